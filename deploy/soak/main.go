// Command soak runs a control plane and two sidecars under mixed load with
// churn, and fails when something of the sidecars grows.
//
// HTTP/1.1, HTTP/2, gRPC, WebSocket and TCP pass from the ambassador ports of
// one sidecar through the inbound ports of the other to applications in this
// process. Meanwhile connections open and close, clients vanish, endpoints come
// and go in the folder, and applications restart. Every few seconds the memory,
// goroutines and descriptors of both sidecars are read; flat.go says what is
// flat. It knows the programs by their flags and ports only; make soak calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "folder with control-plane and sidecar")
	length := flag.Duration("for", 10*time.Minute, "how long the load lasts, at least one minute")
	every := flag.Duration("every", 5*time.Second, "interval of the samples")
	rate := flag.Int("rate", 1500, "exchanges a second, of all kinds together")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := soak(ctx, *bin, *length, *every, *rate); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1) //nolint:gocritic // stop would only give the signals back
	}
}

func soak(ctx context.Context, bin string, length, every time.Duration, rate int) (err error) {
	if length < time.Minute || every < time.Second || rate < 10 {
		return fmt.Errorf("--for %s, --every %s, --rate %d: at least 1m, 1s and 10, for less shows nothing", length, every, rate)
	}
	dir, err := os.MkdirTemp("", "soak")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	w, err := newWorld(ctx, bin, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	base := w.sample()
	var tallies tallies
	load, end := context.WithTimeout(ctx, length)
	defer end()
	var wg sync.WaitGroup
	w.begin(load, &wg, &tallies, rate)
	wg.Go(func() { w.churn(load) })
	table := [][]sample{}
	begun := time.Now()
	fmt.Printf("%8s  %28s  %28s\n%8s  %28s  %28s\n", "", "caller's sidecar", "peer's sidecar", "time", "MiB  goroutines descriptors", "MiB  goroutines descriptors")
	tick := time.NewTicker(every)
	defer tick.Stop()
	for load.Err() == nil {
		select {
		case <-load.Done():
		case <-tick.C:
			s := w.sample()
			table = append(table, s)
			fmt.Printf("%8s  %8.1f %10d %8d  %8.1f %10d %8d\n", time.Since(begun).Round(time.Second),
				s[0].mib, s[0].goroutines, s[0].descriptors, s[1].mib, s[1].goroutines, s[1].descriptors)
			if dead := w.dead(); dead != nil {
				end()
				wg.Wait()
				return dead
			}
		}
	}
	wg.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	fmt.Println(tallies.String())
	return errors.Join(tallies.verdict(), flat(table), w.settles(ctx, base))
}

// settles waits until a sidecar without load is what it was before there was
// any. Idle connections to upstreams last 30 s.
func (w *world) settles(ctx context.Context, base []sample) error {
	const patience, more = 45 * time.Second, 25
	var last []sample
	for deadline := time.Now().Add(patience); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(time.Second) {
		last = w.sample()
		settled := true
		for i := range last {
			settled = settled && last[i].goroutines <= base[i].goroutines+more && last[i].descriptors <= base[i].descriptors+more
		}
		if settled {
			fmt.Printf("after the load: %s\n", describe(last))
			return nil
		}
	}
	return fmt.Errorf("%s after the load the sidecars still hold %s; before it: %s", patience, describe(last), describe(base))
}

// program is one that runs.
type program struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed
	said string
}

func launch(dir, name, binary string, args ...string) (*program, error) {
	p := &program{name: name, done: make(chan struct{}), said: filepath.Join(dir, name+".log")}
	stderr, err := os.Create(p.said)
	if err != nil {
		return nil, err
	}
	defer func() { _ = stderr.Close() }() // the child has its own
	p.cmd = exec.Command(binary, args...)
	p.cmd.Stderr = stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *program) dead() error {
	select {
	case <-p.done:
		b, _ := os.ReadFile(p.said)
		return fmt.Errorf("%s has ended: %w\n%s", p.name, errors.Join(p.err, errors.New("it was not asked to")), b[max(0, len(b)-4000):])
	default:
		return nil
	}
}

// stop ends it, and says so where it does not end in order.
func (p *program) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
	case <-time.After(40 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("%s did not end within 40s of SIGTERM", p.name)
	}
	b, err := os.ReadFile(p.said)
	if err != nil {
		return err
	}
	if i := strings.Index(string(b), "panic: "); i >= 0 {
		return fmt.Errorf("%s has panicked: %.2000s", p.name, b[i:])
	}
	return nil
}

// freeAddress is an address on loopback at which nobody listens now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
