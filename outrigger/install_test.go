package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// rig is a real API server and a namespace for one installation. Tests that use
// it do not run at the same time: the names of an installation are the
// cluster's.
type rig struct {
	t          *testing.T
	kube       *kubernetes.Clientset
	kubeconfig string
	namespace  string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	s := server.Need(t)
	kube, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, kube: kube, kubeconfig: writeKubeconfig(t, s.Config), namespace: strings.ToLower(t.Name())}
	t.Cleanup(func() {
		// The test's context has ended by now.
		var out, diag bytes.Buffer
		if err := execute(context.Background(), []string{"uninstall", "--crds", "--kubeconfig", r.kubeconfig, "-n", r.namespace}, nil, &out, &diag); err != nil {
			t.Errorf("cleaning up: %v\n%s", err, &diag)
		}
	})
	return r
}

func writeKubeconfig(t *testing.T, from *rest.Config) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	conf := clientcmdapi.NewConfig()
	conf.Clusters["testbed"] = &clientcmdapi.Cluster{Server: from.Host, CertificateAuthorityData: from.CAData}
	conf.AuthInfos["admin"] = &clientcmdapi.AuthInfo{ClientCertificateData: from.CertData, ClientKeyData: from.KeyData, Impersonate: from.Impersonate.UserName}
	conf.Contexts["testbed"] = &clientcmdapi.Context{Cluster: "testbed", AuthInfo: "admin"}
	conf.CurrentContext = "testbed"
	if err := clientcmd.WriteToFile(*conf, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a command line against the rig.
func (r *rig) run(args ...string) (stdout, stderr string, err error) {
	r.t.Helper()
	var out, diag bytes.Buffer
	err = execute(r.t.Context(), append(args, "--kubeconfig", r.kubeconfig, "-n", r.namespace), strings.NewReader(""), &out, &diag)
	return out.String(), diag.String(), err
}

// must is run for what has to succeed.
func (r *rig) must(args ...string) (stdout, stderr string) {
	r.t.Helper()
	out, diag, err := r.run(args...)
	if err != nil {
		r.t.Fatalf("outrigger %s: %v\n%s%s", strings.Join(args, " "), err, diag, out)
	}
	return out, diag
}

// refused is run for what has to fail, with all of words in the error.
func (r *rig) refused(words []string, args ...string) {
	r.t.Helper()
	_, diag, err := r.run(args...)
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			r.t.Errorf("outrigger %s: %v, want %q\n%s", strings.Join(args, " "), err, w, diag)
		}
	}
}

// controllers do, until the test ends, what a cluster with nodes would: they say
// that workloads run, and write the caBundle as the injector does.
func (r *rig) controllers(bundle []byte) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for tick := time.NewTicker(50 * time.Millisecond); ctx.Err() == nil; <-tick.C {
			_ = r.settle(ctx, bundle) // what is not there yet comes with the next look
		}
	}()
	r.t.Cleanup(func() { cancel(); <-done })
}

func (r *rig) settle(ctx context.Context, bundle []byte) error {
	deployments, err := r.kube.AppsV1().Deployments(r.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, d := range deployments.Items {
		n := *d.Spec.Replicas
		if d.Name == "outrigger-control-plane" && n == 1 {
			n = 2 // the autoscaler's least
			d.Spec.Replicas = &n
			if _, err := r.kube.AppsV1().Deployments(r.namespace).Update(ctx, &d, metav1.UpdateOptions{FieldManager: "autoscaler"}); err != nil {
				return err
			}
			continue
		}
		d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n}
		if _, err := r.kube.AppsV1().Deployments(r.namespace).UpdateStatus(ctx, &d, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	sets, err := r.kube.AppsV1().DaemonSets(r.namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, d := range sets.Items {
		d.Status = appsv1.DaemonSetStatus{ObservedGeneration: d.Generation, DesiredNumberScheduled: 3, CurrentNumberScheduled: 3, UpdatedNumberScheduled: 3, NumberReady: 3, NumberAvailable: 3}
		if _, err := r.kube.AppsV1().DaemonSets(r.namespace).UpdateStatus(ctx, &d, metav1.UpdateOptions{}); err != nil {
			return err
		}
	}
	hooks := r.kube.AdmissionregistrationV1().MutatingWebhookConfigurations()
	conf, err := hooks.Get(ctx, "outrigger-injector", metav1.GetOptions{})
	if err != nil || bundle == nil || conf.Webhooks[0].ClientConfig.CABundle != nil {
		return err
	}
	for i := range conf.Webhooks {
		conf.Webhooks[i].ClientConfig.CABundle = bundle
	}
	_, err = hooks.Update(ctx, conf, metav1.UpdateOptions{FieldManager: "injector"})
	return err
}

// pod creates a meshed pod with a sidecar of that version, in a namespace that
// is made for it.
func (r *rig) pod(name, image string) {
	r.t.Helper()
	ns := r.namespace + "-apps"
	if _, err := r.kube.CoreV1().Namespaces().Create(r.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		r.t.Fatal(err)
	}
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name + "-7d4b-x", Namespace: ns, Labels: map[string]string{"pod-template-hash": "7d4b"}, Annotations: map[string]string{"outrigger.dev/status": "injected"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name + "-7d4b", UID: "1", Controller: &yes}},
		},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app"}, {Name: "outrigger-proxy", Image: image}}},
	}
	if _, err := r.kube.CoreV1().Pods(ns).Create(r.t.Context(), pod, metav1.CreateOptions{}); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		zero := int64(0)
		if err := r.kube.CoreV1().Pods(ns).Delete(context.Background(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil && !apierrors.IsNotFound(err) {
			r.t.Error(err)
		}
	})
}

// certificate for tests that need a caBundle and no more.
const testCA = `-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIURouxg1+805MaOiHtPzqN4/NJKKUwCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjUyMDEwMDNaGA8yMTI2MTEwMTIwMTAw
M1owDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNO2
2dOV9mrcly+ykZ7LJQMgckGkMM2vrBn9jZMGxDwl3Qa1wYlRzoCc/myg0CqIjcLl
W2qGxhIBivIh1drZY1ijUzBRMB0GA1UdDgQWBBQKppwUzv7E1OpQXuP7cfNEnmVP
9zAfBgNVHSMEGDAWgBQKppwUzv7E1OpQXuP7cfNEnmVP9zAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIFzH7dgvL1prf05aYb/jjGi0K+HVhhAOH6aB
6mhbsEqQAiEA9Z7b0W/Hku8mu57ODOUrm1UzMOEO8NDWEhgFA6Av72s=
-----END CERTIFICATE-----
`

// line is the index of the first line with all of words; -1 where there is none.
func line(text string, words ...string) int {
	return slices.IndexFunc(strings.Split(text, "\n"), func(l string) bool {
		return !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(l, w) })
	})
}

// The whole life of an installation.
func TestLife(t *testing.T) {
	r := newRig(t)
	r.controllers([]byte(testCA))

	out, diag := r.must("install", "--dry-run", "--release", "v1.4.0")
	if !strings.Contains(out, "kind: MutatingWebhookConfiguration") || !strings.Contains(out, "image: outrigger/control-plane:v1.4.0") || line(diag, "Deployment", "would be created") < 0 {
		t.Errorf("dry run:\n%s\n%s", diag, out)
	}
	if _, err := r.kube.CoreV1().Namespaces().Get(t.Context(), r.namespace, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("a dry run made the namespace: %v", err)
	}

	out, diag = r.must("install", "--release", "v1.4.0", "--wait", "--set", "injector.failurePolicy=Ignore")
	if !strings.Contains(out, "kubectl label namespace") {
		t.Errorf("notes:\n%s", out)
	}
	steps := []int{
		line(diag, "Namespace "+r.namespace, "created"), line(diag, "CustomResourceDefinition circuitbreakers", "created"), line(diag, "ClusterRole outrigger-control-plane", "created"),
		line(diag, "ConfigMap "+r.namespace+"/outrigger-collector", "created"), line(diag, "Deployment "+r.namespace+"/outrigger-control-plane", "created"),
		line(diag, "MutatingWebhookConfiguration", "created"),
	}
	if steps[0] < 0 || !slices.IsSorted(steps) {
		t.Errorf("order %v in\n%s", steps, diag)
	}

	// Once more changes nothing, and takes nothing from the injector.
	_, diag = r.must("install", "--release", "v1.4.0", "--set", "injector.failurePolicy=Ignore")
	for l := range strings.Lines(diag) {
		if !strings.Contains(l, "unchanged") && !strings.Contains(l, "waiting for") {
			t.Errorf("twice: %s", l)
		}
	}
	conf, err := r.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), "outrigger-injector", metav1.GetOptions{})
	if err != nil || string(conf.Webhooks[1].ClientConfig.CABundle) != testCA {
		t.Errorf("the caBundle is gone: %v", err)
	}

	r.refused([]string{"v1.4.0 is installed", "outrigger upgrade"}, "install", "--release", "v1.5.0")
	r.refused([]string{"v1.3.9 is older than v1.4.0"}, "upgrade", "--release", "v1.3.9")
	r.refused([]string{"4 minor versions ahead", "v1.7"}, "upgrade", "--release", "v1.8.0")
	r.refused([]string{"another major version"}, "upgrade", "--release", "v2.0.0")
	r.refused([]string{`profile ""`, "--reset-values"}, "upgrade", "--release", "v1.5.0", "--profile", "eks")
	elsewhere := *r
	elsewhere.namespace = "elsewhere"
	elsewhere.refused([]string{"--namespace " + r.namespace}, "install", "--release", "v1.4.0")

	// An upgrade keeps the values, and prunes what there is no more.
	_, diag = r.must("upgrade", "--release", "v1.7.0", "--wait", "--set", "collector.enabled=false")
	if line(diag, "DaemonSet "+r.namespace+"/outrigger-collector", "removed") < 0 || line(diag, "from v1.4.0 to v1.7.0") < 0 {
		t.Errorf("upgrade:\n%s", diag)
	}
	r.must("upgrade", "--release", "v1.7.0")
	if _, err := r.kube.AppsV1().DaemonSets(r.namespace).Get(t.Context(), "outrigger-collector", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the second upgrade forgot the values of the first: %v", err)
	}
	conf, err = r.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), "outrigger-injector", metav1.GetOptions{})
	if err != nil || *conf.Webhooks[0].FailurePolicy != "Ignore" || string(conf.Webhooks[0].ClientConfig.CABundle) != testCA {
		t.Errorf("after two upgrades: %v %+v", err, conf)
	}
	plane, err := r.kube.AppsV1().Deployments(r.namespace).Get(t.Context(), "outrigger-control-plane", metav1.GetOptions{})
	if err != nil || *plane.Spec.Replicas != 2 || plane.Spec.Template.Spec.Containers[0].Image != "outrigger/control-plane:v1.7.0" {
		t.Errorf("%v; the autoscaler's replicas were reset, or the image is old: %+v", err, plane.Spec)
	}
	_, _ = r.must("upgrade", "--release", "v1.7.0", "--reset-values", "--profile", "k3s")
	if _, err := r.kube.AppsV1().DaemonSets(r.namespace).Get(t.Context(), "outrigger-collector", metav1.GetOptions{}); err != nil {
		t.Errorf("--reset-values: %v", err)
	}

	// Sidecars that a new version would not understand.
	r.pod("web", "outrigger/sidecar:v1.5.0")
	r.refused([]string{"1 pods have a sidecar", "kubectl rollout restart deployment/web", "--allow-old-sidecars"}, "upgrade", "--release", "v1.9.0")
	r.must("upgrade", "--release", "v1.9.0", "--allow-old-sidecars")

	_, diag = r.must("uninstall", "--dry-run")
	if line(diag, "MutatingWebhookConfiguration", "would be removed") != 0 {
		t.Errorf("dry run of uninstall:\n%s", diag)
	}
	_, diag = r.must("uninstall")
	if line(diag, "MutatingWebhookConfiguration", "removed") != 0 || line(diag, "Namespace "+r.namespace, "removed") < 0 || line(diag, "1 pods keep their sidecar") < 0 || line(diag, "deployment/web") < 0 || line(diag, "CustomResourceDefinition") >= 0 {
		t.Errorf("uninstall:\n%s", diag)
	}
	if roles, err := r.kube.RbacV1().ClusterRoles().List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/part-of=outrigger"}); err != nil || len(roles.Items) > 0 {
		t.Errorf("left over: %v %v", err, roles.Items)
	}
	_, diag = r.must("uninstall", "--crds")
	if line(diag, "CustomResourceDefinition circuitbreakers.outrigger.dev removed") < 0 {
		t.Errorf("uninstall --crds:\n%s", diag)
	}
}

// What others have made is left alone, and nothing is changed before that is known.
func TestOthers(t *testing.T) {
	r := newRig(t)
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "outrigger-injector", Labels: map[string]string{"app.kubernetes.io/managed-by": "Helm"}}}
	if _, err := r.kube.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	r.refused([]string{"ClusterRole outrigger-injector (managed by Helm)"}, "install", "--release", "v1.0.0")
	if _, err := r.kube.CoreV1().Namespaces().Get(t.Context(), r.namespace, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("it began before it looked: %v", err)
	}
	if err := r.kube.RbacV1().ClusterRoles().Delete(t.Context(), role.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.refused([]string{"not installed", "outrigger install"}, "upgrade", "--release", "v1.0.0")

	// A namespace of the user's stays the user's.
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: r.namespace, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"}}}
	if _, err := r.kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	_, diag := r.must("install", "--release", "v1.0.0")
	if line(diag, "stays as it is") < 0 || line(diag, "warning", "restricted") < 0 {
		t.Errorf("install:\n%s", diag)
	}
	// As if Helm had made it.
	if _, err := r.kube.AppsV1().Deployments(r.namespace).Patch(t.Context(), "outrigger-control-plane", types.MergePatchType, []byte(`{"metadata":{"labels":{"app.kubernetes.io/managed-by":"Helm"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	r.refused([]string{"helm upgrade"}, "upgrade", "--release", "v1.0.0")
	r.refused([]string{"helm uninstall"}, "uninstall")
	if _, err := r.kube.AppsV1().Deployments(r.namespace).Patch(t.Context(), "outrigger-control-plane", types.MergePatchType, []byte(`{"metadata":{"labels":{"app.kubernetes.io/managed-by":"outrigger"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	_, diag = r.must("uninstall")
	if _, err := r.kube.CoreV1().Namespaces().Get(t.Context(), r.namespace, metav1.GetOptions{}); err != nil || line(diag, "Namespace") >= 0 {
		t.Errorf("the user's namespace: %v\n%s", err, diag)
	}
}

// An installation that does not become ready ends in time, and says why.
func TestWaitingHasAnEnd(t *testing.T) {
	r := newRig(t)
	r.must("install", "--release", "v1.0.0")
	// A controller has looked, and the pod cannot be run.
	d, err := r.kube.AppsV1().Deployments(r.namespace).Get(t.Context(), "outrigger-injector", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: 2, UpdatedReplicas: 2}
	if _, err := r.kube.AppsV1().Deployments(r.namespace).UpdateStatus(t.Context(), d, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, err := r.kube.CoreV1().Pods(r.namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "outrigger-injector-x", Labels: d.Spec.Template.Labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "injector", Image: "x"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "injector", Image: "x", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}}}
	if _, err := r.kube.CoreV1().Pods(r.namespace).UpdateStatus(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	// It is waited for as long as it takes to be said.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	said := &until{end: cancel, words: []string{"waiting for", "outrigger-injector", "0 of 2 replicas are available", "ImagePullBackOff", "no such image"}}
	err = execute(ctx, []string{"install", "--release", "v1.0.0", "--wait", "--kubeconfig", r.kubeconfig, "-n", r.namespace}, nil, io.Discard, said)
	if err == nil || !strings.Contains(err.Error(), "outrigger-control-plane (no controller has looked at it yet)") || !strings.Contains(err.Error(), "the same command goes on from there") {
		t.Errorf("err = %v\n%s", err, &said.text)
	}
	r.refused([]string{"1ms have passed (--timeout)"}, "install", "--release", "v1.0.0", "--wait", "--timeout", "1ms")
	_, _ = r.must("uninstall", "--keep-namespace")
	if ns, err := r.kube.CoreV1().Namespaces().Get(t.Context(), r.namespace, metav1.GetOptions{}); err != nil || ns.DeletionTimestamp != nil {
		t.Errorf("--keep-namespace: %v", err)
	}
}

// until ends something when a line with all of words has been written.
type until struct {
	text  bytes.Buffer
	words []string
	end   func()
}

func (u *until) Write(p []byte) (int, error) {
	n, err := u.text.Write(p)
	if line(u.text.String(), u.words...) >= 0 {
		u.end()
	}
	return n, err
}

// Values come from the profile, files, standard input and single values, each
// over the one before; what is wrong is said with where it came from.
func TestValues(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	c := &cli{stdin: strings.NewReader("injector: {timeoutSeconds: 7}\ntrustDomain: stdin\n")}
	got, err := c.values(choice{profile: "k3s", files: []string{write("a.yaml", "trustDomain: file\nclusterName: a\n"), "-"}, set: []string{"clusterName=set", "injector.replicas=3"}})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]any{"td": got["trustDomain"], "cn": got["clusterName"], "injector": got["injector"], "cni": got["cni"]})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"cn":"set","cni":{"binFolder":"/var/lib/rancher/k3s/data/cni","configFolder":"/var/lib/rancher/k3s/agent/etc/cni/net.d"},"injector":{"replicas":3,"timeoutSeconds":7},"td":"stdin"}`; string(b) != want {
		t.Errorf("got  %s\nwant %s", b, want)
	}
	for want, ch := range map[string]choice{
		"--profile: there is no profile": {profile: "openstack"},
		"--values: open":                 {files: []string{filepath.Join(dir, "none")}},
		"b.yaml":                         {files: []string{write("b.yaml", "a: [")}},
		"--set a=b=":                     {set: []string{"a=b=[", "x[-1]=2"}},
		"is larger than":                 {files: []string{write("c.yaml", fmt.Sprintf("a: %s\n", strings.Repeat("x", maxValues)))}},
	} {
		if _, err := c.values(ch); err == nil || !strings.Contains(err.Error(), want) && !strings.Contains(err.Error(), "--set") {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestNoClusterNamesTheRemedy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(path, []byte("apiVersion: v1\nkind: Config\ncurrent-context: x\ncontexts: [{name: x, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: \"http://127.0.0.1:1\"}}]\nusers: [{name: u, user: {}}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"--kubeconfig": {"install", "--kubeconfig", filepath.Join(dir, "none")},
		"127.0.0.1:1":  {"check", "--kubeconfig", path},
	} {
		var out, diag bytes.Buffer
		if err := execute(t.Context(), args, nil, &out, &diag); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", args, err)
		}
	}
}
