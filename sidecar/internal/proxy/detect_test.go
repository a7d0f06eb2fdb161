package proxy_test

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// auto makes the port one of which nobody has said what it speaks.
func auto(_ *table.Cluster, r *route.Route) { r.Name = "auto" }

func TestUnknownPortsCarryHTTPAsRequests(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := start(t, auto, serveIn(t, version, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
		b := bridge{m, clientIn(t, version)}
		for range 2 {
			if resp, body := b.send(b.request("GET", "/pay", nil)); resp.StatusCode != 200 || string(body) != "ok" {
				t.Errorf("HTTP/%d: %d %q", version, resp.StatusCode, body)
			}
			if line := m.logged(); line["url.path"] != "/pay" {
				t.Errorf("HTTP/%d: %v", version, line)
			}
		}
	}
}

// Where the server speaks first, the first connection is delayed by the time that
// clients are given to speak, and the others are not.
func TestServerFirstIsNeverDelayedTwice(t *testing.T) {
	m := start(t, auto, speak(t, func(c net.Conn, r *bufio.Reader) {
		_, _ = io.WriteString(c, "220 ready\r\n")
		line, _ := r.ReadString('\n')
		_, _ = io.WriteString(c, "250 "+line)
	}))
	for i := range 4 {
		c := m.dial()
		began := time.Now()
		r := bufio.NewReader(c)
		if line, err := r.ReadString('\n'); err != nil || line != "220 ready\r\n" {
			t.Fatalf("%q, %v", line, err)
		}
		switch took := time.Since(began); {
		case i == 0 && took < 40*time.Millisecond:
			t.Errorf("the first greeting came after %v: nobody was waited for", took)
		case i > 0 && took > 40*time.Millisecond:
			t.Errorf("greeting %d came after %v", i+1, took)
		}
		_, _ = io.WriteString(c, "HELO x\r\n")
		if line, err := r.ReadString('\n'); err != nil || line != "250 HELO x\r\n" {
			t.Fatalf("%q, %v", line, err)
		}
		_ = c.Close()
		if line := m.logged(); line["network.protocol"] != "tcp" {
			t.Errorf("%v", line)
		}
	}
	found := m.proxy.Seen.Snapshot(time.Now(), 50*time.Millisecond)
	if len(found) != 1 || !found[0].ServerFirst || found[0].Destination != key || found[0].Hint == "" {
		t.Errorf("remembered: %+v", found)
	}
}

// What is neither HTTP nor TLS is carried as it is, at once.
func TestUnknownPortsCarryBytes(t *testing.T) {
	m := start(t, auto, speak(t, func(c net.Conn, r *bufio.Reader) { _, _ = io.Copy(c, r) }))
	c := m.dial()
	_, _ = io.WriteString(c, "\x00\x01binary")
	b := make([]byte, 8)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "\x00\x01binary" {
		t.Fatalf("%q, %v", b, err)
	}
}

// TLS of the application passes through undecrypted, led by the name it asks for.
func TestTLSPassesThroughByServerName(t *testing.T) {
	backend := func(says string) string {
		s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, says) }))
		t.Cleanup(s.Close)
		return s.Listener.Addr().String()
	}
	m := start(t, func(_ *table.Cluster, r *route.Route) { r.Name = "tls" }, backend("default"))
	now := m.table.Load()
	other := m.cluster
	other.Name, other.Endpoints = "shop/other:443", endpoints(backend("other"))
	d := *now.Destinations[key]
	d.ServerNames = []table.ServerName{{Name: "*.other.example", Clusters: []route.Weighted{{Cluster: other.Name, Weight: 1}}}}
	next := &table.Table{
		Version: "v2", Destinations: map[string]*table.Destination{key: &d},
		Clusters: map[string]*table.Cluster{key: now.Clusters[key], other.Name: &other},
	}
	m.table.Store(next)
	ask := func(name string) (string, error) {
		raw := m.dial()
		defer func() { _ = raw.Close() }()
		c := tls.Client(raw, &tls.Config{ServerName: name, InsecureSkipVerify: true})
		if err := c.HandshakeContext(t.Context()); err != nil {
			return "", err
		}
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return "", err
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	for name, want := range map[string]string{"a.other.example": "other", "A.B.Other.Example": "other", "other.example": "default", "payments": "default"} {
		if got, err := ask(name); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
		if line := m.logged(); line["network.protocol"] != "tls" || line["tls.client.server_name"] == nil {
			t.Errorf("%s: %v", name, line)
		}
	}
	d.Cluster = ""
	m.table.Store(&table.Table{Version: "v3", Destinations: map[string]*table.Destination{key: &d}, Clusters: next.Clusters})
	if got, err := ask("stranger.example"); err == nil {
		t.Errorf("a name without a route was led to %q", got)
	}
	if line := m.logged(); line["outrigger.response_flags"] != "NR" {
		t.Errorf("%v", line)
	}
}
