package otlp

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlplog/otlploghttp"
	"go.opentelemetry.io/otel/log"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/resource"
	collector "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	respb "go.opentelemetry.io/proto/otlp/resource/v1"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcgzip "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

// receiver is a running Receiver and the folder that it writes to.
type receiver struct {
	*Receiver
	addr, folder string
	pending      atomic.Int64
}

func start(t *testing.T, cfg Config) *receiver {
	t.Helper()
	r := &receiver{folder: t.TempDir()}
	logger := slog.New(slog.DiscardHandler)
	w, err := journal.Open(journal.Config{Folder: r.folder, Pending: r.pending.Load, Log: logger})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Journal, cfg.Log = w, logger
	if r.Receiver, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *receiver) records(t *testing.T) (out []*record.Record) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.folder, "0.log"))
	if err != nil {
		t.Fatal(err)
	}
	var d journal.Decoder
	for text := range bytes.Lines(b) {
		rec := new(record.Record)
		if err := d.Decode(text, rec); err != nil {
			t.Fatal(err)
		}
		out = append(out, rec)
	}
	return out
}

func str(s string) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: s}}
}

func kv(k string, v any) *common.KeyValue {
	out := &common.KeyValue{Key: k, Value: &common.AnyValue{}}
	switch v := v.(type) {
	case string:
		out.Value = str(v)
	case int:
		out.Value.Value = &common.AnyValue_IntValue{IntValue: int64(v)}
	case float64:
		out.Value.Value = &common.AnyValue_DoubleValue{DoubleValue: v}
	case bool:
		out.Value.Value = &common.AnyValue_BoolValue{BoolValue: v}
	case []byte:
		out.Value.Value = &common.AnyValue_BytesValue{BytesValue: v}
	case []*common.AnyValue:
		out.Value.Value = &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: v}}
	case []*common.KeyValue:
		out.Value.Value = &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: v}}
	default:
		panic(v)
	}
	return out
}

func request(records ...*logs.LogRecord) *collector.ExportLogsServiceRequest {
	return &collector.ExportLogsServiceRequest{ResourceLogs: []*logs.ResourceLogs{{
		Resource: &respb.Resource{Attributes: []*common.KeyValue{
			kv("service.name", "checkout"), kv("k8s.namespace.name", "shop"), kv("k8s.pod.name", "checkout-1"), kv("k8s.pod.uid", "uid"), kv("k8s.container.name", "app"),
			kv("k8s.container.restart_count", 2), kv("k8s.deployment.name", "checkout"), kv("k8s.replicaset.name", "checkout-abc"), kv("k8s.pod.label.app", "co"), kv("k8s.pod.start_time", "now"),
			kv("host.name", "h"), kv("container.image.name", "img"), kv("container.image.tags", []*common.AnyValue{str("v1")}), kv("deployment.environment.name", "prod"), kv("service.version", "7"),
		}},
		ScopeLogs: []*logs.ScopeLogs{{Scope: &common.InstrumentationScope{Name: "lib"}, LogRecords: records}},
	}}}
}

var traceID, spanID = []byte{0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c}, []byte{0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31}

var at = time.Date(2026, 11, 23, 19, 53, 0, 5, time.UTC)

func full() *logs.LogRecord {
	return &logs.LogRecord{
		TimeUnixNano: uint64(at.UnixNano()), SeverityNumber: 18, SeverityText: "ERR", Body: str("card declined"), TraceId: traceID, SpanId: spanID, EventName: "declined",
		Attributes: []*common.KeyValue{
			kv("http.response.status_code", 402), kv("exception.type", "Declined"), kv("log.iostream", "stderr"), kv("big", math.MaxInt64), kv("ok", true), kv("raw", []byte{1, 2}),
			kv("deep", []*common.KeyValue{kv("a", []*common.AnyValue{str("b"), nil})}), kv("nan", math.NaN()), kv("k8s.volume.name", "v"),
		},
	}
}

func wanted(now time.Time) *record.Record {
	return &record.Record{
		Time: at, Observed: now, Stream: "stderr", Body: "card declined", Level: "error", TraceID: "0af7651916cd43dd8448eb211c80319c", SpanID: "b7ad6b7169203331",
		Resource: &record.Resource{
			Cluster: "c", Node: "h", Namespace: "shop", Pod: "checkout-1", PodUID: "uid", Container: "app", Restart: 2, Service: "checkout", WorkloadKind: "Deployment", Workload: "checkout",
			Image: "img:v1", Labels: map[string]string{"app": "co"},
		},
		Attributes: map[string]any{
			"http.response.status_code": 402.0, "error.type": "Declined", "big": "9223372036854775807", "ok": true, "raw": "AQI=", "deep": map[string]any{"a": []any{"b", nil}}, "nan": "NaN",
			"kubernetes.volume.name": "v", "kubernetes.replicaset.name": "checkout-abc", "kubernetes.pod.start_time": "now", "service.environment": "prod", "service.version": "7", "log.logger": "lib", "event.action": "declined",
		},
	}
}

func (r *receiver) post(t *testing.T, body []byte, header map[string]string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+r.addr+Path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, b
}

func zip(t *testing.T, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	if _, err := z.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// inJSON is the request in OTLP's JSON: ids in hex.
func inJSON(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return []byte(strings.NewReplacer("CvdlGRbNQ92ESOshHIAxnA==", "0AF7651916CD43DD8448EB211C80319C", "t61rcWkgMzE=", "b7ad6b7169203331").Replace(string(b)))
}

func client(t *testing.T, addr string) collector.LogsServiceClient {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return collector.NewLogsServiceClient(conn)
}

// The same record in every way of writing it down.
func TestProtocols(t *testing.T) {
	now := time.Date(2026, 11, 23, 20, 0, 0, 0, time.UTC)
	req := request(full())
	for name, send := range map[string]func(*testing.T, *receiver){
		"protobuf": func(t *testing.T, r *receiver) {
			if resp, b := r.post(t, marshal(t, req), map[string]string{"Content-Type": "application/x-protobuf"}); resp.StatusCode != 200 || len(b) != 0 || resp.Header.Get("Content-Type") != "application/x-protobuf" {
				t.Errorf("%d %q", resp.StatusCode, b)
			}
		},
		"protobuf, gzip": func(t *testing.T, r *receiver) {
			if resp, b := r.post(t, zip(t, marshal(t, req)), map[string]string{"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip"}); resp.StatusCode != 200 {
				t.Errorf("%d %q", resp.StatusCode, b)
			}
		},
		"JSON": func(t *testing.T, r *receiver) {
			text := append([]byte(`{"unknownField":1,`), inJSON(t, req)[1:]...)
			if resp, b := r.post(t, text, map[string]string{"Content-Type": "application/json; charset=utf-8"}); resp.StatusCode != 200 || string(b) != "{}" {
				t.Errorf("%d %q", resp.StatusCode, b)
			}
		},
		"gRPC": func(t *testing.T, r *receiver) {
			if resp, err := client(t, r.addr).Export(t.Context(), req); err != nil || resp.GetPartialSuccess() != nil {
				t.Errorf("%v %v", resp, err)
			}
		},
		"gRPC, gzip": func(t *testing.T, r *receiver) {
			if _, err := client(t, r.addr).Export(t.Context(), req, grpc.UseCompressor(grpcgzip.Name)); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := start(t, Config{Cluster: "c", Node: "n", Now: func() time.Time { return now }})
			send(t, r)
			if d := cmp.Diff([]*record.Record{wanted(now)}, r.records(t)); d != "" {
				t.Error(d)
			}
		})
	}
}

// OpenTelemetry's own SDK, with its exporter and its retries.
func TestSDK(t *testing.T) {
	r := start(t, Config{})
	exporter, err := otlploghttp.New(t.Context(), otlploghttp.WithEndpoint(r.addr), otlploghttp.WithInsecure(), otlploghttp.WithCompression(otlploghttp.GzipCompression),
		otlploghttp.WithRetry(otlploghttp.RetryConfig{Enabled: true, InitialInterval: 10 * time.Millisecond, MaxInterval: 50 * time.Millisecond, MaxElapsedTime: time.Minute}))
	if err != nil {
		t.Fatal(err)
	}
	provider := sdklog.NewLoggerProvider(sdklog.WithProcessor(sdklog.NewBatchProcessor(exporter)), sdklog.WithResource(resource.NewSchemaless(attribute.String("service.name", "sdk"))))
	logger := provider.Logger("scope")
	r.pending.Store(1 << 40) // the first attempt is told to come back
	var rec log.Record
	rec.SetBody(attribute.StringValue("from the SDK"))
	rec.SetSeverity(log.SeverityWarn)
	rec.AddAttributes(attribute.Int("n", 3))
	logger.Emit(t.Context(), rec)
	flushed := make(chan error, 1)
	go func() { flushed <- provider.ForceFlush(context.Background()) }()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if n := counted(t, r, "http", "429"); n > 0 {
			break
		} else if time.Now().After(end) {
			t.Fatal("no attempt was refused")
		}
	}
	r.pending.Store(0)
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	if err := provider.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := r.records(t)
	if len(got) != 1 || got[0].Body != "from the SDK" || got[0].Level != "warn" || got[0].Resource.Service != "sdk" || got[0].Attributes["n"] != 3.0 || got[0].Attributes["log.logger"] != "scope" {
		t.Errorf("%+v", got)
	}
}

// While the outputs are behind senders are told to come back, in the words of
// their protocol; nothing is taken.
func TestFull(t *testing.T) {
	r := start(t, Config{})
	r.pending.Store(1 << 40)
	resp, b := r.post(t, marshal(t, request(full())), map[string]string{"Content-Type": "application/x-protobuf"})
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") != "5" {
		t.Errorf("%d %q", resp.StatusCode, resp.Header)
	}
	_, err := client(t, r.addr).Export(t.Context(), request(full()))
	s, _ := status.FromError(err)
	if s.Code() != codes.ResourceExhausted || !strings.Contains(s.Message(), "bytes wait for the outputs") || len(s.Details()) != 1 {
		t.Fatalf("%v %v", err, s.Details())
	}
	if info, ok := s.Details()[0].(*errdetails.RetryInfo); !ok || info.GetRetryDelay().AsDuration() != 5*time.Second {
		t.Errorf("%v", s.Details())
	}
	body := s.Proto().ProtoReflect().New().Interface()
	if err := proto.Unmarshal(b, body); err != nil || !proto.Equal(body, s.Proto()) {
		t.Errorf("HTTP says %v, gRPC %v", body, s.Proto())
	}
	resp, b = r.post(t, inJSON(t, request(full())), map[string]string{"Content-Type": "application/json"})
	if resp.StatusCode != 429 || !json.Valid(b) {
		t.Errorf("%d %s", resp.StatusCode, b)
	}
	if got := r.records(t); len(got) != 0 {
		t.Errorf("%d records taken", len(got))
	}
}

// A record that cannot be represented is refused alone.
func TestPartialSuccess(t *testing.T) {
	r := start(t, Config{})
	deep := str("x")
	for range 40 {
		deep = &common.AnyValue{Value: &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: []*common.AnyValue{deep}}}}
	}
	req := request(full(), &logs.LogRecord{TimeUnixNano: math.MaxUint64, Body: str("when?")}, &logs.LogRecord{Body: deep}, full())
	for range 2 {
		resp, err := client(t, r.addr).Export(t.Context(), req)
		if err != nil || resp.GetPartialSuccess().GetRejectedLogRecords() != 2 || !strings.Contains(resp.GetPartialSuccess().GetErrorMessage(), "2262") {
			t.Errorf("%v %v", resp, err)
		}
	}
	_, b := r.post(t, inJSON(t, req), map[string]string{"Content-Type": "application/json"})
	var out collector.ExportLogsServiceResponse
	if err := protojson.Unmarshal(b, &out); err != nil || out.GetPartialSuccess().GetRejectedLogRecords() != 2 {
		t.Errorf("%s %v", b, err)
	}
	if got := r.records(t); len(got) != 6 {
		t.Errorf("%d records", len(got))
	}
}

func counted(t *testing.T, r *receiver, protocol, code string) float64 {
	t.Helper()
	return testutil.ToFloat64(r.requests.WithLabelValues(protocol, code))
}

// What is no request is refused with the reason, and costs bounded memory.
func TestBadRequests(t *testing.T) {
	r := start(t, Config{MaxRequest: 10_000})
	good := marshal(t, request(full()))
	large := marshal(t, request(&logs.LogRecord{Body: str(strings.Repeat("x", 20_000))}))
	const kind = "application/x-protobuf"
	for name, c := range map[string]struct {
		body   []byte
		header map[string]string
		want   int
	}{
		"no type":          {good, map[string]string{}, 415},
		"other type":       {good, map[string]string{"Content-Type": "text/plain"}, 415},
		"other encoding":   {good, map[string]string{"Content-Type": kind, "Content-Encoding": "br"}, 415},
		"no protobuf":      {[]byte("hello"), map[string]string{"Content-Type": kind}, 400},
		"no gzip":          {good, map[string]string{"Content-Type": kind, "Content-Encoding": "gzip"}, 400},
		"cut gzip":         {zip(t, good)[:50], map[string]string{"Content-Type": kind, "Content-Encoding": "gzip"}, 400},
		"large":            {large, map[string]string{"Content-Type": kind}, 413},
		"bomb":             {zip(t, bytes.Repeat([]byte{0}, 10<<20)), map[string]string{"Content-Type": kind, "Content-Encoding": "gzip"}, 413},
		"no JSON":          {[]byte("{"), map[string]string{"Content-Type": "application/json"}, 400},
		"bad id":           {[]byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":"abcd"}]}]}]}`), map[string]string{"Content-Type": "application/json"}, 400},
		"gRPC over HTTP/1": {good, map[string]string{"Content-Type": "application/grpc"}, 505},
		"empty":            {nil, map[string]string{"Content-Type": kind}, 200},
	} {
		if resp, b := r.post(t, c.body, c.header); resp.StatusCode != c.want {
			t.Errorf("%s: %d %q, want %d", name, resp.StatusCode, b, c.want)
		}
	}
	c := client(t, r.addr)
	_, err := c.Export(t.Context(), request(&logs.LogRecord{Body: str(strings.Repeat("x", 20_000))}))
	if s, _ := status.FromError(err); s.Code() != codes.ResourceExhausted || len(s.Details()) != 0 {
		t.Errorf("large: %v", err) // without RetryInfo: for good
	}
	conn, err := grpc.NewClient(r.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	err = conn.Invoke(t.Context(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export", request(), &collector.ExportLogsServiceResponse{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("traces: %v", err)
	}
	resp, err := http.Get("http://" + r.addr + Path)
	if err != nil {
		t.Fatal(err)
	}
	if _ = resp.Body.Close(); resp.StatusCode != 405 {
		t.Errorf("GET: %d", resp.StatusCode)
	}
	if got := r.records(t); len(got) != 0 {
		t.Errorf("%d records", len(got))
	}
}

func TestValues(t *testing.T) {
	for want, body := range map[string]*common.AnyValue{
		"text":            str("text"),
		"":                nil,
		"5":               kv("", 5).GetValue(),
		"true":            kv("", true).GetValue(),
		`{"a":["<b>",1]}`: kv("", []*common.KeyValue{kv("a", []*common.AnyValue{str("<b>"), kv("", 1).GetValue()})}).GetValue(),
	} {
		rec, err := convert(&logs.LogRecord{Body: body, TraceId: make([]byte, 16), SpanId: []byte{1}}, nil, nil, at)
		if err != nil || rec.Body != want || rec.TraceID != "" || rec.SpanID != "" || !rec.Time.Equal(at) {
			t.Errorf("%+v %v, want %q", rec, err, want)
		}
	}
	for text, want := range map[string]string{"": "", "WARNING": "warn", "Notice": "info", "crit": "fatal", " custom ": "custom"} {
		if got := level(&logs.LogRecord{SeverityText: text}); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
	for n, want := range map[int32]string{1: "trace", 4: "trace", 5: "debug", 9: "info", 13: "warn", 17: "error", 24: "fatal", 25: "x"} {
		if got := level(&logs.LogRecord{SeverityNumber: logs.SeverityNumber(n), SeverityText: "x"}); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
}

func FuzzRequest(f *testing.F) {
	b, err := proto.Marshal(request(full()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false)
	f.Add([]byte(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"traceId":"0AF7651916CD43DD8448EB211C80319C","body":{"kvlistValue":{"values":[{"key":"a"}]}}}]}]}]}`), true)
	r := &Receiver{}
	f.Fuzz(func(t *testing.T, b []byte, asJSON bool) {
		var d logs.LogsData
		if asJSON {
			if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &d) != nil || ids(&d) != nil {
				return
			}
		} else if proto.Unmarshal(b, &d) != nil {
			return
		}
		n := 0
		for _, rl := range d.GetResourceLogs() {
			for _, sl := range rl.GetScopeLogs() {
				n += len(sl.GetLogRecords())
			}
		}
		out, rejected, reason := r.records(&d, at)
		if len(out)+int(rejected) != n || (rejected > 0) != (reason != "") {
			t.Errorf("%d and %d of %d: %q", len(out), rejected, n, reason)
		}
		for _, rec := range out {
			if rec.Resource == nil || rec.Time.IsZero() {
				t.Errorf("%+v", rec)
			}
			if _, err := json.Marshal(rec.TraceID + rec.SpanID); err != nil {
				t.Error(err)
			}
		}
	})
}

func BenchmarkTake(b *testing.B) {
	w, err := journal.Open(journal.Config{Folder: b.TempDir(), Pending: func() int64 { return 0 }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	r, err := New(Config{Journal: w})
	if err != nil {
		b.Fatal(err)
	}
	var records []*logs.LogRecord
	for i := range 512 {
		l := full()
		l.Body = str(fmt.Sprint("card declined ", i))
		records = append(records, l)
	}
	body, err := proto.Marshal(request(records...))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(body)))
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if a := r.take(context.Background(), func() ([]byte, error) { return body, nil }, false); a.status != 200 {
				b.Error(a)
			}
		}
	})
}
