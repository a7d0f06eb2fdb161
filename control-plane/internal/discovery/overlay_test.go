package discovery_test

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	xdsgen "github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// consumers is a mesh whose Service payments sends callers of the namespace front,
// and no others, to the version given.
func consumers(version string) *mesh.Mesh {
	m := split("payments")
	if version != "" {
		m.Services[0].Ports[0].Consumers = []mesh.Consumer{{Namespace: "front", Routes: []mesh.Route{{
			Name: "front/r/0", Backends: []mesh.Backend{{Namespace: "shop", Service: version, Port: 80, Weight: 1}},
		}}}}
	}
	return m
}

// leadsTo is the cluster of the first route of a response to one name.
func leadsTo(t *testing.T, r *discoveryv3.DeltaDiscoveryResponse) string {
	t.Helper()
	var c routev3.RouteConfiguration
	if len(r.GetResources()) != 1 {
		t.Fatalf("%d resources: %v", len(r.GetResources()), names(r))
	}
	if err := r.GetResources()[0].GetResource().UnmarshalTo(&c); err != nil {
		t.Fatal(err)
	}
	return c.GetVirtualHosts()[0].GetRoutes()[0].GetRoute().GetCluster()
}

// Callers of a namespace that has routes of its own get those under the shared
// name; what changes for them does not reach the others, and when they have
// none any more they get the shared ones at once.
func TestRoutesOfANamespace(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, consumers("payments-v1"))
	addr := start(t, s)
	front := newDelta(t, addr, workloadNode(t, "web-0.front", "front", "web"))
	shop := newDelta(t, addr, workloadNode(t, "web-0.shop", "shop", "web"))
	expect := func(c *deltaClient, want string) {
		t.Helper()
		r := c.expect(xdsgen.RouteType, key)
		if got := leadsTo(t, r); got != want {
			t.Fatalf("the route leads to %s, want %s", got, want)
		}
		c.ack(r)
	}
	applied := func(n int) {
		t.Helper()
		waitFor(t, "applied", func() bool { return s.Applied()[0].Applied == n })
	}
	front.subscribe(xdsgen.RouteType, key)
	expect(front, "shop/payments-v1:80")
	shop.subscribe(xdsgen.RouteType, key)
	expect(shop, "shop/payments:80")
	applied(2)

	publish(t, s, consumers("payments-v2"))
	applied(1)
	expect(front, "shop/payments-v2:80")
	shop.quiet(50 * time.Millisecond)
	applied(2)

	m := consumers("payments-v2")
	m.Services[0].Ports[0].Routes[0].Backends[0].Service = "payments-v1"
	publish(t, s, m)
	expect(shop, "shop/payments-v1:80")
	front.quiet(50 * time.Millisecond)
	applied(2)

	publish(t, s, consumers(""))
	expect(front, "shop/payments:80")
	expect(shop, "shop/payments:80")
	applied(2)

	publish(t, s, consumers("payments-v1"))
	expect(front, "shop/payments-v1:80")
	shop.quiet(50 * time.Millisecond)
	applied(2)
}

// With the Service the routes of a namespace go, after the grace period; until
// then nobody of it is led by the shared ones.
func TestRoutesOfANamespaceStayForTheGracePeriod(t *testing.T) {
	s := newServer(discovery.Options{Grace: 300 * time.Millisecond})
	publish(t, s, consumers("payments-v1"))
	c := newDelta(t, start(t, s), workloadNode(t, "web-0.front", "front", "web"))
	c.subscribe(xdsgen.RouteType, key)
	c.ack(c.expect(xdsgen.RouteType, key))
	publish(t, s, &mesh.Mesh{})
	c.quiet(100 * time.Millisecond)
	c.ack(c.expect(xdsgen.RouteType, "-"+key))
	waitFor(t, "applied", func() bool { return s.Applied()[0].Applied == 1 })
	// It comes back for all while the namespace's own is on its way out.
	publish(t, s, consumers("payments-v1"))
	c.ack(c.expect(xdsgen.RouteType, key))
	publish(t, s, &mesh.Mesh{})
	publish(t, s, consumers(""))
	r := c.expect(xdsgen.RouteType, key)
	if got := leadsTo(t, r); got != "shop/payments:80" {
		t.Fatalf("the route leads to %s", got)
	}
}

// An Envoy of the namespace is given the clusters of its routes, and the routes
// when it has them.
func TestRoutesOfANamespaceForEnvoy(t *testing.T) {
	s := newServer(discovery.Options{Grace: -1})
	publish(t, s, consumers("payments-v1"))
	node := envoy("web-0.front", "payments.shop:80=127.0.0.1:4001")
	node.Metadata.Fields[bootstrap.MetaNamespace] = workloadNode(t, "", "front", "").GetMetadata().GetFields()[bootstrap.MetaNamespace]
	c := newDelta(t, start(t, s), node)
	const v1, v2 = "shop/payments-v1:80", "shop/payments-v2:80"
	c.subscribe(xdsgen.ClusterType)
	c.ack(c.expect(xdsgen.ClusterType, v1))
	c.subscribe(xdsgen.EndpointType, v1)
	c.ack(c.expect(xdsgen.EndpointType, v1))
	c.subscribe(xdsgen.ListenerType)
	c.ack(c.expect(xdsgen.ListenerType, "outbound/"+key+"|127.0.0.1:4001"))
	c.subscribe(xdsgen.RouteType, key)
	c.ack(c.expect(xdsgen.RouteType, key))
	publish(t, s, consumers("payments-v2"))
	clusters := c.expect(xdsgen.ClusterType, v2, "-"+v1)
	c.quiet(50 * time.Millisecond)
	c.ack(clusters)
	c.subscribe(xdsgen.EndpointType, v2)
	endpoints := c.expect(xdsgen.EndpointType, v2)
	c.quiet(50 * time.Millisecond)
	c.ack(endpoints)
	r := c.expect(xdsgen.RouteType, key)
	if got := leadsTo(t, r); got != v2 {
		t.Fatalf("the route leads to %s", got)
	}
	c.ack(r)
	waitFor(t, "applied", func() bool { return s.Applied()[1].Applied == 1 })
}

// State of the world, as gRPC asks.
func TestRoutesOfANamespaceForGRPC(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, consumers("payments-v1"))
	addr := start(t, s)
	for ns, want := range map[string]string{"front": "shop/payments-v1:80", "shop": "shop/payments:80"} {
		stream, err := dial(t, addr).StreamAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		node := workloadNode(t, "job-0."+ns, ns, "job")
		node.UserAgentName = "gRPC Go"
		if err := stream.Send(&discoveryv3.DiscoveryRequest{Node: node, TypeUrl: xdsgen.RouteType, ResourceNames: []string{key}}); err != nil {
			t.Fatal(err)
		}
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var c routev3.RouteConfiguration
		if err := r.GetResources()[0].UnmarshalTo(&c); err != nil {
			t.Fatal(err)
		}
		if got := c.GetVirtualHosts()[0].GetRoutes()[0].GetRoute().GetCluster(); got != want {
			t.Errorf("%s: the route leads to %s, want %s", ns, got, want)
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
	}
}

func pods() *mesh.Mesh {
	return &mesh.Mesh{Instances: []mesh.Instance{
		{Namespace: "shop", Name: "orders-0", ServiceAccount: "orders", MTLS: mesh.Strict},
		{Namespace: "shop", Name: "payments-0", ServiceAccount: "pay", MTLS: mesh.Strict},
	}}
}

// What a pod asks of those who call it is told to its own proxy, and to nobody
// else.
func TestInboundListenerIsForItsPodAlone(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := discovery.New(discovery.Options{Log: slog.New(slog.DiscardHandler), Registry: reg})
	publish(t, s, &mesh.Mesh{})
	addr := start(t, s)
	c := newDelta(t, addr, workloadNode(t, "payments-0.shop", "shop", "pay"))
	const own = "inbound/shop/payments-0"
	c.subscribe(xdsgen.ListenerType, own)
	c.ack(c.expect(xdsgen.ListenerType, "-"+own))
	publish(t, s, pods())
	c.ack(c.expect(xdsgen.ListenerType, own))
	if n := counted(t, reg, "outrigger_xds_foreign_listeners_total"); n != 0 {
		t.Errorf("%v foreign listeners are counted", n)
	}
	c.subscribe(xdsgen.ListenerType, "inbound/shop/orders-0")
	c.ack(c.expect(xdsgen.ListenerType, "-inbound/shop/orders-0"))
	waitFor(t, "applied", func() bool { return s.Applied()[0].Applied == 1 })
	// It is not told of changes of others either.
	m := pods()
	m.Instances[0].MTLS = mesh.Off
	publish(t, s, m)
	c.quiet(50 * time.Millisecond)
	m = pods()
	m.Instances[1].MTLS = mesh.Off
	publish(t, s, m)
	c.ack(c.expect(xdsgen.ListenerType, own))
	publish(t, s, &mesh.Mesh{})
	c.ack(c.expect(xdsgen.ListenerType, "-"+own))

	publish(t, s, pods())
	for i, node := range []*corev3.Node{
		workloadNode(t, "payments-0.shop", "shop", "orders"), // it has proved that it is another's
		workloadNode(t, "payments-0.bank", "bank", "pay"),
		workloadNode(t, "payments-0.shop", "bank", "pay"),
		{Id: ".shop"},
		{Id: "payments-0"},
	} {
		other := newDelta(t, addr, node)
		other.subscribe(xdsgen.ListenerType, own)
		other.ack(other.expect(xdsgen.ListenerType, "-"+own))
		if n := counted(t, reg, "outrigger_xds_foreign_listeners_total"); n != float64(i+2) {
			t.Errorf("%s: %v foreign listeners are counted, want %d", node.GetId(), n, i+2)
		}
	}
}

// A stream is of one data plane: what was checked of its first node would
// otherwise not hold for the next.
func TestNodeOfAStreamDoesNotChange(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, pods())
	addr := start(t, s)
	first := func() *corev3.Node { return workloadNode(t, "payments-0.shop", "shop", "pay") }
	c := newDelta(t, addr, first())
	c.subscribe(xdsgen.ListenerType, "inbound/shop/payments-0")
	r := c.expect(xdsgen.ListenerType, "inbound/shop/payments-0")
	c.node = first()
	c.ack(r)
	c.quiet(50 * time.Millisecond)
	for _, next := range []*corev3.Node{
		workloadNode(t, "orders-0.shop", "shop", "pay"), workloadNode(t, "payments-0.shop", "shop", "orders"), workloadNode(t, "payments-0.shop", "bank", "pay"),
		{Id: "payments-0.shop"},
	} {
		c := newDelta(t, addr, first())
		c.subscribe(xdsgen.ListenerType, "inbound/shop/payments-0")
		c.expect(xdsgen.ListenerType, "inbound/shop/payments-0")
		c.node = next
		c.subscribe(xdsgen.ListenerType, "inbound/shop/orders-0")
		select {
		case err := <-c.ended:
			if grpcstatus.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "a stream is of one data plane") {
				t.Errorf("%v: %v", next, err)
			}
		case r := <-c.got:
			t.Errorf("%v is answered %v", next, names(r))
		case <-time.After(time.Second):
			t.Errorf("%v: the stream goes on", next)
		}
	}
	if got := s.Status(); slices.ContainsFunc(got, func(n discovery.NodeStatus) bool { return n.ID != "payments-0.shop" }) {
		t.Errorf("status: %+v", got)
	}
}

// An Envoy that captures gets the listeners of every Service, and that of its own
// pod once there is one; it cannot say that it is another's.
func TestEnvoyThatCaptures(t *testing.T) {
	node := func(id, instance, account string) *corev3.Node {
		n := workloadNode(t, id, "shop", account)
		n.UserAgentName = "envoy"
		more, err := structpb.NewStruct(map[string]any{
			bootstrap.MetaInstance: instance, bootstrap.MetaSDS: "true", bootstrap.MetaCapture: "true", bootstrap.MetaAddresses: []any{"10.1.0.1"},
		})
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(n.Metadata.Fields, more.GetFields())
		return n
	}
	const vip, out, in = "outbound/" + key + "|10.0.0.1:80", "outbound/0.0.0.0:15001", "inbound/0.0.0.0:15006"
	s := newServer(discovery.Options{})
	m := shop("127.0.0.1:9")
	publish(t, s, m)
	addr := start(t, s)
	open := func(n *corev3.Node, want ...string) *deltaClient {
		t.Helper()
		c := newDelta(t, addr, n)
		c.subscribe(xdsgen.ClusterType)
		c.ack(c.expect(xdsgen.ClusterType, "inbound", "passthrough", key))
		c.subscribe(xdsgen.EndpointType, key)
		c.ack(c.expect(xdsgen.EndpointType, key))
		c.subscribe(xdsgen.ListenerType)
		c.ack(c.expect(xdsgen.ListenerType, want...))
		return c
	}
	c := open(node("payments-0.shop", "payments-0", "pay"), out, vip)
	with := *m
	with.Instances = pods().Instances
	publish(t, s, &with)
	c.ack(c.expect(xdsgen.ListenerType, in))
	waitFor(t, "applied", func() bool { return s.Applied()[1].Applied == 1 })
	with.Instances = pods().Instances
	with.Instances[0].MTLS = mesh.Off // another's
	publish(t, s, &with)
	c.quiet(50 * time.Millisecond)
	with.Instances = pods().Instances
	with.Instances[1].MTLS = mesh.Off
	publish(t, s, &with)
	c.ack(c.expect(xdsgen.ListenerType, in))

	open(node("orders-0.shop", "orders-0", "pay"), out, vip)
	refused := newDelta(t, addr, node("payments-0.shop", "orders-0", "orders"))
	refused.subscribe(xdsgen.ListenerType)
	select {
	case err := <-refused.ended:
		if grpcstatus.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "its id must be <instance>.<namespace>") {
			t.Error(err)
		}
	case r := <-refused.got:
		t.Errorf("it is answered %v", names(r))
	case <-time.After(time.Second):
		t.Error("the stream goes on")
	}
}
