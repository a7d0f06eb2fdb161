package audit

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/injector/patch"
)

var created = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func managed(at time.Time, fields string) []metav1.ManagedFieldsEntry {
	stamp := metav1.NewTime(at)
	return []metav1.ManagedFieldsEntry{{Manager: "kubectl-label", Time: &stamp, FieldsV1: metav1.NewFieldsV1(fields)}}
}

const labelField = `{"f:metadata":{"f:labels":{"f:outrigger.dev/injection":{}}}}`

// Each case is a pod of Deployment web in the enabled namespace shop, changed.
func TestCauses(t *testing.T) {
	settings := patch.Settings{Image: "registry.example/outrigger/sidecar:2", NativeSidecar: true}
	yes := true
	f := func(want Cause, message, command string, change func(p *corev1.Pod, ns *corev1.Namespace)) {
		t.Helper()
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "shop", Name: "web-6b7f-x", CreationTimestamp: metav1.NewTime(created), Labels: map[string]string{"pod-template-hash": "6b7f"}, Annotations: map[string]string{},
				OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-6b7f", Controller: &yes}},
			},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}},
		}
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{patch.LabelInjection: "enabled"}}}
		change(pod, ns)
		r := &Report{}
		r.Add(pod, ns, settings)
		if want == "" {
			if len(r.Findings) != 0 {
				t.Errorf("%+v, want nothing", r.Findings)
			}
			return
		}
		if len(r.Findings) != 1 || r.Findings[0].Cause != want || !strings.Contains(r.Findings[0].Message, message) || r.Findings[0].Command != command {
			t.Errorf("got %+v\nwant %s %q %q", r.Findings, want, message, command)
		}
		if r.Counts()[want] != 1 || (r.Unmeshed() == 1) != want.Unmeshed() {
			t.Errorf("%s: counts %v, %d unmeshed", want, r.Counts(), r.Unmeshed())
		}
	}
	const rollout = "kubectl -n shop rollout restart deployment/web"
	disable := `kubectl -n shop patch deployment/web -p '{"spec":{"template":{"metadata":{"labels":{"outrigger.dev/injection":"disabled"}}}}}'`
	inject := func(image string) func(p *corev1.Pod, _ *corev1.Namespace) {
		return func(p *corev1.Pod, _ *corev1.Namespace) {
			p.Annotations[patch.AnnotationStatus] = patch.StatusInjected
			p.Spec.InitContainers = []corev1.Container{{Name: patch.ContainerName, Image: image}}
		}
	}
	own := func(kind, name string) func(p *corev1.Pod, _ *corev1.Namespace) {
		return func(p *corev1.Pod, _ *corev1.Namespace) {
			p.OwnerReferences = nil
			if kind != "" {
				p.OwnerReferences = []metav1.OwnerReference{{Kind: kind, Name: name, Controller: &yes}}
			}
		}
	}
	f(Missed, "created at 2026-11-25T12:00:00Z: the webhook was away", rollout, func(*corev1.Pod, *corev1.Namespace) {})
	f(Missed, "", "kubectl -n shop rollout restart statefulset/db", own("StatefulSet", "db"))
	f(Missed, "", "kubectl -n shop delete pod web-6b7f-x", own("Job", "import"))
	f(Missed, "", "kubectl -n shop get pod web-6b7f-x -o yaml | kubectl replace --force -f -", own("", ""))
	f(Missed, "it was skipped when it was created (no CNI)", rollout, func(p *corev1.Pod, _ *corev1.Namespace) { p.Annotations[patch.AnnotationReason] = "no CNI" })
	f(Missed, "the webhook was away", rollout, func(_ *corev1.Pod, ns *corev1.Namespace) {
		ns.ManagedFields = managed(created.Add(-time.Minute), labelField)
	})
	f(Later, "of the namespace shop was set at 2026-11-25T12:01:00Z", rollout, func(_ *corev1.Pod, ns *corev1.Namespace) {
		ns.ManagedFields = managed(created.Add(time.Minute), labelField)
	})
	f(Missed, "the webhook was away", rollout, func(_ *corev1.Pod, ns *corev1.Namespace) {
		ns.ManagedFields = managed(created.Add(time.Minute), `{"f:metadata":{"f:labels":{"f:team":{}}}}`)
	})
	f(Later, "of the pod was set at", rollout, func(p *corev1.Pod, ns *corev1.Namespace) {
		ns.Labels = nil
		p.Labels[patch.LabelInjection] = "enabled"
		p.ManagedFields = managed(created.Add(time.Second), labelField)
	})
	f(HostNetwork, "the sidecar's ports would be the node's", disable, func(p *corev1.Pod, _ *corev1.Namespace) { p.Spec.HostNetwork = true })
	f(HostNetwork, "", "kubectl -n shop label pod web-6b7f-x outrigger.dev/injection=disabled --overwrite", func(p *corev1.Pod, _ *corev1.Namespace) {
		p.Spec.HostNetwork, p.OwnerReferences = true, nil
	})
	f(Windows, "Linux only", disable, func(p *corev1.Pod, _ *corev1.Namespace) { p.Spec.OS = &corev1.PodOS{Name: corev1.Windows} })
	f(PodSecurity, `enforces Pod Security "restricted"`, "kubectl label namespace shop pod-security.kubernetes.io/enforce=privileged --overwrite && "+rollout, func(_ *corev1.Pod, ns *corev1.Namespace) {
		ns.Labels[patch.LabelEnforce] = "restricted"
	})
	f(Invalid, "write off, permissive or strict", "kubectl -n shop edit deployment/web", func(p *corev1.Pod, _ *corev1.Namespace) { p.Annotations[patch.AnnotationMTLS] = "x" })
	f(Invalid, `label outrigger.dev/injection="yes" on the namespace shop`, "kubectl label namespace shop outrigger.dev/injection=enabled --overwrite && "+rollout, func(_ *corev1.Pod, ns *corev1.Namespace) {
		ns.Labels[patch.LabelInjection] = "yes"
	})
	f(Disabled, "on the pod", strings.Replace(disable, "disabled", "enabled", 1), func(p *corev1.Pod, _ *corev1.Namespace) { p.Labels[patch.LabelInjection] = "disabled" })
	f(Outdated, "it runs outrigger/sidecar:1; the injector gives registry.example/outrigger/sidecar:2 now", rollout, inject("outrigger/sidecar:1"))
	f("", "", "", inject("mirror.example:5000/sidecar:2"))
	f(Outdated, "it runs x/sidecar:1", rollout, func(p *corev1.Pod, ns *corev1.Namespace) { // beside an Envoy
		inject("envoyproxy/envoy:v1")(p, ns)
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: patch.AgentName, Image: "x/sidecar:1"})
	})
	// No concern of anybody's.
	f("", "", "", func(_ *corev1.Pod, ns *corev1.Namespace) { ns.Labels = nil })
	f("", "", "", func(p *corev1.Pod, ns *corev1.Namespace) {
		ns.Labels = nil
		p.Labels[patch.LabelInjection] = "disabled"
	})
	f("", "", "", func(p *corev1.Pod, _ *corev1.Namespace) { p.Status.Phase = corev1.PodFailed })
	f("", "", "", func(p *corev1.Pod, _ *corev1.Namespace) { p.DeletionTimestamp = &metav1.Time{Time: created} })
	f("", "", "", func(p *corev1.Pod, _ *corev1.Namespace) { p.Annotations[corev1.MirrorPodAnnotationKey] = "x" })
	f("", "", "", func(_ *corev1.Pod, ns *corev1.Namespace) { ns.Name = "kube-system" })
	settings.NativeSidecar = false
	f(Completes, "hostPID", "kubectl -n shop label pod web-6b7f-x outrigger.dev/injection=disabled --overwrite", func(p *corev1.Pod, ns *corev1.Namespace) {
		own("Job", "import")(p, ns)
		p.Spec.HostPID, p.Spec.RestartPolicy = true, corev1.RestartPolicyNever
	})
}

func TestOrder(t *testing.T) {
	r := &Report{Findings: []Finding{{Namespace: "b", Pod: "a"}, {Namespace: "a", Pod: "b"}, {Namespace: "a", Pod: "a"}}}
	r.Sort()
	if r.Findings[0].Pod != "a" || r.Findings[1].Pod != "b" || r.Findings[2].Namespace != "b" {
		t.Errorf("%+v", r.Findings)
	}
}
