package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
	"github.com/outrigger-mesh/outrigger/injector/audit"
	"github.com/outrigger-mesh/outrigger/injector/patch"
	kube "github.com/outrigger-mesh/outrigger/outrigger/cluster"
)

// server is a real API server with etcd.
var server *testbed.Server

// within is how long anything may take on a busy machine.
const within = 60 * time.Second

// cluster is a namespace of a real API server for one test, and a webhook
// configuration that concerns nothing else.
type cluster struct {
	*kubernetes.Clientset
	ns         string
	kubeconfig string
	warnings   *warnings
}

type warnings struct {
	mu   sync.Mutex
	text []string
}

func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text = append(w.text, text)
}

func (w *warnings) all() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.text, "\n")
}

func newCluster(t *testing.T, labels map[string]string) *cluster {
	t.Helper()
	s := server.Need(t)
	leaks := goleak.IgnoreCurrent()
	// client-go shares its connections and keeps them; an API server that was
	// started anew has its own goroutines.
	t.Cleanup(func() {
		goleak.VerifyNone(t, leaks, goleak.IgnoreAnyFunction("golang.org/x/net/http2.(*ClientConn).readLoop"),
			goleak.IgnoreAnyFunction("github.com/outrigger-mesh/outrigger/deploy/testbed.start.func1"), goleak.IgnoreAnyFunction("os/exec.(*Cmd).Start.func2"))
	})
	c := &cluster{ns: strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-")), warnings: &warnings{}}
	conf := rest.CopyConfig(s.Config)
	conf.WarningHandler = c.warnings
	var err error
	if c.Clientset, err = kubernetes.NewForConfig(conf); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: c.ns, Labels: labels}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // so that no other test's audit finds it; nobody here would end the namespace
		if _, err := c.CoreV1().Namespaces().Patch(context.Background(), c.ns, types.MergePatchType, []byte(`{"metadata":{"labels":{"outrigger.dev/injection":null}}}`), metav1.PatchOptions{}); err != nil {
			t.Error(err)
		}
		now := int64(0)
		if err := c.CoreV1().Pods(c.ns).DeleteCollection(context.Background(), metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{}); err != nil {
			t.Error(err)
		}
	})
	c.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	file := clientcmdapi.NewConfig()
	file.Clusters["c"] = &clientcmdapi.Cluster{Server: s.Config.Host, CertificateAuthorityData: s.Config.CAData}
	file.AuthInfos["u"] = &clientcmdapi.AuthInfo{ClientCertificateData: s.Config.CertData, ClientKeyData: s.Config.KeyData}
	file.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	file.CurrentContext = "x"
	if err := clientcmd.WriteToFile(*file, c.kubeconfig); err != nil {
		t.Fatal(err)
	}
	return c
}

// injector is a program that runs.
type injector struct {
	reviews, admin string
	log            *safeBuffer
	stop           func()
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// run starts the whole program with a certificate of its own, until stop or the
// end of the test.
func (c *cluster) run(t *testing.T, listen string, args ...string) *injector {
	t.Helper()
	conf, err := parse(append([]string{
		"--listen=" + listen, "--admin-address=127.0.0.1:0", "--self-signed", "--kubeconfig=" + c.kubeconfig, "--namespace=" + c.ns,
		"--webhook-configuration=" + c.ns, "--certificate-names=127.0.0.1", "--image=outrigger/sidecar:1", "--envoy-image=envoyproxy/envoy:v1.38", "--control-plane=cp.outrigger-system:15012",
	}, args...), io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	in := &injector{log: &safeBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	bound, done := make(chan [2]net.Addr, 1), make(chan error, 1)
	go func() {
		done <- serve(ctx, conf, in.log, func(webhook, admin net.Addr) { bound <- [2]net.Addr{webhook, admin} })
	}()
	select {
	case at := <-bound:
		in.reviews, in.admin = at[0].String(), at[1].String()
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	in.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the injector ended: %v\n%s", err, in.log)
		}
	})
	t.Cleanup(in.stop)
	return in
}

// get reads a page of the admin port.
func (in *injector) get(t *testing.T, path string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+in.admin+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// register makes a MutatingWebhookConfiguration that sends the pods of the
// namespace to an address.
func (c *cluster) register(t *testing.T, name, address string, policy admissionregistrationv1.FailurePolicyType, change ...func(*admissionregistrationv1.MutatingWebhook)) {
	t.Helper()
	url, none, seconds, again := "https://"+address+"/mutate", admissionregistrationv1.SideEffectClassNoneOnDryRun, int32(10), admissionregistrationv1.IfNeededReinvocationPolicy
	w := admissionregistrationv1.MutatingWebhook{
		Name: name + ".outrigger.dev", ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: &url},
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
		}},
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": c.ns, patch.LabelInjection: "enabled"}},
		FailurePolicy:     &policy, SideEffects: &none, TimeoutSeconds: &seconds, ReinvocationPolicy: &again,
		AdmissionReviewVersions: []string{"v1"},
	}
	for _, f := range change {
		f(&w)
	}
	conf := &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}, Webhooks: []admissionregistrationv1.MutatingWebhook{w}}
	if _, err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), conf, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// eventually asks until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// works waits until pods are injected: the API server learns of a configuration
// and its caBundle in its own time.
func (c *cluster) works(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		pod, err := c.CoreV1().Pods(c.ns).Create(t.Context(), restricted(bare("probe-"+unique(), "")), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err == nil && !patch.Injected(pod) && pod.Annotations[patch.AnnotationStatus] != patch.StatusSkipped {
			err = errors.New("the pod was not injected")
		}
		return err
	})
}

func unique() string { return fmt.Sprint(time.Now().UnixNano()) }

// bare is a pod as a user writes it; an owner makes it one of a Deployment.
func bare(name, owner string) *corev1.Pod {
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": "web"}},
		// As the ServiceAccount plugin would set it, which has nobody here who creates one.
		Spec: corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "app", Image: "shop/web:1", LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 7000}}}}}},
	}
	if owner != "" {
		pod.Name, pod.GenerateName = "", owner+"-6b7f-"
		pod.Labels["pod-template-hash"] = "6b7f"
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: owner + "-6b7f", UID: types.UID("5a5b-" + owner), Controller: &yes}}
	}
	return pod
}

func (c *cluster) create(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	got, err := c.CoreV1().Pods(c.ns).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func names(pod *corev1.Pod) string {
	var out []string
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		out = append(out, c.Name)
	}
	return strings.Join(out, " ")
}

func enabled(more ...string) map[string]string {
	l := map[string]string{patch.LabelInjection: "enabled"}
	for i := 0; i+1 < len(more); i += 2 {
		l[more[i]] = more[i+1]
	}
	return l
}

// Another webhook changes the pod behind ours, so that the API server invokes
// ours again: each container is there once, and the late one's probe is led too.
func TestReinvocation(t *testing.T) {
	c := newCluster(t, enabled())
	in := c.run(t, "127.0.0.1:0")
	other := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
		}
		kind := admissionv1.PatchTypeJSONPatch
		review.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: true}
		if !bytes.Contains(review.Request.Object.Raw, []byte(`"name":"late"`)) {
			review.Response.PatchType = &kind
			review.Response.Patch = []byte(`[{"op":"add","path":"/spec/containers/0","value":{"name":"late","image":"late:1","readinessProbe":{"tcpSocket":{"port":9}}}},` +
				`{"op":"add","path":"/spec/initContainers/0","value":{"name":"early","image":"early:1"}}]`)
		}
		review.Request = nil
		if err := json.NewEncoder(w).Encode(review); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(other.Close)
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.register(t, c.ns+"-z", strings.TrimPrefix(other.URL, "https://"), admissionregistrationv1.Fail, func(w *admissionregistrationv1.MutatingWebhook) {
		w.ClientConfig.CABundle = pemOf(other)
	})
	c.works(t)
	for _, pod := range []*corev1.Pod{bare("single", ""), bare("", "web")} {
		before := counted(in.get(t, "/metrics"), `outrigger_injections_total{result="again"}`)
		got := c.create(t, pod)
		if n := names(got); n != "outrigger-init outrigger-proxy early late app" {
			t.Errorf("containers %s", n)
		}
		for _, p := range []*corev1.Probe{got.Spec.Containers[0].ReadinessProbe, got.Spec.Containers[1].LivenessProbe} {
			if p.HTTPGet == nil || !strings.HasPrefix(p.HTTPGet.Path, "/app-health/") {
				t.Errorf("probe %+v", p)
			}
		}
		if proxy := got.Spec.InitContainers[1]; !strings.Contains(proxy.Env[len(proxy.Env)-1].Value, "/app-health/late/readyz") {
			t.Errorf("the proxy knows of %+v", proxy.Env)
		}
		if after := counted(in.get(t, "/metrics"), `outrigger_injections_total{result="again"}`); after != before+1 {
			t.Errorf("invoked again %v times", after-before)
		}
	}
	if _, err := c.CoreV1().Pods(c.ns).List(t.Context(), metav1.ListOptions{}); err != nil {
		t.Error(err)
	}
}

func pemOf(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// counted is the value of a series in a page of metrics.
func counted(page, series string) (v float64) {
	for line := range strings.Lines(page) {
		if rest, ok := strings.CutPrefix(line, series+" "); ok {
			_, _ = fmt.Sscan(rest, &v)
		}
	}
	return v
}

// The injector is away. With Fail no pod is created; with Ignore pods run without
// a sidecar, and the audit names each with its cause and remedy, in the report,
// the metric and an Event. When all is mended it has nothing left to say.
func TestAway(t *testing.T) {
	c := newCluster(t, enabled())
	in := c.run(t, "127.0.0.1:0", "--audit", "--audit-interval=1s")
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.works(t)
	c.create(t, bare("meshed", ""))
	in.stop()
	if _, err := c.CoreV1().Pods(c.ns).Create(t.Context(), bare("nothing", ""), metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("with Fail: %v", err)
	}
	ignore := fmt.Appendf(nil, `[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}]`)
	if _, err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(t.Context(), c.ns, types.JSONPatchType, ignore, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := c.CoreV1().Pods(c.ns).Create(t.Context(), bare("single", ""), metav1.CreateOptions{})
		return err
	})
	deployed := c.create(t, bare("", "web"))
	host := bare("", "node")
	host.Spec.HostNetwork = true
	node := c.create(t, host)
	loud := bare("loud", "")
	loud.Annotations = map[string]string{patch.AnnotationLogLevel: "loud"}
	c.create(t, loud)
	out := bare("out", "")
	out.Labels[patch.LabelInjection] = "disabled"
	c.create(t, out)
	old := c.create(t, bare("", "done"))
	old.Status.Phase = corev1.PodSucceeded
	if _, err := c.CoreV1().Pods(c.ns).UpdateStatus(t.Context(), old, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}

	want := map[string][2]string{ // cause and command by pod
		"single":      {"missed", "kubectl -n testaway get pod single -o yaml | kubectl replace --force -f -"},
		deployed.Name: {"missed", "kubectl -n testaway rollout restart deployment/web"},
		node.Name:     {"host-network", `kubectl -n testaway patch deployment/node -p '{"spec":{"template":{"metadata":{"labels":{"outrigger.dev/injection":"disabled"}}}}}'`},
		"loud":        {"invalid", "kubectl -n testaway edit pod loud && kubectl -n testaway get pod loud -o yaml | kubectl replace --force -f -"},
		"out":         {"disabled", "kubectl -n testaway label pod out outrigger.dev/injection=enabled --overwrite && kubectl -n testaway get pod out -o yaml | kubectl replace --force -f -"},
	}
	check := func(r *audit.Report) {
		t.Helper()
		got := map[string][2]string{}
		for _, f := range r.Findings {
			got[f.Pod] = [2]string{string(f.Cause), f.Command}
		}
		for pod, w := range want {
			if got[pod] != w {
				t.Errorf("pod %s: %q, want %q", pod, got[pod], w)
			}
		}
		if len(got) != len(want) || r.Meshed != 1 || r.Unmeshed() != 4 {
			t.Errorf("%d findings, %d meshed, %d unmeshed", len(got), r.Meshed, r.Unmeshed())
		}
	}
	settings := patch.Settings{Image: "elsewhere.example/outrigger/sidecar:1", NativeSidecar: true}
	report, err := kube.Audit(t.Context(), c, c.ns, settings)
	if err != nil {
		t.Fatal(err)
	}
	check(report)

	// The same by the program, when it is back.
	in = c.run(t, in.reviews, "--audit", "--audit-interval=1s")
	eventually(t, func() error {
		page := in.get(t, "/metrics")
		if counted(page, `outrigger_audit_pods{cause="missed"}`) != 2 || counted(page, `outrigger_audit_pods{cause="host-network"}`) != 1 || counted(page, "outrigger_audit_meshed_pods") != 1 {
			return errors.New("the metric does not say so:\n" + page)
		}
		return nil
	})
	eventually(t, func() error {
		events, err := c.CoreV1().Events(c.ns).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + deployed.Name})
		if err != nil || len(events.Items) == 0 {
			return fmt.Errorf("%d Events, %w", len(events.Items), err)
		}
		if e := events.Items[0]; e.Reason != "NotMeshed" || !strings.Contains(e.Message, "rollout restart deployment/web") || e.InvolvedObject.UID != deployed.UID {
			t.Errorf("Event %+v", e)
		}
		return nil
	})

	// Mended as told: pods are created anew.
	for pod := range want {
		if err := c.CoreV1().Pods(c.ns).Delete(t.Context(), pod, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	c.works(t)
	c.create(t, bare("single", ""))
	eventually(t, func() error {
		report, err := kube.Audit(t.Context(), c, c.ns, settings)
		if err == nil && (len(report.Findings) != 0 || report.Meshed != 2) {
			err = fmt.Errorf("%+v", report)
		}
		return err
	})
	settings.Image = "outrigger/sidecar:2"
	if report, err = kube.Audit(t.Context(), c, c.ns, settings); err != nil || len(report.Findings) != 2 || report.Findings[0].Cause != audit.Outdated || report.Unmeshed() != 0 {
		t.Errorf("after an upgrade: %+v, %v", report, err)
	}
}

// The label comes after the pod; a pod's own label counts outside of enabled
// namespaces; and the settings of an installed injector are found.
func TestLabelledLater(t *testing.T) {
	c := newCluster(t, nil)
	c.create(t, bare("first", ""))
	own := bare("own", "")
	own.Labels[patch.LabelInjection] = "enabled"
	c.create(t, own)
	ask := func() *audit.Report {
		t.Helper()
		r, err := kube.Audit(t.Context(), c, c.ns, patch.Settings{NativeSidecar: true})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := ask(); len(r.Findings) != 1 || r.Findings[0].Pod != "own" || r.Findings[0].Cause != audit.Missed {
		t.Errorf("%+v", r)
	}
	time.Sleep(1100 * time.Millisecond) // stamps are of whole seconds
	label := []byte(`{"metadata":{"labels":{"outrigger.dev/injection":"enabled"}}}`)
	if _, err := c.CoreV1().Namespaces().Patch(t.Context(), c.ns, types.MergePatchType, label, metav1.PatchOptions{FieldManager: "kubectl-label"}); err != nil {
		t.Fatal(err)
	}
	if r := ask(); len(r.Findings) != 2 || r.Findings[0].Pod != "first" || r.Findings[0].Cause != audit.Later || !strings.Contains(r.Findings[0].Message, "after the pod was created") || r.Findings[1].Cause != audit.Missed {
		t.Errorf("%+v", r)
	}
	all, err := kube.Audit(t.Context(), c, "", patch.Settings{NativeSidecar: true})
	if err != nil || !slices.ContainsFunc(all.Findings, func(f audit.Finding) bool { return f.Namespace == c.ns && f.Pod == "first" }) {
		t.Errorf("of all namespaces: %+v, %v", all, err)
	}

	labels := map[string]string{"app": "injector"}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: "outrigger-injector"},
		Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: labels},
			// As the ServiceAccount plugin would set it, which has nobody here who creates one.
			Spec: corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{Name: "injector", Image: "i", Args: []string{"--image=outrigger/sidecar:7", "--cni", "--native-sidecar=false", "--envoy-image=e"}}}},
		}},
	}
	if _, err := kube.InjectorSettings(t.Context(), c, c.ns); !apierrors.IsNotFound(err) {
		t.Errorf("no Deployment: %v", err)
	}
	if _, err := c.AppsV1().Deployments(c.ns).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if s, err := kube.InjectorSettings(t.Context(), c, c.ns); err != nil || s.Image != "outrigger/sidecar:7" || !s.CNI || s.NativeSidecar || s.EnvoyImage != "e" {
		t.Errorf("settings %+v, %v", s, err)
	}
}

// Two replicas issue certificates that live for seconds, while pods are created
// without pause and with failurePolicy Fail: none of them fails.
func TestRotation(t *testing.T) {
	c := newCluster(t, enabled())
	a := c.run(t, "127.0.0.1:0", "--certificate-lifetime=6s")
	b := c.run(t, "127.0.0.1:0", "--certificate-lifetime=6s")
	c.register(t, c.ns, a.reviews, admissionregistrationv1.Fail)
	c.works(t)
	var roots, leaves []string
	created, failed := 0, 0
	for end := time.Now().Add(32 * time.Second); time.Now().Before(end); created++ {
		if _, err := c.CoreV1().Pods(c.ns).Create(t.Context(), bare(fmt.Sprint("p", created), ""), metav1.CreateOptions{}); err != nil {
			failed++
			t.Errorf("pod %d: %v", created, err)
		}
		if created%20 == 0 {
			conn, err := tls.Dial("tcp", a.reviews, &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				t.Fatal(err)
			}
			leaf := conn.ConnectionState().PeerCertificates[0]
			_ = conn.Close()
			if s := leaf.SerialNumber.String(); !slices.Contains(leaves, s) {
				leaves = append(leaves, s)
			}
			if s := leaf.Issuer.CommonName; !slices.Contains(roots, s) {
				roots = append(roots, s)
			}
		}
	}
	t.Logf("%d pods created, %d failed, over %d certificates of %d authorities", created, failed, len(leaves), len(roots))
	if len(roots) < 3 || len(leaves) < 5 || created < 100 {
		t.Errorf("that is too little to show anything")
	}
	changes := counted(a.get(t, "/metrics"), "outrigger_webhook_certificate_changes_total") + counted(b.get(t, "/metrics"), "outrigger_webhook_certificate_changes_total")
	if changes < float64(len(leaves)) {
		t.Errorf("%v changes are counted", changes)
	}
}

// Somebody spoils the caBundle, then the Secret: both are mended at once, by
// whichever replica sees it first.
func TestRepair(t *testing.T) {
	c := newCluster(t, enabled())
	in := c.run(t, "127.0.0.1:0")
	c.run(t, "127.0.0.1:0")
	// The configuration comes after the injector.
	eventually(t, func() error {
		if !strings.Contains(in.log.String(), "there is no MutatingWebhookConfiguration") {
			return errors.New("the injector does not say that there is no configuration")
		}
		return nil
	})
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.works(t)
	spoil := []byte(`[{"op":"replace","path":"/webhooks/0/clientConfig/caBundle","value":null}]`)
	if _, err := c.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(t.Context(), c.ns, types.JSONPatchType, spoil, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	c.works(t)
	secret, err := c.CoreV1().Secrets(c.ns).Get(t.Context(), "outrigger-injector-certificate", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	good := string(secret.Data["ca.crt"])
	secret.Data = map[string][]byte{"tls.crt": []byte("nonsense")}
	if _, err := c.CoreV1().Secrets(c.ns).Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		now, err := c.CoreV1().Secrets(c.ns).Get(t.Context(), "outrigger-injector-certificate", metav1.GetOptions{})
		if err == nil && (len(now.Data["ca.crt"]) == 0 || string(now.Data["ca.crt"]) == good) {
			err = errors.New("the Secret is still spoilt")
		}
		return err
	})
	c.works(t)
	if got := in.get(t, "/ready"); got != "ready\n" {
		t.Errorf("/ready: %s", got)
	}
}

// The API server is away when the injector starts, and again later. It is not
// ready until it has a certificate, then serves on with the one it has, and needs
// no restart.
func TestOutage(t *testing.T) {
	c := newCluster(t, enabled())
	server.StopAPI()
	up := false
	defer func() {
		if !up {
			if err := server.StartAPI(); err != nil {
				t.Fatal(err)
			}
		}
	}()
	in := c.run(t, "127.0.0.1:0", "--audit", "--audit-interval=1s")
	if got := in.get(t, "/ready"); !strings.Contains(got, "there is no serving certificate yet") {
		t.Errorf("/ready: %s", got)
	}
	eventually(t, func() error {
		if counted(in.get(t, "/metrics"), "outrigger_webhook_certificate_failures_total") < 2 {
			return errors.New("no failure is counted")
		}
		return nil
	})
	if err := server.StartAPI(); err != nil {
		t.Fatal(err)
	}
	up = true
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.works(t)
	if got := in.get(t, "/ready"); got != "ready\n" {
		t.Errorf("/ready: %s", got)
	}
	server.StopAPI()
	up = false
	conn, err := tls.Dial("tcp", in.reviews, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatalf("while the API server is away: %v", err)
	}
	_ = conn.Close()
	if err := server.StartAPI(); err != nil {
		t.Fatal(err)
	}
	up = true
	c.works(t)
	c.create(t, bare("after", ""))
	eventually(t, func() error {
		if counted(in.get(t, "/metrics"), "outrigger_audit_meshed_pods") != 1 {
			return errors.New("the audit did not come back")
		}
		return nil
	})
}

// Pod Security, as the API server enforces it. Without the CNI plugin the pods of
// such a namespace run without a sidecar, and everybody is told; with it, all
// that we inject fits the strictest level.
func TestPodSecurity(t *testing.T) {
	for _, level := range []string{"baseline", "restricted"} {
		t.Run(level, func(t *testing.T) {
			c := newCluster(t, enabled(patch.LabelEnforce, level))
			in := c.run(t, "127.0.0.1:0")
			c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
			c.works(t)
			eventually(t, func() error { // the injector has to know the namespace
				pod, err := c.CoreV1().Pods(c.ns).Create(t.Context(), restricted(bare("", "web")), metav1.CreateOptions{})
				if err == nil && pod.Annotations[patch.AnnotationStatus] != patch.StatusSkipped {
					err = errors.New("the pod was not skipped")
				}
				return err
			})
			if !strings.Contains(c.warnings.all(), "the pod runs without the sidecar: namespace "+c.ns+" enforces Pod Security") {
				t.Errorf("warnings: %s", c.warnings.all())
			}
			eventually(t, func() error {
				events, err := c.CoreV1().Events(c.ns).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=ReplicaSet,reason=InjectionSkipped"})
				if err == nil && len(events.Items) == 0 {
					err = errors.New("there is no Event about the ReplicaSet")
				}
				return err
			})
			report, err := kube.Audit(t.Context(), c, c.ns, patch.Settings{NativeSidecar: true})
			if err != nil || report.Unmeshed() == 0 || report.Findings[0].Cause != audit.PodSecurity {
				t.Errorf("audit %+v, %v", report, err)
			}
			// Had it been injected, it would not be there at all.
			injected, d := patch.Pod(restricted(bare("direct", "")), patch.Namespace{Name: "elsewhere", Labels: enabled()}, patch.Settings{Image: "i", ControlPlane: "c:1", NativeSidecar: true})
			if !d.Injected {
				t.Fatal(d)
			}
			if _, err := c.CoreV1().Pods(c.ns).Create(t.Context(), injected, metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "NET_ADMIN") {
				t.Errorf("NET_ADMIN under %s: %v", level, err)
			}
		})
	}
	t.Run("cni", func(t *testing.T) {
		c := newCluster(t, enabled(patch.LabelEnforce, "restricted"))
		in := c.run(t, "127.0.0.1:0", "--cni")
		plain := c.run(t, "127.0.0.1:0", "--cni", "--native-sidecar=false", "--webhook-configuration="+c.ns+"-plain", "--certificate-secret=plain")
		c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail, func(w *admissionregistrationv1.MutatingWebhook) {
			w.ObjectSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "plain", Operator: metav1.LabelSelectorOpDoesNotExist}}}
		})
		c.register(t, c.ns+"-plain", plain.reviews, admissionregistrationv1.Fail, func(w *admissionregistrationv1.MutatingWebhook) {
			w.ObjectSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"plain": "yes"}}
		})
		make := func(want string, change func(*corev1.Pod)) {
			t.Helper()
			pod := restricted(bare("p"+unique(), ""))
			change(pod)
			eventually(t, func() error {
				got, err := c.CoreV1().Pods(c.ns).Create(t.Context(), pod, metav1.CreateOptions{})
				if err == nil && names(got) != want {
					t.Errorf("containers %s, want %s", names(got), want)
				}
				return err
			})
		}
		make("outrigger-init outrigger-proxy app", func(*corev1.Pod) {})
		make("outrigger-init outrigger-agent outrigger-proxy app", func(p *corev1.Pod) { p.Annotations = map[string]string{patch.AnnotationProxy: "envoy"} })
		make("outrigger-proxy app", func(p *corev1.Pod) { p.Annotations = map[string]string{patch.AnnotationCapture: "false"} })
		make("outrigger-init outrigger-proxy app", func(p *corev1.Pod) { p.Labels["plain"], p.Spec.RestartPolicy = "yes", corev1.RestartPolicyNever })
	})
}

// restricted makes a pod fit the Pod Security level of that name.
func restricted(pod *corev1.Pod) *corev1.Pod {
	yes, no, user := true, false, int64(1000)
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes, RunAsUser: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
	for i := range pod.Spec.Containers {
		pod.Spec.Containers[i].SecurityContext = &corev1.SecurityContext{AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	}
	return pod
}

// A refused pod leaves an Event with whom it concerns, once.
func TestRefusedPod(t *testing.T) {
	c := newCluster(t, enabled())
	in := c.run(t, "127.0.0.1:0")
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.works(t)
	refused := func(pod *corev1.Pod) {
		t.Helper()
		pod.Annotations = map[string]string{patch.AnnotationMTLS: "maybe"}
		want := `outrigger: annotation outrigger.dev/mtls="maybe": write off, permissive or strict`
		if _, err := c.CoreV1().Pods(c.ns).Create(t.Context(), pod, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	for range 3 {
		refused(bare("", "web"))
		refused(bare("single", ""))
	}
	eventually(t, func() error {
		if got := counted(in.get(t, "/metrics"), `outrigger_injector_events_total{result="repeated"}`); got != 4 {
			return fmt.Errorf("%v Events were repeated", got)
		}
		return nil
	})
	events, err := c.CoreV1().Events(c.ns).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(events.Items) != 2 {
		t.Fatalf("%d Events, %v", len(events.Items), err)
	}
	about := map[string]bool{}
	for _, e := range events.Items {
		about[e.InvolvedObject.Kind+"/"+e.InvolvedObject.Name] = e.Reason == "InjectionRefused" && e.Type == corev1.EventTypeWarning && strings.Contains(e.Message, "permissive")
	}
	if !about["ReplicaSet/web-6b7f"] || !about["Namespace/"+c.ns] {
		t.Errorf("Events about %v", about)
	}
	// The ephemeral container of somebody who debugs is no concern of ours.
	pod := c.create(t, bare("debugged", ""))
	pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "busybox"}}}
	if _, err := c.CoreV1().Pods(c.ns).UpdateEphemeralContainers(t.Context(), pod.Name, pod, metav1.UpdateOptions{}); err != nil {
		t.Error(err)
	}
}

// Whoever writes annotations of a size that nobody needs is told so, and so is
// whoever calls the endpoint without the API server.
func TestHuge(t *testing.T) {
	c := newCluster(t, enabled())
	in := c.run(t, "127.0.0.1:0")
	c.register(t, c.ns, in.reviews, admissionregistrationv1.Fail)
	c.works(t)
	pod := bare("huge", "")
	pod.Annotations = map[string]string{patch.AnnotationUpstreams: strings.Repeat("x", 200<<10)}
	if _, err := c.CoreV1().Pods(c.ns).Create(t.Context(), pod, metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "has 204800 bytes: at most 65536") {
		t.Errorf("%.200v", err)
	}
	pod.Annotations = map[string]string{"shop.example/other": strings.Repeat("x", 200<<10)}
	if got, err := c.CoreV1().Pods(c.ns).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil || !patch.Injected(got) {
		t.Errorf("a huge annotation of somebody else: %v", err)
	}
}
