package admin

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// asked makes a probe as kubelet would ask for it.
func asked(t *testing.T, ps *Probes, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	(&Server{Probes: ps, Log: slog.New(slog.DiscardHandler)}).Health().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
	return w.Code, w.Body.String()
}

func portOf(t *testing.T, address string) uint16 {
	t.Helper()
	a, err := netip.ParseAddrPort(strings.TrimPrefix(strings.TrimPrefix(address, "http://"), "https://"))
	if err != nil {
		t.Fatal(err)
	}
	return a.Port()
}

func TestProbesDoWhatKubeletWouldDo(t *testing.T) {
	app := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from, _, _ := net.SplitHostPort(r.RemoteAddr)
		if from != "127.0.0.6" {
			t.Errorf("the probe came from %s", from)
		}
		switch r.URL.Path {
		case "/well":
			if r.Host != "app.example" || r.Header.Get("X-Probe") != "yes" || !strings.HasPrefix(r.UserAgent(), "kube-probe/") || r.URL.RawQuery != "deep=1" {
				t.Errorf("%s %s %v", r.Host, r.URL, r.Header)
			}
			_, _ = w.Write(make([]byte, 64<<10)) // more than is read
		case "/elsewhere":
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		case "/slow":
			<-r.Context().Done()
		default:
			w.WriteHeader(http.StatusTeapot)
		}
	})
	plain, secure := httptest.NewServer(app), httptest.NewTLSServer(app)
	defer plain.Close()
	defer secure.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g, states := grpc.NewServer(), health.NewServer()
	states.SetServingStatus("pay", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	grpc_health_v1.RegisterHealthServer(g, states)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()

	http1, https, rpc := portOf(t, plain.URL), portOf(t, secure.URL), portOf(t, l.Addr().String())
	at := func(path string) bootstrap.Probe {
		return bootstrap.Probe{HTTP: &bootstrap.HTTPProbe{Port: http1, Path: path}, TimeoutSeconds: 5}
	}
	well := bootstrap.HTTPProbe{Port: http1, Path: "/well?deep=1", Host: "ignored", Headers: map[string][]string{"host": {"app.example"}, "x-probe": {"yes"}}}
	wellTLS := well
	wellTLS.Port, wellTLS.Scheme = https, "HTTPS"
	slow := at("/slow")
	slow.TimeoutSeconds = 1
	ps := NewProbes(map[string]bootstrap.Probe{
		"/app-health/a/livez":      {HTTP: &well, TimeoutSeconds: 5},
		"/app-health/tls/livez":    {HTTP: &wellTLS, TimeoutSeconds: 5},
		"/app-health/moved/livez":  at("/elsewhere"),
		"/app-health/ill/livez":    at("/ill"),
		"/app-health/slow/livez":   slow,
		"/app-health/tcp/readyz":   {TCP: &bootstrap.TCPProbe{Port: http1}, TimeoutSeconds: 5},
		"/app-health/shut/readyz":  {TCP: &bootstrap.TCPProbe{Port: 1}, TimeoutSeconds: 5},
		"/app-health/rpc/startupz": {GRPC: &bootstrap.GRPCProbe{Port: rpc}, TimeoutSeconds: 5},
		"/app-health/pay/startupz": {GRPC: &bootstrap.GRPCProbe{Port: rpc, Service: "pay"}, TimeoutSeconds: 5},
		"/app-health/none/livez":   {GRPC: &bootstrap.GRPCProbe{Port: rpc, Service: "unheard"}, TimeoutSeconds: 5},
	}, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.6"))
	f := func(path string, want int, says string) {
		t.Helper()
		if got, body := asked(t, ps, path); got != want || !strings.Contains(body, says) {
			t.Errorf("%s: %d %q; want %d and %q", path, got, body, want, says)
		}
	}
	f("/app-health/a/livez", 200, "ok")
	f("/app-health/tls/livez", 200, "ok")
	f("/app-health/moved/livez", 200, "ok")
	f("/app-health/ill/livez", 503, "status 418")
	f("/app-health/tcp/readyz", 200, "ok")
	f("/app-health/shut/readyz", 503, "refused")
	f("/app-health/rpc/startupz", 200, "ok")
	f("/app-health/pay/startupz", 503, "NOT_SERVING")
	f("/app-health/none/livez", 503, "unknown service")
	f("/app-health/a/readyz", 404, bootstrap.EnvProbes)
	f("/app-health/", 404, bootstrap.EnvProbes)
	began := time.Now()
	f("/app-health/slow/livez", 503, "deadline")
	if took := time.Since(began); took < time.Second || took > 30*time.Second {
		t.Errorf("the probe's timeout of 1 s took %s", took)
	}
}

func TestOneProbeOfAKindIsMadeAtATime(t *testing.T) {
	var calls atomic.Int32
	begun, release := make(chan bool, 10), make(chan bool)
	app := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		calls.Add(1)
		begun <- true
		<-release
	}))
	defer app.Close()
	ps := NewProbes(map[string]bootstrap.Probe{"/app-health/a/livez": {HTTP: &bootstrap.HTTPProbe{Port: portOf(t, app.URL), Path: "/"}, TimeoutSeconds: 60}},
		netip.MustParseAddr("127.0.0.1"), netip.Addr{})
	results := make(chan int, 5)
	ask := func() { code, _ := asked(t, ps, "/app-health/a/livez"); results <- code }
	go ask()
	<-begun
	// Who leaves does not end it for the others.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := ps.probe(ctx, "/app-health/a/livez", bootstrap.Probe{}); err == nil {
		t.Error("a caller that has left got an answer")
	}
	for range 4 {
		go ask()
	}
	select {
	case <-begun:
		t.Error("a second probe was made")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	for range 5 {
		if code := <-results; code != 200 {
			t.Errorf("%d", code)
		}
	}
	if n := calls.Load(); n > 5 {
		t.Errorf("%d probes", n)
	}
}
