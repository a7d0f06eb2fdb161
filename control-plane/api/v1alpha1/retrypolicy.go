package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// RetryPolicy says which failed attempts are made again, how often, and how
// much load retries may add.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=outrigger,shortName=rp
// +kubebuilder:metadata:labels="gateway.networking.k8s.io/policy=Direct"
// +kubebuilder:printcolumn:name=Attempts,type=integer,JSONPath=`.spec.attempts`
// +kubebuilder:printcolumn:name=Applied,type=string,JSONPath=`.status.proxies.summary`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.ancestors[0].conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type RetryPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec RetryPolicySpec `json:"spec"`
	// +optional
	Status RetryPolicyStatus `json:"status,omitzero"`
}

// RetryPolicyList is what the API server lists.
//
// +kubebuilder:object:root=true
type RetryPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []RetryPolicy `json:"items"`
}

// RetryPolicyStatus is written by the control plane.
type RetryPolicyStatus struct {
	// Ancestors as GEP-713 has them: one entry a target.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=16
	Ancestors []gatewayv1.PolicyAncestorStatus `json:"ancestors,omitempty"`
	// Proxies that have been told of the policy.
	//
	// +optional
	Proxies *Proxies `json:"proxies,omitempty"`
}

// RetryPolicySpec is what the user asks for.
type RetryPolicySpec struct {
	// TargetRefs name Services (sectionName: port name) or HTTPRoutes
	// (sectionName: rule name) of the same namespace. 1 to 16 entries. A policy
	// on a route wins over one on its Service.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:XValidation:rule="self.all(t, (t.group == '' && t.kind == 'Service') || (t.group == 'gateway.networking.k8s.io' && t.kind == 'HTTPRoute'))",message="a target is a Service (group \"\") or an HTTPRoute (group gateway.networking.k8s.io)"
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// RetryOn lists conditions in Envoy's words: 5xx, gateway-error,
	// connect-failure, refused-stream, reset, reset-before-request,
	// retriable-4xx, or gRPC's: cancelled, deadline-exceeded, internal,
	// resource-exhausted, unavailable. Empty: the safe default.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=32
	RetryOn []string `json:"retryOn,omitempty"`
	// RetryOnStatus lists single response codes, 400 to 599.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:Minimum=400
	// +kubebuilder:validation:items:Maximum=599
	RetryOnStatus []uint32 `json:"retryOnStatus,omitempty"`
	// Attempts is the number of retries after the first try, 0 to 10. Default 2.
	//
	// +optional
	// +kubebuilder:validation:Maximum=10
	// +kubebuilder:validation:Minimum=0
	Attempts *uint32 `json:"attempts,omitempty"`
	// PerTryTimeout bounds one attempt. Unset: only the request timeout.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	PerTryTimeout *metav1.Duration `json:"perTryTimeout,omitempty"`
	// Timeout bounds the request with all its attempts. Unset: the route's.
	//
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	Timeout *metav1.Duration `json:"timeout,omitempty"`
	// Backoff between attempts; jittered. Default base 25ms, max 250ms.
	Backoff *Backoff `json:"backoff,omitempty"`
	// Budget bounds retries as a share of active requests. Default 20 % and 3.
	Budget *RetryBudget `json:"budget,omitempty"`
}

// Backoff is exponential with full jitter.
type Backoff struct {
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	Base metav1.Duration `json:"base"`
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:Pattern=`^([0-9]{1,9}(\.[0-9]{1,9})?(ns|us|ms|s|m|h)){1,5}$`
	Max *metav1.Duration `json:"max,omitempty"`
}

// RetryBudget bounds concurrent retries of one caller to one target.
type RetryBudget struct {
	// Percent of the requests in flight, 0 to 100. Default 20.
	//
	// +optional
	// +kubebuilder:validation:Maximum=100
	// +kubebuilder:validation:Minimum=0
	Percent *uint32 `json:"percent,omitempty"`
	// MinConcurrency is allowed whatever the percentage. Default 3.
	//
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=1000000000
	MinConcurrency *uint32 `json:"minConcurrency,omitempty"`
}
