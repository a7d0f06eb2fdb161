package pipeline

import (
	"sync"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
)

// book guards a ledger: the reader opens and gives up, the shipper settles, the
// admin endpoint looks.
type book struct {
	metrics *Metrics
	output  string

	mu    sync.Mutex
	l     *ledger.Ledger
	dirty bool // since the last snapshot
}

func (b *book) Open(file, path string) ledger.Position {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	return b.l.Open(file, path)
}

func (b *book) Written(file string, size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	b.l.Written(file, size)
}

func (b *book) GiveUp(file string, from int64, cause ledger.Cause) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	n := b.l.GiveUp(file, from, cause)
	b.dropped(cause, n)
	return n
}

func (b *book) Gone(file string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	b.l.Gone(file)
}

func (b *book) Absent(keep func(file string) bool) []ledger.Statement {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	lost := b.l.Absent(keep)
	for _, s := range lost {
		b.dropped(ledger.RotatedAway, s.Pending)
	}
	return lost
}

// settle notes the verdict on a record.
func (b *book) settle(e tail.Entry, cause ledger.Cause) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.dirty = true
	cut := int64(e.Record.TruncatedBytes)
	var n int64
	for _, s := range e.Spans {
		span := ledger.Span{Start: s.Start, End: s.End}
		if cause == ledger.Acknowledged {
			// The cut bytes lie anywhere in the record; the account only needs how many.
			c := min(cut, span.End-span.Start)
			n += b.l.Acknowledge(s.File, span, c)
			cut -= c
			continue
		}
		n += b.l.Settle(s.File, span, cause)
	}
	b.metrics.records.WithLabelValues(b.output, cause.String()).Inc()
	if cause != ledger.Acknowledged {
		b.dropped(cause, n)
		return
	}
	if t := int64(e.Record.TruncatedBytes); t > 0 {
		t = min(t, n)
		b.dropped(ledger.TooLong, t)
		n -= t
	}
	b.metrics.bytes.WithLabelValues(b.output).Add(float64(n))
}

func (b *book) dropped(cause ledger.Cause, n int64) {
	if n > 0 {
		b.metrics.dropped.WithLabelValues(b.output, cause.String()).Inc()
		b.metrics.droppedBytes.WithLabelValues(b.output, cause.String()).Add(float64(n))
	}
}

// snapshot returns the checkpoint, or nil if nothing changed since the last one.
func (b *book) snapshot() ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.dirty {
		return nil, nil
	}
	out, err := b.l.Encode()
	b.dirty = err != nil
	return out, err
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
