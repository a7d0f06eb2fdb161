package v1alpha1_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// install creates the CRDs and waits until they are served.
func install(t *testing.T, client *dynamic.DynamicClient) {
	t.Helper()
	files, err := filepath.Glob("../../../deploy/crds/*.yaml")
	if err != nil || len(files) != 3 {
		t.Fatalf("%d CRDs: %v", len(files), err)
	}
	crds := client.Resource(apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions"))
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var crd unstructured.Unstructured
		if err := yaml.UnmarshalStrict(text, &crd.Object); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		if _, err := crds.Create(t.Context(), &crd, metav1.CreateOptions{}); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
	}
	for _, resource := range []string{"circuitbreakers", "retrypolicies", "authorizationpolicies"} {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			_, err := client.Resource(v1alpha1.GroupVersion().WithResource(resource)).List(t.Context(), metav1.ListOptions{})
			if err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %v", resource, err)
			}
		}
	}
}

// The API server refuses what the control plane could not read, above all what
// no Go type holds: one such object would keep a whole list from being read.
func TestTheServerRefuses(t *testing.T) {
	client, err := dynamic.NewForConfig(server.Need(t).Config)
	if err != nil {
		t.Fatal(err)
	}
	install(t, client)
	const target = "targetRefs: [{group: '', kind: Service, name: payments}]"
	try := func(kind, resource, spec string) error {
		var o unstructured.Unstructured
		if err := yaml.Unmarshal([]byte("apiVersion: outrigger.dev/v1alpha1\nkind: "+kind+"\nmetadata: {generateName: x-, namespace: default}\nspec: "+spec), &o.Object); err != nil {
			t.Fatalf("%s: %v", spec, err)
		}
		made, err := client.Resource(schema.GroupVersionResource{Group: v1alpha1.GroupName, Version: v1alpha1.Version, Resource: resource}).
			Namespace("default").Create(context.WithoutCancel(t.Context()), &o, metav1.CreateOptions{})
		if err == nil {
			typed := map[string]any{"circuitbreakers": &v1alpha1.CircuitBreaker{}, "retrypolicies": &v1alpha1.RetryPolicy{}, "authorizationpolicies": &v1alpha1.AuthorizationPolicy{}}[resource]
			if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(made.Object, typed, true); err != nil {
				t.Errorf("%s %s was accepted and cannot be read: %v", kind, spec, err)
			}
		}
		return err
	}
	for _, c := range []struct{ kind, resource, spec, want string }{
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {consecutiveFailures: 5, slowCall: {longerThan: 1m30s, ratio: '0.8'}}}", ""},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", mode: Observe, trip: {failureRatio: '0.5'}, limits: {requests: 0}}", ""},
		{"CircuitBreaker", "circuitbreakers", "{" + target + "}", "set at least one of trip, limits and ejection"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {}}", "set at least one of consecutiveFailures"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {consecutiveFailures: -1}}", "spec.trip.consecutiveFailures"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {consecutiveFailures: 5000000000}}", "spec.trip.consecutiveFailures"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {failureRatio: '1.5'}}", "spec.trip.failureRatio"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {consecutiveFailures: 5, window: 10}}", "spec.trip.window"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", trip: {consecutiveFailures: 5, window: ten}}", "spec.trip.window"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", mode: enforce, limits: {requests: 1}}", "spec.mode"},
		{"CircuitBreaker", "circuitbreakers", "{targetRefs: [], limits: {requests: 1}}", "spec.targetRefs"},
		{"CircuitBreaker", "circuitbreakers", "{targetRefs: [{group: apps, kind: Deployment, name: x}], limits: {requests: 1}}", "a target is a Service"},
		{"CircuitBreaker", "circuitbreakers", "{" + target + ", ejection: {maxEjectionPercent: 101}}", "maxEjectionPercent"},
		{"RetryPolicy", "retrypolicies", "{" + target + ", attempts: 3, backoff: {base: 25ms}}", ""},
		{"RetryPolicy", "retrypolicies", "{" + target + ", attempts: 11}", "spec.attempts"},
		{"RetryPolicy", "retrypolicies", "{" + target + ", retryOnStatus: [200]}", "spec.retryOnStatus"},
		{"AuthorizationPolicy", "authorizationpolicies", "{targetRefs: [{group: '', kind: Namespace, name: default}], rules: [{from: [{serviceAccounts: [shop/storefront]}], to: [{methods: [GET], paths: [/api/*]}]}]}", ""},
		{"AuthorizationPolicy", "authorizationpolicies", "{" + target + ", action: Audit}", "spec.action"},
		{"AuthorizationPolicy", "authorizationpolicies", "{targetRefs: [{group: '', kind: Pod, name: x}]}", "a target is a Service or the Namespace"},
	} {
		err := try(c.kind, c.resource, c.spec)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s %s: %v; want %q", c.kind, c.spec, err, c.want)
		}
	}
}
