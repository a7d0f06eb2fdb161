package tail

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// hear waits for hints until want is true of all that came.
func hear(t *testing.T, h *Hints, want func(written, changed []string) bool) {
	t.Helper()
	var written, changed []string
	deadline := time.After(10 * time.Second)
	for !want(written, changed) {
		select {
		case <-h.C:
		case <-deadline:
			t.Fatalf("no more hints came than of the files %q and the folders %q", written, changed)
		}
		w, c, lost := h.Take()
		if lost {
			t.Fatal("hints were lost")
		}
		written, changed = append(written, w...), append(changed, c...)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A folder that is deleted and made again is watched again; one that is moved away is no
// longer taken for the one that it was.
func TestHintsOfFolders(t *testing.T) {
	h, err := NewHints(slog.New(slog.DiscardHandler))
	must(t, err)
	defer func() { must(t, h.Close()) }()
	root := t.TempDir()
	pod := filepath.Join(root, "pod")
	app := filepath.Join(pod, "app")
	log := filepath.Join(app, "0.log")
	for range 2 {
		must(t, os.MkdirAll(app, 0o750))
		for range 2 { // asking twice is asking once
			for _, path := range []string{root, pod, app} {
				h.Watch(path)
			}
		}
		must(t, os.WriteFile(log, []byte("1"), 0o600))
		hear(t, h, func(w, c []string) bool { return slices.Contains(w, log) && slices.Contains(c, app) })
		must(t, os.RemoveAll(pod))
		hear(t, h, func(_, c []string) bool { return slices.Contains(c, app) && slices.Contains(c, root) })
	}
	must(t, os.MkdirAll(app, 0o750))
	h.Watch(pod)
	h.Watch(app)
	must(t, os.Rename(app, filepath.Join(root, "elsewhere")))
	hear(t, h, func(_, c []string) bool { return slices.Contains(c, pod) })
	must(t, os.WriteFile(filepath.Join(root, "elsewhere", "0.log"), []byte("1"), 0o600))
	must(t, os.MkdirAll(app, 0o750))
	h.Watch(app)
	must(t, os.WriteFile(filepath.Join(app, "1.log"), []byte("1"), 0o600))
	hear(t, h, func(w, _ []string) bool {
		if slices.Contains(w, log) {
			t.Errorf("a file that was written to elsewhere is told of as %s", log)
		}
		return slices.Contains(w, filepath.Join(app, "1.log"))
	})
	must(t, os.RemoveAll(root))
	hear(t, h, func(_, c []string) bool { return slices.Contains(c, filepath.Dir(root)) })
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		h.mu.Lock()
		left := len(h.folders)
		h.mu.Unlock()
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d folders are kept that are gone", left)
		}
	}
}

func TestHintsOfWhatIsNotThere(t *testing.T) {
	h, err := NewHints(slog.New(slog.DiscardHandler))
	must(t, err)
	h.Watch(filepath.Join(t.TempDir(), "no"))
	if _, _, lost := h.Take(); lost {
		t.Error("a folder that is not there counts as lost")
	}
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, nil, 0o600))
	h.Watch(path)
	if _, _, lost := h.Take(); !lost {
		t.Error("what cannot be watched does not count as lost")
	}
	must(t, h.Close())
	h.Watch(t.TempDir())
	if _, _, lost := h.Take(); lost {
		t.Error("what is closed counts as lost")
	}
}

func event(b []byte, watch int32, mask uint32, name string) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(watch))
	b = binary.NativeEndian.AppendUint32(b, mask)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(name)))
	return append(b, name...)
}

// What a folder is hinted at again and again costs nothing.
func TestHintAllocatesOnce(t *testing.T) {
	h := &Hints{folders: map[int32]string{1: "/pods/a/app"}, written: map[string]bool{}, changed: map[string]bool{}}
	b := event(event(nil, 1, syscall.IN_MODIFY, "0.log\x00\x00\x00"), -1, syscall.IN_MODIFY, "")
	if n := testing.AllocsPerRun(10, func() { events(b, h.note) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if !h.written["/pods/a/app/0.log"] || len(h.written) != 1 {
		t.Errorf("written are %v", h.written)
	}
	events(event(nil, -1, syscall.IN_Q_OVERFLOW, ""), h.note)
	if !h.lost {
		t.Error("an overflow is no loss")
	}
	for i := range maxHints + 10 {
		events(event(nil, 1, syscall.IN_MODIFY, strings.Repeat("0", i%200)+string(rune('a'+i/200))+".log"), h.note)
	}
	if len(h.written) > maxHints {
		t.Errorf("%d hints are kept", len(h.written))
	}
}

func FuzzEvents(f *testing.F) {
	f.Add(event(event(nil, 1, syscall.IN_MODIFY, "0.log\x00"), 2, syscall.IN_DELETE_SELF, ""))
	f.Add(binary.NativeEndian.AppendUint32(make([]byte, 12), 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		n := 0
		events(b, func(_ int32, _ uint32, name []byte) {
			n += syscall.SizeofInotifyEvent + len(name)
			if bytes.IndexByte(name, 0) >= 0 {
				t.Errorf("name %q", name)
			}
		})
		if n > len(b) {
			t.Errorf("%d bytes of events in %d", n, len(b))
		}
	})
}
