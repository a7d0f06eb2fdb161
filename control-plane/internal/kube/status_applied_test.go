package kube_test

import (
	"context"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// A policy is applied where the resources that carry it have been acknowledged:
// clusters for circuit breakers, routes for retries, the listeners of pods for
// authorization. A proxy that refuses a route is told of on the route.
func TestAppliedIsWhatProxiesAcknowledge(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	target := gatewayv1.LocalPolicyTargetReferenceWithSectionName{LocalPolicyTargetReference: gatewayv1.LocalPolicyTargetReference{Kind: "Service", Name: "payments"}}
	retries := &v1alpha1.RetryPolicy{ObjectMeta: r.meta("payments"), Spec: v1alpha1.RetryPolicySpec{TargetRefs: []gatewayv1.LocalPolicyTargetReferenceWithSectionName{target}}}
	guard := &v1alpha1.AuthorizationPolicy{ObjectMeta: r.meta("payments"), Spec: v1alpha1.AuthorizationPolicySpec{TargetRefs: []gatewayv1.LocalPolicyTargetReferenceWithSectionName{target}}}
	route := &gatewayv1.HTTPRoute{ObjectMeta: r.meta("payments"), Spec: gatewayv1.HTTPRouteSpec{
		CommonRouteSpec: gatewayv1.CommonRouteSpec{ParentRefs: []gatewayv1.ParentReference{serviceRef("payments")}},
	}}
	pod := r.pod("payments-0", "payments")
	pod.Annotations = map[string]string{kube.AnnotationStatus: kube.StatusInjected}
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: "outrigger-proxy", Image: "example.com/proxy:1"})
	pod.Labels = map[string]string{"app": "payments"}
	service := r.service("payments")
	service.Spec.Selector = pod.Labels
	for _, o := range []client.Object{service, pod, r.slice("payments-x", "payments", "10.1.0.1=payments-0"), breaker(r, "payments"), retries, guard, route} {
		eventually(t, func() string {
			if err := r.admin.Create(t.Context(), o); err != nil {
				return err.Error()
			}
			return ""
		})
	}
	server := discovery.New(discovery.Options{Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	r.publisher = server
	r.reporting(t, "a", kube.StatusOptions{Settle: time.Millisecond}, kube.ReportsOptions{TrustDomain: "cluster.local", Progress: server.Progress, Nodes: server.Nodes})

	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	key := r.ns + "/payments:80"
	node := &corev3.Node{Id: "payments-0." + r.ns, UserAgentName: bootstrap.UserAgent}
	send := func(q *discoveryv3.DeltaDiscoveryRequest) {
		q.Node, node = node, nil
		if err := stream.Send(q); err != nil {
			t.Fatal(err)
		}
	}
	receive := func() *discoveryv3.DeltaDiscoveryResponse {
		a, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for typeURL, name := range map[string]string{xds.ClusterType: key, xds.RouteType: key, xds.ListenerType: xds.InboundListenerName(r.ns, "payments-0")} {
		send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{name}})
	}
	applied := func(want ...string) {
		t.Helper()
		eventually(t, func() string {
			var got []string
			for _, p := range []*v1alpha1.Proxies{
				get(t, r, &v1alpha1.CircuitBreaker{}, "payments").Status.Proxies, get(t, r, &v1alpha1.RetryPolicy{}, "payments").Status.Proxies,
				get(t, r, &v1alpha1.AuthorizationPolicy{}, "payments").Status.Proxies,
			} {
				if p == nil {
					return "not counted yet"
				}
				got = append(got, p.Summary+" "+strings.Join(p.Reasons, "; "))
			}
			return cmp.Diff(want, got)
		})
	}
	applied("0/1 ", "0/1 ", "0/1 ")
	refused := "RouteConfiguration " + key + ": no"
	for range 3 {
		for a := receive(); ; a = receive() {
			if len(a.GetResources()) == 0 {
				send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: a.GetTypeUrl(), ResponseNonce: a.GetNonce()})
				continue // it did not exist a moment ago
			}
			q := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: a.GetTypeUrl(), ResponseNonce: a.GetNonce()}
			if a.GetTypeUrl() == xds.RouteType {
				q.ErrorDetail = &status.Status{Message: refused}
			}
			send(q)
			break
		}
	}
	applied("1/1 ", "0/1 payments-0."+r.ns+": "+refused, "1/1 ")
	eventually(t, func() string {
		var events corev1.EventList
		if err := r.admin.List(t.Context(), &events, client.InNamespace(r.ns)); err != nil {
			return err.Error()
		}
		var about []string
		for _, e := range events.Items {
			if e.Reason == kube.EventRejected && strings.Contains(e.Message, refused) {
				about = append(about, e.InvolvedObject.Kind)
			}
		}
		slices.Sort(about)
		return cmp.Diff([]string{"HTTPRoute", "RetryPolicy"}, about)
	})
}
