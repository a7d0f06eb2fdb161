package rebuild_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// history is a cluster in which things happen at random. It tells of changes as
// package kube does.
type history struct {
	r *rand.Rand

	mu       sync.Mutex
	objects  translate.Objects
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
	pods     map[types.NamespacedName]*corev1.Pod
	policies map[types.NamespacedName]*v1alpha1.AuthorizationPolicy
	changed  func(translate.Change)
}

func (h *history) Load() (translate.Objects, []translate.Problem) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := h.objects
	out.Services = slices.Collect(maps.Values(h.services))
	out.EndpointSlices = slices.Collect(maps.Values(h.slices))
	out.Pods = slices.Collect(maps.Values(h.pods))
	out.AuthorizationPolicies = slices.Collect(maps.Values(h.policies))
	return out, nil
}

func (h *history) Watch(context.Context, func()) error { panic("told of less than it could be") }

func (h *history) WatchChanges(ctx context.Context, changed func(translate.Change)) error {
	h.mu.Lock()
	h.changed = changed
	h.mu.Unlock()
	<-ctx.Done()
	return nil
}

func (h *history) LoadServices(names []types.NamespacedName) (out translate.Objects) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.slices {
		if !slices.Contains(names, serviceOf(s)) {
			continue
		}
		out.EndpointSlices = append(out.EndpointSlices, s)
		for _, e := range s.Endpoints {
			if e.TargetRef == nil {
				continue
			}
			if p := h.pods[types.NamespacedName{Namespace: s.Namespace, Name: e.TargetRef.Name}]; p != nil && !slices.Contains(out.Pods, p) {
				out.Pods = append(out.Pods, p)
			}
		}
	}
	return out
}

func (h *history) Pod(n types.NamespacedName) (*corev1.Pod, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, ok := h.pods[n]
	return p, ok
}

func serviceOf(s *discoveryv1.EndpointSlice) types.NamespacedName {
	return types.NamespacedName{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}
}

func (h *history) pick(of ...string) string { return of[h.r.IntN(len(of))] }

func (h *history) name(kind string, n int) types.NamespacedName {
	return types.NamespacedName{Namespace: h.pick("open", "policed"), Name: fmt.Sprintf("%s-%d", kind, h.r.IntN(n))}
}

// happen changes one thing, and returns what has to be told.
func (h *history) happen(rest bool) translate.Change {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch n := h.r.IntN(10); {
	case rest && n < 5:
		name := h.name("svc", 4)
		if s := h.service(name); h.r.IntN(8) > 0 {
			h.services[name] = s
		} else {
			delete(h.services, name)
		}
		return translate.Change{Rest: true}
	case rest:
		name := types.NamespacedName{Namespace: "policed", Name: h.pick("p", "q")}
		if h.r.IntN(4) > 0 {
			h.policies[name] = h.policy(name)
		} else {
			delete(h.policies, name)
		}
		return translate.Change{Rest: true}
	case n < 4:
		name := h.name("pod", 8)
		out := translate.Change{Pods: []types.NamespacedName{name}}
		if h.r.IntN(4) > 0 {
			h.pods[name] = h.pod(name)
		} else {
			delete(h.pods, name)
		}
		for _, s := range h.slices {
			for _, e := range s.Endpoints {
				if s.Namespace == name.Namespace && e.TargetRef != nil && e.TargetRef.Name == name.Name {
					out.Services = append(out.Services, serviceOf(s))
				}
			}
		}
		return out
	default:
		name := h.name("slice", 6)
		var out translate.Change
		if old := h.slices[name]; old != nil {
			out.Services = append(out.Services, serviceOf(old))
		}
		if h.r.IntN(8) == 0 {
			delete(h.slices, name)
			return out
		}
		h.slices[name] = h.slice(name)
		out.Services = append(out.Services, serviceOf(h.slices[name]))
		return out
	}
}

func (h *history) service(n types.NamespacedName) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name}}
	if h.r.IntN(4) > 0 {
		s.Spec.Selector = map[string]string{"app": h.pick("a", "b")}
	}
	if h.r.IntN(3) > 0 {
		s.Spec.ClusterIPs = []string{fmt.Sprintf("10.9.0.%d", h.r.IntN(4))} // at times another's, at times an endpoint's
	}
	s.Spec.PublishNotReadyAddresses = h.r.IntN(8) == 0
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}}
	if h.r.IntN(2) == 0 {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: h.pick("tcp", "x", "grpc"), Port: 81, TargetPort: intstr.FromString("named")})
	}
	return s
}

func (h *history) policy(n types.NamespacedName) *v1alpha1.AuthorizationPolicy {
	p := &v1alpha1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name}}
	ref := gatewayv1.LocalPolicyTargetReferenceWithSectionName{}
	ref.Kind, ref.Name = "Namespace", gatewayv1.ObjectName(n.Namespace)
	if h.r.IntN(2) == 0 {
		ref.Kind, ref.Name = "Service", gatewayv1.ObjectName(fmt.Sprintf("svc-%d", h.r.IntN(4)))
	}
	p.Spec.TargetRefs = append(p.Spec.TargetRefs, ref)
	return p
}

func (h *history) pod(n types.NamespacedName) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name, Labels: map[string]string{"app": h.pick("a", "a", "b", "c")}}}
	if old := h.pods[n]; old != nil && h.r.IntN(2) == 0 {
		p = old.DeepCopy() // only what changes while it runs
	} else {
		p.Spec.ServiceAccountName = h.pick("", "web", "web", "cart", "not a name")
		p.Spec.Containers = []corev1.Container{{Name: "app", Ports: []corev1.ContainerPort{{Name: h.pick("named", "other"), ContainerPort: int32(9090 + h.r.IntN(2))}}}}
		p.Annotations = map[string]string{}
		if h.r.IntN(4) > 0 {
			p.Annotations["outrigger.dev/status"] = "injected"
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "outrigger-proxy"})
		}
		if h.r.IntN(4) == 0 {
			p.Annotations["outrigger.dev/mtls"] = h.pick("off", "strict", "nonsense")
		}
		if h.r.IntN(4) == 0 {
			p.Annotations["outrigger.dev/exclude-inbound-ports"] = h.pick("8080", "x")
		}
	}
	p.Status.Phase = corev1.PodPhase(h.pick("Running", "Running", "Running", "Pending", "Failed"))
	p.Status.PodIP = fmt.Sprintf("10.9.0.%d", h.r.IntN(6))
	return p
}

func (h *history) slice(n types.NamespacedName) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: n.Namespace, Name: n.Name, Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("svc-%d", h.r.IntN(5))}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	if old := h.slices[n]; old != nil && h.r.IntN(3) > 0 {
		s.Labels = old.Labels
	}
	for _, name := range []string{"http", h.pick("tcp", "x", "grpc")} {
		number := int32(8080 + h.r.IntN(2)*1010)
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &number})
	}
	for range h.r.IntN(5) {
		ready, leaving := h.r.IntN(4) > 0, h.r.IntN(6) == 0
		e := discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.9.0.%d", h.r.IntN(8))},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Terminating: &leaving},
		}
		if h.r.IntN(20) == 0 {
			e.Addresses[0] = "nowhere"
		}
		if h.r.IntN(5) > 0 {
			e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: fmt.Sprintf("pod-%d", h.r.IntN(8))}
		}
		zone := h.pick("", "z1", "z2")
		e.Zone = &zone
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// nodes are Envoys with views of all kinds.
func nodes() []xds.EnvoyNode {
	var out []xds.EnvoyNode
	for i, ns := range []string{"open", "policed"} {
		out = append(out,
			xds.EnvoyNode{Namespace: ns, Workload: "w", Certificates: i == 0},
			xds.EnvoyNode{Namespace: ns, Workload: "w", Certificates: true, Capture: true, Instance: "pod-0", ServiceAccount: "web"},
		)
	}
	return out
}

// sink serves what is published, and looks after each step whether it is what
// would be built from nothing.
type sink struct {
	t      *testing.T
	server *discovery.Server
	sets   map[xds.DataPlane]*xds.Set
	views  []*xds.EnvoyView
}

func (s *sink) Replace(m *mesh.Mesh, seen time.Time) error {
	for _, dp := range xds.DataPlanes() {
		set, err := xds.Build(m, dp, s.sets[dp])
		if err != nil {
			return err
		}
		s.sets[dp] = set
	}
	s.views = nil
	for _, n := range nodes() {
		v, err := s.sets[xds.Envoy].EnvoyView(n, nil)
		if err != nil {
			return err
		}
		s.views = append(s.views, v)
	}
	return s.server.Replace(m, seen)
}

func (s *sink) Update(m *mesh.Mesh, c mesh.Change, seen time.Time) error {
	for _, dp := range xds.DataPlanes() {
		before := s.sets[dp].Clone()
		u, err := s.sets[dp].Prepare(m, c)
		if err != nil {
			return err
		}
		var same []bool
		for i, n := range nodes() {
			same = append(same, !u.Views(n, s.views[i]))
		}
		told := u.Commit()
		for _, typeURL := range xds.TypeURLs() {
			was, is := before.Of(typeURL), s.sets[dp].Of(typeURL)
			for name := range union(was, is) {
				if a, b := was[name], is[name]; (a == nil || b == nil || a.Version != b.Version) && !slices.Contains(told[typeURL], name) {
					s.t.Errorf("%s: %s has changed, and nobody was told", dp, name)
				}
			}
		}
		if dp != xds.Envoy {
			continue
		}
		for i, n := range nodes() {
			v, err := s.sets[dp].EnvoyView(n, s.views[i])
			if err != nil {
				return err
			}
			if same[i] && !v.Equal(s.views[i]) {
				s.t.Errorf("the view of %+v has changed, and nobody was told", n)
			}
			s.views[i] = v
		}
	}
	return s.server.Update(m, c, seen)
}

func union(a, b xds.Resources) xds.Resources {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

// check compares with what is built from nothing.
func (s *sink) check(m *mesh.Mesh) {
	s.t.Helper()
	served := s.server.Sets()
	for _, dp := range xds.DataPlanes() {
		want, err := xds.Build(m, dp, nil)
		if err != nil {
			s.t.Fatal(err)
		}
		for which, got := range map[string]*xds.Set{"updated": s.sets[dp], "served": served[dp]} {
			if got.Version() == want.Version() {
				continue
			}
			for _, typeURL := range xds.TypeURLs() {
				for name := range union(got.Of(typeURL), want.Of(typeURL)) {
					g, w := got.Of(typeURL)[name], want.Of(typeURL)[name]
					if g == nil || w == nil || g.Version != w.Version {
						s.t.Errorf("%s, %s: %s differs: %v, want %v", dp, which, name, g, w)
					}
				}
			}
		}
		if dp != xds.Envoy {
			continue
		}
		for i, n := range nodes() {
			v, err := want.EnvoyView(n, nil)
			if err != nil {
				s.t.Fatal(err)
			}
			if !v.Equal(s.views[i]) {
				s.t.Errorf("the view of %+v differs", n)
			}
		}
	}
}

// Whatever happens, and whichever way it goes, there is in the end what a build
// from nothing makes of the same objects.
func TestHistories(t *testing.T) {
	histories, steps := 10, 40
	if testing.Short() {
		histories = 3
	}
	updates, builds := 0.0, 0.0
	for seed := range histories {
		synctest.Test(t, func(t *testing.T) {
			h := &history{
				r:        rand.New(rand.NewPCG(uint64(seed), 11)),
				services: map[types.NamespacedName]*corev1.Service{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{},
				pods: map[types.NamespacedName]*corev1.Pod{}, policies: map[types.NamespacedName]*v1alpha1.AuthorizationPolicy{},
			}
			for _, ns := range []string{"open", "policed"} {
				o := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}
				if h.r.IntN(3) == 0 {
					o.Labels = map[string]string{"outrigger.dev/mtls": h.pick("off", "strict", "nonsense")}
				}
				h.objects.Namespaces = append(h.objects.Namespaces, o)
			}
			for range 60 {
				h.happen(h.r.IntN(3) == 0)
			}
			log := slog.New(slog.NewTextHandler(&bytes.Buffer{}, nil))
			registry := prometheus.NewRegistry()
			s := &sink{t: t, server: discovery.New(discovery.Options{Log: log, Registry: registry}), sets: map[xds.DataPlane]*xds.Set{}}
			l := rebuild.New(rebuild.Options{Source: h, Publisher: s, Log: log, Registry: registry})
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- l.Run(ctx) }()
			synctest.Wait()
			for step := range steps {
				for range 1 + h.r.IntN(3) {
					h.changed(h.happen(h.r.IntN(12) == 0))
					time.Sleep(time.Duration(h.r.IntN(30)) * time.Millisecond)
				}
				time.Sleep(2 * rebuild.AtMost)
				synctest.Wait()
				want, got := rebuild.Build(h, ""), l.State()
				if !reflect.DeepEqual(got.Mesh, want.Mesh) {
					t.Fatalf("seed %d, step %d: the mesh differs:\n%s", seed, step, cmp.Diff(want.Mesh, got.Mesh, cmpopts.EquateComparable()))
				}
				if got.Version != want.Version {
					t.Errorf("seed %d, step %d: version %s, want %s", seed, step, got.Version, want.Version)
				}
				if !reflect.DeepEqual(got.Problems, want.Problems) || !reflect.DeepEqual(got.Statuses, want.Statuses) {
					t.Errorf("seed %d, step %d: what is said differs:\n%s%s", seed, step, cmp.Diff(want.Problems, got.Problems), cmp.Diff(want.Statuses, got.Statuses))
				}
				if s.check(got.Mesh); t.Failed() {
					t.Fatalf("seed %d, step %d", seed, step)
				}
			}
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			updates += counter(t, registry, "outrigger_rebuild_updates_total", "published")
			builds += counter(t, registry, "outrigger_rebuild_total", "published")
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("%v updates of endpoints, %v builds", updates, builds)
	if updates < float64(histories*steps)/8 || builds < float64(histories*steps)/10 {
		t.Error("one of the ways is hardly gone")
	}
}

func counter(t *testing.T, g prometheus.Gatherer, name, result string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == result {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}
