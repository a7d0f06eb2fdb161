package pipeline

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
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
//
// Replay moves it into a folder that the pipeline follows like one of logs. So a
// record that is replayed is in the account again, as bytes of that file, and what is
// rejected again is a dead letter again.
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
	Reason string    `json:"reason"`
	Time   time.Time `json:"rejected_at"`
	// Where it comes from; a backend that knows records by it stores none twice.
	File   string          `json:"file"`
	Path   string          `json:"path"`
	Offset int64           `json:"offset"`
	End    int64           `json:"end"`
	Record json.RawMessage `json:"record"`
}

func (d *deadLetters) write(r *record.Record, reason string) (result string, err error) {
	b, err := json.Marshal(deadLetter{
		Reason: reason, Time: time.Now().UTC(), File: r.Origin.File, Path: r.Origin.Path, Offset: r.Origin.Offset, End: r.Origin.End,
		Record: json.RawMessage(bytes.TrimSuffix(journal.Encode(r), []byte{'\n'})),
	})
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

// replayFolder is where dead letters go that are to be sent again.
func (p *Pipeline) replayFolder() string { return filepath.Join(p.cfg.DataDir, p.cfg.Name+".replay") }

// replayed are the files that the follower reads for it.
func (p *Pipeline) replayed() tail.Files {
	decoder := &journal.Decoder{}
	return tail.Files{
		Patterns: []string{filepath.Join(p.replayFolder(), "*.ndjson")}, Format: tail.Envelope,
		Resource: record.Resource{Service: "replay"},
		Decode:   func(line []byte, r *record.Record) error { return decodeDeadLetter(decoder, line, r) },
	}
}

func decodeDeadLetter(decoder *journal.Decoder, line []byte, r *record.Record) error {
	var d deadLetter
	if err := json.Unmarshal(line, &d); err != nil {
		return fmt.Errorf("%w: dead letter: %w", journal.ErrMalformed, err)
	}
	if err := decoder.Decode(d.Record, r); err != nil {
		return err
	}
	r.Origin = record.Origin{File: d.File, Path: d.Path, Offset: d.Offset, End: d.End}
	return nil
}

// Replay sends the dead letters again, and returns how many bytes of them there
// are. It may be called from any goroutine while Run runs.
func (p *Pipeline) Replay() (bytes int64, err error) {
	p.dead.mu.Lock()
	defer p.dead.mu.Unlock()
	info, err := os.Stat(p.dead.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return 0, nil
	}
	if err == nil {
		err = os.MkdirAll(p.replayFolder(), 0o750)
	}
	if err == nil {
		err = os.Rename(p.dead.path, filepath.Join(p.replayFolder(), time.Now().UTC().Format("20060102T150405.000000000")+".ndjson"))
	}
	if err != nil {
		return 0, fmt.Errorf("the dead letters of output %s: %w", p.cfg.Name, err)
	}
	p.replaying.Store(true)
	return info.Size(), nil
}

// clearReplayed deletes the replayed files of which everything is settled.
func (p *Pipeline) clearReplayed() error {
	if !p.replaying.Load() { // as nearly always: no need to look into the folder
		return nil
	}
	p.replaying.Store(false) // before looking: Replay may add one meanwhile
	files, err := filepath.Glob(filepath.Join(p.replayFolder(), "*.ndjson"))
	if err != nil || len(files) == 0 {
		return err
	}
	p.replaying.Store(true)
	var errs []error
	for _, path := range files {
		file, ok := p.book.Find(func(_, of string) bool { return of == path })
		if info, err := os.Stat(path); !ok || err != nil || !p.book.read(file, info.Size()) {
			continue
		}
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}
