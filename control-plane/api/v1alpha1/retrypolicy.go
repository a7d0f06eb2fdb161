package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// RetryPolicy says which failed attempts are made again, how often, and how
// much load retries may add.
type RetryPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   RetryPolicySpec        `json:"spec"`
	Status gatewayv1.PolicyStatus `json:"status,omitzero"`
}

// RetryPolicySpec is what the user asks for.
type RetryPolicySpec struct {
	// TargetRefs name Services (sectionName: port name) or HTTPRoutes
	// (sectionName: rule name) of the same namespace. 1 to 16 entries. A policy
	// on a route wins over one on its Service.
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// RetryOn lists conditions in Envoy's words: 5xx, gateway-error,
	// connect-failure, refused-stream, reset, reset-before-request,
	// retriable-4xx, or gRPC's: cancelled, deadline-exceeded, internal,
	// resource-exhausted, unavailable. Empty: the safe default.
	RetryOn []string `json:"retryOn,omitempty"`
	// RetryOnStatus lists single response codes, 400 to 599.
	RetryOnStatus []uint32 `json:"retryOnStatus,omitempty"`
	// Attempts is the number of retries after the first try, 0 to 10. Default 2.
	Attempts *uint32 `json:"attempts,omitempty"`
	// PerTryTimeout bounds one attempt. Unset: only the request timeout.
	PerTryTimeout *metav1.Duration `json:"perTryTimeout,omitempty"`
	// Timeout bounds the request with all its attempts. Unset: the route's.
	Timeout *metav1.Duration `json:"timeout,omitempty"`
	// Backoff between attempts; jittered. Default base 25ms, max 250ms.
	Backoff *Backoff `json:"backoff,omitempty"`
	// Budget bounds retries as a share of active requests. Default 20 % and 3.
	Budget *RetryBudget `json:"budget,omitempty"`
}

// Backoff is exponential with full jitter.
type Backoff struct {
	Base metav1.Duration  `json:"base"`
	Max  *metav1.Duration `json:"max,omitempty"`
}

// RetryBudget bounds concurrent retries of one caller to one target.
type RetryBudget struct {
	// Percent of the requests in flight, 0 to 100. Default 20.
	Percent *uint32 `json:"percent,omitempty"`
	// MinConcurrency is allowed whatever the percentage. Default 3.
	MinConcurrency *uint32 `json:"minConcurrency,omitempty"`
}
