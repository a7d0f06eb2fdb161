// Command control-plane configures the data planes of a mesh from Kubernetes
// objects: it reads them from a folder, builds the mesh and serves it as xDS.
//
// main knows flags and how the parts are put together; what they do is theirs.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/admin"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/manifests"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := execute(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "control-plane:", err)
		os.Exit(1)
	}
}

type settings struct {
	config, xdsAddress, adminAddress, trustDomain string
	logLevel, logFormat                           string
	dryRun, version                               bool
}

func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("control-plane", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.config, "config", "", "folder of Kubernetes objects and policies in YAML or JSON (required)")
	f.StringVar(&s.xdsAddress, "xds-address", "127.0.0.1:15010", "loopback address to serve xDS on")
	f.StringVar(&s.adminAddress, "admin-address", "127.0.0.1:15014", "loopback address of /ready, /metrics and /debug")
	f.StringVar(&s.trustDomain, "trust-domain", identity.DefaultTrustDomain, "SPIFFE trust domain of the workloads")
	f.BoolVar(&s.dryRun, "dry-run", false, "print problems, parity and the xDS that would be served as JSON, and end; exit code 1 if there are problems")
	f.StringVar(&s.logLevel, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&s.logFormat, "log-format", "json", "json or text")
	f.BoolVar(&s.version, "version", false, "print the version and end")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	switch {
	case s.version:
		return s, nil
	case f.NArg() > 0:
		return s, fmt.Errorf("unexpected argument %q: settings are flags, see --help", f.Arg(0))
	case s.config == "":
		return s, errors.New("--config is missing: give the folder with the Kubernetes objects, for example --config ./mesh")
	}
	return s, nil
}

func logger(s settings, to io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(s.logLevel)); err != nil {
		return nil, fmt.Errorf("--log-level %q: write debug, info, warn or error", s.logLevel)
	}
	o := &slog.HandlerOptions{Level: level, ReplaceAttr: record.ECS}
	switch s.logFormat {
	case "json":
		return slog.New(slog.NewJSONHandler(to, o)).With(record.ServiceName, "control-plane"), nil
	case "text":
		return slog.New(slog.NewTextHandler(to, o)), nil
	}
	return nil, fmt.Errorf("--log-format %q: write json or text", s.logFormat)
}

// execute runs the program until ctx ends. Everything is bound before anything
// is started, and stopped in reverse.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if s.version {
		_, err := fmt.Fprintln(stdout, version())
		return err
	}
	log, err := logger(s, stderr)
	if err != nil {
		return err
	}
	source := manifests.New(s.config, log)
	if err := source.Check(); err != nil {
		return fmt.Errorf("--config %s: %w; give an existing folder", s.config, err)
	}
	if s.dryRun {
		return dryRun(source, s.trustDomain, stdout, stderr)
	}

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	server := discovery.New(discovery.Options{Log: log, Registry: registry})
	loop := rebuild.New(rebuild.Options{
		Source: source, Publisher: server, TrustDomain: s.trustDomain, Log: log, Registry: registry,
	})

	xdsListener, err := bind("--xds-address", s.xdsAddress, discovery.CheckAddress)
	if err != nil {
		return err
	}
	adminListener, err := bind("--admin-address", s.adminAddress, admin.CheckAddress)
	if err != nil {
		return errors.Join(err, xdsListener.Close())
	}
	log.Info("control plane starts", "service.version", version(), "outrigger.config", s.config,
		"outrigger.xds_address", xdsListener.Addr().String(), "outrigger.admin_address", adminListener.Addr().String())

	var group run.Group
	add := func(execute func(context.Context) error) {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		group.Add(func() error { return execute(ctx) }, func(error) { cancel() })
	}
	// The first to end ends all: the signal, or whichever part fails.
	{
		ctx, cancel := context.WithCancel(ctx)
		group.Add(func() error { <-ctx.Done(); return nil }, func(error) { cancel() })
	}
	add(func(ctx context.Context) error {
		return admin.Serve(ctx, adminListener, window(log, registry, loop, server))
	})
	add(func(ctx context.Context) error { return server.Serve(ctx, xdsListener) })
	add(loop.Run)
	err = group.Run()
	log.Info("control plane stopped")
	return err
}

// bind listens on a loopback address given by a flag.
func bind(flagName, address string, check func(net.Addr) error) (net.Listener, error) {
	a, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w; write <ip>:<port>", flagName, address, err)
	}
	if err := check(a); err != nil {
		return nil, fmt.Errorf("%s %s: %w", flagName, address, err)
	}
	l, err := net.Listen("tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s %s is in use by another program, perhaps another control plane; stop that or choose another port, for example %s 127.0.0.1:0", flagName, address, flagName)
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", flagName, address, err)
	}
	return l, nil
}

// window is what the admin endpoint shows.
func window(log *slog.Logger, g prometheus.Gatherer, loop *rebuild.Loop, server *discovery.Server) admin.Options {
	return admin.Options{
		Log: log, Gatherer: g,
		Ready: func() error {
			if loop.State() == nil {
				return errors.New("no mesh has been built yet")
			}
			return nil
		},
		Mesh: func() *mesh.Mesh {
			if s := loop.State(); s != nil {
				return s.Mesh
			}
			return nil
		},
		Problems: func() any {
			s := loop.State()
			if s == nil {
				return problemsReport{Problems: []problem{}}
			}
			return problemsReport{Version: s.Version, Problems: problems(s.Problems), Parity: parityOf(s.Mesh)}
		},
		Proxies: func() any {
			return struct {
				Applied []discovery.Applied    `json:"applied"`
				Proxies []discovery.NodeStatus `json:"proxies"`
			}{server.Applied(), server.Status()}
		},
		XDS: func() (any, error) { return dump(server.Sets()) },
	}
}

// problem is a translate.Problem with names for JSON.
type problem struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	Source    string `json:"source,omitempty"`
	Field     string `json:"field,omitempty"`
	Reason    string `json:"reason"`
	Message   string `json:"message"`
}

func problems(in []translate.Problem) []problem {
	out := make([]problem, 0, len(in))
	for _, p := range in {
		out = append(out, problem{p.Kind, p.Namespace, p.Name, p.Source, p.Field, string(p.Reason), p.Message})
	}
	return out
}

type problemsReport struct {
	Version  string    `json:"version"`
	Problems []problem `json:"problems"`
	Parity   []parity  `json:"parity"`
}

// parity says what each data plane makes of a policy where it applies.
type parity struct {
	Kind   string           `json:"kind"`
	Policy string           `json:"policy"`
	Target string           `json:"target"`
	Notes  []xds.ParityNote `json:"notes"`
}

func parityOf(m *mesh.Mesh) []parity {
	out := []parity{}
	for _, s := range m.Services {
		for _, p := range s.Ports {
			key := mesh.Key(s.Namespace, s.Name, p.Number)
			if p.Breaker != nil {
				out = append(out, parity{"CircuitBreaker", p.Breaker.Policy, key, xds.BreakerParity(p.Breaker)})
			}
			for _, r := range p.Routes {
				if r.Retry.Policy != "" && r.Retry.Policy != "default" {
					out = append(out, parity{"RetryPolicy", r.Retry.Policy, key + " " + r.Name, xds.RetryParity(r.Retry)})
				}
			}
		}
	}
	return out
}

func dump(sets map[xds.DataPlane]*xds.Set) (map[xds.DataPlane]map[string][]xds.DumpedResource, error) {
	out := map[xds.DataPlane]map[string][]xds.DumpedResource{}
	for dp, set := range sets {
		d, err := set.Dump()
		if err != nil {
			return nil, err
		}
		out[dp] = d
	}
	return out, nil
}

// errProblems ends a dry run with exit code 1.
var errProblems = errors.New("the configuration has problems")

func dryRun(source *manifests.Source, trustDomain string, stdout, stderr io.Writer) error {
	state := rebuild.Build(source, trustDomain)
	sets := map[xds.DataPlane]*xds.Set{}
	for _, dp := range xds.DataPlanes() {
		set, err := xds.Build(state.Mesh, dp, nil)
		if err != nil {
			return err
		}
		sets[dp] = set
	}
	served, err := dump(sets)
	if err != nil {
		return err
	}
	e := json.NewEncoder(stdout)
	e.SetIndent("", "  ")
	if err := e.Encode(struct {
		problemsReport
		XDS map[xds.DataPlane]map[string][]xds.DumpedResource `json:"xds"`
	}{problemsReport{state.Version, problems(state.Problems), parityOf(state.Mesh)}, served}); err != nil {
		return fmt.Errorf("write the dry run: %w", err)
	}
	if len(state.Problems) == 0 {
		return nil
	}
	for _, p := range state.Problems {
		fmt.Fprintln(stderr, p)
	}
	return fmt.Errorf("%w: %d; see above", errProblems, len(state.Problems))
}

// version is the module's version, or the commit that it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	i := slices.IndexFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "vcs.revision" })
	if v := info.Main.Version; i < 0 || (v != "" && v != "(devel)") {
		return v
	}
	return info.Settings[i].Value
}
