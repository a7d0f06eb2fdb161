// Package certificate decides about the webhook's own little authority: whose
// roots the API server is to trust, which certificate is served, and when either
// is replaced so that no call ever fails for it.
//
// It is pure: time is an argument, and where a State is kept and how it is
// published is package webhook's business. Any number of replicas may decide over
// the same State; whoever stores first wins.
//
// An authority lives four times as long as the certificates that it issues, and
// is followed by another at half of its life. The order is what matters: the new
// root is published first, beside the old one; the certificate in use changes to
// the new authority when the API servers have had time to take the root over; the
// old root goes when it expires.
package certificate

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"
)

// Keys of the Secret that holds a State.
const (
	keyRoots, keyRootKey = "ca.crt", "ca.key"
	keyCert, keyCertKey  = "tls.crt", "tls.key"
)

const (
	// generations is how many lives of a certificate an authority lives.
	generations = 4
	// maxBackdate covers a clock of an API server that is behind.
	maxBackdate = 5 * time.Minute
	// maxSettle is how long a new root is published before anything depends on it.
	maxSettle = time.Minute
	// maxRoots of a bundle that is read.
	maxRoots = 16
)

// MinLife of a certificate; below it backdating and settling lose their meaning.
const MinLife = 3 * time.Second

// State is an authority and the certificate that it has issued. It is immutable.
type State struct {
	roots   []*x509.Certificate // newest first; the key is of the first
	rootKey crypto.Signer
	leaf    tls.Certificate
}

// Serving is the certificate to serve.
func (s *State) Serving() *tls.Certificate { return &s.leaf }

// Bundle is what callers are to trust, in PEM.
func (s *State) Bundle() []byte {
	var b bytes.Buffer
	for _, root := range s.roots {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}) // a Buffer does not fail
	}
	return b.Bytes()
}

// Newest is the root of the newest authority, in PEM.
func (s *State) Newest() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.roots[0].Raw})
}

// Data is the State as a Secret holds it.
func (s *State) Data() (map[string][]byte, error) {
	data := map[string][]byte{keyRoots: s.Bundle(), keyCert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.leaf.Leaf.Raw})}
	for name, key := range map[string]crypto.PrivateKey{keyRootKey: s.rootKey, keyCertKey: s.leaf.PrivateKey} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		data[name] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	return data, nil
}

// Parse reads what Data wrote, and refuses what does not belong together.
func Parse(data map[string][]byte) (*State, error) {
	s := &State{}
	for rest := data[keyRoots]; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", keyRoots, err)
		}
		s.roots = append(s.roots, root)
	}
	if n := len(s.roots); n == 0 || n > maxRoots {
		return nil, fmt.Errorf("%s holds %d certificates: expected 1 to %d", keyRoots, n, maxRoots)
	}
	block, _ := pem.Decode(data[keyRootKey])
	if block == nil {
		return nil, fmt.Errorf("%s holds no key", keyRootKey)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyRootKey, err)
	}
	own, ok := key.(*ecdsa.PrivateKey)
	if !ok || !own.PublicKey.Equal(s.roots[0].PublicKey) {
		return nil, fmt.Errorf("%s is not the key of the first certificate of %s", keyRootKey, keyRoots)
	}
	s.rootKey = own
	if s.leaf, err = tls.X509KeyPair(data[keyCert], data[keyCertKey]); err != nil {
		return nil, fmt.Errorf("%s and %s: %w", keyCert, keyCertKey, err)
	}
	if s.issuer() < 0 {
		return nil, fmt.Errorf("%s was issued by none of %s", keyCert, keyRoots)
	}
	return s, nil
}

// issuer is the index of the root that issued the certificate, -1 where none has.
func (s *State) issuer() int {
	return slices.IndexFunc(s.roots, func(root *x509.Certificate) bool { return s.leaf.Leaf.CheckSignatureFrom(root) == nil })
}

// Plan is what a State is held against.
type Plan struct {
	// Names (DNS) and addresses that the webhook is called by.
	Names []string
	// Life of a certificate, at least MinLife.
	Life time.Duration
}

// Validate says what is wrong with a Plan, by the flags of the injector.
func (p Plan) Validate() error {
	if len(p.Names) == 0 {
		return errors.New("the certificate has no name: name the Service of the webhook")
	}
	if p.Life < MinLife {
		return fmt.Errorf("--certificate-lifetime %s is too short: at least %s", p.Life, MinLife)
	}
	return nil
}

// backdate and settle are shares of a life, where that is short.
func (p Plan) backdate() time.Duration { return min(p.Life/10, maxBackdate) }
func (p Plan) settle() time.Duration   { return min(p.Life/3, maxSettle) }

// Look is how often the State should be held against the Plan.
func (p Plan) Look() time.Duration { return min(p.Life/30, time.Minute) }

// Next is the State that should follow, and why; s itself and "" where it is
// good. s is nil at the beginning. published says whether all that would trust
// the newest root have been given it.
func Next(s *State, p Plan, published bool, now time.Time) (*State, string, error) {
	now = now.UTC()
	if s == nil || !now.Before(s.roots[0].NotAfter) {
		next := &State{}
		if err := next.found(p, now); err != nil {
			return nil, "", err
		}
		return next, "an authority was founded", next.issue(p, now)
	}
	next := *s
	why := ""
	if root := s.roots[0]; now.After(half(root)) {
		if err := next.found(p, now); err != nil {
			return nil, "", err
		}
		return &next, "an authority was founded to follow another", nil
	}
	issuer := s.issuer()
	settled := published && now.Sub(s.roots[0].NotBefore) >= p.backdate()+p.settle()
	switch {
	case now.After(s.leaf.Leaf.NotAfter.Add(-life(s.leaf.Leaf) / 10)):
		why = "the certificate is about to expire" // and there is no time to wait for anybody
	case issuer != 0 && settled:
		why = "the certificate changes to the new authority"
	case issuer == 0 && now.After(half(s.leaf.Leaf)):
		why = "the certificate is at half of its life"
	case !slices.Equal(names(s.leaf.Leaf), sorted(p.Names)):
		why = "the certificate has other names"
	}
	if why != "" {
		if err := next.issue(p, now); err != nil {
			return nil, "", err
		}
	}
	used := next.issuer()
	next.roots = nil
	for i, root := range s.roots {
		if i == 0 || i == used || now.Before(root.NotAfter) {
			next.roots = append(next.roots, root)
		}
	}
	if why == "" && len(next.roots) != len(s.roots) {
		why = "a root has expired"
	}
	if why == "" {
		return s, "", nil
	}
	return &next, why, nil
}

func life(c *x509.Certificate) time.Duration { return c.NotAfter.Sub(c.NotBefore) }

func half(c *x509.Certificate) time.Time { return c.NotBefore.Add(life(c) / 2) }

func names(c *x509.Certificate) []string {
	all := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	return sorted(all)
}

func sorted(list []string) []string {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

// found puts a new authority before the others.
func (s *State) found(p Plan, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("key of the authority: %w", err)
	}
	serial, err := serial()
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"Outrigger"}, CommonName: fmt.Sprintf("injector webhook authority %x", serial.Bytes()[:4])},
		NotBefore:    now.Add(-p.backdate()), NotAfter: now.Add(generations * p.Life),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return fmt.Errorf("certificate of the authority: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("certificate of the authority: %w", err)
	}
	s.roots, s.rootKey = append([]*x509.Certificate{root}, s.roots...), key
	return nil
}

// issue replaces the certificate by one of the newest authority.
func (s *State) issue(p Plan, now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("key of the certificate: %w", err)
	}
	serial, err := serial()
	if err != nil {
		return err
	}
	root := s.roots[0]
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"Outrigger"}, CommonName: "injector webhook"},
		NotBefore:    now.Add(-p.backdate()), NotAfter: now.Add(p.Life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}
	if tmpl.NotAfter.After(root.NotAfter) {
		tmpl.NotAfter = root.NotAfter
	}
	for _, name := range sorted(p.Names) {
		if ip := net.ParseIP(name); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root, key.Public(), s.rootKey)
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("certificate: %w", err)
	}
	s.leaf = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return nil
}

func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	return n.SetBit(n, 126, 1), nil // never short
}
