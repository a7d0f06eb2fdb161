package proxy

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

const database = "shop/db:3306"

// carrier is a path to one cluster, "db", whose server is the test.
type carrier struct {
	*path
	server net.Listener
	lines  chan map[string]any
}

func (c *carrier) Write(b []byte) (int, error) {
	for one := range bytes.Lines(b) {
		var line map[string]any
		if err := json.Unmarshal(one, &line); err != nil {
			return 0, err
		}
		c.lines <- line
	}
	return len(b), nil
}

func newCarrier(t *testing.T) *carrier {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	current := &table.Current{}
	current.Store(&table.Table{Clusters: map[string]*table.Cluster{"db": {
		Name: "db", Endpoints: []balance.Endpoint{{Address: netip.MustParseAddrPort(l.Addr().String()), Healthy: true, Weight: 1}},
	}}})
	node := bootstrap.Config{Namespace: "shop", Workload: "web", Instance: "web-0"}
	clusters := upstream.New(func() string { return "e" }, func(breaker.Evidence) {}, func(string, outlier.Event) {})
	c := &carrier{server: l, lines: make(chan map[string]any, 8)}
	c.path = &path{outbound: true, table: current, key: database, Proxy: &Proxy{
		Node: node, Table: current, Clusters: clusters, Log: accesslog.New("shop", "web", "web-0"),
		Metrics: telemetry.NewMetrics(prometheus.NewRegistry(), node),
	}}
	c.series = c.Metrics.Destination(true, database)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = clusters.Run(ctx, current) })
	wg.Go(func() { _ = c.Log.Run(ctx, c) })
	t.Cleanup(func() { cancel(); _ = l.Close(); wg.Wait() })
	return c
}

// begin carries a connection and returns the client's end and, in time, done.
func (c *carrier) begin(t *testing.T, s stream) (client *net.TCPConn, done chan struct{}) {
	t.Helper()
	down, client := sockets(t)
	_ = down.SetDeadline(time.Time{})
	done = make(chan struct{})
	go func() {
		defer close(done)
		c.carry(context.Background(), down, s)
		_ = down.Close()
	}()
	t.Cleanup(func() { _ = client.Close(); <-done })
	return client, done
}

func (c *carrier) accept(t *testing.T) net.Conn {
	t.Helper()
	s, err := c.server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	_ = s.SetDeadline(time.Now().Add(10 * time.Second))
	return s
}

func TestCarryLogsTheWholeConnection(t *testing.T) {
	c := newCarrier(t)
	released := false
	client, done := c.begin(t, stream{Cluster: "db", Protocol: "tls", ServerName: "db.example", Early: []byte("hello "), Release: func() { released = true }})
	server := c.accept(t)
	say(t, client, "server")
	hear(t, server, "hello server")
	say(t, server, "hi")
	hear(t, client, "hi")
	_, _ = client.CloseWrite(), server.Close()
	ended(t, client)
	<-done
	line := <-c.lines
	for field, want := range map[string]any{
		"network.protocol": "tls", "tls.client.server_name": "db.example", "outrigger.response_flags": "-", "outrigger.destination": database,
		"http.request.body.bytes": 12.0, "http.response.body.bytes": 2.0, "outrigger.attempts": 1.0,
	} {
		if line[field] != want {
			t.Errorf("%s is %v, want %v", field, line[field], want)
		}
	}
	if !released {
		t.Error("the early bytes are not released")
	}
}

func TestCarryLearnsWhoSpeaksFirst(t *testing.T) {
	c := newCarrier(t)
	var mem detect.Memory
	for _, serverFirst := range []bool{true, false} {
		client, done := c.begin(t, stream{Cluster: "db", Memory: &mem, Key: database})
		server := c.accept(t)
		first, second := net.Conn(client), server
		if serverFirst {
			first, second = second, first
		}
		say(t, first, "220")
		hear(t, second, "220")
		if got := mem.ServerFirst(database, time.Now()); got != serverFirst {
			t.Errorf("the server speaks first: %t, want %t", got, serverFirst)
		}
		_, _ = client.Close(), server.Close()
		<-done
		<-c.lines
	}
}

func TestCarryRefusesWithAReset(t *testing.T) {
	c := newCarrier(t)
	_ = c.server.Close()
	for _, test := range []struct {
		stream
		flags, detail string
	}{
		{stream{Refused: "no TLSRoute has x.example"}, "NR", "no TLSRoute has x.example"},
		{stream{Cluster: "other"}, "NC", "the control plane knows no cluster other"},
		{stream{Cluster: "db"}, "UF", ""},
	} {
		client, done := c.begin(t, test.stream)
		if _, err := client.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v, want a reset", test.flags, err)
		}
		<-done
		line := <-c.lines
		if line["outrigger.response_flags"] != test.flags || test.detail != "" && line["error.message"] != test.detail {
			t.Errorf("%v, want %s", line, test.flags)
		}
	}
}
