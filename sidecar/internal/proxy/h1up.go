package proxy

import (
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// h1Up is the called side of an attempt over HTTP/1.1: a connection that is ours
// alone until release.
type h1Up struct {
	c      *upstream.Conn
	method []byte // of the request, which decides how its response is framed

	framing http1.Framing // of the request's body
	out     []byte
	outBuf  *[]byte
	wrote   atomic.Bool

	body   http1.Body
	closes bool // the response says that the connection ends with it
	// bodiless: the response has no body, for its status or the method of the request.
	bodiless bool
	woken    atomic.Bool // interrupted, in vain if the exchange was complete
}

func (u *h1Up) begin(c *upstream.Conn, method []byte) {
	u.c, u.method, u.framing, u.closes = c, method, 0, false
	u.wrote.Store(false)
	u.woken.Store(false)
	u.body.Limits = &limits
	u.body.Reset(http1.None, 0)
}

func (u *h1Up) writeHead(h *http1.Head, e *http1.Edit, _ bool) error {
	u.framing = h.Framing
	if u.outBuf == nil {
		u.outBuf = wire.Take()
	}
	u.out = http1.AppendRequestHead((*u.outBuf)[:0], h, e)
	return nil
}

func (u *h1Up) writeBody(b []byte, end bool) error {
	if len(b) > 0 {
		u.out = appendSpan(u.out, b, u.framing)
	}
	if end && u.framing == http1.Chunked {
		u.out = http1.AppendLastChunk(u.out, nil)
	}
	return nil
}

func (u *h1Up) writeTrailers(t []http1.Header) error {
	if u.framing == http1.Chunked {
		u.out = http1.AppendLastChunk(u.out, t)
	}
	return nil
}

func (u *h1Up) flush() error {
	if len(u.out) == 0 {
		return nil
	}
	n, err := u.c.Write(u.out)
	if n > 0 {
		u.wrote.Store(true)
	}
	u.out = u.out[:0]
	return err
}

func (u *h1Up) sent() bool { return u.wrote.Load() }

func (u *h1Up) writeBy(t time.Time) { u.c.WriteBy(t) }

func (u *h1Up) interruptWrite() {
	u.woken.Store(true)
	u.c.InterruptWrite()
}

func (u *h1Up) readHead(h *http1.Head, by time.Time) error {
	for {
		if b := u.c.Unread(); len(b) > 0 {
			n, err := http1.ParseResponse(h, b, &limits, u.method)
			switch {
			case errors.Is(err, http1.ErrIncomplete):
			case err != nil:
				return err
			default:
				u.begun(h, n)
				return nil
			}
		}
		u.c.ReadBy(by)
		if err := u.c.Fill(); err != nil {
			return err
		}
	}
}

// begun takes in that a head of n bytes has been read. It is valid until the
// body is read, by when it has been passed on.
func (u *h1Up) begun(h *http1.Head, n int) {
	u.c.Use(n)
	if h.Status >= 200 {
		u.closes, u.bodiless = h.Close, h.Framing == http1.None
		u.body.Reset(h.Framing, h.Length)
	}
}

func (u *h1Up) readBody(wait bool, by time.Time) (data []byte, done bool, err error) {
	for {
		if u.body.Done() {
			return nil, true, nil
		}
		if u.c.Empty() {
			if !wait {
				return nil, false, nil
			}
			u.c.ReadBy(by)
			if err := u.c.Fill(); err != nil {
				if errors.Is(err, io.EOF) && u.body.End() == nil {
					u.closes = true
					return nil, true, nil
				}
				return nil, false, err
			}
		}
		n, data, done, err := u.body.Next(u.c.Unread())
		if err != nil {
			return nil, false, err
		}
		u.c.Use(n)
		if len(data) > 0 || done {
			return data, done, nil
		}
	}
}

func (u *h1Up) bodyTrailers() []http1.Header { return u.body.Trailers() }

func (u *h1Up) wake() {
	u.woken.Store(true)
	u.c.Interrupt()
}

func (u *h1Up) unprocessed() bool { return false }

func (u *h1Up) release(keep bool) {
	// Bytes that nobody asked for make it unfit.
	keep = keep && !u.closes && u.body.Done() && u.c.Empty()
	u.c.Release()
	if u.outBuf != nil {
		wire.Give(u.outBuf)
		u.out, u.outBuf = nil, nil
	}
	c := u.c
	u.c = nil
	if keep {
		if u.woken.Load() {
			c.Resume()
		}
		c.Suspect = u.bodiless
		c.Endpoint.Put(c, time.Now())
	} else {
		c.Endpoint.Discard(c)
	}
}
