// Package journal turns what is pushed to the collector into a log file, so that
// one mechanism (tail, cursors, ledger, checkpoints) serves every input.
//
// A Writer appends records, one JSON document a line, to <folder>/0.log, and
// renames that at a size to 0.log.<date>-<time>, as kubelet does with a container's
// log. Append returns once the records are on the disk (fsync); requests that come
// at the same time share one. A Decoder is the other half.
//
// Nothing that was taken is ever deleted before it is acknowledged: while the
// outputs are behind by more than a budget, Append refuses, and whoever pushes
// keeps the records and tries again.
//
// The inputs (otlp, events, journald) write; package tail reads. The package does
// not know either of them.
package journal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Defaults and limits.
const (
	DefaultMaxFile  = 16 << 20
	DefaultMaxBytes = 512 << 20
	// retryAfter is how long a refused sender is asked to wait.
	retryAfter = 5 * time.Second
	// maxCommit bytes are written with one fsync at most, and maxWaiting bytes wait
	// for one; more requests are refused.
	maxCommit  = 8 << 20
	maxWaiting = 32 << 20
	live       = "0.log"
	layout     = "20060102-150405"
)

// Config of a Writer.
type Config struct {
	// Folder of the input's files; it is made. No other Writer may use it.
	Folder string
	// MaxFile bytes make a file old. Default 16 MiB.
	MaxFile int64
	// MaxBytes of all files are kept; beyond it the oldest is deleted as soon as it is
	// acknowledged. Default 512 MiB.
	MaxBytes int64
	// MaxPending bytes may wait for the slowest output; beyond it Append refuses. At
	// most MaxBytes less two files; default half of MaxBytes.
	MaxPending int64
	// Pending returns how many bytes of the files the slowest output has not
	// acknowledged. It has to know from before Open what a former process left. It may
	// be some seconds late.
	Pending func() int64
	// Now is the clock for the files' names. Default time.Now.
	Now        func() time.Time
	Log        *slog.Logger
	Registerer prometheus.Registerer // with the input's name as a label
}

// FullError is what Append returns while the outputs are too far behind. Nothing
// of the request was taken.
type FullError struct {
	Pending, Max int64
	RetryAfter   time.Duration
}

func (e *FullError) Error() string {
	return fmt.Sprintf("%d bytes wait for the outputs, and at most %d may: try again in %s", e.Pending, e.Max, e.RetryAfter)
}

// ErrClosed is what Append returns after Close.
var ErrClosed = errors.New("the journal is closed")

// Writer is safe for concurrent use.
type Writer struct {
	cfg     Config
	metrics *metrics

	mu      sync.Mutex
	closed  bool
	waiting int64 // bytes of requests that are not answered
	queue   []*request
	wake    chan struct{}
	done    chan struct{}

	// Of the goroutine that commits.
	file  *os.File
	size  int64
	torn  bool // the file does not end with a line's end
	older []generation

	total  int64 // bytes of all files; under mu
	failed error // the last commit did; under mu
}

type generation struct {
	path  string
	stamp time.Time
	size  int64
}

type request struct {
	text    []byte
	records int
	taken   chan error
}

type metrics struct {
	records, bytes, commits prometheus.Counter
	refused                 *prometheus.CounterVec
	size                    prometheus.GaugeFunc
}

var oldName = regexp.MustCompile(`^0\.log\.(\d{8}-\d{6})$`)

// Open makes the folder, and goes on with the files that are in it.
func Open(cfg Config) (*Writer, error) {
	cfg.MaxFile = cmp.Or(cfg.MaxFile, DefaultMaxFile)
	cfg.MaxBytes = cmp.Or(cfg.MaxBytes, DefaultMaxBytes)
	cfg.MaxPending = cmp.Or(cfg.MaxPending, cfg.MaxBytes/2)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Pending == nil {
		return nil, errors.New("journal: nobody says how far behind the outputs are")
	}
	if cfg.MaxFile < 1 || cfg.MaxPending < 1 || cfg.MaxPending > cfg.MaxBytes-2*cfg.MaxFile {
		return nil, fmt.Errorf("journal: maxPending is %d: it has to be above 0 and at most maxBytes (%d) less two files (2 x %d)", cfg.MaxPending, cfg.MaxBytes, cfg.MaxFile)
	}
	w := &Writer{cfg: cfg, wake: make(chan struct{}, 1), done: make(chan struct{})}
	if err := os.MkdirAll(cfg.Folder, 0o750); err != nil {
		return nil, fmt.Errorf("journal: %w; name a folder that this user may write to", err)
	}
	if err := w.scan(); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err := w.register(); err != nil {
		_ = w.file.Close() // the error is the other one
		return nil, err
	}
	go w.commits()
	return w, nil
}

func (w *Writer) register() error {
	w.metrics = &metrics{
		records: prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_input_records_total", Help: "Records that were taken: they are on the disk."}),
		bytes:   prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_input_bytes_total", Help: "Bytes of records that were taken, as they are on the disk."}),
		commits: prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_input_commits_total", Help: "Writes to the disk (fsync); requests share them."}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_input_refused_total", Help: "Requests that were refused and stay with their sender, by reason: full (the outputs are behind), busy (the disk is), error (a write failed)."}, []string{"reason"}),
		size: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "outrigger_input_journal_bytes", Help: "Bytes of the input's files, acknowledged ones included."}, func() float64 {
			w.mu.Lock()
			defer w.mu.Unlock()
			return float64(w.total)
		}),
	}
	if w.cfg.Registerer == nil {
		return nil
	}
	r := w.cfg.Registerer
	return errors.Join(r.Register(w.metrics.records), r.Register(w.metrics.bytes), r.Register(w.metrics.commits), r.Register(w.metrics.refused), r.Register(w.metrics.size))
}

// scan finds the files and opens the live one.
func (w *Writer) scan() error {
	entries, err := os.ReadDir(w.cfg.Folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		m := oldName.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		at, err := time.Parse(layout, m[1])
		if err != nil {
			continue // nothing that a Writer wrote
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		w.older = append(w.older, generation{filepath.Join(w.cfg.Folder, e.Name()), at, info.Size()})
		w.total += info.Size()
	}
	slices.SortFunc(w.older, func(a, b generation) int { return a.stamp.Compare(b.stamp) })
	return w.open()
}

func (w *Writer) open() error {
	f, err := os.OpenFile(filepath.Join(w.cfg.Folder, live), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	w.size, err = f.Seek(0, io.SeekEnd)
	if err == nil && w.size > 0 {
		var last [1]byte
		_, err = f.ReadAt(last[:], w.size-1)
		// The end of a request that was never said to be taken. It is not cut off: a
		// reader may have seen the size.
		w.torn = last[0] != '\n'
	}
	if err == nil {
		err = syncFolder(w.cfg.Folder)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	w.file = f
	w.mu.Lock()
	w.total += w.size
	w.mu.Unlock()
	return nil
}

// Append writes the records down, all or none, and returns when they are on the
// disk. A FullError or another error says that they are not taken; they may be
// sent again. When ctx ends first it is not known whether they are.
func (w *Writer) Append(ctx context.Context, records []*record.Record) error {
	if len(records) == 0 {
		return nil
	}
	if pending := w.cfg.Pending(); pending > w.cfg.MaxPending {
		w.metrics.refused.WithLabelValues("full").Inc()
		return &FullError{pending, w.cfg.MaxPending, retryAfter}
	}
	var e encoder
	var text []byte
	for _, r := range records {
		text = e.append(text, r)
	}
	q := &request{text: text, records: len(records), taken: make(chan error, 1)}
	if err := w.enqueue(q); err != nil {
		return err
	}
	select {
	case err := <-q.taken:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *Writer) enqueue(q *request) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	size := int64(len(q.text))
	switch {
	case w.closed:
		return ErrClosed
	case w.total+w.waiting+size > w.cfg.MaxBytes+w.cfg.MaxFile: // and nothing of it was acknowledged
		w.nudge() // unless something is by now
		w.metrics.refused.WithLabelValues("full").Inc()
		return &FullError{w.total, w.cfg.MaxBytes, retryAfter}
	case w.waiting > 0 && w.waiting+size > maxWaiting:
		w.metrics.refused.WithLabelValues("busy").Inc()
		return &FullError{w.waiting, maxWaiting, time.Second}
	}
	w.waiting += size
	w.queue = append(w.queue, q)
	w.nudge()
	return nil
}

// nudge wakes the goroutine that commits and deletes; mu is held.
func (w *Writer) nudge() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Close waits for the requests that were taken in, and closes the file.
func (w *Writer) Close() error {
	w.mu.Lock()
	first := !w.closed
	w.closed = true
	w.mu.Unlock()
	if first {
		close(w.wake)
	}
	<-w.done
	if !first {
		return nil
	}
	return w.file.Close()
}

// commits writes what waits until Close.
func (w *Writer) commits() {
	defer close(w.done)
	for open := true; open; {
		_, open = <-w.wake
		for {
			batch := w.take()
			if len(batch) == 0 {
				break
			}
			err := w.commit(batch)
			if err != nil {
				w.metrics.refused.WithLabelValues("error").Add(float64(len(batch)))
			}
			w.answer(batch, err)
			w.bound()
		}
		w.bound()
	}
}

// take returns requests for one fsync.
func (w *Writer) take() (batch []*request) {
	w.mu.Lock()
	defer w.mu.Unlock()
	size := 0
	for len(w.queue) > 0 && (size == 0 || size+len(w.queue[0].text) <= maxCommit) {
		size += len(w.queue[0].text)
		batch = append(batch, w.queue[0])
		w.queue[0] = nil
		w.queue = w.queue[1:]
	}
	if len(w.queue) == 0 {
		w.queue = nil
	}
	return batch
}

func (w *Writer) answer(batch []*request, err error) {
	w.mu.Lock()
	for _, q := range batch {
		w.waiting -= int64(len(q.text))
	}
	again := err != nil && w.failed != nil
	w.failed = err
	w.mu.Unlock()
	if err != nil && !again { // once until it works again
		w.cfg.Log.Error("cannot write what was pushed; the senders are told to keep it", "file.path", w.cfg.Folder, "error.message", err.Error())
	}
	for _, q := range batch {
		q.taken <- err
	}
}

func (w *Writer) commit(batch []*request) error {
	if w.size >= w.cfg.MaxFile {
		if err := w.rotate(); err != nil {
			return fmt.Errorf("rotate the journal: %w", err)
		}
	}
	if w.torn {
		if err := w.write([]byte{'\n'}); err != nil {
			return err
		}
	}
	records, size := 0, 0
	for _, q := range batch {
		if err := w.write(q.text); err != nil {
			return err
		}
		records += q.records
		size += len(q.text)
	}
	// Nobody is told that its records are taken before this has succeeded for all.
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("write the journal: %w", err)
	}
	w.metrics.records.Add(float64(records))
	w.metrics.bytes.Add(float64(size))
	w.metrics.commits.Inc()
	return nil
}

func (w *Writer) write(text []byte) error {
	n, err := w.file.Write(text)
	w.size += int64(n)
	w.mu.Lock()
	w.total += int64(n)
	w.mu.Unlock()
	if n > 0 {
		w.torn = !bytes.HasSuffix(text[:n], []byte{'\n'})
	}
	if err != nil {
		return fmt.Errorf("write the journal: %w", err)
	}
	return nil
}

// rotate renames the live file. Names grow even where the clock does not.
func (w *Writer) rotate() error {
	at := w.cfg.Now().UTC().Truncate(time.Second)
	if n := len(w.older); n > 0 && !at.After(w.older[n-1].stamp) {
		at = w.older[n-1].stamp.Add(time.Second)
	}
	from := filepath.Join(w.cfg.Folder, live)
	to := from + "." + at.Format(layout)
	for { // a file that came after the start is nobody's to overwrite
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return err
		}
		at = at.Add(time.Second)
		to = from + "." + at.Format(layout)
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	old, size := w.file, w.size
	if err := w.openAfter(size); err != nil {
		// The old file goes on under its first name.
		return errors.Join(err, os.Rename(to, from))
	}
	w.torn = false
	w.older = append(w.older, generation{to, at, size})
	return old.Close()
}

func (w *Writer) openAfter(size int64) error {
	if err := w.open(); err != nil {
		w.size = size
		return err
	}
	return nil
}

// bound deletes the oldest files beyond the budget, but none that is not
// acknowledged: then the newer ones hold fewer bytes than are pending.
func (w *Writer) bound() {
	for len(w.older) > 0 {
		w.mu.Lock()
		total := w.total
		w.mu.Unlock()
		oldest := w.older[0]
		if total <= w.cfg.MaxBytes || total-oldest.size < w.cfg.Pending() {
			return
		}
		if err := os.Remove(oldest.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.cfg.Log.Warn("an acknowledged file cannot be deleted", "file.path", oldest.path, "error.message", err.Error())
			return
		}
		w.older = w.older[1:]
		w.mu.Lock()
		w.total -= oldest.size
		w.mu.Unlock()
	}
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
