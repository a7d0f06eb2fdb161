// Package identity maps a workload's identity to its SPIFFE ID and back.
//
// It is a contract between whoever issues identities (the control plane) and
// whoever checks them (the sidecar). It knows names, their syntax and where a
// certificate holds them; it knows neither who may have one nor whether a
// certificate is to be trusted.
package identity

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
)

// DefaultTrustDomain is used where no other is configured.
const DefaultTrustDomain = "cluster.local"

// The workload that the control plane is: what its own certificate says, and
// what a proxy wants it to say.
const (
	SystemNamespace     = "outrigger-system"
	ControlPlaneAccount = "control-plane"
)

// ControlPlane is the identity of the control plane of a trust domain.
func ControlPlane(trustDomain string) Identity {
	return Identity{TrustDomain: trustDomain, Namespace: SystemNamespace, ServiceAccount: ControlPlaneAccount}
}

// Identity is what a workload is: a service account in a namespace of a trust
// domain. The zero value is no identity.
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// SPIFFE returns the SPIFFE ID spiffe://<trust domain>/ns/<ns>/sa/<account>
// (SPIFFE-ID section 2, with Istio's path).
func (id Identity) SPIFFE() string {
	return "spiffe://" + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.ServiceAccount
}

// String returns the SPIFFE ID.
func (id Identity) String() string { return id.SPIFFE() }

// ErrNotWorkload says that a SPIFFE ID is not one of a workload of this mesh.
var ErrNotWorkload = errors.New("not a workload identity")

// Parse reads a SPIFFE ID as SPIFFE writes it. It is strict: another scheme,
// path, query, escape or an empty part is an error that wraps ErrNotWorkload.
func Parse(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("%w: %q does not begin with spiffe://", ErrNotWorkload, s)
	}
	if len(s) > maxLength {
		return Identity{}, fmt.Errorf("%w: longer than %d bytes", ErrNotWorkload, maxLength)
	}
	parts := strings.Split(rest, "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return Identity{}, fmt.Errorf("%w: %q is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>", ErrNotWorkload, s)
	}
	id := Identity{TrustDomain: parts[0], Namespace: parts[2], ServiceAccount: parts[4]}
	for _, part := range []string{id.TrustDomain, id.Namespace, id.ServiceAccount} {
		if !validSegment(part) {
			return Identity{}, fmt.Errorf("%w: %q holds a part that is empty or not of [a-z0-9.-_]", ErrNotWorkload, s)
		}
	}
	return id, nil
}

// OfCertificate returns the identity that a certificate states, which is worth
// as much as its signature. A certificate of a workload has exactly one URI
// among its alternative names (X509-SVID section 2) and is no authority; all
// else is an error that wraps ErrNotWorkload.
func OfCertificate(c *x509.Certificate) (Identity, error) {
	switch {
	case len(c.URIs) == 0:
		return Identity{}, fmt.Errorf("%w: the certificate has no URI among its alternative names", ErrNotWorkload)
	case len(c.URIs) > 1:
		return Identity{}, fmt.Errorf("%w: the certificate has %d URIs among its alternative names, want exactly one", ErrNotWorkload, len(c.URIs))
	case c.IsCA:
		return Identity{}, fmt.Errorf("%w: %s is on the certificate of an authority", ErrNotWorkload, c.URIs[0])
	}
	return Parse(c.URIs[0].String())
}

// maxLength is the limit that SPIFFE-ID section 2.3 sets.
const maxLength = 2048

func validSegment(s string) bool {
	if s == "" || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}
