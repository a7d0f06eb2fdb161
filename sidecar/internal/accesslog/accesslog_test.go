package accesslog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// written returns what f logs, line by line.
func written(t *testing.T, f func(*accesslog.Log)) []map[string]any {
	t.Helper()
	l := accesslog.New("shop", "storefront", "storefront-0")
	f(l)
	var lines []map[string]any
	for line := range strings.Lines(drained(l)) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("not JSON: %v\n%s", err, line)
		}
		lines = append(lines, m)
	}
	return lines
}

func TestLineIsECS(t *testing.T) {
	lines := written(t, func(l *accesslog.Log) {
		l.Write(&accesslog.Entry{
			Start: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC), Duration: 1500 * time.Microsecond, Direction: "outbound", Protocol: "http",
			Method: []byte("GET"), Path: []byte("/pay"), Host: []byte("payments.shop"), Status: 503, Flags: accesslog.UO | accesslog.URX,
			Destination: "shop/payments:80", Attempts: 2, TraceID: []byte("4bf92f3577b34da6a3ce929d0e0e4736"), SpanID: []byte("00f067aa0ba902b7"),
		})
	})
	for k, want := range map[string]any{
		"@timestamp": "2026-11-23T03:00:00.000000Z", "message": "GET /pay -> 503 UO,URX 1.5ms", "log.level": "warn", "service.name": "storefront",
		"http.request.method": "GET", "url.path": "/pay", "http.response.status_code": float64(503), "event.duration": float64(1500000),
		"outrigger.response_flags": "UO,URX", "outrigger.attempts": float64(2), "trace.id": "4bf92f3577b34da6a3ce929d0e0e4736", "event.dataset": "outrigger.access",
	} {
		if lines[0][k] != want {
			t.Errorf("%s = %v; want %v", k, lines[0][k], want)
		}
	}
}

// Whatever a stranger sends, the line is JSON and says it, with U+FFFD for each
// byte that is not UTF-8.
func FuzzLineIsJSON(f *testing.F) {
	f.Add([]byte("/a\"b\\c\n"), []byte("caf\xc3\xa9\xff"))
	f.Add([]byte("/12345678\x7f"), []byte("\xed\xa0\x80 12345678\xf0\x9f\x9a"))
	f.Fuzz(func(t *testing.T, path, agent []byte) {
		lines := written(t, func(l *accesslog.Log) {
			l.Write(&accesslog.Entry{Method: []byte("GET"), Path: path, UserAgent: agent, Protocol: "http", Detail: string(agent)})
		})
		if len(lines) != 1 {
			t.Fatalf("%d lines", len(lines))
		}
		said := func(b []byte, most int) any {
			return string([]rune(string(b[:min(len(b), most)])))
		}
		if lines[0]["url.path"] != said(path, 1024) {
			t.Errorf("url.path = %q; want %q", lines[0]["url.path"], path)
		}
		if len(agent) > 0 && (lines[0]["user_agent.original"] != said(agent, 256) || lines[0]["error.message"] != said(agent, 1024)) {
			t.Errorf("user_agent.original = %q, error.message = %q; want %q", lines[0]["user_agent.original"], lines[0]["error.message"], agent)
		}
	})
}

// What waits is bounded, whoever does not read it; what was dropped is counted,
// and what was not is written at the end.
func TestTooMuchPendingIsDroppedAndCounted(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	const n = 5000
	for range n {
		l.Write(&usual)
	}
	out := drained(l)
	kept := strings.Count(out, "\n")
	if l.Dropped() == 0 || kept+int(l.Dropped()) != n || len(out) > accesslog.MaxPending || len(out) < accesslog.MaxPending-1000 {
		t.Fatalf("%d lines of %d bytes kept and %d dropped of %d", kept, len(out), l.Dropped(), n)
	}
	l.WriteRaw(bytes.Repeat([]byte("{}"), accesslog.MaxPending/2))
	if kept+int(l.Dropped()) != n+1 {
		t.Fatal("a line that never fits was not counted")
	}
}

// drained is what is pending.
func drained(l *accesslog.Log) string {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out bytes.Buffer
	_ = l.Run(ctx, &out)
	return out.String()
}

// A reader that stands still stops the writer, and no request.
func TestBlockedWriterBlocksNoRequest(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	r, w := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx, w) }()
	const n = 10000
	for range n { // nobody reads
		l.Write(&usual)
	}
	if l.Dropped() == 0 {
		t.Error("nothing was dropped")
	}
	read := make(chan int)
	go func() {
		all, _ := io.ReadAll(r)
		read <- bytes.Count(all, []byte("\n"))
	}()
	cancel()
	<-done
	_ = w.Close()
	if got := <-read; got+int(l.Dropped()) != n {
		t.Errorf("%d lines read and %d dropped of %d", got, l.Dropped(), n)
	}
}

// Lines are gathered: one write for what comes within the interval, at once for
// what fills a buffer, and nothing at all where there is nothing to write.
func TestLinesAreWrittenTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := accesslog.New("shop", "storefront", "storefront-0")
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var got writes
		wg.Go(func() { _ = l.Run(ctx, &got) })
		time.Sleep(time.Hour)
		if n, _ := got.counts(); n != 0 {
			t.Fatalf("%d writes of nothing", n)
		}
		for range 10 {
			l.Write(&usual)
			time.Sleep(time.Millisecond)
		}
		if n, _ := got.counts(); n != 0 {
			t.Errorf("%d writes before the interval was over", n)
		}
		time.Sleep(accesslog.FlushInterval)
		if n, lines := got.counts(); n != 1 || lines != 10 {
			t.Errorf("%d lines in %d writes; want 10 in one", lines, n)
		}
		for range 50 { // more than 32 KiB, in no time
			l.Write(&usual)
		}
		synctest.Wait()
		if _, lines := got.counts(); lines < 10+35 {
			t.Errorf("%d lines; want a chunk written as soon as it is full", lines)
		}
		l.Write(&usual)
		cancel()
		wg.Wait()
		if _, lines := got.counts(); lines != 61 {
			t.Errorf("%d lines at the end; want 61", lines)
		}
	})
}

// writes counts what is written at once.
type writes struct {
	mu    sync.Mutex
	calls int
	lines int
}

func (w *writes) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	w.lines += bytes.Count(b, []byte("\n"))
	return len(b), nil
}

func (w *writes) counts() (calls, lines int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.calls, w.lines
}

// From many goroutines, every line comes out once and whole.
func TestNoLineIsTornOrLost(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx, &out) }()
	const writers, each = 8, 100
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				e := usual
				e.Path = fmt.Appendf(nil, "/%d/%d", w, i)
				l.Write(&e)
				if i%10 == 0 {
					l.WriteRaw(fmt.Appendf(nil, `{"url.path":"/raw/%d/%d"}`, w, i))
				}
			}
		})
	}
	wg.Wait()
	cancel()
	<-done
	seen := map[string]bool{}
	for line := range strings.Lines(out.String()) {
		var m struct {
			Path    string `json:"url.path"`
			Service string `json:"service.name"`
		}
		if err := json.Unmarshal([]byte(line), &m); err != nil || seen[m.Path] || m.Service != "storefront" {
			t.Fatalf("torn or twice: %v: %s", err, line)
		}
		seen[m.Path] = true
	}
	if len(seen) != writers*each*11/10 || l.Dropped() != 0 {
		t.Errorf("%d lines, %d dropped; want all %d", len(seen), l.Dropped(), writers*each*11/10)
	}
}

// A writer that takes part of a batch leaves a torn line; the rest is counted,
// and the next line is whole.
func TestWhatTheWriterRefusesIsCounted(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	ctx, cancel := context.WithCancel(t.Context())
	out := &full{room: 1000, said: make(chan struct{})}
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx, out) }()
	for range 10 {
		l.Write(&usual)
	}
	<-out.said
	l.Write(&usual)
	cancel()
	<-done
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	whole := 0
	for _, line := range lines {
		if json.Valid([]byte(line)) {
			whole++
		}
	}
	if uint64(whole)+l.Failed() != 11 || len(lines) != whole+1 {
		t.Errorf("%d whole lines of %d, %d failed; want 11 and one torn", whole, len(lines), l.Failed())
	}
}

// full is a disk that is full once.
type full struct {
	bytes.Buffer
	room int
	said chan struct{}
}

func (f *full) Write(b []byte) (int, error) {
	if f.room > 0 && len(b) > f.room {
		n, _ := f.Buffer.Write(b[:f.room])
		f.room = 0
		close(f.said)
		return n, syscall.ENOSPC
	}
	return f.Buffer.Write(b)
}

func TestWriteDoesNotAllocate(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx, io.Discard) }()
	e := usual
	raw := []byte(`{"message":"circuit breaker opened"}`)
	if n := testing.AllocsPerRun(5000, func() {
		e.Start = e.Start.Add(time.Millisecond)
		e.Flags ^= accesslog.UO | accesslog.URX
		l.Write(&e)
		l.WriteRaw(raw)
	}); n > 0 && !raceEnabled {
		t.Errorf("%v allocations a line", n)
	}
	cancel()
	<-done
}

// What gRPC and TLS add to a line.
func TestLineTellsTheProofAndTheCodeOfGRPC(t *testing.T) {
	lines := written(t, func(l *accesslog.Log) {
		e := usual
		e.Protocol, e.Method, e.Path, e.GRPCStatus, e.Duration = "grpc", []byte("POST"), []byte("/pay.Pay/Do"), 14, 949*time.Microsecond
		e.Security, e.PeerIdentity, e.TLSServerName = "mutual_tls", "spiffe://cluster.local/ns/shop/sa/payments", "payments.shop\xff\"."
		l.Write(&e)
		e.GRPCStatus, e.Duration, e.Start = -1, 950*time.Microsecond, e.Start.Add(time.Second)
		l.Write(&e)
		l.Write(&accesslog.Entry{Start: e.Start.In(time.FixedZone("", 3600)), Protocol: "tcp", Duration: 61*time.Second + 50*time.Microsecond})
	})
	for i, want := range []map[string]any{
		{
			"@timestamp": "2026-11-23T03:00:00.123456Z", "message": "POST /pay.Pay/Do -> 200/14 0.9ms", "log.level": "warn", "network.protocol": "grpc",
			"http.response.status_code": 200.0, "rpc.grpc.status_code": 14.0, "outrigger.security": "mutual_tls",
			"outrigger.peer.identity": "spiffe://cluster.local/ns/shop/sa/payments", "tls.client.server_name": "payments.shop\ufffd\".",
		},
		{"@timestamp": "2026-11-23T03:00:01.123456Z", "message": "POST /pay.Pay/Do -> 200 1.0ms", "log.level": "info", "rpc.grpc.status_code": nil},
		{"@timestamp": "2026-11-23T03:00:01.123456Z", "message": "tcp -> 61000.1ms", "log.level": "info", "http.response.status_code": nil, "rpc.grpc.status_code": nil, "outrigger.security": nil},
	} {
		for k, v := range want {
			if lines[i][k] != v {
				t.Errorf("line %d: %s = %v; want %v", i, k, lines[i][k], v)
			}
		}
	}
}

// Every byte at every place of a word comes back as it was.
func TestEscapingIsExact(t *testing.T) {
	for c := range 128 {
		for at := range 17 {
			host := bytes.Repeat([]byte("a"), 17)
			host[at] = byte(c)
			if got := written(t, func(l *accesslog.Log) { l.Write(&accesslog.Entry{Method: []byte("GET"), Host: host}) })[0]["url.domain"]; got != string(host) {
				t.Fatalf("%q became %q", host, got)
			}
		}
	}
}

func TestFlags(t *testing.T) {
	for f, want := range map[accesslog.Flags]string{0: "-", accesslog.SI: "SI", accesslog.UT: "UT", accesslog.URX | accesslog.DC | accesslog.UF: "DC,UF,URX"} {
		if got := f.String(); got != want {
			t.Errorf("%d: %q; want %q", f, got, want)
		}
	}
}

// A head may hold 64 KiB; a queue full of such lines must not.
func TestWhatStrangersWroteIsCut(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 60<<10)
	line := written(t, func(l *accesslog.Log) {
		l.Write(&accesslog.Entry{Protocol: "http", Method: []byte("GET"), Path: long, Host: long, UserAgent: long, RequestID: long})
	})[0]
	for field, most := range map[string]int{"url.path": 1024, "url.domain": 256, "user_agent.original": 256, "http.request.id": 256} {
		if v, _ := line[field].(string); len(v) != most {
			t.Errorf("%s has %d bytes; want %d", field, len(v), most)
		}
	}
}
