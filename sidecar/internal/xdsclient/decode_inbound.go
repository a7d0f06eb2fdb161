package xdsclient

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbachttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	rbacnetworkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/authz"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// decodeInbound reads the listener that says what a workload asks of those who
// call it. For each destination_port, and without one for all the others, these
// shapes are known, and every other one is an error, for what is not understood
// might be what keeps strangers out:
//
//	http  one chain with an HTTP connection manager
//	tcp   one chain with a TCP proxy
//	auto  a chain for application protocols of HTTP with an HTTP connection
//	      manager, and one with a TCP proxy
//
// Where a chain leads does not count: inbound connections go to the application.
func decodeInbound(b []byte) (*table.Inbound, error) {
	var l listenerv3.Listener
	if err := proto.Unmarshal(b, &l); err != nil {
		return nil, err
	}
	out := table.Inbound{MTLS: l.GetMetadata().GetFilterMetadata()[metadataKey].GetFields()["mtls"].GetStringValue(), Ports: map[uint16]table.InboundPort{}}
	switch out.MTLS {
	case bootstrap.MTLSOff, bootstrap.MTLSPermissive, bootstrap.MTLSStrict:
	default:
		return nil, fmt.Errorf("metadata.filter_metadata[%s].mtls: %q is not off, permissive or strict", metadataKey, out.MTLS)
	}
	var filters []*listenerv3.ListenerFilter
	for _, f := range l.GetListenerFilters() {
		if !f.GetTypedConfig().MessageIs((*originaldstv3.OriginalDst)(nil)) {
			filters = append(filters, f)
		}
	}
	_, httpSeen, err := inspectors(filters)
	if err != nil {
		return nil, err
	}
	ports := map[uint16]*inboundChains{}
	for i, c := range l.GetFilterChains() {
		if err := addInbound(ports, fmt.Sprintf("filter_chains[%d]", i), c, httpSeen); err != nil {
			return nil, err
		}
	}
	if c := l.GetDefaultFilterChain(); c != nil {
		const field = "default_filter_chain"
		if proto.Size(c.GetFilterChainMatch()) > 0 {
			return nil, errors.New(field + ".filter_chain_match: it is not supported there")
		}
		if err := addInbound(ports, field, c, httpSeen); err != nil {
			return nil, err
		}
	}
	for _, n := range slices.Sorted(maps.Keys(ports)) {
		p, err := ports[n].port(n)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			out.Default = p
		} else {
			out.Ports[n] = p
		}
	}
	if out.Default.Protocol == "" {
		return nil, errors.New("default_filter_chain: it is missing; ports that have no chain need one")
	}
	return &out, nil
}

// inboundChains are those of one port; 0 is every other one.
type inboundChains struct {
	detected, whole, bytes *inboundChain // of HTTP that is found out, HTTP that is declared, bytes
}

type inboundChain struct {
	http   bool
	policy *authz.Policy
}

func addInbound(ports map[uint16]*inboundChains, field string, c *listenerv3.FilterChain, httpSeen bool) error {
	m := c.GetFilterChainMatch()
	match := field + ".filter_chain_match"
	if err := onlyFields(match, m, "destination_port", "application_protocols", "transport_protocol"); err != nil {
		return err
	}
	n := m.GetDestinationPort().GetValue()
	if n > math.MaxUint16 || m.GetDestinationPort() != nil && n == 0 {
		return fmt.Errorf("%s.destination_port: %d is not 1 to 65535", match, n)
	}
	chain, err := decodeInboundChain(field, c)
	if err != nil {
		return err
	}
	p := ports[uint16(n)]
	if p == nil {
		p = &inboundChains{}
		ports[uint16(n)] = p
	}
	slot := &p.bytes
	switch {
	case len(m.GetApplicationProtocols()) > 0:
		plain := proto.CloneOf(m)
		plain.DestinationPort = nil
		if err := detects(match, plain); err != nil {
			return err
		}
		if !httpSeen {
			return fmt.Errorf("%s.application_protocols: nothing finds them out; listener_filters lacks http_inspector", match)
		}
		if !chain.http {
			return fmt.Errorf("%s.application_protocols: only an http_connection_manager is supported behind them", match)
		}
		slot = &p.detected
	case m.GetTransportProtocol() != "":
		return fmt.Errorf("%s.transport_protocol: it is supported beside application_protocols only", match)
	case chain.http:
		slot = &p.whole
	}
	if *slot != nil {
		return fmt.Errorf("%s: there is another chain for the same connections", match)
	}
	*slot = chain
	return nil
}

func (c *inboundChains) port(n uint16) (table.InboundPort, error) {
	var out table.InboundPort
	switch {
	case c.whole != nil && c.detected == nil && c.bytes == nil:
		out.Protocol, out.HTTPAuthorization = "http", c.whole.policy
	case c.whole == nil && c.detected == nil:
		out.Protocol, out.BytesAuthorization = "tcp", c.bytes.policy
	case c.whole == nil && c.bytes != nil:
		out.Protocol, out.HTTPAuthorization, out.BytesAuthorization = "auto", c.detected.policy, c.bytes.policy
	default:
		return out, fmt.Errorf("filter_chains: those of destination_port %d (0 is every other) are neither one chain nor a pair of http/1.1,h2c and the rest", n)
	}
	return out, nil
}

// decodeInboundChain reads all filters of a chain: one that is not known might be
// what keeps strangers out.
func decodeInboundChain(field string, c *listenerv3.FilterChain) (*inboundChain, error) {
	if c.GetTransportSocket() != nil {
		return nil, fmt.Errorf("%s.transport_socket: it is not supported; mutual TLS is asked for in metadata", field)
	}
	var rbac []*anypb.Any
	for i, f := range c.GetFilters() {
		at := fmt.Sprintf("%s.filters[%d]", field, i)
		a := f.GetTypedConfig()
		last := i == len(c.GetFilters())-1
		switch {
		case a.MessageIs((*rbacnetworkv3.RBAC)(nil)):
			rbac = append(rbac, a)
			continue
		case !last:
			return nil, fmt.Errorf("%s: type %q is not supported there; the RBAC filter is", at, a.GetTypeUrl())
		case a.MessageIs((*tcpproxyv3.TcpProxy)(nil)):
			p, err := decodeRBAC(rbac)
			if err != nil {
				return nil, fmt.Errorf("%s.filters: %w", field, err)
			}
			return &inboundChain{policy: p}, nil
		case a.MessageIs((*hcmv3.HttpConnectionManager)(nil)):
			if len(rbac) > 0 {
				return nil, fmt.Errorf("%s.filters: the RBAC network filter is not supported before an http_connection_manager; use its http_filters", field)
			}
			p, err := httpRBAC(at, a)
			if err != nil {
				return nil, err
			}
			return &inboundChain{http: true, policy: p}, nil
		default:
			return nil, fmt.Errorf("%s: type %q is not supported; http_connection_manager and tcp_proxy are", at, a.GetTypeUrl())
		}
	}
	return nil, fmt.Errorf("%s.filters: neither http_connection_manager nor tcp_proxy is the last", field)
}

func httpRBAC(field string, a *anypb.Any) (*authz.Policy, error) {
	var m hcmv3.HttpConnectionManager
	if err := proto.Unmarshal(a.GetValue(), &m); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	var rbac []*anypb.Any
	for i, f := range m.GetHttpFilters() {
		switch a := f.GetTypedConfig(); {
		case f.GetDisabled():
			return nil, fmt.Errorf("%s.http_filters[%d].disabled: it is not supported; leave the filter out", field, i)
		case a.MessageIs((*rbachttpv3.RBAC)(nil)):
			rbac = append(rbac, a)
		case a.MessageIs((*routerv3.Router)(nil)) && i == len(m.GetHttpFilters())-1:
		default:
			return nil, fmt.Errorf("%s.http_filters[%d]: type %q is not supported there; RBAC and, as the last, router are", field, i, a.GetTypeUrl())
		}
	}
	p, err := decodeRBAC(rbac)
	if err != nil {
		return nil, fmt.Errorf("%s.http_filters: %w", field, err)
	}
	return p, nil
}

// decodeRBAC makes a policy of the RBAC filters of a chain, in their order; none
// is no policy.
func decodeRBAC(filters []*anypb.Any) (*authz.Policy, error) { //nolint:unparam // a policy cannot be said yet
	if len(filters) > 0 {
		return nil, errors.New("RBAC is not supported")
	}
	return nil, nil // everybody may call
}
