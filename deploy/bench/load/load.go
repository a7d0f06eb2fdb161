// Package load asks one address again and again, over a fixed number of
// connections, and times the answers: as fast as they come (a closed loop), or
// at a fixed rate whatever comes (an open loop).
//
// It knows what the upstream server of the benchmark answers, and takes
// anything else for an error; a run with an error is no run. In an open loop a
// latency counts from when the request should have been sent, not from when a
// connection was free, so that a slow answer is not hidden by those that it
// held up.
//
// A Client belongs to the goroutine that calls it.
package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/loop"
	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// Protocols by the names of the upstream's ports.
const (
	HTTP1Small = "http1-small"
	HTTP1Large = "http1-large"
	TCPEcho    = "tcp-echo"
	GRPCUnary  = "grpc-unary"
	GRPCStream = "grpc-stream"
)

// Sizes in bytes: of bodies and messages that come back, and of the message of a
// gRPC call. An echo goes there and back.
const (
	Small    = 1 << 10
	Large    = 64 << 10
	Question = 128
)

// patience is how long an answer may take before the run fails.
const patience = 10 * time.Second

// Plan says whom to ask, in what, and over how many connections.
type Plan struct {
	Address  netip.AddrPort
	Protocol string
	// Connections to open, 1 or more.
	Connections int
	// Streams that a connection carries at once, 1 or more; 1 unless it is gRPC.
	Streams int
}

// Result of a run. All answers were right.
type Result struct {
	Requests int
	Took     time.Duration // until the last answer
	Latency  *measure.Histogram
}

// Rate is requests a second.
func (r Result) Rate() float64 { return float64(r.Requests) / r.Took.Seconds() }

// session is a connection's side of a protocol.
type session interface {
	loop.Handler
	// begin says what must be said before the first request.
	begin(c *loop.Conn)
	// ask sends a request; the client's answer is called when all of its answer
	// has come.
	ask(s *slot)
	// finish ends what outlives requests, and reports whether nothing of it is
	// left.
	finish(c *loop.Conn) (done bool)
}

// slot carries one request at a time.
type slot struct {
	conn    *loop.Conn
	session session
	due     time.Duration // when it should have been sent, since the client's base
	stream  stream        // of gRPC
}

// Client holds connections.
type Client struct {
	loop *loop.Loop
	base time.Time
	err  error // the first that spoils everything

	all      []*slot
	free     []*slot // taken from the end
	sessions map[*loop.Conn]session
	waiting  []time.Duration // due, but no slot is free
	flying   int             // requests without an answer

	record   *measure.Histogram
	requests int
	again    bool // a closed loop goes on
}

// Dial opens the connections one after the other; nothing is asked yet.
func Dial(ctx context.Context, p Plan) (*Client, error) {
	l, err := loop.New()
	if err != nil {
		return nil, err
	}
	c := &Client{loop: l, base: time.Now(), sessions: map[*loop.Conn]session{}}
	for range p.Connections {
		if err := errors.Join(c.dial(p), ctx.Err()); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return c, nil
}

func (c *Client) dial(p Plan) error {
	var s session
	switch p.Protocol {
	case HTTP1Small:
		s = &http1{client: c, want: Small}
	case HTTP1Large:
		s = &http1{client: c, want: Large}
	case TCPEcho:
		s = &echo{client: c}
	case GRPCUnary, GRPCStream:
		s = newGRPC(c, p.Protocol == GRPCStream)
	default:
		return fmt.Errorf("protocol %q is not known", p.Protocol)
	}
	conn, err := c.loop.Dial(p.Address, s)
	if err != nil {
		return err
	}
	c.sessions[conn] = s
	s.begin(conn)
	for range max(p.Streams, 1) {
		sl := &slot{conn: conn, session: s}
		c.all, c.free = append(c.all, sl), append(c.free, sl)
	}
	return nil
}

// Close ends all connections. What goes on in them is cut.
func (c *Client) Close() error {
	c.sessions = nil // their ends are no news
	return c.loop.Close()
}

// Slots is how many requests can be in flight.
func (c *Client) Slots() int { return len(c.all) }

// Closed asks in every slot, and again as soon as the answer is there, for the
// time given.
func (c *Client) Closed(ctx context.Context, d time.Duration) (Result, error) {
	return c.run(ctx, func() error {
		c.again = true
		for len(c.free) > 0 {
			c.ask(c.now())
		}
		end := c.now() + d
		for c.now() < end {
			if err := c.wait(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// Once asks once in every slot, at most so many at a time.
func (c *Client) Once(ctx context.Context, atOnce int) (Result, error) {
	return c.run(ctx, func() error {
		todo := c.all
		c.free = nil
		for len(todo) > 0 || c.flying > 0 {
			for ; len(todo) > 0 && c.flying < atOnce; todo = todo[1:] {
				c.free = append(c.free, todo[0])
				c.ask(c.now())
			}
			if err := c.wait(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// Open asks rate times a second for the time given, evenly spaced.
func (c *Client) Open(ctx context.Context, rate int, d time.Duration) (Result, error) {
	return c.run(ctx, func() error {
		every := time.Second / time.Duration(rate)
		start := c.now()
		next := start
		for next < start+d {
			for now := c.now(); next <= now && next < start+d; next += every {
				if len(c.free) == 0 {
					c.waiting = append(c.waiting, next)
					continue
				}
				c.ask(next)
			}
			if err := c.loop.Alarm(next - c.now()); err != nil {
				return err
			}
			if err := c.wait(ctx); err != nil {
				return err
			}
		}
		return nil
	})
}

// run does one run from a clean start and waits for what it left in flight.
func (c *Client) run(ctx context.Context, do func() error) (Result, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c.record, c.requests, c.again, c.waiting = new(measure.Histogram), 0, false, nil
	began := c.now()
	err := do()
	c.again = false
	for last := c.now() + patience; err == nil && (c.flying > 0 || len(c.waiting) > 0); {
		if err = c.wait(ctx); err == nil && c.now() > last {
			err = fmt.Errorf("%d requests have no answer after %s", c.flying+len(c.waiting), patience)
		}
	}
	if err != nil {
		c.err = err // its answers could come in the next run
		return Result{}, err
	}
	return Result{Requests: c.requests, Took: c.now() - began, Latency: c.record}, nil
}

// Finish ends what outlives requests, such as the streams of gRPC, and waits for
// the other side to agree that all went well.
func (c *Client) Finish(ctx context.Context) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for last := c.now() + patience; ; {
		left := 0
		for conn, s := range c.sessions {
			if !s.finish(conn) {
				left++
			}
		}
		if left == 0 {
			return c.err
		}
		if err := c.wait(ctx); err != nil {
			return err
		}
		if c.now() > last {
			return fmt.Errorf("the streams of %d connections have not ended after %s", left, patience)
		}
	}
}

func (c *Client) now() time.Duration { return time.Since(c.base) }

func (c *Client) wait(ctx context.Context) error {
	if err := c.loop.Wait(50 * time.Millisecond); err != nil {
		return err
	}
	if c.err != nil {
		return c.err
	}
	return ctx.Err()
}

// ask sends a request in a free slot, of which there is one.
func (c *Client) ask(due time.Duration) {
	s := c.free[len(c.free)-1]
	c.free = c.free[:len(c.free)-1]
	s.due = due
	c.flying++
	s.session.ask(s)
}

// answer is called by a session when the answer of a slot's request is there.
func (c *Client) answer(s *slot) {
	now := c.now()
	c.record.Record(now - s.due)
	c.requests++
	c.flying--
	c.free = append(c.free, s)
	switch {
	case c.again:
		c.ask(now)
	case len(c.waiting) > 0:
		due := c.waiting[0]
		c.waiting = c.waiting[1:]
		c.ask(due)
	default:
	}
}

// closed is called by a session when its connection has ended; nil means that
// this side did it.
func (c *Client) closed(err error) {
	if errors.Is(err, io.EOF) {
		err = errors.New("the other side closed the connection")
	}
	if c.err == nil && c.sessions != nil && err != nil {
		c.err = err
	}
}
