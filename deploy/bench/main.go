// Command bench measures our sidecar beside its peers: the same upstream server
// and the same load, in turns, on two processors.
//
// It starts everything as children on loopback, measures in interleaved rounds,
// and writes what it has found as JSON, as a table and, after a full run, into
// the documentation. A peer that cannot be had or gives one wrong answer has a
// reason in its place, never a number.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := pin(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// pinned marks the environment of a benchmark that runs on few processors.
const pinned = "OUTRIGGER_BENCH_PINNED"

// pin begins again on the first two processors where there are more: children
// inherit that, so that every machine measures the same.
func pin() error {
	if runtime.NumCPU() <= workers || os.Getenv(pinned) != "" {
		return nil
	}
	runtime.LockOSThread() // exec keeps what this thread may use
	defer runtime.UnlockOSThread()
	var may, two unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		return fmt.Errorf("sched_getaffinity: %w", err)
	}
	for cpu := 0; two.Count() < workers; cpu++ {
		if may.IsSet(cpu) {
			two.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &two); err != nil {
		return fmt.Errorf("sched_setaffinity: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, os.Args, append(os.Environ(), pinned+"=1"))
}

// plan is how much is measured.
type plan struct {
	scenarios []scenario
	peers     []peer
	rounds    int
	length    time.Duration // of a closed loop
	quick     bool
	docs      bool
	root      string // of the repository
	idle      int    // connections that idle
}

// parse reads the flags and the environment, which make hands over.
func parse(args []string, getenv func(string) string) (plan, error) {
	p := plan{rounds: 5, length: 2 * time.Second, scenarios: scenarios, peers: peers}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&p.root, "root", ".", "folder of the repository")
	if err := fs.Parse(args); err != nil {
		return p, err
	}
	var err error
	if p.root, err = filepath.Abs(p.root); err != nil {
		return p, err
	}
	if p.quick = getenv("BENCH_QUICK") == "1"; p.quick {
		p.rounds, p.length = 2, 500*time.Millisecond
	}
	number := func(name string, most int, set func(int)) error {
		v := getenv(name)
		if v == "" {
			return nil
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > most {
			return fmt.Errorf("%s=%s: write a number from 1 to %d", name, v, most)
		}
		set(n)
		return nil
	}
	if err := errors.Join(
		number("BENCH_ROUNDS", 1000, func(n int) { p.rounds = n }),
		number("BENCH_SECONDS", 600, func(n int) { p.length = time.Duration(n) * time.Second }),
	); err != nil {
		return p, err
	}
	if only := getenv("BENCH_ONLY"); only != "" {
		if p.scenarios, err = choose(scenarios, only, "BENCH_ONLY", func(s scenario) string { return s.name }); err != nil {
			return p, err
		}
	}
	if only := getenv("BENCH_PEERS"); only != "" {
		if p.peers, err = choose(peers, only, "BENCH_PEERS", func(s peer) string { return s.name }); err != nil {
			return p, err
		}
	}
	full := !p.quick && len(p.scenarios) == len(scenarios) && len(p.peers) == len(peers)
	switch v := getenv("BENCH_DOCS"); v {
	case "":
		p.docs = full
	case "0", "1":
		p.docs = v == "1"
	default:
		return p, fmt.Errorf("BENCH_DOCS=%s: write 0 or 1", v)
	}
	return p, nil
}

// choose keeps those whose names are in a list with commas, in their own order.
func choose[T any](all []T, list, variable string, name func(T) string) ([]T, error) {
	wanted := strings.Split(list, ",")
	var out []T
	names := make([]string, 0, len(all))
	for _, v := range all {
		names = append(names, name(v))
		if slices.Contains(wanted, name(v)) {
			out = append(out, v)
		}
	}
	for _, w := range wanted {
		if !slices.Contains(names, w) {
			return nil, fmt.Errorf("%s=%s: %q is none of %s", variable, list, w, strings.Join(names, ", "))
		}
	}
	return out, nil
}

func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) error {
	p, err := parse(args, getenv)
	if err != nil {
		return err
	}
	began := time.Now()
	cache := filepath.Join(p.root, ".cache", "bench")
	w := &world{bin: filepath.Join(cache, "bin"), dir: filepath.Join(cache, "run")}
	unlock, err := lock(cache)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.RemoveAll(w.dir); err != nil {
		return err
	}
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	files, err := openFiles()
	if err != nil {
		return err
	}
	// A proxy needs two descriptors for each connection that is not HTTP.
	const spare = 400
	p.idle = min(10_000, (files-spare)/2)
	w.atOnce = min(12_000, (files-spare/2)/2)
	if p.quick {
		p.idle = min(p.idle, 2000)
	}

	fmt.Fprintln(stdout, "Building our programs and finding the others ...")
	if err := build(ctx, p.root, w.bin); err != nil {
		return err
	}
	w.tools = findTools(ctx, p.root)
	w.tools.files = files
	for name, why := range w.tools.missing {
		fmt.Fprintf(stdout, "\n  !!! %s is not installed and will not be measured: %s\n\n", name, why)
	}
	w.certs = filepath.Join(w.dir, "certs")
	if err := writeCerts(w.certs); err != nil {
		return err
	}
	up, err := startUpstream(ctx, w)
	if err != nil {
		return err
	}
	defer up.stop()
	w.upstream = up

	all := results{}
	for _, s := range p.scenarios {
		b := &bench{plan: p, world: w, scenario: s, out: stdout, figures: map[string]*figures{}}
		all[s.name] = b.figures
		if err := b.measure(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if err := up.ended(); err != nil {
			return err
		}
		// After each, so that a run that is cut short leaves what it has.
		if err := writeJSON(filepath.Join(cache, "sidecar.json"), all); err != nil {
			return err
		}
		fmt.Fprintf(stdout, "\n%s\n", table(s, b.figures))
	}
	m := machineHere(w, time.Since(began))
	if s := strangers(all); s != "" {
		fmt.Fprintln(stdout, s)
	}
	fmt.Fprintf(stdout, "%s\nWritten: %s (%s)\n", verdicts(all), filepath.Join(cache, "sidecar.json"), time.Since(began).Round(time.Second))
	if p.docs {
		if err := writeDocs(filepath.Join(p.root, "docs"), m, p, all); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "Written: docs/bench-sidecar.md, docs/bench-sidecar.svg")
	}
	return nil
}

// lock makes sure that no other run uses the folder, or the processors.
func lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another benchmark runs in %s: wait for its end (%w)", dir, err), f.Close())
	}
	return func() { _ = f.Close() }, nil // closing unlocks
}

// openFiles raises the limit of descriptors as far as it goes, for the children
// too, and returns it.
func openFiles() (int, error) {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("getrlimit: %w", err)
	}
	l.Cur = l.Max
	// Set by hand, or children would get back what was there before Go raised it.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("setrlimit: %w", err)
	}
	return int(min(l.Cur, 1<<20)), nil
}

func build(ctx context.Context, root, bin string) error {
	if err := os.MkdirAll(bin, 0o700); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin+string(filepath.Separator), "./control-plane", "./sidecar", "./deploy/bench/peer")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// startUpstream starts the server that all scenarios ask, and learns its ports.
func startUpstream(ctx context.Context, w *world) (*process, error) {
	up, err := start(w.dir, "upstream", []string{"GOMAXPROCS=1"}, filepath.Join(w.bin, "peer"), "upstream")
	if err != nil {
		return nil, err
	}
	for range 500 {
		f, err := os.Open(up.stdout)
		if err != nil {
			break
		}
		line, err := bufio.NewReader(f).ReadString('\n')
		_ = f.Close() // it was read
		if err == nil {
			w.ports = map[string]netip.AddrPort{}
			if err := json.Unmarshal([]byte(line), &w.ports); err == nil {
				return up, nil
			}
		}
		if err := errors.Join(up.ended(), ctx.Err()); err != nil {
			up.stop()
			return nil, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	up.stop()
	return nil, errors.New("the upstream server does not say its ports: " + up.words())
}
