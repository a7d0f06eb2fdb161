package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// measured is a peer whose CPU a request was cpu in both of two rounds, and
// whose latency was p99 microseconds.
func measured(cpu, p99 float64) *figures {
	l := &latency{p50: measure.Rounds{p99 / 2, p99 / 2}, p99: measure.Rounds{p99, p99}, kept: 1}
	l.all.Record(time.Duration(2*p99) * time.Microsecond)
	return &figures{
		cpu: measure.Rounds{cpu, cpu}, cpuStat: measure.Rounds{cpu, cpu}, rps: measure.Rounds{1000, 3000}, switches: measure.Rounds{1, 1},
		open: map[int]*latency{comparedRate: l}, rss: 15 << 10, rss64: 16 << 10, rss10k: 64 << 10, idle: 9800, heap: 900, routines: 1,
	}
}

func example() results {
	return results{"h1_1k": {
		"direct": {rps: measure.Rounds{9000, 9000}, open: map[int]*latency{comparedRate: {p50: measure.Rounds{50, 50}, p99: measure.Rounds{100, 100}, kept: 1}}},
		"relay":  measured(20, 150), "haproxy": measured(30, 180), "envoy": measured(100, 300), "ours": measured(22, 250),
		"nginx": {failed: "not measured: not installed: no network\nand more"},
	}}
}

// TestJSONHasTheAgreedShape: others read these names.
func TestJSONHasTheAgreedShape(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sidecar.json")
	if err := writeJSON(path, example()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]map[string]map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	ours := got["h1_1k"]["ours"]
	for name, want := range map[string]float64{
		"cpu_us": 22, "rps": 2000, "p50_us": 125, "p99_us": 250, "rss_kb": 15 << 10, "rss_64_kb": 16 << 10, "rss_10k_kb": 64 << 10, "idle_connections": 9800,
	} {
		if ours[name] != want {
			t.Errorf("%s is %v, want %v", name, ours[name], want)
		}
	}
	if d := cmp.Diff(map[string]any{"cpu_us": []any{22.0, 22.0}, "rps": []any{1000.0, 3000.0}, "p99_us": []any{250.0, 250.0}}, ours["spread"]); d != "" {
		t.Error(d)
	}
	if f, _ := got["h1_1k"]["nginx"]["failed"].(string); !strings.Contains(f, "no network") || len(got["h1_1k"]["nginx"]) != 1 {
		t.Errorf("nginx: %v", got["h1_1k"]["nginx"])
	}
}

// TestTargetsSayWhatBecameOfThem: met, missed, or why there is no ratio; latency
// is compared by what is added to none at all: 150 us beside 200.
func TestTargetsSayWhatBecameOfThem(t *testing.T) {
	all := example()
	got := strings.Join(comparisons("h1_1k", all["h1_1k"]), "\n")
	want := `PASS  CPU of ours is at most 1.15x relay's: 1.10x (1.10..1.10)
PASS  CPU of ours is at most 0.90x haproxy's: 0.73x (0.73..0.73)
PASS  CPU of ours is at most 0.40x envoy's: 0.22x (0.22..0.22)
MISS  p99 added at 1,000/s of ours is at most 0.50x envoy's: 0.75x (150 us beside 200 us)
PASS  memory of ours without connections: 15.0 MB, at most 20.0
PASS  heap of ours for each of 9800 idle connections: 0.9 KiB, at most 1.0
      goroutines of ours for each: 1.00`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	all["h1_1k"]["envoy"].open[comparedRate].p99 = measure.Rounds{400, 90}
	if got := comparisons("h1_1k", all["h1_1k"])[3]; !strings.HasSuffix(got, "no ratio: faster than without a proxy, which is noise (150 us beside -10 us)") {
		t.Errorf("faster than without a proxy: %s", got)
	}
	all["h1_1k"]["envoy"].open[comparedRate].p99 = measure.Rounds{300, 300}
	for _, name := range []string{"direct", "envoy", "ours"} {
		all["h1_1k"][name].strangers = measure.Rounds{0.01, 0.5, 0.4}
	}
	if got := comparisons("h1_1k", all["h1_1k"])[3]; !strings.Contains(got, "no ratio: other programs took 40 % of the processors") {
		t.Errorf("on a busy machine: %s", got)
	}
	all["h1_1k"]["envoy"] = &figures{failed: "round 2: not a 200"}
	delete(all["h1_1k"], "relay")
	got = strings.Join(comparisons("h1_1k", all["h1_1k"])[:3], "\n")
	want = `?     CPU of ours is at most 1.15x relay's: no ratio: relay was not asked for
PASS  CPU of ours is at most 0.90x haproxy's: 0.73x (0.73..0.73)
?     CPU of ours is at most 0.40x envoy's: no ratio: envoy: round 2: not a 200`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestFailuresAreLoudAndWithoutNumbers: in the table, on the page and in the
// picture.
func TestFailuresAreLoudAndWithoutNumbers(t *testing.T) {
	all := example()
	p := plan{scenarios: scenarios[:1], rounds: 2, length: time.Second}
	for _, o := range peers {
		if all["h1_1k"][o.name] != nil {
			p.peers = append(p.peers, o)
		}
	}
	const reason = "not measured: not installed: no network"
	if text := table(scenarios[0], all["h1_1k"]); !strings.Contains(text, "nginx: NO FIGURES: "+reason+"\n") {
		t.Errorf("the table does not say it:\n%s", text)
	}
	text := page(machine{}, p, all)
	if !strings.Contains(text, "**No figures for nginx**: "+reason) || !strings.Contains(text, "| HTTP/1.1, 1 KiB | **1.10** (1.10 to 1.10) | - |") {
		t.Errorf("the page does not say it:\n%s", text)
	}
	drawn := picture(p, all)
	if strings.Count(drawn, "<rect") != 4 || strings.Count(drawn, "no figures") != 1 {
		t.Errorf("the picture has not four bars and one gap:\n%s", drawn)
	}
	for dec := xml.NewDecoder(strings.NewReader(drawn)); ; {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the picture is not XML: %v", err)
		}
	}
}

func TestEnvironmentIsChecked(t *testing.T) {
	f := func(want string, env ...string) plan {
		t.Helper()
		p, err := parse(nil, func(name string) string {
			for i := 0; i < len(env); i += 2 {
				if env[i] == name {
					return env[i+1]
				}
			}
			return ""
		})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", env, err, want)
		}
		return p
	}
	f(`"h2" is none of h1_1k, h1_64k`, "BENCH_ONLY", "h1_1k,h2")
	f(`"ngnix" is none of direct, relay, nginx`, "BENCH_PEERS", "ngnix")
	f("BENCH_ROUNDS=0: write a number from 1", "BENCH_ROUNDS", "0")
	f("BENCH_DOCS=yes: write 0 or 1", "BENCH_DOCS", "yes")
	if p := f(""); !p.docs || p.rounds != 5 || len(p.scenarios) != len(scenarios) {
		t.Errorf("a full run: %d rounds, docs %v", p.rounds, p.docs)
	}
	if p := f("", "BENCH_ONLY", "tcp,h1_1k", "BENCH_SECONDS", "3"); p.docs || len(p.scenarios) != 2 || p.scenarios[0].name != "h1_1k" || p.length != 3*time.Second {
		t.Errorf("a part: %+v", p)
	}
}

// TestEveryTargetNamesWhatIsMeasured: a target of a scenario or a peer that does
// not exist would be met by nobody noticing.
func TestEveryTargetNamesWhatIsMeasured(t *testing.T) {
	known := map[string]bool{figureCPU: true, figureAdded: true}
	for _, s := range scenarios {
		known[s.name] = true
	}
	for _, p := range peers {
		known[p.name] = true
	}
	for _, g := range targets {
		for _, name := range []string{g.scenario, g.peer, g.figure} {
			if !known[name] {
				t.Errorf("target %+v: there is no %s", g, name)
			}
		}
	}
}

// TestUseAndMemoryOfARealProcess: against a shell that burns CPU in a child.
func TestUseAndMemoryOfARealProcess(t *testing.T) {
	p, err := start(t.TempDir(), "burn", nil, "/bin/sh", "-c", `(while :; do :; done) & echo ready; wait`)
	if err != nil {
		t.Fatal(err)
	}
	defer p.stop()
	deadline := time.Now().Add(10 * time.Second)
	for {
		u, err := use([]*process{p})
		if err != nil {
			t.Fatal(err)
		}
		if u.cpu > 100*time.Millisecond {
			if d := u.cpu - u.stat; d < -50*time.Millisecond || d > 50*time.Millisecond {
				t.Errorf("the clock says %s, /proc says %s", u.cpu, u.stat)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a busy child has used %s", u.cpu)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if kb, err := resident([]*process{p}); err != nil || kb < 200 {
		t.Errorf("resident: %d KiB, %v", kb, err)
	}
	children := tree(p.cmd.Process.Pid)
	p.stop()
	for _, pid := range children {
		lives := func() bool { // a zombie waits only for its new parent
			b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
			return err == nil && !strings.Contains(string(b), ") Z ")
		}
		for lives() {
			if time.Now().After(deadline) {
				t.Fatalf("process %d lives on", pid)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	if n, err := countLines(p.stdout); n != 1 || err != nil {
		t.Errorf("%d lines, %v", n, err)
	}
}
