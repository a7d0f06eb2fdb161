// Command bench-control-plane measures the control plane in meshes of several
// sizes: a real kube-apiserver and etcd with Services and EndpointSlices, the
// control plane as it is built, and thousands of sidecars that speak delta ADS
// over gRPC and do nothing else, in a process of their own.
//
// What is measured is what a user would see: a change of an EndpointSlice is
// patched through the API server, and the clock stops when the last sidecar that
// uses the Service has acknowledged it. Nothing on the way is replaced; nobody
// runs the pods.
//
// It ends all that it has started. Needs what deploy/testbed/build.sh api builds.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if len(os.Args) > 1 && os.Args[1] == sidecarsCommand {
		err = runSidecars(ctx, os.Args[2:], os.Stdin, os.Stdout)
	} else {
		err = run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-control-plane:", err)
		os.Exit(1)
	}
}

// plan is how much is measured.
type plan struct {
	root      string
	sizes     []int // Services
	endpoints int   // of all of them
	sidecars  int
	pods      int           // those of the sidecars, and more
	uses      int           // destinations of a sidecar
	rate      int           // changes a second
	warm      time.Duration // of changes before those that count
	length    time.Duration // of changes that count
	docs      bool
	quick     bool
}

func parse(args []string, getenv func(string) string) (plan, error) {
	p := plan{
		sizes: []int{1000, 5000, 10_000}, endpoints: 100_000, sidecars: 2000, uses: 10, rate: 100,
		warm: 5 * time.Second, length: 60 * time.Second, docs: true,
	}
	if getenv("BENCH_QUICK") == "1" {
		p.quick, p.docs = true, false
		p.sizes, p.warm, p.length = []int{1000, 10_000}, 2*time.Second, 10*time.Second
	}
	fs := flag.NewFlagSet("bench-control-plane", flag.ContinueOnError)
	fs.StringVar(&p.root, "root", ".", "folder of the repository")
	sizes := fs.String("sizes", "", "comma list of numbers of Services; default 1000,5000,10000")
	fs.IntVar(&p.endpoints, "endpoints", p.endpoints, "endpoints in all")
	fs.IntVar(&p.sidecars, "sidecars", p.sidecars, "sidecars")
	fs.IntVar(&p.pods, "pods", 0, "pods with a proxy; default as many as sidecars")
	fs.IntVar(&p.rate, "rate", p.rate, "changes a second")
	fs.DurationVar(&p.length, "for", p.length, "how long there are changes")
	fs.BoolVar(&p.docs, "docs", p.docs, "write docs/bench-control-plane.md")
	if err := fs.Parse(args); err != nil {
		return p, err
	}
	if *sizes != "" {
		p.sizes = nil
		for s := range strings.SplitSeq(*sizes, ",") {
			n, err := strconv.Atoi(s)
			if err != nil || n < 2*popular || n > p.endpoints {
				return p, fmt.Errorf("--sizes: %q is no number of Services; write one from %d to %d", s, 2*popular, p.endpoints)
			}
			p.sizes = append(p.sizes, n)
		}
	}
	if p.pods = max(p.pods, p.sidecars); p.pods > p.endpoints {
		return p, fmt.Errorf("%d pods: each is an endpoint, of which there are %d", p.pods, p.endpoints)
	}
	if p.sidecars < 1 || p.rate < 1 || p.endpoints < 1 || p.endpoints > 1_000_000 {
		return p, errors.New("--sidecars and --rate must be at least 1, --endpoints at most 1000000")
	}
	var err error
	p.root, err = filepath.Abs(p.root)
	return p, err
}

func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	p, err := parse(args, getenv)
	if err != nil {
		return err
	}
	cache := filepath.Join(p.root, ".cache", "bench")
	dir := filepath.Join(cache, "control-plane")
	bin := filepath.Join(cache, "bin")
	for _, d := range []string{dir, bin} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if err := openFiles(); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "Building the control plane and the sidecar ...")
	if err := build(ctx, p.root, bin); err != nil {
		return err
	}
	all := results{Machine: fmt.Sprintf("%d processors, %s", runtime.NumCPU(), runtime.Version()), Plan: p.describe(), Sizes: map[string]*result{}, Targets: targets()}
	for _, n := range p.sizes {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := &bench{plan: p, services: n, dir: filepath.Join(dir, strconv.Itoa(n)), bin: bin, out: stdout}
		r, err := b.measure(ctx)
		if err != nil {
			return fmt.Errorf("%d Services: %w", n, err)
		}
		all.Sizes[strconv.Itoa(n)] = r
		// After each, so that a run that is cut short leaves what it has.
		if err := writeJSON(filepath.Join(cache, "control-plane.json"), all); err != nil {
			return err
		}
	}
	if all.Injection, err = injection(ctx, p.root); err != nil {
		fmt.Fprintln(stdout, "injection:", err)
	}
	if err := writeJSON(filepath.Join(cache, "control-plane.json"), all); err != nil {
		return err
	}
	text := page(all)
	fmt.Fprintf(stdout, "\n%s\nWritten: %s\n", text, filepath.Join(cache, "control-plane.json"))
	if p.docs {
		path := filepath.Join(p.root, "docs", "bench-control-plane.md")
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "Written:", path)
	}
	return nil
}

func (p plan) describe() string {
	return fmt.Sprintf("%d endpoints, %d pods, %d sidecars that use %d destinations each, %d changes of endpoints a second for %s", p.endpoints, p.pods, p.sidecars, p.uses, p.rate, p.length)
}

func build(ctx context.Context, root, bin string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin+string(filepath.Separator), "./control-plane", "./sidecar")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// lock makes sure that no other benchmark uses the processors.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another benchmark has locked %s: wait for its end (%w)", path, err), f.Close())
	}
	return func() { _ = f.Close() }, nil // closing unlocks
}

// openFiles raises the limit of descriptors as far as it goes, for the children too.
func openFiles() error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("getrlimit: %w", err)
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("setrlimit: %w", err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("encode the figures: %w", err)
	}
	return os.WriteFile(path, b.Bytes(), 0o600)
}
