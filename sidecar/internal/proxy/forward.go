package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
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

var (
	errClientGone  = errors.New("the client went away before the answer was complete")
	errClientStuck = errors.New("it takes no bytes")
)

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
	classified bool   // all have been told how it went
	peer       string // SPIFFE ID that the endpoint has proved; empty in clear

	begun time.Time
	until time.Time // deadline; zero is none
	look  time.Duration
	heard time.Time // when the head of the response had come

	mu       sync.Mutex // guards the setting of up
	use      uint64     // counts the exchanges, for callbacks that come late; guarded by mu
	up       callee     // what is called; h1 or h2
	h1       h1Up
	h2       h2Up
	resp     http1.Head
	respEdit http1.Edit
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
	f.broken, f.slow, f.interim = false, false, false
	f.pump, f.pumpDone, f.clientErr = nil, false, nil
	f.stop.Store(false)
	f.reading.Store(false)
}

// forget drops what must not outlive the request.
func (f *forwarding) forget() {
	f.mu.Lock()
	f.use++
	f.mu.Unlock()
	f.exchange, f.breaker, f.endpoint, f.peer = nil, nil, nil, ""
	f.resp.Reset()
	f.respEdit = http1.Edit{}
}

// sooner of two deadlines, of which a may be zero, which is none.
func sooner(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// connect borrows a connection, or a stream of one, for the attempt. over is the
// limit that it passed in Observe mode.
func (f *forwarding) connect() (over upstream.Limit, err error) {
	if f.useHTTP2() {
		if err = f.h2.open(f.endpoint, f.until); err != nil {
			return "", err
		}
		f.called(&f.h2)
		f.peer = f.h2.s.Peer()
		return f.h2.s.Over, nil
	}
	// Not the listener's context: a drain lets requests finish.
	c, err := f.endpoint.Get(context.Background(), f.until)
	if err != nil {
		return "", err
	}
	f.h1.begin(c, f.req.Method)
	f.called(&f.h1)
	f.peer = c.Peer()
	return c.Over, nil
}

// useHTTP2 says what the endpoint is spoken to in: the application, and a port of
// which nobody has said what it speaks, in what the caller speaks; others, in what
// the control plane says.
func (f *forwarding) useHTTP2() bool {
	if f.outbound && f.dest.Protocol != protocolAuto {
		return f.cluster.Config().HTTP2
	}
	_, is := f.down.(*h2Down)
	return is
}

// called sets whom hangUp wakes; nil for nobody.
func (f *forwarding) called(up callee) {
	f.mu.Lock()
	f.up = up
	f.mu.Unlock()
}

// hangUp ends the attempt, whatever it waits for: the client has gone. It may be
// called by any goroutine at any time.
func (f *forwarding) hangUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.up != nil {
		f.up.wake()
	}
}

// hangUpOn is hangUp unless the exchange that it is meant for is over: a
// callback may be on its way while the forwarding serves another one already.
func (f *forwarding) hangUpOn(use uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.use == use && f.up != nil {
		f.up.wake()
	}
}

// run sends the request over the connection and passes the response on to the
// client, or holds it back where the retry policy wants another attempt and one
// may be made. It ends the connection, unless the result is a tunnel.
func (f *forwarding) run() (r result) {
	keep := false
	defer func() {
		if !r.tunnel {
			up := f.up
			f.called(nil) // from here on it may be another's
			up.release(keep)
		}
	}()
	f.up.writeBy(f.until)
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
	x.down.resumeBody() // an attempt before may have woken it
	if err := x.readBuffered(); err != nil {
		f.clientErr = err
		return f.clientFault(), false
	}
	x.attemptHeader()
	x.edit.KeepUpgrade = x.req.Upgrade && f.up == callee(&f.h1)
	whole := x.bodyDone && x.replayable
	trailers := x.down.bodyTrailers()
	err := f.up.writeHead(&x.req, &x.edit, whole && len(x.replay) == 0 && len(trailers) == 0)
	if err == nil && len(x.replay) > 0 {
		err = f.up.writeBody(x.replay, whole && len(trailers) == 0)
	}
	switch {
	case err != nil || !whole:
	case len(trailers) > 0:
		err = f.up.writeTrailers(trailers)
	case len(x.replay) == 0:
		err = f.up.writeBody(nil, true)
	}
	if err == nil {
		err = f.up.flush()
	}
	f.broken = err != nil
	if err != nil && !f.up.sent() {
		return f.lost(err), false
	}
	// A write that failed half-way may have met an early response: read it.
	if err == nil && !x.bodyDone {
		// Receiving ends at the attempt's deadline, and stops the pump with it. The
		// pump's own is the request's, for the per-try timeout may end before it does.
		f.up.writeBy(x.deadline)
		f.pump = make(chan struct{})
		go f.pumpBody()
	}
	return result{}, true
}

// readBuffered takes what has already come of the body, before anything is
// sent.
func (x *exchange) readBuffered() error {
	for !x.bodyDone && len(x.replay) < maxReplay {
		data, done, err := x.down.readBody(false)
		if err != nil {
			return err
		}
		x.replay = append(x.replay, data...)
		x.bodyDone = done
		if len(data) == 0 {
			break
		}
	}
	return nil
}

// pumpBody carries the rest of the request's body from the client to the
// upstream. It alone reads the client's body and writes to the upstream until it
// ends.
func (f *forwarding) pumpBody() {
	defer close(f.pump)
	x := f.exchange
	for !x.bodyDone {
		data, done, err := x.down.readBody(false)
		if err == nil && len(data) == 0 && !done {
			if f.stop.Load() {
				return
			}
			f.reading.Store(true)
			data, done, err = x.down.readBody(true)
			f.reading.Store(false)
		}
		if err != nil {
			f.breakOff(err)
			return
		}
		if x.replayable && len(x.replay)+len(data) <= maxReplay {
			x.replay = append(x.replay, data...)
		} else {
			x.replayable = false
			x.pumped += int64(len(data))
		}
		x.bodyDone = done
		// Where the upstream reads no more, receive will see why.
		if done && len(x.down.bodyTrailers()) > 0 {
			if f.up.writeBody(data, false) != nil || f.up.writeTrailers(x.down.bodyTrailers()) != nil {
				return
			}
		} else if f.up.writeBody(data, done) != nil {
			return
		}
		if f.up.flush() != nil {
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
	f.hangUp() // receive; the connection is discarded
}

// stopPump ends the pump and waits for it. It reports whether the whole body was
// sent, so that the upstream connection can be used again.
func (f *forwarding) stopPump() bool {
	f.stop.Store(true)
	select {
	case <-f.pump:
	default:
		f.down.interruptBody()
		f.up.interruptWrite()
		<-f.pump
	}
	return f.pumpDone
}

// receive reads the response and passes it on. keep says that the connection
// may serve another exchange.
func (f *forwarding) receive() (r result, keep bool) {
	x := f.exchange
	for {
		f.resp.Reset()
		if err := f.awaitHead(); err != nil {
			var bad *http1.Error
			if errors.As(err, &bad) {
				x.Metrics.ProtocolError("upstream", bad.Reason)
				return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.endpoint.Name + " answered " + bad.Reason + ": " + bad.Detail}, false
			}
			return f.lost(err), false
		}
		switch {
		case f.resp.Status == 101:
			return f.upgrade(), false
		case f.resp.Status < 200: // an interim response is passed on and the next awaited
			f.interim = true
			if err := x.down.interim(&f.resp); err != nil {
				return left(err, 0), false
			}
			continue
		}
		return f.passOn()
	}
}

// left is the end of an attempt whose client has gone.
func left(err error, status int) result {
	return result{client: true, why: "the client went away: " + err.Error(), status: status}
}

// awaitHead reads the next head of the response.
func (f *forwarding) awaitHead() error {
	for {
		err := f.up.readHead(&f.resp, f.nextLook())
		if err = f.patient(err); err != nil || f.resp.Status != 0 {
			return err
		}
	}
}

// awaitBody reads more of the response's body, waiting for it.
func (f *forwarding) awaitBody() (data []byte, done bool, err error) {
	for {
		data, done, err = f.up.readBody(true, f.nextLook())
		if err = f.patient(err); err != nil || done || len(data) > 0 {
			return data, done, err
		}
	}
}

// nextLook is when to look whether the client still waits.
func (f *forwarding) nextLook() time.Time {
	return sooner(f.until, time.Now().Add(f.look))
}

// patient turns the end of a look into nil where waiting goes on: the attempt's
// deadline has not passed, and the client has not gone.
func (f *forwarding) patient(err error) error {
	if (errors.Is(err, wire.ErrInterrupted) || errors.Is(err, http2.ErrInterrupted)) && f.down.gone() {
		return errClientGone
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if !f.until.IsZero() && !time.Now().Before(f.until) {
		return err
	}
	if f.down.gone() {
		return errClientGone
	}
	f.look = min(2*f.look, lastLook)
	return nil
}

// passOn sends the response whose head has been read to the client, unless it is
// to be retried.
func (f *forwarding) passOn() (r result, keep bool) {
	x := f.exchange
	f.heard = time.Now()
	r = result{status: f.resp.Status, grpc: retry.NoGRPC}
	if x.grpc {
		r.grpc = parseGRPCStatus(f.resp.Get("grpc-status"))
	}
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
	x.status, x.grpcStatus = r.status, r.grpc
	if f.verdict.State == breaker.HalfOpen && (!x.grpc || r.grpc != retry.NoGRPC) {
		f.classify(r) // others wait for the probe's outcome, and this body may last
	}
	if x.route.Retry.PerTryTimeout > 0 {
		f.until = x.deadline // the rest of the response has the request's own
	}
	f.respEdit = http1.Edit{}
	if c := x.backend.Response; c != nil {
		f.respEdit.Set, f.respEdit.Add, f.respEdit.Remove = slices.Clone(c.Set), slices.Clone(c.Add), c.Remove
	}
	x.answered = true
	done := f.resp.Framing == http1.None
	if err := x.down.writeHead(&f.resp, &f.respEdit, done); err != nil {
		return left(err, r.status), false
	}
	for !done {
		if bytes := f.unread(); bytes >= minSplice {
			if err := x.down.flush(); err != nil {
				return left(err, r.status), false
			}
			switch err := f.splice(bytes); {
			case err == nil:
				done = true
				continue
			case errors.Is(err, errClientGone), errors.Is(err, errClientStuck):
				return left(err, r.status), false
			default:
				x.down.cut()
				return f.lost(err), false
			}
		}
		var data []byte
		var err error
		data, done, err = f.up.readBody(false, time.Time{})
		if err == nil && !done && len(data) == 0 {
			// What is at hand goes out before more is waited for: a stream that
			// pauses must not hold back what it has said.
			if err := x.down.flush(); err != nil {
				return left(err, r.status), false
			}
			data, done, err = f.awaitBody()
		}
		if err != nil {
			x.down.cut() // the client must see that the body is not whole
			var bad *http1.Error
			if errors.As(err, &bad) {
				x.Metrics.ProtocolError("upstream", "body")
				return result{failure: retry.Reset, status: r.status, flags: accesslog.UPE, why: err.Error()}, false
			}
			return f.lost(err), false
		}
		x.bytesOut += int64(len(data))
		trailers := done && len(f.up.bodyTrailers()) > 0
		if err = x.down.writeBody(data, done && !trailers); err == nil && trailers {
			if x.grpc {
				r.grpc = grpcStatusIn(f.up.bodyTrailers())
				x.grpcStatus = r.grpc
			}
			err = x.down.writeTrailers(f.up.bodyTrailers())
		}
		if err != nil {
			return left(err, r.status), false
		}
	}
	if err := x.down.flush(); err != nil {
		return left(err, r.status), false
	}
	return r, true
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
	if f.resp.Framing == http1.UntilClose {
		return false
	}
	by := f.heard.Add(drainPatience)
	for read := 0; read <= most; {
		data, done, err := f.up.readBody(true, by)
		if err != nil {
			return false
		}
		if done {
			return true
		}
		read += len(data)
	}
	return false
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
	name := f.endpoint.Name
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
	switch {
	case f.up.unprocessed():
		failure = retry.RefusedStream
	case !f.up.sent():
		failure = retry.ResetBeforeRequest
	}
	why := cause(err)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
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
