package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Workload lists the addresses at which a program runs where no Kubernetes
// writes EndpointSlices: on a laptop or a virtual machine. Every Service whose
// selector matches the Workload's labels gets its addresses as endpoints, at
// the port that the Service's targetPort names. In a cluster there is none: pods
// say the same.
//
// +kubebuilder:object:generate=true
type Workload struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec WorkloadSpec `json:"spec"`
}

// WorkloadSpec is what runs where.
type WorkloadSpec struct {
	// ServiceAccount is the identity of the program. Default: default.
	ServiceAccount string `json:"serviceAccount,omitempty"`
	// MTLS says what the program's sidecar takes from other workloads. Default:
	// Disabled.
	MTLS MTLSMode `json:"mtls,omitempty"`
	// Endpoints of the program. At least one, at most 1000.
	Endpoints []WorkloadEndpoint `json:"endpoints"`
}

// MTLSMode is what a workload takes from others.
type MTLSMode string

// The modes. The sidecar's --mtls must say the same: this one tells callers.
const (
	// MTLSDisabled: callers speak in clear.
	MTLSDisabled MTLSMode = "Disabled"
	// MTLSPermissive: callers in the mesh use mutual TLS; those that have no
	// sidecar are taken in clear.
	MTLSPermissive MTLSMode = "Permissive"
	// MTLSStrict: callers use mutual TLS, and those that do not are refused.
	MTLSStrict MTLSMode = "Strict"
)

// WorkloadEndpoint is one running instance.
type WorkloadEndpoint struct {
	// Name of the instance, as a pod name would be. Default: <workload>-<n>.
	Name string `json:"name,omitempty"`
	// Address is an IP address, never a host name.
	Address string `json:"address"`
	// Ports by name; a Service's targetPort may be a name found here or a
	// number. A number is used as it is.
	Ports map[string]int32 `json:"ports,omitempty"`
	// Zone for zone-aware balancing.
	Zone string `json:"zone,omitempty"`
	// Labels of this instance, added to the Workload's: so that version
	// Services (payments-v1, payments-v2) can select single instances.
	Labels map[string]string `json:"labels,omitempty"`
}
