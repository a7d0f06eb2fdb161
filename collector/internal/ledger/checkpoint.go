package ledger

import (
	"bytes"
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
	Written int64            `json:"written"`
	Settled map[string]int64 `json:"settled,omitempty"`
	Offset  int64            `json:"offset"`
	Above   []Span           `json:"above,omitempty"`
	Gone    bool             `json:"gone,omitempty"`
}

type document struct {
	Files []entry `json:"files"`
	Past  entry   `json:"past"`
}

// Encode returns the ledger as a checkpoint. Equal ledgers give equal bytes.
func (l *Ledger) Encode() ([]byte, error) {
	d := document{Files: make([]entry, 0, len(l.files)), Past: l.past.entry("")}
	for _, file := range slices.Sorted(maps.Keys(l.files)) {
		d.Files = append(d.Files, l.files[file].entry(file))
	}
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
	l.past = *past
	if err := l.Check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return l, nil
}

func (a *account) entry(file string) entry {
	e := entry{File: file, Path: a.path, Written: a.written, Offset: a.offset, Above: a.above, Gone: a.gone}
	for c, n := range a.settled {
		if n > 0 {
			if e.Settled == nil {
				e.Settled = map[string]int64{}
			}
			e.Settled[Cause(c).String()] = n
		}
	}
	return e
}

func (e *entry) account() (*account, error) {
	a := &account{path: e.Path, written: e.Written, offset: e.Offset, above: e.Above, gone: e.Gone}
	if e.Written < 0 || e.Offset < 0 {
		return nil, fmt.Errorf("negative count")
	}
	known := 0
	for c := range causes {
		n, ok := e.Settled[c.String()]
		if n < 0 || n > e.Written {
			return nil, fmt.Errorf("%v is %d of %d written", c, n, e.Written)
		}
		a.settled[c] = n
		if ok {
			known++
		}
	}
	if known != len(e.Settled) {
		return nil, fmt.Errorf("unknown cause in %v", slices.Sorted(maps.Keys(e.Settled)))
	}
	for _, s := range e.Above {
		if s.Start < 0 || s.End > e.Written {
			return nil, fmt.Errorf("span %v of %d written", s, e.Written)
		}
	}
	return a, nil
}

func sum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }
