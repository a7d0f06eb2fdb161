package store

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// schemaVersion is in PRAGMA user_version of every database.
const schemaVersion = 1

// The id of a row orders it by time: microseconds of the day, then 16 bits in
// order of arrival. So newest first is descending rowid, which both the table
// and the full-text index give without sorting. Microseconds and not
// nanoseconds, because the index writes the differences of ids: two bytes less
// each.
//
// origin makes an append of the same record a no-op. Offsets of one file grow, so
// its entries are appended and not scattered.
//
// words is an index only: no content (it is in logs), no positions (package query
// checks phrases), no columns. The terms come from query.Terms.
const schema = `
CREATE TABLE files (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE logs (
  id INTEGER PRIMARY KEY, time INTEGER NOT NULL, file INTEGER, pos INTEGER,
  service TEXT, namespace TEXT, pod TEXT, level TEXT, trace_id TEXT, dataset TEXT,
  fields TEXT NOT NULL);
CREATE UNIQUE INDEX origin ON logs (file, pos) WHERE file IS NOT NULL;
CREATE VIRTUAL TABLE words USING fts5 (terms, content='', detail=none, columnsize=0, tokenize='ascii');
`

const idBits = 16

// idSlack is how much later than its time a row's id can say: rows of one
// microsecond that found their place taken move on.
const idSlack = int64(time.Second/time.Microsecond) << idBits

func idOf(start, t time.Time) int64 { return t.Sub(start).Microseconds() << idBits }

// row is a record as it is stored.
type row struct {
	index                                          int // in the batch
	time                                           time.Time
	file                                           string
	offset                                         int64
	service, namespace, pod, level, trace, dataset string
	line                                           []byte // the fields as JSON
	fields                                         map[string]any
	terms                                          string
	id                                             int64
}

// day is one database. Opening, closing and refs are guarded by Store.mu; write
// and files are used by the one writer only.
type day struct {
	start time.Time
	path  string
	refs  int
	used  time.Time

	write  *sql.DB // one connection
	insert *sql.Stmt
	known  *sql.Stmt
	index  *sql.Stmt
	file   *sql.Stmt
	files  map[string]int64
	read   *sql.DB
}

func dayOfFile(name string) (time.Time, bool) {
	date, ok := strings.CutPrefix(name, "logs-")
	if !ok {
		return time.Time{}, false
	}
	date, ok = strings.CutSuffix(date, ".db")
	if !ok {
		return time.Time{}, false
	}
	t, err := time.Parse(time.DateOnly, date)
	return t, err == nil
}

func newDay(folder string, start time.Time) *day {
	return &day{start: start, path: filepath.Join(folder, "logs-"+start.Format(time.DateOnly)+".db")}
}

func (d *day) isOpen() bool { return d.write != nil }

// open opens or creates the database. One that is no database or is damaged is
// renamed, and open returns its new name and goes on with an empty one: a bad day
// must not stop today's logs.
func (d *day) open() (aside string, err error) {
	err = d.openOnce()
	if !isDamaged(err) {
		return "", err
	}
	if aside, err = d.aside(); err != nil {
		return "", err
	}
	return aside, d.openOnce()
}

// aside renames the files of a day that is not open and returns the new name.
func (d *day) aside() (string, error) {
	to := d.path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000000000")
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Rename(d.path+suffix, to+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return to, nil
}

func (d *day) openOnce() (err error) {
	dsn := func(pragmas ...string) string {
		u := url.URL{Scheme: "file", Path: d.path, RawQuery: url.Values{"_pragma": pragmas, "_txlock": {"immediate"}}.Encode()}
		return u.String()
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", filepath.Base(d.path), err), d.close())
		}
	}()
	d.write, err = sql.Open("sqlite", dsn("busy_timeout(5000)", "journal_mode(WAL)", "synchronous(FULL)", "journal_size_limit(67108864)", "cache_size(-4096)"))
	if err != nil {
		return err
	}
	d.write.SetMaxOpenConns(1)
	if err = d.create(); err != nil {
		return err
	}
	for stmt, text := range map[**sql.Stmt]string{
		&d.insert: `INSERT OR IGNORE INTO logs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		&d.known:  `SELECT count(*) FROM logs WHERE file = ? AND pos = ?`,
		&d.index:  `INSERT INTO words (rowid, terms) VALUES (?, ?)`,
		&d.file:   `INSERT INTO files (name) VALUES (?) ON CONFLICT (name) DO UPDATE SET name = name RETURNING id`,
	} {
		if *stmt, err = d.write.Prepare(text); err != nil {
			return err
		}
	}
	d.files = map[string]int64{}
	d.read, err = sql.Open("sqlite", dsn("busy_timeout(5000)", "query_only(1)", "cache_size(-4096)"))
	if err != nil {
		return err
	}
	// Every connection has a cache of its own: those of a search go with it.
	d.read.SetMaxOpenConns(4)
	d.read.SetMaxIdleConns(1)
	d.read.SetConnMaxIdleTime(10 * time.Second)
	return nil
}

// create makes the tables of a new database, in one transaction, and syncs the
// folder so that a power cut does not lose the file's name.
func (d *day) create() (err error) {
	tx, err := d.write.Begin()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	var version int
	if err = tx.QueryRow(`PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	switch version {
	case schemaVersion:
		return tx.Commit()
	case 0:
	default:
		return fmt.Errorf("has format %d and this program reads %d: move it out of the folder, or use the newer program", version, schemaVersion)
	}
	if _, err = tx.Exec(schema + fmt.Sprintf("PRAGMA user_version = %d;", schemaVersion)); err != nil {
		return err
	}
	if err = tx.Commit(); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(d.path))
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

func (d *day) close() error {
	var errs []error
	for _, stmt := range []**sql.Stmt{&d.insert, &d.known, &d.index, &d.file} {
		if *stmt != nil {
			errs = append(errs, (*stmt).Close())
			*stmt = nil
		}
	}
	for _, db := range []**sql.DB{&d.read, &d.write} {
		if *db != nil {
			errs = append(errs, (*db).Close())
			*db = nil
		}
	}
	return errors.Join(errs...)
}

// delete closes the day and removes its files.
func (d *day) delete() error {
	errs := []error{d.close()}
	for _, suffix := range []string{"-wal", "-shm", ""} {
		if err := os.Remove(d.path + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// size is what the day takes on disk, in bytes.
func (d *day) size() int64 {
	var sum int64
	for _, suffix := range []string{"", "-wal"} {
		if info, err := os.Stat(d.path + suffix); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

// limit bounds the database in bytes; SQLite does not go below what it has.
func (d *day) limit(ctx context.Context, size int64) error {
	const page = 4096
	_, err := d.write.ExecContext(ctx, fmt.Sprintf(`PRAGMA max_page_count = %d`, max(1, min(size/page, math.MaxInt32))))
	return err
}

// append stores the rows in one transaction and returns those that were new.
func (d *day) append(ctx context.Context, rows []row, seq *uint16) (fresh []row, err error) {
	tx, err := d.write.BeginTx(ctx, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			clear(d.files) // names of this transaction are not there
			if rollback := tx.Rollback(); rollback != nil && !errors.Is(rollback, sql.ErrTxDone) {
				err = errors.Join(err, rollback)
			}
			fresh = nil
		}
	}()
	insert, known, index, file := tx.StmtContext(ctx, d.insert), tx.StmtContext(ctx, d.known), tx.StmtContext(ctx, d.index), tx.StmtContext(ctx, d.file)
	fresh = make([]row, 0, len(rows))
	for _, r := range rows {
		fileID := sql.NullInt64{}
		if r.file != "" {
			id, ok := d.files[r.file]
			if !ok {
				if err := file.QueryRowContext(ctx, r.file).Scan(&id); err != nil {
					return nil, err
				}
				d.files[r.file] = id
			}
			fileID = sql.NullInt64{Int64: id, Valid: true}
		}
		*seq++
		r.id = idOf(d.start, r.time) + int64(*seq)
		for step := int64(1); ; step *= 2 {
			res, err := insert.ExecContext(ctx, r.id, r.time.UnixNano(), fileID, r.offset, r.service, r.namespace, r.pod, r.level, r.trace, r.dataset, string(r.line))
			if err != nil {
				return nil, err
			}
			n, err := res.RowsAffected()
			if err != nil {
				return nil, err
			}
			if n == 1 {
				if _, err := index.ExecContext(ctx, r.id, r.terms); err != nil {
					return nil, err
				}
				fresh = append(fresh, r)
				break
			}
			if fileID.Valid {
				var count int
				if err := known.QueryRowContext(ctx, fileID, r.offset).Scan(&count); err != nil {
					return nil, err
				}
				if count > 0 {
					break
				}
			}
			// The id is taken by another record of this microsecond. Doubling steps
			// end soon even where a clock of whole seconds fills it.
			r.id += step
		}
	}
	return fresh, tx.Commit()
}

// candidate is a row of a page.
type candidate struct {
	id   int64
	time int64 // nanoseconds since 1970
	line []byte
}

// page returns up to limit candidates with from <= id < before, newest first.
// Every page is a query of its own, so that a reader who is slow never holds the
// write-ahead log.
func (d *day) page(ctx context.Context, match string, from, before int64, limit int) (out []candidate, err error) {
	text := `SELECT id, time, fields FROM logs WHERE id >= ? AND id < ? ORDER BY id DESC LIMIT ?`
	args := []any{from, before, limit}
	if match != "" {
		text = `SELECT l.id, l.time, l.fields FROM words w CROSS JOIN logs l ON l.id = w.rowid
			WHERE words MATCH ? AND w.rowid >= ? AND w.rowid < ? ORDER BY w.rowid DESC LIMIT ?`
		args = append([]any{match}, args...)
	}
	rows, err := d.read.QueryContext(ctx, text, args...)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		var c candidate
		if err := rows.Scan(&c.id, &c.time, &c.line); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, rows.Err()
}

// encode writes fields as one line of JSON, keys in order.
func encode(fields map[string]any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(fields); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// sqliteCode returns the primary result code of an error of SQLite, or 0.
func sqliteCode(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}

func isDamaged(err error) bool {
	code := sqliteCode(err)
	return code == sqlite3.SQLITE_NOTADB || code == sqlite3.SQLITE_CORRUPT
}

func isFull(err error) bool { return sqliteCode(err) == sqlite3.SQLITE_FULL || errors.Is(err, ErrFull) }
