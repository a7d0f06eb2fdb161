package proxy

import (
	"errors"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const database = "shop/db:3306"

func TestSniff(t *testing.T) {
	for _, c := range []struct {
		name   string
		client func(c *net.TCPConn)
		want   detect.Protocol
		early  string
		waits  bool
	}{
		{"HTTP at once", func(c *net.TCPConn) { _, _ = c.Write([]byte("GET / HTTP/1.1\r\n")) }, detect.HTTP1, "GET / HTTP/1.1\r\n", false},
		{"HTTP in two parts", func(c *net.TCPConn) {
			_, _ = c.Write([]byte("GE"))
			time.Sleep(10 * time.Millisecond)
			_, _ = c.Write([]byte("T /"))
		}, detect.HTTP1, "GET /", false},
		{"bytes", func(c *net.TCPConn) { _, _ = c.Write([]byte("*1\r\n")) }, detect.Opaque, "*1\r\n", false},
		{"the beginning of HTTP and no more", func(c *net.TCPConn) { _, _ = c.Write([]byte("GE")) }, detect.Opaque, "GE", true},
		{"silence", func(*net.TCPConn) {}, detect.Opaque, "", true},
		{"a half-close", func(c *net.TCPConn) { _ = c.CloseWrite() }, detect.Opaque, "", false},
		{"some bytes and a half-close", func(c *net.TCPConn) { _, _ = c.Write([]byte("GE")); _ = c.CloseWrite() }, detect.Opaque, "GE", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := sockets(t)
			done := make(chan struct{})
			go func() { defer close(done); c.client(far) }()
			var mem detect.Memory
			began := time.Now()
			early, r, err := (&path{}).sniff(near, &mem, database, began)
			took := time.Since(began)
			if err != nil || r.Protocol != c.want || string(early) != c.early {
				t.Fatalf("%q, %v, %v; want %q, %v", early, r, err, c.early, c.want)
			}
			if waited := took >= sniffTimeout; waited != c.waits {
				t.Errorf("it took %v", took)
			}
			release(early)
			<-done
			if strings.HasSuffix(c.name, "half-close") {
				return
			}
			// No deadline is left behind.
			time.Sleep(2 * sniffGrace)
			_, _ = far.Write([]byte("x"))
			if _, err := near.Read(make([]byte, 1)); err != nil {
				t.Errorf("the connection is of no further use: %v", err)
			}
		})
	}
}

func TestSniffOfAReset(t *testing.T) {
	near, far := sockets(t)
	_ = far.SetLinger(0)
	_ = far.Close()
	early, _, err := (&path{}).sniff(near, &detect.Memory{}, "shop/web:80", time.Now())
	if early != nil || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%q, %v", early, err)
	}
}

// The bytes that are there when the wait is over count: who reads them may have
// had no processor.
func TestSniffLooksAgain(t *testing.T) {
	near, far := sockets(t)
	_, _ = far.Write([]byte("GET /"))
	time.Sleep(10 * time.Millisecond)
	// The first read of this connection meets a deadline that has passed.
	early, r, err := (&path{}).sniff(&late{Conn: near}, &detect.Memory{}, database, time.Now())
	if string(early) != "GET /" || r.Protocol != detect.HTTP1 || err != nil {
		t.Errorf("%q, %v, %v", early, r, err)
	}
}

// late is a connection whose first deadline passes before it is read.
type late struct {
	net.Conn
	set bool
}

func (l *late) SetReadDeadline(t time.Time) error {
	if !l.set {
		l.set, t = true, time.Unix(1, 0)
	}
	return l.Conn.SetReadDeadline(t)
}

// A server that speaks first is waited for once, and never twice.
func TestServerFirstIsDelayedOnce(t *testing.T) {
	var mem detect.Memory
	for i := range 3 {
		near, client := sockets(t)
		up, server := sockets(t)
		began := time.Now()
		early, r, err := (&path{}).sniff(near, &mem, database, began)
		if took := time.Since(began); r.Protocol != detect.Opaque || len(early) > 0 || err != nil || (took >= sniffTimeout) != (i == 0) {
			t.Fatalf("connection %d: %q, %v, %v after %v", i, early, r, err, took)
		}
		e := join(t, &tunnelling{first: func(server bool) { remember(&mem, database, server, began, time.Now()) }}, &ends{client: client, server: server}, near, up)
		say(t, server, "5.7.30")
		hear(t, client, "5.7.30")
		_, _ = client.Close(), server.Close()
		<-e.done
	}
	if f := mem.Snapshot(time.Now(), sniffTimeout); len(f) != 1 || f[0].Count != 3 || !f[0].ServerFirst {
		t.Errorf("%+v", f)
	}
	// An HTTP server that gives up on a silent client is no such server.
	var other detect.Memory
	start := time.Now()
	remember(&other, database, true, start, start.Add(greetingTimeout+1))
	if other.ServerFirst(database, start.Add(greetingTimeout+1)) {
		t.Error("a late word is taken for a greeting")
	}
}

func TestClusterFor(t *testing.T) {
	to := func(c string) []route.Weighted { return []route.Weighted{{Cluster: c, Weight: 1}} }
	d := &table.Destination{Cluster: "rest", ServerNames: []table.ServerName{
		{Name: "a.example", Clusters: to("exact")},
		{Name: "*.deep.example", Clusters: to("deep")},
		{Name: "*.example", Clusters: to("wide")},
		{Name: "none.test", Clusters: nil},
	}}
	got := map[string]string{}
	for _, name := range []string{"a.example", "b.example", "x.y.deep.example", "deep.example", "example", ".example", "", "none.test", "other"} {
		got[name] = clusterFor(d, name)
	}
	want := map[string]string{
		"a.example": "exact", "b.example": "wide", "x.y.deep.example": "deep", "deep.example": "wide", "example": "rest", ".example": "rest", "": "rest", "none.test": "", "other": "rest",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if c := clusterFor(&table.Destination{}, "a"); c != "" {
		t.Errorf("%q", c)
	}
}
