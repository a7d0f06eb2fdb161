package apptest

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"
)

const healthService = `
apiVersion: v1
kind: Service
metadata: {name: health, namespace: shop}
spec:
  selector: {app: health}
  ports: [{name: grpc, port: 50051, targetPort: http, appProtocol: grpc}]
`

// TestStockGRPCClient: a gRPC program without a proxy, with grpc-go as it is
// released, takes its configuration from the same control plane.
func TestStockGRPCClient(t *testing.T) {
	t.Parallel()
	var servers []string
	var unavailable atomic.Int32 // so many calls are answered UNAVAILABLE
	for i := range 2 {
		l, err := net.Listen("tcp", freeAddress(t))
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if unavailable.Add(-1) >= 0 {
				return nil, status.Error(codes.Unavailable, "as ordered")
			}
			if err := grpc.SetHeader(ctx, metadata.Pairs("instance", fmt.Sprint(i))); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}))
		healthv1.RegisterHealthServer(s, health.NewServer())
		done := make(chan error, 1)
		go func() { done <- s.Serve(l) }()
		t.Cleanup(func() {
			s.Stop()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		servers = append(servers, l.Addr().String())
	}
	c := startControlPlane(t, map[string]string{
		"health.yaml":   healthService,
		"workload.yaml": workload("health", servers[0]),
		"policies.yaml": fmt.Sprintf(retryPolicy, "health") + "  retryOn: [unavailable]\n  attempts: 2\n",
	})

	resolver, err := xds.NewXDSResolverWithConfigForTesting(fmt.Appendf(nil, `{
		"xds_servers": [{"server_uri": %q, "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}],
		"node": {"id": "caller-0.shop"}}`, c.xds))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("xds:///health.shop:50051", grpc.WithResolvers(resolver), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	client := healthv1.NewHealthClient(conn)
	check := func() (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		var header metadata.MD
		r, err := client.Check(ctx, &healthv1.HealthCheckRequest{}, grpc.Header(&header))
		if err == nil && r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
			err = fmt.Errorf("status %s", r.GetStatus())
		}
		return strings.Join(header.Get("instance"), ","), err
	}

	if instance, err := check(); err != nil || instance != "0" {
		t.Fatalf("the first call: instance %q, %v\n%s", instance, err, c.process.stderr.tail(10))
	}
	var s proxies
	getJSON(t, "http://"+c.admin+"/debug/proxies", &s)
	if len(s.Proxies) != 1 || s.Proxies[0].DataPlane != "grpc" || s.Proxies[0].ID != "caller-0.shop" {
		t.Errorf("the control plane sees %+v", s.Proxies)
	}
	eventually(t, 5*time.Second, func() string { return c.settled(t, 1) })

	unavailable.Store(2)
	if _, err := check(); err != nil {
		t.Errorf("a call that is UNAVAILABLE twice, with attempts: 2: %v", err)
	}
	unavailable.Store(3)
	if _, err := check(); status.Code(err) != codes.Unavailable {
		t.Errorf("a call that is UNAVAILABLE three times, with attempts: 2: %v", err)
	}

	// The endpoint moves: no call fails while it does.
	if problems := c.apply(t, "workload.yaml", workload("health", servers[1])); len(problems) > 0 {
		t.Fatal(problems)
	}
	eventually(t, 2*time.Second, func() string {
		// The list is new and the instance is named anew: 1 stands at the second address.
		instance, err := check()
		if err != nil {
			t.Fatal(err)
		}
		if instance != "1" {
			return "calls go to instance " + instance
		}
		return ""
	})
	eventually(t, 5*time.Second, func() string { return c.settled(t, 1) })
	if n := metric(t, c.admin, "outrigger_xds_nacks_total"); n != 0 {
		t.Errorf("%d NACKs", n)
	}
}
