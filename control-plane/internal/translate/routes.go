package translate

import (
	"slices"

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
}

// ours says whether the parent is a Service. Routes of Gateways are the
// business of whoever runs the Gateway.
func ours(ref gatewayv1.ParentReference) bool {
	return deref(ref.Group, gatewayGroup) == "" && deref(ref.Kind, "Gateway") == kindService
}

// parents returns the ports that a route is attached to, each once.
func (b *builder) parents(r *report, namespace string, refs []gatewayv1.ParentReference, kind parentKind) []*port {
	var out []*port
	for i, ref := range refs {
		if !ours(ref) {
			continue
		}
		field := at("spec.parentRefs", i)
		if ns := deref(ref.Namespace, ""); ns != "" && string(ns) != namespace {
			r.add(field+".namespace", ReasonUnsupported,
				"the parent is in namespace %q: consumer routes are not supported, only producer routes; put the route into the Service's namespace", ns)
			continue
		}
		k := key{namespace, string(ref.Name)}
		s := b.services[k]
		if s == nil {
			r.add(field+".name", ReasonNoMatchingParent, "no usable Service %s; create it or correct the name", k)
			continue
		}
		named := s.matching(ref)
		if len(named) == 0 {
			r.add(field, ReasonNoMatchingParent, "Service %s has no such port; it has %s", k, s.describePorts())
			continue
		}
		ports := b.parentPorts(namespace, ref, kind.speaks)
		if len(ports) == 0 {
			r.add(field, ReasonUnsupportedProtocol, "port %s of Service %s %s, not %s; set appProtocol of the port to %s if that is what it speaks",
				named[0].describe(), k, named[0].speaks(), kind.name, kind.words)
			continue
		}
		for _, p := range ports {
			if !slices.Contains(out, p) {
				out = append(out, p)
			}
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

// parentPorts returns the ports that a route with this parent is attached to.
// A route that names a port of unknown protocol says what that speaks. One that
// names no port means the ports of its protocol, and those of unknown protocol
// only where there is no other: it must not turn a database into a web server.
func (b *builder) parentPorts(namespace string, ref gatewayv1.ParentReference, speaks func(mesh.Protocol) bool) []*port {
	if ns := deref(ref.Namespace, ""); ns != "" && string(ns) != namespace {
		return nil
	}
	s := b.services[key{namespace, string(ref.Name)}]
	if s == nil {
		return nil
	}
	var known, unknown []*port
	for _, p := range s.matching(ref) {
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

// backendRef resolves a backendRef to a port, which it reports on r where that
// cannot be done; consequence says what it means. A weight that is out of range
// is a problem of the whole rule: no share can be made of it.
func (b *builder) backendRef(rule, r *report, field, namespace string, ref *gatewayv1.BackendRef, consequence string) mesh.Backend {
	out := mesh.Backend{Namespace: namespace, Service: string(ref.Name), Weight: 1}
	if ref.Weight != nil {
		if *ref.Weight < 0 || *ref.Weight > maxWeight {
			rule.add(field+".weight", ReasonInvalid, "%d is out of range; write 0 to %d", *ref.Weight, maxWeight)
		} else {
			out.Weight = uint32(*ref.Weight)
		}
	}
	switch ns := string(deref(ref.Namespace, gatewayv1.Namespace(namespace))); {
	case deref(ref.Group, "") != "" || deref(ref.Kind, kindService) != kindService:
		r.add(field+".kind", ReasonInvalidKind, `%s/%s cannot be a backend; write group: "" and kind: Service`+consequence, deref(ref.Group, ""), deref(ref.Kind, kindService))
	case ns != "" && ns != namespace:
		out.Namespace = ns
		r.add(field+".namespace", ReasonRefNotPermitted, "backends in another namespace (%q) are not permitted: ReferenceGrant is not supported; use a Service of namespace %s"+consequence, ns, namespace)
	case ref.Port == nil:
		r.add(field+".port", ReasonInvalid, "missing; write the port of the Service%s", consequence)
	default:
		k := key{namespace, out.Service}
		s := b.services[k]
		if s == nil {
			r.add(field+".name", ReasonBackendNotFound, "no usable Service %s; create it or correct the name"+consequence, k)
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
		in.Missing, in.Port = true, 0
	}
	return in
}
