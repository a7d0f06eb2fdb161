package translate_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// BenchmarkBuild is a large cluster: 2000 Services with 10 meshed pods each, in as
// many namespaces as the name says, each with an AuthorizationPolicy.
func BenchmarkBuild(b *testing.B) {
	for _, namespaces := range []int{100, 1} {
		b.Run(fmt.Sprintf("namespaces=%d", namespaces), func(b *testing.B) {
			objects := large(namespaces, 2000/namespaces)
			b.ReportAllocs()
			for b.Loop() {
				if m, problems, _ := translate.Build(objects, translate.Options{}); len(m.Instances) != 20_000 || len(problems) > 0 {
					b.Fatalf("%d instances, %d problems", len(m.Instances), len(problems))
				}
			}
		})
	}
}

func large(namespaces, services int) translate.Objects {
	var out translate.Objects
	name, number, n := "http", int32(8080), 0
	for i := range namespaces {
		ns := fmt.Sprintf("ns%d", i)
		policy := &v1alpha1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "all"}}
		policy.Spec.TargetRefs = named("Namespace", ns)
		out.AuthorizationPolicies = append(out.AuthorizationPolicies, policy)
		for j := range services {
			svc := fmt.Sprintf("service%d", j)
			labels := map[string]string{"app": svc, "part-of": "everything"}
			out.Services = append(out.Services, &corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: svc},
				Spec:       corev1.ServiceSpec{Selector: labels, Ports: []corev1.ServicePort{{Name: name, Port: 80, TargetPort: intstr.FromInt32(number)}}},
			})
			slice := &discoveryv1.EndpointSlice{
				ObjectMeta:  metav1.ObjectMeta{Namespace: ns, Name: svc, Labels: map[string]string{discoveryv1.LabelServiceName: svc}},
				AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &number}},
			}
			for k := range 10 {
				n++
				pod, ip := fmt.Sprintf("%s-%d", svc, k), fmt.Sprintf("10.%d.%d.%d", n>>16, n>>8&255, n&255)
				out.Pods = append(out.Pods, &corev1.Pod{
					ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: pod, Labels: labels, Annotations: map[string]string{"outrigger.dev/status": "injected"}},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "outrigger-proxy"}}},
					Status:     corev1.PodStatus{PodIP: ip},
				})
				slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
					Addresses: []string{ip}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: pod, Namespace: ns},
				})
			}
			out.EndpointSlices = append(out.EndpointSlices, slice)
		}
	}
	return out
}
