package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
)

// rate is one measurement of all files.
type rate struct {
	Name    string  `json:"name"`
	To      string  `json:"to"`
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"mbPerSecond"`      // of log files, by the clock
	CPU     float64 `json:"cpuSecondsPerGB"`  // of the process
	PerCore float64 `json:"mbPerCPUSecond"`   // what a whole processor to itself would do
	RSS     float64 `json:"rssMiB"`           // at most
	Wire    float64 `json:"wireBytesPerByte"` // sent for a byte of log file
	Others  float64 `json:"others"`           // processors that other programs had
}

// footprint is one measurement of memory.
type footprint struct {
	Name string  `json:"name"`
	To   string  `json:"to"`
	What string  `json:"what"`
	RSS  float64 `json:"rssMiB"`
	CPU  float64 `json:"cpu"` // seconds a second
	// Arrived is which part of what was written had arrived when the writing ended.
	Arrived float64 `json:"arrived"`
}

// results is collector.json.
type results struct {
	Machine string             `json:"machine"`
	Bytes   int64              `json:"bytes"`
	Lines   int64              `json:"lines"`
	Rounds  int                `json:"rounds"`
	Rates   []rate             `json:"rates"` // of all rounds
	Memory  []footprint        `json:"memory"`
	Targets map[string]float64 `json:"targets"`
	Notes   []string           `json:"notes"`
}

func targets() map[string]float64 {
	return map[string]float64{"mbPerSecondToBulk": 40, "cpuRatioToOpenTelemetry": 1.0 / 3, "rssMiB": 60}
}

func machine() string {
	name := runtime.GOARCH
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				name = strings.TrimSpace(value)
				break
			}
		}
	}
	return fmt.Sprintf("%d processors (%s), Linux, %s", runtime.NumCPU(), name, runtime.Version())
}

func (r *results) add(m rate) { r.Rates = append(r.Rates, m) }

// median is the measurement in the middle by CPU of each contestant, in the order
// in which they ran.
func (r results) median() (out []rate) {
	by := map[string][]rate{}
	var order []string
	for _, m := range r.Rates {
		key := m.Name + m.To
		if by[key] == nil {
			order = append(order, key)
		}
		by[key] = append(by[key], m)
	}
	for _, key := range order {
		ms := by[key]
		slices.SortFunc(ms, func(a, b rate) int {
			switch {
			case a.CPU < b.CPU:
				return -1
			case a.CPU > b.CPU:
				return 1
			}
			return 0
		})
		out = append(out, ms[len(ms)/2])
	}
	return out
}

// rival is the measurement of the other collector that one is compared with: the
// same way out, or OTLP for what has none.
func rival(ms []rate, to string) (rate, bool) {
	for _, want := range []string{to, "otlp"} {
		for _, m := range ms {
			if m.Name == "otelcol" && m.To == want {
				return m, true
			}
		}
	}
	return rate{}, false
}

var situations = map[string]string{"paced": "at 10 MB/s", "idle": "5,000 idle files, nothing written", "down": "at 10 MB/s, the backend down"}

// table is for the terminal and for the page: Markdown that reads as it stands.
func (r results) table() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	ms := r.median()
	line("| %-10s | %-8s | MB/s | CPU s/GB | MB per CPU s | RSS MiB | sent/read | CPU beside OpenTelemetry's |", "collector", "to")
	line("|%s|%s|-----:|---------:|-------------:|--------:|----------:|---------------------------:|", strings.Repeat("-", 12), strings.Repeat("-", 10))
	for _, m := range ms {
		ratio := ""
		if o, ok := rival(ms, m.To); ok && m.Name != "otelcol" {
			ratio = fmt.Sprintf("%.2f (of %s)", m.CPU/o.CPU, o.To)
		}
		line("| %-10s | %-8s | %4.1f | %8.1f | %12.1f | %7.0f | %9.2f | %26s |", m.Name, m.To, m.Rate, m.CPU, m.PerCore, m.RSS, m.Wire, ratio)
	}
	line("\n| %-10s | %-34s | RSS MiB at most | processors | arrived at the end |", "collector", "situation")
	line("|%s|%s|----------------:|-----------:|-------------------:|", strings.Repeat("-", 12), strings.Repeat("-", 36))
	for _, m := range r.Memory {
		arrived := ""
		if m.What == "paced" {
			arrived = fmt.Sprintf("%.0f %%", 100*m.Arrived)
		}
		line("| %-10s | %-34s | %15.0f | %10.3f | %18s |", m.Name, situations[m.What], m.RSS, m.CPU, arrived)
	}
	return b.String()
}

// disturbed is from how many processors on that others take figures are marked.
const disturbed = 0.1

// page is docs/bench-collector.md.
func (r results) page() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("<!-- Written by make bench-collector; edit deploy/bench-collector/report.go. -->")
	line("# What shipping a node's logs costs\n")
	line("Measured on %s. %d MB of plain CRI lines (%d of them,", r.Machine, r.Bytes/1e6, r.Lines)
	line("%d bytes each) lie in the files of %d containers and are read from their beginning until the last record has", r.Bytes/max(r.Lines, 1), containers)
	line("arrived, with the Kubernetes fields of the path on each. The collector has one processor and GOMAXPROCS=1; the")
	line("server, which counts and stores nothing, has the other. Figures are of the median of %d rounds by CPU. MB are", r.Rounds)
	line("1,000,000 bytes of log files.\n")
	for _, m := range r.median() {
		if m.Others > disturbed {
			line("**DISTURBED: other programs took up to %.1f processors while this was measured. MB/s are too few; CPU seconds are less disturbed.**\n", r.most())
			break
		}
	}
	line("%s", r.table())
	line("Wanted: at least %.0f MB/s to Elasticsearch's bulk API, at most a third of the OpenTelemetry Collector's CPU, at", r.Targets["mbPerSecondToBulk"])
	line("most %.0f MiB throughout. `MB per CPU s` is what a processor would do that nobody else uses.\n", r.Targets["rssMiB"])
	for _, n := range r.Notes {
		line("- %s", n)
	}
	return b.String()
}

func (r results) most() (most float64) {
	for _, m := range r.median() {
		most = max(most, m.Others)
	}
	return most
}
