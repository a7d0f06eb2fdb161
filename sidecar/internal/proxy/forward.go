package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// forward sends the request over c and passes the response on to the client,
// or holds it back where the retry policy wants another attempt and one may be
// made. It ends c.
func (x *exchange) forward(c *upstream.Conn) (r result) {
	f := forwarding{exchange: x, c: c}
	keep := false
	defer func() {
		f.in.release()
		if keep {
			c.Endpoint.Put(c, time.Now())
		} else {
			c.Endpoint.Discard(c)
		}
	}()
	if err := f.in.reset(c.TCPConn); err != nil {
		return f.lost(err)
	}
	if err := c.SetDeadline(x.attemptDeadline(time.Now())); err != nil {
		return f.lost(err)
	}
	if r, ok := f.send(); !ok {
		return r
	}
	r, keep = f.receive()
	if f.pump != nil {
		// The response is over before the request is, or the attempt has failed.
		if !f.stopPump() {
			keep = false
		}
		if f.clientErr != nil && r.failure != retry.None {
			r = f.clientFault()
		}
	}
	return r
}

// forwarding is the state of one attempt.
type forwarding struct {
	*exchange
	c    *upstream.Conn
	in   reader // from the upstream
	resp http1.Head
	sent bool // some bytes of the request went out

	pump      chan struct{} // closed when the pump has ended; nil without one
	pumpDone  bool
	stop      atomic.Bool
	clientErr error
}

func (x *exchange) attemptDeadline(now time.Time) time.Time {
	d := x.deadline
	if per := x.route.Retry.PerTryTimeout; per > 0 && (d.IsZero() || now.Add(per).Before(d)) {
		d = now.Add(per)
	}
	return d
}

// send writes the head and as much of the body as has been read: with a small
// body that is the whole request in one write. What is still to come is sent by
// a pump beside us, for the response may begin before the request has ended.
func (f *forwarding) send() (result, bool) {
	x := f.exchange
	if err := x.readBuffered(); err != nil {
		f.clientErr = err
		return f.clientFault(), false
	}
	x.attemptHeader()
	out := http1.AppendRequestHead(x.out[:0], &x.req, &x.edit)
	out = x.appendBody(out, x.replay)
	if x.bodyDone && x.req.Framing == http1.Chunked {
		out = http1.AppendLastChunk(out, x.body.Trailers())
	}
	x.out = out
	n, err := f.c.Write(out)
	f.sent = n > 0
	if err != nil && n == 0 {
		return f.lost(err), false
	}
	// A write that failed half-way may have met an early response: read it.
	if err == nil && !x.bodyDone {
		f.pump = make(chan struct{})
		go f.pumpBody()
	}
	return result{}, true
}

// readBuffered takes what has already come of the body, before anything is
// sent.
func (x *exchange) readBuffered() error {
	for !x.bodyDone && x.in.r < x.in.w && len(x.replay) < maxReplay {
		n, data, done, err := x.body.Next(x.in.unread())
		if err != nil {
			return err
		}
		x.in.use(n)
		x.replay = append(x.replay, data...)
		x.bodyDone = done
	}
	return nil
}

func (x *exchange) appendBody(out, data []byte) []byte {
	if len(data) == 0 {
		return out
	}
	if x.req.Framing != http1.Chunked {
		return append(out, data...)
	}
	out = http1.AppendChunkHeader(out, len(data))
	return append(append(out, data...), "\r\n"...)
}

// pumpBody carries the rest of the request's body from the client to the
// upstream. It alone uses the client's reader and the upstream's writing side
// until it ends.
func (f *forwarding) pumpBody() {
	defer close(f.pump)
	x := f.exchange
	var out []byte
	for !x.bodyDone {
		if x.in.r == x.in.w {
			if err := x.conn.SetReadDeadline(time.Now().Add(bodyTimeout)); err != nil {
				f.breakOff(err)
				return
			}
			if f.stop.Load() { // set before stopPump sets its deadline, which ours may have replaced
				return
			}
			if err := x.in.fill(); err != nil {
				f.breakOff(err)
				return
			}
		}
		n, data, done, err := x.body.Next(x.in.unread())
		if err != nil {
			f.breakOff(err)
			return
		}
		x.in.use(n)
		out = x.appendBody(out[:0], data)
		if x.replayable && len(x.replay)+len(data) <= maxReplay {
			x.replay = append(x.replay, data...)
		} else {
			x.replayable = false
			x.pumped += int64(len(data))
		}
		x.bodyDone = done
		if done && x.req.Framing == http1.Chunked {
			out = http1.AppendLastChunk(out, x.body.Trailers())
		}
		if len(out) == 0 {
			continue
		}
		if _, err := f.c.Write(out); err != nil {
			// The upstream reads no more; receive will see why.
			return
		}
	}
	f.pumpDone = true
}

// breakOff ends the attempt because the client has: the upstream must not take
// half a request for a whole one.
func (f *forwarding) breakOff(err error) {
	if f.stop.Load() {
		return // it was stopPump that woke us
	}
	f.clientErr = err
	_ = f.c.Close() // wakes receive; the connection is discarded
}

// stopPump ends the pump and waits for it. It reports whether the whole body was
// sent, so that the upstream connection can be used again.
func (f *forwarding) stopPump() bool {
	f.stop.Store(true)
	select {
	case <-f.pump:
	default:
		_ = f.conn.SetReadDeadline(time.Unix(1, 0))
		_ = f.c.SetWriteDeadline(time.Unix(1, 0))
		<-f.pump
	}
	return f.pumpDone
}

// receive reads the response and passes it on. keep says that the connection
// may serve another exchange.
func (f *forwarding) receive() (r result, keep bool) {
	x := f.exchange
	for {
		n, err := f.readHead()
		if err != nil {
			var bad *http1.Error
			if errors.As(err, &bad) {
				x.Metrics.ProtocolError("upstream", bad.Reason)
				return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.c.Endpoint.Name + " answered " + bad.Reason + ": " + bad.Detail}, false
			}
			return f.lost(err), false
		}
		switch {
		case f.resp.Status == 101:
			return f.upgrade(n), false
		case f.resp.Status < 200: // an interim response is passed on and the next awaited
			if x.req.Minor == 1 {
				x.out = http1.AppendResponseHead(x.out[:0], &f.resp, nil)
				if err := x.writeClient(x.out); err != nil {
					return result{client: true, why: "the client went away: " + err.Error()}, false
				}
			}
			f.in.use(n)
			continue
		}
		f.in.use(n)
		return f.passOn()
	}
}

func (f *forwarding) readHead() (int, error) {
	f.resp.Reset()
	for {
		if b := f.in.unread(); len(b) > 0 {
			n, err := http1.ParseResponse(&f.resp, b, &limits, f.req.Method)
			if !errors.Is(err, http1.ErrIncomplete) {
				return n, err
			}
		}
		if err := f.in.fill(); err != nil {
			return 0, err
		}
	}
}

// passOn sends the response whose head has been parsed to the client, unless it
// is to be retried.
func (f *forwarding) passOn() (r result, keep bool) {
	x := f.exchange
	r = result{status: f.resp.Status}
	var body http1.Body
	body.Limits = &limits
	body.Reset(f.resp.Framing, f.resp.Length)
	if f.pumpEnded() {
		var flags accesslog.Flags
		if r.held, flags = x.reserveRetry(r); r.held {
			return r, f.discardBody(&body)
		}
		r.flags |= flags
	}
	x.status = r.status
	if x.Conns.Draining() || !x.bodyDone && f.pump == nil {
		x.mustClose = true
	}
	framing := f.resp.Framing
	e := http1.Edit{KeepAlive: x.req.Minor == 0 && !x.mustClose}
	if framing == http1.UntilClose && x.req.Minor == 1 {
		framing = http1.Chunked // so that the client's connection survives
		e.Framing = framing
	}
	if framing == http1.Chunked && x.req.Minor == 0 {
		framing = http1.UntilClose // HTTP/1.0 knows no chunks
		e.Framing = framing
		x.mustClose = true
	}
	e.Close = x.mustClose
	x.answered = true
	x.out = http1.AppendResponseHead(x.out[:0], &f.resp, &e)
	keep = !f.resp.Close
	for !body.Done() {
		if f.in.r == f.in.w {
			// What is at hand goes out before more is waited for: a stream that
			// pauses must not hold back what it has said.
			if err := f.flush(); err != nil {
				return result{client: true, why: "the client went away: " + err.Error(), status: r.status}, false
			}
			if err := f.in.fill(); err != nil {
				if !errors.Is(err, io.EOF) || body.End() != nil {
					x.mustClose = true // the client must see that the body is not whole
					lost := f.lost(err)
					lost.flags &^= accesslog.UF
					return lost, false
				}
				keep = false
				break
			}
		}
		n, data, _, err := body.Next(f.in.unread())
		if err != nil {
			x.mustClose = true
			x.Metrics.ProtocolError("upstream", "body")
			return result{failure: retry.Reset, status: r.status, flags: accesslog.UPE, why: err.Error()}, false
		}
		f.in.use(n)
		x.bytesOut += int64(len(data))
		if framing == http1.Chunked && len(data) > 0 {
			x.out = http1.AppendChunkHeader(x.out, len(data))
			x.out = append(append(x.out, data...), "\r\n"...)
		} else {
			x.out = append(x.out, data...)
		}
		if len(x.out) >= bufferSize {
			if err := f.flush(); err != nil {
				return result{client: true, why: "the client went away: " + err.Error(), status: r.status}, false
			}
		}
	}
	if framing == http1.Chunked {
		x.out = http1.AppendLastChunk(x.out, body.Trailers())
	}
	if err := f.flush(); err != nil {
		return result{client: true, why: "the client went away: " + err.Error(), status: r.status}, false
	}
	return r, keep && f.in.r == f.in.w // bytes that nobody asked for: not reusable
}

func (f *forwarding) flush() error {
	if len(f.out) == 0 {
		return nil
	}
	err := f.writeClient(f.out)
	f.out = f.out[:0]
	return err
}

// pumpEnded: nobody else uses the request's body. While it is still being sent a
// response is passed on rather than retried.
func (f *forwarding) pumpEnded() bool {
	if f.pump == nil {
		return true
	}
	select {
	case <-f.pump:
		return true
	default:
		return false
	}
}

// discardBody reads the rest of a short response so that its connection can be
// used again.
func (f *forwarding) discardBody(body *http1.Body) bool {
	const most = 16 << 10
	for read := 0; !body.Done(); {
		if f.in.r == f.in.w {
			if read > most || f.resp.Framing == http1.UntilClose || f.in.fill() != nil {
				return false
			}
		}
		n, _, _, err := body.Next(f.in.unread())
		if err != nil {
			return false
		}
		read += n
		f.in.use(n)
	}
	return !f.resp.Close && f.in.r == f.in.w
}

// upgrade passes a 101 on and then carries bytes both ways until both sides
// have ended (RFC 9110, 7.8).
func (f *forwarding) upgrade(n int) result {
	x := f.exchange
	if !x.req.Upgrade || !f.resp.Upgrade {
		return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.c.Endpoint.Name + " switched protocols unasked"}
	}
	f.in.use(n)
	x.status, x.answered, x.mustClose = 101, true, true
	x.out = http1.AppendResponseHead(x.out[:0], &f.resp, &http1.Edit{KeepUpgrade: true})
	x.out = append(x.out, f.in.unread()...)
	f.in.use(len(f.in.unread()))
	if err := x.writeClient(x.out); err != nil {
		return result{client: true, why: "the client went away: " + err.Error()}
	}
	early := append([]byte(nil), x.in.unread()...)
	x.in.use(len(early))
	_ = x.conn.SetDeadline(time.Time{})
	_ = f.c.SetDeadline(time.Time{})
	if len(early) > 0 {
		if _, err := f.c.Write(early); err != nil {
			return f.lost(err)
		}
	}
	in, out := tunnel(x.conn.TCPConn, f.c.TCPConn)
	x.pumped += in + int64(len(early))
	x.bytesOut += out
	return result{status: 101}
}

// lost says what became of an attempt whose connection ended.
func (f *forwarding) lost(err error) result {
	x := f.exchange
	name := f.c.Endpoint.Name
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if !x.deadline.IsZero() && !time.Now().Before(x.deadline) {
			return result{failure: retry.PerTryTimeout, status: 504, flags: accesslog.UT, why: fmt.Sprintf("request timeout of %s is over", x.deadline.Sub(x.start)), final: true}
		}
		return result{failure: retry.PerTryTimeout, status: 504, flags: accesslog.UT, why: fmt.Sprintf("%s did not answer within %s", name, x.route.Retry.PerTryTimeout)}
	}
	failure := retry.Reset
	if !f.sent {
		failure = retry.ResetBeforeRequest
	}
	why := cause(err)
	if errors.Is(err, io.EOF) {
		why = "closed the connection before its response was complete"
	}
	return result{failure: failure, status: 503, flags: accesslog.UC, why: name + ": " + why}
}

// clientFault is the end of an attempt whose request body was cut short or
// malformed.
func (f *forwarding) clientFault() result {
	x := f.exchange
	var bad *http1.Error
	if errors.As(f.clientErr, &bad) && !x.answered {
		x.Metrics.ProtocolError("downstream", bad.Reason)
		x.mustClose = true
		x.flags |= accesslog.DPE
		x.reply(bad.Status, bad.Reason+": "+bad.Detail)
		return result{status: bad.Status, flags: accesslog.DPE, client: true, why: bad.Detail}
	}
	return result{client: true, why: "the client went away in the middle of its request"}
}

// cause is what the system said, without the addresses that net adds.
func cause(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err.Error()
	}
	return err.Error()
}
