package main

import (
	"crypto/rand"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/outrigger/torture"
)

//go:embed torture/peers/*.yaml
var peers embed.FS

func (c *cli) torture() *cobra.Command {
	var o torture.Options
	var peer, config string
	var list bool
	cmd := &cobra.Command{
		Use:   "torture",
		Short: "Prove of a log collector on this machine that it loses nothing, or show what it loses",
		Long: `Writes numbered log lines as a node's container runtime does, rotates and deletes
as kubelet does, kills and stops the collector, breaks the backend, and judges from
the backend's side. The exit code is 1 if a line was lost that nothing explains; of
Outrigger's own collector also if one came twice, or late, that should not have.

  lost       did not arrive, and nothing says why
  explained  did not arrive; the collector's audit counts it, with a cause
  kubelet    written and deleted while the collector was not there
  twice      arrived more than once
  disorder   came after a later line of its stream (with --elasticsearch: by @timestamp)

Another collector is graded with --collector-command and --collector-config, or with
--peer. Both may name {{.Logs}}, {{.Data}}, {{.Backend}} and {{.Config}}.`,
		Example: `  outrigger torture --collector bin/collector
  outrigger torture --peer otelcol --output otlp
  outrigger torture --run sigkill --full --seed 7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if list {
				for _, s := range torture.Scenarios() {
					fmt.Fprintf(c.stdout, "%-18s %s\n", s[0], s[1])
				}
				return nil
			}
			if err := chooseCollector(&o, peer, config); err != nil {
				return err
			}
			if o.Seed == 0 {
				var b [8]byte
				_, _ = rand.Read(b[:]) // never fails
				o.Seed = binary.LittleEndian.Uint64(b[:])%1_000_000_000 + 1
			}
			o.Out = cmd.ErrOrStderr()
			fmt.Fprintf(o.Out, "torturing %s with seed %d\n", o.Name, o.Seed)
			if err := os.MkdirAll(o.Folder, 0o755); err != nil { //nolint:gosec // as /var/log/pods
				return err
			}
			results, err := torture.Run(cmd.Context(), o)
			if len(results) == 0 {
				return err
			}
			if err := errors.Join(err, torture.Write(o.Folder, results), torture.Table(c.stdout, results)); err != nil {
				return err
			}
			failed := 0
			for _, r := range results {
				if r.Failed() {
					failed++
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d of %d failed; --seed %d repeats the run, and %s has what the collector said", failed, len(results), o.Seed, filepath.Join(o.Folder, "run"))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Folder, "folder", ".cache/torture", "where the logs, the collector's data and result.json go")
	f.StringVar(&o.Command, "collector-command", "bin/collector --config {{.Config}}", "command of the collector to torture")
	f.StringVar(&config, "collector-config", "", "file with a template of its configuration; without it the collector is ours")
	f.StringVar(&peer, "peer", "", "torture a known collector instead: otelcol (built by deploy/peers/otelcol.sh)")
	f.StringSliceVar(&o.Outputs, "output", nil, "backends to send to: elasticsearch, forward, otlp (default: elasticsearch,forward)")
	f.StringSliceVar(&o.Run, "run", nil, "scenarios to run; all by default")
	f.StringVar(&o.Elasticsearch, "elasticsearch", "", "URL of a real Elasticsearch to put behind the kit's; it is judged by reading the index")
	f.BoolVar(&o.Full, "full", false, "ten times the lines, 100 SIGKILLs, lines of 100 MB")
	f.Uint64Var(&o.Seed, "seed", 0, "repeat the random choices of an earlier run; 0 takes a new one")
	f.IntVar(&o.Parallel, "parallel", 3, "scenarios at once")
	f.BoolVar(&list, "list", false, "list the scenarios and end")
	return cmd
}

// chooseCollector fills in what says which collector it is.
func chooseCollector(o *torture.Options, peer, config string) error {
	o.Name = filepath.Base(strings.Fields(o.Command + " ?")[0])
	if peer == "" && config == "" {
		if len(o.Outputs) == 0 {
			o.Outputs = []string{"elasticsearch", "forward"}
		}
		return nil
	}
	if config != "" {
		b, err := os.ReadFile(config)
		if err != nil {
			return fmt.Errorf("--collector-config: %w", err)
		}
		o.Config = string(b)
		if len(o.Outputs) == 0 {
			return errors.New("--output is missing: say what the collector sends, elasticsearch, forward or otlp")
		}
		return nil
	}
	b, err := peers.ReadFile("torture/peers/" + peer + ".yaml")
	if err != nil {
		return fmt.Errorf("--peer %s is not known: write otelcol, or give --collector-command and --collector-config", peer)
	}
	o.Config, o.Name = string(b), peer
	o.Command = filepath.Join(".cache", "peers", peer, peer) + " --config {{.Config}}"
	if len(o.Outputs) == 0 {
		o.Outputs = []string{"otlp"}
	}
	return nil
}
