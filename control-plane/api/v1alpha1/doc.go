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
package v1alpha1

// GroupName is the API group of every kind in this package.
const GroupName = "outrigger.dev"

// Version is the API version of every kind in this package.
const Version = "v1alpha1"

// APIVersion is what users write in the apiVersion field.
const APIVersion = GroupName + "/" + Version
