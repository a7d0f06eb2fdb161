package translate

import (
	"cmp"
	"slices"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// What routes of all kinds have in common: parents, which are ports of Services,
// and backends, which are too.

// Limits of the route types that a folder does not enforce.
const (
	maxBackends = 16
	maxWeight   = 1_000_000
)

// parentKind says which ports a kind of route is for.
type parentKind struct {
	speaks func(mesh.Protocol) bool
	// name and words are for messages: what the ports speak, and the appProtocols
	// that say so.
	name, words string
	// producerOnly: routes of the kind are for Services of their namespace.
	producerOnly bool
}

func forHTTP() parentKind {
	return parentKind{speaks: mesh.Protocol.IsHTTP, name: "HTTP", words: "http, http2 or grpc"}
}

func forGRPC() parentKind {
	return parentKind{speaks: speaksGRPC, name: "gRPC", words: "grpc or kubernetes.io/h2c"}
}

func forTLS() parentKind {
	return parentKind{speaks: func(p mesh.Protocol) bool { return p == mesh.TLS }, name: "TLS", words: "tls or https", producerOnly: true}
}

func speaksGRPC(p mesh.Protocol) bool { return p == mesh.GRPC || p == mesh.HTTP2 }

// scope is a port as some callers see it. Routes in the namespace of the Service
// (producer routes) are for all; those in another (consumer routes) are for the
// callers of that namespace, who have them instead (GEP-1294, namespace
// boundaries). Routes are merged within a scope only.
type scope struct {
	port *port
	// consumer is the namespace of the callers; empty for a producer's scope.
	consumer string
}

func scopeOf(p *port, routeNamespace string) scope {
	if p.service.namespace == routeNamespace {
		return scope{port: p}
	}
	return scope{p, routeNamespace}
}

// ours says whether the parent is a Service. Routes of Gateways are the
// business of whoever runs the Gateway.
func ours(ref gatewayv1.ParentReference) bool {
	return deref(ref.Group, gatewayGroup) == "" && deref(ref.Kind, "Gateway") == kindService
}

// parentKey names the Service that a parentRef of a route in namespace means.
func parentKey(namespace string, ref gatewayv1.ParentReference) key {
	if ns := deref(ref.Namespace, ""); ns != "" {
		namespace = string(ns)
	}
	return key{namespace, string(ref.Name)}
}

// isProducer says whether some parent is a Service of the route's own namespace.
func isProducer(namespace string, refs []gatewayv1.ParentReference) bool {
	return slices.ContainsFunc(refs, func(ref gatewayv1.ParentReference) bool {
		return ours(ref) && parentKey(namespace, ref).namespace == namespace
	})
}

// parents returns for each parentRef the ports that the route is for. A port
// that a route of a kind before this one has in the same scope is left out
// (GEP-1294, route types).
func (b *builder) parents(r *report, namespace string, refs []gatewayv1.ParentReference, kind parentKind) [][]*port {
	out := make([][]*port, len(refs))
	for i, ref := range refs {
		if !ours(ref) {
			continue
		}
		field := at("spec.parentRefs", i)
		k := parentKey(namespace, ref)
		if kind.producerOnly && k.namespace != namespace {
			r.add(field+".namespace", ReasonUnsupported,
				"the parent is in namespace %q: consumer routes of this kind are not supported, only producer routes; put the route into the Service's namespace", k.namespace)
			continue
		}
		s := b.services[k]
		if s == nil {
			r.add(field+".name", ReasonNoMatchingParent, "%s", b.missing(k))
			continue
		}
		named := s.matching(ref)
		if len(named) == 0 {
			r.add(field, ReasonNoMatchingParent, "Service %s has no such port; it has %s", k, s.describePorts())
			continue
		}
		ports := parentPorts(named, kind.speaks)
		if len(ports) == 0 {
			r.add(field, ReasonUnsupportedProtocol, "port %s of Service %s %s, not %s; set appProtocol of the port to %s if that is what it speaks",
				named[0].describe(), k, named[0].speaks(), kind.name, kind.words)
			continue
		}
		for _, p := range ports {
			if other := b.attached[scopeOf(p, namespace)]; other == "" || other == r.at.Kind {
				out[i] = append(out[i], p)
			}
		}
		if len(out[i]) == 0 {
			p := ports[0]
			r.add(field, ReasonConflicted, "a route of kind %s is attached to port %s of Service %s, and goes before this one; delete one, or name another port",
				b.attached[scopeOf(p, namespace)], p.describe(), k)
		}
	}
	return out
}

// matching returns the ports that a parentRef names, whatever they speak.
func (s *service) matching(ref gatewayv1.ParentReference) []*port {
	var out []*port
	for _, p := range s.ports {
		if ref.Port != nil && *ref.Port != int32(p.Number) {
			continue
		}
		if ref.SectionName != nil && *ref.SectionName != "" && string(*ref.SectionName) != p.Name {
			continue
		}
		out = append(out, p)
	}
	return out
}

// parentPorts returns those of the ports that a parentRef names which the route
// is for. A route that names a port of unknown protocol says what that speaks.
// One that names no port means the ports of its protocol, and those of unknown
// protocol only where there is no other: it must not turn a database into a web
// server.
func parentPorts(named []*port, speaks func(mesh.Protocol) bool) []*port {
	var known, unknown []*port
	for _, p := range named {
		switch {
		case speaks(p.declared):
			known = append(known, p)
		case p.declared == mesh.Unknown:
			unknown = append(unknown, p)
		}
	}
	if len(known) > 0 {
		return known
	}
	return unknown
}

// findRouted notes the ports of unknown protocol that some route of HTTP names:
// policies ask before the routes are read.
func (b *builder) findRouted(namespace string, refs []gatewayv1.ParentReference, kind parentKind) {
	for _, ref := range refs {
		if s := b.services[parentKey(namespace, ref)]; s != nil && ours(ref) {
			for _, p := range parentPorts(s.matching(ref), kind.speaks) {
				b.routed[p] = true
			}
		}
	}
}

// attach attaches a route of HTTP or gRPC to the ports of its parents. It returns
// them by parentRef, and all the scopes, each once.
func (b *builder) attach(r *report, namespace string, refs []gatewayv1.ParentReference, hostnames []gatewayv1.Hostname, kind parentKind, becomes mesh.Protocol) ([][]*port, []scope) {
	ports := b.parents(r, namespace, refs, kind)
	var scopes []scope
	for _, p := range slices.Concat(ports...) {
		sc := scopeOf(p, namespace)
		if slices.Contains(scopes, sc) {
			continue
		}
		scopes = append(scopes, sc)
		b.attached[sc] = r.at.Kind
		switch {
		case sc.consumer != "":
			// A consumer does not decide for others what the port speaks.
			p.consumers = append(p.consumers, sc.consumer)
		case p.declared == mesh.Unknown:
			p.Protocol = becomes
		}
	}
	if len(hostnames) > 0 && !slices.ContainsFunc(refs, func(ref gatewayv1.ParentReference) bool { return !ours(ref) }) {
		r.note("spec.hostnames", ReasonUnsupported, "ignored for a Service as parent: the Service is the host; match a header, or delete it")
	}
	return ports, scopes
}

// rule is one rule of an HTTPRoute or a GRPCRoute, as every port it is attached to
// gets it.
type rule struct {
	// name is the rule's, or its index; section is empty for a rule that a
	// policy cannot name.
	name, section string
	matches       []ruleMatch
	backends      []mesh.Backend
	filters       *mesh.Filters
	timeout       time.Duration
	perTry        time.Duration
	// retry is the rule's own retry field, or nil.
	retry *mesh.Retry
}

// ruleMatch is a match, and for gRPC what decides its place.
type ruleMatch struct {
	mesh.Match
	service, method int // characters
}

// candidate is a route with what decides its place among the others of a scope.
type candidate struct {
	mesh.Route
	obj             metav1.Object
	service, method int
	rule, match     int
}

// ruleNames gives each rule its name.
func ruleNames(r *report, n int, name func(i int) *gatewayv1.SectionName) []rule {
	out := make([]rule, n)
	seen := map[string]bool{}
	for i := range out {
		out[i].name = strconv.Itoa(i)
		switch name := string(deref(name(i), "")); {
		case name == "":
		case seen[name]:
			r.add(at("spec.rules", i)+".name", ReasonInvalid, "%q names an earlier rule; give each rule its own name", name)
		default:
			seen[name] = true
			out[i].name, out[i].section = name, name
		}
	}
	return out
}

// candidates are the routes that the rules of an object make in a scope.
func candidates(kind string, obj metav1.Object, rules []rule, sc scope, retries retryPolicies) []candidate {
	var out []candidate
	for i := range rules {
		rl := &rules[i]
		for j, m := range rl.matches {
			c := candidate{obj: obj, rule: i, match: j, service: m.service, method: m.method}
			c.Name = keyOf(obj).String() + "/" + rl.name
			c.Match = cloneMatch(m.Match)
			c.Backends = cloneBackends(rl.backends)
			c.Filters = cloneFilters(rl.filters)
			retries.apply(&c.Route, sc.port, target{kind: kind, key: keyOf(obj)}, rl)
			out = append(out, c)
		}
	}
	return out
}

// addRoutes gives every port that may be HTTP its routes in order of precedence.
func (b *builder) addRoutes(http []*gatewayv1.HTTPRoute, grpc []*gatewayv1.GRPCRoute, retries retryPolicies) {
	found := map[scope][]candidate{}
	for _, obj := range grpc {
		if !slices.ContainsFunc(obj.Spec.ParentRefs, ours) {
			continue
		}
		r := b.on(kindGRPCRoute, obj)
		ports, scopes := b.attach(r, obj.Namespace, obj.Spec.ParentRefs, obj.Spec.Hostnames, forGRPC(), mesh.GRPC)
		rules := b.grpcRules(r, obj)
		for _, sc := range scopes {
			found[sc] = append(found[sc], candidates(kindGRPCRoute, obj, rules, sc, retries)...)
		}
		b.routeStatus(r, obj, obj.Spec.ParentRefs, ports)
	}
	for _, obj := range http {
		if !slices.ContainsFunc(obj.Spec.ParentRefs, ours) {
			continue
		}
		r := b.on(kindHTTPRoute, obj)
		ports, scopes := b.attach(r, obj.Namespace, obj.Spec.ParentRefs, obj.Spec.Hostnames, forHTTP(), mesh.HTTP1)
		rules := b.rules(r, obj)
		for _, sc := range scopes {
			found[sc] = append(found[sc], candidates(kindHTTPRoute, obj, rules, sc, retries)...)
		}
		b.routeStatus(r, obj, obj.Spec.ParentRefs, ports)
	}
	routes := func(sc scope) []mesh.Route {
		cs := found[sc]
		order := precedence
		if b.attached[sc] == kindGRPCRoute {
			order = grpcPrecedence
		}
		slices.SortFunc(cs, order)
		var out []mesh.Route
		for _, c := range cs {
			out = append(out, c.Route)
		}
		return out
	}
	for _, s := range b.services {
		for _, p := range s.ports {
			for _, ns := range sortedOnce(p.consumers) {
				p.Consumers = append(p.Consumers, mesh.Consumer{Namespace: ns, Routes: routes(scope{p, ns})})
			}
			switch {
			case b.attached[scope{port: p}] != "":
				p.Routes = routes(scope{port: p})
			case p.Protocol.MayBeHTTP():
				route := mesh.Route{
					Name:     "default",
					Backends: []mesh.Backend{{Namespace: s.namespace, Service: s.name, Port: p.Number, Weight: 1}},
				}
				retries.apply(&route, p, target{}, &rule{})
				p.Routes = []mesh.Route{route}
			}
		}
	}
}

func cloneMatch(m mesh.Match) mesh.Match {
	m.Headers = slices.Clone(m.Headers)
	m.Query = slices.Clone(m.Query)
	return m
}

// routeOf is whose backends are resolved.
type routeOf struct {
	kind, namespace string
	// producer: the route decides for callers of other namespaces too.
	producer bool
}

// mayUse says whether the route may name a Service of another namespace. A
// consumer route may: its callers could go there themselves. A producer route
// sends callers of other namespaces, with their identities, to where they did not
// mean to go; the owner of that namespace says in a ReferenceGrant that it may.
func (b *builder) mayUse(route routeOf, k key) bool {
	if k.namespace == route.namespace || !route.producer {
		return true
	}
	for _, g := range b.grants[k.namespace] {
		from := slices.ContainsFunc(g.Spec.From, func(f gatewayv1.ReferenceGrantFrom) bool {
			return f.Group == gatewayGroup && string(f.Kind) == route.kind && string(f.Namespace) == route.namespace
		})
		to := slices.ContainsFunc(g.Spec.To, func(t gatewayv1.ReferenceGrantTo) bool {
			return t.Group == "" && t.Kind == kindService && string(deref(t.Name, gatewayv1.ObjectName(k.name))) == k.name
		})
		if from && to {
			return true
		}
	}
	return false
}

// backendRef resolves a backendRef to a port, which it reports on r where that
// cannot be done; consequence says what it means. A weight that is out of range
// is a problem of the whole rule: no share can be made of it.
func (b *builder) backendRef(rule, r *report, field string, route routeOf, ref *gatewayv1.BackendRef, consequence string) mesh.Backend {
	namespace := route.namespace
	if ns := string(deref(ref.Namespace, "")); ns != "" {
		namespace = ns
	}
	k := key{namespace, string(ref.Name)}
	out := mesh.Backend{Namespace: k.namespace, Service: k.name, Weight: 1}
	if ref.Weight != nil {
		if *ref.Weight < 0 || *ref.Weight > maxWeight {
			rule.add(field+".weight", ReasonInvalid, "%d is out of range; write 0 to %d", *ref.Weight, maxWeight)
		} else {
			out.Weight = uint32(*ref.Weight)
		}
	}
	switch {
	case deref(ref.Group, "") != "" || deref(ref.Kind, kindService) != kindService:
		r.add(field+".kind", ReasonInvalidKind, `%s/%s cannot be a backend; write group: "" and kind: Service`+consequence, deref(ref.Group, ""), deref(ref.Kind, kindService))
	case !b.mayUse(route, k):
		r.add(field+".namespace", ReasonRefNotPermitted,
			"Service %s is in another namespace, and this route is for callers of all namespaces: a ReferenceGrant in namespace %s must let %ss of namespace %s name it; create one, or use a Service of namespace %s"+consequence,
			k, k.namespace, route.kind, route.namespace, route.namespace)
	case ref.Port == nil:
		r.add(field+".port", ReasonInvalid, "missing; write the port of the Service%s", consequence)
	default:
		s := b.services[k]
		if s == nil {
			r.add(field+".name", ReasonBackendNotFound, "%s"+consequence, b.missing(k))
			break
		}
		p := s.byNumber(*ref.Port)
		if p == nil {
			r.add(field+".port", ReasonBackendNotFound, "no port %d; Service %s has %s"+consequence, *ref.Port, k, s.describePorts())
			break
		}
		out.Port = p.Number
	}
	return out
}

// missing says what is wrong with a Service that is not in the mesh.
func (b *builder) missing(k key) string {
	if b.external[k] {
		return "Service " + k.String() + " is of type ExternalName: calls to it leave the mesh; name another, or one without selector and with an EndpointSlice"
	}
	return "no usable Service " + k.String() + "; create it or correct the name"
}

// backendPort is the port of a backend that has been resolved, or nil.
func (b *builder) backendPort(in mesh.Backend) *port {
	if in.Port == 0 {
		return nil
	}
	return b.services[key{in.Namespace, in.Service}].byNumber(int32(in.Port))
}

// resolved is the backend, or where there is a problem with it one that keeps its
// share. Port 0 keeps the key from naming a cluster that exists but that this
// route may not use.
func resolved(r *report, in mesh.Backend) mesh.Backend {
	if r.bad {
		in.Missing, in.Port, in.Filters = true, 0, nil
	}
	return in
}

func cloneBackends(in []mesh.Backend) []mesh.Backend {
	out := slices.Clone(in)
	for i := range out {
		out[i].Filters = cloneFilters(out[i].Filters)
	}
	return out
}

// routeStatus adds the entries of a route, one for each Service that is a parent.
func (b *builder) routeStatus(r *report, o metav1.Object, refs []gatewayv1.ParentReference, ports [][]*port) {
	const list = "spec.parentRefs"
	st := statusOf(r, o)
	for i, ref := range refs {
		if !ours(ref) {
			continue
		}
		var accepted, refused []Problem
		for _, p := range about(*r.found, list, i) {
			if isReference(p, list) {
				refused = append(refused, p)
			} else {
				accepted = append(accepted, p)
			}
		}
		// What is wrong with this parent goes before what is wrong with all.
		slices.SortStableFunc(accepted, func(a, b Problem) int { return -compareBool(inList(a, list), inList(b, list)) })
		consumer := o.GetNamespace()
		if parentKey(consumer, ref).namespace == consumer {
			consumer = ""
		}
		st.add(ref, consumer, keysOf(ports[i]), nil,
			condition(gatewayv1.RouteConditionAccepted, gatewayv1.RouteReasonAccepted, accepted, acceptedReason),
			condition(gatewayv1.RouteConditionResolvedRefs, gatewayv1.RouteReasonResolvedRefs, refused, func(r Reason) string { return string(r) }))
	}
}

// isReference says whether the problem is with what a route refers to rather than
// with the route.
func isReference(p Problem, parents string) bool {
	switch p.Reason {
	case ReasonBackendNotFound, ReasonRefNotPermitted, ReasonInvalidKind:
		return true
	case ReasonUnsupportedProtocol:
		return !inList(p, parents)
	default:
		return false
	}
}

// acceptedReason is the word that the Gateway API has for why a route is not
// accepted.
func acceptedReason(r Reason) string {
	switch r {
	case ReasonConflicted, ReasonNoMatchingParent, ReasonIncompatibleFilters:
		return string(r)
	case ReasonUnsupportedProtocol:
		return string(gatewayv1.RouteReasonNoMatchingParent)
	default:
		return string(gatewayv1.RouteReasonUnsupportedValue)
	}
}

// precedence is the order that HTTPRouteRule.matches prescribes. It leaves the
// place of regular expressions open: they come before prefixes, the longest
// first, because behind the usual catch-all prefix they would never match.
func precedence(a, b candidate) int {
	return cmp.Or(
		cmp.Compare(kindRank(a.Match.Path.Kind), kindRank(b.Match.Path.Kind)),
		-cmp.Compare(pathLength(a.Match.Path), pathLength(b.Match.Path)),
		-compareBool(a.Match.Method != "", b.Match.Method != ""),
		-cmp.Compare(len(a.Match.Headers), len(b.Match.Headers)),
		-cmp.Compare(len(a.Match.Query), len(b.Match.Query)),
		tie(a, b),
	)
}

// grpcPrecedence is the order that GRPCRouteRule.matches prescribes.
func grpcPrecedence(a, b candidate) int {
	return cmp.Or(
		-cmp.Compare(a.service, b.service),
		-cmp.Compare(a.method, b.method),
		-cmp.Compare(len(a.Match.Headers), len(b.Match.Headers)),
		tie(a, b),
	)
}

func tie(a, b candidate) int {
	return cmp.Or(older(a.obj, b.obj), cmp.Compare(a.rule, b.rule), cmp.Compare(a.match, b.match))
}

func kindRank(k mesh.MatchKind) int {
	switch k {
	case mesh.Exact:
		return 0
	case mesh.Regex:
		return 1
	default:
		return 2
	}
}

// pathLength decides between prefixes, and between expressions. Two exact
// paths never match the same request unless they are equal, so that their
// length would only hide the criteria that follow.
func pathLength(p mesh.PathMatch) int {
	if p.Kind == mesh.Exact {
		return 0
	}
	return len(p.Value)
}
