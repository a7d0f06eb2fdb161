package xdsclient

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const callers = inboundPrefix + "shop/front-0"

// inboundListener asks for mtls of those who call, whatever the port.
func inboundListener(mtls string) *listenerv3.Listener {
	l := filterListener("x", &tcpproxyv3.TcpProxy{ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: "inbound"}})
	l.Name = callers
	l.Metadata = &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{
		metadataKey: {Fields: map[string]*structpb.Value{"mtls": structpb.NewStringValue(mtls)}},
	}}
	return l
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestNobodyIsServedBeforeTheInboundListenerIsKnown(t *testing.T) {
	s := newStore(false)
	s.inbound = callers
	subscribe, _ := s.reconcile()
	if diff := cmp.Diff([]string{callers}, subscribe[listeners]); diff != "" {
		t.Fatal(diff)
	}
	now := time.Unix(1000, 0)
	s.wanted["10.96.0.1:80"] = true // whoever calls it waits for it, not all the others
	if s.allAnswered() {
		t.Error("it is ready before the listener has come")
	}
	step := func(what, want string, news bool) {
		t.Helper()
		tab, _ := s.build(now)
		if tab == nil == news {
			t.Fatalf("%s: table %v; want news: %t", what, tab, news)
		}
		got := ""
		if tab != nil && tab.Inbound != nil {
			got = tab.Inbound.MTLS
		}
		if got != want {
			t.Errorf("%s: mtls %q, want %q", what, got, want)
		}
	}
	step("nothing came", "", false)
	if err := s.accept(listeners, callers, "1", marshal(t, inboundListener("maybe"))); err == nil {
		t.Fatal("a mode that does not exist was accepted")
	}
	step("a first one that is wrong", "", false)
	if !s.allAnswered() {
		t.Error("a version that was refused is an answer: main looks at the Table")
	}
	if err := s.accept(listeners, callers, "2", marshal(t, inboundListener("permissive"))); err != nil {
		t.Fatal(err)
	}
	step("permissive", "permissive", true)
	if err := s.accept(listeners, callers, "3", marshal(t, inboundListener("nonsense"))); err == nil {
		t.Fatal("a mode that does not exist was accepted")
	}
	step("one that is wrong", "", false) // the one before stays in force
	if err := s.accept(listeners, callers, "4", marshal(t, inboundListener("strict"))); err != nil {
		t.Fatal(err)
	}
	step("strict", "strict", true)
	s.remove(listeners, callers)
	step("removed", "", true)
}

func TestTheServiceOfACapturedAddressIsToldByTheListener(t *testing.T) {
	s := newStore(false)
	s.wanted["10.96.0.1:80"] = true
	s.reconcile()
	l := filterListener("10.96.0.1:80", &hcmv3.HttpConnectionManager{
		StatPrefix: "shop/payments:80", RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: "shop/payments:80"}},
	})
	if err := s.accept(listeners, "outbound/10.96.0.1:80", "1", marshal(t, l)); err != nil {
		t.Fatal(err)
	}
	s.reconcile()
	if err := s.accept(routes, "shop/payments:80", "1", marshal(t, routesTo("shop/payments:80"))); err != nil {
		t.Fatal(err)
	}
	tab, _ := s.build(time.Unix(1000, 0))
	if d := tab.Destinations["10.96.0.1:80"]; d == nil || d.Key != "10.96.0.1:80" || d.Service != "shop/payments:80" {
		t.Errorf("destination = %+v", d)
	}
	for in, want := range map[string]string{"shop/x:80": "shop/x:80", "": "", "inbound": "", "/x:80": "", "shop/:80": "", "shop/x": "", "shop/x:": ""} {
		if got := serviceOf(in); got != want {
			t.Errorf("serviceOf(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestForgetUnsubscribes(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("10.96.0.1:80", "10.0.0.1")
	s := startSidecar(t, cp.address, "")
	if err := s.Want("10.96.0.1:80"); err != nil {
		t.Fatal(err)
	}
	s.has("10.96.0.1:80 http->[10.96.0.1:80] | 10.96.0.1:80=[10.0.0.1]")
	changed := s.table.Changed()
	s.Forget("10.96.0.1:80", "10.96.0.9:80")
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		t.Fatal("no new table")
	}
	s.has(show(&table.Table{}))
	for _, name := range []string{"outbound/10.96.0.1:80", "10.96.0.1:80"} {
		cp.find("that gives up "+name, func(r *discoveryv3.DeltaDiscoveryRequest) bool {
			return slices.Contains(r.GetResourceNamesUnsubscribe(), name)
		})
	}
	if st := s.Status(); len(st.Wanted)+len(st.Resources) != 0 {
		t.Errorf("it still wants %v and has %v", st.Wanted, st.Resources)
	}
	if err := s.Want("10.96.0.1:80"); err != nil { // and it can be wanted again
		t.Fatal(err)
	}
	s.has("10.96.0.1:80 http->[10.96.0.1:80] | 10.96.0.1:80=[10.0.0.1]")
}

// A sidecar that starts again without the control plane knows what was captured
// before, and what to ask of those who call.
func TestCapturedDestinationsAreRestored(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("10.96.0.1:80", "10.0.0.1")
	cp.service("shop/payments:80", "10.0.0.2")
	cp.put(listeners, callers, inboundListener("strict"))
	cp.absent["outbound/192.0.2.1:443"] = true
	file := filepath.Join(t.TempDir(), "x.xds")
	node := bootstrap.Config{Namespace: "shop", Workload: "front", Instance: "front-0", ServiceAccount: "front", ControlPlane: cp.address, Capture: true}
	run := func(want func(*Client, *table.Current)) {
		t.Helper()
		var current table.Current
		c := New(Options{Address: cp.address, StateFile: file, Table: &current, Node: node, Log: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		restored := c.Restore()
		if err := c.Want(restored...); err != nil {
			t.Fatal(err)
		}
		go func() { done <- c.Run(ctx) }()
		want(c, &current)
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	run(func(c *Client, current *table.Current) {
		if err := c.Want("10.96.0.1:80", "shop/payments:80", "192.0.2.1:443"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "everything", func() bool {
			tab := current.Load()
			return len(tab.Destinations) == 3 && tab.Inbound != nil && len(tab.Clusters) == 2
		})
	})
	if _, err := os.Stat(file); err != nil {
		t.Fatal(err)
	}
	cp.stop()
	run(func(c *Client, current *table.Current) {
		if diff := cmp.Diff([]string{"10.96.0.1:80"}, c.Status().Wanted); diff != "" {
			t.Errorf("restored: %s", diff)
		}
		eventually(t, "what the file says", func() bool {
			tab := current.Load()
			d := tab.Destinations["10.96.0.1:80"]
			return d != nil && fmt.Sprint(tab.Clusters[d.Key].Endpoints[0].Address) == "10.0.0.1:80" && tab.Inbound != nil && tab.Inbound.MTLS == "strict"
		})
		// What is not restored by itself is there once it is wanted.
		if err := c.Want("192.0.2.1:443"); err != nil {
			t.Fatal(err)
		}
		eventually(t, "an address outside the mesh", func() bool {
			d := current.Load().Destinations["192.0.2.1:443"]
			return d != nil && d.Missing
		})
	})
}
