package torture

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// judge takes what a backend got, by bitmap. It is safe for concurrent use.
type judge struct {
	mu   sync.Mutex
	seen map[uint32]*arrivals

	arrived    int // different lines
	duplicated int
	disordered int
	corrupted  int
	cut        int
	cutBytes   int64
	alien      int     // without a head
	latencies  []int32 // milliseconds, of first arrivals
	damage     []string
}

// arrivals are the lines of one source that came.
type arrivals struct {
	bits    []uint64
	highest int64 // number, -1 before the first
}

func newJudge() *judge { return &judge{seen: map[uint32]*arrivals{}} }

// maxSamples bounds what is told of each kind of damage.
const maxSamples = 5

// maxNumber bounds the bitmap of a source, whatever a line claims.
const maxNumber = 1 << 26

// arrive takes the text of one record. A zero time is one that says nothing of
// latency.
func (j *judge) arrive(text []byte, at time.Time) {
	h, rest, ok := parse(text)
	whole, prefix := true, true
	if ok && h.kind != embedded {
		whole, prefix = h.whole(rest)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case !ok:
		j.alien++
		return
	case h.number >= maxNumber:
		j.corrupted++
		return
	case !whole && h.kind == long && prefix:
		j.cut++
		j.cutBytes += int64(h.filling - len(rest))
	case !whole:
		j.corrupted++ // and it is missing, unless it comes once more
		if len(j.damage) < maxSamples {
			j.damage = append(j.damage, h.compare(rest))
		}
		return
	}
	a := j.seen[h.source]
	if a == nil {
		a = &arrivals{highest: -1}
		j.seen[h.source] = a
	}
	for int(h.number/64) >= len(a.bits) {
		a.bits = append(a.bits, 0)
	}
	bit := uint64(1) << (h.number % 64)
	if a.bits[h.number/64]&bit != 0 {
		j.duplicated++
		return
	}
	a.bits[h.number/64] |= bit
	j.arrived++
	if int64(h.number) < a.highest {
		j.disordered++
	}
	a.highest = max(a.highest, int64(h.number))
	if !at.IsZero() {
		j.latencies = append(j.latencies, int32(min(max(at.UnixNano()-h.written, 0)/1e6, 1<<30)))
	}
}

// has says whether the line came. The caller holds the lock.
func (j *judge) has(id, number uint32) bool {
	a := j.seen[id]
	return a != nil && int(number/64) < len(a.bits) && a.bits[number/64]&(1<<(number%64)) != 0
}

func (j *judge) count() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.arrived
}

// absence is a time in which the collector did not run, or was stopped.
type absence struct{ from, to time.Time }

// verdict is what became of the lines.
//
//	written = arrived + explained + kubelet + lost
type verdict struct {
	Written   int `json:"written"`
	Arrived   int `json:"arrived"`
	Lost      int `json:"lost"`      // and nothing says why
	Explained int `json:"explained"` // did not arrive, and the collector's audit counts them as dropped, with a cause
	Kubelet   int `json:"kubelet"`   // written and deleted while the collector was not there: nobody could have them

	Duplicated int `json:"duplicated"`
	Disordered int `json:"disordered"` // first arrivals after one with a higher number of the same stream
	Corrupted  int `json:"corrupted"`
	Cut        int `json:"cut"`     // long lines of which the beginning came
	Alien      int `json:"alien"`   // records without a number
	Leaked     int `json:"leaked"`  // lines from outside the folder, through a symbolic link: whether they should come is the user's policy
	Dropped    int `json:"dropped"` // bytes that the audit counts as dropped
	// Unequal is the bytes that the audit explains beyond what did not arrive.
	Unequal int `json:"unequal"`

	P50 float64 `json:"p50"` // milliseconds from the write to the backend
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`

	// Samples of what is lost or corrupted, for people.
	Samples []string `json:"samples,omitempty"`
}

// verdict compares what was written with what came. dropped is the bytes that the
// collector says it gave up, unnamed the records of which it knows but their number.
func (j *judge) verdict(sources []*source, dropped int64, unnamed int, absences []absence) verdict {
	j.mu.Lock()
	defer j.mu.Unlock()
	v := verdict{
		Duplicated: j.duplicated, Disordered: j.disordered, Corrupted: j.corrupted, Cut: j.cut,
		Alien: j.alien, Dropped: int(dropped),
	}
	budget := dropped - j.cutBytes
	for _, s := range sources {
		for n, w := range s.lines {
			if w.secret {
				if j.has(s.id, uint32(n)) {
					v.Leaked++
				}
				continue
			}
			v.Written++
			switch {
			case j.has(s.id, uint32(n)):
				v.Arrived++
			case w.unseen(absences):
				v.Kubelet++
			case w.bytes <= budget:
				budget -= w.bytes
				v.Explained++
			case unnamed > 0:
				unnamed--
				v.Explained++
			default:
				v.Lost++
				if len(v.Samples) < maxSamples {
					v.Samples = append(v.Samples, "lost "+w.describe(s, n))
				}
			}
		}
	}
	v.Samples = append(v.Samples, j.damage...)
	v.Unequal = int(max(budget, 0))
	slices.Sort(j.latencies)
	at := func(q float64) float64 {
		if len(j.latencies) == 0 {
			return 0
		}
		return float64(j.latencies[int(q*float64(len(j.latencies)-1))])
	}
	v.P50, v.P99, v.Max = at(0.5), at(0.99), at(1)
	return v
}

// unseen says whether the line was written and deleted within one absence.
func (w written) unseen(absences []absence) bool {
	if w.generation == nil || w.generation.deleted.IsZero() {
		return false
	}
	at := time.Unix(0, w.at)
	for _, a := range absences {
		if !at.Before(a.from) && !w.generation.deleted.After(a.to) {
			return true
		}
	}
	return false
}

func (w written) describe(s *source, n int) string {
	text := time.Unix(0, w.at).UTC().Format("15:04:05.000") + " " + s.name + " " + itoa(n)
	if w.generation != nil && !w.generation.deleted.IsZero() {
		text += ", its file was deleted at " + w.generation.deleted.UTC().Format("15:04:05.000")
	}
	return text
}

// compare says how the rest differs from the filling, for people.
func (h head) compare(rest []byte) string {
	want := appendFilling(nil, h.number, h.filling)
	at := 0
	for at < min(len(rest), len(want)) && rest[at] == want[at] {
		at++
	}
	return fmt.Sprintf("corrupted source %d number %d: %d bytes came of %d, they differ from byte %d on: %q", h.source, h.number, len(rest), len(want), at, rest[at:min(at+60, len(rest))])
}
