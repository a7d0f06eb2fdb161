package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Mode says whether a policy acts or only reports what it would have done.
type Mode string

const (
	// ModeObserve evaluates the policy on live traffic, counts and explains
	// what it would have rejected, and rejects nothing.
	ModeObserve Mode = "Observe"
	// ModeEnforce acts. It is the default.
	ModeEnforce Mode = "Enforce"
)

// CircuitBreaker protects a Service, or one port of it, from calls that are
// likely to fail, and its callers from waiting for them.
type CircuitBreaker struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   CircuitBreakerSpec     `json:"spec"`
	Status gatewayv1.PolicyStatus `json:"status,omitzero"`
}

// CircuitBreakerSpec is what the user asks for. At least one of Trip, Limits
// and Ejection must be set.
type CircuitBreakerSpec struct {
	// TargetRefs name Services of the same namespace; sectionName is a port
	// name. 1 to 16 entries.
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// Mode is Enforce unless set.
	Mode Mode `json:"mode,omitempty"`
	// Trip is the service-level breaker that each calling workload keeps.
	Trip *Trip `json:"trip,omitempty"`
	// Limits bound what one caller may have in flight (Envoy's thresholds).
	Limits *Limits `json:"limits,omitempty"`
	// Ejection takes single endpoints out of load balancing for a while
	// (Envoy's outlier detection).
	Ejection *Ejection `json:"ejection,omitempty"`
}

// Trip says when the breaker opens and how it closes again. Any of
// ConsecutiveFailures, FailureRatio and SlowCall opens it; at least one must
// be set.
type Trip struct {
	// ConsecutiveFailures opens the breaker after this many failures in a
	// row. 0 means this condition is not used.
	ConsecutiveFailures uint32 `json:"consecutiveFailures,omitempty"`
	// FailureRatio, in (0, 1], as a string so that YAML tools keep it exact.
	FailureRatio string `json:"failureRatio,omitempty"`
	// SlowCall counts calls that succeed too late.
	SlowCall *SlowCall `json:"slowCall,omitempty"`
	// MinimumRequests in the window before a ratio means anything. Default 20.
	MinimumRequests *uint32 `json:"minimumRequests,omitempty"`
	// Window over which ratios are taken, rolling. Default 10s; 1s to 10m.
	Window *metav1.Duration `json:"window,omitempty"`
	// OpenFor is how long the breaker rejects before it probes. Default 15s.
	OpenFor *metav1.Duration `json:"openFor,omitempty"`
	// HalfOpenRequests is how many probes must succeed to close it. Default 3.
	HalfOpenRequests *uint32 `json:"halfOpenRequests,omitempty"`
	// FailureOn lists what counts as a failure, in Envoy's retry_on words
	// (5xx, gateway-error, connect-failure, reset, timeout) or gRPC status
	// names. Default: 5xx, connect-failure, reset, timeout.
	FailureOn []string `json:"failureOn,omitempty"`
}

// SlowCall opens the breaker when too large a share of calls takes too long.
type SlowCall struct {
	// LongerThan is the duration from which a call is slow. Required.
	LongerThan metav1.Duration `json:"longerThan"`
	// Ratio of slow calls in the window that opens the breaker, in (0, 1].
	Ratio string `json:"ratio"`
}

// Limits bound one caller's use of the target. Nil means no limit: there are
// no hidden defaults.
type Limits struct {
	Connections     *uint32 `json:"connections,omitempty"`
	PendingRequests *uint32 `json:"pendingRequests,omitempty"`
	Requests        *uint32 `json:"requests,omitempty"`
	Retries         *uint32 `json:"retries,omitempty"`
}

// Ejection is outlier detection of single endpoints.
type Ejection struct {
	// Consecutive5xx ejects after this many 5xx in a row from one endpoint.
	Consecutive5xx *uint32 `json:"consecutive5xx,omitempty"`
	// ConsecutiveGatewayErrors counts 502, 503, 504 and connection failures.
	ConsecutiveGatewayErrors *uint32 `json:"consecutiveGatewayErrors,omitempty"`
	// Interval between sweeps that return ejected endpoints. Default 10s.
	Interval *metav1.Duration `json:"interval,omitempty"`
	// BaseEjectionTime is multiplied by the number of ejections. Default 30s.
	BaseEjectionTime *metav1.Duration `json:"baseEjectionTime,omitempty"`
	// MaxEjectionPercent of the endpoints, 1 to 100. Default 50.
	MaxEjectionPercent *uint32 `json:"maxEjectionPercent,omitempty"`
	// FailurePercentage ejects endpoints that fail too large a share.
	FailurePercentage *FailurePercentage `json:"failurePercentage,omitempty"`
}

// FailurePercentage is Envoy's failure-percentage ejection.
type FailurePercentage struct {
	// Threshold in percent, 1 to 100. Default 85.
	Threshold *uint32 `json:"threshold,omitempty"`
	// MinimumHosts with enough requests before it acts. Default 5.
	MinimumHosts *uint32 `json:"minimumHosts,omitempty"`
	// RequestVolume an endpoint must have had in an interval. Default 50.
	RequestVolume *uint32 `json:"requestVolume,omitempty"`
}
