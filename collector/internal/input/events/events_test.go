package events

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus/testutil"
	authv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/outrigger-mesh/outrigger/collector/internal/input/journal"
	"github.com/outrigger-mesh/outrigger/collector/internal/kube"
	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

type cluster struct {
	t         *testing.T
	client    kubernetes.Interface
	namespace string
	api       *kube.Client
}

// newCluster makes a namespace and a client with exactly the rights of the
// package's comment.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	s := server.Need(t)
	client, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	ns, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "events-"}}, metav1.CreateOptions{})
	must(err)
	name := ns.Name
	_, err = client.CoreV1().ServiceAccounts(name).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	must(err)
	subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: name, Name: name}}
	meta := metav1.ObjectMeta{Name: name}
	_, err = client.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{{APIGroups: []string{"events.k8s.io"}, Resources: []string{"events"}, Verbs: []string{"list", "watch"}}}}, metav1.CreateOptions{})
	must(err)
	_, err = client.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: meta, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: name}}, metav1.CreateOptions{})
	must(err)
	_, err = client.RbacV1().Roles(name).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{{APIGroups: []string{"coordination.k8s.io"}, Resources: []string{"leases"}, Verbs: []string{"get", "create", "update"}}}}, metav1.CreateOptions{})
	must(err)
	_, err = client.RbacV1().RoleBindings(name).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: meta, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "Role", Name: name}}, metav1.CreateOptions{})
	must(err)
	token, err := client.CoreV1().ServiceAccounts(name).CreateToken(ctx, name, &authv1.TokenRequest{}, metav1.CreateOptions{})
	must(err)
	dir := t.TempDir()
	must(os.WriteFile(filepath.Join(dir, "token"), []byte(token.Status.Token), 0o600))
	must(os.WriteFile(filepath.Join(dir, "ca.crt"), s.CA, 0o600))
	api, err := kube.New(kube.Config{Server: s.Config.Host, CAFile: filepath.Join(dir, "ca.crt"), TokenFile: filepath.Join(dir, "token")})
	must(err)
	t.Cleanup(api.Close)
	return &cluster{t, client, name, api}
}

// event makes one, and returns its note, by which records are told apart.
func (c *cluster) event(i int) string {
	c.t.Helper()
	note := fmt.Sprintf("event %d of %s", i, c.namespace)
	_, err := c.client.EventsV1().Events(c.namespace).Create(context.Background(), &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "web-"}, EventTime: metav1.NowMicro(), ReportingController: "kubelet", ReportingInstance: "node-1", Action: "Pulling", Reason: "BackOff", Note: note, Type: "Warning",
		Regarding: corev1.ObjectReference{Kind: "Pod", Namespace: c.namespace, Name: "web-0", UID: "uid-0", FieldPath: "spec.containers{app}"},
	}, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return note
}

// reader is one collector of the cluster.
type reader struct {
	*Input
	folder  string
	pending atomic.Int64
	stop    func()
}

func (c *cluster) reader(identity string) *reader {
	c.t.Helper()
	r := &reader{folder: c.t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	w, err := journal.Open(journal.Config{Folder: r.folder, Pending: r.pending.Load, Log: log})
	if err != nil {
		c.t.Fatal(err)
	}
	if r.Input, err = New(Config{API: c.api, Namespace: c.namespace, Identity: identity, Cluster: "c", Journal: w, Term: 12 * time.Second, Log: log}); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Error(err)
		}
		if err := w.Close(); err != nil {
			c.t.Error(err)
		}
	})
	c.t.Cleanup(r.stop)
	return r
}

// records returns those of this test's namespace by their notes.
func (c *cluster) records(r *reader) map[string][]*record.Record {
	c.t.Helper()
	b, err := os.ReadFile(filepath.Join(r.folder, "0.log"))
	if err != nil {
		c.t.Fatal(err)
	}
	out := map[string][]*record.Record{}
	var d journal.Decoder
	for text := range bytes.Lines(b) {
		rec := new(record.Record)
		if d.Decode(text, rec) == nil && rec.Resource.Namespace == c.namespace { // the last line may be half written
			out[rec.Body] = append(out[rec.Body], rec)
		}
	}
	return out
}

func (c *cluster) eventually(what string, is func() bool) {
	c.t.Helper()
	for end := time.Now().Add(90 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("never: %s", what)
		}
	}
}

// Of two collectors one reads. When it ends, or has its API server away, the other
// or it goes on, and each Event is there once.
func TestEveryEventOnce(t *testing.T) {
	c := newCluster(t)
	var notes []string
	emit := func(n int) {
		for range n {
			notes = append(notes, c.event(len(notes)))
		}
	}
	emit(3) // before anybody reads
	a := c.reader("a")
	c.eventually("a reads", func() bool { return len(c.records(a)) == 3 })
	b := c.reader("b")
	emit(3)
	c.eventually("a reads what is new", func() bool { return len(c.records(a)) == 6 })
	if testutil.ToFloat64(a.leader) != 1 || testutil.ToFloat64(b.leader) != 0 {
		t.Errorf("leaders: %v and %v", testutil.ToFloat64(a.leader), testutil.ToFloat64(b.leader))
	}
	a.stop()
	emit(3)
	c.eventually("b takes over", func() bool { return len(c.records(b)) == 3 })

	s := server.Need(t)
	s.StopAPI()
	if err := s.StartAPI(); err != nil {
		t.Fatal(err)
	}
	emit(3)
	c.eventually("after the outage", func() bool { return len(c.records(b)) == 6 })

	// A full journal keeps the Events with the API server.
	b.pending.Store(1 << 40)
	emit(1)
	b.pending.Store(0)
	c.eventually("after the full journal", func() bool { return len(c.records(b)) == 7 })

	b.stop()
	all := map[string]int{}
	for _, r := range []*reader{a, b} {
		for note, recs := range c.records(r) {
			all[note] += len(recs)
		}
	}
	want := map[string]int{}
	for _, n := range notes {
		want[n] = 1
	}
	if d := cmp.Diff(want, all); d != "" {
		t.Error(d)
	}
	lease, err := c.client.CoordinationV1().Leases(c.namespace).Get(t.Context(), LeaseName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != "" || lease.Annotations[annotationAt] == "" {
		t.Errorf("the Lease was not given back: %v", lease)
	}
	lease.Annotations[annotationAt] = "1" // compacted, or nearly: the API server's memory does not have it
	if _, err := c.client.CoordinationV1().Leases(c.namespace).Update(t.Context(), lease, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	third := c.reader("c")
	c.eventually("all again from an old version", func() bool { return len(c.records(third)) == len(notes) })
}

// One that died keeps the Lease for its term and no longer.
func TestDeadHolder(t *testing.T) {
	c := newCluster(t)
	note := c.event(0)
	holder, seconds, now := "dead", int32(2), metav1.NowMicro()
	if _, err := c.client.CoordinationV1().Leases(c.namespace).Create(t.Context(), &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: LeaseName}, Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &now},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	r := c.reader("alive")
	c.eventually("the Lease runs out", func() bool { return len(c.records(r)[note]) == 1 })
	rec := c.records(r)[note][0]
	id, _ := rec.Attributes["event.id"].(string)
	want := &record.Record{
		Body: note, Level: "warn", Resource: &record.Resource{Cluster: "c", Namespace: c.namespace, Pod: "web-0", PodUID: "uid-0", Container: "app", Service: "kubelet"},
		Attributes: map[string]any{
			"event.dataset": "kubernetes.event", "event.kind": "event", "event.module": "kubernetes", "event.id": id, "event.action": "BackOff", "event.provider": "kubelet", "event.type": "info",
			"kubernetes.event.count": 1.0, "kubernetes.event.type": "Warning", "kubernetes.event.action": "Pulling", "kubernetes.event.name": rec.Attributes["kubernetes.event.name"],
			"kubernetes.event.involved_object.kind": "Pod", "kubernetes.event.involved_object.name": "web-0", "kubernetes.event.involved_object.uid": "uid-0",
			"kubernetes.event.involved_object.namespace": c.namespace, "kubernetes.event.reporting_instance": "node-1",
		},
	}
	if d := cmp.Diff(want, rec, cmpopts.IgnoreFields(record.Record{}, "Time", "Observed")); d != "" {
		t.Error(d)
	}
	if age := time.Since(rec.Time); id == "" || age < 0 || age > 5*time.Minute {
		t.Errorf("id %q, %s old", id, age)
	}
}

// A counted Event is another record each time that it is counted up.
func TestSeries(t *testing.T) {
	at := func(s int) *time.Time { t := time.Unix(int64(s), 0).UTC(); return &t }
	in := &Input{}
	e := &event{First: at(10), Last: at(30), Count: 4, Type: "Normal"}
	e.Metadata.CreationTimestamp = *at(11)
	e.Metadata.Namespace = "default"
	e.Source.Component, e.Source.Host = "kubelet", "n1"
	e.Regarding = reference{Kind: "Node", Name: "n2"}
	r := in.record(e)
	if !r.Time.Equal(*at(30)) || r.Attributes["kubernetes.event.count"] != 4.0 || r.Level != "info" || r.Resource.Node != "n2" || r.Resource.Namespace != "default" || r.Resource.Service != "kubelet" {
		t.Errorf("%+v %+v", r, r.Resource)
	}
	for path, want := range map[string]string{"spec.containers{app}": "app", "spec.initContainers{a}": "a", "spec": "", "": "", "spec.containers{": ""} {
		if got := container(path); got != want {
			t.Errorf("%q: %q", path, got)
		}
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{{"10", "9", true}, {"9", "10", false}, {"9", "9", false}, {"9", "", true}, {"x", "9", true}} {
		if newer(c.a, c.b) != c.want {
			t.Errorf("%v", c)
		}
	}
}
