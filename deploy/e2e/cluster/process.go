package cluster

import (
	"context"
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
			cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
			cmd.Stdout, cmd.Stderr, cmd.Env = log, log, g.env
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
			err := cmd.Run()
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
