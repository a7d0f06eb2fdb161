package balance

import (
	"math"
	"math/bits"
	"time"
)

// draws is how often an excluded endpoint is drawn again before all are looked
// at: four draws miss when half of the endpoints are excluded one time in 16.
const draws = 4

// Pick chooses one of n endpoints: two different ones are drawn, evenly from
// those that excluded does not name, and the one with the smaller load wins.
// r1 and r2 are random. It returns -1 where every endpoint is excluded or n is
// 0. It allocates nothing where the closures do not escape, and looks at every
// endpoint only where most are excluded.
func Pick(n int, load func(i int) float64, excluded func(i int) bool, r1, r2 uint64) int {
	first := draw(n, excluded, r1, -1)
	if first < 0 {
		return -1
	}
	second := draw(n, excluded, r2, first)
	if second < 0 || load(first) <= load(second) {
		return first
	}
	return second
}

// draw returns an endpoint that is neither excluded nor taken, each with the
// same probability, or -1.
func draw(n int, excluded func(i int) bool, r uint64, taken int) int {
	if n <= 0 {
		return -1
	}
	for range draws {
		if i := bounded(r, n); i != taken && !excluded(i) {
			return i
		}
		r = mix(r)
	}
	left := 0
	for i := range n {
		if i != taken && !excluded(i) {
			left++
		}
	}
	if left == 0 {
		return -1
	}
	skip := bounded(r, left)
	last := -1
	for i := range n {
		if i == taken || excluded(i) {
			continue
		}
		last = i
		if skip == 0 {
			break
		}
		skip--
	}
	// Health may change between the passes; the last one seen is then as good.
	return last
}

// bounded maps a random number to [0, n).
func bounded(r uint64, n int) int {
	hi, _ := bits.Mul64(r, uint64(n))
	return int(hi)
}

// mix is the step of SplitMix64: from one random number to the next.
func mix(r uint64) uint64 {
	r += 0x9e3779b97f4a7c15
	r = (r ^ r>>30) * 0xbf58476d1ce4e5b9
	r = (r ^ r>>27) * 0x94d049bb133111eb
	return r ^ r>>31
}

// Load is what Pick compares: the expected wait at an endpoint with active
// requests in flight that answers in latency, divided by its weight. An endpoint
// whose latency is not known yet counts as a quick one, so that it is tried.
func Load(active int, latency time.Duration, weight uint32) float64 {
	return float64(active+1) * math.Max(float64(latency), float64(time.Microsecond)) / float64(max(weight, 1))
}

// DefaultDecay is the time constant of an EWMA that does not set one.
const DefaultDecay = 10 * time.Second

// EWMA is a moving average of latencies that believes bad news at once: a
// latency above the average replaces it, one below moves it by the time that
// has passed. The zero value knows nothing. Its owner serialises the calls.
type EWMA struct {
	// Decay is after how long 1/e of an observation is left; 0 is DefaultDecay.
	Decay time.Duration

	value float64 // nanoseconds
	at    time.Time
}

// Observe takes in a latency measured at now.
func (e *EWMA) Observe(now time.Time, latency time.Duration) {
	d := float64(max(latency, 0))
	if w := e.left(now); d > e.value*w {
		e.value = d
	} else {
		e.value = e.value*w + d*(1-w)
	}
	if now.After(e.at) {
		e.at = now
	}
}

// Value is the average as of now. It shrinks while nothing is observed, so that
// an endpoint that was slow once is tried again.
func (e *EWMA) Value(now time.Time) time.Duration {
	return time.Duration(e.value * e.left(now))
}

// left is the share of the last observation that has not decayed.
func (e *EWMA) left(now time.Time) float64 {
	decay := e.Decay
	if decay <= 0 {
		decay = DefaultDecay
	}
	return math.Exp(-float64(max(now.Sub(e.at), 0)) / float64(decay))
}
