package translate

import (
	"slices"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const gatewayGroup = gatewayv1.GroupName

// maxAttempts is the limit that the RetryPolicy type states; it holds for the
// retry field of an HTTPRoute too.
const maxAttempts = 10

// defaultRetry is in force where no policy says otherwise: attempts that cannot
// have been processed are made again, and those of idempotent methods also
// where the upstream or the connection to it failed.
func defaultRetry() mesh.Retry {
	return mesh.Retry{
		Policy:       "default",
		On:           []string{"connect-failure", "refused-stream", "reset-before-request"},
		IdempotentOn: []string{"gateway-error", "reset"},
		Attempts:     2,
		BackoffBase:  25 * time.Millisecond,
		BackoffMax:   250 * time.Millisecond,
	}
}

func defaultBudget() mesh.RetryBudget { return mesh.RetryBudget{Percent: 20, MinConcurrency: 3} }

// retryPolicy is a RetryPolicy with its defaults filled in.
type retryPolicy struct {
	retry mesh.Retry
	// perTry and timeout are nil where the policy leaves them to the route.
	perTry  *time.Duration
	timeout *time.Duration
	budget  *mesh.RetryBudget
}

// retryPolicies is which policy holds where. An entry for a section is more
// specific than one for the whole object.
type retryPolicies map[target]*retryPolicy

// port returns the policy of the port, or nil.
func (ps retryPolicies) port(p *port) *retryPolicy {
	if p.Name != "" {
		if rp := ps[target{kindService, p.service.key, p.Name}]; rp != nil {
			return rp
		}
	}
	return ps[target{kindService, p.service.key, ""}]
}

// apply decides the retries and the timeout of a route. The most specific
// word wins: a policy on the rule, the rule's own retry field, a policy on the
// HTTPRoute, on the port, on the Service, the default.
func (ps retryPolicies) apply(out *mesh.Route, p *port, route target, rl *rule) {
	named := route
	named.section = rl.section
	rp := ps[named]
	if rl.section == "" {
		rp = nil
	}
	if rp == nil && rl.retry == nil {
		rp = ps[route]
		if rp == nil {
			rp = ps.port(p)
		}
	}
	out.Timeout = rl.timeout
	switch {
	case rp != nil:
		out.Retry = rp.retry
		out.Retry.PerTryTimeout = deref(rp.perTry, rl.perTry)
		out.Timeout = deref(rp.timeout, rl.timeout)
	case rl.retry != nil:
		out.Retry = *rl.retry
		out.Retry.Policy = out.Name
		out.Retry.PerTryTimeout = rl.perTry
	default:
		out.Retry = defaultRetry()
		out.Retry.PerTryTimeout = rl.perTry
	}
	// Routes are changed by nobody, but they share no memory either.
	out.Retry.On = slices.Clone(out.Retry.On)
	out.Retry.IdempotentOn = slices.Clone(out.Retry.IdempotentOn)
	out.Retry.Status = slices.Clone(out.Retry.Status)
}

// retryPolicies decides which policy holds where, and sets the budgets of
// ports.
func (b *builder) retryPolicies(in []*v1alpha1.RetryPolicy) retryPolicies {
	won := claims{}
	chosen := retryPolicies{}
	for _, obj := range in {
		r := b.on(kindRetryPolicy, obj)
		policy := newRetryPolicy(r, obj)
		valid := !r.bad
		onService := false
		ports := make([][]*port, len(obj.Spec.TargetRefs))
		for i, ref := range obj.Spec.TargetRefs {
			field := at("spec.targetRefs", i)
			t := target{string(ref.Kind), key{obj.Namespace, string(ref.Name)}, sectionName(ref)}
			var ok bool
			switch {
			case ref.Group == "" && ref.Kind == kindService:
				onService = true
				ports[i], ok = b.retriesService(r, field, obj.Namespace, ref)
			case ref.Group == gatewayGroup && ref.Kind == kindHTTPRoute:
				ports[i], ok = b.retriesRoute(r, field, t)
			default:
				r.add(field, ReasonUnsupported, `%s/%s cannot be a target; write group: "" and kind: Service, or group: %s and kind: HTTPRoute`,
					ref.Group, ref.Kind, gatewayGroup)
			}
			if ok && valid && won.take(r, field, t, keyOf(obj)) {
				chosen[t] = policy
			}
		}
		if valid && policy.budget != nil && !onService {
			r.note("spec.budget", ReasonUnsupported,
				"ignored: a budget is kept for each port of a Service, not for a route; set it in a RetryPolicy that names the Service")
		}
		b.policyStatus(r, obj, obj.Spec.TargetRefs, func(i int) (keys, instances []string) { return keysOf(ports[i]), nil })
	}
	for _, s := range b.services {
		for _, p := range s.ports {
			if rp := chosen.port(p); rp != nil && rp.budget != nil {
				p.Budget = *rp.budget
			}
		}
	}
	return chosen
}

func (b *builder) retriesService(r *report, field, namespace string, ref gatewayv1.LocalPolicyTargetReferenceWithSectionName) ([]*port, bool) {
	s, p, ok := b.serviceTarget(r, field, namespace, ref)
	if !ok {
		return nil, false
	}
	ports := s.portsOr(p)
	if len(ports) == 0 || slices.ContainsFunc(ports, b.mayBeHTTP) {
		return ports, true
	}
	p = ports[0]
	r.add(field, ReasonUnsupportedProtocol,
		"port %s of Service %s %s, and retries are for HTTP; set appProtocol of the port to http, http2 or grpc if that is what it speaks", p.describe(), s.key, p.speaks())
	return ports, false
}

// mayBeHTTP says whether requests on the port are routed one by one, either
// because the Service says so or because a route names it.
func (b *builder) mayBeHTTP(p *port) bool {
	return p.declared.IsHTTP() || p.declared == mesh.Unknown && b.routed[p]
}

func (b *builder) retriesRoute(r *report, field string, t target) ([]*port, bool) {
	route := b.routes[t.key]
	if route == nil {
		r.add(field+".name", ReasonTargetNotFound, "no HTTPRoute %s; create it in the policy's namespace or correct the name", t.key)
		return nil, false
	}
	if !slices.ContainsFunc(route.Spec.ParentRefs, ours) {
		r.add(field+".name", ReasonTargetNotFound, "HTTPRoute %s has no Service as parent, so it is not of this mesh; name another", t.key)
		return nil, false
	}
	var ports []*port
	for _, ref := range route.Spec.ParentRefs {
		if s := b.services[parentKey(route.Namespace, ref)]; s != nil && ours(ref) {
			ports = append(ports, parentPorts(s.matching(ref), forHTTP().speaks)...)
		}
	}
	if t.section == "" {
		return ports, true
	}
	var names []string
	for _, rl := range route.Spec.Rules {
		if rl.Name != nil {
			names = append(names, string(*rl.Name))
		}
	}
	if slices.Contains(names, t.section) {
		return ports, true
	}
	has := "has no named rules"
	if len(names) > 0 {
		has = "has " + strings.Join(names, ", ")
	}
	r.add(field+".sectionName", ReasonTargetNotFound, "no rule named %q; HTTPRoute %s %s", t.section, t.key, has)
	return ports, false
}

func newRetryPolicy(r *report, obj *v1alpha1.RetryPolicy) *retryPolicy {
	spec := obj.Spec
	checkTargetRefs(r, spec.TargetRefs)
	out := &retryPolicy{retry: defaultRetry()}
	out.retry.Policy = keyOf(obj).String()
	if len(spec.RetryOn) > 0 {
		out.retry.On = words(r, "spec.retryOn", spec.RetryOn, retryWord, retryWords)
		out.retry.IdempotentOn = nil
	}
	for i, code := range spec.RetryOnStatus {
		if code < 400 || code > 599 {
			r.add(at("spec.retryOnStatus", i), ReasonInvalid, "%d is not the status of an error; write 400 to 599", code)
		}
	}
	out.retry.Status = slices.Compact(slices.Sorted(slices.Values(spec.RetryOnStatus)))
	out.retry.Attempts = number(r, "spec.attempts", spec.Attempts, out.retry.Attempts, 0, maxAttempts)
	if spec.PerTryTimeout != nil {
		d := duration(r, "spec.perTryTimeout", spec.PerTryTimeout, 0, 0, maxDuration)
		out.perTry = &d
	}
	if spec.Timeout != nil {
		d := duration(r, "spec.timeout", spec.Timeout, 0, 0, maxDuration)
		out.timeout = &d
	}
	if out.perTry != nil && out.timeout != nil && *out.timeout > 0 && *out.perTry > *out.timeout {
		r.add("spec.perTryTimeout", ReasonInvalid, "%s is longer than spec.timeout, %s, which bounds all attempts; shorten it", *out.perTry, *out.timeout)
	}
	if bo := spec.Backoff; bo != nil {
		base := duration(r, "spec.backoff.base", &bo.Base, out.retry.BackoffBase, minDuration, maxDuration)
		out.retry.BackoffBase = base
		out.retry.BackoffMax = duration(r, "spec.backoff.max", bo.Max, 10*base, base, maxDuration)
	}
	if bu := spec.Budget; bu != nil {
		d := defaultBudget()
		out.budget = &mesh.RetryBudget{
			Percent:        number(r, "spec.budget.percent", bu.Percent, d.Percent, 0, 100),
			MinConcurrency: deref(bu.MinConcurrency, d.MinConcurrency),
		}
	}
	return out
}

const retryWords = "5xx, gateway-error, connect-failure, refused-stream, reset, reset-before-request, retriable-4xx, " +
	"cancelled, deadline-exceeded, internal, resource-exhausted or unavailable, or list codes in retryOnStatus"

func retryWord(s string) (string, bool) {
	switch s {
	case "5xx", "gateway-error", "connect-failure", "refused-stream", "reset", "reset-before-request", "retriable-4xx",
		"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable":
		return s, true
	default:
		return "", false
	}
}
