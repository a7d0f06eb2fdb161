package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
)

// process is a collector that runs.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// bench is what all measurements share.
type bench struct {
	plan    plan
	work    string
	logs    string
	written amount
	n       int
}

// start runs the contestant on the second processor.
func (b *bench) start(c contestant, logs, backend string) (*process, error) {
	b.n++
	dir := filepath.Join(b.work, strconv.Itoa(b.n)+"-"+c.name+"-"+c.to)
	data := filepath.Join(dir, "data")
	if err := os.MkdirAll(data, 0o755); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	admin := l.Addr().String()
	if err := l.Close(); err != nil {
		return nil, err
	}
	t, err := template.New("config").Parse(c.config)
	if err != nil {
		return nil, err
	}
	var config bytes.Buffer
	if err := t.Execute(&config, map[string]string{"Admin": admin, "Data": data, "Logs": logs, "Backend": backend}); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, config.Bytes(), 0o600); err != nil {
		return nil, err
	}
	p := &process{log: filepath.Join(dir, "log"), done: make(chan struct{})}
	f, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // the child has its own
	args := append([]string{"-c", "1"}, append(c.command, path)...)
	p.cmd = exec.Command("taskset", args...)
	p.cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // ProcessState says how it ended
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func (p *process) ended() error {
	select {
	case <-p.done:
		text, _ := os.ReadFile(p.log) // nothing is known then
		return fmt.Errorf("it ended (%s): %s", p.cmd.ProcessState, text[max(0, len(text)-600):])
	default:
		return nil
	}
}

func (p *process) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	return measure.StatCPU(b)
}

// number reads a field of a file of /proc that has "name: value" lines.
func (p *process) number(file, name string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.cmd.Process.Pid, file))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if key, value, _ := strings.Cut(line, ":"); key == name {
			return strconv.ParseFloat(strings.Fields(value)[0], 64)
		}
	}
	return 0, fmt.Errorf("/proc/%d/%s has no %s", p.cmd.Process.Pid, file, name)
}

// most is the most resident memory so far, in MiB.
func (p *process) most() (float64, error) {
	kib, err := p.number("status", "VmHWM")
	return kib / 1024, err
}

// others is how long other programs than this one and the collector have had
// processors.
func (p *process) others() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	all, err := measure.Busy(b, func(int) bool { return true })
	if err != nil {
		return 0, err
	}
	theirs, err := p.cpu()
	if err != nil {
		return 0, err
	}
	self, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return 0, err
	}
	own, err := measure.StatCPU(self)
	return all - theirs - own, err
}

// throughput lets the contestant read all files from their beginning and measures
// until the last record has arrived.
func (b *bench) throughput(ctx context.Context, c contestant) (r rate, err error) {
	s, err := newSink(ctx, c.to)
	if err != nil {
		return r, err
	}
	defer s.close()
	started := time.Now()
	p, err := b.start(c, b.logs, s.addr)
	if err != nil {
		return r, err
	}
	defer p.stop()
	before, err := p.others()
	if err != nil {
		return r, err
	}
	for moved, last := time.Now(), int64(0); ; {
		got, want := s.records.Load(), b.written.lines
		if c.to == "null" { // nobody is told, but what was read can be seen
			n, err := p.number("io", "rchar")
			if err != nil {
				return r, errors.Join(err, p.ended())
			}
			got, want = int64(n), b.written.bytes
		}
		if got >= want {
			break
		}
		if got != last {
			moved, last = time.Now(), got
		}
		if time.Since(moved) > time.Minute {
			return r, fmt.Errorf("%d of %d arrived, and nothing for a minute", got, want)
		}
		if err := errors.Join(p.ended(), ctx.Err()); err != nil {
			return r, err
		}
		time.Sleep(5 * time.Millisecond)
	}
	took := time.Since(started)
	used, err := p.cpu()
	if err != nil {
		return r, err
	}
	most, err := p.most()
	if err != nil {
		return r, err
	}
	after, err := p.others()
	if err != nil {
		return r, err
	}
	mb := float64(b.written.bytes) / 1e6
	return rate{
		Name: c.name, To: c.to, Seconds: took.Seconds(), Rate: mb / took.Seconds(), CPU: used.Seconds() / (mb / 1000),
		PerCore: mb / used.Seconds(), RSS: most, Wire: float64(s.bytes.Load()) / float64(b.written.bytes), Others: (after - before).Seconds() / took.Seconds(),
	}, nil
}

// memory measures how much the contestant needs at 10 MB a second: with all well,
// with 5,000 idle files and no other, or with the backend down.
func (b *bench) memory(ctx context.Context, c contestant, what string) (r footprint, err error) {
	logs := filepath.Join(b.work, "memory-"+c.name+"-"+what)
	defer func() { _ = os.RemoveAll(logs) }() // it is remade anyway
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return r, err
	}
	if what == "idle" {
		for n := range idle {
			if err := os.MkdirAll(folder(logs, containers+n), 0o755); err != nil {
				return r, err
			}
			if err := os.WriteFile(filepath.Join(folder(logs, containers+n), "0.log"), appendLine(nil, time.Now(), int64(n)), 0o644); err != nil {
				return r, err
			}
		}
	}
	s, err := newSink(ctx, c.to)
	if err != nil {
		return r, err
	}
	if what == "down" {
		s.close() // the port refuses
	} else {
		defer s.close()
	}
	p, err := b.start(c, logs, s.addr)
	if err != nil {
		return r, err
	}
	defer p.stop()
	var used time.Duration
	started := time.Now()
	if what == "idle" {
		for s.records.Load() < idle && time.Since(started) < b.plan.paced {
			if err := errors.Join(p.ended(), ctx.Err()); err != nil {
				return r, err
			}
			time.Sleep(10 * time.Millisecond)
		}
		if used, err = p.cpu(); err != nil {
			return r, err
		}
		started = time.Now()
		select {
		case <-time.After(b.plan.paced):
		case <-ctx.Done():
		}
	} else {
		a, err := writePaced(ctx, logs, pace, b.plan.paced)
		if err != nil {
			return r, err
		}
		r.Arrived = float64(s.records.Load()) / float64(a.lines)
	}
	if err := errors.Join(p.ended(), ctx.Err()); err != nil {
		return r, err
	}
	total, err := p.cpu()
	if err != nil {
		return r, err
	}
	most, err := p.most()
	r.Name, r.To, r.What, r.RSS, r.CPU = c.name, c.to, what, most, (total-used).Seconds()/time.Since(started).Seconds()
	return r, err
}
