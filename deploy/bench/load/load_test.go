package load

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func at(t *testing.T, a net.Addr) netip.AddrPort {
	t.Helper()
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		t.Fatal(err)
	}
	return ap
}

// serve answers with net/http, which is nobody's of this package.
func serve(t *testing.T, h http.HandlerFunc) netip.AddrPort {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return at(t, s.Listener.Addr())
}

func dial(t *testing.T, p Plan) *Client {
	t.Helper()
	c, err := Dial(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestClosedLoopCountsWhatTheServerServed(t *testing.T) {
	var served atomic.Int64
	c := dial(t, Plan{Protocol: HTTP1Small, Connections: 4, Streams: 1, Address: serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != HTTP1Path || r.Host != Host {
			t.Errorf("asked for %s at %s", r.URL, r.Host)
		}
		served.Add(1)
		_, _ = w.Write(bytes.Repeat([]byte{'b'}, Small)) // the client notices
	})})
	r, err := c.Closed(t.Context(), 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if int64(r.Requests) != served.Load() || r.Requests < 4 || r.Latency.Count() != uint64(r.Requests) {
		t.Errorf("%d requests, %d latencies, %d served", r.Requests, r.Latency.Count(), served.Load())
	}
	if r, err = c.Once(t.Context(), 2); err != nil || r.Requests != 4 {
		t.Errorf("once on each of 4 connections: %d, %v", r.Requests, err)
	}
}

// TestOpenLoopHidesNoStall: for 200 ms nothing is answered. Every request that
// was due meanwhile has waited, on average half of it, whether it could be sent
// or not.
func TestOpenLoopHidesNoStall(t *testing.T) {
	const stall = 200 * time.Millisecond
	begun := time.Now()
	c := dial(t, Plan{Protocol: HTTP1Small, Connections: 2, Streams: 1, Address: serve(t, func(w http.ResponseWriter, _ *http.Request) {
		time.Sleep(time.Until(begun.Add(stall)))
		_, _ = w.Write(bytes.Repeat([]byte{'b'}, Small)) // the client notices
	})})
	r, err := c.Open(t.Context(), 1000, 2*stall)
	if err != nil {
		t.Fatal(err)
	}
	if r.Requests != 400 {
		t.Errorf("%d requests in %s at 1000 a second", r.Requests, 2*stall)
	}
	// With the two that could be sent alone, the median would be below 1 ms.
	if q := r.Latency.Quantile(0.75); q < stall/4 {
		t.Errorf("a quarter waited longer than %s only, though half were due in a stall of %s", q, stall)
	}
}

// TestWrongAnswersAreErrors: a number that counts them would be worse than none.
func TestWrongAnswersAreErrors(t *testing.T) {
	f := func(want string, h http.HandlerFunc) {
		t.Helper()
		c := dial(t, Plan{Protocol: HTTP1Small, Connections: 1, Streams: 1, Address: serve(t, h)})
		if _, err := c.Once(t.Context(), 1); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	f("not a 200", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	f("a body of 3 bytes", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "bbb") })
	f(`ends with 'x'`, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(bytes.Repeat([]byte{'x'}, Small)) })
	f("no content-length", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "b")
		_ = http.NewResponseController(w).Flush()
	})
	f("closed the connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
}

// raw hands gRPC messages over as bytes.
type raw struct{}

func (raw) Name() string { return "raw" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// serveGRPC answers with grpc-go: a message for each that comes, until the
// caller ends the stream.
func serveGRPC(t *testing.T, end error) (netip.AddrPort, *atomic.Int64) {
	t.Helper()
	var served atomic.Int64
	s := grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		for {
			var m []byte
			if err := stream.RecvMsg(&m); err != nil {
				return end
			}
			if len(m) != Question {
				t.Errorf("a message of %d bytes", len(m))
			}
			served.Add(1)
			if err := stream.SendMsg(bytes.Repeat([]byte{'r'}, Small)); err != nil {
				return err
			}
		}
	}))
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return at(t, l.Addr()), &served
}

// TestGRPCCallsAndStreams: many more bytes than a flow-control window holds, in
// calls and in streams that stay open.
func TestGRPCCallsAndStreams(t *testing.T) {
	for _, protocol := range []string{GRPCUnary, GRPCStream} {
		addr, served := serveGRPC(t, nil)
		c := dial(t, Plan{Protocol: protocol, Connections: 2, Streams: 4, Address: addr})
		total := 0
		for total < 2000 {
			r, err := c.Closed(t.Context(), 50*time.Millisecond)
			if err != nil {
				t.Fatalf("%s: %v", protocol, err)
			}
			total += r.Requests
		}
		r, err := c.Open(t.Context(), 500, 100*time.Millisecond)
		if err != nil || r.Requests != 50 {
			t.Errorf("%s: %d requests, %v", protocol, r.Requests, err)
		}
		if err := c.Finish(t.Context()); err != nil {
			t.Errorf("%s: %v", protocol, err)
		}
		if int64(total+r.Requests) != served.Load() {
			t.Errorf("%s: %d answers, %d served", protocol, total+r.Requests, served.Load())
		}
	}
}

func TestGRPCStatusIsChecked(t *testing.T) {
	addr, _ := serveGRPC(t, status.Error(codes.Internal, "no"))
	c := dial(t, Plan{Protocol: GRPCUnary, Connections: 1, Streams: 1, Address: addr})
	if _, err := c.Once(t.Context(), 1); err == nil || !strings.Contains(err.Error(), `grpc-status "13"`) {
		t.Errorf("got %v", err)
	}
	c = dial(t, Plan{Protocol: GRPCStream, Connections: 1, Streams: 1, Address: addr})
	if _, err := c.Once(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if err := c.Finish(t.Context()); err == nil || !strings.Contains(err.Error(), `grpc-status "13"`) {
		t.Errorf("the end of a stream: %v", err)
	}
}
