package apptest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// process is a program that a test has started and owns: it ends with the
// test at the latest.
type process struct {
	name string
	cmd  *exec.Cmd
	// stdout and stderr are all that it has said.
	stdout, stderr output
	done           chan struct{}
	err            error // valid once done is closed
}

// launch starts a program. When the test ends the program is told to end, and
// waited for; where the test has failed its last words are shown.
func launch(t *testing.T, name, binary string, args ...string) *process {
	t.Helper()
	p := &process{name: name, done: make(chan struct{})}
	p.cmd = exec.Command(binary, args...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.WaitDelay = 2 * time.Second
	// Should the tests be killed, what they started goes with them.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if said := p.stderr.String(); strings.Contains(said, "WARNING: DATA RACE") || strings.Contains(said, "panic: ") {
			t.Errorf("%s has a data race or has panicked", name)
		}
		if t.Failed() {
			t.Logf("--- %s (%v), its errors:\n%s--- and the end of its output:\n%s", name, p.err, p.stderr.tail(40), p.stdout.tail(15))
		}
	})
	return p
}

// stop asks the program to end and waits; one that does not is a failure.
func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-p.done:
	case <-time.After(15 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
		t.Errorf("%s did not end within 15s of SIGTERM", p.name)
	}
}

// kill gives the program no chance to say goodbye.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended already
	<-p.done
}

// running fails the test if the program has ended.
func (p *process) running(t *testing.T) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("%s has ended: %v\n%s", p.name, p.err, p.stderr.tail(20))
	default:
	}
}

// exits waits for the program to end by itself and returns its exit code.
func (p *process) exits(t *testing.T) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s still runs after 10s:\n%s", p.name, p.stderr.tail(20))
	}
	var exit *exec.ExitError
	switch {
	case p.err == nil:
		return 0
	case errors.As(p.err, &exit):
		return exit.ExitCode()
	}
	t.Fatalf("%s: %v", p.name, p.err)
	return -1
}

// maxOutput of a program that is kept, in bytes: a program that says more in
// one test is broken.
const maxOutput = 64 << 20

// output keeps what a program says.
type output struct {
	mu sync.Mutex
	b  []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.b)+len(p) > maxOutput {
		return 0, fmt.Errorf("more than %d bytes of output", maxOutput)
	}
	o.b = append(o.b, p...)
	return len(p), nil
}

// size is a mark for from.
func (o *output) size() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.b)
}

// from returns the whole lines that came after the mark.
func (o *output) from(mark int) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := o.b[mark:]
	return b[: bytes.LastIndexByte(b, '\n')+1 : bytes.LastIndexByte(b, '\n')+1]
}

func (o *output) String() string { return string(o.from(0)) }

func (o *output) tail(lines int) string {
	all := strings.SplitAfter(o.String(), "\n")
	return strings.Join(all[max(0, len(all)-lines-1):], "")
}

// nextPort hands out ports below the range from which the kernel takes those
// of outgoing connections, so that nothing takes one between its choice and
// its use, nor while a program restarts on it.
var nextPort atomic.Uint32

const firstPort, lastPort = 20000, 32000

// freeAddress is an address on loopback at which nobody listens. None is
// handed out twice.
func freeAddress(t *testing.T) string {
	t.Helper()
	// A program that starts while the port is tried would hold it until its exec.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	nextPort.CompareAndSwap(0, firstPort+rand.Uint32N(lastPort-firstPort)) // other test runs begin elsewhere
	for range lastPort - firstPort {
		n := nextPort.Add(1)
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+n%(lastPort-firstPort))
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return address
	}
	t.Fatal("no free port on 127.0.0.1")
	return ""
}

// eventually polls until ok returns an empty string; what it returned last is
// the reason for the failure.
func eventually(t *testing.T, patience time.Duration, ok func() string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		why := ok()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s still: %s", patience, why)
		}
		time.Sleep(15 * time.Millisecond)
	}
}
