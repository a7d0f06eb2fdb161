package pipeline

import (
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Rules decide on the records of one output (package rules).
type Rules interface {
	// For returns what is to be done with the records of a container. It is asked
	// once for each Resource, by one goroutine.
	For(*record.Resource) Program
}

// Program is what is done with the records of one container. It is used by one goroutine.
type Program interface {
	// Policy is how the container's lines are read.
	Policy() tail.Policy
	// Apply parses the record, changes it, and decides.
	Apply(*record.Record) Verdict
	// Problems are what an annotation says that is not understood.
	Problems() []string
}

// Verdict is the decision on a record.
type Verdict struct {
	// Cause is ledger.Acknowledged for a record that is to be sent; else why it is not.
	Cause ledger.Cause
	// Rule that dropped it.
	Rule string
	// FieldsLeft were not lifted out of a structured body; see package parse.
	FieldsLeft  int
	ParseFailed bool
}

// Meter adds up what records cost (package cost). It is safe for concurrent use.
type Meter interface {
	Add(r *record.Record, bytes int64, dropped bool)
}

// batch is what an output gets at once.
type batch struct {
	entries []tail.Entry
	records []*record.Record // of the same
	bytes   int64
	begun   time.Time
}

func (b *batch) reset() {
	clear(b.entries)
	clear(b.records)
	*b = batch{entries: b.entries[:0], records: b.records[:0]}
}

// reading is the state of the reader: the batch that it fills, and what it has dropped.
type reading struct {
	current  *batch
	dropped  []tail.Entry
	verdicts []Verdict
	programs map[*record.Resource]Program
	resource *record.Resource // of the last record
	program  Program
}

// maxPrograms are kept. Resources are replaced when the API knows more, and old ones
// are not told of.
const maxPrograms = 8192

// programOf returns what is to be done with the records of a container.
func (p *Pipeline) programOf(r *record.Resource) Program {
	if p.cfg.Rules == nil {
		return plain{}
	}
	s := &p.reading
	if s.resource == r && s.program != nil {
		return s.program
	}
	program, ok := s.programs[r]
	if !ok {
		if len(s.programs) >= maxPrograms {
			clear(s.programs)
		}
		program = p.cfg.Rules.For(r)
		s.programs[r] = program
		for _, problem := range program.Problems() {
			p.metrics.problems.WithLabelValues(p.cfg.Name).Inc()
			p.log.Warn("an annotation or a rule is not understood; it is left out", record.Namespace, r.Namespace, record.PodName, r.Pod,
				record.KContainer, r.Container, "error.message", problem)
		}
	}
	s.resource, s.program = r, program
	return program
}

func (p *Pipeline) policy(r *record.Resource) tail.Policy { return p.programOf(r).Policy() }

// plain parses, and keeps all.
type plain struct{}

func (plain) Policy() tail.Policy { return tail.Policy{} }
func (plain) Problems() []string  { return nil }
func (plain) Apply(r *record.Record) Verdict {
	out := parse.Record(r)
	return Verdict{FieldsLeft: out.Left}
}

// take puts a record into the batch, or among the dropped. It returns whether there is
// credit for another.
func (p *Pipeline) take(e tail.Entry) bool {
	v := p.programOf(e.Record.Resource).Apply(e.Record)
	if v.FieldsLeft > 0 {
		p.metrics.fieldsLeft.Add(float64(v.FieldsLeft))
	}
	if v.ParseFailed {
		p.metrics.parseFailed.WithLabelValues(p.cfg.Name).Inc()
	}
	n := cost(e)
	if p.cfg.Meter != nil {
		p.cfg.Meter.Add(e.Record, n, v.Cause != ledger.Acknowledged)
	}
	s := &p.reading
	if v.Cause != ledger.Acknowledged {
		s.dropped, s.verdicts = append(s.dropped, e), append(s.verdicts, v)
		if len(s.dropped) >= p.cfg.MaxRecords {
			p.settleDropped()
		}
		return true
	}
	if s.current == nil {
		select {
		case s.current = <-p.spare:
		default:
			s.current = &batch{}
		}
		s.current.begun = time.Now()
	}
	b := s.current
	b.entries, b.records, b.bytes = append(b.entries, e), append(b.records, e.Record), b.bytes+n
	records, bytes := p.records.Add(1), p.bytes.Add(n)
	if p.full() {
		p.push(false)
	}
	return records < int64(p.cfg.InFlight) && bytes < p.cfg.InFlightBytes && !p.full()
}

// full reports whether the batch that is being filled takes no more.
func (p *Pipeline) full() bool {
	b := p.reading.current
	return b != nil && (len(b.entries) >= p.cfg.MaxRecords || b.bytes >= int64(p.cfg.MaxBytes))
}

// push hands the batch over if it is full or has waited for long enough, and if
// there is room for it. It returns how long the batch still waits: 0 if it waits for room only,
// negative if there is none.
func (p *Pipeline) push(now bool) time.Duration {
	b := p.reading.current
	if b == nil {
		return -1
	}
	if waits := p.cfg.Linger - time.Since(b.begun); !now && !p.full() && waits > 0 {
		return waits
	}
	select {
	case p.queue <- b:
		p.reading.current = nil
		return -1
	default:
		return 0
	}
}

// settleDropped settles what the rules have dropped.
func (p *Pipeline) settleDropped() {
	s := &p.reading
	for i := 0; i < len(s.dropped); {
		j := i + 1
		for j < len(s.dropped) && s.verdicts[j].Cause == s.verdicts[i].Cause && s.verdicts[j].Rule == s.verdicts[i].Rule {
			j++
		}
		p.book.settle(s.dropped[i:j], s.verdicts[i].Cause)
		p.metrics.ruled.WithLabelValues(p.cfg.Name, s.verdicts[i].Rule).Add(float64(j - i))
		for _, e := range s.dropped[i:j] {
			p.why.note(e.Record, s.verdicts[i].Cause, s.verdicts[i].Rule, cost(e))
		}
		i = j
	}
	clear(s.dropped)
	s.dropped, s.verdicts = s.dropped[:0], s.verdicts[:0]
}

// cost of a record in memory, roughly: attributes were part of the line.
func cost(e tail.Entry) int64 {
	var n int64
	for _, s := range e.Spans {
		n += s.End - s.Start
	}
	return n
}

// free gives the credit of entries back.
func (p *Pipeline) free(es []tail.Entry) {
	var bytes int64
	for _, e := range es {
		bytes += cost(e)
	}
	p.records.Add(-int64(len(es)))
	p.bytes.Add(-bytes)
	p.wake()
}

// wake tells the reader that there may be credit or room.
func (p *Pipeline) wake() {
	select {
	case p.freed <- struct{}{}:
	default:
	}
}
