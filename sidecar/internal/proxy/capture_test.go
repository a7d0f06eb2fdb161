package proxy_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/admin"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls/mtlstest"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/proxy"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
)

// world is a control plane that answers for a captured address at once: with the
// service that has it, that none has it, or, for what is silent, never.
type world struct {
	table *table.Current

	mu       sync.Mutex
	known    map[string]*table.Destination
	clusters map[string]*table.Cluster
	silent   map[string]bool
	wanted   []string // every call, in order
	now      map[string]bool
	inbound  *table.Inbound
}

func (w *world) Want(keys ...string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range keys {
		w.wanted = append(w.wanted, k)
		w.now[k] = true
	}
	w.publish()
	return nil
}

func (w *world) Forget(keys ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range keys {
		delete(w.now, k)
	}
	w.publish()
}

func (w *world) publish() {
	t := &table.Table{Version: "v1", Destinations: map[string]*table.Destination{}, Clusters: maps.Clone(w.clusters), Inbound: w.inbound}
	for k := range w.now {
		switch d := w.known[k]; {
		case w.silent[k]:
		case d != nil:
			t.Destinations[k] = d
		default:
			t.Destinations[k] = &table.Destination{Key: k, Service: k, Missing: true}
		}
	}
	w.table.Store(t)
}

// times is how often a key was asked for.
func (w *world) times(key string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, k := range w.wanted {
		if k == key {
			n++
		}
	}
	return n
}

// answers says whether anything is said of a key.
func (w *world) answers(key string, does bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.silent[key] = !does
	w.publish()
}

// ask sets what is asked of callers.
func (w *world) ask(mtls string, ports map[uint16]table.InboundPort) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.inbound = &table.Inbound{MTLS: mtls, Ports: ports, Default: table.InboundPort{Protocol: "auto"}}
	if mtls == "" {
		w.inbound = nil
	}
	w.publish()
}

// service puts a service at addresses that are called.
func (w *world) service(key, protocol string, tls *table.TLS, servers []string, called ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	eps := endpoints(servers...)
	for i := range eps {
		eps[i].TLS = tls != nil
	}
	w.clusters[key] = &table.Cluster{Name: key, Endpoints: eps, TLS: tls}
	for _, a := range called {
		w.known[a] = &table.Destination{Key: a, Service: key, Protocol: protocol, Cluster: key, Routes: &route.Config{
			Name: key, Routes: []route.Route{{Name: "default", Clusters: []route.Weighted{{Cluster: key, Weight: 1}}}},
		}}
	}
	w.publish()
}

// captured is a sidecar in the pod's namespace.
type captured struct {
	*mesh
	*pod
	world   *world
	capture *proxy.Capture
}

func capturing(t *testing.T, identity *mtlstest.CA) *captured {
	t.Helper()
	p := inPod(t)
	m := start(t, nil)
	m.proxy.Node.Addresses = []netip.Addr{netip.MustParseAddr(podIPv4), netip.MustParseAddr(podIPv6)}
	if identity != nil {
		own := identity.Identity(t, "shop", "storefront")
		m.proxy.Mutual = mutual(own, false)
		m.clusters.Secure = secure(own)
	}
	w := &world{table: m.table, known: map[string]*table.Destination{}, clusters: map[string]*table.Cluster{}, silent: map[string]bool{}, now: map[string]bool{}}
	w.publish()
	c := &captured{mesh: m, pod: p, world: w}
	c.capture = proxy.NewCapture(m.proxy, w, func(n func() int) *telemetry.Capture { return telemetry.NewCapture(m.registry, n) })
	listen := func(port string) *net.TCPListener {
		// That of the test before may be on its way to be closed.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			l, err := net.Listen("tcp", ":"+port)
			if err == nil {
				return l.(*net.TCPListener)
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	out, in := listen("15001"), listen("15006")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.capture.Serve(ctx, out, in) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	if os.Getenv(lostEnv) != "" {
		return c
	}
	end := time.Now().Add(30 * time.Second)
	for c.capture.Redirected() != nil {
		if time.Now().After(end) {
			t.Fatal(c.capture.Redirected())
		}
		time.Sleep(10 * time.Millisecond)
	}
	return c
}

// line waits for the access log line of a connection or request to a destination.
func (c *captured) line(destination string) map[string]any {
	c.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c.mu.Lock()
		for i := len(c.lines) - 1; i >= 0; i-- {
			if l := c.lines[i]; l["outrigger.destination"] == destination {
				c.mu.Unlock()
				return l
			}
		}
		c.mu.Unlock()
		if time.Now().After(end) {
			c.t.Fatalf("no log line of %s: %v", destination, c.lines)
		}
	}
}

func (c *captured) counts(name, want string) {
	c.t.Helper()
	var got string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		var b strings.Builder
		all, err := c.registry.Gather()
		if err != nil {
			c.t.Fatal(err)
		}
		for _, f := range all {
			if f.GetName() != name {
				continue
			}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					b.WriteString(l.GetValue() + " ")
				}
				fmt.Fprintf(&b, "%v;", m.GetCounter().GetValue())
			}
		}
		if got = b.String(); got == want {
			return
		}
	}
	c.t.Errorf("%s: %q, want %q", name, got, want)
}

func host(address string) string {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return address
	}
	return a.Addr().Unmap().String()
}

func TestPodServiceCall(t *testing.T) {
	c := capturing(t, nil)
	for _, f := range [][3]string{{"shop/four:80", "10.96.0.10:80", "10.2.0.1:80"}, {"shop/six:80", "[fd96::10]:80", "[fd02::1]:80"}} {
		key, vip, server := f[0], f[1], f[2]
		c.world.service(key, "http", nil, []string{server}, vip)
		for range 2 {
			s, r := c.app.get(t, "http://"+vip+"/pay", "")
			if r.Err != "" || s.Role != "peer" || s.At != server || s.Host != strings.TrimSuffix(vip, ":80") && s.Host != vip {
				t.Fatalf("%s: %+v %+v", vip, s, r)
			}
		}
		if l := c.line(key); l["outrigger.route"] != "default" || l["destination.address"] != server || l["http.response.status_code"] != 200.0 {
			t.Errorf("%v", l)
		}
		if n := c.world.times(vip); n != 1 {
			t.Errorf("%s was asked for %d times", vip, n)
		}
	}
	var captured []string
	for _, d := range c.capture.Captured() {
		captured = append(captured, fmt.Sprintf("%s is %s", d.Address, d.Service))
	}
	if diff := cmp.Diff([]string{"10.96.0.10:80 is shop/four:80", "[fd96::10]:80 is shop/six:80"}, captured); diff != "" {
		t.Error(diff)
	}
	// By name and port the metrics know the service, whatever address was called.
	c.counts("outrigger_request_attempts_total", "four.shop.svc original 2;four.shop.svc retry 0;six.shop.svc original 2;six.shop.svc retry 0;")
}

func TestPodTheAddressGetsAnotherService(t *testing.T) {
	c := capturing(t, nil)
	c.world.service("shop/payments:80", "http", nil, []string{"10.2.0.1:80"}, "10.96.0.10:80")
	if s, r := c.app.get(t, "http://10.96.0.10/", ""); s.At != "10.2.0.1:80" {
		t.Fatalf("%+v %+v", s, r)
	}
	c.world.service("shop/basket:80", "http", nil, []string{"10.2.0.2:80"}, "10.96.0.10:80")
	if s, r := c.app.get(t, "http://10.96.0.10/", ""); s.At != "10.2.0.2:80" {
		t.Fatalf("%+v %+v", s, r)
	}
	c.line("shop/basket:80")
}

func TestPodPassthrough(t *testing.T) {
	c := capturing(t, nil)
	for _, to := range []string{"203.0.113.5", "[2001:db8::5]"} {
		for range 3 {
			if s, r := c.app.get(t, "http://"+to+":80/", ""); r.Err != "" || s.At != to+":80" {
				t.Fatalf("%s: %+v %+v", to, s, r)
			}
		}
		if n := c.world.times(to + ":80"); n != 1 {
			t.Errorf("%s was asked for %d times", to, n)
		}
		if l := c.line(to + ":80"); l["outrigger.route"] != "passthrough" || l["outrigger.response_flags"] != "-" || l["http.response.body.bytes"].(float64) < 100 {
			t.Errorf("%v", l)
		}
		// Nobody sniffs: a server that speaks first is heard at once, and the end of one
		// direction is passed on.
		if r := c.app.do(t, order{Do: "say", To: to + ":25"}); r.Got != "220 hello\n" {
			t.Errorf("%+v", r)
		}
	}
	c.counts("outrigger_passthrough_connections_total", "no_service 8;")
	// What nobody serves is reset.
	if r := c.app.do(t, order{Do: "say", To: "203.0.113.5:81", Send: "x"}); r.Err == "" {
		t.Errorf("%+v", r)
	}
	if l := c.line("203.0.113.5:81"); l["outrigger.response_flags"] != "UF" {
		t.Errorf("%v", l)
	}
}

func TestPodSilenceOfTheControlPlanePassesThrough(t *testing.T) {
	c := capturing(t, nil)
	c.world.answers("203.0.113.5:80", false)
	s, r := c.app.get(t, "http://203.0.113.5/", "")
	if s.At != "203.0.113.5:80" || r.Took < 2*time.Second {
		t.Fatalf("%+v %+v; want an answer after 2 s", s, r)
	}
	if s, r = c.app.get(t, "http://203.0.113.5/", ""); s.At != "203.0.113.5:80" || r.Took >= 2*time.Second {
		t.Errorf("the second connection: %+v %+v; want it not to wait", s, r)
	}
	c.counts("outrigger_passthrough_connections_total", "no_answer 2;")
	if l := c.line("203.0.113.5:80"); l["outrigger.route"] != "passthrough" || !strings.Contains(fmt.Sprint(l["error.message"]), "no_answer") {
		t.Errorf("%v", l)
	}
	// The answer counts when it comes.
	c.world.answers("203.0.113.5:80", true)
	c.world.service("shop/payments:80", "http", nil, []string{"10.2.0.1:80"}, "203.0.113.5:80")
	if s, r = c.app.get(t, "http://203.0.113.5/", ""); s.At != "10.2.0.1:80" {
		t.Errorf("%+v %+v", s, r)
	}
}

func TestPodHeadlessCallGoesToTheEndpointThatWasCalled(t *testing.T) {
	c := capturing(t, nil)
	servers := []string{"10.2.0.1:80", "10.2.0.2:80"}
	c.world.service("shop/db:80", "http", nil, servers, servers...)
	c.world.service("shop/bytes:9000", "tcp", nil, []string{"10.2.0.1:9000", "10.2.0.2:9000"}, "10.2.0.2:9000")
	for range 10 {
		for _, server := range servers {
			if s, r := c.app.get(t, "http://"+server+"/", ""); s.At != server {
				t.Fatalf("%s was called, and answered: %+v %+v", server, s, r)
			}
		}
		if r := c.app.do(t, order{Do: "say", To: "10.2.0.2:9000", Send: "x\n"}); r.Got != "x\n" {
			t.Fatalf("%+v", r)
		}
	}
	c.line("shop/bytes:9000")
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lines {
		if l["outrigger.destination"] == "shop/bytes:9000" && l["destination.address"] != "10.2.0.2:9000" {
			t.Errorf("%v", l)
		}
	}
}

// A call to the pod's own Service leaves by the outbound path and comes in by the
// inbound one, with mutual TLS.
func TestPodSelfCall(t *testing.T) {
	c := capturing(t, mtlstest.New(t, "cluster.local"))
	c.world.ask("strict", map[uint16]table.InboundPort{8080: {Protocol: "http"}, 9000: {Protocol: "tcp"}})
	tls := &table.TLS{Identities: []string{storefrontID}, ServerName: "storefront.shop"}
	for vip, at := range map[string]string{"10.96.0.20": podIPv4, "[fd96::20]": "[" + podIPv6 + "]"} {
		c.world.service("shop/storefront:80", "http", tls, []string{at + ":8080"}, vip+":80")
		c.world.service("shop/storefront:9000", "tcp", tls, []string{at + ":9000"}, vip+":9000")
		s, r := c.app.get(t, "http://"+vip+"/", "")
		if s.Role != "app" || s.At != at+":8080" {
			t.Fatalf("%s: %+v %+v; log %v", vip, s, r, c.lines)
		}
		from := map[bool]string{true: "127.0.0.6", false: "::6"}[vip[0] != '[']
		if host(s.From) != from || s.XFCC != "By="+storefrontID+";URI="+storefrontID {
			t.Errorf("the application saw %+v", s)
		}
		if r := c.app.do(t, order{Do: "say", To: vip + ":9000", Send: "x\n"}); r.Got != "x\n" {
			t.Errorf("%+v", r)
		}
		if l := c.line("shop/storefront:8080"); l["outrigger.direction"] != "inbound" || l["outrigger.security"] != "mutual_tls" || l["outrigger.config_version"] != "v1" {
			t.Errorf("%v", l)
		}
	}
}

func TestPodLoopsAreRefused(t *testing.T) {
	c := capturing(t, nil)
	c.world.ask("off", nil)
	refused := func(who *other, to string) {
		t.Helper()
		if r := who.do(t, order{Do: "say", To: to, Send: "GET / HTTP/1.1\r\nhost: x\r\n\r\n"}); r.Err == "" || r.Got != "" {
			t.Errorf("%s: %+v; want it closed", to, r)
		}
	}
	for _, a := range []string{"127.0.0.1", podIPv4, "[" + podIPv6 + "]", "[::1]"} {
		refused(c.app, a+":15001")
		refused(c.app, a+":15006")
	}
	c.counts("outrigger_capture_refused_total", "inbound not_redirected 4;outbound loop 4;")
	for _, a := range []string{podIPv4, "[" + podIPv6 + "]"} {
		refused(c.peer, a+":15001")
		refused(c.peer, a+":15006")
	}
	refused(c.peer, strayIPv4+":8080")
	c.counts("outrigger_capture_refused_total", "inbound not_ours 1;inbound not_redirected 8;outbound loop 4;")
	if l := c.line(strayIPv4 + ":8080"); l["outrigger.response_flags"] != "NR" || !strings.Contains(fmt.Sprint(l["error.message"]), podIPv4) {
		t.Errorf("%v", l)
	}
}

func TestPodInboundFollowsTheControlPlane(t *testing.T) {
	c := capturing(t, mtlstest.New(t, "cluster.local"))
	url := func(a string) string { return "http://" + a + ":8080/" }
	const six = "[" + podIPv6 + "]"
	for _, a := range []string{podIPv4, six} {
		if _, r := c.peer.get(t, url(a), ""); r.Err == "" {
			t.Fatalf("before anything is known: %+v", r)
		}
	}
	c.counts("outrigger_capture_refused_total", "inbound not_configured 2;")

	c.world.ask("permissive", map[uint16]table.InboundPort{8080: {Protocol: "http"}})
	for a, from := range map[string]string{podIPv4: "127.0.0.6", six: "::6"} {
		s, r := c.peer.get(t, url(a), "")
		if s.Role != "app" || s.At != a+":8080" || host(s.From) != from || s.XFCC != "" {
			t.Fatalf("%s: %+v %+v", a, s, r)
		}
	}
	if l := c.line("shop/storefront:8080"); l["outrigger.direction"] != "inbound" || !strings.Contains(fmt.Sprint(l["source.address"]), "1::1") && !strings.Contains(fmt.Sprint(l["source.address"]), "10.1.0.1") {
		t.Errorf("%v", l)
	}
	if _, r := c.peer.get(t, url(podIPv4), "keeps"); r.Status != 200 {
		t.Fatalf("%+v", r)
	}
	// One of the ports that nobody has named: bytes, by what they begin with.
	if r := c.peer.do(t, order{Do: "hold", To: podIPv4 + ":9000", Send: "hello there\n", ID: "bytes"}); r.Got != "hello there\n" {
		t.Fatalf("%+v", r)
	}
	if r := c.peer.do(t, order{Do: "hold", To: podIPv4 + ":8080", Send: "GET / HTTP/1.1\r\nhost: x\r\n\r\n", ID: "idle"}); r.Got != "HTTP/1.1 200 OK\r\n" {
		t.Fatalf("%+v", r)
	}

	c.world.ask("strict", map[uint16]table.InboundPort{8080: {Protocol: "http"}})
	if r := c.peer.do(t, order{Do: "look", ID: "bytes"}); !strings.Contains(r.Err, "reset") {
		t.Errorf("bytes in clear go on: %+v", r)
	}
	if r := c.peer.do(t, order{Do: "look", ID: "idle"}); r.Err != "EOF" {
		t.Errorf("a connection in clear that idles: %+v; want its end", r)
	}
	for _, id := range []string{"keeps", ""} {
		if _, r := c.peer.get(t, url(podIPv4), id); r.Err == "" && r.Status != 403 {
			t.Errorf("in clear, client %q: %+v", id, r)
		}
	}
	// A sidecar's own mutual TLS is served (TestPodSelfCall), and kubelet's probes are.
	at := netip.MustParseAddr(podIPv4)
	ps := admin.NewProbes(map[string]bootstrap.Probe{
		"/app-health/a/livez":  {HTTP: &bootstrap.HTTPProbe{Port: 8080, Path: "/"}, TimeoutSeconds: 10},
		"/app-health/a/readyz": {TCP: &bootstrap.TCPProbe{Port: 9000}, TimeoutSeconds: 10},
	}, at, proxy.SourceFor(at))
	for _, path := range []string{"/app-health/a/livez", "/app-health/a/readyz"} {
		w := httptest.NewRecorder()
		ps.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, http.NoBody))
		if w.Code != 200 {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}

	c.world.ask("", nil)
	if _, r := c.peer.get(t, url(podIPv4), ""); r.Err == "" {
		t.Errorf("after the pod is not known any more: %+v", r)
	}
	c.world.ask("off", nil)
	if s, r := c.peer.get(t, url(podIPv4), ""); s.Role != "app" {
		t.Errorf("off: %+v %+v", s, r)
	}
}

func TestPodStrictWithoutAnIdentityServesNobody(t *testing.T) {
	c := capturing(t, nil)
	c.world.ask("strict", nil)
	if _, r := c.peer.get(t, "http://"+podIPv4+":8080/", ""); r.Err == "" {
		t.Errorf("%+v", r)
	}
	c.counts("outrigger_capture_refused_total", "inbound no_identity 1;")
}

// The first connections to an address wait together.
func TestPodManyAtOnce(t *testing.T) {
	c := capturing(t, nil)
	c.world.service("shop/payments:80", "http", nil, []string{"10.2.0.1:80"}, "10.96.0.10:80")
	if r := c.app.do(t, order{Do: "burst", To: "http://10.96.0.10/", Send: "50"}); r.Err != "" || r.Status != 50 {
		t.Fatalf("%+v", r)
	}
	if n := c.world.times("10.96.0.10:80"); n != 1 {
		t.Errorf("asked for %d times", n)
	}
}

func TestLostSidecarSaysSoAndDoesNotCallItselfForEver(t *testing.T) {
	c := capturing(t, nil)
	r := c.app.do(t, order{Do: "say", To: "203.0.113.5:25"})
	if r.Err == "" || r.Got != "" {
		t.Errorf("%+v; want it closed", r)
	}
	chain, refused := 0, false
	for end := time.Now().Add(20 * time.Second); !refused && time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		chain = 0
		c.mu.Lock()
		for _, l := range c.lines {
			if l["outrigger.destination"] == "203.0.113.5:25" {
				chain++
				refused = refused || strings.HasPrefix(fmt.Sprint(l["error.message"]), "loop: ")
			}
		}
		c.mu.Unlock()
	}
	if !refused || chain > 1000 {
		t.Errorf("refused: %t; connections for one: %d", refused, chain)
	}
	t.Logf("%d connections for one; the application saw %+v", chain, r)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := c.capture.Redirected()
		if err != nil && strings.Contains(err.Error(), "as the user that it was told") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it says of the redirection: %v", err)
		}
	}
}
