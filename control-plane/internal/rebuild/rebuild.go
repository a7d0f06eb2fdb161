// Package rebuild is the one loop of the control plane: gather changes, hold
// off, load the objects, translate them, publish the mesh.
//
// It knows when to build and what to keep in force when an object becomes
// invalid; what objects mean is package translate's, where they come from the
// Source's and who is told the Publisher's. main makes one Loop and runs it;
// admin reads its State.
package rebuild

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

// Publisher is told each new mesh.
type Publisher interface {
	Publish(*mesh.Mesh) error
}

// How long changes are gathered.
const (
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

	// What follows belongs to Run.
	good  map[objectKey]metav1.Object
	known map[translate.Problem]bool

	builds   *prometheus.CounterVec
	duration prometheus.Histogram
	problems *prometheus.GaugeVec
}

// New makes a Loop that has built nothing yet.
func New(o Options) *Loop {
	l := &Loop{
		o: o, changed: make(chan struct{}, 1), good: map[objectKey]metav1.Object{}, known: map[translate.Problem]bool{},
		builds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_rebuild_total", Help: "Builds of the mesh: published, unchanged or failed.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "outrigger_rebuild_duration_seconds", Help: "Load, translate and publish.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2, 15),
		}),
		problems: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_problems", Help: "Problems with objects, now.",
		}, []string{"kind", "reason"}),
	}
	o.Registry.MustRegister(l.builds, l.duration, l.problems)
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
	l.build()
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- l.o.Source.Watch(ctx, l.notify) }()
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
	for {
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
		case <-l.changed:
		}
		l.holdOff(ctx)
		if ctx.Err() == nil {
			l.build()
		}
	}
}

// notify never blocks: one pending notice stands for any number of changes.
func (l *Loop) notify() {
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// holdOff waits until nothing has changed for Quiet, AtMost at the longest.
func (l *Loop) holdOff(ctx context.Context) {
	quiet := time.NewTimer(Quiet)
	defer quiet.Stop()
	limit := time.NewTimer(AtMost)
	defer limit.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-quiet.C:
			return
		case <-limit.C:
			return
		case <-l.changed:
			quiet.Reset(Quiet)
		}
	}
}

// Build translates objects once, as the loop does but without its memory of
// what was valid before.
func Build(src Loader, trustDomain string) *State {
	in, problems := src.Load()
	m, more, statuses := translate.Build(in, translate.Options{TrustDomain: trustDomain})
	return &State{Mesh: m, Problems: slices.Concat(problems, more), Statuses: statuses, Version: version(m)}
}

func (l *Loop) build() {
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
	next := &State{Mesh: m, Problems: slices.Concat(problems, more), Statuses: statuses, BuiltAt: started, Version: version(m)}
	l.report(next.Problems)
	result := "published"
	if old := l.state.Load(); old != nil && old.Version == next.Version {
		result = "unchanged"
	} else if err := l.o.Publisher.Publish(m); err != nil {
		l.builds.WithLabelValues("failed").Inc()
		l.o.Log.Error("the mesh was built but not published; the one before stays in force", "error.message", err.Error())
		return
	}
	l.builds.WithLabelValues(result).Inc()
	l.state.Store(next)
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

// version is a hash of the mesh. A Mesh holds nothing that JSON cannot say, so
// that encoding it cannot fail.
func version(m *mesh.Mesh) string {
	h := sha256.New()
	if err := json.NewEncoder(h).Encode(m); err != nil {
		panic("rebuild: cannot encode the mesh: " + err.Error())
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
