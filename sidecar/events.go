package main

import (
	"cmp"
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/reporter"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// events turns what the pure packages report into log records and counts.
type events struct {
	log     *slog.Logger
	access  *accesslog.Log
	metrics *telemetry.Metrics
	reports *reporter.Reporter // nil where nobody is told
}

// breaker writes one record a change of state, with the requests behind it, in
// the stream of the access log, so that whoever finds the one finds the other.
func (e *events) breaker(v breaker.Evidence) {
	e.metrics.Transition(v.Destination, v.Policy, v.To, v.Mode)
	if e.reports != nil {
		e.reports.Changed(v)
	}
	level, verb := "info", map[string]string{"open": "opened", "closed": "closed", "half-open": "probes"}[v.To]
	if v.To == "open" {
		level = "warn"
	}
	if v.Mode == "Observe" {
		verb = "would be " + v.To
	}
	line, err := json.Marshal(struct {
		Timestamp   string             `json:"@timestamp"`
		Level       string             `json:"log.level"`
		Message     string             `json:"message"`
		Dataset     string             `json:"event.dataset"`
		ID          string             `json:"outrigger.evidence.id"`
		Policy      string             `json:"outrigger.breaker.policy"`
		Mode        string             `json:"outrigger.breaker.mode"`
		From        string             `json:"outrigger.breaker.from"`
		State       string             `json:"outrigger.breaker.state"`
		Reason      string             `json:"outrigger.breaker.reason"`
		Destination string             `json:"outrigger.destination"`
		Requests    []breaker.Recorded `json:"outrigger.evidence.requests"`
	}{
		v.At.UTC().Format("2006-01-02T15:04:05.000000Z"), level,
		"circuit breaker " + v.Policy + " " + verb + " for " + v.Destination + ": " + v.Reason + " (outrigger why " + v.ID + ")",
		record.DatasetBreaker, v.ID, v.Policy, v.Mode, v.From, v.To, v.Reason, v.Destination, v.Requests,
	})
	if err != nil {
		e.log.Error("a breaker's evidence could not be written", "error.message", err.Error(), "outrigger.evidence.id", v.ID)
		return
	}
	e.access.WriteRaw(line)
}

func (e *events) ejection(cluster string, v outlier.Event) {
	e.metrics.Ejection(cluster, string(v.Cause)+":"+string(v.Action))
	e.log.Warn("endpoint "+v.Endpoint.String()+" of "+cluster+": "+string(v.Action)+": "+v.Reason,
		"event.dataset", "outrigger.ejection", "outrigger.destination", cluster, "destination.address", v.Endpoint.String(),
		"outrigger.ejection.action", string(v.Action), "outrigger.ejection.cause", string(v.Cause), "outrigger.ejection.observe", v.Observe)
}

// breakers are those of all clusters as the control plane is told of them.
func breakers(clusters *upstream.Clusters) func(now time.Time) []reporting.Breaker {
	return func(now time.Time) []reporting.Breaker {
		var out []reporting.Breaker
		for _, c := range clusters.All() {
			if b := c.Breaker(); b != nil {
				state, _ := b.State(now)
				out = append(out, reporting.Breaker{Policy: b.Policy().Name, Target: c.Name, State: reporting.State(state.String())})
			}
		}
		slices.SortFunc(out, func(a, b reporting.Breaker) int { return cmp.Compare(a.Target, b.Target) })
		return out
	}
}
