package xds

import (
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// loadAssignment groups the endpoints by zone, zones in order. Each locality
// weighs what it has ready, because gRPC ignores a locality without a weight.
// An address is listed once, because gRPC refuses duplicates.
func loadAssignment(key string, eps []mesh.Endpoint, dp DataPlane) *endpointv3.ClusterLoadAssignment {
	cla := &endpointv3.ClusterLoadAssignment{ClusterName: key}
	byZone := map[string]*endpointv3.LocalityLbEndpoints{}
	var zones []string
	seen := make(map[netip.AddrPort]bool, len(eps))
	for _, e := range eps {
		if seen[e.Address] {
			continue
		}
		seen[e.Address] = true
		l := byZone[e.Zone]
		if l == nil {
			l = &endpointv3.LocalityLbEndpoints{
				Locality: &corev3.Locality{Zone: e.Zone}, LoadBalancingWeight: wrapperspb.UInt32(0),
			}
			byZone[e.Zone] = l
			zones = append(zones, e.Zone)
		}
		health := corev3.HealthStatus_UNHEALTHY
		if e.Ready {
			health = corev3.HealthStatus_HEALTHY
			l.LoadBalancingWeight.Value++
		}
		lb := &endpointv3.LbEndpoint{
			HealthStatus:   health,
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: socketAddress(e.Address)}},
		}
		if dp != GRPC {
			lb.Metadata = endpointMetadata(e)
		}
		l.LbEndpoints = append(l.LbEndpoints, lb)
	}
	slices.Sort(zones)
	for _, z := range zones {
		l := byZone[z]
		l.LoadBalancingWeight.Value = max(l.LoadBalancingWeight.Value, 1)
		cla.Endpoints = append(cla.Endpoints, l)
	}
	return cla
}

func endpointMetadata(e mesh.Endpoint) *corev3.Metadata {
	fields := map[string]*structpb.Value{}
	for name, v := range map[string]string{"instance": e.Instance, "workload": e.Workload, "serviceAccount": e.ServiceAccount} {
		if v != "" {
			fields[name] = structpb.NewStringValue(v)
		}
	}
	m := map[string]*structpb.Struct{}
	if len(fields) > 0 {
		m[MetadataKey] = &structpb.Struct{Fields: fields}
	}
	if e.MTLS {
		m[transportSocketMatch] = mtlsMatch()
	}
	if len(m) == 0 {
		return nil
	}
	return &corev3.Metadata{FilterMetadata: m}
}

func socketAddress(a netip.AddrPort) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       a.Addr().String(),
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())},
	}}}
}
