package authority

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
)

// Join tokens prove a workload where no Kubernetes does: on a laptop or a
// virtual machine. A token is
//
//	ojt1.<claims>.<HMAC-SHA256 of all before the second point>
//
// in base64url without padding, the claims being JSON. Whoever holds one is the
// workload until it expires; it may be used any number of times.
const tokenPrefix = "ojt1."

// Limits of join tokens.
const (
	DefaultTokenTTL = 24 * time.Hour
	MaxTokenTTL     = 30 * 24 * time.Hour
	maxToken        = 4096 // bytes
)

type claims struct {
	TrustDomain    string `json:"td"`
	Namespace      string `json:"ns"`
	ServiceAccount string `json:"sa"`
	Expires        int64  `json:"exp"` // Unix time
}

// JoinToken makes a join token for <namespace>/<service account>.
func (a *Authority) JoinToken(workload string, ttl time.Duration) (string, error) {
	ns, sa, ok := strings.Cut(workload, "/")
	id, err := identity.Parse(identity.Identity{TrustDomain: a.o.TrustDomain, Namespace: ns, ServiceAccount: sa}.SPIFFE())
	if !ok || err != nil {
		return "", fmt.Errorf("%q is not <namespace>/<service account>, for example shop/payments", workload)
	}
	if id == identity.ControlPlane(a.o.TrustDomain) {
		return "", fmt.Errorf("%s is the control plane itself; no workload may be it", workload)
	}
	if ttl <= 0 || ttl > MaxTokenTTL {
		return "", fmt.Errorf("a join token that lasts %s: write more than 0 and at most %s", ttl, MaxTokenTTL)
	}
	key := a.current.Load().tokenKey
	if key == nil {
		return "", fmt.Errorf("%s has no %s: write what openssl rand -base64 32 prints into it, with mode 600", a.o.Store, fileToken)
	}
	return encodeToken(claims{id.TrustDomain, id.Namespace, id.ServiceAccount, a.now().Add(ttl).Unix()}, key)
}

func encodeToken(c claims, key []byte) (string, error) {
	body, err := json.Marshal(c)
	if err != nil {
		return "", fmt.Errorf("encode a join token: %w", err)
	}
	signed := tokenPrefix + base64.RawURLEncoding.EncodeToString(body)
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac(signed, key)), nil
}

func mac(signed string, key []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(signed))
	return h.Sum(nil)
}

// joinTokens verifies those of the folder.
type joinTokens struct{ a *Authority }

// Verify implements Verifier.
func (v joinTokens) Verify(_ context.Context, token string) (identity.Identity, error) {
	key := v.a.current.Load().tokenKey
	if key == nil {
		return identity.Identity{}, refuse(TokenMalformed, "join tokens are not taken here: the authority has no %s", fileToken)
	}
	return decodeToken(token, key, v.a.o.TrustDomain, v.a.now())
}

// decodeToken believes nothing of a token before its signature has been
// compared.
func decodeToken(token string, key []byte, trustDomain string, now time.Time) (identity.Identity, error) {
	none := identity.Identity{}
	rest, ok := strings.CutPrefix(token, tokenPrefix)
	body, sum, ok2 := strings.Cut(rest, ".")
	if !ok || !ok2 || len(token) > maxToken {
		return none, refuse(TokenMalformed, "it is not a join token: give what control-plane --join-token prints")
	}
	got, err := base64.RawURLEncoding.Strict().DecodeString(sum)
	if err != nil {
		return none, refuse(TokenMalformed, "the join token is damaged")
	}
	if !hmac.Equal(got, mac(tokenPrefix+body, key)) {
		return none, refuse(TokenSignature, "the join token is of another authority, or damaged: get one from this control plane with --join-token")
	}
	// What follows can be wrong only in a token of ours.
	text, err := base64.RawURLEncoding.Strict().DecodeString(body)
	if err != nil {
		return none, refuse(TokenMalformed, "the join token is damaged")
	}
	var c claims
	if err := json.Unmarshal(text, &c); err != nil {
		return none, refuse(TokenMalformed, "the join token is of another version")
	}
	if c.TrustDomain != trustDomain {
		return none, refuse(TrustDomain, "the join token is for trust domain %q; this authority is of %q", c.TrustDomain, trustDomain)
	}
	if exp := time.Unix(c.Expires, 0); !now.Before(exp) {
		return none, refuse(TokenExpired, "the join token has expired at %s: get another with --join-token", exp.UTC().Format(time.RFC3339))
	}
	id, err := identity.Parse(identity.Identity{TrustDomain: c.TrustDomain, Namespace: c.Namespace, ServiceAccount: c.ServiceAccount}.SPIFFE())
	if err != nil {
		return none, refuse(TokenMalformed, "the join token: %w", err)
	}
	return id, nil
}
