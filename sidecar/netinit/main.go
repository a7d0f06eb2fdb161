// Command netinit leads a pod's TCP traffic to its proxy: in an init container,
// once, before anything else of the pod runs. Where the CNI plugin has done so,
// it checks with --check that it has.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/check"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

// Exit codes, which kubectl describe shows of a pod that does not start.
const (
	exitFailed       = 1 // anything else
	exitUsage        = 2 // flags
	exitNotPermitted = 3 // no NET_ADMIN, seccomp
	exitUnsupported  = 4 // neither nftables nor iptables
	exitNotCaptured  = 5 // the check failed
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "netinit:", err)
	}
	os.Exit(code(err)) //nolint:forbidigo // this is main, and codes are told apart
}

// errUsage wraps what is wrong with the flags.
var errUsage = errors.New("flags")

func code(err error) int {
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, redirect.ErrNotPermitted):
		return exitNotPermitted
	case errors.Is(err, redirect.ErrUnsupported):
		return exitUnsupported
	case errors.Is(err, check.ErrNotCaptured):
		return exitNotCaptured
	}
	return exitFailed
}

type config struct {
	program.Flags
	rules.Config
	backend                 redirect.Backend
	check, clean, skipCheck bool
}

func parse(args []string, stdout, stderr io.Writer) (config, error) {
	c := config{Config: rules.Default()}
	fs := flag.NewFlagSet("netinit", flag.ContinueOnError)
	fs.SetOutput(stderr)
	c.Config.Register(fs)
	fs.TextVar(&c.backend, "backend", redirect.Auto, "auto (nftables where the kernel takes it, else iptables), nftables or iptables")
	fs.BoolVar(&c.check, "check", false, "change nothing, only check that traffic is captured; needs no privilege")
	fs.BoolVar(&c.clean, "clean", false, "remove all rules that this program has set, by either backend, and end")
	fs.BoolVar(&c.skipCheck, "skip-check", false, "do not check whether the rules work once they are set")
	c.Flags.Register(fs)
	if err := c.Flags.Parse(fs, args, stdout); err != nil {
		return c, err
	}
	switch {
	case c.check && c.clean:
		return c, errors.New("--check and --clean exclude each other: give one")
	case c.check && c.skipCheck:
		return c, errors.New("--check and --skip-check exclude each other: give one")
	}
	return c, c.Config.Validate()
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	c, err := parse(args, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	log := c.Log("netinit", stderr)
	if c.clean {
		if err := redirect.Clean(ctx); err != nil {
			return err
		}
		log.Info("traffic is no longer captured")
		return nil
	}
	if !c.check {
		res, err := redirect.Apply(ctx, c.Config, c.backend, log)
		if err != nil {
			return err
		}
		if _, err := redirect.Verify(ctx, c.Config); err != nil {
			return fmt.Errorf("the rules were set, but read back they are others: %w; does something else in this pod change them?", err)
		}
		log.Info("traffic is captured", "outrigger.backend", string(res.Backend), "outrigger.program", res.Program, "outrigger.ipv6", res.IPv6)
	}
	if c.skipCheck {
		return nil
	}
	return check.Run(ctx, c.Config, log)
}
