package balance_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
)

func TestPickSpreadsEvenlyOverWhatIsNotExcluded(t *testing.T) {
	f := func(n int, excluded ...int) {
		t.Helper()
		out := map[int]bool{}
		for _, i := range excluded {
			out[i] = true
		}
		rng := rand.New(rand.NewPCG(1, 2))
		const rounds = 20000
		got := make([]int, n)
		for range rounds {
			i := balance.Pick(n, func(int) float64 { return 1 }, func(i int) bool { return out[i] }, rng.Uint64(), rng.Uint64())
			if i < 0 || out[i] {
				t.Fatalf("n=%d excluded=%v: picked %d", n, excluded, i)
			}
			got[i]++
		}
		want := rounds / (n - len(excluded))
		for i, c := range got {
			if !out[i] && (c < want*8/10 || c > want*12/10) {
				t.Errorf("n=%d excluded=%v: endpoint %d got %d of %d; want about %d", n, excluded, i, c, rounds, want)
			}
		}
	}
	f(1)
	f(2)
	f(5)
	f(5, 1, 2, 3)
	f(10, 0, 1, 2, 3, 4, 5, 6, 7, 8)
	f(10, 0, 1, 2, 3, 4, 5, 6, 8)
}

func TestPickPrefersTheLessLoaded(t *testing.T) {
	loads := []float64{1, 100}
	for r := range uint64(100) {
		i := balance.Pick(2, func(i int) float64 { return loads[i] }, func(int) bool { return false }, r<<57, r<<60)
		if i != 0 {
			t.Fatalf("picked %d; want the one with load 1, which is always one of the two", i)
		}
	}
}

func TestPickOfNothingIsMinusOne(t *testing.T) {
	all := func(int) bool { return true }
	load := func(int) float64 { return 0 }
	for _, n := range []int{0, 1, 3} {
		if i := balance.Pick(n, load, all, 1, 2); i != -1 {
			t.Errorf("Pick of %d excluded endpoints = %d; want -1", n, i)
		}
	}
}

func TestPickAllocatesNothing(t *testing.T) {
	loads := []float64{3, 1, 2, 5}
	tried := 2
	var sum int
	if n := testing.AllocsPerRun(100, func() {
		sum += balance.Pick(len(loads), func(i int) float64 { return loads[i] }, func(i int) bool { return i == tried }, 7<<60, 3<<61)
	}); n != 0 {
		t.Errorf("Pick allocates %v times", n)
	}
}

func TestEWMABelievesPeaksAtOnceAndForgetsThem(t *testing.T) {
	const ms = time.Millisecond
	at := func(s float64) time.Time { return time.Unix(1000, 0).Add(time.Duration(s * float64(time.Second))) }
	var e balance.EWMA
	f := func(when float64, want time.Duration) {
		t.Helper()
		if got := e.Value(at(when)).Round(ms); got != want {
			t.Errorf("at %vs: %v; want %v", when, got, want)
		}
	}
	f(0, 0)
	e.Observe(at(0), 100*ms)
	f(0, 100*ms)
	f(10, 37*ms) // 100 ms / e
	e.Observe(at(10), 1000*ms)
	f(10, 1000*ms)
	e.Observe(at(20), 100*ms)
	f(20, 431*ms) // 1000/e + 100*(1-1/e)
	f(15, 431*ms) // a clock read earlier changes nothing
	f(120, 0)
}

func TestLoadCountsRequestsLatencyAndWeight(t *testing.T) {
	f := func(a, b float64) {
		t.Helper()
		if a >= b {
			t.Errorf("load %v is not below %v", a, b)
		}
	}
	f(balance.Load(0, time.Millisecond, 1), balance.Load(1, time.Millisecond, 1))
	f(balance.Load(1, time.Millisecond, 1), balance.Load(0, 3*time.Millisecond, 1))
	f(balance.Load(1, time.Millisecond, 4), balance.Load(0, time.Millisecond, 1))
	f(balance.Load(0, 0, 1), balance.Load(1, 0, 0))
	f(balance.Load(3, 0, 1), balance.Load(0, time.Millisecond, 1))
}
