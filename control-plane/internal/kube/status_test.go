package kube_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
)

var reported = []string{crdBreaker, "outrigger.dev_retrypolicies", "outrigger.dev_authorizationpolicies", crdHTTPRoute}

// nowhere is a Publisher without proxies.
type nowhere struct{}

func (nowhere) Publish(*mesh.Mesh) error { return nil }

func (nowhere) Replace(*mesh.Mesh, time.Time) error { return nil }

func (nowhere) Update(_ *mesh.Mesh, _ mesh.Change, _ time.Time) error { return nil }

// to is where meshes are published.
func (r *rig) to() rebuild.Publisher {
	if r.publisher != nil {
		return r.publisher
	}
	return nowhere{}
}

// replica is a control plane that writes what it finds.
type replica struct {
	*kube.Cluster
	reports *kube.Reports
	loop    *rebuild.Loop
	log     *output
	stop    func()
}

// replica starts one that works in the namespace of the rig, and stops it at the
// end of the test at the latest.
func (r *rig) replica(t *testing.T, pod string, o kube.StatusOptions, change ...func(*rest.Config)) *replica {
	t.Helper()
	return r.reporting(t, pod, o, kube.ReportsOptions{}, change...)
}

// reporting is a replica that also takes reports, where there is a way to ask for
// Progress.
func (r *rig) reporting(t *testing.T, pod string, o kube.StatusOptions, reports kube.ReportsOptions, change ...func(*rest.Config)) *replica {
	t.Helper()
	config := rest.CopyConfig(server.Need(t).Config)
	for _, c := range change {
		c(config)
	}
	p := &replica{log: &output{}}
	registry := prometheus.NewRegistry()
	log := slog.New(slog.NewTextHandler(p.log, nil))
	var err error
	if p.Cluster, err = kube.Connect(kube.Options{Config: config, Namespace: r.ns, Registry: registry, Log: log}); err != nil {
		t.Fatal(err)
	}
	p.loop = rebuild.New(rebuild.Options{Source: p.Source(), Publisher: r.to(), Log: log, Registry: registry})
	o.Pod, o.State = pod, p.loop.State
	run := map[string]func(context.Context) error{}
	if reports.Progress != nil {
		reports.Pod, reports.State = pod, p.loop.State
		p.reports = p.CollectReports(reports)
		o.Reports = p.reports
		run["Reports"] = p.reports.Run
	}
	status := p.WriteStatus(o)
	p.loop.OnBuild(status.Changed)

	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	run["Cluster"], run["Status"] = p.Run, status.Run
	run["Loop"] = func(ctx context.Context) error {
		if !p.Source().WaitSynced(ctx) {
			return nil
		}
		return p.loop.Run(ctx)
	}
	for name, run := range run {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	p.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if t.Failed() {
			t.Log(pod, p.log)
		}
	})
	t.Cleanup(p.stop)
	return p
}

// get reads an object of the rig's namespace.
func get[P client.Object](t *testing.T, r *rig, o P, name string) P {
	t.Helper()
	if err := r.admin.Get(t.Context(), r.name(name), o); err != nil {
		t.Fatal(err)
	}
	return o
}

// said is what our conditions of a policy say: "<target> <status> <reason> <generation>".
func said(p *v1alpha1.CircuitBreaker) string {
	var out []string
	for _, a := range p.Status.Ancestors {
		for _, c := range a.Conditions {
			out = append(out, fmt.Sprint(a.AncestorRef.Name, " ", c.Type, " ", c.Status, " ", c.Reason, " ", c.ObservedGeneration))
		}
	}
	return strings.Join(out, "; ")
}

func (r *rig) says(t *testing.T, name, want string) {
	t.Helper()
	eventually(t, func() string {
		if got := said(get(t, r, &v1alpha1.CircuitBreaker{}, name)); got != want {
			return fmt.Sprintf("%s says %q; want %q", name, got, want)
		}
		return ""
	})
}

func serviceRef(name string) gatewayv1.ParentReference {
	group, kind := gatewayv1.Group(""), gatewayv1.Kind("Service")
	return gatewayv1.ParentReference{Group: &group, Kind: &kind, Name: gatewayv1.ObjectName(name)}
}

// foreign is an entry of another controller.
func foreign(ref gatewayv1.ParentReference) gatewayv1.RouteParentStatus {
	return gatewayv1.RouteParentStatus{ParentRef: ref, ControllerName: "example.com/gateway", Conditions: []metav1.Condition{{
		Type: "Accepted", Status: metav1.ConditionTrue, Reason: "Accepted", LastTransitionTime: metav1.NewTime(time.Unix(1e9, 0)),
	}}}
}

// What has become of an object is written into it, beside what others wrote, and
// then never again: not after builds that change nothing, not after a restart.
func TestStatusIsWrittenOnce(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	younger := breaker(r, "younger")
	route := &gatewayv1.HTTPRoute{ObjectMeta: r.meta("payments"), Spec: gatewayv1.HTTPRouteSpec{
		CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{serviceRef("payments")}},
	}}
	create := func(o client.Object) {
		t.Helper()
		eventually(t, func() string { // a CRD is served a moment after it was made
			if err := r.admin.Create(t.Context(), o); err != nil {
				return err.Error()
			}
			return ""
		})
	}
	for _, o := range []client.Object{r.service("payments"), breaker(r, "older"), route} {
		create(o)
	}
	route.Status.Parents = []gatewayv1.RouteParentStatus{foreign(serviceRef("payments")), foreign(serviceRef("ledger"))}
	if err := r.admin.Status().Update(t.Context(), route); err != nil {
		t.Fatal(err)
	}
	create(younger) // by name, where it is made in the same second

	a := r.replica(t, "a", kube.StatusOptions{})
	r.says(t, "older", "payments Accepted True Accepted 1")
	r.says(t, "younger", "payments Accepted False Conflicted 1")
	eventually(t, func() string {
		get(t, r, route, "payments")
		if len(route.Status.Parents) != 3 {
			return fmt.Sprint(len(route.Status.Parents), " parents")
		}
		return ""
	})
	if d := cmp.Diff([]gatewayv1.RouteParentStatus{foreign(serviceRef("payments")), foreign(serviceRef("ledger"))}, route.Status.Parents[:2]); d != "" {
		t.Errorf("another controller's entries (-want +got):\n%s", d)
	}
	if p := route.Status.Parents[2]; p.ControllerName != kube.ControllerName || !meta.IsStatusConditionTrue(p.Conditions, "Accepted") || !meta.IsStatusConditionTrue(p.Conditions, "ResolvedRefs") {
		t.Errorf("%+v", p)
	}
	versions := func() string {
		return get(t, r, &v1alpha1.CircuitBreaker{}, "older").ResourceVersion + " " + get(t, r, &v1alpha1.CircuitBreaker{}, "younger").ResourceVersion + " " +
			get(t, r, &gatewayv1.HTTPRoute{}, "payments").ResourceVersion
	}
	first := versions()
	built := a.loop.State()
	r.create(t, r.service("ledger"))
	eventually(t, func() string {
		if a.loop.State() == built {
			return "nothing was built"
		}
		return ""
	})
	a.stop()
	if n := a.log.count("outrigger.leader=true"); n != 1 {
		t.Errorf("led %d times", n)
	}
	b := r.replica(t, "b", kube.StatusOptions{})
	eventually(t, func() string {
		if b.log.count("outrigger.leader=true") == 0 || b.loop.State() == nil {
			return "b does not lead"
		}
		return ""
	})
	// The work that follows is what it would have done after what it must not do.
	create(breaker(r, "youngest"))
	r.says(t, "youngest", "payments Accepted False Conflicted 1")
	if now := versions(); now != first {
		t.Errorf("written again: %s, then %s", first, now)
	}
	eventually(t, func() string { // the Event comes after the status
		var events corev1.EventList
		if err := r.admin.List(t.Context(), &events, client.InNamespace(r.ns)); err != nil {
			return err.Error()
		}
		conflicts := map[string]int{}
		for _, e := range events.Items {
			if e.InvolvedObject.Kind != "Service" { // the API server speaks of addresses that it repairs
				conflicts[e.InvolvedObject.Name+" "+e.Type+" "+e.Reason]++
			}
		}
		return cmp.Diff(map[string]int{"younger Warning Conflicted": 1, "youngest Warning Conflicted": 1}, conflicts)
	})
}

// A condition keeps the time of its transition while its status stays, and follows
// the generation of the object. What nobody asks for any more goes.
func TestConditionsFollowTheObject(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	p := breaker(r, "payments")
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), p); err != nil {
			return err.Error()
		}
		return ""
	})
	r.create(t, r.service("payments"))
	r.replica(t, "a", kube.StatusOptions{})
	r.says(t, "payments", "payments Accepted True Accepted 1")
	long := metav1.NewTime(time.Now().Add(-time.Hour).Truncate(time.Second))
	eventually(t, func() string {
		get(t, r, p, "payments")
		p.Status.Ancestors[0].Conditions[0].LastTransitionTime = long
		if err := r.admin.Status().Update(t.Context(), p); err != nil {
			return err.Error()
		}
		return ""
	})
	change(t, r, p, func(p *v1alpha1.CircuitBreaker) { p.Spec.Trip.ConsecutiveFailures++ })
	r.says(t, "payments", "payments Accepted True Accepted 2")
	if got := get(t, r, p, "payments").Status.Ancestors[0].Conditions[0].LastTransitionTime; !got.Equal(&long) {
		t.Errorf("transition at %s; want %s", got, long)
	}
	change(t, r, p, func(p *v1alpha1.CircuitBreaker) { p.Spec.TargetRefs[0].Name = "nobody" })
	r.says(t, "payments", "nobody Accepted False TargetNotFound 3")

	// A route that is not for a mesh any more.
	route := &gatewayv1.HTTPRoute{ObjectMeta: r.meta("r"), Spec: gatewayv1.HTTPRouteSpec{
		CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{serviceRef("payments")}},
	}}
	r.create(t, route)
	parents := func(want int) {
		t.Helper()
		eventually(t, func() string {
			if n := len(get(t, r, route, "r").Status.Parents); n != want {
				return fmt.Sprint(n, " parents; want ", want)
			}
			return ""
		})
	}
	parents(1)
	change(t, r, route, func(o *gatewayv1.HTTPRoute) { o.Spec.ParentRefs = []gatewayv1.ParentReference{{Name: "gateway"}} })
	parents(0)
}

// meddler changes an object before the first write of its status arrives.
type meddler struct {
	http.RoundTripper
	once   sync.Once
	before func()
}

func (m *meddler) RoundTrip(q *http.Request) (*http.Response, error) {
	if q.Method == http.MethodPatch && strings.HasSuffix(q.URL.Path, "/circuitbreakers/payments/status") {
		m.once.Do(m.before)
	}
	return m.RoundTripper.RoundTrip(q)
}

// What somebody else writes between our reading and our writing stays.
func TestConflictIsResolved(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	p := breaker(r, "payments")
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), p); err != nil {
			return err.Error()
		}
		return ""
	})
	r.create(t, r.service("payments"))
	other := foreign(serviceRef("payments"))
	m := &meddler{before: func() {
		p.Status.Ancestors = []gatewayv1.PolicyAncestorStatus{{AncestorRef: other.ParentRef, ControllerName: other.ControllerName, Conditions: other.Conditions}}
		if err := r.admin.Status().Update(context.Background(), p); err != nil {
			t.Error(err)
		}
	}}
	r.replica(t, "a", kube.StatusOptions{}, func(c *rest.Config) {
		c.Wrap(func(rt http.RoundTripper) http.RoundTripper { m.RoundTripper = rt; return m })
	})
	r.says(t, "payments", "payments Accepted True Accepted 0; payments Accepted True Accepted 1")
	get(t, r, p, "payments")
	if a := p.Status.Ancestors[0]; a.ControllerName != other.ControllerName || len(a.Conditions) != 1 {
		t.Errorf("%+v", a)
	}
}

// Of two replicas one writes. When it goes it gives the Lease back, and the other
// writes at once.
func TestLeadershipIsHandedOver(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	const lease = 20 * time.Second
	a := r.replica(t, "a", kube.StatusOptions{Lease: lease})
	leads := func(p *replica) func() string {
		return func() string {
			if p.log.count("outrigger.leader=true") == 0 {
				return "nobody leads"
			}
			return ""
		}
	}
	eventually(t, leads(a))
	b := r.replica(t, "b", kube.StatusOptions{Lease: lease})
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), breaker(r, "first")); err != nil {
			return err.Error()
		}
		return ""
	})
	r.says(t, "first", "payments Accepted False TargetNotFound 1")
	if b.log.count("outrigger.leader=true") != 0 {
		t.Error("b leads beside a")
	}
	begin := time.Now()
	a.stop()
	eventually(t, leads(b))
	t.Logf("handed over in %s", time.Since(begin).Round(10*time.Millisecond))
	r.create(t, breaker(r, "second"))
	r.says(t, "second", "payments Accepted False TargetNotFound 1")
}

// Who loses the Lease, because the API server is away, stops writing and nothing
// else, and writes again when it has it again.
func TestLosingTheLeaseIsNotTheEnd(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	a := r.replica(t, "a", kube.StatusOptions{Lease: 6 * time.Second})
	led := func(times int, state string) {
		t.Helper()
		eventually(t, func() string {
			if n := a.log.count("outrigger.leader=" + state); n != times {
				return fmt.Sprintf("outrigger.leader=%s %d times; want %d", state, n, times)
			}
			return ""
		})
	}
	led(1, "true")
	server.StopAPI()
	led(1, "false")
	if err := server.StartAPI(); err != nil {
		t.Fatal(err)
	}
	led(2, "true")
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), breaker(r, "payments")); err != nil {
			return err.Error()
		}
		return ""
	})
	r.says(t, "payments", "payments Accepted False TargetNotFound 1")
}

// Without permission to elect there is no leader, and the log says what is missing.
func TestNoLeaderWithoutPermission(t *testing.T) {
	r := prepare(t)
	a := r.replica(t, "a", kube.StatusOptions{Lease: 3 * time.Second}, func(c *rest.Config) {
		c.Wrap(func(rt http.RoundTripper) http.RoundTripper { return forbidden{rt} })
	})
	eventually(t, func() string {
		if a.log.count("no leader can be elected") != 1 {
			return "the log says nothing"
		}
		return ""
	})
}

// forbidden has the API server refuse whatever is about Leases.
type forbidden struct{ http.RoundTripper }

func (f forbidden) RoundTrip(q *http.Request) (*http.Response, error) {
	if strings.Contains(q.URL.Path, "/leases") {
		q = q.Clone(q.Context())
		q.Header.Set("Impersonate-User", "nobody")
	}
	return f.RoundTripper.RoundTrip(q)
}
