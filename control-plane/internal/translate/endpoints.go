package translate

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// maxWorkloadEndpoints is the limit that the Workload type states.
const maxWorkloadEndpoints = 1000

func (b *builder) addEndpointSlices(in []*discoveryv1.EndpointSlice) {
	for _, slice := range in {
		b.addEndpointSlice(slice)
	}
}

func (b *builder) addEndpointSlice(slice *discoveryv1.EndpointSlice) {
	r := b.on(kindEndpointSlice, slice)
	const label = "metadata.labels." + discoveryv1.LabelServiceName
	name := slice.Labels[discoveryv1.LabelServiceName]
	if name == "" {
		r.remark(label, ReasonInvalid, "missing; name the Service that the endpoints belong to")
		return
	}
	s := b.services[key{slice.Namespace, name}]
	if s == nil {
		r.remark(label, ReasonTargetNotFound, "no usable Service %s/%s; create it or correct the label", slice.Namespace, name)
		return
	}
	if slice.AddressType == discoveryv1.AddressTypeFQDN {
		r.remark("addressType", ReasonUnsupported, "FQDN is not supported: host names would need resolving; list IP addresses")
		return
	}
	// In a dual-stack Service each instance is in one slice a family. Taking
	// both would count it twice, so the Service's first family stands for all. A
	// headless Service is called at the addresses themselves: it needs both.
	if fs := s.obj.Spec.IPFamilies; len(fs) > 1 && len(s.vips) > 0 && slice.AddressType != "" && string(slice.AddressType) != string(fs[0]) {
		return
	}

	type served struct {
		port   *port
		number uint16
	}
	var ports []served
	var tcp int
	for i, sp := range slice.Ports {
		if deref(sp.Protocol, corev1.ProtocolTCP) != corev1.ProtocolTCP || sp.Port == nil {
			continue
		}
		tcp++
		if *sp.Port < 1 || *sp.Port > 65535 {
			r.add(at("ports", i)+".port", ReasonInvalid, "%d is not a port; write 1 to 65535", *sp.Port)
			continue
		}
		if p := s.byName(deref(sp.Name, "")); p != nil {
			ports = append(ports, served{p, uint16(*sp.Port)})
		}
	}
	if tcp > 0 && len(ports) == 0 && !r.bad {
		r.remark("ports", ReasonInvalid, "none has the name of a port of Service %s, which has %s; ports are matched by name", s.key, s.describePorts())
	}

	for i, ep := range slice.Endpoints {
		field := at("endpoints", i)
		if len(ep.Addresses) == 0 {
			r.add(field+".addresses", ReasonInvalid, "empty; write the IP address of the endpoint")
			continue
		}
		// The API gives no meaning to further addresses of one endpoint.
		addr, ok := parseEndpoint(r, field+".addresses[0]", ep.Addresses[0])
		if !ok {
			continue
		}
		out := mesh.Endpoint{
			Instance: deref(ep.Hostname, ""),
			Zone:     deref(ep.Zone, ""),
			Ready:    deref(ep.Conditions.Ready, true) || s.obj.Spec.PublishNotReadyAddresses,
		}
		var pd *pod
		// A pod of another namespace is nobody's endpoint: callers would expect an
		// identity of this one.
		if t := ep.TargetRef; t != nil && t.Kind == kindPod && (t.Namespace == "" || t.Namespace == slice.Namespace) {
			out.Instance = t.Name
			if pd = b.pods[key{slice.Namespace, t.Name}]; pd != nil {
				out.Workload, out.ServiceAccount = pd.workload, pd.account
			}
		}
		leaving := deref(ep.Conditions.Terminating, false) && deref(ep.Conditions.Serving, out.Ready)
		for _, p := range ports {
			out.Address = netip.AddrPortFrom(addr, p.number)
			if pd != nil {
				out.MTLS = pd.takesMTLS(p.number)
				pd.leads = append(pd.leads, lead{p.number, p.port})
			}
			p.port.Endpoints = append(p.port.Endpoints, out)
			if leaving {
				p.port.leaving = append(p.port.leaving, out.Address)
			}
		}
	}
}

func parseEndpoint(r *report, field, s string) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(s)
	if err != nil || !usable(addr) {
		if s == "" {
			r.add(field, ReasonInvalid, "empty; write the IP address of the endpoint")
		} else {
			r.add(field, ReasonInvalid, "%q is not an IP address that can be called; host names are not resolved", s)
		}
		return netip.Addr{}, false
	}
	return addr.Unmap(), true
}

func (b *builder) addWorkloads(in []*v1alpha1.Workload) {
	services := b.sortedServices()
	for _, w := range in {
		r := b.on(kindWorkload, w)
		account := cmp.Or(w.Spec.ServiceAccount, "default")
		if errs := validation.IsDNS1123Subdomain(account); len(errs) > 0 {
			r.add("spec.serviceAccount", ReasonInvalid, "%q cannot be a name; %s", account, nameRemedy)
		}
		switch w.Spec.MTLS {
		case "", v1alpha1.MTLSDisabled, v1alpha1.MTLSPermissive, v1alpha1.MTLSStrict:
		default:
			r.add("spec.mtls", ReasonInvalid, "%q is no mode; write %s, %s or %s", w.Spec.MTLS, v1alpha1.MTLSDisabled, v1alpha1.MTLSPermissive, v1alpha1.MTLSStrict)
		}
		switch n := len(w.Spec.Endpoints); {
		case n == 0:
			r.add("spec.endpoints", ReasonInvalid, "empty; list at least one address, or delete the Workload")
		case n > maxWorkloadEndpoints:
			r.add("spec.endpoints", ReasonInvalid, "%d endpoints; at most %d, spread them over several Workloads", n, maxWorkloadEndpoints)
		}
		if r.bad {
			continue
		}
		for i := range w.Spec.Endpoints {
			b.addInstance(r, w, i, account, services)
		}
	}
}

// addInstance makes one endpoint of a Workload an endpoint of every Service
// that selects it.
func (b *builder) addInstance(r *report, w *v1alpha1.Workload, i int, account string, services []*service) {
	ep := &w.Spec.Endpoints[i]
	field := at("spec.endpoints", i)
	addr, ok := parseEndpoint(r, field+".address", ep.Address)
	if !ok {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(ep.Ports)) {
		if n := ep.Ports[name]; n < 1 || n > 65535 {
			r.add(field+".ports."+name, ReasonInvalid, "%d is not a port; write 1 to 65535", n)
			ok = false
		}
	}
	if !ok {
		return
	}
	instance := cmp.Or(ep.Name, w.Name+"-"+strconv.Itoa(i))
	for _, s := range services {
		if s.namespace != w.Namespace || !selects(s.obj.Spec.Selector, w.Labels, ep.Labels) {
			continue
		}
		for _, p := range s.ports {
			number, ok := targetPort(p, ep)
			if !ok {
				r.add(field+".ports", ReasonInvalid, "%q has no port %q, which is the targetPort of port %s of Service %s%s; add it",
					instance, p.target.TargetPort.StrVal, p.describe(), s.key, known(ep.Ports))
				continue
			}
			p.Endpoints = append(p.Endpoints, mesh.Endpoint{
				Address:        netip.AddrPortFrom(addr, number),
				Instance:       instance,
				Workload:       w.Name,
				ServiceAccount: account,
				MTLS:           w.Spec.MTLS == v1alpha1.MTLSPermissive || w.Spec.MTLS == v1alpha1.MTLSStrict,
				Zone:           ep.Zone,
				Ready:          true,
			})
		}
	}
}

func known(ports map[string]int32) string {
	if len(ports) == 0 {
		return ""
	}
	return " (it has " + strings.Join(slices.Sorted(maps.Keys(ports)), ", ") + ")"
}

// targetPort is where the instance serves the port of the Service.
func targetPort(p *port, ep *v1alpha1.WorkloadEndpoint) (uint16, bool) {
	t := p.target.TargetPort
	if t.Type == intstr.String && t.StrVal != "" {
		n, ok := ep.Ports[t.StrVal]
		return uint16(n), ok
	}
	if t.Type == intstr.Int && t.IntVal >= 1 && t.IntVal <= 65535 {
		return uint16(t.IntVal), true
	}
	return p.Number, true
}

// selects says whether the selector matches the Workload's labels with the
// instance's own on top. A Service without selector selects nothing.
func selects(selector, workload, instance map[string]string) bool {
	if len(selector) == 0 {
		return false
	}
	for k, want := range selector {
		got, ok := instance[k]
		if !ok {
			got, ok = workload[k]
		}
		if !ok || got != want {
			return false
		}
	}
	return true
}

// sortEndpoints sorts by address and removes repetitions. While a pod moves
// between slices it may be in both; the ready one is the newer word.
func (b *builder) sortEndpoints() {
	for _, s := range b.services {
		for _, p := range s.ports {
			slices.SortFunc(p.Endpoints, func(a, b mesh.Endpoint) int {
				return cmp.Or(
					a.Address.Compare(b.Address),
					-compareBool(a.Ready, b.Ready),
					// Not what is emptier: a Workload says more than a slice.
					-cmp.Compare(a.Workload, b.Workload),
					-cmp.Compare(a.Instance, b.Instance),
					-cmp.Compare(a.ServiceAccount, b.ServiceAccount),
					-compareBool(a.MTLS, b.MTLS), // where two disagree, the careful one
					-cmp.Compare(a.Zone, b.Zone),
				)
			})
			p.Endpoints = slices.CompactFunc(p.Endpoints, func(a, b mesh.Endpoint) bool { return a.Address == b.Address })
			p.useLeaving()
			for _, e := range p.Endpoints {
				if e.MTLS {
					p.Identities = append(p.Identities, identity.Identity{TrustDomain: b.trustDomain, Namespace: s.namespace, ServiceAccount: e.ServiceAccount}.SPIFFE())
				}
			}
			slices.Sort(p.Identities)
			p.Identities = slices.Compact(p.Identities)
		}
	}
}

// useLeaving makes endpoints that end, but still serve, ready where no other is:
// the last pods of a Service go on until there are new ones, as Kubernetes' own
// proxy has it.
func (p *port) useLeaving() {
	if len(p.leaving) == 0 || slices.ContainsFunc(p.Endpoints, func(e mesh.Endpoint) bool { return e.Ready }) {
		return
	}
	for i := range p.Endpoints {
		if slices.Contains(p.leaving, p.Endpoints[i].Address) {
			p.Endpoints[i].Ready = true
		}
	}
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

func deref[T any](p *T, otherwise T) T {
	if p == nil {
		return otherwise
	}
	return *p
}
