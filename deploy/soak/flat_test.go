package main

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
)

// rows are two sidecars, of which the second grows by so many goroutines a
// sample, amid noise.
func rows(n int, leak float64) [][]sample {
	r := rand.New(rand.NewPCG(1, 2))
	var out [][]sample
	for i := range n {
		noise := int(r.NormFloat64() * 10)
		out = append(out, []sample{{40, 200 + noise, 150}, {40, 200 + noise + int(leak*float64(i)), 150}})
	}
	return out
}

func TestFlat(t *testing.T) {
	if err := flat(rows(40, 0)); err != nil {
		t.Errorf("noise: %v", err)
	}
	if err := flat(rows(40, 3)); err == nil || !strings.Contains(err.Error(), "goroutines of the peer's sidecar grow") {
		t.Errorf("a leak: %v", err)
	}
	if err := flat(rows(8, 0)); err == nil {
		t.Error("eight samples prove nothing")
	}
}

// What fills up in the first half, and one burst in the second, are no leak.
func TestFlatForgivesTheBeginningAndABurst(t *testing.T) {
	all := rows(40, 0)
	for i := range 15 {
		all[i][0].mib = float64(i)
	}
	all[35][0].mib = 300
	if err := flat(all); err != nil {
		t.Error(err)
	}
}

func TestTrend(t *testing.T) {
	if got := trend([]float64{1, 3, 5, 100, 9}); math.Abs(got-2) > 0.5 {
		t.Errorf("%v; want about 2", got)
	}
	if got := median([]float64{4, 1, 3, 2}); got != 2.5 {
		t.Errorf("%v; want 2.5", got)
	}
}

func TestReadings(t *testing.T) {
	if got := residentMiB("Name:\tsidecar\nVmRSS:\t   2048 kB\nVmData: 1 kB\n"); got != 2 {
		t.Errorf("%v MiB; want 2", got)
	}
	if got := gauge("# HELP go_goroutines x\ngo_goroutines_total 9\ngo_goroutines 17\n", "go_goroutines"); got != 17 {
		t.Errorf("%d goroutines; want 17", got)
	}
}
