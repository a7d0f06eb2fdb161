// Package overload says when to turn work away, so that the proxy answers 503
// instead of being killed for its memory.
//
// It knows how much memory the process may have and has, and how many goroutines
// run; what is turned away, and with which answer, is the caller's: package proxy
// asks Shed for every new request, whoever accepts connections asks Refuse, and
// readiness asks State. Asking costs one atomic load. Everything is safe for
// concurrent use.
package overload

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Shares of the memory limit, in per cent. Between an entry and its exit the
// state stays as it is, so that it does not flap.
const (
	// collectAt is where Go begins to collect garbage as hard as it must
	// (debug.SetMemoryLimit). It is below what sheds, so that what is shed for is
	// memory in use and not garbage.
	collectAt  = 85
	shedAt     = 90
	shedUntil  = 85
	refuseAt   = 95
	refuseStay = 92
	// watchAt is from where on samples are taken more often.
	watchAt = 75
)

// MaxGoroutines is from where on requests are shed whatever the memory: each
// connection and each stream of HTTP/2 has one or two. Connections are refused
// from a fifth more on.
const MaxGoroutines = 100_000

const (
	interval = 100 * time.Millisecond // of samples
	hurry    = 20 * time.Millisecond  // of samples where memory is short
	leisure  = time.Second            // of samples without a memory limit
	// reclaim is how often memory is given back while work is turned away: a proxy
	// that does nothing would otherwise never collect its garbage.
	reclaim = time.Second
)

// State is what should be turned away.
type State uint32

// The states in the order of their severity.
const (
	OK       State = iota
	Shedding       // new requests: 503, flag OM
	Refusing       // new connections as well
)

// String is the state as people read it.
func (s State) String() string {
	return [...]string{"ok", "shedding requests", "refusing connections"}[s]
}

// Usage is one sample.
type Usage struct {
	Memory     int64 // bytes: what the process would be killed for
	Goroutines int
}

// Monitor samples the process. The nil Monitor turns nothing away.
type Monitor struct {
	state              atomic.Uint32
	shed, refused      atomic.Uint64
	memory, goroutines atomic.Int64

	limit   int64
	sample  func() Usage
	reclaim func()
	close   func()
}

// New makes a Monitor that holds the process below limit bytes; 0: no limit on
// memory. It samples nothing before Run.
func New(limit Limit) *Monitor {
	s := newSampler(limit)
	return &Monitor{limit: limit.Bytes, sample: s.sample, reclaim: debug.FreeOSMemory, close: s.close}
}

// Run samples until ctx ends. While it runs, Go's own memory limit is a little
// below ours, unless GOMEMLIMIT has set a lower one.
func (m *Monitor) Run(ctx context.Context) error {
	defer m.close()
	if m.limit > 0 {
		before := debug.SetMemoryLimit(-1)
		debug.SetMemoryLimit(min(before, m.limit/100*collectAt))
		defer debug.SetMemoryLimit(before)
	}
	var reclaimed time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-timer.C:
			next := m.step()
			if m.State() != OK && now.Sub(reclaimed) >= reclaim {
				m.reclaim()
				reclaimed = now
			}
			timer.Reset(next)
		}
	}
}

// step takes one sample, and returns when to take the next.
func (m *Monitor) step() time.Duration {
	u := m.sample()
	m.memory.Store(u.Memory)
	m.goroutines.Store(int64(u.Goroutines))
	// In per cent of the limits; a fifth more goroutines than the limit are worth
	// as much as the memory that refuses connections.
	memory := 0
	if m.limit > 0 {
		memory = int(u.Memory * 100 / m.limit)
	}
	m.state.Store(uint32(max(
		next(m.State(), memory, shedUntil, shedAt, refuseStay, refuseAt),
		next(m.State(), u.Goroutines, MaxGoroutines*9/10, MaxGoroutines, MaxGoroutines, MaxGoroutines*12/10),
	)))
	switch {
	case m.limit <= 0:
		return leisure
	case memory >= watchAt:
		return hurry
	}
	return interval
}

// next is the state after a value: Shedding from shed on until it is below ok
// again, Refusing from refuse on until it is below shedding again.
func next(now State, v, ok, shed, shedding, refuse int) State {
	switch {
	case v >= refuse || now == Refusing && v >= shedding:
		return Refusing
	case v >= shed || now != OK && v >= ok:
		return Shedding
	}
	return OK
}

// State is what is turned away now.
func (m *Monitor) State() State {
	if m == nil {
		return OK
	}
	return State(m.state.Load())
}

// Shed reports whether a new request is to be answered with 503 and flag OM, and
// counts it if so.
func (m *Monitor) Shed() bool {
	if m == nil || State(m.state.Load()) == OK {
		return false
	}
	m.shed.Add(1)
	return true
}

// Refuse reports whether a new connection is to be closed unserved, and counts
// it if so.
func (m *Monitor) Refuse() bool {
	if m == nil || State(m.state.Load()) != Refusing {
		return false
	}
	m.refused.Add(1)
	return true
}

// Err says why the proxy is not ready; nil unless it refuses connections. One
// that sheds stays ready: taking it away would only move its load to others that
// are short as well.
func (m *Monitor) Err() error {
	if m.State() != Refusing {
		return nil
	}
	return fmt.Errorf("overloaded: %d of %d bytes of memory in use, %d goroutines", m.memory.Load(), m.limit, m.goroutines.Load())
}

// Register exposes what the Monitor knows.
func (m *Monitor) Register(r prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	gauge("outrigger_overload_state", "0 ok, 1 shedding new requests, 2 refusing new connections as well.", func() float64 { return float64(m.State()) })
	gauge("outrigger_memory_limit_bytes", "Memory that the sidecar may have; 0: no limit is known.", func() float64 { return float64(m.limit) })
	gauge("outrigger_memory_used_bytes", "Memory that the sidecar has, as it counts against the limit.", func() float64 { return float64(m.memory.Load()) })
	for what, v := range map[string]*atomic.Uint64{"request": &m.shed, "connection": &m.refused} {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "outrigger_overload_shed_total", Help: "Requests answered with 503 and flag OM, and connections closed unserved, because memory or goroutines were short.",
			ConstLabels: prometheus.Labels{"what": what},
		}, func() float64 { return float64(v.Load()) }))
	}
}
