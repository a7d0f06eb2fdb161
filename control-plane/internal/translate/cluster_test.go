package translate_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// TestOthersObjectsAreNoProblem: a cluster is full of objects that are no use to a
// mesh and that nobody wrote for one. They are reported only where they are in a
// folder, or where an object of the mesh refers to them.
func TestOthersObjectsAreNoProblem(t *testing.T) {
	port, tcp := int32(443), corev1.ProtocolTCP
	meta := func(name, service string) metav1.ObjectMeta {
		m := metav1.ObjectMeta{Namespace: "kube-system", Name: name, Labels: map[string]string{}}
		if service != "" {
			m.Labels[discoveryv1.LabelServiceName] = service
		}
		return m
	}
	slice := func(name, service string, kind discoveryv1.AddressType, addresses ...string) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{ObjectMeta: meta(name, service), AddressType: kind, Ports: []discoveryv1.EndpointPort{{Port: &port, Protocol: &tcp}}}
		for _, a := range addresses {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, TargetRef: &corev1.ObjectReference{Kind: "Node", Name: "node"}})
		}
		return s
	}
	objects := func() translate.Objects {
		return translate.Objects{
			Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "kube-system"}}},
			Services: []*corev1.Service{
				{ObjectMeta: meta("outside", ""), Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}},
				{ObjectMeta: meta("no-ports", ""), Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}},
				{ObjectMeta: meta("kube-dns", ""), Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.10", Ports: []corev1.ServicePort{
					{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, {Name: "dns-tcp", Port: 53, Protocol: corev1.ProtocolTCP},
				}}},
			},
			EndpointSlices: []*discoveryv1.EndpointSlice{
				slice("orphan", "deleted", discoveryv1.AddressTypeIPv4, "10.0.0.1"),
				slice("of-a-controller", "", discoveryv1.AddressTypeIPv4, "10.0.0.1"),
				slice("of-names", "kube-dns", discoveryv1.AddressTypeFQDN, "example.com"),
				slice("of-another-port", "kube-dns", discoveryv1.AddressTypeIPv4, "10.0.0.1"),
				slice("empty", "outside", discoveryv1.AddressTypeIPv4),
			},
			Pods: []*corev1.Pod{
				{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "plain", Annotations: map[string]string{"outrigger.dev/mtls": "perhaps"}}},
			},
			HTTPRoutes: []*gatewayv1.HTTPRoute{{ObjectMeta: meta("ingress", ""), Spec: gatewayv1.HTTPRouteSpec{
				CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{{Name: "gateway"}}},
				Hostnames:       []gatewayv1.Hostname{"a b"},
			}}},
			GRPCRoutes: []*gatewayv1.GRPCRoute{{ObjectMeta: meta("ingress", "")}},
			TLSRoutes:  []*gatewayv1.TLSRoute{{ObjectMeta: meta("ingress", "")}},
		}
	}
	_, problems, statuses := translate.Build(objects(), translate.Options{})
	for _, p := range problems {
		t.Errorf("a problem in a cluster: %s", p)
	}
	for _, s := range statuses {
		t.Errorf("a status that is another controller's: %+v", s)
	}

	in := objects()
	for _, s := range in.Services {
		s.Annotations = map[string]string{translate.SourceAnnotation: "all.yaml:1"}
	}
	for _, s := range in.EndpointSlices {
		s.Annotations = map[string]string{translate.SourceAnnotation: "all.yaml:1"}
	}
	if _, problems, _ = translate.Build(in, translate.Options{}); len(problems) != 6 {
		t.Errorf("%d problems in a folder, want 6:", len(problems))
		for _, p := range problems {
			t.Log(p)
		}
	}

	in = objects()
	group, kind := gatewayv1.Group(""), gatewayv1.Kind("Service")
	in.HTTPRoutes[0].Spec.ParentRefs = []gatewayv1.ParentReference{{Group: &group, Kind: &kind, Name: "outside"}}
	in.HTTPRoutes[0].Spec.Hostnames = nil
	if _, problems, _ = translate.Build(in, translate.Options{}); len(problems) != 1 || problems[0].Reason != translate.ReasonNoMatchingParent {
		t.Errorf("problems with a route of a Service that is outside: %v", problems)
	}
}
