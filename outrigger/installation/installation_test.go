package installation

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestStep(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{"v1.4.0", "v1.4.0", ""},
		{"v1.4.0", "v1.4.1", ""},
		{"v1.4.0", "1.7.9", ""},
		{"v1.4.0", "v1.8.0", "Go by v1.7 first"},
		{"v1.4.1", "v1.4.0", "is older than"},
		{"v1.4.0", "v1.3.9", "is older than"},
		{"v1.4.0", "v2.0.0", "another major version"},
		{"v1.4.0-rc.1", "v1.4.0", ""},
		{"v1.4.0+k3s1", "v1.5.0", ""},
		{"d4ca8b3", "v1.4.0", ""},
		{"v1.4.0", "v1.4.0-12-gd4ca8b3-dirty", ""},
		{"v1.4.0", "v1.4", ""},
		{"v1.4.0", "v1.-4.0", ""},
	} {
		err := Step(c.from, c.to)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s to %s: %v, want %q", c.from, c.to, err, c.want)
		}
	}
}

func TestBehind(t *testing.T) {
	for _, c := range []struct {
		sidecar, plane string
		want           int
		ok             bool
	}{
		{"v1.4.0", "v1.4.9", 0, true},
		{"v1.1.0", "v1.4.0", 3, true},
		{"v1.5.0", "v1.4.0", -1, true},
		{"v1.9.0", "v2.0.0", 1000, true},
		{"latest", "v1.4.0", 0, false},
		{"", "v1.4.0", 0, false},
	} {
		if n, ok := behind(c.sidecar, c.plane); n != c.want || ok != c.ok {
			t.Errorf("%s of %s: %d %v, want %d %v", c.sidecar, c.plane, n, ok, c.want, c.ok)
		}
	}
}

func TestTag(t *testing.T) {
	for image, want := range map[string]string{
		"outrigger/sidecar:v1.4.0":                       "v1.4.0",
		"localhost:5000/outrigger/sidecar:v1.4.0":        "v1.4.0",
		"localhost:5000/outrigger/sidecar":               "",
		"outrigger/sidecar:v1.4.0@sha256:0123456789abcd": "v1.4.0",
		"outrigger/sidecar@sha256:0123456789abcd":        "",
	} {
		if got := tag(image); got != want {
			t.Errorf("%s: %q, want %q", image, got, want)
		}
	}
}

func TestRestartsNameTheOwner(t *testing.T) {
	var pods []Meshed
	for _, o := range []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-7d4b"}, {Kind: "StatefulSet", Name: "db"}, {Kind: "Job", Name: "once"}} {
		pods = append(pods, Meshed{Namespace: "shop", Name: "pod-of-" + o.Name, Owner: owner(o, map[string]string{"pod-template-hash": "7d4b"})})
	}
	pods = append(pods, pods[0], Meshed{Namespace: "shop", Name: "bare"})
	want := []string{
		"kubectl delete pod bare --namespace shop", "kubectl delete pod pod-of-once --namespace shop",
		"kubectl rollout restart deployment/web --namespace shop", "kubectl rollout restart statefulset/db --namespace shop",
	}
	if got := restarts(pods); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q", got)
	}
	for i := range 30 {
		pods = append(pods, Meshed{Namespace: "shop", Name: strings.Repeat("x", i+1)})
	}
	if got := restarts(pods); len(got) != maxListed+1 || got[maxListed] != "... and 14 more" {
		t.Errorf("%d: %q", len(got), got[len(got)-1])
	}
}

func TestPodTrouble(t *testing.T) {
	status := func(s corev1.ContainerState) corev1.Pod {
		return corev1.Pod{Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{Name: "a", State: s}}}}
	}
	for want, pod := range map[string]corev1.Pod{
		"":                                   status(corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}}),
		"ImagePullBackOff: not found":        status(corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "not found"}}),
		"container a ended with exit code 2": status(corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2}}),
		"Unschedulable: no nodes are left":   {Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: "Unschedulable", Message: "no nodes are left"}}}},
	} {
		if got := podTrouble(pod); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestSupported(t *testing.T) {
	for v, want := range map[string]string{"v1.27.0": "", "v1.37.2-gke.1": "", "v1.26.9": "1.27", "one": `"one"`} {
		err := Supported(v)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", v, err)
		}
	}
}
