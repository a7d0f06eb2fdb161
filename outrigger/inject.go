package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/injector/patch"
	"github.com/outrigger-mesh/outrigger/program"
)

// maxManifest bounds what inject reads.
const maxManifest = 64 << 20

func (c *cli) inject() *cobra.Command {
	var file, namespace string
	s := patch.Settings{}
	cmd := &cobra.Command{
		Use:   "inject -f FILE",
		Short: "Put the sidecar into the pods of a manifest, as the webhook would",
		Long: `Put the sidecar into the Pods, Deployments, StatefulSets, DaemonSets, Jobs and
CronJobs of a manifest, as the webhook would, and write the result to standard
output. Documents that hold no pods stay as they are, byte for byte. What was
done to each object is said on standard error.`,
		Example: `  outrigger inject -f app.yaml | kubectl apply -f -`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			in, err := c.read(file)
			if err != nil {
				return err
			}
			// Who calls inject asks for it: the label of the namespace is implied, the
			// pod's own still wins.
			ns := patch.Namespace{Name: namespace, Labels: map[string]string{patch.LabelInjection: "enabled"}}
			out, decisions, err := patch.YAML(in, ns, s)
			for _, d := range decisions {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", d.Object, d.Reason)
				for _, w := range d.Warnings {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: warning: %s\n", d.Object, w)
				}
			}
			if err != nil {
				return err
			}
			_, err = c.stdout.Write(out)
			return err
		},
	}
	cmd.Flags().StringVarP(&file, "filename", "f", "", "manifest to read; - is standard input (required)")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "default", "namespace of objects that name none")
	cmd.Flags().StringVar(&s.Image, "image", "outrigger/sidecar:"+program.Version(), "image of the sidecar")
	cmd.Flags().StringVar(&s.ControlPlane, "control-plane", "outrigger-control-plane.outrigger-system:15012", "host:port of the control plane")
	cmd.Flags().StringVar(&s.TrustDomain, "trust-domain", "", "SPIFFE trust domain; the sidecar's default where empty")
	cmd.Flags().StringVar(&s.EnvoyImage, "envoy-image", "", "image of Envoy, for pods that ask for one; they are refused where empty")
	cmd.Flags().BoolVar(&s.CNI, "cni", false, "a CNI plugin redirects the traffic of pods, which then need no privilege")
	cmd.Flags().BoolVar(&s.NativeSidecar, "native-sidecar", true, "init container with restartPolicy Always (Kubernetes 1.29 and later)")
	if err := cmd.MarkFlagRequired("filename"); err != nil {
		panic(err) // the flag is defined above
	}
	return cmd
}

func (c *cli) read(file string) ([]byte, error) {
	in := c.stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxManifest+1))
	if err == nil && len(b) > maxManifest {
		err = fmt.Errorf("%s is larger than %d bytes: split it", file, maxManifest)
	}
	return b, err
}
