package kube_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) {
	kube.RouteLogs(slog.New(slog.DiscardHandler))
	testbed.Main(m, func(s *testbed.Server) { server = s })
}

// patience is for what takes a moment on a machine that is busy.
const patience = 60 * time.Second

// eventually polls until ok returns "", which else says what is missing.
func eventually(t *testing.T, ok func() string) {
	t.Helper()
	missing := ""
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if missing = ok(); missing == "" {
			return
		}
	}
	t.Fatalf("after %s: %s", patience, missing)
}

// output is a log that the test reads while others write it.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) count(text string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Count(o.b.String(), text)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// rig is a cluster that runs, and an administrator's hand in it.
type rig struct {
	*kube.Cluster
	admin    client.Client
	registry *prometheus.Registry
	log      *output
	ns       string
	start    func()

	publisher rebuild.Publisher // of replicas; nil is nowhere
}

var namespaces int

// prepare connects, and runs nothing before start.
func prepare(t *testing.T, change ...func(*rest.Config)) *rig {
	t.Helper()
	config := rest.CopyConfig(server.Need(t).Config)
	before := goleak.IgnoreCurrent()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, gatewayv1.Install, v1alpha1.AddToScheme, apiextensionsv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	web, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, func() string {
			utilnet.CloseIdleConnectionsFor(web.Transport) // streams that have just ended count as idle a little later
			if err := goleak.Find(before, goleak.IgnoreAnyFunction("os/exec.(*Cmd).Start.func2"), goleak.IgnoreAnyFunction("os/exec.(*Cmd).Wait")); err != nil {
				return err.Error()
			}
			return ""
		})
	})
	r := &rig{registry: prometheus.NewRegistry(), log: &output{}}
	if r.admin, err = client.New(config, client.Options{HTTPClient: web, Scheme: scheme}); err != nil {
		t.Fatal(err)
	}
	namespaces++
	r.ns = fmt.Sprintf("t%d-%d", namespaces, time.Now().UnixNano()%1e6)
	r.create(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: r.ns}})
	for _, c := range change {
		c(config)
	}
	r.Cluster, err = kube.Connect(kube.Options{
		Config: config, Namespace: r.ns, Registry: r.registry, Log: slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	r.start = func() {
		ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		t.Cleanup(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
			if t.Failed() {
				t.Log(r.log)
			}
		})
	}
	return r
}

// run is a rig that has read everything.
func run(t *testing.T, change ...func(*rest.Config)) *rig {
	t.Helper()
	r := prepare(t, change...)
	r.start()
	r.wait(t)
	return r
}

func (r *rig) wait(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if !r.Source().WaitSynced(ctx) {
		t.Fatalf("%v\n%s", r.Source().Ready(), r.log)
	}
}

func (r *rig) create(t *testing.T, objects ...client.Object) {
	t.Helper()
	for _, o := range objects {
		if err := r.admin.Create(t.Context(), o); err != nil {
			t.Fatalf("%T %s: %v", o, o.GetName(), err)
		}
	}
}

// change reads, changes and writes an object, as long as others interfere.
func change[P client.Object](t *testing.T, r *rig, o P, f func(P)) {
	t.Helper()
	eventually(t, func() string {
		if err := r.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			t.Fatal(err)
		}
		f(o)
		err := r.admin.Update(t.Context(), o)
		if apierrors.IsConflict(err) {
			return err.Error()
		}
		if err != nil {
			t.Fatal(err)
		}
		return ""
	})
}

func (r *rig) name(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: r.ns, Name: name}
}

func (r *rig) meta(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: r.ns, Name: name}
}

func (r *rig) service(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: r.meta(name), Spec: corev1.ServiceSpec{
		Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
	}}
}

// slice is one of a Service with an endpoint at each address; an address of the
// form ip=pod is a pod's.
func (r *rig) slice(name, service string, addresses ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: r.meta(name), AddressType: discoveryv1.AddressTypeIPv4}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	s.Endpoints = []discoveryv1.Endpoint{}
	for _, a := range addresses {
		ip, pod, ok := strings.Cut(a, "=")
		e := discoveryv1.Endpoint{Addresses: []string{ip}}
		if ok {
			e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: r.ns, Name: pod}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

func (r *rig) pod(name, account string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: r.meta(name), Spec: corev1.PodSpec{
		ServiceAccountName: account, Containers: []corev1.Container{{Name: "app", Image: "example.com/app:1"}},
	}}
}

// metric is the value of a metric with these labels, as "name value" pairs.
func (r *rig) metric(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	families, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if slices.EqualFunc(m.GetLabel(), labels, func(p *dto.LabelPair, l string) bool { return p.GetName()+"="+p.GetValue() == l }) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// changes gathers what is told until the test ends.
type changes struct {
	mu  sync.Mutex
	all []kube.Change
	at  []time.Time
}

func (r *rig) watch(t *testing.T) *changes {
	t.Helper()
	c := &changes{}
	r.Source().Load()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() {
		done <- r.Source().WatchChanges(ctx, func(change kube.Change) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.all, c.at = append(c.all, change), append(c.at, time.Now())
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("WatchChanges: %v", err)
		}
	})
	return c
}

// since is everything that has been told, as one, and when the first of it was.
func (c *changes) since() (out kube.Change, first time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, x := range c.all {
		if i == 0 {
			first = c.at[0]
		}
		out.Rest = out.Rest || x.Rest
		out.Services, out.Pods = append(out.Services, x.Services...), append(out.Pods, x.Pods...)
	}
	for _, names := range []*[]types.NamespacedName{&out.Services, &out.Pods} {
		slices.SortFunc(*names, func(a, b types.NamespacedName) int { return strings.Compare(a.String(), b.String()) })
		*names = slices.Compact(*names)
	}
	return out, first
}

func (c *changes) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all, c.at = nil, nil
}

// crds reads those of a folder of ours or of the Gateway API.
func crds(t *testing.T, names ...string) []*apiextensionsv1.CustomResourceDefinition {
	t.Helper()
	var out []*apiextensionsv1.CustomResourceDefinition
	for _, name := range names {
		dir := "../../../deploy/crds"
		if strings.HasPrefix(name, gatewayv1.GroupName) {
			module, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
			if err != nil {
				t.Fatalf("where is the Gateway API: %v", err)
			}
			dir = filepath.Join(strings.TrimSpace(string(module)), "config/crd/standard")
		}
		text, err := os.ReadFile(filepath.Join(dir, name+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(text, crd); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out = append(out, crd)
	}
	return out
}

// install creates CRDs that are not there.
func (r *rig) install(t *testing.T, names ...string) {
	t.Helper()
	for _, crd := range crds(t, names...) {
		if err := r.admin.Create(t.Context(), crd); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
}

func (r *rig) uninstall(t *testing.T, names ...string) {
	t.Helper()
	for _, crd := range crds(t, names...) {
		if err := r.admin.Delete(t.Context(), crd); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() string {
			if err := r.admin.Get(t.Context(), client.ObjectKeyFromObject(crd), &apiextensionsv1.CustomResourceDefinition{}); !apierrors.IsNotFound(err) {
				return "CRD " + crd.Name + " is still there"
			}
			return ""
		})
	}
}

const (
	crdBreaker   = "outrigger.dev_circuitbreakers"
	crdHTTPRoute = "gateway.networking.k8s.io_httproutes"
)

func breaker(r *rig, name string) *v1alpha1.CircuitBreaker {
	return &v1alpha1.CircuitBreaker{ObjectMeta: r.meta(name), Spec: v1alpha1.CircuitBreakerSpec{
		TargetRefs: []gatewayv1.LocalPolicyTargetReferenceWithSectionName{{LocalPolicyTargetReference: gatewayv1.LocalPolicyTargetReference{Kind: "Service", Name: "payments"}}},
		Trip:       &v1alpha1.Trip{ConsecutiveFailures: 5},
	}}
}

// problem returns the message about a CRD, or "".
func (r *rig) problem(crd string) string {
	_, problems := r.Source().Load()
	for _, p := range problems {
		if p.Kind == "CustomResourceDefinition" && p.Name == crd {
			return p.Message
		}
	}
	return ""
}

// A cluster without our CRDs is one without policies, and says so; they are found
// when they come, and missed when they go. A version that cannot be read is named.
func TestCRDsComeAndGo(t *testing.T) {
	r := run(t)
	for _, crd := range []string{"circuitbreakers.outrigger.dev", "retrypolicies.outrigger.dev", "authorizationpolicies.outrigger.dev"} {
		if m := r.problem(crd); !strings.Contains(m, "outrigger install") {
			t.Errorf("%s: %q", crd, m)
		}
	}
	if m := r.problem("tlsroutes.gateway.networking.k8s.io"); !strings.Contains(m, "Gateway API") {
		t.Errorf("%q", m)
	}
	if v := r.metric(t, "outrigger_kube_synced", "kind=CircuitBreaker"); v != 0 {
		t.Errorf("synced %v", v)
	}
	told := r.watch(t)
	r.install(t, crdBreaker)
	begin := time.Now()
	eventually(t, func() string { return r.problem("circuitbreakers.outrigger.dev") })
	t.Logf("found after %s", time.Since(begin).Round(10*time.Millisecond))
	eventually(t, func() string {
		if c, _ := told.since(); !c.Rest {
			return "nobody was told of the CRD"
		}
		return ""
	})
	r.create(t, breaker(r, "payments"))
	eventually(t, func() string {
		in, _ := r.Source().Load()
		if len(in.CircuitBreakers) != 1 || in.CircuitBreakers[0].Name != "payments" {
			return fmt.Sprint(len(in.CircuitBreakers), " breakers")
		}
		return ""
	})
	if v := r.metric(t, "outrigger_kube_synced", "kind=CircuitBreaker"); v != 1 {
		t.Errorf("synced %v", v)
	}
	r.uninstall(t, crdBreaker)
	eventually(t, func() string {
		in, _ := r.Source().Load()
		if r.problem("circuitbreakers.outrigger.dev") == "" || len(in.CircuitBreakers) != 0 {
			return fmt.Sprint("the CRD is gone, and there are ", len(in.CircuitBreakers), " breakers")
		}
		return ""
	})
	r.install(t, crdBreaker) // and again
	eventually(t, func() string { return r.problem("circuitbreakers.outrigger.dev") })

	// What was read stays in force while another version is served only.
	r.install(t, crdHTTPRoute)
	eventually(t, func() string { return r.problem("httproutes.gateway.networking.k8s.io") })
	r.create(t, &gatewayv1.HTTPRoute{ObjectMeta: r.meta("split")})
	eventually(t, func() string {
		if in, _ := r.Source().Load(); len(in.HTTPRoutes) != 1 {
			return "no route"
		}
		return ""
	})
	route := crds(t, crdHTTPRoute)[0]
	serve := func(v1 bool) {
		change(t, r, route, func(c *apiextensionsv1.CustomResourceDefinition) {
			for i := range c.Spec.Versions {
				if c.Spec.Versions[i].Name == "v1" {
					c.Spec.Versions[i].Served = v1
				}
			}
		})
	}
	serve(false)
	eventually(t, func() string {
		if m := r.problem(route.Name); !strings.Contains(m, "served in v1beta1 only, and v1 is needed") {
			return m + " (want it to name v1beta1)"
		}
		return ""
	})
	if in, _ := r.Source().Load(); len(in.HTTPRoutes) != 1 {
		t.Errorf("%d routes in force", len(in.HTTPRoutes))
	}
	serve(true)
	eventually(t, func() string { return r.problem(route.Name) })
	if in, _ := r.Source().Load(); len(in.HTTPRoutes) != 1 {
		t.Errorf("%d routes in force", len(in.HTTPRoutes))
	}
	// What went meanwhile is gone when v1 is there again.
	serve(false)
	eventually(t, func() string {
		if r.problem(route.Name) == "" {
			return "nobody misses v1"
		}
		return ""
	})
	old := &unstructured.Unstructured{}
	old.SetGroupVersionKind(schema.GroupVersionKind{Group: gatewayv1.GroupName, Version: "v1beta1", Kind: "HTTPRoute"})
	old.SetNamespace(r.ns)
	old.SetName("split")
	eventually(t, func() string {
		if err := r.admin.Delete(t.Context(), old); err != nil && !apierrors.IsNotFound(err) {
			return err.Error()
		}
		return ""
	})
	serve(true)
	eventually(t, func() string {
		if in, _ := r.Source().Load(); len(in.HTTPRoutes) != 0 || r.problem(route.Name) != "" {
			return fmt.Sprint(len(in.HTTPRoutes), " routes, ", r.problem(route.Name))
		}
		return ""
	})
}

// Of a pod that which a mesh is made of is kept, and completed pods do not count.
func TestPodsAreTrimmed(t *testing.T) {
	r := run(t)
	yes, always := true, corev1.ContainerRestartPolicyAlways
	pod := r.pod("payments-1", "payments")
	pod.Labels = map[string]string{"app": "payments"}
	pod.Annotations = map[string]string{"outrigger.dev/status": "injected", "example.com/large": strings.Repeat("x", 1000), translate.SourceAnnotation: "forged.yaml:1"}
	pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "payments", UID: "1", Controller: &yes, BlockOwnerDeletion: &yes}}
	pod.GenerateName = "payments-5d4f-"
	pod.Finalizers = []string{"example.com/hold"}
	pod.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "SECRET", Value: "s3cr3t"}}
	pod.Spec.InitContainers = []corev1.Container{{Name: "outrigger-proxy", Image: "outrigger/sidecar", RestartPolicy: &always}}
	pod.Spec.Volumes = []corev1.Volume{{Name: "tmp"}}
	r.create(t, pod)
	pod.Status = corev1.PodStatus{
		Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}, HostIP: "10.1.0.1",
		Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
	}
	if err := r.admin.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	var got *corev1.Pod
	eventually(t, func() string {
		var ok bool
		if got, ok = r.Source().Pod(r.name("payments-1")); !ok || got.Status.PodIP == "" {
			return "the pod has no address"
		}
		return ""
	})
	want := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: r.ns, Name: "payments-1", GenerateName: "payments-5d4f-", UID: pod.UID, ResourceVersion: pod.ResourceVersion, Generation: pod.Generation, CreationTimestamp: pod.CreationTimestamp,
			Labels: map[string]string{"app": "payments"}, Annotations: map[string]string{"outrigger.dev/status": "injected"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "payments", Controller: &yes}},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: "payments",
			InitContainers:     []corev1.Container{{Name: "outrigger-proxy", RestartPolicy: &always}},
			Containers:         []corev1.Container{{Name: "app", Ports: pod.Spec.Containers[0].Ports}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	pod.Status.Phase = corev1.PodSucceeded
	if err := r.admin.Status().Update(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if _, ok := r.Source().Pod(r.name("payments-1")); ok {
			return "the completed pod is still there"
		}
		return ""
	})
	change(t, r, pod, func(p *corev1.Pod) { p.Finalizers = nil })
}

// What changes nothing that is read is not told: heartbeats, other people's
// annotations, what kubectl and controllers leave behind.
func TestNothingIsToldOfNothing(t *testing.T) {
	r := prepare(t)
	r.install(t, crdBreaker)
	eventually(t, func() string {
		err := r.admin.Create(t.Context(), breaker(r, "payments"))
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return err.Error()
		}
		return ""
	})
	r.start()
	r.wait(t)
	service, slice, pod, namespace := r.service("payments"), r.slice("payments-a", "payments", "10.0.0.1=payments-1"), r.pod("payments-1", "payments"), &corev1.Namespace{}
	r.create(t, service, slice, pod)
	eventually(t, func() string {
		in := r.Source().LoadServices([]types.NamespacedName{r.name("payments")})
		if len(in.Services)+len(in.EndpointSlices)+len(in.Pods)+len(in.Namespaces) != 4 {
			return "not all is there yet"
		}
		return ""
	})
	if err := r.admin.Get(t.Context(), types.NamespacedName{Name: r.ns}, namespace); err != nil {
		t.Fatal(err)
	}
	told := r.watch(t)
	beat := func(o client.Object) {
		change(t, r, o, func(o client.Object) {
			o.SetAnnotations(map[string]string{"control-plane.alpha.kubernetes.io/leader": time.Now().String(), "kubectl.kubernetes.io/last-applied-configuration": "{}"})
		})
	}
	for range 3 {
		for _, o := range []client.Object{service, slice, pod, namespace} {
			beat(o)
		}
		if err := r.admin.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil {
			t.Fatal(err)
		}
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastProbeTime: metav1.Now(), Message: time.Now().String()}}
		if err := r.admin.Status().Update(t.Context(), pod); err != nil {
			t.Fatal(err)
		}
		b := breaker(r, "payments")
		if err := r.admin.Get(t.Context(), client.ObjectKeyFromObject(b), b); err != nil {
			t.Fatal(err)
		}
		b.Status.Ancestors = []gatewayv1.PolicyAncestorStatus{{
			AncestorRef: gatewayv1.ParentReference{Name: "payments"}, ControllerName: "outrigger.dev/control-plane",
			Conditions: []metav1.Condition{{Type: "Accepted", Status: metav1.ConditionTrue, Reason: "Accepted", Message: time.Now().String(), LastTransitionTime: metav1.Now()}},
		}}
		if err := r.admin.Status().Update(t.Context(), b); err != nil {
			t.Fatal(err)
		}
	}
	for kind, n := range map[string]float64{"Service": 3, "EndpointSlice": 3, "Pod": 6, "Namespace": 3, "CircuitBreaker": 3} {
		eventually(t, func() string {
			if got := r.metric(t, "outrigger_kube_events_total", "effect=unchanged", "kind="+kind); got < n {
				return fmt.Sprintf("%v events of kind %s without effect, want %v", got, kind, n)
			}
			return ""
		})
	}
	if c, _ := told.since(); c.Rest || len(c.Services)+len(c.Pods) > 0 {
		t.Errorf("told %+v", c)
	}
	// And of something, something.
	change(t, r, pod, func(p *corev1.Pod) { p.Labels = map[string]string{"version": "2"} })
	want := kube.Change{Services: []types.NamespacedName{r.name("payments")}, Pods: []types.NamespacedName{r.name("payments-1")}}
	eventually(t, func() string { c, _ := told.since(); return cmp.Diff(want, c) })
	change(t, r, service, func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 })
	eventually(t, func() string {
		if c, _ := told.since(); !c.Rest {
			return "the Service has changed, and nobody was told"
		}
		return ""
	})
}

// Changes of endpoints are told with the Services that they concern, soon, and
// what these consist of can be had without all the others.
func TestEndpoints(t *testing.T) {
	r := run(t)
	r.create(t, r.service("payments"), r.service("cart"), r.pod("payments-1", "payments"), r.pod("cart-1", "cart"),
		r.slice("payments-a", "payments", "10.0.0.1=payments-1"), r.slice("payments-b", "payments"), r.slice("cart-a", "cart", "10.0.0.9=cart-1"))
	payments, cart := r.name("payments"), r.name("cart")
	eventually(t, func() string {
		in := r.Source().LoadServices([]types.NamespacedName{payments, cart, r.name("nobody")})
		if len(in.Services) != 2 || len(in.EndpointSlices) != 3 || len(in.Pods) != 2 || len(in.Namespaces) != 1 {
			return fmt.Sprintf("%d Services, %d slices, %d pods, %d namespaces", len(in.Services), len(in.EndpointSlices), len(in.Pods), len(in.Namespaces))
		}
		return ""
	})
	if in := r.Source().LoadServices([]types.NamespacedName{payments}); len(in.Services) != 1 || len(in.EndpointSlices) != 2 || len(in.Pods) != 1 || in.Pods[0].Name != "payments-1" {
		t.Errorf("%+v", in)
	}
	told := r.watch(t)
	slice := r.slice("payments-b", "payments")
	best := time.Hour
	for i := range 10 {
		told.forget()
		began := time.Now()
		change(t, r, slice, func(s *discoveryv1.EndpointSlice) {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.0.1.%d", i+1)}})
		})
		want := kube.Change{Services: []types.NamespacedName{payments}}
		eventually(t, func() string {
			c, _ := told.since()
			return cmp.Diff(want, c, cmp.Transformer("nil", func(n []types.NamespacedName) string { return fmt.Sprint(n) }))
		})
		_, first := told.since()
		best = min(best, first.Sub(began))
		if in := r.Source().LoadServices([]types.NamespacedName{payments}); len(in.EndpointSlices) != 2 || len(in.EndpointSlices[0].Endpoints)+len(in.EndpointSlices[1].Endpoints) != i+2 {
			t.Errorf("told of what is not there: %+v", in.EndpointSlices)
		}
	}
	t.Logf("from before the write to the notice, at best %s", best.Round(100*time.Microsecond))
	if best > 200*time.Millisecond {
		t.Errorf("never within 200ms; at best %s", best)
	}
	// A slice that goes over to another Service concerns both.
	told.forget()
	change(t, r, slice, func(s *discoveryv1.EndpointSlice) { s.Labels[discoveryv1.LabelServiceName] = "cart" })
	eventually(t, func() string {
		c, _ := told.since()
		if !slices.Equal(c.Services, []types.NamespacedName{cart, payments}) || c.Rest {
			return fmt.Sprintf("%+v", c)
		}
		return ""
	})
	// One that is gone concerns its own; and the pods' indices forget it.
	told.forget()
	if err := r.admin.Delete(t.Context(), r.slice("payments-a", "payments")); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		c, _ := told.since()
		if !slices.Equal(c.Services, []types.NamespacedName{payments}) {
			return fmt.Sprintf("%+v", c)
		}
		return ""
	})
	told.forget()
	if err := r.admin.Delete(t.Context(), r.pod("payments-1", "payments"), client.GracePeriodSeconds(0)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		c, _ := told.since()
		if !slices.Equal(c.Pods, []types.NamespacedName{r.name("payments-1")}) || len(c.Services) != 0 || c.Rest {
			return fmt.Sprintf("%+v", c)
		}
		return ""
	})
}

// A second Watch, or one that comes late, is told at once of what it has missed.
func TestWatchTellsOfWhatWasMissed(t *testing.T) {
	r := run(t)
	r.Source().Load()
	r.create(t, r.service("payments"))
	eventually(t, func() string {
		if in := r.Source().LoadServices([]types.NamespacedName{r.name("payments")}); len(in.Services) != 1 {
			return "no Service"
		}
		return ""
	})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := r.Source().Watch(ctx, cancel); err != nil || ctx.Err() != context.Canceled {
		t.Errorf("%v, %v", err, ctx.Err())
	}
}

// While the API server is away the last state stands and the log says so once;
// when it is back, what happened is seen without a restart.
func TestOutage(t *testing.T) {
	r := prepare(t)
	libraries := &output{}
	kube.RouteLogs(slog.New(slog.NewTextHandler(libraries, nil)))
	t.Cleanup(func() { kube.RouteLogs(slog.New(slog.DiscardHandler)) })
	r.start()
	r.wait(t)
	r.create(t, r.service("before"))
	has := func(name string) bool {
		return len(r.Source().LoadServices([]types.NamespacedName{r.name(name)}).Services) == 1
	}
	eventually(t, func() string {
		if !has("before") {
			return "no Service"
		}
		return ""
	})
	server.StopAPI()
	eventually(t, func() string {
		if r.log.count("cannot be reached") == 0 {
			return "the log does not say that the API server is away"
		}
		return ""
	})
	time.Sleep(5 * time.Second) // so that informers would have learned to wait
	if !has("before") || r.Source().Ready() != nil {
		t.Errorf("there: %t, ready: %v", has("before"), r.Source().Ready())
	}
	if n := r.log.count("cannot be reached"); n != 1 {
		t.Errorf("the log says %d times that the API server is away", n)
	}
	if err := server.StartAPI(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { // a new API server may refuse for a moment
		if err := r.admin.Create(t.Context(), r.service("after")); err != nil && !apierrors.IsAlreadyExists(err) {
			return err.Error()
		}
		return ""
	})
	began := time.Now()
	eventually(t, func() string {
		if !has("after") {
			return "the new Service is not seen"
		}
		return ""
	})
	t.Logf("seen %s after it could be written", time.Since(began).Round(10*time.Millisecond))
	eventually(t, func() string {
		if r.log.count("the API server is back") != 1 {
			return "the log does not say that it is back"
		}
		return ""
	})
	if n := r.log.count("level=WARN") + r.log.count("level=ERROR"); n != 1 || libraries.String() != "" {
		t.Errorf("%d lines of ours, and of the libraries:\n%s", n, libraries)
	}
	if v := r.metric(t, "outrigger_kube_last_contact_timestamp_seconds"); time.Since(time.Unix(int64(v), 0)) > patience {
		t.Errorf("last contact %v", v)
	}
}

// Where nobody answers, nothing is known and nothing is ready.
func TestNotReadyWithoutAnAPIServer(t *testing.T) {
	r := prepare(t, func(c *rest.Config) { c.Host = "https://127.0.0.1:1" })
	r.start()
	eventually(t, func() string {
		if err := r.Source().Ready(); err == nil || !strings.Contains(err.Error(), "cannot be reached") {
			return fmt.Sprint(err)
		}
		return ""
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if r.Source().WaitSynced(ctx) {
		t.Error("synced with nobody")
	}
}

// A role that does not suffice is named, and nothing is ready before.
func TestForbidden(t *testing.T) {
	r := prepare(t, func(c *rest.Config) { c.Impersonate = rest.ImpersonationConfig{UserName: "nobody"} })
	r.start()
	eventually(t, func() string {
		_, problems := r.Source().Load()
		for _, p := range problems {
			if p.Kind == "Pod" && p.Reason == kube.ReasonForbidden && strings.Contains(p.Message, "ClusterRole get, list and watch pods") {
				return ""
			}
		}
		return fmt.Sprint(problems)
	})
	if err := r.Source().Ready(); err == nil || !strings.Contains(err.Error(), "not read yet: ") || !strings.Contains(err.Error(), "Pod") {
		t.Errorf("%v", err)
	}
}

// An object that its CRD let in and that cannot be decoded keeps its kind from
// being read: that is said, of the kind and with the remedy.
func TestUnreadable(t *testing.T) {
	r := prepare(t)
	yes := true
	loose := crds(t, "outrigger.dev_retrypolicies")[0]
	for i := range loose.Spec.Versions {
		loose.Spec.Versions[i].Schema.OpenAPIV3Schema = &apiextensionsv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: &yes}
	}
	r.create(t, loose)
	bad := &unstructured.Unstructured{Object: map[string]any{"spec": map[string]any{"attempts": "many"}}}
	bad.SetGroupVersionKind(v1alpha1.GroupVersion().WithKind("RetryPolicy"))
	bad.SetNamespace(r.ns)
	bad.SetName("bad")
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), bad); err != nil && !apierrors.IsAlreadyExists(err) {
			return err.Error()
		}
		return ""
	})
	r.start()
	said := func() string {
		_, problems := r.Source().Load()
		for _, p := range problems {
			if p.Kind == "RetryPolicy" && p.Reason == translate.ReasonInvalid && strings.Contains(p.Message, "correct or delete it") {
				return ""
			}
		}
		return fmt.Sprint(problems)
	}
	eventually(t, said)
	if err := r.Source().Ready(); err == nil || !strings.Contains(err.Error(), "RetryPolicy (") {
		t.Errorf("%v", err)
	}
	if err := r.admin.Delete(t.Context(), bad); err != nil {
		t.Fatal(err)
	}
	r.wait(t)
	eventually(t, func() string {
		if _, problems := r.Source().Load(); slices.ContainsFunc(problems, func(p translate.Problem) bool { return p.Kind == "RetryPolicy" }) {
			return fmt.Sprint(problems)
		}
		return ""
	})
	// One that comes later does not take away what was read.
	r.create(t, &v1alpha1.RetryPolicy{ObjectMeta: r.meta("good")})
	eventually(t, func() string {
		if in, _ := r.Source().Load(); len(in.RetryPolicies) != 1 {
			return "no policy"
		}
		return ""
	})
	bad.SetResourceVersion("")
	r.create(t, bad)
	eventually(t, said)
	if in, _ := r.Source().Load(); len(in.RetryPolicies) != 1 || r.Source().Ready() != nil {
		t.Errorf("%d policies, %v", len(in.RetryPolicies), r.Source().Ready())
	}
	r.uninstall(t, "outrigger.dev_retrypolicies")
}
