package authority_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const domain = "cluster.local"

var payments = identity.Identity{TrustDomain: domain, Namespace: "shop", ServiceAccount: "payments"}

type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

func open(t *testing.T, change ...func(*authority.Options)) *authority.Authority {
	t.Helper()
	o := authority.Options{Store: authority.Folder(filepath.Join(t.TempDir(), "authority")), TrustDomain: domain, Names: []string{"localhost", "127.0.0.1"}, Log: slog.New(slog.DiscardHandler)}
	for _, c := range change {
		c(&o)
	}
	a, err := authority.OpenAnyTTL(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func key(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func csr(t *testing.T, k crypto.Signer, r *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, r, k)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// refused says that err is a refusal for the reason, in these words.
func refused(t *testing.T, err error, reason authority.Reason, words ...string) {
	t.Helper()
	var r *authority.Refusal
	if !errors.As(err, &r) || r.Reason != reason {
		t.Errorf("%v; want it refused as %s", err, reason)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v; want it to say %q", err, w)
		}
	}
}

// A certificate is the workload's alone: one URI, for both ends of a connection,
// no authority, valid a little backwards and no longer than was asked.
func TestCertificate(t *testing.T) {
	a := open(t)
	k := key(t)
	before := time.Now()
	r, err := a.Sign(payments, csr(t, k, &x509.CertificateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	c := r.Chain[0]
	if id, err := identity.OfCertificate(c); err != nil || id != payments {
		t.Errorf("%v, %v", id, err)
	}
	if !k.PublicKey.Equal(c.PublicKey) || c.IsCA || !c.BasicConstraintsValid || c.KeyUsage != x509.KeyUsageDigitalSignature || len(c.Subject.Names) != 0 ||
		len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) != 0 || c.SerialNumber.BitLen() < 64 {
		t.Errorf("%+v", c)
	}
	if d := before.Sub(c.NotBefore); d < 4*time.Minute || d > 6*time.Minute {
		t.Errorf("valid %s backwards, want 5m", d)
	}
	if d := c.NotAfter.Sub(before); d < 23*time.Hour+59*time.Minute || d > 24*time.Hour+time.Minute {
		t.Errorf("valid for %s, want 24h", d)
	}
	pool := x509.NewCertPool()
	for _, root := range r.Roots {
		pool.AddCert(root)
	}
	for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := c.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{u}}); err != nil {
			t.Error(err)
		}
	}
}

// What is asked for besides a key is refused, by name.
func TestRequestsAreChecked(t *testing.T) {
	a := open(t)
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	good := csr(t, key(t), &x509.CertificateRequest{})
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	eku, err := asn1.Marshal([]asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 1}})
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]struct {
		der    []byte
		reason authority.Reason
		say    string
	}{
		"nothing":            {nil, authority.BadRequest, "csr"},
		"too large":          {make([]byte, signing.MaxCSR+1), authority.BadRequest, "at most 8192"},
		"signature":          {forged, authority.BadRequest, "signature"},
		"P-384":              {csr(t, p384, &x509.CertificateRequest{}), authority.BadRequest, "P-384"},
		"RSA":                {csr(t, rsaKey, &x509.CertificateRequest{}), authority.BadRequest, "rsa"},
		"subject":            {csr(t, key(t), &x509.CertificateRequest{Subject: pkix.Name{CommonName: "admin"}}), authority.BadRequest, "admin"},
		"DNS name":           {csr(t, key(t), &x509.CertificateRequest{DNSNames: []string{"kubernetes"}}), authority.BadRequest, "alternative names"},
		"IP address":         {csr(t, key(t), &x509.CertificateRequest{IPAddresses: []net.IP{{10, 0, 0, 1}}}), authority.BadRequest, "alternative names"},
		"email":              {csr(t, key(t), &x509.CertificateRequest{EmailAddresses: []string{"a@b"}}), authority.BadRequest, "alternative names"},
		"another workload":   {csr(t, key(t), &x509.CertificateRequest{URIs: []*url.URL{uri("spiffe://cluster.local/ns/shop/sa/cart")}}), authority.OtherIdentity, "sa/cart"},
		"two URIs":           {csr(t, key(t), &x509.CertificateRequest{URIs: []*url.URL{uri(payments.SPIFFE()), uri(payments.SPIFFE())}}), authority.BadRequest, "2 URIs"},
		"extended key usage": {csr(t, key(t), &x509.CertificateRequest{ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: eku}}}), authority.BadRequest, "2.5.29.37"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.Sign(payments, f.der)
			refused(t, err, f.reason, f.say)
		})
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, der := range map[string][]byte{
		"Ed25519": csr(t, edKey, &x509.CertificateRequest{}), "its own URI": csr(t, key(t), &x509.CertificateRequest{URIs: []*url.URL{uri(payments.SPIFFE())}}),
	} {
		if _, err := a.Sign(payments, der); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	foreign := payments
	foreign.TrustDomain = "other.example"
	_, err = a.Sign(foreign, good)
	refused(t, err, authority.TrustDomain, "other.example")
	_, err = a.Sign(identity.ControlPlane(domain), good)
	refused(t, err, authority.Reserved, "control plane")
}

// The folder is made once, whole, and for its owner only, whoever else makes it
// at the same time; what is there is used again.
func TestFolderIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "deep", "authority")
	var wg sync.WaitGroup
	roots := make([]*x509.Certificate, 8)
	for i := range roots {
		wg.Go(func() {
			a, err := authority.Open(t.Context(), authority.Options{Store: authority.Folder(dir), TrustDomain: domain, Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = a.Roots()[0]
		})
	}
	wg.Wait()
	for _, r := range roots {
		if r == nil || !r.Equal(roots[0]) {
			t.Fatal("two of those who made it have different roots")
		}
	}
	for name, want := range map[string]fs.FileMode{"": 0o700, "ca.key": 0o600, "token.key": 0o600, "ca.crt": 0o644, "root.crt": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%q: mode %v, %v; want %v", name, info.Mode().Perm(), err, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(dir), ".*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	empty := t.TempDir() // one that exists and is empty
	if _, err := authority.Open(t.Context(), authority.Options{Store: authority.Folder(empty), TrustDomain: domain, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Error(err)
	}
}

// Folders that cannot be right are refused with the file and the remedy.
func TestFoldersAreChecked(t *testing.T) {
	for want, spoil := range map[string]func(dir string) error{
		"ca.key has mode 0644, so that others could read": func(dir string) error { return os.Chmod(filepath.Join(dir, "ca.key"), 0o644) },
		"token.key has mode 0604":                         func(dir string) error { return os.Chmod(filepath.Join(dir, "token.key"), 0o604) },
		"ca.key has mode 0660":                            func(dir string) error { return os.Chmod(filepath.Join(dir, "ca.key"), 0o660) },
		"ca.crt is missing":                               func(dir string) error { return os.Remove(filepath.Join(dir, "ca.crt")) },
		"ca.key is missing":                               func(dir string) error { return os.Remove(filepath.Join(dir, "ca.key")) },
		"root.crt: it holds no certificate":               func(dir string) error { return os.WriteFile(filepath.Join(dir, "root.crt"), nil, 0o600) },
		"ca.key: it is not PEM":                           func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca.key"), []byte("x"), 0o600) },
		"token.key: it is not 32 bytes":                   func(dir string) error { return os.WriteFile(filepath.Join(dir, "token.key"), []byte("eA=="), 0o600) },
		"no certificate of an authority for the key": func(dir string) error {
			der, err := x509.MarshalPKCS8PrivateKey(key(t))
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, "ca.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
		},
		"does not lead to one in root.crt": func(dir string) error {
			root, _ := newCA(t, "another", nil, nil, 0, time.Hour)
			return os.WriteFile(filepath.Join(dir, "root.crt"), signing.EncodeCertificates([]*x509.Certificate{root}), 0o600)
		},
		"ca.key: 300000 bytes": func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca.key"), make([]byte, 300000), 0o600) },
	} {
		t.Run(want, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "authority")
			o := authority.Options{Store: authority.Folder(dir), TrustDomain: domain, Log: slog.New(slog.DiscardHandler)}
			if _, err := authority.Open(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			if err := spoil(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := authority.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v", err)
			}
		})
	}
	for want, o := range map[string]authority.Options{
		"certificates that last 30s": {TTL: 30 * time.Second, TrustDomain: domain},
		"certificates that last 48h": {TTL: 48 * time.Hour, TrustDomain: domain},
		`trust domain "A b"`:         {TrustDomain: "A b"},
	} {
		o.Store = authority.Folder(t.TempDir())
		if _, err := authority.Open(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

// newCA makes an authority's certificate; self-signed without a parent.
func newCA(t *testing.T, name string, parent *x509.Certificate, parentKey crypto.Signer, age, ttl time.Duration) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	k := key(t)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-age - time.Minute), NotAfter: time.Now().Add(ttl),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if parent == nil {
		parent, parentKey = c, k
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, k.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out, k
}

func put(t *testing.T, dir string, k *ecdsa.PrivateKey, certs, roots []*x509.Certificate) {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		"ca.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), "ca.crt": signing.EncodeCertificates(certs), "root.crt": signing.EncodeCertificates(roots),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// A mounted intermediate signs, the chain is handed out with the certificate,
// and no certificate outlives a link of it. Of several certificates of the key
// the newest is the issuer.
func TestIntermediate(t *testing.T) {
	dir := t.TempDir()
	root, rootKey := newCA(t, "root", nil, nil, time.Hour, 1000*time.Hour)
	middle, middleKey := newCA(t, "middle", root, rootKey, time.Hour, 2*time.Hour)
	issuer, issuerKey := newCA(t, "issuer", middle, middleKey, time.Hour, 100*time.Hour)
	old := *issuer
	old.NotBefore, old.NotAfter = issuer.NotBefore.Add(-time.Hour), time.Now().Add(500*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &old, middle, issuerKey.Public(), middleKey)
	if err != nil {
		t.Fatal(err)
	}
	older, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, issuerKey, []*x509.Certificate{older, issuer, middle}, []*x509.Certificate{root})
	reg := prometheus.NewPedanticRegistry()
	a := open(t, func(o *authority.Options) { o.Store, o.Registerer = authority.Folder(dir), reg })
	r, err := a.Sign(payments, csr(t, key(t), &x509.CertificateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Chain) != 3 || !r.Chain[1].Equal(issuer) || !r.Chain[2].Equal(middle) || !r.Chain[0].NotAfter.Equal(middle.NotAfter) {
		t.Errorf("a chain of %d until %v; want the certificate, issuer and middle, until %v", len(r.Chain), r.Chain[0].NotAfter, middle.NotAfter)
	}
	if n, err := testutil.GatherAndCount(reg, "outrigger_authority_certificate_expiry_timestamp_seconds"); err != nil || n != 3 {
		t.Errorf("%d links with an expiry, %v; want issuer, intermediate and root", n, err)
	}
	if _, err := a.JoinToken("shop/payments", time.Hour); err == nil || !strings.Contains(err.Error(), "token.key") {
		t.Errorf("a token without a key: %v", err)
	}
}

// Roots are exchanged by overlap while the program runs; a folder that is wrong
// meanwhile changes nothing.
func TestRootRotation(t *testing.T) {
	dir := t.TempDir()
	oldRoot, oldKey := newCA(t, "old", nil, nil, 2*time.Hour, 1000*time.Hour)
	newRoot, newKey := newCA(t, "new", nil, nil, time.Hour, 1000*time.Hour)
	put(t, dir, oldKey, []*x509.Certificate{oldRoot}, []*x509.Certificate{oldRoot})
	a := open(t, func(o *authority.Options) { o.Store = authority.Folder(dir) })
	sign := func(issuer *x509.Certificate, roots int) *x509.Certificate {
		t.Helper()
		r, err := a.Sign(payments, csr(t, key(t), &x509.CertificateRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Chain[0].CheckSignatureFrom(issuer); err != nil || len(r.Roots) != roots || len(r.Chain) != 1 {
			t.Errorf("%v; %d roots, want %d", err, len(r.Roots), roots)
		}
		return r.Chain[0]
	}
	reload := func(want bool) {
		t.Helper()
		if changed, err := a.Reload(t.Context()); changed != want || err != nil {
			t.Errorf("changed %t, %v", changed, err)
		}
	}
	sign(oldRoot, 1)
	reload(false)
	put(t, dir, oldKey, []*x509.Certificate{oldRoot}, []*x509.Certificate{oldRoot, newRoot})
	reload(true)
	sign(oldRoot, 2)
	if err := os.WriteFile(filepath.Join(dir, "ca.key"), []byte("half written"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Reload(t.Context()); err == nil {
		t.Error("a broken key was taken")
	}
	sign(oldRoot, 2)
	put(t, dir, newKey, []*x509.Certificate{newRoot}, []*x509.Certificate{oldRoot, newRoot})
	reload(true)
	sign(newRoot, 2)
	put(t, dir, newKey, []*x509.Certificate{newRoot}, []*x509.Certificate{newRoot})
	reload(true)
	sign(newRoot, 1)
}

func TestAnExpiredIssuerSignsNothing(t *testing.T) {
	dir, c := t.TempDir(), &clock{}
	root, rootKey := newCA(t, "root", nil, nil, time.Hour, time.Hour)
	put(t, dir, rootKey, []*x509.Certificate{root}, []*x509.Certificate{root})
	a := open(t, func(o *authority.Options) { o.Store, o.Now = authority.Folder(dir), c.now })
	c.advance(2 * time.Hour)
	_, err := a.Sign(payments, csr(t, key(t), &x509.CertificateRequest{}))
	refused(t, err, authority.NotPossible, "has expired at")
	if _, err := a.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("%v", err)
	}
}

// Each way in which a join token can be wrong has a reason; none is told what
// the token was.
func TestJoinTokens(t *testing.T) {
	k, other := bytes.Repeat([]byte("k"), 32), bytes.Repeat([]byte("o"), 32)
	now := time.Unix(1_000_000, 0)
	good := authority.EncodeToken(domain, "shop", "payments", now.Unix()+60, k)
	if id, err := authority.DecodeToken(good, k, domain, now); err != nil || id != payments {
		t.Fatalf("%v, %v", id, err)
	}
	parts := strings.Split(good, ".")
	for name, f := range map[string]struct {
		token  string
		reason authority.Reason
	}{
		"empty":                     {"", authority.TokenMalformed},
		"of Kubernetes":             {"eyJhbGciOiJSUzI1NiJ9.e30.c2ln", authority.TokenMalformed},
		"without signature":         {parts[0] + "." + parts[1], authority.TokenMalformed},
		"empty signature":           {parts[0] + "." + parts[1] + ".", authority.TokenSignature},
		"a signature of zeros":      {good[:len(good)-len(parts[2])] + strings.Repeat("A", len(parts[2])), authority.TokenSignature},
		"claims exchanged":          {strings.Replace(good, parts[1], strings.Split(authority.EncodeToken(domain, "shop", "cart", now.Unix()+60, other), ".")[1], 1), authority.TokenSignature},
		"of another authority":      {authority.EncodeToken(domain, "shop", "payments", now.Unix()+60, other), authority.TokenSignature},
		"of another domain":         {authority.EncodeToken("other.example", "shop", "payments", now.Unix()+60, k), authority.TrustDomain},
		"expired now":               {authority.EncodeToken(domain, "shop", "payments", now.Unix(), k), authority.TokenExpired},
		"for no workload":           {authority.EncodeToken(domain, "shop", "a/../b", now.Unix()+60, k), authority.TokenMalformed},
		"far too long":              {good + strings.Repeat("A", 5000), authority.TokenMalformed},
		"trailing bits":             {good[:len(good)-1] + "_", authority.TokenMalformed},
		"with something at the end": {good + ".x", authority.TokenMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := authority.DecodeToken(f.token, k, domain, now)
			refused(t, err, f.reason)
			if len(f.token) > 20 && err != nil && strings.Contains(err.Error(), f.token[5:]) {
				t.Error("the error holds the token")
			}
		})
	}
	a := open(t)
	for _, f := range []struct {
		workload string
		ttl      time.Duration
		want     string
	}{
		{"payments", time.Hour, "is not <namespace>/<service account>"},
		{"shop/payments/x", time.Hour, "is not <namespace>"},
		{"shop/", time.Hour, "is not <namespace>"},
		{"shop/payments", 0, "more than 0"},
		{"shop/payments", 1000 * time.Hour, "at most 720h"},
		{"outrigger-system/control-plane", time.Hour, "control plane itself"},
	} {
		if _, err := a.JoinToken(f.workload, f.ttl); err == nil || !strings.Contains(err.Error(), f.want) {
			t.Errorf("%s for %s: %v", f.workload, f.ttl, err)
		}
	}
}

func FuzzJoinToken(f *testing.F) {
	k := bytes.Repeat([]byte("k"), 32)
	now := time.Unix(1_000_000, 0)
	f.Add(authority.EncodeToken(domain, "shop", "payments", now.Unix()+60, k))
	f.Add("ojt1..")
	f.Fuzz(func(t *testing.T, token string) {
		id, err := authority.DecodeToken(token, k, domain, now)
		if (err == nil) != (id != identity.Identity{}) {
			t.Fatalf("%v, %v", id, err)
		}
		if err == nil && !strings.HasPrefix(token, "ojt1.") {
			t.Fatal("a token of another kind was taken")
		}
	})
}

// A caller has a burst and then one a second; another is not held up by it, and
// the memory for callers is bounded.
func TestLimiter(t *testing.T) {
	var b authority.Bucket
	now := time.Unix(1_000_000, 0)
	for range authority.LimitBurst {
		if !b.Allow("a", now) {
			t.Fatal("refused within the burst")
		}
	}
	if b.Allow("a", now) || !b.Allow("b", now) || !b.Allow("a", now.Add(time.Second)) || b.Allow("a", now.Add(time.Second)) {
		t.Error("not a burst and then one a second")
	}
	for i := range 2 * authority.MaxCallers {
		b.Allow("flood "+strconv.Itoa(i), now)
	}
	if b.Allow("late", now) {
		t.Error("more callers are remembered than may be")
	}
	if !b.Allow("late", now.Add(time.Hour)) {
		t.Error("callers of an hour ago are not forgotten")
	}
}

// rig is an authority that serves.
type rig struct {
	*authority.Authority
	address string
	clock   *clock
	reg     *prometheus.Registry
	log     *lockedBuffer
}

func serve(t *testing.T, change ...func(*authority.Options)) *rig {
	t.Helper()
	r := &rig{clock: &clock{}, reg: prometheus.NewRegistry(), log: &lockedBuffer{}}
	r.Authority = open(t, append(change, func(o *authority.Options) {
		o.Now, o.Registerer, o.Log = r.clock.now, r.reg, slog.New(slog.NewTextHandler(r.log, nil))
	})...)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.Creds(r.Credentials()))
	r.Register(g)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.Serve(lis); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { g.Stop(); wg.Wait() })
	r.address = lis.Addr().String()
	return r
}

// sign calls as a workload does, with a token or a certificate or neither.
func (r *rig) sign(t *testing.T, token string, cert *tls.Certificate, k *ecdsa.PrivateKey) (signing.Response, error) {
	t.Helper()
	pool := x509.NewCertPool()
	for _, c := range r.Roots() {
		pool.AddCert(c)
	}
	conf := &tls.Config{RootCAs: pool, ServerName: "localhost", Time: r.clock.now}
	if cert != nil {
		conf.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(r.address, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, signing.Authorization, signing.Bearer(token))
	}
	var out structpb.Struct
	if err := conn.Invoke(ctx, signing.Method, signing.Request{CSR: csr(t, k, &x509.CertificateRequest{})}.Encode(), &out); err != nil {
		return signing.Response{}, err
	}
	return signing.DecodeResponse(&out)
}

func (r *rig) token(t *testing.T, workload string, ttl time.Duration) string {
	t.Helper()
	token, err := r.JoinToken(workload, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// pair is a certificate that the authority has signed with its key.
func pair(r signing.Response, k *ecdsa.PrivateKey) *tls.Certificate {
	c := &tls.Certificate{PrivateKey: k}
	for _, link := range r.Chain {
		c.Certificate = append(c.Certificate, link.Raw)
	}
	return c
}

// A token gets the first certificate, the certificate gets the next.
func TestSignOverTheNetwork(t *testing.T) {
	r := serve(t)
	k := key(t)
	first, err := r.sign(t, r.token(t, "shop/payments", time.Hour), nil, k)
	if err != nil {
		t.Fatal(err)
	}
	r.clock.advance(12 * time.Hour) // the token has expired
	k2 := key(t)
	second, err := r.sign(t, "", pair(first, k), k2)
	if err != nil {
		t.Fatal(err)
	}
	if id, err := identity.OfCertificate(second.Chain[0]); err != nil || id != payments {
		t.Errorf("%v, %v", id, err)
	}
	want := `
		# HELP outrigger_authority_issued_total Certificates signed for workloads, by what proved the workload.
		# TYPE outrigger_authority_issued_total counter
		outrigger_authority_issued_total{proof="certificate"} 1
		outrigger_authority_issued_total{proof="token"} 1
	`
	if err := testutil.GatherAndCompare(r.reg, strings.NewReader(want), "outrigger_authority_issued_total"); err != nil {
		t.Error(err)
	}
}

// Strangers get nothing, are told why, and are counted; no token is logged.
func TestStrangersAreRefused(t *testing.T) {
	r, other := serve(t), serve(t)
	foreign := serve(t, func(o *authority.Options) { o.TrustDomain = "other.example" })
	expired := r.token(t, "shop/payments", time.Minute)
	k := key(t)
	old, err := r.sign(t, r.token(t, "shop/payments", time.Hour), nil, k)
	if err != nil {
		t.Fatal(err)
	}
	otherKey := key(t)
	otherCert, err := other.sign(t, other.token(t, "shop/payments", time.Hour), nil, otherKey)
	if err != nil {
		t.Fatal(err)
	}
	foreignCert, err := foreign.sign(t, foreign.token(t, "shop/payments", time.Hour), nil, otherKey)
	if err != nil {
		t.Fatal(err)
	}
	r.clock.advance(25 * time.Hour)
	for name, f := range map[string]struct {
		token string
		cert  *tls.Certificate
		code  codes.Code
		say   string
	}{
		"a stranger":                      {"", nil, codes.Unauthenticated, "proved nothing"},
		"a foreign token":                 {other.token(t, "shop/payments", 100*time.Hour), nil, codes.Unauthenticated, "of another authority"},
		"a token of another domain":       {foreign.token(t, "shop/payments", 100*time.Hour), nil, codes.Unauthenticated, "of another authority"},
		"an expired token":                {expired, nil, codes.Unauthenticated, "has expired"},
		"nonsense":                        {"nonsense", nil, codes.Unauthenticated, "not a join token"},
		"an expired certificate":          {"", pair(old, k), codes.Unavailable, ""},
		"a certificate of another root":   {"", pair(otherCert, otherKey), codes.Unavailable, ""},
		"a certificate of another domain": {r.token(t, "shop/payments", time.Hour), pair(foreignCert, otherKey), codes.Unavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.sign(t, f.token, f.cert, key(t))
			if status.Code(err) != f.code || !strings.Contains(err.Error(), f.say) {
				t.Errorf("%v; want %s and %q", err, f.code, f.say)
			}
			if f.token != "" && strings.Contains(r.log.String(), f.token[5:]) {
				t.Error("the token is in the log")
			}
		})
	}
	if n := len(r.log.String()); n > 2000 {
		t.Errorf("strangers have made the log say %d bytes", n)
	}
	for reason, want := range map[authority.Reason]float64{authority.NoProof: 1, authority.TokenSignature: 2, authority.TokenExpired: 1, authority.TokenMalformed: 1} {
		n := 0.0
		families, err := r.reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "outrigger_authority_refused_total" && m.GetLabel()[0].GetValue() == string(reason) {
					n = m.GetCounter().GetValue()
				}
			}
		}
		if n != want {
			t.Errorf("%s: %v refusals, want %v", reason, n, want)
		}
	}
}

func TestOneCallerCannotAskForever(t *testing.T) {
	r := serve(t)
	token := r.token(t, "shop/payments", time.Hour)
	var last error
	for range authority.LimitBurst + 10 {
		if _, last = r.sign(t, token, nil, key(t)); last != nil {
			break
		}
	}
	if status.Code(last) != codes.ResourceExhausted {
		t.Errorf("%v; want it refused as too often", last)
	}
	if _, err := r.sign(t, r.token(t, "shop/cart", time.Hour), nil, key(t)); err != nil {
		t.Errorf("another caller: %v", err)
	}
}

// The control plane proves itself with names and its SPIFFE ID, renews in time,
// and follows an exchanged issuer.
func TestControlPlanesOwnCertificate(t *testing.T) {
	r := serve(t)
	look := func() *x509.Certificate {
		t.Helper()
		c, err := tls.Dial("tcp", r.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if v := c.ConnectionState().Version; v != tls.VersionTLS13 {
			t.Errorf("version %x", v)
		}
		return c.ConnectionState().PeerCertificates[0]
	}
	first := look()
	if id, err := identity.OfCertificate(first); err != nil || id != identity.ControlPlane(domain) || fmt.Sprint(first.DNSNames, first.IPAddresses) != "[localhost] [127.0.0.1]" {
		t.Errorf("%v, %v, %v, %v", id, err, first.DNSNames, first.IPAddresses)
	}
	if !look().Equal(first) {
		t.Error("each connection gets a certificate of its own")
	}
	r.clock.advance(13 * time.Hour)
	if look().Equal(first) {
		t.Error("it is not renewed at half of its life")
	}
	if _, err := tls.Dial("tcp", r.address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		t.Error("TLS 1.2 is served")
	}
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
