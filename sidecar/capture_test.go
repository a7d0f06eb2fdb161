package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener/redirecttest"
)

const podAddress = "10.1.0.2"

// TestASidecarInAPod runs the whole program in a network namespace. The test is
// both sidecar and caller: what it sends to the pod's address is redirected to the
// inbound listener, as a call to the pod's own Service is.
func TestASidecarInAPod(t *testing.T) {
	if os.Getenv("OUTRIGGER_TEST_POD") != "" {
		inPod(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: a network namespace needs root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("SKIPPED: there is no program ip")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestASidecarInAPod$", "-test.v", "-test.timeout=120s")
	cmd.Env = append(os.Environ(), "OUTRIGGER_TEST_POD=1",
		`OUTRIGGER_PROBES={"/app-health/app/livez":{"http":{"port":8080,"path":"/well"},"timeoutSeconds":5}}`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EINVAL) || strings.Contains(string(out), "no rules: ") {
		t.Skipf("SKIPPED: this system has no network namespaces, or no rules in them: %v\n%s", err, out)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// callers serves a Listener of the name by delta xDS once put is called.
func callers(t *testing.T, name string) (address string, put func()) {
	t.Helper()
	tcp, err := anypb.New(&tcpproxyv3.TcpProxy{ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: "inbound"}})
	if err != nil {
		t.Fatal(err)
	}
	l := &listenerv3.Listener{
		Name:     name,
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"outrigger.dev": {Fields: map[string]*structpb.Value{"mtls": structpb.NewStringValue("permissive")}}}},
		DefaultFilterChain: &listenerv3.FilterChain{Filters: []*listenerv3.Filter{
			{Name: "tcp", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: tcp}},
		}},
	}
	cache := cachev3.NewLinearCache("type.googleapis.com/envoy.config.listener.v3.Listener")
	ctx, cancel := context.WithCancel(context.Background())
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, serverv3.NewServer(ctx, cache, serverv3.CallbackFuncs{}))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { _ = g.Serve(lis) })
	t.Cleanup(func() { cancel(); g.Stop(); served.Wait() })
	return lis.Addr().String(), func() {
		if err := cache.UpdateResource(name, l); err != nil {
			t.Error(err)
		}
	}
}

func inPod(t *testing.T) {
	for _, script := range []string{"ip link set lo up", "ip addr add " + podAddress + "/32 dev lo"} {
		if b, err := exec.CommandContext(t.Context(), "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, b)
		}
	}
	app, err := net.Listen("tcp", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		_, _ = fmt.Fprint(w, host, " ", r.URL.Path)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(app) })
	t.Cleanup(func() { _ = server.Close(); serving.Wait() })

	address, put := callers(t, "inbound/shop/storefront-0")
	ctx, terminate := context.WithCancel(t.Context())
	var said bytes.Buffer
	done := make(chan error, 1)
	go func() {
		done <- runSidecar(ctx, []string{
			"--workload=storefront", "--namespace=shop", "--control-plane=" + address, "--admin-address=", "--metrics-address=",
			"--health-address=127.0.0.1:15021", "--capture", "--pod-ips=" + podAddress, "--drain-timeout=30s", "--drain-minimum=2s",
		}, io.Discard, &said)
	}()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(url string) (int, string) {
		resp, err := client.Get(url)
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err.Error()
		}
		return resp.StatusCode, string(b)
	}
	until := func(url string, status int, says string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			got, body := get(url)
			if got == status && strings.Contains(body, says) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %d %q; want %d %q\n%s", url, got, body, status, says, said.String())
			}
		}
	}
	const ready, service = "http://127.0.0.1:15021/ready", "http://" + podAddress + ":8080/"
	until(ready, 503, "waiting for configuration from the control plane")
	put()
	until(ready, 503, "has netinit run")
	if err := redirecttest.Set(os.Getuid()); err != nil {
		t.Fatalf("no rules: %v", err)
	}
	until(ready, 200, "ready")
	until(service, 200, "127.0.0.6 /")
	until("http://127.0.0.1:15021/app-health/app/livez", 200, "ok")
	until("http://127.0.0.1:15021/app-health/app/readyz", 404, "")

	terminate()
	// What is redirected has nowhere else to go: connections are served until the
	// least time has passed.
	began, served := time.Now(), 0
	for {
		status, body := get(service)
		if status == 200 && body == "127.0.0.6 /" {
			served++
			continue
		}
		break
	}
	if took := time.Since(began); took < 1500*time.Millisecond || served < 2 {
		t.Errorf("after SIGTERM %d requests were served, for %s; want 2 s", served, took)
	}
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if !strings.Contains(said.String(), `"connections_cut":0`) && !strings.Contains(said.String(), "connections_cut=0") {
		t.Errorf("the log does not say that no connection was cut:\n%s", said.String())
	}
}
