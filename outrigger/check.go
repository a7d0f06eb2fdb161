package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
	"github.com/outrigger-mesh/outrigger/outrigger/installation"
	"github.com/outrigger-mesh/outrigger/program"
)

func (c *cli) check() *cobra.Command {
	var r reach
	var ch choice
	var before, strict bool
	var output string
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look whether a cluster is fit for Outrigger, and whether the installation is well",
		Long: `Look whether a cluster is fit for Outrigger and, where it is installed, whether
all of it is well. Each finding that is not ok says what mends it.

Exit code 0: nothing failed (with --strict: and nothing was warned of). 1:
something did, or the cluster could not be asked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), ch.timeout, fmt.Errorf("%s have passed (--timeout)", ch.timeout))
			defer cancel()
			if output != "text" && output != "json" {
				return fmt.Errorf("--output %q: write text or json", output)
			}
			report, err := c.look(ctx, r, ch, before, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if output == "json" {
				e := json.NewEncoder(c.stdout)
				e.SetIndent("", "  ")
				if err := e.Encode(report); err != nil {
					return err
				}
			} else {
				report.print(c.stdout)
			}
			if n := report.count(installation.Failure); n > 0 || strict && report.count(installation.Warning) > 0 {
				return errNotWell
			}
			return nil
		},
	}
	r.register(cmd)
	cmd.Flags().StringVar(&ch.profile, "profile", "", "the profile that would be installed")
	cmd.Flags().StringArrayVarP(&ch.files, "values", "f", nil, "the values that would be installed")
	cmd.Flags().StringArrayVar(&ch.set, "set", nil, "a value that would be installed")
	cmd.Flags().StringVar(&ch.version, "release", program.Version(), "the version that would be installed")
	cmd.Flags().DurationVar(&ch.timeout, "timeout", time.Minute, "how long all of it may take")
	cmd.Flags().BoolVar(&before, "before", false, "look at the cluster only, as before an installation")
	cmd.Flags().BoolVar(&strict, "strict", false, "fail for warnings too")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// report is what check says.
type report struct {
	Cluster      []installation.Finding `json:"cluster"`
	Installation []installation.Finding `json:"installation,omitempty"`
	// Installed is its version; empty where there is none.
	Installed string `json:"installed,omitempty"`
}

func (c *cli) look(ctx context.Context, r reach, ch choice, before bool, warnings io.Writer) (report, error) {
	var out report
	client, err := r.connect(warnings)
	if err != nil {
		return out, err
	}
	version, err := client.Version()
	if err != nil {
		return out, err
	}
	in, unseen, err := client.See(ctx, r.namespace)
	if err != nil {
		return out, err
	}
	out.Cluster = unseen
	values, err := c.values(ch)
	if err != nil {
		return out, err
	}
	if in.Values != "" {
		kept, err := chart.Values([]byte(in.Values))
		if err != nil {
			return out, fmt.Errorf("the values of the installation: %w", err)
		}
		values = chart.Merge(kept, values)
	}
	rel, err := chart.Render(ctx, values, chart.Options{Namespace: r.namespace, Version: ch.version, KubeVersion: version, ManagedBy: installation.Manager})
	if err != nil {
		return out, err
	}
	now := time.Now()
	out.Cluster = append(out.Cluster, client.Before(ctx, rel, in, now)...)
	if in.Version != "" && !before {
		out.Installed = in.Version
		out.Installation = client.After(ctx, rel, in, now)
	}
	return out, nil
}

func (r report) count(l installation.Level) (n int) {
	for _, f := range append(r.Cluster, r.Installation...) {
		if f.Level == l {
			n++
		}
	}
	return n
}

// print is for people: a line a finding, and what mends it below.
func (r report) print(w io.Writer) {
	section := func(title string, findings []installation.Finding) {
		fmt.Fprintln(w, title)
		for _, f := range findings {
			fmt.Fprintf(w, "  %-7s  %-26s %s\n", f.Level, f.Check, f.Text)
			for line := range strings.Lines(f.Remedy) {
				fmt.Fprintf(w, "           -> %s\n", strings.TrimSuffix(line, "\n"))
			}
		}
	}
	section("cluster", r.Cluster)
	if r.Installed != "" {
		section("installation", r.Installation)
	} else {
		fmt.Fprintln(w, "outrigger is not installed")
	}
	fmt.Fprintf(w, "%d ok, %d warnings, %d failures\n", r.count(installation.OK), r.count(installation.Warning), r.count(installation.Failure))
}
