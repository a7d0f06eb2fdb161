package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The agent of an Envoy writes a bootstrap that only its owner can read, says of
// itself and of the Envoy whether they are ready, and ends when it is told to.
func TestAgent(t *testing.T) {
	dir := t.TempDir()
	ready := false
	envoy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !ready {
			http.Error(w, "initializing", http.StatusServiceUnavailable)
		}
	}))
	defer envoy.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	health := l.Addr().String()
	_ = l.Close()
	roots, token, boot := filepath.Join(dir, "root.crt"), filepath.Join(dir, "token"), filepath.Join(dir, "envoy.json")
	for _, f := range []string{roots, token} {
		if err := os.WriteFile(f, []byte("nothing yet"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- runSidecar(ctx, []string{
			"--namespace=shop", "--workload=payments", "--instance=payments-0", "--control-plane=127.0.0.1:1", "--control-plane-ca=" + roots, "--join-token-file=" + token,
			"--capture", "--pod-ips=10.0.0.7", "--health-address=" + health, "--metrics-address=", "--admin-address=",
			"--sds-address=unix://" + filepath.Join(dir, "sds.sock"), "--write-envoy-bootstrap=" + boot, "--envoy-admin-address=" + strings.TrimPrefix(envoy.URL, "http://"),
		}, io.Discard, io.Discard)
	}()
	defer func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(20 * time.Second):
			t.Error("it does not end")
		}
	}()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if st, err := os.Stat(boot); err == nil {
			if st.Mode().Perm() != 0o600 {
				t.Errorf("the bootstrap has mode %s", st.Mode())
			}
			break
		}
		select {
		case err := <-ended:
			t.Fatalf("it ended: %v", err)
		default:
		}
		if time.Now().After(end) {
			t.Fatal("no bootstrap")
		}
	}
	text, err := os.ReadFile(boot)
	if err != nil || !strings.Contains(string(text), `"CAPTURE":`) || !strings.Contains(string(text), "sds.sock") {
		t.Errorf("%v: %s", err, text)
	}
	for _, path := range []string{"/agent-ready", "/ready"} {
		resp, err := http.Get("http://" + health + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(body), "certificate") {
			t.Errorf("%s without a certificate: %d %s", path, resp.StatusCode, body)
		}
	}
	if err := waitReady(t.Context(), health, 300*time.Millisecond); err == nil || !strings.Contains(err.Error(), "not ready within 300ms") {
		t.Errorf("waited: %v", err)
	}
	client := &http.Client{}
	if err := envoyReady(t.Context(), client, strings.TrimPrefix(envoy.URL, "http://")); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("an Envoy that initialises: %v", err)
	}
	ready = true
	if err := envoyReady(t.Context(), client, strings.TrimPrefix(envoy.URL, "http://")); err != nil {
		t.Errorf("an Envoy that is ready: %v", err)
	}
	client.CloseIdleConnections()
}

// --wait-ready asks at the port of --health-address, wherever that listens, and
// needs no other flag.
func TestWaitReady(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	if err := runSidecar(t.Context(), []string{"--wait-ready=10s", "--health-address=:" + port}, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
}
