package chart_test

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
	"github.com/outrigger-mesh/outrigger/deploy/profiles"
	"github.com/outrigger-mesh/outrigger/golden"
)

const (
	namespace   = "outrigger-system"
	kubeVersion = "v1.37.2"
)

func options() chart.Options { return chart.Options{Namespace: namespace, KubeVersion: kubeVersion} }

// values reads YAML.
func values(t *testing.T, text string) map[string]any {
	t.Helper()
	v, err := chart.Values([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func render(t *testing.T, v map[string]any, o chart.Options) *chart.Release {
	t.Helper()
	r, err := chart.Render(t.Context(), v, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// variants are the profiles, and what no profile switches on.
func variants(t *testing.T) map[string]map[string]any {
	t.Helper()
	out := map[string]map[string]any{
		"defaults": {},
		"everything": values(t, `
image: {registry: registry.example.com/mesh, tag: v1, pullSecrets: [pull]}
clusterName: eu-1
namespace: {create: true}
controlPlane: {podLabels: {team: mesh}, podAnnotations: {a: b}, extraArgs: [--log-format=text], tolerations: [{operator: Exists}]}
injector: {failurePolicy: Ignore, podLabels: {team: mesh}, podAnnotations: {a: b}, image: {digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}}
collector:
  podLabels: {team: mesh}
  podAnnotations: {a: b}
  kubernetes: {kubelet: verified}
  secrets: [{name: es, mountPath: /etc/outrigger/es}]
  logs:
    outputs: [local, es]
    batch: {maxRecords: 500, linger: 1s}
    inFlight: 1024
    inputs: {events: {}, otlp: {address: ":4318"}}
    rules: [{name: health, match: {body: healthz}, drop: true}]
    quotas: [{name: all, bytesPerSecond: 1048576, action: warn}]
  metrics: {outputs: [ix], scrape: [{job: sidecars, address: "127.0.0.1:15020", path: /metrics, interval: 15s}]}
  outputs:
    es: {elasticsearch: {addresses: [https://es:9200], apiKeyFile: /etc/outrigger/es/key}}
    ix: {influxdb: {url: http://influxdb:8086, org: o, bucket: b}}
cni: {enabled: true, podLabels: {team: mesh}}
podMonitors: {enabled: true, labels: {release: prometheus}}
priorityClassQuota: {enabled: true}
`),
		"nothing": values(t, `
controlPlane: {podDisruptionBudget: {enabled: false}, autoscaling: {enabled: false}, priorityClassName: ""}
injector: {podDisruptionBudget: {enabled: false}, nativeSidecars: false}
collector: {enabled: false}
networkPolicies: {enabled: false}
namespace: {create: true}
`),
		"metrics-only": values(t, `collector: {logs: {outputs: []}, outputs: {local: null}}`),
	}
	for _, name := range profiles.Names() {
		b, err := profiles.Read(name)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = values(t, string(b))
	}
	return out
}

// What is in deploy/manifests is what the chart renders.
func TestManifests(t *testing.T) {
	for _, name := range profiles.Names() {
		t.Run(name, func(t *testing.T) {
			v := chart.Merge(variants(t)[name], map[string]any{"namespace": map[string]any{"create": true}})
			o := options()
			o.ManagedBy = "kubectl"
			r := render(t, v, o)
			var text bytes.Buffer
			fmt.Fprintf(&text, "# Made by `make manifests` from deploy/chart and deploy/profiles/%s.yaml, for Kubernetes 1.29 and newer:\n#\n#   kubectl apply --server-side -f deploy/crds -f deploy/manifests/%[1]s.yaml\n", name)
			for _, o := range r.Objects {
				b, err := yaml.Marshal(o)
				if err != nil {
					t.Fatal(err)
				}
				fmt.Fprintf(&text, "---\n%s", b)
			}
			golden.File(t, filepath.Join("..", "manifests", name+".yaml"), text.String())
		})
	}
}

// Every object has the fields of its kind and no others; Prometheus' are not
// linked here.
func TestObjectsAreOfTheirKind(t *testing.T) {
	for name, v := range variants(t) {
		t.Run(name, func(t *testing.T) {
			r := render(t, v, options())
			if len(r.CRDs) == 0 {
				t.Error("no CustomResourceDefinitions")
			}
			for _, o := range append(r.CRDs, r.Objects...) {
				if o.GetKind() != "PodMonitor" {
					typed(t, o)
				}
				if o.GetKind() != "CustomResourceDefinition" && o.GetLabels()[chart.LabelPartOf] != "outrigger" {
					t.Errorf("%s %s has no label %s", o.GetKind(), o.GetName(), chart.LabelPartOf)
				}
			}
			for _, kind := range []string{"Deployment", "DaemonSet"} {
				for _, o := range ofKind(r, kind) {
					checkPods(t, o)
				}
			}
		})
	}
}

func kinds(t *testing.T) *runtime.Scheme {
	t.Helper()
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{scheme.AddToScheme, apiextensionsv1.AddToScheme} {
		if err := add(s); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// typed decodes o strictly into the struct of its kind.
func typed(t *testing.T, o *unstructured.Unstructured) runtime.Object {
	t.Helper()
	obj, err := kinds(t).New(o.GroupVersionKind())
	if err != nil {
		t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
	}
	b, err := o.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	strict, err := json.UnmarshalStrict(b, obj)
	if err != nil || len(strict) > 0 {
		t.Errorf("%s %s: %v %v", o.GetKind(), o.GetName(), err, strict)
	}
	return obj
}

func ofKind(r *chart.Release, kind string) []*unstructured.Unstructured {
	var out []*unstructured.Unstructured
	for _, o := range r.Objects {
		if o.GetKind() == kind {
			out = append(out, o)
		}
	}
	return out
}

// get decodes the object of that kind and name.
func get[T runtime.Object](t *testing.T, r *chart.Release, kind, name string) T {
	t.Helper()
	for _, o := range ofKind(r, kind) {
		if o.GetName() == name {
			return typed(t, o).(T)
		}
	}
	t.Fatalf("there is no %s %s", kind, name)
	panic("unreachable")
}

// checkPods: what every pod of ours promises.
func checkPods(t *testing.T, o *unstructured.Unstructured) {
	t.Helper()
	var selector *metav1.LabelSelector
	var pod corev1.PodTemplateSpec
	switch w := typed(t, o).(type) {
	case *appsv1.Deployment:
		selector, pod = w.Spec.Selector, w.Spec.Template
	case *appsv1.DaemonSet:
		selector, pod = w.Spec.Selector, w.Spec.Template
	}
	at := o.GetKind() + " " + o.GetName()
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil || !s.Matches(labels.Set(pod.Labels)) {
		t.Errorf("%s does not select its own pods: %v", at, err)
	}
	if pod.Labels["outrigger.dev/injection"] != "disabled" {
		t.Errorf("%s might get a sidecar itself", at)
	}
	if pod.Spec.HostNetwork || pod.Spec.HostPID || pod.Spec.HostIPC {
		t.Errorf("%s shares namespaces with its node", at)
	}
	if sc := pod.Spec.SecurityContext; sc.SeccompProfile == nil || sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("%s has no seccomp profile", at)
	}
	for _, c := range pod.Spec.Containers {
		sc := c.SecurityContext
		if !*sc.ReadOnlyRootFilesystem || *sc.AllowPrivilegeEscalation || sc.Privileged != nil || !slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(sc.Capabilities.Add) > 0 {
			t.Errorf("%s: container %s may do more than it must: %+v", at, c.Name, sc)
		}
		if c.Resources.Requests.Cpu().IsZero() || c.Resources.Limits.Memory().IsZero() {
			t.Errorf("%s: container %s has no CPU request or no memory limit", at, c.Name)
		}
		ports := map[string]bool{}
		for _, p := range c.Ports {
			ports[p.Name] = true
		}
		for _, p := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
			switch {
			case p == nil:
			case p.HTTPGet != nil && !ports[p.HTTPGet.Port.StrVal], p.TCPSocket != nil && !ports[p.TCPSocket.Port.StrVal]:
				t.Errorf("%s: a probe asks a port that container %s does not have", at, c.Name)
			}
		}
		mounted := map[string]bool{}
		for _, m := range c.VolumeMounts {
			mounted[m.Name] = true
		}
		for _, v := range pod.Spec.Volumes {
			if !mounted[v.Name] {
				t.Errorf("%s: volume %s is not mounted", at, v.Name)
			}
		}
	}
	for _, v := range pod.Spec.Volumes {
		if v.HostPath != nil && o.GetKind() == "Deployment" {
			t.Errorf("%s mounts %s of its node", at, v.HostPath.Path)
		}
	}
}

// Of the node's folders the collector may write to its own only, and to the one
// above the logs where it keeps their second names.
func TestWhereTheCollectorWrites(t *testing.T) {
	for name, v := range variants(t) {
		r := render(t, v, options())
		if len(ofKind(r, "ConfigMap")) == 0 {
			continue
		}
		d := get[*appsv1.DaemonSet](t, r, "DaemonSet", "outrigger-collector")
		spool := strings.Contains(get[*corev1.ConfigMap](t, r, "ConfigMap", "outrigger-collector").Data["collector.yaml"], "spool: /")
		for _, m := range d.Spec.Template.Spec.Containers[0].VolumeMounts {
			if m.ReadOnly == (m.Name == "state" || m.Name == "logs" && spool) {
				t.Errorf("%s: %s: read only is %v", name, m.MountPath, m.ReadOnly)
			}
		}
	}
}

// The webhook is sent pods that ask and no others, each by one entry.
func TestWhoIsSentToTheInjector(t *testing.T) {
	r := render(t, values(t, `injector: {excludedNamespaces: [kube-system, cattle-system]}`), options())
	w := get[*admissionregistrationv1.MutatingWebhookConfiguration](t, r, "MutatingWebhookConfiguration", "outrigger-injector")
	match := func(s *metav1.LabelSelector, l map[string]string) bool {
		t.Helper()
		m, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			t.Fatal(err)
		}
		return m.Matches(labels.Set(l))
	}
	for _, c := range []struct{ namespace, label, pod, want string }{
		{"shop", "", "", ""},
		{"shop", "enabled", "", "namespace.injector.outrigger.dev"},
		{"shop", "enabled", "enabled", "namespace.injector.outrigger.dev"},
		{"shop", "enabled", "disabled", ""},
		{"shop", "", "enabled", "pod.injector.outrigger.dev"},
		{"shop", "disabled", "enabled", "pod.injector.outrigger.dev"},
		{"shop", "disabled", "", ""},
		{"kube-system", "enabled", "enabled", ""},
		{"cattle-system", "enabled", "enabled", ""},
		{namespace, "enabled", "enabled", ""},
	} {
		ns, pod := map[string]string{"kubernetes.io/metadata.name": c.namespace}, map[string]string{"app": "x"}
		for set, label := range map[*map[string]string]string{&ns: c.label, &pod: c.pod} {
			if label != "" {
				(*set)["outrigger.dev/injection"] = label
			}
		}
		var got []string
		for _, h := range w.Webhooks {
			if match(h.NamespaceSelector, ns) && match(h.ObjectSelector, pod) {
				got = append(got, h.Name)
			}
			if h.ClientConfig.CABundle != nil {
				t.Error("a caBundle of ours would take the injector's away at each upgrade")
			}
		}
		if strings.Join(got, ",") != c.want {
			t.Errorf("namespace %s labelled %q, pod %q: sent by %v, want %q", c.namespace, c.label, c.pod, got, c.want)
		}
	}
}

// Roles name what they need: no wildcards, Secrets by name, each of our kinds
// and no other.
func TestRolesAreLeast(t *testing.T) {
	r := render(t, variants(t)["everything"], options())
	var ours []string
	check := func(role string, rules []rbacv1.PolicyRule) {
		for _, rule := range rules {
			// What replicas tell each other has names of their own, in the namespace of
			// the product alone.
			if role == "Role outrigger-control-plane" && slices.Equal(rule.Resources, []string{"configmaps"}) && slices.Equal(rule.Verbs, []string{"create", "get", "list", "patch", "delete"}) {
				continue
			}
			all := slices.Concat(rule.APIGroups, rule.Resources, rule.Verbs)
			if slices.Contains(all, "*") {
				t.Errorf("%s: %v", role, rule)
			}
			for _, verb := range []string{"escalate", "bind", "impersonate", "delete", "deletecollection"} {
				if slices.Contains(rule.Verbs, verb) {
					t.Errorf("%s may %s %v", role, verb, rule.Resources)
				}
			}
			writes := slices.ContainsFunc(rule.Verbs, func(v string) bool { return v == "update" || v == "patch" })
			if slices.Contains(rule.Resources, "secrets") && !slices.Equal(rule.Verbs, []string{"create"}) && len(rule.ResourceNames) == 0 {
				t.Errorf("%s may read Secrets of any name", role)
			}
			if (slices.Contains(rule.Resources, "configmaps") || slices.Contains(rule.Resources, "mutatingwebhookconfigurations")) && writes && len(rule.ResourceNames) == 0 {
				t.Errorf("%s may write any of %v", role, rule.Resources)
			}
			if slices.Equal(rule.APIGroups, []string{"outrigger.dev"}) {
				ours = append(ours, rule.Resources...)
			}
		}
	}
	for _, o := range ofKind(r, "ClusterRole") {
		rules := typed(t, o).(*rbacv1.ClusterRole).Rules
		check(o.GetName(), rules)
		for _, rule := range rules {
			if slices.Contains(rule.Resources, "secrets") {
				t.Errorf("%s may see Secrets of all namespaces", o.GetName())
			}
		}
	}
	for _, o := range ofKind(r, "Role") {
		check("Role "+o.GetName(), typed(t, o).(*rbacv1.Role).Rules)
	}
	var want []string
	for _, crd := range r.CRDs {
		plural, _, _ := strings.Cut(crd.GetName(), ".")
		want = append(want, plural, plural+"/status")
	}
	slices.Sort(want)
	slices.Sort(ours)
	if d := cmp.Diff(want, ours); d != "" {
		t.Errorf("the control plane's rights to our kinds (- the CRDs, + the role):\n%s", d)
	}
}

// A budget must leave room for a drain, and selects what the Deployment makes.
func TestBudgetsLetNodesDrain(t *testing.T) {
	for name, v := range variants(t) {
		r := render(t, v, options())
		for _, o := range ofKind(r, "PodDisruptionBudget") {
			b := typed(t, o).(*policyv1.PodDisruptionBudget)
			d := get[*appsv1.Deployment](t, r, "Deployment", o.GetName())
			replicas := int32(2) // the autoscaler's least
			if d.Spec.Replicas != nil {
				replicas = *d.Spec.Replicas
			}
			if b.Spec.MinAvailable.IntVal >= replicas {
				t.Errorf("%s: %s: at least %s of %d: no node could be drained", name, o.GetName(), b.Spec.MinAvailable, replicas)
			}
			if d := cmp.Diff(d.Spec.Selector, b.Spec.Selector); d != "" {
				t.Errorf("%s: %s:\n%s", name, o.GetName(), d)
			}
		}
	}
}

func TestNativeSidecarsFollowTheCluster(t *testing.T) {
	for _, c := range []struct{ version, value, want string }{
		{"v1.28.9", "auto", "false"},
		{"v1.29.0", "auto", "true"},
		{"v1.29.3-gke.1282000", "auto", "true"},
		{"v1.31.2+k3s1", "auto", "true"},
		{"v1.37.2", "false", "false"},
		{"v1.28.9", "true", "true"},
	} {
		o := options()
		o.KubeVersion = c.version
		r := render(t, values(t, "injector: {nativeSidecars: "+c.value+"}"), o)
		args := get[*appsv1.Deployment](t, r, "Deployment", "outrigger-injector").Spec.Template.Spec.Containers[0].Args
		if !slices.Contains(args, "--native-sidecar="+c.want) {
			t.Errorf("%s, %s: want %s in %q", c.version, c.value, c.want, args)
		}
	}
}

// Wrong values are refused with their place.
func TestWrongValues(t *testing.T) {
	for text, want := range map[string]string{
		`controlPlan: {}`:                                                         "controlPlan",
		`controlPlane: {replica: 3}`:                                              "controlPlane: additional properties 'replica'",
		`controlPlane: {replicas: 0}`:                                             "controlPlane.replicas",
		`controlPlane: {replicas: many}`:                                          "controlPlane.replicas",
		`injector: {failurePolicy: Sometimes}`:                                    "injector.failurePolicy",
		`injector: {timeoutSeconds: 31}`:                                          "injector.timeoutSeconds",
		`collector: {logs: {folder: var/log}}`:                                    "collector.logs.folder",
		`collector: {outputs: {es: {elasticsearch: {apiKey: hunter2}}}}`:          "collector.outputs.es.elasticsearch",
		`collector: {outputs: {es: {elasticsearch: {}, fluentd: {}}}}`:            "collector.outputs.es",
		`sidecar: {memory: lots}`:                                                 "sidecar.memory",
		`image: {pullPolicy: Perhaps}`:                                            "image.pullPolicy",
		`trustDomain: spiffe://cluster.local`:                                     "trustDomain",
		`controlPlane: {image: {digest: "sha256:abc"}}`:                           "controlPlane.image.digest",
		"cni: {enabled: true, binFolder: \"/opt/cni/bin\\nhostNetwork: true\"}\n": "cni.binFolder",
	} {
		_, err := chart.Render(t.Context(), values(t, text), options())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	o := options()
	o.KubeVersion = "one"
	if _, err := chart.Render(t.Context(), nil, o); err == nil || !strings.Contains(err.Error(), `"one"`) {
		t.Errorf("version: %v", err)
	}
}

// Every value that the chart has is described, and every one described is there.
func TestEveryValueIsDescribed(t *testing.T) {
	b, err := chart.Files.ReadFile("values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := yaml.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	b, err = chart.Files.ReadFile("values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defs := schema["$defs"].(map[string]any)
	var walk func(at string, s map[string]any, v any)
	walk = func(at string, s map[string]any, v any) {
		description := s["description"]
		if ref, ok := s["$ref"].(string); ok {
			s = defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any)
			if description == nil {
				description = s["description"]
			}
		}
		properties, isObject := s["properties"].(map[string]any)
		if description == nil && !isObject {
			t.Errorf("%s has no description", at)
		}
		if !isObject {
			return
		}
		if s["additionalProperties"] != false {
			t.Errorf("%s takes unknown keys", at)
		}
		have, _ := v.(map[string]any)
		for _, key := range slices.Sorted(maps.Keys(have)) {
			if properties[key] == nil {
				t.Errorf("%s.%s is not in the schema", at, key)
			}
		}
		for _, key := range slices.Sorted(maps.Keys(properties)) {
			child := properties[key].(map[string]any)
			optional := slices.Contains([]string{".global", ".collector.logs.batch"}, at+"."+key)
			if _, ok := have[key]; !ok && !optional && !strings.HasSuffix(at, ".batch") {
				t.Errorf("%s.%s has no default in values.yaml", at, key)
			}
			if strings.HasSuffix(at, ".batch") || key == "global" || strings.HasSuffix(at, ".resources") {
				continue
			}
			walk(at+"."+key, child, have[key])
		}
	}
	walk("", schema, values(t, string(b)))
}

// Helm's folder of CRDs is the project's.
func TestCRDsAreTheProjects(t *testing.T) {
	read := func(pattern string) map[string]string {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, p := range paths {
			b, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			out[filepath.Base(p)] = string(b)
		}
		return out
	}
	if d := cmp.Diff(read("../crds/*.yaml"), read("crds/*.yaml")); d != "" {
		t.Errorf("deploy/chart/crds is not deploy/crds; make manifests copies it:\n%s", d)
	}
}

// Every profile says why it is as it is.
func TestProfilesGiveReasons(t *testing.T) {
	for _, name := range profiles.Names() {
		b, err := profiles.Read(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(b), "# ") {
			t.Errorf("%s does not begin with what it is for", name)
		}
	}
	if _, err := profiles.Read("openstack"); err == nil || !strings.Contains(err.Error(), "kubeadm") {
		t.Errorf("err = %v", err)
	}
}

// binary builds a program, once for all tests, as `make build` does.
func binary(t *testing.T, pkg string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("SKIPPED: -short: it builds the programs")
	}
	path := filepath.Join(t.TempDir(), "program")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return path
}

// The collector takes the configuration that the chart writes.
func TestTheCollectorTakesItsConfiguration(t *testing.T) {
	bin := binary(t, "../../collector")
	for name, v := range variants(t) {
		r := render(t, v, options())
		if len(ofKind(r, "ConfigMap")) == 0 {
			continue
		}
		config := get[*corev1.ConfigMap](t, r, "ConfigMap", "outrigger-collector").Data["collector.yaml"]
		path := filepath.Join(t.TempDir(), "collector.yaml")
		if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), bin, "--config", path, "--check").CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s\n%s", name, err, out, config)
		}
	}
}

// The kubelet is asked by who may ask it for its pods and no more, at the address of the
// node, and it is not trusted without a reason.
func TestAskingTheKubelet(t *testing.T) {
	for how, want := range map[string]string{
		"verified": "kubelet: https://$(NODE_IP):10250\n  kubeletCAFile: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt",
		"insecure": "kubelet: https://$(NODE_IP):10250\n  kubeletInsecure: true",
		"":         "",
	} {
		r := render(t, values(t, `collector: {kubernetes: {kubelet: "`+how+`"}}`), options())
		config := get[*corev1.ConfigMap](t, r, "ConfigMap", "outrigger-collector").Data["collector.yaml"]
		if how != "" && !strings.Contains(config, want) || how == "" && strings.Contains(config, "kubelet") {
			t.Errorf("%q: %s", how, config)
		}
		role := get[*rbacv1.ClusterRole](t, r, "ClusterRole", "outrigger-collector")
		if may := slices.ContainsFunc(role.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.Resources, "nodes/pods") }); may != (how != "") {
			t.Errorf("%q: may ask the kubelet: %v", how, may)
		}
		pod := get[*appsv1.DaemonSet](t, r, "DaemonSet", "outrigger-collector").Spec.Template.Spec
		if set := slices.ContainsFunc(pod.Containers[0].Env, func(e corev1.EnvVar) bool { return e.Name == "NODE_IP" }); set != (how != "") {
			t.Errorf("%q: has $NODE_IP: %v", how, set)
		}
	}
}

// The programs know every flag that the chart gives them: with --version they
// read all of them and end.
func TestTheProgramsKnowTheirFlags(t *testing.T) {
	parts := []struct{ kind, name, pkg string }{
		{"Deployment", "outrigger-control-plane", "../../control-plane"},
		{"Deployment", "outrigger-injector", "../../injector"},
		{"DaemonSet", "outrigger-collector", "../../collector"},
		{"DaemonSet", "outrigger-cni", "../../sidecar/cni"},
	}
	for _, part := range parts {
		bin := binary(t, part.pkg)
		for name, v := range variants(t) {
			for _, o := range ofKind(render(t, v, options()), part.kind) {
				if o.GetName() != part.name {
					continue
				}
				var args []string
				switch w := typed(t, o).(type) {
				case *appsv1.Deployment:
					args = w.Spec.Template.Spec.Containers[0].Args
				case *appsv1.DaemonSet:
					args = w.Spec.Template.Spec.Containers[0].Args
				}
				if out, err := exec.CommandContext(t.Context(), bin, append(args, "--version")...).CombinedOutput(); err != nil {
					t.Errorf("%s: %s %q: %v\n%s", name, part.name, args, err, out)
				}
			}
		}
	}
}

func TestNotesSayWhatToDoNext(t *testing.T) {
	r := render(t, nil, options())
	for _, want := range []string{"kubectl label namespace", "outrigger check", namespace} {
		if !strings.Contains(r.Notes, want) {
			t.Errorf("%q is missing in\n%s", want, r.Notes)
		}
	}
}
