// Package cost counts what logs cost: lines, bytes and fields for each workload,
// and for each template, which is what lines have in common that differ in
// their numbers and names.
//
// It knows records, not files or backends; whoever calls Add says how many bytes
// a record has and whether it was dropped. Records have to be redacted before,
// since a template keeps one as an example. All that it remembers is bounded:
// what finds no room is counted in a row or template for the rest.
package cost

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a Meter: about 4 MiB in all.
const (
	MaxRows      = 1000 // workloads; the others share the row Rest
	MaxTemplates = 2000 // of all workloads
	maxOfRow     = 100  // templates
	maxKnown     = 8192 // resources whose row is known without looking
	// TopTemplates of a row are reported.
	TopTemplates = 20
	// Rest is the workload, or the template, of what found no room.
	Rest = "(rest)"

	// The first lines of a workload are all compared with templates, then one in
	// every is, and counts for as many.
	allOf = 256
	every = 16
)

// Meter counts. It is safe for concurrent use.
type Meter struct {
	period atomic.Pointer[period]
}

// period is all that was counted since a time.
type period struct {
	since     time.Time
	templates atomic.Int64

	known   sync.Map // *record.Resource to *row
	knownN  atomic.Int64
	mu      sync.Mutex
	rows    map[key]*row
	restRow *row
}

type key struct{ namespace, workload string }

type row struct {
	key
	lines, bytes, fields, droppedLines, droppedBytes atomic.Int64
	drain                                            drain
}

// New counts from a time on.
func New(since time.Time) *Meter {
	m := &Meter{}
	m.Reset(since)
	return m
}

// Reset forgets everything and counts from a time on. What is added meanwhile
// may be forgotten too.
func (m *Meter) Reset(since time.Time) {
	m.period.Store(&period{since: since, rows: map[key]*row{}, restRow: &row{key: key{"", Rest}}})
}

// Add counts a record of so many bytes. It keeps nothing of r but copies.
func (m *Meter) Add(res *record.Resource, r *record.Record, bytes int, dropped bool) {
	p := m.period.Load()
	w := p.row(res)
	n := w.lines.Add(1)
	w.bytes.Add(int64(bytes))
	w.fields.Add(int64(len(r.Attributes)))
	if dropped {
		w.droppedLines.Add(1)
		w.droppedBytes.Add(int64(bytes))
	}
	weight := int64(1)
	if n > allOf {
		if chosen(&r.Origin)%every != 0 {
			return
		}
		weight = every
	}
	w.drain.add(r.Body, weight, int64(bytes)*weight, dropped, &p.templates)
}

func (p *period) row(res *record.Resource) *row {
	if res == nil {
		return p.restRow
	}
	if w, ok := p.known.Load(res); ok {
		return w.(*row)
	}
	k := key{res.Namespace, res.Workload}
	if k.workload == "" {
		k.workload = res.Service
	}
	if k.workload == "" {
		k.workload = record.Workload(res.Pod)
	}
	p.mu.Lock()
	w := p.rows[k]
	switch {
	case w != nil:
	case len(p.rows) >= MaxRows:
		w = p.restRow
	default:
		w = &row{key: k}
		p.rows[k] = w
	}
	p.mu.Unlock()
	if p.knownN.Add(1) > maxKnown {
		p.knownN.Store(1)
		p.known.Clear()
	}
	p.known.Store(res, w)
	return w
}

// chosen is a number that is the same whenever the same record is counted.
func chosen(o *record.Origin) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(o.File) {
		h = (h ^ uint64(o.File[i])) * 1099511628211
	}
	h ^= uint64(o.Offset) * 0x9e3779b97f4a7c15
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

// Report is what was counted between two times, the most bytes first.
type Report struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	Lines int64     `json:"lines"`
	Bytes int64     `json:"bytes"`
	Rows  []Row     `json:"rows"`
}

// Row is a workload.
type Row struct {
	Namespace    string  `json:"namespace"`
	Workload     string  `json:"workload"`
	Lines        int64   `json:"lines"`
	Bytes        int64   `json:"bytes"`
	Fields       int64   `json:"fields"`
	DroppedLines int64   `json:"droppedLines"`
	DroppedBytes int64   `json:"droppedBytes"`
	Share        float64 `json:"share"` // of all bytes, 0 to 1
	// Templates with the most bytes, at most TopTemplates. Their counts are
	// estimates once a workload has had a few hundred lines.
	Templates []Template `json:"templates"`
}

// Template is what lines have in common.
type Template struct {
	Pattern string `json:"pattern"` // <*> stands for what differs
	Example string `json:"example"`
	// Match is a regular expression for match.body of a rule; empty for Rest.
	Match string  `json:"match"`
	Lines int64   `json:"lines"`
	Bytes int64   `json:"bytes"`
	Share float64 `json:"share"` // of the workload's bytes, 0 to 1
	// WouldSave is how many bytes a day are not sent any more once a rule drops
	// these lines, at the rate of the report's time. What is dropped already does
	// not count.
	WouldSave int64 `json:"wouldSaveBytesPerDay"`
}

// Report sums up to now.
func (m *Meter) Report(now time.Time) Report {
	p := m.period.Load()
	p.mu.Lock()
	rows := make([]*row, 0, len(p.rows)+1)
	for _, w := range p.rows {
		rows = append(rows, w)
	}
	p.mu.Unlock()
	rows = append(rows, p.restRow)

	out := Report{Since: p.since, Until: now}
	for _, w := range rows {
		r := Row{
			Namespace: w.namespace, Workload: w.workload, Lines: w.lines.Load(), Bytes: w.bytes.Load(), Fields: w.fields.Load(),
			DroppedLines: w.droppedLines.Load(), DroppedBytes: w.droppedBytes.Load(),
		}
		if r.Lines == 0 {
			continue
		}
		r.Templates = w.drain.top(now.Sub(p.since))
		out.Lines += r.Lines
		out.Bytes += r.Bytes
		out.Rows = append(out.Rows, r)
	}
	for i := range out.Rows {
		r := &out.Rows[i]
		r.Share = ratio(r.Bytes, out.Bytes)
		var all int64
		for _, t := range r.Templates {
			all += t.Bytes
		}
		for j := range r.Templates {
			// An estimate may exceed what was counted.
			r.Templates[j].Share = ratio(r.Templates[j].Bytes, max(all, r.Bytes))
		}
	}
	slices.SortFunc(out.Rows, func(a, b Row) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Workload, b.Workload))
	})
	return out
}

func ratio(a, b int64) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}
