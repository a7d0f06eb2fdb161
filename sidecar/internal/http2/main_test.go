package http2_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

func TestMain(m *testing.M) {
	if addr := os.Getenv("HTTP2_TEST_SERVER"); addr != "" {
		testServer(addr)
		return
	}
	goleak.VerifyTestMain(m)
}

// testServer is for conformance tools, until it is killed. It answers when it
// has the whole request, with a body, and not at once: some tests need streams
// that last.
func testServer(addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		panic(err)
	}
	for {
		nc, err := l.Accept()
		if err != nil {
			panic(err)
		}
		go func() {
			_ = http2.NewServer(nc, nil, nil).Serve(func(s *http2.Stream) {
				time.Sleep(50 * time.Millisecond)
				for done := false; !done; {
					var err error
					if _, done, err = s.ReadBody(true, in5s()); err != nil {
						return
					}
				}
				_ = s.WriteHead(&http1.Head{Status: 200, Framing: http1.Chunked}, nil, false)
				_ = s.WriteData([]byte("hello, world"), true, in5s())
				_ = s.Flush()
			})
		}()
	}
}

func in5s() time.Time { return time.Now().Add(5 * time.Second) }

// echo answers with the body and the trailers of the request, and with what it
// said as x-* headers.
func echo(s *http2.Stream) {
	defer s.Release()
	var h http1.Head
	if s.ReadHead(&h, in5s()) != nil {
		return
	}
	reply := http1.Head{Status: 200, Framing: http1.Chunked, Headers: []http1.Header{
		{Name: []byte("Content-Type"), Value: []byte("text/plain")},
		{Name: []byte("X-Method"), Value: h.Method},
		{Name: []byte("X-Target"), Value: h.Target},
		{Name: []byte("X-Host"), Value: h.Host},
	}}
	for _, f := range h.Headers {
		reply.Headers = append(reply.Headers, http1.Header{Name: append([]byte("x-echo-"), f.Name...), Value: f.Value})
	}
	if h.Framing == http1.Length {
		reply.Headers = append(reply.Headers, http1.Header{Name: []byte("X-Length"), Value: strconv.AppendInt(nil, h.Length, 10)})
	}
	if string(h.Method) == "HEAD" {
		_ = s.WriteHead(&reply, nil, true)
		_ = s.Flush()
		return
	}
	if s.WriteHead(&reply, nil, false) != nil {
		return
	}
	for {
		data, done, err := s.ReadBody(true, in5s())
		if err != nil {
			return
		}
		if done {
			t := s.Trailers()
			if s.WriteData(data, len(t) == 0, in5s()) != nil {
				return
			}
			if len(t) > 0 {
				_ = s.WriteTrailers(t)
			}
			_ = s.Flush()
			return
		}
		if s.WriteData(data, false, in5s()) != nil || s.Flush() != nil {
			return
		}
	}
}

// server is a listener whose connections are served until the test ends.
type server struct {
	addr string

	mu    sync.Mutex
	conns []*http2.Server
	errs  []error
	why   []string
}

func serve(t testing.TB, cfg *http2.Config, handle func(*http2.Stream)) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String()}
	c := http2.Config{}
	if cfg != nil {
		c = *cfg
	}
	c.OnProtocolError = func(reason string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.why = append(s.why, reason)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			srv := http2.NewServer(nc, nil, &c)
			s.mu.Lock()
			s.conns = append(s.conns, srv)
			s.mu.Unlock()
			wg.Go(func() {
				err := srv.Serve(handle)
				s.mu.Lock()
				s.errs = append(s.errs, err)
				s.mu.Unlock()
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		s.mu.Lock()
		conns := s.conns
		s.mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
		wg.Wait()
	})
	return s
}

// counted waits until n reasons were given: they are given after the frames that
// say so to the client.
func (s *server) counted(n int) []string {
	for deadline := in5s(); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		why := slices.Clone(s.why)
		s.mu.Unlock()
		if len(why) >= n || time.Now().After(deadline) {
			return why
		}
	}
}

func (s *server) reasons() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.why, ",")
}

// The other implementation is that of net/http, which is x/net's.

func withPriorKnowledge() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

func otherTransport(t testing.TB) *http.Transport {
	tr := &http.Transport{Protocols: withPriorKnowledge()}
	t.Cleanup(tr.CloseIdleConnections)
	return tr
}

// otherServer serves until the test ends.
func otherServer(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, Protocols: withPriorKnowledge(), HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250}}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(l) })
	t.Cleanup(func() { _ = srv.Close(); wg.Wait() })
	return l.Addr().String()
}

// dial is a client of ours.
func dial(t testing.TB, addr string, cfg *http2.Config) *http2.Client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := http2.NewClient(nc, cfg)
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run() }()
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

// response is what a stream of ours brought.
type response struct {
	interim  []int
	status   int
	headers  map[string]string
	body     []byte
	trailers map[string]string
}

// roundTrip sends a request and reads the response.
func roundTrip(s *http2.Stream, h *http1.Head, e *http1.Edit, body []byte, trailers []http1.Header) (*response, error) {
	none := body == nil && trailers == nil
	if err := s.WriteHead(h, e, none); err != nil {
		return nil, err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	if !none {
		wg.Go(func() {
			if s.WriteData(body, trailers == nil, in5s()) == nil && trailers != nil {
				_ = s.WriteTrailers(trailers)
			}
			_ = s.Flush()
		})
	} else if err := s.Flush(); err != nil {
		return nil, err
	}
	r := &response{headers: map[string]string{}, trailers: map[string]string{}}
	var head http1.Head
	for {
		if err := s.ReadHead(&head, in5s()); err != nil {
			return nil, err
		}
		if head.Status >= 200 {
			break
		}
		r.interim = append(r.interim, head.Status)
	}
	r.status = head.Status
	for _, f := range head.Headers {
		r.headers[string(f.Name)] += string(f.Value)
	}
	for {
		data, done, err := s.ReadBody(true, in5s())
		if err != nil {
			return nil, err
		}
		r.body = append(r.body, data...)
		if done {
			break
		}
	}
	for _, f := range s.Trailers() {
		r.trailers[string(f.Name)] += string(f.Value)
	}
	return r, nil
}

func get(target string) *http1.Head {
	return &http1.Head{Method: []byte("GET"), Target: []byte(target), Host: []byte("svc.test:80"), Framing: http1.None, Minor: 1}
}

func post(target string) *http1.Head {
	return &http1.Head{Method: []byte("POST"), Target: []byte(target), Host: []byte("svc.test:80"), Framing: http1.Chunked, Minor: 1}
}

func TestServerAnswersAnotherImplementation(t *testing.T) {
	s := serve(t, nil, echo)
	c := &http.Client{Transport: otherTransport(t), Timeout: 10 * time.Second}
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17) // 2 MiB, past every window
	for _, body := range [][]byte{nil, []byte("small"), big} {
		req, err := http.NewRequest(http.MethodPost, "http://"+s.addr+"/path?q=1", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Cookie", "a=1; b=2")
		if body != nil {
			req.ContentLength = -1
			req.Trailer = http.Header{"X-Sum": {"42"}}
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || !bytes.Equal(got, body) {
			t.Fatalf("a body of %d bytes came back as %d bytes, %v", len(body), len(got), err)
		}
		if res.Header.Get("X-Method") != "POST" || res.Header.Get("X-Target") != "/path?q=1" || res.Header.Get("X-Host") != s.addr {
			t.Errorf("the head came back as %v", res.Header)
		}
		if v := res.Header.Get("X-Echo-Cookie"); v != "a=1; b=2" {
			t.Errorf("cookies came as %q", v)
		}
		if body != nil && res.Trailer.Get("X-Sum") != "42" {
			t.Errorf("trailers came back as %v", res.Trailer)
		}
	}
	if w := s.reasons(); w != "" {
		t.Errorf("protocol errors: %s", w)
	}
}

func TestClientAsksAnotherImplementation(t *testing.T) {
	addr := otherServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Link", "</a>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		w.Header().Set("X-Host", r.Host)
		w.Header().Set("X-Uri", r.RequestURI)
		w.Header().Set("X-Te", r.Header.Get("Te"))
		w.Header().Set("X-Conn", r.Header.Get("Keep-Alive"))
		w.Header().Set("Trailer", "X-Sum")
		w.WriteHeader(201)
		_, _ = w.Write(body)
		w.Header().Set("X-Sum", r.Trailer.Get("X-Req"))
	})
	c := dial(t, addr, nil)
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	for _, body := range [][]byte{{}, []byte("small"), big} {
		s, err := c.Open()
		if err != nil {
			t.Fatal(err)
		}
		h := post("/up?x=y")
		h.Headers = []http1.Header{
			{Name: []byte("Keep-Alive"), Value: []byte("5")},
			{Name: []byte("Connection"), Value: []byte("close")},
			{Name: []byte("TE"), Value: []byte("gzip, trailers")},
			{Name: []byte("Trailer"), Value: []byte("x-req")},
		}
		r, err := roundTrip(s, h, nil, body, []http1.Header{{Name: []byte("X-Req"), Value: []byte("7")}})
		if err != nil {
			t.Fatal(err)
		}
		if r.status != 201 || !bytes.Equal(r.body, body) || len(r.interim) != 1 || r.interim[0] != 103 {
			t.Fatalf("status %d, interim %v, %d bytes for %d", r.status, r.interim, len(r.body), len(body))
		}
		if r.headers["x-host"] != "svc.test:80" || r.headers["x-uri"] != "/up?x=y" || r.headers["x-te"] != "trailers" || r.headers["x-conn"] != "" {
			t.Errorf("headers %v", r.headers)
		}
		if r.trailers["x-sum"] != "7" {
			t.Errorf("trailers %v", r.trailers)
		}
		s.Release()
	}
	if n := c.Active(); n != 0 {
		t.Errorf("%d streams are active after all were released", n)
	}
}

func TestManyStreamsAtOnce(t *testing.T) {
	s := serve(t, &http2.Config{StreamWindow: 1000, MaxStreams: 100}, echo)
	c := dial(t, s.addr, &http2.Config{StreamWindow: 777})
	body := bytes.Repeat([]byte("x"), 20_000)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 4 {
				st, err := c.Open()
				if err != nil {
					t.Error(err)
					return
				}
				r, err := roundTrip(st, post("/"), nil, body, nil)
				if err != nil {
					t.Error(err)
				} else if !bytes.Equal(r.body, body) {
					t.Errorf("%d bytes came back for %d", len(r.body), len(body))
				}
				st.Release()
			}
		})
	}
	wg.Wait()
	if w := s.reasons(); w != "" {
		t.Errorf("protocol errors: %s", w)
	}
}

func TestDrainLetsStreamsEndAndServeReturn(t *testing.T) {
	began, release := make(chan bool), make(chan bool)
	s := serve(t, nil, func(st *http2.Stream) {
		began <- true
		<-release
		echo(st)
	})
	c := dial(t, s.addr, nil)
	st, err := c.Open()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := roundTrip(st, post("/"), nil, []byte("hello"), nil)
		st.Release()
		done <- err
	}()
	<-began
	s.mu.Lock()
	srv := s.conns[0]
	s.mu.Unlock()
	srv.Drain()
	srv.Drain()
	for c.Usable() {
		time.Sleep(time.Millisecond)
	}
	if _, err := c.Open(); !errors.Is(err, http2.ErrGone) {
		t.Errorf("Open on a drained connection: %v", err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Errorf("the stream in flight: %v", err)
	}
	for deadline := in5s(); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		n := len(s.errs)
		s.mu.Unlock()
		if n == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("Serve has not returned")
		}
	}
	if s.errs[0] != nil {
		t.Errorf("Serve: %v", s.errs[0])
	}
}
