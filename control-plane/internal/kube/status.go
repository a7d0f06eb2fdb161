package kube

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/flowcontrol"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

const (
	// writesPerSecond to objects, at most, of all kinds together.
	writesPerSecond = 20
	// lookEveryStatus is how often counts are brought up to date, and how often it is
	// looked whether somebody else has changed what is ours.
	lookEveryStatus = 2 * time.Second
	// settle is how long after the start counts are left as they are: proxies come
	// back to a control plane that has just begun within seconds, and until then it
	// would say that there are none.
	defaultSettle = 15 * time.Second
	// conflicts in a row after which an object is left for later.
	mostConflicts = 5
	// How long an object waits that could not be written.
	statusRetryAtFirst = time.Second
	statusRetryAtMost  = time.Minute
)

// StatusOptions say what there is to write. State is required.
type StatusOptions struct {
	// Pod is the name of this replica.
	Pod string
	// State is what was built last; nil before the first build.
	State func() *rebuild.State
	// Reports of the proxies; nil where there are none, and no counts.
	Reports *Reports
	// Lease is how long a leader that has vanished is waited for; 0 is 15 s.
	Lease time.Duration
	// Settle is how long after Run has begun counts are not written; 0 is 15 s.
	Settle time.Duration
}

// Status writes into the objects what has become of them: status.parents of
// routes, status.ancestors, proxies, breakers and lastTrip of policies, and
// Events. Of several replicas the leader does. It writes where something differs,
// and of every list its own entries only.
type Status struct {
	c       *Cluster
	o       StatusOptions
	changed chan struct{}
	metrics statusMetrics
	limiter flowcontrol.RateLimiter
	leader  leader
	events  *events
	started time.Time
}

// WriteStatus makes a Status. It must be run beside the Cluster.
func (c *Cluster) WriteStatus(o StatusOptions) *Status {
	if o.Settle == 0 {
		o.Settle = defaultSettle
	}
	s := &Status{
		c: c, o: o, changed: make(chan struct{}, 1), metrics: newStatusMetrics(c.o.Registry),
		limiter: flowcontrol.NewTokenBucketRateLimiter(writesPerSecond, 1),
	}
	s.events = newEvents(c, o.Pod, s.metrics.events)
	s.leader = newLeader(c, o.Pod, o.Lease, func(leads bool) {
		s.metrics.leader.Set(0)
		if leads {
			s.metrics.leader.Set(1)
		}
		c.log.Info("leadership changed: the leader writes status and Events", "host.name", o.Pod, "outrigger.leader", leads)
	})
	return s
}

// Changed has the State looked at. It never blocks.
func (s *Status) Changed() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Run writes, as long as this replica is the leader, until ctx ends. It returns nil
// then: nobody is served worse without it.
func (s *Status) Run(ctx context.Context) error {
	defer s.limiter.Stop()
	s.started = time.Now()
	if !s.c.source.WaitSynced(ctx) {
		return nil
	}
	if err := s.leader.run(ctx, s.lead); err != nil {
		s.c.log.Error("no status is written", "error.message", err.Error())
		<-ctx.Done()
	}
	return nil
}

type objectKey struct {
	kind string
	types.NamespacedName
}

// term is what is remembered while leading.
type term struct {
	*Status
	// newest are objects as the API server has returned them, until the informer has
	// something else than what it had then.
	newest map[objectKey]answered
	failed map[objectKey]failure
	// bare are the objects that have entries of ours and should have none, and since
	// when. They may be newer than the State.
	bare   map[objectKey]time.Time
	wrote  map[objectKey]time.Time
	full   map[objectKey]bool // of which the log has told
	totals totals
}

type answered struct {
	cached string // resource version in the informer's store
	object client.Object
}

type failure struct {
	next time.Time
	wait time.Duration
}

// job is one object that something is to be written to.
type job struct {
	key    objectKey
	table  *table
	cached string
	object client.Object
	want   wanted
	patch  patch
}

// lead works until ctx ends.
func (s *Status) lead(ctx context.Context) {
	t := &term{
		Status: s, newest: map[objectKey]answered{}, failed: map[objectKey]failure{}, bare: map[objectKey]time.Time{},
		wrote: map[objectKey]time.Time{}, full: map[objectKey]bool{},
	}
	tick := time.NewTicker(lookEveryStatus)
	defer tick.Stop()
	t.count(ctx)
	for {
		t.work(ctx, tick.C)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			t.count(ctx)
		case <-s.changed:
		}
	}
}

// count brings the counts up to date.
func (t *term) count(ctx context.Context) {
	if t.o.Reports == nil {
		return
	}
	t.totals = t.o.Reports.sum(ctx)
	t.events.told(ctx, t.totals)
}

// work writes what is due. It begins anew when there is a new State or new counts,
// because what is wrong goes before what is counted, and what changes in between
// need not be written.
func (t *term) work(ctx context.Context, tick <-chan time.Time) {
	jobs := t.due(time.Now())
	for len(jobs) > 0 {
		if t.limiter.Wait(ctx) != nil {
			return
		}
		t.write(ctx, jobs[0])
		jobs = jobs[1:]
		select {
		case <-ctx.Done():
			return
		case <-tick:
			t.count(ctx)
			jobs = t.due(time.Now())
		case <-t.changed:
			jobs = t.due(time.Now())
		default:
		}
	}
}

// due compares everything that has a status with what it should say.
func (t *term) due(now time.Time) []job {
	state := t.o.State()
	if state == nil {
		return nil
	}
	statuses := map[objectKey][]translate.Status{}
	for _, s := range state.Statuses {
		k := objectKey{s.Kind, types.NamespacedName{Namespace: s.Namespace, Name: s.Name}}
		statuses[k] = append(statuses[k], s)
	}
	settled := t.o.Reports != nil && now.Sub(t.started) >= t.o.Settle
	var jobs []job
	seen := map[objectKey]bool{}
	for _, row := range t.c.source.written() {
		j := job{key: row.key, table: row.table, object: row.object, cached: row.object.GetResourceVersion()}
		seen[j.key] = true
		if a, ok := t.newest[j.key]; ok && a.cached == j.cached {
			j.object = a.object
		} else {
			delete(t.newest, j.key)
		}
		of := statuses[j.key]
		have, _ := read(j.object)
		switch {
		case len(of) == 0 && !have.ours():
			delete(t.bare, j.key)
			continue
		case len(of) == 0:
			if t.bare[j.key].IsZero() {
				t.bare[j.key] = now
			}
			if now.Sub(t.bare[j.key]) < lookEveryStatus {
				continue
			}
		default:
			delete(t.bare, j.key)
			if of[0].Generation != j.object.GetGeneration() {
				continue // the next State is about it
			}
		}
		if f := t.failed[j.key]; now.Before(f.next) {
			continue
		}
		j.want = wanted{entries: entriesOf(of)}
		if settled {
			t.totals.fill(&j.want, j.key, of)
		}
		if j.patch = change(j.object, j.want, metav1.NewTime(now)); len(j.patch.ops) > 0 {
			jobs = append(jobs, j)
		}
		t.sayFull(j.key, j.patch.full)
	}
	t.forget(seen)
	slices.SortStableFunc(jobs, func(a, b job) int {
		first := func(j job) int {
			if j.patch.conditions {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(first(a), first(b)), t.wrote[a.key].Compare(t.wrote[b.key]))
	})
	return jobs
}

// forget what is remembered of objects that are gone.
func (t *term) forget(seen map[objectKey]bool) {
	for k := range t.wrote {
		if !seen[k] {
			delete(t.wrote, k)
			delete(t.newest, k)
			delete(t.failed, k)
		}
	}
	for k := range t.bare {
		if !seen[k] {
			delete(t.bare, k)
		}
	}
	for k := range t.full {
		if !seen[k] {
			delete(t.full, k)
		}
	}
}

// sayFull tells once that there is no room in a status.
func (t *term) sayFull(k objectKey, missing int) {
	if missing == 0 {
		delete(t.full, k)
		return
	}
	if !t.full[k] {
		t.full[k] = true
		t.c.log.Warn("a status has no room for our entries, because other controllers' fill it; delete targets, or what else reports there",
			"outrigger.object.kind", k.kind, "outrigger.object.namespace", k.Namespace, "outrigger.object.name", k.Name, "outrigger.missing", missing)
	}
}

// write makes one object right. What somebody else wrote meanwhile is read, and the
// way from there is made anew.
func (t *term) write(ctx context.Context, j job) {
	t.wrote[j.key] = time.Now()
	newly := j.patch.newly
	var err error
	for range mostConflicts {
		o := j.table.object()
		o.SetNamespace(j.key.Namespace)
		o.SetName(j.key.Name)
		request, cancel := context.WithTimeout(ctx, requestTimeout)
		err = t.c.client.Status().Patch(request, o, client.RawPatch(types.JSONPatchType, j.patch.encode()))
		cancel()
		if err == nil {
			t.keep(j, o)
			delete(t.failed, j.key)
			t.metrics.writes.WithLabelValues(j.key.kind, "written").Inc()
			t.events.refused(ctx, o, j.object, newly)
			return
		}
		if !moved(err) {
			break
		}
		t.metrics.writes.WithLabelValues(j.key.kind, "conflict").Inc()
		o = j.table.object()
		request, cancel = context.WithTimeout(ctx, requestTimeout)
		err = t.c.client.Get(request, j.key.NamespacedName, o)
		cancel()
		if err != nil {
			break
		}
		same := o.GetGeneration() == j.object.GetGeneration() && o.GetUID() == j.object.GetUID()
		t.keep(j, o)
		if !same {
			return // the next State is about it
		}
		j.object = o
		if j.patch = change(o, j.want, metav1.Now()); len(j.patch.ops) == 0 {
			return
		}
		newly = j.patch.newly
		if t.limiter.Wait(ctx) != nil {
			return
		}
	}
	if ctx.Err() != nil || apierrors.IsNotFound(err) {
		return
	}
	t.later(j.key, err)
}

// keep an object until the informer has moved on.
func (t *term) keep(j job, o client.Object) {
	if trimmed, err := j.table.transform(o); err == nil {
		if o, ok := trimmed.(client.Object); ok {
			t.newest[j.key] = answered{j.cached, o}
		}
	}
}

// later has an object wait.
func (t *term) later(k objectKey, err error) {
	t.metrics.writes.WithLabelValues(k.kind, "failed").Inc()
	f := t.failed[k]
	f.wait = min(max(2*f.wait, statusRetryAtFirst), statusRetryAtMost)
	f.next = time.Now().Add(f.wait)
	t.failed[k] = f
	if f.wait == 4*statusRetryAtFirst { // once; what passes by itself has, by then
		t.c.log.Warn("a status cannot be written", "outrigger.object.kind", k.kind, "outrigger.object.namespace", k.Namespace,
			"outrigger.object.name", k.Name, "error.message", err.Error())
	}
}

// moved says whether the object was changed by somebody else: the version that the
// patch tests, or an index in it, is not there any more.
func moved(err error) bool {
	if apierrors.IsConflict(err) {
		return true
	}
	var s apierrors.APIStatus
	return errors.As(err, &s) && s.Status().Code == http.StatusUnprocessableEntity
}

// statusRow is an object that a status is written to.
type statusRow struct {
	key    objectKey
	table  *table
	object client.Object
}

// written lists the objects of the kinds that have a status of ours.
func (s *Source) written() []statusRow {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []statusRow
	for kind, t := range s.tables {
		if !t.custom {
			continue
		}
		if _, ok := read(t.object()); !ok {
			continue
		}
		for name, r := range t.rows {
			out = append(out, statusRow{objectKey{kind, name}, t, r.object})
		}
	}
	return out
}

func (s *Source) object(k objectKey) (client.Object, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t := s.tables[k.kind]
	if t == nil {
		return nil, false
	}
	r, ok := t.rows[k.NamespacedName]
	return r.object, ok
}

type statusMetrics struct {
	leader prometheus.Gauge
	writes *prometheus.CounterVec
	events *prometheus.CounterVec
}

func newStatusMetrics(reg prometheus.Registerer) statusMetrics {
	m := statusMetrics{
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_leader", Help: "1 where this replica writes status and Events, else 0.",
		}),
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_status_writes_total", Help: "Requests to write a status, by kind and result: written, conflict (somebody else was faster; tried again) or failed.",
		}, []string{"kind", "result"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_events_total", Help: "Kubernetes Events, by reason and result: created, known (there is one already), limited or failed.",
		}, []string{"reason", "result"}),
	}
	reg.MustRegister(m.leader, m.writes, m.events)
	return m
}
