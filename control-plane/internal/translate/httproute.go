package translate

import (
	"regexp"
	"slices"
	"strings"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Limits of the HTTPRoute type that a folder does not enforce.
const (
	maxPath  = 1024
	maxValue = 4096
)

// rules reads the rules of a route. A match that is invalid is left out; a
// rule whose action is invalid or not supported keeps its matches and loses
// its backends, so that its requests are answered 500 rather than taken by
// another rule.
func (b *builder) rules(r *report, obj *gatewayv1.HTTPRoute) []rule {
	specs := obj.Spec.Rules
	if len(specs) == 0 {
		// The type's default: one rule that matches everything.
		specs = []gatewayv1.HTTPRouteRule{{}}
	}
	route := routeOf{kindHTTPRoute, obj.Namespace, isProducer(obj.Namespace, obj.Spec.ParentRefs)}
	out := ruleNames(r, len(specs), func(i int) *gatewayv1.SectionName { return specs[i].Name })
	for i := range specs {
		spec, rl := &specs[i], &out[i]
		field := at("spec.rules", i)
		rl.matches = matches(r, field, spec.Matches)

		// The rule's own report tells an invalid action from what came before.
		action := r.part()
		b.action(action, field, route, spec, rl)
		if action.bad {
			rl.backends, rl.filters, rl.retry, rl.timeout, rl.perTry = nil, nil, nil, 0, 0
		}
		if spec.SessionPersistence != nil {
			r.add(field+".sessionPersistence", ReasonUnsupported, "ignored: not supported; delete it")
		}
	}
	return out
}

func (b *builder) action(r *report, field string, route routeOf, spec *gatewayv1.HTTPRouteRule, rl *rule) {
	prefixes := !slices.ContainsFunc(spec.Matches, func(m gatewayv1.HTTPRouteMatch) bool {
		return m.Path != nil && deref(m.Path.Type, gatewayv1.PathMatchPathPrefix) != gatewayv1.PathMatchPathPrefix
	})
	rl.filters = b.filters(r, field+".filters", route, spec.Filters, prefixes, len(spec.BackendRefs) > 0)
	if n := len(spec.BackendRefs); n > maxBackends {
		r.add(field+".backendRefs", ReasonInvalid, "%d backends; at most %d", n, maxBackends)
	}
	for j := range spec.BackendRefs {
		ref := &spec.BackendRefs[j]
		rl.backends = append(rl.backends, b.backend(r, at(field+".backendRefs", j), route, &ref.BackendRef, ref.Filters))
	}
	if t := spec.Timeouts; t != nil {
		rl.timeout = gatewayDuration(r, field+".timeouts.request", t.Request)
		rl.perTry = gatewayDuration(r, field+".timeouts.backendRequest", t.BackendRequest)
		if rl.timeout > 0 && rl.perTry > rl.timeout {
			r.add(field+".timeouts.backendRequest", ReasonInvalid, "%s is longer than timeouts.request, %s, which bounds all attempts; shorten it", rl.perTry, rl.timeout)
		}
	}
	if spec.Retry != nil {
		rl.retry = ruleRetry(r, field+".retry", spec.Retry)
	}
}

// backend resolves a backendRef. What does not resolve is a problem, but not
// one of the whole rule: it keeps its share, which is answered 500.
func (b *builder) backend(rule *report, field string, route routeOf, ref *gatewayv1.BackendRef, filters []gatewayv1.HTTPRouteFilter) mesh.Backend {
	const consequence = "; until then its share of the requests is answered 500"
	r := rule.part()
	out := b.backendRef(rule, r, field, route, ref, consequence)
	if p := b.backendPort(out); p != nil && !b.takes(route.kind, p) {
		r.add(field+".port", ReasonUnsupportedProtocol, "port %s of Service %s %s, not %s; name another"+consequence, p.describe(), p.service.key, p.speaks(), wanted(route.kind))
	}
	out.Filters = b.backendFilters(r, field+".filters", route, filters, consequence)
	return resolved(r, out)
}

// ruleRetry reads the retry field of a rule (GEP-1731). Its presence asks for
// connection errors to be retried, whatever the codes.
func ruleRetry(r *report, field string, in *gatewayv1.HTTPRouteRetry) *mesh.Retry {
	out := defaultRetry()
	out.On = []string{"connect-failure", "refused-stream", "reset"}
	out.IdempotentOn = nil
	for i, code := range in.Codes {
		if code < 400 || code > 599 {
			r.add(at(field+".codes", i), ReasonInvalid, "%d is not the status of an error; write 400 to 599", code)
			continue
		}
		out.Status = append(out.Status, uint32(code))
	}
	slices.Sort(out.Status)
	out.Status = slices.Compact(out.Status)
	if a := in.Attempts; a != nil {
		if *a < 1 || *a > maxAttempts {
			r.add(field+".attempts", ReasonInvalid, "%d is out of range; write 1 to %d", *a, maxAttempts)
		} else {
			out.Attempts = uint32(*a)
		}
	}
	if in.Backoff != nil {
		if d := gatewayDuration(r, field+".backoff", in.Backoff); d > 0 {
			out.BackoffBase, out.BackoffMax = d, 10*d
		}
	}
	return &out
}

// gatewayDuration reads a duration of GEP-2257: up to four numbers of at most
// five digits, each with h, m, s or ms.
func gatewayDuration(r *report, field string, d *gatewayv1.Duration) time.Duration {
	if d == nil {
		return 0
	}
	v, ok := parseGatewayDuration(string(*d))
	if !ok {
		r.add(field, ReasonInvalid, "%q is not a duration; write whole numbers with h, m, s or ms, as in 1m30s or 250ms (GEP-2257)", *d)
	}
	return v
}

func parseGatewayDuration(s string) (time.Duration, bool) {
	rest, parts := s, 0
	for rest != "" {
		digits := 0
		for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
			digits++
		}
		if digits < 1 || digits > 5 {
			return 0, false
		}
		rest = rest[digits:]
		switch {
		case strings.HasPrefix(rest, "ms"):
			rest = rest[2:]
		case strings.HasPrefix(rest, "h"), strings.HasPrefix(rest, "m"), strings.HasPrefix(rest, "s"):
			rest = rest[1:]
		default:
			return 0, false
		}
		parts++
	}
	if parts < 1 || parts > 4 {
		return 0, false
	}
	v, err := time.ParseDuration(s)
	return v, err == nil
}

// matches reads the matches of a rule; none means the one that matches all.
func matches(r *report, field string, in []gatewayv1.HTTPRouteMatch) []ruleMatch {
	if len(in) == 0 {
		return []ruleMatch{{}}
	}
	var out []ruleMatch
	for i := range in {
		m := r.part()
		if match := newMatch(m, at(field+".matches", i), &in[i]); !m.bad {
			out = append(out, ruleMatch{Match: match})
		}
	}
	return out
}

func newMatch(r *report, field string, in *gatewayv1.HTTPRouteMatch) mesh.Match {
	var out mesh.Match
	if in.Path != nil {
		out.Path = pathMatch(r, field+".path", in.Path)
	}
	if in.Method != nil {
		switch m := *in.Method; m {
		case gatewayv1.HTTPMethodGet, gatewayv1.HTTPMethodHead, gatewayv1.HTTPMethodPost, gatewayv1.HTTPMethodPut,
			gatewayv1.HTTPMethodDelete, gatewayv1.HTTPMethodConnect, gatewayv1.HTTPMethodOptions, gatewayv1.HTTPMethodTrace, gatewayv1.HTTPMethodPatch:
			out.Method = string(m)
		default:
			r.add(field+".method", ReasonInvalid, "%q is not a method; write GET, HEAD, POST, PUT, DELETE, CONNECT, OPTIONS, TRACE or PATCH", m)
		}
	}
	// Of entries with the same name only the first counts; header names are the
	// same whatever their case, names of query parameters are not.
	seen := map[string]bool{}
	for i, h := range in.Headers {
		hf := at(field+".headers", i)
		name := strings.ToLower(string(h.Name))
		kind, ok := valueMatch(r, hf, string(h.Name), string(deref(h.Type, gatewayv1.HeaderMatchExact)), h.Value)
		if ok && !seen[name] {
			seen[name] = true
			out.Headers = append(out.Headers, mesh.HeaderMatch{Name: name, Kind: kind, Value: h.Value})
		}
	}
	clear(seen)
	for i, q := range in.QueryParams {
		qf := at(field+".queryParams", i)
		name := string(q.Name)
		kind, ok := valueMatch(r, qf, name, string(deref(q.Type, gatewayv1.QueryParamMatchExact)), q.Value)
		if ok && !seen[name] {
			seen[name] = true
			out.Query = append(out.Query, mesh.QueryMatch{Name: name, Kind: kind, Value: q.Value})
		}
	}
	return out
}

func valueMatch(r *report, field, name, kind, value string) (mesh.MatchKind, bool) {
	if !isToken(name) {
		r.add(field+".name", ReasonInvalid, "%q is not a name; write letters, digits and !#$%%&'*+-.^_`|~", name)
		return "", false
	}
	if value == "" || len(value) > maxValue {
		r.add(field+".value", ReasonInvalid, "has %d bytes; write 1 to %d", len(value), maxValue)
		return "", false
	}
	switch kind {
	case string(gatewayv1.HeaderMatchExact):
		return mesh.Exact, true
	case string(gatewayv1.HeaderMatchRegularExpression):
		if _, err := regexp.Compile(value); err != nil {
			r.add(field+".value", ReasonInvalid, "%q is not an expression of RE2: %s", value, err)
			return "", false
		}
		return mesh.Regex, true
	default:
		r.add(field+".type", ReasonInvalid, "%q is not a type of match; write Exact or RegularExpression", kind)
		return "", false
	}
}

// isToken is RFC 9110, 5.6.2.
func isToken(s string) bool {
	if s == "" || len(s) > 256 {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}

func pathMatch(r *report, field string, in *gatewayv1.HTTPPathMatch) mesh.PathMatch {
	kind, value := deref(in.Type, gatewayv1.PathMatchPathPrefix), deref(in.Value, "/")
	switch kind {
	case gatewayv1.PathMatchRegularExpression:
		if len(value) > maxPath {
			r.add(field+".value", ReasonInvalid, "has %d bytes; at most %d", len(value), maxPath)
			return mesh.PathMatch{}
		}
		if _, err := regexp.Compile(value); err != nil {
			r.add(field+".value", ReasonInvalid, "%q is not an expression of RE2: %s", value, err)
		}
		return mesh.PathMatch{Kind: mesh.Regex, Value: value}
	case gatewayv1.PathMatchExact, gatewayv1.PathMatchPathPrefix:
	default:
		r.add(field+".type", ReasonInvalid, "%q is not a type of match; write Exact, PathPrefix or RegularExpression", kind)
		return mesh.PathMatch{}
	}
	if !normalPath(r, field+".value", value, false) {
		return mesh.PathMatch{}
	}
	if kind == gatewayv1.PathMatchExact {
		return mesh.PathMatch{Kind: mesh.Exact, Value: value}
	}
	// /api and /api/ are the same prefix, and / is every path.
	value = strings.TrimSuffix(value, "/")
	if value == "" {
		return mesh.PathMatch{}
	}
	return mesh.PathMatch{Kind: mesh.Prefix, Value: value}
}

// normalPath says whether a request may have the path, or one that begins so. A
// proxy normalises paths once and matches what comes of it: another value would
// never match.
func normalPath(r *report, field, value string, begins bool) bool {
	if len(value) > maxPath {
		r.add(field, ReasonInvalid, "has %d bytes; at most %d", len(value), maxPath)
		return false
	}
	if !strings.HasPrefix(value, "/") {
		r.add(field, ReasonInvalid, "%q is not a path; begin it with /", value)
		return false
	}
	for _, bad := range []string{"//", "/./", "/../", "%2f", "%2F", "#", "?"} {
		if strings.Contains(value, bad) {
			r.add(field, ReasonInvalid, "%q contains %q, which no normalised path does; remove it", value, bad)
			return false
		}
	}
	if !begins && (strings.HasSuffix(value, "/.") || strings.HasSuffix(value, "/..")) {
		r.add(field, ReasonInvalid, "%q ends in a dot segment, which no normalised path does; remove it", value)
		return false
	}
	return true
}
