package retry

import (
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"time"
)

// conditionWords are the words of Envoy's retry_on (HTTP and gRPC) that a
// Conditions can hold, and "timeout", which is ours.
var conditionWords = [...]struct {
	word string
	bit  Conditions
}{
	{"5xx", On5xx},
	{"gateway-error", OnGatewayError},
	{"connect-failure", OnConnectFailure},
	{"refused-stream", OnRefusedStream},
	{"reset", OnReset},
	{"reset-before-request", OnResetBeforeRequest},
	{"retriable-4xx", OnRetriable4xx},
	{"timeout", OnTimeout},
	{"cancelled", OnCancelled},
	{"deadline-exceeded", OnDeadlineExceeded},
	{"internal", OnInternal},
	{"resource-exhausted", OnResourceExhausted},
	{"unavailable", OnUnavailable},
}

// ParseConditions reads retry_on words, one per element. An unknown word is an
// error that lists the known ones. "retriable-status-codes" is not a condition
// here: Policy.Status alone says which codes are retried.
func ParseConditions(words []string) (Conditions, error) {
	var c Conditions
next:
	for _, w := range words {
		for _, k := range conditionWords {
			if k.word == w {
				c |= k.bit
				continue next
			}
		}
		known := make([]string, 0, len(conditionWords))
		for _, k := range conditionWords {
			known = append(known, k.word)
		}
		return 0, fmt.Errorf("retry condition %q is unknown; use one of %s", w, strings.Join(known, ", "))
	}
	return c, nil
}

// String lists the words of c, separated by commas.
func (c Conditions) String() string {
	var words []string
	for _, k := range conditionWords {
		if c&k.bit != 0 {
			words = append(words, k.word)
		}
	}
	return strings.Join(words, ",")
}

// Idempotent reports whether several identical requests with the method have
// the effect of one (RFC 9110, 9.2.2). Methods are case-sensitive; unknown ones
// are not idempotent.
func Idempotent[M string | []byte](method M) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE":
		return true
	}
	return false
}

// Failure is how an attempt ended that brought no response.
type Failure uint8

// The failures. All but the first end an attempt without response headers.
const (
	// None: there is a response.
	None Failure = iota
	// ConnectFailure: no connection could be made; nothing was sent.
	ConnectFailure
	// RefusedStream: the upstream said that it did not process the request
	// (RFC 9113, 8.7).
	RefusedStream
	// ResetBeforeRequest: the connection was lost before any byte of the
	// request was sent on it.
	ResetBeforeRequest
	// Reset: the connection or stream was lost after part of the request was
	// sent; the upstream may have processed it.
	Reset
	// PerTryTimeout: no response headers within Policy.PerTryTimeout.
	PerTryTimeout
)

// NoGRPC is Outcome.GRPCStatus of a response that carries no grpc-status.
const NoGRPC = -1

// Outcome is how an attempt ended.
type Outcome struct {
	// Status is the response code; 0 where Failure is not None.
	Status int
	// GRPCStatus is grpc-status of a response, as far as it is known when the
	// headers have arrived; NoGRPC without one.
	GRPCStatus int
	Failure    Failure
}

// Retriable reports whether the policy makes the attempt again. How many were
// made, and whether the budget allows another, the caller knows.
//
// The words mean what Envoy does: 5xx and gateway-error cover every way to get
// no response at all (a reset is a 503, a per-try timeout a 504), reset does
// too, and reset-before-request covers those where nothing was sent, which
// includes connect failures.
func (p *Policy) Retriable(method []byte, o Outcome) bool {
	if p.Attempts <= 0 {
		return false
	}
	on := p.On
	if p.IdempotentOn != 0 && Idempotent(method) {
		on |= p.IdempotentOn
	}
	if on&coveredBy(o) != 0 {
		return true
	}
	if o.Failure != None {
		return false
	}
	_, found := slices.BinarySearch(p.Status, o.Status)
	return found
}

// coveredBy is the set of conditions of which any one makes o retriable.
func coveredBy(o Outcome) Conditions {
	const noResponse = On5xx | OnGatewayError | OnReset
	switch o.Failure {
	case None:
	case ConnectFailure:
		return noResponse | OnConnectFailure | OnResetBeforeRequest
	case RefusedStream:
		return noResponse | OnRefusedStream
	case ResetBeforeRequest:
		return noResponse | OnResetBeforeRequest
	case Reset:
		return noResponse
	case PerTryTimeout:
		return noResponse | OnTimeout
	}
	var c Conditions
	switch {
	case o.Status >= 502 && o.Status <= 504:
		c = On5xx | OnGatewayError
	case o.Status >= 500 && o.Status <= 599:
		c = On5xx
	case o.Status == 409:
		c = OnRetriable4xx
	}
	switch o.GRPCStatus { // codes of the gRPC protocol
	case 1:
		c |= OnCancelled
	case 4:
		c |= OnDeadlineExceeded
	case 8:
		c |= OnResourceExhausted
	case 13:
		c |= OnInternal
	case 14:
		c |= OnUnavailable
	}
	return c
}

// Envoy's defaults, used where a Policy leaves them zero.
const (
	defaultBackoffBase = 25 * time.Millisecond
	backoffMaxFactor   = 10
)

// Backoff is the wait before retry number attempt (1 is the first), with full
// jitter: rnd, in [0, 1), of min(base*(2^attempt - 1), max). A zero
// BackoffBase is 25 ms, a zero BackoffMax ten times the base.
func (p *Policy) Backoff(attempt int, rnd float64) time.Duration {
	base := p.BackoffBase
	if base <= 0 {
		base = defaultBackoffBase
	}
	limit := p.BackoffMax
	if limit <= 0 {
		limit = saturatingMul(base, backoffMaxFactor)
	}
	if attempt < 1 {
		return 0
	}
	wait := limit
	if attempt < 63 {
		wait = min(limit, saturatingMul(base, 1<<attempt-1))
	}
	return time.Duration(rnd * float64(wait))
}

func saturatingMul(d time.Duration, n uint64) time.Duration {
	const most = 1<<63 - 1
	hi, lo := bits.Mul64(uint64(d), n)
	if hi != 0 || lo > most {
		return most
	}
	return time.Duration(lo)
}

// Allows reports whether one more retry may start while active requests,
// retries among them, and retries retries are in flight. The zero Budget allows
// none.
func (b Budget) Allows(active, retries int) bool {
	return int64(retries) < b.Limit(active)
}

// Limit is how many retries may be in flight beside active requests.
func (b Budget) Limit(active int) int64 {
	return max(int64(max(active, 0))*int64(b.Percent)/100, int64(b.MinConcurrency))
}
