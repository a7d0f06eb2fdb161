package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// group runs the programs of the cluster until its context ends. Each writes into
// a file of its own in logs.
type group struct {
	logs    string
	env     []string
	running sync.WaitGroup

	mu   sync.Mutex
	held map[string]chan struct{} // programs that are to stay away, until it is closed
	pids map[string]int           // of those that run
}

// restartAfter: how soon a program that ended is started again. kube-proxy ends by
// design when the addresses of its node appear.
const restartAfter = 300 * time.Millisecond

// keep runs a program, again whenever it ends.
func (g *group) keep(ctx context.Context, name string, argv ...string) error {
	log, err := os.OpenFile(filepath.Join(g.logs, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("the log of %s: %w", name, err)
	}
	g.running.Go(func() {
		defer func() { _ = log.Close() }()
		for ctx.Err() == nil {
			if wait := g.holding(name); wait != nil {
				select {
				case <-ctx.Done():
				case <-wait:
				}
				continue
			}
			cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
			cmd.Stdout, cmd.Stderr, cmd.Env = log, log, g.env
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
			err := g.run(name, cmd)
			if ctx.Err() != nil {
				return
			}
			fmt.Fprintf(log, "\n--- %s ended: %v; starting it again\n", argv[0], err)
			select {
			case <-ctx.Done():
			case <-time.After(restartAfter):
			}
		}
	})
	return nil
}

func (g *group) run(name string, cmd *exec.Cmd) error {
	g.mu.Lock()
	err := cmd.Start()
	if err == nil {
		if g.pids == nil {
			g.pids = map[string]int{}
		}
		g.pids[name] = cmd.Process.Pid
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	err = cmd.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.pids, name)
	return err
}

func (g *group) holding(name string) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held[name]
}

// hold kills a program and keeps it away until back is called, once.
func (g *group) hold(name string) (back func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	pid, runs := g.pids[name]
	if !runs || g.held[name] != nil {
		return nil, errors.New(name + " does not run")
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		return nil, fmt.Errorf("kill %s: %w", name, err)
	}
	wait := make(chan struct{})
	if g.held == nil {
		g.held = map[string]chan struct{}{}
	}
	g.held[name] = wait
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.held, name)
		close(wait)
	}, nil
}
