package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

func certFiles(t *testing.T) (certFile, keyFile string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := os.WriteFile(certFile, certPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return certFile, keyFile, pool
}

// The whole program: a review over HTTPS is answered with a patch and counted,
// readiness and metrics are on the other port, and it ends when told to.
func TestProgram(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	certFile, keyFile, pool := certFiles(t)
	conf, err := parse([]string{"--listen=127.0.0.1:0", "--admin-address=127.0.0.1:0", "--tls-cert=" + certFile, "--tls-key=" + keyFile, "--image=outrigger/sidecar:1", "--control-plane=cp.outrigger-system:15012"}, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	addrs, done := make(chan [2]net.Addr, 1), make(chan error, 1)
	var log bytes.Buffer
	go func() {
		done <- serve(ctx, conf, &log, func(webhook, admin net.Addr) { addrs <- [2]net.Addr{webhook, admin} })
	}()
	var at [2]net.Addr
	select {
	case at = <-addrs:
	case err := <-done:
		t.Fatal(err)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}
	do := func(method, url, body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := tr.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s %v\n%s", url, resp.Status, err, b)
		}
		_ = resp.Body.Close()
		return string(b)
	}
	if got := do("GET", "http://"+at[1].String()+"/ready", ""); got != "ready\n" {
		t.Errorf("/ready: %q", got)
	}
	answer := do("POST", "https://"+at[0].String()+"/mutate", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u1","operation":"CREATE","namespace":"shop",`+
		`"resource":{"group":"","version":"v1","resource":"pods"},"object":{"metadata":{"name":"web"},"spec":{"containers":[{"name":"app"}]}}}}`)
	if !strings.Contains(answer, `"uid":"u1","allowed":true`) || !strings.Contains(answer, `"patchType":"JSONPatch"`) {
		t.Errorf("answer %s", answer)
	}
	if got := do("GET", "http://"+at[1].String()+"/metrics", ""); !strings.Contains(got, `outrigger_injections_total{result="injected"} 1`) || !strings.Contains(got, "outrigger_certificate_expiry_timestamp_seconds") {
		t.Errorf("metrics: %s", got)
	}
	tr.CloseIdleConnections()
	cancel()
	if err := <-done; err != nil {
		t.Errorf("the end: %v", err)
	}
	if !strings.Contains(log.String(), `"kubernetes.pod.name":"web"`) {
		t.Errorf("log: %s", log.String())
	}
}

func TestFlags(t *testing.T) {
	ok := []string{"--tls-cert=c", "--tls-key=k", "--image=i", "--control-plane=h:1"}
	f := func(want string, args ...string) {
		t.Helper()
		_, err := parse(append(args, ok...), io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
	if _, err := parse(ok, io.Discard, io.Discard); err != nil {
		t.Error(err)
	}
	f("-nope", "--nope")
	f(`"much" is not a positive quantity`, "--proxy-cpu=much")
	f(`pull policy "Sometimes"`, "--image-pull-policy=Sometimes")
	if _, err := parse(ok[2:], io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "--tls-cert and --tls-key are required, or --self-signed") {
		t.Errorf("no certificate: %v", err)
	}
	if _, err := parse(ok[:3], io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), `control plane ""`) {
		t.Errorf("no control plane: %v", err)
	}
	if _, err := parse(append([]string{}, append(ok, "more")...), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), `unexpected argument "more"`) {
		t.Errorf("more: %v", err)
	}
	if err := execute(t.Context(), append(ok, "--tls-cert=/none", "--tls-key=/none"), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "mount the Secret") {
		t.Errorf("no files: %v", err)
	}
	var out bytes.Buffer
	if err := execute(t.Context(), []string{"--version"}, &out, io.Discard); !errors.Is(err, flag.ErrHelp) || !strings.HasPrefix(out.String(), "injector ") {
		t.Errorf("--version: %q, %v", out.String(), err)
	}
}
