package workload_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/identity/workload"
)

func TestName(t *testing.T) {
	yes := true
	f := func(want, name, generate, kind, owner string, labels map[string]string) {
		t.Helper()
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, GenerateName: generate, Labels: labels}}
		if kind != "" {
			pod.OwnerReferences = []metav1.OwnerReference{{Kind: "Other", Name: "other"}, {Kind: kind, Name: owner, Controller: &yes}}
		}
		if got := workload.Name(pod); got != want {
			t.Errorf("pod %q, generated from %q, owned by %s %q: got %q, want %q", name, generate, kind, owner, got, want)
		}
	}
	f("web", "", "web-7d9f8-", "ReplicaSet", "web-7d9f8", map[string]string{"pod-template-hash": "7d9f8"})
	f("web-7d9f8", "", "web-7d9f8-", "ReplicaSet", "web-7d9f8", nil)
	f("db", "db-0", "", "StatefulSet", "db", nil)
	f("db", "db-0", "db-", "StatefulSet", "db", nil)
	f("nightly", "", "nightly-29380920-", "Job", "nightly-29380920", nil)
	f("import-2026", "", "", "Job", "import-2026", nil)
	f("single", "single", "", "", "", nil)
	// Before and after the API server has completed the name.
	f("gen", "", "gen-", "", "", nil)
	f("gen", "gen-x7k2p", "gen-", "", "", nil)
	f(workload.Unknown, "", "", "", "", nil)
}
