// Command e2e brings a real Kubernetes of two nodes up on this machine, installs
// the product into it, and tells the stories that users live by:
//
//	e2e                  all stories; a table, and result.json in the folder
//	e2e --run REGEXP     those whose names match
//	e2e --shell          no stories: a shell inside, with kubectl's configuration set
//
// make e2e and make cluster call it. It needs root; deploy/testbed/build.sh has
// built the cluster's programs before.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
	"github.com/outrigger-mesh/outrigger/deploy/e2e/stories"
)

func main() {
	if code, handled := cluster.Dispatch(); handled {
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = max(code, 1)
	}
	stop()
	os.Exit(code)
}

type config struct {
	root, folder string
	only         *regexp.Regexp
	shell, keep  bool
	bare         bool
}

func run(ctx context.Context, args []string) (int, error) {
	c := config{}
	fs := flag.NewFlagSet("e2e", flag.ContinueOnError)
	var err error
	if c.root, err = checkout(); err != nil {
		return 1, err
	}
	only := fs.String("run", "", "tell the stories whose names match this regular expression")
	fs.StringVar(&c.folder, "folder", filepath.Join(c.root, ".cache", "e2e"), "where logs and results go")
	fs.BoolVar(&c.shell, "shell", false, "bring the cluster up and open a shell in it instead")
	fs.BoolVar(&c.keep, "keep", false, "open a shell when a story has failed")
	fs.BoolVar(&c.bare, "bare", false, "do not install the product")
	if err := fs.Parse(args); err != nil {
		return 2, err
	}
	if c.only, err = regexp.Compile(*only); err != nil {
		return 2, fmt.Errorf("--run: %w", err)
	}
	if c.folder, err = filepath.Abs(c.folder); err != nil {
		return 2, fmt.Errorf("--folder: %w", err)
	}
	if !cluster.Inside() {
		began := time.Now()
		if err := prepare(ctx, c); err != nil {
			return 1, err
		}
		report("images are ready after %.1f s", time.Since(began).Seconds())
		return cluster.Enter(ctx, c.folder)
	}
	return inside(ctx, c)
}

func report(format string, args ...any) { fmt.Printf("e2e: "+format+"\n", args...) }

// checkout is the root of the project around the working directory.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("where are we: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, ".golangci.yml")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not in a checkout of the project: run it by make e2e")
		}
	}
}

func inside(ctx context.Context, c config) (int, error) {
	cl, err := cluster.Start(ctx, cluster.Options{Bin: c.bin(), Nft: c.nft(), Images: c.images(), Report: report})
	if err != nil {
		if c.keep {
			shell(ctx, c)
		}
		return 1, err
	}
	defer cl.Stop()
	told := stories.Stories{Cluster: cl, Only: c.only, Folder: c.folder, Root: c.root, Bin: filepath.Join(c.folder, "bin"), Report: report}
	if !c.bare {
		if err := told.Install(ctx); err != nil {
			if c.keep {
				shell(ctx, c)
			}
			return 1, err
		}
	}
	if c.shell {
		shell(ctx, c)
		return 0, nil
	}
	ok, err := told.Tell(ctx)
	if !ok && c.keep {
		shell(ctx, c)
	}
	if !ok {
		return 1, err
	}
	return 0, err
}

// shell opens a shell in the cluster until it is left.
func shell(ctx context.Context, c config) {
	report("a shell inside; leave it to end the cluster. Another one: nsenter --target $(cat %s) --all bash -c 'KUBECONFIG=%s bash'", filepath.Join(c.folder, "pid"), filepath.Join(c.folder, "kubeconfig"))
	sh := os.Getenv("SHELL")
	if sh == "" {
		sh = "/bin/bash"
	}
	cmd := exec.CommandContext(ctx, sh)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "KUBECONFIG="+filepath.Join(c.folder, "kubeconfig"), "PATH="+c.bin()+":"+filepath.Join(c.folder, "bin")+":"+os.Getenv("PATH"))
	_ = cmd.Run() // what the last command of the shell ended with is nobody's business
}
