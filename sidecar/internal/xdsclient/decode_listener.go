package xdsclient

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// listener is what a Listener resource says of a destination. These shapes are
// known, and every other one is an error:
//
//	http  one chain with an HTTP connection manager: routeName or inline
//	tcp   one chain with a TCP proxy: cluster
//	auto  a chain for application protocols of HTTP, found out by http_inspector,
//	      and a default one with a TCP proxy: routeName or inline, and cluster
//	tls   tls_inspector, chains with TCP proxies for server names, and maybe a
//	      default one: serverNames, and maybe cluster
type listener struct {
	protocol    string // as in table.Destination
	service     string // <namespace>/<service>:<port>, from stat_prefix; empty where that is something else
	routeName   string
	inline      *route.Config
	cluster     string
	serverNames []table.ServerName
}

// clusters are those that the listener itself names.
func (l *listener) clusters() []string {
	var out []string
	if l.inline != nil {
		out = refs(l.inline)
	}
	if l.cluster != "" {
		out = append(out, l.cluster)
	}
	return append(out, nameRefs(l.serverNames)...)
}

// target is where one filter chain leads: to routes, or to clusters as bytes.
type target struct {
	service   string
	routeName string
	inline    *route.Config
	clusters  []route.Weighted
}

func (t *target) http() bool { return t.routeName != "" || t.inline != nil }

// cluster is the only one of a chain of bytes.
func (t *target) cluster(field string) (string, error) {
	if len(t.clusters) != 1 {
		return "", fmt.Errorf("%s.weighted_clusters: they are supported in a chain for server names only", field)
	}
	return t.clusters[0].Cluster, nil
}

func decodeListener(b []byte) (listener, error) {
	var l listenerv3.Listener
	if err := proto.Unmarshal(b, &l); err != nil {
		return listener{}, err
	}
	if api := l.GetApiListener().GetApiListener(); api != nil {
		t, err := decodeFilter("api_listener.api_listener", api)
		if err != nil {
			return listener{}, err
		}
		return t.alone("api_listener.api_listener", false)
	}
	tlsSeen, httpSeen, err := inspectors(l.GetListenerFilters())
	if err != nil {
		return listener{}, err
	}
	// A chain without a match is the default one, wherever it stands.
	rest, at := l.GetDefaultFilterChain(), "default_filter_chain"
	if rest != nil && proto.Size(rest.GetFilterChainMatch()) > 0 {
		return listener{}, errors.New("default_filter_chain.filter_chain_match: it is not supported there")
	}
	type matched struct {
		field string
		match *listenerv3.FilterChainMatch
		target
	}
	var chains []matched
	for i, c := range l.GetFilterChains() {
		field := fmt.Sprintf("filter_chains[%d]", i)
		if proto.Size(c.GetFilterChainMatch()) == 0 {
			if rest != nil {
				return listener{}, fmt.Errorf("%s.filter_chain_match: it is empty, and so is that of %s", field, at)
			}
			rest, at = c, field
			continue
		}
		t, err := decodeChain(field, c)
		if err != nil {
			return listener{}, err
		}
		chains = append(chains, matched{field, c.GetFilterChainMatch(), t})
	}
	if rest == nil && len(chains) == 0 {
		return listener{}, errors.New("filter_chains: there is none")
	}
	var other target
	if rest != nil {
		if other, err = decodeChain(at, rest); err != nil {
			return listener{}, err
		}
	}
	if len(chains) == 0 {
		return other.alone(at, tlsSeen)
	}

	var out listener
	if rest != nil {
		if other.http() {
			return listener{}, fmt.Errorf("%s: beside chains with a match only a tcp_proxy is supported", at)
		}
		if out.cluster, err = other.cluster(at); err != nil {
			return listener{}, err
		}
	}
	for _, c := range chains {
		field := c.field + ".filter_chain_match"
		if len(c.match.GetApplicationProtocols()) > 0 {
			if err := detects(field, c.match); err != nil {
				return listener{}, err
			}
			switch {
			case !httpSeen:
				return listener{}, fmt.Errorf("%s.application_protocols: nothing finds them out; listener_filters lacks http_inspector", field)
			case len(chains) > 1:
				return listener{}, fmt.Errorf("%s.application_protocols: such a chain is supported once, beside a default chain", field)
			case !c.http():
				return listener{}, fmt.Errorf("%s.application_protocols: only an http_connection_manager is supported behind them", field)
			case rest == nil:
				return listener{}, errors.New("default_filter_chain: it is missing; what is not HTTP needs one")
			}
			out.protocol, out.service, out.routeName, out.inline = "auto", c.service, c.routeName, c.inline
			return out, nil
		}
		names, err := serverNames(field, c.match)
		if err != nil {
			return listener{}, err
		}
		switch {
		case !tlsSeen:
			return listener{}, fmt.Errorf("%s.server_names: nothing finds them out; listener_filters lacks tls_inspector", field)
		case c.http():
			return listener{}, fmt.Errorf("%s: behind server names only a tcp_proxy is supported, since TLS is not ended here", c.field)
		}
		for _, n := range names {
			if slices.ContainsFunc(out.serverNames, func(o table.ServerName) bool { return o.Name == n }) {
				return listener{}, fmt.Errorf("%s.server_names: %q is there twice", field, n)
			}
			out.service = c.service
			out.serverNames = append(out.serverNames, table.ServerName{Name: n, Clusters: c.clusters})
		}
	}
	out.protocol = "tls"
	slices.SortStableFunc(out.serverNames, byPrecedence)
	return out, nil
}

// byPrecedence puts exact names first and longer wildcards before shorter ones,
// which is how Envoy picks a chain whatever their order.
func byPrecedence(a, b table.ServerName) int {
	wildA, wildB := strings.HasPrefix(a.Name, "*"), strings.HasPrefix(b.Name, "*")
	switch {
	case wildA != wildB && wildB:
		return -1
	case wildA != wildB:
		return 1
	}
	return len(b.Name) - len(a.Name)
}

// alone is a listener with one chain for everything.
func (t *target) alone(field string, inspected bool) (listener, error) {
	if t.http() {
		return listener{protocol: "http", service: t.service, routeName: t.routeName, inline: t.inline}, nil
	}
	cluster, err := t.cluster(field)
	if err != nil {
		return listener{}, err
	}
	if inspected {
		return listener{protocol: "tls", service: t.service, cluster: cluster}, nil
	}
	return listener{protocol: "tcp", service: t.service, cluster: cluster}, nil
}

// inspectors reports which of the two listener filters that are known are there.
func inspectors(filters []*listenerv3.ListenerFilter) (tls, http bool, err error) {
	for i, f := range filters {
		switch c := f.GetTypedConfig(); {
		case c.MessageIs((*tlsinspectorv3.TlsInspector)(nil)):
			tls = true
		case c.MessageIs((*httpinspectorv3.HttpInspector)(nil)):
			http = true
		default:
			return false, false, fmt.Errorf("listener_filters[%d]: type %q is not supported; tls_inspector and http_inspector are", i, c.GetTypeUrl())
		}
	}
	return tls, http, nil
}

// detects checks a match for HTTP in the clear.
func detects(field string, m *listenerv3.FilterChainMatch) error {
	if err := onlyFields(field, m, "application_protocols", "transport_protocol"); err != nil {
		return err
	}
	if p := m.GetTransportProtocol(); p != "" && p != "raw_buffer" {
		return fmt.Errorf("%s.transport_protocol: %q is not supported beside application_protocols; raw_buffer is", field, p)
	}
	for _, p := range []string{"http/1.1", "h2c"} {
		if !slices.Contains(m.GetApplicationProtocols(), p) {
			return fmt.Errorf("%s.application_protocols: %q is missing; http/1.1 and h2c are supported together only", field, p)
		}
	}
	for _, p := range m.GetApplicationProtocols() {
		if p != "http/1.0" && p != "http/1.1" && p != "h2c" {
			return fmt.Errorf("%s.application_protocols: %q is not supported; http/1.0, http/1.1 and h2c are", field, p)
		}
	}
	return nil
}

// serverNames checks a match for TLS and returns its names.
func serverNames(field string, m *listenerv3.FilterChainMatch) ([]string, error) {
	if err := onlyFields(field, m, "server_names", "transport_protocol"); err != nil {
		return nil, err
	}
	if p := m.GetTransportProtocol(); p != "" && p != "tls" {
		return nil, fmt.Errorf("%s.transport_protocol: %q is not supported beside server_names; tls is", field, p)
	}
	if len(m.GetServerNames()) == 0 {
		return nil, fmt.Errorf("%s: server_names and application_protocols are supported, and neither is set", field)
	}
	for _, n := range m.GetServerNames() {
		suffix, _ := strings.CutPrefix(n, "*.")
		if suffix == "" || strings.Contains(suffix, "*") || n != strings.ToLower(n) {
			return nil, fmt.Errorf("%s.server_names: %q is not supported; a name in lower case is, and *. and a name", field, n)
		}
	}
	return m.GetServerNames(), nil
}

// onlyFields fails where a field of m other than these is set.
func onlyFields(field string, m *listenerv3.FilterChainMatch, names ...string) (err error) {
	if len(m.ProtoReflect().GetUnknown()) > 0 {
		return fmt.Errorf("%s: it holds fields that are not known", field)
	}
	m.ProtoReflect().Range(func(d protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(names, string(d.Name())) {
			err = fmt.Errorf("%s.%s: it is not supported; %s are", field, d.Name(), strings.Join(names, " and "))
		}
		return err == nil
	})
	return err
}

// decodeChain reads the one filter that counts.
func decodeChain(field string, c *listenerv3.FilterChain) (target, error) {
	if c.GetTransportSocket() != nil {
		return target{}, fmt.Errorf("%s.transport_socket: it is not supported", field)
	}
	for i, f := range c.GetFilters() {
		if config := f.GetTypedConfig(); config != nil {
			return decodeFilter(fmt.Sprintf("%s.filters[%d]", field, i), config)
		}
	}
	return target{}, fmt.Errorf("%s.filters: there is none", field)
}

func decodeFilter(field string, a *anypb.Any) (target, error) {
	switch {
	case a.MessageIs((*hcmv3.HttpConnectionManager)(nil)):
		var m hcmv3.HttpConnectionManager
		if err := proto.Unmarshal(a.GetValue(), &m); err != nil {
			return target{}, fmt.Errorf("%s: %w", field, err)
		}
		if rds := m.GetRds(); rds != nil {
			if rds.GetRouteConfigName() == "" {
				return target{}, fmt.Errorf("%s.rds.route_config_name: it is empty", field)
			}
			return target{service: serviceOf(m.GetStatPrefix()), routeName: rds.GetRouteConfigName()}, nil
		}
		if m.GetRouteConfig() == nil {
			return target{}, fmt.Errorf("%s.route_specifier: rds and route_config are supported, and neither is set", field)
		}
		c, err := routeConfig(m.GetRouteConfig())
		if err != nil {
			return target{}, fmt.Errorf("%s.route_config.%w", field, err)
		}
		return target{service: serviceOf(m.GetStatPrefix()), inline: c}, nil
	case a.MessageIs((*tcpproxyv3.TcpProxy)(nil)):
		var t tcpproxyv3.TcpProxy
		if err := proto.Unmarshal(a.GetValue(), &t); err != nil {
			return target{}, fmt.Errorf("%s: %w", field, err)
		}
		return tcpTarget(field, &t)
	}
	return target{}, fmt.Errorf("%s: type %q is not supported; http_connection_manager and tcp_proxy are", field, a.GetTypeUrl())
}

func tcpTarget(field string, t *tcpproxyv3.TcpProxy) (target, error) {
	out := target{service: serviceOf(t.GetStatPrefix())}
	switch s := t.GetClusterSpecifier().(type) {
	case *tcpproxyv3.TcpProxy_WeightedClusters:
		for i, w := range s.WeightedClusters.GetClusters() {
			switch {
			case w.GetName() == "":
				return target{}, fmt.Errorf("%s.weighted_clusters.clusters[%d].name: it is empty", field, i)
			case w.GetWeight() == 0:
				return target{}, fmt.Errorf("%s.weighted_clusters.clusters[%d].weight: it is 0; leave the cluster out", field, i)
			}
			out.clusters = append(out.clusters, route.Weighted{Cluster: w.GetName(), Weight: w.GetWeight()})
		}
		if len(out.clusters) == 0 {
			return target{}, fmt.Errorf("%s.weighted_clusters.clusters: there is none", field)
		}
	default:
		if t.GetCluster() == "" {
			return target{}, fmt.Errorf("%s.cluster: it is empty", field)
		}
		out.clusters = []route.Weighted{{Cluster: t.GetCluster(), Weight: 1}}
	}
	return out, nil
}

// serviceOf is a stat_prefix that names a service, <namespace>/<service>:<port>,
// and empty for any other.
func serviceOf(statPrefix string) string {
	namespace, rest, ok := strings.Cut(statPrefix, "/")
	name, port, numbered := strings.Cut(rest, ":")
	if !ok || !numbered || namespace == "" || name == "" || port == "" || len(statPrefix) > maxKey {
		return ""
	}
	return statPrefix
}
