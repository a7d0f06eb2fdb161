// Command collector ships every log line and metric of a node: it follows the
// containers' logs, scrapes and reads metrics, and sends both to the outputs
// that its configuration names.
//
// main knows flags, the environment and how the parts are put together; what
// they do is theirs. The configuration is described in package
// collector/internal/config.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/admin"
	"github.com/outrigger-mesh/outrigger/collector/internal/config"
	"github.com/outrigger-mesh/outrigger/collector/internal/cost"
	"github.com/outrigger-mesh/outrigger/collector/internal/hostmetrics"
	"github.com/outrigger-mesh/outrigger/collector/internal/kube"
	"github.com/outrigger-mesh/outrigger/collector/internal/metadata"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/azuremonitor"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/discard"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/elasticsearch"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/fluentd"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/influxdb"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/logstash"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/otlp"
	exposition "github.com/outrigger-mesh/outrigger/collector/internal/output/prometheus"
	storeoutput "github.com/outrigger-mesh/outrigger/collector/internal/output/store"
	"github.com/outrigger-mesh/outrigger/collector/internal/pipeline"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/scrape"
	"github.com/outrigger-mesh/outrigger/collector/internal/store"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/program"
)

func main() { program.Main("collector", execute) }

type settings struct {
	program.Flags
	config string
	check  bool
	reload time.Duration
}

func parse(args []string, stdout, stderr io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("collector", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.config, "config", "", "configuration file in YAML (required)")
	f.BoolVar(&s.check, "check", false, "check the configuration and end; exit code 1 if something is wrong with it")
	f.DurationVar(&s.reload, "reload", 5*time.Second, "how often the configuration file is read again, to be applied when it has changed; 0 is never")
	s.Register(f)
	if err := s.Parse(f, args, stdout); err != nil {
		return s, err
	}
	if s.config == "" {
		return s, errors.New("--config is missing: give the configuration file, for example --config collector.yaml")
	}
	return s, nil
}

// load returns the configuration and the text that it was read from.
func load(path string) (*config.Config, []byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("--config: %w", err)
	}
	c, err := parseConfig(b)
	if err != nil {
		return nil, nil, fmt.Errorf("--config %s:\n%w", path, err)
	}
	return c, b, nil
}

func parseConfig(b []byte) (*config.Config, error) { return config.Parse(b, os.Getenv) }

// execute runs the program until ctx ends.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(args, stdout, stderr)
	if err != nil {
		return err
	}
	c, text, err := load(s.config)
	if err != nil {
		return err
	}
	if s.check {
		_, err := fmt.Fprintf(stdout, "%s is right\n", s.config)
		return err
	}
	node, err := nodeName(c)
	if err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		// A node has little memory to spare for its collector, which makes little garbage.
		debug.SetGCPercent(50)
	}
	log := s.Log("collector", stderr).With(record.HostName, node)
	r := newReloads()
	p, err := assemble(ctx, c, node, log, r, nil)
	if err != nil {
		return errors.Join(err, p.close())
	}
	log.Info("collector starts", "service.version", program.Version(), "outrigger.admin_address", p.admin.Addr().String())
	err = runAndReload(ctx, s, c, text, p, node, r, log)
	log.Info("collector stopped")
	return err
}

// nodeName is where records and metrics say that they come from.
func nodeName(c *config.Config) (string, error) {
	if c.Node != "" {
		return c.Node, nil
	}
	if n := os.Getenv("NODE_NAME"); n != "" { // the downward API's spec.nodeName
		return n, nil
	}
	n, err := os.Hostname()
	if err != nil {
		return "", fmt.Errorf("node: no name in the configuration or in $NODE_NAME, and the host has none: %w", err)
	}
	return n, nil
}

// podName is the downward API's name of the pod that this runs in, if it is one.
func podName() (namespace, pod string) { return os.Getenv("POD_NAMESPACE"), os.Getenv("POD_NAME") }

// parts is the collector put together. Parts that the configuration does not
// ask for are nil.
type parts struct {
	log       *slog.Logger
	registry  *prometheus.Registry
	admin     net.Listener
	expose    net.Listener
	window    http.Handler
	metrics   *exposition.Exposition
	pipelines []*pipeline.Pipeline
	metadata  *metadata.Store
	rules     map[string]*rules.Set // by output
	cost      *cost.Meter
	api       *kube.Client // nil without one
	runners   []func(context.Context) error
	scraper   *scrape.Scraper
	sinks     []*influxdb.Sink
	// closers in the order in which they were made.
	closers []func() error
}

// assemble makes all parts and binds all ports, so that whatever can fail fails
// before the first line is read. Where it fails, the parts have what is to be
// closed. The rules of before hand on what their quotas have counted.
func assemble(ctx context.Context, c *config.Config, node string, log *slog.Logger, r *reloads, before map[string]*rules.Set) (*parts, error) {
	for _, name := range c.Unused() {
		log.Warn("an output is named by neither logs.outputs nor metrics.outputs; nothing is sent to it", "outrigger.output", name)
	}
	p := &parts{log: log, rules: map[string]*rules.Set{}, cost: cost.New(time.Now())}
	var err error
	if p.admin, err = p.bind(program.ListenLoopback(ctx, "admin:", c.Admin)); err != nil {
		return p, err
	}
	if err := p.lock(c.DataDir); err != nil {
		return p, err
	}
	registry := program.Registry()
	registry.MustRegister(r.total, r.failed)
	p.registry = registry
	if c.Kubernetes != nil {
		if err := p.kubernetes(c, node); err != nil {
			return p, err
		}
	}
	var search http.Handler
	if c.Logs != nil {
		if search, err = p.logs(c, node, registry, before); err != nil {
			return p, err
		}
		if err := p.inputs(ctx, c, node); err != nil {
			return p, err
		}
	}
	if c.Metrics != nil {
		if err := p.measure(ctx, c, registry); err != nil {
			return p, err
		}
	}
	p.window = admin.Handler(admin.Options{
		Log: log, Gatherer: registry, Store: search,
		Ready:  func() error { return ready(c) },
		Audit:  func() any { return p.audit() },
		Why:    func() any { return p.why() },
		Replay: p.replay,
		Cost:   func() any { return p.cost.Report(time.Now().UTC()) },
	})
	return p, nil
}

// logs makes a pipeline for each output and returns the store's search, if
// there is a store.
func (p *parts) logs(c *config.Config, node string, reg prometheus.Registerer, before map[string]*rules.Set) (search http.Handler, err error) {
	metrics, err := pipeline.NewMetrics(reg)
	if err != nil {
		return nil, err
	}
	tailMetrics, err := tail.NewMetrics(reg)
	if err != nil {
		return nil, err
	}
	for _, name := range c.Logs.Outputs {
		out, found, err := p.output(name, c.Outputs[name], p.log.With("outrigger.output", name))
		if err != nil {
			return nil, fmt.Errorf("outputs.%s: %w", name, err)
		}
		if found != nil {
			search = found
		}
		set, err := rules.Compile(c.Logs.Config, name, c.Logs.Outputs)
		if err != nil {
			return nil, fmt.Errorf("logs: %w", err)
		}
		if old := before[name]; old != nil {
			set.Resume(old) // what the quotas have counted
		}
		p.rules[name] = set
		var meter pipeline.Meter
		if len(p.pipelines) == 0 { // every output sees every record; one count is enough
			meter = p.cost
		}
		p.closers = append(p.closers, out.Close)
		pl, err := pipeline.New(pipeline.Config{
			Name: name, Tail: p.following(c, node, name), DataDir: c.DataDir, Rules: set, Meter: meter,
			MaxRecords: c.Logs.Batch.MaxRecords, MaxBytes: c.Logs.Batch.MaxBytes, Linger: c.Logs.Batch.Linger, InFlight: c.Logs.InFlight,
		}, out, p.log, metrics, tailMetrics)
		if err != nil {
			return nil, fmt.Errorf("outputs.%s: %w", name, err)
		}
		p.pipelines = append(p.pipelines, pl)
	}
	return search, nil
}

// output makes an output for logs, and the search of a store.
func (p *parts) output(name string, o config.Output, log *slog.Logger) (out output.Output, search http.Handler, err error) {
	switch {
	case o.Store != nil:
		s, err := store.Open(*o.Store, log)
		if err != nil {
			return nil, nil, err
		}
		return storeoutput.New(s), s.Handler(), nil
	case o.Elasticsearch != nil:
		e, err := elasticsearch.New(*o.Elasticsearch, log)
		if err != nil {
			return nil, nil, err
		}
		return e, nil, p.registry.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "outrigger_elasticsearch_failure_store_total", ConstLabels: prometheus.Labels{"output": name},
			Help: "Records that Elasticsearch put into the failure store of their data stream, because they do not fit its mapping. They count as acknowledged.",
		}, func() float64 { return float64(e.FailureStored()) }))
	case o.Fluentd != nil:
		out, err = fluentd.New(*o.Fluentd, log)
	case o.AzureMonitor != nil:
		out, err = azuremonitor.New(*o.AzureMonitor, log)
	case o.Logstash != nil:
		out, err = logstash.New(*o.Logstash, log)
	case o.Discard != nil:
		out = discard.Output{}
	case o.OTLP != nil:
		var m *otlp.Metrics
		if m, err = otlp.NewMetrics(prometheus.WrapRegistererWith(prometheus.Labels{"output": name}, p.registry)); err == nil {
			out, err = otlp.New(*o.OTLP, log, m)
		}
	default:
		err = errors.New("it takes no logs") // config.Parse refused it
	}
	return out, nil, err
}

// kubernetes makes what knows the node's pods.
func (p *parts) kubernetes(c *config.Config, node string) error {
	k := c.Kubernetes
	m := metadata.Config{
		Node: node, CacheFile: filepath.Join(c.DataDir, "metadata.json"), Log: p.log, Registerer: p.registry,
		InUse: func(uid string) bool {
			return slices.ContainsFunc(p.pipelines, func(pl *pipeline.Pipeline) bool { return pl.InUse(uid) })
		},
	}
	client := func(field string, cfg kube.Config) (*kube.Client, error) {
		cl, err := kube.New(cfg)
		if err != nil {
			return nil, fmt.Errorf("kubernetes.%s: %w", field, err)
		}
		p.closers = append(p.closers, func() error { cl.Close(); return nil })
		return cl, nil
	}
	inside, ok := kube.InCluster(os.Getenv)
	var err error
	if k.Watch {
		cfg := inside
		if k.Server != "" {
			cfg = kube.Config{Server: k.Server, CAFile: k.CAFile, TokenFile: k.TokenFile}
		} else if !ok {
			return errors.New("kubernetes.watch: this is no pod of a cluster, so there is no address of its API server; write kubernetes.server, or remove kubernetes")
		}
		if m.API, err = client("server", cfg); err != nil {
			return err
		}
		p.api = m.API
	}
	if k.Kubelet != "" {
		address, err := kube.Expand(k.Kubelet, os.Getenv)
		if err != nil {
			return fmt.Errorf("kubernetes.kubelet: %w", err)
		}
		cfg := kube.Config{Server: address, CAFile: k.KubeletCAFile, Insecure: k.KubeletInsecure, TokenFile: cmp.Or(k.TokenFile, inside.TokenFile)}
		if m.Kubelet, err = client("kubelet", cfg); err != nil {
			return err
		}
	}
	p.metadata, err = metadata.New(m)
	return err
}

// following is what an output's pipeline follows. Each has a spool of its own.
func (p *parts) following(c *config.Config, node, output string) tail.Config {
	t := tail.Config{
		Folder: filepath.Clean(c.Logs.Folder), Cluster: c.Cluster, Node: node,
		Linked: c.Logs.LinkedFolders, MaxDeleted: c.Logs.SpoolBytes,
	}
	if p.metadata != nil {
		t.Resource, t.Generation, t.MetadataWait = p.metadata.Resource, p.metadata.Generation, c.Kubernetes.Wait
	}
	if c.Logs.Spool != "" {
		t.Spool = filepath.Join(c.Logs.Spool, output)
	}
	for _, f := range c.Logs.Files {
		service := cmp.Or(f.Service, f.Name)
		t.Files = append(t.Files, tail.Files{
			Patterns: f.Paths, Format: tail.Format(cmp.Or(f.Format, "text")), Resource: record.Resource{Service: service},
		})
	}
	t.Files = append(t.Files, journals(c)...)
	return t
}

// measure makes what reads metrics and what shows and sends them.
func (p *parts) measure(ctx context.Context, c *config.Config, registry *prometheus.Registry) (err error) {
	sources := []prometheus.Gatherer{registry}
	if c.Metrics.Host {
		host := prometheus.NewRegistry()
		if err := host.Register(hostmetrics.New(c.Metrics.HostRoot, p.log)); err != nil {
			return err
		}
		sources = append(sources, host)
	}
	if len(c.Metrics.Scrape) > 0 {
		p.scraper, err = scrape.New(scrape.Config{Targets: c.Metrics.Scrape}, scrape.Options{Logger: p.log, Registerer: registry})
		if err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		sources = append(sources, p.scraper)
	}
	if p.metrics, err = exposition.New(exposition.Options{Logger: p.log, Registerer: registry, Sources: sources}); err != nil {
		return err
	}
	if c.Metrics.Expose != "" {
		if p.expose, err = p.bind(program.Listen(ctx, "metrics.expose:", c.Metrics.Expose)); err != nil {
			return err
		}
	}
	for _, name := range c.Metrics.Outputs {
		sink, err := influxdb.New(*c.Outputs[name].InfluxDB, influxdb.Options{
			Logger: p.log.With("outrigger.output", name), Source: p.metrics,
			Registerer: prometheus.WrapRegistererWith(prometheus.Labels{"output": name}, registry),
		})
		if err != nil {
			return fmt.Errorf("outputs.%s: %w", name, err)
		}
		p.sinks = append(p.sinks, sink)
	}
	return nil
}

// bind keeps a listener to be closed with the rest, should its server not come
// to it.
func (p *parts) bind(l *net.TCPListener, err error) (net.Listener, error) {
	if err != nil {
		return nil, err
	}
	p.closers = append(p.closers, func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) { // its server closed it
			return err
		}
		return nil
	})
	return l, nil
}

// lock keeps a second collector away from the checkpoints.
func (p *parts) lock(dir string) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return fmt.Errorf("dataDir: %s cannot be made: %w; name a folder that this user may write to", dir, err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("dataDir: %w; name a folder that this user may write to", err)
	}
	p.closers = append(p.closers, f.Close)
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("dataDir: %s is in use by another collector; stop that, or write another folder", dir)
	}
	if err != nil {
		return fmt.Errorf("dataDir: lock %s: %w", dir, err)
	}
	return nil
}

// run starts all parts and waits until ctx ends or one of them does, and then
// for all of them.
func (p *parts) run(ctx context.Context) error {
	var group run.Group
	add := func(part func(context.Context) error) {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		group.Add(func() error { return part(ctx) }, func(error) { cancel() })
	}
	{
		ctx, cancel := context.WithCancel(ctx)
		group.Add(func() error { <-ctx.Done(); return nil }, func(error) { cancel() })
	}
	add(func(ctx context.Context) error { return program.Serve(ctx, p.admin, p.window, p.log) })
	if p.expose != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", p.metrics)
		add(func(ctx context.Context) error { return program.Serve(ctx, p.expose, mux, p.log) })
	}
	var failed []error
	results := make(chan error, len(p.pipelines)) // oklog/run keeps the first error only
	for _, pl := range p.pipelines {
		add(func(ctx context.Context) error {
			err := pl.Run(ctx)
			results <- err
			return err
		})
	}
	for _, run := range p.runners {
		add(run)
	}
	if p.metadata != nil {
		add(p.metadata.Run)
	}
	if p.scraper != nil {
		add(p.scraper.Run)
	}
	for _, sink := range p.sinks {
		add(sink.Run)
	}
	err := group.Run()
	for range p.pipelines {
		if e := <-results; e != nil && !errors.Is(err, e) {
			failed = append(failed, e)
		}
	}
	return errors.Join(append([]error{err}, failed...)...)
}

// close closes what assemble opened, in reverse.
func (p *parts) close() error {
	var errs []error
	for _, c := range slices.Backward(p.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

// audit is the answer of /api/v1/audit.
func (p *parts) audit() any {
	out := struct {
		Time    time.Time        `json:"time"`
		Outputs []pipeline.Audit `json:"outputs"`
	}{time.Now().UTC(), []pipeline.Audit{}}
	for _, pl := range p.pipelines {
		out.Outputs = append(out.Outputs, pl.Audit())
	}
	return out
}

// replay is what POST /api/v1/replay does.
func (p *parts) replay(output string) (int64, error) {
	var names []string
	for _, pl := range p.pipelines {
		if pl.Name() == output {
			return pl.Replay()
		}
		names = append(names, pl.Name())
	}
	return 0, fmt.Errorf("there is no output %q for logs; there are %s", output, strings.Join(names, ", "))
}

// why is the answer of /api/v1/why.
func (p *parts) why() any {
	out := struct {
		Time time.Time `json:"time"`
		// Since when the reasons of an output were collected.
		Since   map[string]time.Time `json:"since"`
		Reasons []pipeline.Reason    `json:"reasons"`
	}{time.Now().UTC(), map[string]time.Time{}, []pipeline.Reason{}}
	for _, pl := range p.pipelines {
		since, reasons := pl.Why()
		out.Since[pl.Name()] = since
		out.Reasons = append(out.Reasons, reasons...)
	}
	return out
}

// ready says why no logs can be read. A backend that is down is no reason: the
// collector is made for that.
func ready(c *config.Config) error {
	if c.Logs == nil {
		return nil
	}
	d, err := os.Open(c.Logs.Folder)
	if err != nil {
		return fmt.Errorf("logs.folder: %w", err)
	}
	return d.Close()
}
