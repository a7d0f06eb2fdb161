// Package listener accepts connections, knows which of them idle, and ends them
// in order when the proxy drains.
//
// It knows sockets and their life; what is spoken on them is the handler's. Each
// connection has a goroutine, owned by the Group that accepted it: Drain returns
// when all have ended.
package listener

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// MaxConnections that one Group serves at once. What is beyond is closed as soon
// as it is accepted, and counted.
const MaxConnections = 20000

// lateWait is how long a connection that was accepted while the group drains is
// waited for to begin its only request.
const lateWait = 5 * time.Second

// Group is the connections of all listeners of a proxy. The zero value is ready.
type Group struct {
	// Refuse has new connections closed while it returns true, for memory is short.
	// Nil: none is. It is set before Serve.
	Refuse func() bool

	draining atomic.Bool
	refused  atomic.Uint64

	mu     sync.Mutex
	conns  map[*Conn]struct{}
	closed bool // Drain has begun to wait: no more connections
	wg     sync.WaitGroup
}

// Conn is an accepted connection.
type Conn struct {
	wire.Conn
	group  *Group
	state  atomic.Int32 // busy, idle or woken
	ending atomic.Bool
	late   bool   // accepted while the group drained, and has said nothing yet
	drain  func() // guarded by group.mu
}

const (
	busy int32 = iota
	idle
	woken // by Drain, while it was idle
)

// Draining reports whether no new work should begin: answers should say
// Connection: close.
func (g *Group) Draining() bool { return g.draining.Load() }

// Refused is how many connections were closed for MaxConnections.
func (g *Group) Refused() uint64 { return g.refused.Load() }

// Active is how many connections there are.
func (g *Group) Active() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.conns)
}

// Serve accepts until ctx ends or the listener is closed, and handles each
// connection in a goroutine of its own. handle must not keep the Conn; it is
// closed when handle returns.
func (g *Group) Serve(ctx context.Context, l *net.TCPListener, handle func(*Conn)) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	backoff := time.Millisecond
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ECONNABORTED) {
				// Out of descriptors or memory: those in use must end before more are
				// accepted.
				g.refused.Add(1)
				time.Sleep(backoff)
				backoff = min(2*backoff, time.Second)
				continue
			}
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		backoff = time.Millisecond
		conn := &Conn{group: g}
		if g.Refuse != nil && g.Refuse() || conn.Init(c, nil) != nil || !g.add(conn) {
			g.refused.Add(1)
			_ = c.Close()
			continue
		}
		go func() {
			defer g.remove(conn)
			handle(conn)
		}()
	}
}

func (g *Group) add(c *Conn) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed || len(g.conns) >= MaxConnections {
		return false
	}
	if g.conns == nil {
		g.conns = map[*Conn]struct{}{}
	}
	c.late = g.draining.Load()
	g.conns[c] = struct{}{}
	g.wg.Add(1)
	return true
}

func (g *Group) remove(c *Conn) {
	_ = c.Close()
	g.mu.Lock()
	delete(g.conns, c)
	g.mu.Unlock()
	g.wg.Done()
}

// FillIdle is Fill for a connection that waits for its next request, until by:
// Drain ends the wait. A request whose first bytes have come is still served.
func (c *Conn) FillIdle(by time.Time) error {
	if c.late {
		if late := time.Now().Add(lateWait); late.Before(by) {
			by = late
		}
		c.ReadBy(by)
		err := c.Fill()
		c.late = err != nil
		return err
	}
	c.ReadBy(by)
	c.state.Store(idle)
	// Either this sees that the group drains or Lame sees that we are idle.
	draining := c.Ending()
	if draining {
		c.Interrupt()
	}
	err := c.Fill()
	if !c.state.CompareAndSwap(idle, busy) {
		// Lame or End woke us; they do so with the lock held.
		c.group.mu.Lock()
		c.state.Store(busy)
		c.group.mu.Unlock()
		draining = true
	}
	if draining && err == nil {
		c.Resume()
	}
	return err
}

// OnDrain has f called when the group drains, at once if it does already: for a
// protocol that can tell its peer to send no more requests. f must not block.
func (c *Conn) OnDrain(f func()) {
	c.group.mu.Lock()
	c.drain = f
	draining := c.Ending()
	c.group.mu.Unlock()
	if draining && f != nil {
		f()
	}
}

// Ending reports whether no new work should begin on the connection.
func (c *Conn) Ending() bool { return c.ending.Load() || c.group.draining.Load() }

// End ends the connection alone, as Lame does with all: at once where it idles,
// else after what it is busy with.
func (c *Conn) End() {
	c.ending.Store(true)
	c.group.mu.Lock()
	tell := c.wake()
	c.group.mu.Unlock()
	if tell != nil {
		tell()
	}
}

// wake ends the wait for a next request, and returns what tells the peer to send
// none. The group's lock is held.
func (c *Conn) wake() (tell func()) {
	if c.state.CompareAndSwap(idle, woken) {
		c.Interrupt() // the reader still serves a request whose first bytes are here
	}
	return c.drain
}

// Lame ends idle connections at once, and every other one after what it is busy
// with. New ones are still accepted, where somebody Serves, and get one request
// each.
func (g *Group) Lame() {
	var tell []func()
	g.mu.Lock()
	g.draining.Store(true)
	for c := range g.conns {
		if f := c.wake(); f != nil {
			tell = append(tell, f)
		}
	}
	g.mu.Unlock()
	for _, f := range tell {
		f()
	}
}

// Drain does what Lame does, accepts nothing more, lets busy connections finish,
// and closes what is left when ctx ends. It returns how many had to be closed.
func (g *Group) Drain(ctx context.Context) (forced int) {
	g.Lame()
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }()
	select {
	case <-done:
		return 0
	case <-ctx.Done():
	}
	g.mu.Lock()
	for c := range g.conns {
		forced++
		_ = c.Close()
	}
	g.mu.Unlock()
	<-done
	return forced
}

// Go runs f in a goroutine that Drain waits for, as it does for connections. It
// reports whether it did: not where the group drains.
func (g *Group) Go(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.draining.Load() {
		return false
	}
	g.wg.Go(f)
	return true
}
