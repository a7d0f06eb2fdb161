package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// row is a peer's line in a table, as text.
type row []string

var columns = row{"", "CPU us", "min..max", "ours/it", "req/s", "CPU us at 1k/s", "p50", "p99", "least p99", "p99.9", "RSS MB", "64 idle", "10k idle"}

// rows are the lines of a scenario; those of peers without figures have a
// reason after their name.
func rows(figs map[string]*figures) []row {
	var out []row
	ours := figs["ours"]
	mb := func(kb int) string {
		if kb == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f", float64(kb)/1024)
	}
	for _, p := range peers {
		f := figs[p.name]
		if f == nil {
			continue
		}
		if f.failed != "" {
			out = append(out, row{p.name, brief(f.failed)})
			continue
		}
		r := row{p.name, "-", "-", "-", fmt.Sprintf("%.0f", f.rps.Median())}
		if p.name != "direct" {
			least, most := f.cpu.Spread()
			r[1], r[2] = fmt.Sprintf("%.1f", f.cpu.Median()), fmt.Sprintf("%.1f..%.1f", least, most)
			if ours != nil && ours.failed == "" && p.name != "ours" {
				ratio, least, most := measure.Ratio(ours.cpu, f.cpu)
				r[3] = fmt.Sprintf("%.2fx (%.2f..%.2f)", ratio, least, most)
			}
		}
		if l := f.open[comparedRate]; l != nil {
			cpu := "-"
			if p.name != "direct" {
				cpu = fmt.Sprintf("%.1f", l.cpu.Median())
			}
			least, _ := l.p99.Spread()
			r = append(r, cpu, fmt.Sprintf("%.0f", l.p50.Median()), fmt.Sprintf("%.0f", l.p99.Median()), fmt.Sprintf("%.0f", least), fmt.Sprintf("%.0f", micros(l.all.Quantile(0.999))))
		} else {
			r = append(r, "-", "-", "-", "-", "-")
		}
		idle := mb(f.rss10k)
		if f.idleFailed != "" {
			idle = "failed"
		}
		if f.rss10k != 0 && f.idle != 10_000 {
			idle += fmt.Sprintf(" (%d)", f.idle)
		}
		out = append(out, append(r, mb(f.rss), mb(f.rss64), idle))
	}
	return out
}

// brief is the beginning of a reason, for a table.
func brief(reason string) string {
	line, _, _ := strings.Cut(reason, "\n")
	if len(line) > 160 {
		line = strings.ToValidUTF8(line[:160], "") + " ..."
	}
	return line
}

// table is a scenario for a terminal.
func table(s scenario, figs map[string]*figures) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s; CPU and req/s with %d in flight; then at %d/s, latency in us from when it was due\n", s.name, s.title, s.conns*s.streams, comparedRate)
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  "+strings.Join(columns, "\t"))
	for _, r := range rows(figs) {
		if len(r) == 2 {
			continue
		}
		fmt.Fprintln(w, "  "+strings.Join(r, "\t"))
	}
	_ = w.Flush() // a builder takes everything
	for _, r := range rows(figs) {
		if len(r) == 2 {
			fmt.Fprintf(&b, "  %s: NO FIGURES: %s\n", r[0], r[1])
		}
	}
	for _, text := range idleFailures(figs) {
		fmt.Fprintf(&b, "  %s\n", text)
	}
	for _, c := range comparisons(s.name, figs) {
		fmt.Fprintf(&b, "  %s\n", c)
	}
	return b.String()
}

// idleFailures are the peers that did not hold many connections.
func idleFailures(figs map[string]*figures) []string {
	var out []string
	for _, p := range peers {
		if f := figs[p.name]; f != nil && f.failed == "" && f.idleFailed != "" {
			out = append(out, fmt.Sprintf("%s: NO FIGURES with many idle connections: %s", p.name, brief(f.idleFailed)))
		}
	}
	return out
}

// comparisons are the targets of a scenario with what became of them.
func comparisons(scenario string, figs map[string]*figures) []string {
	var out []string
	for _, t := range targets {
		if t.scenario != scenario {
			continue
		}
		c := compare(t, figs)
		what := fmt.Sprintf("%s of ours is at most %.2fx %s's", t.figure, t.atMost, t.peer)
		switch {
		case c.missing != "":
			out = append(out, fmt.Sprintf("?     %s: no ratio: %s", what, brief(c.missing)))
		case c.met():
			out = append(out, fmt.Sprintf("PASS  %s: %.2fx (%s)", what, c.ratio, c.detail))
		default:
			out = append(out, fmt.Sprintf("MISS  %s: %.2fx (%s)", what, c.ratio, c.detail))
		}
	}
	ours := figs["ours"]
	if ours == nil || ours.failed != "" {
		return out
	}
	limit := func(what string, value, most float64, unit string) {
		word := "PASS"
		if value > most {
			word = "MISS"
		}
		out = append(out, fmt.Sprintf("%s  %s: %.1f %s, at most %.1f", word, what, value, unit, most))
	}
	if scenario == "h1_1k" {
		limit("memory of ours without connections", float64(ours.rss)/1024, maxIdleKB/1024, "MB")
	}
	if ours.idleFailed != "" {
		return append(out, fmt.Sprintf("?     heap of ours for each of %d idle connections: %s", ours.idle, brief(ours.idleFailed)))
	}
	if ours.idle > 0 {
		limit(fmt.Sprintf("heap of ours for each of %d idle connections", ours.idle), ours.heap/1024, maxIdleBytes/1024, "KiB")
		out = append(out, fmt.Sprintf("      goroutines of ours for each: %.2f", ours.routines))
	}
	return out
}

// verdicts counts the targets.
func verdicts(all results) string {
	var b strings.Builder
	met, missed, open := 0, 0, 0
	for _, s := range scenarios {
		if all[s.name] == nil {
			continue
		}
		for _, c := range comparisons(s.name, all[s.name]) {
			switch c[0] {
			case 'P':
				met++
			case 'M':
				missed++
			case '?':
				open++
			default:
			}
		}
	}
	fmt.Fprintf(&b, "Targets: %d met, %d missed, %d without figures.", met, missed, open)
	return b.String()
}

// tolerable is the share of the processors that others may take before it must be
// said in the first place.
const tolerable = 0.05

// strangers says how much of the processors other programs have taken.
func strangers(all results) string {
	var shares measure.Rounds
	for _, figs := range all {
		for _, f := range figs {
			shares = append(shares, f.strangers...)
		}
	}
	if len(shares) == 0 {
		return ""
	}
	_, most := shares.Spread()
	text := fmt.Sprintf("Programs other than the benchmark's took %.0f %% of the two processors (median of all rounds; at most %.0f %%).", 100*shares.Median(), 100*most)
	if shares.Median() > tolerable {
		text = "DISTURBED: " + text + " Latencies are theirs as much as the proxies'; compare ratios of CPU only, and run it again on a quiet machine."
	}
	return text
}

// machine is where it was measured.
type machine struct {
	processor, kernel, goVersion string
	date, took                   string
	versions                     [][2]string
}

func machineHere(w *world, took time.Duration) machine {
	m := machine{goVersion: runtime.Version(), date: time.Now().UTC().Format(time.DateOnly), took: took.Round(time.Minute).String(), versions: w.tools.versions}
	m.processor = fmt.Sprintf("%d processors of an unknown kind", workers)
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, _ := strings.Cut(line, ":"); strings.TrimSpace(k) == "model name" {
				m.processor = fmt.Sprintf("%d processors of %s", workers, strings.TrimSpace(v))
				break
			}
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		release, _, _ := strings.Cut(unix.ByteSliceToString(u.Release[:]), "-")
		m.kernel = "Linux " + release + " " + unix.ByteSliceToString(u.Machine[:])
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		m.kernel += " with TCP congestion control " + strings.TrimSpace(string(b))
	}
	return m
}

// writeDocs writes the page and its picture.
func writeDocs(dir string, m machine, p plan, all results) error {
	if err := os.WriteFile(filepath.Join(dir, "bench-sidecar.md"), []byte(page(m, p, all)), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "bench-sidecar.svg"), []byte(picture(p, all)), 0o644)
}
