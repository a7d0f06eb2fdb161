package pipeline

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of what is remembered of dropped records.
const (
	maxReasons = 4096
	maxSamples = 3
	maxSample  = 256 // bytes of a body
)

// Reason is why records of a container were not stored.
type Reason struct {
	Output    string    `json:"output"`
	Namespace string    `json:"namespace"`
	Pod       string    `json:"pod"`
	Container string    `json:"container"`
	Cause     string    `json:"cause"`
	Rule      string    `json:"rule,omitempty"` // or what the backend said
	Records   int64     `json:"records"`        // 0: the log is not read at all; its bytes are in the account
	Bytes     int64     `json:"bytes"`
	Last      time.Time `json:"last"`  // time of the last such record; of a log that is not read, when that was decided
	Noted     time.Time `json:"noted"` // when the record was read
	Samples   []string  `json:"samples"`
}

type reasonKey struct {
	namespace, pod, container, rule string
	cause                           ledger.Cause
}

// reasons remembers what was dropped, with samples. When it is full the rest is added up
// without names.
type reasons struct {
	mu    sync.Mutex
	m     map[reasonKey]*Reason
	begun time.Time
}

func newReasons() *reasons { return &reasons{m: map[reasonKey]*Reason{}} }

func (w *reasons) note(r *record.Record, cause ledger.Cause, rule string, bytes int64) {
	from := r.Resource
	if from == nil {
		from = &record.Resource{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	x := w.of(from, cause, rule)
	x.Records++
	x.Bytes += bytes
	x.Last, x.Noted = r.Time, r.Observed
	if len(x.Samples) < maxSamples {
		s := r.Body
		if len(s) > maxSample {
			s = strings.ToValidUTF8(s[:maxSample], "") + "…"
		}
		x.Samples = append(x.Samples, strings.Clone(s)) // not the chunk that the body is part of
	}
}

// unread: the container's log is not read at all, so there are no records to count.
func (w *reasons) unread(from *record.Resource, rule string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now().UTC()
	x := w.of(from, ledger.ByRule, rule)
	x.Last, x.Noted = now, now
}

// of is the reason of a container, or of all others.
func (w *reasons) of(from *record.Resource, cause ledger.Cause, rule string) *Reason {
	k := reasonKey{from.Namespace, from.Pod, from.Container, rule, cause}
	x := w.m[k]
	if x == nil {
		if len(w.m) >= maxReasons {
			k = reasonKey{cause: cause}
			x = w.m[k]
		}
		if x == nil {
			x = &Reason{Namespace: k.namespace, Pod: k.pod, Container: k.container, Cause: cause.String(), Rule: k.rule, Samples: []string{}}
			w.m[k] = x
		}
	}
	return x
}

func (w *reasons) list(output string) []Reason {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := make([]Reason, 0, len(w.m))
	for _, x := range w.m {
		c := *x
		c.Output, c.Samples = output, slices.Clone(x.Samples)
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b Reason) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Container, b.Container),
			cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.Rule, b.Rule))
	})
	return out
}

// restore takes over what an earlier process remembered. It is called before the first note.
func (w *reasons) restore(m memory, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.begun = m.Since; w.begun.IsZero() || w.begun.After(now) {
		w.begun = now
	}
	for _, r := range m.Reasons {
		cause, _ := causeOf(r.Cause) // it was checked
		w.m[reasonKey{r.Namespace, r.Pod, r.Container, r.Rule, cause}] = &r
	}
}

// forget drops what was noted last before then.
func (w *reasons) forget(then time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.m, func(_ reasonKey, r *Reason) bool { return r.Noted.Before(then) })
	if w.begun.Before(then) {
		w.begun = then
	}
}

// since is how far back the reasons go, to the minute.
func (w *reasons) since() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.begun.Truncate(time.Minute)
}
