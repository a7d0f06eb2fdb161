package proxy_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/program"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls/mtlstest"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

const (
	storefrontID = "spiffe://cluster.local/ns/shop/sa/storefront"
	paymentsID   = "spiffe://cluster.local/ns/shop/sa/payments"
)

// inbound serves app for other workloads, and returns where.
func (m *mesh) inbound(protocol, app string, mutual *proxy.Mutual) string {
	m.t.Helper()
	l, err := program.Listen(m.t.Context(), "--inbound", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	m.proxy.Mutual = mutual
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	at := l.Addr().String()
	wg.Go(func() {
		_ = m.proxy.ServeInbound(ctx, l, bootstrap.Inbound{Protocol: protocol, Listen: netip.MustParseAddrPort(at), Forward: netip.MustParseAddrPort(app)})
	})
	m.t.Cleanup(func() { cancel(); wg.Wait() })
	return at
}

func mutual(i *mtls.Identity, strict bool) *proxy.Mutual {
	return &proxy.Mutual{Config: i.Server(), Peer: mtls.PeerID, IsMesh: mtls.IsMesh, Self: i.ID(), Strict: strict}
}

func secure(i *mtls.Identity) upstream.Secure {
	return func(to *table.TLS, protocols ...string) *tls.Config {
		return i.Client(to.Identities, to.ServerName, protocols...)
	}
}

// secured is a caller's sidecar and a callee's, with an application behind it.
type secured struct {
	caller, callee *mesh
	inbound        string
}

// startSecured leads the caller's port to the callee's over mutual TLS with the
// identities that it expects there.
func startSecured(t *testing.T, ca *mtlstest.CA, protocol, app string, strict, http2 bool, expect ...string) secured {
	t.Helper()
	callee := start(t, nil)
	s := secured{callee: callee, inbound: callee.inbound(protocol, app, mutual(ca.Identity(t, "shop", "payments"), strict))}
	own := ca.Identity(t, "shop", "storefront")
	s.caller = start(t, func(c *table.Cluster, r *route.Route) {
		if protocol != "http" {
			r.Name = protocol
		}
		c.HTTP2 = http2
		c.TLS = &table.TLS{Identities: expect, ServerName: "payments.shop"}
	}, s.inbound)
	s.caller.clusters.Secure = secure(own)
	s.caller.takeTLS()
	return s
}

// takeTLS has the endpoints say that they take mutual TLS.
func (m *mesh) takeTLS() {
	c := m.cluster
	for i := range c.Endpoints {
		c.Endpoints[i].TLS = true
	}
	was := m.table.Load()
	m.table.Store(&table.Table{Version: was.Version, Destinations: was.Destinations, Clusters: map[string]*table.Cluster{key: &c}})
}

func TestMutualTLSBetweenSidecars(t *testing.T) {
	for _, version := range []int{1, 2} {
		ca := mtlstest.New(t, "cluster.local")
		seen := make(chan http.Header, 10)
		s := startSecured(t, ca, "http", serveIn(t, version, func(w http.ResponseWriter, r *http.Request) {
			seen <- r.Header
			_ = http.NewResponseController(w).EnableFullDuplex()
			_, _ = io.Copy(w, r.Body)
		}), true, version == 2, paymentsID)
		b := bridge{s.caller, clientIn(t, version)}
		for range 2 {
			r := b.request("POST", "/pay", strings.NewReader(strings.Repeat("x", 200<<10)))
			r.Header.Set("X-Forwarded-Client-Cert", "URI=spiffe://cluster.local/ns/shop/sa/admin")
			if resp, body := b.send(r); resp.StatusCode != 200 || len(body) != 200<<10 {
				t.Fatalf("HTTP/%d: %d, %d bytes; %v", version, resp.StatusCode, len(body), s.caller.logged())
			}
			if got := (<-seen).Values("X-Forwarded-Client-Cert"); len(got) != 1 || got[0] != "By="+paymentsID+";URI="+storefrontID {
				t.Errorf("the application is told of its caller: %q", got)
			}
			if line := s.caller.logged(); line["outrigger.peer.identity"] != paymentsID || line["outrigger.security"] != "mutual_tls" {
				t.Errorf("caller: %v", line)
			}
			if line := s.callee.logged(); line["outrigger.peer.identity"] != storefrontID || line["outrigger.security"] != "mutual_tls" {
				t.Errorf("callee: %v", line)
			}
		}
		if u := s.caller.usage(); u.Connections != 1 {
			t.Errorf("HTTP/%d: %+v; want one connection, used again", version, u)
		}
	}
}

// The caller refuses a callee that is not who the service's endpoints should be,
// whatever it says, and sends it nothing.
func TestWrongIdentityIsAlwaysRefused(t *testing.T) {
	ca := mtlstest.New(t, "cluster.local")
	s := startSecured(t, ca, "http", serveIn(t, 1, func(http.ResponseWriter, *http.Request) { t.Error("the request came through") }), false, false,
		"spiffe://cluster.local/ns/shop/sa/somebody-else")
	b := bridge{s.caller, clientIn(t, 1)}
	if resp, _ := b.send(b.request("GET", "/", nil)); resp.StatusCode != 503 {
		t.Errorf("status %d", resp.StatusCode)
	}
	if line := s.caller.logged(); line["outrigger.response_flags"] != "UF" || !strings.Contains(line["error.message"].(string), "payments") {
		t.Errorf("%v", line)
	}
}

// Without an identity of its own a sidecar does not fall back to clear text.
func TestWithoutIdentityNothingGoesInClear(t *testing.T) {
	m := start(t, nil, serveIn(t, 1, func(http.ResponseWriter, *http.Request) { t.Error("the request went in clear") }))
	m.takeTLS()
	b := bridge{m, clientIn(t, 1)}
	if resp, body := b.send(b.request("GET", "/", nil)); resp.StatusCode != 503 || !strings.Contains(string(body), "join token") {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
}

func TestStrictRefusesPlaintextAndPermissiveTakesIt(t *testing.T) {
	ca := mtlstest.New(t, "cluster.local")
	app := serveIn(t, 1, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Forwarded-Client-Cert") != "" {
			t.Error("a caller in clear claims an identity")
		}
		_, _ = io.WriteString(w, "ok")
	})
	for _, strict := range []bool{false, true} {
		m := start(t, nil)
		at := m.inbound("http", app, mutual(ca.Identity(t, "shop", "payments"), strict))
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+at+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("X-Forwarded-Client-Cert", "URI="+storefrontID)
		resp, err := clientIn(t, 1).Do(r)
		line := m.logged()
		if !strict {
			if err != nil || resp.StatusCode != 200 {
				t.Errorf("permissive: %v, %v", resp, err)
			}
			_ = resp.Body.Close()
			continue
		}
		if err == nil {
			_ = resp.Body.Close()
			t.Errorf("strict: answered %v", resp.Status)
		}
		if why, _ := line["error.message"].(string); !strings.HasPrefix(why, "plaintext_refused") || line["outrigger.response_flags"] != "DPE" {
			t.Errorf("%v", line)
		}
		if n := counted(t, m.registry, "outrigger_protocol_errors_total", "downstream", "plaintext_refused"); n != 1 {
			t.Errorf("%v refusals counted", n)
		}
	}
}

// TLS of the application itself passes through a permissive sidecar.
func TestPermissivePassesTheApplicationsOwnTLS(t *testing.T) {
	ca := mtlstest.New(t, "cluster.local")
	cert := ca.Spoiled(t, "shop", "app", func(*x509.Certificate) {})
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*cert}})
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
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	m := start(t, nil)
	at := m.inbound("tcp", l.Addr().String(), mutual(ca.Identity(t, "shop", "payments"), false))
	c, err := tls.Dial("tcp", at, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, _ = io.WriteString(c, "hello")
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
}

// Bytes go over mutual TLS too, and a server may speak first.
func TestTCPOverMutualTLS(t *testing.T) {
	ca := mtlstest.New(t, "cluster.local")
	s := startSecured(t, ca, "tcp", speak(t, func(c net.Conn, r *bufio.Reader) {
		_, _ = io.WriteString(c, "220 ready\n")
		line, _ := r.ReadString('\n')
		_, _ = io.WriteString(c, "250 "+line)
	}), true, false, paymentsID)
	c := s.caller.dial()
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); err != nil || line != "220 ready\n" {
		t.Fatalf("%q, %v; %v", line, err, s.callee.logged())
	}
	_, _ = io.WriteString(c, "HELO\n")
	if rest, err := io.ReadAll(r); err != nil || string(rest) != "250 HELO\n" {
		t.Fatalf("%q, %v", rest, err)
	}
	_ = c.Close()
	if line := s.callee.logged(); line["outrigger.peer.identity"] != storefrontID || line["network.protocol"] != "tcp" {
		t.Errorf("%v", line)
	}
}

// A new certificate, and a new root, are used for new connections; those that
// stand go on.
func TestRotationDropsNoConnection(t *testing.T) {
	ca := mtlstest.New(t, "cluster.local")
	s := startSecured(t, ca, "http", serveIn(t, 1, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(w, r.Body)
	}), true, false, paymentsID)
	pr, pw := io.Pipe()
	b := bridge{s.caller, clientIn(t, 1)}
	done := make(chan string, 1)
	go func() {
		resp, err := b.client.Do(b.request("POST", "/", pr))
		if err != nil {
			done <- err.Error()
			return
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			body = []byte(err.Error())
		}
		done <- string(body)
	}()
	_, _ = io.WriteString(pw, "before, ")
	ca.Rotate(t)
	time.Sleep(50 * time.Millisecond)
	_, _ = io.WriteString(pw, "after")
	_ = pw.Close()
	if got := <-done; got != "before, after" {
		t.Errorf("%q", got)
	}
}
