package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const good = `
apiVersion: v1
kind: Service
metadata: {name: payments, namespace: shop}
spec: {ports: [{name: http, port: 80, appProtocol: http}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: CircuitBreaker
metadata: {name: payments, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: payments}]
  trip: {consecutiveFailures: 5}
`

func folder(t *testing.T, content string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "shop.yaml"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDryRun(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if err := execute(t.Context(), []string{"--config", folder(t, good), "--dry-run"}, &stdout, &stderr); err != nil {
		t.Fatalf("%v\n%s", err, &stderr)
	}
	var out struct {
		Problems []any
		Parity   []struct {
			Policy string
			Notes  []struct{ Field, DataPlane, Support string }
		}
		XDS map[string]map[string][]struct{ Name string }
	}
	if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
		t.Fatal(err)
	}
	if len(out.Problems) != 0 || len(out.Parity) != 1 || out.Parity[0].Policy != "shop/payments" {
		t.Fatalf("problems %v, parity %v", out.Problems, out.Parity)
	}
	for _, dp := range []string{"outrigger", "envoy", "grpc"} {
		if c := out.XDS[dp]["type.googleapis.com/envoy.config.cluster.v3.Cluster"]; len(c) != 1 || c[0].Name != "shop/payments:80" {
			t.Errorf("clusters for %s: %v", dp, c)
		}
	}
}

func TestDryRunWithProblemsIsAnError(t *testing.T) {
	var stdout, stderr bytes.Buffer
	bad := strings.Replace(good, "consecutiveFailures: 5", `failureRatio: "5"`, 1)
	err := execute(t.Context(), []string{"--config", folder(t, bad), "--dry-run"}, &stdout, &stderr)
	if !errors.Is(err, errProblems) || !strings.Contains(stderr.String(), "CircuitBreaker shop/payments (shop.yaml:") || !json.Valid(stdout.Bytes()) {
		t.Fatalf("%v\n%s", err, &stderr)
	}
}

func TestErrorsNameTheFlagAndTheRemedy(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := taken.Close(); err != nil {
			t.Error(err)
		}
	}()
	f := func(want string, args ...string) {
		t.Helper()
		if err := execute(t.Context(), args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	dir := folder(t, good)
	f("--config is missing")
	f("--config /nowhere/at/all", "--config", "/nowhere/at/all")
	f("unexpected argument", "--config", dir, "serve")
	f("-log-level", "--config", dir, "--log-level", "loud")
	f("--log-format", "--config", dir, "--log-format", "xml")
	f("--xds-address "+taken.Addr().String()+" is in use", "--config", dir, "--xds-address", taken.Addr().String())
	f("--admin-address "+taken.Addr().String()+" is in use", "--config", dir, "--xds-address", "127.0.0.1:0", "--admin-address", taken.Addr().String())
	f("only a loopback address", "--config", dir, "--xds-address", "0.0.0.0:0")
	f("only a loopback address", "--config", dir, "--xds-address", "127.0.0.1:0", "--admin-address", "0.0.0.0:0")
}

// log is a writer that a running program and the test share.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) field(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		var v map[string]any
		if json.Unmarshal([]byte(line), &v) == nil {
			if s, ok := v[name].(string); ok {
				return s
			}
		}
	}
	return ""
}

func TestRunUntilStopped(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr log
	done := make(chan error, 1)
	dir := folder(t, good)
	go func() {
		done <- execute(ctx, []string{"--config", dir, "--xds-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"}, io.Discard, &stderr)
	}()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + stderr.field("outrigger.admin_address") + path)
		if err != nil {
			return 0, err.Error()
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	eventually := func(path, want string) {
		t.Helper()
		var body string
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			var status int
			if status, body = get(path); status == http.StatusOK && strings.Contains(body, want) {
				return
			}
		}
		t.Fatalf("%s never held %q, last:\n%s", path, want, body)
	}
	eventually("/ready", "ready")
	eventually("/debug/mesh", "shop/payments:80")
	eventually("/debug/proxies", `"applied"`)
	eventually("/debug/xds", "outbound/shop/payments:80")
	eventually("/metrics", "outrigger_rebuild_total")
	// A broken policy: reported, and the last valid version stays in force.
	bad := strings.Replace(good, "consecutiveFailures: 5", `failureRatio: "5"`, 1)
	if err := os.WriteFile(filepath.Join(dir, "shop.yaml"), []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually("/debug/problems", "last valid version of the object stays in force")
	eventually("/debug/mesh", "trips after 5 failures in a row")
	http.DefaultClient.CloseIdleConnections()
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A join token is printed alone, so that it can be written to a file, and the
// folder is made for it; TLS is served with what the folder holds.
func TestAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "authority")
	var stdout bytes.Buffer
	if err := execute(t.Context(), []string{"--authority-dir", dir, "--join-token", "shop/payments", "--join-token-ttl", "1h"}, &stdout, io.Discard); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Fields(stdout.String()); len(lines) != 1 || !strings.HasPrefix(lines[0], "ojt1.") {
		t.Errorf("printed %q", stdout.String())
	}
	for want, args := range map[string][]string{
		"--join-token needs --authority-dir":      {"--join-token", "shop/payments"},
		"--xds-tls-address needs --authority-dir": {"--config", dir, "--xds-tls-address", "127.0.0.1:0"},
		"is not <namespace>/<service account>":    {"--authority-dir", dir, "--join-token", "payments"},
		"write 1m0s to 24h0m0s":                   {"--authority-dir", dir, "--join-token", "shop/payments", "--certificate-ttl", "1s"},
	} {
		if err := execute(t.Context(), args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr log
	done := make(chan error, 1)
	go func() {
		done <- execute(ctx, []string{
			"--config", folder(t, good), "--xds-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0",
			"--authority-dir", dir, "--xds-tls-address", "127.0.0.1:0",
		}, io.Discard, &stderr)
	}()
	var address string
	for deadline := time.Now().Add(5 * time.Second); address == "" && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		address = stderr.field("outrigger.xds_tls_address")
	}
	b, err := os.ReadFile(filepath.Join(dir, "root.crt"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost", NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := c.ConnectionState().PeerCertificates[0].URIs[0].String(); got != "spiffe://cluster.local/ns/outrigger-system/sa/control-plane" {
		t.Errorf("it is %s", got)
	}
	_ = c.Close()
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
