package breaker

import "time"

// Policy says when the breaker of a destination opens and how it closes. A
// condition that is zero is not used.
type Policy struct {
	// Name of the CircuitBreaker object, <namespace>/<name>.
	Name string
	// Observe evaluates and explains, and rejects nothing.
	Observe bool

	ConsecutiveFailures uint32
	FailureRatio        float64
	SlowCallThreshold   time.Duration
	SlowCallRatio       float64
	MinimumRequests     uint32
	Window              time.Duration
	OpenFor             time.Duration
	HalfOpenRequests    uint32
	FailureOn           Failures
}

// Failures is the set of outcomes that count against a destination.
type Failures uint32

// What may count as a failure; the words of failureOn.
const (
	Fail5xx Failures = 1 << iota
	FailGatewayError
	FailConnectFailure
	FailReset
	FailTimeout
	failGRPC // of code 1; those of the others follow
)

// FailDefault is what counts unless the policy says otherwise.
const FailDefault = Fail5xx | FailConnectFailure | FailReset | FailTimeout
