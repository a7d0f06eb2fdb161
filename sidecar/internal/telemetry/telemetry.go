// Package telemetry counts what the proxy does: Prometheus metrics with the
// label set that dashboards for meshes know, W3C trace context, and spans.
//
// It knows label names and their limits, not requests. Series are looked up
// once for each combination of labels and then kept, so that a request costs a
// map look-up by value and no string building. Everything here is safe for
// concurrent use.
package telemetry

import (
	"maps"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// maxSeries bounds the series of one metric: what is beyond is counted with
// every label "overflow", so that totals stay right.
const maxSeries = 2000

// Metrics of one proxy.
type Metrics struct {
	node bootstrap.Config

	requests  *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	attempts  *prometheus.CounterVec
	rejected  *prometheus.CounterVec
	trips     *prometheus.CounterVec
	ejections *prometheus.CounterVec
	protocol  *prometheus.CounterVec

	tcpOpened, tcpClosed, tcpSent, tcpReceived *prometheus.CounterVec

	series    cache[Request, *requestSeries]
	attempted cache[attempt, prometheus.Counter]
}

// cache keeps what was looked up once. Reading it costs no lock and no
// allocation; it is copied for every new entry, which the bound on series
// affords.
type cache[K comparable, V any] struct {
	mu sync.Mutex
	m  atomic.Pointer[map[K]V]
}

// get returns the value of k. What is new is looked up, given how many are kept
// already, and kept if keep says so.
func (c *cache[K, V]) get(k K, lookUp func(k K, known int) (v V, keep bool)) V {
	if m := c.m.Load(); m != nil {
		if v, ok := (*m)[k]; ok {
			return v
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var old map[K]V
	if m := c.m.Load(); m != nil {
		old = *m
	}
	if v, ok := old[k]; ok {
		return v
	}
	v, keep := lookUp(k, len(old))
	if keep {
		next := make(map[K]V, len(old)+1)
		maps.Copy(next, old)
		next[k] = v
		c.m.Store(&next)
	}
	return v
}

var requestLabels = []string{
	"reporter", "source_workload", "source_workload_namespace",
	"destination_service", "destination_service_name", "destination_service_namespace",
	"request_protocol",
}

// NewMetrics registers the metrics of the proxy that cfg describes.
func NewMetrics(r prometheus.Registerer, cfg bootstrap.Config) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		r.MustRegister(c)
		return c
	}
	m := &Metrics{node: cfg}
	m.requests = counter("outrigger_requests_total", "Requests that ended, by how.", append(requestLabels[:len(requestLabels):len(requestLabels)], "response_code", "response_flags")...)
	m.duration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "outrigger_request_duration_seconds", Help: "Time from the first byte of a request to the last of its response.",
		Buckets:                     []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
	}, append(requestLabels[:len(requestLabels):len(requestLabels)], "response_code"))
	r.MustRegister(m.duration)
	m.attempts = counter("outrigger_request_attempts_total", "Attempts at upstreams; kind is original or retry.", "destination_service", "kind")
	m.rejected = counter("outrigger_breaker_rejected_total", "Requests that a breaker or limit rejected (mode Enforce) or would have rejected (mode Observe).", "destination_service", "policy", "cause", "mode")
	m.trips = counter("outrigger_breaker_transitions_total", "Changes of a breaker's state.", "destination_service", "policy", "to", "mode")
	m.ejections = counter("outrigger_endpoint_ejections_total", "Ejections of endpoints by outlier detection.", "destination_service", "cause")
	m.protocol = counter("outrigger_protocol_errors_total", "Messages refused by the codec, by reason.", "side", "reason")
	tcp := []string{"reporter", "source_workload", "destination_service"}
	m.tcpOpened = counter("outrigger_tcp_connections_opened_total", "TCP connections opened.", tcp...)
	m.tcpClosed = counter("outrigger_tcp_connections_closed_total", "TCP connections closed.", tcp...)
	m.tcpSent = counter("outrigger_tcp_sent_bytes_total", "Bytes sent to callers over TCP.", tcp...)
	m.tcpReceived = counter("outrigger_tcp_received_bytes_total", "Bytes received from callers over TCP.", tcp...)
	return m
}

// Request is what the series of a request differ in. Destination is
// <namespace>/<service>:<port>.
type Request struct {
	Outbound    bool
	Destination string
	Protocol    string
	Status      int
	Flags       accesslog.Flags
}

type requestSeries struct {
	total    prometheus.Counter
	duration prometheus.Observer
}

// Observe counts a request that took d.
func (m *Metrics) Observe(k Request, d time.Duration) {
	s := m.series.get(k, m.request)
	s.total.Inc()
	s.duration.Observe(d.Seconds())
}

func (m *Metrics) request(k Request, known int) (*requestSeries, bool) {
	labels := []string{"destination", "unknown", "unknown"}
	if k.Outbound {
		labels = []string{"source", m.node.Workload, m.node.Namespace}
	}
	namespace, service := Service(k.Destination)
	labels = append(labels, service+"."+namespace+".svc", service, namespace, k.Protocol)
	code, flags := strconv.Itoa(k.Status), k.Flags.String()
	if known >= maxSeries {
		for i := range labels {
			labels[i] = "overflow"
		}
		code, flags = "overflow", "overflow"
		return &requestSeries{m.requests.WithLabelValues(append(labels, code, flags)...), m.duration.WithLabelValues(append(labels, code)...)}, false
	}
	return &requestSeries{
		total:    m.requests.WithLabelValues(append(labels[:len(labels):len(labels)], code, flags)...),
		duration: m.duration.WithLabelValues(append(labels[:len(labels):len(labels)], code)...),
	}, true
}

// Service splits <namespace>/<service>:<port> as labels want it.
func Service(key string) (namespace, service string) {
	namespace, rest, ok := strings.Cut(key, "/")
	if !ok {
		return "unknown", "unknown"
	}
	service, _, _ = strings.Cut(rest, ":")
	return namespace, service
}

func serviceLabel(key string) string {
	namespace, service := Service(key)
	return service + "." + namespace + ".svc"
}

// Attempt counts an attempt; retry tells the second and later ones.
func (m *Metrics) Attempt(destination string, retry bool) {
	m.attempted.get(attempt{destination, retry}, m.attempt).Inc()
}

type attempt struct {
	destination string
	retry       bool
}

func (m *Metrics) attempt(k attempt, known int) (prometheus.Counter, bool) {
	kind := "original"
	if k.retry {
		kind = "retry"
	}
	return m.attempts.WithLabelValues(serviceLabel(k.destination), kind), known < maxSeries
}

// Rejected counts what a breaker or limit rejected, or would have. Cause is
// breaker, requests, connections, pending_requests or retries.
func (m *Metrics) Rejected(destination, policy, cause string, observe bool) {
	m.rejected.WithLabelValues(serviceLabel(destination), policy, cause, mode(observe)).Inc()
}

// Transition counts a change of a breaker's state.
func (m *Metrics) Transition(destination, policy, to, mode string) {
	m.trips.WithLabelValues(serviceLabel(destination), policy, to, mode).Inc()
}

// Ejection counts an ejected endpoint.
func (m *Metrics) Ejection(destination, cause string) {
	m.ejections.WithLabelValues(serviceLabel(destination), cause).Inc()
}

// ProtocolError counts a message that the codec refused; side is downstream or
// upstream.
func (m *Metrics) ProtocolError(side, reason string) {
	m.protocol.WithLabelValues(side, reason).Inc()
}

// TCPOpened counts a relayed connection.
func (m *Metrics) TCPOpened(outbound bool, destination string) {
	m.tcpOpened.WithLabelValues(m.tcpLabels(outbound, destination)...).Inc()
}

// TCPClosed counts its end and the bytes that it carried.
func (m *Metrics) TCPClosed(outbound bool, destination string, received, sent int64) {
	l := m.tcpLabels(outbound, destination)
	m.tcpClosed.WithLabelValues(l...).Inc()
	m.tcpReceived.WithLabelValues(l...).Add(float64(received))
	m.tcpSent.WithLabelValues(l...).Add(float64(sent))
}

func (m *Metrics) tcpLabels(outbound bool, destination string) []string {
	if outbound {
		return []string{"source", m.node.Workload, serviceLabel(destination)}
	}
	return []string{"destination", "unknown", serviceLabel(destination)}
}

func mode(observe bool) string {
	if observe {
		return "Observe"
	}
	return "Enforce"
}
