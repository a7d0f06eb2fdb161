package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// sample is what a sidecar holds at one moment.
type sample struct {
	mib         float64 // resident memory
	goroutines  int
	descriptors int
}

func describe(all []sample) string {
	var parts []string
	for i, s := range all {
		parts = append(parts, fmt.Sprintf("%s %.1f MiB, %d goroutines, %d descriptors", sidecarNames[i], s.mib, s.goroutines, s.descriptors))
	}
	return strings.Join(parts, "; ")
}

// What a measure may gain over the second half of the run and be flat: a tenth
// of its middle value, or this much where that is less.
const (
	floorMiB         = 4
	floorGoroutines  = 40
	floorDescriptors = 40
)

// flat says what grows over the second half of the samples: the first half is
// for pools and tables to fill. The trend is the median of the slopes between
// all pairs of samples (Theil and Sen), which a burst does not bend as it bends
// least squares.
func flat(table [][]sample) error {
	half := table[len(table)/2:]
	if len(half) < 5 {
		return fmt.Errorf("%d samples in the second half: at least 5; run longer", len(half))
	}
	var grown error
	for i, name := range sidecarNames {
		for _, m := range []struct {
			name  string
			floor float64
			value func(sample) float64
		}{
			{"MiB", floorMiB, func(s sample) float64 { return s.mib }},
			{"goroutines", floorGoroutines, func(s sample) float64 { return float64(s.goroutines) }},
			{"descriptors", floorDescriptors, func(s sample) float64 { return float64(s.descriptors) }},
		} {
			var values []float64
			for _, row := range half {
				values = append(values, m.value(row[i]))
			}
			gain, allowed := trend(values)*float64(len(values)-1), max(m.floor, median(values)/10)
			fmt.Printf("%-8s %-12s median %8.1f, trend over the second half %+7.1f, allowed %+6.1f\n", name, m.name, median(values), gain, allowed)
			if gain > allowed {
				grown = errors.Join(grown, fmt.Errorf("%s of the %s's sidecar grow: %+.1f over the second half, %.1f are allowed", m.name, name, gain, allowed))
			}
		}
	}
	return grown
}

// trend is the median slope, a step.
func trend(v []float64) float64 {
	var slopes []float64
	for i := range v {
		for j := i + 1; j < len(v); j++ {
			slopes = append(slopes, (v[j]-v[i])/float64(j-i))
		}
	}
	return median(slopes)
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// residentMiB reads VmRSS of a process's status.
func residentMiB(status string) float64 {
	_, rest, ok := strings.Cut(status, "VmRSS:")
	if !ok {
		return 0
	}
	kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	if err != nil {
		return 0
	}
	return kib / 1024
}

// gauge is the value of a Prometheus metric without labels; 0 where it is
// missing.
func gauge(metrics, name string) int {
	for line := range strings.Lines(metrics) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			f, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				return 0
			}
			return int(f)
		}
	}
	return 0
}

// take reads what a process holds.
func take(pid int, metrics string) sample {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // zero where it has ended, which dead says
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return sample{mib: residentMiB(string(status)), goroutines: gauge(metrics, "go_goroutines"), descriptors: len(fds)}
}
