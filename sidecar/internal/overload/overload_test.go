package overload

import (
	"context"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// faked is a Monitor of 1000 bytes that sees what the test says.
func faked(u *Usage) *Monitor {
	return &Monitor{limit: 1000, sample: func() Usage { return *u }, reclaim: func() {}, close: func() {}}
}

// The state follows memory up at 90 and 95 %, and down again only below 92 and
// 85 %.
func TestStateFollowsMemoryWithHysteresis(t *testing.T) {
	var u Usage
	m := faked(&u)
	for _, step := range []struct {
		memory int64
		want   State
	}{
		{890, OK},
		{900, Shedding},
		{870, Shedding},
		{850, Shedding},
		{849, OK},
		{899, OK},
		{950, Refusing},
		{930, Refusing},
		{919, Shedding},
		{940, Shedding},
		{1100, Refusing},
		{100, OK},
	} {
		u.Memory = step.memory
		m.step()
		if m.State() != step.want {
			t.Fatalf("at %d: %s; want %s", step.memory, m.State(), step.want)
		}
		if shed, refuse := m.Shed(), m.Refuse(); shed != (step.want != OK) || refuse != (step.want == Refusing) {
			t.Errorf("at %d: Shed() = %t, Refuse() = %t", step.memory, shed, refuse)
		}
		if err := m.Err(); (err != nil) != (step.want == Refusing) {
			t.Errorf("at %d: not ready because of %v", step.memory, err)
		}
	}
}

func TestGoroutinesAreBoundedWithoutAMemoryLimit(t *testing.T) {
	u := Usage{Memory: 1 << 40}
	m := faked(&u)
	m.limit = 0
	for _, step := range []struct {
		n    int
		want State
	}{{MaxGoroutines - 1, OK}, {MaxGoroutines, Shedding}, {MaxGoroutines*9/10 + 1, Shedding}, {MaxGoroutines * 12 / 10, Refusing}, {MaxGoroutines / 2, OK}} {
		u.Goroutines = step.n
		if m.step(); m.State() != step.want {
			t.Errorf("with %d: %s; want %s", step.n, m.State(), step.want)
		}
	}
}

// A sample every 100 ms, every 20 ms where memory is short, and garbage given
// back once a second as long as work is turned away.
func TestSamplesComeFasterWhereMemoryIsShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 1 << 30
		var memory, samples, reclaimed atomic.Int64
		closed := false
		m := &Monitor{
			limit: limit, reclaim: func() { reclaimed.Add(1) }, close: func() { closed = true },
			sample: func() Usage { samples.Add(1); return Usage{Memory: memory.Load()} },
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		before := debug.SetMemoryLimit(-1)
		go func() { defer close(done); _ = m.Run(ctx) }()
		in := func(d time.Duration) (int64, int64) {
			samples.Store(0)
			reclaimed.Store(0)
			time.Sleep(d)
			synctest.Wait()
			return samples.Load(), reclaimed.Load()
		}
		in(time.Millisecond)
		if n, r := in(time.Second); n != 10 || r != 0 {
			t.Errorf("%d samples a second, %d collections; want 10 and none", n, r)
		}
		if debug.SetMemoryLimit(-1) >= before {
			t.Error("Go was not told of the limit")
		}
		memory.Store(limit / 100 * 96)
		in(100 * time.Millisecond)
		if n, r := in(time.Second); n != 50 || r != 1 {
			t.Errorf("%d samples a second where memory is short, %d collections; want 50 and one", n, r)
		}
		cancel()
		<-done
		if !closed || debug.SetMemoryLimit(-1) != before {
			t.Error("Run leaves something behind")
		}
	})
}

func TestNilMonitorTurnsNothingAway(t *testing.T) {
	var m *Monitor
	if m.Shed() || m.Refuse() || m.State() != OK || m.Err() != nil {
		t.Error("it does")
	}
}

func TestMetrics(t *testing.T) {
	u := Usage{Memory: 970}
	m := faked(&u)
	r := prometheus.NewRegistry()
	m.Register(r)
	m.step()
	m.Shed()
	m.Shed()
	m.Refuse()
	want := `
# HELP outrigger_memory_limit_bytes Memory that the sidecar may have; 0: no limit is known.
# TYPE outrigger_memory_limit_bytes gauge
outrigger_memory_limit_bytes 1000
# HELP outrigger_memory_used_bytes Memory that the sidecar has, as it counts against the limit.
# TYPE outrigger_memory_used_bytes gauge
outrigger_memory_used_bytes 970
# HELP outrigger_overload_shed_total Requests answered with 503 and flag OM, and connections closed unserved, because memory or goroutines were short.
# TYPE outrigger_overload_shed_total counter
outrigger_overload_shed_total{what="connection"} 1
outrigger_overload_shed_total{what="request"} 2
# HELP outrigger_overload_state 0 ok, 1 shedding new requests, 2 refusing new connections as well.
# TYPE outrigger_overload_state gauge
outrigger_overload_state 2
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
