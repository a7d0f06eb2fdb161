package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Mode says whether a policy acts or only reports what it would have done.
//
// +kubebuilder:validation:Enum=Observe;Enforce
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
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=outrigger,shortName=cb
// +kubebuilder:metadata:labels="gateway.networking.k8s.io/policy=Direct"
// +kubebuilder:printcolumn:name=Mode,type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name=Closed,type=integer,JSONPath=`.status.breakers.closed`
// +kubebuilder:printcolumn:name=Open,type=integer,JSONPath=`.status.breakers.open`
// +kubebuilder:printcolumn:name=Applied,type=string,JSONPath=`.status.proxies.summary`
// +kubebuilder:printcolumn:name="Last trip",type=date,JSONPath=`.status.lastTrip.time`
// +kubebuilder:printcolumn:name=Reason,type=string,JSONPath=`.status.lastTrip.reason`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.ancestors[0].conditions[?(@.type=="Accepted")].status`,priority=1
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type CircuitBreaker struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec CircuitBreakerSpec `json:"spec"`
	// +optional
	Status CircuitBreakerStatus `json:"status,omitzero"`
}

// CircuitBreakerList is what the API server lists.
//
// +kubebuilder:object:root=true
type CircuitBreakerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []CircuitBreaker `json:"items"`
}

// CircuitBreakerStatus is written by the control plane.
type CircuitBreakerStatus struct {
	// Ancestors as GEP-713 has them: one entry a target.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=16
	Ancestors []gatewayv1.PolicyAncestorStatus `json:"ancestors,omitempty"`
	// Proxies that have been told of the policy.
	//
	// +optional
	Proxies *Proxies `json:"proxies,omitempty"`
	// Breakers by state, one for each calling proxy and port that the policy is
	// about. A caller that has not called yet has none.
	//
	// +optional
	Breakers *Breakers `json:"breakers,omitempty"`
	// LastTrip is the last time that one of them opened.
	//
	// +optional
	LastTrip *LastTrip `json:"lastTrip,omitempty"`
}

// Proxies counts those that subscribe to what the policy is about.
type Proxies struct {
	// Summary is <applied>/<subscribed>, for kubectl get.
	Summary string `json:"summary"`
	// Applied have acknowledged the newest version, in which the policy is.
	Applied int32 `json:"applied"`
	// Subscribed is how many there are.
	Subscribed int32 `json:"subscribed"`
	// Rejected have refused it (NACK); they go on with the version before.
	Rejected int32 `json:"rejected"`
	// Reasons of refusals with the proxy's name, at most 3.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=3
	Reasons []string `json:"reasons,omitempty"`
}

// Breakers counts breakers by state.
type Breakers struct {
	Closed   int32 `json:"closed"`
	Open     int32 `json:"open"`
	HalfOpen int32 `json:"halfOpen"`
}

// LastTrip says why a breaker opened.
type LastTrip struct {
	Time metav1.Time `json:"time"`
	// Caller is the proxy whose breaker opened, <namespace>/<workload> (<pod>).
	Caller string `json:"caller"`
	// Target is the port, <namespace>/<service>:<port>.
	Target string `json:"target"`
	// Reason with its arithmetic.
	Reason string `json:"reason"`
	// Evidence is the command that shows the requests that tripped it.
	Evidence string `json:"evidence"`
}

// CircuitBreakerSpec is what the user asks for. At least one of Trip, Limits
// and Ejection must be set.
//
// +kubebuilder:validation:XValidation:rule="has(self.trip) || has(self.limits) || has(self.ejection)",message="set at least one of trip, limits and ejection"
type CircuitBreakerSpec struct {
	// TargetRefs name Services of the same namespace; sectionName is a port
	// name. 1 to 16 entries.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:XValidation:rule="self.all(t, t.group == '' && t.kind == 'Service')",message="a target is a Service: write group \"\", kind Service"
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// Mode is Enforce unless set.
	//
	// +optional
	// +kubebuilder:default=Enforce
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
//
// +kubebuilder:validation:XValidation:rule="has(self.consecutiveFailures) || has(self.failureRatio) || has(self.slowCall)",message="set at least one of consecutiveFailures, failureRatio and slowCall"
type Trip struct {
	// ConsecutiveFailures opens the breaker after this many failures in a
	// row. 0 means this condition is not used.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	ConsecutiveFailures uint32 `json:"consecutiveFailures,omitempty"`
	// FailureRatio, in (0, 1], as a string so that YAML tools keep it exact.
	//
	// +optional
	// +kubebuilder:validation:Pattern=`^(0?\.[0-9]{1,6}|0\.[0-9]{1,6}|1|1\.0{1,6})$`
	FailureRatio string `json:"failureRatio,omitempty"`
	// SlowCall counts calls that succeed too late.
	SlowCall *SlowCall `json:"slowCall,omitempty"`
	// MinimumRequests in the window before a ratio means anything. Default 20.
	//
	// +optional
	// +kubebuilder:validation:Maximum=1000000000
	MinimumRequests *uint32 `json:"minimumRequests,omitempty"`
	// Window over which ratios are taken, rolling. Default 10s; 1s to 10m.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	Window *metav1.Duration `json:"window,omitempty"`
	// OpenFor is how long the breaker rejects before it probes. Default 15s.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	OpenFor *metav1.Duration `json:"openFor,omitempty"`
	// HalfOpenRequests is how many probes must succeed to close it. Default 3.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	HalfOpenRequests *uint32 `json:"halfOpenRequests,omitempty"`
	// FailureOn lists what counts as a failure, in Envoy's retry_on words
	// (5xx, gateway-error, connect-failure, reset, timeout) or gRPC status
	// names. Default: 5xx, connect-failure, reset, timeout.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=32
	FailureOn []string `json:"failureOn,omitempty"`
}

// SlowCall opens the breaker when too large a share of calls takes too long.
type SlowCall struct {
	// LongerThan is the duration from which a call is slow. Required.
	//
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	LongerThan metav1.Duration `json:"longerThan"`
	// Ratio of slow calls in the window that opens the breaker, in (0, 1].
	//
	// +kubebuilder:validation:Pattern=`^(0?\.[0-9]{1,6}|0\.[0-9]{1,6}|1|1\.0{1,6})$`
	Ratio string `json:"ratio"`
}

// Limits bound one caller's use of the target. Nil means no limit: there are
// no hidden defaults.
type Limits struct {
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	Connections *uint32 `json:"connections,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	PendingRequests *uint32 `json:"pendingRequests,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	Requests *uint32 `json:"requests,omitempty"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	Retries *uint32 `json:"retries,omitempty"`
}

// Ejection is outlier detection of single endpoints.
type Ejection struct {
	// Consecutive5xx ejects after this many 5xx in a row from one endpoint.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	Consecutive5xx *uint32 `json:"consecutive5xx,omitempty"`
	// ConsecutiveGatewayErrors counts 502, 503, 504 and connection failures.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	ConsecutiveGatewayErrors *uint32 `json:"consecutiveGatewayErrors,omitempty"`
	// Interval between sweeps that return ejected endpoints. Default 10s.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	Interval *metav1.Duration `json:"interval,omitempty"`
	// BaseEjectionTime is multiplied by the number of ejections. Default 30s.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	BaseEjectionTime *metav1.Duration `json:"baseEjectionTime,omitempty"`
	// MaxEjectionPercent of the endpoints, 1 to 100. Default 50.
	//
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	MaxEjectionPercent *uint32 `json:"maxEjectionPercent,omitempty"`
	// FailurePercentage ejects endpoints that fail too large a share.
	FailurePercentage *FailurePercentage `json:"failurePercentage,omitempty"`
}

// FailurePercentage is Envoy's failure-percentage ejection.
type FailurePercentage struct {
	// Threshold in percent, 1 to 100. Default 85.
	//
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=100
	Threshold *uint32 `json:"threshold,omitempty"`
	// MinimumHosts with enough requests before it acts. Default 5.
	//
	// +optional
	// +kubebuilder:validation:Maximum=1000000000
	MinimumHosts *uint32 `json:"minimumHosts,omitempty"`
	// RequestVolume an endpoint must have had in an interval. Default 50.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	RequestVolume *uint32 `json:"requestVolume,omitempty"`
}
