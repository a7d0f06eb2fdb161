package tail

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
)

// Hints say where in the folder something happened, so that thousands of idle
// files cost nothing. They are hints only: what the kernel does not report is
// found by the next full sweep, so a lost one costs time and no line.
//
// They are inotify(7) itself: package fsnotify keeps each path in three places.
type Hints struct {
	// C gets a value when there is something to Take.
	C chan struct{}

	file *os.File // the inotify instance
	log  *slog.Logger
	done chan struct{}

	mu      sync.Mutex
	folders map[int32]string // by the number of their watch
	last    int32            // the watch added last
	written map[string]bool  // files
	changed map[string]bool  // folders
	lost    bool             // the kernel or a limit lost some
	deaf    bool             // none will come any more
	closed  bool
	told    bool
	path    []byte // room for one
}

const (
	// maxHints is the number of paths that are kept; beyond it everything is swept.
	maxHints = 1 << 14
	// eventsBuffer bytes of events are read at once. One with the longest name has 272.
	eventsBuffer = 16 << 10

	entered = syscall.IN_CREATE | syscall.IN_MOVED_TO
	left    = syscall.IN_DELETE | syscall.IN_MOVED_FROM
	itself  = syscall.IN_DELETE_SELF | syscall.IN_MOVE_SELF
)

// NewHints starts to listen. Close ends it.
func NewHints(log *slog.Logger) (*Hints, error) {
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w; raise fs.inotify.max_user_instances", err)
	}
	h := &Hints{
		C: make(chan struct{}, 1), file: os.NewFile(uintptr(fd), "inotify"), log: log, done: make(chan struct{}),
		folders: map[int32]string{}, written: map[string]bool{}, changed: map[string]bool{},
	}
	go h.listen()
	return h, nil
}

// Close stops listening and waits for it.
func (h *Hints) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	err := h.file.Close()
	<-h.done
	return err
}

// Watch asks for hints about a folder. A failure is told once; the folder is
// then found by sweeping.
func (h *Hints) Watch(folder string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	var watch int
	var added error
	err := h.control(func(fd int) {
		watch, added = syscall.InotifyAddWatch(fd, folder, syscall.IN_ONLYDIR|syscall.IN_MODIFY|entered|left|itself)
	})
	if err = errors.Join(err, added); err == nil {
		h.keep(int32(watch), folder)
		return
	}
	if errors.Is(err, fs.ErrNotExist) { // deleted meanwhile
		return
	}
	h.lost = true
	if !h.told {
		h.told = true
		h.log.Warn("cannot watch a folder; sweeping it instead, which costs more; if many are watched, raise fs.inotify.max_user_watches",
			"file.path", folder, "error.message", err.Error())
	}
}

// control calls f with the inotify instance.
func (h *Hints) control(f func(fd int)) error {
	raw, err := h.file.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { f(int(fd)) })
}

// keep notes the path of a watch.
func (h *Hints) keep(watch int32, folder string) {
	if h.folders[watch] == folder { // asked for again
		return
	}
	h.folders[watch] = folder
	// A pod's folder comes before its container's: its path need not be kept twice.
	if above := filepath.Dir(folder); h.folders[h.last] == above {
		h.folders[h.last] = above
	}
	h.last = watch
}

// Take returns the files that were written to, the folders of which an entry
// came or went, and whether there were more that are not known.
func (h *Hints) Take() (written, changed []string, lost bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written, changed, lost = slices.Collect(maps.Keys(h.written)), slices.Collect(maps.Keys(h.changed)), h.lost || h.deaf
	clear(h.written)
	clear(h.changed)
	h.lost = false
	return written, changed, lost
}

func (h *Hints) listen() {
	defer close(h.done)
	buf := make([]byte, eventsBuffer)
	for {
		n, err := h.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		h.mu.Lock()
		events(buf[:n], h.note)
		h.deaf = err != nil
		any := h.lost || h.deaf || len(h.written)+len(h.changed) > 0
		h.mu.Unlock()
		if any {
			select {
			case h.C <- struct{}{}:
			default:
			}
		}
		if err != nil { // inotify(7) knows none but that buf is too short
			h.log.Warn("no more hints from the kernel; sweeping every folder instead, which costs more", "error.message", err.Error())
			return
		}
	}
}

// events takes apart what the kernel gave (struct inotify_event). The name is that of the
// entry in the watched folder; empty where the event is about the folder itself.
func events(b []byte, each func(watch int32, mask uint32, name []byte)) {
	for len(b) >= syscall.SizeofInotifyEvent {
		watch := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := binary.NativeEndian.Uint32(b[12:])
		b = b[syscall.SizeofInotifyEvent:]
		name := b[:min(uint64(size), uint64(len(b)))]
		b = b[len(name):]
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		each(watch, mask, name)
	}
}

func (h *Hints) note(watch int32, mask uint32, name []byte) {
	folder, known := h.folders[watch]
	switch {
	case mask&syscall.IN_Q_OVERFLOW != 0:
		h.lost = true
	case mask&syscall.IN_IGNORED != 0:
		delete(h.folders, watch)
	case !known:
	case len(h.written)+len(h.changed) >= maxHints:
		h.lost = true
	case mask&itself != 0:
		h.changed[filepath.Dir(folder)] = true
		if mask&syscall.IN_MOVE_SELF != 0 { // its path is another now
			_ = h.control(func(fd int) { _, _ = syscall.InotifyRmWatch(fd, uint32(watch)) }) // it may be gone by now
		}
	case mask&(entered|left) != 0:
		h.changed[folder] = true
	case mask&syscall.IN_MODIFY != 0 && bytes.HasSuffix(name, []byte(".log")):
		h.path = append(append(append(h.path[:0], folder...), filepath.Separator), name...)
		if !h.written[string(h.path)] {
			h.written[string(h.path)] = true
		}
	}
}
