package authority

import (
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
)

// OpenAnyTTL is Open for certificates that last seconds.
var OpenAnyTTL = open

// Bucket is a limiter.
type Bucket struct{ l limiter }

// Allow asks it.
func (b *Bucket) Allow(caller string, now time.Time) bool { return b.l.allow(caller, now) }

// LimitBurst and MaxCallers are its limits.
const (
	LimitBurst = limitBurst
	MaxCallers = maxCallers
)

// DecodeToken reads a join token.
func DecodeToken(token string, key []byte, trustDomain string, now time.Time) (identity.Identity, error) {
	return decodeToken(token, key, trustDomain, now)
}

// EncodeToken writes one, also one that JoinToken would not.
func EncodeToken(td, ns, sa string, expires int64, key []byte) string {
	s, err := encodeToken(claims{td, ns, sa, expires}, key)
	if err != nil {
		panic(err)
	}
	return s
}
