package logstash

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	lumberlog "github.com/elastic/go-lumber/log"
	lumber "github.com/elastic/go-lumber/server/v2"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) {
	lumberlog.Logger = quiet{}
	goleak.VerifyTestMain(m)
}

// quiet keeps go-lumber from telling about every connection.
type quiet struct{}

func (quiet) Printf(string, ...any) {}
func (quiet) Println(...any)        {}
func (quiet) Print(...any)          {}

func batch(n int) []*record.Record {
	res := &record.Resource{Cluster: "prod", Node: "node-17", Namespace: "shop", Pod: "payments-0", Container: "app", Service: "payments", Labels: map[string]string{"app.kubernetes.io/name": "payments"}}
	var out []*record.Record
	for i := range n {
		out = append(out, &record.Record{
			Time: time.Date(2026, 11, 23, 3, 0, 0, 5+i, time.UTC), Body: fmt.Sprint("line ", i), Stream: "stderr", Resource: res,
			Origin: record.Origin{File: "f", Path: "/p", Offset: int64(i * 10)},
		})
	}
	return out
}

func newOutput(t *testing.T, cfg Config) *Output {
	t.Helper()
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 20 * time.Second // the machine may be busy
	}
	o, err := New(cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
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

func write(t *testing.T, o *Output, records []*record.Record) output.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return o.Write(ctx, records)
}

func clean(r output.Result) bool { return r.Err == nil && len(r.Retry)+len(r.Rejected) == 0 }

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// TestRealLumberServer sends to Elastic's own server of the protocol, which says every
// 20 ms that it is busy.
func TestRealLumberServer(t *testing.T) {
	for _, level := range []int{0, 3, 9} {
		ln := listen(t)
		server, err := lumber.NewWithListener(ln, lumber.Keepalive(20*time.Millisecond), lumber.Timeout(20*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var got []any
		var sizes []int
		wg.Go(func() {
			for b := range server.ReceiveChan() {
				if len(sizes) == 1 {
					time.Sleep(100 * time.Millisecond) // busy
				}
				got = append(got, b.Events...)
				sizes = append(sizes, len(b.Events))
				b.ACK()
			}
		})
		o := newOutput(t, Config{Hosts: []string{ln.Addr().String()}, CompressionLevel: &level, Window: 400, Version: "1.2.3"})
		records := batch(1000)
		records[1].Attributes = map[string]any{"http.response.status_code": 402.0, "ok": true, "none": nil, "list": []any{"a", 2.5}}
		for range 2 {
			if got := write(t, o, records); !clean(got) {
				t.Fatalf("level %d: %+v", level, got)
			}
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if diff := cmp.Diff([]int{400, 400, 200, 400, 400, 200}, sizes); diff != "" {
			t.Errorf("level %d: windows %s", level, diff)
		}
		if len(got) != 2000 {
			t.Fatalf("level %d: %d events", level, len(got))
		}
		for i, e := range got {
			if m, ok := e.(map[string]any); !ok || m["message"] != records[i%1000].Body {
				t.Fatalf("level %d: event %d: %v; want %q", level, i, e, records[i%1000].Body)
			}
		}
		want := map[string]any{
			"@metadata":  map[string]any{"beat": "outrigger", "type": "_doc", "version": "1.2.3"},
			"@timestamp": "2026-11-23T03:00:00.000000006Z", "message": "line 1", "stream": "stderr",
			"service": map[string]any{"name": "payments"}, "container": map[string]any{"name": "app"}, "host": map[string]any{"name": "node-17"},
			"kubernetes": map[string]any{
				"namespace": "shop", "pod": map[string]any{"name": "payments-0"}, "container": map[string]any{"name": "app"},
				"labels": map[string]any{"app_kubernetes_io_name": "payments"},
			},
			"orchestrator": map[string]any{"namespace": "shop", "cluster": map[string]any{"name": "prod"}},
			"log":          map[string]any{"file": map[string]any{"path": "/p"}, "offset": 10.0},
			"http":         map[string]any{"response": map[string]any{"status_code": 402.0}}, "ok": true, "none": nil, "list": []any{"a", 2.5},
		}
		if diff := cmp.Diff(want, got[1]); diff != "" {
			t.Errorf("level %d: %s", level, diff)
		}
	}
}

// beatsServer is a stand-in for Logstash's beats input, strict about the frames of
// lumberjack 2, that acknowledges as a test says.
type beatsServer struct {
	t  *testing.T
	ln net.Listener
	// answer gets the bodies of a window and acknowledges through ack; false closes
	// the connection.
	answer  func(n int, bodies []string, ack func(seq int)) bool
	lenient bool // the client is expected to break the protocol

	wg      sync.WaitGroup
	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	windows int
	opened  int
}

func takes(_ int, bodies []string, ack func(int)) bool {
	ack(len(bodies))
	return true
}

func startServer(t *testing.T, s *beatsServer) *beatsServer {
	t.Helper()
	s.t = t
	if s.ln == nil {
		s.ln = listen(t)
	}
	if s.answer == nil {
		s.answer = takes
	}
	s.conns = map[net.Conn]struct{}{}
	s.wg.Go(func() {
		for {
			conn, err := s.ln.Accept()
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

func (s *beatsServer) address() string { return s.ln.Addr().String() }

func (s *beatsServer) set(answer func(int, []string, func(int)) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *beatsServer) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.windows
}

func (s *beatsServer) stop() {
	_ = s.ln.Close()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *beatsServer) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	r := bufio.NewReader(conn)
	for {
		docs, err := readWindow(r)
		if err != nil {
			var network net.Error
			if !s.lenient && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.As(err, &network) {
				s.t.Errorf("the client sent: %v", err)
			}
			return
		}
		var bodies []string
		for _, d := range docs {
			bodies = append(bodies, fmt.Sprint(d["message"]))
		}
		s.mu.Lock()
		n := s.windows
		s.windows++
		decide := s.answer
		s.mu.Unlock()
		if !decide(n, bodies, func(seq int) { _, _ = conn.Write(binary.BigEndian.AppendUint32([]byte("2A"), uint32(seq))) }) {
			return
		}
	}
}

// readWindow reads 2W and its events, compressed or not, and nothing else.
func readWindow(r *bufio.Reader) (docs []map[string]any, err error) {
	var head [6]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	if string(head[:2]) != "2W" {
		return nil, fmt.Errorf("%q; want 2W", head[:2])
	}
	count := int(binary.BigEndian.Uint32(head[2:]))
	var frames io.Reader = r
	code, err := r.Peek(2)
	if err != nil {
		return nil, err
	}
	if string(code) == "2C" {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return nil, err
		}
		packed := make([]byte, binary.BigEndian.Uint32(head[2:]))
		if _, err := io.ReadFull(r, packed); err != nil {
			return nil, err
		}
		z, err := zlib.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, err
		}
		all, err := io.ReadAll(z)
		if err != nil {
			return nil, err
		}
		frames = bytes.NewReader(all)
		defer func() {
			if n := frames.(*bytes.Reader).Len(); n > 0 && err == nil {
				docs, err = nil, fmt.Errorf("%d bytes after the last event", n)
			}
		}()
	}
	for i := range count {
		var event [10]byte
		if _, err := io.ReadFull(frames, event[:]); err != nil {
			return nil, err
		}
		if seq := binary.BigEndian.Uint32(event[2:6]); string(event[:2]) != "2J" || seq != uint32(i)+1 {
			return nil, fmt.Errorf("%q %d; want 2J %d", event[:2], seq, i+1)
		}
		body := make([]byte, binary.BigEndian.Uint32(event[6:]))
		if _, err := io.ReadFull(frames, body); err != nil {
			return nil, err
		}
		doc := map[string]any{}
		if err := json.Unmarshal(body, &doc); err != nil {
			return nil, fmt.Errorf("%s: %w", body, err)
		}
		docs = append(docs, doc)
	}
	return docs, nil
}

// What is acknowledged is, whatever becomes of the rest; and the output recovers.
func TestAcknowledgements(t *testing.T) {
	f := func(name string, answer func(n int, bodies []string, ack func(int)) bool, wantErr string, wantRetry ...int) {
		t.Helper()
		s := startServer(t, &beatsServer{answer: answer})
		o := newOutput(t, Config{Hosts: []string{s.address()}, Window: 4, AckTimeout: 400 * time.Millisecond, BusyTimeout: 1200 * time.Millisecond})
		got := write(t, o, batch(10))
		if (got.Err != nil) != (wantErr != "") || got.Permanent || !cmp.Equal(got.Retry, wantRetry) || len(got.Rejected) > 0 {
			t.Errorf("%s: %+v; want error %q, retry %v", name, got, wantErr, wantRetry)
		}
		if got.Err != nil && !strings.Contains(got.Err.Error(), wantErr) {
			t.Errorf("%s: %v; want %q", name, got.Err, wantErr)
		}
		s.set(takes)
		if got := write(t, o, batch(2)); !clean(got) {
			t.Errorf("%s, after the server has recovered: %+v", name, got)
		}
	}
	f("one by one", func(_ int, bodies []string, ack func(int)) bool {
		for i := range bodies {
			ack(i + 1)
		}
		return true
	}, "")
	f("busy, longer than the timeout", func(_ int, bodies []string, ack func(int)) bool {
		for i := range 4 {
			time.Sleep(150 * time.Millisecond)
			ack(i / 2) // 0 and the same again
		}
		ack(len(bodies))
		return true
	}, "")
	f("busy for ever", func(_ int, _ []string, ack func(int)) bool {
		for range 100 {
			time.Sleep(20 * time.Millisecond)
			ack(0)
		}
		return true
	}, "busy")
	f("says nothing", func(int, []string, func(int)) bool { return true }, "no acknowledgement within 400ms")
	f("partly, then nothing", func(n int, bodies []string, ack func(int)) bool {
		if n < 1 {
			ack(len(bodies))
			return true
		}
		ack(3)
		return true
	}, "", 7, 8, 9)
	f("partly, then it closes", func(_ int, _ []string, ack func(int)) bool {
		ack(2)
		return false
	}, "", 2, 3, 4, 5, 6, 7, 8, 9)
	f("closes", func(int, []string, func(int)) bool { return false }, "logstash")
	f("too much", func(_ int, _ []string, ack func(int)) bool {
		ack(5)
		return true
	}, "event 5 of a window of 4")
}

// Two windows are on their way at a time, not more.
func TestPipelining(t *testing.T) {
	var held []int
	s := startServer(t, &beatsServer{answer: func(n int, bodies []string, ack func(int)) bool {
		held = append(held, len(bodies))
		if len(held) < 2 && n < 4 { // the client must send another before this is answered
			return true
		}
		for _, size := range held {
			ack(size)
		}
		held = nil
		return true
	}})
	o := newOutput(t, Config{Hosts: []string{s.address()}, Window: 2})
	if got := write(t, o, batch(10)); !clean(got) {
		t.Errorf("%+v", got)
	}
}

func TestWindowsAreBoundInBytes(t *testing.T) {
	s := startServer(t, &beatsServer{})
	no := 0
	o := newOutput(t, Config{Hosts: []string{s.address()}, CompressionLevel: &no})
	records := batch(4)
	for _, r := range records {
		r.Body = strings.Repeat("x", 3<<20)
	}
	records[3].Body = strings.Repeat("x", maxDocument)
	got := write(t, o, records)
	if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 1 || got.Rejected[0].Index != 3 {
		t.Errorf("%v, retry %v, rejected %d", got.Err, got.Retry, len(got.Rejected))
	}
	if n := s.count(); n != 2 {
		t.Errorf("%d windows; want 2", n)
	}
}

func TestRejected(t *testing.T) {
	s := startServer(t, &beatsServer{})
	o := newOutput(t, Config{Hosts: []string{s.address()}})
	records := batch(4)
	records[0].Attributes = map[string]any{"x.y": make(chan int)}
	records[2].Attributes = map[string]any{"x": math.Inf(1)}
	got := write(t, o, records)
	if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 2 || got.Rejected[0].Index != 0 || got.Rejected[1].Index != 2 || !strings.Contains(got.Rejected[0].Reason, `"x.y"`) {
		t.Errorf("%+v", got)
	}
	s.stop()
	if got := write(t, o, records[:1]); got.Err != nil || len(got.Rejected) != 1 {
		t.Errorf("%+v; nothing is to be sent, so no server is needed", got)
	}
}

func TestSeveralHosts(t *testing.T) {
	gone := listen(t)
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	a, b := startServer(t, &beatsServer{}), startServer(t, &beatsServer{})
	o := newOutput(t, Config{Hosts: []string{gone.Addr().String(), a.address(), b.address()}})
	for range 3 {
		if got := write(t, o, batch(1)); !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	a.stop()
	if a.count() != 3 || b.count() != 0 || a.opened != 1 {
		t.Errorf("%d and %d windows, %d connections; want 3, 0 and 1", a.count(), b.count(), a.opened)
	}
	if got := write(t, o, batch(1)); !clean(got) || b.count() != 1 {
		t.Errorf("%+v; want the next host to take over within the attempt", got)
	}
	b.stop()
	if got := write(t, o, batch(1)); got.Err == nil || got.Permanent || !strings.Contains(got.Err.Error(), a.address()) || !strings.Contains(got.Err.Error(), b.address()) {
		t.Errorf("%+v; want an error that names all", got)
	}
	a, b = startServer(t, &beatsServer{}), startServer(t, &beatsServer{})
	o = newOutput(t, Config{Hosts: []string{a.address(), b.address()}, LoadBalance: true})
	for range 6 {
		if got := write(t, o, batch(1)); !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	if a.count() != 3 || b.count() != 3 {
		t.Errorf("%d and %d windows; want 3 each", a.count(), b.count())
	}
}

func TestContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := startServer(t, &beatsServer{answer: func(_ int, _ []string, ack func(int)) bool {
		ack(3)
		time.Sleep(50 * time.Millisecond)
		cancel()
		return true
	}})
	o := newOutput(t, Config{Hosts: []string{s.address()}})
	if got := o.Write(ctx, batch(5)); got.Err != nil || !cmp.Equal(got.Retry, []int{3, 4}) {
		t.Errorf("%+v; want 3 and 4 to be sent again", got)
	}
	if got := o.Write(ctx, batch(1)); !errors.Is(got.Err, context.Canceled) {
		t.Errorf("%+v", got)
	}
	s.set(takes)
	if got := write(t, o, batch(1)); !clean(got) {
		t.Errorf("%+v", got)
	}
}

func TestTLS(t *testing.T) {
	// A certificate for example.com and 127.0.0.1, signed by itself.
	certificate := httptest.NewUnstartedServer(nil)
	certificate.StartTLS()
	defer certificate.Close()
	certFile, keyFile := writePair(t, certificate.TLS.Certificates[0])
	start := func(auth tls.ClientAuthType) *beatsServer {
		return startServer(t, &beatsServer{lenient: true, ln: tls.NewListener(listen(t), &tls.Config{Certificates: certificate.TLS.Certificates, MinVersion: tls.VersionTLS12, ClientAuth: auth})})
	}
	s := start(tls.NoClientCert)
	f := func(name string, cfg Config, wantErr string) {
		t.Helper()
		cfg.Hosts = []string{s.address()}
		o := newOutput(t, cfg)
		for range 2 { // the second on the same connection
			got := write(t, o, batch(2))
			// What the server says can be lost when it hangs up at once.
			for began := time.Now(); wantErr != "" && got.Err != nil && !got.Permanent && time.Since(began) < 30*time.Second; {
				got = write(t, o, batch(2))
			}
			if wantErr == "" && !clean(got) || wantErr != "" && (got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), wantErr)) {
				t.Errorf("%s: %+v; want %q", name, got, wantErr)
			}
		}
	}
	f("skip verify", Config{TLS: true, InsecureSkipVerify: true}, "")
	f("authority", Config{TLS: true, CAFile: certFile}, "")
	s.mu.Lock()
	if s.opened != 2 {
		t.Errorf("%d connections; want 2", s.opened)
	}
	s.mu.Unlock()
	f("server name", Config{TLS: true, CAFile: certFile, ServerName: "example.com"}, "")
	f("unknown authority", Config{TLS: true}, "set caFile")
	f("another host", Config{TLS: true, CAFile: certFile, ServerName: "elsewhere.example"}, "set serverName")
	f("no such file", Config{TLS: true, CAFile: certFile + "x"}, "caFile")
	var refused permanentError
	if _, err := readAck(strings.NewReader("\x15\x03\x03\x00\x02\x02\x46")); !errors.As(err, &refused) || !strings.Contains(err.Error(), "set tls") {
		t.Errorf("no TLS to a server with it: %v", err)
	}
	s = start(tls.RequireAnyClientCert)
	f("client certificate", Config{TLS: true, CAFile: certFile, CertFile: certFile, KeyFile: keyFile}, "")
	f("no client certificate", Config{TLS: true, CAFile: certFile}, "set certFile and keyFile")
	f("missing client certificate", Config{TLS: true, CAFile: certFile, CertFile: certFile + "x", KeyFile: keyFile}, "certFile")
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
	}
	ten := 10
	f(Config{Hosts: []string{"a:5044", "[::1]:5044"}}, "")
	f(Config{}, "hosts is empty")
	f(Config{Hosts: []string{"a"}}, "host:port")
	f(Config{Hosts: []string{":1"}}, "host:port")
	f(Config{Hosts: make([]string, 65)}, "65 are more")
	f(Config{Hosts: []string{"a:1"}, CompressionLevel: &ten}, "compressionLevel")
	f(Config{Hosts: []string{"a:1"}, Window: -1}, "window")
	f(Config{Hosts: []string{"a:1"}, Pipelining: 17}, "pipelining")
	f(Config{Hosts: []string{"a:1"}, BusyTimeout: -1}, "busyTimeout")
	f(Config{Hosts: []string{"a:1"}, ServerName: "x"}, "without TLS")
	f(Config{Hosts: []string{"a:1"}, TLS: true, KeyFile: "x"}, "certFile")
}
