package patch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// scenario is the file "settings" of a golden file.
type scenario struct {
	Plain     bool              `json:"plain"` // no native sidecars
	CNI       bool              `json:"cni"`
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels"` // of the namespace
}

func settings(native bool) Settings {
	return Settings{
		Image: "outrigger/sidecar:1.0", ControlPlane: "outrigger-control-plane.outrigger-system:15012",
		NativeSidecar: native, CPU: "10m", Memory: "32Mi", MemoryLimit: "256Mi", EnvoyImage: "envoyproxy/envoy:v1.38",
	}
}

// Each file holds a sentence, the settings, a manifest, and what injection makes
// of it. Whatever the manifest: a second injection changes no byte, and the JSON
// patch of a pod, applied, gives the patched pod.
func TestGolden(t *testing.T) {
	if files, err := filepath.Glob("testdata/*.txtar"); err != nil || len(files) < 10 {
		t.Fatal("golden files are missing", err)
	}
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		var sc scenario
		if err := yaml.UnmarshalStrict([]byte(c.Input("settings")), &sc); err != nil {
			t.Fatal(err)
		}
		in, ns, s := []byte(c.Input("in.yaml")), Namespace{sc.Namespace, sc.Labels}, settings(!sc.Plain)
		s.CNI = sc.CNI
		out, decisions, err := YAML(in, ns, s)
		got := string(out)
		if err != nil {
			got = "error: " + err.Error() + "\n"
		} else if again, _, err := YAML(out, ns, s); err != nil || !bytes.Equal(again, out) {
			t.Errorf("a second injection: %v\n%s", err, cmp.Diff(string(out), string(again)))
		}
		checkPods(t, in, ns, s)
		c.Want("decisions", describe(decisions))
		c.Want("out.yaml", got)
	})
}

func describe(decisions []Decision) string {
	var b strings.Builder
	for _, d := range decisions {
		verdict := "not injected"
		switch {
		case d.Err != nil:
			verdict = "refused"
		case d.Injected:
			verdict = "injected"
		}
		fmt.Fprintf(&b, "%s: %s: %s\n", d.Object, verdict, d.Reason)
		for _, w := range d.Warnings {
			fmt.Fprintf(&b, "  warning: %s\n", w)
		}
	}
	return b.String()
}

func checkPods(t *testing.T, manifest []byte, ns Namespace, s Settings) {
	t.Helper()
	for _, doc := range documents(manifest) {
		pod := &corev1.Pod{}
		if err := yaml.Unmarshal(doc.body, pod); err != nil || pod.Kind != "Pod" {
			continue
		}
		before := pod.DeepCopy()
		patched, d := Pod(pod, ns, s)
		if !reflect.DeepEqual(pod, before) {
			t.Error("Pod changed its argument")
		}
		if d.Err != nil && !reflect.DeepEqual(patched, pod) {
			t.Error("a refused pod was changed")
		}
		ops, err := Diff(pod, patched)
		if err != nil {
			t.Fatal(err)
		}
		a, b := encode(t, pod), encode(t, patched)
		original, err := decodeJSON(a)
		if err != nil {
			t.Fatal(err)
		}
		applied, err := apply(original, ops)
		if err != nil {
			t.Fatalf("%v\n%s", err, ops)
		}
		want, err := decodeJSON(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, applied); diff != "" {
			t.Errorf("the patch does not make the pod: -want +got:\n%s", diff)
		}
		again, _ := Pod(patched, ns, s)
		if !bytes.Equal(encode(t, again), b) {
			t.Error("a second injection changes the pod")
		}
	}
}

func encode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBadAnnotations(t *testing.T) {
	f := func(key, value, want string) {
		t.Helper()
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "p", Annotations: map[string]string{key: value}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}},
		}
		patched, d := Pod(pod, Namespace{"shop", map[string]string{LabelInjection: "enabled"}}, settings(true))
		if d.Err == nil || d.Injected || !strings.Contains(d.Err.Error(), want) || !strings.Contains(d.Err.Error(), key) {
			t.Errorf("%s=%q: %+v, want %q", key, value, d, want)
		}
		if !reflect.DeepEqual(patched, pod) {
			t.Errorf("%s=%q: the pod was changed", key, value)
		}
	}
	f(AnnotationProxy, "nginx", "write outrigger, envoy, or remove it")
	f(AnnotationCPU, "many", "is not a positive quantity")
	f(AnnotationMemory, "-1", "is not a positive quantity")
	f(AnnotationMemory, "1Gi", "is over the limit 256Mi")
	f(AnnotationMemory, strings.Repeat("9", 5000), "has 5000 bytes: at most 4096")
	f(AnnotationLogLevel, "loud", "write debug, info, warn or error")
	f(AnnotationMTLS, "Strict", "write off, permissive or strict")
	f(AnnotationUpstreams, "payments.shop=127.0.0.1:4001", "has no port")
	f(AnnotationUpstreams, "payments.shop:80=127.0.0.1:0", "write a port")
	f(AnnotationUpstreams, "payments.shop:80=127.0.0.1:15020", "the sidecar's own metrics port")
	f(AnnotationUpstreams, "payments.shop:80=127.0.0.1:15001", "the sidecar's own outbound port")
	f(AnnotationUpstreams, "a.b:80=127.0.0.1:4001,c.d:80=127.0.0.1:4001", "both listen on 127.0.0.1:4001")
	f(AnnotationUpstreams, strings.Repeat("x", 70000), "has 70000 bytes: at most 65536")
	f(AnnotationInbound, "udp:127.0.0.1:1=127.0.0.1:2", "the address to listen on")
	f(AnnotationInbound, "0.0.0.0:15021=127.0.0.1:8080", "the sidecar's own health port")
	f(annotationExclude, "9092", "write outrigger.dev/exclude-inbound-ports for ports of the pod")
	f(AnnotationCapture, "no", "write true or false")
	f(AnnotationExcludeInboundPorts, "http", `"http" is not a port`)
	f(AnnotationExcludeInboundPorts, "80,0", `"0" is not a port`)
	f(AnnotationExcludeInboundPorts, "15006", "a port of the proxy itself")
	f(AnnotationExcludeOutboundPorts, "65536", `"65536" is not a port`)
	f(AnnotationExcludeOutboundPorts, " , ", "names nothing")
	f(AnnotationExcludeOutboundPorts, strings.Repeat("80,", 65), "has 65 items: at most 64")
	f(AnnotationExcludeOutboundCIDRs, "10.0.0.1", "one address as 192.0.2.1/32")
	f(AnnotationExcludeOutboundCIDRs, "10.0.0.1/8", "write 10.0.0.0/8, or for one address 10.0.0.1/32")
	f(AnnotationIncludeOutboundCIDRs, "*", "is not a CIDR")
	f(AnnotationIncludeOutboundCIDRs, "::ffff:10.0.0.0/104", "is not a CIDR")
}

// Pods that ask for what cannot be are refused, and nothing is half done.
func TestRefused(t *testing.T) {
	user := int64(UserID)
	f := func(want string, native bool, change func(*corev1.Pod, *Settings)) {
		t.Helper()
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "p", Annotations: map[string]string{}},
			Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}},
		}
		s := settings(native)
		change(pod, &s)
		patched, d := Pod(pod, Namespace{"shop", map[string]string{LabelInjection: "enabled"}}, s)
		if d.Err == nil || d.Injected || !strings.Contains(d.Err.Error(), want) {
			t.Errorf("%+v, want %q", d, want)
		}
		if !reflect.DeepEqual(patched, pod) {
			t.Errorf("%s: the pod was changed", want)
		}
	}
	f("container app runs as user 1337", true, func(p *corev1.Pod, _ *Settings) {
		p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user}
	})
	f("container app runs as user 1337", false, func(p *corev1.Pod, _ *Settings) {
		p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsUser: &user}
	})
	f("container outrigger-init has a name that is the injector's", true, func(p *corev1.Pod, _ *Settings) {
		p.Spec.InitContainers = []corev1.Container{{Name: InitName}}
	})
	f("container outrigger-proxy: securityContext.runAsUser is 2000", true, func(p *corev1.Pod, _ *Settings) {
		other := int64(2000)
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: ContainerName, SecurityContext: &corev1.SecurityContext{RunAsUser: &other}})
	})
	f("has been given no image of Envoy", true, func(p *corev1.Pod, s *Settings) {
		p.Annotations[AnnotationProxy], s.EnvoyImage = "envoy", ""
	})
	f("needs native sidecars", false, func(p *corev1.Pod, _ *Settings) { p.Annotations[AnnotationProxy] = "envoy" })
	f("the pod has 129 probes", true, func(p *corev1.Pod, _ *Settings) {
		p.Spec.Containers = nil
		for i := range 129 {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprint("c", i), LivenessProbe: tcpProbe(80)})
		}
	})
	f("the pod's probes have", true, func(p *corev1.Pod, _ *Settings) {
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
			Port: intstr.FromInt32(80), HTTPHeaders: []corev1.HTTPHeader{{Name: "a", Value: strings.Repeat("x", bootstrap.MaxProbesBytes)}},
		}}}
	})
}

func tcpProbe(port int32) *corev1.Probe {
	return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(port)}}}
}

// Another webhook changes the pod after us, in every way that one may: the next
// invocation brings it into order, and a further one has nothing to do.
func TestAgain(t *testing.T) {
	ns := Namespace{"shop", map[string]string{LabelInjection: "enabled"}}
	always := corev1.ContainerRestartPolicyAlways
	for _, native := range []bool{true, false} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", ReadinessProbe: tcpProbe(1)}}}}
		s := settings(native)
		once, d := Pod(pod, ns, s)
		if !d.Injected {
			t.Fatal(d)
		}
		once.Spec.InitContainers = append([]corev1.Container{{Name: "first"}}, once.Spec.InitContainers...)
		once.Spec.InitContainers = append(once.Spec.InitContainers, corev1.Container{Name: "side", RestartPolicy: &always, StartupProbe: tcpProbe(2)})
		once.Spec.Containers = append([]corev1.Container{{Name: "late", LivenessProbe: tcpProbe(3)}}, once.Spec.Containers...)
		find(once, ContainerName).Image = "mirror.example/sidecar:1.0"
		twice, d := Pod(once, ns, s)
		if d.Err != nil || d.Injected || d.Reason != "already injected" {
			t.Fatal(d)
		}
		var order []string
		for _, c := range append(append([]corev1.Container{}, twice.Spec.InitContainers...), twice.Spec.Containers...) {
			order = append(order, c.Name)
		}
		want := "outrigger-init outrigger-proxy first side late app"
		if !native {
			want = "first side outrigger-init outrigger-proxy late app"
		}
		if got := strings.Join(order, " "); got != want {
			t.Errorf("order %s, want %s", got, want)
		}
		proxy := find(twice, ContainerName)
		if proxy.Image != "mirror.example/sidecar:1.0" {
			t.Errorf("the image that another webhook gave is now %s", proxy.Image)
		}
		told, err := bootstrap.ParseProbes(proxy.Env[len(proxy.Env)-1].Value)
		if err != nil || len(told) != 3 || told["/app-health/app/readyz"].TCP.Port != 1 || told["/app-health/side/startupz"].TCP.Port != 2 || told["/app-health/late/livez"].TCP.Port != 3 {
			t.Errorf("probes %+v, %v", told, err)
		}
		if p := find(twice, "late").LivenessProbe.HTTPGet; p == nil || p.Path != "/app-health/late/livez" {
			t.Errorf("the late probe is %+v", find(twice, "late").LivenessProbe)
		}
		thrice, _ := Pod(twice, ns, s)
		if !bytes.Equal(encode(t, thrice), encode(t, twice)) {
			t.Errorf("a third invocation changes the pod: %s", cmp.Diff(twice, thrice))
		}
		user := int64(UserID)
		find(twice, "late").SecurityContext = &corev1.SecurityContext{RunAsUser: &user}
		if _, d := Pod(twice, ns, s); d.Err == nil || !strings.Contains(d.Err.Error(), "container late runs as user 1337") {
			t.Errorf("a late container of the proxy's user: %+v", d)
		}
		find(thrice, ContainerName).Env[len(proxy.Env)-1].Value = "{"
		if _, d := Pod(thrice, ns, s); d.Err == nil || !strings.Contains(d.Err.Error(), "leave it alone") {
			t.Errorf("probes that cannot be read: %+v", d)
		}
	}
}

func TestWorkload(t *testing.T) {
	yes := true
	f := func(want, name, generate, kind, owner string, labels map[string]string) {
		t.Helper()
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, GenerateName: generate, Labels: labels}}
		if kind != "" {
			pod.OwnerReferences = []metav1.OwnerReference{{Kind: "Other", Name: "other"}, {Kind: kind, Name: owner, Controller: &yes}}
		}
		if got := workload(pod); got != want {
			t.Errorf("workload of %q %q owned by %s %q = %q, want %q", name, generate, kind, owner, got, want)
		}
	}
	f("web", "", "web-7d9f8-", "ReplicaSet", "web-7d9f8", map[string]string{"pod-template-hash": "7d9f8"})
	f("web-7d9f8", "", "web-7d9f8-", "ReplicaSet", "web-7d9f8", nil)
	f("db", "db-0", "", "StatefulSet", "db", nil)
	f("nightly", "", "nightly-29380920-", "Job", "nightly-29380920", nil)
	f("import-2026", "", "", "Job", "import-2026", nil)
	f("single", "single", "", "", "", nil)
	f("gen", "", "gen-", "", "", nil)
	f("pod", "", "", "", "", nil)
}

func TestSettings(t *testing.T) {
	if err := settings(true).Validate(); err != nil {
		t.Error(err)
	}
	f := func(want string, change func(*Settings)) {
		t.Helper()
		s := settings(true)
		change(&s)
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	f(`image ""`, func(s *Settings) { s.Image = "" })
	f(`envoy image "a b"`, func(s *Settings) { s.EnvoyImage = "a b" })
	f(`pull policy "Sometimes"`, func(s *Settings) { s.PullPolicy = "Sometimes" })
	f(`control plane "here"`, func(s *Settings) { s.ControlPlane = "here" })
	f(`trust domain "a/b"`, func(s *Settings) { s.TrustDomain = "a/b" })
	f(`log level "x"`, func(s *Settings) { s.LogLevel = "x" })
	f(`="much" is not a positive quantity`, func(s *Settings) { s.CPU = "much" })
}

func TestJSONPatch(t *testing.T) {
	f := func(a, b, want string) {
		t.Helper()
		got, err := JSONPatch([]byte(a), []byte(b))
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != want {
			t.Errorf("%s -> %s:\ngot  %s\nwant %s", a, b, got, want)
		}
	}
	f(`{"a":1}`, `{"a":1}`, `[]`)
	f(`{"a":1}`, `{"a":2}`, `[{"op":"add","path":"/a","value":2}]`)
	f(`{"a":1}`, `{"a":null}`, `[{"op":"add","path":"/a","value":null}]`)
	f(`{"a":1,"c":3}`, `{"b":2,"c":3}`, `[{"op":"remove","path":"/a"},{"op":"add","path":"/b","value":2}]`)
	f(`{}`, `{"a/b":{"c~d":1}}`, `[{"op":"add","path":"/a~1b","value":{"c~d":1}}]`)
	f(`{"a/b":{"c~d":0}}`, `{"a/b":{"c~d":1}}`, `[{"op":"add","path":"/a~1b/c~0d","value":1}]`)
	f(`[1,2,3]`, `[0,1,2,3]`, `[{"op":"add","path":"/0","value":0}]`)
	f(`[1,2,3]`, `[1,3]`, `[{"op":"remove","path":"/1"}]`)
	f(`[1,2]`, `[1,2,3]`, `[{"op":"add","path":"/2","value":3}]`)
	f(`[1,2]`, `[2,1]`, `[{"op":"remove","path":"/0"},{"op":"add","path":"/1","value":1}]`)
	f(`[{"name":"x","v":1},{"name":"y"}]`, `[{"name":"n"},{"name":"x","v":2},{"name":"y"}]`,
		`[{"op":"add","path":"/0","value":{"name":"n"}},{"op":"add","path":"/1/v","value":2}]`)
	f(`[{"name":"x","v":1},{"name":"y"},{"name":"z"}]`, `[{"name":"y"},{"name":"z"},{"name":"x","v":2}]`,
		`[{"op":"move","from":"/1","path":"/0"},{"op":"move","from":"/2","path":"/1"},{"op":"add","path":"/2/v","value":2}]`)
	f(`[{"name":"x"},{"name":"y"}]`, `[{"name":"y"}]`, `[{"op":"remove","path":"/0"}]`)
	f(`[{"name":"x"},{"name":"x"}]`, `[{"name":"x"}]`, `[{"op":"remove","path":"/1"}]`)
	f(`[{"name":"x","v":1}]`, `[{"name":"x","v":2}]`, `[{"op":"add","path":"/0/v","value":2}]`)
	f(`{"n":9007199254740993}`, `{"n":9007199254740993,"m":1}`, `[{"op":"add","path":"/m","value":1}]`)
}

// Of any two JSON values the patch makes the second of the first.
func FuzzJSONPatch(f *testing.F) {
	f.Add(`{"a":[1,2,{"name":"x"}]}`, `{"a":[2,{"name":"x","y":1}],"b":null}`)
	f.Add(`[{"name":"x"},{"name":"y","v":1},{"name":"z"}]`, `[{"name":"z"},{"name":"n"},{"name":"y"}]`)
	f.Add(`[1,1,2,1]`, `[1,2,1,1,3]`)
	f.Add(`{"a":{"b":{}}}`, `{"a":[]}`)
	f.Fuzz(func(t *testing.T, a, b string) {
		ops, err := JSONPatch([]byte(a), []byte(b))
		if err != nil {
			return
		}
		original, err := decodeJSON([]byte(a))
		if err != nil {
			t.Fatal(err)
		}
		want, err := decodeJSON([]byte(b))
		if err != nil {
			t.Fatal(err)
		}
		got, err := apply(original, ops)
		if err != nil {
			t.Fatalf("%s -> %s: %v\n%s", a, b, err, ops)
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%s -> %s: %v\n%s", a, b, got, ops)
		}
	})
}

// Whatever pod: no panic, the argument untouched, a refused pod unchanged, a patch
// that makes the patched pod, and nothing left to do for a second invocation.
func FuzzPod(f *testing.F) {
	f.Add([]byte(`{"metadata":{"name":"web","annotations":{"outrigger.dev/capture":"false"}},"spec":{"containers":[{"name":"app"}]}}`), true, false)
	f.Add([]byte(`{"metadata":{"generateName":"web-","annotations":{"outrigger.dev/proxy":"envoy","outrigger.dev/exclude-inbound-ports":"1"}},"spec":{"containers":[{"name":"app","livenessProbe":{"httpGet":{"port":"http"}},"ports":[{"name":"http","containerPort":8080}]}]}}`), true, true)
	f.Add([]byte(`{"spec":{"restartPolicy":"Never","initContainers":[{"name":"x","restartPolicy":"Always","startupProbe":{"grpc":{"port":1}}},{}],"containers":[{"name":"outrigger-proxy","image":"auto"},{"name":"a","readinessProbe":{"tcpSocket":{"port":70000}}},{"name":"a","readinessProbe":{"tcpSocket":{"port":7}}}]}}`), false, false)
	f.Add([]byte(`{"metadata":{"annotations":{"outrigger.dev/status":"injected"}},"spec":{"initContainers":[{"name":"outrigger-init"},{"name":"outrigger-agent","env":[{"name":"OUTRIGGER_PROBES","value":"null"}]}],"containers":[{"name":"outrigger-proxy"},{"name":"b","livenessProbe":{"tcpSocket":{"port":7}}}]}}`), false, true)
	f.Fuzz(func(t *testing.T, data []byte, native, cni bool) {
		pod := &corev1.Pod{}
		if err := json.Unmarshal(data, pod); err != nil {
			return
		}
		s := settings(native)
		s.CNI = cni
		ns := Namespace{"shop", map[string]string{LabelInjection: "enabled"}}
		before := encode(t, pod)
		patched, d := Pod(pod, ns, s)
		if !bytes.Equal(encode(t, pod), before) {
			t.Fatal("the argument was changed")
		}
		after := encode(t, patched)
		if d.Err != nil && !bytes.Equal(after, before) {
			t.Fatal("a refused pod was changed")
		}
		ops, err := Diff(pod, patched)
		if err != nil {
			t.Fatal(err)
		}
		original, err := decodeJSON(before)
		if err != nil {
			t.Fatal(err)
		}
		applied, err := apply(original, ops)
		if err != nil {
			t.Fatalf("%v\n%s", err, ops)
		}
		want, err := decodeJSON(after)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(applied, want) {
			t.Fatalf("the patch does not make the pod: %s", cmp.Diff(want, applied))
		}
		if again, second := Pod(patched, ns, s); d.Injected && (second.Err != nil || !bytes.Equal(encode(t, again), after)) {
			t.Fatalf("a second injection: %v\n%s", second.Err, cmp.Diff(patched, again))
		}
	})
}

// Splitting and joining a stream loses no byte.
func FuzzDocuments(f *testing.F) {
	f.Add("a: 1\n---\nb: |\n  ---\n--- # two\nc\n---x\n")
	f.Add("---")
	f.Add("\n---\n---\n")
	f.Fuzz(func(t *testing.T, in string) {
		var b strings.Builder
		for _, d := range documents([]byte(in)) {
			b.Write(d.separator)
			b.Write(d.body)
		}
		if b.String() != in {
			t.Fatalf("%q became %q", in, b.String())
		}
	})
}
