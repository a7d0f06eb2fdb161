package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

// errRaced says that somebody else wrote a file at the same time.
var errRaced = errors.New("somebody else is writing it")

// write replaces a file at once. Where it exists its mode and owner stay, else it
// gets mode. With was it does so only where the file still holds that.
func write(path string, content []byte, mode os.FileMode, was []byte) (err error) {
	// A link stays one.
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".outrigger-cni-*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = tmp.Write(content)
	info, statErr := os.Stat(path)
	if statErr == nil && was != nil {
		mode = info.Mode().Perm()
		if s, ok := info.Sys().(*syscall.Stat_t); ok && err == nil && int(s.Uid) != os.Geteuid() {
			err = tmp.Chown(int(s.Uid), int(s.Gid))
		}
	}
	if err == nil {
		err = tmp.Chmod(mode)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if was != nil {
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, was) {
			return fmt.Errorf("%s: %w", path, errRaced)
		}
	}
	return os.Rename(tmp.Name(), path)
}

// ensure writes a file that is to be ours alone, where it is not so already.
func ensure(path string, content []byte, mode os.FileMode) (changed bool, err error) {
	now, err := os.ReadFile(path)
	if err == nil && bytes.Equal(now, content) {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() == mode {
			return false, err
		}
		return true, os.Chmod(path, mode)
	}
	return true, write(path, content, mode, nil)
}

// same says whether two files hold the same, reading no more than it has to.
func same(a, b string) (bool, error) {
	x, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer func() { _ = x.Close() }()
	y, err := os.Open(b)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { _ = y.Close() }()
	xi, err := x.Stat()
	if err != nil {
		return false, err
	}
	yi, err := y.Stat()
	if err != nil || xi.Size() != yi.Size() || yi.Mode().Perm()&0o111 == 0 {
		return false, err
	}
	p, q := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(x, p)
		m, yerr := io.ReadFull(y, q)
		if n != m || !bytes.Equal(p[:n], q[:m]) {
			return false, nil
		}
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return true, nil
		case err != nil || yerr != nil:
			return false, errors.Join(err, yerr)
		}
	}
}
