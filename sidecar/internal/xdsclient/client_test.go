package xdsclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// controlPlane is go-control-plane's delta server over one linear cache a type.
type controlPlane struct {
	t       *testing.T
	caches  [kinds]*cachev3.LinearCache
	address string

	mu       sync.Mutex
	requests []*discoveryv3.DeltaDiscoveryRequest
	absent   map[string]bool // listeners of which to say that they do not exist
	stop     func()
}

func newControlPlane(t *testing.T) *controlPlane {
	cp := &controlPlane{t: t, address: "127.0.0.1:0", absent: map[string]bool{}}
	for k := range kinds {
		cp.caches[k] = cachev3.NewLinearCache(k.typeURL())
	}
	cp.start()
	return cp
}

// start listens, on the same address as before if there was one.
func (cp *controlPlane) start() {
	cp.t.Helper()
	mux := &cachev3.MuxCache{
		ClassifyDelta: func(r *cachev3.DeltaRequest) string { return r.GetTypeUrl() },
		Caches:        map[string]cachev3.Cache{},
	}
	for k := range kinds {
		mux.Caches[k.typeURL()] = cp.caches[k]
	}
	mux.Caches[listeners.typeURL()] = absentCache{cp.caches[listeners], cp}
	ctx, cancel := context.WithCancel(context.Background())
	srv := serverv3.NewServer(ctx, mux, serverv3.CallbackFuncs{StreamDeltaRequestFunc: func(_ int64, r *discoveryv3.DeltaDiscoveryRequest) error {
		cp.mu.Lock()
		defer cp.mu.Unlock()
		cp.requests = append(cp.requests, r)
		return nil
	}})
	lis, err := net.Listen("tcp", cp.address)
	if err != nil {
		cp.t.Fatal(err)
	}
	cp.address = lis.Addr().String()
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, srv)
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := g.Serve(lis); err != nil {
			cp.t.Error(err)
		}
	}()
	var once sync.Once
	cp.stop = func() {
		once.Do(func() {
			cancel()
			g.Stop()
			<-served
		})
	}
	cp.t.Cleanup(cp.stop)
}

// absentCache says of the names in absent, once, that they do not exist. The
// linear cache leaves a name that it does not have unanswered.
type absentCache struct {
	*cachev3.LinearCache
	cp *controlPlane
}

func (a absentCache) CreateDeltaWatch(r *cachev3.DeltaRequest, sub cachev3.Subscription, out chan cachev3.DeltaResponse) (func(), error) {
	a.cp.mu.Lock()
	defer a.cp.mu.Unlock()
	for name := range sub.SubscribedResources() {
		if a.cp.absent[name] {
			delete(a.cp.absent, name)
			out <- &cachev3.DeltaPassthroughResponse{
				DeltaRequest: r, NextVersionMap: sub.ReturnedResources(),
				DeltaDiscoveryResponse: &discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.GetTypeUrl(), RemovedResources: []string{name}},
			}
			return func() {}, nil
		}
	}
	return a.LinearCache.CreateDeltaWatch(r, sub, out)
}

func (cp *controlPlane) put(k kind, name string, r types.Resource) {
	cp.t.Helper()
	if err := cp.caches[k].UpdateResource(name, r); err != nil {
		cp.t.Fatal(err)
	}
}

// service puts a whole http destination.
func (cp *controlPlane) service(key string, addresses ...string) {
	cp.put(endpoints, key, assignment(key, addresses...))
	cp.put(clusters, key, edsCluster(key, 10))
	cp.put(routes, key, routesTo(key, key))
	cp.put(listeners, listenerPrefix+key, httpListener(key))
}

func (cp *controlPlane) find(what string, ok func(*discoveryv3.DeltaDiscoveryRequest) bool) (found *discoveryv3.DeltaDiscoveryRequest) {
	cp.t.Helper()
	eventually(cp.t, "a request "+what, func() bool {
		cp.mu.Lock()
		defer cp.mu.Unlock()
		for _, r := range cp.requests {
			if ok(r) {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type sidecar struct {
	*Client
	t     *testing.T
	table table.Current
	logs  logs
	stop  func()
}

func startSidecar(t *testing.T, address, file string, wanted ...string) *sidecar {
	t.Helper()
	s := &sidecar{t: t}
	s.Client = New(Options{
		Address: address, StateFile: file, Table: &s.table, Registerer: prometheus.NewRegistry(),
		Log:  slog.New(slog.NewTextHandler(&s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Node: bootstrap.Config{Namespace: "shop", Workload: "front", Instance: "front-0", ServiceAccount: "front", ControlPlane: address},
	})
	if err := s.Want(wanted...); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	var once sync.Once
	s.stop = func() { once.Do(func() { cancel(); <-done }) }
	t.Cleanup(s.stop)
	return s
}

func (s *sidecar) has(want string) {
	s.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		got := show(s.table.Load())
		if got == want {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("table: %s\nwant:  %s\nlog:\n%s", got, want, s.logs.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *sidecar) isReady() {
	s.t.Helper()
	select {
	case <-s.Ready():
	case <-time.After(10 * time.Second):
		s.t.Fatal("not ready")
	}
}

func (s *sidecar) resources() (out []string) {
	for _, r := range s.Status().Resources {
		out = append(out, r.Type+" "+r.Name)
	}
	return out
}

func TestOnlyWhatIsWantedIsFetched(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	cp.service("shop/other:80", "10.0.0.9")
	cp.put(listeners, "outbound/shop/db:5432", tcpListener("shop/db:5432"))
	cp.put(clusters, "shop/db:5432", edsCluster("shop/db:5432", 10))
	cp.put(endpoints, "shop/db:5432", assignment("shop/db:5432", "10.0.0.2"))

	s := startSidecar(t, cp.address, "", "shop/payments:80")
	s.isReady()
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	if diff := cmp.Diff([]string{
		"listener outbound/shop/payments:80", "route shop/payments:80", "cluster shop/payments:80", "endpoints shop/payments:80",
	}, s.resources()); diff != "" {
		t.Error(diff)
	}
	node := cp.find("with a node", func(r *discoveryv3.DeltaDiscoveryRequest) bool { return r.GetNode().GetId() != "" }).GetNode()
	if node.GetId() != "front-0.shop" || node.GetUserAgentName() != bootstrap.UserAgent || node.GetMetadata().GetFields()[bootstrap.MetaWorkload].GetStringValue() != "front" {
		t.Errorf("node = %v", node)
	}

	if err := s.Want("shop/db:5432", "shop/payments:80"); err != nil {
		t.Fatal(err)
	}
	s.has("shop/db:5432 tcp->shop/db:5432 shop/payments:80 http->[shop/payments:80] | shop/db:5432=[10.0.0.2] shop/payments:80=[10.0.0.1]")
	st := s.Status()
	if !st.Connected || st.TableVersion != s.table.Load().Version || st.Types[listeners].Acks < 2 || st.Types[listeners].Nonce == "" {
		t.Errorf("status = %+v", st)
	}
}

func TestEndpointsFollow(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	s := startSidecar(t, cp.address, "", "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	before := s.table.Load()
	cp.put(endpoints, "shop/payments:80", assignment("shop/payments:80", "10.0.0.1", "10.0.0.2"))
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1 10.0.0.2]")
	if before.Destinations["shop/payments:80"] != s.table.Load().Destinations["shop/payments:80"] {
		t.Error("the routes were made anew")
	}
}

func TestWhatIsNoLongerReferredToIsUnsubscribed(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	cp.put(clusters, "shop/next:80", edsCluster("shop/next:80", 1))
	cp.put(endpoints, "shop/next:80", assignment("shop/next:80", "10.0.0.2"))
	s := startSidecar(t, cp.address, "", "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	cp.put(routes, "shop/payments:80", routesTo("shop/payments:80", "shop/next:80"))
	s.has("shop/payments:80 http->[shop/next:80] | shop/next:80=[10.0.0.2]")
	for _, k := range []kind{clusters, endpoints} {
		cp.find("that gives up the old "+k.String(), func(r *discoveryv3.DeltaDiscoveryRequest) bool {
			return r.GetTypeUrl() == k.typeURL() && fmt.Sprint(r.GetResourceNamesUnsubscribe()) == "[shop/payments:80]"
		})
	}
}

func TestMissingDestination(t *testing.T) {
	cp := newControlPlane(t)
	cp.absent["outbound/shop/gone:80"] = true
	s := startSidecar(t, cp.address, "", "shop/gone:80")
	s.isReady()
	s.has("shop/gone:80 missing |")
	cp.service("shop/gone:80", "10.0.0.1")
	s.has("shop/gone:80 http->[shop/gone:80] | shop/gone:80=[10.0.0.1]")
	if err := cp.caches[listeners].DeleteResource("outbound/shop/gone:80"); err != nil {
		t.Fatal(err)
	}
	s.has("shop/gone:80 missing |")
}

func TestNackKeepsTheVersionBefore(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	s := startSidecar(t, cp.address, "", "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	before := s.table.Load()

	cp.put(clusters, "shop/payments:80", edsCluster("shop/payments:80", 0))
	nack := cp.find("with an error", func(r *discoveryv3.DeltaDiscoveryRequest) bool { return r.GetErrorDetail() != nil })
	const want = "cluster shop/payments:80: circuit_breakers.thresholds[0].max_requests: 0 would reject everything; leave it out, or give at least 1"
	if got := nack.GetErrorDetail().GetMessage(); got != want || nack.GetResponseNonce() == "" || nack.GetTypeUrl() != clusters.typeURL() {
		t.Errorf("NACK = %v", nack)
	}
	if s.table.Load() != before {
		t.Error("a rejected cluster changed the table")
	}
	st := s.Status()
	if st.Types[clusters].Nacks != 1 || st.Resources[2].Rejected != want || st.Resources[2].State != "accepted" {
		t.Errorf("status = %+v", st)
	}

	cp.put(clusters, "shop/payments:80", edsCluster("shop/payments:80", 7))
	eventually(t, "the next version", func() bool {
		return s.table.Load().Clusters["shop/payments:80"].Limits.Requests == 7
	})
	if r := s.Status().Resources[2].Rejected; r != "" {
		t.Errorf("still shown as rejected: %s", r)
	}
}

func TestTheTableOutlivesTheControlPlane(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	s := startSidecar(t, cp.address, "", "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	before := s.table.Load()
	version := s.Status().Resources[3].Version

	cp.stop()
	eventually(t, "several attempts", func() bool { return s.Status().Reconnects >= 3 })
	if s.table.Load() != before {
		t.Error("the table changed")
	}
	log := s.logs.String()
	if n := strings.Count(log, "no configuration from the control plane"); n != 1 || !strings.Contains(log, cp.address) || !strings.Contains(log, "--control-plane") {
		t.Errorf("%d warnings in:\n%s", n, log)
	}

	cp.put(endpoints, "shop/payments:80", assignment("shop/payments:80", "10.0.0.2"))
	cp.mu.Lock()
	cp.requests = nil
	cp.mu.Unlock()
	cp.start()
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.2]")
	again := cp.find("for endpoints", func(r *discoveryv3.DeltaDiscoveryRequest) bool { return r.GetTypeUrl() == endpoints.typeURL() })
	if diff := cmp.Diff(map[string]string{"shop/payments:80": version}, again.GetInitialResourceVersions()); diff != "" {
		t.Errorf("initial_resource_versions: %s", diff)
	}
	if before.Destinations["shop/payments:80"] != s.table.Load().Destinations["shop/payments:80"] {
		t.Error("the routes were made anew, though they had not changed")
	}
}

func TestRestartWithoutControlPlane(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	cp.absent["outbound/shop/gone:80"] = true
	file := filepath.Join(t.TempDir(), "last-good")
	const want = "shop/gone:80 missing shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]"

	first := startSidecar(t, cp.address, file, "shop/payments:80", "shop/gone:80")
	first.has(want)
	first.stop()
	version := first.table.Load().Version
	cp.stop()
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("file: %v, %v", info, err)
	}

	// The second destination is wanted later, as an application does that calls it
	// only then.
	second := startSidecar(t, cp.address, file, "shop/payments:80")
	second.isReady()
	if err := second.Want("shop/gone:80"); err != nil {
		t.Fatal(err)
	}
	second.has(want)
	if v := second.table.Load().Version; v != version || !second.Status().FromFile {
		t.Errorf("version %s, before the restart %s; %+v", v, version, second.Status())
	}
	second.stop()

	cp.service("shop/payments:80", "10.0.0.2")
	cp.start()
	third := startSidecar(t, cp.address, file, "shop/payments:80")
	third.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.2]")
}

func TestDamagedFileIsSetAside(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	file := filepath.Join(t.TempDir(), "last-good")
	good, err := encodeLastGood([]saved{{kind: listeners, name: "outbound/shop/payments:80", missing: true}})
	if err != nil {
		t.Fatal(err)
	}
	good[len(good)-1] ^= 1
	if err := os.WriteFile(file, good, 0o600); err != nil {
		t.Fatal(err)
	}
	s := startSidecar(t, cp.address, file, "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	if aside, err := os.ReadFile(file + ".damaged"); err != nil || !bytes.Equal(aside, good) {
		t.Errorf("set aside: %v", err)
	}
	if !strings.Contains(s.logs.String(), "damaged") {
		t.Error("nothing was logged")
	}
	eventually(t, "a new file", func() bool {
		list, err := readLastGood(file)
		return err == nil && len(list) == 4
	})
}

func TestFileThatCannotBeWrittenIsNotFatal(t *testing.T) {
	cp := newControlPlane(t)
	cp.service("shop/payments:80", "10.0.0.1")
	file := filepath.Join(t.TempDir(), "no such directory", "last-good")
	s := startSidecar(t, cp.address, file, "shop/payments:80")
	s.has("shop/payments:80 http->[shop/payments:80] | shop/payments:80=[10.0.0.1]")
	eventually(t, "a warning", func() bool { return strings.Contains(s.logs.String(), "cannot keep the last good configuration") })
}

func TestWantHasALimit(t *testing.T) {
	c := New(Options{Address: "127.0.0.1:1", Table: &table.Current{}})
	for i := range MaxWanted {
		if err := c.Want(fmt.Sprintf("shop/s%d:80", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Want("shop/s0:80"); err != nil {
		t.Errorf("a destination that is wanted already: %v", err)
	}
	if err := c.Want("shop/more:80"); !errors.Is(err, ErrTooManyWanted) || !strings.Contains(err.Error(), "shop/more:80") {
		t.Errorf("one more: %v", err)
	}
	for _, bad := range []string{"", "*", "a b", strings.Repeat("x", 600)} {
		if err := c.Want(bad); err == nil || errors.Is(err, ErrTooManyWanted) {
			t.Errorf("Want(%.20q) = %v", bad, err)
		}
	}
}

func TestNoClearTextOverANetwork(t *testing.T) {
	c := New(Options{Address: "192.0.2.1:15010", Table: &table.Current{}})
	if err := c.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "192.0.2.1:15010") {
		t.Errorf("Run = %v; want a refusal that names the address", err)
	}
}

func TestASidecarThatWantsNothingIsReady(t *testing.T) {
	startSidecar(t, "127.0.0.1:1", "").isReady()
}
