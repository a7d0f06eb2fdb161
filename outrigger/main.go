// Command outrigger is how people ask the mesh: search its logs, learn why a
// breaker opened, prove that no line is missing, inject sidecars offline.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "outrigger:", err)
		os.Exit(1)
	}
}

// version is set by the linker.
var version = "dev"

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
		Short:         "Ask the mesh: search logs, explain breakers, audit, inject",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	collector := defaultCollector
	if v, ok := os.LookupEnv("OUTRIGGER_COLLECTOR"); ok {
		collector = v
	}
	root.PersistentFlags().StringVar(&c.collector, "collector", collector, "address of a collector with a store (env OUTRIGGER_COLLECTOR)")
	root.AddCommand(c.logs(), c.why(), c.inject())
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}
