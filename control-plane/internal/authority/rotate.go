package authority

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

// Step is one of the three in which a root is exchanged by overlap, so that at no
// time two workloads cannot verify each other.
type Step string

// The steps, in order. Between two of them every workload must have renewed its
// certificate, because that is when it learns of the roots.
const (
	// StepAdd makes a new root, which is trusted from then on and signs nothing.
	StepAdd Step = "add"
	// StepSign lets the new root sign; the old one is still trusted.
	StepSign Step = "sign"
	// StepRemove takes the old root out of the bundle.
	StepRemove Step = "remove"
)

// ErrTooEarly says that some workloads may not know of the step before yet.
var ErrTooEarly = errors.New("the step before is too young")

// Rotate makes the next step of the exchange of a root: it returns the files as
// they are after it, and which step it was. After StepRemove the next is StepAdd
// again, of another exchange. ttl is how long the workloads' certificates last;
// it must have passed since the step before, else the error wraps ErrTooEarly
// and says when.
//
// It is for roots that were made here. Where ca.crt is an intermediate, whoever
// made it exchanges it by writing the files.
func Rotate(files Files, trustDomain string, ttl time.Duration, now time.Time) (Files, Step, error) {
	k, err := decode(files, now)
	if err != nil {
		return nil, "", err
	}
	if !bytes.Equal(k.issuer.RawIssuer, k.issuer.RawSubject) {
		return nil, "", fmt.Errorf("ca.crt is an intermediate, signed by %q: have its issuer sign another, and add roots to root.crt before they are used", k.issuer.Issuer)
	}
	if text, ok := files[fileRotated]; ok {
		last, err := time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
		if err != nil {
			return nil, "", fmt.Errorf("%s: %w; write the time of the last step, as in RFC 3339", fileRotated, err)
		}
		if due := last.Add(ttl + skew); now.Before(due) {
			return nil, "", fmt.Errorf("%w: certificates last %s, so the next step is possible from %s on", ErrTooEarly, ttl, due.UTC().Format(time.RFC3339))
		}
	}
	next := maps.Clone(files)
	next[fileRotated] = []byte(now.UTC().Format(time.RFC3339) + "\n")
	switch {
	case files[fileNextKey] != nil:
		return next, StepSign, next.sign(k)
	case files[fileOldCert] != nil:
		return next, StepRemove, next.remove(k)
	default:
		return next, StepAdd, next.add(k, trustDomain, now)
	}
}

func (f Files) add(k *keys, trustDomain string, now time.Time) error {
	made, err := newRoot(trustDomain, now)
	if err != nil {
		return err
	}
	certs, err := signing.DecodeCertificates(made[fileCert])
	if err != nil {
		return err
	}
	f[fileNextKey], f[fileNextCert] = made[fileKey], made[fileCert]
	f[fileRoots] = signing.EncodeCertificates(append(slices.Clip(k.roots), certs...))
	return nil
}

func (f Files) sign(k *keys) error {
	certs, err := signing.DecodeCertificates(f[fileNextCert])
	if err != nil {
		return fmt.Errorf("%s: %w", fileNextCert, err)
	}
	if !slices.ContainsFunc(k.roots, certs[0].Equal) {
		return fmt.Errorf("%s is not in %s, so that nobody would trust it: take %s and %s away and begin again", fileNextCert, fileRoots, fileNextCert, fileNextKey)
	}
	f[fileOldCert] = signing.EncodeCertificates([]*x509.Certificate{k.issuer})
	f[fileKey] = f[fileNextKey]
	// With the old one: a folder is not replaced at once, and each key must find its
	// certificate at any time.
	f[fileCert] = signing.EncodeCertificates([]*x509.Certificate{certs[0], k.issuer})
	delete(f, fileNextKey)
	delete(f, fileNextCert)
	return nil
}

func (f Files) remove(k *keys) error {
	old, err := signing.DecodeCertificates(f[fileOldCert])
	if err != nil {
		return fmt.Errorf("%s: %w", fileOldCert, err)
	}
	if k.issuer.Equal(old[0]) {
		return fmt.Errorf("%s is what signs now: take it away, or give ca.key and ca.crt another key", fileOldCert)
	}
	left := slices.DeleteFunc(slices.Clone(k.roots), old[0].Equal)
	f[fileRoots] = signing.EncodeCertificates(left)
	f[fileCert] = signing.EncodeCertificates([]*x509.Certificate{k.issuer})
	delete(f, fileOldCert)
	delete(f, fileRotated) // another exchange may begin at once
	return nil
}
