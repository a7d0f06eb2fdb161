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
//
// A checkpoint of thousands of files is written several times a second, so it is put
// together in one piece of memory; encoding/json would need seven times as much.
func (l *Ledger) Encode() ([]byte, error) {
	const room = 64 // for the header
	files := slices.AppendSeq(make([]string, 0, len(l.files)), maps.Keys(l.files))
	slices.Sort(files)
	size := room + 1024
	for file, a := range l.files {
		size += len(file) + len(a.path) + len(a.owner) + 180 + 48*len(a.above)
	}
	for k := range l.rows {
		size += len(k.owner) + 140
	}
	b := make([]byte, room, size)
	b = append(b, `{"files":[`...)
	for i, file := range files {
		b = l.files[file].append(separate(b, i), file)
	}
	b = append(b, `],"past":{`...)
	b = append(l.past.append(b), '}')
	if len(l.rows) > 0 {
		b = append(b, `,"rows":[`...)
		keys := slices.AppendSeq(make([]rowKey, 0, len(l.rows)), maps.Keys(l.rows))
		slices.SortFunc(keys, func(a, b rowKey) int { return cmp.Or(cmp.Compare(a.hour, b.hour), cmp.Compare(a.owner, b.owner)) })
		for i, k := range keys {
			b = append(separate(b, i), '{')
			b = appendText(b, `"owner":`, k.owner)
			if k.hour != 0 {
				b = append(strconv.AppendInt(append(b, `"hour":`...), k.hour, 10), ',')
			}
			b = append(l.rows[k].append(b), '}')
		}
		b = append(b, ']')
	}
	b = append(b, '}')
	body := b[room:]
	head := fmt.Appendf(make([]byte, 0, room), "%s %s %08x %d\n", magic, version, sum(body), len(body))
	if len(head) > room {
		return nil, fmt.Errorf("encode checkpoint: a header of %d bytes; there is room for %d", len(head), room)
	}
	b = b[room-len(head):]
	copy(b, head)
	return b, nil
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

// append adds the account to b as an entry is written.
func (a *account) append(b []byte, file string) []byte {
	b = append(b, '{')
	b = appendText(b, `"file":`, file)
	b = appendText(b, `"path":`, a.path)
	b = appendText(b, `"owner":`, a.owner)
	b = a.sums.append(b)
	if a.offset != 0 {
		b = strconv.AppendInt(append(b, `,"offset":`...), a.offset, 10)
	}
	if len(a.above) > 0 {
		b = append(b, `,"above":[`...)
		for i, s := range a.above {
			b = strconv.AppendInt(append(separate(b, i), `{"start":`...), s.Start, 10)
			b = strconv.AppendInt(append(b, `,"end":`...), s.End, 10)
			b = append(b, '}')
		}
		b = append(b, ']')
	}
	if a.gone {
		b = append(b, `,"gone":true`...)
	}
	return append(b, '}')
}

// append adds the members of an entry that are sums, without a comma at their end.
func (s *sums) append(b []byte) []byte {
	b = strconv.AppendInt(append(b, `"written":`...), s.written, 10)
	b = s.appendCounts(b, `,"settled":{`, func(t tally) int64 { return t.bytes })
	return s.appendCounts(b, `,"records":{`, func(t tally) int64 { return t.records })
}

func (s *sums) appendCounts(b []byte, begin string, of func(tally) int64) []byte {
	any := false
	for c := range causes {
		n := of(s.of(c))
		if n == 0 {
			continue
		}
		if !any {
			b = append(b, begin...)
		}
		any = true
		b = append(append(append(b, '"'), c.String()...), `":`...)
		b = append(strconv.AppendInt(b, n, 10), ',')
	}
	if any {
		b[len(b)-1] = '}'
	}
	return b
}

// separate adds a comma before all members of a list but the first.
func separate(b []byte, i int) []byte {
	if i > 0 {
		b = append(b, ',')
	}
	return b
}

// appendText adds a member that is a text, and a comma; nothing if it is empty.
func appendText(b []byte, name, text string) []byte {
	if text == "" {
		return b
	}
	b = append(b, name...)
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, _ := json.Marshal(text) // a string has no error
			return append(append(b, quoted...), ',')
		}
	}
	return append(append(append(b, '"'), text...), `",`...)
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
	settled, err := counts(e.Settled)
	if err != nil {
		return s, err
	}
	records, err := counts(e.Records)
	if err != nil {
		return s, err
	}
	s.written = e.Written
	for c := range causes {
		s.count(c, settled[c], records[c])
	}
	return s, nil
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
	if all := l.all(); len(rows) == 0 && (len(l.files) > 0 || !all.equal(&sums{})) {
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
	for c := range causes {
		if n := s.of(c).bytes; n > e.Written {
			return nil, fmt.Errorf("%v is %d of %d written", c, n, e.Written)
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
