package proxy

import (
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// xfcc is the header that tells an application who its caller is (Envoy's
// x-forwarded-client-cert).
const xfcc = "x-forwarded-client-cert"

// prove makes sure that only mutual TLS says who the caller is: what a request
// claims of it is left out, and what the handshake has proved is put in. What
// Envoys say among themselves is believed of proved callers alone.
// X-Forwarded-For and its kin pass through: nothing here, nor in the mesh, reads
// them as an identity.
func (x *exchange) prove() bool {
	if x.identity == "" {
		x.req.Strip(claimsOfStranger)
		return true
	}
	x.req.Strip(claimsIdentity)
	n := len(x.edit.Set)
	x.pairs[n] = http1.Pair{Name: xfcc, Value: x.proof}
	x.edit.Set = x.pairs[:n+1]
	return true
}

func claimsIdentity(name []byte) bool { return spells(name, xfcc) }

func claimsOfStranger(name []byte) bool {
	const envoys, ours = "x-envoy-", "x-outrigger-"
	switch {
	case claimsIdentity(name):
		return true
	case len(name) > len(envoys) && spells(name[:len(envoys)], envoys):
		return true
	case len(name) > len(ours) && spells(name[:len(ours)], ours):
		// The attempt is a count for logs; a caller without TLS may tell it.
		return !http1.EqualFold(name, "x-outrigger-attempt")
	}
	return false
}

// spells reports whether a program may take name for s, which is in lower case:
// CGI and what came after it (RFC 3875, 4.1.18) know no difference between '_'
// and '-'. Other names with underscores pass as they are.
func spells(name []byte, s string) bool {
	if len(name) != len(s) {
		return false
	}
	for i, c := range name {
		switch {
		case c == '_':
			c = '-'
		case 'A' <= c && c <= 'Z':
			c |= 0x20
		}
		if c != s[i] {
			return false
		}
	}
	return true
}
