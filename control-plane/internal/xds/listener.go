package xds

import (
	"net/netip"
	"strings"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const (
	filterHCM      = "envoy.filters.network.http_connection_manager"
	filterTCPProxy = "envoy.filters.network.tcp_proxy"
	filterRouter   = "envoy.filters.http.router"

	filterTLSInspector  = "envoy.filters.listener.tls_inspector"
	filterHTTPInspector = "envoy.filters.listener.http_inspector"
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
		outbound(l, key, p, nil)
	case GRPC:
		if !routed(p) {
			return nil, nil // bytes: nothing that a gRPC client could use
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

// hosts are the listeners of a port under the addresses of its endpoints, for a
// Service without virtual IPs: those are what its callers connect to. What there
// was under the same name (had) is taken over.
func hosts(key string, p mesh.Port, had []*Resource) ([]*Resource, error) {
	l := &listenerv3.Listener{}
	outbound(l, key, p, nil)
	old := byName(had)
	out := make([]*Resource, 0, len(p.Endpoints))
	for _, e := range p.Endpoints {
		name := VIPListenerName(e.Address)
		r := old[name]
		if r == nil {
			l.Name = name
			var err error
			if r, err = encode(ListenerType, name, l); err != nil {
				return nil, err
			}
		}
		out = append(out, r)
	}
	return out, nil
}

func byName(rs []*Resource) map[string]*Resource {
	out := make(map[string]*Resource, len(rs))
	for _, r := range rs {
		out[r.Name] = r
	}
	return out
}

// tune adapts the filters of a listener to a data plane; one argument is nil. It
// may be nil itself.
type tune func(*hcmv3.HttpConnectionManager, *tcpproxyv3.TcpProxy)

// outbound gives a listener what carries connections to a port: request by
// request where its protocol is HTTP, as bytes where it is not, by server name
// where it is TLS, and whatever a connection begins as where it is not known.
func outbound(l *listenerv3.Listener, key string, p mesh.Port, tune tune) {
	switch {
	case p.Protocol.IsHTTP():
		l.FilterChains = []*listenerv3.FilterChain{requests(key, tune)}
	case p.Protocol == mesh.Unknown:
		detecting(l, requests(key, tune), bytesTo(key, tune, key))
	case p.Protocol == mesh.TLS:
		byServerName(l, key, p, tune)
	default:
		l.FilterChains = []*listenerv3.FilterChain{bytesTo(key, tune, key)}
	}
}

// detectTimeout is how long a client is waited for before what it does not say is
// taken for bytes, because the server speaks first.
const detectTimeout = 50 * time.Millisecond

// detecting leads what begins as HTTP/1.1, or as HTTP/2 without TLS, to one chain
// and everything else to another. Without the transport's name the chain would
// also get TLS that offers HTTP by ALPN.
func detecting(l *listenerv3.Listener, http, other *listenerv3.FilterChain) {
	detected(http)
	l.FilterChains = []*listenerv3.FilterChain{http}
	l.DefaultFilterChain = other
	l.ListenerFilters = []*listenerv3.ListenerFilter{
		inspector(filterTLSInspector, &tlsinspectorv3.TlsInspector{}), inspector(filterHTTPInspector, &httpinspectorv3.HttpInspector{}),
	}
	l.ListenerFiltersTimeout = durationpb.New(detectTimeout)
	l.ContinueOnListenerFiltersTimeout = true
}

// detected makes a chain take what was found to be HTTP.
func detected(http *listenerv3.FilterChain) {
	http.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer", ApplicationProtocols: []string{"http/1.1", "h2c"}}
}

// byServerName leads TLS that stays closed. Where no TLSRoute is attached every
// connection goes to the port; else one whose name has no chain is closed.
func byServerName(l *listenerv3.Listener, key string, p mesh.Port, tune tune) {
	l.ListenerFilters = []*listenerv3.ListenerFilter{inspector(filterTLSInspector, &tlsinspectorv3.TlsInspector{})}
	for _, n := range p.ServerNames {
		c := weightedTo(key, tune, n.Backends)
		c.FilterChainMatch = &listenerv3.FilterChainMatch{ServerNames: []string{n.Name}}
		l.FilterChains = append(l.FilterChains, c)
	}
	switch {
	case !p.OnlyServerNames:
		l.DefaultFilterChain = bytesTo(key, tune, key)
	case len(l.GetFilterChains()) == 0:
		// A listener must have a chain: this one leads nowhere.
		l.DefaultFilterChain = weightedTo(key, tune, nil)
	}
}

func inspector(name string, config proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: packed(config)}}
}

// requests carries HTTP to where the routes of the port say.
func requests(key string, tune tune) *listenerv3.FilterChain {
	m := manager(key, key)
	if tune != nil {
		tune(m, nil)
	}
	return chain(filterHCM, m)
}

// bytesTo carries whatever comes to a cluster.
func bytesTo(key string, tune tune, cluster string) *listenerv3.FilterChain {
	return proxied(tune, &tcpproxyv3.TcpProxy{StatPrefix: key, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster}})
}

// weightedTo carries whatever comes to one of the backends. Where there is none it
// goes to a cluster that does not exist, as the share of a missing backend does:
// the connection is closed.
func weightedTo(key string, tune tune, backends []mesh.Backend) *listenerv3.FilterChain {
	var weighted []*tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight
	for _, b := range backends {
		if b.Weight > 0 {
			weighted = append(weighted, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: mesh.Key(b.Namespace, b.Service, b.Port), Weight: b.Weight})
		}
	}
	switch len(weighted) {
	case 0:
		return bytesTo(key, tune, key[:strings.LastIndexByte(key, ':')]+":0")
	case 1:
		return bytesTo(key, tune, weighted[0].GetName())
	}
	return proxied(tune, &tcpproxyv3.TcpProxy{StatPrefix: key, ClusterSpecifier: &tcpproxyv3.TcpProxy_WeightedClusters{
		WeightedClusters: &tcpproxyv3.TcpProxy_WeightedCluster{Clusters: weighted},
	}})
}

func proxied(tune tune, t *tcpproxyv3.TcpProxy) *listenerv3.FilterChain {
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
