package translate

import (
	"regexp"
	"strings"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// A call of gRPC is a request for /<service>/<method>, so that a GRPCRoute is
// routes with matches of the path. It has no timeouts and no retries of its own.

// grpcRules reads the rules of a route, as rules does those of an HTTPRoute.
func (b *builder) grpcRules(r *report, obj *gatewayv1.GRPCRoute) []rule {
	specs := obj.Spec.Rules
	if len(specs) == 0 {
		specs = []gatewayv1.GRPCRouteRule{{}}
	}
	route := routeOf{kindGRPCRoute, obj.Namespace, isProducer(obj.Namespace, obj.Spec.ParentRefs)}
	out := ruleNames(r, len(specs), func(i int) *gatewayv1.SectionName { return specs[i].Name })
	for i := range specs {
		spec, rl := &specs[i], &out[i]
		field := at("spec.rules", i)
		rl.matches = grpcMatches(r, field, spec.Matches)

		action := r.part()
		rl.filters = b.filters(action, field+".filters", route, grpcFilters(spec.Filters), false, true)
		if n := len(spec.BackendRefs); n > maxBackends {
			action.add(field+".backendRefs", ReasonInvalid, "%d backends; at most %d", n, maxBackends)
		}
		for j := range spec.BackendRefs {
			ref := &spec.BackendRefs[j]
			rl.backends = append(rl.backends, b.backend(action, at(field+".backendRefs", j), route, &ref.BackendRef, grpcFilters(ref.Filters)))
		}
		if action.bad {
			rl.backends, rl.filters = nil, nil
		}
		if spec.SessionPersistence != nil {
			r.add(field+".sessionPersistence", ReasonUnsupported, "ignored: not supported; delete it")
		}
	}
	return out
}

func grpcMatches(r *report, field string, in []gatewayv1.GRPCRouteMatch) []ruleMatch {
	if len(in) == 0 {
		return []ruleMatch{{}}
	}
	var out []ruleMatch
	for i := range in {
		m := r.part()
		match := grpcMatch(m, at(field+".matches", i), &in[i])
		if !m.bad {
			out = append(out, match)
		}
	}
	return out
}

func grpcMatch(r *report, field string, in *gatewayv1.GRPCRouteMatch) ruleMatch {
	var out ruleMatch
	if in.Method != nil {
		out = methodMatch(r, field+".method", in.Method)
	}
	seen := map[string]bool{}
	for i, h := range in.Headers {
		name := strings.ToLower(string(h.Name))
		kind, ok := valueMatch(r, at(field+".headers", i), string(h.Name), string(deref(h.Type, gatewayv1.GRPCHeaderMatchExact)), h.Value)
		if ok && !seen[name] {
			seen[name] = true
			out.Headers = append(out.Headers, mesh.HeaderMatch{Name: name, Kind: kind, Value: h.Value})
		}
	}
	return out
}

// Names of gRPC, as GRPCMethodMatch has them.
var (
	grpcService = regexp.MustCompile(`^\.?[A-Za-z_][A-Za-z_0-9]*(\.[A-Za-z_][A-Za-z_0-9]*)*$`)
	grpcMethod  = regexp.MustCompile(`^[A-Za-z_][A-Za-z_0-9]*$`)
)

// oneElement stands for any service, or any method.
const oneElement = "[^/]+"

func methodMatch(r *report, field string, in *gatewayv1.GRPCMethodMatch) ruleMatch {
	service, method := deref(in.Service, ""), deref(in.Method, "")
	out := ruleMatch{service: len(service), method: len(method)}
	if service == "" && method == "" {
		r.add(field, ReasonInvalid, "names neither service nor method; write one, or delete it to match every call")
		return out
	}
	for _, l := range []struct{ name, value string }{{"service", service}, {"method", method}} {
		if len(l.value) > maxPath {
			r.add(field+"."+l.name, ReasonInvalid, "has %d bytes; at most %d", len(l.value), maxPath)
			return out
		}
	}
	switch kind := deref(in.Type, gatewayv1.GRPCMethodMatchExact); kind {
	case gatewayv1.GRPCMethodMatchExact:
		if service != "" && !grpcService.MatchString(service) {
			r.add(field+".service", ReasonInvalid, "%q is not the name of a service; write it as in shop.v1.Payments", service)
		}
		if method != "" && !grpcMethod.MatchString(method) {
			r.add(field+".method", ReasonInvalid, "%q is not the name of a method; write it as in Pay", method)
		}
		switch {
		case service == "":
			out.Path = mesh.PathMatch{Kind: mesh.Regex, Value: "/" + oneElement + "/" + method}
		case method == "":
			out.Path = mesh.PathMatch{Kind: mesh.Prefix, Value: "/" + service}
		default:
			out.Path = mesh.PathMatch{Kind: mesh.Exact, Value: "/" + service + "/" + method}
		}
	case gatewayv1.GRPCMethodMatchRegularExpression:
		part := func(name, value string) string {
			if value == "" {
				return oneElement
			}
			if _, err := regexp.Compile(value); err != nil {
				r.add(field+"."+name, ReasonInvalid, "%q is not an expression of RE2: %s", value, err)
			}
			return "(?:" + value + ")"
		}
		out.Path = mesh.PathMatch{Kind: mesh.Regex, Value: "/" + part("service", service) + "/" + part("method", method)}
		if !r.bad {
			if _, err := regexp.Compile(out.Path.Value); err != nil {
				r.add(field, ReasonInvalid, "service and method together are no expression of RE2: %s", err)
			}
		}
	default:
		r.add(field+".type", ReasonUnsupported, "%q is not a type of match; write Exact or RegularExpression", kind)
	}
	return out
}
