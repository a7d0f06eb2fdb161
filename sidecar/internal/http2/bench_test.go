package http2_test

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
)

// unary is what a gRPC call of 100 bytes looks like.
var unary = bytes.Repeat([]byte("x"), 100)

func unaryServer(s *http2.Stream) {
	defer s.Release()
	deadline := time.Now().Add(10 * time.Second)
	h, _ := heads.Get().(*http1.Head)
	defer heads.Put(h)
	if s.ReadHead(h, deadline) != nil {
		return
	}
	reply := http1.Head{Status: 200, Framing: http1.Chunked, Headers: replyHeaders}
	if s.WriteHead(&reply, nil, false) != nil {
		return
	}
	for {
		data, done, err := s.ReadBody(true, deadline)
		if err != nil || s.WriteData(data, false, deadline) != nil {
			return
		}
		if done {
			break
		}
	}
	_ = s.WriteTrailers(replyTrailers)
	_ = s.Flush()
}

var (
	heads         = sync.Pool{New: func() any { return new(http1.Head) }}
	replyHeaders  = []http1.Header{{Name: []byte("content-type"), Value: []byte("application/grpc")}}
	replyTrailers = []http1.Header{{Name: []byte("grpc-status"), Value: []byte("0")}}
)

func callOurs(c *http2.Client, h, head *http1.Head, deadline time.Time) error {
	s, err := c.Open()
	if err != nil {
		return err
	}
	defer s.Release()
	if err := s.WriteHead(h, nil, false); err != nil {
		return err
	}
	if err := s.WriteData(unary, true, deadline); err != nil {
		return err
	}
	if err := s.Flush(); err != nil {
		return err
	}
	if err := s.ReadHead(head, deadline); err != nil {
		return err
	}
	for {
		_, done, err := s.ReadBody(true, deadline)
		if done || err != nil {
			return err
		}
	}
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// measure runs call b.N times from n goroutines, and reports the CPU time of
// client and server together.
func measure(b *testing.B, n int, call func() error) {
	b.ReportAllocs()
	b.ResetTimer()
	start := cpu()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for range (b.N + n - 1 - i) / n {
				if err := call(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.ReportMetric(float64(cpu()-start)/float64(b.N), "cpu-ns/op")
}

// BenchmarkUnary is a call over one connection: client and server are both ours
// or both net/http's.
func BenchmarkUnary(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run("ours/"+strconv.Itoa(n), func(b *testing.B) {
			s := serve(b, nil, unaryServer)
			c := dial(b, s.addr, nil)
			h := post("/helloworld.Greeter/SayHello")
			h.Headers = []http1.Header{
				{Name: []byte("content-type"), Value: []byte("application/grpc")},
				{Name: []byte("te"), Value: []byte("trailers")},
				{Name: []byte("user-agent"), Value: []byte("grpc-go/1.85.0")},
			}
			deadline := time.Now().Add(time.Minute)
			measure(b, n, func() error {
				head, _ := heads.Get().(*http1.Head)
				defer heads.Put(head)
				return callOurs(c, h, head, deadline)
			})
		})
		b.Run("net-http/"+strconv.Itoa(n), func(b *testing.B) {
			addr := otherServer(b, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/grpc")
				w.Header().Set("Trailer", "Grpc-Status")
				w.WriteHeader(200)
				_, _ = io.Copy(w, r.Body)
				w.Header().Set("Grpc-Status", "0")
			})
			tr := otherTransport(b)
			measure(b, n, func() error {
				req, err := http.NewRequest(http.MethodPost, "http://"+addr+"/helloworld.Greeter/SayHello", bytes.NewReader(unary))
				if err != nil {
					return err
				}
				req.Header.Set("Content-Type", "application/grpc")
				req.Header.Set("Te", "trailers")
				res, err := tr.RoundTrip(req)
				if err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				return err
			})
		})
	}
}
