package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// A pod with a plain sidecar, which is all that clusters without native ones have,
// ends only when its sidecar does. In a shared process namespace
// (shareProcessNamespace) the sidecar can see when it is the last: other processes
// are visible in /proc whatever their user, and go when their container ends.
const (
	// aloneGrace is for how long nobody else must have been there: a container's
	// process may give way to another one.
	aloneGrace = 3 * time.Second
	// aloneFirst is how often others are looked for until some have been seen, which
	// must not miss one that ends at once; aloneEvery is how often after that.
	aloneFirst = 100 * time.Millisecond
	aloneEvery = time.Second
	// pausePID is the process that holds the namespace.
	pausePID = 1
)

// aloneWatch finds out when the application has ended.
type aloneWatch struct {
	proc string // the file system, /proc
	self int
	// marker is a file that says that the application was seen, for a sidecar that
	// starts again after it has ended. Empty: there is none.
	marker string
	grace  time.Duration
}

// newAloneWatch fails where the namespace is our own.
func newAloneWatch(proc string, self int, marker string) (*aloneWatch, error) {
	if self == pausePID {
		return nil, errors.New("--exit-when-alone: this process is the first of its namespace, so no other container can be seen: set shareProcessNamespace in the pod, or leave the flag out")
	}
	return &aloneWatch{proc: proc, self: self, marker: marker, grace: aloneGrace}, nil
}

// run returns nil when processes of the application have been seen and all have
// gone for the time of grace. Its error is that of ctx, or of a /proc that cannot
// be read.
func (w *aloneWatch) run(ctx context.Context) error {
	seen := w.marked()
	every := aloneFirst
	var since time.Time // nobody else is there; zero: somebody is
	for {
		others, err := w.others()
		if err != nil {
			return fmt.Errorf("--exit-when-alone: %w", err)
		}
		now := time.Now()
		switch {
		case others > 0:
			if !seen {
				seen = true
				w.mark()
			}
			every, since = aloneEvery, time.Time{}
		case !seen:
		case since.IsZero():
			since = now
		case now.Sub(since) >= w.grace:
			return nil
		}
		select {
		case <-time.After(min(every, w.grace)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (w *aloneWatch) marked() bool {
	if w.marker == "" {
		return false
	}
	_, err := os.Stat(w.marker)
	return err == nil
}

// mark never fails: without the file a sidecar that starts again waits for ever,
// which is what it would do without this.
func (w *aloneWatch) mark() {
	if w.marker != "" {
		_ = os.WriteFile(w.marker, nil, 0o600)
	}
}

// others counts the processes of other containers. Those that run our own program
// in our own container, as a hook does, are not among them.
func (w *aloneWatch) others() (n int, err error) {
	entries, err := os.ReadDir(w.proc)
	if err != nil {
		return 0, err
	}
	ours := w.command(w.self)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == pausePID || pid == w.self {
			continue
		}
		if w.ended(pid) || len(ours) > 0 && bytes.Equal(ours, w.command(pid)) {
			continue
		}
		n++
	}
	return n, nil
}

// ended reports whether a process has, though nobody may have asked for its end yet.
func (w *aloneWatch) ended(pid int) bool {
	b, err := os.ReadFile(filepath.Join(w.proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		// Gone since it was listed; any other error is no reason to think so.
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
	}
	// The name of the program stands in brackets and may hold anything.
	rest := bytes.TrimSpace(b[bytes.LastIndexByte(b, ')')+1:])
	return len(rest) > 0 && (rest[0] == 'Z' || rest[0] == 'X')
}

// command is the first word of a process's command line.
func (w *aloneWatch) command(pid int) []byte {
	b, err := os.ReadFile(filepath.Join(w.proc, strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return nil
	}
	first, _, _ := bytes.Cut(b, []byte{0})
	return first
}
