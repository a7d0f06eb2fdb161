package detect_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
)

const (
	database = "shop/db:3306"
	wait     = 50 * time.Millisecond
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func TestServerFirstIsRememberedWhileItIsConfirmed(t *testing.T) {
	var m detect.Memory
	if m.ServerFirst(database, start) {
		t.Fatal("known before anything was seen")
	}
	m.ServerSpoke(database, start)
	for i := range 5 { // each connection confirms it
		now := start.Add(time.Duration(i) * 9 * time.Minute)
		if !m.ServerFirst(database, now) {
			t.Fatalf("forgotten after %v", now.Sub(start))
		}
		m.ServerSpoke(database, now)
	}
	last := start.Add(36 * time.Minute)
	if !m.ServerFirst(database, last.Add(10*time.Minute-1)) || m.ServerFirst(database, last.Add(10*time.Minute)) {
		t.Error("it is not ten minutes that it is remembered")
	}
}

func TestAClientThatSpeaksEndsServerFirst(t *testing.T) {
	var m detect.Memory
	m.ServerSpoke(database, start)
	m.ClientSpoke(database, start)
	if m.ServerFirst(database, start) {
		t.Error("still remembered")
	}
}

func TestHTTPIsNotUndoneByAServerThatGivesUp(t *testing.T) {
	var m detect.Memory
	m.Found("shop/web:80", detect.HTTP1, start)
	m.ServerSpoke("shop/web:80", start.Add(time.Minute)) // 408
	if m.ServerFirst("shop/web:80", start.Add(time.Minute)) {
		t.Error("an HTTP destination is carried as bytes")
	}
	m.ServerSpoke("shop/web:80", start.Add(10*time.Minute))
	if !m.ServerFirst("shop/web:80", start.Add(10*time.Minute)) {
		t.Error("what was found ten minutes ago is still believed")
	}
}

func TestMemoryIsBounded(t *testing.T) {
	var m detect.Memory
	for i := range 1025 {
		m.ServerSpoke(fmt.Sprint("n/s:", i), start.Add(time.Duration(i)))
	}
	at := start.Add(time.Second)
	if n := len(m.Snapshot(at, wait)); n != 1024 {
		t.Errorf("%d destinations are remembered", n)
	}
	if m.ServerFirst("n/s:0", at) || !m.ServerFirst("n/s:1", at) {
		t.Error("it is not the oldest that was forgotten")
	}
}

func TestSnapshot(t *testing.T) {
	var m detect.Memory
	m.ServerSpoke(database, start)
	m.ServerSpoke(database, start.Add(time.Second))
	m.Found("shop/web:80", detect.HTTP1, start)
	m.Found("shop/api:81", detect.HTTP2, start)
	m.Found("shop/tls:443", detect.TLS, start)
	m.Found("shop/redis:6379", detect.Opaque, start)
	m.Found("shop/late:1", detect.More, start)
	var got strings.Builder
	for _, f := range m.Snapshot(start.Add(time.Minute), wait) {
		fmt.Fprintln(&got, f.Destination, f.Protocol, f.ServerFirst, f.Last.Sub(f.Since), f.Count, f.Hint)
	}
	const want = `shop/api:81 http2 false 0s 1 set appProtocol: http2 (or grpc) on port 81 of Service shop/api: a connection that is opened ahead of its first request by more than 50ms is carried as bytes
shop/db:3306 opaque true 1s 2 set appProtocol: tcp on port 3306 of Service shop/db: the server speaks first, and detection costs each first connection 50ms
shop/redis:6379 opaque false 0s 1 set appProtocol: tcp on port 6379 of Service shop/redis: what it speaks is not HTTP
shop/tls:443 tls false 0s 1 set appProtocol: tls on port 443 of Service shop/tls: then TLSRoutes may lead it by server name
shop/web:80 http1 false 0s 1 set appProtocol: http on port 80 of Service shop/web: a connection that is opened ahead of its first request by more than 50ms is carried as bytes
`
	if got.String() != want {
		t.Errorf("got:\n%swant:\n%s", got.String(), want)
	}
}
