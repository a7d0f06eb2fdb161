package ledger

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
	"strconv"
)

// The checkpoint is one line of header and one JSON document:
//
//	outrigger-checkpoint 1 <CRC-32C of the document, 8 hex digits> <its length>
//
// so that a person can read it and a damaged one is told from a good one.
const (
	magic   = "outrigger-checkpoint"
	version = "1"
	// MaxCheckpoint bytes are read at most.
	MaxCheckpoint = 256 << 20
)

// ErrDamaged is what Decode returns for bytes that Encode did not write whole.
var ErrDamaged = errors.New("checkpoint is damaged")

type entry struct {
	File    string           `json:"file,omitempty"`
	Path    string           `json:"path,omitempty"`
	Owner   string           `json:"owner,omitempty"`
	Hour    int64            `json:"hour,omitempty"` // of a row, since 1970
	Written int64            `json:"written"`
	Settled map[string]int64 `json:"settled,omitempty"`
	Records map[string]int64 `json:"records,omitempty"`
	Offset  int64            `json:"offset,omitempty"`
	Above   []Span           `json:"above,omitempty"`
	Gone    bool             `json:"gone,omitempty"`
}

type document struct {
	Files []entry `json:"files"`
	Past  entry   `json:"past"`
	Rows  []entry `json:"rows,omitempty"`
}

// Encode returns the ledger as a checkpoint. Equal ledgers give equal bytes.
func (l *Ledger) Encode() ([]byte, error) {
	d := document{Files: make([]entry, 0, len(l.files)), Past: l.past.entry()}
	for _, file := range slices.Sorted(maps.Keys(l.files)) {
		d.Files = append(d.Files, l.files[file].entry(file))
	}
	for k, s := range l.rows {
		e := s.entry()
		e.Owner, e.Hour = k.owner, k.hour
		d.Rows = append(d.Rows, e)
	}
	slices.SortFunc(d.Rows, func(a, b entry) int { return cmp.Or(cmp.Compare(a.Hour, b.Hour), cmp.Compare(a.Owner, b.Owner)) })
	body, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encode checkpoint: %w", err)
	}
	head := fmt.Appendf(nil, "%s %s %08x %d\n", magic, version, sum(body), len(body))
	return append(head, body...), nil
}

// Decode reads a checkpoint. What is not whole, not of this version, or does
// not balance is refused with ErrDamaged; half a ledger would lose lines.
func Decode(b []byte) (*Ledger, error) {
	head, body, ok := bytes.Cut(b, []byte{'\n'})
	words := bytes.Split(head, []byte{' '})
	if !ok || len(words) != 4 || string(words[0]) != magic {
		return nil, fmt.Errorf("%w: no header", ErrDamaged)
	}
	if string(words[1]) != version {
		return nil, fmt.Errorf("%w: version %.20q; this program writes %s", ErrDamaged, words[1], version)
	}
	length, err := strconv.Atoi(string(words[3]))
	if err != nil || length != len(body) {
		return nil, fmt.Errorf("%w: %d bytes after the header that promises %.20q", ErrDamaged, len(body), words[3])
	}
	if want := fmt.Sprintf("%08x", sum(body)); want != string(words[2]) {
		return nil, fmt.Errorf("%w: checksum is %s; the header says %.20q", ErrDamaged, want, words[2])
	}
	var d document
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	l := New()
	for _, e := range d.Files {
		a, err := e.account()
		if err != nil {
			return nil, fmt.Errorf("%w: file %.80q: %w", ErrDamaged, e.File, err)
		}
		if e.File == "" || l.files[e.File] != nil {
			return nil, fmt.Errorf("%w: file %.80q is empty or there twice", ErrDamaged, e.File)
		}
		l.files[e.File] = a
	}
	past, err := d.Past.account()
	if err != nil {
		return nil, fmt.Errorf("%w: past: %w", ErrDamaged, err)
	}
	l.past = past.sums
	if err := l.decodeRows(d.Rows); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := l.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return l, nil
}

func (a *account) entry(file string) entry {
	e := a.sums.entry()
	e.File, e.Path, e.Owner, e.Offset, e.Above, e.Gone = file, a.path, a.owner, a.offset, a.above, a.gone
	return e
}

func (s *sums) entry() entry {
	return entry{Written: s.written, Settled: named(&s.settled), Records: named(&s.records)}
}

func named(counts *[causes]int64) map[string]int64 {
	var m map[string]int64
	for c, n := range counts {
		if n != 0 {
			if m == nil {
				m = map[string]int64{}
			}
			m[Cause(c).String()] = n
		}
	}
	return m
}

func counts(m map[string]int64) (out [causes]int64, err error) {
	known := 0
	for c := range causes {
		n, ok := m[c.String()]
		if n < 0 {
			return out, fmt.Errorf("%v is %d", c, n)
		}
		out[c] = n
		if ok {
			known++
		}
	}
	if known != len(m) {
		return out, fmt.Errorf("unknown cause in %v", slices.Sorted(maps.Keys(m)))
	}
	return out, nil
}

func (e *entry) sums() (s sums, err error) {
	if e.Written < 0 {
		return s, fmt.Errorf("written is %d", e.Written)
	}
	s.written = e.Written
	if s.settled, err = counts(e.Settled); err == nil {
		s.records, err = counts(e.Records)
	}
	return s, err
}

// decodeRows takes the rows. A checkpoint of a version that had none gets one.
func (l *Ledger) decodeRows(rows []entry) error {
	if len(rows) > MaxRows+1 {
		return fmt.Errorf("%d rows; at most %d", len(rows), MaxRows+1)
	}
	for _, e := range rows {
		s, err := e.sums()
		if err != nil {
			return fmt.Errorf("row of %.80q: %w", e.Owner, err)
		}
		k := rowKey{e.Owner, e.Hour}
		if l.rows[k] != nil {
			return fmt.Errorf("the row of %.80q and hour %d is there twice", e.Owner, e.Hour)
		}
		l.rows[k] = &s
	}
	if len(rows) == 0 && (len(l.files) > 0 || l.past != sums{}) {
		all := l.past
		for _, a := range l.files {
			all.add(&a.sums)
		}
		l.rows[rowKey{}] = &all
	}
	return nil
}

func (e *entry) account() (*account, error) {
	if e.Offset < 0 {
		return nil, fmt.Errorf("offset is %d", e.Offset)
	}
	s, err := e.sums()
	if err != nil {
		return nil, err
	}
	a := &account{path: e.Path, owner: e.Owner, offset: e.Offset, above: e.Above, gone: e.Gone, sums: s}
	for c, n := range s.settled {
		if n > e.Written {
			return nil, fmt.Errorf("%v is %d of %d written", Cause(c), n, e.Written)
		}
	}
	for _, s := range e.Above {
		if s.Start < 0 || s.End > e.Written {
			return nil, fmt.Errorf("span %v of %d written", s, e.Written)
		}
	}
	return a, nil
}

func sum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }
