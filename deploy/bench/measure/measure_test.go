package measure

import (
	"testing"
	"time"
)

// TestHistogramIsExactToItsBuckets: a quantile is never below the true one, and
// at most 1/128 above it.
func TestHistogramIsExactToItsBuckets(t *testing.T) {
	var h Histogram
	const n = 100_000
	for i := 1; i <= n; i++ {
		h.Record(time.Duration(i) * time.Microsecond)
	}
	f := func(q float64, want time.Duration) {
		t.Helper()
		got := h.Quantile(q)
		if got < want || got > want+want/128 {
			t.Errorf("quantile %v is %v, want %v or up to 1/128 more", q, got, want)
		}
	}
	f(0.5, 50*time.Millisecond)
	f(0.99, 99*time.Millisecond)
	f(0.999, 99_900*time.Microsecond)
	f(1, 100*time.Millisecond)
	f(0, time.Microsecond)
	if h.Count() != n {
		t.Errorf("count %d, want %d", h.Count(), n)
	}
}

func TestHistogramBucketsJoin(t *testing.T) {
	for i := range magnitudes*steps - 1 {
		if b := bucket(highest(i)); b != i {
			t.Fatalf("the highest value %d of bucket %d is counted in %d", highest(i), i, b)
		}
		if b := bucket(highest(i) + 1); b != i+1 {
			t.Fatalf("value %d is counted in bucket %d, want %d", highest(i)+1, b, i+1)
		}
	}
}

func TestHistogramEdges(t *testing.T) {
	var h, other Histogram
	if q := h.Quantile(0.99); q != 0 {
		t.Errorf("quantile of nothing is %v", q)
	}
	h.Record(-time.Second)
	if q := h.Quantile(1); q != 0 {
		t.Errorf("a duration below zero counts as %v", q)
	}
	other.Record(24 * time.Hour)
	h.Merge(&other)
	if q := h.Quantile(1); h.Count() != 2 || q < 5*time.Minute {
		t.Errorf("after a merge: %d values, the largest %v", h.Count(), q)
	}
}

func TestStatCPU(t *testing.T) {
	f := func(stat string, want time.Duration, ok bool) {
		t.Helper()
		got, err := StatCPU([]byte(stat))
		if got != want || (err == nil) != ok {
			t.Errorf("%q: %v, %v; want %v", stat, got, err, want)
		}
	}
	f("42 (side) car) S 1 42 42 0 -1 4194560 900 0 0 0 123 77 5 5 20 0 8 0 1000 0 0\n", 2*time.Second, true)
	f("42 (sidecar) S 1 42 42 0 -1 4194560 900 0 0 0 123\n", 0, false)
	f("42 (sidecar) S 1 42 42 0 -1 4194560 900 0 0 0 x 77 5\n", 0, false)
	f("", 0, false)
}

func TestParseStatus(t *testing.T) {
	got, err := ParseStatus([]byte("Name:\tsidecar\nVmHWM:\t  9000 kB\nVmRSS:\t  8192 kB\nGroups:\t\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t7\n"))
	if want := (Status{8192, 150, 7}); got != want || err != nil {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	if _, err := ParseStatus([]byte("VmRSS:\tmuch kB\n")); err == nil {
		t.Error("a size that is no number was read")
	}
}

func TestBusy(t *testing.T) {
	text := []byte("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 1000 1000 4 5 6 0 0\ncpu1 10 0 0 7 0 0 0 0 0 0\ncpu2 99 0 0 0 0 0 0 0 0 0\nintr 5\n")
	got, err := Busy(text, func(cpu int) bool { return cpu < 2 })
	if want := 310 * time.Millisecond; got != want || err != nil {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := Busy(text, func(cpu int) bool { return cpu == 3 }); err == nil {
		t.Error("a processor that is not there was idle")
	}
}

func TestRounds(t *testing.T) {
	f := func(r Rounds, median, least, most float64) {
		t.Helper()
		lo, hi := r.Spread()
		if r.Median() != median || lo != least || hi != most {
			t.Errorf("%v: median %v, %v to %v; want %v, %v to %v", r, r.Median(), lo, hi, median, least, most)
		}
	}
	f(nil, 0, 0, 0)
	f(Rounds{3}, 3, 3, 3)
	f(Rounds{9, 1, 5}, 5, 1, 9)
	f(Rounds{4, 1, 2, 9}, 3, 1, 9)
}

// TestRatioPairsRounds: a round in which both took twice as long does not widen
// the spread.
func TestRatioPairsRounds(t *testing.T) {
	r, lo, hi := Ratio(Rounds{10, 20, 11}, Rounds{5, 10, 5})
	if r != 11.0/5 || lo != 2 || hi != 2.2 {
		t.Errorf("ratio %v, %v to %v; want 2.2, 2 to 2.2", r, lo, hi)
	}
	if r, _, _ := Ratio(nil, Rounds{5}); r != 0 {
		t.Errorf("a ratio to nothing is %v", r)
	}
}
