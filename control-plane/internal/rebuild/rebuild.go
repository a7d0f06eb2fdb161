// Package rebuild is the one loop of the control plane: gather changes, hold
// off, load the objects, translate them, publish the mesh.
//
// Endpoints change often, and seldom anything else. Where the Source is a Notifier,
// a change of endpoints alone goes a shorter way: it costs what it touches, and
// leads to the same Mesh.
//
// It knows when to build and what to keep in force when an object becomes
// invalid; what objects mean is package translate's, where they come from the
// Source's and who is told the Publisher's. main makes one Loop and runs it;
// admin reads its State.
package rebuild

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// Source is where the objects come from: a folder or a cluster.
type Source interface {
	Loader
	// Watch calls changed whenever Load may return something else, until ctx
	// ends. An error before that is the end of watching.
	Watch(ctx context.Context, changed func()) error
}

// Loader reads the objects.
type Loader interface {
	// Load returns all objects, and what could not be read.
	Load() (translate.Objects, []translate.Problem)
}

// Notifier is a Source that says what has changed.
type Notifier interface {
	Source
	// WatchChanges is Watch; when it calls changed, LoadServices and Pod return at
	// least what is told.
	WatchChanges(ctx context.Context, changed func(translate.Change)) error
	// LoadServices returns the EndpointSlices of the Services and the pods that those
	// name. It may return more.
	LoadServices(names []types.NamespacedName) translate.Objects
	Pod(name types.NamespacedName) (*corev1.Pod, bool)
}

// Publisher is told each new mesh.
type Publisher interface {
	// Replace puts a mesh in force. seen is when the first change that is in it was
	// seen.
	Replace(m *mesh.Mesh, seen time.Time) error
	// Update puts a mesh in force that differs only by c from the one that is. After
	// an error one has to be replaced.
	Update(m *mesh.Mesh, c mesh.Change, seen time.Time) error
}

// How long changes are gathered.
const (
	// Gather is the shortest time between two updates of endpoints.
	Gather = 20 * time.Millisecond
	// Quiet is how long no change must arrive before a build.
	Quiet = 20 * time.Millisecond
	// AtMost is how long a build is held off while changes keep arriving.
	AtMost = 200 * time.Millisecond
)

// State is the outcome of a build. It is never changed.
type State struct {
	Mesh *mesh.Mesh
	// Problems by object, those of files first.
	Problems []translate.Problem
	// Statuses by object: what is to be written of each.
	Statuses []translate.Status
	BuiltAt  time.Time
	// Version is a hash of the Mesh.
	Version string
}

// Options of a Loop. All fields are required but TrustDomain.
type Options struct {
	Source      Source
	Publisher   Publisher
	TrustDomain string
	Log         *slog.Logger
	Registry    prometheus.Registerer
}

// Loop rebuilds the mesh when something changes. Make it with New.
type Loop struct {
	o       Options
	changed chan struct{}
	state   atomic.Pointer[State]
	after   func() // a build; nil where nobody wants to know

	mu      sync.Mutex
	pending pending

	// What follows belongs to Run.
	good      map[objectKey]metav1.Object
	known     map[translate.Problem]bool
	versions  versions
	endpoints *translate.Endpoints // nil where the Source is no Notifier, or nothing has been published
	torn      bool                 // it is not known what is in force

	builds   *prometheus.CounterVec
	updates  *prometheus.CounterVec
	duration prometheus.Histogram
	problems *prometheus.GaugeVec
}

// New makes a Loop that has built nothing yet.
func New(o Options) *Loop {
	l := &Loop{
		o: o, changed: make(chan struct{}, 1), pending: newPending(), good: map[objectKey]metav1.Object{}, known: map[translate.Problem]bool{},
		builds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_rebuild_total", Help: "Builds of the mesh: published, unchanged or failed.",
		}, []string{"result"}),
		updates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_rebuild_updates_total", Help: "Updates of endpoints without a build: published, unchanged, or incomplete, where a build follows.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "outrigger_rebuild_duration_seconds", Help: "Load, translate and publish.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15),
		}),
		problems: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_problems", Help: "Problems with objects, now.",
		}, []string{"kind", "reason"}),
	}
	o.Registry.MustRegister(l.builds, l.updates, l.duration, l.problems)
	return l
}

// State returns the mesh in force; nil before the first build. It is safe for
// concurrent use.
func (l *Loop) State() *State { return l.state.Load() }

// OnBuild has f called after each build, whether or not the mesh changed by it:
// what is to be said of the objects may have. It must be called before Run; f
// must not block.
func (l *Loop) OnBuild(f func()) { l.after = f }

// Run builds at once, then after every change, until ctx ends; then it returns
// nil. It returns an error when the Source can no longer be watched.
func (l *Loop) Run(ctx context.Context) error {
	// Before watching: a Source reports what differs from the last Load.
	l.build(time.Now())
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- l.watch(ctx) }()
	ended := false
	defer func() {
		cancel()
		if ended {
			return
		}
		if err := <-watched; err != nil {
			l.o.Log.Warn("the watch of the configuration ended badly", "error.message", err.Error())
		}
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var updated time.Time // when endpoints were, last
	for {
		due, build := l.due(updated)
		timer.Stop()
		var at <-chan time.Time
		if !due.IsZero() {
			timer.Reset(time.Until(due))
			at = timer.C
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-watched:
			ended = true
			switch {
			case ctx.Err() != nil:
				return nil
			case err == nil:
				err = errors.New("it ended without a cause")
			}
			return fmt.Errorf("watch the configuration: %w", err)
		case <-l.changed: // it may be due later, or earlier
		case <-at:
			if build {
				l.build(l.take(true).first)
			} else {
				l.update(l.take(false))
			}
			updated = time.Now()
		}
	}
}

func (l *Loop) watch(ctx context.Context) error {
	if n, ok := l.o.Source.(Notifier); ok {
		return n.WatchChanges(ctx, l.notify)
	}
	return l.o.Source.Watch(ctx, func() { l.notify(translate.Change{Rest: true}) })
}

// pending is what has changed and is not in force yet. It holds each Service and
// pod once.
type pending struct {
	first          time.Time // when the first was seen
	services, pods map[types.NamespacedName]bool

	rest              bool
	restFrom, restTil time.Time // when the first and the last of the rest were seen
}

func newPending() pending {
	return pending{services: map[types.NamespacedName]bool{}, pods: map[types.NamespacedName]bool{}}
}

func (p *pending) endpoints() bool { return len(p.services)+len(p.pods) > 0 }

// notify never blocks: one notice stands for any number of changes.
func (l *Loop) notify(c translate.Change) {
	now := time.Now()
	l.mu.Lock()
	p := &l.pending
	if p.first.IsZero() {
		p.first = now
	}
	if c.Rest {
		if !p.rest {
			p.rest, p.restFrom = true, now
		}
		p.restTil = now
	}
	for _, n := range c.Services {
		p.services[n] = true
	}
	for _, n := range c.Pods {
		p.pods[n] = true
	}
	l.mu.Unlock()
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// due says when there is something to do, and whether that is a build: once nothing
// but endpoints has changed for Quiet, AtMost after the first change. Zero is never.
func (l *Loop) due(updated time.Time) (at time.Time, build bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.pending
	if p.rest {
		at, build = p.restTil.Add(Quiet), true
		if limit := p.restFrom.Add(AtMost); limit.Before(at) {
			at = limit
		}
	}
	switch next := updated.Add(Gather); {
	case !p.endpoints():
	case l.endpoints == nil:
		if !p.rest {
			at, build = p.first.Add(AtMost), true
		}
	case at.IsZero() || next.Before(at):
		at, build = next, false
	}
	return at, build
}

// take returns what is pending: all of it, or endpoints only.
func (l *Loop) take(all bool) pending {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.pending
	l.pending = newPending()
	if !all && out.rest {
		l.pending.rest, l.pending.restFrom, l.pending.restTil, l.pending.first = true, out.restFrom, out.restTil, out.restFrom
	}
	return out
}

// update goes the shorter way.
func (l *Loop) update(p pending) {
	started := time.Now()
	source, ok := l.o.Source.(Notifier)
	if !ok {
		return // nobody has told of endpoints
	}
	c := translate.Change{Services: slices.Collect(maps.Keys(p.services)), Pods: slices.Collect(maps.Keys(p.pods))}
	in := source.LoadServices(c.Services)
	for _, n := range c.Pods {
		if pod, ok := source.Pod(n); ok {
			in.Pods = append(in.Pods, pod)
		}
	}
	m, changed, complete := l.endpoints.Update(c, in)
	result := "published"
	switch {
	case !complete:
		result = "incomplete"
	case changed.Empty():
		result = "unchanged"
	}
	l.updates.WithLabelValues(result).Inc()
	if !complete {
		l.notify(translate.Change{Rest: true})
	}
	if changed.Empty() {
		return
	}
	if err := l.o.Publisher.Update(m, changed, p.first); err != nil {
		l.o.Log.Error("an update of endpoints was not published; the mesh is built anew", "error.message", err.Error())
		l.torn = true
		l.notify(translate.Change{Rest: true})
		return
	}
	next := *l.state.Load()
	next.Mesh, next.BuiltAt, next.Version = m, started, l.versions.update(m, changed)
	l.state.Store(&next)
	l.o.Log.Debug("endpoints updated", "outrigger.config_version", next.Version, "outrigger.services", len(changed.Services),
		"outrigger.instances", len(changed.Instances), "event.duration", time.Since(started).Nanoseconds())
}

// Build translates objects once, as the loop does but without its memory of
// what was valid before.
func Build(src Loader, trustDomain string) *State {
	in, problems := src.Load()
	m, more, statuses := translate.Build(in, translate.Options{TrustDomain: trustDomain})
	return &State{Mesh: m, Problems: slices.Concat(problems, more), Statuses: statuses, Version: versionOf(m)}
}

func (l *Loop) build(seen time.Time) {
	started := time.Now()
	defer func() { l.duration.Observe(time.Since(started).Seconds()) }()
	in, problems := l.o.Source.Load()
	opts := translate.Options{TrustDomain: l.o.TrustDomain}
	m, more, statuses := translate.Build(in, opts)
	if held := l.hold(&in, more); len(held) > 0 {
		invalid := more
		was := statuses
		m, more, statuses = translate.Build(in, opts)
		more = slices.Concat(held.problems(invalid), more)
		statuses = held.statuses(was, statuses)
	}
	versions := newVersions(m)
	next := &State{Mesh: m, Problems: slices.Concat(problems, more), Statuses: statuses, BuiltAt: started, Version: versions.String()}
	l.report(next.Problems)
	result := "published"
	if old := l.state.Load(); old != nil && old.Version == next.Version && !l.torn {
		result = "unchanged"
	} else if err := l.o.Publisher.Replace(m, seen); err != nil {
		l.builds.WithLabelValues("failed").Inc()
		l.o.Log.Error("the mesh was built but not published; the one before stays in force", "error.message", err.Error())
		return
	}
	l.torn = false
	l.builds.WithLabelValues(result).Inc()
	l.state.Store(next)
	l.versions = versions
	if _, ok := l.o.Source.(Notifier); ok {
		l.endpoints = translate.NewEndpoints(in, opts, m, more)
	}
	l.o.Log.Info("mesh built", "outrigger.config_version", next.Version, "outrigger.services", len(m.Services),
		"outrigger.problems", len(next.Problems), "event.duration", time.Since(started).Nanoseconds(), "event.outcome", result)
	if l.after != nil {
		l.after()
	}
}

type objectKey struct{ kind, namespace, name string }

// held are the policies whose last valid version is in force.
type held map[objectKey]bool

// hold puts the version that was valid before in the place of each policy that
// has become invalid, and remembers those that are valid. It returns which it
// replaced.
func (l *Loop) hold(in *translate.Objects, problems []translate.Problem) held {
	invalid := map[objectKey]bool{}
	for _, p := range problems {
		if p.Reason == translate.ReasonInvalid {
			invalid[objectKey{p.Kind, p.Namespace, p.Name}] = true
		}
	}
	replaced := held{}
	seen := map[objectKey]bool{}
	in.CircuitBreakers = holdKind(l, "CircuitBreaker", in.CircuitBreakers, invalid, replaced, seen)
	in.RetryPolicies = holdKind(l, "RetryPolicy", in.RetryPolicies, invalid, replaced, seen)
	in.AuthorizationPolicies = holdKind(l, "AuthorizationPolicy", in.AuthorizationPolicies, invalid, replaced, seen)
	for k := range l.good {
		if !seen[k] {
			delete(l.good, k) // deleted by the user
		}
	}
	return replaced
}

const stays = "; the last valid version of the object stays in force"

// problems are those of the versions that were replaced, which say so.
func (h held) problems(in []translate.Problem) []translate.Problem {
	var out []translate.Problem
	for _, p := range in {
		if h[objectKey{p.Kind, p.Namespace, p.Name}] && p.Reason == translate.ReasonInvalid && p.Message != translate.FailsClosed {
			p.Message += stays
			out = append(out, p)
		}
	}
	return out
}

// statuses are those of what is in force, but for the objects that were replaced:
// of these they say what is wrong with the version that is not.
func (h held) statuses(invalid, inForce []translate.Status) []translate.Status {
	is := func(s translate.Status) bool { return h[objectKey{s.Kind, s.Namespace, s.Name}] }
	out := slices.DeleteFunc(slices.Clone(inForce), is)
	for _, s := range invalid {
		if !is(s) {
			continue
		}
		s.Conditions = slices.Clone(s.Conditions)
		for i := range s.Conditions {
			c := &s.Conditions[i]
			if c.Reason == string(translate.ReasonInvalid) {
				c.Message = strings.TrimPrefix(c.Message, translate.FailsClosed+"\n") + stays
			}
		}
		out = append(out, s)
	}
	return translate.SortStatuses(out)
}

type policy interface {
	comparable
	metav1.Object
	*v1alpha1.CircuitBreaker | *v1alpha1.RetryPolicy | *v1alpha1.AuthorizationPolicy
}

func holdKind[P policy](l *Loop, kind string, objects []P, invalid, replaced, seen map[objectKey]bool) []P {
	var none P
	out := slices.Clone(objects)
	for i, o := range out {
		if o == none {
			continue
		}
		k := objectKey{kind, o.GetNamespace(), o.GetName()}
		seen[k] = true
		if !invalid[k] {
			l.good[k] = o
			continue
		}
		if good, ok := l.good[k].(P); ok {
			out[i] = good
			replaced[k] = true
		}
	}
	return out
}

// report logs each problem when it appears and when it is gone.
func (l *Loop) report(problems []translate.Problem) {
	l.problems.Reset()
	now := make(map[translate.Problem]bool, len(problems))
	for _, p := range problems {
		l.problems.WithLabelValues(p.Kind, string(p.Reason)).Inc()
		if now[p] {
			continue
		}
		now[p] = true
		if !l.known[p] {
			l.o.Log.Warn("problem: "+p.String(), problemAttrs(p)...)
		}
	}
	for p := range l.known {
		if !now[p] {
			l.o.Log.Info("solved: "+p.String(), problemAttrs(p)...)
		}
	}
	l.known = now
}

func problemAttrs(p translate.Problem) []any {
	return []any{
		"outrigger.object.kind", p.Kind, "outrigger.object.namespace", p.Namespace, "outrigger.object.name", p.Name,
		"outrigger.object.field", p.Field, "outrigger.problem.reason", p.Reason,
	}
}
