package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"

	"github.com/outrigger-mesh/outrigger/deploy/bench/load"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startUpstream serves until the test ends and returns the ports.
func startUpstream(t *testing.T) map[string]netip.AddrPort {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- upstream(ctx, w) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	ports := map[string]netip.AddrPort{}
	if err := json.Unmarshal([]byte(line), &ports); err != nil {
		t.Fatal(err)
	}
	return ports
}

// TestUpstreamAnswersNetHTTP: what it says is HTTP to others too.
func TestUpstreamAnswersNetHTTP(t *testing.T) {
	ports := startUpstream(t)
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for name, want := range map[string]int{load.HTTP1Small: load.Small, load.HTTP1Large: load.Large} {
		for range 2 { // on one connection
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+ports[name].String()+load.HTTP1Path, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			if err := errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != 200 || len(b) != want {
				t.Errorf("%s: %s, %d bytes, %v", name, resp.Status, len(b), err)
			}
		}
	}
}

type raw struct{}

func (raw) Name() string { return "raw" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// TestUpstreamAnswersGRPC: grpc-go as the caller, with calls beside each other
// and a stream that carries more than a window.
func TestUpstreamAnswersGRPC(t *testing.T) {
	ports := startUpstream(t)
	conn := func(name string) *grpc.ClientConn {
		c, err := grpc.NewClient(ports[name].String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{})))
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
	question := make([]byte, load.Question)
	unary := conn(load.GRPCUnary)
	errs := make(chan error)
	for range 8 {
		go func() {
			for range 50 {
				var got []byte
				if err := unary.Invoke(t.Context(), load.GRPCPath+"Get", question, &got); err != nil || len(got) != load.Small {
					errs <- fmt.Errorf("%d bytes: %w", len(got), err)
					return
				}
			}
			errs <- nil
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	stream, err := conn(load.GRPCStream).NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, load.GRPCPath+"Watch")
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		var got []byte
		if err := errors.Join(stream.SendMsg(question), stream.RecvMsg(&got)); err != nil || len(got) != load.Small {
			t.Fatalf("%d bytes: %v", len(got), err)
		}
	}
	if err := errors.Join(stream.CloseSend(), stream.RecvMsg(new([]byte))); !errors.Is(err, io.EOF) {
		t.Errorf("the end of the stream: %v", err)
	}
}

// TestPeersCarry: the load through each of the two proxies to the upstream.
func TestPeersCarry(t *testing.T) {
	ports := startUpstream(t)
	f := func(protocol string, serve func(context.Context, options) error, o options) {
		t.Helper()
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address, err := netip.ParseAddrPort(l.Addr().String())
		if err := errors.Join(err, l.Close()); err != nil {
			t.Fatal(err)
		}
		o.listen, o.to = address.String(), ports[protocol].String()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- serve(ctx, o) }()
		var c *load.Client
		for range 200 {
			if c, err = load.Dial(ctx, load.Plan{Address: address, Protocol: protocol, Connections: 2, Streams: 1}); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		if err != nil {
			t.Fatal(err)
		}
		if r, err := c.Closed(ctx, 50*time.Millisecond); err != nil || r.Requests == 0 {
			t.Errorf("%s: %d requests, %v", protocol, r.Requests, err)
		}
		if err := errors.Join(c.Finish(ctx), c.Close()); err != nil {
			t.Errorf("%s: %v", protocol, err)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", protocol, err)
		}
	}
	f(load.TCPEcho, relay, options{})
	f(load.HTTP1Large, relay, options{splice: true})
	f(load.HTTP1Small, reverseProxy, options{})
	f(load.GRPCUnary, reverseProxy, options{http2: true})
	f(load.GRPCStream, reverseProxy, options{http2: true})
}
