package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

const key = "shop/payments:80"

// mesh is a sidecar whose outbound port leads to real servers on loopback.
type mesh struct {
	t        testing.TB
	addr     string
	table    *table.Current
	cluster  table.Cluster
	route    route.Route
	conns    *listener.Group
	registry *prometheus.Registry
	clusters *upstream.Clusters
	proxy    *proxy.Proxy

	quiet    bool // throw the access log away
	mu       sync.Mutex
	lines    []map[string]any
	evidence []breaker.Evidence
	logs     chan struct{}
}

// start runs a sidecar in front of the servers. adjust may change its policies.
func start(t testing.TB, adjust func(*table.Cluster, *route.Route), servers ...string) *mesh {
	t.Helper()
	m := &mesh{t: t, table: &table.Current{}, conns: &listener.Group{}, registry: prometheus.NewRegistry(), logs: make(chan struct{}, 10000)}
	m.cluster = table.Cluster{Name: key, Policy: "shop/payments", Budget: retry.Budget{Percent: 20, MinConcurrency: 3}}
	m.cluster.Endpoints = endpoints(servers...)
	m.route = route.Route{Name: "default", Clusters: []route.Weighted{{Cluster: key, Weight: 1}}}
	if adjust != nil {
		adjust(&m.cluster, &m.route)
	}
	protocol := "http"
	switch m.route.Name {
	case "tcp", "auto", "tls":
		protocol = m.route.Name
	}
	m.table.Store(&table.Table{
		Version:      "v1",
		Destinations: map[string]*table.Destination{key: {Key: key, Protocol: protocol, Cluster: key, Routes: &route.Config{Name: key, Routes: []route.Route{m.route}}}},
		Clusters:     map[string]*table.Cluster{key: &m.cluster},
	})
	node := bootstrap.Config{Namespace: "shop", Workload: "storefront", Instance: "storefront-0"}
	ids := 0
	clusters := upstream.New(func() string { ids++; return fmt.Sprintf("e%d", ids) }, func(e breaker.Evidence) {
		m.mu.Lock()
		m.evidence = append(m.evidence, e)
		m.mu.Unlock()
	}, func(string, outlier.Event) {})
	p := &proxy.Proxy{
		Node: node, Table: m.table, Clusters: clusters, Conns: m.conns, Log: accesslog.New("shop", "storefront", "storefront-0"),
		Metrics: telemetry.NewMetrics(m.registry, node), Seen: &detect.Memory{},
	}
	m.clusters, m.proxy = clusters, p
	l, err := program.Listen(t.Context(), "--upstream payments", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = p.ServeOutbound(ctx, l, key) })
	wg.Go(func() { _ = clusters.Run(ctx, m.table) })
	logCtx, logCancel := context.WithCancel(context.Background())
	wg.Go(func() { _ = p.Log.Run(logCtx, m) })
	t.Cleanup(func() {
		cancel()
		drain, stop := context.WithTimeout(context.Background(), 2*time.Second)
		defer stop()
		m.conns.Drain(drain)
		logCancel()
		wg.Wait()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	})
	return m
}

// endpoints at these addresses.
func endpoints(servers ...string) (out []balance.Endpoint) {
	for i, s := range servers {
		out = append(out, balance.Endpoint{Address: netip.MustParseAddrPort(s), Instance: fmt.Sprintf("payments-%d", i), Healthy: true, Weight: 1})
	}
	return out
}

// Write takes the access log.
func (m *mesh) Write(b []byte) (int, error) {
	if m.quiet {
		return len(b), nil
	}
	for one := range bytes.Lines(b) {
		var line map[string]any
		if err := json.Unmarshal(one, &line); err != nil {
			m.t.Errorf("access log is not JSON: %s", one)
		}
		m.mu.Lock()
		m.lines = append(m.lines, line)
		m.mu.Unlock()
		m.logs <- struct{}{}
	}
	return len(b), nil
}

// logged waits for the next access log line.
func (m *mesh) logged() map[string]any {
	m.t.Helper()
	select {
	case <-m.logs:
	case <-time.After(5 * time.Second):
		m.t.Fatal("no access log line within 5 s")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lines[len(m.lines)-1]
}

func (m *mesh) do(method, path string, body io.Reader, header ...string) (*http.Response, string) {
	m.t.Helper()
	req, err := http.NewRequestWithContext(m.t.Context(), method, "http://"+m.addr+path, body)
	if err != nil {
		m.t.Fatal(err)
	}
	req.Host = "payments.shop"
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		m.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		m.t.Fatalf("%s %s: body: %v", method, path, err)
	}
	return resp, string(b)
}

func serve(t *testing.T, h http.HandlerFunc) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func TestCarriesARequestAndItsAnswer(t *testing.T) {
	var seen http.Header
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		seen = r.Header.Clone()
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Answer", "yes")
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "%s %s %s %s", r.Method, r.URL, r.Host, b)
	}))
	resp, body := m.do("POST", "/pay/./now?card=1", strings.NewReader("12 EUR"), "Connection", "x-secret", "X-Secret", "hop")
	if resp.StatusCode != 201 || body != "POST /pay/now?card=1 payments.shop 12 EUR" || resp.Header.Get("X-Answer") != "yes" {
		t.Fatalf("%d %q %v", resp.StatusCode, body, resp.Header)
	}
	if seen.Get("X-Secret") != "" || seen.Get("Traceparent") == "" || seen.Get("X-Request-Id") == "" || seen.Get("X-Outrigger-Attempt") != "1" {
		t.Errorf("the upstream saw %v", seen)
	}
	line := m.logged()
	if line["url.path"] != "/pay/now" || line["http.response.status_code"] != float64(201) || line["http.request.body.bytes"] != float64(6) || !strings.Contains(seen.Get("Traceparent"), line["trace.id"].(string)) {
		t.Errorf("logged %v", line)
	}
}

func TestBodiesOfAnySizeAndFraming(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		if r.URL.Path == "/length" {
			w.Header().Set("Content-Length", r.Header.Get("X-Size"))
		}
		_, _ = io.Copy(w, r.Body)
	}))
	for _, size := range []int{0, 1, 100, 16 << 10, 64<<10 + 1, 3 << 20} {
		payload := bytes.Repeat([]byte("0123456789abcdef"), size/16+1)[:size]
		for _, path := range []string{"/length", "/chunked"} {
			var reader io.Reader = bytes.NewReader(payload)
			if path == "/chunked" {
				reader = struct{ io.Reader }{reader} // of unknown length: sent in chunks
			}
			resp, body := m.do("POST", path, reader, "X-Size", fmt.Sprint(size))
			if resp.StatusCode != 200 || body != string(payload) {
				t.Errorf("%s, %d bytes: %d with %d bytes back", path, size, resp.StatusCode, len(body))
			}
		}
	}
}

// raw sends bytes as they are and returns all that comes back.
func (m *mesh) raw(request string) string {
	m.t.Helper()
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		m.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, request); err != nil {
		m.t.Fatal(err)
	}
	b, _ := io.ReadAll(c)
	return string(b)
}

func TestPipelinedRequestsAreAnsweredInOrder(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }))
	got := m.raw("GET /a HTTP/1.1\r\nHost: x\r\n\r\nPOST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET /c HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	r := bufio.NewReader(strings.NewReader(got))
	for _, want := range []string{"/a", "/b", "/c"} {
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("%v in\n%s", err, got)
		}
		b, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if string(b) != want {
			t.Fatalf("answer %q; want %q", b, want)
		}
	}
}

func TestHeadAndNoContentHaveNoBody(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/none" {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.Header().Set("Content-Length", "5")
		if r.Method != http.MethodHead {
			_, _ = io.WriteString(w, "hello")
		}
	}))
	if resp, body := m.do("HEAD", "/", nil); resp.ContentLength != 5 || body != "" {
		t.Errorf("HEAD: length %d, body %q", resp.ContentLength, body)
	}
	if resp, body := m.do("GET", "/none", nil); resp.StatusCode != 204 || body != "" {
		t.Errorf("204: %d %q", resp.StatusCode, body)
	}
	if _, body := m.do("GET", "/", nil); body != "hello" {
		t.Errorf("the connection is out of step: %q", body)
	}
}

func TestAmbiguousRequestsAreRefusedWithTheReason(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, _ *http.Request) { t.Error("a refused request reached the upstream") }))
	for reason, request := range map[string]string{
		"CL+TE":   "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"bare LF": "GET / HTTP/1.1\nHost: x\n\n",
		"no Host": "GET / HTTP/1.1\r\n\r\n",
		"CONNECT": "CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
		"path":    "GET /..%2f..%2fetc HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		got := m.raw(request)
		if !strings.HasPrefix(got, "HTTP/1.1 4") || !strings.Contains(strings.ToLower(got), "connection: close") {
			t.Errorf("%s: answered %q", reason, got)
		}
		if line := m.logged(); line["outrigger.response_flags"] != "DPE" || line["error.message"] == nil {
			t.Errorf("%s: logged %v", reason, line)
		}
	}
}

func TestRetriesAnotherEndpoint(t *testing.T) {
	var bad, good atomic.Int32
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Retry = retry.Policy{Name: "p", On: retry.OnGatewayError, Attempts: 2, BackoffBase: time.Millisecond, BackoffMax: time.Millisecond}
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		bad.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}), serve(t, func(w http.ResponseWriter, r *http.Request) {
		good.Add(1)
		b, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s attempt %s", b, r.Header.Get("X-Outrigger-Attempt"))
	}))
	retried := 0
	for range 40 {
		resp, body := m.do("POST", "/", strings.NewReader("body"))
		line := m.logged()
		if resp.StatusCode != 200 || !strings.HasPrefix(body, "body attempt ") {
			t.Fatalf("%d %q: %v", resp.StatusCode, body, line)
		}
		if line["outrigger.attempts"] == float64(2) {
			retried++
		}
	}
	if int(bad.Load()) != retried || good.Load() != 40 || retried == 0 {
		t.Errorf("%d at the bad endpoint, %d at the good one, %d retried", bad.Load(), good.Load(), retried)
	}
}

func TestRetryLimitPassesTheLastAnswerOn(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Retry = retry.Policy{Name: "p", On: retry.On5xx, Attempts: 2, BackoffBase: time.Millisecond, BackoffMax: time.Millisecond}
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "attempt "+r.Header.Get("X-Outrigger-Attempt"))
	}))
	resp, body := m.do("GET", "/", nil)
	if line := m.logged(); resp.StatusCode != 500 || body != "attempt 3" || line["outrigger.response_flags"] != "URX" {
		t.Fatalf("%d %q %v", resp.StatusCode, body, line)
	}
}

func TestLargeBodiesAreNotRetried(t *testing.T) {
	var calls atomic.Int32
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Retry = retry.Policy{Name: "p", On: retry.On5xx, Attempts: 2, BackoffBase: time.Millisecond, BackoffMax: time.Millisecond}
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	resp, _ := m.do("POST", "/", bytes.NewReader(make([]byte, 1<<20)))
	if line := m.logged(); resp.StatusCode != 503 || calls.Load() != 1 {
		t.Fatalf("%d after %d calls: %v", resp.StatusCode, calls.Load(), line)
	}
}

func TestBreakerOpensExplainsAndCloses(t *testing.T) {
	var healthy atomic.Bool
	m := start(t, func(c *table.Cluster, _ *route.Route) {
		c.Breaker = &breaker.Policy{Name: "shop/payments", ConsecutiveFailures: 3, Window: 10 * time.Second, OpenFor: 200 * time.Millisecond, HalfOpenRequests: 1, FailureOn: breaker.FailDefault}
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if !healthy.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	for range 3 {
		m.do("GET", "/pay", nil)
		m.logged()
	}
	resp, _ := m.do("GET", "/pay", nil)
	line := m.logged()
	if resp.StatusCode != 503 || resp.Header.Get("X-Outrigger-Breaker") != "shop/payments open 1" || resp.Header.Get("Retry-After") != "1" || line["outrigger.response_flags"] != "UO" || line["outrigger.breaker.policy"] != "shop/payments" {
		t.Fatalf("%d %v %v", resp.StatusCode, resp.Header, line)
	}
	healthy.Store(true)
	time.Sleep(250 * time.Millisecond)
	if resp, _ := m.do("GET", "/pay", nil); resp.StatusCode != 200 {
		t.Fatalf("the probe got %d", resp.StatusCode)
	}
	m.logged() // by then the outcome has been counted
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.evidence) != 3 || m.evidence[0].To != "open" || m.evidence[2].To != "closed" || len(m.evidence[0].Requests) != 3 || m.evidence[0].Requests[0].Path != "/pay" {
		t.Fatalf("evidence %+v", m.evidence)
	}
}

func TestTimeoutsAreFlagged(t *testing.T) {
	release := make(chan struct{})
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Timeout = 50 * time.Millisecond },
		serve(t, func(http.ResponseWriter, *http.Request) { <-release }))
	resp, _ := m.do("GET", "/", nil)
	close(release)
	if line := m.logged(); resp.StatusCode != 504 || line["outrigger.response_flags"] != "UT" {
		t.Fatalf("%d %v", resp.StatusCode, line)
	}
}

func TestNothingListensIsUF(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	m := start(t, nil, addr)
	resp, body := m.do("GET", "/", nil)
	if line := m.logged(); resp.StatusCode != 503 || line["outrigger.response_flags"] != "UF" || !strings.Contains(body, "connection refused") {
		t.Fatalf("%d %q %v", resp.StatusCode, body, line)
	}
}

func TestNoEndpointsIsUH(t *testing.T) {
	m := start(t, nil)
	resp, _ := m.do("GET", "/", nil)
	if line := m.logged(); resp.StatusCode != 503 || line["outrigger.response_flags"] != "UH" {
		t.Fatalf("%d %v", resp.StatusCode, line)
	}
}

func TestLimitOnRequestsRejectsAndObserveDoesNot(t *testing.T) {
	for _, observe := range []bool{false, true} {
		release, entered := make(chan struct{}), make(chan struct{}, 2)
		m := start(t, func(c *table.Cluster, _ *route.Route) { c.Limits.Requests, c.LimitsObserve = 1, observe },
			serve(t, func(http.ResponseWriter, *http.Request) { entered <- struct{}{}; <-release }))
		var wg sync.WaitGroup
		wg.Go(func() { m.do("GET", "/first", nil) })
		<-entered
		if observe {
			time.AfterFunc(50*time.Millisecond, func() { close(release) })
		}
		resp, _ := m.do("GET", "/second", nil)
		if !observe {
			close(release)
		}
		wg.Wait()
		if want := map[bool]int{false: 503, true: 200}[observe]; resp.StatusCode != want {
			t.Errorf("observe %v: %d; want %d", observe, resp.StatusCode, want)
		}
	}
}

func TestUpgradeIsATunnel(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + r.Header.Get("Upgrade") + "\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(c, rw)
	}))
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "websocket" {
		t.Fatalf("%v %v", resp, err)
	}
	_, _ = io.WriteString(c, "ping")
	b := make([]byte, 4)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "ping" {
		t.Fatalf("%q %v", b, err)
	}
}

func TestTCPIsCarriedWithHalfClose(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		b, _ := io.ReadAll(c) // until the client's half-close
		_, _ = c.Write(bytes.ToUpper(b))
		_ = c.Close()
	}()
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Name = "tcp" }, l.Addr().String())
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "hello")
	_ = c.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "HELLO" {
		t.Fatalf("%q %v", b, err)
	}
	if line := m.logged(); line["network.protocol"] != "tcp" || line["http.response.body.bytes"] != float64(5) {
		t.Fatalf("%v", line)
	}
}

func TestDrainFinishesWhatRunsAndEndsWhatIdles(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(entered)
			<-release
		}
		_, _ = io.WriteString(w, "done")
	}))
	idle, err := net.Dial("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = idle.Close() }()
	answer := make(chan string)
	go func() { answer <- m.raw("GET /slow HTTP/1.1\r\nHost: x\r\n\r\n") }()
	<-entered
	drained := make(chan int)
	go func() {
		ctx, stop := context.WithTimeout(context.Background(), 5*time.Second)
		defer stop()
		drained <- m.conns.Drain(ctx)
	}()
	_ = idle.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("an idle connection saw %v; want EOF", err)
	}
	close(release)
	if got := <-answer; !strings.HasPrefix(got, "HTTP/1.1 200") || !strings.Contains(strings.ToLower(got), "connection: close") || !strings.HasSuffix(got, "done") {
		t.Errorf("the request in flight got %q", got)
	}
	if forced := <-drained; forced != 0 {
		t.Errorf("%d connections had to be cut", forced)
	}
}

func TestServerThatClosesMidBodyIsUC(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	got := m.raw("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if !strings.HasSuffix(got, "half") {
		t.Errorf("got %q", got)
	}
	if line := m.logged(); line["outrigger.response_flags"] != "UC" {
		t.Errorf("%v", line)
	}
}

func TestExpectContinue(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body) // makes net/http send 100 (Continue)
		_, _ = w.Write(b)
	}))
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
	r := bufio.NewReader(c)
	interim, err := http.ReadResponse(r, nil)
	if err != nil || interim.StatusCode != 100 {
		t.Fatalf("%v %v; want 100 before the body is sent", interim, err)
	}
	_, _ = io.WriteString(c, "body")
	final, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(final.Body)
	_ = final.Body.Close()
	if final.StatusCode != 200 || string(b) != "body" {
		t.Fatalf("%d %q", final.StatusCode, b)
	}
}

func TestEarlyAnswerEndsALargeUpload(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	}))
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"+strings.Repeat("x", 100000))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 413 {
		t.Fatalf("%v %v", resp, err)
	}
	_ = resp.Body.Close()
}
