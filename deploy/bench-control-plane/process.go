package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// process is a child. It ends when the benchmark does, however that ends.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string // file of what it says
	done chan struct{}

	stdin  io.WriteCloser // where it was asked for
	stdout io.Reader
}

func start(dir, name string, pipes bool, program string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	f, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // the child has its own
	p.cmd = exec.Command(program, args...)
	p.cmd.Stderr = f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if pipes {
		if p.stdin, err = p.cmd.StdinPipe(); err != nil {
			return nil, err
		}
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		defer func() { _ = w.Close() }() // the child has its own
		p.stdout, p.cmd.Stdout = r, w
	} else {
		p.cmd.Stdout = f
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // ProcessState says how it ended
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// ended says why a process has ended that nobody has stopped; nil while it runs.
func (p *process) ended() error {
	select {
	case <-p.done:
		text, _ := os.ReadFile(p.log) // nothing is known then
		return fmt.Errorf("%s has ended (%s): %s", p.name, p.cmd.ProcessState, text[max(0, len(text)-1000):])
	default:
		return nil
	}
}

// cpu is what it has used so far.
func (p *process) cpu() (time.Duration, error) { return cpuOf(p.cmd.Process.Pid) }

func cpuOf(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return measure.StatCPU(b)
}

// waited is how long its threads have been ready to run and not run: other programs
// had the processors, or its own had.
func (p *process) waited() (time.Duration, error) {
	var sum time.Duration
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // the thread may have ended
		if f := strings.Fields(string(b)); len(f) == 3 {
			ns, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", t, err)
			}
			sum += time.Duration(ns)
		}
	}
	return sum, nil
}

// busy is how long the processors have done anything, for anyone.
func busy() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	return measure.Busy(b, func(int) bool { return true })
}

// memory is the resident memory, now and at most, in MiB.
func (p *process) memory() (now, most float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		f := strings.Fields(value)
		if len(f) == 0 {
			continue
		}
		kib, _ := strconv.ParseFloat(f[0], 64) // other lines hold words
		switch name {
		case "VmRSS":
			now = kib / 1024
		case "VmHWM":
			most = kib / 1024
		}
	}
	return now, most, nil
}

// said waits for a line of its log that has the key, and returns the line.
func (p *process) said(ctx context.Context, key string) (map[string]any, error) {
	for {
		f, err := os.Open(p.log)
		if err != nil {
			return nil, err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			var line map[string]any
			if json.Unmarshal(lines.Bytes(), &line) == nil && line[key] != nil && line[key] != "" {
				_ = f.Close() // it was read
				return line, nil
			}
		}
		_ = f.Close() // it was read
		if err := errors.Join(p.ended(), ctx.Err()); err != nil {
			return nil, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// ready waits until http://<address>/ready says so.
func (p *process) ready(ctx context.Context, address string) error {
	for {
		if _, err := get(ctx, "http://"+address+"/ready"); err == nil {
			return nil
		}
		if err := errors.Join(p.ended(), ctx.Err()); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func get(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", fmt.Errorf("the address: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it was read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(b), nil
}

// children are the processes that descend from this one, by the name of their
// program.
func children() (map[string]int, error) {
	out := map[string]int{}
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil, err
	}
	for _, t := range tasks {
		b, _ := os.ReadFile(t) // the thread may have ended
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				continue
			}
			name, _ := os.ReadFile("/proc/" + f + "/comm") // it may have ended
			out[strings.TrimSpace(string(name))] = pid
		}
	}
	return out, nil
}

// etcdURL is where the etcd of the testbed, a child, serves.
func etcdURL() (string, error) {
	kids, err := children()
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", kids["etcd"]))
	if err != nil {
		return "", fmt.Errorf("etcd: %w", err)
	}
	for arg := range strings.SplitSeq(string(text), "\x00") {
		if url, ok := strings.CutPrefix(arg, "--advertise-client-urls="); ok {
			return url, nil
		}
	}
	return "", errors.New("etcd does not say where it serves")
}
