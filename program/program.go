// Package program is what every program of ours owes the one who runs it: a
// clean end and an exit code, logs under ECS names, a version, listeners whose
// errors name the flag and the remedy, and a small HTTP server that ends in
// order.
//
// Only main packages and admin packages call it. It knows nothing of the mesh
// and holds no state.
package program

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Run is a program: it returns when ctx ends, or with what it failed of.
type Run func(ctx context.Context, args []string, stdout, stderr io.Writer) error

// Main runs a program until it returns, with a context that ends with SIGINT or
// SIGTERM, and exits: 0 where it ended because it was told to, or because
// --help or --version was all that was asked; else 1, having said why.
func Main(name string, run Run) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, name+":", err)
		os.Exit(1)
	}
}

// version is set by the linker in releases.
var version string

// Version is the release, or else the commit that the program was built from.
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	i := slices.IndexFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "vcs.revision" })
	if i < 0 || info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return info.Settings[i].Value
}

// Flags are the ones that every program has.
type Flags struct {
	level   slog.Level
	format  string
	version bool
}

// Register defines --log-level, --log-format and --version.
func (f *Flags) Register(fs *flag.FlagSet) {
	fs.TextVar(&f.level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	fs.StringVar(&f.format, "log-format", "json", "json or text")
	fs.BoolVar(&f.version, "version", false, "print the version and end")
}

// Parse parses args, which may hold flags only. It returns flag.ErrHelp where
// --version was asked for, having printed it to stdout.
func (f *Flags) Parse(fs *flag.FlagSet, args []string, stdout io.Writer) error {
	// A mistake is said once, by Main; the flags are listed for --help only.
	said, usage := fs.Output(), &bytes.Buffer{}
	fs.SetOutput(usage)
	err := fs.Parse(args)
	fs.SetOutput(said)
	if errors.Is(err, flag.ErrHelp) {
		_, _ = said.Write(usage.Bytes()) // to the terminal of someone who asked
		return err
	}
	if err != nil {
		return fmt.Errorf("%w; --help lists the flags", err)
	}
	switch {
	case f.version:
		if _, err := fmt.Fprintln(stdout, fs.Name(), Version()); err != nil {
			return err
		}
		return flag.ErrHelp
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q: settings are flags and begin with --, see --help", fs.Arg(0))
	case f.format != "json" && f.format != "text":
		return fmt.Errorf("--log-format %q: write json or text", f.format)
	}
	return nil
}

// Log is the program's own log. Every line says which service wrote it.
func (f *Flags) Log(service string, to io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{Level: f.level, ReplaceAttr: record.ECS}
	if f.format == "text" {
		return slog.New(slog.NewTextHandler(to, o))
	}
	return slog.New(slog.NewJSONHandler(to, o)).With(record.ServiceName, service)
}

// Registry makes a registry that counts what the Go runtime and the process do.
func Registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}
