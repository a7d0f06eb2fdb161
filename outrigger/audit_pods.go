package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/injector/audit"
	"github.com/outrigger-mesh/outrigger/injector/patch"
	"github.com/outrigger-mesh/outrigger/outrigger/cluster"
)

func (c *cli) auditPods() *cobra.Command {
	var kubeconfig, context, namespace, system, image string
	var quiet bool
	format := textFormat
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "List the pods that should be meshed and are not, or run an old sidecar",
		Long: `List the pods that should be meshed and are not, or run another sidecar than the
injector gives now, each with its cause and the command that mends it:

  missed              nobody injected it: the webhook was away, or is not registered
  labelled-later      the label came after the pod
  host-network        the pod uses the node's network
  pod-security        the namespace refuses the redirection, and there is no CNI plugin
  runs-to-completion  without native sidecars it would never complete
  windows             the sidecar runs on Linux only
  invalid             a label or annotation that cannot be followed
  outdated            meshed, with another sidecar than the injector gives now
  disabled            by its own label, in a namespace that is enabled

The exit code is 1 if there are pods that should be meshed and are not: any cause
but the last two.`,
		Example: `  outrigger audit -n shop`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := cluster.Connect(kubeconfig, context, "outrigger")
			if err != nil {
				return err
			}
			settings, err := cluster.InjectorSettings(cmd.Context(), client, system)
			if image != "" {
				settings.Image = image
			} else if err != nil {
				fmt.Fprintf(cmd.ErrOrStderr(), "old sidecars are not looked for: %v; say which is new with --image\n", err)
				settings = patch.Settings{NativeSidecar: true}
			}
			report, err := cluster.Audit(cmd.Context(), client, namespace, settings)
			if err != nil {
				return err
			}
			if format == jsonFormat {
				enc := json.NewEncoder(c.stdout)
				enc.SetEscapeHTML(false) // commands have && in them
				enc.SetIndent("", "  ")
				err = enc.Encode(report)
			} else {
				err = printPods(c.stdout, report, quiet)
			}
			if n := report.Unmeshed(); n > 0 {
				err = errors.Join(err, fmt.Errorf("%s should be meshed and %s not", count(n, "pod"), isAre(n)))
			}
			return err
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file; as kubectl does where empty, or the pod's own ServiceAccount")
	cmd.Flags().StringVar(&context, "context", "", "context of the kubeconfig; the current one where empty")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace to audit; all where empty")
	cmd.Flags().StringVar(&system, "system-namespace", patch.SystemNamespace, "namespace of the injector, whose settings tell which sidecar is new")
	cmd.Flags().StringVar(&image, "image", "", "the sidecar that pods should have; the injector's where empty")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "leave out what is only to be known: outdated and disabled pods")
	cmd.Flags().VarP(&format, "output", "o", "text or json")
	return cmd
}

func printPods(w io.Writer, r *audit.Report, quiet bool) error {
	var b strings.Builder
	rows := table{{"NAMESPACE", "POD", "CAUSE", "MENDED BY"}}
	var messages []string
	for _, f := range r.Findings {
		if quiet && !f.Cause.Unmeshed() {
			continue
		}
		rows = append(rows, []string{clean(f.Namespace), clean(f.Pod), string(f.Cause), clean(f.Command)})
		messages = append(messages, clean(f.Message))
	}
	if len(messages) > 0 {
		rows.printLeft(&b, messages)
		b.WriteByte('\n')
	}
	counts := r.Counts()
	fmt.Fprintf(&b, "%s meshed, %d should be and %s not, %d with an old sidecar, %d disabled\n",
		count(r.Meshed+counts[audit.Outdated], "pod"), r.Unmeshed(), isAre(r.Unmeshed()), counts[audit.Outdated], counts[audit.Disabled])
	_, err := io.WriteString(w, b.String())
	return err
}

// printLeft prints columns of text, and below each row but the first a note.
func (t table) printLeft(b *strings.Builder, notes []string) {
	width := make([]int, len(t[0]))
	for _, row := range t {
		for i, cell := range row {
			width[i] = max(width[i], len([]rune(cell)))
		}
	}
	for n, row := range t {
		var line strings.Builder
		for i, cell := range row {
			fmt.Fprintf(&line, "%-*s  ", width[i], cell)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
		if n > 0 {
			b.WriteString("    " + notes[n-1] + "\n")
		}
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func isAre(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}
