package proxy_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// protocols is HTTP/1.1 or HTTP/2 in clear, for net/http.
func protocols(version int) *http.Protocols {
	p := &http.Protocols{}
	p.SetHTTP1(version == 1)
	p.SetUnencryptedHTTP2(version == 2)
	return p
}

// serveIn runs a server that speaks one version of HTTP.
func serveIn(t testing.TB, version int, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = protocols(version)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// clientIn speaks one version of HTTP to the sidecar.
func clientIn(t testing.TB, version int) *http.Client {
	tr := &http.Transport{Protocols: protocols(version), DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// bridge is a sidecar between a client and a server of two versions.
type bridge struct {
	*mesh
	client *http.Client
}

// acrossVersions runs a test with each pair of versions.
func acrossVersions(t *testing.T, h http.HandlerFunc, adjust func(*table.Cluster, *route.Route), f func(t *testing.T, b bridge)) {
	for _, down := range []int{1, 2} {
		for _, up := range []int{1, 2} {
			t.Run(fmt.Sprintf("%d to %d", down, up), func(t *testing.T) {
				m := start(t, func(c *table.Cluster, r *route.Route) {
					c.HTTP2 = up == 2
					if adjust != nil {
						adjust(c, r)
					}
				}, serveIn(t, up, func(w http.ResponseWriter, r *http.Request) {
					if r.ProtoMajor != up {
						t.Errorf("the server was spoken to in %s", r.Proto)
					}
					h(w, r)
				}))
				f(t, bridge{m, clientIn(t, down)})
			})
		}
	}
}

func (b bridge) request(method, path string, body io.Reader) *http.Request {
	b.t.Helper()
	r, err := http.NewRequestWithContext(b.t.Context(), method, "http://"+b.addr+path, body)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b bridge) send(r *http.Request) (*http.Response, []byte) {
	b.t.Helper()
	resp, err := b.client.Do(r)
	if err != nil {
		b.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatalf("body after %d bytes: %v", len(got), err)
	}
	return resp, got
}

func TestBothVersionsOnBothSides(t *testing.T) {
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Connection") != "" || r.Header.Get("X-Request-Id") == "" || r.Header.Get("Traceparent") == "" {
			t.Errorf("%v", r.Header)
		}
		w.Header().Set("X-Path", r.URL.RequestURI())
		w.Header().Set("X-Host", r.Host)
		w.Header().Set("X-Cookie", r.Header.Get("Cookie"))
		_, _ = io.WriteString(w, "paid")
	}, nil, func(t *testing.T, b bridge) {
		r := b.request("GET", "/a/./pay?card=1", nil)
		r.Host = "payments.shop"
		r.Header.Set("Cookie", "a=1; b=2")
		resp, body := b.send(r)
		if resp.StatusCode != 200 || string(body) != "paid" || resp.Header.Get("X-Path") != "/a/pay?card=1" || resp.Header.Get("X-Host") != "payments.shop" || resp.Header.Get("X-Cookie") != "a=1; b=2" {
			t.Errorf("%v %q", resp, body)
		}
		line := b.logged()
		if line["url.path"] != "/a/pay" || line["http.response.status_code"] != float64(200) || line["url.domain"] != "payments.shop" || line["outrigger.response_flags"] != "-" {
			t.Errorf("%v", line)
		}
	})
}

// Bodies of many sizes go both ways at once, through many streams, unharmed.
func TestBodiesAcrossVersions(t *testing.T) {
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		h := sha256.New()
		_, err := io.Copy(io.MultiWriter(w, h), r.Body)
		if err != nil {
			t.Errorf("the server read: %v", err)
		}
	}, nil, func(t *testing.T, b bridge) {
		var wg sync.WaitGroup
		for _, size := range []int{0, 1, 1000, 16 << 10, 64 << 10, 64<<10 + 1, 300 << 10, 3 << 20} {
			for _, known := range []bool{true, false} {
				wg.Go(func() {
					data := make([]byte, size)
					for i := range data {
						data[i] = byte(rand.Uint32())
					}
					var body io.Reader = bytes.NewReader(data)
					if !known {
						body = io.MultiReader(body) // so that net/http cannot know the length
					}
					_, got := b.send(b.request("POST", "/echo", body))
					if a, b := sha256.Sum256(got), sha256.Sum256(data); a != b {
						t.Errorf("%d bytes (length known: %v): got %d bytes, %s: %.80q", size, known, len(got), hex.EncodeToString(a[:4]), got)
					}
				})
			}
		}
		wg.Wait()
	})
}

func TestTrailersAcrossVersions(t *testing.T) {
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		_, _ = io.Copy(w, r.Body)
		w.Header().Set("X-Sum", "got "+r.Trailer.Get("X-Client-Sum"))
	}, nil, func(t *testing.T, b bridge) {
		r := b.request("POST", "/", io.MultiReader(strings.NewReader("body")))
		r.Trailer = http.Header{"X-Client-Sum": {"42"}}
		resp, body := b.send(r)
		if string(body) != "body" || resp.Trailer.Get("X-Sum") != "got 42" {
			t.Errorf("%q, trailers %v", body, resp.Trailer)
		}
	})
}

// What a stream has said goes out before more is waited for.
func TestStreamsAreNotHeldBack(t *testing.T) {
	next := make(chan struct{})
	acrossVersions(t, func(w http.ResponseWriter, _ *http.Request) {
		for i := range 3 {
			_, _ = fmt.Fprintf(w, "%d", i)
			_ = http.NewResponseController(w).Flush()
			<-next
		}
	}, nil, func(t *testing.T, b bridge) {
		resp, err := b.client.Do(b.request("GET", "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		one := make([]byte, 1)
		for i := range 3 {
			if _, err := io.ReadFull(resp.Body, one); err != nil || one[0] != byte('0'+i) {
				t.Fatalf("%q, %v; want %d", one, err, i)
			}
			next <- struct{}{}
		}
		if _, err := resp.Body.Read(one); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	})
}

// Each pair of versions ends what the client gives up.
func TestCancelReachesTheServer(t *testing.T) {
	cancelled := make(chan struct{}, 1)
	acrossVersions(t, func(_ http.ResponseWriter, r *http.Request) {
		<-r.Context().Done()
		cancelled <- struct{}{}
	}, nil, func(t *testing.T, b bridge) {
		b.client.Timeout = 200 * time.Millisecond
		if _, err := b.client.Do(b.request("GET", "/", nil)); err == nil {
			t.Fatal("answered")
		}
		b.client.CloseIdleConnections()
		select {
		case <-cancelled:
		case <-time.After(8 * time.Second):
			t.Fatal("the server was not told")
		}
		if line := b.logged(); line["outrigger.response_flags"] != "DC" {
			t.Errorf("%v", line)
		}
	})
}

func TestRetriesAcrossVersions(t *testing.T) {
	var mu sync.Mutex
	tries := map[string]int{}
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		id := r.Header.Get("X-Request-Id")
		mu.Lock()
		tries[id]++
		n := tries[id]
		mu.Unlock()
		if n < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		_, _ = fmt.Fprintf(w, "%s at %s", b, r.Header.Get("X-Outrigger-Attempt"))
	}, func(_ *table.Cluster, r *route.Route) { r.Retry = quick(3, retry.OnGatewayError) }, func(t *testing.T, b bridge) {
		resp, body := b.send(b.request("PUT", "/", strings.NewReader("once")))
		if resp.StatusCode != 200 || string(body) != "once at 3" {
			t.Errorf("%d %q", resp.StatusCode, body)
		}
	})
}

func TestBreakerAndTimeoutAcrossVersions(t *testing.T) {
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(3 * time.Second):
		}
		w.WriteHeader(200)
	}, func(c *table.Cluster, r *route.Route) {
		r.Timeout = 100 * time.Millisecond
		c.Breaker = &breaker.Policy{Name: "shop/payments", ConsecutiveFailures: 1, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.FailDefault}
	}, func(t *testing.T, b bridge) {
		if resp, _ := b.send(b.request("GET", "/", nil)); resp.StatusCode != 504 {
			t.Errorf("status %d; want 504", resp.StatusCode)
		}
		if line := b.logged(); line["outrigger.response_flags"] != "UT" {
			t.Errorf("%v", line)
		}
		resp, _ := b.send(b.request("GET", "/", nil))
		if resp.StatusCode != 503 || resp.Header.Get("X-Outrigger-Breaker") == "" {
			t.Errorf("%v", resp)
		}
		if line := b.logged(); line["outrigger.response_flags"] != "UO" {
			t.Errorf("%v", line)
		}
	})
}

// Many requests share one connection to an HTTP/2 server.
func TestStreamsShareAConnection(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]bool{}
	m := start(t, func(c *table.Cluster, _ *route.Route) { c.HTTP2 = true }, serveIn(t, 2, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.RemoteAddr] = true
		mu.Unlock()
		time.Sleep(20 * time.Millisecond)
		_, _ = io.WriteString(w, "ok")
	}))
	b := bridge{m, clientIn(t, 2)}
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() {
			if resp, body := b.send(b.request("GET", "/", nil)); resp.StatusCode != 200 || string(body) != "ok" {
				t.Errorf("%d %q", resp.StatusCode, body)
			}
		})
	}
	wg.Wait()
	if len(seen) != 1 {
		t.Errorf("%d connections to the server; want one", len(seen))
	}
	for began := time.Now(); m.usage().Requests != 0; time.Sleep(time.Millisecond) { // a client has its answer a little earlier
		if time.Since(began) > 5*time.Second {
			t.Fatalf("%+v", m.usage())
		}
	}
	if u := m.usage(); u.Connections != 1 {
		t.Errorf("%+v", u)
	}
}
