package apptest

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	orcareport "github.com/cncf/xds/go/xds/data/orca/v3"
	orcaservice "github.com/cncf/xds/go/xds/service/orca/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/orca"
)

// interopCases are the cases of gRPC's interoperability suite
// (grpc/doc/interop-test-descriptions.md) that need no credentials of a cloud,
// by the names that the suite gives them. Each is the suite's own code.
var interopCases = []struct {
	name string
	do   func(context.Context, *grpc.ClientConn, testgrpc.TestServiceClient)
}{
	{"empty_unary", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoEmptyUnaryCall(ctx, c)
	}},
	{"large_unary", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoLargeUnaryCall(ctx, c)
	}},
	{"client_streaming", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoClientStreaming(ctx, c)
	}},
	{"server_streaming", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoServerStreaming(ctx, c)
	}},
	{"ping_pong", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoPingPong(ctx, c)
	}},
	{"empty_stream", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoEmptyStream(ctx, c)
	}},
	{"timeout_on_sleeping_server", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoTimeoutOnSleepingServer(ctx, c)
	}},
	{"cancel_after_begin", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoCancelAfterBegin(ctx, c)
	}},
	{"cancel_after_first_response", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoCancelAfterFirstResponse(ctx, c)
	}},
	{"custom_metadata", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoCustomMetadata(ctx, c)
	}},
	{"status_code_and_message", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoStatusCodeAndMessage(ctx, c)
	}},
	{"special_status_message", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoSpecialStatusMessage(ctx, c)
	}},
	{"unimplemented_method", func(ctx context.Context, conn *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoUnimplementedMethod(ctx, conn)
	}},
	{"unimplemented_service", func(ctx context.Context, conn *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(conn))
	}},
	{"pick_first_unary", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoPickFirstUnary(ctx, c)
	}},
	{"orca_per_rpc", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoORCAPerRPCTest(ctx, c)
	}},
	{"orca_oob", func(ctx context.Context, _ *grpc.ClientConn, c testgrpc.TestServiceClient) {
		interop.DoORCAOOBTest(ctx, c)
	}},
	{"rpc_soak", func(ctx context.Context, conn *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoSoakTest(ctx, soak(conn.Target(), func() (*grpc.ClientConn, func()) { return conn, func() {} }))
	}},
	{"channel_soak", func(ctx context.Context, conn *grpc.ClientConn, _ testgrpc.TestServiceClient) {
		interop.DoSoakTest(ctx, soak(conn.Target(), func() (*grpc.ClientConn, func()) {
			fresh, err := dialInterop(conn.Target())
			if err != nil {
				panic(err)
			}
			return fresh, func() { _ = fresh.Close() }
		}))
	}},
}

func soak(target string, channel func() (*grpc.ClientConn, func())) interop.SoakTestConfig {
	return interop.SoakTestConfig{
		RequestSize: 271828, ResponseSize: 314159, PerIterationMaxAcceptableLatency: 2 * time.Second, OverallTimeout: 20 * time.Second,
		ServerAddr: target, NumWorkers: 4, Iterations: 40, ChannelForTest: channel,
	}
}

func dialInterop(target string) (*grpc.ClientConn, error) {
	return grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"test_backend_metrics_load_balancer": {}}]}`))
}

// interopJob plays one case, in a process of its own: the suite ends its
// process where a case fails.
func interopJob(name string) error {
	for _, c := range interopCases {
		if c.name != name {
			continue
		}
		target := "passthrough:///" + os.Getenv("APPTEST_TARGET")
		conn, err := dialInterop(target)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
		defer cancel()
		c.do(ctx, conn, testgrpc.NewTestServiceClient(conn))
		return nil
	}
	return fmt.Errorf("the suite has no case %q", name)
}

// namedServer says which server it is where the caller asks: pick_first_unary
// needs it, and the server of the suite in Go leaves it out.
type namedServer struct{ testgrpc.TestServiceServer }

func (s namedServer) UnaryCall(ctx context.Context, in *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	out, err := s.TestServiceServer.UnaryCall(ctx, in)
	if err == nil && in.GetFillServerId() {
		out.ServerId = "peer-0"
	}
	return out, err
}

// loadReports is ORCA's service, which reports every 200 ms: that of grpc-go
// does so every 30 s at most, which is what orca_oob waits.
type loadReports struct {
	orcaservice.UnimplementedOpenRcaServiceServer
	metrics orca.ServerMetricsRecorder
}

func (l loadReports) StreamCoreMetrics(_ *orcaservice.OrcaLoadReportRequest, stream orcaservice.OpenRcaService_StreamCoreMetricsServer) error {
	for {
		m := l.metrics.ServerMetrics()
		if err := stream.Send(&orcareport.OrcaLoadReport{CpuUtilization: m.CPUUtilization, MemUtilization: m.MemUtilization, Utilization: m.Utilization}); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// interopServer is the suite's server.
func interopServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(orca.CallMetricsServerOption(nil))
	recorder := orca.NewServerMetricsRecorder()
	orcaservice.RegisterOpenRcaServiceServer(s, loadReports{metrics: recorder})
	testgrpc.RegisterTestServiceServer(s, namedServer{interop.NewTestServer(interop.NewTestServerOptions{MetricsRecorder: recorder})})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// TestGRPCInterop: two programs of gRPC understand each other through two
// sidecars as they do without.
func TestGRPCInterop(t *testing.T) {
	t.Parallel()
	for _, strict := range []bool{false, true} {
		t.Run(map[bool]string{false: "clear", true: "mtls"}[strict], func(t *testing.T) {
			p := newPair(t, "grpc", interopServer(t), strict)
			for _, c := range interopCases {
				t.Run(c.name, func(t *testing.T) {
					if said, err := again(t, "interop:"+c.name, "APPTEST_TARGET="+p.address); err != nil {
						t.Errorf("%v\n%s", err, said)
					}
				})
			}
			p.passedBoth(t, "/grpc.testing.TestService/", strict)
		})
	}
}

// passedBoth fails the test unless both sidecars have logged calls below the
// path as gRPC: a case that went past them proves nothing.
func (p *pair) passedBoth(t *testing.T, prefix string, strict bool) {
	t.Helper()
	for _, s := range []*runningSidecar{p.caller, p.callee} {
		eventually(t, 5*time.Second, func() string {
			out := s.p.stdout.String()
			if !strings.Contains(out, `"url.path":"`+prefix) || !strings.Contains(out, `"network.protocol":"grpc"`) {
				return s.p.name + " has logged no gRPC call"
			}
			if strict && !strings.Contains(out, "spiffe://") {
				return s.p.name + " has logged no identity"
			}
			return ""
		})
	}
}
