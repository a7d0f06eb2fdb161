package fluentd

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vmihailenco/msgpack/v5"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeServer is a stand-in for a forward server, strict about the message mode of
// the forward protocol v1, that can fail as a test says.
type fakeServer struct {
	t      *testing.T
	ln     net.Listener
	answer func(n int, chunk string) any // nil: no answer; n counts events from 0
	greet  any                           // sent on connect
	wg     sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	events []event
	opened int
}

type event struct {
	Tag    string
	Time   time.Time
	Fields map[string]any
}

// closeConn as an answer closes the connection.
type closeConn struct{}

func ack(_ int, chunk string) any { return map[string]any{"ack": chunk} }

func serve(t *testing.T, ln net.Listener, answer func(int, string) any) *fakeServer {
	t.Helper()
	return serveGreeting(t, ln, answer, nil)
}

func serveGreeting(t *testing.T, ln net.Listener, answer func(int, string) any, greet any) *fakeServer {
	t.Helper()
	s := &fakeServer{t: t, ln: ln, answer: answer, greet: greet, conns: map[net.Conn]struct{}{}}
	s.wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.conns[conn] = struct{}{}
			s.opened++
			s.mu.Unlock()
			s.wg.Go(func() { s.serve(conn) })
		}
	})
	t.Cleanup(s.stop)
	return s
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func (s *fakeServer) stop() {
	_ = s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *fakeServer) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	enc, dec := msgpack.NewEncoder(conn), msgpack.NewDecoder(conn)
	if s.greet != nil {
		if err := enc.Encode(s.greet); err != nil {
			return
		}
	}
	for {
		e, chunk, err := readMessage(dec)
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			var network net.Error
			if !errors.As(err, &network) {
				s.t.Errorf("the client sent: %v", err)
			}
			return
		}
		s.mu.Lock()
		n := len(s.events)
		s.events = append(s.events, e)
		decide := s.answer
		s.mu.Unlock()
		switch answer := decide(n, chunk).(type) {
		case nil:
		case closeConn:
			return
		default:
			if err := enc.Encode(answer); err != nil {
				return
			}
		}
	}
}

// readMessage reads [tag, EventTime, record, {"chunk": id}] and nothing else.
func readMessage(dec *msgpack.Decoder) (e event, chunk string, err error) {
	n, err := dec.DecodeArrayLen()
	if err != nil {
		return e, "", err
	}
	if n != 4 {
		return e, "", fmt.Errorf("an array of %d; want tag, time, record, option", n)
	}
	if e.Tag, err = dec.DecodeString(); err != nil {
		return e, "", fmt.Errorf("tag: %w", err)
	}
	id, size, err := dec.DecodeExtHeader()
	if err != nil || id != 0 || size != 8 {
		return e, "", fmt.Errorf("time: extension %d of %d bytes, %w; want EventTime", id, size, err)
	}
	var raw [8]byte
	if err := dec.ReadFull(raw[:]); err != nil {
		return e, "", err
	}
	e.Time = time.Unix(int64(binary.BigEndian.Uint32(raw[:4])), int64(binary.BigEndian.Uint32(raw[4:]))).UTC()
	if e.Fields, err = dec.DecodeMap(); err != nil {
		return e, "", fmt.Errorf("record: %w", err)
	}
	option, err := dec.DecodeMap()
	if err != nil {
		return e, "", fmt.Errorf("option: %w", err)
	}
	chunk, ok := option["chunk"].(string)
	if !ok || chunk == "" || len(option) != 1 {
		return e, "", fmt.Errorf("option %v; want a chunk id alone", option)
	}
	return e, chunk, nil
}

func (s *fakeServer) bodies() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, e := range s.events {
		out = append(out, fmt.Sprint(e.Fields["message"]))
	}
	return out
}

func batch(n int) []*record.Record {
	var out []*record.Record
	for i := range n {
		out = append(out, &record.Record{
			Time: time.Date(2026, 11, 23, 3, 0, 0, 5+i, time.UTC), Body: fmt.Sprint("line ", i), Stream: "stderr",
			Resource: &record.Resource{Namespace: "shop", Pod: "payments-0", Service: "payments.v2", Container: "app"},
			Origin:   record.Origin{File: "f", Path: "/p", Offset: int64(i * 10)},
		})
	}
	return out
}

func newOutput(t *testing.T, cfg Config) *Output {
	t.Helper()
	if cfg.Mode == "" {
		cfg.Mode = "simple"
	}
	o, err := New(cfg, slog.New(slog.DiscardHandler))
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

// Every event arrives once, in order, with its tag, its nanoseconds and its
// fields, over one connection.
func TestAcknowledged(t *testing.T) {
	s := serve(t, listen(t), ack)
	o := newOutput(t, Config{Address: s.ln.Addr().String()})
	records := batch(3)
	records[1].Attributes = map[string]any{"n": 1.5, "ok": true, "none": nil, "list": []any{"a", 2.0}, "map": map[string]any{"x": "y"}}
	for range 2 {
		if got := o.Write(t.Context(), records); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
			t.Fatalf("%+v", got)
		}
	}
	if diff := cmp.Diff([]string{"line 0", "line 1", "line 2", "line 0", "line 1", "line 2"}, s.bodies()); diff != "" {
		t.Error(diff)
	}
	want := event{Tag: "kube.shop.payments_v2", Time: records[1].Time, Fields: map[string]any{
		"@timestamp": "2026-11-23T03:00:00.000000006Z", "message": "line 1", "stream": "stderr", "service.name": "payments.v2", "container.name": "app",
		"kubernetes.namespace": "shop", "kubernetes.pod.name": "payments-0", "kubernetes.container.name": "app", "orchestrator.namespace": "shop",
		"log.file.path": "/p", "log.offset": int8(10), "n": 1.5, "ok": true, "none": nil, "list": []any{"a", 2.0}, "map": map[string]any{"x": "y"},
	}}
	if diff := cmp.Diff(want, s.events[1]); diff != "" {
		t.Error(diff)
	}
	if s.opened != 1 {
		t.Errorf("%d connections; want 1", s.opened)
	}
}

// What is not acknowledged is to be sent again; what came before it is not.
func TestFailures(t *testing.T) {
	f := func(name string, answer func(int, string) any, wantErr bool, wantRetry []int) {
		t.Helper()
		s := serve(t, listen(t), answer)
		o := newOutput(t, Config{Address: s.ln.Addr().String(), AckTimeout: 100 * time.Millisecond})
		got := o.Write(t.Context(), batch(4))
		if (got.Err != nil) != wantErr || got.Permanent || !cmp.Equal(got.Retry, wantRetry) || len(got.Rejected) > 0 {
			t.Errorf("%s: %+v; want error %t, retry %v", name, got, wantErr, wantRetry)
		}
		s.mu.Lock()
		s.answer = ack // the server recovers
		s.mu.Unlock()
		if got := o.Write(t.Context(), batch(1)); got.Err != nil {
			t.Errorf("%s, after the server has recovered: %v", name, got.Err)
		}
	}
	after := func(n int, answer any) func(int, string) any {
		return func(i int, chunk string) any {
			if i < n {
				return ack(i, chunk)
			}
			return answer
		}
	}
	f("never acknowledges", after(0, nil), true, nil)
	f("stops acknowledging", after(2, nil), false, []int{2, 3})
	f("closes at once", after(0, closeConn{}), true, nil)
	f("closes in between", after(1, closeConn{}), false, []int{1, 2, 3})
	f("acknowledges another chunk", after(3, map[string]any{"ack": "another"}), false, []int{3})
	f("answers something else", after(1, []any{"PONG", false}), false, []int{1, 2, 3})
}

// A server with a shared key greets first; this mode cannot answer and says so.
func TestSharedKeyServer(t *testing.T) {
	ln := listen(t)
	serveGreeting(t, ln, func(int, string) any { return nil }, []any{"HELO", map[string]any{"nonce": "x", "auth": "", "keepalive": true}})
	o := newOutput(t, Config{Address: ln.Addr().String(), AckTimeout: time.Second})
	if got := o.Write(t.Context(), batch(2)); got.Err == nil || !strings.Contains(got.Err.Error(), "shared key") {
		t.Errorf("%+v; want an error that names the shared key", got)
	}
}

func TestNobodyListens(t *testing.T) {
	ln := listen(t)
	address := ln.Addr().String()
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	o := newOutput(t, Config{Address: address})
	if got := o.Write(t.Context(), batch(2)); got.Err == nil || !strings.Contains(got.Err.Error(), address) || len(got.Retry) > 0 {
		t.Errorf("%+v; want an error with the address", got)
	}
}

func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := serve(t, listen(t), func(n int, chunk string) any {
		if n == 1 {
			cancel()
		}
		return ack(n, chunk)
	})
	o := newOutput(t, Config{Address: s.ln.Addr().String()})
	if got := o.Write(ctx, batch(4)); got.Err != nil || !cmp.Equal(got.Retry, []int{2, 3}) {
		t.Errorf("%+v; want 2 and 3 to be sent again", got)
	}
	if got := o.Write(ctx, batch(1)); !errors.Is(got.Err, context.Canceled) {
		t.Errorf("%+v", got)
	}
}

// An event that msgpack cannot hold is rejected and stops nothing.
func TestRejected(t *testing.T) {
	s := serve(t, listen(t), ack)
	o := newOutput(t, Config{Address: s.ln.Addr().String()})
	records := batch(3)
	records[0].Attributes = map[string]any{"x": make(chan int)}
	got := o.Write(t.Context(), records)
	if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 1 || got.Rejected[0].Index != 0 || strings.Contains(got.Rejected[0].Reason, "line 0") {
		t.Errorf("%+v; want record 0 rejected, without its text", got)
	}
	if diff := cmp.Diff([]string{"line 1", "line 2"}, s.bodies()); diff != "" {
		t.Error(diff)
	}
}

func TestIdleConnectionIsRenewed(t *testing.T) {
	s := serve(t, listen(t), ack)
	o := newOutput(t, Config{Address: s.ln.Addr().String(), IdleTimeout: time.Nanosecond})
	for range 2 {
		if got := o.Write(t.Context(), batch(1)); got.Err != nil {
			t.Fatal(got.Err)
		}
	}
	if s.opened != 2 {
		t.Errorf("%d connections; want 2", s.opened)
	}
}

func TestUnixSocketAndTLS(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln, ack)
	if got := newOutput(t, Config{Address: "unix://" + path}).Write(t.Context(), batch(2)); got.Err != nil {
		t.Errorf("unix: %v", got.Err)
	}

	certificate := httptest.NewUnstartedServer(nil)
	certificate.StartTLS()
	defer certificate.Close()
	s := serve(t, tls.NewListener(listen(t), &tls.Config{Certificates: certificate.TLS.Certificates, MinVersion: tls.VersionTLS12}), ack)
	if got := newOutput(t, Config{Address: s.ln.Addr().String(), TLS: true, InsecureSkipVerify: true}).Write(t.Context(), batch(2)); got.Err != nil {
		t.Errorf("tls: %v", got.Err)
	}
	if got := newOutput(t, Config{Address: s.ln.Addr().String(), TLS: true}).Write(t.Context(), batch(2)); got.Err == nil || !strings.Contains(got.Err.Error(), "certificate") {
		t.Errorf("tls with an unknown authority: %+v", got)
	}
}

func TestTag(t *testing.T) {
	r := batch(1)[0]
	r.Attributes = map[string]any{"event.dataset": "outrigger.access"}
	f := func(template, want string) {
		t.Helper()
		p, err := parseTag(template)
		if err != nil {
			t.Fatal(err)
		}
		if got := p.of(r); got != want {
			t.Errorf("%s = %s; want %s", template, got, want)
		}
	}
	f("kube", "kube")
	f("kube.{namespace}.{service}", "kube.shop.payments_v2")
	f("{stream}{pod}.{container}.{dataset}.x", "stderrpayments-0.app.outrigger_access.x")
	r.Resource = &record.Resource{}
	f("k.{namespace}", "k.unknown")
}

func TestConfig(t *testing.T) {
	f := func(c Config, want string) {
		t.Helper()
		err := c.Validate()
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v; want %q in it", c, err, want)
		}
	}
	f(Config{Address: "fluentd:24224"}, "")
	f(Config{Address: "[::1]:24224"}, "")
	f(Config{Address: "unix:///run/f.sock"}, "")
	f(Config{}, "address is empty")
	f(Config{Address: "fluentd"}, `"fluentd" is not host:port`)
	f(Config{Address: "fluentd:0"}, "host:port")
	f(Config{Address: "unix://f"}, "path of a socket")
	f(Config{Address: "unix:///f", TLS: true}, "tls")
	f(Config{Address: "f:1", InsecureSkipVerify: true}, "insecureSkipVerify")
	f(Config{Address: "f:1", AckTimeout: -1}, "ackTimeout")
	f(Config{Address: "f:1", Tag: "{node}"}, "{node")
	f(Config{Address: "f:1", Tag: "a}"}, "'}'")
	f(Config{Address: "f:1", Tag: "{pod"}, "{pod")
	f(Config{Servers: []Server{{Address: "a:1"}, {Address: "b:1", Weight: 3}}, Balance: "weighted", Compression: "zstd", SharedKeyFile: "k"}, "")
	f(Config{Address: "f:1", Servers: []Server{{Address: "a:1"}}}, "both set")
	f(Config{Servers: []Server{{Address: "a"}}}, "host:port")
	f(Config{Servers: []Server{{Address: "a:1", Weight: -1}}}, "weight")
	f(Config{Servers: make([]Server, 65)}, "65 are more than 64")
	f(Config{Address: "f:1", Mode: "packed"}, "mode")
	f(Config{Address: "f:1", Balance: "random"}, "balance")
	f(Config{Address: "f:1", Compression: "lz4"}, "compression")
	f(Config{Address: "f:1", Window: 257}, "window")
	f(Config{Address: "f:1", MaxChunkBytes: 1}, "maxChunkBytes")
	f(Config{Address: "f:1", CAFile: "x"}, "without TLS")
	f(Config{Address: "f:1", TLS: true, CertFile: "x"}, "keyFile")
	f(Config{Address: "f:1", SharedKeyFile: "k", Username: "u"}, "passwordFile")
	f(Config{Address: "f:1", Username: "u", PasswordFile: "p"}, "sharedKeyFile")
	f(Config{Address: "f:1", Mode: "simple", SharedKeyFile: "k"}, "sharedKeyFile: the simple mode")
	f(Config{Address: "f:1", Mode: "simple", Window: 2}, "window: the simple mode")
}

// FuzzReadMessage: the fake server takes any bytes without panic.
func FuzzReadMessage(f *testing.F) {
	f.Add([]byte{0x94, 0xa1, 'x', 0xd7, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x81, 0xa5, 'c', 'h', 'u', 'n', 'k', 0xa1, 'y'})
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _, _ = readMessage(msgpack.NewDecoder(bytes.NewReader(data)))
	})
}
