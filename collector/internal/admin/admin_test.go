package admin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/admin"
	"github.com/outrigger-mesh/outrigger/program"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestServe(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	var notReady error
	serve := func(store http.Handler) (base string, stop func()) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		reg := prometheus.NewRegistry()
		reg.MustRegister(prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_test_total", Help: "x"}))
		h := admin.Handler(admin.Options{
			Log: log, Gatherer: reg, Store: store,
			Ready: func() error { return notReady },
			Audit: func() any { return map[string]int{"pending": 3} },
			Why:   func() any { return nil }, Cost: func() any { return nil },
		})
		go func() { done <- program.Serve(ctx, l, h, log) }()
		return "http://" + l.Addr().String(), func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	f := func(method, url string, status int, contains string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r.Body)
		if err := errors.Join(err, r.Body.Close()); err != nil {
			t.Fatal(err)
		}
		if r.StatusCode != status || !strings.Contains(string(b), contains) {
			t.Errorf("%s %s: %d %s; want %d and %q", method, url, r.StatusCode, b, status, contains)
		}
	}
	base, stop := serve(nil)
	f("GET", base+"/ready", 200, "ready")
	f("GET", base+"/healthz", 200, "ok")
	f("GET", base+"/metrics", 200, "outrigger_test_total 0")
	f("GET", base+"/api/v1/audit", 200, `"pending": 3`)
	f("POST", base+"/api/v1/audit", 404, "")
	f("POST", base+"/ready", 405, "")
	f("GET", base+"/api/v1/logs", 404, "kind store")
	notReady = errors.New("no folder")
	f("GET", base+"/ready", 503, "no folder")
	stop()

	base, stop = serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "store "+r.URL.Path) }))
	f("GET", base+"/api/v1/logs?query=x", 200, "store /api/v1/logs")
	f("GET", base+"/api/v1/evidence/7", 200, "store /api/v1/evidence/7")
	f("GET", base+"/api/v1/audit", 200, `"pending": 3`)
	stop()
}
