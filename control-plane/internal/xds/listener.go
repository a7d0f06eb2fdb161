package xds

import (
	"net/netip"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const (
	filterHCM      = "envoy.filters.network.http_connection_manager"
	filterTCPProxy = "envoy.filters.network.tcp_proxy"
	filterRouter   = "envoy.filters.http.router"
)

// ListenerName is the name under which a sidecar asks for a port of a Service:
// outbound/<key>.
func ListenerName(key string) string { return "outbound/" + key }

// VIPListenerName is the name under which a sidecar asks for an original
// destination that it captured.
func VIPListenerName(vip netip.AddrPort) string { return "outbound/" + vip.String() }

// listeners are the shared listeners of a port under each of its names. Envoy
// has none: its listeners bind addresses and belong to a node.
func listeners(svc *mesh.Service, p mesh.Port, dp DataPlane) ([]*Resource, error) {
	key := mesh.Key(svc.Namespace, svc.Name, p.Number)
	var names []string
	l := &listenerv3.Listener{}
	switch dp {
	case Outrigger:
		names = append(names, ListenerName(key))
		for _, ip := range svc.VIPs {
			names = append(names, VIPListenerName(netip.AddrPortFrom(ip, p.Number)))
		}
		l.FilterChains = []*listenerv3.FilterChain{outboundChain(key, p, nil)}
	case GRPC:
		if !routed(p, dp) {
			return nil, nil // plain TCP: nothing that a gRPC client could use
		}
		host := svc.Name + "." + svc.Namespace
		names = []string{hostPort(host, p.Number), hostPort(host+".svc.cluster.local", p.Number)}
		l.ApiListener = &listenerv3.ApiListener{ApiListener: packed(manager(key, key))}
	case Envoy:
		return nil, nil
	}
	out := make([]*Resource, 0, len(names))
	for _, name := range names {
		named := proto.CloneOf(l)
		named.Name = name
		r, err := encode(ListenerType, name, named)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// outboundChain carries connections to a port: request by request where its
// protocol is known to be HTTP, else as bytes. tune may be nil.
func outboundChain(key string, p mesh.Port, tune func(*hcmv3.HttpConnectionManager, *tcpproxyv3.TcpProxy)) *listenerv3.FilterChain {
	if p.Protocol.IsHTTP() {
		m := manager(key, key)
		if tune != nil {
			tune(m, nil)
		}
		return chain(filterHCM, m)
	}
	t := &tcpproxyv3.TcpProxy{StatPrefix: key, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: key}}
	if tune != nil {
		tune(nil, t)
	}
	return chain(filterTCPProxy, t)
}

// manager fetches the named route configuration over ADS.
func manager(statPrefix, route string) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		StatPrefix: statPrefix,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource: fromADS(), RouteConfigName: route,
		}},
		HttpFilters: []*hcmv3.HttpFilter{router()},
	}
}

func router() *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{
		Name:       filterRouter,
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&routerv3.Router{})},
	}
}

func chain(name string, config proto.Message) *listenerv3.FilterChain {
	return &listenerv3.FilterChain{Filters: []*listenerv3.Filter{{
		Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed(config)},
	}}}
}
