// Command sidecar is the ambassador beside an application: it carries the
// application's calls to other services and their calls to it, and gives each
// circuit breaking, retries, timeouts, balancing and telemetry.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/admin"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/overload"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/reporter"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/sds"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/xdsclient"
)

func main() { program.Main("sidecar", runSidecar) }

type config struct {
	program.Flags
	bootstrap.Config
	admin, metrics, health string
	stateDir               string
	drainTimeout           time.Duration
	drainMinimum           time.Duration
	exitWhenAlone          bool
	probes                 map[string]bootstrap.Probe
	readyTimeout           time.Duration
	otlpEndpoint           string
	otlpRatio              float64
	memory                 overload.Limit

	controlPlaneCA, joinToken string
	sds                       string

	envoyBootstrap, envoyAdmin string
	waitReady                  time.Duration
}

// hasIdentity: the sidecar gets a certificate from the authority.
func (c config) hasIdentity() bool { return c.joinToken != "" }

func parse(args []string, stdout, stderr io.Writer) (config, error) {
	c := config{}
	fs := flag.NewFlagSet("sidecar", flag.ContinueOnError)
	fs.SetOutput(stderr)
	loopback := func(port int) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(port)) }
	fs.StringVar(&c.Namespace, "namespace", "default", "namespace of the workload")
	fs.StringVar(&c.Workload, "workload", "", "name of the workload (Deployment, StatefulSet, ...); required")
	fs.StringVar(&c.Instance, "instance", "", "name of the pod; default <workload>-0")
	fs.StringVar(&c.ServiceAccount, "service-account", "default", "service account of the workload")
	fs.StringVar(&c.TrustDomain, "trust-domain", "cluster.local", "SPIFFE trust domain")
	fs.StringVar(&c.ControlPlane, "control-plane", loopback(bootstrap.PortXDS), "host:port of the control plane's xDS server; loopback only where it is reached in clear, without --control-plane-ca")
	fs.StringVar(&c.controlPlaneCA, "control-plane-ca", "", "file with the roots (PEM) of the control plane's certificate; configuration and certificates are then fetched over TLS. Needs --join-token-file")
	fs.StringVar(&c.joinToken, "join-token-file", "", "file with the token that proves the workload to the authority at first contact, read at every use. Needs --control-plane-ca")
	fs.StringVar(&c.MTLS, "mtls", "", "mutual TLS of --inbound ports: off, permissive (other workloads use it, clear text is taken too) or strict. Default permissive with --join-token-file, else off")
	fs.StringVar(&c.sds, "sds-address", "", "serve the workload's certificate and key by SDS to an Envoy beside it, at unix:///<path> (made with mode 0600) or a loopback address. Empty: not")
	fs.StringVar(&c.envoyBootstrap, "write-envoy-bootstrap", "", "be the agent of an Envoy: write its bootstrap to this file, serve its certificate at --sds-address and answer for it at --health-address (/ready, and /agent-ready without it), and carry nothing")
	fs.StringVar(&c.envoyAdmin, "envoy-admin-address", loopback(bootstrap.PortAdmin), "with --write-envoy-bootstrap: the Envoy's admin interface, on loopback")
	fs.DurationVar(&c.waitReady, "wait-ready", 0, "wait this long at most for the sidecar at --health-address to be ready, and end: 0 if it is, else 1")
	fs.Func("upstream", "ambassador port <service>.<namespace>:<port>=<ip>:<port>; may be repeated", func(s string) error {
		u, err := bootstrap.ParseUpstream(s)
		c.Upstreams = append(c.Upstreams, u)
		return err
	})
	fs.Func("inbound", "port for other workloads [http:|tcp:|tls:|auto:]<ip>:<port>=<ip>:<port of the application>; may be repeated", func(s string) error {
		in, err := bootstrap.ParseInbound(s)
		c.Inbounds = append(c.Inbounds, in)
		return err
	})
	fs.BoolVar(&c.Capture, "capture", false, "serve the pod's traffic that netinit redirects to ports "+strconv.Itoa(bootstrap.PortOutbound)+" and "+strconv.Itoa(bootstrap.PortInbound)+"; what is asked of callers is then said by the control plane. Needs --pod-ips")
	fs.Func("pod-ips", "addresses of the pod, separated by commas, as the downward API's status.podIPs says them", func(s string) (err error) {
		c.Addresses, err = parseAddresses(s)
		return err
	})
	fs.BoolVar(&c.exitWhenAlone, "exit-when-alone", false, "drain and end once processes of other containers have been seen and all have gone, so that a Job completes; for a pod with shareProcessNamespace")
	fs.StringVar(&c.admin, "admin-address", loopback(bootstrap.PortAdmin), "admin interface; keep it on loopback. Empty: none")
	fs.StringVar(&c.metrics, "metrics-address", loopback(bootstrap.PortMetrics), "Prometheus metrics. Empty: none")
	fs.StringVar(&c.health, "health-address", loopback(bootstrap.PortHealth), "readiness. Empty: none")
	fs.StringVar(&c.stateDir, "state-dir", "", "folder for the last good configuration, from which a restart without control plane starts. Empty: none")
	fs.DurationVar(&c.drainTimeout, "drain-timeout", 10*time.Second, "how long requests in flight may take after SIGTERM")
	fs.DurationVar(&c.drainMinimum, "drain-minimum", 0, "with --capture: how long after SIGTERM connections are accepted at least, for an application that ends at the same time; with --exit-when-alone it is until the application has ended. Not more than --drain-timeout")
	fs.DurationVar(&c.readyTimeout, "ready-timeout", 0, "give up when not configured by then; 0 waits for ever, not ready")
	fs.StringVar(&c.otlpEndpoint, "otlp-endpoint", "", "OTLP/HTTP endpoint for spans, for example http://127.0.0.1:4318. Empty: none")
	fs.Float64Var(&c.otlpRatio, "trace-ratio", 0.01, "share of the traces that begin here and are sampled, 0 to 1")
	memory := fs.String("memory-limit", "", "memory in bytes, with Ki, Mi or Gi: requests are shed from 90 % on, connections refused from 95 % on. Empty: the limit of the cgroup; none: no limit")
	c.Register(fs)
	if err := c.Parse(fs, args, stdout); err != nil {
		return c, err
	}
	if c.waitReady > 0 {
		return c, nil // nothing else counts
	}
	var err error
	if c.memory, err = overload.ParseLimit(*memory); err != nil {
		return c, fmt.Errorf("--memory-limit %w", err)
	}
	if c.Workload == "" {
		return c, errors.New("--workload is empty: name the workload that this sidecar stands beside")
	}
	if c.Instance == "" {
		c.Instance = c.Workload + "-0"
	}
	if host, _, err := net.SplitHostPort(c.ControlPlane); err != nil {
		return c, fmt.Errorf("--control-plane %q is not host:port: %w", c.ControlPlane, err)
	} else if ip := net.ParseIP(host); c.controlPlaneCA == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return c, fmt.Errorf("--control-plane %s is not on this machine: configuration is not fetched in clear over a network; give --control-plane-ca and --join-token-file to fetch it over TLS, or use a loopback address", c.ControlPlane)
	}
	switch {
	case c.controlPlaneCA == "" && c.joinToken != "":
		return c, errors.New("--join-token-file needs --control-plane-ca: a token is sent to nobody who has not proved to be the control plane; give the authority's root.crt")
	case c.controlPlaneCA != "" && c.joinToken == "":
		return c, errors.New("--control-plane-ca needs --join-token-file: over TLS the control plane wants to know whose sidecar it is; write what control-plane --join-token prints into a file")
	case !c.hasIdentity() && (c.MTLS == bootstrap.MTLSPermissive || c.MTLS == bootstrap.MTLSStrict):
		return c, fmt.Errorf("--mtls %s needs a certificate: give --control-plane-ca and --join-token-file", c.MTLS)
	case !c.hasIdentity() && c.sds != "":
		return c, fmt.Errorf("--sds-address %s needs a certificate: give --control-plane-ca and --join-token-file", c.sds)
	case c.envoyBootstrap != "" && c.sds == "":
		return c, errors.New("--write-envoy-bootstrap needs --sds-address: where the Envoy gets its certificate")
	case c.Capture && len(c.Addresses) == 0:
		return c, errors.New("--capture needs --pod-ips: only what was sent to the pod's own addresses is served; give it status.podIPs of the downward API")
	case c.Capture && len(c.Inbounds) > 0:
		return c, errors.New("--capture and --inbound: the pod's ports are served as the control plane says; leave --inbound out")
	case c.Capture && c.MTLS != "":
		return c, fmt.Errorf("--mtls %s with --capture: what is asked of callers is said by the control plane; set the annotation outrigger.dev/mtls of the pod or the label of its namespace", c.MTLS)
	case c.Capture:
	case c.MTLS == "" && c.hasIdentity():
		c.MTLS = bootstrap.MTLSPermissive
	case c.MTLS == "":
		c.MTLS = bootstrap.MTLSOff
	}
	if c.drainMinimum < 0 || c.drainMinimum > c.drainTimeout {
		return c, fmt.Errorf("--drain-minimum %s is not between 0 and --drain-timeout %s", c.drainMinimum, c.drainTimeout)
	}
	if c.probes, err = bootstrap.ParseProbes(os.Getenv(bootstrap.EnvProbes)); err != nil {
		return c, err
	}
	if len(c.probes) > 0 && len(c.Addresses) == 0 {
		return c, fmt.Errorf("%s needs --pod-ips: probes are made at the pod's own address", bootstrap.EnvProbes)
	}
	c.ControlPlaneTLS = c.controlPlaneCA != ""
	if c.otlpRatio < 0 || c.otlpRatio > 1 {
		return c, fmt.Errorf("--trace-ratio %v is not a share: write a number from 0 to 1", c.otlpRatio)
	}
	return c, c.Validate()
}

// maxAddresses of a pod: one a family, and room for what may come.
const maxAddresses = 16

func parseAddresses(s string) ([]netip.Addr, error) {
	var out []netip.Addr
	for one := range strings.SplitSeq(s, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(one))
		if err != nil || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Zone() != "" {
			return nil, fmt.Errorf("%q is no address of a pod: write addresses separated by commas, for example 10.0.0.7,fd00::7", one)
		}
		out = append(out, a.Unmap())
	}
	if len(out) > maxAddresses {
		return nil, fmt.Errorf("%d addresses: a pod has at most %d", len(out), maxAddresses)
	}
	return out, nil
}

// collectAt keeps the heap of an idle sidecar small: it collects when the heap
// has grown by this percentage, which costs little because the hot path
// allocates next to nothing.
const collectAt = 50

func runSidecar(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	cfg, err := parse(args, stdout, stderr)
	if err != nil {
		return err
	}
	if cfg.waitReady > 0 {
		return waitReady(ctx, cfg.health, cfg.waitReady)
	}
	debug.SetGCPercent(collectAt)
	log := cfg.Log(cfg.Workload, stderr).With("event.dataset", "outrigger.sidecar")
	if cfg.envoyBootstrap != "" {
		return runAgent(ctx, cfg, log)
	}

	// What is known and counted.
	registry := program.Registry()
	var current table.Current
	access := accesslog.New(cfg.Namespace, cfg.Workload, cfg.Instance)
	metrics := telemetry.NewMetrics(registry, cfg.Config)
	events := &events{log: log, access: access, metrics: metrics}
	clusters := upstream.New(newEvidenceID, events.breaker, events.ejection)
	registry.MustRegister(admin.Gauges{Clusters: clusters})
	conns := &listener.Group{}
	registerQueues(registry, access, conns)
	monitor := overload.New(cfg.memory)
	monitor.Register(registry)

	// Who tells us, and who carries.
	state := ""
	if cfg.stateDir != "" {
		if err := os.MkdirAll(cfg.stateDir, 0o700); err != nil {
			return fmt.Errorf("--state-dir: %w", err)
		}
		state = filepath.Join(cfg.stateDir, cfg.Instance+".xds")
	}
	xds := xdsclient.Options{Address: cfg.ControlPlane, Node: cfg.Config, StateFile: state, Table: &current, Log: log, Registerer: registry}
	var who *mtls.Identity // nil without one
	if cfg.hasIdentity() {
		who = mtls.New(mtls.Options{
			Authority: cfg.ControlPlane, TokenFile: cfg.joinToken, RootsFile: cfg.controlPlaneCA, Node: cfg.Config, Log: log, Registerer: registry,
		})
		xds.Credentials = who.ControlPlane()
		events.reports = reporter.New(reporter.Options{Node: cfg.Config, Breakers: breakers(clusters), Registerer: registry})
		xds.Beside = events.reports.Beside
	}
	client := xdsclient.New(xds)
	for _, u := range cfg.Upstreams {
		if err := client.Want(u.Key()); err != nil {
			return err
		}
	}
	clusters.HTTP2 = proxy.HTTP2("upstream", metrics)
	conns.Refuse = monitor.Refuse
	seen := &detect.Memory{}
	carrier := &proxy.Proxy{
		Node: cfg.Config, Table: &current, Clusters: clusters, Conns: conns, Log: access, Metrics: metrics, Seen: seen, Overload: monitor,
	}
	if who != nil {
		clusters.Secure = func(to *table.TLS, protocols ...string) *tls.Config {
			return who.Client(to.Identities, to.ServerName, protocols...)
		}
		if cfg.MTLS != bootstrap.MTLSOff { // with --capture it is the control plane that says how it is used
			carrier.Mutual = &proxy.Mutual{
				Config: who.Server(), Peer: mtls.PeerID, IsMesh: mtls.IsMesh, Self: who.ID(), Strict: cfg.MTLS == bootstrap.MTLSStrict,
			}
		}
	}

	var captor *proxy.Capture // nil without --capture
	if cfg.Capture {
		restored := client.Restore()
		captor = proxy.NewCapture(carrier, client, func(destinations func() int) *telemetry.Capture { return telemetry.NewCapture(registry, destinations) })
		captor.Restore(restored)
	}
	var alone *aloneWatch
	if cfg.exitWhenAlone {
		marker := ""
		if cfg.stateDir != "" {
			marker = filepath.Join(cfg.stateDir, cfg.Instance+".seen")
		}
		if alone, err = newAloneWatch("/proc", os.Getpid(), marker); err != nil {
			return err
		}
	}

	// Everything that can fail has failed before the first goroutine starts.
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	operators := &admin.Server{
		Table: &current, Clusters: clusters, Metrics: registry, Log: log,
		Detected: func() any { return carrier.Detected(time.Now()) }, Control: func() any { return client.Status() }, Drain: quit, Quit: quit,
	}
	// ready says why the sidecar is not.
	ready := func() error {
		if err := readiness(client, who, conns, monitor, cfg.ControlPlane); err != nil || captor == nil {
			return err
		}
		return capturing(captor, current.Load(), cfg.Config)
	}
	operators.Ready = ready
	if captor != nil {
		operators.Captured = func() any { return captor.Captured() }
	}
	if len(cfg.probes) > 0 {
		at := cfg.Addresses[0] // as kubelet takes status.podIP
		operators.Probes = admin.NewProbes(cfg.probes, at, proxy.SourceFor(at))
	}
	binder := binder{ctx: ctx}
	defer binder.closeUnused()
	outbound := map[bootstrap.Upstream]*net.TCPListener{}
	for _, u := range cfg.Upstreams {
		outbound[u] = binder.bind(u.Listen.String(), "--upstream "+u.String())
	}
	inbound := map[bootstrap.Inbound]*net.TCPListener{}
	for _, in := range cfg.Inbounds {
		inbound[in] = binder.bind(in.Listen.String(), "--inbound "+in.String())
	}
	var outgoing, incoming *net.TCPListener
	if cfg.Capture {
		// Without a host it is every address, of IPv4 alone where there is no IPv6.
		outgoing = binder.bind(net.JoinHostPort("", strconv.Itoa(bootstrap.PortOutbound)), "--capture, outbound")
		incoming = binder.bind(net.JoinHostPort("", strconv.Itoa(bootstrap.PortInbound)), "--capture, inbound")
	}
	adminListener := binder.bind(cfg.admin, "--admin-address")
	metricsListener := binder.bind(cfg.metrics, "--metrics-address")
	healthListener := binder.bind(cfg.health, "--health-address")
	if binder.err != nil {
		return binder.err
	}
	var secrets net.Listener
	if cfg.sds != "" {
		if secrets, err = sds.Listen(ctx, cfg.sds); err != nil {
			return fmt.Errorf("--sds-address: %w", err)
		}
		defer func() { _ = secrets.Close() }() // closed already where it was served
	}
	var spans *telemetry.Spans // its exporter is the first goroutine
	if cfg.otlpEndpoint != "" {
		if spans, err = telemetry.NewSpans(ctx, cfg.otlpEndpoint, cfg.otlpRatio, cfg.Config); err != nil {
			return fmt.Errorf("--otlp-endpoint %q: %w", cfg.otlpEndpoint, err)
		}
		carrier.Spans = spans
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
	lateOnes.Go(func() { _ = monitor.Run(late) })

	actor := func(f func(context.Context) error) {
		actx, cancel := context.WithCancel(ctx)
		g.Add(func() error { return f(actx) }, func(error) { cancel() })
	}
	// outlive is an actor that goes on during the drain: its failure ends the program,
	// the end of the program does not end it.
	outlive := func(f func(context.Context) error) {
		failed := make(chan error, 1)
		lateOnes.Go(func() { failed <- f(late) })
		actor(func(ctx context.Context) error {
			select {
			case err := <-failed:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}
	actor(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	outlive(client.Run)
	if who != nil {
		outlive(who.Run)
	}
	if captor != nil {
		// What is redirected has nowhere else to go, for as long as the application lives.
		outlive(func(ctx context.Context) error { return captor.Serve(ctx, outgoing, incoming) })
	}
	if alone != nil {
		actor(alone.run)
	}
	if secrets != nil {
		actor(func(ctx context.Context) error { return sds.Serve(ctx, secrets, who, log) })
	}
	actor(func(ctx context.Context) error {
		select {
		case <-client.Ready():
			giveBack()
		case <-ctx.Done():
		}
		<-ctx.Done()
		return ctx.Err()
	})
	for u, l := range outbound {
		actor(func(ctx context.Context) error { return carrier.ServeOutbound(ctx, l, u.Key()) })
	}
	for in, l := range inbound {
		actor(func(ctx context.Context) error { return carrier.ServeInbound(ctx, l, in) })
	}
	for l, h := range map[*net.TCPListener]http.Handler{adminListener: operators.Admin(), metricsListener: operators.Scrape(), healthListener: operators.Health()} {
		if l != nil {
			actor(func(ctx context.Context) error { return program.Serve(ctx, l, h, log) })
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
				return fmt.Errorf("not configured within --ready-timeout %s: %w", cfg.readyTimeout, ready())
			}
		})
	}
	log.Info("sidecar started", "service.version", program.Version(), "control_plane", cfg.ControlPlane, "upstreams", len(cfg.Upstreams), "inbounds", len(cfg.Inbounds), "capture", cfg.Capture)
	for name, layers := range proxy.Layers() {
		log.Debug("path", "direction", name, "layers", layers)
	}
	err = g.Run()

	// Nothing new is accepted from here on, but what is redirected here.
	drain, stop := context.WithTimeout(context.WithoutCancel(ctx), cfg.drainTimeout)
	defer stop()
	if captor != nil {
		until := time.Now().Add(cfg.drainMinimum)
		accept(drain, conns, func() bool {
			if alone != nil { // which knows better than any time does
				n, err := alone.others()
				return err == nil && n > 0
			}
			return time.Now().Before(until)
		})
	}
	forced := conns.Drain(drain)
	end()
	lateOnes.Wait()
	if err := spans.Shutdown(drain); err != nil {
		log.Warn("the last spans were not exported", "error.message", err.Error())
	}
	log.Info("sidecar stopped", "connections_cut", forced)
	return err
}

// accept goes on while connections are open, and while the application may make
// more, but no longer than until ctx ends.
func accept(ctx context.Context, conns *listener.Group, more func() bool) {
	conns.Lame()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for conns.Active() > 0 || more() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// capturing is what a sidecar that captures is ready for beside the rest.
func capturing(captor *proxy.Capture, t *table.Table, node bootstrap.Config) error {
	if t.Inbound == nil {
		return fmt.Errorf("waiting for the control plane to say what is asked of those who call: it has no %s, which it makes of the pod", node.InboundName())
	}
	return captor.Redirected()
}

func readiness(client *xdsclient.Client, who *mtls.Identity, conns *listener.Group, monitor *overload.Monitor, address string) error {
	if conns.Draining() {
		return errors.New("draining")
	}
	if who != nil {
		select {
		case <-who.Ready():
		default:
			return fmt.Errorf("waiting for a certificate from the authority at %s", address)
		}
	}
	select {
	case <-client.Ready():
		return monitor.Err()
	default:
		return fmt.Errorf("waiting for configuration from the control plane at %s", address)
	}
}

// binder binds listeners and remembers the first error.
type binder struct {
	ctx   context.Context //nolint:containedctx // for the calls of one function
	bound []*net.TCPListener
	err   error
}

func (b *binder) bind(address, purpose string) *net.TCPListener {
	if b.err != nil || address == "" {
		return nil
	}
	l, err := program.Listen(b.ctx, purpose, address)
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

func registerQueues(r prometheus.Registerer, access *accesslog.Log, conns *listener.Group) {
	count := func(name, help string, f func() uint64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f()) }))
	}
	count("outrigger_access_log_dropped_total", "Access log lines dropped because 1 MiB of them waited for the writer.", access.Dropped)
	count("outrigger_access_log_failed_total", "Access log lines that could not be written.", access.Failed)
	count("outrigger_connections_refused_total", "Connections closed unserved: "+strconv.Itoa(listener.MaxConnections)+" were open, or the system had no room for more.", conns.Refused)
}

func newEvidenceID() string {
	var t telemetry.TraceContext
	t.Begin(nil, false)
	return "br-" + strings.ToLower(string(t.SpanID[:10]))
}
