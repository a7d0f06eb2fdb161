// Command outrigger is how people ask the mesh: search its logs, learn why a
// breaker opened, prove that no line is missing, inject sidecars offline.
package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/outrigger-mesh/outrigger/program"
)

func main() {
	program.Main("outrigger", func(ctx context.Context, args []string, stdout, stderr io.Writer) error {
		return execute(ctx, args, os.Stdin, stdout, stderr)
	})
}

// defaultCollector is where a collector answers unless told otherwise.
const defaultCollector = "127.0.0.1:15030"

// cli is what all commands share.
type cli struct {
	stdin     io.Reader
	stdout    io.Writer
	collector string
	http      *http.Client
}

func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	c := &cli{stdin: stdin, stdout: stdout, http: &http.Client{Transport: &http.Transport{ResponseHeaderTimeout: 30 * time.Second}}}
	root := &cobra.Command{
		Use:           "outrigger",
		Short:         "Install the mesh and ask it: check, search logs, explain breakers, audit, inject",
		Version:       program.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	collector := defaultCollector
	if v, ok := os.LookupEnv("OUTRIGGER_COLLECTOR"); ok {
		collector = v
	}
	root.PersistentFlags().StringVar(&c.collector, "collector", collector, "address of a collector with a store (env OUTRIGGER_COLLECTOR)")
	root.AddCommand(c.logs(), c.why(), c.inject(), c.auditPods(), c.install(), c.upgrade(), c.uninstall(), c.check(), c.torture())
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}
