package breaker

import "time"

// recorded is how many outcomes the flight recorder keeps of each breaker:
// enough to show what tripped it, at 13 KiB a breaker.
const recorded = 64

// Outcome is how one attempt went: what the breaker counts and the flight
// recorder keeps. It holds no pointer into a connection's buffer.
type Outcome struct {
	At time.Time
	// Duration until the response began, or the attempt failed.
	Duration time.Duration
	// Ended is when the outcome became known, where that is later than At and
	// Duration say.
	Ended time.Time
	// Status of the response; 0 where there was none.
	Status int
	// Failed is which words of failureOn describe the outcome.
	Failed Failures
	// Flags are Envoy's response flags, for example "UF".
	Flags    string
	Endpoint string

	trace  [32]byte
	method [8]byte
	path   [96]byte
	nt, nm uint8
	np     uint8
}

// Describe copies what names the request; what does not fit is cut.
func (o *Outcome) Describe(traceID, method, path []byte) {
	o.nt = uint8(copy(o.trace[:], traceID))
	o.nm = uint8(copy(o.method[:], method))
	o.np = uint8(copy(o.path[:], path))
}

// Recorded is an outcome as evidence shows it.
type Recorded struct {
	At         time.Time `json:"@timestamp"`
	TraceID    string    `json:"trace.id"`
	Method     string    `json:"http.request.method"`
	Path       string    `json:"url.path"`
	Endpoint   string    `json:"destination.address"`
	Status     int       `json:"http.response.status_code"`
	Flags      string    `json:"outrigger.response_flags"`
	DurationNS int64     `json:"event.duration"`
	Failure    bool      `json:"outrigger.failure"`
	Slow       bool      `json:"outrigger.slow"`
}

// recorder keeps the last outcomes in a ring.
type recorder struct {
	ring [recorded]entry
	next int
	n    int
}

type entry struct {
	Outcome
	failure, slow bool
}

func (r *recorder) add(o *Outcome, failure, slow bool) {
	r.ring[r.next] = entry{*o, failure, slow}
	r.next = (r.next + 1) % recorded
	r.n = min(r.n+1, recorded)
}

// last returns the newest k outcomes, oldest first, of those not before since.
func (r *recorder) last(since time.Time) []Recorded {
	out := make([]Recorded, 0, r.n)
	for i := range r.n {
		e := &r.ring[(r.next-r.n+i+2*recorded)%recorded]
		if e.At.Before(since) {
			continue
		}
		out = append(out, Recorded{
			At: e.At, TraceID: string(e.trace[:e.nt]), Method: string(e.method[:e.nm]), Path: string(e.path[:e.np]),
			Endpoint: e.Endpoint, Status: e.Status, Flags: e.Flags, DurationNS: int64(e.Duration), Failure: e.failure, Slow: e.slow,
		})
	}
	return out
}

// buckets is how finely the rolling window moves: a tenth of it at a time.
const buckets = 10

// window counts outcomes over a rolling window. Exact counts a bucket, because
// the reason that a breaker gives must add up: a decaying average would not.
type window struct {
	period time.Duration // of one bucket
	start  time.Time     // of the current bucket
	cur    int
	b      [buckets]tally
}

type tally struct{ total, failed, slow uint32 }

func newWindow(d time.Duration, now time.Time) window {
	return window{period: max(d/buckets, time.Millisecond), start: now}
}

func (w *window) roll(now time.Time) {
	for steps := 0; now.Sub(w.start) >= w.period; steps++ {
		if steps == buckets { // everything is older than the window
			w.start = now
			return
		}
		w.cur = (w.cur + 1) % buckets
		w.b[w.cur] = tally{}
		w.start = w.start.Add(w.period)
	}
}

func (w *window) add(now time.Time, failure, slow bool) {
	w.roll(now)
	t := &w.b[w.cur]
	t.total++
	if failure {
		t.failed++
	}
	if slow {
		t.slow++
	}
}

func (w *window) sum(now time.Time) tally {
	w.roll(now)
	var s tally
	for _, t := range w.b {
		s.total += t.total
		s.failed += t.failed
		s.slow += t.slow
	}
	return s
}
