package influxdb

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"
)

// The values of outrigger_influxdb_points_dropped_total's label cause.
const (
	causeNotFinite     = "not_finite"     // NaN or infinite: line protocol has no such value
	causeNativeBuckets = "native_buckets" // a histogram's exponential buckets; its sum and count are sent
	causeUnwritable    = "unwritable"     // a name that line protocol cannot hold, or over 64 KiB
	causeQueueFull     = "queue_full"     // the oldest, because the server is too slow or away
	causeRejected      = "rejected"       // by the server, for good
	causeTooLarge      = "too_large"      // a single point got 413
	causeShutdown      = "shutdown"       // still waiting when the collector stopped
)

type metrics struct {
	gathered, written, sourceErrors prometheus.Counter
	drops                           *prometheus.CounterVec // cause
	requests                        *prometheus.CounterVec // code
}

func newMetrics(reg prometheus.Registerer, s *Sink) (*metrics, error) {
	m := &metrics{
		gathered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_influxdb_points_total", Help: "Points queued for the database: written + dropped after queueing + waiting.",
		}),
		written: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_influxdb_points_written_total", Help: "Points that the database acknowledged.",
		}),
		sourceErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_influxdb_source_errors_total", Help: "Times the source of metrics returned an error.",
		}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_influxdb_points_dropped_total",
			Help: "Points that were never stored. Before queueing: not_finite, native_buckets, unwritable. After: queue_full, rejected, too_large, shutdown.",
		}, []string{"cause"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_influxdb_requests_total", Help: "Attempts to write a batch by status code; none where there was no answer.",
		}, []string{"code"}),
	}
	for _, c := range []string{causeNotFinite, causeNativeBuckets, causeUnwritable, causeQueueFull, causeRejected, causeTooLarge, causeShutdown} {
		m.drops.WithLabelValues(c)
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "outrigger_influxdb_points_waiting", Help: "Points in the queue, the batch that is being sent among them.",
	}, func() float64 { return float64(s.queue.size()) })
	limit := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "outrigger_influxdb_points_waiting_max", Help: "Points that the queue holds before the oldest are dropped.",
	})
	limit.Set(float64(s.conf.QueuePoints))
	state := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "outrigger_influxdb_breaker_state", Help: "Breaker of the output: 0 closed, 1 half-open, 2 open.",
	}, func() float64 {
		switch s.breaker.State() {
		case gobreaker.StateHalfOpen:
			return 1
		case gobreaker.StateOpen:
			return 2
		default:
			return 0
		}
	})
	for _, c := range []prometheus.Collector{m.gathered, m.written, m.sourceErrors, m.drops, m.requests, waiting, limit, state} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("influxdb output: registering metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) dropped(cause string, n int) { m.drops.WithLabelValues(cause).Add(float64(n)) }
