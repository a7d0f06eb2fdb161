package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"helm.sh/helm/v4/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
	"github.com/outrigger-mesh/outrigger/deploy/profiles"
	"github.com/outrigger-mesh/outrigger/outrigger/installation"
	"github.com/outrigger-mesh/outrigger/program"
)

// maxValues bounds a file of values.
const maxValues = 1 << 20

// reach is how a cluster is reached, and where in it we are.
type reach struct{ kubeconfig, context, namespace string }

func (r *reach) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&r.kubeconfig, "kubeconfig", "", "file that says how to reach the cluster; empty: as kubectl finds it")
	cmd.Flags().StringVar(&r.context, "context", "", "context of the kubeconfig; empty: the current one")
	cmd.Flags().StringVarP(&r.namespace, "namespace", "n", installation.Namespace, "namespace of the control plane")
}

func (r *reach) connect(warnings io.Writer) (*installation.Client, error) {
	return installation.Connect(r.kubeconfig, r.context, warnings)
}

// choice is which release is wanted.
type choice struct {
	profile string
	files   []string
	set     []string
	dryRun  bool
	wait    bool
	timeout time.Duration
	version string
}

func (ch *choice) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&ch.profile, "profile", "", "values for a kind of cluster: "+list(profiles.Names()))
	cmd.Flags().StringArrayVarP(&ch.files, "values", "f", nil, "file of values, laid over the profile; - is standard input; may be given often")
	cmd.Flags().StringArrayVar(&ch.set, "set", nil, "one value, as in Helm: injector.failurePolicy=Ignore; may be given often")
	cmd.Flags().BoolVar(&ch.dryRun, "dry-run", false, "print the objects and have the API server check them; change nothing")
	cmd.Flags().BoolVar(&ch.wait, "wait", false, "wait until everything works, and say what is waited for")
	cmd.Flags().DurationVar(&ch.timeout, "timeout", 5*time.Minute, "how long all of it may take")
	cmd.Flags().StringVar(&ch.version, "release", program.Version(), "version to install: the tag of the images, unless a value names another")
}

func list(names []string) string {
	var b bytes.Buffer
	for i, n := range names {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(n)
	}
	return b.String()
}

// values are the user's own: profile, files, single values, in this order.
func (c *cli) values(ch choice) (map[string]any, error) {
	out := map[string]any{}
	if ch.profile != "" {
		b, err := profiles.Read(ch.profile)
		if err != nil {
			return nil, fmt.Errorf("--profile: %w", err)
		}
		if out, err = chart.Values(b); err != nil {
			return nil, fmt.Errorf("--profile %s: %w", ch.profile, err)
		}
	}
	for _, name := range ch.files {
		b, err := c.readValues(name)
		if err != nil {
			return nil, fmt.Errorf("--values: %w", err)
		}
		v, err := chart.Values(b)
		if err != nil {
			return nil, fmt.Errorf("--values %s: %w", name, err)
		}
		out = chart.Merge(out, v)
	}
	for _, s := range ch.set {
		if err := strvals.ParseInto(s, out); err != nil {
			return nil, fmt.Errorf("--set %s: %w; write for example injector.failurePolicy=Ignore", s, err)
		}
	}
	return out, nil
}

func (c *cli) readValues(name string) ([]byte, error) {
	in := c.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxValues+1))
	if err == nil && len(b) > maxValues {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxValues)
	}
	return b, err
}

// plan renders the release with the user's values.
func plan(ctx context.Context, client *installation.Client, r reach, ch choice, values map[string]any, upgrade bool, out io.Writer) (installation.Plan, error) {
	kube, err := client.Version()
	if err != nil {
		return installation.Plan{}, err
	}
	if err := installation.Supported(kube); err != nil {
		return installation.Plan{}, err
	}
	text, err := yaml.Marshal(values)
	if err != nil {
		return installation.Plan{}, fmt.Errorf("values: %w", err)
	}
	all := chart.Merge(values, map[string]any{"namespace": map[string]any{"create": true}})
	rel, err := chart.Render(ctx, all, chart.Options{Namespace: r.namespace, Version: ch.version, KubeVersion: kube, ManagedBy: installation.Manager, Upgrade: upgrade})
	if err != nil {
		return installation.Plan{}, err
	}
	return installation.Plan{
		Release: rel, Namespace: r.namespace, Profile: ch.profile, Values: string(text), DryRun: ch.dryRun, Wait: ch.wait, Out: out,
	}, nil
}

// carryOut applies a plan within its time. What happens goes to standard error,
// so that the objects of a dry run can be piped on.
func (c *cli) carryOut(ctx context.Context, client *installation.Client, p installation.Plan, ch choice) error {
	ctx, cancel := context.WithTimeoutCause(ctx, ch.timeout, fmt.Errorf("%s have passed (--timeout)", ch.timeout))
	defer cancel()
	if p.DryRun {
		for _, o := range append(p.Release.CRDs, p.Release.Objects...) {
			b, err := yaml.Marshal(o)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(c.stdout, "---\n%s", b); err != nil {
				return err
			}
		}
	}
	if err := client.Apply(ctx, p); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			return fmt.Errorf("%w: %w; the same command goes on from there", cause, err)
		}
		return err
	}
	if p.DryRun {
		fmt.Fprintln(p.Out, "nothing was changed: --dry-run")
		return nil
	}
	_, err := fmt.Fprint(c.stdout, p.Release.Notes)
	return err
}

func (c *cli) install() *cobra.Command {
	var r reach
	var ch choice
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put Outrigger into a cluster",
		Long: `Put Outrigger into a cluster: the chart that is built into this program, with
the values of a profile and yours, by server-side apply. The webhook comes last.
Whatever goes wrong, the same command goes on from there.

The values are kept in the cluster for the next upgrade.`,
		Example: `  outrigger check
  outrigger install --profile kubeadm --wait`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := r.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			values, err := c.values(ch)
			if err != nil {
				return err
			}
			in, err := client.Installed(ctx, r.namespace)
			if err != nil {
				return err
			}
			if err := in.ByOther(); err != nil {
				return err
			}
			if in.Version != "" && in.Version != ch.version {
				return fmt.Errorf("outrigger %s is installed in namespace %s: use outrigger upgrade", in.Version, in.Namespace)
			}
			p, err := plan(ctx, client, r, ch, values, false, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return c.carryOut(ctx, client, p, ch)
		},
	}
	r.register(cmd)
	ch.register(cmd)
	return cmd
}

func (c *cli) upgrade() *cobra.Command {
	var r reach
	var ch choice
	var reset, oldSidecars bool
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Bring the installation to this version, or give it other values",
		Long: `Bring the installation to the version of this program, with the values that it
was installed with and those given now laid over them. What the new version has
no more is removed. Meshed pods keep working with their old sidecars.

It refuses to go back, and to go more than three minor versions at once.`,
		Example: `  outrigger upgrade --wait
  outrigger upgrade --set injector.failurePolicy=Ignore`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := r.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			in, err := client.Installed(ctx, r.namespace)
			if err != nil {
				return err
			}
			if in.Version == "" {
				return fmt.Errorf("outrigger is not installed in namespace %s: use outrigger install", r.namespace)
			}
			if err := in.ByOther(); err != nil {
				return err
			}
			if err := installation.Step(in.Version, ch.version); err != nil {
				return err
			}
			if !oldSidecars {
				if err := client.TooOld(ctx, ch.version); err != nil {
					return fmt.Errorf("%w\nor give --allow-old-sidecars", err)
				}
			}
			values, err := c.values(ch)
			if err != nil {
				return err
			}
			if !reset {
				// A profile given now begins anew: it would not know which values were the
				// old profile's.
				if ch.profile != "" && in.Profile != ch.profile {
					return fmt.Errorf("it was installed with the profile %q; give --reset-values to begin anew with --profile %s and the values given now", in.Profile, ch.profile)
				}
				kept, err := chart.Values([]byte(in.Values))
				if err != nil {
					return fmt.Errorf("the values that it was installed with: %w; give --reset-values and all values", err)
				}
				values, ch.profile = chart.Merge(kept, values), in.Profile
			}
			p, err := plan(ctx, client, r, ch, values, true, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			fmt.Fprintf(p.Out, "from %s to %s\n", in.Version, ch.version)
			return c.carryOut(ctx, client, p, ch)
		},
	}
	r.register(cmd)
	ch.register(cmd)
	cmd.Flags().BoolVar(&reset, "reset-values", false, "forget the values of the installation; only those given now count")
	cmd.Flags().BoolVar(&oldSidecars, "allow-old-sidecars", false, "go on where meshed pods have sidecars that the new version does not understand any more")
	return cmd
}

func (c *cli) uninstall() *cobra.Command {
	var r reach
	var crds, keep, dryRun bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take Outrigger out of a cluster",
		Long: `Take Outrigger out of a cluster: the webhook first, so that no pod waits for it,
then all else, and the namespace, if install has made it. With the namespace
goes the certificate authority; --keep-namespace keeps both.

Policies stay, unless --crds takes their kinds away too. Pods keep their
sidecars until they are restarted; they are listed.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("%s have passed (--timeout)", timeout))
			defer cancel()
			client, err := r.connect(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			in, err := client.Installed(ctx, r.namespace)
			if err != nil {
				return err
			}
			if err := in.ByOther(); err != nil {
				return err
			}
			removal := installation.Removal{Namespace: r.namespace, KeepNamespace: keep, DryRun: dryRun, Out: cmd.ErrOrStderr()}
			if crds {
				rel, err := chart.Render(ctx, nil, chart.Options{Namespace: r.namespace, KubeVersion: minimum})
				if err != nil {
					return err
				}
				removal.CRDs = rel.CRDs
			}
			return client.Remove(ctx, removal)
		},
	}
	r.register(cmd)
	cmd.Flags().BoolVar(&crds, "crds", false, "remove the CustomResourceDefinitions and with them every policy of the cluster")
	cmd.Flags().BoolVar(&keep, "keep-namespace", false, "keep the namespace and the certificate authority in it, for another installation")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "say what would be removed, and remove nothing")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long all of it may take")
	return cmd
}

// minimum is the oldest Kubernetes that the chart takes.
const minimum = "v1.27.0"

// errNotWell: check has said why.
var errNotWell = errors.New("not all is well, see above")
