package accesslog_test

import (
	"context"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// usual is what most lines are made of.
var usual = accesslog.Entry{
	Start: time.Date(2026, 11, 23, 3, 0, 0, 123456789, time.UTC), Duration: 1234567, Direction: "outbound", Protocol: "http",
	Method: []byte("GET"), Path: []byte("/v1/orders/4711/items"), Host: []byte("payments.shop"), UserAgent: []byte("Go-http-client/1.1"),
	RequestID: []byte("4bf92f3577b34da6a3ce929d0e0e4736"), Status: 200, Destination: "shop/payments:80", Route: "shop/payments",
	Upstream: "10.0.0.7:8080", Source: "127.0.0.1:54321", Attempts: 1, BytesIn: 0, BytesOut: 1024,
	TraceID: []byte("4bf92f3577b34da6a3ce929d0e0e4736"), SpanID: []byte("00f067aa0ba902b7"), Config: "5f2c9a7b1e3d",
}

// cpu is the processor time that this process has used.
func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// into runs f with a log whose lines go to a pipe that is read, waits for the
// log, and reports the processor time of all of it beyond the time given.
func into(b *testing.B, f func(*accesslog.Log), less time.Duration) {
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	l := accesslog.New("shop", "storefront", "storefront-0")
	ctx, cancel := context.WithCancel(b.Context())
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(io.Discard, r); _ = r.Close() })
	wg.Go(func() { _ = l.Run(ctx, w); _ = w.Close() })
	b.ReportAllocs()
	before := cpu()
	f(l)
	cancel()
	wg.Wait()
	b.ReportMetric(float64(cpu()-before-less)/float64(b.N), "cpu-ns/op")
	b.ReportMetric(float64(l.Dropped())/float64(b.N), "dropped/op")
}

// work is what a proxy does between two lines: some 10 us.
func work() (sum uint64) {
	for i := range uint64(7000) {
		sum += i * sum
	}
	return sum
}

var sink uint64

// BenchmarkRequests is a line after every 10 us of other work, as a busy proxy
// writes them. cpu-ns/op is what a line costs the machine: building it, waking
// the writer, the system calls, and the reader's.
func BenchmarkRequests(b *testing.B) {
	before := cpu()
	for range b.N {
		sink += work()
	}
	alone := cpu() - before
	into(b, func(l *accesslog.Log) {
		for range b.N {
			sink += work()
			l.Write(&usual)
		}
	}, alone)
}

// BenchmarkWrite is what a line costs the request, and how many are dropped when
// nothing else is done.
func BenchmarkWrite(b *testing.B) {
	into(b, func(l *accesslog.Log) {
		for b.Loop() {
			l.Write(&usual)
		}
	}, 0)
}

// BenchmarkWriteParallel is the same from all processors.
func BenchmarkWriteParallel(b *testing.B) {
	into(b, func(l *accesslog.Log) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				l.Write(&usual)
			}
		})
	}, 0)
}
