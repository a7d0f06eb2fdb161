// Package v1alpha1 holds the objects users write for Outrigger: the API group
// outrigger.dev/v1alpha1.
//
// It is a contract: it knows the shape of the objects, their defaults and
// nothing of how they are served. The control plane reads them from a folder
// or a cluster and translates them into the mesh model; validation that needs
// other objects (does the Service exist?) is the translator's.
//
// CircuitBreaker and RetryPolicy are Direct policies after GEP-713: they name
// their targets in spec.targetRefs, and where two name the same target the
// older one wins and the younger is told so.
//
// +kubebuilder:object:generate=true
// +groupName=outrigger.dev
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupName is the API group of every kind in this package.
const GroupName = "outrigger.dev"

// Version is the API version of every kind in this package.
const Version = "v1alpha1"

// APIVersion is what users write in the apiVersion field.
const APIVersion = GroupName + "/" + Version

//go:generate ../../../tools/crds/generate.sh

// GroupVersion of every kind in this package.
func GroupVersion() schema.GroupVersion {
	return schema.GroupVersion{Group: GroupName, Version: Version}
}

// AddToScheme registers the kinds that a cluster holds. It is what scheme
// builders call.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion(),
		&CircuitBreaker{}, &CircuitBreakerList{}, &RetryPolicy{}, &RetryPolicyList{}, &AuthorizationPolicy{}, &AuthorizationPolicyList{})
	metav1.AddToGroupVersion(s, GroupVersion())
	return nil
}
