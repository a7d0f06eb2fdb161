package atomicfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/outrigger-mesh/outrigger/atomicfile"
)

// want checks what is in a folder: one file with this content and mode.
func want(t *testing.T, path, content string, mode fs.FileMode) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != content {
		t.Errorf("%q, %v; want %q", got, err, content)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != mode {
		t.Errorf("%v, %v; want a file of mode %v", info, err, mode)
	}
	if all, err := os.ReadDir(filepath.Dir(path)); err != nil || len(all) != 1 {
		t.Errorf("%v, %v; want one file", all, err)
	}
}

func TestWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	f := func(content string, mode fs.FileMode) {
		t.Helper()
		if err := atomicfile.Write(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		want(t, path, content, mode)
	}
	defer syscall.Umask(syscall.Umask(0o077)) // narrows no mode
	f("first", 0o600)
	f("the second, which is longer", 0o644)
	f("", 0o600)
}

// Whoever has the file open goes on with what it opened.
func TestReaderKeepsTheOldFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if err := atomicfile.Write(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Close() }()
	if err := atomicfile.Write(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 9)
	if n, err := reader.Read(b); err != nil || string(b[:n]) != "old" {
		t.Errorf("%q, %v; want the old content", b[:n], err)
	}
	want(t, path, "new", 0o600)
}

// What a crash left is in nobody's way, and a link is not written through.
func TestLeftTemporaryFile(t *testing.T) {
	path, other := filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(path+".tmp", []byte("half of what was once meant to"), 0o400); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Write(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, path, "new", 0o600)
	if err := errors.Join(os.WriteFile(other, []byte("other"), 0o600), os.Symlink(other, path+".tmp")); err != nil {
		t.Fatal(err)
	}
	if err := atomicfile.Write(path, []byte("newer"), 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, path, "newer", 0o600)
	want(t, other, "other", 0o600)
}

// After an error nothing has changed, and no half file is left.
func TestErrors(t *testing.T) {
	t.Run("the rename", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "state")
		if err := os.Mkdir(path, 0o700); err != nil { // no file replaces a folder
			t.Fatal(err)
		}
		if err := atomicfile.Write(path, []byte("new"), 0o600); err == nil {
			t.Error("a folder was replaced")
		}
		if all, err := os.ReadDir(dir); err != nil || len(all) != 1 || !all[0].IsDir() {
			t.Errorf("%v, %v; want the folder alone", all, err)
		}
	})
	t.Run("the write", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state")
		if err := atomicfile.Write(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		var before syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &before); err != nil {
			t.Fatal(err)
		}
		small := before
		small.Cur = 4096 // as a disk that is full
		if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &small); err != nil {
			t.Fatal(err)
		}
		err := atomicfile.Write(path, make([]byte, 8192), 0o600)
		if restore := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &before); restore != nil {
			t.Fatal(restore)
		}
		if !errors.Is(err, syscall.EFBIG) {
			t.Errorf("%v; want EFBIG", err)
		}
		want(t, path, "old", 0o600)
	})
	t.Run("no folder", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none", "state")
		if err := atomicfile.Write(path, nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v; want that there is no folder", err)
		}
	})
	t.Run("no permission", func(t *testing.T) {
		if os.Geteuid() == 0 {
			t.Skip("root may write everywhere")
		}
		dir := t.TempDir()
		path := filepath.Join(dir, "state")
		if err := errors.Join(atomicfile.Write(path, []byte("old"), 0o600), os.Chmod(dir, 0o500)); err != nil {
			t.Fatal(err)
		}
		err := atomicfile.Write(path, []byte("new"), 0o600)
		if back := os.Chmod(dir, 0o700); back != nil {
			t.Fatal(back)
		}
		if !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%v; want that it is not permitted", err)
		}
		want(t, path, "old", 0o600)
	})
}

func TestSyncFolder(t *testing.T) {
	dir := t.TempDir()
	if err := atomicfile.SyncFolder(dir); err != nil {
		t.Error(err)
	}
	if err := atomicfile.SyncFolder(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v; want that there is no folder", err)
	}
}
