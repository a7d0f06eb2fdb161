package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// process is a program and the log file that a container runtime would write
// for it.
type process struct {
	name string
	cmd  *exec.Cmd
	log  *runtimeLog
	tail lastLines
	done chan struct{}
	err  error // valid once done is closed
	want bool  // we have ended it
}

// launch starts a program as a container of a pod.
func (s *scene) launch(namespace, pod, container, program string, args ...string) (*process, error) {
	folder := filepath.Join(s.logDir(), fmt.Sprintf("%s_%s_%s", namespace, pod, podUID(namespace, pod)), container)
	log, err := openRuntimeLog(folder)
	if err != nil {
		return nil, err
	}
	p := &process{name: pod + "/" + container, log: log, done: make(chan struct{})}
	p.cmd = exec.Command(s.binary(program), args...)
	// A group of its own: Ctrl-C is for the demo, which ends the others in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	var readers sync.WaitGroup
	readers.Go(func() { p.copy("stdout", stdout) })
	readers.Go(func() { p.copy("stderr", stderr) })
	go func() {
		readers.Wait()
		p.err = p.cmd.Wait()
		_ = p.log.close() // its lines are on disk already
		close(p.done)
	}()
	s.running = append(s.running, p)
	return p, nil
}

// podUID is made up from the names, so that a restarted program goes on in the
// folder of its pod.
func podUID(namespace, pod string) string {
	var h uint64 = 14695981039346656037
	for _, c := range []byte(namespace + "/" + pod) {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(h>>32), h&0xffffffffffff)
}

func (p *process) copy(stream string, r io.Reader) {
	br := bufio.NewReaderSize(r, 64<<10)
	for {
		// A runtime reads what a pipe has, and splits what is longer than 16 KiB.
		line, err := br.ReadSlice('\n')
		full := errors.Is(err, bufio.ErrBufferFull)
		if len(line) > 0 {
			p.log.write(stream, bytes.TrimSuffix(line, []byte("\n")), full)
			if stream == "stderr" {
				p.tail.add(line)
			}
		}
		if err != nil && !full {
			return
		}
	}
}

// ended is what a process that ended by itself died of.
func (p *process) ended() error {
	select {
	case <-p.done:
		if p.want {
			return nil
		}
		return fmt.Errorf("%s has ended: %w", p.name, errors.Join(p.err, errors.New(p.tail.String())))
	default:
		return nil
	}
}

// stop ends it in order, and by force after five seconds.
func (p *process) stop() {
	p.want = true
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(5 * time.Second):
		p.kill()
	}
}

// kill gives it no chance to say goodbye.
func (p *process) kill() {
	p.want = true
	_ = p.cmd.Process.Kill()
	<-p.done
}

// rssKB is the resident memory of the process, from /proc.
func (p *process) rssKB() int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		var kb int
		if n, _ := fmt.Sscanf(string(line), "VmRSS: %d kB", &kb); n == 1 {
			return kb
		}
	}
	return 0
}

// lastLines keeps the end of what a process said.
type lastLines struct {
	mu sync.Mutex
	b  []byte
}

func (l *lastLines) add(line []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, line...)
	if len(l.b) > 4096 {
		l.b = append([]byte(nil), l.b[len(l.b)-2048:]...)
	}
}

func (l *lastLines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

// Sizes at which a runtime splits lines and kubelet rotates files.
const (
	partSize   = 16 << 10
	rotateSize = 10 << 20
)

// runtimeLog writes a container's output as containerd does (the CRI log
// format): <time> <stream> P|F <text>, rotated by rename.
type runtimeLog struct {
	path string

	mu   sync.Mutex
	f    *os.File
	size int
}

func openRuntimeLog(folder string) (*runtimeLog, error) {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	l := &runtimeLog{path: filepath.Join(folder, "0.log")}
	return l, l.open()
}

func (l *runtimeLog) open() (err error) {
	l.f, err = os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	return err
}

func (l *runtimeLog) write(stream string, text []byte, more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for first := true; first || len(text) > 0; first = false {
		part := text[:min(len(text), partSize)]
		text = text[len(part):]
		tag := "F"
		if more || len(text) > 0 {
			tag = "P"
		}
		line := time.Now().UTC().AppendFormat(nil, "2006-01-02T15:04:05.000000000Z")
		line = append(line, " "+stream+" "+tag+" "...)
		line = append(append(line, part...), '\n')
		n, err := l.f.Write(line)
		if err != nil {
			fmt.Fprintln(os.Stderr, "demo: write container log:", err)
			return
		}
		l.size += n
	}
	if l.size < rotateSize {
		return
	}
	l.size = 0
	_ = l.f.Close()
	if err := os.Rename(l.path, l.path+"."+time.Now().UTC().Format("20060102-150405")); err != nil {
		fmt.Fprintln(os.Stderr, "demo: rotate container log:", err)
	}
	if err := l.open(); err != nil {
		fmt.Fprintln(os.Stderr, "demo: reopen container log:", err)
	}
}

func (l *runtimeLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
