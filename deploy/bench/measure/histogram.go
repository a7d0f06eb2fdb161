package measure

import (
	"math/bits"
	"time"
)

// Histogram counts durations in buckets whose width is at most 1/128 of their
// value (as HdrHistogram's are, at two digits), from 1 ns to about 9 minutes;
// what is longer is counted as that. The zero value is ready; it takes 33 KiB.
type Histogram struct {
	counts [magnitudes * steps]uint64
	n      uint64
}

const (
	stepBits   = 7
	steps      = 1 << stepBits
	magnitudes = 33
)

// Record counts one duration; below zero counts as zero.
func (h *Histogram) Record(d time.Duration) {
	h.counts[bucket(uint64(max(d, 0)))]++
	h.n++
}

// bucket is linear below 2*steps, and has steps buckets a power of two above.
func bucket(v uint64) int {
	shift := max(bits.Len64(v)-stepBits-1, 0)
	return min(shift*steps+int(v>>shift), magnitudes*steps-1)
}

// highest is the largest value of a bucket.
func highest(i int) uint64 {
	shift := max(i/steps-1, 0)
	return uint64(i-shift*steps+1)<<shift - 1
}

// Merge adds what another has counted.
func (h *Histogram) Merge(o *Histogram) {
	for i, c := range o.counts {
		h.counts[i] += c
	}
	h.n += o.n
}

// Count is how many durations were recorded.
func (h *Histogram) Count() uint64 { return h.n }

// Quantile is the duration that the share q of all (0 to 1) did not exceed,
// rounded up to the end of its bucket; zero where nothing was recorded.
func (h *Histogram) Quantile(q float64) time.Duration {
	if h.n == 0 {
		return 0
	}
	// The smallest rank that covers q, and at least the first.
	rank := uint64(q * float64(h.n))
	if float64(rank) < q*float64(h.n) || rank == 0 {
		rank++
	}
	var seen uint64
	for i, c := range h.counts {
		if seen += c; seen >= rank {
			return time.Duration(highest(i))
		}
	}
	return time.Duration(highest(len(h.counts) - 1))
}
