package pipeline

import (
	"encoding/json"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// What became of a rejected record: the values of the metric's label.
const (
	deadWritten = "written"
	deadFull    = "full"
	deadFailed  = "failed"
)

// deadLetters is a file of one JSON object a line: a record that the backend
// rejected for good, and the backend's reason. It grows to its limit and stays.
type deadLetters struct {
	path string
	max  int64

	mu    sync.Mutex // the saver syncs
	file  *os.File
	size  int64
	dirty bool
	told  time.Time
}

type deadLetter struct {
	Reason string         `json:"reason"`
	Time   time.Time      `json:"rejected_at"`
	File   string         `json:"file"` // identity of the generation
	Record map[string]any `json:"record"`
}

func (d *deadLetters) write(r *record.Record, reason string) (result string, err error) {
	b, err := json.Marshal(deadLetter{Reason: reason, Time: time.Now().UTC(), File: r.Origin.File, Record: r.Fields()})
	if err != nil {
		return deadFailed, err
	}
	b = append(b, '\n')
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return deadFailed, err
	}
	if d.size+int64(len(b)) > d.max {
		return deadFull, nil
	}
	n, err := d.file.Write(b)
	if err != nil {
		// Half a line would spoil the next one.
		return deadFailed, errors.Join(err, d.file.Truncate(d.size))
	}
	d.size += int64(n)
	d.dirty = true
	return deadWritten, nil
}

// open opens the file, anew if somebody has moved it away.
func (d *deadLetters) open() error {
	if d.file != nil {
		here, err := os.Stat(d.path)
		if err == nil {
			var ours os.FileInfo
			if ours, err = d.file.Stat(); err == nil && os.SameFile(here, ours) {
				return nil
			}
		}
		err = errors.Join(d.file.Sync(), d.file.Close())
		d.file = nil
		if err != nil {
			return err
		}
	}
	f, err := os.OpenFile(d.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	d.file, d.size = f, info.Size()
	return nil
}

func (d *deadLetters) sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.dirty {
		return nil
	}
	if err := d.file.Sync(); err != nil {
		return err
	}
	d.dirty = false
	return nil
}

func (d *deadLetters) close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.file == nil {
		return nil
	}
	err := d.file.Close()
	d.file = nil
	return err
}

// mayTell is true once in ten seconds: a backend that rejects one record
// usually rejects many.
func (d *deadLetters) mayTell() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.told) < 10*time.Second {
		return false
	}
	d.told = time.Now()
	return true
}
