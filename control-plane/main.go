// Command control-plane configures the data planes of a mesh from Kubernetes
// objects: it reads them from a cluster or a folder, builds the mesh and serves
// it as xDS.
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
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/admin"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/manifests"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/program"
)

func main() { program.Main("control-plane", execute) }

type settings struct {
	program.Flags
	config, xdsAddress, adminAddress, healthAddress, trustDomain string
	dryRun                                                       bool

	kubernetes                     bool
	kubeconfig, namespace, podName string

	authorityDir           string
	xdsTLSAddress, tlsName string
	certificateTTL         time.Duration
	joinToken              string
	joinTokenTTL           time.Duration
	rotateRoot             bool
}

func parse(args []string, stdout, stderr io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("control-plane", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.config, "config", "", "folder of Kubernetes objects and policies in YAML or JSON; this or --kubernetes is required")
	f.BoolVar(&s.kubernetes, "kubernetes", false, "read the objects from the Kubernetes API, as the service account of the pod that this runs in")
	f.StringVar(&s.kubeconfig, "kubeconfig", "", "file that says how to reach the Kubernetes API, with --kubernetes outside of a pod")
	f.StringVar(&s.namespace, "namespace", identity.SystemNamespace, "namespace of the control plane, with --kubernetes")
	f.StringVar(&s.podName, "pod-name", "", "name of the pod that this runs in, with --kubernetes. Empty: the host's name")
	f.StringVar(&s.xdsAddress, "xds-address", "127.0.0.1:15010", "loopback address to serve xDS on")
	f.StringVar(&s.adminAddress, "admin-address", "127.0.0.1:15014", "loopback address of /ready, /metrics and /debug")
	f.StringVar(&s.healthAddress, "health-address", "", "address of /ready, /live and /metrics for the kubelet and for Prometheus, in clear; nothing else is served there. Empty: not served")
	f.StringVar(&s.trustDomain, "trust-domain", identity.DefaultTrustDomain, "SPIFFE trust domain of the workloads")
	f.BoolVar(&s.dryRun, "dry-run", false, "print problems, parity and the xDS that would be served from --config as JSON, and end; exit code 1 if there are problems")
	f.StringVar(&s.authorityDir, "authority-dir", "", "folder of the certificate authority (ca.key, ca.crt, root.crt, token.key); made with a new root where it does not exist. Empty: no authority, or with --kubernetes the Secret "+kube.AuthoritySecret)
	f.StringVar(&s.xdsTLSAddress, "xds-tls-address", "", "address to serve xDS and certificates on over TLS, usually port 15012; needs --authority-dir or --kubernetes. Empty: not served")
	f.StringVar(&s.tlsName, "xds-tls-names", "localhost,127.0.0.1,::1", "comma list of DNS names and IP addresses in the certificate of --xds-tls-address; with --kubernetes those of the Service are added")
	f.DurationVar(&s.certificateTTL, "certificate-ttl", authority.DefaultTTL, "how long a workload's certificate is valid, 1m to 24h; it is renewed at half of that")
	f.StringVar(&s.joinToken, "join-token", "", "print a token with which the workload <namespace>/<service account> gets its first certificate, and end; needs --authority-dir")
	f.DurationVar(&s.joinTokenTTL, "join-token-ttl", authority.DefaultTokenTTL, "how long the token of --join-token is valid, at most 720h")
	f.BoolVar(&s.rotateRoot, "rotate-root", false, "make the next step of the exchange of the authority's root (add, sign, remove; --certificate-ttl apart), say which it was, and end; needs --authority-dir or --kubernetes")
	s.Register(f)
	if err := s.Parse(f, args, stdout); err != nil {
		return s, err
	}
	return s, s.check()
}

// check refuses settings that do not go together.
func (s settings) check() error {
	stored := s.authorityDir != "" || s.kubernetes
	switch {
	case s.kubernetes && s.config != "":
		return errors.New("--kubernetes and --config exclude each other: the objects come from a cluster or from a folder")
	case s.kubeconfig != "" && !s.kubernetes:
		return errors.New("--kubeconfig needs --kubernetes")
	case s.joinToken != "" && s.kubernetes:
		return errors.New("--join-token is for workloads outside of Kubernetes, which --kubernetes does not take: pods prove themselves with their projected tokens")
	case s.joinToken != "" && s.authorityDir == "":
		return errors.New("--join-token needs --authority-dir: the folder whose key signs the token")
	case s.xdsTLSAddress != "" && !stored:
		return errors.New("--xds-tls-address needs --authority-dir: the folder of the authority that signs certificates, for example --authority-dir ./authority")
	case s.rotateRoot && !stored:
		return errors.New("--rotate-root needs --authority-dir or --kubernetes: where the root is")
	case s.dryRun && s.kubernetes:
		return errors.New("--dry-run needs --config: give a folder with the objects, for example what kubectl get -o yaml prints")
	case s.joinToken == "" && !s.rotateRoot && s.config == "" && !s.kubernetes:
		return errors.New("--config is missing: give the folder with the Kubernetes objects, for example --config ./mesh, or --kubernetes in a cluster")
	}
	return nil
}

// execute runs the program until ctx ends. Everything is bound before anything
// is started, and stopped in reverse.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(args, stdout, stderr)
	if err != nil {
		return err
	}
	log := s.Log("control-plane", stderr)
	registry := program.Registry()
	cluster, err := s.cluster(log, registry)
	if err != nil {
		return err
	}
	switch {
	case s.joinToken != "":
		return printToken(ctx, s, log, stdout)
	case s.rotateRoot:
		return rotateRoot(ctx, s, cluster, stdout)
	case s.dryRun:
		return dryRun(s, log, stdout, stderr)
	}

	source, err := s.source(cluster, log)
	if err != nil {
		return err
	}
	server := discovery.New(discovery.Options{Log: log, Registry: registry})
	loop := rebuild.New(rebuild.Options{
		Source: source, Publisher: server, TrustDomain: s.trustDomain, Log: log, Registry: registry,
	})
	bound, err := s.listen(ctx)
	if err != nil {
		return err
	}
	log.Info("control plane starts", "service.version", program.Version(), "outrigger.config", s.config, "host.name", s.podName,
		"outrigger.xds_address", address(bound.xds), "outrigger.xds_tls_address", address(bound.xdsTLS),
		"outrigger.admin_address", address(bound.admin), "outrigger.health_address", address(bound.health))

	shown := window(log, registry, ready(cluster, loop), loop, server)
	parts := []part{
		func(ctx context.Context) error { return program.Serve(ctx, bound.admin, admin.Handler(shown), log) },
		func(ctx context.Context) error { return s.work(ctx, cluster, server, loop, bound, log, registry) },
	}
	if bound.health != nil {
		parts = append(parts, func(ctx context.Context) error { return program.Serve(ctx, bound.health, health(shown), log) })
	}
	err = together(ctx, parts...)
	log.Info("control plane stopped")
	return err
}

// work opens the authority, which may have to wait for the API server, and serves
// until ctx ends.
func (s settings) work(ctx context.Context, cluster *kube.Cluster, server *discovery.Server, loop *rebuild.Loop, bound listeners, log *slog.Logger, registry prometheus.Registerer) error {
	var parts []part
	var secure []discovery.Secure
	telling := s.teller(cluster, loop, server)
	if s.authorityDir != "" || bound.xdsTLS != nil {
		issuer, err := s.authority(ctx, cluster, log, registry)
		if err != nil {
			return errors.Join(err, bound.xds.Close(), closed(bound.xdsTLS))
		}
		parts = append(parts, issuer.Run)
		if bound.xdsTLS != nil {
			secure = append(secure, discovery.Secure{
				Listener: bound.xdsTLS, Credentials: issuer.Credentials(), TrustDomain: s.trustDomain, MaxAge: issuer.MaxConnectionAge(),
				Register: telling.register(issuer),
			})
		}
		if cluster != nil {
			roots := cluster.DistributeRoots(issuer.Bundle, func(ctx context.Context) error { _, err := issuer.Reload(ctx); return err })
			issuer.OnChange(roots.Changed)
		}
	}
	parts = append(parts, func(ctx context.Context) error { return server.Serve(ctx, bound.xds, secure...) })
	if cluster != nil {
		parts = append(parts, cluster.Run)
	}
	parts = append(parts, telling.parts()...)
	parts = append(parts, func(ctx context.Context) error {
		// What is built from half of the objects takes services from those who use
		// them.
		if cluster != nil && !cluster.Source().WaitSynced(ctx) {
			return nil
		}
		return loop.Run(ctx)
	})
	return together(ctx, parts...)
}

// part runs until its context ends.
type part = func(context.Context) error

// together runs the parts until ctx ends. The first to end ends all: the signal,
// or whichever part fails.
func together(ctx context.Context, parts ...part) error {
	var group run.Group
	{
		ctx, cancel := context.WithCancel(ctx)
		group.Add(func() error { <-ctx.Done(); return nil }, func(error) { cancel() })
	}
	for _, p := range parts {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		group.Add(func() error { return p(ctx) }, func(error) { cancel() })
	}
	return group.Run()
}

// cluster connects where the settings say so; else it is nil.
func (s *settings) cluster(log *slog.Logger, registry prometheus.Registerer) (*kube.Cluster, error) {
	if !s.kubernetes {
		return nil, nil //nolint:nilnil // no cluster and no error: a folder
	}
	if s.podName == "" {
		var err error
		if s.podName, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("--pod-name is missing, and the host has no name: %w", err)
		}
	}
	if !s.rotateRoot { // a command that says what it does itself
		kube.RouteLogs(log)
	}
	c, err := kube.Connect(kube.Options{Kubeconfig: s.kubeconfig, Namespace: s.namespace, Log: log, Registry: registry})
	if err != nil {
		return nil, fmt.Errorf("--kubernetes: %w", err)
	}
	return c, nil
}

// source is where the objects come from.
func (s settings) source(cluster *kube.Cluster, log *slog.Logger) (rebuild.Source, error) {
	if cluster != nil {
		return cluster.Source(), nil
	}
	return s.folder(log)
}

func (s settings) folder(log *slog.Logger) (*manifests.Source, error) {
	source := manifests.New(s.config, log)
	if err := source.Check(); err != nil {
		return nil, fmt.Errorf("--config %s: %w; give an existing folder", s.config, err)
	}
	return source, nil
}

// listeners are what is bound; nil where it is not asked for.
type listeners struct{ xds, xdsTLS, admin, health net.Listener }

func address(l net.Listener) string {
	if l == nil {
		return ""
	}
	return l.Addr().String()
}

func closed(l net.Listener) error {
	if l == nil {
		return nil
	}
	return l.Close()
}

// listen binds all addresses, or none.
func (s settings) listen(ctx context.Context) (bound listeners, err error) {
	var open []net.Listener
	defer func() {
		if err == nil {
			return
		}
		for _, l := range open {
			err = errors.Join(err, l.Close())
		}
	}()
	for _, a := range []struct {
		flag, address string
		bind          func(context.Context, string, string) (*net.TCPListener, error)
		to            *net.Listener
	}{
		{"--xds-address", s.xdsAddress, program.ListenLoopback, &bound.xds},
		{"--admin-address", s.adminAddress, program.ListenLoopback, &bound.admin},
		{"--health-address", s.healthAddress, program.Listen, &bound.health},
		{"--xds-tls-address", s.xdsTLSAddress, program.Listen, &bound.xdsTLS},
	} {
		if a.address == "" && (a.to == &bound.health || a.to == &bound.xdsTLS) {
			continue
		}
		l, err := a.bind(ctx, a.flag, a.address)
		if err != nil {
			return listeners{}, err
		}
		open, *a.to = append(open, l), l
	}
	return bound, nil
}

// service is the Service of the control plane in a cluster.
const service = "outrigger-control-plane"

// authority opens the one that the flags describe. In a cluster, tokens are
// verified by it, whoever keeps the keys.
func (s settings) authority(ctx context.Context, cluster *kube.Cluster, log *slog.Logger, registry prometheus.Registerer) (*authority.Authority, error) {
	o := authority.Options{
		Store: s.store(cluster), TrustDomain: s.trustDomain, TTL: s.certificateTTL, Log: log, Registerer: registry,
	}
	for n := range strings.SplitSeq(s.tlsName, ",") {
		if n = strings.TrimSpace(n); n != "" {
			o.Names = append(o.Names, n)
		}
	}
	if cluster != nil {
		for _, n := range kube.ServiceNames(service, s.namespace) {
			if !slices.Contains(o.Names, n) {
				o.Names = append(o.Names, n)
			}
		}
		o.Verifier = cluster.TokenVerifier(s.trustDomain)
		if s.authorityDir == "" {
			if err := cluster.Reach(ctx); err != nil {
				return nil, err
			}
		}
	}
	a, err := authority.Open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("--authority-dir, --certificate-ttl: %w", err)
	}
	return a, nil
}

// store is where the authority's files are.
func (s settings) store(cluster *kube.Cluster) authority.Store {
	if s.authorityDir == "" {
		return cluster.Secret()
	}
	return authority.Folder(s.authorityDir)
}

// rotateRoot makes one step and says what comes next.
func rotateRoot(ctx context.Context, s settings, cluster *kube.Cluster, stdout io.Writer) error {
	store := s.store(cluster)
	files, err := store.Load(ctx)
	if err != nil {
		return fmt.Errorf("--rotate-root: %s: %w", store, err)
	}
	next, step, err := authority.Rotate(files, s.trustDomain, s.certificateTTL, time.Now())
	if err == nil {
		err = store.Replace(ctx, files, next)
	}
	if err != nil {
		return fmt.Errorf("--rotate-root: %s: %w", store, err)
	}
	said := map[authority.Step]string{
		authority.StepAdd:    "a new root is trusted beside the old one; in %s, when every workload has renewed its certificate, do this again, and the new root signs",
		authority.StepSign:   "the new root signs; in %s, when no certificate of the old one is left, do this again, and the old root is no longer trusted",
		authority.StepRemove: "the old root is no longer trusted; the exchange is complete",
	}[step]
	if strings.Contains(said, "%s") {
		said = fmt.Sprintf(said, s.certificateTTL)
	}
	if _, err := fmt.Fprintf(stdout, "%s: %s: %s\n", store, step, said); err != nil {
		return fmt.Errorf("say which step it was: %w", err)
	}
	return nil
}

func printToken(ctx context.Context, s settings, log *slog.Logger, stdout io.Writer) error {
	a, err := s.authority(ctx, nil, log, nil)
	if err != nil {
		return err
	}
	token, err := a.JoinToken(s.joinToken, s.joinTokenTTL)
	if err != nil {
		return fmt.Errorf("--join-token: %w", err)
	}
	if _, err := fmt.Fprintln(stdout, token); err != nil {
		return fmt.Errorf("print the join token: %w", err)
	}
	return nil
}

// ready says what is missing before a mesh is served.
func ready(cluster *kube.Cluster, loop *rebuild.Loop) func() error {
	return func() error {
		if cluster != nil {
			if err := cluster.Source().Ready(); err != nil {
				return err
			}
		}
		if loop.State() == nil {
			return errors.New("no mesh has been built yet")
		}
		return nil
	}
}

// health is what those may see who are not on this machine.
func health(o admin.Options) http.Handler {
	mux := http.NewServeMux()
	program.Operate(mux, o.Ready, o.Gatherer, o.Log)
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) { program.Answer(w, o.Log, http.StatusOK, "ok\n") })
	return mux
}

// window is what the admin endpoint shows.
func window(log *slog.Logger, g prometheus.Gatherer, ready func() error, loop *rebuild.Loop, server *discovery.Server) admin.Options {
	return admin.Options{
		Log: log, Gatherer: g, Ready: ready,
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

func dryRun(s settings, log *slog.Logger, stdout, stderr io.Writer) error {
	source, err := s.folder(log)
	if err != nil {
		return err
	}
	state := rebuild.Build(source, s.trustDomain)
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
