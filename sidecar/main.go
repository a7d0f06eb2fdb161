// Command sidecar is the ambassador beside an application: it carries the
// application's calls to other services and their calls to it, and gives each
// circuit breaking, retries, timeouts, balancing and telemetry.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/admin"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/xdsclient"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := runSidecar(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "sidecar:", err)
		os.Exit(1)
	}
}

// version is set by the linker.
var version = "dev"

type config struct {
	bootstrap.Config
	admin, metrics, health string
	stateDir               string
	drainTimeout           time.Duration
	readyTimeout           time.Duration
	otlpEndpoint           string
	otlpRatio              float64
	logLevel               slog.Level
}

func parse(args []string, stderr io.Writer) (config, error) {
	c := config{}
	fs := flag.NewFlagSet("sidecar", flag.ContinueOnError)
	fs.SetOutput(stderr)
	loopback := func(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
	fs.StringVar(&c.Namespace, "namespace", "default", "namespace of the workload")
	fs.StringVar(&c.Workload, "workload", "", "name of the workload (Deployment, StatefulSet, ...); required")
	fs.StringVar(&c.Instance, "instance", "", "name of the pod; default <workload>-0")
	fs.StringVar(&c.ServiceAccount, "service-account", "default", "service account of the workload")
	fs.StringVar(&c.TrustDomain, "trust-domain", "cluster.local", "SPIFFE trust domain")
	fs.StringVar(&c.ControlPlane, "control-plane", loopback(bootstrap.PortXDS), "host:port of the control plane's xDS server; in clear, so loopback only")
	fs.Func("upstream", "ambassador port <service>.<namespace>:<port>=<ip>:<port>; may be repeated", func(s string) error {
		u, err := bootstrap.ParseUpstream(s)
		c.Upstreams = append(c.Upstreams, u)
		return err
	})
	fs.Func("inbound", "port for other workloads [http:|tcp:]<ip>:<port>=<ip>:<port of the application>; may be repeated", func(s string) error {
		in, err := bootstrap.ParseInbound(s)
		c.Inbounds = append(c.Inbounds, in)
		return err
	})
	fs.StringVar(&c.admin, "admin-address", loopback(bootstrap.PortAdmin), "admin interface; keep it on loopback. Empty: none")
	fs.StringVar(&c.metrics, "metrics-address", loopback(bootstrap.PortMetrics), "Prometheus metrics. Empty: none")
	fs.StringVar(&c.health, "health-address", loopback(bootstrap.PortHealth), "readiness. Empty: none")
	fs.StringVar(&c.stateDir, "state-dir", "", "folder for the last good configuration, from which a restart without control plane starts. Empty: none")
	fs.DurationVar(&c.drainTimeout, "drain-timeout", 10*time.Second, "how long requests in flight may take after SIGTERM")
	fs.DurationVar(&c.readyTimeout, "ready-timeout", 0, "give up when not configured by then; 0 waits for ever, not ready")
	fs.StringVar(&c.otlpEndpoint, "otlp-endpoint", "", "OTLP/HTTP endpoint for spans, for example http://127.0.0.1:4318. Empty: none")
	fs.Float64Var(&c.otlpRatio, "trace-ratio", 0.01, "share of the traces that begin here and are sampled, 0 to 1")
	fs.TextVar(&c.logLevel, "log-level", slog.LevelInfo, "debug, info, warn or error")
	showVersion := fs.Bool("version", false, "print the version and exit")
	if err := fs.Parse(args); err != nil {
		return c, err
	}
	if *showVersion {
		fmt.Fprintln(stderr, "sidecar", version)
		return c, flag.ErrHelp
	}
	if fs.NArg() > 0 {
		return c, fmt.Errorf("unexpected argument %q: every option begins with --", fs.Arg(0))
	}
	if c.Workload == "" {
		return c, errors.New("--workload is empty: name the workload that this sidecar stands beside")
	}
	if c.Instance == "" {
		c.Instance = c.Workload + "-0"
	}
	if c.otlpRatio < 0 || c.otlpRatio > 1 {
		return c, fmt.Errorf("--trace-ratio %v is not a share: write a number from 0 to 1", c.otlpRatio)
	}
	return c, c.Validate()
}

// collectAt keeps the heap of an idle sidecar small: it collects when the heap
// has grown by this percentage, which costs little because the hot path
// allocates next to nothing.
const collectAt = 50

func runSidecar(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cfg, err := parse(args, stderr)
	if err != nil {
		return err
	}
	debug.SetGCPercent(collectAt)
	log := slog.New(slog.NewJSONHandler(stderr, &slog.HandlerOptions{Level: cfg.logLevel, ReplaceAttr: record.ECS})).With("service.name", cfg.Workload, "event.dataset", "outrigger.sidecar")

	// What is known and counted.
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	var current table.Current
	access := accesslog.New(cfg.Namespace, cfg.Workload, cfg.Instance)
	metrics := telemetry.NewMetrics(registry, cfg.Config)
	events := &events{log: log, access: access, metrics: metrics}
	clusters := upstream.New(newEvidenceID, events.breaker, events.ejection)
	registry.MustRegister(admin.Gauges{Clusters: clusters})
	registerQueues(registry, access)
	var spans *telemetry.Spans
	if cfg.otlpEndpoint != "" {
		if spans, err = telemetry.NewSpans(ctx, cfg.otlpEndpoint, cfg.otlpRatio, cfg.Config); err != nil {
			return fmt.Errorf("--otlp-endpoint %q: %w", cfg.otlpEndpoint, err)
		}
	}

	// Who tells us, and who carries.
	state := ""
	if cfg.stateDir != "" {
		if err := os.MkdirAll(cfg.stateDir, 0o700); err != nil {
			return fmt.Errorf("--state-dir: %w", err)
		}
		state = filepath.Join(cfg.stateDir, cfg.Instance+".xds")
	}
	client := xdsclient.New(xdsclient.Options{Address: cfg.ControlPlane, Node: cfg.Config, StateFile: state, Table: &current, Log: log, Registerer: registry})
	for _, u := range cfg.Upstreams {
		if err := client.Want(u.Key()); err != nil {
			return err
		}
	}
	conns := &listener.Group{}
	carrier := &proxy.Proxy{Node: cfg.Config, Table: &current, Clusters: clusters, Conns: conns, Log: access, Metrics: metrics, Spans: spans, Events: log}

	// Everything that can fail has failed before the first goroutine starts.
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	operators := &admin.Server{
		Table: &current, Clusters: clusters, Metrics: registry, Control: func() any { return client.Status() }, Drain: quit, Quit: quit,
		Ready: func() error { return readiness(client, conns, cfg.ControlPlane) },
	}
	binder := binder{}
	defer binder.closeUnused()
	outbound := map[bootstrap.Upstream]*net.TCPListener{}
	for _, u := range cfg.Upstreams {
		outbound[u] = binder.bind(u.Listen.String(), "--upstream "+u.String())
	}
	inbound := map[bootstrap.Inbound]*net.TCPListener{}
	for _, in := range cfg.Inbounds {
		inbound[in] = binder.bind(in.Listen.String(), "--inbound "+in.String())
	}
	adminListener := binder.bind(cfg.admin, "--admin-address")
	metricsListener := binder.bind(cfg.metrics, "--metrics-address")
	healthListener := binder.bind(cfg.health, "--health-address")
	if binder.err != nil {
		return binder.err
	}

	var g run.Group
	// The group stops all when the first returns, in no order; what must outlive
	// the others (the log, the control plane's word) gets a context of its own
	// that ends after the drain.
	late, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var lateOnes sync.WaitGroup
	lateOnes.Go(func() { _ = access.Run(late, stdout) })
	lateOnes.Go(func() { _ = clusters.Run(late, &current) })

	actor := func(f func(context.Context) error) {
		actx, cancel := context.WithCancel(ctx)
		g.Add(func() error { return f(actx) }, func(error) { cancel() })
	}
	actor(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	actor(client.Run)
	for u, l := range outbound {
		actor(func(ctx context.Context) error { return carrier.ServeOutbound(ctx, l, u.Key()) })
	}
	for in, l := range inbound {
		actor(func(ctx context.Context) error { return carrier.ServeInbound(ctx, l, in) })
	}
	for l, h := range map[*net.TCPListener]http.Handler{adminListener: operators.Admin(), metricsListener: operators.Scrape(), healthListener: operators.Health()} {
		if l != nil {
			actor(func(ctx context.Context) error { return serveHTTP(ctx, l, h) })
		}
	}
	if cfg.readyTimeout > 0 {
		actor(func(ctx context.Context) error {
			select {
			case <-client.Ready():
				<-ctx.Done()
				return ctx.Err()
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(cfg.readyTimeout):
				return fmt.Errorf("not configured within --ready-timeout %s: %w", cfg.readyTimeout, readiness(client, conns, cfg.ControlPlane))
			}
		})
	}
	log.Info("sidecar started", "version", version, "control_plane", cfg.ControlPlane, "upstreams", len(cfg.Upstreams), "inbounds", len(cfg.Inbounds))
	for name, layers := range proxy.Layers() {
		log.Debug("path", "direction", name, "layers", layers)
	}
	err = g.Run()

	// Nothing new is accepted from here on.
	drain, stop := context.WithTimeout(context.WithoutCancel(ctx), cfg.drainTimeout)
	defer stop()
	forced := conns.Drain(drain)
	end()
	lateOnes.Wait()
	if err := spans.Shutdown(drain); err != nil {
		log.Warn("the last spans were not exported", "error.message", err.Error())
	}
	log.Info("sidecar stopped", "connections_cut", forced)
	return err
}

func readiness(client *xdsclient.Client, conns *listener.Group, address string) error {
	if conns.Draining() {
		return errors.New("draining")
	}
	select {
	case <-client.Ready():
		return nil
	default:
		return fmt.Errorf("waiting for configuration from the control plane at %s", address)
	}
}

// binder binds listeners and remembers the first error.
type binder struct {
	bound []*net.TCPListener
	err   error
}

func (b *binder) bind(address, purpose string) *net.TCPListener {
	if b.err != nil || address == "" {
		return nil
	}
	l, err := listener.Listen(address, purpose)
	if err != nil {
		b.err = err
		return nil
	}
	b.bound = append(b.bound, l)
	return l
}

// closeUnused closes what an error left without a server; a listener that was
// served is closed already.
func (b *binder) closeUnused() {
	for _, l := range b.bound {
		_ = l.Close()
	}
}

func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	stop := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if s.Shutdown(end) != nil {
			_ = s.Close()
		}
	})
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", l.Addr(), err)
	}
	return ctx.Err()
}

func registerQueues(r prometheus.Registerer, access *accesslog.Log) {
	count := func(name, help string, f func() uint64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f()) }))
	}
	count("outrigger_access_log_dropped_total", "Access log lines dropped because the queue of "+strconv.Itoa(accesslog.Queue)+" was full.", access.Dropped)
	count("outrigger_access_log_failed_total", "Access log lines that could not be written.", access.Failed)
}

func newEvidenceID() string {
	var t telemetry.TraceContext
	t.Begin(nil, false)
	return "br-" + strings.ToLower(string(t.SpanID[:10]))
}
