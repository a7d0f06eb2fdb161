package kube_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
)

// What a pod costs, whole and as it is kept.
func BenchmarkMemoryOfAPod(b *testing.B) {
	for _, trimmed := range []bool{false, true} {
		b.Run(fmt.Sprintf("trimmed=%t", trimmed), func(b *testing.B) {
			var before, after runtime.MemStats
			kept := make([]*corev1.Pod, 0, b.N)
			runtime.GC()
			runtime.ReadMemStats(&before)
			for i := range b.N {
				p := large(i)
				if trimmed {
					kube.Trim(p)
				}
				kept = append(kept, p)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(b.N), "B/pod")
			runtime.KeepAlive(kept)
		})
	}
}

// large is a pod of the usual size, of which nothing is shared with another.
func large(i int) *corev1.Pod {
	text := func(format string, n int) string { return strings.Clone(fmt.Sprintf(format, n)) }
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: text("shop-%d", i), Name: text("payments-5d4f8c7b9-%d", i), GenerateName: text("payments-%d-", i), UID: types.UID(text("4a1c%032d", i)), ResourceVersion: text("%d", i),
		Labels:          map[string]string{"app": text("payments-%d", i), "pod-template-hash": text("5d4f8c7b9-%d", i), "version": text("%d", i)},
		Annotations:     map[string]string{"outrigger.dev/status": "injected", "kubectl.kubernetes.io/restartedAt": text("2026-%d", i), "checksum/config": strings.Repeat(text("%d", i%10), 64)},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: text("payments-%d", i), UID: types.UID(text("%036d", i))}},
		ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1(strings.Repeat("f", 3000))}},
	}}
	for c := range 2 {
		container := corev1.Container{
			Name: text("app-%d", c), Image: text("registry.example.com/shop/payments:%d", i), Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
			LivenessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: text("/live/%d", i)}}},
		}
		for e := range 12 {
			container.Env = append(container.Env, corev1.EnvVar{Name: text("VARIABLE_%d", e), Value: text("value of some length %d", i)})
		}
		p.Spec.Containers = append(p.Spec.Containers, container)
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{Name: container.Name, ImageID: text("sha256:%064d", i), ContainerID: text("containerd://%064d", i)})
	}
	for v := range 4 {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: text("volume-%d", v), VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{}}})
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodConditionType(text("Condition%d", v)), Status: corev1.ConditionTrue})
	}
	p.Spec.ServiceAccountName, p.Spec.NodeName = text("payments-%d", i), text("node-%d", i%100)
	p.Status.Phase, p.Status.PodIP = corev1.PodRunning, text("10.0.%d.1", i%250)
	p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}}
	return p
}
