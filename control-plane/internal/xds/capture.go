package xds

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// An Envoy that captures the traffic of its pod has one listener to which what
// leaves the pod is redirected, which hands a connection to the listener of its
// original destination, and one for what comes in. Neither opens another port.
//
// What does not depend on the pod is made once for all of them: its access log
// names the workload by an expression.
const (
	filterOriginalDst = "envoy.filters.listener.original_dst"
	// clusterPassthrough is where a captured connection leads that no Service has:
	// the address that it was made to.
	clusterPassthrough = "passthrough"
	// clusterNowhere does not exist. What was meant for the proxy itself leads there,
	// and not round in circles.
	clusterNowhere = "nowhere"
	// passthroughTimeout bounds a connect beyond the cluster.
	passthroughTimeout = 10 * time.Second
)

// Redirection leaves alone what comes from these, so that the application can be
// reached where it serves.
func inboundSources() (v4, v6 netip.Addr) {
	return netip.AddrFrom4([4]byte{127, 0, 0, 6}), netip.AddrFrom16([16]byte{15: 6})
}

// captureSet is what Envoys that capture share, whatever the mesh.
type captureSet struct {
	listeners map[bool]*Resource // that of IPv4 under false, that of IPv6 under true
	clusters  []*Resource
}

func buildCapture() (*captureSet, error) {
	out := &captureSet{listeners: map[bool]*Resource{}}
	for _, ip := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		l := capturedOutbound(ip)
		r, err := encode(ListenerType, l.GetName(), l)
		if err != nil {
			return nil, err
		}
		r.Reaches = []string{clusterPassthrough}
		out.listeners[ip.Is6()] = r
	}
	inbound := originalDestination(clusterInbound, connectTimeout)
	inbound.TypedExtensionProtocolOptions = asDownstream()
	v4, v6 := inboundSources()
	inbound.UpstreamBindConfig = &corev3.BindConfig{
		SourceAddress: socketAddress(netip.AddrPortFrom(v4, 0)).GetSocketAddress(),
		ExtraSourceAddresses: []*corev3.ExtraSourceAddress{{
			Address: socketAddress(netip.AddrPortFrom(v6, 0)).GetSocketAddress(),
		}},
	}
	for _, c := range []*clusterv3.Cluster{inbound, originalDestination(clusterPassthrough, passthroughTimeout)} {
		r, err := encode(ClusterType, c.GetName(), c)
		if err != nil {
			return nil, err
		}
		out.clusters = append(out.clusters, r)
	}
	return out, nil
}

// originalDestination is a cluster of the addresses that connections were made to.
func originalDestination(name string, timeout time.Duration) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:       durationpb.New(timeout),
		CircuitBreakers:      unlimited(),
		CommonLbConfig:       &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
	}
}

// directCluster is where the connections to single endpoints of a Service without
// virtual IPs lead: to that endpoint, with mutual TLS. Nil where none takes that.
func directCluster(key string, svc *mesh.Service, p mesh.Port) *clusterv3.Cluster {
	if len(svc.VIPs) > 0 || len(p.Identities) == 0 {
		return nil
	}
	c := originalDestination(directName(key), connectTimeout)
	c.TransportSocket = mutualTLS(svc, p)
	return c
}

func directName(key string) string { return key + "|direct" }

// captured are the listeners of a port at each virtual IP of its Service.
func captured(key string, svc *mesh.Service, p mesh.Port) ([]*Resource, error) {
	out := make([]*Resource, 0, len(svc.VIPs))
	fields := capturedFields("outbound", literal(key))
	for _, ip := range svc.VIPs {
		l := capturedAt(key, netip.AddrPortFrom(ip, p.Number))
		outbound(l, key, p, func(m *hcmv3.HttpConnectionManager, t *tcpproxyv3.TcpProxy) {
			if m != nil {
				forEnvoy(m, maps.Clone(fields))
				return
			}
			t.AccessLog = accessLog(maps.Clone(fields).tcp())
		})
		r, err := encode(ListenerType, l.GetName(), l)
		if err != nil {
			return nil, err
		}
		r.Reaches = reaches(key, p, p.Routes, Envoy)
		out = append(out, r)
	}
	return out, nil
}

// capturedHosts are the listeners at the endpoints of a Service without virtual
// IPs that take mutual TLS. Others need none: what is sent to them passes through.
// Connections are carried as bytes, because routes and balancing would lead them
// to another endpoint. What there was under the same name (had) is taken over.
func capturedHosts(key string, p mesh.Port, had []*Resource) ([]*Resource, error) {
	old := byName(had)
	var out []*Resource
	for _, e := range p.Endpoints {
		if !e.MTLS {
			continue
		}
		l := capturedAt(key, e.Address)
		r := old[l.GetName()]
		if r == nil {
			l.FilterChains = []*listenerv3.FilterChain{chain(filterTCPProxy, &tcpproxyv3.TcpProxy{
				StatPrefix: key, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: directName(key)},
				AccessLog: accessLog(capturedFields("outbound", literal(key)).tcp()),
			})}
			var err error
			if r, err = encode(ListenerType, l.GetName(), l); err != nil {
				return nil, err
			}
			r.Reaches = []string{directName(key)}
		}
		out = append(out, r)
	}
	return out, nil
}

// capturedAt is a listener for what was sent to an address. It does not bind it.
func capturedAt(key string, to netip.AddrPort) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name: ListenerName(key) + "|" + to.String(), Address: socketAddress(to), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		BindToPort: wrapperspb.Bool(false),
	}
}

// listenOf is the address in the name of a listener of capturedAt.
func listenOf(name string) string { return name[strings.LastIndexByte(name, '|')+1:] }

// capturedOutbound takes what leaves the pod.
func capturedOutbound(ip netip.Addr) *listenerv3.Listener {
	at := netip.AddrPortFrom(ip, bootstrap.PortOutbound)
	fields := capturedFields("outbound", "%DOWNSTREAM_LOCAL_ADDRESS%")
	return &listenerv3.Listener{
		Name: "outbound/" + at.String(), Address: socketAddress(at), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		UseOriginalDst:  wrapperspb.Bool(true),
		ListenerFilters: []*listenerv3.ListenerFilter{inspector(filterOriginalDst, &originaldstv3.OriginalDst{})},
		FilterChains:    []*listenerv3.FilterChain{nowhere(bootstrap.PortOutbound, fields)},
		DefaultFilterChain: chain(filterTCPProxy, &tcpproxyv3.TcpProxy{
			StatPrefix: clusterPassthrough, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterPassthrough},
			AccessLog: accessLog(maps.Clone(fields).tcp()),
		}),
	}
}

// nowhere closes what was sent to a port of the proxy itself.
func nowhere(port uint16, fields logFields) *listenerv3.FilterChain {
	c := chain(filterTCPProxy, &tcpproxyv3.TcpProxy{
		StatPrefix: clusterNowhere, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterNowhere},
		AccessLog: accessLog(maps.Clone(fields).tcp()),
	})
	c.Name, c.FilterChainMatch = clusterNowhere, atPort(port)
	return c
}

// capturedFields are those of a record, whoever writes it. destination may hold
// commands.
func capturedFields(direction, destination string) logFields {
	f := EnvoyNode{}.logFields(direction, "")
	f["outrigger.destination"] = destination
	f["service.name"] = "%CEL(xds.node.metadata['" + bootstrap.MetaWorkload + "'])%"
	f["service.namespace"] = "%CEL(xds.node.metadata['" + bootstrap.MetaNamespace + "'])%"
	return f
}

// capturedInbound takes what comes in to the pod at addresses of one family.
//
// Envoy does not go back on a criterion that it has found a value for: a
// connection to a port that has chains, or with a transport that has, is not
// looked for elsewhere. So each port has a chain for each transport.
func (n EnvoyNode) capturedInbound(in *mesh.Instance, ip netip.Addr, addresses []netip.Addr) *listenerv3.Listener {
	at := netip.AddrPortFrom(ip, bootstrap.PortInbound)
	name := InboundPrefix + at.String()
	mode, authz := modeOf(in), authorizations(in.Authorizations)
	var ranges []*corev3.CidrRange
	for _, a := range addresses {
		ranges = append(ranges, &corev3.CidrRange{AddressPrefix: a.String(), PrefixLen: wrapperspb.UInt32(uint32(a.BitLen()))})
	}
	workload := literal(n.Namespace + "/" + n.Workload + ":")
	l := &listenerv3.Listener{
		Name: name, Address: socketAddress(at), TrafficDirection: corev3.TrafficDirection_INBOUND,
		ListenerFilters: n.inspectors(in, mode),
		FilterChains:    []*listenerv3.FilterChain{nowhere(bootstrap.PortInbound, capturedFields("inbound", workload+"%DOWNSTREAM_LOCAL_PORT%"))},
	}
	switch mode {
	case mesh.Off:
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = durationpb.New(detectTimeout), true
	case mesh.Permissive:
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = durationpb.New(inspectTimeout), true
	case mesh.Strict: // who says nothing is not let in
	}
	for _, p := range append(portsOf(in), mesh.InstancePort{Protocol: mesh.Unknown}) {
		label, fields := "others", capturedFields("inbound", workload+"%DOWNSTREAM_LOCAL_PORT%")
		if p.Number != 0 {
			label = strconv.Itoa(int(p.Number))
			fields["outrigger.destination"] = workload + label
		}
		add := func(what string, c *listenerv3.FilterChain, transport string, protocols ...string) *listenerv3.FilterChain {
			c.Name = label + " " + what
			c.FilterChainMatch = &listenerv3.FilterChainMatch{PrefixRanges: ranges, TransportProtocol: transport, ApplicationProtocols: protocols}
			if p.Number != 0 {
				c.FilterChainMatch.DestinationPort = wrapperspb.UInt32(uint32(p.Number))
			}
			l.FilterChains = append(l.FilterChains, c)
			return c
		}
		requests := func() *listenerv3.FilterChain {
			return inboundRequests(name, authz.at(p.Number), Envoy, func(m *hcmv3.HttpConnectionManager, _ *tcpproxyv3.TcpProxy) { forEnvoy(m, maps.Clone(fields)) })
		}
		bytes := func() *listenerv3.FilterChain {
			return inboundBytes(name, authz.at(p.Number), Envoy, func(_ *hcmv3.HttpConnectionManager, t *tcpproxyv3.TcpProxy) {
				t.AccessLog = accessLog(maps.Clone(fields).tcp())
			})
		}
		known := bytes
		if p.Protocol.IsHTTP() {
			known = requests
		}
		if mode != mesh.Off {
			// What is spoken inside of TLS is not looked for: it is carried as bytes.
			add("mtls", known(), "tls", bootstrap.ProtocolMesh).TransportSocket = n.downstreamTLS()
		}
		if mode == mesh.Strict {
			continue
		}
		if p.Protocol == mesh.Unknown {
			add("http", requests(), "raw_buffer", "http/1.1", "h2c")
		}
		add("clear", known(), "raw_buffer")
		if mode == mesh.Permissive || p.Protocol == mesh.Unknown {
			add("tls", known(), "tls")
		}
	}
	return l
}

// inspectors are asked for the original destination and then, where it matters,
// for what is spoken. They wait for the caller to say something, so that where the
// protocol is known and nothing has to be told apart they are not asked.
func (n EnvoyNode) inspectors(in *mesh.Instance, mode mesh.MTLS) []*listenerv3.ListenerFilter {
	known := &listenerv3.ListenerFilterChainMatchPredicate{}
	var ports []*listenerv3.ListenerFilterChainMatchPredicate
	for _, p := range portsOf(in) {
		if p.Protocol != mesh.Unknown {
			ports = append(ports, &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_DestinationPortRange{
				DestinationPortRange: &typev3.Int32Range{Start: int32(p.Number), End: int32(p.Number) + 1},
			}})
		}
	}
	switch len(ports) {
	case 0:
		known = nil
	case 1:
		known = ports[0]
	default:
		known.Rule = &listenerv3.ListenerFilterChainMatchPredicate_OrMatch{OrMatch: &listenerv3.ListenerFilterChainMatchPredicate_MatchSet{Rules: ports}}
	}
	tls, http := inspector(filterTLSInspector, &tlsinspectorv3.TlsInspector{}), inspector(filterHTTPInspector, &httpinspectorv3.HttpInspector{})
	http.FilterDisabled = known
	out := []*listenerv3.ListenerFilter{inspector(filterOriginalDst, &originaldstv3.OriginalDst{}), tls}
	switch mode {
	case mesh.Strict:
		return out
	case mesh.Off:
		tls.FilterDisabled = known
	case mesh.Permissive:
	}
	return append(out, http)
}

// addCaptured adds to a view what a node that captures has.
func (s *Set) addCaptured(v *EnvoyView, n EnvoyNode, prev *EnvoyView) error {
	for _, c := range s.capture.clusters {
		v.Clusters[c.Name] = c
	}
	v4, v6 := n.families()
	v.Listeners[s.capture.listeners[false].Name] = s.capture.listeners[false]
	if len(v6) > 0 {
		v.Listeners[s.capture.listeners[true].Name] = s.capture.listeners[true]
	}
	taken := map[string]bool{}
	keys := slices.Sorted(maps.Keys(s.ports))
	for _, key := range keys {
		ps := s.ports[key]
		for _, l := range ps.captured {
			taken[listenOf(l.Name)] = true
			if o := ps.overlays[n.Namespace]; o != nil {
				own := *l
				own.Reaches = o.Reaches
				l = &own
			}
			v.Listeners[l.Name] = l
		}
		s.addClusters(v, n, ps.reachesFrom(n.Namespace))
		if ps.direct != nil {
			v.Clusters[ps.direct.Name] = ps.direct
		}
	}
	// Of several ports that have an endpoint, the first has its listener.
	for _, key := range keys {
		for _, l := range s.ports[key].hosts {
			if at := listenOf(l.Name); !taken[at] {
				taken[at] = true
				v.Listeners[l.Name] = l
			}
		}
	}
	is := s.instances[InboundListenerName(n.Namespace, n.Instance)]
	if is == nil || is.instance.ServiceAccount != "" && is.instance.ServiceAccount != n.ServiceAccount {
		return nil // nobody is let in
	}
	v.instance = is
	if prev != nil && prev.instance == is {
		v.inbound = prev.inbound
	} else {
		for _, f := range []struct {
			ip        netip.Addr
			addresses []netip.Addr
		}{{netip.IPv4Unspecified(), v4}, {netip.IPv6Unspecified(), v6}} {
			if len(f.addresses) == 0 {
				continue
			}
			l := n.capturedInbound(is.instance, f.ip, f.addresses)
			r, err := encode(ListenerType, l.GetName(), l)
			if err != nil {
				return err
			}
			r.Reaches = []string{clusterInbound}
			v.inbound = append(v.inbound, r)
		}
	}
	for _, l := range v.inbound {
		v.Listeners[l.Name] = l
	}
	return nil
}

// families are the addresses of a node's pod.
func (n EnvoyNode) families() (v4, v6 []netip.Addr) {
	for _, a := range n.Addresses {
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	return v4, v6
}
