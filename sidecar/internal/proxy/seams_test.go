package proxy_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// An attempt that fails while the client is still sending wakes the reading of
// its body; the next attempt reads on.
func TestRetryGoesOnWithABodyThatIsStillComing(t *testing.T) {
	for _, down := range []int{1, 2} {
		t.Run(fmt.Sprintf("from HTTP/%d", down), func(t *testing.T) {
			second := make(chan struct{})
			var heads atomic.Int32
			m := start(t, func(_ *table.Cluster, r *route.Route) { r.Retry = quick(3, retry.OnReset) },
				speak(t, func(c net.Conn, r *bufio.Reader) {
					head(r)
					b := make([]byte, 4)
					_, _ = io.ReadFull(r, b)
					if heads.Add(1) == 1 {
						time.Sleep(20 * time.Millisecond) // the body is waited for
						_ = c.(*net.TCPConn).SetLinger(0)
						return
					}
					close(second)
					rest, _ := io.ReadAll(io.LimitReader(r, 6))
					_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\nConnection: close\r\n\r\n%s%s", b, rest)
				}))
			pr, pw := io.Pipe()
			go func() {
				_, _ = io.WriteString(pw, "half")
				select {
				case <-second:
				case <-time.After(5 * time.Second):
				}
				_, _ = io.WriteString(pw, "-whole")
				_ = pw.Close()
			}()
			req, _ := http.NewRequestWithContext(t.Context(), "PUT", "http://"+m.addr+"/", pr)
			req.ContentLength = 10
			resp, err := clientIn(t, down).Do(req)
			if err != nil {
				t.Fatalf("%v; logged %v", err, m.logged())
			}
			defer func() { _ = resp.Body.Close() }()
			if b, err := io.ReadAll(resp.Body); err != nil || string(b) != "half-whole" {
				t.Fatalf("%d %q, %v; logged %v", resp.StatusCode, b, err, m.logged())
			}
		})
	}
}

// A client may close its direction behind a body that came in pieces.
func TestClientThatHalfClosesBehindAnUploadIsAnswered(t *testing.T) {
	m := start(t, nil, serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		time.Sleep(400 * time.Millisecond)
		_, _ = io.WriteString(w, "late")
	}))
	c := m.dial()
	_, _ = io.WriteString(c, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
	time.Sleep(20 * time.Millisecond)
	_, _ = io.WriteString(c, "-whole")
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(b), "\r\n\r\nlate") {
		t.Fatalf("%q, %v", b, err)
	}
}

// The response may begin, and the per-try timeout end, while the body is sent.
func TestPerTryTimeoutEndsWhileTheBodyIsSent(t *testing.T) {
	acrossVersions(t, func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(200)
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(w, r.Body)
	}, func(_ *table.Cluster, r *route.Route) { r.Retry.PerTryTimeout = 150 * time.Millisecond },
		func(t *testing.T, b bridge) {
			pr, pw := io.Pipe()
			go func() {
				for range 40 {
					time.Sleep(10 * time.Millisecond)
					_, _ = io.WriteString(pw, "ten bytes.")
				}
				_ = pw.Close()
			}()
			resp, got := b.send(b.request("POST", "/", pr))
			if resp.StatusCode != 200 || len(got) != 400 {
				t.Errorf("%d with %d bytes", resp.StatusCode, len(got))
			}
		})
}

// Who cancels harms nobody else, whatever is used again.
func TestCancelsHarmNobodyElse(t *testing.T) {
	for _, up := range []int{1, 2} {
		t.Run(fmt.Sprintf("to HTTP/%d", up), func(t *testing.T) {
			m := start(t, func(c *table.Cluster, r *route.Route) {
				c.HTTP2 = up == 2
			}, serveIn(t, up, func(w http.ResponseWriter, r *http.Request) {
				if r.Method == "POST" {
					_, _ = io.Copy(io.Discard, r.Body)
				}
				time.Sleep(time.Duration(rand.IntN(1500)) * time.Microsecond)
				_, _ = io.WriteString(w, "ok")
			}))
			m.quiet = true
			fickle, steady := clientIn(t, 2), clientIn(t, 2)
			ctx, stop := context.WithTimeout(t.Context(), 3*time.Second)
			defer stop()
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for i := 0; ctx.Err() == nil; i++ {
						// Every other one waits: on a busy machine all would be cancelled, which is
						// the attack that a server's rations are against.
						patience := time.Second
						if i%2 == 0 {
							patience = time.Duration(rand.IntN(2000)) * time.Microsecond
						}
						one, cancel := context.WithTimeout(ctx, patience)
						req, _ := http.NewRequestWithContext(one, "GET", "http://"+m.addr+"/", nil)
						if resp, err := fickle.Do(req); err == nil {
							_, _ = io.Copy(io.Discard, resp.Body)
							_ = resp.Body.Close()
						}
						cancel()
					}
				})
			}
			var done, failed atomic.Int32
			for range 8 {
				wg.Go(func() {
					for ctx.Err() == nil {
						req, _ := http.NewRequestWithContext(t.Context(), "POST", "http://"+m.addr+"/", strings.NewReader("body"))
						resp, err := steady.Do(req)
						if err != nil {
							if !errors.Is(err, context.Canceled) {
								failed.Add(1)
								t.Log(err)
							}
							continue
						}
						b, _ := io.ReadAll(resp.Body)
						_ = resp.Body.Close()
						done.Add(1)
						if resp.StatusCode != 200 || string(b) != "ok" {
							failed.Add(1)
							t.Logf("%d %s", resp.StatusCode, b)
						}
					}
				})
			}
			wg.Wait()
			if failed.Load() > 0 || done.Load() == 0 {
				t.Errorf("%d of %d steady requests failed", failed.Load(), done.Load())
			}
		})
	}
}
