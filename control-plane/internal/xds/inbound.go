package xds

import (
	"cmp"
	"reflect"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// InboundPrefix begins the names of the listeners that are for one proxy alone.
const InboundPrefix = "inbound/"

// clusterInbound is where an inbound listener leads: the address that the
// connection was made to. Our sidecar has no need of the cluster.
const clusterInbound = "inbound"

// InboundListenerName is the name under which the proxy of a pod, and no other,
// asks for what is asked of those who call it.
func InboundListenerName(namespace, pod string) string {
	return bootstrap.Config{Namespace: namespace, Instance: pod}.InboundName()
}

// maxEarlyData is what Envoy takes of a caller before it connects to the
// application.
const maxEarlyData = 64 << 10

// instanceSet is what was built for one pod, and from what.
type instanceSet struct {
	instance *mesh.Instance
	listener *Resource // Outrigger only
}

// buildInstance takes over what was built before for a pod that did not change.
func buildInstance(in *mesh.Instance, dp DataPlane, old *instanceSet) (*instanceSet, error) {
	if old != nil && reflect.DeepEqual(old.instance, in) {
		return old, nil
	}
	own := *in // else all the pods of a mesh stay in memory with one that is taken over
	out := &instanceSet{instance: &own}
	if dp != Outrigger {
		return out, nil // an Envoy's listeners are in its view
	}
	name := InboundListenerName(in.Namespace, in.Name)
	l, err := encode(ListenerType, name, inbound(name, in))
	if err != nil {
		return nil, err
	}
	l.ServiceAccount = in.ServiceAccount
	out.listener = l
	return out, nil
}

// modeOf is what a pod's proxy asks of those who call it. A word that is not known
// asks for the most.
func modeOf(in *mesh.Instance) mesh.MTLS {
	switch in.MTLS {
	case mesh.Off, mesh.Permissive:
		return in.MTLS
	case mesh.Strict:
	}
	return mesh.Strict
}

// portsOf are the ports of a pod by number: those at which it serves, and those
// that only an Authorization names. Of the latter nothing else is known.
func portsOf(in *mesh.Instance) []mesh.InstancePort {
	out := slices.Clone(in.Ports)
	for _, a := range in.Authorizations {
		for _, n := range a.Ports {
			if !slices.ContainsFunc(out, func(p mesh.InstancePort) bool { return p.Number == n }) {
				out = append(out, mesh.InstancePort{Number: n, Protocol: mesh.Unknown})
			}
		}
	}
	slices.SortFunc(out, func(a, b mesh.InstancePort) int { return cmp.Compare(a.Number, b.Number) })
	return out
}

// inbound is for our sidecar, which ends mutual TLS by itself. It has no address,
// and a chain, or for an Unknown protocol two, for each port; what comes in at
// another is found out.
func inbound(name string, in *mesh.Instance) *listenerv3.Listener {
	l := &listenerv3.Listener{Name: name, TrafficDirection: corev3.TrafficDirection_INBOUND}
	authz := authorizations(in.Authorizations)
	pair := func(port uint16) (http, bytes *listenerv3.FilterChain) {
		return inboundRequests(name, authz.at(port), Outrigger, nil), inboundBytes(name, authz.at(port), Outrigger, nil)
	}
	http, other := pair(0)
	detecting(l, http, other)
	rest := l.GetFilterChains()
	l.FilterChains = nil
	for _, p := range portsOf(in) {
		http, bytes := pair(p.Number)
		bytes.FilterChainMatch = atPort(p.Number)
		switch {
		case p.Protocol.IsHTTP():
			http.FilterChainMatch = atPort(p.Number)
			l.FilterChains = append(l.FilterChains, http)
		case p.Protocol == mesh.Unknown:
			detected(http)
			http.FilterChainMatch.DestinationPort = bytes.GetFilterChainMatch().GetDestinationPort()
			l.FilterChains = append(l.FilterChains, http, bytes)
		default:
			l.FilterChains = append(l.FilterChains, bytes)
		}
	}
	l.FilterChains = append(l.FilterChains, rest...)
	l.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{MetadataKey: {Fields: map[string]*structpb.Value{
		"mtls": structpb.NewStringValue(string(modeOf(in))),
	}}}}
	return l
}

func atPort(n uint16) *listenerv3.FilterChainMatch {
	return &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(uint32(n))}
}

// inboundRequests carries HTTP to the application, as far as those who call may.
func inboundRequests(name string, authz authorizations, dp DataPlane, tune tune) *listenerv3.FilterChain {
	m := manager(name, "")
	m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: toApplication(name, clusterInbound)}
	m.HttpFilters = append(authz.ofRequests(dp), m.GetHttpFilters()...)
	if tune != nil {
		tune(m, nil)
	}
	return chain(filterHCM, m)
}

// inboundBytes carries whatever comes to the application, as far as those who call
// may.
func inboundBytes(name string, authz authorizations, dp DataPlane, tune tune) *listenerv3.FilterChain {
	t := &tcpproxyv3.TcpProxy{StatPrefix: name, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: clusterInbound}}
	if dp == Envoy && authz.enforced() {
		// Envoy judges a connection at the first byte that the caller sends. Until then
		// the application must not hear of it, or what it says first would get out.
		t.UpstreamConnectMode, t.MaxEarlyDataBytes = tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_DATA, wrapperspb.UInt32(maxEarlyData)
	}
	c := proxied(tune, t)
	c.Filters = append(authz.ofConnections(dp), c.GetFilters()...)
	return c
}

// toApplication leads every request to one cluster.
func toApplication(name, cluster string) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name: name,
		VirtualHosts: []*routev3.VirtualHost{{
			Name: "application", Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Name:  "default",
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster},
					// The caller's proxy keeps the time; two clocks would race.
					Timeout: durationpb.New(0),
				}},
			}},
		}},
	}
}
