// Package ledger is the accounting of log bytes, so that the collector can
// prove that no line went missing:
//
//	written = acknowledged + dropped (by cause) + pending
//
// for each file generation at one output. Written is what stat says, and the
// other side is built from the byte ranges of the records, so neither can be
// made to agree with the other by mistake. The ledger also knows where to go on
// after a restart: a Position that covers exactly what has been settled, which
// is never more than the backend acknowledged or a stated cause took.
//
// It does no I/O and knows neither files nor backends. Package pipeline keeps
// one Ledger for each output, guards it, and stores what Encode returns.
package ledger

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// Span is the half-open byte range [Start, End) of a file generation.
type Span struct {
	Start int64 `json:"start"`
	End   int64 `json:"end"`
}

// Cause says what became of bytes. Acknowledged is the zero value; all others
// are reasons for a drop.
type Cause uint8

// The causes.
const (
	Acknowledged Cause = iota
	Rejected           // the backend refused the record for good; it is in the dead letters
	TooLong            // the end of a line over record.MaxBody
	RotatedAway        // deleted before it could be read
	Truncated          // overwritten in place before it could be read
	Unreadable         // the file system or the compressed file does not give it back
	ByRule             // a rule or an annotation says that it is not to be sent
	ByQuota            // its namespace is over its quota
	Routed             // a rule sends it to other outputs only
	causes
)

// Drops are the causes of a drop, for whoever lists them.
func Drops() []Cause {
	return []Cause{Rejected, TooLong, RotatedAway, Truncated, Unreadable, ByRule, ByQuota, Routed}
}

// String is the name in metrics, in the audit and in the checkpoint.
func (c Cause) String() string {
	switch c {
	case Acknowledged:
		return "acknowledged"
	case Rejected:
		return "rejected"
	case TooLong:
		return "too_long"
	case RotatedAway:
		return "rotated_away"
	case Truncated:
		return "truncated"
	case Unreadable:
		return "unreadable"
	case ByRule:
		return "rule"
	case ByQuota:
		return "quota"
	case Routed:
		return "routed"
	default:
		return fmt.Sprintf("cause %d", uint8(c))
	}
}

// Totals are one side and the other of the account, in bytes, and beside it the
// records that the bytes were; what was never read has bytes only.
type Totals struct {
	Written      int64            `json:"written"`
	Acknowledged int64            `json:"acknowledged"`
	Dropped      map[string]int64 `json:"dropped,omitempty"`
	Pending      int64            `json:"pending"`

	Records        int64            `json:"records,omitempty"` // acknowledged
	DroppedRecords map[string]int64 `json:"dropped_records,omitempty"`
}

// Statement is the account of one file generation.
type Statement struct {
	File string `json:"file"`
	Path string `json:"path"`
	Totals
}

// Position is where to go on: everything before Offset is settled, and so are
// the spans above it, which are sorted, disjoint and not adjacent. A record is
// settled whole, so a position never falls into one.
type Position struct {
	Offset int64
	Above  []Span
}

// sums are what an account, or one hour of a pod, adds up to.
type sums struct {
	written      int64
	acknowledged tally
	// drops is nil without any: of most files nothing is ever dropped. Acknowledged has
	// no use in it.
	drops *[causes]tally
}

type tally struct{ bytes, records int64 }

func (s *sums) of(c Cause) tally {
	switch {
	case c == Acknowledged:
		return s.acknowledged
	case s.drops == nil:
		return tally{}
	default:
		return s.drops[c]
	}
}

func (s *sums) count(c Cause, bytes, records int64) {
	if bytes == 0 && records == 0 {
		return
	}
	t := &s.acknowledged
	if c != Acknowledged {
		if s.drops == nil {
			s.drops = new([causes]tally)
		}
		t = &s.drops[c]
	}
	t.bytes += bytes
	t.records += records
}

func (s *sums) add(o *sums) {
	s.written += o.written
	for c := range causes {
		t := o.of(c)
		s.count(c, t.bytes, t.records)
	}
}

// taken is how many bytes are settled.
func (s *sums) taken() (n int64) {
	for c := range causes {
		n += s.of(c).bytes
	}
	return n
}

func (s *sums) equal(o *sums) bool {
	for c := range causes {
		if s.of(c) != o.of(c) {
			return false
		}
	}
	return s.written == o.written
}

type account struct {
	path  string
	owner string
	sums
	offset int64
	above  []Span
	gone   bool
}

// covered is how many bytes the position says are settled. It is kept apart from
// taken, so that an account that does not close shows: were pending what is left
// over of written, every account would.
func (a *account) covered() int64 {
	n := a.offset
	for _, s := range a.above {
		n += s.End - s.Start
	}
	return n
}

func (a *account) pending() int64 { return a.written - a.covered() }

// Ledger is the book of one output. It is not safe for concurrent use. The zero
// value is not ready; use New or Decode.
type Ledger struct {
	files map[string]*account
	// past holds the closed accounts of generations that are gone and settled,
	// so that totals do not shrink when files are deleted.
	past sums
	// rows hold the same sums a second time, by owner and hour.
	rows map[rowKey]*sums
	hour int64 // of the clock, in hours since 1970
}

// New returns an empty ledger.
func New() *Ledger { return &Ledger{files: map[string]*account{}, rows: map[rowKey]*sums{}} }

// Open makes sure that the generation has an account, and returns where to go
// on in it. The path and the owner (namespace/pod) are for people and may
// change; the file is the identity.
func (l *Ledger) Open(file, path, owner string) Position {
	a := l.files[file]
	if a == nil {
		a = &account{}
		l.files[file] = a
	}
	a.path, a.owner, a.gone = path, owner, false
	return Position{Offset: a.offset, Above: slices.Clone(a.above)}
}

// Find returns the open account for which match is true; of several the first
// by name.
func (l *Ledger) Find(match func(file, path string) bool) (file string, ok bool) {
	for f, a := range l.files {
		if (!ok || f < file) && match(f, a.path) {
			file, ok = f, true
		}
	}
	return file, ok
}

// Pending is how many written bytes of the generation are not settled.
func (l *Ledger) Pending(file string) int64 {
	if a := l.files[file]; a != nil {
		return a.pending()
	}
	return 0
}

// Written notes the size of the generation by stat. It never shrinks: what was
// once seen has to be accounted for.
func (l *Ledger) Written(file string, size int64) {
	if a := l.files[file]; a != nil && size > a.written {
		l.row(a).written += size - a.written
		a.written = size
	}
}

// Count notes that records of the generation were settled with the cause.
func (l *Ledger) Count(file string, c Cause, records int64) {
	if a := l.files[file]; a != nil && c < causes {
		a.count(c, 0, records)
		l.row(a).count(c, 0, records)
	}
}

// Settle notes what became of the bytes of s and returns how many of them were
// not settled before; only those are counted, so saying it twice is harmless.
// Bytes of an unknown generation are not counted.
func (l *Ledger) Settle(file string, s Span, c Cause) int64 { return l.settle(file, s, c, 0) }

// Acknowledge settles s as acknowledged but for cut bytes of it, which were
// left off the record because it was too long.
func (l *Ledger) Acknowledge(file string, s Span, cut int64) int64 {
	return l.settle(file, s, Acknowledged, cut)
}

func (l *Ledger) settle(file string, s Span, c Cause, cut int64) int64 {
	a := l.files[file]
	if a == nil || c >= causes {
		return 0
	}
	n := a.settle(s)
	cut = min(cut, n)
	row := l.row(a)
	for _, s := range [...]*sums{&a.sums, row} {
		s.count(c, n-cut, 0)
		s.count(TooLong, cut, 0)
	}
	// Bytes that a record was made of were written, whatever stat said last.
	l.Written(file, max(a.taken(), s.End))
	l.retire(file, a)
	return n
}

// settle adds s to the settled set and returns the bytes that are new in it.
func (a *account) settle(s Span) (added int64) {
	s.Start = max(s.Start, a.offset)
	if s.End <= s.Start {
		return 0
	}
	if len(a.above) == 0 && s.Start == a.offset {
		a.offset = s.End
		return s.End - s.Start
	}
	// All spans that overlap or touch s become one with it.
	i, _ := slices.BinarySearchFunc(a.above, s.Start, func(x Span, at int64) int { return cmp.Compare(x.End, at) })
	j := i
	added = s.End - s.Start
	for ; j < len(a.above) && a.above[j].Start <= s.End; j++ {
		x := a.above[j]
		added -= max(0, min(s.End, x.End)-max(s.Start, x.Start))
	}
	if j > i {
		s.Start = min(s.Start, a.above[i].Start)
		s.End = max(s.End, a.above[j-1].End)
	}
	a.above = slices.Replace(a.above, i, j, s)
	if a.above[0].Start == a.offset {
		a.offset = a.above[0].End
		a.above = slices.Delete(a.above, 0, 1)
	}
	return added
}

// GiveUp settles with the cause all bytes from the offset on that are written
// and not settled, and returns how many: nobody can read them any more. Bytes
// below it have been read and are still to be settled.
func (l *Ledger) GiveUp(file string, from int64, c Cause) int64 {
	a := l.files[file]
	if a == nil || a.written <= from {
		return 0
	}
	return l.Settle(file, Span{from, a.written}, c)
}

// Gone notes that the generation will not be read any more. Its account is
// closed when the last of its bytes is settled.
func (l *Ledger) Gone(file string) {
	if a := l.files[file]; a != nil {
		a.gone = true
		l.retire(file, a)
	}
}

func (l *Ledger) retire(file string, a *account) {
	if !a.gone || a.pending() != 0 {
		return
	}
	l.past.add(&a.sums)
	delete(l.files, file)
}

// Absent gives up every generation that keep does not know: it was deleted
// while nobody looked. It returns the statements of those that had bytes
// pending, as they stood before.
func (l *Ledger) Absent(keep func(file string) bool) []Statement {
	var lost []Statement
	for _, file := range slices.Sorted(maps.Keys(l.files)) {
		if keep(file) {
			continue
		}
		a := l.files[file]
		if a.pending() > 0 {
			lost = append(lost, a.statement(file))
			l.GiveUp(file, a.offset, RotatedAway)
		}
		l.Gone(file)
	}
	return lost
}

// Files returns the statements of all open accounts by path and file.
func (l *Ledger) Files() []Statement {
	out := make([]Statement, 0, len(l.files))
	for file, a := range l.files {
		out = append(out, a.statement(file))
	}
	slices.SortFunc(out, func(a, b Statement) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.File, b.File))
	})
	return out
}

// Total is the sum of all accounts, closed ones included.
func (l *Ledger) Total() Totals {
	sum, pending := sums{}, int64(0)
	sum.add(&l.past)
	for _, a := range l.files {
		sum.add(&a.sums)
		pending += a.pending()
	}
	return sum.totals(pending)
}

// Past is the sum of the closed accounts, of which nothing is pending.
func (l *Ledger) Past() Totals { return l.past.totals(0) }

// Check returns an error that names the first account whose settled bytes are
// not the bytes of its position, or more than were written: a broken invariant.
func (l *Ledger) Check() error {
	for file, a := range l.files {
		last := a.offset
		for _, s := range a.above {
			if s.Start <= last || s.End <= s.Start {
				return fmt.Errorf("account of %s (%s): span %v does not lie above %d", file, a.path, s, last)
			}
			last = s.End
		}
		covered := a.covered()
		if covered != a.taken() || a.taken() > a.written {
			return fmt.Errorf("account of %s (%s): position covers %d bytes, settled are %d, written %d", file, a.path, covered, a.taken(), a.written)
		}
	}
	return l.checkRows()
}

func (a *account) statement(file string) Statement {
	return Statement{File: file, Path: a.path, Totals: a.totals(a.pending())}
}

func (s *sums) totals(pending int64) Totals {
	t := Totals{Written: s.written, Acknowledged: s.acknowledged.bytes, Pending: pending, Records: s.acknowledged.records}
	note := func(m *map[string]int64, c Cause, n int64) {
		if n > 0 {
			if *m == nil {
				*m = map[string]int64{}
			}
			(*m)[c.String()] = n
		}
	}
	for _, c := range Drops() {
		note(&t.Dropped, c, s.of(c).bytes)
		note(&t.DroppedRecords, c, s.of(c).records)
	}
	return t
}

// PendingOf is Pending of all generations whose path matches.
func (l *Ledger) PendingOf(match func(path string) bool) (n int64) {
	for _, a := range l.files {
		if match(a.path) {
			n += a.pending()
		}
	}
	return n
}

// WrittenOf is how many bytes of the generation were seen.
func (l *Ledger) WrittenOf(file string) int64 {
	if a := l.files[file]; a != nil {
		return a.written
	}
	return 0
}

// Settled reports whether nothing of the generation is pending.
func (l *Ledger) Settled(file string) bool { return l.Pending(file) == 0 }
