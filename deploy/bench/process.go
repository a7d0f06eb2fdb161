package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// process is a child: it ends when the benchmark ends, however that ends.
type process struct {
	name   string
	cmd    *exec.Cmd
	stdout string        // file
	stderr string        // file
	done   chan struct{} // closed when it has ended
}

// start runs a program whose output goes to files in dir. Both are opened for
// appending, so that they can be emptied while it runs.
func start(dir, name string, env []string, program string, args ...string) (*process, error) {
	p := &process{name: name, stdout: filepath.Join(dir, name+".out"), stderr: filepath.Join(dir, name+".err"), done: make(chan struct{})}
	open := func(path string) (*os.File, error) {
		return os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	}
	out, err := open(p.stdout)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }() // the child has its own
	errs, err := open(p.stderr)
	if err != nil {
		return nil, err
	}
	defer func() { _ = errs.Close() }() // the child has its own
	p.cmd = exec.Command(program, args...)
	p.cmd.Stdout, p.cmd.Stderr = out, errs
	p.cmd.Env = append(os.Environ(), env...)
	// A group of its own: Ctrl-C is for the benchmark, which ends the others. The
	// kernel does it where the benchmark cannot.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // ProcessState says how it ended
		close(p.done)
	}()
	return p, nil
}

// stop ends it and what it has started.
func (p *process) stop() {
	children := tree(p.cmd.Process.Pid)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(2 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	for _, pid := range children[1:] {
		// Workers end with their master; the group says that this is still one.
		if g, err := syscall.Getpgid(pid); err == nil && g == p.cmd.Process.Pid {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// ended says why a process has ended that nobody has stopped; nil while it runs.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended (%s): %s", p.name, p.cmd.ProcessState, p.words())
	default:
		return nil
	}
}

// words are the last that it wrote to stderr, without what only tells of its
// work.
func (p *process) words() string {
	b, _ := os.ReadFile(p.stderr) // nothing is known then
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		if !strings.Contains(line, `"log.level":"info"`) {
			out.WriteString(line)
		}
	}
	text := out.String()
	return strings.TrimSpace(text[max(0, len(text)-600):])
}

// tree is a process and all that descend from it.
func tree(pid int) []int {
	out := []int{pid}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // it may have ended
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				out = append(out, tree(child)...)
			}
		}
	}
	return out
}

// usage is what processes have used so far.
type usage struct {
	cpu      time.Duration // of the scheduler's clock, exact to nanoseconds
	stat     time.Duration // of /proc/<pid>/stat, exact to 10 ms
	switches uint64        // because a thread waited
}

func (u usage) minus(v usage) usage {
	return usage{u.cpu - v.cpu, u.stat - v.stat, u.switches - v.switches}
}

// use adds up what the processes and their children have used.
func use(ps []*process) (usage, error) {
	var u usage
	for _, p := range ps {
		if err := p.ended(); err != nil {
			return u, err
		}
		for _, pid := range tree(p.cmd.Process.Pid) {
			// The clock of another process: clock_getcpuclockid(3) makes its name so.
			const perProcessSchedulerClock = 2
			var ts unix.Timespec
			if err := unix.ClockGettime(int32(^pid)<<3|perProcessSchedulerClock, &ts); err != nil {
				return u, fmt.Errorf("CPU clock of %s: %w", p.name, err)
			}
			u.cpu += time.Duration(ts.Nano())
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil {
				return u, err
			}
			stat, err := measure.StatCPU(b)
			if err != nil {
				return u, fmt.Errorf("%s: %w", p.name, err)
			}
			u.stat += stat
			tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid)) // the pattern is right
			for _, t := range tasks {
				b, err := os.ReadFile(t)
				if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
					continue // the thread has ended
				}
				s, err := measure.ParseStatus(b)
				if err != nil {
					return u, fmt.Errorf("%s: %w", p.name, err)
				}
				u.switches += s.Voluntary
			}
		}
	}
	return u, nil
}

// busy is how long the processors of this benchmark have done anything, for
// anyone.
func busy() (time.Duration, error) {
	var ours unix.CPUSet
	if err := unix.SchedGetaffinity(0, &ours); err != nil {
		return 0, fmt.Errorf("sched_getaffinity: %w", err)
	}
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return measure.Busy(b, ours.IsSet)
}

// own is what the benchmark and the processes given have used.
func own(ps []*process) (time.Duration, error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return 0, fmt.Errorf("getrusage: %w", err)
	}
	u, err := use(ps)
	return u.cpu + time.Duration(r.Utime.Nano()+r.Stime.Nano()), err
}

// resident adds up the resident memory of the processes and their children, in
// KiB. What they share is counted for each.
func resident(ps []*process) (int, error) {
	sum := 0
	for _, p := range ps {
		for _, pid := range tree(p.cmd.Process.Pid) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil {
				return 0, err
			}
			s, err := measure.ParseStatus(b)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", p.name, err)
			}
			sum += s.ResidentKB
		}
	}
	return sum, nil
}

// output runs a program to its end and returns what it printed.
func output(ctx context.Context, env []string, program string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", filepath.Base(program), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}
