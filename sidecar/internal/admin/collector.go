package admin

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// Gauges shows what is true now rather than what has happened: the state of
// breakers, and each limit beside how much of it is in use, so that no limit is
// hidden. It implements prometheus.Collector.
type Gauges struct {
	Clusters *upstream.Clusters
}

var (
	breakerState = prometheus.NewDesc("outrigger_breaker_state", "State of a breaker: 0 closed, 1 half-open, 2 open.", []string{"destination_service", "destination_port", "policy", "mode"}, nil)
	limitCurrent = prometheus.NewDesc("outrigger_limit_current", "How much of a limit is in use.", []string{"destination_service", "destination_port", "limit"}, nil)
	limitMax     = prometheus.NewDesc("outrigger_limit_max", "The limit; absent where there is none.", []string{"destination_service", "destination_port", "limit"}, nil)
	endpoints    = prometheus.NewDesc("outrigger_endpoints", "Endpoints of a destination: healthy, unhealthy or ejected.", []string{"destination_service", "destination_port", "state"}, nil)
)

// Describe implements prometheus.Collector.
func (g Gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{breakerState, limitCurrent, limitMax, endpoints} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (g Gauges) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	for _, c := range g.Clusters.All() {
		namespace, name := telemetry.Service(c.Name)
		if namespace == "inbound" {
			continue // the application itself: no policy guards it
		}
		service := name + "." + namespace + ".svc"
		_, port, _ := strings.Cut(c.Name, ":") // each port of a Service is a cluster of its own
		gauge := func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{service, port}, labels...)...)
		}
		if b := c.Breaker(); b != nil {
			state, _ := b.State(now)
			mode := "Enforce"
			if b.Policy().Observe {
				mode = "Observe"
			}
			gauge(breakerState, float64(state), b.Policy().Name, mode)
		}
		use, limits := c.Usage(), c.Config().Limits
		for _, l := range []struct {
			name string
			now  int64
			max  uint32
		}{
			{"connections", use.Connections, limits.Connections},
			{"pending_requests", use.PendingRequests, limits.PendingRequests},
			{"requests", use.Requests, limits.Requests},
			{"retries", use.Retries, limits.Retries},
		} {
			gauge(limitCurrent, float64(l.now), l.name)
			if l.max > 0 {
				gauge(limitMax, float64(l.max), l.name)
			}
		}
		states := map[string]float64{"healthy": 0, "unhealthy": 0, "ejected": 0}
		for _, e := range c.Endpoints() {
			switch {
			case e.Ejected():
				states["ejected"]++
			case e.Healthy:
				states["healthy"]++
			default:
				states["unhealthy"]++
			}
		}
		for s, n := range states {
			gauge(endpoints, n, s)
		}
	}
}
