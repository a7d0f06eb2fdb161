package translate_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// TestAuthorizationLimits: a policy at a limit is taken, one beyond it is invalid
// and denies, rather than being cut.
func TestAuthorizationLimits(t *testing.T) {
	many := func(n int, prefix string) []string {
		var out []string
		for i := range n {
			out = append(out, fmt.Sprintf("%s%d", prefix, i))
		}
		return out
	}
	f := func(field string, most int, set func(spec *v1alpha1.AuthorizationPolicySpec, n int)) {
		t.Helper()
		for _, n := range []int{most, most + 1} {
			p := &v1alpha1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}}
			p.Spec.TargetRefs = namespaces(1)
			set(&p.Spec, n)
			m, problems, statuses := translate.Build(translate.Objects{
				Pods: []*corev1.Pod{{
					ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "pod", Annotations: map[string]string{"outrigger.dev/status": "injected"}},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "outrigger-proxy"}}},
				}},
				AuthorizationPolicies: []*v1alpha1.AuthorizationPolicy{p},
			}, translate.Options{})
			got := m.Instances[0].Authorizations[0]
			switch {
			case n == most && (got.Action != mesh.Allow || len(problems) > 0):
				t.Errorf("%s: %d are too many: %v", field, n, problems)
			case n > most && (got.Action != mesh.Deny || len(got.Rules) != 1 || len(problems) != 2 || problems[1].Field != field):
				t.Errorf("%s: %d are not refused: %+v, %v", field, n, got, problems)
			}
			if len(statuses) != 1 {
				t.Errorf("%s: %d entries of status for one target", field, len(statuses))
			}
		}
	}
	one := func(rule v1alpha1.AuthorizationRule) []v1alpha1.AuthorizationRule {
		return []v1alpha1.AuthorizationRule{rule}
	}
	f("spec.targetRefs", 16, func(s *v1alpha1.AuthorizationPolicySpec, n int) { s.TargetRefs = namespaces(n) })
	f("spec.rules", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) { s.Rules = make([]v1alpha1.AuthorizationRule, n) })
	f("spec.rules[0].from", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		var from []v1alpha1.AuthorizationSource
		for range n {
			from = append(from, v1alpha1.AuthorizationSource{Namespaces: []string{"a"}})
		}
		s.Rules = one(v1alpha1.AuthorizationRule{From: from})
	})
	f("spec.rules[0].to", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		var to []v1alpha1.AuthorizationOperation
		for range n {
			to = append(to, v1alpha1.AuthorizationOperation{Methods: []string{"GET"}})
		}
		s.Rules = one(v1alpha1.AuthorizationRule{To: to})
	})
	source := func(s v1alpha1.AuthorizationSource) []v1alpha1.AuthorizationRule {
		return one(v1alpha1.AuthorizationRule{From: []v1alpha1.AuthorizationSource{s}})
	}
	f("spec.rules[0].from[0].serviceAccounts", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = source(v1alpha1.AuthorizationSource{ServiceAccounts: many(n, "a")})
	})
	f("spec.rules[0].from[0].namespaces", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = source(v1alpha1.AuthorizationSource{Namespaces: many(n, "a")})
	})
	f("spec.rules[0].from[0].principals", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = source(v1alpha1.AuthorizationSource{Principals: many(n, "spiffe://a/ns/b/sa/c")})
	})
	operation := func(o v1alpha1.AuthorizationOperation) []v1alpha1.AuthorizationRule {
		return one(v1alpha1.AuthorizationRule{To: []v1alpha1.AuthorizationOperation{o}})
	}
	f("spec.rules[0].to[0].methods", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = operation(v1alpha1.AuthorizationOperation{Methods: many(n, "M")})
	})
	f("spec.rules[0].to[0].paths", 64, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = operation(v1alpha1.AuthorizationOperation{Paths: many(n, "/")})
	})
	// 63 entries of to, each with a method, have 64 callers; the last rule has the rest.
	f("spec.rules", 4096, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		to := slices.Repeat([]v1alpha1.AuthorizationOperation{{Methods: []string{"GET"}}}, 63)
		s.Rules = []v1alpha1.AuthorizationRule{
			{From: []v1alpha1.AuthorizationSource{{Namespaces: many(64, "a")}}, To: to},
			{To: []v1alpha1.AuthorizationOperation{{Methods: []string{"GET"}}}},
		}
		if n > 4096 {
			s.Rules[1].To[0].Paths = []string{"/"}
		}
	})
	f("spec.rules[0].to[0].paths[0]", 1024, func(s *v1alpha1.AuthorizationPolicySpec, n int) {
		s.Rules = operation(v1alpha1.AuthorizationOperation{Paths: []string{"/" + strings.Repeat("a", n-1)}})
	})
}

// namespaces names the namespace shop n times.
func namespaces(n int) []gatewayv1.LocalPolicyTargetReferenceWithSectionName {
	return slices.Repeat(named("Namespace", "shop"), n)
}

func named(kind, name string) []gatewayv1.LocalPolicyTargetReferenceWithSectionName {
	return []gatewayv1.LocalPolicyTargetReferenceWithSectionName{{
		LocalPolicyTargetReference: gatewayv1.LocalPolicyTargetReference{Kind: gatewayv1.Kind(kind), Name: gatewayv1.ObjectName(name)},
	}}
}

// TestMessagesAreBounded: a status holds what people can read, whatever the object
// holds.
func TestMessagesAreBounded(t *testing.T) {
	long := strings.Repeat("\u00e9", 10_000)
	_, problems, statuses := translate.Build(translate.Objects{CircuitBreakers: []*v1alpha1.CircuitBreaker{{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
		Spec: v1alpha1.CircuitBreakerSpec{
			TargetRefs: namespaces(40), Mode: v1alpha1.Mode(long),
			Trip: &v1alpha1.Trip{FailureOn: []string{long, long, long, long, long, long}},
		},
	}}}, translate.Options{})
	if len(problems) < 6 || len(statuses) != 1 {
		t.Fatalf("%d problems, %d statuses", len(problems), len(statuses))
	}
	if m := statuses[0].Conditions[0].Message; len(m) > 4100 || !strings.HasSuffix(m, "...") || strings.ToValidUTF8(m, "") != m {
		t.Errorf("a message of %d bytes that ends in %q", len(m), m[len(m)-20:])
	}
}
