package xds

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// EnvoyNode is what a real Envoy said in its node metadata: whose proxy it is,
// and the ports that it is to open.
type EnvoyNode struct {
	Namespace string
	Workload  string
	Upstreams []bootstrap.Upstream
	Inbounds  []bootstrap.Inbound
	// MTLS is what the node takes from those who call it: a word of
	// bootstrap.Config.
	MTLS string
	// Certificates: the node gets its certificate by SDS.
	Certificates bool
	// Capture: the pod's traffic is redirected to the node, which is that of the pod
	// Instance, with these service account and addresses.
	Capture        bool
	Instance       string
	ServiceAccount string
	Addresses      []netip.Addr
	// TrustDomain of the callers. It is set by EnvoyView.
	TrustDomain string
}

// Key tells nodes apart that need different listeners; replicas share one where
// they do not capture.
func (n EnvoyNode) Key() string {
	var b strings.Builder
	b.WriteString(strconv.Quote(n.Namespace) + strconv.Quote(n.Workload) + "\n")
	b.WriteString(n.MTLS + strconv.FormatBool(n.Certificates) + "\n")
	if n.Capture {
		b.WriteString(strconv.Quote(n.Instance) + strconv.Quote(n.ServiceAccount) + fmt.Sprint(n.Addresses) + "\n")
	}
	for _, u := range n.Upstreams {
		b.WriteString(u.String() + "\n")
	}
	for _, in := range n.Inbounds {
		b.WriteString(in.String() + "\n")
	}
	return b.String()
}

// maxAddresses of a pod: Kubernetes gives it one a family.
const maxAddresses = 8

// ParseEnvoyNode reads NAMESPACE, WORKLOAD, MTLS, SDS and the lists UPSTREAMS and
// INBOUNDS of the node metadata that bootstrap.Config writes, and where CAPTURE is
// "true" INSTANCE, SERVICE_ACCOUNT and ADDRESSES. Each may be absent, but for those
// of a node that captures. The error names every entry that cannot be read.
func ParseEnvoyNode(metadata *structpb.Struct) (EnvoyNode, error) {
	n := EnvoyNode{
		Namespace: metadata.GetFields()[bootstrap.MetaNamespace].GetStringValue(),
		Workload:  metadata.GetFields()[bootstrap.MetaWorkload].GetStringValue(),
		MTLS:      metadata.GetFields()[bootstrap.MetaMTLS].GetStringValue(),

		Certificates: metadata.GetFields()[bootstrap.MetaSDS].GetStringValue() == "true",
	}
	switch n.MTLS {
	case "", bootstrap.MTLSOff:
	case bootstrap.MTLSPermissive, bootstrap.MTLSStrict:
		if !n.Certificates {
			return EnvoyNode{}, fmt.Errorf("node metadata %s is %q, and %s is not: an Envoy without a certificate can take no mutual TLS", bootstrap.MetaMTLS, n.MTLS, bootstrap.MetaSDS)
		}
	default:
		return EnvoyNode{}, fmt.Errorf("node metadata %s is %q: write off, permissive or strict", bootstrap.MetaMTLS, n.MTLS)
	}
	var errs []error
	ups := metadata.GetFields()[bootstrap.MetaUpstreams].GetListValue().GetValues()
	ins := metadata.GetFields()[bootstrap.MetaInbounds].GetListValue().GetValues()
	if total := len(ups) + len(ins); total > bootstrap.MaxListeners {
		return EnvoyNode{}, fmt.Errorf("node metadata %s and %s hold %d entries: at most %d", bootstrap.MetaUpstreams, bootstrap.MetaInbounds, total, bootstrap.MaxListeners)
	}
	if metadata.GetFields()[bootstrap.MetaCapture].GetStringValue() == "true" {
		errs = append(errs, n.parseCapture(metadata))
	}
	listens := map[netip.AddrPort]bool{}
	twice := func(a netip.AddrPort) {
		if n.Capture && (a.Port() == bootstrap.PortOutbound || a.Port() == bootstrap.PortInbound) {
			errs = append(errs, fmt.Errorf("a listener on %s: ports %d and %d are those to which %s redirects", a, bootstrap.PortOutbound, bootstrap.PortInbound, bootstrap.MetaCapture))
		}
		if listens[a] {
			errs = append(errs, fmt.Errorf("two listeners on %s: give each its own port", a))
		}
		listens[a] = true
	}
	for _, v := range ups {
		u, err := bootstrap.ParseUpstream(v.GetStringValue())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		twice(u.Listen)
		n.Upstreams = append(n.Upstreams, u)
	}
	for _, v := range ins {
		in, err := bootstrap.ParseInbound(v.GetStringValue())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		twice(in.Listen)
		n.Inbounds = append(n.Inbounds, in)
	}
	if err := errors.Join(errs...); err != nil {
		return EnvoyNode{}, fmt.Errorf("node metadata: %w", err)
	}
	return n, nil
}

func (n *EnvoyNode) parseCapture(metadata *structpb.Struct) error {
	n.Capture = true
	n.Instance = metadata.GetFields()[bootstrap.MetaInstance].GetStringValue()
	n.ServiceAccount = metadata.GetFields()[bootstrap.MetaServiceAccount].GetStringValue()
	if n.Namespace == "" || n.Instance == "" {
		return fmt.Errorf("%s is true, and %s or %s is empty: what is asked of those who call a pod is told to its proxy alone", bootstrap.MetaCapture, bootstrap.MetaNamespace, bootstrap.MetaInstance)
	}
	if !n.Certificates {
		return fmt.Errorf("%s is true, and %s is not: an Envoy without a certificate can take no mutual TLS", bootstrap.MetaCapture, bootstrap.MetaSDS)
	}
	values := metadata.GetFields()[bootstrap.MetaAddresses].GetListValue().GetValues()
	if len(values) == 0 || len(values) > maxAddresses {
		return fmt.Errorf("%s is true, and %s holds %d addresses: give those of the pod, at most %d", bootstrap.MetaCapture, bootstrap.MetaAddresses, len(values), maxAddresses)
	}
	for _, v := range values {
		a, err := netip.ParseAddr(v.GetStringValue())
		if err != nil || a.Zone() != "" || a.IsUnspecified() {
			return fmt.Errorf("%s %q is not an IP address of a pod", bootstrap.MetaAddresses, v.GetStringValue())
		}
		if a = a.Unmap(); !slices.Contains(n.Addresses, a) {
			n.Addresses = append(n.Addresses, a)
		}
	}
	slices.SortFunc(n.Addresses, netip.Addr.Compare)
	return nil
}

// EnvoyView is what one Envoy gets where it asks with wildcards.
type EnvoyView struct {
	Listeners Resources
	Clusters  Resources
	// Missing names the upstreams that no Service of the mesh has, sorted. No
	// listener is opened for them, so a connection is refused.
	Missing []string

	trustDomain string
	made        map[string]made // listeners of upstreams, by name
	instance    *instanceSet    // that inbound was made of
	inbound     []*Resource
}

// made is a listener and what it was made of.
type made struct {
	of       *shape
	listener *Resource
}

// EnvoyView makes the listeners of a node and picks the clusters that those can
// reach. The set must have been built for Envoy. What was made for the same node
// before (prev, which may be nil) is taken over where it is the same.
func (s *Set) EnvoyView(n EnvoyNode, prev *EnvoyView) (*EnvoyView, error) {
	v := &EnvoyView{Listeners: Resources{}, Clusters: Resources{}, trustDomain: s.trustDomain, made: map[string]made{}}
	n.TrustDomain = s.trustDomain
	if prev != nil && prev.trustDomain != s.trustDomain {
		prev = nil
	}
	for _, u := range n.Upstreams {
		ps := s.ports[u.Key()]
		if ps == nil {
			v.Missing = append(v.Missing, u.Key())
			continue
		}
		name := ListenerName(u.Key()) + "|" + u.Listen.String()
		var old made
		if prev != nil {
			old = prev.made[name]
		}
		if old.of != ps.shape {
			r, err := encode(ListenerType, name, n.upstreamListener(name, u, ps.port))
			if err != nil {
				return nil, err
			}
			r.Reaches = ps.reachesFrom(n.Namespace)
			old = made{ps.shape, r}
		}
		v.made[name] = old
		v.Listeners[name] = old.listener
		s.addClusters(v, n, ps.reachesFrom(n.Namespace))
	}
	slices.Sort(v.Missing)
	v.Missing = slices.Compact(v.Missing)
	for _, in := range n.Inbounds {
		l, c := InboundPrefix+in.Listen.String(), InboundPrefix+in.Forward.String()
		if prev != nil && prev.Listeners[l] != nil && prev.Clusters[c] != nil {
			v.Listeners[l], v.Clusters[c] = prev.Listeners[l], prev.Clusters[c]
			continue
		}
		var err error
		if v.Listeners[l], err = encode(ListenerType, l, n.inboundListener(in)); err != nil {
			return nil, err
		}
		if v.Clusters[c], err = encode(ClusterType, c, inboundCluster(in)); err != nil {
			return nil, err
		}
		v.Listeners[l].Reaches = []string{c}
	}
	if n.Capture {
		return v, s.addCaptured(v, n, prev)
	}
	return v, nil
}

// addClusters adds those of the clusters that there are, as the node can use them.
func (s *Set) addClusters(v *EnvoyView, n EnvoyNode, names []string) {
	for _, name := range names {
		r := s.types[ClusterType][name]
		if ps := s.ports[name]; ps != nil && ps.clear != nil && !n.Certificates {
			r = ps.clear
		}
		if r != nil {
			v.Clusters[name] = r
		}
	}
}

// upstreamListener is an ambassador port.
func (n EnvoyNode) upstreamListener(name string, u bootstrap.Upstream, p mesh.Port) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name: name, Address: socketAddress(u.Listen), TrafficDirection: corev3.TrafficDirection_OUTBOUND,
	}
	outbound(l, u.Key(), p, func(m *hcmv3.HttpConnectionManager, t *tcpproxyv3.TcpProxy) {
		if m != nil {
			forEnvoy(m, n.logFields("outbound", u.Key()))
			return
		}
		t.AccessLog = accessLog(n.logFields("outbound", u.Key()).tcp())
	})
	return l
}

// Equal reports whether both views hold the same resources.
func (v *EnvoyView) Equal(o *EnvoyView) bool {
	same := func(a, b *Resource) bool { return a.Version == b.Version }
	return maps.EqualFunc(v.Listeners, o.Listeners, same) && maps.EqualFunc(v.Clusters, o.Clusters, same)
}

func (n EnvoyNode) inboundListener(in bootstrap.Inbound) *listenerv3.Listener {
	to := "inbound/" + in.Forward.String()
	fields := n.logFields("inbound", mesh.Key(n.Namespace, n.Workload, in.Forward.Port()))
	l := &listenerv3.Listener{
		Name: "inbound/" + in.Listen.String(), Address: socketAddress(in.Listen), TrafficDirection: corev3.TrafficDirection_INBOUND,
	}
	plain := chain(filterTCPProxy, &tcpproxyv3.TcpProxy{
		StatPrefix: l.GetName(), ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: to}, AccessLog: accessLog(maps.Clone(fields).tcp()),
	})
	if in.Protocol == "tcp" || in.Protocol == "tls" {
		l.FilterChains = []*listenerv3.FilterChain{plain}
		n.secureInbound(l)
		return l
	}
	m := manager(l.GetName(), "")
	m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: toApplication(l.GetName(), to)}
	forEnvoy(m, fields)
	http := chain(filterHCM, m)
	if in.Protocol == "auto" {
		detecting(l, http, plain)
	} else {
		l.FilterChains = []*listenerv3.FilterChain{http}
	}
	n.secureInbound(l)
	return l
}

// inboundCluster is the application. It is spoken to in the version of HTTP
// that the caller used, so that gRPC and HTTP/1.1 share a port.
func inboundCluster(in bootstrap.Inbound) *clusterv3.Cluster {
	name := "inbound/" + in.Forward.String()
	c := &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(in.Forward)}},
			}},
		}}},
		CircuitBreakers: unlimited(),
		CommonLbConfig:  &clusterv3.Cluster_CommonLbConfig{HealthyPanicThreshold: &typev3.Percent{Value: 0}},
	}
	if in.Protocol == "http" || in.Protocol == "auto" {
		c.TypedExtensionProtocolOptions = asDownstream()
	}
	return c
}

func unlimited() *clusterv3.CircuitBreakers {
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections: wrapperspb.UInt32(noLimit), MaxPendingRequests: wrapperspb.UInt32(noLimit),
		MaxRequests: wrapperspb.UInt32(noLimit), MaxRetries: wrapperspb.UInt32(noLimit),
	}}}
}

// asDownstream speaks to endpoints in the version of HTTP that the caller speaks.
func asDownstream() map[string]*anypb.Any {
	return map[string]*anypb.Any{httpOptions: packed(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &httpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions:  &corev3.Http1ProtocolOptions{},
				Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
			},
		},
	})}
}

// forEnvoy adds what our own sidecar does by itself.
func forEnvoy(m *hcmv3.HttpConnectionManager, fields logFields) {
	m.NormalizePath = wrapperspb.Bool(true)
	m.MergeSlashes = true
	m.PathWithEscapedSlashesAction = hcmv3.HttpConnectionManager_REJECT_REQUEST
	m.UpgradeConfigs = []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}}
	m.AccessLog = accessLog(fields.http())
}

// logFields are the fields of an access log, by name: format strings of Envoy.
// The names are those of our sidecar's access log, so that one search finds the
// records of both; each kind has some that the other cannot know.
type logFields map[string]string

// logFields are those of every record of a listener that leads to destination.
func (n EnvoyNode) logFields(direction, destination string) logFields {
	f := logFields{
		"@timestamp":               "%START_TIME(%Y-%m-%dT%H:%M:%S.%6fZ)%",
		"event.dataset":            "outrigger.access",
		"outrigger.direction":      direction,
		"outrigger.destination":    literal(destination),
		"source.address":           "%DOWNSTREAM_REMOTE_ADDRESS%",
		"destination.address":      "%UPSTREAM_HOST%",
		"outrigger.cluster":        "%UPSTREAM_CLUSTER%",
		"outrigger.response_flags": "%RESPONSE_FLAGS%",
		"http.request.body.bytes":  "%BYTES_RECEIVED%",
		"http.response.body.bytes": "%BYTES_SENT%",
	}
	if n.Workload != "" {
		f["service.name"] = literal(n.Workload)
	}
	if n.Namespace != "" {
		f["service.namespace"] = literal(n.Namespace)
	}
	return f
}

// literal is text in which Envoy sees no command.
func literal(text string) string { return strings.ReplaceAll(text, "%", "%%") }

// http adds what is known of a request. What a stranger wrote is cut at the
// lengths at which our sidecar cuts it. Envoy makes no trace.id without tracing:
// the header is logged as it came.
func (f logFields) http() logFields {
	maps.Copy(f, logFields{
		"message":                          "%REQ(:METHOD):256% %PATH(NQ:PATH):128% -> %RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION%ms",
		"network.protocol":                 "http",
		"event.duration":                   "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:ns)%",
		"http.request.method":              "%REQ(:METHOD):256%",
		"http.request.id":                  "%REQ(X-REQUEST-ID):256%",
		"http.request.headers.traceparent": "%REQ(TRACEPARENT):256%",
		"http.response.status_code":        "%RESPONSE_CODE%",
		"http.version":                     "%PROTOCOL%",
		"url.path":                         "%PATH(NQ:PATH):1024%", // the query may hold secrets
		"url.domain":                       "%REQ(:AUTHORITY):256%",
		"user_agent.original":              "%REQ(USER-AGENT):256%",
		"outrigger.route":                  "%ROUTE_NAME%",
		"outrigger.attempts":               "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
		"outrigger.detail":                 "%RESPONSE_CODE_DETAILS%",
	})
	return f
}

// tcp adds what is known of a connection.
func (f logFields) tcp() logFields {
	maps.Copy(f, logFields{
		"message":          "tcp -> %RESPONSE_FLAGS% %DURATION%ms",
		"network.protocol": "tcp",
		"event.duration":   "%DURATION%000000",
		// Only where the listener looks at what a client says.
		"tls.client.server_name": "%REQUESTED_SERVER_NAME%",
	})
	return f
}

func accessLog(format logFields) []*accesslogv3.AccessLog {
	f := make(map[string]*structpb.Value, len(format))
	for k, v := range format {
		f[k] = structpb.NewStringValue(v)
	}
	return []*accesslogv3.AccessLog{{
		Name: "envoy.access_loggers.stdout",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: packed(&streamv3.StdoutAccessLog{
			AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format:          &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: &structpb.Struct{Fields: f}},
				OmitEmptyValues: true,
			}},
		})},
	}}
}
