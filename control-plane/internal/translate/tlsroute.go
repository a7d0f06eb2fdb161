package translate

import (
	"cmp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// maxHostnames is the limit of the TLSRoute type, which a folder does not enforce.
const maxHostnames = 1024

// addTLSRoutes gives every TLS port the server names that it leads elsewhere. The
// routes come oldest first: of two with the same name the older one has it.
func (b *builder) addTLSRoutes(in []*gatewayv1.TLSRoute) {
	owner := map[*port]map[string]*gatewayv1.TLSRoute{}
	for _, obj := range in {
		if !slices.ContainsFunc(obj.Spec.ParentRefs, ours) {
			continue
		}
		r := b.on(kindTLSRoute, obj)
		ports, attached := b.tlsParents(r, obj)
		names := hostnames(r, obj.Spec.Hostnames)
		backends := b.tlsRule(r, obj)
		for _, p := range attached {
			if owner[p] == nil {
				owner[p] = map[string]*gatewayv1.TLSRoute{}
			}
			for i, name := range names {
				switch older := owner[p][name]; {
				case name == "" || older == obj:
				case older != nil:
					r.add(at("spec.hostnames", i), ReasonConflicted, "%q of port %s of Service %s belongs to TLSRoute %s, which is older; delete it in one of them",
						name, p.describe(), p.service.key, keyOf(older))
				default:
					owner[p][name] = obj
					p.ServerNames = append(p.ServerNames, mesh.ServerName{Name: name, Route: keyOf(obj).String(), Backends: slices.Clone(backends)})
				}
			}
		}
		b.routeStatus(r, obj, obj.Spec.ParentRefs, ports)
	}
	for p := range owner {
		slices.SortFunc(p.ServerNames, nameOrder)
	}
}

// nameOrder puts exact names before wildcards and longer wildcards before shorter
// ones, so that the first name that matches is the most specific.
func nameOrder(a, b mesh.ServerName) int {
	wild := func(s string) bool { return strings.HasPrefix(s, "*") }
	if order := compareBool(wild(a.Name), wild(b.Name)); order != 0 {
		return order
	}
	if wild(a.Name) {
		return cmp.Or(-cmp.Compare(len(a.Name), len(b.Name)), cmp.Compare(a.Name, b.Name))
	}
	return cmp.Compare(a.Name, b.Name)
}

// tlsParents marks the ports that the route is attached to and returns them, by
// parentRef and each once.
func (b *builder) tlsParents(r *report, obj *gatewayv1.TLSRoute) ([][]*port, []*port) {
	byRef := b.parents(r, obj.Namespace, obj.Spec.ParentRefs, forTLS())
	var out []*port
	for _, p := range slices.Concat(byRef...) {
		if slices.Contains(out, p) {
			continue
		}
		// A port that was HTTP until now has a route to itself. Consumers had routes
		// of HTTP: what is TLS for all is TLS for them.
		p.Protocol, p.Routes, p.Consumers, p.OnlyServerNames = mesh.TLS, nil, nil, true
		out = append(out, p)
	}
	return byRef, out
}

// hostnames returns the names in lower case, each at its place in the list; what
// is no name is empty there.
func hostnames(r *report, in []gatewayv1.Hostname) []string {
	const field = "spec.hostnames"
	switch n := len(in); {
	case n == 0:
		r.add(field, ReasonInvalid, "missing; write the server names that clients ask for, as in pay.example.com or *.example.com")
	case n > maxHostnames:
		r.add(field, ReasonInvalid, "%d names; at most %d, the rest is left out", n, maxHostnames)
		in = in[:maxHostnames]
	}
	out := make([]string, len(in))
	for i, h := range in {
		name := strings.ToLower(string(h))
		suffix, _ := strings.CutPrefix(name, "*.")
		switch {
		case len(validation.IsDNS1123Subdomain(suffix)) > 0:
			r.add(at(field, i), ReasonInvalid, "%q is not a host name; write a DNS name, or *. and a DNS name", h)
		case len(validation.IsValidIP(nil, name)) == 0:
			r.add(at(field, i), ReasonInvalid, "%q is an address, which no client asks for by name (RFC 6066, 3); write a DNS name", h)
		default:
			out[i] = name
		}
	}
	return out
}

// tlsRule reads the one rule. What is wrong with it leaves the names without
// backends, so that their connections are refused rather than led by another name.
func (b *builder) tlsRule(r *report, obj *gatewayv1.TLSRoute) []mesh.Backend {
	const consequence = "; until then its share of the connections is refused"
	rules := obj.Spec.Rules
	if len(rules) != 1 {
		r.add("spec.rules", ReasonInvalid, "%d rules; write exactly one, until then connections for its host names are refused", len(rules))
		return nil
	}
	refs := rules[0].BackendRefs
	const field = "spec.rules[0].backendRefs"
	if n := len(refs); n == 0 || n > maxBackends {
		r.add(field, ReasonInvalid, "%d backends; write 1 to %d, until then connections for its host names are refused", n, maxBackends)
		return nil
	}
	rule := r.part()
	route := routeOf{kindTLSRoute, obj.Namespace, isProducer(obj.Namespace, obj.Spec.ParentRefs)}
	var out []mesh.Backend
	for j := range refs {
		one := r.part()
		backend := b.backendRef(rule, one, at(field, j), route, &refs[j], consequence)
		if p := b.backendPort(backend); p != nil && p.declared.IsHTTP() {
			one.add(at(field, j)+".port", ReasonUnsupportedProtocol, "port %s of Service %s %s, not TLS; name a TLS port"+consequence, p.describe(), p.service.key, p.speaks())
		}
		out = append(out, resolved(one, backend))
	}
	if rule.bad {
		return nil
	}
	return out
}
