package xdsclient

import (
	"context"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// What works beside the stream has its connection, ends with it, and is there
// again on the next.
func TestBeside(t *testing.T) {
	cp := newControlPlane(t)
	var begun, ended, answered atomic.Int32
	var current table.Current
	c := New(Options{
		Address: cp.address, Table: &current, Node: bootstrap.Config{Namespace: "shop", Workload: "front", Instance: "front-0", ServiceAccount: "front"},
		Beside: func(ctx context.Context, conn grpc.ClientConnInterface) {
			begun.Add(1)
			if err := conn.Invoke(ctx, "/x.Y/Z", &emptypb.Empty{}, &emptypb.Empty{}); status.Code(err) == codes.Unimplemented {
				answered.Add(1)
			}
			<-ctx.Done()
			ended.Add(1)
		},
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	eventually(t, "an answer", func() bool { return answered.Load() == 1 })
	cp.stop()
	eventually(t, "the end", func() bool { return ended.Load() == begun.Load() })
	cp.start()
	eventually(t, "an answer on the next connection", func() bool { return answered.Load() == 2 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if b, e := begun.Load(), ended.Load(); b != e {
		t.Errorf("begun %d times, ended %d times", b, e)
	}
}
