package otlp

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var payments = &record.Resource{
	Cluster: "prod", Node: "node-17", Namespace: "shop", Pod: "payments-0", PodUID: "u-1", PodIP: "10.0.0.1", Container: "app", Restart: 2, Service: "payments",
	Labels: map[string]string{"app.kubernetes.io/name": "payments"}, WorkloadKind: "StatefulSet", Workload: "payments", ContainerID: "abc", Image: "reg:5000/pay:v1@sha256:00",
}

func batch(n int) []*record.Record {
	var out []*record.Record
	for i := range n {
		at := time.Date(2026, 11, 23, 3, 0, 0, 5+i, time.UTC)
		out = append(out, &record.Record{
			Time: at, Observed: at.Add(time.Second), Body: fmt.Sprint("line ", i), Stream: "stderr", Level: "warn", Resource: payments,
			TraceID: "4bf92f3577b34da6a3ce929d0e0e4736", SpanID: "00f067aa0ba902b7", Origin: record.Origin{File: "f", Path: "/p", Offset: int64(i * 10)},
		})
	}
	return out
}

func text(s string) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: s}}
}

func integer(n int64) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: n}}
}

func list(v ...*common.AnyValue) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_ArrayValue{ArrayValue: &common.ArrayValue{Values: v}}}
}

func pair(name string, v *common.AnyValue) *common.KeyValue {
	return &common.KeyValue{Key: name, Value: v}
}

// byKey makes the order of attributes, which a map gave, of no account.
var byKey = protocmp.SortRepeated(func(a, b *common.KeyValue) bool { return a.GetKey() < b.GetKey() })

func decode(t *testing.T, data []byte) *collogs.ExportLogsServiceRequest {
	t.Helper()
	var req collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(data, &req); err != nil {
		t.Fatal(err)
	}
	return &req
}

// What the generated types read is what the record says.
func TestEncode(t *testing.T) {
	records := batch(3)
	records[1].Resource = &record.Resource{Pod: "other"}
	records[1].Level, records[1].TraceID, records[1].SpanID, records[1].Stream = "", "not an id", strings.Repeat("0", 16), ""
	records[1].Time, records[1].Observed, records[1].Origin, records[1].TruncatedBytes = time.Time{}, time.Time{}, record.Origin{}, 300
	records[1].Body = "\xffx"
	records[2].Attributes = map[string]any{
		"a.b": "x", "n": 1.5, "ok": true, "no": false, "none": nil, "bad": "\xff", "list": []any{"a", 2.0, []any{}, map[string]any{}},
		"map": map[string]any{"x": "größe", "deep": map[string]any{"y": []any{nil, false}}}, "log.level": "WARN", "log.iostream": "mine", "i": 7,
	}
	request, sent, rejected := newEncoder().encode(records)
	if len(rejected) > 0 || !cmp.Equal(sent, []int{0, 2, 1}) {
		t.Errorf("sent %v, rejected %v", sent, rejected)
	}
	id, _ := hex.DecodeString("4bf92f3577b34da6a3ce929d0e0e4736")
	span, _ := hex.DecodeString("00f067aa0ba902b7")
	boolean := func(b bool) *common.AnyValue {
		return &common.AnyValue{Value: &common.AnyValue_BoolValue{BoolValue: b}}
	}
	double := func(n float64) *common.AnyValue {
		return &common.AnyValue{Value: &common.AnyValue_DoubleValue{DoubleValue: n}}
	}
	pairs := func(kv ...*common.KeyValue) *common.AnyValue {
		return &common.AnyValue{Value: &common.AnyValue_KvlistValue{KvlistValue: &common.KeyValueList{Values: kv}}}
	}
	line := func(i int) *logs.LogRecord {
		at := uint64(records[0].Time.UnixNano()) + uint64(i)
		return &logs.LogRecord{
			TimeUnixNano: at, ObservedTimeUnixNano: at + 1e9, SeverityNumber: logs.SeverityNumber_SEVERITY_NUMBER_WARN, SeverityText: "warn",
			Body: text(fmt.Sprint("line ", i)), TraceId: id, SpanId: span,
			Attributes: []*common.KeyValue{pair("log.iostream", text("stderr")), pair("log.file.path", text("/p"))},
		}
	}
	structured := line(2)
	structured.Attributes = append(structured.Attributes,
		pair("a.b", text("x")), pair("n", double(1.5)), pair("ok", boolean(true)), pair("no", boolean(false)), pair("none", &common.AnyValue{}), pair("bad", text("\uFFFD")),
		pair("list", list(text("a"), double(2), list(), pairs())), pair("i", integer(7)),
		pair("map", pairs(pair("x", text("größe")), pair("deep", pairs(pair("y", list(&common.AnyValue{}, boolean(false))))))))
	outrigger := &common.InstrumentationScope{Name: "outrigger"}
	want := &collogs.ExportLogsServiceRequest{ResourceLogs: []*logs.ResourceLogs{
		{ScopeLogs: []*logs.ScopeLogs{{Scope: outrigger, LogRecords: []*logs.LogRecord{line(0), structured}}}},
		{ScopeLogs: []*logs.ScopeLogs{{Scope: outrigger, LogRecords: []*logs.LogRecord{{
			Body: text("\uFFFDx"), Attributes: []*common.KeyValue{pair("trace.id", text("not an id")), pair("span.id", text(strings.Repeat("0", 16))), pair("log.truncated_bytes", integer(300))},
		}}}}},
	}}
	got := decode(t, request)
	resources := [][]*common.KeyValue{}
	for _, r := range got.GetResourceLogs() {
		resources = append(resources, r.GetResource().GetAttributes())
		r.Resource = nil
	}
	if diff := cmp.Diff(want, got, protocmp.Transform(), byKey); diff != "" {
		t.Error(diff)
	}
	wantResources := [][]*common.KeyValue{{
		pair("service.name", text("payments")), pair("k8s.cluster.name", text("prod")), pair("k8s.node.name", text("node-17")), pair("host.name", text("node-17")),
		pair("k8s.namespace.name", text("shop")), pair("k8s.pod.name", text("payments-0")), pair("k8s.pod.uid", text("u-1")), pair("k8s.pod.ip", text("10.0.0.1")),
		pair("k8s.container.name", text("app")), pair("k8s.container.restart_count", integer(2)), pair("container.id", text("abc")),
		pair("container.image.name", text("reg:5000/pay")), pair("container.image.tags", list(text("v1"))), pair("container.image.repo_digests", list(text("reg:5000/pay@sha256:00"))),
		pair("k8s.statefulset.name", text("payments")), pair("k8s.pod.label.app.kubernetes.io/name", text("payments")),
	}, {pair("k8s.pod.name", text("other"))}}
	if diff := cmp.Diff(wantResources, resources, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

// A service that the program names is a resource of its own.
func TestServiceOfTheRecord(t *testing.T) {
	records := batch(4)
	records[1].Service = "checkout"
	records[2].Attributes = map[string]any{"service.name": "cart"}
	records[3].Attributes = map[string]any{"service.name": 7.0}
	e := newEncoder()
	for range 2 { // the second from the cache
		request, _, _ := e.encode(records)
		var got []string
		for _, r := range decode(t, request).GetResourceLogs() {
			got = append(got, fmt.Sprint(r.GetResource().GetAttributes()[0].GetValue().GetStringValue(), len(r.GetScopeLogs()[0].GetLogRecords())))
		}
		if diff := cmp.Diff([]string{"payments2", "checkout1", "cart1"}, got); diff != "" {
			t.Error(diff)
		}
	}
	for range maxFragments + 10 {
		r := batch(1)
		r[0].Resource = &record.Resource{}
		e.encode(r)
	}
	if len(e.fragments) > maxFragments {
		t.Errorf("%d fragments", len(e.fragments))
	}
}

// receiver is the generated server of the protocol, over both of its wires.
type receiver struct {
	collogs.UnimplementedLogsServiceServer

	mu       sync.Mutex
	requests []*collogs.ExportLogsServiceRequest
	headers  []string // x-token
	encoding []string
	answer   func(n int, req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error)
}

func (r *receiver) Export(ctx context.Context, req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	return r.take(req, strings.Join(md.Get("x-token"), ","), strings.Join(md.Get("grpc-encoding"), ","))
}

func (r *receiver) take(req *collogs.ExportLogsServiceRequest, token, encoding string) (*collogs.ExportLogsServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.requests)
	r.requests = append(r.requests, req)
	r.headers = append(r.headers, token)
	r.encoding = append(r.encoding, encoding)
	if r.answer != nil {
		return r.answer(n, req)
	}
	return &collogs.ExportLogsServiceResponse{}, nil
}

// ServeHTTP is OTLP over HTTP; an error of the answer is a status of HTTP.
func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body := io.Reader(req.Body)
	if req.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusTeapot)
			return
		}
		body = z
	}
	data, err := io.ReadAll(body)
	if err != nil || req.Method != http.MethodPost || req.URL.Path != "/v1/logs" || req.Header.Get("Content-Type") != protobuf {
		http.Error(w, fmt.Sprint(req.Method, req.URL, req.Header, err), http.StatusTeapot)
		return
	}
	var m collogs.ExportLogsServiceRequest
	if err := proto.Unmarshal(data, &m); err != nil {
		http.Error(w, err.Error(), http.StatusTeapot)
		return
	}
	resp, err := r.take(&m, req.Header.Get("X-Token"), req.Header.Get("Content-Encoding"))
	w.Header().Set("Content-Type", protobuf)
	if err != nil {
		s := status.Convert(err)
		for _, d := range s.Details() {
			if info, ok := d.(*errdetails.RetryInfo); ok {
				w.Header().Set("Retry-After", fmt.Sprint(int(info.GetRetryDelay().AsDuration().Seconds())))
			}
		}
		w.WriteHeader(int(s.Code()))
		data, _ = proto.Marshal(&spb.Status{Message: s.Message()})
	} else {
		data, _ = proto.Marshal(resp)
	}
	_, _ = w.Write(data)
}

func (r *receiver) lines() (out []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, req := range r.requests {
		for _, rl := range req.GetResourceLogs() {
			for _, l := range rl.GetScopeLogs()[0].GetLogRecords() {
				out = append(out, l.GetBody().GetStringValue())
			}
		}
	}
	return out
}

func startHTTP(t *testing.T, r *receiver) string {
	t.Helper()
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	return s.URL
}

func startGRPC(t *testing.T, r *receiver, options ...grpc.ServerOption) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(options...)
	collogs.RegisterLogsServiceServer(s, r)
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(ln) })
	t.Cleanup(func() {
		s.Stop()
		wg.Wait()
	})
	return ln.Addr().String()
}

func newOutput(t *testing.T, cfg Config, m *Metrics) *Output {
	t.Helper()
	o, err := New(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

func clean(r output.Result) bool { return r.Err == nil && len(r.Retry)+len(r.Rejected) == 0 }

// Over both wires, compressed and not, with headers from a file that changes.
func TestExport(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	for _, protocol := range []string{"http", "grpc"} {
		for _, compression := range []string{"gzip", "none"} {
			r := &receiver{}
			cfg := Config{Protocol: protocol, Compression: compression, HeaderFiles: map[string]string{"X-Token": token}}
			if protocol == "http" {
				cfg.Endpoint = startHTTP(t, r)
			} else {
				cfg.Endpoint = "http://" + startGRPC(t, r)
			}
			o := newOutput(t, cfg, nil)
			for i, secret := range []string{"one", "two"} {
				if err := os.WriteFile(token, []byte(secret+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
				records := batch(4)
				records[1].Attributes = map[string]any{"x": make(chan int)}
				got := o.Write(t.Context(), records)
				if got.Err != nil || len(got.Rejected) != 1 || got.Rejected[0].Index != 1 || !strings.Contains(got.Rejected[0].Reason, `"x"`) {
					t.Fatalf("%s %s: %+v", protocol, compression, got)
				}
				if r.headers[i] != secret {
					t.Errorf("%s: header %q", protocol, r.headers[i])
				}
			}
			if diff := cmp.Diff([]string{"line 0", "line 2", "line 3", "line 0", "line 2", "line 3"}, r.lines()); diff != "" {
				t.Errorf("%s: %s", protocol, diff)
			}
			if compressed := r.encoding[0] == "gzip"; protocol == "http" && compressed != (compression == "gzip") {
				t.Errorf("%s: encoding %q", compression, r.encoding[0])
			}
		}
	}
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	o := newOutput(t, Config{Endpoint: "http://127.0.0.1:1", HeaderFiles: map[string]string{"X-Token": token}}, nil)
	if got := o.Write(t.Context(), batch(1)); !got.Permanent || !strings.Contains(got.Err.Error(), "X-Token") {
		t.Errorf("%+v", got)
	}
}

// Rejected records of a call that succeeded are counted and never sent again.
func TestPartialSuccess(t *testing.T) {
	m, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{answer: func(int, *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		return &collogs.ExportLogsServiceResponse{PartialSuccess: &collogs.ExportLogsPartialSuccess{RejectedLogRecords: 2, ErrorMessage: "too old"}}, nil
	}}
	for _, cfg := range []Config{{Endpoint: startHTTP(t, r)}, {Endpoint: "http://" + startGRPC(t, r), Protocol: "grpc"}} {
		o := newOutput(t, cfg, m)
		for range 2 {
			if got := o.Write(t.Context(), batch(3)); !clean(got) {
				t.Errorf("%+v", got)
			}
		}
		if got := testutil.ToFloat64(o.rejected); got != 4 {
			t.Errorf("%s: %v rejected; want 4", cfg.Protocol, got)
		}
	}
}

type verdict struct {
	permanent, tooLarge bool
	retryAfter          time.Duration
	rejected            int
}

func TestRefusals(t *testing.T) {
	f := func(protocol string, n int, failure error, want verdict) {
		t.Helper()
		r := &receiver{answer: func(int, *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
			return nil, failure
		}}
		cfg := Config{Protocol: protocol, Endpoint: startHTTP(t, r)}
		if protocol == "grpc" {
			cfg.Endpoint = "http://" + startGRPC(t, r)
		}
		got := newOutput(t, cfg, nil).Write(t.Context(), batch(n))
		if v := (verdict{got.Permanent, got.TooLarge, got.RetryAfter, len(got.Rejected)}); v != want || (got.Err == nil) != (want.rejected > 0) || len(got.Retry) > 0 {
			t.Errorf("%s %v: %+v; want %+v", protocol, failure, got, want)
		}
		if got.Err != nil && !strings.Contains(got.Err.Error(), "because") {
			t.Errorf("%v does not say why", got.Err)
		}
	}
	later := func(code codes.Code) error {
		s, err := status.New(code, "because").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(7 * time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		return s.Err()
	}
	plain := func(code codes.Code) error { return status.Error(code, "because") }
	seconds := 7 * time.Second

	for _, code := range []codes.Code{429, 502, 503, 504} {
		f("http", 2, plain(code), verdict{})
		f("http", 2, later(code), verdict{retryAfter: seconds})
	}
	for _, code := range []codes.Code{301, 401, 403, 404, 415, 500, 501} {
		f("http", 2, plain(code), verdict{permanent: true})
	}
	f("http", 2, plain(413), verdict{tooLarge: true})
	f("http", 1, plain(413), verdict{rejected: 1})
	f("http", 2, plain(400), verdict{tooLarge: true}) // in halves, until
	f("http", 1, plain(400), verdict{rejected: 1})

	for _, code := range []codes.Code{codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded, codes.OutOfRange, codes.DataLoss} {
		f("grpc", 2, plain(code), verdict{})
	}
	f("grpc", 2, later(codes.Unavailable), verdict{retryAfter: seconds})
	f("grpc", 2, later(codes.ResourceExhausted), verdict{retryAfter: seconds})
	for _, code := range []codes.Code{codes.ResourceExhausted, codes.Unauthenticated, codes.PermissionDenied, codes.Unimplemented, codes.Internal, codes.Unknown} {
		f("grpc", 2, plain(code), verdict{permanent: true})
	}
	f("grpc", 2, plain(codes.InvalidArgument), verdict{tooLarge: true})
	f("grpc", 1, plain(codes.InvalidArgument), verdict{rejected: 1})

	// The limit of gRPC itself.
	o := newOutput(t, Config{Protocol: "grpc", Endpoint: "http://" + startGRPC(t, &receiver{}, grpc.MaxRecvMsgSize(100))}, nil)
	if got := o.Write(t.Context(), batch(10)); !got.TooLarge {
		t.Errorf("%+v; want too large", got)
	}
}

func TestNobodyListens(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	_ = ln.Close()
	for _, protocol := range []string{"http", "grpc"} {
		got := newOutput(t, Config{Protocol: protocol, Endpoint: "http://" + address}, nil).Write(t.Context(), batch(2))
		if got.Err == nil || got.Permanent || !strings.Contains(got.Err.Error(), address) {
			t.Errorf("%s: %+v", protocol, got)
		}
	}
}

// A receiver that does not answer is given up after the timeout, or when ctx ends.
func TestNoAnswer(t *testing.T) {
	release := make(chan struct{})
	r := &receiver{answer: func(int, *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
		<-release
		return &collogs.ExportLogsServiceResponse{}, nil
	}}
	for _, cfg := range []Config{{Endpoint: startHTTP(t, r)}, {Endpoint: "http://" + startGRPC(t, r), Protocol: "grpc"}} {
		cfg.Timeout = time.Second
		o := newOutput(t, cfg, nil)
		if got := o.Write(t.Context(), batch(2)); got.Err == nil || got.Permanent {
			t.Errorf("%+v", got)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got := o.Write(ctx, batch(2)); got.Err == nil || got.Permanent {
			t.Errorf("%+v", got)
		}
	}
	close(release)
}

func TestConcurrentWrites(t *testing.T) {
	r := &receiver{}
	o := newOutput(t, Config{Endpoint: startHTTP(t, r)}, nil)
	var wg sync.WaitGroup
	for range concurrency {
		wg.Go(func() {
			for range 20 {
				if got := o.Write(t.Context(), batch(20)); !clean(got) {
					t.Errorf("%+v", got)
				}
			}
		})
	}
	wg.Wait()
	counts := map[string]int{}
	for _, l := range r.lines() {
		counts[l]++
	}
	for i := range 20 {
		if n := counts[fmt.Sprint("line ", i)]; n != 20*concurrency {
			t.Errorf("line %d came %d times", i, n)
		}
	}
}

func TestTLS(t *testing.T) {
	r := &receiver{}
	// A certificate for example.com and 127.0.0.1, signed by itself.
	web := httptest.NewUnstartedServer(r)
	web.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0)
	web.StartTLS()
	t.Cleanup(web.Close)
	certFile, keyFile := writePair(t, web.TLS.Certificates[0])
	strict := httptest.NewUnstartedServer(r)
	strict.Config.ErrorLog = web.Config.ErrorLog
	strict.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS12}
	strict.StartTLS()
	t.Cleanup(strict.Close)
	grpcTLS := func(auth tls.ClientAuthType) string {
		return "https://" + startGRPC(t, r, grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: web.TLS.Certificates, MinVersion: tls.VersionTLS12, ClientAuth: auth})))
	}
	for protocol, endpoints := range map[string][2]string{"http": {web.URL, strict.URL}, "grpc": {grpcTLS(tls.NoClientCert), grpcTLS(tls.RequireAnyClientCert)}} {
		f := func(name string, endpoint string, cfg Config, wantErr string) {
			t.Helper()
			cfg.Protocol, cfg.Endpoint = protocol, endpoint
			o := newOutput(t, cfg, nil)
			got := o.Write(t.Context(), batch(1))
			// The server's reason can be lost when it hangs up at once.
			for began := time.Now(); wantErr != "" && got.Err != nil && !got.Permanent && time.Since(began) < 30*time.Second; {
				got = o.Write(t.Context(), batch(1))
			}
			if wantErr == "" && !clean(got) || wantErr != "" && (got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), wantErr)) {
				t.Errorf("%s, %s: %+v; want %q", protocol, name, got, wantErr)
			}
		}
		f("skip verify", endpoints[0], Config{InsecureSkipVerify: true}, "")
		f("authority", endpoints[0], Config{CAFile: certFile}, "")
		f("server name", endpoints[0], Config{CAFile: certFile, ServerName: "example.com"}, "")
		f("unknown authority", endpoints[0], Config{}, "set caFile")
		f("another host", endpoints[0], Config{CAFile: certFile, ServerName: "elsewhere.example"}, "set serverName")
		f("client certificate", endpoints[1], Config{CAFile: certFile, CertFile: certFile, KeyFile: keyFile}, "")
		f("no client certificate", endpoints[1], Config{CAFile: certFile}, "set certFile and keyFile")
		f("missing client certificate", endpoints[1], Config{CAFile: certFile, CertFile: certFile + "x", KeyFile: keyFile}, "certFile")
	}
	if _, err := New(Config{Endpoint: web.URL, CAFile: keyFile + "x"}, slog.New(slog.DiscardHandler), nil); err == nil || !strings.Contains(err.Error(), "caFile") {
		t.Errorf("%v", err)
	}
}

func writePair(t *testing.T, c tls.Certificate) (certFile, keyFile string) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600); err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile
}

func TestConfig(t *testing.T) {
	f := func(c Config, want string) {
		t.Helper()
		err := c.Validate()
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v; want %q in it", c, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("a secret: %v", err)
		}
	}
	f(Config{Endpoint: "http://otel:4318"}, "")
	f(Config{Endpoint: "https://otel/otlp/v1/logs", CAFile: "x", Headers: map[string]string{"X-Tenant": "a"}, HeaderFiles: map[string]string{"Authorization": "f"}}, "")
	f(Config{Endpoint: "http://otel:4317", Protocol: "grpc"}, "")
	f(Config{}, "endpoint is empty")
	f(Config{Endpoint: "otel:4318"}, "not a URL")
	f(Config{Endpoint: "http://u:s3cret@otel:4318"}, "credentials")
	f(Config{Endpoint: "http://otel:4318?x"}, "more than a path")
	f(Config{Endpoint: "http://otel", Protocol: "grpc"}, "no port")
	f(Config{Endpoint: "http://otel:1/x", Protocol: "grpc"}, "path")
	f(Config{Endpoint: "http://otel", Protocol: "json"}, "protocol")
	f(Config{Endpoint: "http://otel", Compression: "br"}, "compression")
	f(Config{Endpoint: "http://otel", Timeout: 1}, "timeout")
	f(Config{Endpoint: "http://otel", CAFile: "x"}, "without TLS")
	f(Config{Endpoint: "https://otel", KeyFile: "x"}, "certFile")
	f(Config{Endpoint: "http://otel", Headers: map[string]string{"a b": "x"}}, "a b")
	f(Config{Endpoint: "http://otel", Headers: map[string]string{"a": "s3cret\n"}}, "control character")
	f(Config{Endpoint: "http://otel", Headers: map[string]string{"A": "x"}, HeaderFiles: map[string]string{"a": "y"}}, "twice")
	f(Config{Endpoint: "http://otel", Headers: map[string]string{"content-type": "x"}}, "protocol")
	if s := fmt.Sprintf("%v %+v %#v", Config{Headers: map[string]string{"a": "s3cret"}}, &Config{Headers: map[string]string{"a": "s3cret"}}, Config{Endpoint: "http://u:s3cret@x"}); strings.Contains(s, "s3cret") {
		t.Errorf("a secret: %s", s)
	}
}

func plain(n int) []*record.Record {
	out := batch(n)
	for _, r := range out {
		r.Body = strings.Repeat("x", 200)
		r.Origin.Path = "/var/log/pods/shop_payments-7d9c8b5f6d-x2vzq_0e8f3c1a-5a5e-4d39-9f2c-2f6f7f1d4b11/app/0.log"
	}
	return out
}

func TestEncodingAllocatesNothing(t *testing.T) {
	records := plain(200)
	for i, r := range records {
		if i%2 == 0 {
			r.Attributes = map[string]any{"http.response.status_code": 402.0, "url.path": "/pay", "list": []any{"a"}, "map": map[string]any{"x": true}}
		}
	}
	e := newEncoder()
	e.encode(records)
	// One for the indices.
	if got := testing.AllocsPerRun(100, func() { e.encode(records) }); got > 1 {
		t.Errorf("%v allocations in a batch of 200 records; want 1", got)
	}
}

func BenchmarkEncode(b *testing.B) {
	e := newEncoder()
	records := plain(1000)
	b.SetBytes(200 * 1000)
	b.ReportAllocs()
	for b.Loop() {
		e.encode(records)
	}
}

// FuzzPartial: an answer is read as the generated types read it.
func FuzzPartial(f *testing.F) {
	for _, m := range []*collogs.ExportLogsServiceResponse{{}, {PartialSuccess: &collogs.ExportLogsPartialSuccess{RejectedLogRecords: 3, ErrorMessage: "x"}}, {PartialSuccess: &collogs.ExportLogsPartialSuccess{RejectedLogRecords: -1}}} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		n, message, err := partial(data)
		var m collogs.ExportLogsServiceResponse
		if proto.Unmarshal(data, &m) != nil {
			return
		}
		if p := m.GetPartialSuccess(); err != nil || n != p.GetRejectedLogRecords() || message != shorten(p.GetErrorMessage()) {
			t.Fatalf("%d, %q, %v; want %v", n, message, err, p)
		}
	})
}

// FuzzEncode: any record becomes a request that the generated types read.
func FuzzEncode(f *testing.F) {
	f.Add("line", "name", "value", 1.5, int64(7), "4bf92f3577b34da6a3ce929d0e0e4736")
	f.Add("0", "0:\xff", "\xf2", -0.5, int64(-33), "0")
	f.Add("\xff\x00", "service.name", "", 0.0, int64(-1), "zz")
	f.Fuzz(func(t *testing.T, body, name, value string, number float64, nanos int64, id string) {
		r := &record.Record{Time: time.Unix(0, nanos), Body: body, TraceID: id, SpanID: id, Level: value, Resource: &record.Resource{Pod: value, Image: name}, Attributes: map[string]any{name: value, name + "n": []any{number, map[string]any{name: value}}}}
		request, sent, rejected := newEncoder().encode([]*record.Record{r, r})
		if len(sent) != 2 || len(rejected) > 0 {
			t.Fatalf("%v, %v", sent, rejected)
		}
		got := decode(t, request).GetResourceLogs()[0].GetScopeLogs()[0].GetLogRecords()
		if len(got) != 2 || got[0].GetBody().GetStringValue() != valid(body) || !bytes.Equal(got[0].GetTraceId(), got[1].GetTraceId()) {
			t.Fatalf("%v", got)
		}
	})
}
