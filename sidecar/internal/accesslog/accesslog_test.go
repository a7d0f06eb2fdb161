package accesslog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// written runs the log over what f logs and returns the lines.
func written(t *testing.T, f func(*accesslog.Log)) []map[string]any {
	t.Helper()
	l := accesslog.New("shop", "storefront", "storefront-0")
	f(l)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out bytes.Buffer
	_ = l.Run(ctx, &out)
	var lines []map[string]any
	for line := range strings.Lines(out.String()) {
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

func FuzzLineIsJSON(f *testing.F) {
	f.Add([]byte("/a\"b\\c\n"), []byte("caf\xc3\xa9\xff"))
	f.Fuzz(func(t *testing.T, path, agent []byte) {
		lines := written(t, func(l *accesslog.Log) {
			l.Write(&accesslog.Entry{Method: []byte("GET"), Path: path, UserAgent: agent, Protocol: "http"})
		})
		if len(lines) != 1 {
			t.Fatalf("%d lines", len(lines))
		}
	})
}

func TestFullQueueDropsAndCounts(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	for range accesslog.Queue + 3 {
		l.Write(&accesslog.Entry{})
	}
	if l.Dropped() != 3 {
		t.Fatalf("Dropped() = %d; want 3", l.Dropped())
	}
}

func TestWriteDoesNotAllocate(t *testing.T) {
	l := accesslog.New("shop", "storefront", "storefront-0")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	wrote := make(handover)
	go func() { defer close(done); _ = l.Run(ctx, wrote) }()
	e := &accesslog.Entry{Method: []byte("GET"), Path: []byte("/"), Protocol: "http", Status: 200, Start: time.Now()}
	if n := testing.AllocsPerRun(1000, func() { l.Write(e); <-wrote }); n > 0 && !raceEnabled {
		t.Errorf("%v allocations a line", n)
	}
	cancel()
	<-done
}

// handover tells the test of each line, so that no queue builds up.
type handover chan struct{}

func (h handover) Write(b []byte) (int, error) { h <- struct{}{}; return len(b), nil }

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
