package program

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Limits of an operator's endpoint.
const (
	readTimeout = 5 * time.Second
	idleTimeout = 60 * time.Second
	maxHeader   = 16 << 10
	stopTimeout = 3 * time.Second
	// maxConnections at once; more wait to be accepted.
	maxConnections = 256
	// maxScrapes at once; more are answered 503.
	maxScrapes = 4
)

// ErrNotLoopback says that an address would show a network what is for this
// machine only.
var ErrNotLoopback = errors.New("only a loopback address may be used, because it is served in clear and to anyone")

// Listen binds address for what, which is the flag or field that gave it. The
// error names both and the remedy.
func Listen(ctx context.Context, what, address string) (*net.TCPListener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s %s is in use by another program: stop that one, or give this one another port: %w", what, address, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", what, address, err)
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, fmt.Errorf("%s %s is not a TCP address", what, address)
	}
	return tcp, nil
}

// ListenLoopback is Listen for what must not leave the machine.
func ListenLoopback(ctx context.Context, what, address string) (*net.TCPListener, error) {
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w; write <ip>:<port>", what, address, err)
	}
	if !a.IP.IsLoopback() {
		return nil, fmt.Errorf("%s %s: %w; write for example 127.0.0.1:%d", what, address, ErrNotLoopback, a.Port)
	}
	return Listen(ctx, what, address)
}

// Serve serves h on l until ctx ends. Requests that run then get three seconds;
// their contexts end with ctx, so that streams end. It closes l, and returns nil
// where the end was in order.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	s := &http.Server{
		Handler: h, ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(netutil.LimitListener(l, maxConnections)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
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

// Operate adds /healthz, /ready and /metrics to mux. ready says why the program
// does not work, and nil when it does.
func Operate(mux *http.ServeMux, ready func() error, g prometheus.Gatherer, log *slog.Logger) {
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { Answer(w, log, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			Answer(w, log, http.StatusServiceUnavailable, "not ready: "+err.Error()+"\n")
			return
		}
		Answer(w, log, http.StatusOK, "ready\n")
	})
	mux.Handle("GET /metrics", Metrics(g, log))
}

// Metrics serves what g gathers, in the format that the scraper asks for.
func Metrics(g prometheus.Gatherer, log *slog.Logger) http.Handler {
	return promhttp.HandlerFor(g, promhttp.HandlerOpts{
		EnableOpenMetrics: true, MaxRequestsInFlight: maxScrapes, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	})
}

// Answer writes a short answer; its content type is text unless one is set.
func Answer(w http.ResponseWriter, log *slog.Logger, status int, body string) {
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	}
	w.WriteHeader(status)
	if _, err := io.WriteString(w, body); err != nil {
		log.Debug("a client of the admin endpoint went away", "error.message", err.Error())
	}
}
