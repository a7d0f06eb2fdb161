package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	xhttp2 "golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// serveGRPC runs grpc-go's health service; answer decides about each call.
func serveGRPC(t *testing.T, answer func(ctx context.Context) error, options ...grpc.ServerOption) (string, *grpc.Server) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(append(options,
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := answer(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		// A stream sends one message and ends as the answer says.
		grpc.StreamInterceptor(func(_ any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
			if err := ss.SendMsg(&healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}); err != nil {
				return err
			}
			return answer(ss.Context())
		}))...)
	healthv1.RegisterHealthServer(s, health.NewServer())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(l) })
	t.Cleanup(func() { s.Stop(); wg.Wait() })
	return l.Addr().String(), s
}

// grpcClient is grpc-go's client of the sidecar.
func (m *mesh) grpcClient() healthv1.HealthClient {
	m.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+m.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = conn.Close() })
	return healthv1.NewHealthClient(conn)
}

func check(c healthv1.HealthClient) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := c.Check(ctx, &healthv1.HealthCheckRequest{})
	return err
}

// watch reads a stream to its end.
func watch(c healthv1.HealthClient) (messages int, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := c.Watch(ctx, &healthv1.HealthCheckRequest{})
	for ; err == nil; messages++ {
		_, err = s.Recv()
	}
	return messages - 1, err
}

func inHTTP2(c *table.Cluster, _ *route.Route) { c.HTTP2 = true }

// A call's status is its grpc-status, wherever that stands: alone in the head
// (Trailers-Only) or behind messages.
func TestGRPCStatusIsCountedAndLogged(t *testing.T) {
	var code atomic.Int32
	address, _ := serveGRPC(t, func(context.Context) error {
		return status.Error(codes.Code(code.Load()), "as ordered: 100 %, caf\u00e9")
	})
	m := start(t, inHTTP2, address)
	c := m.grpcClient()
	for _, want := range []codes.Code{codes.OK, codes.NotFound, codes.Internal, codes.Unauthenticated} {
		code.Store(int32(want))
		for kind, do := range map[string]func() error{
			"unary": func() error { return check(c) },
			"stream": func() error {
				n, err := watch(c)
				if n != 1 {
					t.Errorf("%v: %d messages", want, n)
				}
				if err == io.EOF { //nolint:errorlint // gRPC's end of a stream
					return nil
				}
				return err
			},
		} {
			err := do()
			if status.Code(err) != want || want != codes.OK && status.Convert(err).Message() != "as ordered: 100 %, caf\u00e9" {
				t.Errorf("%s, %v: %v", kind, want, err)
			}
			line := m.logged()
			if line["rpc.grpc.status_code"] != float64(want) || line["network.protocol"] != "grpc" || line["http.response.status_code"] != float64(200) {
				t.Errorf("%s, %v: logged %v", kind, want, line)
			}
		}
		if n := counted(t, m.registry, "outrigger_requests_total", "grpc", strconv.Itoa(int(want))); n != 2 {
			t.Errorf("%v: %v calls are counted with this grpc_response_status; want 2", want, n)
		}
	}
}

func TestGRPCRetries(t *testing.T) {
	var left atomic.Int32
	var code codes.Code
	address, _ := serveGRPC(t, func(context.Context) error {
		if left.Add(-1) >= 0 {
			return status.Error(code, "as ordered")
		}
		return nil
	})
	m := start(t, func(c *table.Cluster, r *route.Route) {
		c.HTTP2 = true
		r.Retry = quick(2, retry.OnUnavailable)
	}, address)
	c := m.grpcClient()
	for _, row := range []struct {
		name     string
		code     codes.Code
		failures int32
		want     codes.Code
		attempts float64
	}{
		{"unavailable twice", codes.Unavailable, 2, codes.OK, 3},
		{"unavailable too often", codes.Unavailable, 3, codes.Unavailable, 3},
		{"another status", codes.NotFound, 1, codes.NotFound, 1},
	} {
		code = row.code
		left.Store(row.failures)
		if err := check(c); status.Code(err) != row.want {
			t.Errorf("%s: %v; want %v", row.name, err, row.want)
		}
		if line := m.logged(); line["outrigger.attempts"] != row.attempts {
			t.Errorf("%s: %v attempts; want %v: %v", row.name, line["outrigger.attempts"], row.attempts, line)
		}
	}
	// What has sent a message cannot be begun again.
	code = codes.Unavailable
	left.Store(1)
	if n, err := watch(c); n != 1 || status.Code(err) != codes.Unavailable {
		t.Errorf("a stream: %d messages, %v", n, err)
	}
	if line := m.logged(); line["outrigger.attempts"] != float64(1) {
		t.Errorf("a stream: %v attempts", line["outrigger.attempts"])
	}
}

func TestGRPCStatusOpensTheBreaker(t *testing.T) {
	var reached atomic.Int32
	address, _ := serveGRPC(t, func(context.Context) error {
		reached.Add(1)
		return status.Error(codes.ResourceExhausted, "as ordered")
	})
	m := start(t, func(c *table.Cluster, _ *route.Route) {
		c.HTTP2 = true
		c.Breaker = &breaker.Policy{Name: "shop/payments", ConsecutiveFailures: 2, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.GRPCFailures(int(codes.ResourceExhausted))}
	}, address)
	c := m.grpcClient()
	for range 2 {
		if err := check(c); status.Code(err) != codes.ResourceExhausted {
			t.Fatal(err)
		}
		m.logged()
	}
	err := check(c)
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "circuit breaker shop/payments is open") || reached.Load() != 2 {
		t.Errorf("%v; %d calls reached the server", err, reached.Load())
	}
	if line := m.logged(); line["outrigger.response_flags"] != "UO" || line["rpc.grpc.status_code"] != float64(codes.Unavailable) {
		t.Errorf("%v", line)
	}
}

// What the sidecar answers by itself, a gRPC client understands.
func TestGRPCLocalReplies(t *testing.T) {
	slow := func(ctx context.Context) error {
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second):
		}
		return nil
	}
	address, _ := serveGRPC(t, slow)
	closed := speak(t, func(c net.Conn, _ *bufio.Reader) { _ = c.Close() })
	for _, row := range []struct {
		name    string
		adjust  func(*mesh)
		servers []string
		flag    string
		code    codes.Code
		says    string
	}{
		{"no configuration", func(m *mesh) { m.table.Store(&table.Table{}) }, []string{address}, "NC", codes.Unavailable, "no configuration for"},
		{"no endpoint", nil, nil, "UH", codes.Unavailable, "has no healthy endpoint"},
		{"no route", func(m *mesh) { m.routes() }, []string{address}, "NR", codes.Unimplemented, "no route of"},
		{"limit", func(m *mesh) { m.cluster.Limits.Requests = 1; m.routes(m.route) }, []string{address}, "UO", codes.Unavailable, "limit of 1 requests"},
		{"timeout", func(m *mesh) { m.route.Timeout = 100 * time.Millisecond; m.routes(m.route) }, []string{address}, "UT", codes.DeadlineExceeded, "request timeout of 100ms is over"},
		{"connection lost", nil, []string{closed}, "UC", codes.Unavailable, closed},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := start(t, inHTTP2, row.servers...)
			if row.adjust != nil {
				row.adjust(m)
			}
			c := m.grpcClient()
			if row.name == "limit" {
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { _, _ = c.Check(ctx, &healthv1.HealthCheckRequest{}) })
				defer wg.Wait()
				defer cancel()
				eventually(t, func() bool { return m.usage().Requests == 1 }, "the first call is not in flight")
			}
			err := check(c)
			if status.Code(err) != row.code || !strings.Contains(err.Error(), row.says) {
				t.Errorf("%v; want %v with %q", err, row.code, row.says)
			}
			if line := m.logged(); line["outrigger.response_flags"] != row.flag || line["rpc.grpc.status_code"] != float64(row.code) || line["http.response.status_code"] != float64(200) {
				t.Errorf("logged %v", line)
			}
		})
	}
}

// The status stands in trailers, which both versions of HTTP have.
func TestGRPCAcrossVersions(t *testing.T) {
	message := []byte{0, 0, 0, 0, 2, 0x08, 0x01} // HealthCheckResponse{SERVING}
	old := serveIn(t, 1, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
		_, _ = w.Write(message)
		w.Header().Set("Grpc-Status", "5")
		w.Header().Set("Grpc-Message", "not here")
	})
	t.Run("a gRPC client of a server of HTTP 1", func(t *testing.T) {
		m := start(t, nil, old)
		n, err := watch(m.grpcClient())
		if n != 1 || status.Code(err) != codes.NotFound || status.Convert(err).Message() != "not here" {
			t.Errorf("%d messages, %v", n, err)
		}
		if line := m.logged(); line["rpc.grpc.status_code"] != float64(5) {
			t.Errorf("%v", line)
		}
	})
	t.Run("a client of HTTP 1 of a gRPC server", func(t *testing.T) {
		address, _ := serveGRPC(t, func(context.Context) error { return status.Error(codes.NotFound, "not here") })
		m := start(t, inHTTP2, address)
		b := bridge{m, clientIn(t, 1)}
		r := b.request("POST", "/grpc.health.v1.Health/Watch", strings.NewReader("\x00\x00\x00\x00\x00"))
		r.Header.Set("Content-Type", "application/grpc")
		r.Header.Set("TE", "trailers")
		resp, body := b.send(r)
		if string(body) != string(message) || resp.Trailer.Get("Grpc-Status") != "5" || resp.Trailer.Get("Grpc-Message") != "not here" {
			t.Errorf("%v %q, trailers %v", resp.Status, body, resp.Trailer)
		}
	})
}

// A server that ends its connections again and again, in order, costs no call.
func TestGoAwayLosesNothing(t *testing.T) {
	var conns sync.Map
	address, _ := serveGRPC(t, func(ctx context.Context) error {
		if p, ok := peer.FromContext(ctx); ok {
			conns.Store(p.Addr.String(), true)
		}
		time.Sleep(3 * time.Millisecond)
		return nil
	}, grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: 60 * time.Millisecond, MaxConnectionAgeGrace: 5 * time.Second}))
	m := start(t, inHTTP2, address)
	m.quiet = true // more lines than the test's log holds
	var wg sync.WaitGroup
	var calls, failed atomic.Int32
	for range 8 {
		c := m.grpcClient()
		wg.Go(func() {
			for until := time.Now().Add(1500 * time.Millisecond); time.Now().Before(until); calls.Add(1) {
				if err := check(c); err != nil {
					failed.Add(1)
					t.Log(err)
				}
			}
		})
	}
	wg.Wait()
	n := 0
	conns.Range(func(any, any) bool { n++; return true })
	if failed.Load() > 0 || n < 3 {
		t.Errorf("%d of %d calls failed, on %d connections", failed.Load(), calls.Load(), n)
	}
}

// A drain lets streams end, and does not wait for idle connections.
func TestDrainFinishesStreams(t *testing.T) {
	const calls = 20
	var running atomic.Int32
	var quick atomic.Bool
	release := make(chan struct{})
	address, _ := serveGRPC(t, func(context.Context) error {
		if quick.Load() {
			return nil
		}
		running.Add(1)
		<-release
		return nil
	})
	m := start(t, inHTTP2, address)
	quick.Store(true)
	idle := m.grpcClient()
	if err := check(idle); err != nil {
		t.Fatal(err)
	}
	quick.Store(false)
	c := m.grpcClient()
	var wg sync.WaitGroup
	for range calls / 2 {
		wg.Go(func() {
			if err := check(c); err != nil {
				t.Errorf("unary: %v", err)
			}
		})
		wg.Go(func() {
			if n, err := watch(c); n != 1 || err != io.EOF { //nolint:errorlint // gRPC's end of a stream
				t.Errorf("stream: %d messages, %v", n, err)
			}
		})
	}
	eventually(t, func() bool { return running.Load() == calls }, "not all calls are in flight")
	drained := make(chan time.Time, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		m.conns.Drain(ctx)
		drained <- time.Now()
	}()
	select {
	case <-drained:
		t.Error("the drain did not wait for the calls")
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	wg.Wait()
	ended := time.Now()
	if took := (<-drained).Sub(ended); took > time.Second {
		t.Errorf("the drain took %s longer than the calls", took)
	}
}

// speakH2 serves frames that no HTTP/2 server would send.
func speakH2(t *testing.T, settings []xhttp2.Setting, handle func(fr *xhttp2.Framer, stream uint32)) string {
	return speak(t, func(c net.Conn, r *bufio.Reader) {
		if _, err := io.ReadFull(r, make([]byte, len(xhttp2.ClientPreface))); err != nil {
			return
		}
		fr := xhttp2.NewFramer(c, r)
		_ = fr.WriteSettings(settings...)
		for {
			f, err := fr.ReadFrame()
			if err != nil {
				return
			}
			switch f := f.(type) {
			case *xhttp2.SettingsFrame:
				if !f.IsAck() {
					_ = fr.WriteSettingsAck()
				}
			case *xhttp2.HeadersFrame:
				handle(fr, f.StreamID)
			}
		}
	})
}

// answer200 is :status 200, from the static table.
var answer200 = []byte{0x88}

// What a server certainly has not looked at is safe to send again, even a POST.
func TestRefusedStreamIsRetried(t *testing.T) {
	for name, refuse := range map[string]func(fr *xhttp2.Framer, id uint32){
		"REFUSED_STREAM": func(fr *xhttp2.Framer, id uint32) { _ = fr.WriteRSTStream(id, xhttp2.ErrCodeRefusedStream) },
		"GOAWAY before it": func(fr *xhttp2.Framer, id uint32) {
			_ = fr.WriteGoAway(id-1, xhttp2.ErrCodeNo, nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var seen atomic.Int32
			m := start(t, func(c *table.Cluster, r *route.Route) {
				c.HTTP2 = true
				r.Retry = quick(2, retry.OnRefusedStream)
			}, speakH2(t, nil, func(fr *xhttp2.Framer, id uint32) {
				if seen.Add(1) == 1 {
					refuse(fr, id)
					return
				}
				_ = fr.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: id, BlockFragment: answer200, EndHeaders: true, EndStream: true})
			}))
			if resp, body := m.do("POST", "/", strings.NewReader("pay once")); resp.StatusCode != 200 {
				t.Errorf("%d %q", resp.StatusCode, body)
			}
			if line := m.logged(); line["outrigger.attempts"] != float64(2) {
				t.Errorf("%v", line)
			}
		})
	}
	t.Run("another reset is not, for a POST", func(t *testing.T) {
		m := start(t, func(c *table.Cluster, r *route.Route) {
			c.HTTP2 = true
			r.Retry = quick(2, retry.OnRefusedStream)
		}, speakH2(t, nil, func(fr *xhttp2.Framer, id uint32) { _ = fr.WriteRSTStream(id, xhttp2.ErrCodeInternal) }))
		if resp, _ := m.do("POST", "/", strings.NewReader("pay once")); resp.StatusCode != 503 {
			t.Errorf("%d", resp.StatusCode)
		}
		if line := m.logged(); line["outrigger.attempts"] != float64(1) || line["outrigger.response_flags"] != "UC" {
			t.Errorf("%v", line)
		}
	})
}

// A server's limit on streams is no limit on calls: another connection is made.
func TestMaxStreamsTakeAnotherConnection(t *testing.T) {
	const calls, each = 30, 10
	var mu sync.Mutex
	conns := map[string]int{}
	all := make(chan struct{})
	address, _ := serveGRPC(t, func(ctx context.Context) error {
		p, ok := peer.FromContext(ctx)
		if !ok {
			return status.Error(codes.Internal, "no peer")
		}
		mu.Lock()
		conns[p.Addr.String()]++
		n := 0
		for _, c := range conns {
			n += c
		}
		mu.Unlock()
		if n == calls {
			close(all)
		}
		select { // all at once
		case <-all:
			return nil
		case <-time.After(5 * time.Second):
			return status.Error(codes.Aborted, fmt.Sprintf("only %d calls are here", n))
		}
	}, grpc.MaxConcurrentStreams(each))
	m := start(t, inHTTP2, address)
	var wg sync.WaitGroup
	c := m.grpcClient()
	wg.Go(func() {
		if err := check(c); err != nil {
			t.Error(err)
		}
	})
	// The connection is there and the server's limit is known.
	eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(conns) == 1 }, "no call arrives")
	for range calls - 1 {
		wg.Go(func() {
			if err := check(c); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(conns) < calls/each {
		t.Errorf("calls by connection: %v", conns)
	}
}
