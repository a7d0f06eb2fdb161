package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
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
	shared  []*shared
	dialing *dialing // nil unless a shared connection is being made
	retired bool
	tlsFor  *table.TLS
	tls     map[string]*tls.Config // by protocol, for tlsFor
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

	// Suspect has the connection looked at before its next use, however soon: a
	// server may have sent a body where there is none.
	Suspect bool

	since time.Time // when it became idle
	verified
}

// Get borrows a connection for one exchange: an idle one that is still open, or
// a new one, made before deadline (zero: none). It must be ended by Put or
// Discard. Deadlines that the last exchange set are still on it. The error is a
// Limit, or what connecting met.
func (e *Endpoint) Get(ctx context.Context, deadline time.Time) (*Conn, error) {
	for {
		c := e.popIdle()
		if c == nil {
			return e.dialOne(ctx, deadline, "http/1.1")
		}
		// What was in use a moment ago is not looked at: looking costs a system call a
		// request, and a server that closes says so in its answer.
		if c.verified.holds(e) && (!c.Suspect && time.Since(c.since) < freshFor || c.Alive()) {
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

// Dial is Get for who cannot take a connection that has been used, nor says in
// advance what it will speak.
func (e *Endpoint) Dial(ctx context.Context, deadline time.Time) (*Conn, error) {
	return e.dialOne(ctx, deadline, "")
}

func (e *Endpoint) dialOne(ctx context.Context, deadline time.Time, protocol string) (*Conn, error) {
	e.active.Add(1)
	d, err := e.dial(ctx, deadline, protocol)
	if err != nil {
		e.active.Add(-1)
		return nil, err
	}
	c := &Conn{Endpoint: e, Over: d.over, verified: d.verified}
	if err := c.Init(d.tcp, nil); err != nil {
		e.Discard(c)
		return nil, err
	}
	if d.tls != nil {
		c.Secure(d.tls)
	}
	return c, nil
}

// dialed is a new connection to an endpoint.
type dialed struct {
	tcp *net.TCPConn
	tls *tls.Conn // above tcp; nil in clear
	verified
	over Limit
}

// verified is who is at the other end, and under which configuration that was
// enough. The zero value is a connection in clear.
type verified struct {
	by   *table.TLS
	peer string // SPIFFE ID
}

// Peer is the SPIFFE ID that the other end has proved; empty in clear.
func (v *verified) Peer() string { return v.peer }

// holds reports whether a connection to e may be used under the configuration
// that is now in force, and remembers that it may.
func (v *verified) holds(e *Endpoint) bool {
	now := e.cluster.Config().TLS
	if !e.TLS || v.by == now {
		return true
	}
	if now == nil || !slices.Contains(now.Identities, v.peer) {
		return false
	}
	v.by = now
	return true
}

// dial counts the request as pending while it connects, as Envoy does.
// protocol is what TLS offers to speak.
func (e *Endpoint) dial(ctx context.Context, deadline time.Time, protocol string) (d dialed, err error) {
	cfg := e.cluster.Config()
	if !within(&e.cluster.pending, cfg.Limits.PendingRequests) {
		d.over = PendingRequests
	}
	defer e.cluster.pending.Add(-1)
	// A connection that idles at another endpoint is no reason to refuse this one.
	if !within(&e.cluster.connections, cfg.Limits.Connections) && !e.cluster.spare(!cfg.LimitsObserve) {
		d.over = Connections
	}
	defer func() {
		if err != nil {
			e.cluster.connections.Add(-1)
		}
	}()
	if d.over != "" && !cfg.LimitsObserve {
		return d, d.over
	}
	until := time.Now().Add(connectTimeout)
	if !deadline.IsZero() && deadline.Before(until) {
		until = deadline
	}
	dialer := net.Dialer{Deadline: until, KeepAlive: 30 * time.Second}
	if cfg.Source.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(cfg.Source, 0))
		dialer.ControlContext = choosePortLate
	}
	nc, err := dialer.DialContext(ctx, "tcp", e.Name)
	if err != nil {
		return d, err
	}
	var ok bool
	if d.tcp, ok = nc.(*net.TCPConn); !ok {
		panic("upstream: a TCP dialer returned another connection")
	}
	if !e.TLS {
		return d, nil
	}
	if err = e.secure(ctx, &d, cfg.TLS, protocol, until); err != nil {
		_ = d.tcp.Close()
	}
	return d, err
}

// secure shakes hands. There is no way on in clear.
func (e *Endpoint) secure(ctx context.Context, d *dialed, want *table.TLS, protocol string, until time.Time) error {
	if want == nil || e.cluster.secure == nil {
		return errors.New("the endpoint takes mutual TLS only, and this sidecar has no identity: give it a join token and the control plane's roots")
	}
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	d.tls = tls.Client(d.tcp, e.sessions(e.cluster.secure, want, protocol))
	if err := d.tls.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	d.by = want
	if uris := d.tls.ConnectionState().PeerCertificates[0].URIs; len(uris) == 1 {
		d.peer = uris[0].String()
	}
	return nil
}

// sessions is the TLS configuration for want and protocol. It is kept, for it
// resumes its own sessions only.
func (p *pool) sessions(secure Secure, want *table.TLS, protocol string) *tls.Config {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tlsFor != want {
		p.tlsFor, p.tls = want, map[string]*tls.Config{}
	}
	cfg := p.tls[protocol]
	if cfg == nil {
		var protocols []string
		if protocol != "" {
			protocols = []string{protocol}
		}
		cfg = secure(want, protocols...)
		p.tls[protocol] = cfg
	}
	return cfg
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
	p.closeIdleShared(before)
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
	for _, c := range p.shared {
		c.Drain() // its streams go on
	}
	p.mu.Unlock()
	p.closeIdle(time.Time{})
}

func (c *Conn) close() {
	c.Endpoint.cluster.connections.Add(-1)
	// The exchange is over and its outcome known: what Close says changes nothing.
	_ = c.Close()
}
