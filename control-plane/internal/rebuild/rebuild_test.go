package rebuild_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// folder is a Source that the test writes to.
type folder struct {
	mu      sync.Mutex
	objects translate.Objects
	broken  []translate.Problem
	loads   int
	changed func()
	fail    chan error
}

func newFolder() *folder { return &folder{fail: make(chan error, 1)} }

func (f *folder) Load() (translate.Objects, []translate.Problem) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.loads++
	return f.objects, f.broken
}

func (f *folder) Watch(ctx context.Context, changed func()) error {
	f.mu.Lock()
	f.changed = changed
	f.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil
	case err := <-f.fail:
		return err
	}
}

func (f *folder) write(o translate.Objects) {
	f.mu.Lock()
	f.objects = o
	f.mu.Unlock()
	f.changed()
}

// published is a Publisher that keeps what it was told.
type published struct{ meshes []*mesh.Mesh }

func (p *published) Update(m *mesh.Mesh, _ mesh.Change, seen time.Time) error {
	return p.Replace(m, seen)
}

func (p *published) Replace(m *mesh.Mesh, _ time.Time) error {
	p.meshes = append(p.meshes, m)
	return nil
}

func service(ports ...int32) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "payments"}}
	for _, p := range ports {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: p})
	}
	return s
}

func breaker(ratio string) *v1alpha1.CircuitBreaker {
	return &v1alpha1.CircuitBreaker{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "payments"},
		Spec: v1alpha1.CircuitBreakerSpec{
			TargetRefs: []gatewayv1.LocalPolicyTargetReferenceWithSectionName{{
				LocalPolicyTargetReference: gatewayv1.LocalPolicyTargetReference{Kind: "Service", Name: "payments"},
			}},
			Trip: &v1alpha1.Trip{FailureRatio: ratio},
		},
	}
}

func run(t *testing.T, f func(t *testing.T, src *folder, pub *published, l *rebuild.Loop, log *bytes.Buffer)) {
	synctest.Test(t, func(t *testing.T) {
		src, pub, log := newFolder(), &published{}, &bytes.Buffer{}
		src.objects = translate.Objects{Services: []*corev1.Service{service(80)}}
		l := rebuild.New(rebuild.Options{
			Source: src, Publisher: pub, Log: slog.New(slog.NewTextHandler(log, nil)), Registry: prometheus.NewRegistry(),
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait()
		f(t, src, pub, l, log)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestChangesAreGathered(t *testing.T) {
	run(t, func(t *testing.T, src *folder, pub *published, l *rebuild.Loop, _ *bytes.Buffer) {
		if len(pub.meshes) != 1 || l.State() == nil {
			t.Fatal("nothing was published at the start")
		}
		for port := range int32(5) {
			src.write(translate.Objects{Services: []*corev1.Service{service(81 + port)}})
			time.Sleep(rebuild.Quiet / 2)
		}
		time.Sleep(rebuild.Quiet)
		synctest.Wait()
		if src.loads != 2 || len(pub.meshes) != 2 || pub.meshes[1].Services[0].Ports[0].Number != 85 {
			t.Fatalf("%d loads, %d published", src.loads, len(pub.meshes))
		}
		// What changes nothing is not published.
		src.changed()
		time.Sleep(2 * rebuild.Quiet)
		synctest.Wait()
		if src.loads != 3 || len(pub.meshes) != 2 {
			t.Fatalf("%d loads, %d published", src.loads, len(pub.meshes))
		}
	})
}

// Whoever writes what has become of the objects hears of every build, because that
// may differ where the mesh does not.
func TestOnBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, pub := newFolder(), &published{}
		l := rebuild.New(rebuild.Options{Source: src, Publisher: pub, Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
		builds := 0
		l.OnBuild(func() {
			if builds++; l.State() == nil {
				t.Error("it is told before there is a State")
			}
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		synctest.Wait()
		src.write(translate.Objects{CircuitBreakers: []*v1alpha1.CircuitBreaker{breaker("0.5")}}) // of a Service that is not there
		time.Sleep(2 * rebuild.Quiet)
		synctest.Wait()
		if builds != 2 || len(pub.meshes) != 1 || len(l.State().Statuses) != 1 {
			t.Errorf("told of %d builds, %d published, %d statuses", builds, len(pub.meshes), len(l.State().Statuses))
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestEndlessChangesDoNotStarveTheBuild(t *testing.T) {
	run(t, func(t *testing.T, src *folder, _ *published, _ *rebuild.Loop, _ *bytes.Buffer) {
		started := time.Now()
		for src.count() < 2 {
			src.changed()
			time.Sleep(rebuild.Quiet / 2)
		}
		if d := time.Since(started); d > rebuild.AtMost+rebuild.Quiet {
			t.Fatalf("built after %s", d)
		}
	})
}

func (f *folder) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.loads
}

func TestTheLastValidVersionStaysInForce(t *testing.T) {
	run(t, func(t *testing.T, src *folder, _ *published, l *rebuild.Loop, log *bytes.Buffer) {
		with := func(ratio string) {
			src.write(translate.Objects{
				Services: []*corev1.Service{service(80)}, CircuitBreakers: []*v1alpha1.CircuitBreaker{breaker(ratio)},
			})
			time.Sleep(2 * rebuild.Quiet)
			synctest.Wait()
		}
		ratio := func() float64 {
			b := l.State().Mesh.Services[0].Ports[0].Breaker
			if b == nil || b.Trip == nil {
				return 0
			}
			return b.Trip.FailureRatio
		}
		with("0.5")
		if ratio() != 0.5 || len(l.State().Problems) != 0 {
			t.Fatalf("ratio %v, problems %v", ratio(), l.State().Problems)
		}
		with("half")
		ps := l.State().Problems
		if ratio() != 0.5 || len(ps) != 1 || !strings.Contains(ps[0].Message, "last valid version of the object stays in force") {
			t.Fatalf("ratio %v, problems %v", ratio(), ps)
		}
		with("half") // the same problem is not logged again
		with("0.6")
		if ratio() != 0.6 || len(l.State().Problems) != 0 {
			t.Fatalf("ratio %v, problems %v", ratio(), l.State().Problems)
		}
		if n := strings.Count(log.String(), "problem: "); n != 1 {
			t.Errorf("logged %d times:\n%s", n, log)
		}
		if n := strings.Count(log.String(), "solved: "); n != 1 {
			t.Errorf("logged as solved %d times:\n%s", n, log)
		}
		// A policy that is deleted is not held.
		src.write(translate.Objects{Services: []*corev1.Service{service(80)}})
		time.Sleep(2 * rebuild.Quiet)
		synctest.Wait()
		with("half")
		if ratio() != 0 {
			t.Fatalf("ratio %v of a policy that was deleted and never valid since", ratio())
		}
	})
}

// An AuthorizationPolicy that becomes invalid goes on as it was; one that was
// never valid denies.
func TestAuthorizationNeverFailsOpen(t *testing.T) {
	run(t, func(t *testing.T, src *folder, _ *published, l *rebuild.Loop, _ *bytes.Buffer) {
		generation := int64(0)
		with := func(method string) {
			generation++
			var policies []*v1alpha1.AuthorizationPolicy
			if method != "" {
				policies = append(policies, authorization(method, generation))
			}
			src.write(translate.Objects{Pods: []*corev1.Pod{pod()}, AuthorizationPolicies: policies})
			time.Sleep(2 * rebuild.Quiet)
			synctest.Wait()
		}
		expect := func(action mesh.Action, rule string, accepted metav1.ConditionStatus, parts ...string) {
			t.Helper()
			s := l.State()
			as := s.Mesh.Instances[0].Authorizations
			if len(as) != 1 || as[0].Action != action || len(as[0].Rules) != 1 || as[0].Rules[0].Name != rule {
				t.Errorf("authorizations %+v; want one to %s with the rule %q", as, action, rule)
			}
			if len(s.Statuses) != 1 || s.Statuses[0].Generation != generation || s.Statuses[0].Conditions[0].Status != accepted {
				t.Fatalf("statuses %+v; want one of generation %d that is %s", s.Statuses, generation, accepted)
			}
			text := s.Statuses[0].Conditions[0].Message
			for _, p := range s.Problems {
				text += p.Message
			}
			for _, want := range parts {
				if want, unwanted := strings.CutPrefix(want, "not "); strings.Contains(text, want) == unwanted {
					t.Errorf("%q: found %v", want, !unwanted)
				}
			}
		}
		const stays, denies = "the last valid version of the object stays in force", translate.FailsClosed
		with("get")
		expect(mesh.Deny, "invalid", "False", denies, "not "+stays)
		with("GET")
		expect(mesh.Allow, "read", "True", "not "+denies, "not "+stays)
		with("get")
		expect(mesh.Allow, "read", "False", stays, "not "+denies)
		with("")
		with("get")
		expect(mesh.Deny, "invalid", "False", denies, "not "+stays)
	})
}

func pod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "payments", Annotations: map[string]string{"outrigger.dev/status": "injected"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "outrigger-proxy"}}},
	}
}

func authorization(method string, generation int64) *v1alpha1.AuthorizationPolicy {
	return &v1alpha1.AuthorizationPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "payments", Generation: generation},
		Spec: v1alpha1.AuthorizationPolicySpec{
			TargetRefs: []gatewayv1.LocalPolicyTargetReferenceWithSectionName{{
				LocalPolicyTargetReference: gatewayv1.LocalPolicyTargetReference{Kind: "Namespace", Name: "shop"},
			}},
			Rules: []v1alpha1.AuthorizationRule{{Name: "read", To: []v1alpha1.AuthorizationOperation{{Methods: []string{method}}}}},
		},
	}
}

func TestAWatchThatEndsIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := newFolder()
		l := rebuild.New(rebuild.Options{Source: src, Publisher: &published{}, Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
		lost := errors.New("folder removed")
		src.fail <- lost
		if err := l.Run(t.Context()); !errors.Is(err, lost) {
			t.Fatalf("Run = %v", err)
		}
	})
}
