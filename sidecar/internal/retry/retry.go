// Package retry decides whether a failed attempt is made again, when, and
// whether the budget allows it.
//
// It is pure: outcomes, numbers in flight and randomness are arguments. The
// words are Envoy's retry_on.
package retry

import "time"

// Policy says which attempts are made again. The zero value retries nothing.
type Policy struct {
	// Name of the policy, for logs: <namespace>/<name> or "default".
	Name string
	// On applies to every request, IdempotentOn to idempotent methods only
	// (RFC 9110, 9.2.2).
	On           Conditions
	IdempotentOn Conditions
	// Status codes that are retried, sorted.
	Status []int
	// Attempts after the first; 0 switches retries off.
	Attempts      int
	PerTryTimeout time.Duration
	BackoffBase   time.Duration
	BackoffMax    time.Duration
}

// Budget bounds the retries in flight to the larger of Percent of the requests
// in flight and MinConcurrency.
type Budget struct {
	Percent        uint32
	MinConcurrency uint32
}

// Conditions is a set of retry_on words.
type Conditions uint32

// The conditions. A word may imply others: 5xx covers connect-failure, reset
// and timeouts, as Envoy's does.
const (
	On5xx Conditions = 1 << iota
	OnGatewayError
	OnConnectFailure
	OnRefusedStream
	OnReset
	OnResetBeforeRequest
	OnRetriable4xx
	OnTimeout // a per-try timeout
	OnCancelled
	OnDeadlineExceeded
	OnInternal
	OnResourceExhausted
	OnUnavailable
)
