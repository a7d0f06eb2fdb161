// Package admin is the collector's window for people and for Prometheus:
// readiness, metrics, the audit of the logs, and the embedded store's search.
//
// It knows HTTP; what it shows comes from functions and handlers that main hands
// it. It serves loopback only, because the store shows every log of the node.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Limits of a server.
const (
	MaxConnections = 128 // more wait to be accepted
	maxScrapes     = 4   // at once; more are answered 503
	maxHeader      = 16 << 10
	readTimeout    = 5 * time.Second
	writeTimeout   = 30 * time.Second // of what is not streamed
	idleTimeout    = 2 * time.Minute
	stopTimeout    = 3 * time.Second
)

// ErrNotLoopback says that logs would be shown to a network.
var ErrNotLoopback = errors.New("the admin endpoint is served on loopback only")

// CheckAddress refuses an address that is not loopback.
func CheckAddress(a net.Addr) error {
	if t, ok := a.(*net.TCPAddr); ok && t.IP.IsLoopback() {
		return nil
	}
	return fmt.Errorf("%w: %s is not; write 127.0.0.1:15030", ErrNotLoopback, a)
}

// Options are what is shown. Functions are called once a request, from any
// goroutine.
type Options struct {
	Log      *slog.Logger
	Gatherer prometheus.Gatherer
	// Ready says why the collector does not work; nil when it does.
	Ready func() error
	// Audit is rendered as JSON.
	Audit func() any
	// Store serves all else under /api/v1/; nil where there is no store. It
	// bounds its own answers in time, since some are streams.
	Store http.Handler
}

// Handler serves /healthz, /ready, /metrics, /api/v1/audit and the store.
func Handler(o Options) http.Handler {
	own := http.NewServeMux()
	own.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(o.Log, w, http.StatusOK, "ok\n") })
	own.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Ready(); err != nil {
			answer(o.Log, w, http.StatusServiceUnavailable, "not ready: "+err.Error()+"\n")
			return
		}
		answer(o.Log, w, http.StatusOK, "ready\n")
	})
	own.Handle("GET /metrics", promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes, ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
	}))
	own.HandleFunc("GET /api/v1/audit", func(w http.ResponseWriter, _ *http.Request) {
		b, err := json.MarshalIndent(o.Audit(), "", "  ")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		answer(o.Log, w, http.StatusOK, string(b)+"\n")
	})
	bounded := http.TimeoutHandler(own, writeTimeout, "timed out\n")
	mux := http.NewServeMux()
	mux.Handle("/", bounded)
	mux.Handle("GET /api/v1/audit", bounded)
	if o.Store != nil {
		mux.Handle("/api/v1/", o.Store)
	} else {
		mux.HandleFunc("/api/v1/", func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, fmt.Sprintf("%s needs an output of kind store, and the configuration has none", r.URL.Path), http.StatusNotFound)
		})
	}
	return mux
}

func answer(log *slog.Logger, w http.ResponseWriter, status int, body string) {
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	}
	w.WriteHeader(status)
	if _, err := w.Write([]byte(body)); err != nil {
		log.Debug("admin client went away", "error.message", err.Error())
	}
}

// Serve serves h on l until ctx ends. Requests that are under way then get a
// few seconds; streams are cut. It closes l.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readTimeout,
		ReadTimeout:       readTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		// Streams end with the server.
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(netutil.LimitListener(l, MaxConnections)) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serving %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err := s.Shutdown(sctx)
	if err != nil {
		err = s.Close()
	}
	if e := <-ended; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}
