// Package otlp takes log records in over OTLP (OpenTelemetry Protocol 1.10): HTTP
// POST /v1/logs in protobuf and JSON, and gRPC, on the same port.
//
// A request is answered when its records are on the disk (package journal), so
// that a sender that was told so may forget them. While the outputs are behind it
// is told to come back (429, RESOURCE_EXHAUSTED) and keeps them. Records that
// cannot be represented are counted in partial_success, by the protocol's rules
// for good.
//
// It knows the protocol and how OpenTelemetry's names are called in the Elastic
// Common Schema. gRPC is spoken over net/http: one unary method needs no more, and
// it keeps the library out of the program.
package otlp

import (
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"golang.org/x/net/netutil"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
)

// Defaults and limits.
const (
	// DefaultMaxRequest bytes has a request at most, before and after it is
	// decompressed; also gRPC's own default.
	DefaultMaxRequest = 4 << 20
	// DefaultConcurrency requests are in memory at a time; others wait.
	DefaultConcurrency = 4
	// waitTurn is how long they wait before they are told to come back.
	waitTurn = 5 * time.Second
	// maxConnections at a time; more wait to be accepted.
	maxConnections = 256
	readTimeout    = 30 * time.Second
	idleTimeout    = 5 * time.Minute
	stopTimeout    = 3 * time.Second
)

// Method is the path of the gRPC method, Path that of HTTP.
const (
	Method = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
	Path   = "/v1/logs"
)

// Config of a Receiver.
type Config struct {
	Journal *journal.Writer
	// Cluster and Node are taken where a resource names none.
	Cluster, Node string
	MaxRequest    int
	Concurrency   int
	// Now is the clock. Default time.Now.
	Now        func() time.Time
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Receiver is safe for concurrent use.
type Receiver struct {
	cfg      Config
	turns    chan struct{}
	requests *prometheus.CounterVec
	rejected prometheus.Counter
}

// New makes a Receiver that listens nowhere yet.
func New(cfg Config) (*Receiver, error) {
	if cfg.Journal == nil {
		return nil, errors.New("otlp: no journal to write to")
	}
	if cfg.MaxRequest == 0 {
		cfg.MaxRequest = DefaultMaxRequest
	}
	if cfg.Concurrency == 0 {
		cfg.Concurrency = DefaultConcurrency
	}
	if cfg.MaxRequest < 0 || cfg.MaxRequest > 64<<20 || cfg.Concurrency < 0 || cfg.Concurrency > 1024 {
		return nil, fmt.Errorf("otlp: maxRequest is %d and concurrency %d: at most %d and 1024; leave them out for %d and %d", cfg.MaxRequest, cfg.Concurrency, 64<<20, DefaultMaxRequest, DefaultConcurrency)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &Receiver{
		cfg: cfg, turns: make(chan struct{}, cfg.Concurrency),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_otlp_input_requests_total", Help: "OTLP requests by protocol (http, grpc) and the HTTP status of the answer; gRPC's codes are given as the status that means the same."}, []string{"protocol", "code"}),
		rejected: prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_otlp_input_rejected_records_total", Help: "Records in accepted requests that cannot be represented; their senders were told in partial_success."}),
	}
	if cfg.Registerer != nil {
		if err := errors.Join(cfg.Registerer.Register(r.requests), cfg.Registerer.Register(r.rejected)); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Serve serves both protocols on l until ctx ends, and closes l. HTTP/2 is spoken
// without TLS (h2c), as gRPC clients on the node do. It returns nil where the end
// was in order.
func (r *Receiver) Serve(ctx context.Context, l net.Listener) error {
	protocols := &http.Protocols{}
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{
		Handler: r, Protocols: protocols, ReadHeaderTimeout: readTimeout, ReadTimeout: readTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 64 << 10,
		HTTP2:       &http.HTTP2Config{MaxConcurrentStreams: 100},
		ErrorLog:    slog.NewLogLogger(r.cfg.Log.Handler(), slog.LevelDebug),
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(netutil.LimitListener(l, maxConnections)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve OTLP on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err := s.Shutdown(stop)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.Close()
	}
	if end := <-served; !errors.Is(end, http.ErrServerClosed) {
		err = errors.Join(err, end)
	}
	return err
}

// answer is what a request comes to. status is that of HTTP; it is 200 where the
// records are taken.
type answer struct {
	status   int
	message  string
	after    time.Duration // 0: do not come back
	rejected int64
}

// ServeHTTP answers both protocols.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	kind, _, err := mime.ParseMediaType(req.Header.Get("Content-Type"))
	if err != nil {
		kind = ""
	}
	if kind == "application/grpc" || strings.HasPrefix(kind, "application/grpc+") {
		if req.ProtoMajor < 2 {
			http.Error(w, "gRPC needs HTTP/2", http.StatusHTTPVersionNotSupported)
			return
		}
		a := r.grpc(req, kind)
		r.requests.WithLabelValues("grpc", strconv.Itoa(a.status)).Inc()
		answerGRPC(w, a)
		return
	}
	a := r.http(req, kind)
	r.requests.WithLabelValues("http", strconv.Itoa(a.status)).Inc()
	answerHTTP(w, a, kind == "application/json")
}

func (r *Receiver) http(req *http.Request, kind string) answer {
	switch {
	case req.URL.Path != Path:
		return answer{status: http.StatusNotFound, message: "this takes OTLP logs: POST " + Path}
	case req.Method != http.MethodPost:
		return answer{status: http.StatusMethodNotAllowed, message: "this takes OTLP logs: POST " + Path}
	case kind != "application/x-protobuf" && kind != "application/json":
		return answer{status: http.StatusUnsupportedMediaType, message: fmt.Sprintf("Content-Type %.100q: send application/x-protobuf or application/json", kind)}
	}
	encoding := req.Header.Get("Content-Encoding")
	if encoding != "" && encoding != "identity" && encoding != "gzip" {
		return answer{status: http.StatusUnsupportedMediaType, message: fmt.Sprintf("Content-Encoding %.100q: send gzip or none", encoding)}
	}
	return r.take(req.Context(), func() ([]byte, error) { return r.read(req.Body, encoding == "gzip") }, kind == "application/json")
}

func (r *Receiver) grpc(req *http.Request, kind string) answer {
	switch {
	case req.URL.Path != Method:
		return answer{status: http.StatusNotFound, message: "this takes OTLP logs: " + Method}
	case kind != "application/grpc" && kind != "application/grpc+proto":
		return answer{status: http.StatusUnsupportedMediaType, message: fmt.Sprintf("Content-Type %.100q: send application/grpc+proto", kind)}
	}
	encoding := req.Header.Get("Grpc-Encoding")
	if encoding != "" && encoding != "identity" && encoding != "gzip" {
		return answer{status: http.StatusNotFound, message: fmt.Sprintf("grpc-encoding %.100q: send gzip or identity", encoding)}
	}
	return r.take(req.Context(), func() ([]byte, error) {
		var head [5]byte
		if _, err := io.ReadFull(req.Body, head[:]); err != nil {
			return nil, fmt.Errorf("read the message: %w", err)
		}
		size := binary.BigEndian.Uint32(head[1:])
		if size > uint32(r.cfg.MaxRequest) {
			return nil, errLarge
		}
		if head[0] > 1 || head[0] == 1 && encoding != "gzip" {
			return nil, errors.New("the message is compressed, and grpc-encoding does not say how")
		}
		body := io.LimitReader(req.Body, int64(size))
		b, err := r.read(body, head[0] == 1)
		if err == nil && head[0] == 0 && len(b) != int(size) {
			err = io.ErrUnexpectedEOF
		}
		return b, err
	}, false)
}

var errLarge = errors.New("the request is too large")

// read returns the body, decompressed, if it is within the limit on both sides.
func (r *Receiver) read(body io.Reader, zipped bool) ([]byte, error) {
	limit := int64(r.cfg.MaxRequest)
	body = &io.LimitedReader{R: body, N: limit + 1}
	in := body
	if zipped {
		z, err := gzip.NewReader(body)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		in = z
	}
	b, err := io.ReadAll(io.LimitReader(in, limit+1))
	if int64(len(b)) > limit {
		return nil, errLarge
	}
	if err != nil {
		return nil, fmt.Errorf("read the request: %w", err)
	}
	return b, nil
}

// take reads a request in its turn, and answers when its records are on the disk.
func (r *Receiver) take(ctx context.Context, read func() ([]byte, error), inJSON bool) answer {
	turn := time.NewTimer(waitTurn)
	defer turn.Stop()
	select {
	case r.turns <- struct{}{}:
		defer func() { <-r.turns }()
	case <-turn.C:
		return answer{status: http.StatusTooManyRequests, message: "too many requests at a time", after: time.Second}
	case <-ctx.Done():
		return answer{status: http.StatusServiceUnavailable, message: ctx.Err().Error(), after: time.Second}
	}
	b, err := read()
	if errors.Is(err, errLarge) {
		return answer{status: http.StatusRequestEntityTooLarge, message: fmt.Sprintf("the request has more than %d bytes: send smaller batches", r.cfg.MaxRequest)}
	}
	if err != nil {
		return answer{status: http.StatusBadRequest, message: err.Error()}
	}
	var d logs.LogsData // the same message as ExportLogsServiceRequest
	if inJSON {
		if err = (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &d); err == nil {
			err = ids(&d)
		}
	} else {
		err = proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, &d)
	}
	if err != nil {
		return answer{status: http.StatusBadRequest, message: "not an ExportLogsServiceRequest: " + err.Error()}
	}
	records, rejected, reason := r.records(&d, r.cfg.Now())
	r.rejected.Add(float64(rejected))
	if err := r.cfg.Journal.Append(ctx, records); err != nil {
		var full *journal.FullError
		if errors.As(err, &full) {
			return answer{status: http.StatusTooManyRequests, message: err.Error(), after: full.RetryAfter}
		}
		return answer{status: http.StatusServiceUnavailable, message: err.Error(), after: 5 * time.Second}
	}
	return answer{status: http.StatusOK, rejected: rejected, message: reason}
}

// response is an ExportLogsServiceResponse: partial_success = 1, in it
// rejected_log_records = 1 and error_message = 2.
func (a answer) response() []byte {
	if a.rejected == 0 {
		return nil
	}
	p := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(a.rejected))
	p = protowire.AppendString(protowire.AppendTag(p, 2, protowire.BytesType), strings.ToValidUTF8(a.message, "\uFFFD"))
	return protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), p)
}

// Codes of gRPC (google.rpc.Code).
const (
	codeOK              = 0
	codeUnknown         = 2
	codeInvalidArgument = 3
	codeExhausted       = 8
	codeUnimplemented   = 12
	codeUnavailable     = 14
)

func (a answer) code() int {
	switch a.status {
	case http.StatusOK:
		return codeOK
	case http.StatusBadRequest:
		return codeInvalidArgument
	case http.StatusTooManyRequests, http.StatusRequestEntityTooLarge:
		return codeExhausted
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusUnsupportedMediaType:
		return codeUnimplemented
	case http.StatusServiceUnavailable:
		return codeUnavailable
	default:
		return codeUnknown
	}
}

// rpcStatus is a google.rpc.Status: code = 1, message = 2, details = 3. Where the
// sender may come back it has a google.rpc.RetryInfo: retry_delay = 1.
func (a answer) rpcStatus() []byte {
	b := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(a.code()))
	b = protowire.AppendString(protowire.AppendTag(b, 2, protowire.BytesType), strings.ToValidUTF8(a.message, "\uFFFD"))
	if a.after <= 0 {
		return b
	}
	delay := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), uint64(math.Ceil(a.after.Seconds())))
	info := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), delay)
	detail := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "type.googleapis.com/google.rpc.RetryInfo")
	detail = protowire.AppendBytes(protowire.AppendTag(detail, 2, protowire.BytesType), info)
	return protowire.AppendBytes(protowire.AppendTag(b, 3, protowire.BytesType), detail)
}

func answerHTTP(w http.ResponseWriter, a answer, inJSON bool) {
	if a.after > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(a.after.Seconds()))))
	}
	var body []byte
	switch {
	case inJSON && a.status == http.StatusOK && a.rejected > 0:
		body = fmt.Appendf(nil, `{"partialSuccess":{"rejectedLogRecords":"%d","errorMessage":%s}}`, a.rejected, quote(a.message))
	case inJSON && a.status == http.StatusOK:
		body = []byte("{}")
	case inJSON:
		body = fmt.Appendf(nil, `{"code":%d,"message":%s}`, a.code(), quote(a.message))
	case a.status == http.StatusOK:
		body = a.response()
	default:
		body = a.rpcStatus()
	}
	kind := "application/x-protobuf"
	if inJSON {
		kind = "application/json"
	}
	w.Header().Set("Content-Type", kind)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(a.status)
	_, _ = w.Write(body) //nolint:gosec // G705: the type is not HTML and may not be sniffed; a sender that has gone comes again
}

func answerGRPC(w http.ResponseWriter, a answer) {
	h := w.Header()
	h.Set("Content-Type", "application/grpc+proto")
	h.Set("Grpc-Accept-Encoding", "gzip,identity")
	w.WriteHeader(http.StatusOK)
	if a.status == http.StatusOK {
		b := a.response()
		frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b)))
		_, _ = w.Write(append(frame, b...)) //nolint:gosec // G705: gRPC is not HTML; a sender that has gone comes again
	}
	h.Set(http.TrailerPrefix+"Grpc-Status", strconv.Itoa(a.code()))
	if a.status != http.StatusOK {
		h.Set(http.TrailerPrefix+"Grpc-Message", strings.ReplaceAll(url.QueryEscape(a.message), "+", "%20"))
		h.Set(http.TrailerPrefix+"Grpc-Status-Details-Bin", encodeBinary(a.rpcStatus()))
	}
}
