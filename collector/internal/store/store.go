// Package store is the embedded log store: a folder of SQLite databases, one a
// day, with a full-text index. It is made for a laptop or one node, where it
// stands in for Elasticsearch.
//
// It knows how records are kept, found (package query decides what matches) and
// thrown away, and serves that over HTTP. It does not know where records come
// from. Output "store" appends; the collector's admin server mounts Handler.
//
// What Append has accepted survives a power cut: a batch is one transaction a
// day, committed with synchronous=FULL, which syncs the write-ahead log before
// the commit returns. NORMAL would be about as fast for large batches and could
// lose acknowledged records.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	sqlite3 "modernc.org/sqlite/lib"

	"github.com/outrigger-mesh/outrigger/collector/internal/query"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a store.
const (
	MaxResults    = 10_000 // lines of one search
	MaxFollowers  = 32     // live tails at once
	MaxSearches   = 8      // searches over HTTP at once
	followerQueue = 1024   // lines that a live tail may be behind
	maxOpenDays   = 8      // databases kept open; more only while all are in use
	maxAhead      = 24 * time.Hour
	minMaxBytes   = 16 << 20
	sweepEvery    = time.Minute
)

// Config is the store's part of the collector's configuration.
type Config struct {
	// Folder holds the databases, logs-YYYY-MM-DD.db by the records' UTC day. It
	// is made if it does not exist. One process may write to it.
	Folder string `yaml:"folder"`
	// Retention is how long records are kept; a day's database is deleted when
	// all of it is older. Default 168h.
	Retention time.Duration `yaml:"retention"`
	// MaxBytes bounds the databases together, without their write-ahead logs (some
	// MiB): the oldest day is deleted to make room. 0 is no limit.
	MaxBytes int64 `yaml:"maxBytes"`
	// SearchTimeout bounds one search. Default 30s.
	SearchTimeout time.Duration `yaml:"searchTimeout"`
}

// Validate reports the first field that cannot be used, and what to write instead.
func (c Config) Validate() error {
	switch {
	case c.Folder == "":
		return errors.New("store: folder is empty: name a folder for the databases, such as /var/lib/outrigger/logs")
	case c.Retention < 0 || c.Retention > 0 && c.Retention < 24*time.Hour:
		return fmt.Errorf("store: retention: %s is shorter than a day, and whole days are deleted: write 24h or more", c.Retention)
	case c.MaxBytes < 0 || c.MaxBytes > 0 && c.MaxBytes < minMaxBytes:
		return fmt.Errorf("store: maxBytes: %d is too small for one database: write at least %d, or 0 for no limit", c.MaxBytes, minMaxBytes)
	case c.SearchTimeout < 0:
		return fmt.Errorf("store: searchTimeout: %s is negative: write a duration such as 30s", c.SearchTimeout)
	}
	return nil
}

// ErrFull is wrapped by the errors of Append when the file system has no space
// left or MaxBytes is used up by the newest day. Append works again when there is
// space; nothing has to be restarted.
var ErrFull = errors.New("no space left")

// RefusedError is returned by Append when it has stored all records but these,
// which it will never store.
type RefusedError struct{ Records []Refusal }

// Refusal is a record that is not stored: its index in the batch, and why.
type Refusal struct {
	Index  int
	Reason string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("store: %d records refused, the first: %s", len(e.Records), e.Records[0].Reason)
}

// Stats counts since Open.
type Stats struct {
	Stored     int64 // records
	Duplicates int64 // records that were there already
	Refused    int64
	Skipped    int64 // lines that a live tail was too slow for
	Followers  int64 // live tails now
	Days       int64 // databases
	Bytes      int64 // of the databases and their write-ahead logs
}

// Store is an open store. Its methods can be called by several goroutines.
type Store struct {
	cfg Config
	log *slog.Logger

	writing sync.Mutex // held by Append: one batch at a time
	sweep   time.Time  // of the last look for old days; guarded by writing
	seq     uint16     // orders records of one microsecond; guarded by writing

	mu        sync.Mutex // guards what follows
	days      map[string]*day
	followers map[*follower]struct{}
	closed    bool

	stored, duplicates, refused, skipped atomic.Int64
}

// Open opens the store in cfg.Folder and deletes the days that are past their
// retention.
func Open(cfg Config, log *slog.Logger) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Retention == 0 {
		cfg.Retention = 7 * 24 * time.Hour
	}
	if cfg.SearchTimeout == 0 {
		cfg.SearchTimeout = 30 * time.Second
	}
	folder, err := filepath.Abs(cfg.Folder)
	if err != nil {
		return nil, fmt.Errorf("store: folder %s: %w", cfg.Folder, err)
	}
	cfg.Folder = folder
	if err := os.MkdirAll(folder, 0o750); err != nil {
		return nil, fmt.Errorf("store: folder %s cannot be made: %w; name a folder that this user may write to", folder, err)
	}
	s := &Store{cfg: cfg, log: log, days: map[string]*day{}, followers: map[*follower]struct{}{}}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, fmt.Errorf("store: folder %s cannot be read: %w", folder, err)
	}
	for _, e := range entries {
		if start, ok := dayOfFile(e.Name()); ok {
			s.days[start.Format(time.DateOnly)] = newDay(folder, start)
		}
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	s.retain(time.Now())
	return s, nil
}

// Append stores the batch durably. Records that are there already, by their
// Origin and day, are left as they are, so a batch can be appended again. It
// returns a *RefusedError when all others are stored; after any other error none,
// some or all may be, and the batch should be appended again.
func (s *Store) Append(ctx context.Context, batch []*record.Record) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	now := time.Now()
	if now.Sub(s.sweep) >= sweepEvery {
		s.retain(now)
	}
	refused := &RefusedError{}
	perDay := map[string][]row{}
	var order []string
	for i, r := range batch {
		row, reason := s.row(now, i, r)
		if reason != "" {
			refused.Records = append(refused.Records, Refusal{i, reason})
			continue
		}
		key := row.time.Format(time.DateOnly)
		if _, ok := perDay[key]; !ok {
			order = append(order, key)
		}
		perDay[key] = append(perDay[key], row)
	}
	// Oldest first: what makes room for the newest must not be written after it.
	slices.Sort(order)
	for _, key := range order {
		reason, err := s.appendDay(ctx, key, perDay[key])
		if err != nil {
			return err
		}
		if reason != "" {
			for _, row := range perDay[key] {
				refused.Records = append(refused.Records, Refusal{row.index, reason})
			}
		}
	}
	if len(refused.Records) > 0 {
		s.refused.Add(int64(len(refused.Records)))
		slices.SortFunc(refused.Records, func(a, b Refusal) int { return a.Index - b.Index })
		return refused
	}
	return nil
}

// appendDay stores the rows of one day and shows the new ones to the live tails.
// It returns why the day cannot be kept, or an error.
func (s *Store) appendDay(ctx context.Context, key string, rows []row) (string, error) {
	for mended := false; ; {
		d, err := s.acquire(key, true)
		if err != nil {
			return "", s.explain(err)
		}
		if s.cfg.MaxBytes > 0 {
			err = d.limit(ctx, s.cfg.MaxBytes-s.sizeOfOthers(key))
		}
		var fresh []row
		if err == nil {
			fresh, err = d.append(ctx, rows, &s.seq)
		}
		s.release(d)
		if err == nil {
			s.stored.Add(int64(len(fresh)))
			s.duplicates.Add(int64(len(rows) - len(fresh)))
			s.publish(fresh)
			return "", nil
		}
		if isDamaged(err) && !mended && s.setAside(d) {
			mended = true
			continue
		}
		if !isFull(err) || s.cfg.MaxBytes == 0 {
			return "", s.explain(err)
		}
		// The limit is ours: an older day makes room for a newer one.
		oldest, newest := s.ends()
		switch {
		case oldest < key:
			if !s.remove(oldest, "maxBytes") {
				return "", fmt.Errorf("store: folder %s is at maxBytes (%d) and a search still reads the oldest day %s: %w", s.cfg.Folder, s.cfg.MaxBytes, oldest, ErrFull)
			}
		case newest > key:
			return fmt.Sprintf("the store is at maxBytes (%d) and keeps the newer days: raise maxBytes to keep %s", s.cfg.MaxBytes, key), nil
		default:
			return "", s.explain(err)
		}
	}
}

// explain names the folder and the remedy of the errors that users can mend.
func (s *Store) explain(err error) error {
	switch {
	case isFull(err) && s.cfg.MaxBytes > 0:
		return fmt.Errorf("store: folder %s: %w: the newest day alone has reached maxBytes (%d) or the disk is full; raise maxBytes or free space: %w", s.cfg.Folder, ErrFull, s.cfg.MaxBytes, err)
	case isFull(err):
		return fmt.Errorf("store: folder %s: %w: free space on its file system, shorten retention (%s) or set maxBytes; storing goes on by itself then: %w", s.cfg.Folder, ErrFull, s.cfg.Retention, err)
	case remedy(sqliteCode(err)) != "":
		return fmt.Errorf("store: folder %s: %s: %w", s.cfg.Folder, remedy(sqliteCode(err)), err)
	default:
		return fmt.Errorf("store: folder %s: %w", s.cfg.Folder, err)
	}
}

// remedy is what to do about a primary result code of SQLite; empty where
// nothing can be said. A full disk is not always SQLITE_FULL: a quota, a limit
// on the size of a file and the growth of the index of the write-ahead log are
// errors of input and output.
func remedy(code int) string {
	switch code {
	case sqlite3.SQLITE_IOERR:
		return "its file system does not take what is written: free space on it, raise a quota or a limit on the size of files, or replace a disk that fails; storing goes on by itself then"
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM:
		return "its databases cannot be written: name a folder that exists and that this user may write to"
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return "another program holds its database: end it; one collector writes to a folder"
	default:
		return ""
	}
}

// row makes what is stored of a record, or says why it never will be.
func (s *Store) row(now time.Time, index int, r *record.Record) (row, string) {
	t := r.Time
	if t.IsZero() {
		t = r.Observed
	}
	t = t.UTC()
	switch day := t.Truncate(24 * time.Hour); {
	case !day.Add(24 * time.Hour).After(now.Add(-s.cfg.Retention)):
		return row{}, fmt.Sprintf("its time %s is older than retention (%s)", t.Format(time.RFC3339), s.cfg.Retention)
	case t.After(now.Add(maxAhead)):
		return row{}, fmt.Sprintf("its time %s is more than %s in the future: check the clock of the program that wrote it", t.Format(time.RFC3339), maxAhead)
	}
	from := r.Resource
	if from == nil {
		from = &record.Resource{}
	}
	fields := r.Fields()
	line, err := encode(fields)
	if err != nil {
		return row{}, fmt.Sprintf("it cannot be written as JSON: %v", err)
	}
	return row{
		index: index, time: t, file: r.Origin.File, offset: r.Origin.Offset, line: line, fields: fields, terms: query.Terms(fields),
		service: str(fields[record.ServiceName]), namespace: from.Namespace, pod: from.Pod,
		level: r.Level, trace: r.TraceID, dataset: str(fields[record.EventDataset]),
	}, ""
}

func str(v any) string {
	s, _ := v.(string)
	return s
}

// retain deletes the days all of whose records are older than the retention. A
// day that a search is reading is left for the next time.
func (s *Store) retain(now time.Time) {
	s.sweep = now
	s.mu.Lock()
	var old []string
	for key, d := range s.days {
		if !d.start.Add(24 * time.Hour).After(now.Add(-s.cfg.Retention)) {
			old = append(old, key)
		}
	}
	s.mu.Unlock()
	slices.Sort(old)
	for _, key := range old {
		s.remove(key, "retention")
	}
}

// remove deletes a day unless it is in use.
func (s *Store) remove(key, cause string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.days[key]
	if d == nil || d.refs > 0 {
		return false
	}
	size := d.size()
	if err := d.delete(); err != nil {
		s.log.Error("a day of the log store cannot be deleted", "file.path", d.path, "event.reason", cause, "error.message", err.Error())
		return false
	}
	delete(s.days, key)
	s.log.Info("a day of the log store is deleted", "file.path", d.path, "event.reason", cause, "file.size", size)
	return true
}

func (s *Store) ends() (oldest, newest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key := range s.days {
		if oldest == "" || key < oldest {
			oldest = key
		}
		newest = max(newest, key)
	}
	return oldest, newest
}

func (s *Store) sizeOfOthers(key string) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum int64
	for k, d := range s.days {
		if k != key {
			sum += d.size()
		}
	}
	return sum
}

// acquire opens a day and holds it open until release. Without create, a day
// that does not exist is nil.
func (s *Store) acquire(key string, create bool) (*day, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the store is closed")
	}
	d := s.days[key]
	if d == nil {
		if !create {
			return nil, nil
		}
		start, err := time.Parse(time.DateOnly, key)
		if err != nil {
			return nil, err
		}
		d = newDay(s.cfg.Folder, start)
	}
	if !d.isOpen() {
		s.closeIdle()
		aside, err := d.open()
		if aside != "" {
			s.tellDamaged(d, aside)
		}
		if err != nil {
			return nil, err
		}
	}
	s.days[key] = d
	d.refs++
	d.used = time.Now()
	return d, nil
}

// setAside puts an empty database in the place of a damaged one, unless a search
// is reading it; the batch then comes again.
func (s *Store) setAside(d *day) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d.refs > 0 {
		return false
	}
	if err := d.close(); err != nil {
		s.log.Warn("a damaged day of the log store did not close cleanly", "file.path", d.path, "error.message", err.Error())
	}
	aside, err := d.aside()
	if err != nil {
		s.log.Error("a damaged day of the log store cannot be set aside", "file.path", d.path, "error.message", err.Error())
		return false
	}
	s.tellDamaged(d, aside)
	return true
}

func (s *Store) tellDamaged(d *day, aside string) {
	s.log.Error("a day of the log store was damaged and is set aside; its records cannot be searched", "file.path", d.path, "file.target_path", aside)
}

func (s *Store) release(d *day) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d.refs--
}

// closeIdle closes the days used longest ago, down to room for one more. The
// caller holds mu.
func (s *Store) closeIdle() {
	var idle []*day
	open := 0
	for _, d := range s.days {
		if d.isOpen() {
			open++
			if d.refs == 0 {
				idle = append(idle, d)
			}
		}
	}
	slices.SortFunc(idle, func(a, b *day) int { return a.used.Compare(b.used) })
	for _, d := range idle {
		if open < maxOpenDays {
			return
		}
		if err := d.close(); err != nil {
			s.log.Error("a day of the log store did not close cleanly", "file.path", d.path, "error.message", err.Error())
		}
		open--
	}
}

// Stats returns the counters and sizes of now.
func (s *Store) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{
		Stored: s.stored.Load(), Duplicates: s.duplicates.Load(), Refused: s.refused.Load(), Skipped: s.skipped.Load(),
		Followers: int64(len(s.followers)), Days: int64(len(s.days)),
	}
	for _, d := range s.days {
		st.Bytes += d.size()
	}
	return st
}

// Close ends the live tails and closes the databases. Searches that run end with
// an error. Append must not be running.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	for f := range s.followers {
		close(f.closed)
	}
	var errs []error
	for _, d := range s.days {
		if d.isOpen() {
			errs = append(errs, d.close())
		}
	}
	return errors.Join(errs...)
}
