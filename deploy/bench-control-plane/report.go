package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// result is what was measured at one size. Times are in ms where they are not in
// seconds, memory in MiB.
type result struct {
	Services  int `json:"services"`
	Endpoints int `json:"endpoints"`
	Pods      int `json:"pods"`
	Sidecars  int `json:"sidecars"`

	FillSeconds   float64 `json:"fillSeconds"`   // to make the objects, which is the API server's
	ReadySeconds  float64 `json:"readySeconds"`  // from the start of the control plane until it serves
	SyncedSeconds float64 `json:"syncedSeconds"` // from the start of the sidecars until all have all

	Changes          int     `json:"changes"`
	ChangesPerSecond float64 `json:"changesPerSecond"`
	// From when a change was sent to the API server to the acknowledgement of the last
	// sidecar that uses the Service.
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
	// How much of that the API server took before it answered.
	PatchP50 float64 `json:"patchP50"`
	PatchP99 float64 `json:"patchP99"`
	// As the control plane measures it, from when it saw the change: the end of the
	// bucket.
	PropagationP99 float64 `json:"propagationP99"`

	CPU         float64 `json:"cpu"` // of the control plane, seconds a second
	CPUSidecars float64 `json:"cpuSidecars"`
	CPUAPI      float64 `json:"cpuAPI"` // kube-apiserver and etcd
	// Of programs that have nothing to do with it: where it is more than a little, the
	// times are those of a machine that has something else to do.
	CPUOthers float64 `json:"cpuOthers"`
	// How long threads of the control plane were ready to run and did not, seconds a
	// second.
	Waited float64 `json:"waited"`

	RSSEmpty float64 `json:"rssEmpty"` // before a sidecar was connected
	RSS      float64 `json:"rss"`
	RSSMost  float64 `json:"rssMost"`
	Heap     float64 `json:"heap"`

	BytesStart     float64 `json:"bytesStart"`     // a sidecar, until it has all
	BytesPerSecond float64 `json:"bytesPerSecond"` // a sidecar, with changes
	SidecarRSS     float64 `json:"sidecarRSS"`     // of one that is real

	Updates float64 `json:"updates"` // of endpoints alone
	Builds  float64 `json:"builds"`  // of the whole mesh
}

// results is control-plane.json.
type results struct {
	Machine   string             `json:"machine"`
	Plan      string             `json:"plan"`
	Sizes     map[string]*result `json:"-"`
	Targets   map[string]float64 `json:"targets"`
	Injection *injected          `json:"injection,omitempty"`
}

// injected is what the injector's own benchmark says.
type injected struct {
	PodsPerSecond float64 `json:"podsPerSecond"`
	P99           float64 `json:"p99"`
}

func targets() map[string]float64 {
	return map[string]float64{"p99": 500, "rssMost": 1536, "sidecarRSSGrowth": 1.1, "podsPerSecond": 200, "injectionP99": 10}
}

// MarshalJSON puts the sizes beside the rest.
func (r results) MarshalJSON() ([]byte, error) {
	type rest results
	text, err := json.Marshal(rest(r))
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(text, &out); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	for size, figures := range r.Sizes {
		out[size] = figures
	}
	return json.Marshal(out)
}

// injection runs the benchmark of the injector's webhook, where there is one.
func injection(ctx context.Context, root string) (*injected, error) {
	files, err := filepath.Glob(filepath.Join(root, "injector", "internal", "webhook", "*_test.go"))
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(files, func(path string) bool {
		text, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(text), "func BenchmarkInjection(")
	}) {
		return nil, errors.New("injector/internal/webhook has no BenchmarkInjection")
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-bench", "^BenchmarkInjection$", "-benchtime", "3s", "./injector/internal/webhook")
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, "BenchmarkInjection") {
			continue
		}
		var r injected
		f := strings.Fields(line)
		for i := 2; i+1 < len(f); i += 2 {
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				continue
			}
			switch f[i+1] {
			case "pods/s":
				r.PodsPerSecond = v
			case "ns/op":
				if r.PodsPerSecond == 0 && v > 0 {
					r.PodsPerSecond = 1e9 / v
				}
			case "p99-ms":
				r.P99 = v
			}
		}
		return &r, nil
	}
	return nil, errors.New("injector/internal/webhook has no BenchmarkInjection")
}

// disturbed is from how many processors on that others take figures are marked.
const disturbed = 0.1

// page is docs/bench-control-plane.md.
func page(all results) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	var sizes []*result
	for _, r := range all.Sizes {
		sizes = append(sizes, r)
	}
	slices.SortFunc(sizes, func(a, b *result) int { return a.Services - b.Services })
	line("<!-- Written by make bench-control-plane; edit deploy/bench-control-plane/report.go. -->")
	line("# The control plane at scale\n")
	line("A real kube-apiserver and etcd, the control plane, and the sidecars share one machine: %s.", all.Machine)
	line("%s. A change is the move of one endpoint, patched in an EndpointSlice; one in ten is of", capital(all.Plan))
	line("a Service that a tenth of the sidecars use. The sidecars are delta ADS streams, each with a connection of its own, in one")
	line("other process; they acknowledge at once. Of the pods behind the endpoints only some exist.\n")
	for _, r := range sizes {
		if r.CPUOthers > disturbed {
			line("**DISTURBED: other programs took %.2f processors while %d Services were measured. The times are too long.**\n", r.CPUOthers, r.Services)
		}
	}
	head, rule := "| |", "|---|"
	for _, r := range sizes {
		head += fmt.Sprintf(" %d Services |", r.Services)
		rule += "--:|"
	}
	line("%s target |\n%s--:|", head, rule)
	row := func(name, target, format string, value func(*result) float64) {
		cells := "| " + name + " |"
		for _, r := range sizes {
			cells += fmt.Sprintf(" "+format+" |", value(r))
		}
		line("%s %s |", cells, target)
	}
	row("change sent to last acknowledgement, p50 (ms)", "", "%.0f", func(r *result) float64 { return r.P50 })
	row("p99 (ms)", "500", "%.0f", func(r *result) float64 { return r.P99 })
	row("longest (ms)", "", "%.0f", func(r *result) float64 { return r.Max })
	row("of that until the API server has answered, p50 (ms)", "", "%.0f", func(r *result) float64 { return r.PatchP50 })
	row("p99 (ms)", "", "%.0f", func(r *result) float64 { return r.PatchP99 })
	row("from when the control plane saw it, p99 (ms, at most)", "", "%.0f", func(r *result) float64 { return r.PropagationP99 })
	row("changes a second", "100", "%.0f", func(r *result) float64 { return r.ChangesPerSecond })
	row("CPU of the control plane (s/s)", "", "%.2f", func(r *result) float64 { return r.CPU })
	row("CPU of kube-apiserver and etcd (s/s)", "", "%.2f", func(r *result) float64 { return r.CPUAPI })
	row("CPU of all sidecars (s/s)", "", "%.2f", func(r *result) float64 { return r.CPUSidecars })
	row("CPU of other programs (s/s)", "", "%.2f", func(r *result) float64 { return r.CPUOthers })
	row("threads of the control plane waiting for a processor (s/s)", "", "%.2f", func(r *result) float64 { return r.Waited })
	row("memory of the control plane (MiB)", "", "%.0f", func(r *result) float64 { return r.RSS })
	row("at most (MiB)", "1536", "%.0f", func(r *result) float64 { return r.RSSMost })
	row("before a sidecar was connected (MiB)", "", "%.0f", func(r *result) float64 { return r.RSSEmpty })
	row("start until ready (s)", "", "%.1f", func(r *result) float64 { return r.ReadySeconds })
	row("start of all sidecars until they have all (s)", "", "%.1f", func(r *result) float64 { return r.SyncedSeconds })
	row("received by a sidecar at its start (KiB)", "", "%.1f", func(r *result) float64 { return r.BytesStart / 1024 })
	row("received by a sidecar while there are changes (KiB/s)", "", "%.2f", func(r *result) float64 { return r.BytesPerSecond / 1024 })
	row("memory of a real sidecar with as many destinations (MiB)", "flat", "%.1f", func(r *result) float64 { return r.SidecarRSS })
	row("updates of endpoints", "", "%.0f", func(r *result) float64 { return r.Updates })
	row("builds of the whole mesh", "", "%.0f", func(r *result) float64 { return r.Builds })
	if in := all.Injection; in != nil {
		line("\nInjection: %.0f pods/s (target 200), p99 %.1f ms (target 10).", in.PodsPerSecond, in.P99)
	}
	line("\n`make bench-control-plane` repeats it; `BENCH_QUICK=1` takes a few minutes. All figures are in `.cache/bench/control-plane.json`.")
	return b.String()
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
