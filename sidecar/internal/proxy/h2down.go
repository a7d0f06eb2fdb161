package proxy

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
)

// h2Down is an exchange whose client speaks HTTP/2, and the client's side of it:
// one stream.
type h2Down struct {
	exchange
	s *http2.Stream
}

var h2Downs = sync.Pool{New: func() any { return new(h2Down) }}

// serveHTTP2 serves the streams of one connection until it ends.
func (p *path) serveHTTP2(ctx context.Context, c *listener.Conn, peer caller) {
	nc := c.Transport()
	early := append([]byte(nil), c.Unread()...)
	c.Release()
	c.ReadBy(time.Time{}) // deadlines are http2's from here on
	c.WriteBy(time.Time{})
	_ = nc.SetDeadline(time.Time{})
	s := http2.NewServer(nc, early, p.http2)
	c.OnDrain(s.Drain)
	defer c.OnDrain(nil)
	err := s.Serve(func(s *http2.Stream) {
		d, ok := h2Downs.Get().(*h2Down)
		if !ok {
			panic("proxy: the pool holds something else than exchanges")
		}
		d.path, d.ctx, d.caller, d.s = p, ctx, peer, s
		d.down = d
		d.serve()
		s.OnGone(nil)
		s.Release()
		d.s = nil
		d.forget()
		h2Downs.Put(d)
	})
	// Requests of it may never have come to a line of their own.
	var broken *http2.ConnError
	if errors.As(err, &broken) && broken.Reason != "" {
		p.refuseConn(c, peer, logged[telemetry.HTTP2], accesslog.DPE, broken.Reason+": the client broke a rule of HTTP/2 or its rations, and the connection was ended with "+broken.Code.String())
	}
}

// serve takes the request of a stream down the path.
func (d *h2Down) serve() {
	d.begin()
	if d.s.ReadHead(&d.req, time.Time{}) != nil {
		return // reset before we came to it
	}
	d.bodyDone = d.req.Framing == http1.None
	use := d.fwd.use
	d.s.OnGone(func() { d.fwd.hangUpOn(use) })
	d.run()
}

func (d *h2Down) readBody(wait bool) ([]byte, bool, error) {
	if d.bodyDone {
		return nil, true, nil
	}
	return d.s.ReadBody(wait, time.Now().Add(bodyTimeout))
}

func (d *h2Down) bodyTrailers() []http1.Header { return d.s.Trailers() }

func (d *h2Down) interruptBody() { d.s.Interrupt() }

func (d *h2Down) resumeBody() { d.s.Resume() }

func (d *h2Down) gone() bool { return d.s.Gone() }

func (d *h2Down) interim(h *http1.Head) error {
	if err := d.s.WriteHead(h, nil, false); err != nil {
		return err
	}
	return d.s.Flush()
}

func (d *h2Down) writeHead(h *http1.Head, e *http1.Edit, end bool) error {
	return d.s.WriteHead(h, e, end)
}

func (d *h2Down) writeBody(b []byte, end bool) error {
	if len(b) == 0 && !end {
		return nil
	}
	return d.s.WriteData(b, end, time.Now().Add(writeTimeout))
}

func (d *h2Down) writeTrailers(t []http1.Header) error { return d.s.WriteTrailers(t) }

func (d *h2Down) flush() error { return d.s.Flush() }

func (d *h2Down) cut() {
	code := http2.InternalError
	if d.flags&accesslog.DPE != 0 {
		code = http2.ProtocolError
	}
	d.s.Reset(code)
}
