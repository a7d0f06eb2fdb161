// Package upstream keeps what outlives a routing table: the connections to the
// endpoints of each cluster, how busy and how slow each endpoint is, which are
// ejected, the cluster's breaker, and how much of its limits is in use.
//
// It knows addresses and policies; it does not know requests or protocols. The
// proxy borrows a connection for one exchange and gives it back. State is kept
// by cluster name, so that a change of configuration closes no connection that
// it does not concern.
package upstream

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// Limits of what is kept.
const (
	// maxIdle connections of one endpoint; more are closed.
	maxIdle = 256
	// idleTimeout closes a connection that nobody used. Shorter than the usual
	// keep-alive of servers would cost connections; the liveness check at
	// checkout covers the race with those that are quicker.
	idleTimeout = 30 * time.Second
	// freshFor is how long after its use a connection is taken to be still open.
	freshFor = time.Millisecond
	// connectTimeout of one attempt to connect.
	connectTimeout = time.Second
	// sweepEvery is how often idle connections and ejections are looked at.
	sweepEvery = time.Second
)

// Secure makes the configuration for mutual TLS with the endpoints of a cluster
// and what is going to be spoken: "h2", "http/1.1", or nothing known.
type Secure func(to *table.TLS, protocols ...string) *tls.Config

// Clusters is the state of every cluster in use. It is safe for concurrent use.
type Clusters struct {
	// Secure is nil where this proxy has no identity: endpoints that take TLS only
	// cannot be reached then. It is set before use.
	Secure Secure
	// HTTP2 bounds the HTTP/2 connections; nil takes the defaults. It is set before
	// use.
	HTTP2 *http2.Config

	newID   func() string
	onTrip  func(breaker.Evidence)
	onEject func(cluster string, e outlier.Event)

	mu     sync.RWMutex
	m      map[string]*Cluster
	pinned map[string]bool

	open connections
}

// New makes an empty set. newID names evidence; onTrip and onEject hear of every
// change of a breaker and of every ejection, in the goroutine that caused it.
func New(newID func() string, onTrip func(breaker.Evidence), onEject func(string, outlier.Event)) *Clusters {
	return &Clusters{newID: newID, onTrip: onTrip, onEject: onEject, m: map[string]*Cluster{}, pinned: map[string]bool{}}
}

// For returns the state of the cluster as t describes it; nil where t has no
// such cluster.
func (cs *Clusters) For(t *table.Table, name string) *Cluster {
	want := t.Clusters[name]
	if want == nil {
		return nil
	}
	cs.mu.RLock()
	c := cs.m[name]
	cs.mu.RUnlock()
	if c != nil && c.applied.Load() == want {
		return c
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c = cs.m[name]; c == nil {
		c = &Cluster{Name: name, secure: cs.Secure, http2: cs.HTTP2, open: &cs.open}
		cs.m[name] = c
	}
	if c.applied.Load() != want {
		c.apply(want, cs)
	}
	return c
}

// Pin keeps a cluster that the control plane's Tables do not name: the
// application behind an inbound port.
func (cs *Clusters) Pin(name string) {
	cs.mu.Lock()
	cs.pinned[name] = true
	cs.mu.Unlock()
}

// Unpin ends Pin: once idle, the cluster is forgotten.
func (cs *Clusters) Unpin(name string) {
	cs.mu.Lock()
	delete(cs.pinned, name)
	cs.mu.Unlock()
}

// All returns the clusters in use, in no order.
func (cs *Clusters) All() []*Cluster {
	cs.mu.RLock()
	defer cs.mu.RUnlock()
	out := make([]*Cluster, 0, len(cs.m))
	for _, c := range cs.m {
		out = append(out, c)
	}
	return out
}

// Run closes idle connections, ends ejections and forgets clusters that current
// no longer names, until ctx ends; then it closes every connection that idles and
// every one that speaks HTTP/2.
func (cs *Clusters) Run(ctx context.Context, current *table.Current) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			for _, c := range cs.All() {
				for _, e := range c.Endpoints() {
					e.retire()
				}
			}
			cs.open.cut()
			return ctx.Err()
		case now := <-tick.C:
			cs.sweep(now, current.Load())
		}
	}
}

func (cs *Clusters) sweep(now time.Time, t *table.Table) {
	for _, c := range cs.All() {
		cs.For(t, c.Name) // a new configuration counts even where no request comes
		cs.mu.Lock()
		gone := t.Clusters[c.Name] == nil && !cs.pinned[c.Name] && c.requests.Load() == 0
		if gone {
			delete(cs.m, c.Name)
		}
		cs.mu.Unlock()
		if gone {
			// A request may have got hold of it just before: what it borrows is
			// closed when it comes back, for no sweep would find it here again.
			for _, e := range c.Endpoints() {
				e.retire()
			}
			continue
		}
		c.closeIdle(now.Add(-idleTimeout))
		c.sweepOutliers(now)
	}
}

// Cluster is the state of one cluster.
type Cluster struct {
	Name string

	secure Secure
	http2  *http2.Config
	open   *connections

	applied   atomic.Pointer[table.Cluster]
	endpoints atomic.Pointer[[]*Endpoint]
	byAddress atomic.Pointer[[]*Endpoint] // the same, sorted
	breaker   atomic.Pointer[breaker.Breaker]

	requests    atomic.Int64
	pending     atomic.Int64
	connections atomic.Int64
	retries     atomic.Int64

	outliersMu sync.Mutex
	outliers   *outlier.Detector
	onEject    func(string, outlier.Event)
}

// Config is the description in force.
func (c *Cluster) Config() *table.Cluster { return c.applied.Load() }

// Breaker is nil where no policy sets trip.
func (c *Cluster) Breaker() *breaker.Breaker { return c.breaker.Load() }

// Endpoints in the order of the configuration. The slice must not be changed.
func (c *Cluster) Endpoints() []*Endpoint {
	if p := c.endpoints.Load(); p != nil {
		return *p
	}
	return nil
}

// apply makes the state fit want. It is called with the set's lock held.
func (c *Cluster) apply(want *table.Cluster, cs *Clusters) {
	now := time.Now()
	old := map[netip.AddrPort]*Endpoint{}
	for _, e := range c.Endpoints() {
		old[e.Address] = e
	}
	known := make(map[netip.AddrPort]bool, len(want.Endpoints))
	next := make([]*Endpoint, 0, len(want.Endpoints))
	addresses := make([]netip.AddrPort, 0, len(want.Endpoints))
	for _, ep := range want.Endpoints {
		if known[ep.Address] { // twice the same would be two pools of which one is lost
			continue
		}
		known[ep.Address] = true
		e := old[ep.Address]
		if e != nil && e.TLS != ep.TLS {
			e = nil // a connection in clear is not gone on with; the old pool retires below
		}
		switch {
		case e == nil:
			e = &Endpoint{Endpoint: ep, Name: ep.Address.String(), cluster: c, pool: &pool{}}
		case e.Endpoint != ep: // same address, other metadata: the connections are as good as before
			e = &Endpoint{Endpoint: ep, Name: e.Name, cluster: c, pool: e.pool}
		}
		if e.pool == poolOf(old[ep.Address]) {
			delete(old, ep.Address)
		}
		next = append(next, e)
		addresses = append(addresses, ep.Address)
	}
	sorted := slices.SortedFunc(slices.Values(next), func(a, b *Endpoint) int { return a.Address.Compare(b.Address) })
	c.endpoints.Store(&next)
	c.byAddress.Store(&sorted)
	for _, gone := range old {
		gone.retire()
	}
	switch b := c.breaker.Load(); {
	case want.Breaker == nil:
		c.breaker.Store(nil)
	case b == nil || b.Policy() != *want.Breaker:
		c.breaker.Store(breaker.New(*want.Breaker, c.Name, now, cs.newID, cs.onTrip))
	}
	c.outliersMu.Lock()
	c.onEject = cs.onEject
	switch {
	case want.Outlier == nil:
		c.outliers = nil
	case c.outliers == nil:
		c.outliers = outlier.New(*want.Outlier)
	default:
		c.outliers.SetPolicy(*want.Outlier)
	}
	if c.outliers != nil {
		c.outliers.SetEndpoints(addresses)
	}
	for _, e := range next {
		e.ejected.Store(c.outliers != nil && c.outliers.Ejected(e.Address))
	}
	c.outliersMu.Unlock()
	c.applied.Store(want)
	if most := want.Limits.Connections; most > 0 && c.connections.Load() > int64(most) {
		c.closeIdle(time.Time{}) // connections from before the limit
	}
}

func poolOf(e *Endpoint) *pool {
	if e == nil {
		return nil
	}
	return e.pool
}

func (c *Cluster) closeIdle(before time.Time) {
	for _, e := range c.Endpoints() {
		e.closeIdle(before)
	}
}

// spare reports whether a connection of the cluster idles, and closes it if take
// is set.
func (c *Cluster) spare(take bool) bool {
	for _, e := range c.Endpoints() {
		if e.spare(take) {
			return true
		}
	}
	return false
}

// Pick chooses an endpoint with balance.Pick, leaving out the unhealthy, the
// ejected, and tried, the endpoints of earlier attempts, unless nothing else is
// left. Nil where the cluster has no healthy endpoint.
func (c *Cluster) Pick(tried []*Endpoint) *Endpoint {
	eps := c.Endpoints()
	// Latencies are estimates: noise of a half keeps a difference of a few per
	// cent from sending every request to one of two equals.
	load := func(i int) float64 { return eps[i].load() * (0.5 + rand.Float64()) }
	usable := func(i int) bool { return eps[i].Healthy && !eps[i].ejected.Load() }
	i := balance.Pick(len(eps), load, func(i int) bool {
		if !usable(i) {
			return true
		}
		for _, t := range tried {
			if t.pool == eps[i].pool {
				return true
			}
		}
		return false
	}, rand.Uint64(), rand.Uint64())
	if i < 0 && len(tried) > 0 {
		i = balance.Pick(len(eps), load, func(i int) bool { return !usable(i) }, rand.Uint64(), rand.Uint64())
	}
	if i < 0 {
		return nil
	}
	return eps[i]
}

// At is the endpoint with the address, whether it is healthy or not; nil where
// the cluster has none. It is for callers that have made the choice themselves, as
// those of a headless Service do.
func (c *Cluster) At(address netip.AddrPort) *Endpoint {
	p := c.byAddress.Load()
	if p == nil {
		return nil
	}
	i, found := slices.BinarySearchFunc(*p, address, func(e *Endpoint, a netip.AddrPort) int { return e.Address.Compare(a) })
	if !found {
		return nil
	}
	return (*p)[i]
}

// Record tells outlier detection how an attempt ended.
func (c *Cluster) Record(now time.Time, e *Endpoint, r outlier.Result) {
	if cfg := c.applied.Load(); cfg == nil || cfg.Outlier == nil {
		return
	}
	c.outliersMu.Lock()
	defer c.outliersMu.Unlock()
	if c.outliers == nil {
		return
	}
	if event, happened := c.outliers.Record(now, e.Address, r); happened {
		c.report(event)
	}
}

func (c *Cluster) sweepOutliers(now time.Time) {
	c.outliersMu.Lock()
	defer c.outliersMu.Unlock()
	if c.outliers == nil {
		return
	}
	for _, event := range c.outliers.Sweep(now) {
		c.report(event)
	}
}

func (c *Cluster) report(event outlier.Event) {
	for _, e := range c.Endpoints() {
		e.ejected.Store(c.outliers.Ejected(e.Address))
	}
	c.onEject(c.Name, event)
}

// Usage is how much of each limit is in use.
type Usage struct{ Connections, PendingRequests, Requests, Retries int64 }

// Usage now.
func (c *Cluster) Usage() Usage {
	return Usage{c.connections.Load(), c.pending.Load(), c.requests.Load(), c.retries.Load()}
}

// AcquireRequest counts a request in flight and says whether the limit on
// requests allows it. Every call must be followed by ReleaseRequest.
func (c *Cluster) AcquireRequest() bool { return within(&c.requests, c.Config().Limits.Requests) }

// ReleaseRequest ends what AcquireRequest began.
func (c *Cluster) ReleaseRequest() { c.requests.Add(-1) }

// AcquireRetry counts a retry in flight and says whether both the limit and the
// budget allow it, and whether it is over the limit, which in Observe mode is
// allowed. Every call must be followed by ReleaseRetry.
func (c *Cluster) AcquireRetry() (allowed, over bool) {
	cfg := c.Config()
	n := c.retries.Add(1)
	over = cfg.Limits.Retries > 0 && n > int64(cfg.Limits.Retries)
	return cfg.Budget.Allows(int(c.requests.Load()), int(n-1)) && (!over || cfg.LimitsObserve), over
}

// ReleaseRetry ends what AcquireRetry began.
func (c *Cluster) ReleaseRetry() { c.retries.Add(-1) }

func within(counter *atomic.Int64, limit uint32) bool {
	n := counter.Add(1)
	return limit == 0 || n <= int64(limit)
}
