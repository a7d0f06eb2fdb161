package translate

import (
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// addCircuitBreakers gives every port the breaker that names it: the one that
// names the port itself before the one that names its Service.
func (b *builder) addCircuitBreakers(in []*v1alpha1.CircuitBreaker) {
	won := claims{}
	chosen := map[target]*mesh.CircuitBreaker{}
	for _, obj := range in {
		r := b.on(kindCircuitBreaker, obj)
		policy := circuitBreaker(r, obj)
		valid := !r.bad
		ports := make([][]*port, len(obj.Spec.TargetRefs))
		for i, ref := range obj.Spec.TargetRefs {
			field := at("spec.targetRefs", i)
			switch {
			case ref.Group == gatewayGroup && ref.Kind == kindHTTPRoute:
				r.add(field+".kind", ReasonUnsupported,
					"a CircuitBreaker cannot be attached to an HTTPRoute: callers keep one breaker for each port; name the Service that the route sends to")
				continue
			case ref.Group != "" || ref.Kind != kindService:
				r.add(field, ReasonUnsupported, `%s/%s cannot be a target; write group: "" and kind: Service`, ref.Group, ref.Kind)
				continue
			}
			s, p, ok := b.serviceTarget(r, field, obj.Namespace, ref)
			if !ok {
				continue
			}
			ports[i] = s.portsOr(p)
			t := target{kindService, s.key, sectionName(ref)}
			if valid && won.take(r, field, t, keyOf(obj)) {
				chosen[t] = policy
			}
		}
		b.policyStatus(r, obj, obj.Spec.TargetRefs, func(i int) (keys, instances []string) { return keysOf(ports[i]), nil })
	}
	for _, s := range b.services {
		for _, p := range s.ports {
			if p.Name != "" {
				p.Breaker = chosen[target{kindService, s.key, p.Name}]
			}
			if p.Breaker == nil {
				p.Breaker = chosen[target{kindService, s.key, ""}]
			}
		}
	}
}

// circuitBreaker fills in the defaults. Where something is invalid r is bad
// and the result means nothing.
func circuitBreaker(r *report, obj *v1alpha1.CircuitBreaker) *mesh.CircuitBreaker {
	spec := obj.Spec
	checkTargetRefs(r, spec.TargetRefs)
	out := &mesh.CircuitBreaker{Policy: keyOf(obj).String()}
	switch spec.Mode {
	case v1alpha1.ModeObserve:
		out.Observe = true
	case v1alpha1.ModeEnforce, "":
	default:
		r.add("spec.mode", ReasonInvalid, "%q is not a mode; write Observe or Enforce", spec.Mode)
	}
	if spec.Trip == nil && spec.Limits == nil && spec.Ejection == nil {
		r.add("spec", ReasonInvalid, "sets none of trip, limits and ejection; set at least one")
	}
	if spec.Trip != nil {
		out.Trip = trip(r, spec.Trip)
	}
	if spec.Limits != nil {
		out.Limits = limits(r, spec.Limits)
	}
	if spec.Ejection != nil {
		out.Ejection = ejection(r, spec.Ejection)
	}
	return out
}

func trip(r *report, in *v1alpha1.Trip) *mesh.Trip {
	const field = "spec.trip"
	if in.ConsecutiveFailures == 0 && in.FailureRatio == "" && in.SlowCall == nil {
		r.add(field, ReasonInvalid, "has no condition; set consecutiveFailures, failureRatio or slowCall")
	}
	out := &mesh.Trip{
		ConsecutiveFailures: in.ConsecutiveFailures,
		MinimumRequests:     number(r, field+".minimumRequests", in.MinimumRequests, 20, 1, maxNumber),
		Window:              duration(r, field+".window", in.Window, 10*time.Second, time.Second, 10*time.Minute),
		OpenFor:             duration(r, field+".openFor", in.OpenFor, 15*time.Second, minDuration, maxDuration),
		HalfOpenRequests:    number(r, field+".halfOpenRequests", in.HalfOpenRequests, 3, 1, maxNumber),
		FailureOn:           words(r, field+".failureOn", in.FailureOn, failureWord, failureWords),
	}
	if in.FailureRatio != "" {
		out.FailureRatio = ratio(r, field+".failureRatio", in.FailureRatio)
	}
	if sc := in.SlowCall; sc != nil {
		out.SlowCallThreshold = duration(r, field+".slowCall.longerThan", &sc.LongerThan, 0, minDuration, maxDuration)
		out.SlowCallRatio = ratio(r, field+".slowCall.ratio", sc.Ratio)
	}
	if len(in.FailureOn) == 0 {
		out.FailureOn = []string{"5xx", "connect-failure", "reset", "timeout"}
	}
	return out
}

const failureWords = "5xx, gateway-error, connect-failure, reset, timeout or the name of a gRPC status such as unavailable"

// failureWord returns the word in its one spelling: gRPC status names may be
// written as gRPC does (UNAVAILABLE) or as Envoy does (unavailable).
func failureWord(s string) (string, bool) {
	switch s {
	case "5xx", "gateway-error", "connect-failure", "reset", "timeout":
		return s, true
	}
	switch w := strings.ReplaceAll(strings.ToLower(s), "_", "-"); w {
	case "cancelled", "unknown", "invalid-argument", "deadline-exceeded", "not-found", "already-exists",
		"permission-denied", "resource-exhausted", "failed-precondition", "aborted", "out-of-range",
		"unimplemented", "internal", "unavailable", "data-loss", "unauthenticated":
		return w, true
	default:
		return "", false
	}
}

func limits(r *report, in *v1alpha1.Limits) mesh.Limits {
	var out mesh.Limits
	set := false
	for _, l := range []struct {
		field string
		in    *uint32
		out   **uint32
	}{
		{"spec.limits.connections", in.Connections, &out.Connections},
		{"spec.limits.pendingRequests", in.PendingRequests, &out.PendingRequests},
		{"spec.limits.requests", in.Requests, &out.Requests},
		{"spec.limits.retries", in.Retries, &out.Retries},
	} {
		if l.in == nil {
			continue
		}
		set = true
		if *l.in == 0 {
			// Proxies disagree on what 0 means: nothing at all, or no limit.
			remedy := "write 1 or more, or leave it out for no limit"
			if strings.HasSuffix(l.field, "retries") {
				remedy += "; to switch retries off set attempts: 0 in a RetryPolicy"
			}
			r.add(l.field, ReasonInvalid, "0 is not a limit; %s", remedy)
			continue
		}
		n := *l.in
		*l.out = &n
	}
	if !set {
		r.add("spec.limits", ReasonInvalid, "has no limit; set connections, pendingRequests, requests or retries")
	}
	return out
}

func ejection(r *report, in *v1alpha1.Ejection) *mesh.Ejection {
	const field = "spec.ejection"
	out := &mesh.Ejection{
		Consecutive5xx:           deref(in.Consecutive5xx, 0),
		ConsecutiveGatewayErrors: deref(in.ConsecutiveGatewayErrors, 0),
		Interval:                 duration(r, field+".interval", in.Interval, 10*time.Second, minDuration, maxDuration),
		BaseEjectionTime:         duration(r, field+".baseEjectionTime", in.BaseEjectionTime, 30*time.Second, minDuration, maxDuration),
		MaxEjectionPercent:       number(r, field+".maxEjectionPercent", in.MaxEjectionPercent, 50, 1, 100),
	}
	if fp := in.FailurePercentage; fp != nil {
		out.FailurePercentage = &mesh.FailurePercentage{
			Threshold:     number(r, field+".failurePercentage.threshold", fp.Threshold, 85, 1, 100),
			MinimumHosts:  number(r, field+".failurePercentage.minimumHosts", fp.MinimumHosts, 5, 1, maxNumber),
			RequestVolume: number(r, field+".failurePercentage.requestVolume", fp.RequestVolume, 50, 1, maxNumber),
		}
	}
	if out.Consecutive5xx == 0 && out.ConsecutiveGatewayErrors == 0 && out.FailurePercentage == nil {
		r.add(field, ReasonInvalid, "has no condition; set consecutive5xx, consecutiveGatewayErrors or failurePercentage")
	}
	return out
}
