package translate

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// service is a Service while it is being put together.
type service struct {
	key
	obj   *corev1.Service
	vips  []netip.Addr
	ports []*port // by number
}

// port is one port of a service while it is being put together.
type port struct {
	mesh.Port
	service *service
	// target is the Service's port, for its targetPort.
	target corev1.ServicePort
	// declared is the protocol that the Service says. A route may turn a port of
	// unknown protocol into what it is for; decisions on that look at this.
	declared mesh.Protocol
	// leaving are the endpoints that serve until they have ended.
	leaving []netip.AddrPort
	// consumers are the namespaces that have routes of their own.
	consumers []string
}

func (s *service) model() mesh.Service {
	out := mesh.Service{Namespace: s.namespace, Name: s.name, VIPs: s.vips}
	for _, p := range s.ports {
		out.Ports = append(out.Ports, p.Port)
	}
	return out
}

func (b *builder) sortedServices() []*service {
	return slices.SortedFunc(maps.Values(b.services), func(a, b *service) int { return a.key.compare(b.key) })
}

func (s *service) byNumber(n int32) *port {
	for _, p := range s.ports {
		if int32(p.Number) == n {
			return p
		}
	}
	return nil
}

func (s *service) byName(name string) *port {
	for _, p := range s.ports {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// describePorts is for messages: "http (80), admin (9000)".
func (s *service) describePorts() string {
	if len(s.ports) == 0 {
		return "no usable TCP port"
	}
	var out []string
	for _, p := range s.ports {
		out = append(out, p.describe())
	}
	return "the " + plural(len(out), "port") + " " + strings.Join(out, ", ")
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

func (p *port) describe() string {
	if p.Name == "" {
		return fmt.Sprint(p.Number)
	}
	return fmt.Sprintf("%s (%d)", p.Name, p.Number)
}

// speaks is for messages: "speaks tcp".
func (p *port) speaks() string {
	if p.declared == mesh.Unknown {
		return "has no known protocol"
	}
	return "speaks " + string(p.declared)
}

func (b *builder) addServices(in []*corev1.Service) {
	for _, obj := range in {
		r := b.on(kindService, obj)
		if obj.Spec.Type == corev1.ServiceTypeExternalName {
			b.external[keyOf(obj)] = true
			r.remark("spec.type", ReasonUnsupported,
				"ExternalName is not supported: calls to %q leave the mesh; use a Service without selector and an EndpointSlice", obj.Spec.ExternalName)
			continue
		}
		s := &service{key: keyOf(obj), obj: obj}
		for i, sp := range obj.Spec.Ports {
			field := at("spec.ports", i)
			if cmp.Or(sp.Protocol, corev1.ProtocolTCP) != corev1.ProtocolTCP {
				continue
			}
			if sp.Port < 1 || sp.Port > 65535 {
				r.add(field+".port", ReasonInvalid, "%d is not a port; write 1 to 65535", sp.Port)
				continue
			}
			if other := s.byNumber(sp.Port); other != nil {
				r.add(field+".port", ReasonInvalid, "%d is used by port %q already; give each port its own number", sp.Port, other.Name)
				continue
			}
			if other := s.byName(sp.Name); other != nil {
				r.add(field+".name", ReasonInvalid, "port %d has the name %q too; give each port its own name", other.Number, sp.Name)
				continue
			}
			if t := sp.TargetPort; t.Type == intstr.Int && (t.IntVal < 0 || t.IntVal > 65535) {
				r.add(field+".targetPort", ReasonInvalid, "%d is not a port; write 1 to 65535, or the name of a port", t.IntVal)
				continue
			}
			protocol := protocolOf(sp)
			s.ports = append(s.ports, &port{
				Port: mesh.Port{
					Name: sp.Name, Number: uint16(sp.Port), Protocol: protocol,
					Budget: defaultBudget(),
				},
				service: s, target: sp, declared: protocol,
			})
		}
		slices.SortFunc(s.ports, func(a, b *port) int { return cmp.Compare(a.Number, b.Number) })
		b.services[s.key] = s
	}
}

// resolveVIPs gives every cluster IP to one Service, the oldest that claims
// it: listeners are named by address, and no two may share a name.
func (b *builder) resolveVIPs() {
	claims := slices.SortedFunc(maps.Values(b.services), func(a, b *service) int { return older(a.obj, b.obj) })
	owner := map[netip.Addr]*service{}
	for _, s := range claims {
		field, ips := "spec.clusterIPs", s.obj.Spec.ClusterIPs
		if len(ips) == 0 && s.obj.Spec.ClusterIP != "" {
			field, ips = "spec.clusterIP", []string{s.obj.Spec.ClusterIP}
		}
		r := b.on(kindService, s.obj)
		for _, ip := range ips {
			if ip == "" || ip == corev1.ClusterIPNone {
				continue
			}
			addr, err := netip.ParseAddr(ip)
			if err != nil || !usable(addr) {
				r.add(field, ReasonInvalid, "%q is not an IP address that can be called; write one, or None", ip)
				continue
			}
			addr = addr.Unmap()
			if o := owner[addr]; o == s {
				continue
			} else if o != nil {
				r.add(field, ReasonConflicted, "%s belongs to Service %s; give this Service another address", addr, o.key)
				continue
			}
			owner[addr] = s
			s.vips = append(s.vips, addr)
		}
	}
}

// usable says whether a program can listen at the address and be called there.
func usable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
}

// protocolOf follows Kubernetes and Istio: appProtocol decides where it is
// set, else the part of the port's name before the first hyphen.
func protocolOf(p corev1.ServicePort) mesh.Protocol {
	if p.AppProtocol != nil && *p.AppProtocol != "" {
		switch word := strings.ToLower(*p.AppProtocol); word {
		case "kubernetes.io/h2c":
			return mesh.HTTP2
		case "kubernetes.io/ws":
			return mesh.HTTP1
		case "kubernetes.io/wss":
			return mesh.TLS
		default:
			return protocolWord(word)
		}
	}
	name := strings.ToLower(p.Name)
	if name == "grpc-web" || strings.HasPrefix(name, "grpc-web-") {
		return mesh.HTTP1
	}
	word, _, _ := strings.Cut(name, "-")
	return protocolWord(word)
}

// protocolWord knows the words of Istio's protocol selection, and those of other
// protocols that are bytes to a proxy.
func protocolWord(word string) mesh.Protocol {
	switch word {
	case "http", "grpc-web":
		return mesh.HTTP1
	case "http2":
		return mesh.HTTP2
	case "grpc":
		return mesh.GRPC
	case "tls", "https":
		return mesh.TLS
	case "tcp", "mysql", "postgres", "postgresql", "redis", "rediss", "mongo", "mongodb",
		"amqp", "amqps", "kafka", "ldap", "ldaps", "smtp", "smtps", "imap", "imaps", "ftp", "ftps", "ssh", "nats", "memcache", "memcached", "zookeeper":
		return mesh.TCP
	default:
		return mesh.Unknown
	}
}
