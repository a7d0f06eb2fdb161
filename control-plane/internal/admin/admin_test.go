package admin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/admin"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/program"
)

func shop() *mesh.Mesh {
	return &mesh.Mesh{TrustDomain: "cluster.local", Services: []mesh.Service{{
		Namespace: "shop", Name: "payments",
		Ports: []mesh.Port{{
			Number: 80, Protocol: mesh.HTTP1,
			Routes:    []mesh.Route{{Name: "default", Backends: []mesh.Backend{{Namespace: "shop", Service: "payments", Port: 80, Weight: 1}}}},
			Endpoints: []mesh.Endpoint{{Address: netip.MustParseAddrPort("127.0.0.1:9"), Instance: "payments-0", Ready: true}},
			Breaker: &mesh.CircuitBreaker{
				Policy: "shop/payments", Observe: true,
				Trip: &mesh.Trip{ConsecutiveFailures: 5, Window: 10 * time.Second, MinimumRequests: 20, OpenFor: 15 * time.Second},
			},
		}, {
			Number: 443, Protocol: mesh.TLS, OnlyServerNames: true, ServerNames: []mesh.ServerName{
				{Name: "a.example", Route: "shop/a", Backends: []mesh.Backend{{Namespace: "shop", Service: "payments", Port: 443, Weight: 1}}},
				{Name: "*.example", Route: "shop/b"},
			},
		}},
	}}}
}

func TestPages(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_test", Help: "x"}))
	ready := errors.New("no mesh has been built yet")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- program.Serve(ctx, lis, admin.Handler(admin.Options{
			Log: slog.New(slog.DiscardHandler), Gatherer: reg,
			Ready:    func() error { return ready },
			Mesh:     shop,
			Problems: func() any { return []string{"p"} },
			Proxies:  func() any { return map[string]int{"n": 1} },
			XDS:      func() (any, error) { return nil, errors.New("cannot render") },
		}), slog.New(slog.DiscardHandler))
	}()
	f := func(path string, status int, want string) {
		t.Helper()
		resp, err := http.Get("http://" + lis.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != status || !strings.Contains(string(b), want) {
			t.Errorf("%s: %d %q, want %d with %q", path, resp.StatusCode, b, status, want)
		}
	}
	f("/healthz", 200, "ok")
	f("/ready", 503, "no mesh has been built yet")
	f("/metrics", 200, "outrigger_test 0")
	f("/debug/mesh", 200, "shop/payments:80  http\n  route default: -> shop/payments:80*1\n")
	f("/debug/mesh", 200, "circuit breaker shop/payments Observe: trips after 5 failures in a row; over 10s, of 20 requests; open for 15s;\n  endpoint 127.0.0.1:9 ready instance=payments-0\n")
	f("/debug/mesh", 200, "shop/payments:443  tls\n  server name a.example of TLSRoute shop/a: -> shop/payments:443*1\n"+
		"  server name *.example of TLSRoute shop/b: -> refused, no backend\n  other server names: refused\n")
	f("/debug/problems", 200, `"p"`)
	f("/debug/proxies", 200, `"n": 1`)
	f("/debug/xds", 500, "cannot render")
	f("/nothing", 404, "")
	http.DefaultClient.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
