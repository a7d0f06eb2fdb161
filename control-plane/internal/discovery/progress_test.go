package discovery_test

import (
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/status"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	xdsgen "github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// response waits for one as long as a busy machine may take.
func (c *deltaClient) response() *discoveryv3.DeltaDiscoveryResponse {
	c.t.Helper()
	select {
	case r := <-c.got:
		return r
	case err := <-c.ended:
		c.t.Fatalf("the stream ended: %v", err)
	case <-time.After(30 * time.Second):
		c.t.Fatal("no response")
	}
	return nil
}

func (c *deltaClient) refuse(r *discoveryv3.DeltaDiscoveryResponse, reason string) {
	c.t.Helper()
	c.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce(), ErrorDetail: &status.Status{Message: reason}})
}

// Of those who ask for a resource, those count as having it who have acknowledged
// it as it is served now; who refuses it is named, with what it says of it.
func TestProgress(t *testing.T) {
	s := newServer(discovery.Options{})
	m := shop("127.0.0.1:9")
	second := m.Services[0]
	second.Name = "ledger"
	second.VIPs = nil
	m.Services = append([]mesh.Service{second}, m.Services...)
	publish(t, s, m)
	addr := start(t, s)
	const ledger = "shop/ledger:80"
	want := []discovery.Interest{
		{Names: []discovery.Name{{xdsgen.ClusterType, key}}},
		{Names: []discovery.Name{{xdsgen.ClusterType, ledger}}},
		{Names: []discovery.Name{{xdsgen.ClusterType, key}, {xdsgen.ClusterType, ledger}}},
		{Names: []discovery.Name{{xdsgen.ClusterType, key}}, Namespace: "bank"},
		{Names: []discovery.Name{{xdsgen.ListenerType, "outbound/" + key}}},
		{Names: []discovery.Name{{xdsgen.ClusterType, "shop/nobody:80"}}},
		{},
	}
	reaches := func(step string, now ...discovery.Progress) {
		t.Helper()
		d := ""
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if d = cmp.Diff(now, s.Progress(want)); d == "" {
				return
			}
		}
		t.Fatalf("%s (-want +got):\n%s", step, d)
	}
	asks := func(id, ns string) *deltaClient {
		t.Helper()
		c := newDelta(t, addr, workloadNode(t, id, ns, "x"))
		c.subscribe(xdsgen.ClusterType, key, ledger, "shop/nobody:80")
		return c
	}
	good, bad, mute, bank := asks("good-0.shop", "shop"), asks("bad-0.shop", "shop"), asks("mute-0.shop", "shop"), asks("teller-0.bank", "bank")
	good.ack(good.response())
	bad.refuse(bad.response(), "cluster "+key+": no")
	held := mute.response()
	bank.ack(bank.response())
	none := discovery.Progress{}
	reasons := []string{"bad-0.shop: cluster " + key + ": no"}
	reaches("one refuses, one is silent",
		discovery.Progress{Subscribed: 4, Applied: 2, Rejected: 1, Reasons: reasons}, discovery.Progress{Subscribed: 4, Applied: 2, Rejected: 1},
		discovery.Progress{Subscribed: 4, Applied: 2, Rejected: 1, Reasons: reasons}, discovery.Progress{Subscribed: 1, Applied: 1}, none, none, none)

	// One of the two changes.
	changed := *m
	changed.Services = []mesh.Service{second, m.Services[1]}
	port := m.Services[1].Ports[0]
	port.Breaker = &mesh.CircuitBreaker{Policy: "shop/payments", Trip: &mesh.Trip{ConsecutiveFailures: 5, Window: time.Second, OpenFor: time.Second}}
	changed.Services[1].Ports = []mesh.Port{port}
	publish(t, s, &changed)
	next := good.response()
	mute.ack(held)
	reaches("nobody has what is new",
		discovery.Progress{Subscribed: 4, Rejected: 1, Reasons: reasons}, discovery.Progress{Subscribed: 4, Applied: 3, Rejected: 1},
		discovery.Progress{Subscribed: 4, Rejected: 1, Reasons: reasons}, discovery.Progress{Subscribed: 1}, none, none, none)
	good.ack(next)
	bank.ack(bank.response())
	mute.ack(mute.response())
	bad.ack(bad.response())
	// What was refused with it and has not changed was not sent again.
	reaches("all have what is new",
		discovery.Progress{Subscribed: 4, Applied: 4}, discovery.Progress{Subscribed: 4, Applied: 3, Rejected: 1},
		discovery.Progress{Subscribed: 4, Applied: 3, Rejected: 1}, discovery.Progress{Subscribed: 1, Applied: 1}, none, none, none)

	if err := good.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	reaches("one has gone",
		discovery.Progress{Subscribed: 3, Applied: 3}, discovery.Progress{Subscribed: 3, Applied: 2, Rejected: 1},
		discovery.Progress{Subscribed: 3, Applied: 2, Rejected: 1}, discovery.Progress{Subscribed: 1, Applied: 1}, none, none, none)
	if d := cmp.Diff(map[string]bool{"bad-0.shop": true, "mute-0.shop": true, "teller-0.bank": true}, s.Nodes()); d != "" {
		t.Errorf("nodes (-want +got):\n%s", d)
	}
}
