package proxy

import (
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// result is how one attempt ended.
type result struct {
	// failure is retry.None where a response came.
	failure retry.Failure
	// status of the response that came, or that the client is to be told.
	status int
	// grpc is the grpc-status of a response, as far as it is known; retry.NoGRPC
	// without one.
	grpc int
	// flags to log if this attempt is the last.
	flags accesslog.Flags
	// held: the response was not passed on, because a retry has its place in the
	// budget already.
	held bool
	// client: it was the client that broke the exchange off; the upstream is not
	// to blame.
	client bool
	// final: another attempt could not go better, or would have no time.
	final bool
	// tunnel: the upstream has switched protocols, and its connection is still
	// ours.
	tunnel bool
	why    string
}

// attemptAll makes attempts until one is passed on to the client.
func (x *exchange) attemptAll() bool {
	b := x.cluster.Breaker()
	for {
		release := func() {}
		if x.attempts > 0 {
			release = x.cluster.ReleaseRetry
		}
		verdict := breaker.Verdict{Admit: true}
		if b != nil {
			verdict = b.Allow(time.Now())
			if verdict.Rejected {
				x.rejected = b.Policy().Name
				x.Metrics.Rejected(x.key, x.rejected, "breaker", b.Policy().Observe)
			}
			if !verdict.Admit {
				release()
				return x.overflowOpen(b, verdict)
			}
		}
		r := x.attemptOnce(b, verdict)
		release()
		if r.client {
			x.clientGone(r)
			return false
		}
		if r.tunnel {
			x.fwd.converse()
			return false
		}
		if x.answered {
			x.flags |= r.flags
			if r.why != "" {
				x.detail = r.why
			}
			return false
		}
		if !r.held {
			var flags accesslog.Flags
			if r.held, flags = x.reserveRetry(r); !r.held {
				x.flags |= r.flags | flags
				if r.flags&accesslog.UO != 0 {
					return x.overflow(r.why)
				}
				return x.reply(r.status, r.why)
			}
		}
		x.backOff()
		if x.down.gone() {
			x.cluster.ReleaseRetry()
			x.clientGone(result{client: true, why: errClientGone.Error()})
			return false
		}
	}
}

// attemptOnce is one attempt: { balance -> connection -> forward -> classify }.
func (x *exchange) attemptOnce(b *breaker.Breaker, v breaker.Verdict) (r result) {
	x.attempts++
	x.series.Attempt(x.attempts > 1)
	f := &x.fwd
	f.begin(x, b, v)
	f.endpoint = x.pick(x.cluster, x.tried)
	if f.endpoint == nil {
		f.abandon() // nothing was tried, so nothing is known
		return result{failure: retry.ConnectFailure, status: 503, flags: accesslog.UH, why: x.cluster.Name + " has no healthy endpoint", final: true}
	}
	x.tried = append(x.tried, f.endpoint)
	x.upstream = f.endpoint.Name
	over, err := f.connect()
	switch {
	case err != nil:
		if limit := upstream.LimitOf(err); limit != "" {
			f.abandon()
			x.overLimit(string(limit), false)
			return result{status: 503, flags: accesslog.UO, why: limit.Error(), final: true}
		}
		r = f.unconnected(err)
	default:
		if over != "" {
			x.overLimit(string(over), true)
		}
		r = f.run()
	}
	f.classify(r)
	return r
}

// overLimit counts what a limit of the cluster's policy rejected, or would have.
func (x *exchange) overLimit(limit string, observe bool) {
	x.rejected = x.cluster.Config().Policy
	x.Metrics.Rejected(x.key, x.rejected, limit, observe)
}

// abandon ends the attempt's ticket without an outcome.
func (f *forwarding) abandon() {
	f.classified = true
	if f.breaker != nil {
		f.breaker.Abandon(f.verdict.Ticket)
	}
}

// classify tells everyone who decides about later requests how the attempt
// went: once, which may be before a response that lasts has ended.
func (f *forwarding) classify(r result) {
	if f.classified {
		return
	}
	if r.client {
		f.abandon()
		return
	}
	f.classified = true
	x, now := f.exchange, time.Now()
	took := now.Sub(f.begun)
	if r.failure == retry.None {
		took = f.heard.Sub(f.begun) // what follows depends on the client, too
	}
	if x.grpc && r.failure == retry.None && r.grpc != retry.NoGRPC {
		r.status = httpOf(r.grpc)
	}
	f.endpoint.Observe(now, took, r.failure != retry.None || r.status >= 500)
	x.cluster.Record(now, f.endpoint, outlier.Result{Status: r.status, LocalOrigin: r.failure != retry.None})
	if f.breaker == nil {
		return
	}
	o := breaker.Outcome{At: f.begun, Duration: took, Ended: now, Status: r.status, Flags: r.flags.String(), Endpoint: f.endpoint.Name}
	switch r.failure {
	case retry.None:
		o.Failed = breaker.StatusFailures(r.status)
		if x.grpc {
			o.Failed |= breaker.GRPCFailures(r.grpc)
		}
	case retry.ConnectFailure:
		o.Status, o.Failed = 0, breaker.FailConnectFailure|breaker.FailGatewayError
	case retry.PerTryTimeout:
		o.Status, o.Failed = 0, breaker.FailTimeout|breaker.FailGatewayError
	case retry.Reset, retry.ResetBeforeRequest, retry.RefusedStream:
		o.Status, o.Failed = 0, breaker.FailReset|breaker.FailGatewayError
	}
	o.Describe(x.trace.TraceID[:], x.req.Method, x.urlPath)
	f.breaker.Done(f.verdict.Ticket, &o)
}

// reserveRetry decides about another attempt after r and takes its place in the
// budget, which attemptAll gives back. The flags say why there is none where one
// was wanted.
func (x *exchange) reserveRetry(r result) (bool, accesslog.Flags) {
	p := &x.route.Retry
	if r.failure == retry.RefusedStream && !r.final && x.replayable && x.attempts <= maxUnprocessed {
		// Nobody has looked at the request, which is why no policy is asked (RFC 9113,
		// 8.7): a connection that just ended, or took fewer streams than was thought,
		// costs no request. It is bounded, so that a server that refuses all is heard.
		x.cluster.AcquireRetry()
		return true, 0
	}
	if r.final || !p.Retriable(x.req.Method, retry.Outcome{Status: statusOf(r), GRPCStatus: r.grpc, Failure: r.failure}) {
		return false, 0
	}
	if x.attempts > p.Attempts || x.attempts >= maxAttempts {
		return false, accesslog.URX
	}
	if !x.replayable {
		x.Metrics.Rejected(x.key, p.Name, "replay", false)
		return false, accesslog.URX
	}
	if !x.deadline.IsZero() && time.Now().Add(p.BackoffBase).After(x.deadline) {
		return false, 0
	}
	allowed, over := x.cluster.AcquireRetry()
	switch {
	case over:
		x.overLimit("retries", allowed)
	case !allowed: // the budget
		x.Metrics.Rejected(x.key, p.Name, "retries", false)
	}
	if !allowed {
		x.cluster.ReleaseRetry()
		return false, accesslog.URX
	}
	return true, 0
}

// backOff waits before the next attempt, though not past the request's own
// timeout, nor when the proxy drains.
func (x *exchange) backOff() {
	wait := x.route.Retry.Backoff(x.attempts, rand.Float64())
	if !x.deadline.IsZero() {
		wait = min(wait, time.Until(x.deadline))
	}
	if wait <= 0 {
		return
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-x.ctx.Done():
	}
}

func statusOf(r result) int {
	if r.failure != retry.None {
		return 0
	}
	return r.status
}

// attemptHeader marks the attempt for the other side and for its logs.
func (x *exchange) attemptHeader() {
	if !x.outbound { // the caller's sidecar has
		return
	}
	n := len(x.edit.Set)
	if n > 0 && x.edit.Set[n-1].Name == "x-outrigger-attempt" {
		n--
	}
	x.edit.Set = append(x.edit.Set[:n], http1.Pair{Name: "x-outrigger-attempt", Value: strconv.AppendInt(x.attempt[:0], int64(x.attempts), 10)})
}
