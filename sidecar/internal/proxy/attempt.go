package proxy

import (
	"context"
	"errors"
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
	why   string
}

// attemptAll makes attempts until one is passed on to the client.
func (x *exchange) attemptAll() bool {
	b := x.cluster.Breaker()
	for {
		retrying := x.attempts > 0
		verdict := breaker.Verdict{Admit: true}
		if b != nil {
			verdict = b.Allow(time.Now())
			if verdict.Rejected {
				x.rejected = b.Policy().Name
				x.Metrics.Rejected(x.key, x.rejected, "breaker", b.Policy().Observe)
			}
			if !verdict.Admit {
				return x.overflowOpen(b, verdict)
			}
		}
		r := x.attemptOnce(b, verdict)
		if retrying {
			x.cluster.ReleaseRetry()
		}
		if r.client {
			x.clientGone(r)
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
				return x.reply(r.status, r.why)
			}
		}
		x.backOff()
	}
}

// attemptOnce is one attempt: { balance -> connection -> forward -> classify }.
func (x *exchange) attemptOnce(b *breaker.Breaker, v breaker.Verdict) (r result) {
	x.attempts++
	x.Metrics.Attempt(x.key, x.attempts > 1)
	start := time.Now()
	ep := x.cluster.Pick(x.tried)
	if ep == nil {
		if b != nil {
			b.Abandon(v.Ticket) // nothing was tried, so nothing is known
		}
		return result{failure: retry.ConnectFailure, status: 503, flags: accesslog.UH, why: x.cluster.Name + " has no healthy endpoint", final: true}
	}
	x.tried = append(x.tried, ep)
	x.upstream = ep.Name
	c, err := ep.Get(context.Background())
	switch {
	case errors.Is(err, upstream.ErrLimit):
		if b != nil {
			b.Abandon(v.Ticket)
		}
		policy := x.cluster.Config().Policy
		x.rejected = policy
		x.Metrics.Rejected(x.key, policy, "connections", false)
		return result{status: 503, flags: accesslog.UO, why: policy + ": limit of connections or pending requests is reached", final: true}
	case err != nil:
		r = result{failure: retry.ConnectFailure, status: 503, flags: accesslog.UF, why: "cannot connect to " + ep.Name + ": " + cause(err)}
	default:
		if c.OverLimit {
			x.rejected = x.cluster.Config().Policy
			x.Metrics.Rejected(x.key, x.rejected, "connections", true)
		}
		r = x.forward(c)
	}
	x.classify(b, v, ep, r, start)
	return r
}

// classify tells everyone who decides about later requests how this one went.
func (x *exchange) classify(b *breaker.Breaker, v breaker.Verdict, ep *upstream.Endpoint, r result, start time.Time) {
	now := time.Now()
	if r.client {
		if b != nil {
			b.Abandon(v.Ticket)
		}
		return
	}
	ep.Observe(now, now.Sub(start))
	x.cluster.Record(now, ep, outlier.Result{Status: r.status, LocalOrigin: r.failure != retry.None})
	if b == nil {
		return
	}
	o := breaker.Outcome{At: start, Duration: now.Sub(start), Status: r.status, Flags: r.flags.String(), Endpoint: ep.Name}
	switch r.failure {
	case retry.None:
		o.Failed = breaker.StatusFailures(r.status)
	case retry.ConnectFailure:
		o.Status, o.Failed = 0, breaker.FailConnectFailure|breaker.FailGatewayError
	case retry.PerTryTimeout:
		o.Status, o.Failed = 0, breaker.FailTimeout|breaker.FailGatewayError
	case retry.Reset, retry.ResetBeforeRequest, retry.RefusedStream:
		o.Status, o.Failed = 0, breaker.FailReset|breaker.FailGatewayError
	}
	o.Describe(x.trace.TraceID[:], x.req.Method, x.urlPath)
	b.Done(v.Ticket, &o)
}

// reserveRetry decides about another attempt after r and takes its place in the
// budget, which attemptAll gives back. The flags say why there is none where one
// was wanted.
func (x *exchange) reserveRetry(r result) (bool, accesslog.Flags) {
	p := &x.route.Retry
	if r.final || !p.Retriable(x.req.Method, retry.Outcome{Status: statusOf(r), GRPCStatus: retry.NoGRPC, Failure: r.failure}) {
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
	if !x.cluster.AcquireRetry() {
		x.cluster.ReleaseRetry()
		x.Metrics.Rejected(x.key, p.Name, "retries", false)
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
	n := len(x.edit.Set)
	if n > 0 && x.edit.Set[n-1].Name == "x-outrigger-attempt" {
		n--
	}
	x.pairs[n] = http1.Pair{Name: "x-outrigger-attempt", Value: strconv.AppendInt(x.attempt[:0], int64(x.attempts), 10)}
	x.edit.Set = x.pairs[:n+1]
}
