package upstream

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

// Stream is a place on an HTTP/2 connection to an endpoint, lent to one exchange.
type Stream struct {
	*http2.Stream
	Endpoint *Endpoint
	// Over is as that of a Conn.
	Over Limit

	c *shared
}

// shared is an HTTP/2 connection, which many exchanges use at once.
type shared struct {
	*http2.Client
	verified
	since time.Time // when a stream last ended; guarded by the pool's lock, as by is
}

// dialing is a connection being made, which others wait for.
type dialing struct {
	done chan struct{}
	over Limit
	err  error
}

// maxShared bounds the HTTP/2 connections to one endpoint. Beyond it a stream is
// refused as one of PendingRequests is.
const maxShared = 64

// Open borrows a stream, on a connection that has room or a new one, made before
// deadline (zero: none). It must be ended by Close. The error is a Limit, or what
// connecting met.
func (e *Endpoint) Open(ctx context.Context, deadline time.Time) (Stream, error) {
	var over Limit
	entered := time.Now()
	for {
		e.mu.Lock()
		s, ok := e.openShared()
		if ok {
			e.mu.Unlock()
			e.active.Add(1)
			s.Over = over
			return s, nil
		}
		d := e.dialing
		if d == nil {
			if len(e.shared) >= maxShared {
				e.mu.Unlock()
				return Stream{}, PendingRequests
			}
			d = &dialing{done: make(chan struct{})}
			e.dialing = d
			e.mu.Unlock()
			e.share(ctx, deadline, d)
			if over = d.over; d.err != nil {
				return Stream{}, d.err
			}
			continue
		}
		e.mu.Unlock()
		if err := d.wait(ctx, deadline); err != nil {
			return Stream{}, err
		}
		// Whoever dialled may have had less time than we have.
		if d.err != nil && time.Since(entered) >= connectTimeout {
			return Stream{}, d.err
		}
	}
}

func (d *dialing) wait(ctx context.Context, deadline time.Time) error {
	if deadline.IsZero() {
		deadline = time.Now().Add(connectTimeout)
	}
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-d.done:
		return nil
	case <-t.C:
		return context.DeadlineExceeded
	case <-ctx.Done():
		return ctx.Err()
	}
}

// openShared opens a stream on the first connection that has room, and forgets
// those that are over. The lock is held.
func (e *Endpoint) openShared() (Stream, bool) {
	for i := 0; i < len(e.shared); i++ {
		c := e.shared[i]
		err := http2.ErrGone
		var s *http2.Stream
		if c.holds(e) {
			s, err = c.Client.Open()
		}
		switch {
		case err == nil:
			return Stream{Stream: s, Endpoint: e, c: c}, true
		case !errors.Is(err, http2.ErrBusy):
			c.Drain()
			e.shared = slices.Delete(e.shared, i, i+1)
			i--
		}
	}
	return Stream{}, false
}

// share makes a connection that others may use, and tells those who wait.
func (e *Endpoint) share(ctx context.Context, deadline time.Time, d *dialing) {
	got, err := e.dial(ctx, deadline, "h2")
	e.mu.Lock()
	defer e.mu.Unlock()
	defer close(d.done)
	e.dialing = nil
	if err != nil {
		d.err = err
		return
	}
	d.over = got.over
	var nc net.Conn = got.tcp
	if got.tls != nil {
		nc = got.tls
	}
	c := &shared{Client: http2.NewClient(nc, e.cluster.http2), verified: got.verified, since: time.Now()}
	// Also where the endpoint has retired meanwhile: whoever chose it before is
	// served, and the last stream ends the connection.
	e.shared = append(e.shared, c)
	running := e.cluster.open.run(c, func() {
		_ = nc.Close()
		e.cluster.connections.Add(-1)
		e.mu.Lock()
		e.shared = slices.DeleteFunc(e.shared, func(o *shared) bool { return o == c })
		e.mu.Unlock()
	})
	if !running {
		d.err = errors.New("the proxy ends")
		e.shared = slices.DeleteFunc(e.shared, func(o *shared) bool { return o == c })
		e.cluster.connections.Add(-1)
		_ = nc.Close()
	}
}

// Peer is the SPIFFE ID that the other end has proved; empty in clear.
func (s *Stream) Peer() string { return s.c.peer }

// Close ends the exchange.
func (s *Stream) Close(now time.Time) {
	s.Stream.Release()
	s.Endpoint.active.Add(-1)
	p := s.Endpoint.pool
	p.mu.Lock()
	s.c.since = now
	retired := p.retired
	p.mu.Unlock()
	if retired {
		p.closeIdleShared(time.Time{}) // no sweep finds it any more
	}
}

// closeIdleShared ends connections without streams that nobody has used since
// before; all without streams where it is zero.
func (p *pool) closeIdleShared(before time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shared = slices.DeleteFunc(p.shared, func(c *shared) bool {
		if c.Active() > 0 || !before.IsZero() && !c.since.Before(before) {
			return false
		}
		c.Drain()
		return true
	})
}

// connections are the HTTP/2 connections of a set of clusters, those that drain
// among them. Each has a goroutine that reads, owned by the set.
type connections struct {
	readers sync.WaitGroup
	mu      sync.Mutex
	all     map[*shared]struct{}
	over    bool // cut was called
}

// run reads from c until it has ended. It returns false after cut, when nobody
// waits for readers any more.
func (o *connections) run(c *shared, ended func()) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over {
		return false
	}
	if o.all == nil {
		o.all = map[*shared]struct{}{}
	}
	o.all[c] = struct{}{}
	o.readers.Go(func() {
		_ = c.Run() // its streams have been told why
		o.mu.Lock()
		delete(o.all, c)
		o.mu.Unlock()
		ended()
	})
	return true
}

// cut ends all connections, whatever runs on them, and waits.
func (o *connections) cut() {
	o.mu.Lock()
	o.over = true
	for c := range o.all {
		c.Client.Close()
	}
	o.mu.Unlock()
	o.readers.Wait()
}
