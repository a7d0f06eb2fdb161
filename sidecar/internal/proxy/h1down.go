package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// h1Down is an exchange whose client speaks HTTP/1.1, and the client's side of
// it. It is taken from a pool when a request's first bytes are there and given
// back when it has been answered, so that an idle connection has none.
type h1Down struct {
	exchange
	conn    *listener.Conn
	body    http1.Body
	framing http1.Framing // of the response's body, as written
	out     []byte
	outBuf  *[]byte
	// halfClosed is since when the client is known to have closed its direction.
	halfClosed time.Time
	woken      bool // the reading of the body was interrupted, in vain if it was complete
}

var h1Downs = sync.Pool{New: func() any { return new(h1Down) }}

// serveHTTP1 serves the requests of one connection, in order, until it ends.
func (p *path) serveHTTP1(ctx context.Context, c *listener.Conn, peer caller) {
	defer c.Release()
	now := time.Now()
	for {
		if c.Empty() {
			c.Release()
			if c.FillIdle(now.Add(idleTimeout)) != nil {
				return
			}
		}
		d, ok := h1Downs.Get().(*h1Down)
		if !ok {
			panic("proxy: the pool holds something else than exchanges")
		}
		d.path, d.ctx, d.conn, d.caller = p, ctx, c, peer
		d.down = d
		again := d.serveOne()
		now = d.ended
		d.release()
		if !again {
			return
		}
	}
}

// release gives everything back. Nothing of the request may be used afterwards.
func (d *h1Down) release() {
	if d.outBuf != nil {
		wire.Give(d.outBuf)
	}
	d.out, d.outBuf, d.conn, d.woken, d.halfClosed = nil, nil, nil, false, time.Time{}
	d.forget()
	h1Downs.Put(d)
}

// serveOne reads a head, takes the request down the path, and reports whether
// the connection can serve another.
func (d *h1Down) serveOne() (again bool) {
	d.begin()
	n, err := d.readHead()
	if err != nil {
		return d.refuse(err)
	}
	d.conn.Pin(n)
	defer d.conn.Unpin()
	d.body.Limits = &limits
	d.body.Reset(d.req.Framing, d.req.Length)
	d.bodyDone = d.body.Done()
	d.mustClose = d.req.Close || d.conn.Ending()
	d.run()
	if !d.mustClose && !d.bodyDone {
		d.mustClose = true // where the next request begins is not known
	}
	if d.mustClose {
		d.lingeringClose()
	} else if d.woken {
		d.conn.Resume()
	}
	return !d.mustClose
}

func (d *h1Down) readHead() (int, error) {
	for {
		if b := d.conn.Unread(); len(b) > 0 {
			n, err := http1.ParseRequest(&d.req, b, &limits)
			if !errors.Is(err, http1.ErrIncomplete) {
				return n, err
			}
		}
		d.conn.ReadBy(d.start.Add(headTimeout))
		if err := d.conn.Fill(); err != nil {
			return 0, err
		}
	}
}

// refuse answers a head that could not be read.
func (d *h1Down) refuse(err error) bool {
	d.mustClose = true
	var bad *http1.Error
	switch {
	case errors.As(err, &bad):
		d.protocolError(bad)
	case errors.Is(err, os.ErrDeadlineExceeded) && !d.conn.Empty():
		d.Metrics.ProtocolError("downstream", "head_timeout")
		d.flags |= accesslog.DPE
		d.reply(408, "head_timeout: the request's head took longer than "+headTimeout.String())
	default: // the client went away before it had said anything: nothing to log
		d.ended = d.start
		return false
	}
	d.req.Reset() // what was parsed of it is not to be trusted
	d.finish()
	d.lingeringClose()
	return false
}

// lingeringClose lets the client read the answer before the connection ends:
// closing with its bytes unread would send a reset that overtakes it (RFC 9112,
// 9.6). What it still sends is thrown away, within bounds.
func (d *h1Down) lingeringClose() {
	if d.bodyDone && d.conn.Empty() {
		return
	}
	const bytesMax, patience = 256 << 10, 500 * time.Millisecond
	if d.conn.CloseWrite() != nil || d.conn.TCP().SetReadDeadline(time.Now().Add(patience)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(net.Conn(d.conn.TCP()), bytesMax))
}

func (d *h1Down) readBody(wait bool) (data []byte, done bool, err error) {
	for {
		if d.body.Done() {
			return nil, true, nil
		}
		if d.conn.Empty() {
			if !wait {
				return nil, false, nil
			}
			d.conn.ReadBy(time.Now().Add(bodyTimeout))
			if err := d.conn.Fill(); err != nil {
				return nil, false, err
			}
		}
		n, data, done, err := d.body.Next(d.conn.Unread())
		if err != nil {
			return nil, false, err
		}
		d.conn.Use(n)
		if len(data) > 0 || done {
			return data, done, nil
		}
	}
}

func (d *h1Down) bodyTrailers() []http1.Header { return d.body.Trailers() }

func (d *h1Down) interruptBody() {
	d.woken = true
	d.conn.Interrupt()
}

func (d *h1Down) resumeBody() {
	if d.woken {
		d.woken = false
		d.conn.Resume()
	}
}

// gone lets a client that has closed its direction wait for its answer: it may
// have done so only to say that its request is whole (RFC 9112, 9.6), and cannot
// be told from one that has left.
func (d *h1Down) gone() bool {
	err := d.conn.Gone()
	if !errors.Is(err, io.EOF) {
		return err != nil
	}
	now := time.Now()
	if d.halfClosed.IsZero() {
		d.halfClosed = now
	}
	// While a pump reads the body, it is the pump that finds out whether the body is
	// whole, and bodyDone is its own.
	return d.fwd.pumpEnded() && !d.bodyDone || now.Sub(d.halfClosed) >= halfCloseGrace
}

func (d *h1Down) interim(h *http1.Head) error {
	if d.req.Minor == 0 { // HTTP/1.0 knows none
		return nil
	}
	d.take()
	d.out = http1.AppendResponseHead(d.out, h, nil)
	return d.flush()
}

func (d *h1Down) writeHead(h *http1.Head, e *http1.Edit, end bool) error {
	framing := h.Framing
	if e.Framing != 0 {
		framing = e.Framing
	}
	if !end {
		// In chunks the client's connection survives, and trailers, which HTTP/2 may
		// send behind a body of known length, have a place.
		if d.req.Minor == 1 && (framing == http1.UntilClose || framing == http1.Length && h.Get("trailer") != nil) {
			framing = http1.Chunked
			e.Framing = framing
		}
		if framing == http1.Chunked && d.req.Minor == 0 {
			framing = http1.UntilClose // HTTP/1.0 knows no chunks
			e.Framing = framing
			d.mustClose = true
		}
	}
	e.Close = d.mustClose
	e.KeepAlive = d.req.Minor == 0 && !d.mustClose
	d.framing = framing
	d.take()
	d.out = http1.AppendResponseHead(d.out, h, e)
	return nil
}

func (d *h1Down) take() {
	if d.outBuf == nil {
		d.outBuf = wire.Take()
		d.out = (*d.outBuf)[:0]
	}
}

func (d *h1Down) writeBody(b []byte, end bool) error {
	if len(b) > 0 {
		d.take()
		d.out = appendSpan(d.out, b, d.framing)
	}
	if end && d.framing == http1.Chunked {
		d.out = http1.AppendLastChunk(d.out, nil)
	}
	if len(d.out) >= wire.BufferSize {
		return d.flush()
	}
	return nil
}

func (d *h1Down) writeTrailers(t []http1.Header) error {
	if d.framing == http1.Chunked {
		d.out = http1.AppendLastChunk(d.out, t)
	}
	return nil
}

func (d *h1Down) flush() error {
	if len(d.out) == 0 {
		return nil
	}
	d.conn.WriteBy(time.Now().Add(writeTimeout))
	_, err := d.conn.Write(d.out)
	d.out = d.out[:0]
	return err
}

func (d *h1Down) cut() {
	d.mustClose = true
	if d.framing == http1.UntilClose {
		d.conn.Abort() // only a reset tells the client
	}
}

// appendSpan appends a span of a body, framed.
func appendSpan(out, data []byte, f http1.Framing) []byte {
	if f != http1.Chunked {
		return append(out, data...)
	}
	out = http1.AppendChunkHeader(out, len(data))
	return append(append(out, data...), http1.ChunkEnd...)
}
