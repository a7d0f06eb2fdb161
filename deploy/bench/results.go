package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// figures are what was measured of a peer in a scenario.
type figures struct {
	failed string // why there are no figures

	cpu      measure.Rounds // microseconds of the proxy's CPU a request
	cpuStat  measure.Rounds // the same after /proc/<pid>/stat, as a check
	rps      measure.Rounds // requests a second in the closed loop
	switches measure.Rounds // times that a thread of the proxy waited, a request
	// strangers is the share of the processors that programs took which are none of
	// the benchmark's.
	strangers measure.Rounds
	open      map[int]*latency

	rss        int    // KiB resident after the start
	rss64      int    // with 64 connections that have each had an answer
	rss10k     int    // with idle many
	idleFailed string // why rss10k, heap and routines are missing
	idle       int
	logged     float64 // lines in each access log a request; 0 where there is none
	sent       int     // requests so far
	lines      int     // in the access logs so far
	heap       float64 // bytes of heap an idle connection, ours only
	routines   float64 // goroutines an idle connection, ours only
}

// latency is what an open loop of one rate has seen.
type latency struct {
	all      measure.Histogram
	cpu      measure.Rounds // as in the closed loop; a proxy that often wakes up for one request needs more
	p50, p99 measure.Rounds // microseconds, a round
	kept     float64        // share of the rate that was asked, the worst round
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// results are keyed by scenario and peer.
type results map[string]map[string]*figures

// entry is a peer's place in the JSON file. Times are microseconds, memory is
// KiB; p50, p99 and p99.9 are those at 1,000 requests a second.
type entry struct {
	CPU             float64               `json:"cpu_us"`
	CPUStat         float64               `json:"cpu_stat_us,omitempty"`
	RPS             float64               `json:"rps"`
	P50             float64               `json:"p50_us"`
	P99             float64               `json:"p99_us"`
	P999            float64               `json:"p999_us,omitempty"`
	RSS             int                   `json:"rss_kb"`
	RSS64           int                   `json:"rss_64_kb,omitempty"`
	RSS10k          int                   `json:"rss_10k_kb,omitempty"`
	Idle            int                   `json:"idle_connections,omitempty"`
	IdleFailed      string                `json:"idle_failed,omitempty"`
	HeapPerIdle     float64               `json:"heap_bytes_per_idle,omitempty"`
	RoutinesPerIdle float64               `json:"goroutines_per_idle,omitempty"`
	Switches        float64               `json:"waits_per_request,omitempty"`
	Strangers       float64               `json:"strangers_cpu_share"`
	Logged          float64               `json:"log_lines_per_request,omitempty"`
	Spread          map[string][2]float64 `json:"spread,omitempty"`
	At              map[string]atRate     `json:"at,omitempty"`
}

// atRate is an open loop of one rate.
type atRate struct {
	CPU  float64 `json:"cpu_us"`
	P50  float64 `json:"p50_us"`
	P99  float64 `json:"p99_us"`
	P999 float64 `json:"p999_us"`
	Kept float64 `json:"kept"` // least share of the rate that was reached
}

// failure is in the place of a peer that has no figures.
type failure struct {
	Failed string `json:"failed"`
}

// entryOf is what the file says of a peer: an entry, or a failure.
func entryOf(f *figures) any {
	if f.failed != "" {
		return failure{f.failed}
	}
	e := entry{
		CPU: f.cpu.Median(), CPUStat: f.cpuStat.Median(), RPS: f.rps.Median(), RSS: f.rss, RSS64: f.rss64, RSS10k: f.rss10k, Idle: f.idle,
		IdleFailed: f.idleFailed, HeapPerIdle: f.heap, RoutinesPerIdle: f.routines, Switches: f.switches.Median(), Strangers: f.strangers.Median(), Logged: f.logged,
		Spread: map[string][2]float64{}, At: map[string]atRate{},
	}
	for name, r := range map[string]measure.Rounds{"cpu_us": f.cpu, "rps": f.rps} {
		least, most := r.Spread()
		e.Spread[name] = [2]float64{least, most}
	}
	for rate, l := range f.open {
		e.At[strconv.Itoa(rate)] = atRate{l.cpu.Median(), l.p50.Median(), l.p99.Median(), micros(l.all.Quantile(0.999)), l.kept}
	}
	if l := f.open[comparedRate]; l != nil {
		e.P50, e.P99, e.P999 = l.p50.Median(), l.p99.Median(), micros(l.all.Quantile(0.999))
		least, most := l.p99.Spread()
		e.Spread["p99_us"] = [2]float64{least, most}
	}
	return e
}

// comparedRate is the open loop that targets are about, requests a second.
const comparedRate = 1000

// writeJSON replaces the file by what is known so far.
func writeJSON(path string, all results) error {
	out := map[string]map[string]any{}
	for s, peers := range all {
		out[s] = map[string]any{}
		for p, f := range peers {
			out[s][p] = entryOf(f)
		}
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}

// compared is a figure of ours beside a peer's.
type compared struct {
	target
	ratio   float64
	detail  string // what it is the ratio of
	missing string // why there is no ratio
}

func (c compared) met() bool { return c.missing == "" && c.ratio <= c.atMost }

// compare finds what became of a target.
func compare(t target, peers map[string]*figures) compared {
	c := compared{target: t}
	for _, name := range []string{"ours", t.peer} {
		if f := peers[name]; f == nil {
			c.missing = name + " was not asked for"
		} else if f.failed != "" {
			c.missing = name + ": " + f.failed
		}
		if c.missing != "" {
			return c
		}
	}
	us, them := peers["ours"], peers[t.peer]
	switch t.figure {
	case figureCPU:
		ratio, least, most := measure.Ratio(us.cpu, them.cpu)
		c.ratio, c.detail = ratio, fmt.Sprintf("%.2f..%.2f", least, most)
	case figureAdded:
		direct := peers["direct"]
		if direct == nil || direct.failed != "" {
			c.missing = "direct was not measured"
			return c
		}
		// A disturbance adds to a p99 and never takes away: the least of all rounds
		// is the least disturbed.
		added := func(f *figures) float64 {
			least, _ := f.open[comparedRate].p99.Spread()
			base, _ := direct.open[comparedRate].p99.Spread()
			return least - base
		}
		mine, theirs := added(us), added(them)
		c.detail = fmt.Sprintf("%.0f us beside %.0f us", mine, theirs)
		switch taken := slices.Concat(direct.strangers, us.strangers, them.strangers).Median(); {
		case taken > tolerable:
			c.missing = fmt.Sprintf("other programs took %.0f %% of the processors, which says more of them (%s)", 100*taken, c.detail)
		case mine <= 0 || theirs <= 0:
			c.missing = "faster than without a proxy, which is noise (" + c.detail + ")"
		default:
			c.ratio = mine / theirs
		}
	default:
		c.missing = "no such figure"
	}
	if c.ratio <= 0 && c.missing == "" {
		c.missing = "nothing to compare"
	}
	return c
}
