package pipeline

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
)

// Metrics of all Pipelines of a process.
type Metrics struct {
	records, bytes, dropped, droppedBytes, retries, deadLetters, problems, ruled, parseFailed, redacted, warned *prometheus.CounterVec
	pending, inFlight, breaker, concurrency                                                                     *prometheus.GaugeVec
	fieldsLeft, checkpointErrors, damaged                                                                       prometheus.Counter
}

// NewMetrics registers the metrics.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	var errs []error
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		errs = append(errs, reg.Register(v))
		return v
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, []string{"output"})
		errs = append(errs, reg.Register(v))
		return v
	}
	single := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		errs = append(errs, reg.Register(c))
		return c
	}
	m := &Metrics{
		records:          counter("outrigger_log_records_total", "Log records settled, by what became of them: acknowledged by the backend, rejected by it, or dropped with a cause.", "output", "result"),
		bytes:            counter("outrigger_log_bytes_total", "Bytes of log files whose records the backend acknowledged.", "output"),
		dropped:          counter("outrigger_log_dropped_total", "Times that something was dropped, by cause: rejected and too_long count records, rotated_away and truncated count files.", "output", "cause"),
		droppedBytes:     counter("outrigger_log_dropped_bytes_total", "Bytes of log files that were dropped, by cause.", "output", "cause"),
		retries:          counter("outrigger_output_retries_total", "Attempts that sent something again.", "output"),
		deadLetters:      counter("outrigger_log_dead_letters_total", "Rejected records, by result: written to the dead letters, full (the file is at its limit) or failed (it could not be written).", "output", "result"),
		problems:         counter("outrigger_log_annotation_problems_total", "Annotations of pods that are not understood and left out.", "output"),
		ruled:            counter("outrigger_log_rule_drops_total", "Records that a rule, an annotation or a quota dropped or sent elsewhere.", "output", "rule"),
		parseFailed:      counter("outrigger_log_parse_failures_total", "Records that are not in the format that a rule or an annotation says. They are shipped whole.", "output"),
		redacted:         counter("outrigger_log_redacted_total", "Secrets that rules replaced in records.", "output"),
		warned:           counter("outrigger_log_quota_exceeded_total", "Records over a quota whose action is to warn. They are shipped.", "output", "quota"),
		concurrency:      gauge("outrigger_output_concurrency", "Attempts that may be under way at a time; fewer while the backend is busy or away."),
		pending:          gauge("outrigger_log_pending_bytes", "Bytes of log files that are written and neither acknowledged nor dropped."),
		inFlight:         gauge("outrigger_log_in_flight_records", "Records that were read and are not settled."),
		breaker:          gauge("outrigger_output_breaker_state", "State of the output's circuit breaker: 0 closed, 1 half-open, 2 open."),
		fieldsLeft:       single("outrigger_log_fields_left_total", "Fields of structured lines that were left in the body, because a limit was reached."),
		checkpointErrors: single("outrigger_log_checkpoint_errors_total", "Checkpoints that could not be saved."),
		damaged:          single("outrigger_log_checkpoint_damaged_total", "Checkpoints that were set aside because they were damaged."),
	}
	return m, errors.Join(errs...)
}

// init makes the series of an output exist before their first event, so that a
// rate over them is right from the start.
func (m *Metrics) init(output string) {
	for _, c := range []ledger.Cause{ledger.Acknowledged, ledger.Rejected} {
		m.records.WithLabelValues(output, c.String())
	}
	for _, c := range ledger.Drops() {
		m.dropped.WithLabelValues(output, c.String())
		m.droppedBytes.WithLabelValues(output, c.String())
	}
	for _, r := range []string{deadWritten, deadFull, deadFailed} {
		m.deadLetters.WithLabelValues(output, r)
	}
	m.bytes.WithLabelValues(output)
	m.retries.WithLabelValues(output)
	m.breaker.WithLabelValues(output)
}
