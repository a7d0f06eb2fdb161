package xdsclient

import (
	"fmt"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// inspected is a listener with the filters that find out what its chains match.
func inspected(t *testing.T, l *listenerv3.Listener) *listenerv3.Listener {
	t.Helper()
	for _, m := range []proto.Message{&tlsinspectorv3.TlsInspector{}, &httpinspectorv3.HttpInspector{}} {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		l.ListenerFilters = append(l.ListenerFilters, &listenerv3.ListenerFilter{Name: "inspector", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: a}})
	}
	return l
}

// A destination that leads several ways is published when all of its clusters are
// there, the ones of its routes and those that the listener names.
func TestStoreFollowsEveryReference(t *testing.T) {
	auto := httpListener("a")
	auto.FilterChains[0].FilterChainMatch = &listenerv3.FilterChainMatch{ApplicationProtocols: []string{"http/1.1", "h2c"}}
	auto.DefaultFilterChain = tcpListener("bytes").GetFilterChains()[0]

	byName := tcpListener("named")
	byName.FilterChains[0].FilterChainMatch = &listenerv3.FilterChainMatch{ServerNames: []string{"*.example"}}
	byName.DefaultFilterChain = tcpListener("rest").GetFilterChains()[0]

	for _, c := range []struct {
		name     string
		listener *listenerv3.Listener
		routes   bool
		clusters []string
		want     string
	}{
		{"auto", auto, true, []string{"requests", "bytes"}, "auto to bytes, routes to [requests], names []"},
		{"tls", byName, false, []string{"named", "rest"}, "tls to rest, routes to [], names [{*.example [{Cluster:named Weight:1}]}]"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newStore(false)
			s.wanted["a"] = true
			s.reconcile()
			put := func(k kind, m proto.Message, name string) {
				t.Helper()
				raw, err := proto.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				if s.res[k][name] == nil {
					t.Fatalf("%s %s is not asked for", k, name)
				}
				if err := s.accept(k, name, "1", raw); err != nil {
					t.Fatal(err)
				}
				s.reconcile()
			}
			now := time.Unix(1000, 0)
			put(listeners, inspected(t, c.listener), listenerPrefix+"a")
			if c.routes {
				put(routes, routesTo("a", "requests"), "a")
			}
			for _, name := range c.clusters {
				if table, _ := s.build(now); table != nil {
					t.Fatalf("published before cluster %s is there: %s", name, show(table))
				}
				put(clusters, edsCluster(name, 1), name)
				put(endpoints, assignment(name, "10.0.0.1"), name)
			}
			table, _ := s.build(now)
			if table == nil || len(table.Clusters) != len(c.clusters) {
				t.Fatalf("published: %s", show(table))
			}
			d := table.Destinations["a"]
			to := []string{}
			if d.Routes != nil {
				to = refs(d.Routes)
			}
			names := []string{}
			for _, n := range d.ServerNames {
				names = append(names, fmt.Sprintf("{%s %s}", n.Name, weighted(n.Clusters)))
			}
			if got := fmt.Sprintf("%s to %s, routes to %v, names %s", d.Protocol, d.Cluster, to, names); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}
