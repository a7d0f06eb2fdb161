package output

import "time"

// A host that failed rests from a second to a minute.
const (
	minRest = time.Second
	maxRest = time.Minute
)

// Rest says how long one of several hosts is left alone after it has failed: a
// second, twice as long after each further failure in a row, a minute at most. The
// zero value does not rest. Whoever has no other host tries one that rests. It is
// for one goroutine.
type Rest struct {
	failures int
	until    time.Time
}

// Failed begins a rest.
func (r *Rest) Failed(now time.Time) {
	r.until = now.Add(min(minRest<<min(r.failures, 10), maxRest))
	r.failures++
}

// Worked makes the next rest a short one again. One that is under way goes on.
func (r *Rest) Worked() { r.failures = 0 }

// Resting reports whether the host is to be left alone.
func (r *Rest) Resting(now time.Time) bool { return r.until.After(now) }
