package translate

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Change says what a source returns differently than before. It never names less
// than has changed.
type Change struct {
	// Rest: something other than what the fields below name, so that everything has
	// to be built anew.
	Rest bool
	// Services of which EndpointSlices, or pods that these name, have changed. The
	// Services themselves have not, unless Rest is set; they need not exist.
	Services []types.NamespacedName
	// Pods that are new, gone or different in what is kept of them. The Services
	// whose EndpointSlices name them are in Services.
	Pods []types.NamespacedName
}

// Endpoints carries a Mesh from one change of endpoints to the next without
// building all of it: what a change costs depends on the Services and pods that it
// touches. What comes out is what Build makes of the same objects.
//
// It is not safe for concurrent use.
type Endpoints struct {
	opts       Options
	mesh       *mesh.Mesh
	namespaces map[string]*corev1.Namespace
	services   map[key]*corev1.Service
	slices     map[key][]*discoveryv1.EndpointSlice // by Service
	pods       map[key]*corev1.Pod
	selecting  map[label][]*corev1.Service
	problems   map[object3][]Problem // those of EndpointSlices and pods
	policed    map[string]bool       // namespaces with AuthorizationPolicies
	whole      bool                  // nothing but Build will do
}

type object3 struct{ kind, namespace, name string }

// NewEndpoints goes on from what Build has made of the objects: the Mesh and the
// problems.
func NewEndpoints(in Objects, opts Options, m *mesh.Mesh, problems []Problem) *Endpoints {
	e := &Endpoints{
		opts: opts, mesh: m, namespaces: map[string]*corev1.Namespace{}, services: make(map[key]*corev1.Service, len(in.Services)),
		slices: make(map[key][]*discoveryv1.EndpointSlice, len(in.Services)), pods: make(map[key]*corev1.Pod, len(in.Pods)),
		problems: map[object3][]Problem{}, policed: map[string]bool{},
		// Where an endpoint may come from a Workload, one change is not enough to know it.
		whole: len(in.Workloads) > 0,
	}
	for _, o := range in.Namespaces {
		if o != nil {
			e.namespaces[o.Name] = o
		}
	}
	for _, o := range in.Services {
		if o != nil {
			e.whole = e.whole || e.services[keyOf(o)] != nil
			e.services[keyOf(o)] = o
		}
	}
	seen := map[key]bool{}
	for _, o := range in.EndpointSlices {
		if o != nil {
			e.whole = e.whole || seen[keyOf(o)]
			seen[keyOf(o)] = true
			k := sliceService(o)
			e.slices[k] = append(e.slices[k], o)
		}
	}
	for _, o := range in.Pods {
		if o != nil {
			e.whole = e.whole || e.pods[keyOf(o)] != nil
			e.pods[keyOf(o)] = o
		}
	}
	for _, o := range in.AuthorizationPolicies {
		if o != nil {
			e.policed[o.Namespace] = true
		}
	}
	for _, p := range problems {
		if p.Kind == kindEndpointSlice || p.Kind == kindPod {
			k := object3{p.Kind, p.Namespace, p.Name}
			e.problems[k] = append(e.problems[k], p)
		}
	}
	e.selecting = byLabel(e.services, func(s *corev1.Service) map[string]string { return s.Spec.Selector })
	return e
}

func sliceService(o *discoveryv1.EndpointSlice) key {
	return key{o.Namespace, o.Labels[discoveryv1.LabelServiceName]}
}

// Mesh is the one in force: that of NewEndpoints or of the last Update.
func (e *Endpoints) Mesh() *mesh.Mesh { return e.mesh }

// Update takes the change of the objects that c names. in has what there is of
// them now: the EndpointSlices of c.Services, the pods that those name, and
// c.Pods; other objects in it are not looked at. It returns the Mesh that has the
// change, which shares with the one before what is the same, and what differs.
//
// Where complete is false the Mesh has the endpoints of c.Services all the same,
// but something else follows from the change that only a Build knows: an Instance
// to which policies apply, or a Problem.
func (e *Endpoints) Update(c Change, in Objects) (m *mesh.Mesh, changed mesh.Change, complete bool) {
	if e.whole {
		return e.mesh, mesh.Change{}, false
	}
	now := e.read(c, in)
	u := update{Endpoints: e, now: now, complete: !c.Rest}
	affected := u.affected(c)
	b := u.build(c, affected)
	u.compareProblems(b, c, affected)
	services := u.updatedServices(b, c)
	instances := u.updatedInstances(b, affected)

	for _, n := range c.Services {
		k := key{n.Namespace, n.Name}
		if s := now.slices[k]; len(s) > 0 {
			e.slices[k] = s
		} else {
			delete(e.slices, k)
		}
	}
	if u.complete {
		// Else the old ones stay to be compared with, until there is a Build.
		for _, n := range c.Pods {
			k := key{n.Namespace, n.Name}
			if p := now.pods[k]; p != nil {
				e.pods[k] = p
			} else {
				delete(e.pods, k)
			}
		}
	}
	if len(services)+len(instances) > 0 {
		e.mesh = e.mesh.With(services, instances)
	}
	for _, s := range services {
		changed.Services = append(changed.Services, mesh.Name{Namespace: s.Namespace, Name: s.Name})
	}
	for n := range instances {
		changed.Instances = append(changed.Instances, n)
	}
	return e.mesh, changed, u.complete
}

// update is one Update.
type update struct {
	*Endpoints
	now      present
	complete bool
}

// present is what there is now of what a change names.
type present struct {
	slices map[key][]*discoveryv1.EndpointSlice
	pods   map[key]*corev1.Pod
}

func (e *Endpoints) read(c Change, in Objects) present {
	touched := make(map[key]bool, len(c.Services))
	for _, n := range c.Services {
		touched[key{n.Namespace, n.Name}] = true
	}
	out := present{map[key][]*discoveryv1.EndpointSlice{}, make(map[key]*corev1.Pod, len(in.Pods))}
	for _, o := range in.EndpointSlices {
		if k := sliceService(o); touched[k] {
			out.slices[k] = append(out.slices[k], o)
		}
	}
	for _, o := range in.Pods {
		out.pods[keyOf(o)] = o
	}
	return out
}

// affected are the pods of which the Instances may change: those of the change.
// That an EndpointSlice begins or ceases to name a pod makes no difference where
// its Service leads to the same port of it by its selector; where not, all is built
// anew, because other EndpointSlices may name it.
func (u *update) affected(c Change) map[key]bool {
	out := make(map[key]bool, len(c.Pods))
	for _, n := range c.Pods {
		out[key{n.Namespace, n.Name}] = true
	}
	for _, n := range c.Services {
		k := key{n.Namespace, n.Name}
		before, after := named(u.slices[k]), named(u.now.slices[k])
		for l := range before {
			if _, stays := after[l]; !stays {
				u.named(k, l)
			}
		}
		for l := range after {
			if _, was := before[l]; !was {
				u.named(k, l)
			}
		}
	}
	return out
}

// named notes that it has changed whether EndpointSlices of a Service lead to a
// port of a pod.
func (u *update) named(service key, l naming) {
	s := u.services[service]
	pd := u.now.pods[l.pod]
	if pd == nil {
		pd = u.pods[l.pod]
	}
	if s == nil || pd == nil || !hasProxy(pd) && !u.policed[service.namespace] {
		return
	}
	if selects(s.Spec.Selector, pd.Labels, nil) {
		for _, p := range s.Spec.Ports {
			if p.Name != l.name {
				continue
			}
			if n, ok := podPort(&port{Port: mesh.Port{Number: uint16(p.Port)}, target: p}, pd); ok && int32(n) == l.number {
				return
			}
		}
	}
	u.complete = false
}

// naming is a port of a pod that an EndpointSlice names.
type naming struct {
	pod    key
	name   string
	number int32
}

func named(in []*discoveryv1.EndpointSlice) map[naming]struct{} {
	out := map[naming]struct{}{}
	for _, s := range in {
		for _, ep := range s.Endpoints {
			t := ep.TargetRef
			if t == nil || t.Kind != kindPod {
				continue
			}
			for _, p := range s.Ports {
				if p.Port != nil {
					out[naming{key{s.Namespace, t.Name}, deref(p.Name, ""), *p.Port}] = struct{}{}
				}
			}
		}
	}
	return out
}

// build does as Build does, with what the change touches: the Services with their
// EndpointSlices and pods, and the pods with the Services that select them.
func (u *update) build(c Change, affected map[key]bool) *builder {
	b := newBuilder(u.opts)
	services, namespaces := map[key]*corev1.Service{}, map[string]*corev1.Namespace{}
	var endpointSlices []*discoveryv1.EndpointSlice
	for _, n := range c.Services {
		k := key{n.Namespace, n.Name}
		if s := u.services[k]; s != nil {
			services[k] = s
		}
		namespaces[k.namespace] = u.namespaces[k.namespace]
		endpointSlices = append(endpointSlices, u.now.slices[k]...)
	}
	for k := range affected {
		namespaces[k.namespace] = u.namespaces[k.namespace]
		pd := u.now.pods[k]
		if pd == nil {
			continue
		}
		for name, value := range pd.Labels {
			for _, s := range u.selecting[label{k.namespace, name, value}] {
				services[keyOf(s)] = s
			}
		}
	}
	b.addNamespaces(ordered(b, kindNamespace, slices.Collect(maps.Values(namespaces))))
	b.addPods(ordered(b, kindPod, slices.Collect(maps.Values(u.now.pods))))
	b.addServices(ordered(b, kindService, slices.Collect(maps.Values(services))))
	for k, s := range b.services {
		// Who has an address, all Services have agreed upon.
		if known := u.mesh.Service(mesh.Name{Namespace: k.namespace, Name: k.name}); known != nil {
			s.vips = known.VIPs
		}
	}
	b.addEndpointSlices(ordered(b, kindEndpointSlice, endpointSlices))
	b.sortEndpoints()
	b.addLeads()
	return b
}

// compareProblems looks whether the problems are those that are known.
func (u *update) compareProblems(b *builder, c Change, affected map[key]bool) {
	concerned := map[object3][]Problem{}
	for _, n := range c.Services {
		k := key{n.Namespace, n.Name}
		for _, o := range slices.Concat(u.slices[k], u.now.slices[k]) {
			concerned[object3{kindEndpointSlice, o.Namespace, o.Name}] = nil
		}
	}
	for k := range affected {
		concerned[object3{kindPod, k.namespace, k.name}] = nil
	}
	for _, p := range b.problems {
		k := object3{p.Kind, p.Namespace, p.Name}
		if _, ok := concerned[k]; ok {
			concerned[k] = append(concerned[k], p)
		}
	}
	for k, found := range concerned {
		if !slices.Equal(sortProblems(found), u.problems[k]) {
			u.complete = false
			return
		}
	}
}

func (u *update) updatedServices(b *builder, c Change) []mesh.Service {
	var out []mesh.Service
	for _, n := range c.Services {
		s := b.services[key{n.Namespace, n.Name}]
		old := u.mesh.Service(mesh.Name{Namespace: n.Namespace, Name: n.Name})
		if s == nil || old == nil || len(s.ports) != len(old.Ports) {
			continue // it is none for a mesh
		}
		next := *old
		differs := false
		next.Ports = slices.Clone(old.Ports)
		for i, p := range s.ports {
			q := &next.Ports[i]
			if slices.Equal(q.Endpoints, p.Endpoints) {
				continue
			}
			differs = true
			q.Endpoints = p.Endpoints
			if !slices.Equal(q.Identities, p.Identities) {
				q.Identities = p.Identities
			}
		}
		if differs {
			out = append(out, next)
		}
	}
	return out
}

func (u *update) updatedInstances(b *builder, affected map[key]bool) map[mesh.Name]*mesh.Instance {
	var out map[mesh.Name]*mesh.Instance
	set := func(k key, in *mesh.Instance) {
		if out == nil {
			out = map[mesh.Name]*mesh.Instance{}
		}
		out[mesh.Name{Namespace: k.namespace, Name: k.name}] = in
	}
	for k := range affected {
		old := u.mesh.Instance(mesh.Name{Namespace: k.namespace, Name: k.name})
		var now *mesh.Instance
		if pd := b.pods[k]; pd != nil && pd.proxied {
			one := pd.instance()
			now = &one
		}
		if u.policed[k.namespace] {
			// Which policies apply, and what is said of them, depends on what a pod is, not
			// on where and how it runs.
			if !sameTarget(u.pods[k], u.now.pods[k]) {
				u.complete = false
				continue
			}
			if old != nil && now != nil {
				now.Authorizations = old.Authorizations
			}
		}
		switch {
		case old == nil && now == nil:
		case old == nil || now == nil || !sameInstance(old, now):
			set(k, now)
		}
	}
	return out
}

// sameInstance compares two versions, whose policies are the same or taken over.
func sameInstance(a, b *mesh.Instance) bool {
	return a.Workload == b.Workload && a.ServiceAccount == b.ServiceAccount && a.MTLS == b.MTLS && len(a.Authorizations) == len(b.Authorizations) &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports)
}

// sameTarget says whether two versions of a pod, of which nil is none, are the same
// to policies.
func sameTarget(a, b *corev1.Pod) bool {
	ended := func(p *corev1.Pod) bool {
		return p == nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	}
	if ended(a) || ended(b) {
		return ended(a) && ended(b)
	}
	return maps.Equal(a.Labels, b.Labels) && maps.Equal(a.Annotations, b.Annotations) && equality.Semantic.DeepEqual(a.Spec, b.Spec)
}
