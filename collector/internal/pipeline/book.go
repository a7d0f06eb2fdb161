package pipeline

import (
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
)

// book guards a ledger: the reader opens and gives up, the senders settle, the
// admin endpoint looks.
type book struct {
	metrics *Metrics
	output  string

	mu    sync.Mutex
	l     *ledger.Ledger
	dirty bool // since the last snapshot

	// Snapshots are numbered, so that it is known which verdicts are on the disk.
	taken, onDisk uint64
	settledAt     map[string]moment // generations of which all was found to be settled
}

// moment is a snapshot's number, and a time.
type moment struct {
	snapshot uint64
	at       time.Time
}

// unsavedFor is how long a settled generation is kept for a checkpoint that cannot
// be saved. After that the disk's space counts for more: it may be what is missing.
const unsavedFor = time.Minute

func newBook(l *ledger.Ledger, output string, m *Metrics) *book {
	l.Clock(time.Now())
	return &book{l: l, metrics: m, output: output, dirty: true, settledAt: map[string]moment{}}
}

func (b *book) Open(file, path, owner string) ledger.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	return b.l.Open(file, path, owner)
}

func (b *book) Written(file string, size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.l.WrittenOf(file) >= size {
		return // nothing new: no reason to write a checkpoint
	}
	b.dirty = true
	b.l.Written(file, size)
}

func (b *book) GiveUp(file string, from int64, cause ledger.Cause) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	n := b.l.GiveUp(file, from, cause)
	b.dropped(cause, 1, n)
	return n
}

func (b *book) Gone(file string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	delete(b.settledAt, file)
	b.l.Gone(file)
}

func (b *book) Find(match func(file, path string) bool) (file string, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.l.Find(match)
}

// Settled reports whether all of a generation is settled in a checkpoint that is
// on the disk.
func (b *book) Settled(file string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.l.Settled(file) {
		delete(b.settledAt, file)
		return false
	}
	m, ok := b.settledAt[file]
	if !ok {
		b.settledAt[file] = moment{b.taken, time.Now()}
		return false
	}
	return b.onDisk > m.snapshot || time.Since(m.at) > unsavedFor
}

func (b *book) Absent(keep func(file string) bool) []ledger.Statement {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	lost := b.l.Absent(keep)
	for _, s := range lost {
		b.dropped(ledger.RotatedAway, 1, s.Pending)
	}
	return lost
}

func (b *book) clock(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.l.Clock(now)
}

// settle notes one verdict on records. Records that follow each other in a file
// are settled as one.
func (b *book) settle(es []tail.Entry, cause ledger.Cause) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	var bytes, cut int64
	var run ledger.Span
	var file string
	var records int64
	end := func() {
		if records > 0 {
			b.l.Count(file, cause, records)
			bytes += b.l.Settle(file, run, cause)
		}
		records = 0
	}
	for _, e := range es {
		if s := e.Spans[0]; len(e.Spans) == 1 && e.Record.TruncatedBytes == 0 {
			if records == 0 || s.File != file || s.Start != run.End {
				end()
				file, run = s.File, ledger.Span{Start: s.Start, End: s.Start}
			}
			run.End = s.End
			records++
			continue
		}
		end()
		n, c := b.settleOne(e, cause)
		bytes, cut = bytes+n, cut+c
	}
	end()
	b.metrics.records.WithLabelValues(b.output, cause.String()).Add(float64(len(es)))
	if cause != ledger.Acknowledged {
		b.dropped(cause, len(es), bytes)
		return
	}
	b.dropped(ledger.TooLong, 1, cut)
	b.metrics.bytes.WithLabelValues(b.output).Add(float64(bytes - cut))
}

// settleOne settles a record of several pieces, or one of which the end was cut off. It
// returns the bytes that are new, and how many of them were cut.
func (b *book) settleOne(e tail.Entry, cause ledger.Cause) (bytes, cut int64) {
	left := int64(e.Record.TruncatedBytes)
	b.l.Count(e.Spans[0].File, cause, 1)
	for _, s := range e.Spans {
		span := ledger.Span{Start: s.Start, End: s.End}
		if cause != ledger.Acknowledged {
			bytes += b.l.Settle(s.File, span, cause)
			continue
		}
		// The cut bytes lie anywhere in the record; the account only needs how many.
		c := min(left, span.End-span.Start)
		n := b.l.Acknowledge(s.File, span, c)
		bytes, cut = bytes+n, cut+min(c, n)
		left -= c
	}
	return bytes, cut
}

func (b *book) dropped(cause ledger.Cause, times int, n int64) {
	if n > 0 {
		b.metrics.dropped.WithLabelValues(b.output, cause.String()).Add(float64(times))
		b.metrics.droppedBytes.WithLabelValues(b.output, cause.String()).Add(float64(n))
	}
}

// snapshot returns the checkpoint and its number, or nil if nothing changed since the last one.
func (b *book) snapshot() (out []byte, number uint64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taken++
	if !b.dirty {
		b.onDisk = b.taken
		return nil, b.taken, nil
	}
	out, err = b.l.Encode()
	b.dirty = err != nil
	return out, b.taken, err
}

// saved notes that the snapshot is on the disk.
func (b *book) saved(number uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.onDisk = max(b.onDisk, number)
}

// read reports whether all size bytes of a file are known and settled on the disk.
func (b *book) read(file string, size int64) bool {
	b.mu.Lock()
	written := b.l.WrittenOf(file)
	b.mu.Unlock()
	return written >= size && b.Settled(file)
}

func (b *book) total() ledger.Totals {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.l.Total()
}

func (b *book) touch() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
}
