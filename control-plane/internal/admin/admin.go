// Package admin is the control plane's window for people and for Prometheus:
// readiness, metrics, and what is in force.
//
// It knows HTTP and how to render; it is handed functions that return what to
// show. It serves loopback only, because what it shows is the configuration of
// the whole mesh. Its caller is main.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Options are what is shown. The functions are called once a request, from any
// goroutine. What they return is rendered as JSON.
type Options struct {
	Log      *slog.Logger
	Gatherer prometheus.Gatherer
	// Ready says why the control plane cannot serve yet; nil when it can.
	Ready func() error
	// Mesh in force; nil before the first build.
	Mesh func() *mesh.Mesh
	// Problems of the objects.
	Problems func() any
	// Proxies: who is connected and has applied what.
	Proxies func() any
	// XDS: all that is served.
	XDS func() (any, error)
}

const (
	readTimeout  = 5 * time.Second
	writeTimeout = 30 * time.Second
	idleTimeout  = 60 * time.Second
	maxHeader    = 16 << 10
	stopTimeout  = 3 * time.Second
	// maxScrapes at once; more are answered 503.
	maxScrapes = 4
)

// ErrNotLoopback says that the configuration would be shown to a network.
var ErrNotLoopback = errors.New("the admin endpoint is served on loopback only")

// CheckAddress refuses an address that is not loopback.
func CheckAddress(a net.Addr) error {
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsLoopback() {
		return nil
	}
	return fmt.Errorf("%w: %s is not; listen on 127.0.0.1:15014", ErrNotLoopback, a)
}

// Handler serves /ready, /healthz, /metrics and /debug/{mesh,problems,proxies,xds}.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { text(o.Log, w, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Ready(); err != nil {
			text(o.Log, w, http.StatusServiceUnavailable, "not ready: "+err.Error()+"\n")
			return
		}
		text(o.Log, w, http.StatusOK, "ready\n")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes, ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /debug/mesh", func(w http.ResponseWriter, _ *http.Request) {
		text(o.Log, w, http.StatusOK, Describe(o.Mesh()))
	})
	show := func(get func() any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { object(o.Log, w, get()) }
	}
	mux.HandleFunc("GET /debug/problems", show(o.Problems))
	mux.HandleFunc("GET /debug/proxies", show(o.Proxies))
	mux.HandleFunc("GET /debug/xds", func(w http.ResponseWriter, _ *http.Request) {
		v, err := o.XDS()
		if err != nil {
			text(o.Log, w, http.StatusInternalServerError, err.Error()+"\n")
			return
		}
		object(o.Log, w, v)
	})
	return mux
}

func object(log *slog.Logger, w http.ResponseWriter, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		text(log, w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	write(log, w, string(b)+"\n")
}

func text(log *slog.Logger, w http.ResponseWriter, status int, s string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	write(log, w, s)
}

func write(log *slog.Logger, w io.Writer, s string) {
	if _, err := io.WriteString(w, s); err != nil {
		log.Debug("admin client went away", "error.message", err.Error())
	}
}

// Serve answers on lis, which it closes, until ctx ends, and returns nil once
// the requests that run have ended, 3 s later at most.
func Serve(ctx context.Context, lis net.Listener, o Options) error {
	if err := CheckAddress(lis.Addr()); err != nil {
		return errors.Join(err, lis.Close())
	}
	s := &http.Server{
		Handler: Handler(o), ReadTimeout: readTimeout, ReadHeaderTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(lis) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve admin on %s: %w", lis.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err := s.Shutdown(stop)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.Close()
	}
	if end := <-served; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	return err
}
