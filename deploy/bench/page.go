package main

import (
	"fmt"
	"strings"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// page is docs/bench-sidecar.md: ratios first, and no time without those of the
// peers beside it.
func page(m machine, p plan, all results) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("<!-- Written by make bench-sidecar; edit deploy/bench/page.go. -->")
	line("# The sidecar beside its peers\n")
	line("What a proxy costs is the CPU time that it takes for a request. Below, that of the sidecar is compared with the time that")
	line("others take for the same requests in the same run, on the same two processors. Times by themselves say little: they are")
	line("those of one machine. `make bench-sidecar` repeats all of it on yours.\n")
	line("![CPU time a request, relative to a raw TCP relay](bench-sidecar.svg)\n")

	if s := strangers(all); strings.HasPrefix(s, "DISTURBED") {
		line("**%s**\n", s)
	}
	line("## CPU a request: ours as a share of theirs\n")
	line("Ratio of the medians; in brackets, the smallest and the largest ratio of a round. Below 1 the sidecar takes less.\n")
	var others []peer
	for _, o := range p.peers {
		if o.name != "ours" && o.name != "direct" {
			others = append(others, o)
		}
	}
	head, rule := "| scenario |", "|---|"
	for _, o := range others {
		head += " " + o.title + " |"
		rule += "--:|"
	}
	line("%s\n%s", head, rule)
	for _, s := range p.scenarios {
		figs := all[s.name]
		cells := "| " + s.title + " |"
		for _, o := range others {
			cells += " " + share(figs["ours"], figs[o.name]) + " |"
		}
		line("%s", cells)
	}

	line("\n## Targets\n")
	line("| | | |\n|---|---|---|")
	for _, s := range p.scenarios {
		for _, v := range comparisons(s.name, all[s.name]) {
			verdict, text := strings.TrimSpace(v[:6]), v[6:]
			if verdict == "?" {
				verdict = "no figures"
			}
			line("| `%s` | %s | %s |", s.name, verdict, text)
		}
	}

	for _, s := range p.scenarios {
		line("\n## %s\n", s.title)
		about := fmt.Sprintf("`%s`: %d connections", s.name, s.conns)
		if s.streams > 1 {
			about += fmt.Sprintf(" with %d streams each", s.streams)
		}
		if s.unit != "request" {
			about += "; a request is a " + s.unit
		}
		line("%s. Latencies in us.\n", about)
		var missing []string
		line("| %s |\n|---%s|", strings.Join(columns, " | "), strings.Repeat("|--:", len(columns)-1))
		for _, r := range rows(all[s.name]) {
			if len(r) == 2 {
				missing = append(missing, fmt.Sprintf("**No figures for %s**: %s", r[0], r[1]))
				continue
			}
			line("| %s |", strings.Join(r, " | "))
		}
		for _, text := range missing {
			line("\n%s", text)
		}
		for _, text := range idleFailures(all[s.name]) {
			line("\n%s", text)
		}
		if l := loads(s, all[s.name]); l != "" {
			line("\n%s", l)
		}
	}

	line("\n## How it is measured\n")
	line("- %s, %s, %s, %s; on %s, in %s. Everything runs on loopback and shares two processors: load, upstream and proxy.", m.processor, m.kernel, m.goVersion, "GOMAXPROCS and workers of each proxy: "+fmt.Sprint(workers), m.date, m.took)
	if s := strangers(all); s != "" {
		line("- %s", strings.TrimPrefix(s, "DISTURBED: "))
	}
	line("- %d rounds. In each, every peer has its turn: %s of a closed loop with all connections busy, from which CPU and requests a second", p.rounds, p.length)
	line("  are taken, then an open loop at each fixed rate, from which latencies are taken. A round begins at another peer each time.")
	line("- CPU is the scheduler's clock of the proxy's processes (`clock_getcpuclockid`), all threads and children, both proxies of a")
	line("  pair; `/proc/<pid>/stat` is read beside it and is in the JSON file. What load and upstream use is not in it.")
	line("- Latency in the open loop counts from when a request was due, not from when it could be sent, so that a slow answer is not")
	line("  hidden by those that it held up. p50 and p99 are medians of rounds, p99.9 is of all rounds together. What a proxy adds to p99")
	line("  is taken from its least p99 of all rounds and the least without a proxy: what disturbs the machine adds and never takes away.")
	line("- Every answer is checked: status, length, and of gRPC the status in the trailers. One wrong answer, and the peer has no figures.")
	line("- Memory is the resident memory of a new process (the sum where there are several), without connections, with 64 and with as")
	line("  many idle connections as the table says, each of which has had one answer. 10,000 need 20,000 file descriptors and some in")
	line("  a proxy that does not pool, so there are fewer where the system allows no more.")
	line("- Heap of ours is the least of %d readings of its own metric, so that it is little more than what is in use.", readings)
	line("- TLS is version 1.3 on every pair, both sides with ECDSA P-256, over connections that are kept. nginx and HAProxy are told to")
	line("  use AES-128-GCM, which the others choose.")
	line("\n## What each does\n")
	for _, o := range p.peers {
		line("- %s (`%s`): %s.", o.title, o.name, o.how)
	}
	line("\nVersions: %s.\n", versions(m))
	line("What is not fair, and to whom: the relay reads nothing of what it carries, and on HTTP/2 connections it carries many messages at")
	line("once. `httputil.ReverseProxy` keeps no log and no metrics. The sidecar's log line has about twice the fields of the others',")
	line("and it alone takes its routes and its breaker from a control plane that runs meanwhile. HAProxy writes each line by itself")
	line("because it has no log file of its own; the others collect lines.")
	if short := unlogged(p, all); short != "" {
		line("\n%s", short)
	}
	return b.String()
}

func share(ours, it *figures) string {
	switch {
	case ours == nil || ours.failed != "" || it == nil || it.failed != "":
		return "-"
	default:
		ratio, least, most := measure.Ratio(ours.cpu, it.cpu)
		return fmt.Sprintf("**%.2f** (%.2f to %.2f)", ratio, least, most)
	}
}

// loads are the latencies at rates other than the compared one.
func loads(s scenario, figs map[string]*figures) string {
	var out []string
	for _, rate := range s.rates {
		if rate == comparedRate {
			continue
		}
		for _, p := range peers {
			f := figs[p.name]
			if f == nil || f.failed != "" || f.open[rate] == nil {
				continue
			}
			l := f.open[rate]
			text := fmt.Sprintf("%s %.0f / %.0f / %.0f", p.name, l.p50.Median(), l.p99.Median(), micros(l.all.Quantile(0.999)))
			if l.kept < 0.98 {
				text += fmt.Sprintf(" (reached only %.0f %% of the rate)", 100*l.kept)
			}
			out = append(out, text)
		}
		if len(out) > 0 {
			return fmt.Sprintf("At %d/s, p50 / p99 / p99.9 in us: %s.", rate, strings.Join(out, "; "))
		}
	}
	return ""
}

// unlogged names those whose access logs lack lines: who drops a line saves its
// cost.
func unlogged(p plan, all results) string {
	var out []string
	for _, s := range p.scenarios {
		if !s.lineEach() {
			continue
		}
		for _, o := range p.peers {
			if f := all[s.name][o.name]; f != nil && f.failed == "" && f.logged > 0 && f.logged < 0.99 {
				out = append(out, fmt.Sprintf("%s in `%s` %.0f %%", o.title, s.name, 100*(1-f.logged)))
			}
		}
	}
	if out == nil {
		return ""
	}
	return "Lines that their access logs lack under the closed loop, and what these would have cost: " + strings.Join(out, "; ") + "."
}

func versions(m machine) string {
	out := make([]string, 0, len(m.versions))
	for _, v := range m.versions {
		out = append(out, v[0]+" ("+v[1]+")")
	}
	return strings.Join(append(out, m.goVersion), ", ")
}
