// Package authority is the certificate authority of the mesh: it signs, for a
// workload that has proved who it is, a certificate that says so for a day.
//
// It knows certificates, join tokens and the files that hold its keys; it does
// not know xDS, Kubernetes or which workloads there are. main opens it and
// registers it at the server that package discovery runs over TLS, for which it
// provides the credentials too.
//
// # The files
//
// They are in a folder, or wherever else a Store keeps them.
//
//	ca.key     the key that signs (PEM), for nobody but its owner and group to read
//	ca.crt     its certificate; where it is an intermediate, those between it and a root follow
//	root.crt   every root that peers may be rooted in, the bundle that workloads are given
//	token.key  the key of join tokens, 32 bytes in base64; may be absent: no join tokens then
//
// Where there are none they are made with a root of their own, at once or not at
// all. Files may be exchanged while the program runs; what does not fit together
// is refused and what was before stays in force.
//
// A root is exchanged by overlap: add the new root to root.crt; when the longest
// certificate has been renewed (--certificate-ttl later), put its key and
// certificate into ca.key and ca.crt; as long later, take the old root out of
// root.crt. Rotate makes each of these steps.
package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

// How long a workload's certificate is valid.
const (
	DefaultTTL = 24 * time.Hour
	MaxTTL     = 24 * time.Hour
	MinTTL     = time.Minute
)

const (
	// skew is how far a certificate is valid backwards, for clocks that are slow.
	skew = 5 * time.Minute
	// reloadEvery is how often the files are looked at.
	reloadEvery = 10 * time.Second
	// warnBefore a link of the chain expires the log says so, every warnEvery.
	warnBefore = 30 * 24 * time.Hour
	warnEvery  = 6 * time.Hour
	// complainEvery is how often the log may say that the files cannot be read.
	complainEvery = time.Minute
)

// Reason says in one word why something was refused, for the metric.
type Reason string

// The reasons.
const (
	NoProof        Reason = "no_proof"
	TokenMalformed Reason = "token_malformed"
	TokenSignature Reason = "token_signature"
	TokenExpired   Reason = "token_expired"
	TokenRejected  Reason = "token_rejected" // by the one who issued it
	TokenUnbound   Reason = "token_unbound"  // it is no pod's, or not that pod's any more
	TrustDomain    Reason = "trust_domain"
	Certificate    Reason = "certificate"
	Reserved       Reason = "reserved_identity"
	BadRequest     Reason = "request"
	OtherIdentity  Reason = "other_identity"
	TooOften       Reason = "rate"
	NotPossible    Reason = "internal"
)

func reasons() []Reason {
	return []Reason{NoProof, TokenMalformed, TokenSignature, TokenExpired, TokenRejected, TokenUnbound, TrustDomain, Certificate, Reserved, BadRequest, OtherIdentity, TooOften, NotPossible}
}

// Refusal is why a certificate was not signed. It never holds the token.
type Refusal struct {
	Reason Reason
	Err    error
}

// Error names what was wrong and the remedy.
func (r *Refusal) Error() string { return r.Err.Error() }

// Unwrap returns the cause.
func (r *Refusal) Unwrap() error { return r.Err }

func refuse(reason Reason, format string, args ...any) error {
	return &Refusal{reason, fmt.Errorf(format, args...)}
}

// Verifier tells whom a token proves. Its errors are Refusals. It must be safe
// for concurrent use.
type Verifier interface {
	Verify(ctx context.Context, token string) (identity.Identity, error)
}

// Options of an Authority. Store and TrustDomain are required.
type Options struct {
	Store       Store
	TrustDomain string
	// TTL of a workload's certificate, MinTTL to MaxTTL. Default DefaultTTL.
	TTL time.Duration
	// Names of the control plane's own certificate besides its identity: DNS names
	// and IP addresses.
	Names []string
	// Verifier of tokens. Nil takes join tokens, whose key is then among the files
	// that are made.
	Verifier Verifier
	// Log is slog.Default where nil.
	Log *slog.Logger
	// Registerer takes the metrics; nil registers none.
	Registerer prometheus.Registerer
	// Now is time.Now where nil.
	Now func() time.Time
}

// Authority signs certificates. Make it with Open. It is safe for concurrent
// use.
type Authority struct {
	o        Options
	now      func() time.Time
	log      *slog.Logger
	verifier Verifier
	limiter  limiter
	metrics  metrics
	quiet    quiet

	current atomic.Pointer[keys]

	reloading sync.Mutex // so that what was read last is in force
	changed   []func()   // guarded by reloading

	mu       sync.Mutex
	own      *tls.Certificate // the control plane's
	ownKeys  *keys            // that signed it
	ownRenew time.Time
}

// keys are what the files hold, never changed once read.
type keys struct {
	digest   [sha256.Size]byte // of the files
	key      crypto.Signer
	issuer   *x509.Certificate
	chain    []*x509.Certificate // from the issuer to below the root; empty where it is a root itself
	until    time.Time           // when the first link expires
	roots    []*x509.Certificate
	pool     *x509.CertPool
	tokenKey []byte // nil where there is none
}

// Open reads the files, which it makes where there are none.
func Open(ctx context.Context, o Options) (*Authority, error) {
	if o.TTL != 0 && (o.TTL < MinTTL || o.TTL > MaxTTL) {
		return nil, fmt.Errorf("certificates that last %s: write %s to %s", o.TTL, MinTTL, MaxTTL)
	}
	return open(ctx, o)
}

func open(ctx context.Context, o Options) (*Authority, error) {
	if o.TTL == 0 {
		o.TTL = DefaultTTL
	}
	if _, err := identity.Parse(identity.ControlPlane(o.TrustDomain).SPIFFE()); err != nil {
		return nil, fmt.Errorf("trust domain %q: %w", o.TrustDomain, err)
	}
	a := &Authority{o: o, now: o.Now, log: o.Log, verifier: o.Verifier}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.Default()
	}
	if a.verifier == nil {
		a.verifier = joinTokens{a}
	}
	a.metrics = newMetrics(o.Registerer)
	if err := a.create(ctx); err != nil {
		return nil, fmt.Errorf("authority: %s: %w", o.Store, err)
	}
	if _, err := a.Reload(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

// create makes a root where there is none. Of several that do so at once one
// wins, and the others use what it made.
func (a *Authority) create(ctx context.Context) error {
	_, err := a.o.Store.Load(ctx)
	if !errors.Is(err, ErrEmpty) {
		return err
	}
	files, err := newRoot(a.o.TrustDomain, a.now())
	if err != nil {
		return err
	}
	if a.o.Verifier != nil {
		delete(files, fileToken)
	}
	made, err := a.o.Store.Create(ctx, files)
	if err != nil {
		return err
	}
	if made {
		a.log.Info("a new root was made", "file.path", a.o.Store.String(), "outrigger.trust_domain", a.o.TrustDomain)
	}
	return nil
}

// Reload reads the files again and reports whether something has changed. On an
// error what was before stays in force.
func (a *Authority) Reload(ctx context.Context) (changed bool, err error) {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	files, err := a.o.Store.Load(ctx)
	if err != nil {
		return false, fmt.Errorf("authority: %s: %w", a.o.Store, err)
	}
	k, err := decode(files, a.now())
	if err != nil {
		return false, fmt.Errorf("authority: %s: %w", a.o.Store, err)
	}
	old := a.current.Load()
	if old != nil && old.digest == k.digest {
		return false, nil
	}
	a.current.Store(k)
	a.metrics.links.Reset()
	for name, c := range k.links() {
		a.metrics.links.WithLabelValues(name).Set(float64(c.NotAfter.Unix()))
	}
	if old != nil {
		a.log.Info("the authority's files have changed", "issuer", fingerprint(k.issuer), "roots", len(k.roots))
	}
	for _, f := range a.changed {
		f()
	}
	return true, nil
}

// OnChange has f called, from whichever goroutine reloads, after the keys or the
// roots have changed. f must return at once and call nothing of
// the Authority that reloads.
func (a *Authority) OnChange(f func()) {
	a.reloading.Lock()
	defer a.reloading.Unlock()
	a.changed = append(a.changed, f)
}

// links of the chains that workloads are given, by what they are called.
func (k *keys) links() map[string]*x509.Certificate {
	out := map[string]*x509.Certificate{"issuer": k.issuer}
	for _, c := range k.chain {
		if c != k.issuer {
			out["intermediate "+fingerprint(c)] = c
		}
	}
	for _, c := range k.roots {
		out["root "+fingerprint(c)] = c
	}
	return out
}

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:4])
}

// Run follows the files until ctx ends, and returns nil then.
func (a *Authority) Run(ctx context.Context) error {
	tick := time.NewTicker(reloadEvery)
	defer tick.Stop()
	var warned, complained time.Time
	said := ""
	for {
		if now := a.now(); now.Sub(warned) >= warnEvery {
			for name, c := range a.current.Load().links() {
				if left := c.NotAfter.Sub(now); left < warnBefore {
					warned = now
					a.log.Warn("a link of the authority's chain expires; exchange it by overlap", "link", name, "tls.server.not_after", c.NotAfter, "left", left.Round(time.Minute).String())
				}
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		switch changed, err := a.Reload(ctx); {
		case ctx.Err() != nil:
			return nil
		case err != nil && err.Error() != said && a.now().Sub(complained) >= complainEvery:
			said, complained = err.Error(), a.now()
			a.log.Warn("the authority's files cannot be used as they are; what was before stays in force", "error.message", said)
		case err != nil:
		case changed:
			said, warned = "", time.Time{}
		default:
			said = ""
		}
	}
}

// Roots are all that peers may be rooted in.
func (a *Authority) Roots() []*x509.Certificate { return a.current.Load().roots }

// Bundle is Roots in PEM.
func (a *Authority) Bundle() []byte { return signing.EncodeCertificates(a.Roots()) }

// Sign signs the key of a request in DER for a workload that has proved that it
// is id. Its error is a Refusal.
func (a *Authority) Sign(id identity.Identity, csr []byte) (signing.Response, error) {
	if id.TrustDomain != a.o.TrustDomain {
		return signing.Response{}, refuse(TrustDomain, "%s is of trust domain %s; this authority is of %s", id, id.TrustDomain, a.o.TrustDomain)
	}
	if id == identity.ControlPlane(a.o.TrustDomain) {
		return signing.Response{}, refuse(Reserved, "%s is the control plane's own identity and is signed for nobody", id)
	}
	public, err := publicKey(csr, id)
	if err != nil {
		return signing.Response{}, err
	}
	k := a.current.Load()
	leaf, err := k.sign(id, public, nil, a.o.TTL, a.now())
	if err != nil {
		return signing.Response{}, err
	}
	return signing.Response{Chain: append([]*x509.Certificate{leaf}, k.chain...), Roots: k.roots}, nil
}

// publicKey checks a request: what it asks for besides a key it does not get, so
// it may not ask.
func publicKey(der []byte, id identity.Identity) (any, error) {
	if len(der) > signing.MaxCSR {
		return nil, refuse(BadRequest, "csr: %d bytes; at most %d", len(der), signing.MaxCSR)
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, refuse(BadRequest, "csr: %w", err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, refuse(BadRequest, "csr: signature: %w", err)
	}
	switch key := r.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return nil, refuse(BadRequest, "csr: key on curve %s; use P-256 or Ed25519", key.Curve.Params().Name)
		}
	case ed25519.PublicKey:
	default:
		return nil, refuse(BadRequest, "csr: key is %T; use ECDSA on P-256, or Ed25519", r.PublicKey)
	}
	if len(r.Subject.Names) > 0 {
		return nil, refuse(BadRequest, "csr: subject %q; leave it empty, the authority knows whose certificate it is", r.Subject)
	}
	subjectAltName := asn1.ObjectIdentifier{2, 5, 29, 17}
	for _, e := range r.Extensions {
		if !e.Id.Equal(subjectAltName) {
			return nil, refuse(BadRequest, "csr: extension %s; none may be asked for but subjectAltName", e.Id)
		}
	}
	if n := len(r.DNSNames) + len(r.EmailAddresses) + len(r.IPAddresses); n > 0 {
		return nil, refuse(BadRequest, "csr: %d alternative names that are no URI; a workload has none", n)
	}
	if len(r.URIs) > 1 {
		return nil, refuse(BadRequest, "csr: %d URIs; at most the workload's own", len(r.URIs))
	}
	for _, u := range r.URIs {
		if u.String() != id.SPIFFE() {
			return nil, refuse(OtherIdentity, "csr: asks for %s, and the caller has proved that it is %s", u, id)
		}
	}
	return r.PublicKey, nil
}

// sign makes a certificate that no link of the chain outlives.
func (k *keys) sign(id identity.Identity, public any, names []string, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	uri, err := url.Parse(id.SPIFFE())
	if err != nil {
		return nil, refuse(NotPossible, "%s: %w", id, err)
	}
	t := &x509.Certificate{
		URIs:      []*url.URL{uri},
		NotBefore: now.Add(-skew), NotAfter: now.Add(ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		// Says that it is no authority.
		BasicConstraintsValid: true,
	}
	if t.NotBefore.Before(k.issuer.NotBefore) {
		t.NotBefore = k.issuer.NotBefore
	}
	if t.NotAfter.After(k.until) {
		t.NotAfter = k.until
	}
	if !t.NotAfter.After(now) {
		return nil, refuse(NotPossible, "a link of the authority's chain has expired at %s: exchange it", k.until.UTC().Format(time.RFC3339))
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, k.issuer, public, k.key)
	if err != nil {
		return nil, refuse(NotPossible, "sign %s: %w", id, err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, refuse(NotPossible, "sign %s: %w", id, err)
	}
	return c, nil
}

// verify says whether a chain of a peer leads to one of our roots now, and whose
// it is.
func (a *Authority) verify(chain []*x509.Certificate) (identity.Identity, error) {
	id, err := identity.OfCertificate(chain[0])
	if err != nil {
		return id, refuse(Certificate, "client certificate: %w", err)
	}
	if id.TrustDomain != a.o.TrustDomain {
		return id, refuse(TrustDomain, "client certificate: %s is of trust domain %s; this control plane is of %s", id, id.TrustDomain, a.o.TrustDomain)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{
		Roots: a.current.Load().pool, Intermediates: between, CurrentTime: a.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		return id, refuse(Certificate, "client certificate of %s: %w", id, err)
	}
	return id, nil
}

type metrics struct {
	links   *prometheus.GaugeVec
	issued  *prometheus.CounterVec
	refused *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) metrics {
	m := metrics{
		links: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_authority_certificate_expiry_timestamp_seconds", Help: "When a link of the chain of workloads' certificates expires, in Unix time.",
		}, []string{"link"}),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_authority_issued_total", Help: "Certificates signed for workloads, by what proved the workload.",
		}, []string{"proof"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_authority_refused_total", Help: "Requests for a certificate that were refused, by reason.",
		}, []string{"reason"}),
	}
	for _, p := range []string{byToken, byCertificate} {
		m.issued.WithLabelValues(p)
	}
	for _, r := range reasons() {
		m.refused.WithLabelValues(string(r))
	}
	if reg != nil {
		reg.MustRegister(m.links, m.issued, m.refused)
	}
	return m
}

func samePublicKey(a, b any) bool {
	x, err := x509.MarshalPKIXPublicKey(a)
	if err != nil {
		return false
	}
	y, err := x509.MarshalPKIXPublicKey(b)
	return err == nil && bytes.Equal(x, y)
}

// errNoIssuer says that no certificate belongs to the key.
var errNoIssuer = errors.New("ca.crt holds no certificate of an authority for the key in ca.key")
