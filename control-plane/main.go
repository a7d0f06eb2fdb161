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
	"strings"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/admin"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
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
	config, xdsAddress, adminAddress, trustDomain string
	dryRun                                        bool

	authorityDir           string
	xdsTLSAddress, tlsName string
	certificateTTL         time.Duration
	joinToken              string
	joinTokenTTL           time.Duration
}

func parse(args []string, stdout, stderr io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("control-plane", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&s.config, "config", "", "folder of Kubernetes objects and policies in YAML or JSON (required)")
	f.StringVar(&s.xdsAddress, "xds-address", "127.0.0.1:15010", "loopback address to serve xDS on")
	f.StringVar(&s.adminAddress, "admin-address", "127.0.0.1:15014", "loopback address of /ready, /metrics and /debug")
	f.StringVar(&s.trustDomain, "trust-domain", identity.DefaultTrustDomain, "SPIFFE trust domain of the workloads")
	f.BoolVar(&s.dryRun, "dry-run", false, "print problems, parity and the xDS that would be served as JSON, and end; exit code 1 if there are problems")
	f.StringVar(&s.authorityDir, "authority-dir", "", "folder of the certificate authority (ca.key, ca.crt, root.crt, token.key); made with a new root where it does not exist. Empty: no authority")
	f.StringVar(&s.xdsTLSAddress, "xds-tls-address", "", "address to serve xDS and certificates on over TLS, usually port 15012; needs --authority-dir. Empty: not served")
	f.StringVar(&s.tlsName, "xds-tls-names", "localhost,127.0.0.1,::1", "comma list of DNS names and IP addresses in the certificate of --xds-tls-address")
	f.DurationVar(&s.certificateTTL, "certificate-ttl", authority.DefaultTTL, "how long a workload's certificate is valid, 1m to 24h; it is renewed at half of that")
	f.StringVar(&s.joinToken, "join-token", "", "print a token with which the workload <namespace>/<service account> gets its first certificate, and end; needs --authority-dir")
	f.DurationVar(&s.joinTokenTTL, "join-token-ttl", authority.DefaultTokenTTL, "how long the token of --join-token is valid, at most 720h")
	s.Register(f)
	if err := s.Parse(f, args, stdout); err != nil {
		return s, err
	}
	if s.authorityDir == "" && s.joinToken != "" {
		return s, errors.New("--join-token needs --authority-dir: the folder whose key signs the token")
	}
	if s.authorityDir == "" && s.xdsTLSAddress != "" {
		return s, errors.New("--xds-tls-address needs --authority-dir: the folder of the authority that signs certificates, for example --authority-dir ./authority")
	}
	if s.joinToken != "" {
		return s, nil
	}
	if s.config == "" {
		return s, errors.New("--config is missing: give the folder with the Kubernetes objects, for example --config ./mesh")
	}
	return s, nil
}

// execute runs the program until ctx ends. Everything is bound before anything
// is started, and stopped in reverse.
func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s, err := parse(args, stdout, stderr)
	if err != nil {
		return err
	}
	log := s.Log("control-plane", stderr)
	if s.joinToken != "" {
		return printToken(s, log, stdout)
	}
	source := manifests.New(s.config, log)
	if err := source.Check(); err != nil {
		return fmt.Errorf("--config %s: %w; give an existing folder", s.config, err)
	}
	if s.dryRun {
		return dryRun(source, s.trustDomain, stdout, stderr)
	}

	registry := program.Registry()
	server := discovery.New(discovery.Options{Log: log, Registry: registry})
	loop := rebuild.New(rebuild.Options{
		Source: source, Publisher: server, TrustDomain: s.trustDomain, Log: log, Registry: registry,
	})

	var issuer *authority.Authority
	if s.authorityDir != "" {
		if issuer, err = s.authority(log, registry); err != nil {
			return err
		}
	}

	xdsListener, err := program.ListenLoopback(ctx, "--xds-address", s.xdsAddress)
	if err != nil {
		return err
	}
	adminListener, err := program.ListenLoopback(ctx, "--admin-address", s.adminAddress)
	if err != nil {
		return errors.Join(err, xdsListener.Close())
	}
	var secure []discovery.Secure
	secureAddress := ""
	if s.xdsTLSAddress != "" {
		l, err := program.Listen(ctx, "--xds-tls-address", s.xdsTLSAddress)
		if err != nil {
			return errors.Join(err, xdsListener.Close(), adminListener.Close())
		}
		secureAddress = l.Addr().String()
		secure = append(secure, discovery.Secure{
			Listener: l, Credentials: issuer.Credentials(), TrustDomain: s.trustDomain, MaxAge: issuer.MaxConnectionAge(), Register: issuer.Register,
		})
	}
	log.Info("control plane starts", "service.version", program.Version(), "outrigger.config", s.config,
		"outrigger.xds_address", xdsListener.Addr().String(), "outrigger.xds_tls_address", secureAddress, "outrigger.admin_address", adminListener.Addr().String())

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
		return program.Serve(ctx, adminListener, admin.Handler(window(log, registry, loop, server)), log)
	})
	add(func(ctx context.Context) error { return server.Serve(ctx, xdsListener, secure...) })
	if issuer != nil {
		add(issuer.Run)
	}
	add(loop.Run)
	err = group.Run()
	log.Info("control plane stopped")
	return err
}

// authority opens the one that the flags describe.
func (s settings) authority(log *slog.Logger, registry prometheus.Registerer) (*authority.Authority, error) {
	var names []string
	for n := range strings.SplitSeq(s.tlsName, ",") {
		if n = strings.TrimSpace(n); n != "" {
			names = append(names, n)
		}
	}
	a, err := authority.Open(authority.Options{
		Dir: s.authorityDir, TrustDomain: s.trustDomain, TTL: s.certificateTTL, Names: names, Log: log, Registerer: registry,
	})
	if err != nil {
		return nil, fmt.Errorf("--authority-dir, --certificate-ttl: %w", err)
	}
	return a, nil
}

func printToken(s settings, log *slog.Logger, stdout io.Writer) error {
	a, err := s.authority(log, nil)
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
			if notes := xds.MTLSParity(p); notes != nil {
				workloads := map[string]bool{}
				for _, e := range p.Endpoints {
					if e.MTLS && !workloads[e.Workload] {
						workloads[e.Workload] = true
						out = append(out, parity{"Workload", s.Namespace + "/" + e.Workload, key, notes})
					}
				}
			}
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
