package proxy_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// dial connects to the sidecar with five seconds for all that follows.
func (m *mesh) dial() *net.TCPConn {
	m.t.Helper()
	c, err := net.Dial("tcp", m.addr)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return c.(*net.TCPConn)
}

func (m *mesh) usage() upstream.Usage { return m.clusters.For(m.table.Load(), key).Usage() }

// counted sums the counter over the series that have all the label values.
func counted(t *testing.T, r *prometheus.Registry, name string, labels ...string) (sum float64) {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, s := range f.GetMetric() {
			if has(s, labels) {
				sum += s.GetCounter().GetValue()
			}
		}
	}
	return sum
}

func has(s *dto.Metric, values []string) bool {
	for _, want := range values {
		found := false
		for _, l := range s.GetLabel() {
			found = found || l.GetValue() == want
		}
		if !found {
			return false
		}
	}
	return true
}

// speak serves connections with bytes that no HTTP server would send.
func speak(t testing.TB, handle func(net.Conn, *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				handle(c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

// head reads a request's head.
func head(r *bufio.Reader) {
	for {
		if line, err := r.ReadString('\n'); err != nil || line == "\r\n" {
			return
		}
	}
}

// blackHole is an address at which connecting takes for ever.
func blackHole(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := "127.0.0.1:" + strconv.Itoa(name.(*syscall.SockaddrInet4).Port)
	for range 3 { // fill the queue of those that wait to be accepted
		if c, err := net.DialTimeout("tcp", addr, 50*time.Millisecond); err == nil {
			t.Cleanup(func() { _ = c.Close() })
		}
	}
	return addr
}

func quick(attempts int, on retry.Conditions) retry.Policy {
	return retry.Policy{Name: "p", On: on, Attempts: attempts, BackoffBase: time.Millisecond, BackoffMax: time.Millisecond}
}

func TestRetryThatTheBreakerRejectsGivesItsPlaceBack(t *testing.T) {
	m := start(t, func(c *table.Cluster, r *route.Route) {
		c.Breaker = &breaker.Policy{Name: "shop/payments", ConsecutiveFailures: 1, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.FailDefault}
		r.Retry = quick(2, retry.On5xx)
	}, serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }))
	m.do("GET", "/", nil)
	if line := m.logged(); line["outrigger.response_flags"] != "UO" {
		t.Fatalf("%v; want the retry rejected", line)
	}
	if u := m.usage(); u.Retries != 0 || u.Requests != 0 {
		t.Fatalf("in use after the request: %+v", u)
	}
}

func TestRetryLimitInObserveModeRejectsNothing(t *testing.T) {
	var calls atomic.Int32
	release := make(chan struct{})
	m := start(t, func(c *table.Cluster, r *route.Route) {
		c.Limits.Retries, c.LimitsObserve = 1, true
		r.Retry = quick(1, retry.On5xx)
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Outrigger-Attempt") == "1" {
			w.WriteHeader(500)
			return
		}
		if calls.Add(1) == 2 {
			close(release)
		}
		select {
		case <-release:
		case <-time.After(time.Second):
		}
	}))
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if resp, _ := m.do("GET", "/", nil); resp.StatusCode != 200 {
				t.Errorf("%d; want the retry's answer", resp.StatusCode)
			}
		})
	}
	wg.Wait()
	if n := counted(t, m.registry, "outrigger_breaker_rejected_total", "shop/payments", "retries", "Observe"); n != 1 {
		t.Errorf("%v retries counted as rejected in Observe mode; want 1", n)
	}
}

func TestRequestTimeoutCoversConnecting(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Timeout = 100 * time.Millisecond }, blackHole(t))
	began := time.Now()
	resp, _ := m.do("GET", "/", nil)
	if line := m.logged(); resp.StatusCode != 504 || line["outrigger.response_flags"] != "UT" || time.Since(began) > 600*time.Millisecond {
		t.Fatalf("%d after %v: %v", resp.StatusCode, time.Since(began), line)
	}
}

func TestPerTryTimeoutEndsWhenTheResponseBegins(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Retry.PerTryTimeout = 60 * time.Millisecond },
		serve(t, func(w http.ResponseWriter, _ *http.Request) {
			for range 4 {
				_, _ = io.WriteString(w, "tick ")
				_ = http.NewResponseController(w).Flush()
				time.Sleep(40 * time.Millisecond)
			}
		}))
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if line := m.logged(); err != nil || string(b) != "tick tick tick tick " || line["outrigger.response_flags"] != "-" {
		t.Fatalf("%q %v: %v", b, err, line)
	}
}

// While the proxy waits for an answer, or for more of one, it notices that
// nobody waits for it any more, and says so to the upstream.
func TestClientThatLeavesEndsTheAttempt(t *testing.T) {
	for _, path := range []string{"/silent", "/stream"} {
		ended, entered := make(chan struct{}), make(chan struct{})
		m := start(t, func(c *table.Cluster, _ *route.Route) {
			c.Breaker = &breaker.Policy{Name: "p", ConsecutiveFailures: 1, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.FailDefault}
		}, serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/stream" {
				_ = http.NewResponseController(w).Flush()
			}
			close(entered)
			select {
			case <-r.Context().Done():
				close(ended)
			case <-time.After(4 * time.Second):
			}
		}))
		c := m.dial()
		_, _ = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: x\r\n\r\n")
		<-entered
		_ = c.SetLinger(0) // in the middle of something, as a program that dies
		_ = c.Close()
		select {
		case <-ended:
		case <-time.After(3 * time.Second):
			t.Fatalf("%s: the upstream still works for a client that has gone", path)
		}
		if line := m.logged(); line["outrigger.response_flags"] != "DC" {
			t.Errorf("%s: %v", path, line)
		}
		if m.usage().Requests != 0 {
			t.Errorf("%s: %+v", path, m.usage())
		}
		if s, _ := m.clusters.For(m.table.Load(), key).Breaker().State(time.Now()); s != breaker.Closed {
			t.Errorf("%s: breaker is %v; the upstream is not to blame", path, s)
		}
	}
}

func TestForcedDrainEndsAnExchangeThatWaitsForItsUpstream(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	m := start(t, nil, serve(t, func(http.ResponseWriter, *http.Request) { close(entered); <-release }))
	defer close(release)
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-entered
	ctx, stop := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer stop()
	done := make(chan int)
	go func() { done <- m.conns.Drain(ctx) }()
	select {
	case n := <-done:
		if n != 1 {
			t.Errorf("%d connections cut; want 1", n)
		}
	case <-time.After(3 * time.Second):
		t.Fatal("Drain does not return")
	}
}

// Drain looks for connections that idle while they become idle.
func TestDrainFindsConnectionsThatAreJustAboutToIdle(t *testing.T) {
	for range 20 {
		m := start(t, nil)
		for range 50 {
			c, err := net.Dial("tcp", m.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = c.Close() }()
		}
		// It is over at once, but for a machine that has no time for it.
		ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
		if n := m.conns.Drain(ctx); n != 0 {
			t.Errorf("%d connections had to be cut", n)
		}
		stop()
	}
}

func TestUpgradeWaitsForTheEndOfTheRequest(t *testing.T) {
	addr := speak(t, func(c net.Conn, r *bufio.Reader) {
		head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		_, _ = io.Copy(c, r)
	})
	m := start(t, nil, addr)
	c := m.dial()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 8\r\n\r\nhalf")
	time.Sleep(50 * time.Millisecond)
	_, _ = io.WriteString(c, "halfthen")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("%v %v", resp, err)
	}
	b := make([]byte, 12)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "halfhalfthen" {
		t.Fatalf("%q %v", b, err)
	}
}

// A probe is over when the response has begun: a tunnel or stream of hours must
// not keep the breaker half-open.
func TestLongProbeClosesTheBreaker(t *testing.T) {
	var healthy atomic.Bool
	hold := make(chan struct{})
	m := start(t, func(c *table.Cluster, _ *route.Route) {
		c.Breaker = &breaker.Policy{Name: "p", ConsecutiveFailures: 1, Window: time.Second, OpenFor: 50 * time.Millisecond, HalfOpenRequests: 1, FailureOn: breaker.FailDefault}
	}, serve(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !healthy.Load():
			w.WriteHeader(500)
		case r.URL.Path == "/stream":
			_, _ = io.WriteString(w, "begun")
			_ = http.NewResponseController(w).Flush()
			<-hold
		}
	}))
	defer close(hold)
	m.do("GET", "/", nil)
	healthy.Store(true)
	time.Sleep(80 * time.Millisecond)
	c := m.dial()
	_, _ = io.WriteString(c, "GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
	if _, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if resp, _ := m.do("GET", "/", nil); resp.StatusCode == 200 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the breaker stays half-open while the probe's response goes on")
}

// The endpoint's latency is the time to its response, not the life of a tunnel.
func TestTunnelDoesNotMakeItsEndpointLookSlow(t *testing.T) {
	websocket := func(w http.ResponseWriter, _ *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		_ = rw.Flush()
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
	m := start(t, func(c *table.Cluster, _ *route.Route) {
		c.Breaker = &breaker.Policy{Name: "p", SlowCallThreshold: 300 * time.Millisecond, SlowCallRatio: 0.1, Window: time.Minute, OpenFor: time.Minute, FailureOn: breaker.FailDefault}
	}, serve(t, websocket))
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	time.Sleep(400 * time.Millisecond)
	_ = c.Close()
	m.logged()
	if s, _ := m.clusters.For(m.table.Load(), key).Breaker().State(time.Now()); s != breaker.Closed {
		t.Fatalf("breaker is %v after a tunnel of 400 ms", s)
	}
}

func TestSlowUploadIsNotTheUpstreamsFault(t *testing.T) {
	m := start(t, func(c *table.Cluster, r *route.Route) {
		r.Timeout = 150 * time.Millisecond
		c.Breaker = &breaker.Policy{Name: "p", ConsecutiveFailures: 1, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.FailDefault}
	}, serve(t, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	got := m.raw("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
	line := m.logged()
	if !strings.HasPrefix(got, "HTTP/1.1 408") || line["outrigger.response_flags"] != "DPE" {
		t.Errorf("answered %q, logged %v", got, line)
	}
	if s, _ := m.clusters.For(m.table.Load(), key).Breaker().State(time.Now()); s != breaker.Closed {
		t.Errorf("a slow client opened the breaker: %v", s)
	}
}

func TestBodyThatStallsDoesNotHoldTheRetryUp(t *testing.T) {
	stalled := speak(t, func(c net.Conn, r *bufio.Reader) {
		head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\nhalf")
		_, _ = io.Copy(io.Discard, r)
	})
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Retry = quick(1, retry.On5xx) },
		stalled, serve(t, func(http.ResponseWriter, *http.Request) {}))
	for range 10 {
		began := time.Now()
		resp, _ := m.do("GET", "/", nil)
		if resp.StatusCode != 200 || time.Since(began) > time.Second {
			t.Fatalf("%d after %v", resp.StatusCode, time.Since(began))
		}
	}
}

func TestOldClientsLearnThatTheConnectionStays(t *testing.T) {
	m := start(t, nil)
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 503 || !strings.EqualFold(resp.Header.Get("Connection"), "keep-alive") {
		t.Fatalf("%v %v", resp, err)
	}
}

func TestCutBodyOfAnOldClientDoesNotLookWhole(t *testing.T) {
	m := start(t, nil, speak(t, func(c net.Conn, r *bufio.Reader) {
		head(r)
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
		time.Sleep(50 * time.Millisecond)
	}))
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if b, err := io.ReadAll(c); err == nil {
		t.Fatalf("%q and a clean end", b)
	}
}

func TestInboundKeepsTheAttemptOfTheCaller(t *testing.T) {
	var seen atomic.Value
	app := serve(t, func(_ http.ResponseWriter, r *http.Request) { seen.Store(r.Header.Get("X-Outrigger-Attempt")) })
	m := start(t, nil)
	m.addr = m.inbound("http", app, nil)
	m.do("GET", "/", nil, "X-Outrigger-Attempt", "2")
	if seen.Load() != "2" {
		t.Errorf("the application saw attempt %q; want the caller's 2", seen.Load())
	}
}

func TestRelayThatSucceedsAtLastIsNoFailure(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Name = "tcp" }, closed.Addr().String(), speak(t, func(c net.Conn, _ *bufio.Reader) { _, _ = io.WriteString(c, "hi") }))
	for range 50 {
		if got := m.raw(""); got != "hi" {
			t.Fatalf("%q", got)
		}
		line := m.logged()
		if line["outrigger.response_flags"] != "-" || line["error.message"] != nil {
			t.Fatalf("%v", line)
		}
		if line["outrigger.attempts"] == float64(2) {
			return
		}
	}
	t.Skip("the closed endpoint was never drawn")
}

func TestRelayCountsWhatLimitsReject(t *testing.T) {
	for _, observe := range []bool{false, true} {
		m := start(t, func(c *table.Cluster, r *route.Route) {
			r.Name = "tcp"
			c.Limits.Connections, c.LimitsObserve = 1, observe
		}, speak(t, func(c net.Conn, r *bufio.Reader) { _, _ = io.WriteString(c, "hi"); _, _ = r.ReadByte() }))
		first := m.dial()
		_, _ = io.ReadFull(first, make([]byte, 2))
		n := 0
		second, err := net.Dial("tcp", m.addr) // a refusal is a reset, which may come as early as this
		if err == nil {
			n, _ = io.ReadFull(second, make([]byte, 2))
			defer func() { _ = second.Close() }()
		}
		if want := map[bool]int{false: 0, true: 2}[observe]; n != want {
			t.Errorf("observe %v: %d bytes; want %d", observe, n, want)
		}
		mode := map[bool]string{false: "Enforce", true: "Observe"}[observe]
		if n := counted(t, m.registry, "outrigger_breaker_rejected_total", "connections", "shop/payments", mode); n != 1 {
			t.Errorf("observe %v: %v rejections counted; want 1", observe, n)
		}
		_ = first.Close()
	}
}

// What a request line or Host may hold of secrets is told to the client that
// sent it, not to the log.
func TestRefusalsLogNoSecrets(t *testing.T) {
	m := start(t, nil)
	for _, request := range []string{
		"GET http://user:s3cret@host/ HTTP/1.1\r\nHost: host\r\n\r\n",
		"GET x?token=s3cret HTTP/1.1\r\nHost: host\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: user:s3cret@host\r\n\r\n",
		"GET /\x01 HTTP/1.1\r\nHost: host\r\nAuthorization: s3cret\x01\r\n\r\n",
		"GET /%2F?token=s3cret HTTP/1.1\r\nHost: host\r\nAuthorization: s3cret\r\n\r\n",
	} {
		m.raw(request)
		if line := fmt.Sprint(m.logged()); strings.Contains(line, "s3cret") {
			t.Errorf("%q is logged as %s", request, line)
		}
	}
}

func TestIdleConnectionToOneEndpointDoesNotStarveAnother(t *testing.T) {
	m := start(t, func(c *table.Cluster, _ *route.Route) { c.Limits.Connections = 1 },
		serve(t, func(http.ResponseWriter, *http.Request) {}), serve(t, func(http.ResponseWriter, *http.Request) {}))
	for range 20 {
		if resp, body := m.do("GET", "/", nil); resp.StatusCode != 200 {
			t.Fatalf("%d %q with nothing in flight", resp.StatusCode, body)
		}
	}
}

// A client that closes its direction after its request has said that the request
// is whole, and is still answered.
func TestHalfClosedClientIsAnswered(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(300 * time.Millisecond) // long enough for the proxy to look whether the client is there
		_, _ = io.WriteString(w, "late")
	}))
	c := m.dial()
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(b), "\r\n\r\nlate") {
		t.Fatalf("%q, %v", b, err)
	}
	if line := m.logged(); line["outrigger.response_flags"] != "-" {
		t.Errorf("%v", line)
	}
}

// One that closes it in the middle of its request has left.
func TestHalfClosedInMidRequestHasLeft(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, r.Body) }))
	c := m.dial()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
	_ = c.CloseWrite()
	if b, _ := io.ReadAll(c); len(b) > 0 {
		t.Errorf("answered %q", b)
	}
	if line := m.logged(); line["outrigger.response_flags"] != "DC" {
		t.Errorf("%v", line)
	}
}

// Nobody waits for ever for one that may have left.
func TestHalfClosedClientIsNotWaitedForForLong(t *testing.T) {
	ended := make(chan struct{})
	m := start(t, nil, serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done(); close(ended) }))
	c := m.dial()
	_ = c.SetDeadline(time.Now().Add(15 * time.Second))
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_ = c.CloseWrite()
	begun := time.Now()
	select {
	case <-ended:
	case <-time.After(12 * time.Second):
		t.Fatal("the upstream still works for a client that has probably gone")
	}
	if took := time.Since(begun); took < 4*time.Second {
		t.Errorf("given up after %v; a slow answer should still have reached it", took)
	}
}
