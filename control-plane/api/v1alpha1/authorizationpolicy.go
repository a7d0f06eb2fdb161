package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// AuthorizationPolicy says who may call a Service, or any pod of a namespace.
//
// It is evaluated by the proxy of the pod that is called. Deny policies come
// first. Where Allow policies apply to a port, a request that none of them
// matches is denied; where none applies, everything is allowed. A policy that is
// invalid, and that was never valid before, denies everything that it applies to.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=outrigger,shortName=authz
// +kubebuilder:metadata:labels="gateway.networking.k8s.io/policy=Direct"
// +kubebuilder:printcolumn:name=Mode,type=string,JSONPath=`.spec.mode`
// +kubebuilder:printcolumn:name=Action,type=string,JSONPath=`.spec.action`
// +kubebuilder:printcolumn:name=Applied,type=string,JSONPath=`.status.proxies.summary`
// +kubebuilder:printcolumn:name=Accepted,type=string,JSONPath=`.status.ancestors[0].conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name=Age,type=date,JSONPath=`.metadata.creationTimestamp`
type AuthorizationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec AuthorizationPolicySpec `json:"spec"`
	// +optional
	Status AuthorizationPolicyStatus `json:"status,omitzero"`
}

// AuthorizationPolicyList is what the API server lists.
//
// +kubebuilder:object:root=true
type AuthorizationPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`

	Items []AuthorizationPolicy `json:"items"`
}

// AuthorizationPolicyStatus is written by the control plane.
type AuthorizationPolicyStatus struct {
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

// AuthorizationAction is what becomes of a request that a rule matches.
//
// +kubebuilder:validation:Enum=Allow;Deny
type AuthorizationAction string

// The actions.
const (
	ActionAllow AuthorizationAction = "Allow"
	ActionDeny  AuthorizationAction = "Deny"
)

// AuthorizationPolicySpec is what the user asks for.
type AuthorizationPolicySpec struct {
	// TargetRefs name Services of the same namespace (sectionName: port name), or
	// the namespace itself (group "", kind Namespace). 1 to 16 entries.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:XValidation:rule="self.all(t, t.group == '' && t.kind in ['Service', 'Namespace'])",message="a target is a Service or the Namespace: write group \"\""
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// Mode is Enforce unless set. Observe evaluates, counts and logs what it would
	// have denied, and denies nothing.
	//
	// +optional
	// +kubebuilder:default=Enforce
	Mode Mode `json:"mode,omitempty"`
	// Action is Allow unless set.
	//
	// +optional
	// +kubebuilder:default=Allow
	Action AuthorizationAction `json:"action,omitempty"`
	// Rules of which one must match; at most 64. None matches nothing, so that an
	// Allow without rules denies everything.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Rules []AuthorizationRule `json:"rules,omitempty"`
}

// AuthorizationRule matches a request when From and To do. One that is left out
// matches everything.
type AuthorizationRule struct {
	// Name of the rule, for what is said about it. Default: its index.
	Name string `json:"name,omitempty"`
	// From says who calls; one of the entries must match.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	From []AuthorizationSource `json:"from,omitempty"`
	// To says what is called; one of the entries must match.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	To []AuthorizationOperation `json:"to,omitempty"`
}

// AuthorizationSource matches when every list that is set has an item that
// matches. Only mutual TLS proves who calls: a caller in clear text has no
// service account and no namespace.
type AuthorizationSource struct {
	// ServiceAccounts as <namespace>/<name>, or <name> in the policy's namespace.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
	// Namespaces of the callers.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Namespaces []string `json:"namespaces,omitempty"`
	// Principals are SPIFFE IDs; one that ends in * is a prefix.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Principals []string `json:"principals,omitempty"`
}

// AuthorizationOperation matches when every list that is set has an item that
// matches.
type AuthorizationOperation struct {
	// Methods of HTTP, for example GET.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Methods []string `json:"methods,omitempty"`
	// Paths without the query: exact, or a prefix where it ends in *.
	//
	// +optional
	// +kubebuilder:validation:MaxItems=64
	Paths []string `json:"paths,omitempty"`
}
