package manifests

import (
	"context"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// sweepEvery is how often the folder is looked at whether or not the
	// kernel reported anything: reports get lost, and some file systems have
	// none.
	sweepEvery = time.Second
	// settle gathers the reports of one save, such as write, rename, chmod.
	settle = 10 * time.Millisecond
)

// Watch calls changed, from the goroutine that called Watch, whenever a file
// of the folder may read differently than in the last Load; changed must not
// block for long. Differences since that Load, or any file at all if there was
// none, count too. It returns nil when ctx ends, and an error at once if the
// folder cannot be read.
func (s *Source) Watch(ctx context.Context, changed func()) error {
	if err := s.Check(); err != nil {
		return err
	}
	w := s.newWatcher()
	defer w.close()

	s.mu.Lock()
	last := s.seen
	s.mu.Unlock()

	sweep := func(touched bool) {
		now, _ := list(s.dir)
		w.watch(now.folders)
		if touched || !now.same(last) {
			changed()
		}
		last = now
	}
	sweep(false)

	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	// quiet fires once the reports of one save are in.
	quiet := time.NewTimer(0)
	quiet.Stop()
	touched := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case e := <-w.events():
			// A rewrite within one tick of the file system's clock leaves size
			// and time as they were, so the report itself counts as a change.
			touched = touched || wanted(filepath.Base(e.Name)) && !e.Op.Has(fsnotify.Chmod)
			quiet.Reset(settle)
		case err := <-w.errors():
			s.log.Warn("reports of file changes were lost; the sweep finds them", slog.String("file.directory", s.dir), slog.Any("error.message", err))
			touched = true
			quiet.Reset(settle)
		case <-quiet.C:
			sweep(touched)
			touched = false
		case <-tick.C:
			sweep(touched)
			touched = false
		}
	}
}

// watcher is the kernel's reports, where there are any.
type watcher struct {
	fs  *fsnotify.Watcher
	log *slog.Logger
	// refused are folders for which a warning was given.
	refused map[string]bool
}

func (s *Source) newWatcher() *watcher {
	w := &watcher{log: s.log, refused: map[string]bool{}}
	var err error
	if w.fs, err = fsnotify.NewWatcher(); err != nil {
		s.log.Warn("no reports of file changes; looking every second instead", slog.String("file.directory", s.dir), slog.Any("error.message", err))
		w.fs = nil
	}
	return w
}

// watch adds the folders. Adding one again is free, and needed where a link
// leads to another folder than before; folders that are gone remove
// themselves.
func (w *watcher) watch(folders []string) {
	if w.fs == nil {
		return
	}
	for _, f := range folders {
		if err := w.fs.Add(f); err != nil && !w.refused[f] {
			w.refused[f] = true
			w.log.Warn("no reports of changes in this folder; looking every second instead", slog.String("file.directory", f), slog.Any("error.message", err))
		}
	}
}

// events never delivers where the kernel does not report.
func (w *watcher) events() <-chan fsnotify.Event {
	if w.fs == nil {
		return nil
	}
	return w.fs.Events
}

func (w *watcher) errors() <-chan error {
	if w.fs == nil {
		return nil
	}
	return w.fs.Errors
}

func (w *watcher) close() {
	if w.fs == nil {
		return
	}
	if err := w.fs.Close(); err != nil {
		w.log.Warn("stopping the reports of file changes", slog.Any("error.message", err))
	}
}
