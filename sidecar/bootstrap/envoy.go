package bootstrap

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"
)

// Envoy writes the bootstrap of a real Envoy that is driven by the same
// control plane: delta ADS over gRPC, the node of this Config, and the admin
// interface on adminAddress, which should be a loopback address.
func (c Config) Envoy(adminAddress string) ([]byte, error) {
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
		"static_resources": m{"clusters": []m{{
			"name": "outrigger-control-plane", "type": "STRICT_DNS", "connect_timeout": "1s",
			"typed_extension_protocol_options": m{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": m{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": m{"http2_protocol_options": m{"connection_keepalive": m{"interval": "30s", "timeout": "5s"}}},
			}},
			"load_assignment": m{"cluster_name": "outrigger-control-plane", "endpoints": []m{{
				"lb_endpoints": []m{{"endpoint": m{"address": xds}}},
			}}},
		}}},
	}, "", "  ")
}
