// Package mtlstest is an authority for tests, in memory: it signs what it is
// asked for whoever the test says that the asker is.
package mtlstest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"log/slog"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
)

// CA is an authority. Make it with New; set its fields before it signs.
type CA struct {
	TrustDomain string
	// TTL of what it signs. Default an hour.
	TTL time.Duration
	// Now is time.Now where nil.
	Now func() time.Time
	// Change may spoil a certificate before it is signed.
	Change func(*x509.Certificate)
	// Fail, where it returns an error, is the answer.
	Fail func() error

	mu     sync.Mutex
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	roots  []*x509.Certificate
	signed int
	last   time.Time
}

// New makes an authority for a trust domain with one root.
func New(tb testing.TB, trustDomain string) *CA {
	tb.Helper()
	c := &CA{TrustDomain: trustDomain}
	c.Rotate(tb)
	return c
}

func (c *CA) now() time.Time {
	if c.Now != nil {
		return c.Now()
	}
	return time.Now()
}

// Rotate makes a new root, which signs from now on. The roots before it stay in
// the bundle.
func (c *CA) Rotate(tb testing.TB) {
	tb.Helper()
	c.Pause(tb)()
}

// Pause makes a new root that is in the bundle from now on, and signs once the
// function that it returns has been called.
func (c *CA) Pause(tb testing.TB) (sign func()) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root of " + c.TrustDomain},
		NotBefore: c.now().Add(-time.Hour), NotAfter: c.now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.roots = append(c.roots, root)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.key, c.cert = key, root
	}
}

// LastExpiry is when the certificate that was signed last expires.
func (c *CA) LastExpiry() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// Spoiled signs a certificate that change has changed, with a key of its own.
func (c *CA) Spoiled(tb testing.TB, namespace, account string, change func(*x509.Certificate)) *tls.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		tb.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	r, err := c.sign(c.identity(namespace, account), csr, change)
	if err != nil {
		tb.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{r.Chain[0].Raw}, Leaf: r.Chain[0], PrivateKey: key}
}

// Retire takes all roots but the newest out of the bundle.
func (c *CA) Retire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.roots = c.roots[len(c.roots)-1:]
}

// Roots of the bundle.
func (c *CA) Roots() []*x509.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.roots
}

// Signed is how many certificates there are.
func (c *CA) Signed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.signed
}

// Signer is the authority as a workload meets it.
func (c *CA) Signer(namespace, account string) mtls.Signer {
	return signer{c, c.identity(namespace, account)}
}

func (c *CA) identity(namespace, account string) identity.Identity {
	return identity.Identity{TrustDomain: c.TrustDomain, Namespace: namespace, ServiceAccount: account}
}

type signer struct {
	ca *CA
	id identity.Identity
}

func (s signer) Sign(_ context.Context, r signing.Request) (signing.Response, error) {
	c := s.ca
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Fail != nil {
		if err := c.Fail(); err != nil {
			return signing.Response{}, err
		}
	}
	return c.sign(s.id, r.CSR, c.Change)
}

// sign is called with the lock held.
func (c *CA) sign(who identity.Identity, request []byte, change func(*x509.Certificate)) (signing.Response, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return signing.Response{}, err
	}
	id, err := url.Parse(who.SPIFFE())
	if err != nil {
		return signing.Response{}, err
	}
	ttl := c.TTL
	if ttl == 0 {
		ttl = time.Hour
	}
	c.signed++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(100 + c.signed)), URIs: []*url.URL{id},
		NotBefore: c.now().Add(-time.Minute), NotAfter: c.now().Add(ttl), BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if change != nil {
		change(template)
	}
	c.last = template.NotAfter
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, csr.PublicKey, c.key)
	if err != nil {
		return signing.Response{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return signing.Response{}, err
	}
	return signing.Response{Chain: []*x509.Certificate{leaf}, Roots: append([]*x509.Certificate(nil), c.roots...)}, nil
}

// Identity of a workload, which runs until the test ends and has a certificate.
func (c *CA) Identity(tb testing.TB, namespace, account string) *mtls.Identity {
	tb.Helper()
	i := mtls.New(mtls.Options{
		Signer: c.Signer(namespace, account), Log: slog.New(slog.DiscardHandler), Now: c.Now,
		Node: bootstrap.Config{TrustDomain: c.TrustDomain, Namespace: namespace, ServiceAccount: account},
	})
	Run(tb, i)
	select {
	case <-i.Ready():
	case <-time.After(10 * time.Second):
		tb.Fatalf("%s gets no certificate", i.ID())
	}
	return i
}

// Run runs an identity until the test ends.
func Run(tb testing.TB, i *mtls.Identity) {
	tb.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := i.Run(ctx); err != nil {
			tb.Errorf("Run: %v", err)
		}
	})
	tb.Cleanup(func() { stop(); wg.Wait() })
}
