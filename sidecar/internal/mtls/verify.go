package mtls

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
)

// ErrPeer is wrapped by every refusal of a peer.
var ErrPeer = errors.New("peer refused")

// maxVerified bounds the certificates of peers that are remembered as verified.
const maxVerified = 1024

// window is when a chain that was verified is valid.
type window struct{ from, until time.Time }

// PeerID returns the SPIFFE ID in the certificate that the peer of a connection
// has proved itself with. The connection must have been made by a configuration
// of this package, which has verified it.
func PeerID(cs *tls.ConnectionState) (string, error) {
	id, err := peer(cs)
	if err != nil {
		return "", err
	}
	return id.SPIFFE(), nil
}

func peer(cs *tls.ConnectionState) (identity.Identity, error) {
	if len(cs.PeerCertificates) == 0 {
		return identity.Identity{}, fmt.Errorf("%w: it has presented no certificate", ErrPeer)
	}
	id, err := identity.OfCertificate(cs.PeerCertificates[0])
	if err != nil {
		return identity.Identity{}, fmt.Errorf("%w: %w", ErrPeer, err)
	}
	return id, nil
}

// check verifies the peer of a connection, whether the session is new or
// resumed: that it has a certificate of one workload of our trust domain, that
// it leads to a root now, and that accept says yes.
func (i *Identity) check(cs *tls.ConnectionState, usage x509.ExtKeyUsage, accept func(id identity.Identity) error) error {
	return i.checkWith(i.current.Load(), cs, usage, accept)
}

func (i *Identity) checkWith(m *material, cs *tls.ConnectionState, usage x509.ExtKeyUsage, accept func(id identity.Identity) error) error {
	id, err := peer(cs)
	if err != nil {
		return fmt.Errorf("%s: %w", i.self, err)
	}
	if id.TrustDomain != i.self.TrustDomain {
		return fmt.Errorf("%s: %w: %s is of trust domain %s, not %s", i.self, ErrPeer, id, id.TrustDomain, i.self.TrustDomain)
	}
	if err := m.verify(cs.PeerCertificates, usage, i.now()); err != nil {
		return fmt.Errorf("%s: %w: %s: %w", i.self, ErrPeer, id, err)
	}
	if err := accept(id); err != nil {
		return fmt.Errorf("%s: %w: %s: %w", i.self, ErrPeer, id, err)
	}
	return nil
}

// anyone of the trust domain is accepted.
func anyone(identity.Identity) error { return nil }

// oneOf accepts the identities in want, which is sorted; none is nobody.
func oneOf(want []string) func(identity.Identity) error {
	return func(id identity.Identity) error {
		if _, ok := slices.BinarySearch(want, id.SPIFFE()); ok {
			return nil
		}
		if len(want) == 0 {
			return errors.New("no identity is expected here, so nobody is accepted")
		}
		return fmt.Errorf("want %s", strings.Join(want, " or "))
	}
}

// verify says whether a chain leads to one of the roots now. A certificate that
// did once is not computed again until the first of its chain expires.
func (m *material) verify(chain []*x509.Certificate, usage x509.ExtKeyUsage, now time.Time) error {
	leaf := chain[0]
	key := sha256.Sum256(append(bytes.Clone(leaf.Raw), byte(usage)))
	m.mu.Lock()
	w, known := m.verified[key]
	m.mu.Unlock()
	if known && !now.Before(w.from) && !now.After(w.until) {
		return nil
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{Roots: m.roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	if err != nil {
		return err
	}
	w = window{from: leaf.NotBefore, until: leaf.NotAfter}
	for _, c := range chains[0] {
		if c.NotBefore.After(w.from) {
			w.from = c.NotBefore
		}
		if c.NotAfter.Before(w.until) {
			w.until = c.NotAfter
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.verified) >= maxVerified {
		clear(m.verified)
	}
	if m.verified != nil {
		m.verified[key] = w
	}
	return nil
}
