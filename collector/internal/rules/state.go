package rules

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// Limits of a State.
const (
	maxStateItems = 32768 // streams, and parts of them, of all namespaces: some megabytes
	maxStateText  = 4096  // bytes of a name; longer ones are left out
	maxStateBytes = 1 << 60
)

// State is what quotas of a day have counted, to be kept over a restart. What
// quotas of a second have counted is not in it: ten seconds later it says nothing.
type State []Counted

// Counted is of one namespace.
type Counted struct {
	Quota     string `json:"quota"`
	Namespace string `json:"namespace"` // empty is of all that have no count of their own
	// Days are those that records were written on.
	Days []DayCount `json:"days"`
	// Judged are streams of which records may come again: those are not counted twice.
	Judged []JudgedStream `json:"judged,omitempty"`
}

// DayCount is the sum of a day.
type DayCount struct {
	Day   int64 `json:"day"` // UTC, since 1970
	Bytes int64 `json:"bytes"`
}

// JudgedStream is how far a stream of a file is judged.
type JudgedStream struct {
	File   string     `json:"file"`
	Stream string     `json:"stream"`
	End    int64      `json:"end"`
	Over   [][2]int64 `json:"over,omitempty"` // from, to: what was over the quota
}

// Counts is a number that changes with what State returns.
func (s *Set) Counts() uint64 { return s.counts.Load() }

// State returns what is counted. Days that ended more than a week before now are left
// out, those after now are not: a clock that went back may come forward again.
func (s *Set) State(now time.Time) State {
	s.mu.Lock()
	defer s.mu.Unlock()
	today := now.Unix() / secondsOfDay
	var out State
	items := 0
	for key, u := range s.usages {
		if u.quota.perDay <= 0 || len(key.namespace) > maxStateText {
			continue
		}
		u.mu.Lock()
		c := Counted{Quota: key.quota, Namespace: key.namespace}
		for _, d := range u.day {
			if d.bytes > 0 && d.at > today-days {
				c.Days = append(c.Days, DayCount{d.at, d.bytes})
			}
		}
		for k, p := range u.sent {
			if len(c.Days) == 0 || items+1+len(p.over) > maxStateItems {
				break
			}
			j := JudgedStream{File: k.file, Stream: k.stream, End: p.end}
			for _, o := range p.over {
				j.Over = append(j.Over, [2]int64{o.from, o.to})
			}
			if j.valid() {
				c.Judged = append(c.Judged, j)
				items += j.items()
			}
		}
		u.mu.Unlock()
		if len(c.Days) > 0 {
			slices.SortFunc(c.Days, func(a, b DayCount) int { return cmp.Compare(a.Day, b.Day) })
			slices.SortFunc(c.Judged, func(a, b JudgedStream) int {
				return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Stream, b.Stream))
			})
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b Counted) int {
		return cmp.Or(cmp.Compare(a.Quota, b.Quota), cmp.Compare(a.Namespace, b.Namespace))
	})
	return out
}

// Restore takes over what a former process has counted, for quotas of a day that still
// have their name. What the Set has counted or resumed itself stays. The error says what
// is wrong with a state that State did not return; nothing of it is taken then. It is
// called before the first For.
func (s *Set) Restore(state State, now time.Time) error {
	if err := state.check(); err != nil {
		return err
	}
	today := now.Unix() / secondsOfDay
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range state {
		i := slices.IndexFunc(s.quotas, func(q *quota) bool { return q.name == c.Quota && q.perDay > 0 })
		key := usageKey{c.Quota, c.Namespace}
		if i < 0 || s.usages[key] != nil {
			continue
		}
		u := &usage{quota: s.quotas[i], counts: &s.counts, sent: make(map[streamKey]*past, len(c.Judged))}
		for _, d := range c.Days {
			if d.Day > today-days {
				u.day[slot(d.Day, days)] = count{d.Day, d.Bytes}
			}
		}
		for _, j := range c.Judged {
			p := &past{end: j.End}
			for _, o := range j.Over {
				p.over = append(p.over, span{o[0], o[1]})
			}
			u.sent[streamKey{j.File, j.Stream}] = p
		}
		if s.usages == nil {
			s.usages = map[usageKey]*usage{}
		}
		s.usages[key] = u
	}
	return nil
}

func (s State) check() error {
	// A namespace that has no count of its own is there for each quota.
	if len(s) > maxUsages+MaxQuotas {
		return fmt.Errorf("it has %d namespaces; at most %d are written", len(s), maxUsages+MaxQuotas)
	}
	seen := map[usageKey]bool{}
	items := 0
	for i, c := range s {
		key := usageKey{c.Quota, c.Namespace}
		if seen[key] || len(c.Quota) > maxStateText || len(c.Namespace) > maxStateText || len(c.Days) > days || len(c.Judged) > maxSent {
			return fmt.Errorf("namespace %d, %.80q of quota %.80q, is there twice or beyond a limit", i, c.Namespace, c.Quota)
		}
		seen[key] = true
		for _, d := range c.Days {
			if d.Bytes < 0 || d.Bytes > maxStateBytes {
				return fmt.Errorf("namespace %d: %d bytes on day %d", i, d.Bytes, d.Day)
			}
		}
		for _, j := range c.Judged {
			if items += j.items(); !j.valid() || items > maxStateItems {
				return fmt.Errorf("namespace %d: stream %.80q of file %.80q is beyond a limit", i, j.Stream, j.File)
			}
		}
	}
	return nil
}

func (j *JudgedStream) items() int { return 1 + len(j.Over) }

func (j *JudgedStream) valid() bool {
	if j.File == "" || len(j.File) > maxStateText || len(j.Stream) > maxStateText || j.End < 0 || len(j.Over) > maxSpans {
		return false
	}
	for i, o := range j.Over {
		if o[0] >= o[1] || o[1] > j.End || i > 0 && o[0] < j.Over[i-1][1] {
			return false
		}
	}
	return true
}
