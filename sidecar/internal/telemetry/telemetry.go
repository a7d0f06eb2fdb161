// Package telemetry counts what the proxy does: Prometheus metrics with the
// label set that dashboards for meshes know, W3C trace context, and spans.
//
// It knows label names and their limits, not requests. Package proxy calls it:
// it resolves a Destination for each of its paths and tells it of every request,
// which costs no lock, no look-up by text and no allocation. Everything here is
// safe for concurrent use.
package telemetry

import (
	"strings"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// maxSeries bounds the series of one metric: what is beyond is counted with
// every label "overflow", so that totals stay right.
const maxSeries = 2000

// Metrics of one proxy.
type Metrics struct {
	node bootstrap.Config

	requests  *prometheus.CounterVec
	duration  *durations
	attempts  *prometheus.CounterVec
	rejected  *prometheus.CounterVec
	trips     *prometheus.CounterVec
	ejections *prometheus.CounterVec
	protocol  *prometheus.CounterVec

	tcpOpened, tcpClosed, tcpSent, tcpReceived *prometheus.CounterVec

	overflow atomic.Pointer[requestSeries] // of requests beyond maxSeries; nil until known has reached it

	mu           sync.Mutex
	destinations map[destinationKey]*Destination
	known        int             // series of requests
	beyond       [2]*Destination // inbound and outbound, beyond maxSeries destinations
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
	m := &Metrics{node: cfg, destinations: map[destinationKey]*Destination{}}
	m.requests = counter("outrigger_requests_total", "Requests that ended, by how.", append(requestLabels[:len(requestLabels):len(requestLabels)], "response_code", "response_flags", "grpc_response_status", "connection_security_policy")...)
	m.duration = newDurations("outrigger_request_duration_seconds", "Time from the first byte of a request to the last of its response.", append(requestLabels[:len(requestLabels):len(requestLabels)], "response_code"))
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
	for i := range m.beyond {
		m.beyond[i] = newDestination(m, i == 1, "overflow/overflow")
	}
	return m
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

func mode(observe bool) string {
	if observe {
		return "Observe"
	}
	return "Enforce"
}
