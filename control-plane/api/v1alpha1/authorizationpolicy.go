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
type AuthorizationPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   AuthorizationPolicySpec `json:"spec"`
	Status gatewayv1.PolicyStatus  `json:"status,omitzero"`
}

// AuthorizationAction is what becomes of a request that a rule matches.
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
	TargetRefs []gatewayv1.LocalPolicyTargetReferenceWithSectionName `json:"targetRefs"`
	// Mode is Enforce unless set. Observe evaluates, counts and logs what it would
	// have denied, and denies nothing.
	Mode Mode `json:"mode,omitempty"`
	// Action is Allow unless set.
	Action AuthorizationAction `json:"action,omitempty"`
	// Rules of which one must match; at most 64. None matches nothing, so that an
	// Allow without rules denies everything.
	Rules []AuthorizationRule `json:"rules,omitempty"`
}

// AuthorizationRule matches a request when From and To do. One that is left out
// matches everything.
type AuthorizationRule struct {
	// Name of the rule, for what is said about it. Default: its index.
	Name string `json:"name,omitempty"`
	// From says who calls; one of the entries must match.
	From []AuthorizationSource `json:"from,omitempty"`
	// To says what is called; one of the entries must match.
	To []AuthorizationOperation `json:"to,omitempty"`
}

// AuthorizationSource matches when every list that is set has an item that
// matches. Only mutual TLS proves who calls: a caller in clear text has no
// service account and no namespace.
type AuthorizationSource struct {
	// ServiceAccounts as <namespace>/<name>, or <name> in the policy's namespace.
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
	// Namespaces of the callers.
	Namespaces []string `json:"namespaces,omitempty"`
	// Principals are SPIFFE IDs; one that ends in * is a prefix.
	Principals []string `json:"principals,omitempty"`
}

// AuthorizationOperation matches when every list that is set has an item that
// matches.
type AuthorizationOperation struct {
	// Methods of HTTP, for example GET.
	Methods []string `json:"methods,omitempty"`
	// Paths without the query: exact, or a prefix where it ends in *.
	Paths []string `json:"paths,omitempty"`
}
