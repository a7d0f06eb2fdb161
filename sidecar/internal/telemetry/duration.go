package telemetry

import (
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// The buckets of a duration: the classic ones by their upper bounds, and the
// native ones of schema 3, which divide each power of two into eight (a factor
// of 1.09).
var classicBounds = [...]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second, 10 * time.Second,
}

const (
	nativeSchema = 3
	perOctave    = 1 << nativeSchema
	// Durations of 1 ns to 292 years lie in [2^-30, 2^34) seconds.
	lowestOctave = -30
	octaves      = 64
	// maxNativeBuckets is how many native buckets a scrape shows. A series that
	// has more is shown in a coarser schema.
	maxNativeBuckets = 100
)

// durations is the histogram outrigger_request_duration_seconds. client_golang's
// own keeps every native bucket in two maps: 13 KB for a series with 100 of
// them, which are 26 MB in a sidecar that has all the series it may have. This
// one takes 1.5 KB, and a fifth of the time for an observation: three atomic
// additions.
type durations struct {
	desc *prometheus.Desc

	mu   sync.Mutex
	all  map[string]*durationSeries
	list []*durationSeries // grows only
}

// durationSeries is the histogram of one set of labels.
type durationSeries struct {
	desc    *prometheus.Desc
	labels  []*dto.LabelPair
	created *timestamppb.Timestamp

	sum     atomic.Int64 // nanoseconds: 292 years
	classic [len(classicBounds) + 1]atomic.Uint64
	native  [octaves]atomic.Pointer[octave] // made when one is needed: most durations are alike
}

// octave counts durations in [2^n, 2^(n+1)) seconds: one cache line.
type octave [perOctave]atomic.Uint64

func newDurations(name, help string, labels []string) *durations {
	return &durations{desc: prometheus.NewDesc(name, help, labels, nil), all: map[string]*durationSeries{}}
}

// with returns the series of these label values.
func (d *durations) with(values ...string) *durationSeries {
	key := strings.Join(values, "\xff")
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.all[key]
	if s == nil {
		s = &durationSeries{desc: d.desc, labels: prometheus.MakeLabelPairs(d.desc, values), created: timestamppb.Now()}
		d.all[key] = s
		d.list = append(d.list, s)
	}
	return s
}

// Describe and Collect are for the registry.
func (d *durations) Describe(out chan<- *prometheus.Desc) { out <- d.desc }

// Collect hands out every series.
func (d *durations) Collect(out chan<- prometheus.Metric) {
	d.mu.Lock()
	list := d.list
	d.mu.Unlock()
	for _, s := range list {
		out <- s
	}
}

// withinOctave holds the lower bounds of the eight buckets of an octave as
// mantissas of float64.
var withinOctave = func() (m [perOctave]uint64) {
	for i := range m {
		m[i] = math.Float64bits(math.Exp2(float64(i)/perOctave)) & (1<<52 - 1)
	}
	return m
}()

// place is the native bucket of a duration of at least 1 ns: its octave and the
// bucket in it. The upper bound belongs to a bucket, the lower one to the one
// before.
func place(took time.Duration) (oct, bucket int) {
	bits := math.Float64bits(float64(took) / 1e9)
	oct, mantissa := int(bits>>52)-1023-lowestOctave, bits&(1<<52-1)
	// Branches that a processor can foretell only badly, but three of them.
	if mantissa > withinOctave[4] {
		bucket = 4
	}
	if mantissa > withinOctave[bucket+2] {
		bucket += 2
	}
	if mantissa > withinOctave[bucket+1] {
		bucket++
	}
	if mantissa == 0 { // a power of two is the upper bound of what is below
		return oct - 1, perOctave - 1
	}
	return oct, bucket
}

func (s *durationSeries) observe(took time.Duration) {
	took = max(took, 1)
	oct, bucket := place(took)
	o := s.native[oct].Load()
	if o == nil {
		o = new(octave)
		if !s.native[oct].CompareAndSwap(nil, o) {
			o = s.native[oct].Load()
		}
	}
	// In this order: Write must never see a classic bucket that has more than the
	// native ones together, which are the count.
	o[bucket].Add(1)
	le := 0
	for le < len(classicBounds) && took > classicBounds[le] {
		le++
	}
	s.classic[le].Add(1)
	s.sum.Add(int64(took))
}

// Desc is for the registry.
func (s *durationSeries) Desc() *prometheus.Desc { return s.desc }

// Write fills in the histogram as it is now.
func (s *durationSeries) Write(out *dto.Metric) error {
	h := &dto.Histogram{CreatedTimestamp: s.created, Bucket: make([]*dto.Bucket, len(classicBounds))}
	var below uint64
	for i, bound := range classicBounds {
		below += s.classic[i].Load()
		h.Bucket[i] = &dto.Bucket{CumulativeCount: new(below), UpperBound: new(bound.Seconds())}
	}
	h.SampleSum = new(float64(s.sum.Load()) / 1e9)
	counts := map[int]uint64{} // by the index of Prometheus: upper bound 2^(index/8)
	var total uint64
	for oct := range s.native {
		o := s.native[oct].Load()
		if o == nil {
			continue
		}
		for b := range o {
			if n := o[b].Load(); n > 0 {
				counts[(oct+lowestOctave)*perOctave+b+1] = n
				total += n
			}
		}
	}
	h.SampleCount = new(total)
	schema := int32(nativeSchema)
	for len(counts) > maxNativeBuckets {
		coarse := make(map[int]uint64, len(counts)/2)
		for i, n := range counts {
			coarse[(i+1)>>1] += n
		}
		counts = coarse
		schema--
	}
	h.Schema = new(schema)
	h.ZeroThreshold, h.ZeroCount = new(prometheus.DefNativeHistogramZeroThreshold), new(uint64(0))
	h.PositiveSpan, h.PositiveDelta = encode(counts)
	out.Label, out.Histogram = s.labels, h
	return nil
}

// encode writes buckets as the exposition wants them: runs of neighbours, each
// count as the difference to the one before. Gaps of two are cheaper filled in
// than begun anew.
func encode(counts map[int]uint64) (list []*dto.BucketSpan, deltas []int64) {
	indices := make([]int, 0, len(counts))
	for i := range counts {
		indices = append(indices, i)
	}
	slices.Sort(indices)
	var before int64
	next := 0
	add := func(n int64) {
		*list[len(list)-1].Length++
		deltas = append(deltas, n-before)
		before = n
	}
	for k, i := range indices {
		if gap := i - next; k == 0 || gap > 2 {
			list = append(list, &dto.BucketSpan{Offset: new(int32(gap)), Length: new(uint32(0))})
		} else {
			for range gap {
				add(0)
			}
		}
		add(int64(counts[i]))
		next = i + 1
	}
	return list, deltas
}
