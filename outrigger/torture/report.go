package torture

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const sigterm = syscall.SIGTERM

// line is a result as it is told while the others run.
func line(r Result) string {
	state := "ok"
	switch {
	case r.Skipped != "":
		state = "skipped: " + r.Skipped
	case r.Failed():
		state = "FAILED"
	}
	return fmt.Sprintf("%-18s %-13s %5.1f s  %s", r.Scenario, r.Output, r.Seconds, state)
}

// Table prints the results for people, and below it why what failed did.
func Table(out io.Writer, results []Result) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%-18s %-13s %8s %8s %5s %9s %8s %6s %8s %7s %5s %7s %7s  %s\n",
		"scenario", "output", "written", "arrived", "lost", "explained", "kubelet", "twice", "disorder", "corrupt", "cut", "p50 ms", "p99 ms", "audit")
	var below strings.Builder
	for _, r := range results {
		if r.Scenario == "" {
			continue
		}
		if r.Skipped != "" {
			fmt.Fprintf(&b, "%-18s %-13s skipped: %s\n", r.Scenario, r.Output, r.Skipped)
			continue
		}
		failed := ""
		if r.Failed() {
			failed = "  FAILED"
		}
		fmt.Fprintf(&b, "%-18s %-13s %8d %8d %5d %9d %8d %6d %8d %7d %5d %7.0f %7.0f  %s%s\n",
			r.Scenario, r.Output, r.Written, r.Arrived, r.Lost, r.Explained, r.Kubelet, r.Duplicated, r.Disordered, r.Corrupted, r.Cut, r.P50, r.P99, r.causes(), failed)
		for _, s := range r.Samples {
			fmt.Fprintf(&below, "%s at %s: %s\n", r.Scenario, r.Output, s)
		}
		for _, s := range r.Problems {
			fmt.Fprintf(&below, "%s at %s: %s\n", r.Scenario, r.Output, s)
		}
		if r.AuditOff != 0 {
			fmt.Fprintf(&below, "%s at %s: the audit does not close by %d bytes\n", r.Scenario, r.Output, r.AuditOff)
		}
		if r.Leaked > 0 {
			fmt.Fprintf(&below, "%s at %s: note: %d lines from outside the folder came, through a symbolic link\n", r.Scenario, r.Output, r.Leaked)
		}
	}
	if below.Len() > 0 {
		b.WriteString("\n" + below.String())
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// causes is what the audit says, short.
func (r Result) causes() string {
	var out []string
	for _, cause := range slices.Sorted(maps.Keys(r.Audit)) {
		if n := r.Audit[cause]; n != 0 {
			out = append(out, fmt.Sprintf("%s %d B", cause, n))
		}
	}
	if r.Unequal > 0 && len(out) > 0 {
		out = append(out, fmt.Sprintf("(%d B more than is missing)", r.Unequal))
	}
	if r.Unnamed > 0 {
		out = append(out, fmt.Sprintf("%d rejected unnamed", r.Unnamed))
	}
	if r.Pending != 0 {
		out = append(out, fmt.Sprintf("pending %d B", r.Pending))
	}
	return strings.Join(out, ", ")
}

// Write puts the results into result.json of the folder.
func Write(folder string, results []Result) error {
	b, err := json.MarshalIndent(results, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(folder, "result.json"), append(b, '\n'), 0o644) //nolint:gosec // it is for everybody
}
