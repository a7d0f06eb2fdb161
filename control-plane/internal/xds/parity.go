package xds

import (
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Support says how well a data plane keeps to a field of a policy.
type Support string

// The grades of support.
const (
	Honoured     Support = "honoured"
	Approximated Support = "approximated"
	Ignored      Support = "ignored"
)

// ParityNote says what one data plane makes of one field that the user set.
type ParityNote struct {
	Field     string    `json:"field"`
	DataPlane DataPlane `json:"dataPlane"`
	Support   Support   `json:"support"`
	// Detail says what happens instead; empty where honoured.
	Detail string `json:"detail,omitempty"`
}

// parity collects notes: Outrigger honours all; the others as given.
type parity []ParityNote

func (p *parity) note(field string, envoy Support, envoyDetail string, grpc Support, grpcDetail string) {
	*p = append(*p,
		ParityNote{Field: field, DataPlane: Outrigger, Support: Honoured},
		ParityNote{Field: field, DataPlane: Envoy, Support: envoy, Detail: envoyDetail},
		ParityNote{Field: field, DataPlane: GRPC, Support: grpc, Detail: grpcDetail})
}

// BreakerParity tells, for each field of a CircuitBreaker that is used, what
// each data plane makes of it. A nil policy has no notes.
func BreakerParity(b *mesh.CircuitBreaker) []ParityNote {
	if b == nil {
		return nil
	}
	var p parity
	if b.Observe {
		p.note("mode", Approximated, "limits and trip are not evaluated; ejections are detected and counted, not enforced",
			Ignored, "nothing is evaluated and nothing is enforced")
	}
	breakerTrip(&p, b)
	breakerLimits(&p, b)
	breakerEjection(&p, b)
	return p
}

func breakerTrip(p *parity, b *mesh.CircuitBreaker) {
	t := b.Trip
	if t == nil {
		return
	}
	const (
		perEndpoint = "no breaker for the service: each endpoint is ejected by itself"
		shadowed    = "spec.ejection is set and is what is sent"
		asPercent   = "an endpoint is ejected when every request of an interval failed"
		notTimed    = "latency does not count as failure"
	)
	approximated := func(detail string) (Support, string) {
		if b.Ejection != nil {
			return Ignored, shadowed
		}
		return Approximated, detail
	}
	grpc := func(detail string) (Support, string) {
		if b.Observe {
			return Ignored, "Observe is not sent"
		}
		return approximated(detail)
	}
	if t.ConsecutiveFailures > 0 {
		es, ed := approximated(perEndpoint + ", on consecutive 5xx and connection failures")
		gs, gd := grpc(asPercent)
		if b.Ejection == nil && !b.Observe && t.FailureRatio > 0 {
			gs, gd = Ignored, "trip.failureRatio is what is sent"
		}
		p.note("trip.consecutiveFailures", es, ed, gs, gd)
	}
	if t.FailureRatio > 0 {
		es, ed := approximated(perEndpoint + ", on its failure percentage")
		gs, gd := grpc(perEndpoint + ", on its failure percentage, which must exceed the ratio")
		p.note("trip.failureRatio", es, ed, gs, gd)
	}
	if t.SlowCallThreshold > 0 {
		p.note("trip.slowCall", Ignored, notTimed, Ignored, notTimed)
	}
	if t.ConsecutiveFailures == 0 && t.FailureRatio == 0 {
		return
	}
	es, ed := approximated("the interval of outlier detection, not a rolling window")
	gs, gd := grpc("the interval of outlier detection, not a rolling window")
	p.note("trip.window", es, ed, gs, gd)
	es, ed = approximated("the base ejection time, multiplied with each ejection")
	gs, gd = grpc("the base ejection time, multiplied with each ejection")
	p.note("trip.openFor", es, ed, gs, gd)
	const noProbe = "there is no half-open state: an endpoint returns with all its traffic"
	p.note("trip.halfOpenRequests", Ignored, noProbe, Ignored, noProbe)
	p.note("trip.failureOn", Ignored, "5xx and connection failures count", Ignored, "every status but OK counts")
}

func breakerLimits(p *parity, b *mesh.CircuitBreaker) {
	l := b.Limits
	only := "gRPC knows max_requests only (gRFC A32)"
	envoy, grpc := Honoured, Honoured
	envoyDetail, grpcDetail := "", ""
	if b.Observe {
		envoy, envoyDetail = Ignored, "no threshold is sent in Observe"
		grpc, grpcDetail = Ignored, envoyDetail
		only = envoyDetail
	}
	if l.Connections != nil {
		cs, cd := envoy, envoyDetail
		if !b.Observe {
			cs, cd = Approximated, "beyond it requests wait for a connection, as many as limits.pendingRequests allows, and are not rejected"
		}
		p.note("limits.connections", cs, cd, Ignored, only)
	}
	if l.PendingRequests != nil {
		p.note("limits.pendingRequests", envoy, envoyDetail, Ignored, only)
	}
	if l.Requests != nil {
		p.note("limits.requests", envoy, envoyDetail, grpc, grpcDetail)
	}
	if l.Retries != nil {
		if !b.Observe {
			envoy, envoyDetail = Approximated, "replaces the retry budget, which Envoy would otherwise prefer to it"
		}
		p.note("limits.retries", envoy, envoyDetail, Ignored, only)
	}
}

func breakerEjection(p *parity, b *mesh.CircuitBreaker) {
	e := b.Ejection
	if e == nil {
		return
	}
	envoy, envoyDetail := Honoured, ""
	grpc, detail := Honoured, ""
	if b.Observe {
		envoy, envoyDetail = Approximated, "detected and counted, not enforced"
		grpc, detail = Ignored, "Observe is not sent"
	}
	consecutive := func() (Support, string) {
		switch {
		case b.Observe:
			return grpc, detail
		case e.FailurePercentage != nil:
			return Ignored, "ejection.failurePercentage is what is sent"
		default:
			return Approximated, "an endpoint is ejected when every request of an interval failed"
		}
	}
	if e.Consecutive5xx > 0 {
		gs, gd := consecutive()
		p.note("ejection.consecutive5xx", envoy, envoyDetail, gs, gd)
	}
	if e.ConsecutiveGatewayErrors > 0 {
		gs, gd := consecutive()
		p.note("ejection.consecutiveGatewayErrors", envoy, envoyDetail, gs, gd)
	}
	if e.FailurePercentage != nil {
		gs, gd := grpc, detail
		if !b.Observe {
			gs, gd = Approximated, "the threshold must be exceeded, not reached; every status but OK counts"
		}
		p.note("ejection.failurePercentage", envoy, envoyDetail, gs, gd)
	}
	p.note("ejection.interval", envoy, envoyDetail, grpc, detail)
	p.note("ejection.baseEjectionTime", envoy, envoyDetail, grpc, detail)
	p.note("ejection.maxEjectionPercent", envoy, envoyDetail, grpc, detail)
}

// RetryParity tells, for each field of a route's retries that is used, what
// each data plane makes of it.
func RetryParity(r mesh.Retry) []ParityNote {
	if r.Attempts == 0 {
		return nil
	}
	var p parity
	if len(r.On) > 0 {
		var dropped []string
		for _, w := range r.On {
			if !slices.Contains(grpcRetryWords(), w) {
				dropped = append(dropped, w)
			}
		}
		gs, gd := Honoured, ""
		switch len(dropped) {
		case 0:
		case len(r.On):
			gs, gd = Ignored, "gRPC does not know "+strings.Join(dropped, ", ")+"; nothing is retried by this policy"
		default:
			gs, gd = Approximated, "gRPC does not know "+strings.Join(dropped, ", ")
		}
		p.note("retryOn", Honoured, "", gs, gd)
	}
	if len(r.IdempotentOn) > 0 {
		const detail = "retries by method do not exist: these conditions are not retried"
		p.note("retryOn (idempotent methods)", Ignored, detail, Ignored, detail)
	}
	if len(r.Status) > 0 {
		p.note("retryOnStatus", Honoured, "", Ignored, "gRPC retries on gRPC status only")
	}
	gs, gd := Honoured, ""
	if r.Attempts > grpcMaxRetries {
		gs, gd = Approximated, "gRPC makes 5 attempts at most (gRFC A44)"
	}
	p.note("attempts", Honoured, "", gs, gd)
	if r.PerTryTimeout > 0 {
		p.note("perTryTimeout", Honoured, "", Ignored, "gRPC bounds the call with all its attempts only (gRFC A44)")
	}
	if r.BackoffBase > 0 {
		p.note("backoff", Honoured, "", Honoured, "")
	}
	p.note("budget", Honoured, "", Ignored, "gRPC has no retry budget in xDS")
	return p
}
