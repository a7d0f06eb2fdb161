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
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// While the proxy waits for an upstream it looks whether the client still waits
// for the proxy: first after firstLook, then at intervals that double up to
// lastLook.
const (
	firstLook = 100 * time.Millisecond
	lastLook  = time.Second
	// drainPatience is how long an answer that is not passed on may take to end
	// before its connection is given up.
	drainPatience = 25 * time.Millisecond
)

var errClientGone = errors.New("the client went away before the answer was complete")

func bodyTimeoutError() error {
	return &http1.Error{Status: 408, Reason: "body_timeout", Detail: "the request's body did not arrive in time"}
}

// forwarding is the state of one attempt. An exchange has one and uses it again
// for each attempt.
type forwarding struct {
	*exchange
	breaker    *breaker.Breaker // nil where the cluster has none
	verdict    breaker.Verdict
	endpoint   *upstream.Endpoint
	classified bool // all have been told how it went

	begun time.Time
	until time.Time // deadline; zero is none
	look  time.Duration
	heard time.Time // when the head of the response had come

	c        *upstream.Conn
	in       reader // from the upstream
	resp     http1.Head
	respBody http1.Body
	sent     bool // some bytes of the request went out
	broken   bool // what send wrote did not go out as a whole
	slow     bool // the deadline passed while the client was to send its body

	pump      chan struct{} // closed when the pump has ended; nil without one
	pumpDone  bool
	stop      atomic.Bool
	reading   atomic.Bool // the pump waits for the client
	interim   bool        // an interim response was passed on
	clientErr error
}

// begin prepares for the next attempt of x.
func (f *forwarding) begin(x *exchange, b *breaker.Breaker, v breaker.Verdict) {
	f.exchange, f.breaker, f.verdict, f.endpoint, f.classified = x, b, v, nil, false
	f.begun, f.heard, f.look = time.Now(), time.Time{}, firstLook
	f.until = x.deadline
	if per := x.route.Retry.PerTryTimeout; per > 0 {
		f.until = sooner(f.until, f.begun.Add(per))
	}
	f.c, f.sent, f.broken, f.slow, f.interim = nil, false, false, false, false
	f.pump, f.pumpDone, f.clientErr = nil, false, nil
	f.stop.Store(false)
	f.reading.Store(false)
}

// sooner of two deadlines, of which a may be zero, which is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// run sends the request over the connection and passes the response on to the
// client, or holds it back where the retry policy wants another attempt and one
// may be made. It ends the connection, unless the result is a tunnel.
func (f *forwarding) run() (r result) {
	f.in = reader{nc: f.c.TCPConn}
	keep := false
	defer func() {
		f.in.release()
		switch {
		case r.tunnel:
		case keep:
			f.c.Endpoint.Put(f.c, time.Now())
		default:
			f.c.Endpoint.Discard(f.c)
		}
	}()
	if err := errors.Join(f.c.SetWriteDeadline(f.until), f.c.SetReadDeadline(sooner(f.until, f.begun.Add(f.look)))); err != nil {
		return f.lost(err)
	}
	if r, ok := f.send(); !ok {
		return r
	}
	r, keep = f.receive()
	keep = keep && !f.broken
	if f.pump != nil {
		// The response is over before the request is, or the attempt has failed.
		if !f.stopPump() {
			keep = false
		}
		if f.slow {
			f.clientErr = bodyTimeoutError()
		}
		if f.clientErr != nil && r.failure != retry.None {
			r = f.clientFault()
		}
	}
	return r
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
	f.sent, f.broken = n > 0, err != nil
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
			f.reading.Store(true)
			err := x.in.fill()
			f.reading.Store(false)
			if err != nil {
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
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = bodyTimeoutError()
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
				f.interim = true
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
		if err := f.await(); err != nil {
			return 0, err
		}
	}
}

// await reads more from the upstream. It gives up at the attempt's deadline, and
// when the client has gone.
func (f *forwarding) await() error {
	for {
		err := f.in.fill()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		now := time.Now()
		if !f.until.IsZero() && !now.Before(f.until) {
			return err
		}
		if f.exchange.in.gone() {
			return errClientGone
		}
		f.look = min(2*f.look, lastLook)
		if err := f.c.SetReadDeadline(sooner(f.until, now.Add(f.look))); err != nil {
			return err
		}
	}
}

// passOn sends the response whose head has been parsed to the client, unless it
// is to be retried.
func (f *forwarding) passOn() (r result, keep bool) {
	x, body := f.exchange, &f.respBody
	f.heard = time.Now()
	r = result{status: f.resp.Status}
	body.Limits = &limits
	body.Reset(f.resp.Framing, f.resp.Length)
	if f.pumpEnded() {
		if f.clientErr != nil {
			return f.clientFault(), false
		}
		var flags accesslog.Flags
		if r.held, flags = x.reserveRetry(r); r.held {
			return r, f.discardBody()
		}
		r.flags |= flags
		x.mustClose = x.mustClose || !x.bodyDone
	}
	x.mustClose = x.mustClose || x.Conns.Draining()
	x.status = r.status
	if f.verdict.State == breaker.HalfOpen {
		f.classify(r) // others wait for the probe's outcome, and this body may last
	}
	if x.route.Retry.PerTryTimeout > 0 {
		f.until = x.deadline // the rest of the response has the request's own
		if err := f.c.SetWriteDeadline(f.until); err != nil {
			return f.lost(err), false
		}
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
			if err := f.await(); err != nil {
				if !errors.Is(err, io.EOF) || body.End() != nil {
					x.mustClose = true // the client must see that the body is not whole
					if framing == http1.UntilClose {
						_ = x.conn.SetLinger(0) // only a reset tells it
					}
					return f.lost(err), false
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
func (f *forwarding) discardBody() bool {
	const most = 16 << 10
	if f.c.SetReadDeadline(f.heard.Add(drainPatience)) != nil {
		return false
	}
	for read := 0; !f.respBody.Done(); {
		if f.in.r == f.in.w {
			if read > most || f.resp.Framing == http1.UntilClose || f.in.fill() != nil {
				return false
			}
		}
		n, _, _, err := f.respBody.Next(f.in.unread())
		if err != nil {
			return false
		}
		read += n
		f.in.use(n)
	}
	return !f.resp.Close && f.in.r == f.in.w
}

// upgrade passes a 101 on (RFC 9110, 7.8). The request must have ended: what
// follows it belongs to the new protocol.
func (f *forwarding) upgrade(n int) result {
	x := f.exchange
	if !x.req.Upgrade || !f.resp.Upgrade {
		return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.c.Endpoint.Name + " switched protocols unasked"}
	}
	for f.pump != nil && !f.pumpEnded() {
		select {
		case <-f.pump:
		case <-time.After(lastLook):
			if x.in.gone() {
				return f.lost(errClientGone)
			}
		}
	}
	if !x.bodyDone || f.broken || f.pump != nil && !f.pumpDone {
		return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.c.Endpoint.Name + " switched protocols before the request was complete"}
	}
	f.in.use(n)
	f.heard = time.Now()
	x.status, x.answered, x.mustClose = 101, true, true
	x.out = http1.AppendResponseHead(x.out[:0], &f.resp, &http1.Edit{KeepUpgrade: true})
	x.out = append(x.out, f.in.unread()...)
	x.bytesOut = int64(len(f.in.unread()))
	f.in.use(len(f.in.unread()))
	if err := x.writeClient(x.out); err != nil {
		return result{client: true, why: "the client went away: " + err.Error()}
	}
	return result{status: 101, tunnel: true}
}

// converse carries bytes both ways after a 101 until both sides have ended. The
// attempt is over by then: a tunnel may last for days.
func (f *forwarding) converse() {
	x := f.exchange
	defer f.c.Endpoint.Discard(f.c)
	early := x.in.unread()
	x.in.use(len(early))
	x.pumped += int64(len(early))
	err := errors.Join(x.conn.SetDeadline(time.Time{}), f.c.SetDeadline(time.Time{}))
	if err == nil && len(early) > 0 {
		_, err = f.c.Write(early)
	}
	if err != nil {
		r := f.lost(err)
		x.flags |= r.flags
		x.detail = r.why
		return
	}
	in, out := tunnel(x.conn.TCPConn, f.c.TCPConn)
	x.pumped += in
	x.bytesOut += out
}

// unconnected says what became of an attempt that got no connection.
func (f *forwarding) unconnected(err error) result {
	if !f.until.IsZero() && !time.Now().Before(f.until) {
		return f.timedOut()
	}
	return result{failure: retry.ConnectFailure, status: 503, flags: accesslog.UF, why: "cannot connect to " + f.endpoint.Name + ": " + cause(err)}
}

// timedOut is the end of an attempt whose deadline has passed.
func (f *forwarding) timedOut() result {
	x := f.exchange
	if !x.deadline.IsZero() && !time.Now().Before(x.deadline) {
		return result{failure: retry.PerTryTimeout, status: 504, flags: accesslog.UT, why: fmt.Sprintf("request timeout of %s is over", x.deadline.Sub(x.start)), final: true}
	}
	return result{failure: retry.PerTryTimeout, status: 504, flags: accesslog.UT, why: fmt.Sprintf("%s did not answer within %s", f.endpoint.Name, x.route.Retry.PerTryTimeout)}
}

// lost says what became of an attempt whose connection ended.
func (f *forwarding) lost(err error) result {
	x := f.exchange
	name := f.c.Endpoint.Name
	switch {
	case errors.Is(err, errClientGone):
		return result{client: true, status: x.status, why: err.Error()}
	case errors.Is(err, os.ErrDeadlineExceeded):
		// While the upstream waits for a client that sends nothing, the time that
		// passes is the client's.
		f.slow = f.reading.Load() && !x.answered && (f.interim || !x.req.Expect100)
		return f.timedOut()
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
		x.mustClose = true
		x.protocolError(bad)
		return result{status: bad.Status, flags: accesslog.DPE, client: true, why: x.detail}
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
