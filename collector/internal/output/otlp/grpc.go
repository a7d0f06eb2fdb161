package otlp

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

const exportMethod = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"

// grpcWire is OTLP over gRPC.
type grpcWire struct {
	conn      *grpc.ClientConn
	handshake *handshake // nil without TLS
	options   []grpc.CallOption
}

func newGRPC(cfg Config, u *url.URL, config *tls.Config) (*grpcWire, error) {
	w := &grpcWire{options: []grpc.CallOption{grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(maxAnswer)}}
	if cfg.Compression == "gzip" {
		w.options = append(w.options, grpc.UseCompressor(gzip.Name))
	}
	creds := insecure.NewCredentials()
	if u.Scheme == "https" {
		w.handshake = &handshake{TransportCredentials: credentials.NewTLS(config), last: &atomic.Pointer[error]{}}
		creds = w.handshake
	}
	delays := backoff.DefaultConfig
	delays.MaxDelay = 5 * time.Second // the pipeline waits on its own
	conn, err := grpc.NewClient("dns:///"+u.Host,
		grpc.WithTransportCredentials(creds),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: delays, MinConnectTimeout: 10 * time.Second}),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
	if err != nil {
		return nil, fmt.Errorf("otlp: endpoint: %q: %w", cfg.Endpoint, err)
	}
	w.conn = conn
	return w, nil
}

func (w *grpcWire) close() error { return w.conn.Close() }

func (w *grpcWire) export(ctx context.Context, header map[string]string, request []byte) ([]byte, error) {
	for name, value := range header {
		ctx = metadata.AppendToOutgoingContext(ctx, name, value)
	}
	// The transport can send the request after an error was returned, so it gets its
	// own.
	var answer []byte
	err := w.conn.Invoke(ctx, exportMethod, bytes.Clone(request), &answer, w.options...)
	if err == nil {
		return answer, nil
	}
	s := status.Convert(err)
	if s.Code() == codes.Unavailable && w.handshake != nil && strings.Contains(s.Message(), "handshake failed") {
		if cause := w.handshake.last.Load(); cause != nil {
			if _, permanent := tlsfiles.Explain(*cause); permanent {
				return nil, *cause // gRPC keeps its text alone
			}
		}
	}
	return nil, sorted(s)
}

// sorted sorts a status that is not OK (OTLP specification, "OTLP/gRPC Response").
func sorted(s *status.Status) *refusal {
	r := &refusal{}
	asked := false
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			asked = true
			r.retryAfter = max(info.GetRetryDelay().AsDuration(), 0)
		}
	}
	remedy := ""
	switch s.Code() {
	case codes.Unavailable, codes.Aborted, codes.Canceled, codes.DeadlineExceeded, codes.OutOfRange, codes.DataLoss:
		if strings.Contains(s.Message(), "certificate required") || strings.Contains(s.Message(), "bad certificate") {
			r.permanent, remedy = true, ": the server refuses this client's certificate: set certFile and keyFile to one that it trusts"
		}
	case codes.ResourceExhausted:
		r.tooLarge = !asked && strings.Contains(s.Message(), "larger than max")
		r.permanent = !asked && !r.tooLarge
	case codes.InvalidArgument:
		r.bad = true
	case codes.Unauthenticated, codes.PermissionDenied:
		r.permanent, remedy = true, ": check the credentials in headerFiles"
	case codes.Unimplemented:
		r.permanent, remedy = true, ": check that endpoint is an OTLP receiver for logs over gRPC"
	default:
		r.permanent = true
	}
	r.err = fmt.Errorf("the receiver answers %s%s: %q", s.Code(), remedy, shorten(s.Message()))
	return r
}

// raw is a codec for messages that are encoded already.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) ([]byte, error) {
	if data, ok := v.([]byte); ok {
		return data, nil
	}
	return nil, errors.New("otlp: only encoded messages are sent")
}

func (raw) Unmarshal(data []byte, v any) error {
	into, ok := v.(*[]byte)
	if !ok {
		return errors.New("otlp: only encoded messages are received")
	}
	*into = bytes.Clone(data)
	return nil
}

// handshake keeps the last error of TLS, of which gRPC passes on the text alone.
type handshake struct {
	credentials.TransportCredentials
	last *atomic.Pointer[error]
}

// ClientHandshake is that of the credentials inside.
func (h *handshake) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if err != nil {
		h.last.Store(&err)
	} else {
		h.last.Store(nil)
		c = listening{c}
	}
	return c, info, err
}

// listening hears what the server said before it hung up (that it does not trust our
// certificate, which it can say only after the handshake): that tells more than the
// broken pipe.
type listening struct{ net.Conn }

// Write returns the server's last word where the connection's Write fails.
func (c listening) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil && c.SetReadDeadline(time.Now().Add(200*time.Millisecond)) == nil {
		if _, said := c.Read(make([]byte, 1)); said != nil {
			if remedy, _ := tlsfiles.Explain(said); remedy != "" {
				err = said
			}
		}
	}
	return n, err
}

// Clone keeps the place of the error.
func (h *handshake) Clone() credentials.TransportCredentials {
	return &handshake{TransportCredentials: h.TransportCredentials.Clone(), last: h.last}
}
