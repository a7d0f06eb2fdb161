package discovery_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	xdsgen "github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// A change of endpoints is under way until the last of the proxies that ask for
// them has acknowledged it, or will not.
func TestPropagation(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := discovery.New(discovery.Options{Log: slog.New(slog.DiscardHandler), Registry: reg})
	m := shop("127.0.0.1:9")
	publish(t, s, m)
	addr := start(t, s)
	ask := func(id string) *deltaClient {
		c := newDelta(t, addr, sidecar(id))
		c.subscribe(xdsgen.EndpointType, key)
		c.ack(c.next())
		return c
	}
	clients := []*deltaClient{ask("a-0.shop"), ask("b-0.shop")}
	waitFor(t, "all acknowledged", func() bool { return s.Applied()[0].Applied == 2 })
	measured := func() uint64 { return histogramCount(t, reg, "outrigger_xds_propagation_seconds") }
	pending := func() float64 { return gauge(t, reg, "outrigger_xds_propagation_pending_seconds") }
	move := func(port uint16) {
		t.Helper()
		svc := m.Services[0]
		svc.Ports = slices.Clone(svc.Ports)
		svc.Ports[0].Endpoints = []mesh.Endpoint{{Address: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), Ready: true}}
		m = m.With([]mesh.Service{svc}, nil)
		if err := s.Update(m, mesh.Change{Services: []mesh.Name{{Namespace: svc.Namespace, Name: svc.Name}}}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	refuse := func(c *deltaClient, r *discoveryv3.DeltaDiscoveryResponse) {
		c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: "no"}})
	}
	if measured() != 0 || pending() != 0 {
		t.Fatalf("before any change: %d measured, %v pending", measured(), pending())
	}

	move(10)
	first, second := clients[0].expect(xdsgen.EndpointType, key), clients[1].expect(xdsgen.EndpointType, key)
	clients[0].ack(first)
	waitFor(t, "one acknowledged", func() bool { return s.Applied()[0].Applied == 1 })
	if measured() != 0 || pending() <= 0 {
		t.Fatalf("one of two has it: %d measured, %v pending", measured(), pending())
	}
	clients[1].ack(second)
	waitFor(t, "measured once", func() bool { return measured() == 1 && pending() == 0 })

	// Who is slow gets the last of what has happened meanwhile, and has with it all
	// before. It holds up nobody.
	move(11)
	slow := clients[1].expect(xdsgen.EndpointType, key)
	for port := uint16(12); port < 20; port++ {
		clients[0].ack(clients[0].expect(xdsgen.EndpointType, key))
		move(port)
	}
	clients[0].ack(clients[0].expect(xdsgen.EndpointType, key))
	waitFor(t, "the other has all", func() bool { return s.Applied()[0].Applied == 1 })
	if measured() != 1 {
		t.Fatalf("%d measured, and one has not answered", measured())
	}
	clients[1].ack(slow)
	clients[1].ack(clients[1].expect(xdsgen.EndpointType, key))
	waitFor(t, "nothing under way", func() bool { return measured() > 1 && pending() == 0 })
	clients[1].quiet(50 * time.Millisecond)

	// Nobody waits for one that refuses.
	was := measured()
	move(30)
	refuse(clients[0], clients[0].expect(xdsgen.EndpointType, key))
	clients[1].ack(clients[1].expect(xdsgen.EndpointType, key))
	waitFor(t, "measured without it", func() bool { return measured() == was+1 && pending() == 0 })

	// Nor for one that is gone.
	move(31)
	clients[0].expect(xdsgen.EndpointType, key)
	clients[1].ack(clients[1].expect(xdsgen.EndpointType, key))
	if err := clients[0].stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "measured without the one that left", func() bool { return measured() == was+2 && pending() == 0 })
}

func gauge(t *testing.T, g prometheus.Gatherer, name string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("no %s", name)
	return 0
}

// However endpoints change while proxies subscribe and answer, each has in the end
// what is served.
func TestNothingIsMissed(t *testing.T) {
	const clients, changes = 24, 400
	s := newServer(discovery.Options{})
	m := shop("127.0.0.1:9")
	publish(t, s, m)
	addr, stop := startStop(t, s)
	var wg sync.WaitGroup
	for i := range clients {
		c := newDelta(t, addr, sidecar(fmt.Sprintf("a-%d.shop", i)))
		wg.Go(func() {
			for k := range 20 { // names that come and go
				c.subscribe(xdsgen.EndpointType, key)
				if k%2 == i%2 {
					c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xdsgen.EndpointType, ResourceNamesUnsubscribe: []string{key}})
				}
			}
			c.subscribe(xdsgen.EndpointType, key)
			for {
				select {
				case r := <-c.got:
					c.ack(r)
				case err := <-c.ended:
					_ = err // the server has stopped
					return
				}
			}
		})
	}
	for n := range changes {
		svc := m.Services[0]
		svc.Ports = slices.Clone(svc.Ports)
		svc.Ports[0].Endpoints = []mesh.Endpoint{{Address: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(100+n)), Ready: true}}
		m = m.With([]mesh.Service{svc}, nil)
		if n%20 == 0 {
			publish(t, s, m)
			continue
		}
		if err := s.Update(m, mesh.Change{Services: []mesh.Name{{Namespace: svc.Namespace, Name: svc.Name}}}, time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, "all have the last", func() bool { return s.Applied()[0].Applied == clients })
	for _, n := range s.Status() {
		if len(n.Types) != 1 || n.Types[0].Resources != 1 {
			t.Errorf("%s has %+v", n.ID, n.Types)
		}
	}
	stop()
	wg.Wait()
}
