package telemetry

import (
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// reference is the library's histogram with our buckets, at most so many native
// ones; 0: any number.
func reference(most uint32) prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "outrigger_request_duration_seconds", Help: "h", Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: most, NativeHistogramMinResetDuration: time.Hour,
	})
}

// client_golang's histogram is the reference for ours: the same observations,
// the same metric.
func TestDurationsAreAsClientGolangCountsThem(t *testing.T) {
	reference := reference(0)
	ours := newDurations("outrigger_request_duration_seconds", "h", nil).with()
	observe := func(d time.Duration) {
		ours.observe(d)
		reference.Observe(d.Seconds())
	}
	for _, d := range classicBounds {
		for off := time.Duration(-1); off <= 1; off++ {
			observe(d + off)
		}
	}
	for _, s := range []float64{.25, .5, 1, 2, 4} { // powers of two are bounds of native buckets too
		observe(time.Duration(s * 1e9))
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 5000 { // within few enough octaves for the schema to stay
		observe(time.Duration(math.Exp2(17 + 11*rnd.Float64())))
	}
	var got, want dto.Metric
	if err := ours.Write(&got); err != nil {
		t.Fatal(err)
	}
	if err := reference.Write(&want); err != nil {
		t.Fatal(err)
	}
	g, w := got.GetHistogram(), want.GetHistogram()
	if math.Abs(g.GetSampleSum()-w.GetSampleSum()) > 1e-6 {
		t.Errorf("sum %v; want %v", g.GetSampleSum(), w.GetSampleSum())
	}
	g.SampleSum, g.CreatedTimestamp, w.SampleSum, w.CreatedTimestamp = nil, nil, nil, nil
	if diff := cmp.Diff(w.String(), g.String()); diff != "" {
		t.Error(diff)
	}
}

// A series with durations of every size is shown with fewer, wider buckets,
// which hold the same.
func TestNativeBucketsAreBounded(t *testing.T) {
	ours := newDurations("d", "h", nil).with()
	n := uint64(0)
	for d := time.Duration(1); d > 0; d += d/20 + 1 {
		ours.observe(d)
		n++
	}
	ours.observe(-time.Second) // a clock that went back
	n++
	var got dto.Metric
	if err := ours.Write(&got); err != nil {
		t.Fatal(err)
	}
	h := got.GetHistogram()
	total, last := int64(0), int64(0)
	for _, delta := range h.GetPositiveDelta() {
		last += delta
		total += last
	}
	if h.GetSchema() >= nativeSchema || len(h.GetPositiveDelta()) > maxNativeBuckets || uint64(total) != n || h.GetSampleCount() != n {
		t.Errorf("schema %d, %d buckets, %d in them, count %d; want at most %d buckets with all %d", h.GetSchema(), len(h.GetPositiveDelta()), total, h.GetSampleCount(), maxNativeBuckets, n)
	}
}

// A scraper refuses a histogram whose count is not the sum of its buckets, so
// that must hold whenever it asks.
func TestScrapeDuringObservationsAddsUp(t *testing.T) {
	ours := newDurations("d", "h", nil).with()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for d := time.Duration(1000); ; d = d*21/20%time.Hour + 1000 {
				select {
				case <-stop:
					return
				default:
					ours.observe(d)
				}
			}
		})
	}
	for range 500 {
		var m dto.Metric
		_ = ours.Write(&m)
		h := m.GetHistogram()
		total, last := int64(0), int64(0)
		for _, delta := range h.GetPositiveDelta() {
			last += delta
			total += last
		}
		if b := h.GetBucket(); uint64(total) != h.GetSampleCount() || b[len(b)-1].GetCumulativeCount() > h.GetSampleCount() {
			t.Fatalf("count %d, native buckets %d, classic buckets %d", h.GetSampleCount(), total, b[len(b)-1].GetCumulativeCount())
		}
	}
	close(stop)
	wg.Wait()
}

// BenchmarkHistogram is ours and the library's: alone, and from all processors.
func BenchmarkHistogram(b *testing.B) {
	for _, h := range []struct {
		name    string
		observe func(time.Duration)
	}{
		{"ours", newDurations("d", "h", nil).with().observe},
		{"client_golang", func() func(time.Duration) {
			h := reference(100)
			return func(d time.Duration) { h.Observe(d.Seconds()) }
		}()},
	} {
		b.Run(h.name, func(b *testing.B) {
			b.ReportAllocs()
			took := time.Duration(0)
			for b.Loop() {
				took = (took + 997) & (1<<20 - 1)
				h.observe(took)
			}
		})
		b.Run(h.name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				took := time.Duration(0)
				for pb.Next() {
					took = (took + 997) & (1<<20 - 1)
					h.observe(took)
				}
			})
		})
	}
}
