package chart_test

import (
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// podMonitorCRD stands for the Prometheus operator's, whose schema is not here.
const podMonitorCRD = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: podmonitors.monitoring.coreos.com, annotations: {api-approved.kubernetes.io: "https://example.com"}}
spec:
  group: monitoring.coreos.com
  names: {kind: PodMonitor, listKind: PodMonitorList, plural: podmonitors, singular: podmonitor}
  scope: Namespaced
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
`

// applier sends objects to the API server.
type applier struct {
	t      *testing.T
	client dynamic.Interface
	mapper meta.RESTMapper
}

func newApplier(t *testing.T, conf *rest.Config) *applier {
	t.Helper()
	client, err := dynamic.NewForConfig(conf)
	if err != nil {
		t.Fatal(err)
	}
	d, err := discovery.NewDiscoveryClientForConfig(conf)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := restmapper.GetAPIGroupResources(d)
	if err != nil {
		t.Fatal(err)
	}
	return &applier{t, client, restmapper.NewDiscoveryRESTMapper(groups)}
}

func (a *applier) apply(o *unstructured.Unstructured, dryRun bool) error {
	a.t.Helper()
	gvk := o.GroupVersionKind()
	m, err := a.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		return err
	}
	var r dynamic.ResourceInterface = a.client.Resource(m.Resource)
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		r = a.client.Resource(m.Resource).Namespace(o.GetNamespace())
	}
	opts := metav1.ApplyOptions{FieldManager: "chart-test", Force: true}
	if dryRun {
		opts.DryRun = []string{metav1.DryRunAll}
	}
	_, err = r.Apply(a.t.Context(), o.GetName(), o, opts)
	return err
}

// A real API server admits every object of every profile, and keeps it as it is
// written: server-side apply refuses unknown fields.
func TestTheAPIServerTakesIt(t *testing.T) {
	s := server.Need(t)
	crds := render(t, nil, options()).CRDs
	extra, err := chart.Decode([]byte(podMonitorCRD))
	if err != nil {
		t.Fatal(err)
	}
	a := newApplier(t, s.Config)
	for _, crd := range append(crds, extra...) {
		if err := a.apply(crd, false); err != nil {
			t.Fatalf("%s: %v", crd.GetName(), err)
		}
	}
	ns := &unstructured.Unstructured{}
	ns.SetAPIVersion("v1")
	ns.SetKind("Namespace")
	ns.SetName(namespace)
	if err := a.apply(ns, false); err != nil {
		t.Fatal(err)
	}
	established(t, a, "podmonitors.monitoring.coreos.com")
	a = newApplier(t, s.Config) // knows PodMonitors
	for name, v := range variants(t) {
		for _, o := range render(t, v, options()).Objects {
			if err := a.apply(o, true); err != nil {
				t.Errorf("%s: %s %s: %v", name, o.GetKind(), o.GetName(), err)
			}
		}
	}
}

// established waits until the API server serves a CRD.
func established(t *testing.T, a *applier, name string) {
	t.Helper()
	crds := a.client.Resource(apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions"))
	w, err := crds.Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		u, ok := e.Object.(*unstructured.Unstructured)
		if !ok {
			continue
		}
		conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
		for _, c := range conditions {
			if m, ok := c.(map[string]any); ok && m["type"] == "Established" && m["status"] == "True" {
				return
			}
		}
	}
	t.Fatalf("%s was not established", name)
}

// The control plane's and the injector's pods keep to Pod Security "restricted",
// as the API server's own admission sees it; the collector's cannot.
func TestPodSecurity(t *testing.T) {
	s := server.Need(t)
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	ns := "pod-security"
	if _, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	create := func(name string, template corev1.PodTemplateSpec) error {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: template.Labels}, Spec: template.Spec}
		pod.Spec.PriorityClassName = "" // made by a controller that is not here
		_, err := client.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	for name, v := range variants(t) {
		r := render(t, v, options())
		for _, part := range []string{"outrigger-control-plane", "outrigger-injector"} {
			if err := create(part, get[*appsv1.Deployment](t, r, "Deployment", part).Spec.Template); err != nil {
				t.Errorf("%s: %s: %v", name, part, err)
			}
		}
		for _, o := range ofKind(r, "DaemonSet") {
			if err := create(o.GetName(), typed(t, o).(*appsv1.DaemonSet).Spec.Template); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "hostPath") {
				t.Errorf("%s: %s: the namespace need not be privileged: %v", name, o.GetName(), err)
			}
		}
	}
}
