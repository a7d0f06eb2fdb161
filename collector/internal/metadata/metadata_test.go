package metadata

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/outrigger-mesh/outrigger/collector/internal/kube"
	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// counter counts requests by what they ask for.
type counter struct {
	mu sync.Mutex
	n  map[string]int
}

type countingTransport struct {
	counter *counter
	next    http.RoundTripper
}

func (t countingTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	verb := "list"
	if r.URL.Query().Get("watch") != "" {
		verb = "watch"
	}
	t.counter.mu.Lock()
	t.counter.n[verb+" "+r.URL.Path]++
	t.counter.mu.Unlock()
	return t.next.RoundTrip(r)
}

func (c *counter) wrap(next http.RoundTripper) http.RoundTripper { return countingTransport{c, next} }

func (c *counter) counts() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]int{}
	for k, v := range c.n {
		out[k] = v
	}
	return out
}

// account makes a service account with exactly the rights of the package's
// comment, and returns the configuration of its client.
func account(t *testing.T, s *testbed.Server, client kubernetes.Interface, c *counter) kube.Config {
	t.Helper()
	name := fmt.Sprintf("collector-%d", time.Now().UnixNano())
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := client.CoreV1().ServiceAccounts("default").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	must(err)
	_, err = client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "namespaces"}, Verbs: []string{"list", "watch"}},
	}}, metav1.CreateOptions{})
	must(err)
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name}, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: name},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "default", Name: name}},
	}, metav1.CreateOptions{})
	must(err)
	token, err := client.CoreV1().ServiceAccounts("default").CreateToken(ctx, name, &authv1.TokenRequest{}, metav1.CreateOptions{})
	must(err)
	dir := t.TempDir()
	must(os.WriteFile(filepath.Join(dir, "token"), []byte(token.Status.Token), 0o600))
	must(os.WriteFile(filepath.Join(dir, "ca.crt"), s.CA, 0o600))
	return kube.Config{Server: s.Config.Host, CAFile: filepath.Join(dir, "ca.crt"), TokenFile: filepath.Join(dir, "token"), Wrap: c.wrap}
}

func open(t *testing.T, cfg kube.Config) *kube.Client {
	t.Helper()
	c, err := kube.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// start makes a Store and runs it until stop is called.
func start(t *testing.T, cfg Config) (s *Store, stop func()) {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	cfg.Jitter = time.Nanosecond
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// eventually waits for a condition; the machine may be busy.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(90 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func path(namespace, pod, uid, container string) *record.Resource {
	return &record.Resource{Cluster: "c", Node: "n", Namespace: namespace, Pod: pod, PodUID: uid, Container: container, Service: record.Workload(pod)}
}

type cluster struct {
	t         *testing.T
	client    kubernetes.Interface
	namespace string
}

func newCluster(t *testing.T, s *testbed.Server) *cluster {
	t.Helper()
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	ns, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "meta-", Labels: map[string]string{"team": "shop"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t: t, client: client, namespace: ns.Name}
}

func (c *cluster) pod(node string, p *corev1.Pod) *corev1.Pod {
	c.t.Helper()
	p.Spec.NodeName = node
	if p.Spec.Containers == nil {
		p.Spec.Containers = []corev1.Container{{Name: "app", Image: "registry/app:1"}}
	}
	p, err := c.client.CoreV1().Pods(c.namespace).Create(context.Background(), p, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

func controller(kind, name string) []metav1.OwnerReference {
	yes := true
	return []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: name, UID: "5e1cbd3a-7b1d-4a6e-9f5c-000000000001", Controller: &yes}}
}

// A pod of a Deployment, from creation to long after its end, against the real
// API server, with only the rights that are documented.
func TestWatch(t *testing.T) {
	s := server.Need(t)
	c := newCluster(t, s)
	count := &counter{n: map[string]int{}}
	node := "node-" + c.namespace
	inUse := true
	store, stop := start(t, Config{Node: node, API: open(t, account(t, s, c.client, count)), InUse: func(string) bool { return inUse }})
	eventually(t, "first lists", func() bool {
		n := count.counts()
		return n["watch /api/v1/pods"] == 1 && n["watch /api/v1/namespaces"] == 1
	})
	p := c.pod(node, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Name: "web-6c9f7d5b4-x2x4z", Labels: map[string]string{"app": "web", "pod-template-hash": "6c9f7d5b4"}, OwnerReferences: controller("ReplicaSet", "web-6c9f7d5b4"),
		Annotations: map[string]string{"outrigger.dev/logs": "json", "example.com/big": strings.Repeat("x", 1000)},
	}})
	other := c.pod("elsewhere", &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "other"}})
	from := path(c.namespace, p.Name, string(p.UID), "app")
	eventually(t, "the pod is known", func() bool { r, ok := store.Resource(from); return ok && r != from })
	got, _ := store.Resource(from)
	want := &record.Resource{
		Cluster: "c", Node: "n", Namespace: c.namespace, Pod: p.Name, PodUID: string(p.UID), Container: "app", Service: "web",
		Labels: p.Labels, WorkloadKind: "Deployment", Workload: "web", Image: "registry/app:1", Annotations: map[string]string{"outrigger.dev/logs": "json"},
		NamespaceLabels: map[string]string{"team": "shop", "kubernetes.io/metadata.name": c.namespace},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	same := *from
	if again, _ := store.Resource(&same); again != got {
		t.Error("equal paths gave two pointers")
	}

	// A status with nothing new in it changes nothing; one with the ids does.
	before := store.Generation()
	p.Status.Phase = corev1.PodRunning
	p, err := c.client.CoreV1().Pods(c.namespace).UpdateStatus(t.Context(), p, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p.Status.PodIP, p.Status.PodIPs = "10.1.2.3", []corev1.PodIP{{IP: "10.1.2.3"}}
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "app", ContainerID: "containerd://bbb", RestartCount: 1, LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://aaa"}},
	}}
	if p, err = c.client.CoreV1().Pods(c.namespace).UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the generation changes", func() bool { return store.Generation() != before })
	if n := store.Generation() - before; n != 1 {
		t.Errorf("two updates of which one says something new changed the generation by %d", n)
	}
	for restart, id := range []string{"aaa", "bbb", ""} {
		r := *from
		r.Restart = restart
		if got, _ := store.Resource(&r); got.ContainerID != id || got.PodIP != "10.1.2.3" {
			t.Errorf("restart %d: container %q, address %q", restart, got.ContainerID, got.PodIP)
		}
	}

	// Labels of the namespace.
	before = store.Generation()
	if _, err := c.client.CoreV1().Namespaces().Patch(t.Context(), c.namespace, "application/merge-patch+json", []byte(`{"metadata":{"labels":{"team":"cart"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the namespace's label", func() bool { r, _ := store.Resource(from); return r.NamespaceLabels["team"] == "cart" })
	if store.Generation() == before {
		t.Error("the generation did not change with the namespace")
	}

	// A deleted pod is kept while its logs are in use.
	zero := int64(0)
	if err := c.client.CoreV1().Pods(c.namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end is seen", func() bool {
		store.mu.Lock()
		defer store.mu.Unlock()
		return !store.pods[string(p.UID)].gone.IsZero()
	})
	store.sweep(time.Now().Add(24 * time.Hour))
	if r, ok := store.Resource(from); !ok || r.Labels["app"] != "web" || r.PodIP != "10.1.2.3" {
		t.Errorf("ended and in use: %v", r)
	}
	inUse = false
	store.sweep(time.Now())
	if r, _ := store.Resource(from); r == from {
		t.Error("forgotten at once")
	}
	store.sweep(time.Now().Add(24 * time.Hour))
	if r, _ := store.Resource(from); r != from {
		t.Error("never forgotten")
	}
	// The watch is of this node only, and has never heard of the other pod.
	elsewhere := path(c.namespace, other.Name, string(other.UID), "app")
	eventually(t, "asking for another node's pod is in vain", func() bool { r, complete := store.Resource(elsewhere); return complete && r == elsewhere })

	stop()
	if d := cmp.Diff(map[string]int{"list /api/v1/pods": 1, "watch /api/v1/pods": 1, "list /api/v1/namespaces": 1, "watch /api/v1/namespaces": 1}, count.counts()); d != "" {
		t.Errorf("requests of the whole story: %s", d)
	}
}

// While the API server is away, all that was known is; when it is back, what
// happened meanwhile is learned. A store that starts meanwhile has its cache.
func TestAPIServerAway(t *testing.T) {
	s := server.Need(t)
	c := newCluster(t, s)
	count := &counter{n: map[string]int{}}
	node := "node-" + c.namespace
	dir := t.TempDir()
	cfg := account(t, s, c.client, count)
	p := c.pod(node, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "db-0", Labels: map[string]string{"app": "db"}, OwnerReferences: controller("StatefulSet", "db")}})
	from := path(c.namespace, p.Name, string(p.UID), "app")
	store, stop := start(t, Config{Node: node, API: open(t, cfg), CacheFile: filepath.Join(dir, "metadata"), InUse: func(string) bool { return true }})
	eventually(t, "the pod is known", func() bool { r, _ := store.Resource(from); return r.WorkloadKind == "StatefulSet" })

	s.StopAPI()
	eventually(t, "the outage is noticed", func() bool { return testutil.ToFloat64(store.metrics.failures.WithLabelValues("pods")) > 0 })
	if r, ok := store.Resource(from); !ok || r.Labels["app"] != "db" {
		t.Errorf("during the outage: %v %v", r, ok)
	}
	unknown := path(c.namespace, "new", "5e1cbd3a-7b1d-4a6e-9f5c-000000000009", "app")
	if r, _ := store.Resource(unknown); r != unknown {
		t.Errorf("unknown: %v", r)
	}
	stop() // writes the cache
	second, stopSecond := start(t, Config{Node: node, API: open(t, cfg), CacheFile: filepath.Join(dir, "metadata"), InUse: func(string) bool { return true }})
	if r, ok := second.Resource(from); !ok || r.Labels["app"] != "db" || r.NamespaceLabels["team"] != "shop" {
		t.Errorf("from the cache: %v %v", r, ok)
	}

	if err := s.StartAPI(); err != nil {
		t.Fatal(err)
	}
	q := c.pod(node, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "late", Labels: map[string]string{"app.kubernetes.io/name": "tardy"}}})
	late := path(c.namespace, "late", string(q.UID), "app")
	eventually(t, "what is new after the outage", func() bool { r, ok := second.Resource(late); return ok && r.Service == "tardy" })
	zero := int64(0)
	if err := c.client.CoreV1().Pods(c.namespace).Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	stopSecond()

	// The pod's end is not seen by anybody; its last lines still have labels.
	third, _ := start(t, Config{Node: node, API: open(t, cfg), CacheFile: filepath.Join(dir, "metadata"), InUse: func(string) bool { return true }})
	eventually(t, "the list without it", func() bool {
		third.mu.Lock()
		defer third.mu.Unlock()
		return third.podsSettled && !third.pods[string(p.UID)].gone.IsZero()
	})
	if r, ok := third.Resource(from); !ok || r.Labels["app"] != "db" {
		t.Errorf("died while nobody looked: %v %v", r, ok)
	}
}

// Without any right the store says so, and nobody waits for it.
func TestForbidden(t *testing.T) {
	s := server.Need(t)
	c := newCluster(t, s)
	count := &counter{n: map[string]int{}}
	cfg := account(t, s, c.client, count)
	if err := os.WriteFile(cfg.TokenFile, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	var log logBuffer
	store, _ := start(t, Config{Node: "n", API: open(t, cfg), Log: slog.New(slog.NewTextHandler(&log, nil)), AskEvery: 10 * time.Millisecond})
	from := path("a", "b", "c", "d")
	eventually(t, "nobody waits", func() bool { r, complete := store.Resource(from); return complete && r == from })
	if text := log.String(); !strings.Contains(text, "401") || strings.Contains(text, "wrong") {
		t.Errorf("log: %s", text)
	}
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// fakeKubelet is a fake: it answers /pods as a kubelet does, over HTTPS with a
// certificate that nobody signed.
type fakeKubelet struct {
	mu    sync.Mutex
	pods  []corev1.Pod
	asked int
	fail  int // status
}

func (k *fakeKubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	if r.URL.Path != "/pods" || k.fail != 0 {
		http.Error(w, "no", k.fail)
		return
	}
	_ = json.NewEncoder(w).Encode(corev1.PodList{Items: k.pods})
}

func (k *fakeKubelet) set(pods ...corev1.Pod) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods = pods
}

func (k *fakeKubelet) requests() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.asked
}

func kubelet(t *testing.T, pods ...corev1.Pod) (*fakeKubelet, *kube.Client) {
	t.Helper()
	k := &fakeKubelet{pods: pods}
	srv := httptest.NewTLSServer(k)
	t.Cleanup(srv.Close)
	return k, open(t, kube.Config{Server: srv.URL, Insecure: true})
}

func plain(uid, name string, labels map[string]string) corev1.Pod {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: labels}, Spec: corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Name: "app", Image: "i"}}}}
	p.UID = types.UID("uid-" + uid)
	return p
}

// The kubelet alone: asked once at the start, then once for all the pods that
// appeared, and not for ever for one that it does not know.
func TestKubelet(t *testing.T) {
	k, client := kubelet(t, plain("1", "a", map[string]string{"l": "a"}))
	store, _ := start(t, Config{Kubelet: client, AskEvery: 20 * time.Millisecond})
	eventually(t, "the first pod", func() bool {
		r, ok := store.Resource(path("shop", "a", "uid-1", "app"))
		return ok && r.Labels["l"] == "a"
	})
	if n := k.requests(); n != 1 {
		t.Errorf("%d requests at the start", n)
	}
	var more []corev1.Pod
	for i := range 50 {
		more = append(more, plain(fmt.Sprint("m", i), fmt.Sprint("p", i), map[string]string{"l": fmt.Sprint(i)}))
	}
	k.set(more...)
	eventually(t, "fifty pods", func() bool {
		known := 0
		for i := range 50 {
			if r, _ := store.Resource(path("shop", fmt.Sprint("p", i), fmt.Sprint("uid-m", i), "app")); r.Labels["l"] == fmt.Sprint(i) {
				known++
			}
		}
		return known == 50
	})
	if n := k.requests(); n > 6 {
		t.Errorf("%d requests for fifty pods", n)
	}
	before := store.Generation()
	stranger := path("shop", "stranger", "uid-stranger", "app")
	eventually(t, "in vain", func() bool { r, complete := store.Resource(stranger); return complete && r == stranger })
	if store.Generation() == before {
		t.Error("the generation says nothing of it")
	}
	n := k.requests()
	for range 1000 {
		store.Resource(stranger)
	}
	time.Sleep(200 * time.Millisecond) // ten times AskEvery, in which nothing must happen
	if k.requests() != n {
		t.Errorf("%d more requests for a pod that is not there", k.requests()-n)
	}
	if v := testutil.ToFloat64(store.metrics.bare); v < 1 {
		t.Errorf("unknown pods %v", v)
	}
	k.mu.Lock()
	k.fail = 503
	k.mu.Unlock()
	store.Resource(path("shop", "later", "uid-later", "app"))
	eventually(t, "a failure is counted", func() bool { return testutil.ToFloat64(store.metrics.failures.WithLabelValues("kubelet")) > 0 })
	k.mu.Lock()
	k.fail = 0
	k.mu.Unlock()
	k.set(plain("later", "later", nil))
	eventually(t, "after the failure", func() bool { r, _ := store.Resource(path("shop", "later", "uid-later", "app")); return r.Image == "i" })
}

// The folder of a static pod has the hash of its file for a UID; its mirror in
// the API another. Both tell of one pod, in either order.
func TestStaticPod(t *testing.T) {
	const hash = "0123456789abcdef0123456789abcdef"
	file := plain("x", "etcd-n", map[string]string{"tier": "control"})
	file.UID = hash
	file.Annotations = map[string]string{"kubernetes.io/config.hash": hash, "kubernetes.io/config.source": "file"}
	mirror := *file.DeepCopy()
	mirror.UID = "uid-mirror"
	mirror.Annotations["kubernetes.io/config.mirror"] = hash
	mirror.OwnerReferences = controller("Node", "n")
	from := path("shop", "etcd-n", hash, "app")
	for name, order := range map[string][]corev1.Pod{"file first": {file, mirror}, "mirror first": {mirror, file}, "mirror": {mirror}, "file": {file}} {
		t.Run(name, func(t *testing.T) {
			store := newStore(t, Config{})
			for _, p := range order {
				store.put(trim(decodePod(t, &p)), 1)
			}
			r, ok := store.Resource(from)
			if !ok || r.Labels["tier"] != "control" || r.Service != "etcd" || r.Workload != "" {
				t.Errorf("%+v", r)
			}
			if store.lru.Len() != 1 {
				t.Errorf("%d pods", store.lru.Len())
			}
		})
	}
	// Whoever writes the annotation on a pod of their own does not become another.
	store := newStore(t, Config{})
	thief := plain("thief", "thief", map[string]string{"tier": "stolen"})
	thief.Annotations = map[string]string{"kubernetes.io/config.hash": "uid-victim"}
	victim := plain("victim", "victim", map[string]string{"tier": "own"})
	store.put(trim(decodePod(t, &thief)), 1)
	if r, _ := store.Resource(path("shop", "victim", "uid-victim", "app")); r.Labels != nil {
		t.Errorf("stolen: %v", r)
	}
	store.put(trim(decodePod(t, &victim)), 1)
	store.put(trim(decodePod(t, &thief)), 1)
	if r, _ := store.Resource(path("shop", "victim", "uid-victim", "app")); r.Labels["tier"] != "own" {
		t.Errorf("stolen: %v", r)
	}
}

func newStore(t *testing.T, cfg Config) *Store {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// decodePod is the pod as trim gets it.
func decodePod(t *testing.T, p *corev1.Pod) *object {
	t.Helper()
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	o := new(object)
	if err := json.Unmarshal(b, o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestWorkload(t *testing.T) {
	born := time.Date(2026, 11, 23, 19, 53, 7, 0, time.UTC)
	stamp := born.Unix() / 60
	for _, c := range []struct {
		kind, name         string
		labels             map[string]string
		wantKind, wantName string
	}{
		{"ReplicaSet", "web-abc", map[string]string{"pod-template-hash": "abc"}, "Deployment", "web"},
		{"ReplicaSet", "web-abc", map[string]string{"rollouts-pod-template-hash": "abc"}, "Rollout", "web"},
		{"ReplicaSet", "web-abc", map[string]string{"pod-template-hash": "xyz"}, "ReplicaSet", "web-abc"},
		{"ReplicaSet", "web-abc", nil, "ReplicaSet", "web-abc"},
		{"ReplicaSet", "-abc", map[string]string{"pod-template-hash": "abc"}, "ReplicaSet", "-abc"},
		{"Job", fmt.Sprintf("backup-%d", stamp), nil, "CronJob", "backup"},
		{"Job", fmt.Sprintf("backup-%d", stamp-30), nil, "CronJob", "backup"}, // waited for half an hour
		{"Job", fmt.Sprintf("backup-%d", stamp+60), nil, "Job", fmt.Sprintf("backup-%d", stamp+60)},
		{"Job", "load-20261123", nil, "Job", "load-20261123"}, // a date
		{"Job", "migrate-1", nil, "Job", "migrate-1"},
		{"Job", "-29400000", nil, "Job", "-29400000"},
		{"DaemonSet", "agent", nil, "DaemonSet", "agent"},
		{"TaskRun", "build", nil, "TaskRun", "build"},
	} {
		if kind, name := workload(c.kind, c.name, c.labels, born); kind != c.wantKind || name != c.wantName {
			t.Errorf("%s %s: %s %s, want %s %s", c.kind, c.name, kind, name, c.wantKind, c.wantName)
		}
	}
}

func TestService(t *testing.T) {
	for name, c := range map[string]struct {
		labels, annotations map[string]string
		owner               string
		want                string
	}{
		"path":       {want: "checkout"},
		"workload":   {owner: "checkout-v2", want: "checkout-v2"},
		"label":      {owner: "checkout-v2", labels: map[string]string{"app.kubernetes.io/name": "shop-checkout", "app.kubernetes.io/instance": "release"}, want: "shop-checkout"},
		"annotation": {owner: "checkout-v2", labels: map[string]string{"app.kubernetes.io/name": "x"}, annotations: map[string]string{"resource.opentelemetry.io/service.name": "pay"}, want: "pay"},
	} {
		t.Run(name, func(t *testing.T) {
			p := plain("1", "checkout-0", c.labels)
			p.Annotations = c.annotations
			if c.owner != "" {
				p.OwnerReferences = controller("StatefulSet", c.owner)
			}
			store := newStore(t, Config{})
			store.put(trim(decodePod(t, &p)), 1)
			if r, _ := store.Resource(path("shop", "checkout-0", "uid-1", "app")); r.Service != c.want {
				t.Errorf("%q, want %q", r.Service, c.want)
			}
		})
	}
}

// Beside a watch the kubelet's word is provisional: what only it knows goes once its
// logs are through, and what the watch saw the end of stays ended.
func TestKubeletBesideWatch(t *testing.T) {
	inUse := true
	store := newStore(t, Config{InUse: func(string) bool { return inUse }})
	p := plain("1", "a", map[string]string{"l": "a"})
	from := path("shop", "a", "uid-1", "app")
	known := func() bool { r, _ := store.Resource(from); return r != from }
	sweep := func() { store.sweep(time.Now().Add(24 * time.Hour)) }
	for name, c := range map[string]struct {
		do   func()
		kept bool
	}{
		"kubelet": {func() { store.put(trim(decodePod(t, &p)), byKubelet) }, false},
		"confirmed": {func() {
			store.put(trim(decodePod(t, &p)), byKubelet)
			store.put(trim(decodePod(t, &p)), 1)
		}, true},
		"ended": {func() {
			store.put(trim(decodePod(t, &p)), 1)
			store.leave("uid-1")
			store.put(trim(decodePod(t, &p)), byKubelet)
		}, false},
		"not in the list": {func() {
			store.put(trim(decodePod(t, &p)), store.begin())
			store.end(store.begin())
		}, false},
		"in the list again": {func() {
			store.put(trim(decodePod(t, &p)), store.begin())
			store.end(store.begin())
			round := store.begin()
			store.put(trim(decodePod(t, &p)), round)
			store.end(round)
		}, true},
	} {
		store.mu.Lock()
		for _, e := range store.pods {
			store.remove(e)
		}
		store.mu.Unlock()
		inUse = true
		c.do()
		if sweep(); !known() {
			t.Errorf("%s: forgotten while in use", name)
		}
		inUse = false
		if sweep(); known() != c.kept {
			t.Errorf("%s: known is %v", name, !c.kept)
		}
	}
}

// A pod that has ended loses its address and the id of its container in the API.
func TestMerge(t *testing.T) {
	store := newStore(t, Config{})
	p := plain("1", "a", nil)
	p.Status.PodIP = "10.0.0.1"
	p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", ContainerID: "containerd://one"}}
	store.put(trim(decodePod(t, &p)), 1)
	p.Status = corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "app", RestartCount: 1, ContainerID: "containerd://two"}}}
	store.put(trim(decodePod(t, &p)), 1)
	p.Status = corev1.PodStatus{}
	store.put(trim(decodePod(t, &p)), 1)
	for restart, id := range []string{"one", "two"} {
		from := path("shop", "a", "uid-1", "app")
		from.Restart = restart
		if r, _ := store.Resource(from); r.ContainerID != id || r.PodIP != "10.0.0.1" {
			t.Errorf("%d: %+v", restart, r)
		}
	}
}

// The bound holds: those that ended go first, and what goes in use is counted.
func TestBound(t *testing.T) {
	store := newStore(t, Config{MaxPods: 3})
	for i := range 3 {
		p := plain(fmt.Sprint(i), fmt.Sprint("p", i), nil)
		store.put(trim(decodePod(t, &p)), 1)
		store.Resource(path("shop", p.Name, string(p.UID), "app"))
	}
	store.leave("uid-1")
	here := func() string {
		var ids []string
		for i := range 5 {
			store.mu.Lock()
			if store.pods[fmt.Sprint("uid-", i)] != nil {
				ids = append(ids, fmt.Sprint(i))
			}
			store.mu.Unlock()
		}
		return strings.Join(ids, "")
	}
	p := plain("3", "p3", nil)
	store.put(trim(decodePod(t, &p)), 1)
	if got := here(); got != "023" {
		t.Errorf("%s; the ended one should have gone", got)
	}
	store.Resource(path("shop", "p0", "uid-0", "app"))
	p = plain("4", "p4", nil)
	before := store.Generation()
	store.put(trim(decodePod(t, &p)), 1)
	if got := here(); got != "034" {
		t.Errorf("%s; the longest unused should have gone", got)
	}
	if store.Generation() == before || testutil.ToFloat64(store.metrics.evicted) != 2 {
		t.Errorf("evicted %v", testutil.ToFloat64(store.metrics.evicted))
	}
	for i := range 100 {
		store.Resource(path("shop", "u", fmt.Sprint("unknown-", i), "app"))
	}
	if n := len(store.unknown); n > 3 {
		t.Errorf("%d questions", n)
	}
	for i := range 3 * maxVariants {
		from := path("shop", "p0", "uid-0", "app")
		from.Restart = i
		store.Resource(from)
	}
	if n := len(store.pods["uid-0"].variants); n > maxVariants {
		t.Errorf("%d variants", n)
	}
}

// A cache that is damaged anywhere is set aside and does not stop the start.
func TestDamagedCache(t *testing.T) {
	file := filepath.Join(t.TempDir(), "cache")
	store := newStore(t, Config{CacheFile: file})
	p := plain("1", "a", map[string]string{"l": "a"})
	store.put(trim(decodePod(t, &p)), 1)
	store.save()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	from := path("shop", "a", "uid-1", "app")
	if r, _ := newStore(t, Config{CacheFile: file}).Resource(from); r.Labels["l"] != "a" {
		t.Fatalf("%+v", r)
	}
	for cut := 0; cut < len(good); cut += 7 {
		if err := os.WriteFile(file, good[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		s := newStore(t, Config{CacheFile: file})
		if r, _ := s.Resource(from); r != from {
			t.Errorf("cut at %d: %+v", cut, r)
		}
		if _, err := os.Stat(file + ".damaged"); err != nil {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
}

func FuzzCache(f *testing.F) {
	good, err := encode(document{Pods: []*pod{{UID: "1", Namespace: "a", Name: "b", Containers: map[string]container{"c": {ID: "x"}}}}, Namespaces: map[string]map[string]string{"a": {"k": "v"}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:len(good)-1])
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decode(b)
		if err != nil {
			return
		}
		again, err := encode(d)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(again); err != nil {
			t.Errorf("%q: %v", again, err)
		}
	})
}

// What the tail asks of a known container costs nothing but a look.
func TestAllocations(t *testing.T) {
	store := newStore(t, Config{})
	p := plain("1", "a", map[string]string{"l": "a"})
	store.put(trim(decodePod(t, &p)), 1)
	from := path("shop", "a", "uid-1", "app")
	store.Resource(from)
	if n := testing.AllocsPerRun(100, func() { store.Resource(from) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkResource(b *testing.B) {
	s, err := New(Config{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	s.put(&pod{UID: "uid-1", Namespace: "shop", Name: "a"}, 1)
	from := path("shop", "a", "uid-1", "app")
	b.ReportAllocs()
	for b.Loop() {
		s.Resource(from)
	}
}
