package rules

import (
	"slices"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of what quotas remember.
const (
	windowSeconds = 10
	windows       = 360 // of a namespace: an hour
	days          = 8   // of a namespace
	secondsOfDay  = 24 * 60 * 60
	maxUsages     = 512  // namespaces of all quotas; the others share one
	maxSent       = 1024 // streams of a namespace whose past verdicts are known
	maxSpans      = 64   // of a stream
)

// quota bounds a namespace. Bytes are counted in windows of the records' own
// time, not in one bucket: files are read one after another, and the second of
// two that were written at the same time goes back in time.
type quota struct {
	name              string
	namespaces        []string
	perSecond, perDay int64
	below             uint64 // what is over is kept if its hash is below; warn keeps all
}

type usageKey struct{ quota, namespace string }

// usage of a quota by one namespace. It is safe for concurrent use.
type usage struct {
	quota  *quota
	counts *atomic.Uint64 // of the Set

	mu     sync.Mutex
	window [windows]count
	day    [days]count
	sent   map[streamKey]*past
}

type count struct{ at, bytes int64 }

type streamKey struct{ file, stream string }

// past is what was decided about a stream: how far it was judged, and which
// parts of it were over. A record that comes again gets the same verdict, and is
// not counted again.
type past struct {
	end  int64
	over []span
}

type span struct{ from, to int64 }

// usage finds the count of a namespace, which a Set keeps as long as it lives.
func (s *Set) usage(q *quota, namespace string) *usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := usageKey{q.name, namespace}
	if len(s.usages) >= maxUsages && s.usages[key] == nil {
		key.namespace = "" // no namespace has this name
	}
	u := s.usages[key]
	if u == nil {
		if s.usages == nil {
			s.usages = map[usageKey]*usage{}
		}
		u = &usage{quota: q, counts: &s.counts, sent: map[streamKey]*past{}}
		s.usages[key] = u
	}
	return u
}

// Resume takes over what an earlier set of the same output has counted, for
// quotas that still have their name, so that a new configuration does not begin
// a namespace's day again. It is called before the first For.
func (s *Set) Resume(from *Set) {
	from.mu.Lock()
	defer from.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, u := range from.usages {
		i := slices.IndexFunc(s.quotas, func(q *quota) bool { return q.name == key.quota })
		if i < 0 {
			continue
		}
		if s.usages == nil {
			s.usages = map[usageKey]*usage{}
		}
		u.mu.Lock()
		now := &usage{quota: s.quotas[i], counts: &s.counts, window: u.window, day: u.day, sent: make(map[streamKey]*past, len(u.sent))}
		for k, p := range u.sent {
			now.sent[k] = &past{end: p.end, over: slices.Clone(p.over)}
		}
		u.mu.Unlock()
		s.usages[key] = now
	}
}

// over counts a record of n bytes and reports whether it is over the quota.
func (u *usage) over(r *record.Record, n int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	key := streamKey{r.Origin.File, r.Stream}
	p := u.sent[key]
	if p != nil && r.Origin.Offset < p.end {
		return p.wasOver(r.Origin.Offset)
	}
	over := u.count(r.Time.Unix(), n)
	if r.Origin.File == "" {
		return over
	}
	if p == nil {
		if len(u.sent) >= maxSent {
			clear(u.sent)
		}
		p = &past{}
		u.sent[key] = p
	}
	p.judged(span{r.Origin.Offset, max(r.Origin.End, r.Origin.Offset+1)}, over)
	return over
}

func (u *usage) count(at, n int64) bool {
	q := u.quota
	if q.perSecond > 0 && u.window[slot(at/windowSeconds, windows)].add(at/windowSeconds, n) > q.perSecond*windowSeconds {
		return true
	}
	if q.perDay <= 0 {
		return false
	}
	u.counts.Add(1)
	day := at / secondsOfDay
	return u.day[slot(day, days)].add(day, n) > q.perDay
}

func slot(at int64, n int) int { return int(uint64(at) % uint64(n)) }

func (c *count) add(at, n int64) int64 {
	if c.at != at {
		*c = count{at: at}
	}
	c.bytes += n
	return c.bytes
}

func (p *past) wasOver(offset int64) bool {
	for i := len(p.over) - 1; i >= 0; i-- {
		if p.over[i].from <= offset {
			return offset < p.over[i].to
		}
	}
	return false
}

// judged remembers a verdict. Records that are over mostly follow each other and
// take one span.
func (p *past) judged(s span, over bool) {
	last := len(p.over) - 1
	switch {
	case !over:
	case last >= 0 && p.over[last].to == p.end:
		p.over[last].to = s.to
	default:
		if len(p.over) >= maxSpans {
			copy(p.over, p.over[1:])
			p.over = p.over[:last]
		}
		p.over = append(p.over, s)
	}
	p.end = s.to
}

// chosen is a number that is the same whenever the same record is judged for the
// same purpose, and evenly spread over records.
func chosen(purpose string, o *record.Origin) uint64 {
	h := uint64(14695981039346656037)
	for _, s := range [...]string{purpose, o.File} {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 1099511628211
		}
	}
	h ^= uint64(o.Offset) * 0x9e3779b97f4a7c15
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

// share is the bound below which chosen numbers are kept.
func share(rate float64) uint64 {
	if rate >= 1 {
		return 1<<64 - 1
	}
	return uint64(max(rate, 0) * (1 << 63) * 2)
}
