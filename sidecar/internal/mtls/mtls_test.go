package mtls_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls/mtlstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	domain     = "cluster.local"
	payments   = "spiffe://cluster.local/ns/shop/sa/payments"
	storefront = "spiffe://cluster.local/ns/shop/sa/storefront"
)

// result of a handshake as one side saw it.
type result struct {
	state tls.ConnectionState
	err   error
}

// peers are both ends of a connection over a real socket.
type peers struct{ client, server *tls.Conn }

// handshake connects two configurations and exchanges a byte each way, so that
// tickets arrive too. The listener is given, because sessions are resumed with
// the same server only.
func handshake(t *testing.T, client, server *tls.Config) (p peers, c, s result) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	var wg sync.WaitGroup
	wg.Go(func() {
		raw, err := l.Accept()
		if err != nil {
			s.err = err
			return
		}
		_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
		p.server = tls.Server(raw, server)
		if s.err = p.server.Handshake(); s.err != nil {
			_ = raw.Close()
			return
		}
		s.state = p.server.ConnectionState()
		var b [1]byte
		if _, err := io.ReadFull(p.server, b[:]); err == nil {
			_, _ = p.server.Write(b[:])
		}
	})
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
	p.client = tls.Client(raw, client)
	if c.err = p.client.Handshake(); c.err == nil {
		// In TLS 1.3 the server's refusal of a client arrives after the handshake.
		if _, c.err = p.client.Write([]byte("x")); c.err == nil {
			var b [1]byte
			_, c.err = io.ReadFull(p.client, b[:])
		}
		c.state = p.client.ConnectionState()
	}
	if c.err != nil {
		_ = raw.Close()
	}
	wg.Wait()
	t.Cleanup(func() {
		_ = p.client.Close()
		if p.server != nil {
			_ = p.server.Close()
		}
	})
	return p, c, s
}

func works(t *testing.T, what string, client, server *tls.Config) (peers, result, result) {
	t.Helper()
	p, c, s := handshake(t, client, server)
	if c.err != nil || s.err != nil {
		t.Fatalf("%s: client: %v; server: %v", what, c.err, s.err)
	}
	return p, c, s
}

// Both sides know whom they speak with, over TLS 1.3, and the server agrees on
// the most that the client offers.
func TestBothSidesProveThemselves(t *testing.T) {
	ca := mtlstest.New(t, domain)
	client, server := ca.Identity(t, "shop", "storefront"), ca.Identity(t, "shop", "payments")
	for _, f := range []struct {
		offer []string
		want  string
	}{{nil, mtls.Protocol}, {[]string{"http/1.1"}, "http/1.1"}, {[]string{"http/1.1", "h2"}, "h2"}} {
		_, c, s := works(t, fmt.Sprint(f.offer), client.Client([]string{payments}, "payments.shop", f.offer...), server.Server())
		if got, err := mtls.PeerID(&c.state); err != nil || got != payments {
			t.Errorf("the client sees %q, %v", got, err)
		}
		if got, err := mtls.PeerID(&s.state); err != nil || got != storefront {
			t.Errorf("the server sees %q, %v", got, err)
		}
		if c.state.Version != tls.VersionTLS13 || s.state.ServerName != "payments.shop" || c.state.NegotiatedProtocol != f.want {
			t.Errorf("version %x, server name %q, protocol %q; want %q", c.state.Version, s.state.ServerName, c.state.NegotiatedProtocol, f.want)
		}
	}
}

func TestIsMesh(t *testing.T) {
	var offered []string
	ca := mtlstest.New(t, domain)
	client, server := ca.Identity(t, "shop", "storefront"), ca.Identity(t, "shop", "payments")
	look := server.Server().Clone()
	look.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		offered = h.SupportedProtos
		return nil, nil //nolint:nilnil // the configuration stays
	}
	works(t, "mesh", client.Client([]string{payments}, "", "h2"), look)
	if !mtls.IsMesh(offered) {
		t.Errorf("a sidecar offers %q, which is not told from an application", offered)
	}
	if mtls.IsMesh(nil) || mtls.IsMesh([]string{"h2", "http/1.1"}) {
		t.Error("an application is taken for a sidecar")
	}
}

// Whoever is not who is expected is refused, and the error of the side that
// refuses names both.
func TestPeersAreRefused(t *testing.T) {
	ca, foreign := mtlstest.New(t, domain), mtlstest.New(t, "other.example")
	stranger := mtlstest.New(t, domain) // same name, another root
	spoiled := func(change func(*x509.Certificate)) *tls.Config {
		return certificateOf(t, ca, change)
	}
	here := ca.Identity(t, "shop", "payments")
	link := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for name, f := range map[string]struct {
		peer *tls.Config // of the peer that proves itself badly
		want []string
	}{
		"another workload":          {ca.Identity(t, "shop", "cart").Server(), []string{"ns/shop/sa/cart", "want " + storefront}},
		"another trust domain":      {foreign.Identity(t, "shop", "storefront").Server(), []string{"spiffe://other.example/ns/shop/sa/storefront", "trust domain"}},
		"a root that is not ours":   {stranger.Identity(t, "shop", "storefront").Server(), []string{storefront, "unknown authority"}},
		"expired":                   {spoiled(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), []string{storefront, "expired"}},
		"not yet valid":             {spoiled(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }), []string{storefront, "not yet valid"}},
		"no URI":                    {spoiled(func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"payments.shop"} }), []string{"no URI"}},
		"two URIs":                  {spoiled(func(c *x509.Certificate) { c.URIs = append(c.URIs, link(payments)) }), []string{"2 URIs"}},
		"an authority":              {spoiled(func(c *x509.Certificate) { c.IsCA = true }), []string{"certificate of an authority"}},
		"for signing documents":     {spoiled(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }), []string{storefront, "usage"}},
		"not a workload's identity": {spoiled(func(c *x509.Certificate) { c.URIs = []*url.URL{link("spiffe://cluster.local/node/7")} }), []string{"spiffe://cluster.local/node/7"}},
	} {
		t.Run(name, func(t *testing.T) {
			refused := func(side string, err error) {
				t.Helper()
				if !errors.Is(err, mtls.ErrPeer) {
					t.Fatalf("%s: %v; want it refused", side, err)
				}
				for _, want := range append(f.want, payments) {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%s: %v; want it to say %q", side, err, want)
					}
				}
			}
			server := f.peer.Clone()
			server.ClientAuth, server.VerifyConnection = tls.RequestClientCert, nil
			_, c, _ := handshake(t, here.Client([]string{storefront}, ""), server)
			refused("client", c.err)
			if name == "another workload" {
				return // a server takes any of the trust domain
			}
			cert, err := f.peer.GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _, s := handshake(t, &tls.Config{
				NextProtos: []string{mtls.Protocol}, InsecureSkipVerify: true,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
			}, here.Server())
			refused("server", s.err)
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		_, _, s := handshake(t, &tls.Config{NextProtos: []string{mtls.Protocol}, InsecureSkipVerify: true}, here.Server())
		if s.err == nil {
			t.Error("a client without a certificate was served")
		}
	})
	t.Run("nobody is wanted", func(t *testing.T) {
		_, c, _ := handshake(t, here.Client(nil, ""), ca.Identity(t, "shop", "storefront").Server())
		if !errors.Is(c.err, mtls.ErrPeer) || !strings.Contains(c.err.Error(), "nobody is accepted") {
			t.Errorf("%v", c.err)
		}
	})
	t.Run("old TLS", func(t *testing.T) {
		old := ca.Identity(t, "shop", "storefront").Client([]string{payments}, "")
		old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		if _, _, s := handshake(t, old, here.Server()); s.err == nil {
			t.Error("TLS 1.2 was served")
		}
	})
}

// certificateOf is a server that presents storefront's certificate, spoiled.
func certificateOf(t *testing.T, ca *mtlstest.CA, change func(*x509.Certificate)) *tls.Config {
	t.Helper()
	c := ca.Spoiled(t, "shop", "storefront", change)
	return &tls.Config{NextProtos: []string{mtls.Protocol}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c, nil }}
}

// Before there is a certificate nothing works, and nothing works without one.
func TestNotReady(t *testing.T) {
	ca := mtlstest.New(t, domain)
	early := mtls.New(mtls.Options{Signer: ca.Signer("shop", "payments"), Node: node("payments")})
	if _, c, _ := handshake(t, early.Client([]string{storefront}, ""), ca.Identity(t, "shop", "storefront").Server()); c.err == nil {
		t.Error("a client without a certificate connects")
	}
	if _, c, s := handshake(t, ca.Identity(t, "shop", "storefront").Client([]string{payments}, ""), early.Server()); c.err == nil || !errors.Is(s.err, mtls.ErrNoCertificate) {
		t.Errorf("a server without a certificate serves: %v, %v", c.err, s.err)
	}
	if s, _, err := early.Secrets(); s != nil || err != nil {
		t.Errorf("it has secrets: %v", err)
	}
}

func node(account string) bootstrap.Config {
	return bootstrap.Config{TrustDomain: domain, Namespace: "shop", ServiceAccount: account}
}

// clock is a clock that a test sets.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// A second connection resumes the session of the first, and the peer is known
// there too; but it is verified at that moment, not by what was true before.
func TestResumptionIsVerified(t *testing.T) {
	setup := func(t *testing.T) (ca *mtlstest.CA, c *clock, client *mtls.Identity, server *mtls.Identity) {
		t.Helper()
		ca, c = mtlstest.New(t, domain), &clock{}
		ca.Now = c.now
		client = ca.Identity(t, "shop", "storefront")
		ca.TTL = 10 * time.Minute
		return ca, c, client, ca.Identity(t, "shop", "payments")
	}
	resumed := func(t *testing.T, conf *tls.Config, server *mtls.Identity) {
		t.Helper()
		works(t, "first", conf, server.Server())
		_, c, s := works(t, "second", conf, server.Server())
		if !c.state.DidResume || !s.state.DidResume {
			t.Fatalf("the session is not resumed: client %t, server %t", c.state.DidResume, s.state.DidResume)
		}
		if id, err := mtls.PeerID(&s.state); err != nil || id != storefront {
			t.Errorf("the server sees %q, %v", id, err)
		}
	}
	t.Run("it works", func(t *testing.T) {
		_, _, client, server := setup(t)
		resumed(t, client.Client([]string{payments}, "payments.shop"), server)
	})
	t.Run("no session for another configuration", func(t *testing.T) {
		_, _, client, server := setup(t)
		works(t, "first", client.Client([]string{payments}, "payments.shop"), server.Server())
		if _, c, _ := works(t, "second", client.Client([]string{payments}, "payments.shop"), server.Server()); c.state.DidResume {
			t.Error("a session was resumed that another configuration had made")
		}
	})
	t.Run("an expired peer", func(t *testing.T) {
		_, c, client, server := setup(t)
		conf := client.Client([]string{payments}, "payments.shop")
		resumed(t, conf, server)
		c.advance(20 * time.Minute) // before the loop looks at the clock
		if _, got, _ := handshake(t, conf, server.Server()); got.err == nil || !strings.Contains(got.err.Error(), "expired") {
			t.Errorf("%v; want it refused as expired", got.err)
		}
	})
	t.Run("a root that was taken away", func(t *testing.T) {
		ca, _, client, server := setup(t)
		conf := client.Client([]string{payments}, "payments.shop")
		resumed(t, conf, server)
		// The server renews and no longer knows the old root, the client does not.
		ca.Rotate(t)
		ca.Retire()
		if err := mtls.Renew(t.Context(), server); err != nil {
			t.Fatal(err)
		}
		_, _, s := handshake(t, conf, server.Server())
		if !errors.Is(s.err, mtls.ErrPeer) || !strings.Contains(s.err.Error(), storefront) {
			t.Errorf("the server: %v; want storefront refused", s.err)
		}
		// The client renews: its old session is not tried again.
		if err := mtls.Renew(t.Context(), client); err != nil {
			t.Fatal(err)
		}
		if _, c, _ := works(t, "after renewal", conf, server.Server()); c.state.DidResume {
			t.Error("a session of before the renewal was resumed")
		}
	})
}

// Roots are exchanged by overlap: at no moment do two workloads refuse each
// other, whichever has renewed first, and a connection that stands goes on.
func TestRotationDropsNothing(t *testing.T) {
	ca := mtlstest.New(t, domain)
	a, b := ca.Identity(t, "shop", "storefront"), ca.Identity(t, "shop", "payments")
	conf := a.Client([]string{payments}, "payments.shop")
	standing, _, _ := works(t, "before", conf, b.Server())
	renew := func(who *mtls.Identity) {
		t.Helper()
		if err := mtls.Renew(t.Context(), who); err != nil {
			t.Fatal(err)
		}
		works(t, "meanwhile", conf, b.Server())
	}
	key := ca.Pause(t) // the new root is in the bundle and does not sign yet
	renew(a)
	renew(b)
	key()
	renew(b)
	renew(a)
	ca.Retire()
	renew(a)
	renew(b)
	if len(ca.Roots()) != 1 {
		t.Errorf("%d roots", len(ca.Roots()))
	}
	if _, err := standing.client.Write([]byte("still\n")); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(standing.server).ReadString('\n'); err != nil || line != "still\n" {
		t.Errorf("the connection that stood: %q, %v", line, err)
	}
}

// TestSecondsLongCertificates: while certificates are renewed many times, a
// connection stands and new ones are made.
func TestSecondsLongCertificates(t *testing.T) {
	ca := mtlstest.New(t, domain)
	ca.TTL = 4 * time.Second // whole seconds are written, so 3 to 4
	a, b := ca.Identity(t, "shop", "storefront"), ca.Identity(t, "shop", "payments")
	conf := a.Client([]string{payments}, "payments.shop")
	standing, _, _ := works(t, "first", conf, b.Server())
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		works(t, "meanwhile", conf, b.Server())
	}
	if n := ca.Signed(); n < 6 {
		t.Errorf("%d certificates in 6 s, want each renewed at least every 2 seconds", n)
	}
	_ = standing.client.SetDeadline(time.Now().Add(5 * time.Second))
	_ = standing.server.SetDeadline(time.Now().Add(5 * time.Second))
	go func() { _, _ = standing.client.Write([]byte("x")) }()
	if _, err := io.ReadFull(standing.server, make([]byte, 1)); err != nil {
		t.Errorf("the connection that stood: %v", err)
	}
}

// TestRenewal: at half of its life the certificate is renewed. While that fails
// the old one serves, attempts grow rarer, and the log warns, once a minute,
// then says that it has expired; the first success ends it.
func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := mtlstest.New(t, domain)
		ca.TTL = 24 * time.Hour
		var down atomic.Bool
		var asked atomic.Int64
		ca.Fail = func() error {
			asked.Add(1)
			if down.Load() {
				return errors.New("authority away")
			}
			return nil
		}
		var log lockedBuffer
		reg := prometheus.NewPedanticRegistry()
		i := mtls.New(mtls.Options{Signer: ca.Signer("shop", "payments"), Node: node("payments"), Log: slog.New(slog.NewTextHandler(&log, nil)), Registerer: reg})
		mtlstest.Run(t, i)
		<-i.Ready()
		first, replaced, err := i.Secrets()
		if err != nil || first == nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Hour + 40*time.Minute)
		if n := ca.Signed(); n != 1 {
			t.Errorf("%d certificates before half of the life", n)
		}
		time.Sleep(3 * time.Hour)
		<-replaced
		second, _, err := i.Secrets()
		if n := ca.Signed(); n != 2 || err != nil || bytes.Equal(first.Key, second.Key) || bytes.Equal(first.Chain, second.Chain) {
			t.Errorf("%d certificates after half of the life; the key must be new: %v", n, err)
		}

		down.Store(true)
		before := asked.Load()
		// With jitter the next renewal is due 8 to 13 hours from here, and the
		// certificate ends 21 to 24 hours from here.
		time.Sleep(14 * time.Hour)
		if s, _, _ := i.Secrets(); !bytes.Equal(s.Chain, second.Chain) {
			t.Error("the old certificate is not served any more")
		}
		if n := asked.Load() - before; n < 30 || n > 600 {
			t.Errorf("%d attempts in 1 to 6 hours; want about one a minute", n)
		}
		if said := log.String(); !strings.Contains(said, "level=WARN") || !strings.Contains(said, "goes on with the one it has") || !strings.Contains(said, "authority away") || strings.Contains(said, "level=ERROR") {
			t.Errorf("log:\n%.2000s", said)
		}
		time.Sleep(14 * time.Hour)
		if !strings.Contains(log.String(), "has expired and cannot be renewed") {
			t.Error("the log does not say that the certificate has expired")
		}
		down.Store(false)
		time.Sleep(time.Minute)
		if n := ca.Signed(); n != 3 {
			t.Errorf("%d certificates after the authority is back", n)
		}
		want := fmt.Sprintf(`
			# HELP outrigger_certificate_expiry_timestamp_seconds When the workload's certificate expires, in Unix time; 0 while there is none.
			# TYPE outrigger_certificate_expiry_timestamp_seconds gauge
			outrigger_certificate_expiry_timestamp_seconds %d
		`, ca.LastExpiry().Unix())
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "outrigger_certificate_expiry_timestamp_seconds"); err != nil {
			t.Error(err)
		}
	})
}

// What the authority signs is looked at before it is used.
func TestWrongAnswersAreNotUsed(t *testing.T) {
	for want, f := range map[string]struct {
		account string
		change  func(*x509.Certificate)
	}{
		"this workload is " + payments:  {"cart", nil},
		"is the clock of this machine":  {"payments", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }},
		"certificate has no URI":        {"payments", func(c *x509.Certificate) { c.URIs = nil }},
		"certificate specifies an inco": {"payments", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
	} {
		ca := mtlstest.New(t, domain)
		ca.Change = f.change
		i := mtls.New(mtls.Options{Signer: ca.Signer("shop", f.account), Node: node("payments")})
		if err := mtls.Renew(t.Context(), i); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
		select {
		case <-i.Ready():
			t.Errorf("%s: it was used", want)
		default:
		}
	}
}

// FuzzPeerID: whatever URI a certificate holds, what is taken for an identity is
// what the URI says, to the letter.
func FuzzPeerID(f *testing.F) {
	f.Add(payments)
	f.Add("spiffe://cluster.local/ns/shop/sa/%70ayments")
	f.Add("SPIFFE://cluster.local/ns/shop/sa/payments?x#y")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil {
			return
		}
		id, err := mtls.PeerID(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{{URIs: []*url.URL{u}}}})
		if err != nil {
			if id != "" {
				t.Errorf("%q with %v", id, err)
			}
			return
		}
		if u.Scheme != "spiffe" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Port() != "" || id != "spiffe://"+u.Host+u.Path {
			t.Errorf("%q was taken for %q", s, id)
		}
		if parts := strings.Split(id, "/"); len(parts) != 7 || slices.Contains(parts[2:], "") || slices.Contains(parts, "..") {
			t.Errorf("%q", id)
		}
	})
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
