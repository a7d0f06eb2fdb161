package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// free is an address at which nothing listens.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// quiet are the arguments of a sidecar that binds nothing.
func quiet(more ...string) []string {
	return append([]string{"--workload=storefront", "--namespace=shop", "--control-plane=127.0.0.1:1", "--admin-address=", "--metrics-address=", "--health-address="}, more...)
}

func TestBadFlagsAreNamed(t *testing.T) {
	f := func(want string, args ...string) {
		t.Helper()
		err := runSidecar(t.Context(), args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v; want it to say %q", args, err, want)
		}
	}
	f("--workload is empty")
	f("--trace-ratio 2", quiet("--trace-ratio=2")...)
	f("upstream", quiet("--upstream=nonsense")...)
	f("inbound", quiet("--inbound=nonsense")...)
	f("not-defined", quiet("--not-defined")...)
	f("--control-plane", quiet("--control-plane=10.0.0.1:15010")...)
	f("--memory-limit \"64MB\"", quiet("--memory-limit=64MB")...)
	f("--memory-limit \"1Mi\"", quiet("--memory-limit=1Mi")...)
	f("--control-plane-ca", quiet("--control-plane=10.0.0.1:15010")...)
	f("--join-token-file needs --control-plane-ca", quiet("--join-token-file=x")...)
	f("--control-plane-ca needs --join-token-file", quiet("--control-plane-ca=x")...)
	f("--mtls strict needs a certificate", quiet("--mtls=strict")...)
	f("--sds-address unix:///x needs a certificate", quiet("--sds-address=unix:///x")...)
	f(`--mtls "loud"`, quiet("--mtls=loud")...)
	f("--sds-address", quiet("--control-plane-ca=x", "--join-token-file=x", "--sds-address=0.0.0.0:1")...)
	f("--state-dir", quiet("--state-dir=/dev/null/x")...)
	f("--capture needs --pod-ips", quiet("--capture")...)
	f("10.0.0.7,fd00::7", quiet("--capture", "--pod-ips=")...)
	f(`"127.0.0.1"`, quiet("--capture", "--pod-ips=10.0.0.7,127.0.0.1")...)
	f("leave --inbound out", quiet("--capture", "--pod-ips=10.0.0.7", "--inbound=127.0.0.1:1=127.0.0.1:2")...)
	f("outrigger.dev/mtls", quiet("--capture", "--pod-ips=10.0.0.7", "--control-plane-ca=x", "--join-token-file=x", "--mtls=strict")...)
	f("--drain-minimum 1m0s", quiet("--drain-minimum=1m")...)
	t.Setenv("OUTRIGGER_PROBES", `{"/app-health/a/livez":{"tcp":{"port":80},"timeoutSeconds":1}}`)
	f("OUTRIGGER_PROBES needs --pod-ips", quiet()...)
	t.Setenv("OUTRIGGER_PROBES", `{"/elsewhere":{"tcp":{"port":80},"timeoutSeconds":1}}`)
	f("/app-health/", quiet("--pod-ips=10.0.0.7")...)
}

func TestHelpIsNoFailure(t *testing.T) {
	var out bytes.Buffer
	if err := runSidecar(t.Context(), []string{"--help"}, io.Discard, &out); !errors.Is(err, flag.ErrHelp) || !strings.Contains(out.String(), "-upstream") {
		t.Errorf("%v: %s", err, out.String())
	}
}

// A port in use is named with its flag, and what was begun before it was found
// is undone: the other ports, and the exporter of spans.
func TestPortInUseIsNamedWithItsFlag(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	addr, other := taken.Addr().String(), free(t)
	f := func(want string, args ...string) {
		t.Helper()
		err := runSidecar(t.Context(), args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), "another port") {
			t.Errorf("%q: %v; want %s, the address and the remedy", args, err, want)
		}
		l, err := net.Listen("tcp", other)
		if err != nil {
			t.Fatalf("a port stays bound: %v", err)
		}
		_ = l.Close()
	}
	f("--upstream", quiet("--otlp-endpoint=http://127.0.0.1:1", "--upstream=ledger.shop:80="+other, "--upstream=payments.shop:80="+addr)...)
	f("--inbound", quiet("--upstream=ledger.shop:80="+other, "--inbound=http:"+addr+"=127.0.0.1:8080")...)
	f("--health-address", quiet("--upstream=ledger.shop:80="+other, "--health-address="+addr)...)
}

// TestRunsUntilItIsTold starts the sidecar without a control plane: it is not
// ready, says why, answers NC, and ends in order with its log written.
func TestRunsUntilItIsTold(t *testing.T) {
	health, service := free(t), free(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var access, log lockedBuffer
	ended := make(chan error, 1)
	go func() {
		ended <- runSidecar(ctx, quiet("--health-address="+health, "--upstream=payments.shop:80="+service, "--state-dir="+t.TempDir(), "--drain-timeout=2s"), &access, &log)
	}()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 2 * time.Second}
	ask := func(url string) (int, string) {
		for range 200 {
			resp, err := client.Get(url)
			if err != nil {
				time.Sleep(10 * time.Millisecond)
				continue
			}
			b, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			return resp.StatusCode, string(b)
		}
		return 0, "nothing listens"
	}
	if status, body := ask("http://" + health + "/ready"); status != 503 || !strings.Contains(body, "127.0.0.1:1") {
		t.Errorf("readiness: %d %q; want the control plane that it waits for", status, body)
	}
	if status, body := ask("http://" + health + "/metrics"); status != 200 || !strings.Contains(body, "outrigger_connections_refused_total 0") {
		t.Errorf("metrics: %d, %d bytes", status, len(body))
	}
	if status, body := ask("http://" + service + "/pay?card=1"); status != 503 || !strings.Contains(body, "shop/payments:80") {
		t.Errorf("a call: %d %q", status, body)
	}
	stop()
	select {
	case err := <-ended:
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(8 * time.Second):
		t.Fatal("it does not end")
	}
	if line := access.String(); !strings.Contains(line, `"outrigger.response_flags":"NC"`) || strings.Contains(line, "card") {
		t.Errorf("access log: %s", line)
	}
	if !strings.Contains(log.String(), "sidecar stopped") {
		t.Errorf("log: %s", log.String())
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
