package proxy_test

import (
	"bufio"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// BenchmarkOutbound is one keep-alive connection, a request after the other,
// each answered with 1 KiB, through every layer, with a breaker, retries and a
// timeout. The server and the client allocate nothing, so what is counted is
// ours.
func BenchmarkOutbound(b *testing.B) {
	once := keepAlive(b)
	b.ReportAllocs()
	for b.Loop() {
		once()
	}
}

// A request over a connection that stays costs no allocation, with everything on.
func TestARequestAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates for itself: make test runs it once more without")
	}
	if n := testing.AllocsPerRun(2000, keepAlive(t)); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// keepAlive returns a function that makes a request and reads the answer.
func keepAlive(b testing.TB) (once func()) {
	response := "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nDate: Mon, 23 Nov 2026 03:00:00 GMT\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", 1024)
	m := start(b, func(c *table.Cluster, r *route.Route) {
		c.Breaker = &breaker.Policy{Name: "p", FailureRatio: 0.5, MinimumRequests: 10, Window: 10 * time.Second, OpenFor: time.Second, FailureOn: breaker.FailDefault}
		r.Retry, r.Timeout = quick(2, retry.OnGatewayError), 15*time.Second
	}, speak(b, func(c net.Conn, _ *bufio.Reader) {
		_ = c.SetDeadline(time.Time{})
		in, out := make([]byte, 4096), []byte(response)
		for {
			if _, err := c.Read(in); err != nil {
				return
			}
			if _, err := c.Write(out); err != nil {
				return
			}
		}
	}))
	m.quiet = true
	c := m.dial()
	_ = c.SetDeadline(time.Time{})
	request := []byte("GET /pay?card=1 HTTP/1.1\r\nHost: payments.shop\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n")
	in := make([]byte, 4096)
	once = func() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadAtLeast(c, in, len(response)); err != nil {
			b.Fatal(err)
		}
	}
	for range 100 {
		once()
	}
	return once
}
