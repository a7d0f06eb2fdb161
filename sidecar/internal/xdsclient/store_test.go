package xdsclient

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

func httpListener(key string) *listenerv3.Listener {
	return filterListener(key, &hcmv3.HttpConnectionManager{RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: key}}})
}

func tcpListener(key string) *listenerv3.Listener {
	return filterListener(key, &tcpproxyv3.TcpProxy{ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: key}})
}

func filterListener(key string, filter proto.Message) *listenerv3.Listener {
	a, err := anypb.New(filter)
	if err != nil {
		panic(err)
	}
	return &listenerv3.Listener{Name: listenerPrefix + key, FilterChains: []*listenerv3.FilterChain{{
		Filters: []*listenerv3.Filter{{Name: "only", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: a}}},
	}}}
}

func routesTo(key string, to ...string) *routev3.RouteConfiguration {
	vh := &routev3.VirtualHost{Name: key, Domains: []string{"*"}}
	for _, c := range to {
		vh.Routes = append(vh.Routes, &routev3.Route{
			Name:   "to " + c,
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: c}}},
		})
	}
	return &routev3.RouteConfiguration{Name: key, VirtualHosts: []*routev3.VirtualHost{vh}}
}

func edsCluster(name string, maxRequests uint32) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name: name, ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		CircuitBreakers: &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{MaxRequests: wrapperspb.UInt32(maxRequests)}}},
	}
}

func assignment(name string, addresses ...string) *endpointv3.ClusterLoadAssignment {
	l := &endpointv3.LocalityLbEndpoints{}
	for _, a := range addresses {
		l.LbEndpoints = append(l.LbEndpoints, &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
				Address: a, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 80},
			}}},
		}}})
	}
	return &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{l}}
}

// show writes a table on one line: destinations, then clusters.
func show(t *table.Table) string {
	if t == nil {
		return "no change"
	}
	var out []string
	for _, key := range slices.Sorted(maps.Keys(t.Destinations)) {
		switch d := t.Destinations[key]; {
		case d.Missing:
			out = append(out, key+" missing")
		case d.Routes != nil:
			out = append(out, fmt.Sprintf("%s %s->%v", key, d.Protocol, refs(d.Routes)))
		default:
			out = append(out, fmt.Sprintf("%s %s->%s", key, d.Protocol, d.Cluster))
		}
	}
	out = append(out, "|")
	for _, name := range slices.Sorted(maps.Keys(t.Clusters)) {
		var eps []string
		for _, e := range t.Clusters[name].Endpoints {
			eps = append(eps, e.Address.Addr().String())
		}
		out = append(out, fmt.Sprintf("%s=%v", name, eps))
	}
	return strings.Join(out, " ")
}

// TestStore tells what is published when resources arrive in one order or
// another.
func TestStore(t *testing.T) {
	start := time.Unix(1000, 0)
	type scene struct {
		s   *store
		now time.Time
	}
	setup := func() *scene {
		s := &scene{newStore(false), start}
		s.s.wanted["a"] = true
		s.s.reconcile()
		return s
	}
	version := 0
	put := func(s *scene, m proto.Message, name string) {
		t.Helper()
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		k, _ := kindOf(a.GetTypeUrl())
		version++
		if err := s.s.accept(k, name, fmt.Sprint(version), raw); err != nil {
			t.Fatal(err)
		}
	}
	step := func(s *scene, want string) {
		t.Helper()
		s.s.reconcile()
		got, _ := s.s.build(s.now)
		s.s.reconcile()
		if g := show(got); g != want {
			t.Errorf("table: %s\nwant:  %s", g, want)
		}
	}
	chain := func(s *scene, key string, addresses ...string) {
		put(s, httpListener(key), listenerPrefix+key)
		s.s.reconcile()
		put(s, routesTo(key, key), key)
		s.s.reconcile()
		put(s, edsCluster(key, 1), key)
		s.s.reconcile()
		put(s, assignment(key, addresses...), key)
	}

	t.Run("a destination is published once its endpoints are known", func(t *testing.T) {
		s := setup()
		step(s, "no change")
		put(s, httpListener("a"), "outbound/a")
		step(s, "no change")
		put(s, routesTo("a", "a"), "a")
		step(s, "no change")
		put(s, edsCluster("a", 1), "a")
		step(s, "no change")
		put(s, assignment("a", "10.0.0.1"), "a")
		step(s, "a http->[a] | a=[10.0.0.1]")
		step(s, "no change")
	})
	t.Run("a destination whose endpoints do not come is published without them after two seconds", func(t *testing.T) {
		s := setup()
		put(s, tcpListener("a"), "outbound/a")
		s.s.reconcile()
		put(s, edsCluster("a", 1), "a")
		step(s, "no change")
		s.now = start.Add(patience - 1)
		step(s, "no change")
		if _, next := s.s.build(s.now); !next.Equal(start.Add(patience)) {
			t.Errorf("build wants to be called at %v; want %v", next, start.Add(patience))
		}
		s.now = start.Add(patience)
		step(s, "a tcp->a | a=[]")
		put(s, assignment("a", "10.0.0.1"), "a")
		step(s, "a tcp->a | a=[10.0.0.1]")
	})
	t.Run("new routes wait for the new cluster, and the old cluster stays until then", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		put(s, routesTo("a", "b"), "a")
		step(s, "no change")
		s.s.remove(clusters, "a") // too early
		put(s, edsCluster("b", 1), "b")
		step(s, "no change")
		put(s, assignment("b", "10.0.0.2"), "b")
		step(s, "a http->[b] | b=[10.0.0.2]")
		if len(s.s.res[clusters]) != 1 {
			t.Errorf("still subscribed to %v", slices.Sorted(maps.Keys(s.s.res[clusters])))
		}
	})
	t.Run("a backend that does not exist is not waited for", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		put(s, routesTo("a", "a", "gone"), "a")
		step(s, "no change")
		s.s.remove(clusters, "gone")
		step(s, "a http->[a gone] | a=[10.0.0.1]")
	})
	t.Run("a cluster that vanishes while routes lead to it is missed after two seconds", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		s.s.remove(clusters, "a")
		step(s, "no change")
		s.now = start.Add(patience)
		step(s, "a http->[a] |")
	})
	t.Run("endpoints that vanish with their cluster change nothing for two seconds, an empty list does at once", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		s.s.remove(endpoints, "a")
		step(s, "no change")
		put(s, assignment("a"), "a")
		step(s, "a http->[a] | a=[]")
	})
	t.Run("a listener that is removed makes the destination missing at once", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		s.s.remove(listeners, "outbound/a")
		step(s, "a missing |")
		if n := len(s.s.res[routes]) + len(s.s.res[clusters]) + len(s.s.res[endpoints]); n != 0 {
			t.Errorf("%d resources are still subscribed to", n)
		}
		chain(s, "a", "10.0.0.2")
		step(s, "a http->[a] | a=[10.0.0.2]")
	})
	t.Run("a version that cannot be decoded leaves the one before in force", func(t *testing.T) {
		s := setup()
		chain(s, "a", "10.0.0.1")
		step(s, "a http->[a] | a=[10.0.0.1]")
		raw, err := proto.Marshal(edsCluster("a", 0))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.s.accept(clusters, "a", "bad", raw); err == nil {
			t.Error("a cluster with max_requests 0 was accepted")
		}
		step(s, "no change")
		if v := s.s.versions(clusters)["a"]; v == "bad" {
			t.Error("the rejected version is claimed")
		}
	})
	t.Run("a change of one destination leaves what is published of another one as it is", func(t *testing.T) {
		s := setup()
		s.s.wanted["b"] = true
		s.s.reconcile()
		chain(s, "a", "10.0.0.1")
		chain(s, "b", "10.0.0.2")
		s.s.reconcile()
		before, _ := s.s.build(s.now)
		put(s, assignment("b", "10.0.0.3"), "b")
		after, _ := s.s.build(s.now)
		if before.Destinations["b"] != after.Destinations["b"] || before.Clusters["a"] != after.Clusters["a"] || before.Clusters["b"] == after.Clusters["b"] {
			t.Error("only cluster b should be new")
		}
		if before.Version == after.Version {
			t.Error("the version is the same")
		}
	})
}
