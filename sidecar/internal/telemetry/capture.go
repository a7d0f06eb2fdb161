package telemetry

import "github.com/prometheus/client_golang/prometheus"

// Capture counts what becomes of captured connections that no service of the mesh
// is behind, or that are not served at all.
type Capture struct {
	passthrough *prometheus.CounterVec
	refused     *prometheus.CounterVec
}

// NewCapture registers the metrics. destinations is how many captured addresses
// the control plane is being asked about.
func NewCapture(r prometheus.Registerer, destinations func() int) *Capture {
	m := &Capture{
		passthrough: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_passthrough_connections_total",
			Help: "Captured connections carried to their original destination as bytes; reason is no_service, no_answer (of the control plane in time) or limit (too many destinations are in use).",
		}, []string{"reason"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_capture_refused_total",
			Help: "Captured connections closed unserved; reason is loop, not_redirected, not_ours, limit, no_identity, not_configured (the control plane has not said what is asked of callers) or became_strict.",
		}, []string{"direction", "reason"}),
	}
	r.MustRegister(m.passthrough, m.refused, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "outrigger_captured_destinations",
		Help: "Captured addresses that the control plane is being asked about; those not used for a while are given up.",
	}, func() float64 { return float64(destinations()) }))
	return m
}

// Passthrough counts a connection to an original destination.
func (m *Capture) Passthrough(reason string) { m.passthrough.WithLabelValues(reason).Inc() }

// Refused counts a connection that was closed.
func (m *Capture) Refused(direction, reason string) {
	m.refused.WithLabelValues(direction, reason).Inc()
}
