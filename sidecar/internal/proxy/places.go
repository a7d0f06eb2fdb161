package proxy

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// place is one original destination of captured connections: an address that the
// application calls, or a port of its own.
type place struct {
	to  netip.AddrPort
	key string // to, as text
	way atomic.Pointer[path]

	// The rest is guarded by the places' lock.

	users int // connections that need it
	used  time.Time
	// foreign: the control plane said that no service has the address.
	foreign bool
	// silent is until when nobody waits for the control plane, which has not answered
	// in time.
	silent time.Time
}

// places remembers original destinations, a bounded number of them: whoever calls
// one that does not fit takes the room of one that is not in use, of the foreign
// ones first, then of the one used longest ago. It is safe for concurrent use.
type places struct {
	max int
	// open is called for a place that is new, and close for one that is forgotten,
	// with the lock held.
	open  func(*place) error
	close func(*place)

	mu sync.Mutex
	m  map[netip.AddrPort]*place
}

// take is the place of to, for one connection, which leave ends. Nil where there
// is no room; what is always served has room.
func (ps *places) take(to netip.AddrPort, always bool, now time.Time) *place {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	pl := ps.m[to]
	if pl == nil {
		if len(ps.m) >= ps.max && !ps.evict() && !always {
			return nil
		}
		pl = &place{to: to, key: to.String()}
		if err := ps.open(pl); err != nil && (!ps.evict() || ps.open(pl) != nil) {
			return nil
		}
		if ps.m == nil {
			ps.m = map[netip.AddrPort]*place{}
		}
		ps.m[to] = pl
	}
	pl.users++
	pl.used = now
	return pl
}

func (ps *places) leave(pl *place, now time.Time) {
	ps.mu.Lock()
	pl.users--
	pl.used = now
	ps.mu.Unlock()
}

func (ps *places) isForeign(pl *place, foreign bool) {
	ps.mu.Lock()
	pl.foreign = foreign
	ps.mu.Unlock()
}

func (ps *places) isSilent(pl *place, until time.Time) {
	ps.mu.Lock()
	pl.silent = until
	ps.mu.Unlock()
}

func (ps *places) silentUntil(pl *place) time.Time {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return pl.silent
}

func (ps *places) len() int {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	return len(ps.m)
}

// CapturedDestination is an address that the application calls.
type CapturedDestination struct {
	Address string `json:"address"`
	// Service that has it, <namespace>/<service>:<port>; empty where none has, or
	// nothing is known yet.
	Service     string    `json:"service,omitempty"`
	Connections int       `json:"connections"` // that go by the service
	Used        time.Time `json:"used"`        // when a connection began or ended last
}

// list is in the order of addresses.
func (ps *places) list() []CapturedDestination {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	out := make([]CapturedDestination, 0, len(ps.m))
	for _, pl := range ps.m {
		d := CapturedDestination{Address: pl.key, Connections: pl.users, Used: pl.used}
		if way := pl.way.Load(); way != nil && !pl.foreign {
			d.Service = way.key
		}
		out = append(out, d)
	}
	slices.SortFunc(out, func(a, b CapturedDestination) int { return strings.Compare(a.Address, b.Address) })
	return out
}

// sweep forgets what nobody has used since before.
func (ps *places) sweep(before time.Time) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for _, pl := range ps.m {
		if pl.users == 0 && pl.used.Before(before) {
			ps.forget(pl)
		}
	}
}

func (ps *places) evict() bool {
	var worst *place
	for _, pl := range ps.m {
		switch {
		case pl.users > 0:
		case worst == nil, pl.foreign && !worst.foreign, pl.foreign == worst.foreign && pl.used.Before(worst.used):
			worst = pl
		}
	}
	if worst == nil {
		return false
	}
	ps.forget(worst)
	return true
}

func (ps *places) forget(pl *place) {
	delete(ps.m, pl.to)
	ps.close(pl)
}
