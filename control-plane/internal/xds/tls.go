package xds

import (
	"slices"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const (
	socketTLS = "envoy.transport_sockets.tls"
	socketRaw = "envoy.transport_sockets.raw_buffer"
	// transportSocketMatch is the key of an endpoint's metadata by which Envoy
	// chooses one of transport_socket_matches.
	transportSocketMatch = "envoy.transport_socket_match"
	// MetadataMTLS there says that the endpoint takes mutual TLS.
	MetadataMTLS = MetadataKey + "/mtls"
)

func mtlsMatch() *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{MetadataMTLS: structpb.NewStringValue("true")}}
}

// transportSockets is how the endpoints of a port are reached: with mutual TLS
// those that say so, in clear the rest.
func transportSockets(svc *mesh.Service, p mesh.Port) []*clusterv3.Cluster_TransportSocketMatch {
	if len(p.Identities) == 0 {
		return nil
	}
	return []*clusterv3.Cluster_TransportSocketMatch{
		{Name: "mtls", Match: mtlsMatch(), TransportSocket: mutualTLS(svc, p)},
		{Name: "clear", Match: &structpb.Struct{}, TransportSocket: socket(socketRaw, &rawv3.RawBuffer{})},
	}
}

// mutualTLS is with a peer that proves one of the port's identities.
func mutualTLS(svc *mesh.Service, p mesh.Port) *corev3.TransportSocket {
	sans := make([]*tlsv3.SubjectAltNameMatcher, 0, len(p.Identities))
	for _, id := range p.Identities {
		sans = append(sans, uri(id))
	}
	return socket(socketTLS, &tlsv3.UpstreamTlsContext{
		CommonTlsContext: common(append(spoken(p.Protocol), bootstrap.ProtocolMesh), sans),
		Sni:              svc.Name + "." + svc.Namespace,
	})
}

// spoken is what a proxy offers in ALPN of what it is about to speak: an Envoy on
// the other side believes what was agreed on.
func spoken(p mesh.Protocol) []string {
	switch p {
	case mesh.HTTP2, mesh.GRPC:
		return []string{"h2"}
	case mesh.HTTP1:
		return []string{"http/1.1"}
	case mesh.TCP, mesh.TLS, mesh.Unknown:
	}
	return nil
}

func uri(id string) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{
		SanType: tlsv3.SubjectAltNameMatcher_URI,
		Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id}},
	}
}

// common is what both ends agree on: TLS 1.3, the workload's certificate, and a
// peer that leads to a root of the mesh and has one of the names.
func common(alpn []string, sans []*tlsv3.SubjectAltNameMatcher) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		AlpnProtocols:                  alpn,
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(bootstrap.SecretCertificate)},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: sans},
				ValidationContextSdsSecretConfig: secret(bootstrap.SecretRoots),
			},
		},
	}
}

func secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: bootstrap.ClusterSDS},
			}}},
		}},
	}}
}

func socket(name string, config proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: name, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(config)}}
}

// inspectTimeout is how long an inbound connection may say nothing before a
// permissive listener takes it for one whose server speaks first.
const inspectTimeout = time.Second

// secureInbound makes an inbound listener of an Envoy take what the node's mode
// says. Mesh TLS is told from the application's own by its ALPN: the latter is
// passed on as it is where the mode is permissive.
func (n EnvoyNode) secureInbound(l *listenerv3.Listener) {
	if n.MTLS != bootstrap.MTLSPermissive && n.MTLS != bootstrap.MTLSStrict {
		return
	}
	clear := l.GetFilterChains()
	secure := proto.CloneOf(clear[0])
	if other := l.GetDefaultFilterChain(); other != nil {
		// What is spoken inside of TLS is not looked for: it is carried as bytes.
		secure = proto.CloneOf(other)
	}
	secure.Name = "mtls"
	secure.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: []string{bootstrap.ProtocolMesh}}
	secure.TransportSocket = n.downstreamTLS()
	if len(l.GetListenerFilters()) == 0 {
		l.ListenerFilters = []*listenerv3.ListenerFilter{inspector(filterTLSInspector, &tlsinspectorv3.TlsInspector{})}
	}
	if n.MTLS == bootstrap.MTLSStrict {
		l.FilterChains, l.DefaultFilterChain = []*listenerv3.FilterChain{secure}, nil
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = nil, false
		return
	}
	clear[0].Name = "clear"
	l.FilterChains = append([]*listenerv3.FilterChain{secure}, clear...)
	if l.GetDefaultFilterChain() == nil {
		// Having found a chain for TLS, Envoy goes back to none without a transport: the
		// application's own would be refused.
		other := proto.CloneOf(clear[0])
		other.Name, other.FilterChainMatch = "tls", &listenerv3.FilterChainMatch{TransportProtocol: "tls"}
		l.FilterChains = append(l.FilterChains, other)
	}
	if l.GetListenerFiltersTimeout() == nil {
		l.ListenerFiltersTimeout = durationpb.New(inspectTimeout)
	}
	l.ContinueOnListenerFiltersTimeout = true
}

// downstreamTLS is with a peer of the trust domain that proves who it is.
func (n EnvoyNode) downstreamTLS() *corev3.TransportSocket {
	return socket(socketTLS, &tlsv3.DownstreamTlsContext{
		// Without ProtocolMesh: what is agreed on, Envoy takes for what will be
		// spoken; where nothing is, it looks.
		CommonTlsContext: common([]string{"h2", "http/1.1"}, []*tlsv3.SubjectAltNameMatcher{{
			SanType: tlsv3.SubjectAltNameMatcher_URI,
			Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + n.TrustDomain + "/ns/"}},
		}}),
		RequireClientCertificate: wrapperspb.Bool(true),
	})
}

// MTLSParity tells what each data plane makes of the mode of the workloads
// behind a port; nothing where none has one.
func MTLSParity(p mesh.Port) []ParityNote {
	if !slices.ContainsFunc(p.Endpoints, func(e mesh.Endpoint) bool { return e.MTLS }) {
		return nil
	}
	var out parity
	out.note("mtls", Approximated, "an Envoy needs the certificate of a sidecar (--sds-address); one without speaks in clear, which Strict refuses",
		Ignored, "a proxyless gRPC program speaks in clear, which Strict refuses")
	return out
}
