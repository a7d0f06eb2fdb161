package upstream

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// Limit names a limit of a cluster, as metrics do. As an error it says that the
// limit is reached.
type Limit string

// The limits on connecting.
const (
	Connections     Limit = "connections"
	PendingRequests Limit = "pending_requests"
)

// Error implements error.
func (l Limit) Error() string { return "limit on " + string(l) + " is reached" }

// LimitOf is the Limit that err is, or empty.
func LimitOf(err error) (l Limit) {
	errors.As(err, &l)
	return l
}

// Endpoint is one address of a cluster as one configuration describes it. Those
// of later configurations share the pool, so that a change of health or weight
// closes no connection and forgets no latency.
type Endpoint struct {
	balance.Endpoint
	Name    string // the address as text
	cluster *Cluster
	*pool
}

// pool is what is kept of an address: its connections, and how busy and how
// slow it is.
type pool struct {
	active  atomic.Int64
	ejected atomic.Bool

	mu      sync.Mutex
	latency balance.EWMA
	idle    []*Conn // the one used last is last
	retired bool
}

// Ejected reports whether outlier detection has taken the endpoint out.
func (p *pool) Ejected() bool { return p.ejected.Load() }

// Active is how many exchanges are in flight.
func (p *pool) Active() int64 { return p.active.Load() }

// load is what balance.Pick compares: requests in flight, scaled by the latency
// that the endpoint has shown.
func (e *Endpoint) load() float64 {
	e.mu.Lock()
	l := e.latency.Value(time.Now())
	e.mu.Unlock()
	return balance.Load(int(e.active.Load()), l, e.Weight)
}

// Conn is a connection to an endpoint, lent to one exchange at a time.
type Conn struct {
	wire.Conn
	Endpoint *Endpoint
	// Reused: an earlier exchange has used it, so the server may have closed it
	// while it idled.
	Reused bool
	// Over is the limit that would have refused the connection in Enforce mode;
	// empty where none would.
	Over Limit

	since time.Time // when it became idle
}

// Get borrows a connection for one exchange: an idle one that is still open, or
// a new one, made before deadline (zero: none). It must be ended by Put or
// Discard. Deadlines that the last exchange set are still on it. The error is a
// Limit, or what connecting met.
func (e *Endpoint) Get(ctx context.Context, deadline time.Time) (*Conn, error) {
	for {
		c := e.popIdle()
		if c == nil {
			return e.Dial(ctx, deadline)
		}
		if c.Alive() {
			e.active.Add(1)
			c.Endpoint, c.Reused, c.Over = e, true, ""
			return c, nil
		}
		c.close()
	}
}

func (e *Endpoint) popIdle() *Conn {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.idle)
	if n == 0 {
		return nil
	}
	c := e.idle[n-1]
	e.idle = e.idle[:n-1]
	return c
}

// Dial is Get for who cannot take a connection that has been used.
func (e *Endpoint) Dial(ctx context.Context, deadline time.Time) (c *Conn, err error) {
	e.active.Add(1)
	if c, err = e.dial(ctx, deadline); err != nil {
		e.active.Add(-1)
	}
	return c, err
}

// dial counts the request as pending while it connects, as Envoy does.
func (e *Endpoint) dial(ctx context.Context, deadline time.Time) (*Conn, error) {
	cfg := e.cluster.Config()
	var over Limit
	if !within(&e.cluster.pending, cfg.Limits.PendingRequests) {
		over = PendingRequests
	}
	defer e.cluster.pending.Add(-1)
	// A connection that idles at another endpoint is no reason to refuse this one.
	if !within(&e.cluster.connections, cfg.Limits.Connections) && !e.cluster.spare(!cfg.LimitsObserve) {
		over = Connections
	}
	if over != "" && !cfg.LimitsObserve {
		e.cluster.connections.Add(-1)
		return nil, over
	}
	d := net.Dialer{Timeout: connectTimeout, Deadline: deadline, KeepAlive: 30 * time.Second}
	nc, err := d.DialContext(ctx, "tcp", e.Name)
	if err != nil {
		e.cluster.connections.Add(-1)
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		panic("upstream: a TCP dialer returned another connection")
	}
	c := &Conn{Endpoint: e, Over: over}
	if err := c.Init(tcp, nil); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// Put ends the exchange; the connection may serve another one.
func (e *Endpoint) Put(c *Conn, now time.Time) {
	e.active.Add(-1)
	c.since = now
	e.mu.Lock()
	keep := !e.retired && len(e.idle) < maxIdle
	if keep {
		e.idle = append(e.idle, c)
	}
	e.mu.Unlock()
	if !keep {
		c.close()
	}
}

// Discard ends the exchange and the connection.
func (e *Endpoint) Discard(c *Conn) {
	e.active.Add(-1)
	c.close()
}

// A failed attempt counts as slow, failurePenalty at least and maxPenalty at
// most: an endpoint that fails at once would otherwise look like the quickest
// of all and draw every request to itself.
const (
	failurePenalty = 100 * time.Millisecond
	maxPenalty     = time.Second
)

// Observe tells how long an attempt took, and whether it failed.
func (p *pool) Observe(now time.Time, d time.Duration, failed bool) {
	p.mu.Lock()
	if failed {
		d = max(d, min(maxPenalty, max(failurePenalty, 10*p.latency.Value(now))))
	}
	p.latency.Observe(now, d)
	p.mu.Unlock()
}

func (p *pool) closeIdle(before time.Time) {
	p.mu.Lock()
	n := 0
	if before.IsZero() {
		n = len(p.idle)
	}
	for n < len(p.idle) && p.idle[n].since.Before(before) {
		n++
	}
	gone := append([]*Conn(nil), p.idle[:n]...)
	p.idle = append(p.idle[:0], p.idle[n:]...)
	p.mu.Unlock()
	for _, c := range gone {
		c.close()
	}
}

// spare reports whether a connection idles, and closes it if take is set. The
// one idle for longest goes.
func (p *pool) spare(take bool) bool {
	p.mu.Lock()
	if len(p.idle) == 0 || !take {
		defer p.mu.Unlock()
		return len(p.idle) > 0
	}
	c := p.idle[0]
	p.idle = append(p.idle[:0], p.idle[1:]...)
	p.mu.Unlock()
	c.close()
	return true
}

// retire closes what idles; what is in use is closed when it comes back.
func (p *pool) retire() {
	p.mu.Lock()
	p.retired = true
	p.mu.Unlock()
	p.closeIdle(time.Time{})
}

func (c *Conn) close() {
	c.Endpoint.cluster.connections.Add(-1)
	// The exchange is over and its outcome known: what Close says changes nothing.
	_ = c.Close()
}
