package otlp

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/gzip"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
)

const protobuf = "application/x-protobuf"

// httpWire is protobuf over HTTP.
type httpWire struct {
	url       string
	gzip      bool
	transport *http.Transport
	client    *http.Client
	writers   sync.Pool // of *gzip.Writer
}

func newHTTP(cfg Config, u *url.URL, config *tls.Config) *httpWire {
	transport := output.Transport(config, concurrency, cfg.Timeout)
	target := *u
	if !strings.HasSuffix(target.Path, "/v1/logs") {
		target = *target.JoinPath("v1/logs")
	}
	return &httpWire{
		url: target.String(), gzip: cfg.Compression == "gzip", transport: transport,
		// The headers can hold secrets, which are for this server alone.
		client: &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	}
}

func (w *httpWire) close() error {
	w.transport.CloseIdleConnections()
	return nil
}

func (w *httpWire) export(ctx context.Context, header map[string]string, request []byte) ([]byte, error) {
	// The transport can read the body after it has returned, so it gets its own.
	body, err := w.body(request)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	req.Header.Set("Content-Type", protobuf)
	if w.gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }() // read to its end or given up
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode >= 200 && resp.StatusCode <= 299 {
		if err != nil {
			return nil, fmt.Errorf("the receiver's answer broke off: %w", err)
		}
		if !strings.HasPrefix(resp.Header.Get("Content-Type"), protobuf) {
			return nil, nil // says nothing that we know
		}
		return answer, nil
	}
	return nil, refused(resp, answer, time.Now())
}

func (w *httpWire) body(request []byte) ([]byte, error) {
	if !w.gzip {
		return bytes.Clone(request), nil
	}
	var b bytes.Buffer
	b.Grow(len(request) / 4)
	z, ok := w.writers.Get().(*gzip.Writer)
	if ok {
		z.Reset(&b)
	} else {
		var err error
		if z, err = gzip.NewWriterLevel(&b, gzip.BestSpeed); err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
	}
	defer w.writers.Put(z)
	if _, err := z.Write(request); err != nil {
		return nil, fmt.Errorf("gzip: %w", err)
	}
	if err := z.Close(); err != nil {
		return nil, fmt.Errorf("gzip: %w", err)
	}
	return b.Bytes(), nil
}

// refused sorts an answer that is no success (OTLP specification, "OTLP/HTTP
// Response").
func refused(resp *http.Response, answer []byte, now time.Time) *refusal {
	message := strings.TrimSpace(string(answer))
	if strings.HasPrefix(resp.Header.Get("Content-Type"), protobuf) {
		var s status.Status
		if err := proto.Unmarshal(answer, &s); err == nil {
			message = s.GetMessage()
		}
	}
	r := &refusal{}
	remedy := ""
	switch code := resp.StatusCode; code {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		r.retryAfter = output.RetryAfter(resp.Header.Get("Retry-After"), now)
	case http.StatusRequestEntityTooLarge:
		r.tooLarge = true
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		r.bad = true
	case http.StatusUnauthorized, http.StatusForbidden:
		r.permanent, remedy = true, ": check the credentials in headerFiles"
	case http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusUnsupportedMediaType:
		r.permanent, remedy = true, ": check that endpoint is an OTLP receiver for logs over HTTP"
	default:
		r.permanent = true
		if code >= 300 && code <= 399 {
			remedy = fmt.Sprintf(": it has moved; write the new place as endpoint: %q", shorten(resp.Header.Get("Location")))
		}
	}
	r.err = fmt.Errorf("the receiver answers %s%s: %q", resp.Status, remedy, shorten(message))
	return r
}
