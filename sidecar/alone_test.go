package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fakeProc is a /proc with some processes.
type fakeProc struct {
	t   *testing.T
	dir string
}

func (f fakeProc) add(pid int, state, command string) {
	f.t.Helper()
	dir := filepath.Join(f.dir, strconv.Itoa(pid))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.t.Fatal(err)
	}
	for name, text := range map[string]string{
		"stat":    fmt.Sprintf("%d (a) Z (b) %s 1 1 1 0 -1", pid, state),
		"cmdline": command + "\x00--flag\x00",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f fakeProc) remove(pid int) {
	if err := os.RemoveAll(filepath.Join(f.dir, strconv.Itoa(pid))); err != nil {
		f.t.Fatal(err)
	}
}

func TestOthersAreTheLivingProcessesOfOtherContainers(t *testing.T) {
	f := fakeProc{t, t.TempDir()}
	f.add(1, "S", "/pause")
	f.add(7, "R", "/sidecar")
	w, err := newAloneWatch(f.dir, 7, "")
	if err != nil {
		t.Fatal(err)
	}
	is := func(want int, when string) {
		t.Helper()
		if got, err := w.others(); got != want || err != nil {
			t.Errorf("%s: %d, %v; want %d", when, got, err, want)
		}
	}
	is(0, "pause and ourselves")
	f.add(8, "S", "/sidecar")
	is(0, "a hook that runs our own program")
	f.add(20, "S", "/bin/app")
	f.add(21, "D", "")
	is(2, "an application of two processes")
	f.add(20, "Z", "")
	is(1, "one that has ended and that nobody has asked about")
	if err := os.Mkdir(filepath.Join(f.dir, "22"), 0o700); err != nil { // listed, then gone
		t.Fatal(err)
	}
	is(1, "one that has just gone")
	f.remove(21)
	is(0, "all gone")
	w.proc = filepath.Join(f.dir, "nowhere")
	if err := w.run(t.Context()); err == nil || !strings.Contains(err.Error(), "--exit-when-alone") {
		t.Errorf("without /proc: %v", err)
	}
	if _, err := newAloneWatch(f.dir, 1, ""); err == nil || !strings.Contains(err.Error(), "shareProcessNamespace") {
		t.Errorf("as the first process: %v; want the remedy", err)
	}
}

func TestItEndsOnceTheApplicationWasSeenAndHasGone(t *testing.T) {
	f := fakeProc{t, t.TempDir()}
	f.add(1, "S", "/pause")
	f.add(7, "R", "/sidecar")
	marker := filepath.Join(t.TempDir(), "seen")
	run := func() chan error {
		w, err := newAloneWatch(f.dir, 7, marker)
		if err != nil {
			t.Fatal(err)
		}
		w.grace = 200 * time.Millisecond
		done := make(chan error, 1)
		go func() { done <- w.run(t.Context()) }()
		return done
	}
	done := run()
	still := func(when string) {
		t.Helper()
		select {
		case err := <-done:
			t.Fatalf("%s: it ended: %v", when, err)
		case <-time.After(500 * time.Millisecond):
		}
	}
	still("before the application has come")
	f.add(30, "S", "/bin/job")
	still("while it runs")
	f.remove(30)
	ended := func() {
		t.Helper()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the application has gone and it goes on")
		}
	}
	ended()
	done = run() // a sidecar that starts again knows that the application was there
	ended()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	w := &aloneWatch{proc: f.dir, self: 7, grace: time.Second}
	if err := w.run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("told to end: %v", err)
	}
}

// With real processes in a namespace of their own, whose first process stands for
// pause: the application is of another user, and lives for a moment.
func TestAloneInARealNamespace(t *testing.T) {
	if os.Getenv("OUTRIGGER_TEST_PAUSE") != "" {
		pauseMain(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: a process namespace needs root")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAloneInARealNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), "OUTRIGGER_TEST_PAUSE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) {
		t.Skipf("SKIPPED: this system makes no process namespace: %v", err)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(string(out), "sidecar ended after the application") {
		t.Errorf("the processes did not say that all went well:\n%s", out)
	}
}

// pauseMain is the first process of the namespace.
func pauseMain(t *testing.T) {
	proc := os.Getenv("OUTRIGGER_TEST_PROC")
	if proc != "" { // the sidecar
		w, err := newAloneWatch(proc, os.Getpid(), "")
		if err != nil {
			t.Fatal(err)
		}
		w.grace = 300 * time.Millisecond
		if err := w.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		return
	}
	proc = t.TempDir()
	if err := syscall.Mount("proc", proc, "proc", 0, ""); err != nil {
		t.Fatalf("mount proc: %v", err)
	}
	defer func() { _ = syscall.Unmount(proc, syscall.MNT_DETACH) }()
	sidecar := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestAloneInARealNamespace$")
	sidecar.Env = append(os.Environ(), "OUTRIGGER_TEST_PROC="+proc)
	if err := sidecar.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- sidecar.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it ended before the application came: %v", err)
	case <-time.After(700 * time.Millisecond):
	}
	app := exec.CommandContext(t.Context(), "sleep", "1.5")
	app.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- app.Wait() }()
	select {
	case err := <-ended:
		t.Fatalf("it ended while the application ran: %v", err)
	case err := <-gone:
		if err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("sidecar ended after the application")
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on without the application")
	}
}
