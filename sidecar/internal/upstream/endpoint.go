package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
)

// ErrLimit says that the limit on connections or on pending requests is reached.
var ErrLimit = errors.New("limit reached")

// Endpoint is one address of a cluster with the connections to it.
type Endpoint struct {
	balance.Endpoint
	Address netip.AddrPort
	Name    string // the address as text
	cluster *Cluster

	active  atomic.Int64
	ejected atomic.Bool

	mu      sync.Mutex
	latency balance.EWMA
	idle    []*Conn // the one used last is last
	retired bool
}

// Ejected reports whether outlier detection has taken the endpoint out.
func (e *Endpoint) Ejected() bool { return e.ejected.Load() }

// Active is how many exchanges are in flight.
func (e *Endpoint) Active() int64 { return e.active.Load() }

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
	*net.TCPConn
	Endpoint *Endpoint
	// Reused: an earlier exchange has used it, so the server may have closed it
	// while it idled.
	Reused bool
	// OverLimit: in Observe mode, a limit would have refused the connection.
	OverLimit bool

	raw      syscall.RawConn
	check    func(fd uintptr) bool // made once: a closure a checkout would allocate
	alive    bool
	since    time.Time // when it became idle
	returned bool
}

// Get borrows a connection for one exchange: an idle one that is still open, or
// a new one. It must be ended by Put or Discard. The error is ErrLimit, or what
// connecting met.
func (e *Endpoint) Get(ctx context.Context) (*Conn, error) {
	e.active.Add(1)
	for {
		c := e.popIdle()
		if c == nil {
			break
		}
		if c.open() {
			c.Reused, c.OverLimit, c.returned = true, false, false
			return c, nil
		}
		c.close()
	}
	c, err := e.dial(ctx)
	if err != nil {
		e.active.Add(-1)
		return nil, err
	}
	return c, nil
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

// dial counts the request as pending while it connects, as Envoy does.
func (e *Endpoint) dial(ctx context.Context) (*Conn, error) {
	limits, observe := e.cluster.Config().Limits, e.cluster.Config().LimitsObserve
	okConn := within(&e.cluster.connections, limits.Connections)
	okPending := within(&e.cluster.pending, limits.PendingRequests)
	defer e.cluster.pending.Add(-1)
	if !observe && !(okConn && okPending) {
		e.cluster.connections.Add(-1)
		return nil, ErrLimit
	}
	d := net.Dialer{Timeout: connectTimeout, KeepAlive: 30 * time.Second}
	nc, err := d.DialContext(ctx, "tcp", e.Name)
	if err != nil {
		e.cluster.connections.Add(-1)
		return nil, err
	}
	tcp, ok := nc.(*net.TCPConn)
	if !ok {
		panic("upstream: a TCP dialer returned another connection")
	}
	c := &Conn{TCPConn: tcp, Endpoint: e, OverLimit: !okConn || !okPending}
	if c.raw, err = tcp.SyscallConn(); err != nil {
		c.close()
		return nil, err
	}
	c.check = c.peek
	return c, nil
}

// Put ends the exchange; the connection may serve another one.
func (e *Endpoint) Put(c *Conn, now time.Time) {
	e.active.Add(-1)
	c.since = now
	e.mu.Lock()
	keep := !e.retired && len(e.idle) < maxIdle && !c.returned
	if keep {
		c.returned = true
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

// Observe tells how long an exchange took.
func (e *Endpoint) Observe(now time.Time, d time.Duration) {
	e.mu.Lock()
	e.latency.Observe(now, d)
	e.mu.Unlock()
}

func (e *Endpoint) closeIdle(before time.Time) {
	e.mu.Lock()
	n := 0
	if before.IsZero() {
		n = len(e.idle)
	}
	for n < len(e.idle) && e.idle[n].since.Before(before) {
		n++
	}
	gone := append([]*Conn(nil), e.idle[:n]...)
	e.idle = append(e.idle[:0], e.idle[n:]...)
	e.mu.Unlock()
	for _, c := range gone {
		c.close()
	}
}

func (e *Endpoint) retire() {
	e.mu.Lock()
	e.retired = true
	e.mu.Unlock()
	e.closeIdle(time.Time{})
}

// takeOver moves what is known of an address to its new description.
func (e *Endpoint) takeOver(old *Endpoint) {
	old.mu.Lock()
	idle, latency := old.idle, old.latency
	old.idle, old.retired = nil, true
	old.mu.Unlock()
	for _, c := range idle {
		c.Endpoint = e
	}
	e.idle, e.latency = idle, latency
	e.ejected.Store(old.ejected.Load())
}

func (c *Conn) close() {
	c.Endpoint.cluster.connections.Add(-1)
	// The exchange is over and its outcome known: what Close says changes nothing.
	_ = c.TCPConn.Close()
}

// open looks whether the server has closed the connection, or has sent what
// nobody asked for, while it idled.
func (c *Conn) open() bool {
	c.alive = false
	if err := c.raw.Read(c.check); err != nil {
		return false
	}
	return c.alive
}

func (c *Conn) peek(fd uintptr) bool {
	var b [1]byte
	_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	c.alive = errors.Is(err, syscall.EAGAIN)
	return true
}
