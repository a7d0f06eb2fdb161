package tail

import (
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/fsnotify/fsnotify"
)

// Hints say where in the folder something happened, so that thousands of idle
// files cost nothing. They are hints only: what the kernel does not report is
// found by the next full sweep, so a lost one costs time and no line.
type Hints struct {
	// C gets a value when there is something to Take.
	C chan struct{}

	watcher *fsnotify.Watcher
	log     *slog.Logger
	done    chan struct{}

	mu      sync.Mutex
	written map[string]bool // files
	changed map[string]bool // folders
	lost    bool            // the kernel or a limit lost some
	told    bool
}

// maxHints is the number of paths that are kept; beyond it everything is swept.
const maxHints = 1 << 14

// NewHints starts to listen. Close ends it.
func NewHints(log *slog.Logger) (*Hints, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	h := &Hints{
		C: make(chan struct{}, 1), watcher: w, log: log, done: make(chan struct{}),
		written: map[string]bool{}, changed: map[string]bool{},
	}
	go h.listen()
	return h, nil
}

// Close stops listening and waits for it.
func (h *Hints) Close() error {
	err := h.watcher.Close()
	<-h.done
	return err
}

// Watch asks for hints about a folder. A failure is told once; the folder is
// then found by sweeping.
func (h *Hints) Watch(folder string) {
	err := h.watcher.Add(folder)
	if err == nil || errors.Is(err, fs.ErrNotExist) { // deleted meanwhile
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lost = true
	if !h.told {
		h.told = true
		h.log.Warn("cannot watch a folder; sweeping it instead, which costs more; if many are watched, raise fs.inotify.max_user_watches",
			"file.path", folder, "error.message", err.Error())
	}
}

// Take returns the files that were written to, the folders of which an entry
// came or went, and whether there were more that are not known.
func (h *Hints) Take() (written, changed []string, lost bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written, changed, lost = slices.Collect(maps.Keys(h.written)), slices.Collect(maps.Keys(h.changed)), h.lost
	clear(h.written)
	clear(h.changed)
	h.lost = false
	return written, changed, lost
}

func (h *Hints) listen() {
	defer close(h.done)
	for {
		select {
		case e, ok := <-h.watcher.Events:
			if !ok {
				return
			}
			h.note(e)
		case _, ok := <-h.watcher.Errors: // the queue of the kernel ran over
			if !ok {
				return
			}
			h.mu.Lock()
			h.lost = true
			h.mu.Unlock()
		}
		select {
		case h.C <- struct{}{}:
		default:
		}
	}
}

func (h *Hints) note(e fsnotify.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case len(h.written)+len(h.changed) >= maxHints:
		h.lost = true
	case e.Has(fsnotify.Create), e.Has(fsnotify.Remove), e.Has(fsnotify.Rename):
		h.changed[filepath.Dir(e.Name)] = true
	case e.Has(fsnotify.Write) && strings.HasSuffix(e.Name, ".log"):
		h.written[e.Name] = true
	}
}
