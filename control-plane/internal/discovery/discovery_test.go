package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	xdsgen "github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

func TestMain(m *testing.M) {
	// The xDS client of grpc-go keeps what it shares between channels.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("google.golang.org/grpc/internal/grpcsync.(*CallbackSerializer).run"))
}

// shop is a mesh of one Service, payments, at the given endpoints.
func shop(endpoints ...string) *mesh.Mesh {
	var eps []mesh.Endpoint
	for _, e := range endpoints {
		eps = append(eps, mesh.Endpoint{Address: netip.MustParseAddrPort(e), Instance: "payments-0", Zone: "a", Ready: true})
	}
	return &mesh.Mesh{TrustDomain: "cluster.local", Services: []mesh.Service{{
		Namespace: "shop", Name: "payments", VIPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Ports: []mesh.Port{{
			Name: "grpc", Number: 80, Protocol: mesh.GRPC, Endpoints: eps,
			Routes: []mesh.Route{{Name: "default", Backends: []mesh.Backend{{Namespace: "shop", Service: "payments", Port: 80, Weight: 1}}}},
			Budget: mesh.RetryBudget{Percent: 20, MinConcurrency: 3},
		}},
	}}}
}

// start serves until the test ends and returns the address.
func start(t *testing.T, s *discovery.Server) string {
	t.Helper()
	addr, stop := startStop(t, s)
	t.Cleanup(stop)
	return addr
}

func startStop(t *testing.T, s *discovery.Server) (string, func()) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, lis) }()
	return lis.Addr().String(), func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
}

func newServer(o discovery.Options) *discovery.Server {
	o.Log = slog.New(slog.DiscardHandler)
	o.Registry = prometheus.NewRegistry()
	return discovery.New(o)
}

func publish(t *testing.T, s *discovery.Server, m *mesh.Mesh) {
	t.Helper()
	if err := s.Publish(m); err != nil {
		t.Fatal(err)
	}
}

func dial(t *testing.T, addr string) discoveryv3.AggregatedDiscoveryServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
}

// deltaClient is a data plane that speaks delta ADS by hand.
type deltaClient struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]
	node   *corev3.Node
	got    chan *discoveryv3.DeltaDiscoveryResponse
	ended  chan error
}

func newDelta(t *testing.T, addr string, node *corev3.Node) *deltaClient {
	t.Helper()
	stream, err := dial(t, addr).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &deltaClient{t: t, stream: stream, node: node, got: make(chan *discoveryv3.DeltaDiscoveryResponse, 64), ended: make(chan error, 1)}
	go func() {
		for {
			r, err := stream.Recv()
			if err != nil {
				c.ended <- err
				return
			}
			c.got <- r
		}
	}()
	return c
}

func (c *deltaClient) send(r *discoveryv3.DeltaDiscoveryRequest) {
	c.t.Helper()
	r.Node, c.node = c.node, nil // the first request only
	if err := c.stream.Send(r); err != nil {
		c.t.Fatal(err)
	}
}

func (c *deltaClient) subscribe(typeURL string, names ...string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
}

func (c *deltaClient) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

// next waits for a response; a name that does not exist must not take longer
// than a second.
func (c *deltaClient) next() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case r := <-c.got:
		return r
	case err := <-c.ended:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(time.Second):
		c.t.Fatal("no response within a second")
	}
	return nil
}

func (c *deltaClient) quiet(d time.Duration) {
	c.t.Helper()
	select {
	case r := <-c.got:
		c.t.Fatalf("unexpected response of %s: %v", r.GetTypeUrl(), names(r))
	case <-time.After(d):
	}
}

func names(r *discoveryv3.DeltaDiscoveryResponse) []string {
	var out []string
	for _, res := range r.GetResources() {
		out = append(out, res.GetName())
	}
	for _, n := range r.GetRemovedResources() {
		out = append(out, "-"+n)
	}
	return out
}

func sidecar(id string) *corev3.Node {
	return &corev3.Node{Id: id, UserAgentName: bootstrap.UserAgent}
}

const key = "shop/payments:80"

func TestDeltaByName(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, shop("127.0.0.1:9"))
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	for typeURL, name := range map[string]string{
		xdsgen.ListenerType: "outbound/" + key, xdsgen.RouteType: key, xdsgen.ClusterType: key, xdsgen.EndpointType: key,
	} {
		c.subscribe(typeURL, name)
		r := c.next()
		if got := names(r); !slices.Equal(got, []string{name}) || r.GetTypeUrl() != typeURL {
			t.Fatalf("asked for %s of %s, got %v of %s", name, typeURL, got, r.GetTypeUrl())
		}
		if v := r.GetResources()[0].GetVersion(); v != xdsgen.VersionOf(r.GetResources()[0].GetResource().GetValue()) {
			t.Fatalf("version %q is not the hash of the content", v)
		}
		c.ack(r)
	}
	c.subscribe(xdsgen.ListenerType, "outbound/10.0.0.1:80")
	if got := names(c.next()); !slices.Equal(got, []string{"outbound/10.0.0.1:80"}) {
		t.Fatalf("by virtual IP: %v", got)
	}
}

func TestUnknownNameIsAnsweredAtOnceAndLaterServed(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, &mesh.Mesh{})
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	for _, typeURL := range xdsgen.TypeURLs() {
		c.subscribe(typeURL, key)
		r := c.next()
		if got := names(r); !slices.Equal(got, []string{"-" + key}) {
			t.Fatalf("%s: got %v, want it removed", typeURL, got)
		}
		c.ack(r)
	}
	c.quiet(100 * time.Millisecond) // it is said once
	publish(t, s, shop("127.0.0.1:9"))
	for _, want := range []string{xdsgen.ClusterType, xdsgen.EndpointType, xdsgen.RouteType} {
		if r := c.next(); r.GetTypeUrl() != want || !slices.Equal(names(r), []string{key}) {
			t.Fatalf("got %v of %s, want %s of %s", names(r), r.GetTypeUrl(), key, want)
		}
	}
}

func TestNothingIsSaidBeforeTheFirstPublish(t *testing.T) {
	s := newServer(discovery.Options{})
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	c.subscribe(xdsgen.ClusterType, key)
	c.quiet(100 * time.Millisecond)
	publish(t, s, shop())
	if got := names(c.next()); !slices.Equal(got, []string{key}) {
		t.Fatalf("got %v", got)
	}
}

func TestEndpointChangePushesEndpointsOnly(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := discovery.New(discovery.Options{Log: slog.New(slog.DiscardHandler), Registry: reg})
	publish(t, s, shop("127.0.0.1:9"))
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	for _, typeURL := range xdsgen.TypeURLs() {
		name := key
		if typeURL == xdsgen.ListenerType {
			name = "outbound/" + key
		}
		c.subscribe(typeURL, name)
		c.ack(c.next())
	}
	// The last acknowledgement has no answer to wait for.
	waitFor(t, "all acknowledged", func() bool { return s.Applied()[0].Applied == 1 })
	publish(t, s, shop("127.0.0.1:9", "127.0.0.1:10"))
	r := c.next()
	if r.GetTypeUrl() != xdsgen.EndpointType || !slices.Equal(names(r), []string{key}) {
		t.Fatalf("got %v of %s", names(r), r.GetTypeUrl())
	}
	c.quiet(100 * time.Millisecond)
	if a := s.Applied()[0]; a.Applied != 0 || a.Total != 1 {
		t.Fatalf("before the acknowledgement: %+v", a)
	}
	c.ack(r)
	waitFor(t, "applied 1/1", func() bool { return s.Applied()[0].Applied == 1 })
	// Of all the answers, one was to a change.
	if n := histogramCount(t, reg, "outrigger_xds_push_duration_seconds"); n != 1 {
		t.Fatalf("%d pushes measured, want 1", n)
	}
}

func histogramCount(t *testing.T, g prometheus.Gatherer, name string) uint64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetHistogram().GetSampleCount()
		}
	}
	return 0
}

func TestRestartKeepsVersions(t *testing.T) {
	first := newServer(discovery.Options{})
	publish(t, first, shop("127.0.0.1:9"))
	addr, stop := startStop(t, first)
	c := newDelta(t, addr, sidecar("storefront-0.shop"))
	c.subscribe(xdsgen.ClusterType, key)
	version := c.next().GetResources()[0].GetVersion()
	stop()

	second := newServer(discovery.Options{})
	publish(t, second, shop("127.0.0.1:9"))
	c = newDelta(t, start(t, second), sidecar("storefront-0.shop"))
	c.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: xdsgen.ClusterType, ResourceNamesSubscribe: []string{key, "shop/gone:80"},
		InitialResourceVersions: map[string]string{key: version, "shop/gone:80": "0123"},
	})
	// What it has is not sent; what is gone is said.
	r := c.next()
	if got := names(r); !slices.Equal(got, []string{"-shop/gone:80"}) {
		t.Fatalf("got %v", got)
	}
	c.ack(r)
	c.quiet(200 * time.Millisecond)
	waitFor(t, "applied", func() bool { return second.Applied()[0].Applied == 1 })
}

func TestNackBecomesStatus(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, shop("127.0.0.1:9"))
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	c.subscribe(xdsgen.ClusterType, key)
	r := c.next()
	c.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &status.Status{Message: "bad cluster"},
	})
	waitFor(t, "a NACK in status", func() bool { return s.Applied()[0].Rejected == 1 })
	n := s.Status()[0]
	if n.ID != "storefront-0.shop" || n.DataPlane != xdsgen.Outrigger || n.Applied || n.Types[0].Nack.Reason != "bad cluster" {
		t.Fatalf("status = %+v", n)
	}
	if diff := cmp.Diff(map[string]string{key: r.GetResources()[0].GetVersion()}, n.Types[0].Nack.Resources); diff != "" {
		t.Fatal(diff)
	}
	// Another resource that is accepted does not hide the one that is not.
	c.subscribe(xdsgen.ClusterType, "shop/none:80")
	c.ack(c.next())
	waitFor(t, "the second answer", func() bool { return s.Status()[0].Types[0].Pending == 0 })
	if s.Applied()[0].Rejected != 1 {
		t.Fatal("the NACK is forgotten")
	}
	// A new version that is accepted settles it.
	m := shop("127.0.0.1:9")
	m.Services[0].Ports[0].Protocol = mesh.HTTP1
	publish(t, s, m)
	c.ack(c.next())
	waitFor(t, "applied", func() bool { a := s.Applied()[0]; return a.Applied == 1 && a.Rejected == 0 })
}

func TestRemovedClustersStayForTheGracePeriod(t *testing.T) {
	s := newServer(discovery.Options{Grace: 300 * time.Millisecond})
	publish(t, s, shop("127.0.0.1:9"))
	c := newDelta(t, start(t, s), sidecar("storefront-0.shop"))
	c.subscribe(xdsgen.ClusterType, key)
	c.ack(c.next())
	c.subscribe(xdsgen.ListenerType, "outbound/"+key)
	c.ack(c.next())
	waitFor(t, "applied", func() bool { return s.Applied()[0].Applied == 1 })
	publish(t, s, &mesh.Mesh{})
	r := c.next()
	if got := names(r); !slices.Equal(got, []string{"-outbound/" + key}) {
		t.Fatalf("at once: %v", got)
	}
	c.ack(r)
	c.quiet(100 * time.Millisecond)
	if got := names(c.next()); !slices.Equal(got, []string{"-" + key}) {
		t.Fatalf("after the grace period: %v", got)
	}
}

func TestLimitsAreClear(t *testing.T) {
	for _, f := range []struct {
		name string
		node *corev3.Node
		req  *discoveryv3.DeltaDiscoveryRequest
		code codes.Code
		want string
	}{
		{"names", sidecar("a.shop"), &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ClusterType, ResourceNamesSubscribe: []string{"a", "b", "c"}}, codes.ResourceExhausted, "at most 2"},
		{"wildcard", sidecar("a.shop"), &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ClusterType, ResourceNamesSubscribe: []string{"*"}}, codes.InvalidArgument, "subscribe by name"},
		{"node", &corev3.Node{}, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ClusterType}, codes.InvalidArgument, "node.id"},
		{"type", sidecar("a.shop"), &discoveryv3.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/x"}, codes.InvalidArgument, "is not served"},
		{"metadata", envoy("a.shop", "payments=1"), &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ClusterType}, codes.InvalidArgument, "payments.shop:80=127.0.0.1:4001"},
	} {
		t.Run(f.name, func(t *testing.T) {
			s := newServer(discovery.Options{Limits: discovery.Limits{Names: 2}})
			publish(t, s, &mesh.Mesh{})
			c := newDelta(t, start(t, s), f.node)
			c.send(f.req)
			select {
			case err := <-c.ended:
				if grpcstatus.Code(err) != f.code || !strings.Contains(err.Error(), f.want) {
					t.Fatalf("got %v, want %s and %q", err, f.code, f.want)
				}
			case <-time.After(time.Second):
				t.Fatal("the stream was not ended")
			}
		})
	}
}

func envoy(id string, upstreams ...string) *corev3.Node {
	list := &structpb.ListValue{}
	for _, u := range upstreams {
		list.Values = append(list.Values, structpb.NewStringValue(u))
	}
	return &corev3.Node{Id: id, UserAgentName: "envoy", Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
		bootstrap.MetaUpstreams: structpb.NewListValue(list),
	}}}
}

func TestEnvoyWildcardsGetTheNodesOwnView(t *testing.T) {
	s := newServer(discovery.Options{Grace: -1})
	publish(t, s, &mesh.Mesh{})
	addr := start(t, s)
	c := newDelta(t, addr, envoy("storefront-0.shop", "payments.shop:80=127.0.0.1:4001"))
	for _, typeURL := range []string{xdsgen.ClusterType, xdsgen.ListenerType} {
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL})
		r := c.next() // empty, so that Envoy can finish its start
		if len(names(r)) != 0 || r.GetTypeUrl() != typeURL {
			t.Fatalf("got %v of %s", names(r), r.GetTypeUrl())
		}
		c.ack(r)
	}
	c.quiet(50 * time.Millisecond)
	if got := s.Status()[0].Missing; !slices.Equal(got, []string{key}) {
		t.Fatalf("missing = %v", got)
	}
	publish(t, s, shop("127.0.0.1:9"))
	r := c.next()
	c.subscribe(xdsgen.EndpointType, key)
	c.ack(r)
	for _, want := range []string{key, "outbound/" + key + "|127.0.0.1:4001"} {
		r := c.next()
		if got := names(r); !slices.Equal(got, []string{want}) {
			t.Fatalf("got %v, want %s", got, want)
		}
		c.ack(r)
	}
	// When a cluster changes, Envoy waits for its endpoints once more.
	m := shop("127.0.0.1:9")
	m.Services[0].Ports[0].Breaker = &mesh.CircuitBreaker{Policy: "shop/payments", Limits: mesh.Limits{Requests: new(uint32(1))}}
	publish(t, s, m)
	for _, want := range []string{xdsgen.ClusterType, xdsgen.EndpointType} {
		r := c.next()
		if r.GetTypeUrl() != want || !slices.Equal(names(r), []string{key}) {
			t.Fatalf("got %v of %s, want %s", names(r), r.GetTypeUrl(), want)
		}
		c.ack(r)
	}
	// Another Envoy with other upstreams sees none of it.
	other := newDelta(t, addr, envoy("other-0.shop"))
	other.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.ClusterType})
	if got := names(other.next()); len(got) != 0 {
		t.Fatalf("got %v", got)
	}
	waitFor(t, "applied", func() bool { a := s.Applied()[1]; return a.DataPlane == xdsgen.Envoy && a.Applied >= 1 })
	publish(t, s, &mesh.Mesh{})
	removed := map[string]bool{}
	for range 3 {
		for _, n := range names(c.next()) {
			removed[n] = true
		}
	}
	if !removed["-"+key] || !removed["-outbound/"+key+"|127.0.0.1:4001"] {
		t.Fatalf("removed %v", removed)
	}
}

// split is a mesh whose Service payments, which an Envoy calls, sends all to the
// version given.
func split(version string) *mesh.Mesh {
	m := shop("127.0.0.1:9")
	for _, v := range []string{"payments-v1", "payments-v2"} {
		svc := shop("127.0.0.1:9").Services[0]
		svc.Name, svc.VIPs = v, nil
		svc.Ports[0].Routes[0].Backends[0].Service = v
		m.Services = append(m.Services, svc)
	}
	m.Services[0].Ports[0].Routes[0].Backends[0].Service = version
	return m
}

// onlyV1 is an Envoy that has acknowledged all of split("payments-v1").
func onlyV1(t *testing.T, s *discovery.Server) *deltaClient {
	t.Helper()
	publish(t, s, split("payments-v1"))
	c := newDelta(t, start(t, s), envoy("storefront-0.shop", "payments.shop:80=127.0.0.1:4001"))
	c.subscribe(xdsgen.ClusterType)
	c.ack(c.expect(xdsgen.ClusterType, "shop/payments-v1:80"))
	c.subscribe(xdsgen.EndpointType, "shop/payments-v1:80")
	c.ack(c.expect(xdsgen.EndpointType, "shop/payments-v1:80"))
	c.subscribe(xdsgen.ListenerType)
	c.ack(c.expect(xdsgen.ListenerType, "outbound/"+key+"|127.0.0.1:4001"))
	c.subscribe(xdsgen.RouteType, key)
	c.ack(c.expect(xdsgen.RouteType, key))
	waitFor(t, "applied", func() bool { return s.Applied()[1].Applied == 1 })
	return c
}

func (c *deltaClient) expect(typeURL string, want ...string) *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	r := c.next()
	if r.GetTypeUrl() != typeURL || !slices.Equal(names(r), want) {
		c.t.Fatalf("got %v of %s, want %v of %s", names(r), r.GetTypeUrl(), want, typeURL)
	}
	return r
}

// An Envoy answers by itself what is routed to a cluster that is still warming,
// so that a route that newly names one is not sent before it has the cluster
// and its endpoints.
func TestRouteWaitsForTheClusterThatItNewlyNames(t *testing.T) {
	const v2 = "shop/payments-v2:80"
	for _, f := range []struct {
		name string
		// in which order Envoy answers; the route must come after the last.
		order []string
	}{
		{"the cluster is acknowledged first", []string{xdsgen.ClusterType, xdsgen.EndpointType}},
		{"the cluster is acknowledged when it is warm", []string{xdsgen.EndpointType, xdsgen.ClusterType}},
	} {
		t.Run(f.name, func(t *testing.T) {
			s := newServer(discovery.Options{})
			c := onlyV1(t, s)
			publish(t, s, split("payments-v2"))
			got := map[string]*discoveryv3.DeltaDiscoveryResponse{xdsgen.ClusterType: c.expect(xdsgen.ClusterType, v2)}
			c.quiet(50 * time.Millisecond)
			c.subscribe(xdsgen.EndpointType, v2)
			got[xdsgen.EndpointType] = c.expect(xdsgen.EndpointType, v2)
			for _, typeURL := range f.order {
				c.quiet(50 * time.Millisecond)
				if s.Applied()[1].Applied != 0 {
					t.Error("the node counts as up to date before it has the route")
				}
				c.ack(got[typeURL])
			}
			c.ack(c.expect(xdsgen.RouteType, key))
			waitFor(t, "applied", func() bool { return s.Applied()[1].Applied == 1 })
			// What it has already is not waited for.
			publish(t, s, split("payments-v1"))
			c.ack(c.expect(xdsgen.RouteType, key))
		})
	}
}

// A cluster that Envoy refuses holds up a route for 2 s only.
func TestRouteDoesNotWaitForEver(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := discovery.New(discovery.Options{Log: slog.New(slog.DiscardHandler), Registry: reg})
	c := onlyV1(t, s)
	publish(t, s, split("payments-v2"))
	r := c.expect(xdsgen.ClusterType, "shop/payments-v2:80")
	c.send(&discoveryv3.DeltaDiscoveryRequest{
		TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &status.Status{Message: "bad cluster"},
	})
	c.quiet(1700 * time.Millisecond)
	c.ack(c.expect(xdsgen.RouteType, key))
	if n := counted(t, reg, "outrigger_xds_ordering_timeouts_total"); n != 1 {
		t.Errorf("%v timeouts are counted, want 1", n)
	}
}

// A cluster of which Envoy acknowledges the endpoints only after it has dropped
// it counts as new when it comes back.
func TestRouteWaitsForAClusterThatCameBack(t *testing.T) {
	const v1, v2 = "shop/payments-v1:80", "shop/payments-v2:80"
	s := newServer(discovery.Options{Grace: -1})
	c := onlyV1(t, s)
	publish(t, s, split("payments-v2"))
	c.ack(c.expect(xdsgen.ClusterType, v2, "-"+v1))
	c.subscribe(xdsgen.EndpointType, v2)
	endpoints := c.expect(xdsgen.EndpointType, v2)
	publish(t, s, split("payments-v1"))
	r := c.expect(xdsgen.ClusterType, v1, "-"+v2)
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.EndpointType, ResourceNamesUnsubscribe: []string{v2}})
	c.ack(r)
	c.ack(endpoints)
	// The route has not changed for the client: that to v2 was never sent.
	c.quiet(50 * time.Millisecond)
	waitFor(t, "applied", func() bool { return s.Applied()[1].Applied == 1 })
	publish(t, s, split("payments-v2"))
	c.ack(c.expect(xdsgen.ClusterType, v2, "-"+v1))
	c.quiet(50 * time.Millisecond)
	c.subscribe(xdsgen.EndpointType, v2)
	endpoints = c.expect(xdsgen.EndpointType, v2)
	c.quiet(50 * time.Millisecond)
	c.ack(endpoints)
	c.ack(c.expect(xdsgen.RouteType, key))
}

// SotW is ordered alike. Its listeners are sent in full, so that all are kept
// back until one that is new may be sent.
func TestSotWListenersWaitForTheirClusters(t *testing.T) {
	s := newServer(discovery.Options{})
	publish(t, s, &mesh.Mesh{})
	stream, err := dial(t, start(t, s)).StreamAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan *discoveryv3.DiscoveryResponse, 8)
	go func() {
		defer close(got)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			got <- r
		}
	}()
	node := envoy("storefront-0.shop", "payments.shop:80=127.0.0.1:4001")
	send := func(typeURL string, r *discoveryv3.DiscoveryResponse, names ...string) {
		t.Helper()
		if err := stream.Send(&discoveryv3.DiscoveryRequest{
			Node: node, TypeUrl: typeURL, ResourceNames: names, ResponseNonce: r.GetNonce(), VersionInfo: r.GetVersionInfo(),
		}); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(typeURL string, n int) *discoveryv3.DiscoveryResponse {
		t.Helper()
		select {
		case r := <-got:
			if r.GetTypeUrl() != typeURL || len(r.GetResources()) != n {
				t.Fatalf("got %d of %s, want %d of %s", len(r.GetResources()), r.GetTypeUrl(), n, typeURL)
			}
			return r
		case <-time.After(time.Second):
			t.Fatalf("no %s within a second", typeURL)
		}
		return nil
	}
	quiet := func() {
		t.Helper()
		select {
		case r := <-got:
			t.Fatalf("unexpected response of %s", r.GetTypeUrl())
		case <-time.After(50 * time.Millisecond):
		}
	}
	for _, typeURL := range []string{xdsgen.ClusterType, xdsgen.ListenerType} {
		send(typeURL, nil)
		send(typeURL, expect(typeURL, 0))
	}
	quiet()
	publish(t, s, shop("127.0.0.1:9"))
	clusters := expect(xdsgen.ClusterType, 1)
	send(xdsgen.ClusterType, clusters)
	send(xdsgen.EndpointType, nil, key)
	endpoints := expect(xdsgen.EndpointType, 1)
	quiet()
	send(xdsgen.EndpointType, endpoints, key)
	expect(xdsgen.ListenerType, 1)
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

func counted(t *testing.T, g prometheus.Gatherer, name string) (n float64) {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}

func TestSotWSubsetIsAnswered(t *testing.T) {
	s := newServer(discovery.Options{})
	m := shop("127.0.0.1:9")
	other := m.Services[0]
	other.Name = "orders"
	m.Services = append([]mesh.Service{other}, m.Services...)
	publish(t, s, m)
	stream, err := dial(t, start(t, s)).StreamAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(nonce, version string, names ...string) *discoveryv3.DiscoveryResponse {
		t.Helper()
		if err := stream.Send(&discoveryv3.DiscoveryRequest{
			Node: &corev3.Node{Id: "grpc-1", UserAgentName: "gRPC Go"}, TypeUrl: xdsgen.ClusterType,
			ResourceNames: names, ResponseNonce: nonce, VersionInfo: version,
		}); err != nil {
			t.Fatal(err)
		}
		got := make(chan *discoveryv3.DiscoveryResponse, 1)
		go func() {
			r, err := stream.Recv()
			if err != nil {
				t.Error(err)
			}
			got <- r
		}()
		select {
		case r := <-got:
			return r
		case <-time.After(time.Second):
			t.Fatal("no response within a second")
		}
		return nil
	}
	r := ask("", "", key)
	if len(r.GetResources()) != 1 {
		t.Fatalf("%d clusters, want the one that was asked for", len(r.GetResources()))
	}
	// A further name that does not exist: all that is asked for and exists.
	r2 := ask(r.GetNonce(), r.GetVersionInfo(), key, "shop/none:80")
	if e := r2.GetResourceErrors(); len(e) != 1 || e[0].GetResourceName().GetName() != "shop/none:80" {
		t.Fatalf("resource errors %v", e)
	}
	if len(r2.GetResources()) != 1 || r2.GetVersionInfo() != r.GetVersionInfo() {
		t.Fatalf("%d clusters of version %s, want 1 of %s", len(r2.GetResources()), r2.GetVersionInfo(), r.GetVersionInfo())
	}
	r3 := ask(r2.GetNonce(), r2.GetVersionInfo(), key, "shop/none:80", "shop/orders:80")
	if len(r3.GetResources()) != 2 || r3.GetVersionInfo() == r.GetVersionInfo() {
		t.Fatalf("%d clusters of version %s", len(r3.GetResources()), r3.GetVersionInfo())
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// A stock gRPC client, configured by nothing but this control plane, reaches a
// stock gRPC server.
func TestProxylessGRPC(t *testing.T) {
	backend := func() (string, *grpc.Server) {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer()
		healthpb.RegisterHealthServer(g, health.NewServer())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := g.Serve(lis); err != nil {
				t.Error(err)
			}
		}()
		t.Cleanup(func() { g.Stop(); <-done })
		return lis.Addr().String(), g
	}
	one, firstServer := backend()
	two, _ := backend()
	s := newServer(discovery.Options{})
	m := shop(one)
	m.Services[0].Ports[0].Breaker = &mesh.CircuitBreaker{
		Policy: "shop/payments", Limits: mesh.Limits{Requests: new(uint32(10))},
		Trip: &mesh.Trip{ConsecutiveFailures: 5, FailureRatio: 0.5, MinimumRequests: 20, Window: 10 * time.Second, OpenFor: 15 * time.Second},
	}
	m.Services[0].Ports[0].Routes[0].Retry = mesh.Retry{
		Policy: "default", On: []string{"connect-failure", "unavailable"}, IdempotentOn: []string{"gateway-error"}, Attempts: 2,
		BackoffBase: 25 * time.Millisecond, BackoffMax: 250 * time.Millisecond,
	}
	m.Services[0].Ports[0].Routes = append([]mesh.Route{
		{Name: "none", Match: mesh.Match{Path: mesh.PathMatch{Kind: mesh.Exact, Value: "/none"}}},
		{Name: "prefix", Match: mesh.Match{Path: mesh.PathMatch{Kind: mesh.Prefix, Value: "/a/b"}}, Backends: m.Services[0].Ports[0].Routes[0].Backends},
	}, m.Services[0].Ports[0].Routes...)
	publish(t, s, m)

	r, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil,
		`{"node":{"id":"checkout-0.shop"},"xds_servers":[{"server_uri":%q,"channel_creds":[{"type":"insecure"}]}]}`, start(t, s)))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///payments.shop:80", grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, grpc.WaitForReady(true))
		return err
	}
	if err := call(); err != nil {
		t.Fatalf("call: %v; status %+v", err, s.Status())
	}
	waitFor(t, "applied by gRPC", func() bool { a := s.Applied()[2]; return a.Total == 1 && a.Applied == 1 })

	// The endpoint moves: no call after the push may fail.
	m2 := *m
	m2.Services = slices.Clone(m.Services)
	m2.Services[0].Ports = slices.Clone(m.Services[0].Ports)
	m2.Services[0].Ports[0].Endpoints = shop(two).Services[0].Ports[0].Endpoints
	publish(t, s, &m2)
	waitFor(t, "applied by gRPC", func() bool { return s.Applied()[2].Applied == 1 })
	firstServer.Stop()
	for range 10 {
		if err := call(); err != nil {
			t.Fatalf("call after the move: %v", err)
		}
	}
}

func TestClearTextStaysOnLoopback(t *testing.T) {
	if err := discovery.CheckAddress(&net.TCPAddr{IP: net.IPv6loopback}); err != nil {
		t.Error(err)
	}
	for _, ip := range []string{"0.0.0.0", "10.0.0.1", "::"} {
		if err := discovery.CheckAddress(&net.TCPAddr{IP: net.ParseIP(ip), Port: 15010}); !errors.Is(err, discovery.ErrNotLoopback) {
			t.Errorf("%s: %v", ip, err)
		}
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 3 s: %s", what)
		}
	}
}
