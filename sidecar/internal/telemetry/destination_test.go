package telemetry

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// What dashboards for meshes ask for: who called, whom, how it ended, and
// whether the connection was proved.
func TestRequestsCarryTheMeshLabels(t *testing.T) {
	r := prometheus.NewRegistry()
	m := NewMetrics(r, node)
	out, in := m.Destination(true, "shop/payments:80"), m.Destination(false, "shop/storefront:8080")
	for range 2 {
		out.Observe(Request{Status: 503, GRPCStatus: -1, Flags: accesslog.UO}, time.Millisecond)
	}
	out.Observe(Request{Protocol: GRPC, Status: 200, GRPCStatus: 14, Secure: true}, time.Millisecond)
	out.Observe(Request{Protocol: GRPC, Status: 200, GRPCStatus: -1, Secure: true}, time.Millisecond)
	in.Observe(Request{Protocol: HTTP2, Status: 200, Secure: true, Peer: "shop/cart"}, time.Millisecond)
	in.Observe(Request{Status: 200}, time.Millisecond)
	const (
		payments   = `destination_service="payments.shop.svc",destination_service_name="payments",destination_service_namespace="shop",`
		storefront = `destination_service="storefront.shop.svc",destination_service_name="storefront",destination_service_namespace="shop",`
		source     = `source_workload="storefront",source_workload_namespace="shop"} `
	)
	want := `
# HELP outrigger_requests_total Requests that ended, by how.
# TYPE outrigger_requests_total counter
outrigger_requests_total{connection_security_policy="none",` + payments + `grpc_response_status="",reporter="source",request_protocol="http",response_code="503",response_flags="UO",` + source + `2
outrigger_requests_total{connection_security_policy="mutual_tls",` + payments + `grpc_response_status="14",reporter="source",request_protocol="grpc",response_code="200",response_flags="-",` + source + `1
outrigger_requests_total{connection_security_policy="mutual_tls",` + payments + `grpc_response_status="",reporter="source",request_protocol="grpc",response_code="200",response_flags="-",` + source + `1
outrigger_requests_total{connection_security_policy="mutual_tls",` + storefront + `grpc_response_status="",reporter="destination",request_protocol="http",response_code="200",response_flags="-",source_workload="cart",source_workload_namespace="shop"} 1
outrigger_requests_total{connection_security_policy="none",` + storefront + `grpc_response_status="",reporter="destination",request_protocol="http",response_code="200",response_flags="-",source_workload="unknown",source_workload_namespace="unknown"} 1
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "outrigger_requests_total"); err != nil {
		t.Fatal(err)
	}
	if m.Destination(true, "shop/payments:80") != out {
		t.Error("the same destination was resolved to other series")
	}
}

func TestAttemptsAndConnectionsAreCounted(t *testing.T) {
	r := prometheus.NewRegistry()
	d := NewMetrics(r, node).Destination(true, "shop/payments:80")
	d.Attempt(false)
	d.Attempt(true)
	d.Attempt(true)
	d.TCPOpened()
	d.TCPClosed(5, 7)
	want := `
# HELP outrigger_request_attempts_total Attempts at upstreams; kind is original or retry.
# TYPE outrigger_request_attempts_total counter
outrigger_request_attempts_total{destination_service="payments.shop.svc",kind="original"} 1
outrigger_request_attempts_total{destination_service="payments.shop.svc",kind="retry"} 2
# HELP outrigger_tcp_connections_closed_total TCP connections closed.
# TYPE outrigger_tcp_connections_closed_total counter
outrigger_tcp_connections_closed_total{destination_service="payments.shop.svc",reporter="source",source_workload="storefront"} 1
# HELP outrigger_tcp_connections_opened_total TCP connections opened.
# TYPE outrigger_tcp_connections_opened_total counter
outrigger_tcp_connections_opened_total{destination_service="payments.shop.svc",reporter="source",source_workload="storefront"} 1
# HELP outrigger_tcp_received_bytes_total Bytes received from callers over TCP.
# TYPE outrigger_tcp_received_bytes_total counter
outrigger_tcp_received_bytes_total{destination_service="payments.shop.svc",reporter="source",source_workload="storefront"} 5
# HELP outrigger_tcp_sent_bytes_total Bytes sent to callers over TCP.
# TYPE outrigger_tcp_sent_bytes_total counter
outrigger_tcp_sent_bytes_total{destination_service="payments.shop.svc",reporter="source",source_workload="storefront"} 7
`
	if err := testutil.GatherAndCompare(r, strings.NewReader(want)); err != nil {
		t.Fatal(err)
	}
}

// Whatever callers send, the series are bounded and the totals are right.
func TestSeriesAreBounded(t *testing.T) {
	const beyond, each = 100, 3
	r := prometheus.NewRegistry()
	m := NewMetrics(r, node)
	in, out := m.Destination(false, "shop/payments:80"), m.Destination(true, "shop/cart:80")
	var wg sync.WaitGroup
	for range each { // at once: a series is registered once whoever comes first
		wg.Go(func() {
			for i := range (maxSeries + beyond) / 2 {
				in.Observe(Request{Status: 200, Peer: fmt.Sprintf("shop/caller-%d", i)}, time.Millisecond)
				out.Observe(Request{Status: i % 1000, Secure: i >= 1000}, time.Millisecond)
			}
		})
	}
	wg.Wait()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		series, total, over := 0, uint64(0), uint64(0)
		for _, s := range f.GetMetric() {
			n := uint64(s.GetCounter().GetValue())
			if s.GetHistogram() != nil {
				n = s.GetHistogram().GetSampleCount()
			}
			series++
			total += n
			if strings.Contains(s.String(), `"overflow"`) {
				over = n
			}
		}
		if total != each*(maxSeries+beyond) {
			t.Errorf("%s: %d requests; want %d", f.GetName(), total, each*(maxSeries+beyond))
		}
		if f.GetName() == "outrigger_requests_total" && (series != maxSeries+1 || over != each*beyond) {
			t.Errorf("%d series, %d requests in the overflow; want %d and one for the overflow with %d", series, over, maxSeries, each*beyond)
		}
	}
}

func TestObserveDoesNotAllocate(t *testing.T) {
	m := NewMetrics(prometheus.NewRegistry(), node)
	d := m.Destination(false, "shop/payments:80")
	observe := func() {
		d.Observe(Request{Status: 200}, 300*time.Microsecond)
		d.Observe(Request{Protocol: GRPC, Status: 200, GRPCStatus: 5, Flags: accesslog.UO | accesslog.URX, Secure: true, Peer: "shop/cart"}, 3*time.Millisecond)
		d.Attempt(true)
		d.TCPOpened()
		d.TCPClosed(1, 2)
	}
	if n := testing.AllocsPerRun(1000, observe); n != 0 {
		t.Errorf("%v allocations", n)
	}
	for i := range maxSeries { // and beyond the bound
		d.Observe(Request{Status: 1 + i}, time.Millisecond)
	}
	if n := testing.AllocsPerRun(1000, func() { d.Observe(Request{Status: 5000}, time.Millisecond) }); n != 0 {
		t.Errorf("%v allocations in the overflow", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	for _, bench := range []struct {
		name string
		r    Request
	}{
		{"anonymous", Request{Status: 200, GRPCStatus: -1}},
		{"peer", Request{Protocol: GRPC, Status: 200, Secure: true, Peer: "shop/storefront"}},
	} {
		d := NewMetrics(prometheus.NewRegistry(), node).Destination(false, "shop/payments:80")
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			took := time.Duration(0)
			for b.Loop() {
				took = (took + 997) & (1<<20 - 1)
				d.Observe(bench.r, took)
			}
		})
		b.Run(bench.name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				took := time.Duration(0)
				for pb.Next() {
					took = (took + 997) & (1<<20 - 1)
					d.Observe(bench.r, took)
				}
			})
		})
	}
}
