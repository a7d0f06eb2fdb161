// Package translate turns Kubernetes objects and policies into the mesh model.
//
// It is pure: it knows the objects, what the Gateway API and GEP-713 say they
// mean, and every default; it knows neither where the objects come from nor
// how proxies are told. rebuild calls Build with what kube or manifests
// gathered. There is one file a kind of policy.
//
// Build never fails. An object that cannot be used spoils only itself and is
// reported as a Problem, which becomes a status condition or a line in a log.
package translate

import (
	"cmp"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Objects is everything that a mesh is made of. Build reads the objects and
// keeps none of their slices or maps, so that they may come from a shared
// cache; nobody may change them while Build runs. Nil entries are skipped.
type Objects struct {
	// Namespaces need their names and labels only.
	Namespaces     []*corev1.Namespace
	Services       []*corev1.Service
	EndpointSlices []*discoveryv1.EndpointSlice
	// Pods may be trimmed to metadata (name, namespace, generateName, labels,
	// annotations, ownerReferences), spec.serviceAccountName, of all containers and
	// init containers name, ports and restartPolicy, and status.phase, podIP and podIPs.
	Pods                  []*corev1.Pod
	HTTPRoutes            []*gatewayv1.HTTPRoute
	GRPCRoutes            []*gatewayv1.GRPCRoute
	TLSRoutes             []*gatewayv1.TLSRoute
	ReferenceGrants       []*gatewayv1.ReferenceGrant
	Workloads             []*v1alpha1.Workload
	CircuitBreakers       []*v1alpha1.CircuitBreaker
	RetryPolicies         []*v1alpha1.RetryPolicy
	AuthorizationPolicies []*v1alpha1.AuthorizationPolicy
}

// Options are the settings of the mesh that no object carries.
type Options struct {
	// TrustDomain of the identities; empty is identity.DefaultTrustDomain.
	TrustDomain string
}

// Build makes the Mesh. The order of the objects makes no difference, neither
// to the Mesh nor to the problems, which are sorted by object and field, nor to
// what is to be said of each object, which is sorted by object.
//
// Of two objects with the same kind, namespace and name the one with the lower
// SourceAnnotation wins; where those are equal too, which wins is not defined.
//
// Build is safe for concurrent use and never panics on what the objects hold.
func Build(in Objects, opts Options) (*mesh.Mesh, []Problem, []Status) {
	b := newBuilder(opts)

	b.addNamespaces(ordered(b, kindNamespace, in.Namespaces))
	b.addPods(ordered(b, kindPod, in.Pods))
	b.addServices(ordered(b, kindService, in.Services))
	b.resolveVIPs()
	b.addEndpointSlices(ordered(b, kindEndpointSlice, in.EndpointSlices))
	b.addWorkloads(ordered(b, kindWorkload, in.Workloads))
	b.sortEndpoints()
	b.addLeads()

	// Retry policies come first: a route asks for the policy that names it.
	routes := ordered(b, kindHTTPRoute, in.HTTPRoutes)
	for _, r := range routes {
		b.routes[keyOf(r)] = r
		b.findRouted(r.Namespace, r.Spec.ParentRefs, forHTTP())
	}
	grpcRoutes := ordered(b, kindGRPCRoute, in.GRPCRoutes)
	for _, r := range grpcRoutes {
		b.findRouted(r.Namespace, r.Spec.ParentRefs, forGRPC())
	}
	for _, g := range ordered(b, kindReferenceGrant, in.ReferenceGrants) {
		b.grants[g.Namespace] = append(b.grants[g.Namespace], g)
	}
	retries := b.retryPolicies(ordered(b, kindRetryPolicy, in.RetryPolicies))
	b.addRoutes(routes, grpcRoutes, retries)
	b.addTLSRoutes(ordered(b, kindTLSRoute, in.TLSRoutes))
	b.addCircuitBreakers(ordered(b, kindCircuitBreaker, in.CircuitBreakers))

	b.addAuthorizationPolicies(ordered(b, kindAuthorizationPolicy, in.AuthorizationPolicies))

	m := &mesh.Mesh{TrustDomain: b.trustDomain, Instances: b.instances()}
	for _, s := range b.sortedServices() {
		m.Services = append(m.Services, s.model())
	}
	return m, sortProblems(b.problems), SortStatuses(b.statuses)
}

// The kinds of objects, as problems name them.
const (
	kindNamespace           = "Namespace"
	kindPod                 = "Pod"
	kindService             = "Service"
	kindEndpointSlice       = "EndpointSlice"
	kindHTTPRoute           = "HTTPRoute"
	kindGRPCRoute           = "GRPCRoute"
	kindReferenceGrant      = "ReferenceGrant"
	kindTLSRoute            = "TLSRoute"
	kindWorkload            = "Workload"
	kindCircuitBreaker      = "CircuitBreaker"
	kindRetryPolicy         = "RetryPolicy"
	kindAuthorizationPolicy = "AuthorizationPolicy"
)

// builder is the state of one Build.
type builder struct {
	trustDomain string
	// modes are what namespaces ask of those who call their pods.
	modes    map[string]mesh.MTLS
	pods     map[key]*pod
	podsIn   map[string][]*pod // by namespace
	services map[key]*service
	external map[key]bool // Services of type ExternalName
	grants   map[string][]*gatewayv1.ReferenceGrant
	// routes are all HTTPRoutes, whether or not they are attached to a Service:
	// policies name them.
	routes map[key]*gatewayv1.HTTPRoute
	// routed are the ports that some route of HTTP or gRPC names.
	routed map[*port]bool
	// attached is which kind of route has a scope. Where none has, there is the
	// implicit route; of TLSRoutes OnlyServerNames says it.
	attached map[scope]string
	problems []Problem
	statuses []Status
}

func newBuilder(opts Options) *builder {
	return &builder{
		trustDomain: cmp.Or(opts.TrustDomain, identity.DefaultTrustDomain),
		services:    map[key]*service{}, external: map[key]bool{}, grants: map[string][]*gatewayv1.ReferenceGrant{},
		routes: map[key]*gatewayv1.HTTPRoute{}, routed: map[*port]bool{}, attached: map[scope]string{},
		modes: map[string]mesh.MTLS{}, pods: map[key]*pod{}, podsIn: map[string][]*pod{},
	}
}

// key names an object of a known kind.
type key struct{ namespace, name string }

func (k key) String() string { return k.namespace + "/" + k.name }

func (k key) compare(o key) int {
	if c := cmp.Compare(k.namespace, o.namespace); c != 0 {
		return c
	}
	return cmp.Compare(k.name, o.name)
}

func keyOf(o metav1.Object) key { return key{o.GetNamespace(), o.GetName()} }

// older orders objects as the Gateway API resolves conflicts: by creation
// time, then by namespace and name. Objects from a folder have no creation
// time and are equally old.
func older(a, b metav1.Object) int {
	if c := created(a).Compare(created(b)); c != 0 {
		return c
	}
	return keyOf(a).compare(keyOf(b))
}

// created is in whole seconds, which is what the API server keeps.
func created(o metav1.Object) time.Time {
	return o.GetCreationTimestamp().Truncate(time.Second)
}

// nameRemedy says what RFC 1123 wants of names.
const nameRemedy = "write lower-case letters, digits and hyphens, beginning and ending with a letter or digit"

// object is a pointer to one of the types in Objects.
type object[T any] interface {
	*T
	metav1.Object
}

// ordered returns the usable objects, oldest first: not nil, with names that
// can be part of a resource name, and no two of the same name.
func ordered[T any, P object[T]](b *builder, kind string, in []P) []P {
	out := make([]P, 0, len(in))
	for _, o := range in {
		if o == nil {
			continue
		}
		r := b.on(kind, o)
		ok := true
		if errs := validation.IsDNS1123Label(o.GetNamespace()); kind != kindNamespace && len(errs) > 0 {
			r.add("metadata.namespace", ReasonInvalid, "%q is not a namespace; %s", o.GetNamespace(), nameRemedy)
			ok = false
		}
		check := validation.IsDNS1123Subdomain
		if kind == kindService {
			check = validation.IsDNS1123Label
		}
		if errs := check(o.GetName()); len(errs) > 0 {
			r.add("metadata.name", ReasonInvalid, "%q cannot be a name; %s", o.GetName(), nameRemedy)
			ok = false
		}
		if ok {
			out = append(out, o)
		}
	}
	slices.SortFunc(out, func(a, b P) int {
		if c := keyOf(a).compare(keyOf(b)); c != 0 {
			return c
		}
		return cmp.Compare(source(a), source(b))
	})
	unique := out[:0]
	for _, o := range out {
		if n := len(unique); n > 0 && keyOf(unique[n-1]) == keyOf(o) {
			b.on(kind, o).add("metadata.name", ReasonConflicted,
				"another %s has this namespace and name%s and is used; rename or delete one", kind, parenthesised(source(unique[n-1])))
			continue
		}
		unique = append(unique, o)
	}
	slices.SortFunc(unique, func(a, b P) int { return older(a, b) })
	return unique
}
