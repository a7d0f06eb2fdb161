package kube

import (
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// kind is one of those that are read.
type kind struct {
	gvk      schema.GroupVersionKind
	resource string
	cluster  bool // not in a namespace
	// custom kinds are there where their CRD is.
	custom bool
	// field selects what the API server sends at all.
	field fields.Selector
	// mesh says that the kind is part of a mesh, so that Load returns it.
	mesh   bool
	object func() client.Object
	// trim takes away what nobody reads, besides what is taken from all metadata.
	trim func(client.Object)
	// essence returns a shallow copy without what may change without a notice.
	essence func(client.Object) client.Object
}

func (k kind) addTo(m *meta.DefaultRESTMapper) {
	plural := k.gvk.GroupVersion().WithResource(k.resource)
	var scope meta.RESTScope = meta.RESTScopeNamespace
	if k.cluster {
		scope = meta.RESTScopeRoot
	}
	m.AddSpecific(k.gvk, plural, k.gvk.GroupVersion().WithResource(strings.ToLower(k.gvk.Kind)), scope)
}

// crd is the name of the kind's CRD.
func (k kind) crd() string { return k.resource + "." + k.gvk.Group }

// Names of kinds that are treated specially.
const (
	kindPod           = "Pod"
	kindEndpointSlice = "EndpointSlice"
	kindConfigMap     = "ConfigMap"
	kindNamespace     = "Namespace"
)

// kinds are all that are watched.
func kinds() []kind {
	core, gateway, own := corev1.SchemeGroupVersion, schema.GroupVersion(gatewayv1.GroupVersion), v1alpha1.GroupVersion()
	return []kind{
		{
			gvk: core.WithKind("Service"), resource: "services", mesh: true, object: func() client.Object { return &corev1.Service{} },
			trim:    trim(func(s *corev1.Service) { s.Status = corev1.ServiceStatus{} }),
			essence: essence(func(*corev1.Service) {}),
		},
		{
			gvk: discoveryv1.SchemeGroupVersion.WithKind(kindEndpointSlice), resource: "endpointslices", mesh: true, object: func() client.Object { return &discoveryv1.EndpointSlice{} },
			trim: trim(func(s *discoveryv1.EndpointSlice) {
				for i := range s.Endpoints {
					s.Endpoints[i].DeprecatedTopology = nil
				}
			}),
			essence: essence(func(s *discoveryv1.EndpointSlice) { s.Generation = 0 }),
		},
		{
			gvk: core.WithKind(kindPod), resource: "pods", mesh: true, object: func() client.Object { return &corev1.Pod{} },
			// Completed pods do not count.
			field: fields.AndSelectors(
				fields.OneTermNotEqualSelector("status.phase", string(corev1.PodSucceeded)),
				fields.OneTermNotEqualSelector("status.phase", string(corev1.PodFailed)),
			),
			trim: trim(trimPod), essence: essence(func(p *corev1.Pod) { p.Generation = 0 }),
		},
		{
			gvk: core.WithKind(kindNamespace), resource: "namespaces", cluster: true, mesh: true, object: func() client.Object { return &corev1.Namespace{} },
			trim: trim(func(n *corev1.Namespace) {
				n.Spec, n.Status = corev1.NamespaceSpec{}, corev1.NamespaceStatus{Phase: n.Status.Phase}
			}),
			essence: essence(func(*corev1.Namespace) {}),
		},
		{
			gvk: gateway.WithKind("HTTPRoute"), resource: "httproutes", custom: true, mesh: true, object: func() client.Object { return &gatewayv1.HTTPRoute{} },
			trim: trim(func(*gatewayv1.HTTPRoute) {}), essence: essence(func(r *gatewayv1.HTTPRoute) { r.Status = gatewayv1.HTTPRouteStatus{} }),
		},
		{
			gvk: gateway.WithKind("GRPCRoute"), resource: "grpcroutes", custom: true, mesh: true, object: func() client.Object { return &gatewayv1.GRPCRoute{} },
			trim: trim(func(*gatewayv1.GRPCRoute) {}), essence: essence(func(r *gatewayv1.GRPCRoute) { r.Status = gatewayv1.GRPCRouteStatus{} }),
		},
		{
			gvk: gateway.WithKind("TLSRoute"), resource: "tlsroutes", custom: true, mesh: true, object: func() client.Object { return &gatewayv1.TLSRoute{} },
			trim: trim(func(*gatewayv1.TLSRoute) {}), essence: essence(func(r *gatewayv1.TLSRoute) { r.Status = gatewayv1.TLSRouteStatus{} }),
		},
		{
			gvk: gateway.WithKind("ReferenceGrant"), resource: "referencegrants", custom: true, mesh: true, object: func() client.Object { return &gatewayv1.ReferenceGrant{} },
			trim: trim(func(*gatewayv1.ReferenceGrant) {}), essence: essence(func(*gatewayv1.ReferenceGrant) {}),
		},
		{
			gvk: own.WithKind("CircuitBreaker"), resource: "circuitbreakers", custom: true, mesh: true, object: func() client.Object { return &v1alpha1.CircuitBreaker{} },
			trim: trim(func(*v1alpha1.CircuitBreaker) {}), essence: essence(func(p *v1alpha1.CircuitBreaker) { p.Status = v1alpha1.CircuitBreakerStatus{} }),
		},
		{
			gvk: own.WithKind("RetryPolicy"), resource: "retrypolicies", custom: true, mesh: true, object: func() client.Object { return &v1alpha1.RetryPolicy{} },
			trim: trim(func(*v1alpha1.RetryPolicy) {}), essence: essence(func(p *v1alpha1.RetryPolicy) { p.Status = v1alpha1.RetryPolicyStatus{} }),
		},
		{
			gvk: own.WithKind("AuthorizationPolicy"), resource: "authorizationpolicies", custom: true, mesh: true, object: func() client.Object { return &v1alpha1.AuthorizationPolicy{} },
			trim: trim(func(*v1alpha1.AuthorizationPolicy) {}), essence: essence(func(p *v1alpha1.AuthorizationPolicy) { p.Status = v1alpha1.AuthorizationPolicyStatus{} }),
		},
		{
			// Of all namespaces, those of our name: a few hundred bytes each.
			gvk: core.WithKind(kindConfigMap), resource: "configmaps", object: func() client.Object { return &corev1.ConfigMap{} },
			field: fields.OneTermEqualSelector("metadata.name", RootsConfigMap),
			trim:  trim(func(*corev1.ConfigMap) {}), essence: essence(func(*corev1.ConfigMap) {}),
		},
	}
}

// transform is called by informers before they keep an object.
func (k kind) transform(in any) (any, error) {
	o, ok := in.(client.Object)
	if !ok {
		return in, nil // a tombstone, whose object has been trimmed
	}
	trimMeta(o)
	k.trim(o)
	return o, nil
}

// same says whether two versions of an object mean the same.
func (k kind) same(a, b client.Object) bool {
	return a.GetResourceVersion() == b.GetResourceVersion() && a.GetUID() == b.GetUID() || equality.Semantic.DeepEqual(k.essence(a), k.essence(b))
}

// trim makes a function on one type one on objects.
func trim[T any, P interface {
	*T
	client.Object
}](f func(P)) func(client.Object) {
	return func(o client.Object) {
		if p, ok := o.(P); ok {
			f(p)
		}
	}
}

// essence copies the object, not what it points to, so that f may clear fields.
func essence[T any, P interface {
	*T
	client.Object
}](f func(P)) func(client.Object) client.Object {
	return func(o client.Object) client.Object {
		p, ok := o.(P)
		if !ok {
			return o
		}
		t := *p
		p = &t
		p.SetResourceVersion("")
		f(p)
		return p
	}
}

// trimMeta keeps, of annotations, our own. The resource version stays: informers
// tell updates from repetitions by it, and writers need it.
func trimMeta(o client.Object) {
	o.SetManagedFields(nil)
	o.SetFinalizers(nil)
	o.SetSelfLink("")
	if _, pod := o.(*corev1.Pod); !pod { // of a pod they name the workload
		o.SetOwnerReferences(nil)
		o.SetGenerateName("")
	}
	ours := maps.Clone(o.GetAnnotations())
	maps.DeleteFunc(ours, func(name, _ string) bool {
		return !strings.HasPrefix(name, Prefix) || name == translate.SourceAnnotation
	})
	if len(ours) == 0 {
		ours = nil
	}
	o.SetAnnotations(ours)
}

// trimPod keeps what a mesh is made of, which is a small part: a cluster has many
// pods.
func trimPod(p *corev1.Pod) {
	p.Spec = corev1.PodSpec{
		InitContainers: trimContainers(p.Spec.InitContainers), Containers: trimContainers(p.Spec.Containers),
		ServiceAccountName: p.Spec.ServiceAccountName, NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
	}
	p.Status = corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs}
	owners := make([]metav1.OwnerReference, 0, len(p.OwnerReferences))
	for _, r := range p.OwnerReferences {
		owners = append(owners, metav1.OwnerReference{APIVersion: r.APIVersion, Kind: r.Kind, Name: r.Name, Controller: r.Controller})
	}
	p.OwnerReferences = owners
}

func trimContainers(in []corev1.Container) []corev1.Container {
	out := make([]corev1.Container, 0, len(in))
	for _, c := range in {
		out = append(out, corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy})
	}
	return out
}
