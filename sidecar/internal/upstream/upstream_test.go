package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const name = "shop/payments:80"

// server accepts connections and hands them to the test.
func server(t *testing.T) (netip.AddrPort, <-chan net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1000)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			accepted <- c
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return netip.MustParseAddrPort(l.Addr().String()), accepted
}

func endpoint(a netip.AddrPort) balance.Endpoint {
	return balance.Endpoint{Address: a, Healthy: true, Weight: 1}
}

func tableOf(cs ...*table.Cluster) *table.Table {
	t := &table.Table{Clusters: map[string]*table.Cluster{}}
	for _, c := range cs {
		t.Clusters[c.Name] = c
	}
	return t
}

func set() *Clusters {
	return New(func() string { return "e" }, func(breaker.Evidence) {}, func(string, outlier.Event) {})
}

func get(t *testing.T, e *Endpoint) *Conn {
	t.Helper()
	c, err := e.Get(t.Context(), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func use(t *testing.T, c *Cluster, want Usage) {
	t.Helper()
	if got := c.Usage(); got != want {
		t.Errorf("in use: %+v; want %+v", got, want)
	}
}

func TestIdleConnectionIsUsedAgain(t *testing.T) {
	a, _ := server(t)
	cs := set()
	c := cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a)}}), name)
	e := c.Endpoints()[0]
	first := get(t, e)
	if first.Reused || e.Active() != 1 {
		t.Errorf("a new connection: reused %v, active %d", first.Reused, e.Active())
	}
	// The exchange's deadline stays behind and passes while the connection idles.
	first.ReadBy(time.Now().Add(time.Millisecond))
	first.WriteBy(time.Now().Add(time.Millisecond))
	e.Put(first, time.Now())
	time.Sleep(5 * time.Millisecond)
	again := get(t, e)
	if again != first || !again.Reused {
		t.Error("the idle connection was not used again")
	}
	e.Discard(again)
	use(t, c, Usage{})
	if e.Active() != 0 {
		t.Errorf("%d exchanges active after all have ended", e.Active())
	}
}

func TestIdleConnectionThatTheServerTouchedIsNotUsed(t *testing.T) {
	for what, touch := range map[string]func(net.Conn){
		"closed":   func(c net.Conn) { _ = c.Close() },
		"reset":    func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0); _ = c.Close() },
		"answered": func(c net.Conn) { _, _ = c.Write([]byte("HTTP/1.1 408 Request Timeout\r\n\r\n")) },
	} {
		a, accepted := server(t)
		c := set().For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a)}}), name)
		e := c.Endpoints()[0]
		e.Put(get(t, e), time.Now())
		touch(<-accepted)
		time.Sleep(5 * time.Millisecond)
		fresh := get(t, e)
		if fresh.Reused {
			t.Errorf("%s: the connection was used again", what)
		}
		use(t, c, Usage{Connections: 1})
		e.Discard(fresh)
	}
}

func TestLimitOnConnections(t *testing.T) {
	for _, observe := range []bool{false, true} {
		a, _ := server(t)
		c := set().For(tableOf(&table.Cluster{Name: name, LimitsObserve: observe, Limits: table.Limits{Connections: 1}, Endpoints: []balance.Endpoint{endpoint(a)}}), name)
		e := c.Endpoints()[0]
		first := get(t, e)
		second, err := e.Get(t.Context(), time.Time{})
		switch {
		case observe && (err != nil || second.Over != Connections):
			t.Errorf("Observe mode: %v; want the connection, marked", err)
		case !observe && !errors.Is(err, Connections):
			t.Errorf("Enforce mode: %v; want %v", err, Connections)
		}
		if second != nil {
			e.Discard(second)
		}
		e.Put(first, time.Now())
		if third := get(t, e); third != first || third.Over != "" {
			t.Errorf("observe %v: an idle connection is within the limit", observe)
		}
		use(t, c, Usage{Connections: 1})
		e.Discard(first)
	}
}

func TestConnectionThatIdlesElsewhereMakesRoom(t *testing.T) {
	for _, observe := range []bool{false, true} {
		a, _ := server(t)
		b, _ := server(t)
		c := set().For(tableOf(&table.Cluster{Name: name, LimitsObserve: observe, Limits: table.Limits{Connections: 1}, Endpoints: []balance.Endpoint{endpoint(a), endpoint(b)}}), name)
		first, second := c.Endpoints()[0], c.Endpoints()[1]
		first.Put(get(t, first), time.Now())
		conn := get(t, second)
		if conn.Over != "" {
			t.Errorf("observe %v: %v with nothing in flight", observe, conn.Over)
		}
		second.Discard(conn)
		use(t, c, Usage{Connections: map[bool]int64{false: 0, true: 1}[observe]})
		c.closeIdle(time.Time{})
	}
}

func TestLimitOnPendingRequestsAndDeadlineWhileConnecting(t *testing.T) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(fd) }()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := "127.0.0.1:" + strconv.Itoa(sa.(*syscall.SockaddrInet4).Port)
	for range 3 { // fill the queue: from then on connecting takes for ever
		if c, err := net.DialTimeout("tcp", addr, 50*time.Millisecond); err == nil {
			defer func() { _ = c.Close() }()
		}
	}
	c := set().For(tableOf(&table.Cluster{Name: name, Limits: table.Limits{PendingRequests: 1}, Endpoints: []balance.Endpoint{endpoint(netip.MustParseAddrPort(addr))}}), name)
	e := c.Endpoints()[0]
	began := time.Now()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := e.Get(context.Background(), began.Add(200*time.Millisecond)); err == nil || time.Since(began) > 600*time.Millisecond {
			t.Errorf("%v after %v; want the deadline", err, time.Since(began))
		}
	})
	for c.Usage().PendingRequests == 0 {
		time.Sleep(time.Millisecond)
	}
	if _, err := e.Get(t.Context(), time.Time{}); !errors.Is(err, PendingRequests) {
		t.Errorf("%v; want %v", err, PendingRequests)
	}
	wg.Wait()
	use(t, c, Usage{})
	if e.Active() != 0 {
		t.Errorf("%d active", e.Active())
	}
}

func TestRetriesNeedTheBudgetAndTheLimit(t *testing.T) {
	f := func(cfg table.Cluster, wantAllowed, wantOver bool) {
		t.Helper()
		cfg.Name = name
		c := set().For(tableOf(&cfg), name)
		c.AcquireRetry()
		allowed, over := c.AcquireRetry()
		if allowed != wantAllowed || over != wantOver {
			t.Errorf("second retry: allowed %v, over %v; want %v, %v", allowed, over, wantAllowed, wantOver)
		}
		c.ReleaseRetry()
		c.ReleaseRetry()
		use(t, c, Usage{})
	}
	f(table.Cluster{Budget: retry.Budget{MinConcurrency: 2}}, true, false)
	f(table.Cluster{Budget: retry.Budget{MinConcurrency: 1}}, false, false)
	f(table.Cluster{Budget: retry.Budget{MinConcurrency: 2}, Limits: table.Limits{Retries: 1}}, false, true)
	f(table.Cluster{Budget: retry.Budget{MinConcurrency: 2}, Limits: table.Limits{Retries: 1}, LimitsObserve: true}, true, true)
	f(table.Cluster{Budget: retry.Budget{MinConcurrency: 1}, Limits: table.Limits{Retries: 1}, LimitsObserve: true}, false, true)
}

// A change of health or weight concerns no connection: neither those that idle
// nor those in use, nor what is known of the address.
func TestChangeOfMetadataKeepsConnectionsAndLoad(t *testing.T) {
	a, _ := server(t)
	cs := set()
	c := cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a)}}), name)
	before := c.Endpoints()[0]
	idle, busy := get(t, before), get(t, before)
	before.Put(idle, time.Now())
	changed := endpoint(a)
	changed.Weight = 5
	if cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{changed}}), name) != c {
		t.Fatal("another cluster of the same name")
	}
	after := c.Endpoints()[0]
	if after == before || after.Weight != 5 || after.Active() != 1 {
		t.Fatalf("weight %d, %d active; want 5 and the exchange in flight", after.Weight, after.Active())
	}
	if got := get(t, after); got != idle {
		t.Error("the idle connection was lost")
	}
	busy.Endpoint.Put(busy, time.Now()) // as its exchange does, which began before
	if got := get(t, after); got != busy {
		t.Error("the connection in use was closed when it came back")
	}
	after.Discard(idle)
	after.Discard(busy)
	use(t, c, Usage{})
	if after.Active() != 0 {
		t.Errorf("%d active", after.Active())
	}
}

func TestEndpointThatGoesTakesItsConnectionsWithIt(t *testing.T) {
	a, accepted := server(t)
	cs := set()
	c := cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a), endpoint(a)}}), name)
	if n := len(c.Endpoints()); n != 1 {
		t.Fatalf("an address named twice makes %d endpoints", n)
	}
	e := c.Endpoints()[0]
	idle, busy := get(t, e), get(t, e)
	e.Put(idle, time.Now())
	cs.For(tableOf(&table.Cluster{Name: name}), name)
	use(t, c, Usage{Connections: 1})
	busy.Endpoint.Put(busy, time.Now())
	use(t, c, Usage{})
	for range 2 {
		server := <-accepted
		_ = server.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := server.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.ETIMEDOUT) {
			t.Error("a connection to the endpoint is still open")
		}
	}
}

func TestEjectionLeavesTheEndpointOutUntilTheSweep(t *testing.T) {
	a, b := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")
	policy := &outlier.Policy{Consecutive5xx: 1, Interval: time.Second, BaseEjectionTime: 10 * time.Second, MaxEjectionPercent: 100}
	cs := set()
	c := cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a), endpoint(b)}, Outlier: policy}), name)
	bad := c.Endpoints()[0]
	now := time.Now()
	c.Record(now, bad, outlier.Result{Status: 500})
	if !bad.Ejected() {
		t.Fatal("not ejected")
	}
	for range 50 {
		if c.Pick(nil) == bad {
			t.Fatal("an ejected endpoint was picked")
		}
	}
	// New metadata of the same address does not end the ejection.
	changed := endpoint(a)
	changed.Weight = 2
	next := tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{changed, endpoint(b)}, Outlier: policy})
	cs.For(next, name)
	if !c.Endpoints()[0].Ejected() {
		t.Fatal("a change of weight ended the ejection")
	}
	cs.sweep(now.Add(5*time.Second), next)
	if !c.Endpoints()[0].Ejected() {
		t.Fatal("returned after 5 s of 10 s")
	}
	cs.sweep(now.Add(20*time.Second), next)
	if c.Endpoints()[0].Ejected() || bad.Ejected() {
		t.Fatal("still ejected after 20 s of 10 s")
	}
	// Without the policy there are no ejections.
	c.Record(now.Add(21*time.Second), bad, outlier.Result{Status: 500})
	cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{changed, endpoint(b)}}), name)
	if c.Endpoints()[0].Ejected() {
		t.Fatal("ejected without a policy")
	}
}

func TestPickPrefersEndpointsThatWereNotTried(t *testing.T) {
	a, b := netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2")
	sick := endpoint(b)
	sick.Healthy = false
	cs := set()
	c := cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a), endpoint(b)}}), name)
	tried := c.Endpoints()[0]
	for range 20 {
		if got := c.Pick([]*Endpoint{tried}); got == tried {
			t.Fatal("picked what was tried")
		}
	}
	cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a), sick}}), name)
	if got := c.Pick([]*Endpoint{tried}); got == nil || got.Address != a {
		t.Fatalf("picked %v; want the only healthy one again", got)
	}
	cs.For(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{sick}}), name)
	if got := c.Pick(nil); got != nil {
		t.Fatalf("picked %v; want none", got.Name)
	}
}

func TestSweep(t *testing.T) {
	a, _ := server(t)
	cs := set()
	first := &table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a)}}
	pinned := &table.Cluster{Name: "inbound/127.0.0.1:1", Endpoints: []balance.Endpoint{endpoint(a)}}
	now := time.Now()
	c := cs.For(tableOf(first), name)
	cs.Pin(pinned.Name)
	cs.For(tableOf(pinned), pinned.Name)
	e := c.Endpoints()[0]
	old, young := get(t, e), get(t, e)
	e.Put(old, now.Add(-idleTimeout-time.Second))
	e.Put(young, now)
	cs.sweep(now, tableOf(first))
	use(t, c, Usage{Connections: 1})

	// A new configuration counts without a request.
	second := &table.Cluster{Name: name, Policy: "shop/new", Endpoints: first.Endpoints}
	cs.sweep(now, tableOf(second))
	if c.Config() != second {
		t.Error("the sweep did not apply the new configuration")
	}

	// A cluster that is gone stays while a request holds it.
	c.AcquireRequest()
	cs.sweep(now, &table.Table{})
	if cs.For(tableOf(second), name) != c {
		t.Error("a cluster in use was forgotten")
	}
	busy := get(t, e)
	c.ReleaseRequest()
	cs.sweep(now, &table.Table{})
	if all := cs.All(); len(all) != 1 || all[0].Name != pinned.Name {
		t.Errorf("%d clusters left; want the pinned one", len(all))
	}
	// A request that got hold of it just before must not leave a connection that
	// no sweep finds.
	busy.Endpoint.Put(busy, now)
	use(t, c, Usage{})
}

func TestRunEndsIdleConnections(t *testing.T) {
	a, _ := server(t)
	cs := set()
	var current table.Current
	current.Store(tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{endpoint(a)}}))
	c := cs.For(current.Load(), name)
	e := c.Endpoints()[0]
	e.Put(get(t, e), time.Now())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := cs.Run(ctx, &current); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	use(t, c, Usage{})
}

func TestGetAndPutFromManyGoroutines(t *testing.T) {
	a, _ := server(t)
	cs := set()
	tables := make([]*table.Table, 3)
	for i := range tables {
		ep := endpoint(a)
		ep.Weight = uint32(i + 1)
		tables[i] = tableOf(&table.Cluster{Name: name, Endpoints: []balance.Endpoint{ep}})
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 50 {
				c := cs.For(tables[i%len(tables)], name)
				c.AcquireRequest()
				e := c.Pick(nil)
				conn, err := e.Get(context.Background(), time.Time{})
				if err != nil {
					t.Error(err)
				} else if i%5 == 0 {
					conn.Endpoint.Discard(conn)
				} else {
					conn.Endpoint.Put(conn, time.Now())
				}
				c.ReleaseRequest()
			}
		})
	}
	wg.Wait()
	c := cs.For(tables[0], name)
	c.closeIdle(time.Time{})
	use(t, c, Usage{})
	if n := c.Endpoints()[0].Active(); n != 0 {
		t.Errorf("%d active after all have ended", n)
	}
}

func TestAtFindsAnEndpointThatTheCallerChose(t *testing.T) {
	cs := New(nil, nil, nil)
	var eps []balance.Endpoint
	for _, a := range []string{"10.0.0.9:80", "[fd00::1]:80", "10.0.0.1:81", "10.0.0.1:80"} {
		eps = append(eps, balance.Endpoint{Address: netip.MustParseAddrPort(a), Healthy: false, Weight: 1})
	}
	c := cs.For(&table.Table{Clusters: map[string]*table.Cluster{"a": {Name: "a", Endpoints: eps}}}, "a")
	for _, ep := range eps {
		if e := c.At(ep.Address); e == nil || e.Address != ep.Address {
			t.Errorf("At(%s) = %v", ep.Address, e)
		}
	}
	none := netip.MustParseAddrPort("10.0.0.2:80")
	if n := testing.AllocsPerRun(100, func() { _, _ = c.At(eps[0].Address), c.At(none) }); n != 0 {
		t.Errorf("At allocates %v times: every request asks", n)
	}
	if e := c.At(none); e != nil {
		t.Errorf("an address that is no endpoint gives %s", e.Name)
	}
	c = cs.For(&table.Table{Clusters: map[string]*table.Cluster{"a": {Name: "a"}}}, "a")
	if e := c.At(eps[0].Address); e != nil {
		t.Errorf("an endpoint that has gone is still found: %s", e.Name)
	}
}

// A connection comes from the cluster's source, which is how the rules of a
// captured pod tell it from others.
func TestConnectionsComeFromTheSource(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	cs := New(nil, nil, nil)
	c := cs.For(&table.Table{Clusters: map[string]*table.Cluster{"a": {
		Name: "a", Endpoints: []balance.Endpoint{{Address: netip.MustParseAddrPort(l.Addr().String()), Healthy: true, Weight: 1}},
		Source: netip.MustParseAddr("127.0.0.6"),
	}}}, "a")
	up, err := c.Endpoints()[0].Dial(t.Context(), time.Time{})
	if err != nil {
		t.Skipf("no connection from 127.0.0.6, so this system is none that pods run on: %v", err)
	}
	defer up.Endpoint.Discard(up)
	down, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = down.Close() }()
	if got := netip.MustParseAddrPort(down.RemoteAddr().String()).Addr().String(); got != "127.0.0.6" {
		t.Errorf("the connection came from %s", got)
	}
}
