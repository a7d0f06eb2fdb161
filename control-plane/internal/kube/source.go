package kube

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// Change is what WatchChanges tells.
type Change = translate.Change

// Source is the cluster's objects as rebuild.Source wants them. Its methods are
// safe for concurrent use. It has its own maps beside the informers' stores: for
// the indices, and because it goes on with what it had where a kind cannot be read
// any more.
type Source struct {
	c *Cluster

	mu     sync.RWMutex
	tables map[string]*table
	// slicesOf are the EndpointSlices of a Service, slicesWith those that name a
	// pod.
	slicesOf, slicesWith map[types.NamespacedName]set
	// meshed counts the pods of a namespace that have a proxy or ask for one.
	meshed map[string]int
	// version counts changes, loaded is the one of the last Load.
	version, loaded uint64
	watchers        map[*watcher]bool

	synced     chan struct{} // closed once every kind is known
	syncedOnce sync.Once
}

type set map[types.NamespacedName]bool

// table is all objects of one kind.
type table struct {
	kind
	rows map[types.NamespacedName]row
	// life counts the informers that the kind has had. Rows of an earlier one are
	// dropped when the present one has synced.
	life   int
	state  state
	absent string // why; where state is absent
	failed error  // of the last request; nil where it went well
}

type row struct {
	object client.Object
	life   int
}

type state int

const (
	unknown state = iota // nobody has looked yet
	absent               // its CRD is missing, or another version of it
	reading
	known
)

func newSource(c *Cluster) *Source {
	s := &Source{
		c: c, tables: map[string]*table{}, slicesOf: map[types.NamespacedName]set{}, slicesWith: map[types.NamespacedName]set{},
		meshed: map[string]int{}, watchers: map[*watcher]bool{}, synced: make(chan struct{}),
	}
	for _, k := range kinds() {
		s.tables[k.gvk.Kind] = &table{kind: k, rows: map[types.NamespacedName]row{}}
	}
	return s
}

// WaitSynced waits until all objects of all kinds that there are have been read.
// Before that Load returns only some, and nothing must be built from them. It
// reports false where ctx ends first.
func (s *Source) WaitSynced(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-s.synced:
		return true
	}
}

// Ready says which kinds WaitSynced waits for; nil where for none. It stays nil
// when the API server goes away: there is a last state.
func (s *Source) Ready() error {
	select {
	case <-s.synced:
		return nil
	default:
	}
	if err := s.c.contact.state(); err != nil {
		return fmt.Errorf("the API server cannot be reached: %w", err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	var open []string
	for name, t := range s.tables {
		switch {
		case !s.open(t):
		case t.failed != nil:
			open = append(open, fmt.Sprintf("%s (%v)", name, t.failed))
		default:
			open = append(open, name)
		}
	}
	slices.Sort(open)
	return fmt.Errorf("not read yet: %s", strings.Join(open, ", "))
}

// open says that it is not known yet which objects of a kind there are.
func (s *Source) open(t *table) bool { return s.needed(t) && t.state != known && t.state != absent }

// Load implements rebuild.Source. The objects are shared and trimmed; nobody may
// change them. Their order is not defined.
func (s *Source) Load() (translate.Objects, []translate.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loaded = s.version
	out := translate.Objects{
		Namespaces:            all[*corev1.Namespace](s.tables[kindNamespace]),
		Services:              all[*corev1.Service](s.tables["Service"]),
		EndpointSlices:        all[*discoveryv1.EndpointSlice](s.tables[kindEndpointSlice]),
		Pods:                  all[*corev1.Pod](s.tables[kindPod]),
		HTTPRoutes:            all[*gatewayv1.HTTPRoute](s.tables["HTTPRoute"]),
		GRPCRoutes:            all[*gatewayv1.GRPCRoute](s.tables["GRPCRoute"]),
		TLSRoutes:             all[*gatewayv1.TLSRoute](s.tables["TLSRoute"]),
		ReferenceGrants:       all[*gatewayv1.ReferenceGrant](s.tables["ReferenceGrant"]),
		CircuitBreakers:       all[*v1alpha1.CircuitBreaker](s.tables["CircuitBreaker"]),
		RetryPolicies:         all[*v1alpha1.RetryPolicy](s.tables["RetryPolicy"]),
		AuthorizationPolicies: all[*v1alpha1.AuthorizationPolicy](s.tables["AuthorizationPolicy"]),
	}
	return out, s.problems()
}

func all[P client.Object](t *table) []P {
	if t == nil {
		return nil
	}
	out := make([]P, 0, len(t.rows))
	for _, r := range t.rows {
		if p, ok := r.object.(P); ok {
			out = append(out, p)
		}
	}
	return out
}

// LoadServices is Load for some Services only, as Change names them: those that
// exist, their EndpointSlices, the pods that these name, and the namespaces of the
// Services. It costs what it returns.
func (s *Source) LoadServices(names []types.NamespacedName) translate.Objects {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out translate.Objects
	namespaces, pods := set{}, set{}
	for _, name := range names {
		if o, ok := get[*corev1.Service](s, "Service", name); ok {
			out.Services = append(out.Services, o)
		}
		for slice := range s.slicesOf[name] {
			o, ok := get[*discoveryv1.EndpointSlice](s, kindEndpointSlice, slice)
			if !ok {
				continue
			}
			out.EndpointSlices = append(out.EndpointSlices, o)
			for pod := range podsOf(o) {
				pods[pod] = true
			}
		}
		namespaces[types.NamespacedName{Name: name.Namespace}] = true
	}
	for name := range pods {
		if o, ok := get[*corev1.Pod](s, kindPod, name); ok {
			out.Pods = append(out.Pods, o)
		}
	}
	for name := range namespaces {
		if o, ok := get[*corev1.Namespace](s, kindNamespace, name); ok {
			out.Namespaces = append(out.Namespaces, o)
		}
	}
	return out
}

// Pod returns what is known of one.
func (s *Source) Pod(name types.NamespacedName) (*corev1.Pod, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return get[*corev1.Pod](s, kindPod, name)
}

func get[P client.Object](s *Source, kind string, name types.NamespacedName) (P, bool) {
	p, ok := s.tables[kind].rows[name].object.(P)
	return p, ok
}

// Watch implements rebuild.Source. Events that change nothing of what is kept
// are not told.
func (s *Source) Watch(ctx context.Context, changed func()) error {
	return s.WatchChanges(ctx, func(Change) { changed() })
}

// WatchChanges is Watch for those who can do with less than a Load. It calls
// changed from the goroutine that called it. When it does, Load and LoadServices
// return at least what is told; changes that come while changed runs are told
// together afterwards. What differs from the last Load is told at once, as Rest.
func (s *Source) WatchChanges(ctx context.Context, changed func(Change)) error {
	w := &watcher{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	s.watchers[w] = true
	if s.version != s.loaded {
		w.add(Change{Rest: true})
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, w)
	}()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.wake:
			changed(w.take())
		}
	}
}

// watcher gathers what has not been told yet: at most each Service and pod once.
type watcher struct {
	wake chan struct{}

	mu             sync.Mutex
	rest           bool
	services, pods set
}

func (w *watcher) add(c Change) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = w.rest || c.Rest
	if w.services == nil {
		w.services, w.pods = set{}, set{}
	}
	for _, n := range c.Services {
		w.services[n] = true
	}
	for _, n := range c.Pods {
		w.pods[n] = true
	}
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() Change {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := Change{Rest: w.rest, Services: sorted(w.services), Pods: sorted(w.pods)}
	w.rest, w.services, w.pods = false, nil, nil
	return c
}

func sorted(in set) []types.NamespacedName {
	return slices.SortedFunc(maps.Keys(in), func(a, b types.NamespacedName) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

// tell is called with mu held, after the change.
func (s *Source) tell(c Change) {
	s.version++
	for w := range s.watchers {
		w.add(c)
	}
}

// put takes an object, or its absence where o is nil.
func (s *Source) put(t *table, life int, name types.NamespacedName, o client.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.life != life {
		return // of an informer that is being stopped
	}
	old, had := t.rows[name]
	if o == nil {
		delete(t.rows, name)
	} else {
		t.rows[name] = row{o, life}
	}
	effect := "changed"
	if o == nil && !had || o != nil && had && t.same(old.object, o) {
		effect = "unchanged"
	}
	s.c.metrics.events.WithLabelValues(t.gvk.Kind, effect).Inc()
	if effect == "changed" {
		s.moved(t, name, old.object, o)
	}
}

// moved brings the indices up to date and tells. Either object may be nil.
func (s *Source) moved(t *table, name types.NamespacedName, old, now client.Object) {
	if r := s.c.roots; r != nil && t.gvk.Kind != kindEndpointSlice {
		r.look(t, name, old, now)
	}
	switch t.gvk.Kind {
	case kindEndpointSlice:
		s.tell(s.movedSlice(name, old, now))
	case kindPod:
		if s.meshed[name.Namespace] += meshed(now) - meshed(old); s.meshed[name.Namespace] == 0 {
			delete(s.meshed, name.Namespace)
		}
		c := Change{Pods: []types.NamespacedName{name}}
		for slice := range s.slicesWith[name] {
			if o, ok := get[*discoveryv1.EndpointSlice](s, kindEndpointSlice, slice); ok {
				if service, ok := serviceOf(o); ok {
					c.Services = append(c.Services, service)
				}
			}
		}
		s.tell(c)
	default:
		if t.mesh {
			s.tell(Change{Rest: true})
		}
	}
}

func (s *Source) movedSlice(name types.NamespacedName, old, now client.Object) Change {
	var c Change
	side := func(o client.Object, change func(index map[types.NamespacedName]set, key types.NamespacedName)) {
		slice, ok := o.(*discoveryv1.EndpointSlice)
		if !ok {
			return
		}
		if service, ok := serviceOf(slice); ok {
			c.Services = append(c.Services, service)
			change(s.slicesOf, service)
		} else {
			c.Rest = true // it is nobody's, which is a Problem
		}
		for pod := range podsOf(slice) {
			change(s.slicesWith, pod)
		}
	}
	side(old, func(index map[types.NamespacedName]set, key types.NamespacedName) {
		if delete(index[key], name); len(index[key]) == 0 {
			delete(index, key)
		}
	})
	side(now, func(index map[types.NamespacedName]set, key types.NamespacedName) {
		if index[key] == nil {
			index[key] = set{}
		}
		index[key][name] = true
	})
	return c
}

func serviceOf(s *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name, ok := s.Labels[discoveryv1.LabelServiceName]
	return types.NamespacedName{Namespace: s.Namespace, Name: name}, ok && name != ""
}

func podsOf(s *discoveryv1.EndpointSlice) set {
	out := set{}
	for _, e := range s.Endpoints {
		if r := e.TargetRef; r != nil && r.Kind == kindPod {
			out[types.NamespacedName{Namespace: cmp.Or(r.Namespace, s.Namespace), Name: r.Name}] = true
		}
	}
	return out
}
