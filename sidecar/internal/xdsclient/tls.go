package xdsclient

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const (
	// transportSocketMatch is the key of an endpoint's metadata by which one of the
	// cluster's transport_socket_matches is chosen, and mtlsKey the member of it
	// that we know.
	transportSocketMatch = "envoy.transport_socket_match"
	mtlsKey              = metadataKey + "/mtls"
	// maxIdentities bounds those of one cluster.
	maxIdentities = 1024

	httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

// transportSockets reads how endpoints are reached. What is not understood is
// refused: it must not end in clear text.
func transportSockets(c *clusterv3.Cluster, out *table.Cluster) error {
	if c.GetTransportSocket() != nil {
		return errors.New("transport_socket: it is not supported; transport_socket_matches is")
	}
	if c.GetTransportSocketMatcher() != nil {
		return errors.New("transport_socket_matcher: it is not supported; transport_socket_matches is")
	}
	for i, m := range c.GetTransportSocketMatches() {
		fail := func(format string, args ...any) error {
			return fmt.Errorf("transport_socket_matches[%d](%s).%w", i, m.GetName(), fmt.Errorf(format, args...))
		}
		fields := m.GetMatch().GetFields()
		socket := m.GetTransportSocket().GetTypedConfig()
		switch {
		case len(fields) == 1 && fields[mtlsKey].GetStringValue() == "true":
			if out.TLS != nil {
				return fail("match: it is there twice")
			}
			if !socket.MessageIs((*tlsv3.UpstreamTlsContext)(nil)) {
				return fail("transport_socket.typed_config: %q is not supported for endpoints with mutual TLS; UpstreamTlsContext is", socket.GetTypeUrl())
			}
			var t tlsv3.UpstreamTlsContext
			if err := proto.Unmarshal(socket.GetValue(), &t); err != nil {
				return fail("transport_socket.typed_config: %w", err)
			}
			conf, err := upstreamTLS(&t)
			if err != nil {
				return fail("transport_socket.%w", err)
			}
			out.TLS = conf
		case len(fields) == 0:
			if !socket.MessageIs((*rawv3.RawBuffer)(nil)) {
				return fail("transport_socket.typed_config: %q is not supported for the rest of the endpoints; RawBuffer is", socket.GetTypeUrl())
			}
		default:
			return fail("match: only {%s: \"true\"} and {} are supported", mtlsKey)
		}
	}
	return nil
}

func upstreamTLS(t *tlsv3.UpstreamTlsContext) (*table.TLS, error) {
	out := &table.TLS{ServerName: t.GetSni()}
	if t.GetAutoHostSni() || t.GetAutoSniSanValidation() {
		return nil, errors.New("auto_host_sni, auto_sni_san_validation: they are not supported")
	}
	c := t.GetCommonTlsContext()
	certs := c.GetTlsCertificateSdsSecretConfigs()
	if len(certs) != 1 || certs[0].GetName() != bootstrap.SecretCertificate || len(c.GetTlsCertificates()) > 0 {
		return nil, fmt.Errorf("common_tls_context.tls_certificate_sds_secret_configs: exactly one is supported, %q, which is the workload's own", bootstrap.SecretCertificate)
	}
	if v := c.GetTlsParams().GetTlsMaximumProtocolVersion(); v != tlsv3.TlsParameters_TLSv1_3 && v != tlsv3.TlsParameters_TLS_AUTO {
		return nil, fmt.Errorf("common_tls_context.tls_params.tls_maximum_protocol_version: %s is not supported; TLSv1_3 is", v)
	}
	combined := c.GetCombinedValidationContext()
	if combined == nil {
		return nil, fmt.Errorf("common_tls_context.validation_context_type: %T is not supported; combined_validation_context is", c.GetValidationContextType())
	}
	const context = "common_tls_context.combined_validation_context."
	if name := combined.GetValidationContextSdsSecretConfig().GetName(); name != bootstrap.SecretRoots {
		return nil, fmt.Errorf(context+"validation_context_sds_secret_config.name: %.100q is not supported; %q is", name, bootstrap.SecretRoots)
	}
	v := combined.GetDefaultValidationContext()
	if rest := proto.CloneOf(v); rest != nil {
		rest.MatchTypedSubjectAltNames = nil
		if proto.Size(rest) > 0 {
			return nil, errors.New(context + "default_validation_context: only match_typed_subject_alt_names is supported")
		}
	}
	sans := v.GetMatchTypedSubjectAltNames()
	switch n := len(sans); {
	case n == 0:
		return nil, errors.New(context + "default_validation_context.match_typed_subject_alt_names: it is empty, so that anybody would be taken for the destination")
	case n > maxIdentities:
		return nil, fmt.Errorf(context+"default_validation_context.match_typed_subject_alt_names: %d; at most %d", n, maxIdentities)
	}
	for i, s := range sans {
		exact, ok := s.GetMatcher().GetMatchPattern().(*matcherv3.StringMatcher_Exact)
		if s.GetSanType() != tlsv3.SubjectAltNameMatcher_URI || !ok || s.GetMatcher().GetIgnoreCase() || !strings.HasPrefix(exact.Exact, "spiffe://") {
			return nil, fmt.Errorf(context+"default_validation_context.match_typed_subject_alt_names[%d]: only an exact URI spiffe://... is supported", i)
		}
		out.Identities = append(out.Identities, exact.Exact)
	}
	slices.Sort(out.Identities)
	out.Identities = slices.Compact(out.Identities)
	return out, nil
}

// protocolOptions reads whether requests are sent over HTTP/2.
func protocolOptions(c *clusterv3.Cluster, out *table.Cluster) error {
	a := c.GetTypedExtensionProtocolOptions()[httpOptions]
	if a == nil {
		return nil
	}
	var o httpv3.HttpProtocolOptions
	const field = "typed_extension_protocol_options[" + httpOptions + "]"
	if !a.MessageIs(&o) {
		return fmt.Errorf(field+": it is %q", a.GetTypeUrl())
	}
	if err := proto.Unmarshal(a.GetValue(), &o); err != nil {
		return fmt.Errorf(field+": %w", err)
	}
	switch u := o.GetUpstreamProtocolOptions().(type) {
	case nil:
		return nil
	case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_:
		switch p := u.ExplicitHttpConfig.GetProtocolConfig().(type) {
		case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions:
			out.HTTP2 = true
			return nil
		case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions:
			return nil
		default:
			return fmt.Errorf(field+".explicit_http_config: %T is not supported; http_protocol_options and http2_protocol_options are", p)
		}
	default:
		return fmt.Errorf(field+": %T is not supported; explicit_http_config is", u)
	}
}

// endpointTLS reads whether the endpoint takes mutual TLS.
func endpointTLS(meta *corev3.Metadata, out *balance.Endpoint) error {
	v := meta.GetFilterMetadata()[transportSocketMatch].GetFields()[mtlsKey]
	if v == nil {
		return nil
	}
	if v.GetStringValue() != "true" {
		return fmt.Errorf("metadata.filter_metadata[%s].%s: only \"true\" is supported", transportSocketMatch, mtlsKey)
	}
	out.TLS = true
	return nil
}
