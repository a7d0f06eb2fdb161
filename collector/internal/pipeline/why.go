package pipeline

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of what is remembered of dropped records.
const (
	maxReasons     = 4096
	maxReasonBytes = 4 << 20 // of their names, rules and samples
	maxSamples     = 3
	maxSample      = 256 // bytes of a body
	maxName        = 253 // bytes of a namespace, pod or container, as in Kubernetes
	maxRule        = 1024
	// maxReasonsFile bounds the file: a byte takes six at most in JSON, and a reason
	// less than half a kilobyte beside its texts.
	maxReasonsFile = 32 << 20
	// reasonsEvery is how much time there is between two saves of reasons, at least: a
	// crash forgets those of so long.
	reasonsEvery = 5 * time.Second
	// maxCounted bounds a count that is read, so that adding to it cannot overflow.
	maxCounted = 1 << 60

	reasonsMagic = "outrigger-reasons"
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
	Last      time.Time `json:"last"` // time of the last such record; of a log that is not read, when that was decided
	Samples   []string  `json:"samples"`
}

type reasonKey struct {
	namespace, pod, container, rule string
	cause                           ledger.Cause
}

type noted struct {
	Reason
	at uint64 // when it was last noted, as a number that grows
}

// reasons remembers what was dropped, with samples. When it is full, the quarter that
// was not noted for the longest time is added up without names. It is safe for concurrent
// use.
type reasons struct {
	mu    sync.Mutex
	since time.Time
	m     map[reasonKey]*noted
	bytes int // of texts
	noted uint64
	saved uint64 // noted of what is on the disk
}

func newReasons(since time.Time) *reasons {
	const none = ^uint64(0) // so that the moment is saved, if nothing else
	return &reasons{since: since.UTC(), m: map[reasonKey]*noted{}, saved: none}
}

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
	if x.Last = r.Time.UTC(); x.Last.Year() < 0 || x.Last.Year() > 9999 {
		x.Last = time.Time{} // RFC 3339 has no such year
	}
	if len(x.Samples) < maxSamples && w.bytes < maxReasonBytes {
		s := strings.Clone(clip(r.Body, maxSample)) // not the chunk that the body is part of
		x.Samples = append(x.Samples, s)
		w.bytes += len(s)
	}
}

// unread: the container's log is not read at all, so there are no records to count.
func (w *reasons) unread(from *record.Resource, rule string, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.of(from, ledger.ByRule, rule).Last = now.UTC()
}

// of returns the reason, which is made if it is not there, as the one that was noted last.
func (w *reasons) of(from *record.Resource, cause ledger.Cause, rule string) *noted {
	k := reasonKey{clip(from.Namespace, maxName), clip(from.Pod, maxName), clip(from.Container, maxName), clip(rule, maxRule), cause}
	x := w.m[k]
	if x == nil {
		x = w.add(k)
	}
	w.noted++
	x.at = w.noted
	return x
}

// add makes room for a reason, and makes it.
func (w *reasons) add(k reasonKey) *noted {
	if len(w.m) >= maxReasons || w.bytes >= maxReasonBytes {
		w.shrink()
	}
	k = reasonKey{strings.Clone(k.namespace), strings.Clone(k.pod), strings.Clone(k.container), strings.Clone(k.rule), k.cause}
	x := &noted{Reason: Reason{Namespace: k.namespace, Pod: k.pod, Container: k.container, Cause: k.cause.String(), Rule: k.rule, Samples: []string{}}}
	w.m[k] = x
	w.bytes += k.size()
	return x
}

func (k reasonKey) size() int {
	return len(k.namespace) + len(k.pod) + len(k.container) + len(k.rule)
}

// shrink adds the oldest quarter up by cause.
func (w *reasons) shrink() {
	keys := slices.SortedFunc(maps.Keys(w.m), func(a, b reasonKey) int { return cmp.Compare(w.m[a].at, w.m[b].at) })
	for _, k := range keys[:(len(keys)+3)/4] {
		if k.size() == 0 {
			continue // of no name already
		}
		x := w.m[k]
		delete(w.m, k)
		w.bytes -= k.size()
		for _, s := range x.Samples {
			w.bytes -= len(s)
		}
		rest := w.m[reasonKey{cause: k.cause}]
		if rest == nil {
			rest = &noted{Reason: Reason{Cause: x.Cause, Samples: []string{}}}
			w.m[reasonKey{cause: k.cause}] = rest
		}
		rest.at = max(rest.at, x.at)
		rest.Records, rest.Bytes = rest.Records+x.Records, rest.Bytes+x.Bytes
		if x.Last.After(rest.Last) {
			rest.Last = x.Last
		}
		for _, s := range x.Samples[:min(len(x.Samples), maxSamples-len(rest.Samples))] {
			rest.Samples = append(rest.Samples, s)
			w.bytes += len(s)
		}
	}
}

// clip bounds a text, and makes it one that JSON can hold.
func clip(s string, most int) string {
	if len(s) > most {
		s = s[:most-len("…")]
		for range utf8.UTFMax - 1 {
			if r, n := utf8.DecodeLastRuneInString(s); r != utf8.RuneError || n != 1 {
				break
			}
			s = s[:len(s)-1]
		}
		return strings.ToValidUTF8(s, "") + "…"
	}
	return strings.ToValidUTF8(s, "")
}

// copied returns the reasons in the order in which they were last noted.
func (w *reasons) copied() (out []noted, number uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	out = make([]noted, 0, len(w.m))
	for _, x := range w.m {
		c := *x
		c.Samples = slices.Clone(x.Samples)
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b noted) int { return cmp.Compare(a.at, b.at) })
	return out, w.noted
}

func (w *reasons) list(output string) []Reason {
	all, _ := w.copied()
	out := make([]Reason, 0, len(all))
	for _, x := range all {
		x.Output = output
		out = append(out, x.Reason)
	}
	slices.SortFunc(out, func(a, b Reason) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Container, b.Container),
			cmp.Compare(a.Cause, b.Cause), cmp.Compare(a.Rule, b.Rule))
	})
	return out
}

// reasonsDocument is the file: those that were noted last stand last.
type reasonsDocument struct {
	Since   time.Time `json:"since"`
	Reasons []Reason  `json:"reasons"`
}

// encode returns the file, or nil if nothing was noted since the last one that was saved.
func (w *reasons) encode() (b []byte, number uint64, err error) {
	w.mu.Lock()
	same := w.noted == w.saved
	w.mu.Unlock()
	if same {
		return nil, 0, nil
	}
	all, number := w.copied()
	d := reasonsDocument{Since: w.since, Reasons: make([]Reason, 0, len(all))}
	for _, x := range all {
		d.Reasons = append(d.Reasons, x.Reason)
	}
	b, err = seal(reasonsMagic, d)
	return b, number, err
}

// decodeReasons reads what encode wrote; all else is errDamaged.
func decodeReasons(b []byte) (*reasons, error) {
	var d reasonsDocument
	if err := unseal(reasonsMagic, b, &d); err != nil {
		return nil, err
	}
	causes := map[string]ledger.Cause{}
	for _, c := range ledger.Drops() {
		causes[c.String()] = c
	}
	if d.Since.IsZero() || len(d.Reasons) > maxReasons+len(causes) {
		return nil, fmt.Errorf("%w: %d reasons since %s", errDamaged, len(d.Reasons), d.Since)
	}
	w := newReasons(d.Since)
	for i, x := range d.Reasons {
		cause, ok := causes[x.Cause]
		k := reasonKey{x.Namespace, x.Pod, x.Container, x.Rule, cause}
		bad := !ok || x.Output != "" || len(x.Namespace) > maxName || len(x.Pod) > maxName || len(x.Container) > maxName || len(x.Rule) > maxRule ||
			x.Records < 0 || x.Records > maxCounted || x.Bytes < 0 || x.Bytes > maxCounted || len(x.Samples) > maxSamples || w.m[k] != nil
		w.bytes += k.size()
		for _, s := range x.Samples {
			bad = bad || len(s) > maxSample
			w.bytes += len(s)
		}
		if bad {
			return nil, fmt.Errorf("%w: reason %d is out of its limits or there twice", errDamaged, i)
		}
		w.noted++
		x.Last = x.Last.UTC()
		w.m[k] = &noted{Reason: x, at: w.noted}
	}
	w.saved = w.noted
	return w, nil
}

func (p *Pipeline) loadReasons() {
	p.why = newReasons(time.Now())
	p.whyFile = &keptFile{
		path: filepath.Join(p.cfg.DataDir, p.cfg.Name+".reasons"), max: maxReasonsFile,
		what: "reasons why records were dropped", every: reasonsEvery, log: p.log,
	}
	p.whyFile.load(func(b []byte) error {
		w, err := decodeReasons(b)
		if err == nil {
			p.why = w
		}
		return err
	})
}

func (p *Pipeline) saveReasons(now bool) {
	var number uint64
	if p.whyFile.save(now, func() (b []byte, err error) {
		b, number, err = p.why.encode()
		return b, err
	}) {
		p.why.mu.Lock()
		defer p.why.mu.Unlock()
		p.why.saved = number
	}
}
