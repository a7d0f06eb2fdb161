// Package atomicfile replaces a file so that whoever reads it, also after a crash
// of the machine, finds the old content or the new one and never a part of it.
//
// It knows no format and keeps no copies. All programs use it for the small files
// in which they remember something.
package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// Write makes path a file with this content and these permissions, which the
// umask does not narrow; a file that stood there is gone with its own. The folder
// must exist and be writable. Where path is a symbolic link, the link is replaced.
//
// The content is written to a new file beside it, named path + ".tmp", which
// replaces one that a crash left, and flushed to the disk before it gets its name;
// then the folder is flushed, so once Write has returned nil the new content
// survives a crash. After an error the old content is there and no new file, but
// where the folder alone could not be flushed the new content is there and may not
// survive. Of two Writes to one path at the same time one may fail; a caller has
// them take turns.
func Write(path string, content []byte, mode fs.FileMode) (err error) {
	temp := path + ".tmp"
	// Not written into: it may be a link, or have other permissions.
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder flushes a folder's entries to the disk: names that were made, changed
// or removed in it survive a crash once it has returned nil. A file system that cannot
// flush folders is left to itself.
func SyncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	err = dir.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, dir.Close())
}
