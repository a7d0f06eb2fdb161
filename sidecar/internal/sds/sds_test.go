package sds_test

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls/mtlstest"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/sds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a workload's secrets, which a test exchanges.
type source struct {
	mu       sync.Mutex
	secrets  *mtls.Secrets
	replaced chan struct{}
}

func (s *source) Secrets() (*mtls.Secrets, <-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.secrets, s.replaced, nil
}

func (s *source) put(chain string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.secrets = &mtls.Secrets{Chain: []byte(chain), Key: []byte("key of " + chain), Roots: []byte("roots")}
	close(s.replaced)
	s.replaced = make(chan struct{})
}

func newSource() *source { return &source{replaced: make(chan struct{})} }

// serve runs a server until the test ends and returns a client.
func serve(t *testing.T, from sds.Source) (secretv3.SecretDiscoveryServiceClient, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sds.sock")
	l, err := sds.Listen(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := sds.Serve(ctx, l, from, slog.New(slog.DiscardHandler)); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); stop(); wg.Wait() })
	return secretv3.NewSecretDiscoveryServiceClient(conn), path
}

func decode(t *testing.T, value []byte) *tlsv3.Secret {
	t.Helper()
	var s tlsv3.Secret
	if err := proto.Unmarshal(value, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

// state of the world: asked early, answered when there is a certificate, pushed
// when there is another, and nothing when it is acknowledged.
func TestStream(t *testing.T) {
	src := newSource()
	client, _ := serve(t, src)
	str, err := client.StreamSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := receive(t, str.Recv)
	ask := func(nonce string, names ...string) {
		t.Helper()
		if err := str.Send(&discoveryv3.DiscoveryRequest{TypeUrl: sds.SecretType, ResourceNames: names, ResponseNonce: nonce}); err != nil {
			t.Fatal(err)
		}
	}
	ask("", "default")
	quiet(t, got)
	for _, chain := range []string{"one", "two"} {
		src.put(chain)
		r := next(t, got)
		if len(r.GetResources()) != 1 || r.GetVersionInfo() == "" {
			t.Fatalf("%v", r)
		}
		s := decode(t, r.GetResources()[0].GetValue())
		if s.GetName() != "default" || string(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes()) != chain || string(s.GetTlsCertificate().GetPrivateKey().GetInlineBytes()) != "key of "+chain {
			t.Errorf("%s with %q", s.GetName(), s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
		}
		ask(r.GetNonce(), "default")
		quiet(t, got)
	}
	ask("", "default", "ROOTCA")
	if r := next(t, got); len(r.GetResources()) != 2 {
		t.Errorf("%d secrets, want both", len(r.GetResources()))
	}
	ask("", "other")
	select {
	case _, ok := <-got:
		if ok {
			t.Error("there is no such secret, and it was sent")
		}
	case <-time.After(5 * time.Second):
		t.Error("a secret that does not exist is waited for")
	}
}

func TestDelta(t *testing.T) {
	src := newSource()
	src.put("one")
	client, _ := serve(t, src)
	str, err := client.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := receive(t, str.Recv)
	send := func(r *discoveryv3.DeltaDiscoveryRequest) {
		t.Helper()
		r.TypeUrl = sds.SecretType
		if err := str.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"default", "ROOTCA"}})
	first := next(t, got)
	if len(first.GetResources()) != 2 {
		t.Fatalf("%v", first)
	}
	send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: first.GetNonce()})
	src.put("two")
	second := next(t, got)
	if len(second.GetResources()) != 1 || second.GetResources()[0].GetName() != "default" {
		t.Errorf("%v; want what has changed", second)
	}
	send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"default"}})
	quiet(t, got)
	src.put("three")
	quiet(t, got)

	again, err := client.DeltaSecrets(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Send(&discoveryv3.DeltaDiscoveryRequest{
		ResourceNamesSubscribe: []string{"ROOTCA", "default"}, InitialResourceVersions: map[string]string{"ROOTCA": version(first, "ROOTCA")},
	}); err != nil {
		t.Fatal(err)
	}
	if r, err := again.Recv(); err != nil || len(r.GetResources()) != 1 || r.GetResources()[0].GetName() != "default" {
		t.Errorf("%v, %v; want only what the client does not have", r, err)
	}
}

func version(r *discoveryv3.DeltaDiscoveryResponse, name string) string {
	for _, res := range r.GetResources() {
		if res.GetName() == name {
			return res.GetVersion()
		}
	}
	return ""
}

func TestFetch(t *testing.T) {
	src := newSource()
	client, _ := serve(t, src)
	ask := func(typeURL string, names ...string) error {
		_, err := client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{TypeUrl: typeURL, ResourceNames: names})
		return err
	}
	if err := ask("", "default"); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	src.put("one")
	if err := ask(sds.SecretType, "default"); err != nil {
		t.Error(err)
	}
	if err := ask(sds.SecretType, "other"); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), `"other"`) {
		t.Errorf("%v", err)
	}
	if err := ask("type.googleapis.com/envoy.config.cluster.v3.Cluster", "default"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%v", err)
	}
}

// What a real identity hands out is a key pair that TLS takes.
func TestOfAnIdentity(t *testing.T) {
	client, _ := serve(t, mtlstest.New(t, "cluster.local").Identity(t, "shop", "payments"))
	var r *discoveryv3.DiscoveryResponse
	for range 100 {
		var err error
		if r, err = client.FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}}); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if len(r.GetResources()) != 2 {
		t.Fatalf("%v", r)
	}
	c := decode(t, r.GetResources()[0].GetValue()).GetTlsCertificate()
	pair, err := tls.X509KeyPair(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
	if err != nil || pair.Leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/payments" {
		t.Errorf("%v, %v", pair.Leaf, err)
	}
}

// The socket is its owner's alone; what stands in the way is named, and a socket
// that nobody listens on is replaced.
func TestListen(t *testing.T) {
	src := newSource()
	_, path := serve(t, src)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for address, want := range map[string]string{
		"unix://" + path: "in use by another program", "unix://" + plain: "is no socket", "unix://relative": "not absolute",
		"0.0.0.0:0": "would leave the machine", "payments:80": "would leave the machine", "unix:///nowhere/at/all": "/nowhere/at/all",
	} {
		if l, err := sds.Listen(t.Context(), address); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", address, l, err, want)
		}
	}
	dead := filepath.Join(t.TempDir(), "dead.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for _, address := range []string{"unix://" + dead, "127.0.0.1:0"} {
		l, err := sds.Listen(t.Context(), address)
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
	}
}

func receive[T any](t *testing.T, recv func() (T, error)) <-chan T {
	t.Helper()
	out := make(chan T, 16)
	go func() {
		for {
			r, err := recv()
			if err != nil {
				close(out)
				return
			}
			out <- r
		}
	}()
	return out
}

func next[T any](t *testing.T, in <-chan T) T {
	t.Helper()
	select {
	case r, ok := <-in:
		if !ok {
			t.Fatal("the stream has ended")
		}
		return r
	case <-time.After(5 * time.Second):
		t.Fatal("no response within 5s")
	}
	var none T
	return none
}

func quiet[T any](t *testing.T, in <-chan T) {
	t.Helper()
	select {
	case r := <-in:
		t.Fatalf("unexpected: %v", r)
	case <-time.After(50 * time.Millisecond):
	}
}
