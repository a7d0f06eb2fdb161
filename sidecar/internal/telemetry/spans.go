package telemetry

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Spans exports one span a request over OTLP/HTTP. A nil *Spans exports none.
type Spans struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
	ratio    float64
}

// spanQueue is how many ended spans may wait for the exporter; the SDK drops
// what is beyond it.
const spanQueue = 2048

// NewSpans exports to an OTLP/HTTP endpoint such as http://127.0.0.1:4318.
// Sampling is parent-based: the share ratio decides only for traces that begin
// here.
func NewSpans(ctx context.Context, endpoint string, ratio float64, cfg bootstrap.Config) (*Spans, error) {
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(endpoint))
	if err != nil {
		return nil, err
	}
	return newSpans(exporter, ratio, cfg), nil
}

func newSpans(exporter sdktrace.SpanExporter, ratio float64, cfg bootstrap.Config) *Spans {
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(spanQueue)),
		sdktrace.WithIDGenerator(chosenIDs{}),
		sdktrace.WithSampler(sdktrace.AlwaysSample()), // asked only for requests whose context is sampled
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", cfg.Workload),
			attribute.String("service.namespace", cfg.Namespace),
			attribute.String("service.instance.id", cfg.Instance),
		)),
	)
	return &Spans{provider: provider, tracer: provider.Tracer("github.com/outrigger-mesh/outrigger/sidecar"), ratio: ratio}
}

// Sample decides for a trace that begins here; draw is uniform in [0, 1).
func (s *Spans) Sample(draw float64) bool { return s != nil && draw < s.ratio }

// Shutdown exports what is queued, as long as ctx allows.
func (s *Spans) Shutdown(ctx context.Context) error {
	if s == nil {
		return nil
	}
	return s.provider.Shutdown(ctx)
}

// Span is a request as its span shows it (OpenTelemetry's HTTP conventions).
type Span struct {
	Context     *TraceContext
	Outbound    bool
	Method      string
	Path        string
	Status      int
	Flags       string
	Destination string
	Upstream    string
	Attempts    int
	Start, End  time.Time
}

// Record exports a request that has ended, if its trace is sampled.
func (s *Spans) Record(v Span) {
	if s == nil || !v.Context.Sampled {
		return
	}
	traceID, err1 := trace.TraceIDFromHex(string(v.Context.TraceID[:]))
	spanID, err2 := trace.SpanIDFromHex(string(v.Context.SpanID[:]))
	if err1 != nil || err2 != nil {
		return
	}
	ctx := context.WithValue(context.Background(), idsKey{}, ids{traceID, spanID})
	if v.Context.Joined {
		if parent, err := trace.SpanIDFromHex(string(v.Context.ParentID[:])); err == nil {
			ctx = trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
				TraceID: traceID, SpanID: parent, TraceFlags: trace.FlagsSampled, Remote: true,
			}))
		}
	}
	kind := trace.SpanKindServer
	if v.Outbound {
		kind = trace.SpanKindClient
	}
	_, span := s.tracer.Start(ctx, v.Method+" "+v.Destination, trace.WithSpanKind(kind), trace.WithTimestamp(v.Start), trace.WithAttributes(
		attribute.String("http.request.method", v.Method),
		attribute.String("url.path", v.Path),
		attribute.Int("http.response.status_code", v.Status),
		attribute.String("outrigger.response_flags", v.Flags),
		attribute.String("outrigger.destination", v.Destination),
		attribute.String("server.address", v.Upstream),
		attribute.Int("outrigger.attempts", v.Attempts),
	))
	if v.Status >= 500 || v.Status == 0 {
		span.SetStatus(codes.Error, v.Flags)
	}
	span.End(trace.WithTimestamp(v.End))
}

type idsKey struct{}

type ids struct {
	trace trace.TraceID
	span  trace.SpanID
}

// chosenIDs hands the SDK the ids that went out in the traceparent header
// before the span was made.
type chosenIDs struct{}

func (chosenIDs) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	v, _ := ctx.Value(idsKey{}).(ids)
	return v.trace, v.span
}

func (chosenIDs) NewSpanID(ctx context.Context, _ trace.TraceID) trace.SpanID {
	v, _ := ctx.Value(idsKey{}).(ids)
	return v.span
}
