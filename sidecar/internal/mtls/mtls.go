// Package mtls is the identity of the workload that the sidecar stands beside:
// a key and a certificate that prove it, and what is asked of peers that prove
// theirs.
//
// It knows the authority (package signing), SPIFFE IDs and crypto/tls; it knows
// neither listeners, pools nor what is spoken inside. main makes an Identity
// and runs it; the proxy takes its configurations for connections in and out,
// the xDS client its credentials, and package sds hands what it has to an Envoy.
//
// The key is made here and never written anywhere. The certificate is renewed
// at half of its life. A peer is verified again whenever a session is resumed,
// against the roots and the time of that moment: so a new root counts, and a
// root that was taken away no longer does, at the next handshake of either kind.
// Connections that stand are never ended by it.
package mtls

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const (
	// signTimeout bounds one attempt to get a certificate.
	signTimeout = 10 * time.Second
	backoffMin  = 100 * time.Millisecond
	// Between attempts at most: while there is none that is valid, and while
	// there is.
	backoffUrgent = 5 * time.Second
	backoffCalm   = time.Minute
	warnEvery     = time.Minute
	// look is how often the wall clock is looked at: timers stand still while a
	// machine sleeps, and certificates do not.
	look = 30 * time.Second
)

// ErrNoCertificate says that the authority has not signed one yet.
var ErrNoCertificate = errors.New("this workload has no certificate yet")

// Signer signs what the workload asks for.
type Signer interface {
	Sign(ctx context.Context, r signing.Request) (signing.Response, error)
}

// Options of an Identity. Node and either Authority or Signer are required.
type Options struct {
	// Authority is its address, host:port.
	Authority string
	// TokenFile proves the workload at first contact. It is read at every use,
	// because what is mounted there changes.
	TokenFile string
	// RootsFile holds, as PEM, the roots of the control plane's certificate. It is
	// read at every use.
	RootsFile string
	// Signer takes the place of the authority at the address.
	Signer Signer
	// Node says whose identity it is.
	Node bootstrap.Config
	// Log is slog.Default where nil.
	Log *slog.Logger
	// Registerer takes the metrics; nil registers none.
	Registerer prometheus.Registerer
	// Now is time.Now where nil.
	Now func() time.Time
}

// Identity is what the workload proves itself with. Make it with New; it has a
// certificate from a moment after Run began. It is safe for concurrent use.
type Identity struct {
	o       Options
	self    identity.Identity
	log     *slog.Logger
	now     func() time.Time
	signer  Signer
	server  *tls.Config
	session tls.ClientSessionCache
	scopes  atomic.Uint64
	epoch   atomic.Uint64
	ready   chan struct{}
	expiry  prometheus.Gauge
	renewed *prometheus.CounterVec

	current atomic.Pointer[material]
}

// material is what one signing gave. It is never changed, but for what it
// remembers.
type material struct {
	certificate *tls.Certificate // nil before the first
	roots       *x509.CertPool
	rootList    []*x509.Certificate
	replaced    chan struct{} // closed when there is newer

	mu       sync.Mutex
	verified map[[sha256.Size]byte]window
}

// New makes an Identity; it does nothing until Run. A Registerer that already
// has its metrics makes it panic.
func New(o Options) *Identity {
	i := &Identity{
		o: o, log: o.Log, now: o.Now, signer: o.Signer, ready: make(chan struct{}),
		self:    identity.Identity{TrustDomain: o.Node.TrustDomain, Namespace: o.Node.Namespace, ServiceAccount: o.Node.ServiceAccount},
		session: tls.NewLRUClientSessionCache(maxSessions),
		expiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_certificate_expiry_timestamp_seconds", Help: "When the workload's certificate expires, in Unix time; 0 while there is none.",
		}),
		renewed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_certificate_renewals_total", Help: "Attempts to get a certificate from the authority, by result.",
		}, []string{"result"}),
	}
	if i.log == nil {
		i.log = slog.Default()
	}
	if i.now == nil {
		i.now = time.Now
	}
	if i.signer == nil {
		i.signer = authority{i}
	}
	i.current.Store(&material{roots: x509.NewCertPool(), replaced: make(chan struct{})})
	i.server = i.serverConfig()
	for _, r := range []string{succeeded, failed} {
		i.renewed.WithLabelValues(r)
	}
	if o.Registerer != nil {
		o.Registerer.MustRegister(i.expiry, i.renewed)
	}
	return i
}

const (
	succeeded = "success"
	failed    = "failure"
)

// ID is the SPIFFE ID of the workload.
func (i *Identity) ID() string { return i.self.SPIFFE() }

// Ready is closed once there is a certificate. It stays closed.
func (i *Identity) Ready() <-chan struct{} { return i.ready }

// Run gets the certificate and renews it until ctx ends, trying for ever; it
// then returns nil.
func (i *Identity) Run(ctx context.Context) error {
	r := renewal{Identity: i, backoff: backoffMin}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		if now := i.now(); !now.Before(r.due) {
			r.attempt(ctx)
		}
		timer.Reset(min(max(r.due.Sub(i.now()), 0), look))
	}
}

// renewal is one call of Run.
type renewal struct {
	*Identity
	due      time.Time
	backoff  time.Duration
	failures int // since the last warning
	warned   time.Time
}

func (r *renewal) attempt(ctx context.Context) {
	err := r.renew(ctx)
	if ctx.Err() != nil {
		return
	}
	now := r.now()
	left := r.left(now)
	if err == nil {
		r.renewed.WithLabelValues(succeeded).Inc()
		r.backoff, r.failures, r.warned = backoffMin, 0, time.Time{}
		// Sidecars that were started together need not ask together.
		r.due = now.Add(max(time.Duration((0.45+0.1*rand.Float64())*float64(left)), backoffMin))
		r.log.Info("certificate signed", "outrigger.identity", r.ID(), "tls.server.not_after", now.Add(left), "renewal", r.due)
		return
	}
	r.renewed.WithLabelValues(failed).Inc()
	r.failures++
	most := backoffUrgent
	if left > 0 {
		// However short the life, there is time for a few attempts.
		most = min(max(left/8, backoffMin), backoffCalm)
	}
	r.backoff = min(r.backoff, most)
	r.due = now.Add(r.backoff/2 + rand.N(r.backoff/2))
	r.backoff = min(2*r.backoff, most)
	if !r.warned.IsZero() && now.Before(r.warned.Add(warnEvery)) {
		return
	}
	r.warned = now
	args := []any{"outrigger.identity", r.ID(), "server.address", r.o.Authority, "error.message", err.Error(), "failures", r.failures}
	r.failures = 0
	switch c := r.current.Load().certificate; {
	case c == nil:
		r.log.Warn("no certificate from the authority; nothing that needs one works. Check --control-plane, --control-plane-ca and --join-token-file", args...)
	case left > 0:
		r.log.Warn("the certificate cannot be renewed; the sidecar goes on with the one it has", append(args, "tls.server.not_after", c.Leaf.NotAfter, "left", left.Round(time.Second).String())...)
	default:
		r.log.Error("the certificate has expired and cannot be renewed; peers refuse this workload", append(args, "tls.server.not_after", c.Leaf.NotAfter)...)
	}
}

// left is how long the certificate is still valid; not positive where there is
// none.
func (i *Identity) left(now time.Time) time.Duration {
	c := i.current.Load().certificate
	if c == nil {
		return 0
	}
	return c.Leaf.NotAfter.Sub(now)
}

// renew gets a certificate for a new key and puts it to use.
func (i *Identity) renew(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		return fmt.Errorf("make a key: %w", err)
	}
	// Whose it is, the authority knows from what proves the workload.
	csr, err := x509.CreateCertificateRequest(crand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return fmt.Errorf("make a request: %w", err)
	}
	r, err := i.signer.Sign(ctx, signing.Request{CSR: csr})
	if err != nil {
		return err
	}
	return i.use(key, r)
}

// use checks what the authority has signed, as a peer would, and replaces what
// was in use.
func (i *Identity) use(key crypto.Signer, r signing.Response) error {
	m := &material{roots: x509.NewCertPool(), rootList: r.Roots, replaced: make(chan struct{}), verified: map[[sha256.Size]byte]window{}}
	for _, c := range r.Roots {
		m.roots.AddCert(c)
	}
	if len(r.Chain) == 0 {
		return errors.New("the authority has sent no certificate")
	}
	leaf := r.Chain[0]
	if pub, ok := key.Public().(*ecdsa.PublicKey); !ok || !pub.Equal(leaf.PublicKey) {
		return errors.New("the authority has signed another key")
	}
	id, err := identity.OfCertificate(leaf)
	if err != nil {
		return fmt.Errorf("the authority's certificate: %w", err)
	}
	if id != i.self {
		return fmt.Errorf("the authority has signed %s, and this workload is %s: correct --namespace, --service-account and --trust-domain, or the join token", id, i.self)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if err := m.verify(r.Chain, usage, i.now()); err != nil {
			return fmt.Errorf("the authority's certificate would be refused by peers (is the clock of this machine right?): %w", err)
		}
	}
	m.certificate = &tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, c := range r.Chain {
		m.certificate.Certificate = append(m.certificate.Certificate, c.Raw)
	}
	old := i.current.Swap(m)
	// Sessions were made with the old certificate and verified by the old roots:
	// what peers think of those is not worth finding out.
	i.epoch.Add(1)
	i.expiry.Set(float64(leaf.NotAfter.Unix()))
	close(old.replaced)
	if old.certificate == nil {
		close(i.ready)
	}
	return nil
}

// Secrets are what proves the workload, as PEM.
type Secrets struct {
	// Chain begins with the workload's certificate.
	Chain []byte
	// Key in PKCS #8. Whoever has it is the workload until the chain expires.
	Key   []byte
	Roots []byte
}

// Secrets returns what is in use, nil before there is a certificate, and a
// channel that is closed when there is something newer.
func (i *Identity) Secrets() (*Secrets, <-chan struct{}, error) {
	m := i.current.Load()
	if m.certificate == nil {
		return nil, m.replaced, nil
	}
	der, err := x509.MarshalPKCS8PrivateKey(m.certificate.PrivateKey)
	if err != nil {
		return nil, m.replaced, fmt.Errorf("encode the key: %w", err)
	}
	s := &Secrets{Key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), Roots: signing.EncodeCertificates(m.rootList)}
	for _, raw := range m.certificate.Certificate {
		s.Chain = append(s.Chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: raw})...)
	}
	return s, m.replaced, nil
}

// sorted returns a sorted copy.
func sorted(in []string) []string { return slices.Sorted(slices.Values(in)) }
