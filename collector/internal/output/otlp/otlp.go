// Package otlp is the output to whatever takes OpenTelemetry's logs: protobuf over
// HTTP, or gRPC.
//
// It knows how records become OTLP (resources by OpenTelemetry's semantic
// conventions) and what the answers of the protocol mean; the pipeline, which calls
// it, owns retries, batch sizes and the circuit breaker. The requests are written by
// hand, because the generated types cost an allocation for every value; the tests
// read them by the generated types.
//
// A receiver can take a request and reject some records of it (partial_success),
// without saying which. The protocol forbids to send them again, and nobody can put
// them in the dead letters: they count as acknowledged, are logged, and counted in
// outrigger_otlp_rejected_records_total.
//
// A receiver that refuses a request as bad (400, INVALID_ARGUMENT) gets it again in
// halves, until the record that it does not like is alone and is rejected.
//
// OTLP has no ids: a request that was repeated, because its answer was lost, is
// stored twice.
package otlp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	concurrency = 4

	// A receiver takes 4 MiB over gRPC, if nobody has changed that. These many lines of
	// these many bytes stay below with their usual attributes; what does not is halved.
	maxRecords = 4096
	maxBytes   = 1 << 20

	maxAnswer = 1 << 20 // bytes of a response that are read
	maxReason = 512     // bytes of another's words that are passed on
)

// Metrics of all outputs of the kind in a process.
type Metrics struct{ rejected *prometheus.CounterVec }

// NewMetrics registers the metrics.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	m := newMetrics()
	return m, reg.Register(m.rejected)
}

func newMetrics() *Metrics {
	return &Metrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "outrigger_otlp_rejected_records_total",
		Help: "Log records that an OTLP receiver rejected without naming them, in a request that it took. They count as acknowledged elsewhere.",
	}, []string{"endpoint"})}
}

// Output sends records to one receiver. It is safe for concurrent use.
type Output struct {
	cfg      Config
	log      *slog.Logger
	wire     wire
	rejected prometheus.Counter

	mu       sync.Mutex
	encoders []*encoder // idle ones, at most concurrency
}

// wire makes one call with a request, and returns the response's bytes.
type wire interface {
	export(ctx context.Context, header map[string]string, request []byte) ([]byte, error)
	close() error
}

// refusal is a failed call, sorted.
type refusal struct {
	err        error
	permanent  bool // whatever the batch
	tooLarge   bool
	bad        bool // the batch, not its size
	retryAfter time.Duration
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// New makes the output. It reads the certificates but does not connect; a receiver
// that is away is the first Write's matter. metrics can be nil.
func New(cfg Config, log *slog.Logger, metrics *Metrics) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	u, err := url.Parse(cfg.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("otlp: endpoint: %w", err)
	}
	if metrics == nil {
		metrics = newMetrics()
	}
	tlsConfig, err := cfg.files().Config("otlp")
	if err != nil {
		return nil, err
	}
	o := &Output{cfg: cfg, log: log, rejected: metrics.rejected.WithLabelValues(cfg.Endpoint)}
	if cfg.Protocol == "grpc" {
		o.wire, err = newGRPC(cfg, u, tlsConfig)
	} else {
		o.wire = newHTTP(cfg, u, tlsConfig)
	}
	if err != nil {
		return nil, err
	}
	return o, nil
}

// Kind returns "otlp".
func (*Output) Kind() string { return "otlp" }

// Traits are several Writes at a time: receivers order records by their times.
func (*Output) Traits() output.Traits {
	return output.Traits{Concurrency: concurrency, MaxRecords: maxRecords, MaxBytes: maxBytes}
}

// Close closes the connections.
func (o *Output) Close() error { return o.wire.close() }

// Write sends the batch as one request.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	e := o.encoder()
	defer o.done(e)
	request, sent, rejected := e.encode(batch)
	if len(sent) == 0 {
		return output.Result{Rejected: rejected}
	}
	header, err := o.cfg.header()
	if err != nil {
		return output.Result{Err: err, Permanent: true}
	}
	ctx, cancel := context.WithTimeout(ctx, o.cfg.Timeout)
	defer cancel()
	answer, err := o.wire.export(ctx, header, request)
	if err != nil {
		return o.failed(err, sent, rejected)
	}
	n, message, err := partial(answer)
	if err != nil {
		// The receiver has taken it; only what it says beside that is lost.
		o.log.Warn("cannot read the receiver's answer", "output.address", o.cfg.Endpoint, "error.message", err.Error())
	}
	if n > 0 {
		n = min(n, int64(len(sent)))
		o.rejected.Add(float64(n))
		o.log.Error("the receiver rejected records for good without naming them; they are lost there", "output.address", o.cfg.Endpoint, "event.rejected", n, "event.total", len(sent), "error.message", message)
	} else if message != "" {
		o.log.Warn("the receiver took the records and warns", "output.address", o.cfg.Endpoint, "error.message", message)
	}
	return output.Result{Rejected: rejected}
}

func (o *Output) failed(err error, sent []int, rejected []output.Rejection) output.Result {
	result := output.Result{Err: fmt.Errorf("otlp %s: %w", o.cfg.Endpoint, err)}
	var r *refusal
	if errors.As(err, &r) {
		if (r.bad || r.tooLarge) && len(sent) == 1 {
			return output.Result{Rejected: append(rejected, output.Rejection{Index: sent[0], Reason: shorten(err.Error())})}
		}
		result.Permanent, result.TooLarge, result.RetryAfter = r.permanent, r.tooLarge || r.bad, r.retryAfter
		return result
	}
	if remedy, permanent := tlsfiles.Explain(err); permanent {
		if remedy != "" {
			err = fmt.Errorf("%s: %w", remedy, err)
		}
		result.Err, result.Permanent = fmt.Errorf("otlp %s: %w", o.cfg.Endpoint, err), true
	}
	return result
}

func (o *Output) encoder() *encoder {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.encoders); n > 0 {
		e := o.encoders[n-1]
		o.encoders = o.encoders[:n-1]
		return e
	}
	return newEncoder()
}

func (o *Output) done(e *encoder) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.encoders) < concurrency {
		o.encoders = append(o.encoders, e)
	}
}

func shorten(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

var _ output.Output = (*Output)(nil)
