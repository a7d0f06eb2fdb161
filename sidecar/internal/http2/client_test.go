package http2_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

// rawServer gives the test a client of ours and its peer, which has read the
// preface.
func rawServer(t testing.TB, cfg *http2.Config, settings ...xhttp2.Setting) (*http2.Client, *raw, <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := http2.NewClient(nc, cfg)
	done := make(chan error, 1)
	ended := make(chan struct{})
	go func() { defer close(ended); done <- c.Run() }()
	t.Cleanup(func() { c.Close(); <-ended })
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	r := newRaw(t, peer)
	if _, err := io.ReadFull(peer, make([]byte, len(xhttp2.ClientPreface))); err != nil {
		t.Fatal(err)
	}
	_ = r.WriteSettings(settings...)
	if _, err := r.until(func(f xhttp2.Frame) bool {
		s, ok := f.(*xhttp2.SettingsFrame)
		return ok && s.IsAck()
	}); err != nil {
		t.Fatal(err)
	}
	return c, r, done
}

// ask opens a stream, sends a request, and waits until the peer has it.
func ask(t testing.TB, c *http2.Client, r *raw, h *http1.Head) *http2.Stream {
	t.Helper()
	s, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WriteHead(h, nil, true); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.until(func(f xhttp2.Frame) bool {
		return f.Header().Type == xhttp2.FrameHeaders && f.Header().StreamID == s.ID()
	}); err != nil {
		t.Fatal(err)
	}
	return s
}

func readAll(s *http2.Stream) (status int, body []byte, err error) {
	var h http1.Head
	for h.Status < 200 {
		if err := s.ReadHead(&h, in5s()); err != nil {
			return 0, nil, err
		}
	}
	for {
		data, done, err := s.ReadBody(true, in5s())
		body = append(body, data...)
		if done || err != nil {
			return h.Status, body, err
		}
	}
}

func TestMalformedResponsesAreStreamErrors(t *testing.T) {
	tests := []struct {
		name   string
		reason string
		do     func(r *raw, id uint32)
	}{
		{"no status", http2.ReasonPseudoHeader, func(r *raw, id uint32) { _ = r.headers(id, true, "a", "b") }},
		{"a status of two digits", http2.ReasonPseudoHeader, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "20") }},
		{"two statuses", http2.ReasonPseudoHeader, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "200", ":status", "200") }},
		{"a method", http2.ReasonPseudoHeader, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "200", ":method", "GET") }},
		{"101", http2.ReasonPseudoHeader, func(r *raw, id uint32) { _ = r.headers(id, false, ":status", "101") }},
		{"an interim response that is the end", http2.ReasonResponse, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "103") }},
		{"DATA before the head", http2.ReasonResponse, func(r *raw, id uint32) { _ = r.WriteData(id, true, nil) }},
		{"an upper-case name", http2.ReasonName, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "200", "X-A", "b") }},
		{"LF in a value", http2.ReasonValue, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "200", "a", "b\nc") }},
		{"connection", http2.ReasonConnectionField, func(r *raw, id uint32) { _ = r.headers(id, true, ":status", "200", "connection", "close") }},
		{"a body shorter than its length", http2.ReasonLength, func(r *raw, id uint32) {
			_ = r.headers(id, false, ":status", "200", "content-length", "3")
			_ = r.WriteData(id, true, []byte("ab"))
		}},
		{"a body of a response that has none", http2.ReasonLength, func(r *raw, id uint32) {
			_ = r.headers(id, false, ":status", "204")
			_ = r.WriteData(id, true, []byte("ab"))
		}},
		{"interim responses without end", http2.ReasonInterimFlood, func(r *raw, id uint32) {
			repeat(1000, func(int) error { return r.headers(id, false, ":status", "103") })
		}},
	}
	c, r, _ := rawServer(t, nil)
	for _, test := range tests {
		s := ask(t, c, r, get("/"))
		test.do(r, s.ID())
		if test.reason == http2.ReasonInterimFlood {
			r.rst(s.ID()) // before the client has begun to read
		}
		_, _, err := readAll(s)
		var se *http2.StreamError
		if !errors.As(err, &se) || se.Remote || se.Reason != test.reason {
			t.Errorf("%s: %v, want %s", test.name, err, test.reason)
		}
		s.Release()
	}
	if !c.Usable() || c.Active() != 0 {
		t.Error("the connection cannot be used after errors of streams")
	}
}

func TestResponsesWithoutABodyTellItsLength(t *testing.T) {
	c, r, _ := rawServer(t, nil)
	h := get("/")
	h.Method = []byte("HEAD")
	s := ask(t, c, r, h)
	defer s.Release()
	_ = r.headers(s.ID(), true, ":status", "200", "content-length", "77")
	var got http1.Head
	if err := s.ReadHead(&got, in5s()); err != nil || got.Framing != http1.None || got.Length != 77 {
		t.Fatalf("%v %d, %v", got.Framing, got.Length, err)
	}
	if b := string(http1.AppendResponseHead(nil, &got, nil)); b != "HTTP/1.1 200 \r\nContent-Length: 77\r\n\r\n" {
		t.Errorf("in HTTP/1.1 it is %q", b)
	}
}

func TestTheServerBreaksTheConnection(t *testing.T) {
	for _, test := range []struct {
		name   string
		code   http2.ErrCode
		reason string
		do     func(r *raw)
	}{
		{"a push", http2.ProtocolError, http2.ReasonPush, func(r *raw) {
			_ = r.WritePushPromise(xhttp2.PushPromiseParam{StreamID: 1, PromiseID: 2, EndHeaders: true})
		}},
		{"a response to nothing", http2.ProtocolError, http2.ReasonStreamID, func(r *raw) { _ = r.headers(99, true, ":status", "200") }},
		{"a server that allows pushes", http2.ProtocolError, http2.ReasonSetting, func(r *raw) {
			_ = r.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnablePush, Val: 1})
		}},
		{"PING", http2.EnhanceYourCalm, http2.ReasonPingFlood, func(r *raw) {
			repeat(10000, func(int) error { return r.WritePing(false, [8]byte{}) })
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, r, done := rawServer(t, nil)
			s := ask(t, c, r, get("/"))
			defer s.Release()
			gone := make(chan struct{})
			s.OnGone(func() { close(gone) })
			stop := r.drop()
			defer stop()
			test.do(r)
			_, _, err := readAll(s)
			var ce *http2.ConnError
			if !errors.As(err, &ce) || ce.Code != test.code || ce.Reason != test.reason {
				t.Errorf("the stream was told %v", err)
			}
			<-gone
			if err := <-done; !errors.As(err, &ce) {
				t.Errorf("Run: %v", err)
			}
			if _, err := c.Open(); !errors.Is(err, http2.ErrGone) {
				t.Errorf("Open: %v", err)
			}
		})
	}
}

// A request that the server has not looked at may be sent again.
func TestUnprocessedRequestsAreKnown(t *testing.T) {
	c, r, _ := rawServer(t, nil)
	a, b := ask(t, c, r, get("/a")), ask(t, c, r, get("/b"))
	refused := ask(t, c, r, get("/c"))
	early, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	_ = r.WriteRSTStream(refused.ID(), xhttp2.ErrCodeRefusedStream)
	_ = r.WriteGoAway(a.ID(), xhttp2.ErrCodeNo, nil)
	_ = r.headers(a.ID(), true, ":status", "200")
	if status, _, err := readAll(a); status != 200 || err != nil || a.Unprocessed() {
		t.Errorf("below the last stream: %d, %v", status, err)
	}
	for _, s := range []*http2.Stream{b, refused} {
		if _, _, err := readAll(s); err == nil || !s.Unprocessed() || !s.Gone() {
			t.Errorf("stream %d: %v, unprocessed %v, gone %v", s.ID(), err, s.Unprocessed(), s.Gone())
		}
	}
	if err := early.WriteHead(get("/"), nil, true); !errors.Is(err, http2.ErrGone) || !early.Unprocessed() {
		t.Errorf("a stream that had not begun: %v", err)
	}
	if _, err := c.Open(); !errors.Is(err, http2.ErrGone) || c.Usable() {
		t.Errorf("Open behind GOAWAY: %v", err)
	}
	for _, s := range []*http2.Stream{a, b, refused, early} {
		s.Release()
	}
}

func TestTheServersLimitOfStreamsIsKept(t *testing.T) {
	c, r, _ := rawServer(t, nil, xhttp2.Setting{ID: xhttp2.SettingMaxConcurrentStreams, Val: 2})
	a, b := ask(t, c, r, get("/")), ask(t, c, r, get("/"))
	if _, err := c.Open(); !errors.Is(err, http2.ErrBusy) || c.Active() != 2 {
		t.Errorf("a third of two: %v", err)
	}
	a.Release()
	s, err := c.Open()
	if err != nil {
		t.Errorf("behind a release: %v", err)
	}
	s.Release()
	b.Release()
}

func TestWaitsEnd(t *testing.T) {
	c, r, _ := rawServer(t, nil)
	s := ask(t, c, r, get("/"))
	defer s.Release()
	var h http1.Head
	if err := s.ReadHead(&h, time.Now().Add(20*time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("at the deadline: %v", err)
	}
	s.Interrupt()
	if err := s.ReadHead(&h, in5s()); !errors.Is(err, http2.ErrInterrupted) {
		t.Errorf("an interrupt that came before: %v", err)
	}
	done := make(chan error)
	go func() { done <- s.ReadHead(&h, in5s()) }()
	time.Sleep(10 * time.Millisecond)
	s.Interrupt()
	if err := <-done; !errors.Is(err, http2.ErrInterrupted) {
		t.Errorf("an interrupt of a wait: %v", err)
	}
	_ = r.headers(s.ID(), false, ":status", "200")
	if err := s.ReadHead(&h, in5s()); err != nil || h.Status != 200 {
		t.Errorf("after both: %v", err)
	}
	if data, done, err := s.ReadBody(false, time.Time{}); data != nil || done || err != nil {
		t.Errorf("a body that has not come: %q, %v, %v", data, done, err)
	}
	if _, _, err := s.ReadBody(true, time.Now().Add(-time.Second)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline that has passed: %v", err)
	}
	_ = r.WriteRSTStream(s.ID(), xhttp2.ErrCodeInternal)
	_, _, err := s.ReadBody(true, in5s())
	var se *http2.StreamError
	if !errors.As(err, &se) || !se.Remote || se.Code != http2.InternalError {
		t.Errorf("a reset: %v", err)
	}
}

func TestASilentServerIsFound(t *testing.T) {
	c, r, done := rawServer(t, &http2.Config{PingEvery: 50 * time.Millisecond})
	s := ask(t, c, r, get("/"))
	defer s.Release()
	if err := <-done; err == nil {
		t.Error("Run returned nil")
	}
	if !s.Gone() {
		t.Error("the stream does not know")
	}
}

func TestIdleConnectionsEndWithGoAway(t *testing.T) {
	s := serve(t, &http2.Config{IdleTimeout: 50 * time.Millisecond, HeadTimeout: 40 * time.Millisecond}, echo)
	r := rawClient(t, s.addr)
	if code, debug := r.goAway(); code != xhttp2.ErrCodeNo || debug != "" {
		t.Errorf("GOAWAY %v %q", code, debug)
	}
}

// Large field sections are cut into frames that the peer takes.
func TestLargeHeadsAreContinued(t *testing.T) {
	s := serve(t, nil, echo)
	c := dial(t, s.addr, nil)
	st, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Release()
	h := post("/")
	large := bytes.Repeat([]byte("v"), 50<<10)
	h.Headers = []http1.Header{{Name: []byte("Large"), Value: large}}
	r, err := roundTrip(st, h, nil, []byte("b"), nil)
	if err != nil || r.headers["x-echo-large"] != string(large) {
		t.Errorf("%d bytes, %v", len(r.headers["x-echo-large"]), err)
	}
}

func TestEditsApply(t *testing.T) {
	s := serve(t, nil, echo)
	c := dial(t, s.addr, nil)
	st, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Release()
	h := post("http://svc.test/x")
	h.Headers = []http1.Header{
		{Name: []byte("Host"), Value: []byte("svc.test:80")},
		{Name: []byte("Drop"), Value: []byte("1")},
		{Name: []byte("Keep"), Value: []byte("2")},
		{Name: []byte("Replace"), Value: []byte("3")},
		{Name: []byte("Upgrade"), Value: []byte("websocket")},
	}
	e := &http1.Edit{
		Remove: []string{"drop"}, Framing: http1.Length, Length: 2,
		Set: []http1.Pair{{Name: "Replace", Value: []byte(" a\nb ")}, {Name: "Host", Value: []byte("other.test")}},
		Add: []http1.Pair{{Name: "Keep", Value: []byte("4")}},
	}
	r, err := roundTrip(st, h, e, []byte("hi"), nil)
	if err != nil {
		t.Fatal(err)
	}
	delete(r.headers, "content-type")
	want := map[string]string{
		"x-method": "POST", "x-target": "/x", "x-host": "other.test", "x-echo-keep": "24", "x-echo-replace": "a b",
		"x-length": "2",
	}
	for _, m := range []map[string]string{r.headers, want} {
		for k := range m {
			if r.headers[k] != want[k] {
				t.Errorf("%s is %q, want %q", k, r.headers[k], want[k])
			}
		}
	}
}

// certificate for loopback.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"svc.test"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestTLSAndEarlyBytes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	config := &tls.Config{Certificates: []tls.Certificate{certificate(t)}, NextProtos: []string{"h2"}}
	wg.Go(func() {
		nc, err := l.Accept()
		if err != nil {
			return
		}
		tc := tls.Server(nc, config)
		early := make([]byte, 30) // past the preface, into SETTINGS
		if _, err := io.ReadFull(tc, early); err != nil {
			t.Error(err)
		}
		_ = http2.NewServer(tc, early, nil).Serve(echo)
	})
	nc, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	c := http2.NewClient(nc, nil)
	wg.Go(func() { _ = c.Run() })
	body := bytes.Repeat([]byte("z"), 300_000)
	for range 3 {
		s, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		if r, err := roundTrip(s, post("/"), nil, body, nil); err != nil || !bytes.Equal(r.body, body) {
			t.Errorf("over TLS: %v", err)
		}
		s.Release()
	}
	c.Drain()
	_ = l.Close()
	wg.Wait()
}

// What is quick is not taken for stuck, however often one looks.
func TestBusyConnectionsAreNotCut(t *testing.T) {
	s := serve(t, &http2.Config{PingEvery: 20 * time.Millisecond, HeadTimeout: time.Minute}, echo)
	for range 3 {
		c := dial(t, s.addr, nil)
		for range 5 {
			st, err := c.Open()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := roundTrip(st, post("/"), nil, []byte("hi"), nil); err != nil {
				t.Fatal(err)
			}
			st.Release()
			time.Sleep(7 * time.Millisecond)
		}
	}
	if w := s.reasons(); w != "" {
		t.Errorf("counted %q", w)
	}
}

// A connection that waits for its next request holds little: no read or write
// buffer, no goroutine but the one that reads.
func TestIdleConnectionsHoldLittle(t *testing.T) {
	s := serve(t, &http2.Config{PingEvery: 400 * time.Millisecond}, echo)
	const n = 200
	var before, after runtime.MemStats
	clients := make([]*http2.Client, n)
	runtime.GC()
	runtime.ReadMemStats(&before)
	goroutines := runtime.NumGoroutine()
	for i := range clients {
		clients[i] = dial(t, s.addr, nil)
		st, err := clients[i].Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := roundTrip(st, post("/"), nil, []byte("hi"), nil); err != nil {
			t.Fatal(err)
		}
		st.Release()
	}
	// The next look after the last use lets go.
	for deadline := in5s(); runtime.NumGoroutine()-goroutines > 4*n && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	time.Sleep(400 * time.Millisecond)
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	per := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / n
	t.Logf("%d bytes of heap for an idle connection, both sides", per)
	if per > 80<<10 {
		t.Errorf("%d bytes of heap for an idle connection, both sides", per)
	}
	slices.Reverse(clients)
	runtime.KeepAlive(clients)
}
