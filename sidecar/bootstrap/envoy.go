package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Envoy writes the bootstrap of a real Envoy that is driven by the same
// control plane: delta ADS over gRPC, the node of this Config, and the admin
// interface on adminAddress, which must be a loopback address. With SDS there
// is a static cluster for it, and with ControlPlaneTLS the ADS stream proves the
// workload by its certificate and wants the control plane to prove itself.
//
// An Envoy with Capture needs SDS and Addresses. Its listeners, at PortOutbound
// and PortInbound, come from the control plane; it answers no probes and has no
// metrics port: those are of the sidecar that serves its certificate.
func (c Config) Envoy(adminAddress string) ([]byte, error) {
	if host, _, err := net.SplitHostPort(adminAddress); err == nil && !loopback(host) {
		return nil, fmt.Errorf("address %q for the admin interface is not on loopback, and it lets everybody who reaches it end the proxy: write 127.0.0.1:%d", adminAddress, PortAdmin)
	}
	if c.Capture {
		if c.SDS == "" {
			return nil, errors.New("an Envoy that captures the traffic of its pod takes mutual TLS with a certificate from SDS: set SDS too")
		}
		if len(c.Addresses) == 0 {
			return nil, errors.New("an Envoy that captures the traffic of its pod serves what was sent to the pod's addresses: set Addresses too")
		}
	}
	type m = map[string]any
	socket := func(hostport string) (m, error) {
		host, port, err := net.SplitHostPort(hostport)
		if err != nil {
			return nil, fmt.Errorf("address %q is not host:port: %w", hostport, err)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("address %q: port is not a number: %w", hostport, err)
		}
		return m{"socket_address": m{"address": host, "port_value": n}}, nil
	}
	admin, err := socket(adminAddress)
	if err != nil {
		return nil, err
	}
	xds, err := socket(c.ControlPlane)
	if err != nil {
		return nil, err
	}
	http2 := m{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": m{
		"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
		"explicit_http_config": m{"http2_protocol_options": m{"connection_keepalive": m{"interval": "30s", "timeout": "5s"}}},
	}}
	controlPlane := m{
		"name": "outrigger-control-plane", "type": "STRICT_DNS", "connect_timeout": "1s",
		"typed_extension_protocol_options": http2,
		"load_assignment": m{"cluster_name": "outrigger-control-plane", "endpoints": []m{{
			"lb_endpoints": []m{{"endpoint": m{"address": xds}}},
		}}},
	}
	clusters := []m{controlPlane}
	if c.SDS != "" {
		address := m{}
		if path, ok := strings.CutPrefix(c.SDS, "unix://"); ok {
			address["pipe"] = m{"path": path}
		} else if address, err = socket(c.SDS); err != nil {
			return nil, err
		}
		clusters = append(clusters, m{
			"name": ClusterSDS, "type": "STATIC", "connect_timeout": "1s", "typed_extension_protocol_options": http2,
			"load_assignment": m{"cluster_name": ClusterSDS, "endpoints": []m{{
				"lb_endpoints": []m{{"endpoint": m{"address": address}}},
			}}},
		})
	}
	if c.ControlPlaneTLS {
		if c.SDS == "" {
			return nil, errors.New("an Envoy reaches the control plane over TLS with a certificate from SDS: set SDS too")
		}
		secret := func(name string) m {
			return m{"name": name, "sds_config": m{"resource_api_version": "V3", "api_config_source": m{
				"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": []m{{"envoy_grpc": m{"cluster_name": ClusterSDS}}},
			}}}
		}
		controlPlane["transport_socket"] = m{"name": "envoy.transport_sockets.tls", "typed_config": m{
			"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
			"common_tls_context": m{
				"tls_params":                         m{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
				"alpn_protocols":                     []string{"h2"},
				"tls_certificate_sds_secret_configs": []m{secret(SecretCertificate)},
				"combined_validation_context": m{
					"default_validation_context": m{"match_typed_subject_alt_names": []m{{
						"san_type": "URI", "matcher": m{"exact": "spiffe://" + c.TrustDomain + "/ns/outrigger-system/sa/control-plane"},
					}}},
					"validation_context_sds_secret_config": secret(SecretRoots),
				},
			},
		}}
	}
	ads := m{"resource_api_version": "V3", "ads": m{}}
	return json.MarshalIndent(m{
		"node":  m{"id": c.NodeID(), "cluster": c.Workload + "." + c.Namespace, "metadata": c.Metadata()},
		"admin": m{"address": admin},
		"dynamic_resources": m{
			"lds_config": ads, "cds_config": ads,
			"ads_config": m{
				"api_type": "DELTA_GRPC", "transport_api_version": "V3",
				"grpc_services": []m{{"envoy_grpc": m{"cluster_name": "outrigger-control-plane"}}},
			},
		},
		"static_resources": m{"clusters": clusters},
	}, "", "  ")
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
