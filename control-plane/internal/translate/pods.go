package translate

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/outrigger-mesh/outrigger/control-plane/identity/workload"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// What pods and namespaces say of proxies.
const (
	annotationStatus = "outrigger.dev/status" // injected, by the injector: the pod has a proxy, if the container is there
	keyMTLS          = "outrigger.dev/mtls"   // off, permissive or strict: what pods ask of those who call; annotation of a pod, else label of its namespace

	// What comes in at these ports does not pass through the pod's proxy.
	annotationExclude = "outrigger.dev/exclude-inbound-ports" // comma list of the pod's ports that are not captured

	annotationCapture = "outrigger.dev/capture" // "false": nothing of the pod's traffic passes through its proxy but what ambassador ports lead there

	statusInjected = "injected"
	proxyContainer = "outrigger-proxy"
)

// pod is a Pod that may be called.
type pod struct {
	key
	obj               *corev1.Pod
	workload, account string
	addresses         []netip.Addr
	// proxied: it has a proxy. What follows is about that.
	proxied  bool
	mtls     mesh.MTLS
	excluded []uint16
	// leads are the ports of Services that lead to the pod.
	leads []lead
	// authorizations by policy.
	authorizations []mesh.Authorization
}

// lead is a port of the pod, and a port of a Service that leads to it.
type lead struct {
	number uint16
	port   *port
}

// takesMTLS says whether callers use mutual TLS at the port of the pod.
func (p *pod) takesMTLS(number uint16) bool {
	return p.captures(number) && p.mtls != mesh.Off
}

// captures says whether what comes in at the port passes through a proxy.
func (p *pod) captures(number uint16) bool {
	return p.proxied && !slices.Contains(p.excluded, number)
}

// addNamespaces notes the mode that each namespace asks for.
func (b *builder) addNamespaces(in []*corev1.Namespace) {
	for _, obj := range in {
		if v, set := obj.Labels[keyMTLS]; set {
			b.modes[obj.Name] = mode(b.on(kindNamespace, obj), "metadata.labels."+keyMTLS, v)
		}
	}
}

// mode reads a mode. What is none is strict: whoever wrote it asked for
// something, and clear text may not be it.
func mode(r *report, field, v string) mesh.MTLS {
	switch m := mesh.MTLS(v); m {
	case mesh.Off, mesh.Permissive, mesh.Strict:
		return m
	default:
		r.add(field, ReasonInvalid, "%q is no mode; write off, permissive or strict, until then it is taken for strict", v)
		return mesh.Strict
	}
}

func (b *builder) addPods(in []*corev1.Pod) {
	for _, obj := range in {
		// Whoever has ended is not called, and its address may be another's.
		if obj.Status.Phase == corev1.PodSucceeded || obj.Status.Phase == corev1.PodFailed {
			continue
		}
		r := b.on(kindPod, obj)
		p := &pod{
			key: keyOf(obj), obj: obj, workload: workload.Name(obj),
			account: cmp.Or(obj.Spec.ServiceAccountName, "default"),
		}
		if errs := validation.IsDNS1123Subdomain(p.account); len(errs) > 0 {
			r.add("spec.serviceAccountName", ReasonInvalid, "%q cannot be a name; %s", p.account, nameRemedy)
			continue
		}
		p.addresses = podAddresses(obj)
		if hasProxy(obj) {
			p.proxied = true
			p.mtls = cmp.Or(b.modes[obj.Namespace], mesh.Permissive)
			if v, set := obj.Annotations[keyMTLS]; set {
				p.mtls = mode(r, "metadata.annotations."+keyMTLS, v)
			}
			p.excluded = excludedPorts(r, obj)
		}
		b.pods[p.key] = p
		b.podsIn[p.namespace] = append(b.podsIn[p.namespace], p)
	}
}

// hasProxy: what comes to the pod passes through a proxy. The annotation alone may
// be copied from a pod to a template, and a pod that captures nothing has
// ambassador ports only.
func hasProxy(obj *corev1.Pod) bool {
	if obj.Annotations[annotationCapture] == "false" {
		return false
	}
	is := func(c corev1.Container) bool { return c.Name == proxyContainer }
	return obj.Annotations[annotationStatus] == statusInjected &&
		(slices.ContainsFunc(obj.Spec.Containers, is) || slices.ContainsFunc(obj.Spec.InitContainers, is))
}

func podAddresses(obj *corev1.Pod) []netip.Addr {
	ips := obj.Status.PodIPs
	if len(ips) == 0 && obj.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: obj.Status.PodIP}}
	}
	var out []netip.Addr
	for _, ip := range ips {
		if addr, err := netip.ParseAddr(ip.IP); err == nil && usable(addr) && !slices.Contains(out, addr.Unmap()) {
			out = append(out, addr.Unmap())
		}
	}
	return out
}

func excludedPorts(r *report, obj *corev1.Pod) []uint16 {
	var out []uint16
	for item := range strings.SplitSeq(obj.Annotations[annotationExclude], ",") {
		if item = strings.TrimSpace(item); item == "" {
			continue
		}
		n, err := strconv.ParseUint(item, 10, 16)
		if err != nil || n == 0 {
			r.add("metadata.annotations."+annotationExclude, ReasonInvalid, "%q is not a port; write a comma list of ports, 1 to 65535", item)
			continue
		}
		out = append(out, uint16(n))
	}
	return out
}

// addLeads finds the ports of pods that Services lead to. EndpointSlices have
// added theirs already; a Service that selects a pod leads to it before any
// EndpointSlice says so.
func (b *builder) addLeads() {
	selecting := byLabel(b.services, func(s *service) map[string]string { return s.obj.Spec.Selector })
	for _, pd := range b.pods {
		for name, value := range pd.obj.Labels {
			for _, s := range selecting[label{pd.namespace, name, value}] {
				if !selects(s.obj.Spec.Selector, pd.obj.Labels, nil) {
					continue
				}
				for _, p := range s.ports {
					if n, ok := podPort(p, pd.obj); ok {
						pd.leads = append(pd.leads, lead{n, p})
					}
				}
			}
		}
		slices.SortFunc(pd.leads, func(a, b lead) int {
			return cmp.Or(
				cmp.Compare(a.number, b.number),
				a.port.service.key.compare(b.port.service.key),
				cmp.Compare(a.port.Number, b.port.Number),
			)
		})
		pd.leads = slices.Compact(pd.leads)
	}
}

// label is one of a pod, in a namespace.
type label struct{ namespace, name, value string }

// byLabel has each Service that selects under the label of its selector that the
// fewest others have: pods look at those of their labels only, however many
// Services a namespace has.
func byLabel[S any](services map[key]S, selector func(S) map[string]string) map[label][]S {
	uses := map[label]int{}
	for k, s := range services {
		for name, value := range selector(s) {
			uses[label{k.namespace, name, value}]++
		}
	}
	out := map[label][]S{}
	for k, s := range services {
		var rarest label
		for name, value := range selector(s) {
			if l := (label{k.namespace, name, value}); uses[rarest] == 0 || uses[l] < uses[rarest] {
				rarest = l
			}
		}
		if uses[rarest] > 0 {
			out[rarest] = append(out[rarest], s)
		}
	}
	return out
}

// podPort is where the pod serves the port of the Service. A name that no
// container has leads nowhere, as it does for Kubernetes: pods of several
// versions may be behind one Service.
func podPort(p *port, obj *corev1.Pod) (uint16, bool) {
	t := p.target.TargetPort
	if t.Type == intstr.Int || t.StrVal == "" {
		if t.Type == intstr.Int && t.IntVal >= 1 && t.IntVal <= 65535 {
			return uint16(t.IntVal), true
		}
		return p.Number, true
	}
	named := func(cs []corev1.Container, only func(corev1.Container) bool) (uint16, bool) {
		for _, c := range cs {
			for _, cp := range c.Ports {
				if cp.Name == t.StrVal && cmp.Or(cp.Protocol, corev1.ProtocolTCP) == corev1.ProtocolTCP && only(c) &&
					cp.ContainerPort >= 1 && cp.ContainerPort <= 65535 {
					return uint16(cp.ContainerPort), true
				}
			}
		}
		return 0, false
	}
	if n, ok := named(obj.Spec.Containers, func(corev1.Container) bool { return true }); ok {
		return n, true
	}
	return named(obj.Spec.InitContainers, func(c corev1.Container) bool {
		return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
}

// instances are the pods that have a proxy.
func (b *builder) instances() []mesh.Instance {
	var out []mesh.Instance
	for _, pd := range b.pods {
		if !pd.proxied {
			continue
		}
		out = append(out, pd.instance())
	}
	slices.SortFunc(out, func(a, b mesh.Instance) int {
		return key{a.Namespace, a.Name}.compare(key{b.Namespace, b.Name})
	})
	return out
}

func (p *pod) instance() mesh.Instance {
	slices.SortFunc(p.authorizations, func(a, b mesh.Authorization) int { return cmp.Compare(a.Policy, b.Policy) })
	return mesh.Instance{
		Namespace: p.namespace, Name: p.name, Workload: p.workload, ServiceAccount: p.account,
		Addresses: p.addresses, MTLS: p.mtls, Ports: p.ports(), Authorizations: p.authorizations,
	}
}

// ports are what the Services say is spoken at each port of the pod. Where two
// differ it is found out for each connection.
func (p *pod) ports() []mesh.InstancePort {
	var out []mesh.InstancePort
	differ := false
	for _, l := range p.leads {
		if !p.captures(l.number) {
			continue
		}
		// What the Service declares, not what a route made of it: who calls from
		// outside of the mesh has no route.
		said, last := l.port.declared, len(out)-1
		switch {
		case last < 0 || out[last].Number != l.number:
			out = append(out, mesh.InstancePort{Number: l.number, Protocol: said})
			differ = false
		case said == mesh.Unknown || said == out[last].Protocol || differ:
		case out[last].Protocol == mesh.Unknown:
			out[last].Protocol = said
		default:
			out[last].Protocol, differ = mesh.Unknown, true
		}
	}
	return out
}
