package manifests_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// noticed is how soon a change must be known. The sweep, which finds what the
// kernel did not report, takes a second.
const noticed = 200 * time.Millisecond

// watch runs Watch until the test ends and returns its reports.
func watch(t *testing.T, dir string) <-chan struct{} {
	t.Helper()
	s := newSource(dir)
	s.Load()
	changes := make(chan struct{}, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Watch(ctx, func() { changes <- struct{}{} }) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Watch ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("Watch did not end with its context")
		}
	})
	// A change is seen whether or not the reports have begun, but only those
	// come within noticed: wait for the first.
	probe := filepath.Join(dir, "probe.yaml")
	write(t, probe, "# probe\n")
	wait(t, changes, "the probe", 5*time.Second)
	remove(t, probe)
	wait(t, changes, "the end of the probe", 5*time.Second)
	settle(changes)
	return changes
}

// settle waits until nothing has been reported for a while.
func settle(changes <-chan struct{}) {
	for {
		select {
		case <-changes:
		case <-time.After(50 * time.Millisecond):
			return
		}
	}
}

func wait(t *testing.T, changes <-chan struct{}, what string, limit time.Duration) {
	t.Helper()
	begin := time.Now()
	select {
	case <-changes:
		t.Logf("%s was noticed after %s", what, time.Since(begin))
	case <-time.After(limit):
		t.Fatalf("%s was not noticed within %s", what, limit)
	}
}

func TestWatchNoticesChanges(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	write(t, path, service("a", 1))
	changes := watch(t, dir)

	step := func(what string, do func()) {
		t.Helper()
		do()
		wait(t, changes, what, noticed)
		settle(changes)
	}
	step("a write", func() { write(t, path, service("a", 22)) })
	step("a write of the same size", func() { write(t, path, service("a", 33)) })
	step("a rename over the file", func() {
		// Under a name that is not a manifest's, as editors do.
		write(t, path+".tmp", service("a", 44))
		if err := os.Rename(path+".tmp", path); err != nil {
			t.Fatal(err)
		}
	})
	step("a new file", func() { write(t, filepath.Join(dir, "b.yaml"), service("b", 1)) })
	step("a deletion", func() { remove(t, path) })
	step("a new folder with a file", func() { write(t, filepath.Join(dir, "sub", "deep", "c.yaml"), service("c", 1)) })
	step("a change in the new folder", func() { write(t, filepath.Join(dir, "sub", "deep", "c.yaml"), service("c", 2)) })
	step("the folder moved away", func() {
		if err := os.Rename(filepath.Join(dir, "sub"), filepath.Join(t.TempDir(), "sub")); err != nil {
			t.Fatal(err)
		}
	})
}

func TestWatchNoticesTheSwapOfAConfigMap(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "..1", "a.yaml"), service("a", 1))
	write(t, filepath.Join(dir, "..2", "a.yaml"), service("a", 2))
	for name, target := range map[string]string{"..data": "..1", "a.yaml": "..data/a.yaml", "..data_tmp": "..2"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	changes := watch(t, dir)
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	wait(t, changes, "the swap", noticed)
}

func TestWatchReportsWhatChangedSinceLoad(t *testing.T) {
	dir := t.TempDir()
	s := newSource(dir)
	write(t, filepath.Join(dir, "a.yaml"), service("a", 1))
	s.Load()
	write(t, filepath.Join(dir, "b.yaml"), service("b", 1))
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	if err := s.Watch(ctx, func() { calls++; cancel() }); err != nil {
		t.Fatal(err)
	}
	if calls != 1 {
		t.Errorf("got %d reports, want 1", calls)
	}
}

func TestWatchIsQuietWhileNothingChanges(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a.yaml"), service("a", 1))
	changes := watch(t, dir)
	write(t, filepath.Join(dir, "notes.txt"), "not a manifest")
	write(t, filepath.Join(dir, ".a.yaml.swp"), "an editor's")
	if _, err := os.ReadFile(filepath.Join(dir, "a.yaml")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changes:
		t.Error("a report without a change")
	case <-time.After(1500 * time.Millisecond): // longer than a sweep
	}
}

func TestWatchOfAMissingFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nothing")
	err := newSource(dir).Watch(t.Context(), func() {})
	if err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want an error that names %s", err, dir)
	}
}
