package pipeline

import (
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Meter adds up what records cost (package cost). It is safe for concurrent use.
type Meter interface {
	Add(res *record.Resource, r *record.Record, bytes int, dropped bool)
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
	verdicts []rules.Verdict
	programs map[*record.Resource]*rules.Program
	resource *record.Resource // of the last record
	program  *rules.Program
}

// maxPrograms are kept. Resources are replaced when the API knows more, and old ones
// are not told of.
const maxPrograms = 8192

// programOf returns what is to be done with the records of a container.
func (p *Pipeline) programOf(r *record.Resource) *rules.Program {
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
			p.log.Warn("an annotation is not understood; it is left out", record.Namespace, r.Namespace, record.PodName, r.Pod,
				record.KContainer, r.Container, "error.message", problem)
		}
	}
	s.resource, s.program = r, program
	return program
}

// policy is how a container's lines are read.
func (p *Pipeline) policy(r *record.Resource) tail.Policy {
	program := p.programOf(r)
	if off := program.Off(); off != "" {
		p.why.unread(r, off, time.Now())
	}
	lines := program.Multiline()
	return tail.Policy{Off: program.Off(), Grouper: func() tail.Grouper { g := lines.Grouper(); return &g }}
}

// causes of the rules, as the ledger calls them.
var causes = [...]ledger.Cause{rules.Keep: ledger.Acknowledged, rules.ByRule: ledger.ByRule, rules.ByQuota: ledger.ByQuota, rules.Routed: ledger.Routed}

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
	if v.Redacted > 0 {
		p.metrics.redacted.WithLabelValues(p.cfg.Name).Add(float64(v.Redacted))
	}
	if p.cfg.Meter != nil {
		p.cfg.Meter.Add(e.Record.Resource, e.Record, int(n), v.Cause != rules.Keep)
	}
	s := &p.reading
	if v.Cause == rules.Keep && v.Rule != "" { // a quota that only warns
		p.metrics.warned.WithLabelValues(p.cfg.Name, v.Rule).Inc()
	}
	if v.Cause != rules.Keep {
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
		cause := causes[s.verdicts[i].Cause]
		p.book.settle(s.dropped[i:j], cause)
		p.metrics.ruled.WithLabelValues(p.cfg.Name, s.verdicts[i].Rule).Add(float64(j - i))
		for _, e := range s.dropped[i:j] {
			p.why.note(e.Record, cause, s.verdicts[i].Rule, cost(e))
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
