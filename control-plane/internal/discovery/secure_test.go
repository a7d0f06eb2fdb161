package discovery_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	xdsgen "github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// secure is a control plane that is reached over TLS.
type secure struct {
	a       *authority.Authority
	address string
}

func startSecure(t *testing.T, now func() time.Time) secure {
	t.Helper()
	a := newAuthority(t, "cluster.local", now)
	s := newServer(discovery.Options{})
	publish(t, s, shop("127.0.0.1:9"))
	var listeners [2]net.Listener
	for i := range listeners {
		var err error
		if listeners[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- s.Serve(ctx, listeners[0], discovery.Secure{
			Listener: listeners[1], Credentials: a.Credentials(), TrustDomain: "cluster.local", MaxAge: a.MaxConnectionAge(), Register: a.Register,
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return secure{a, listeners[1].Addr().String()}
}

func newAuthority(t *testing.T, trustDomain string, now func() time.Time) *authority.Authority {
	t.Helper()
	a, err := authority.Open(t.Context(), authority.Options{
		Store: authority.Folder(filepath.Join(t.TempDir(), "authority")), TrustDomain: trustDomain, Names: []string{"127.0.0.1"}, Log: slog.New(slog.DiscardHandler), Now: now,
	})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func certificate(t *testing.T, a *authority.Authority, trustDomain, ns, account string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := a.Sign(identity.Identity{TrustDomain: trustDomain, Namespace: ns, ServiceAccount: account}, csr)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{r.Chain[0].Raw}, PrivateKey: key}
}

// ask opens a stream as a node and returns the answer to its first request.
func (s secure) ask(t *testing.T, cert *tls.Certificate, node *corev3.Node) (*discoveryv3.DeltaDiscoveryResponse, error) {
	t.Helper()
	pool := x509.NewCertPool()
	for _, c := range s.a.Roots() {
		pool.AddCert(c)
	}
	conf := &tls.Config{RootCAs: pool}
	if cert != nil {
		conf.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return nil, err
	}
	_ = stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xdsgen.ClusterType, ResourceNamesSubscribe: []string{key}}) // Recv says why
	return stream.Recv()
}

func workloadNode(t *testing.T, id, ns, account string) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{bootstrap.MetaNamespace: ns, bootstrap.MetaServiceAccount: account})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.Node{Id: id, UserAgentName: bootstrap.UserAgent, Metadata: meta}
}

// Over TLS configuration is given to workloads that have proved who they are,
// as whom they have proved to be, and to nobody else.
func TestSecureStreams(t *testing.T) {
	s := startSecure(t, time.Now)
	pay := certificate(t, s.a, "cluster.local", "shop", "pay")
	if r, err := s.ask(t, pay, workloadNode(t, "payments-0.shop", "shop", "pay")); err != nil || len(r.GetResources()) != 1 {
		t.Fatalf("%v, %v", r, err)
	}
	foreign := newAuthority(t, "other.example", time.Now)
	stranger := newAuthority(t, "cluster.local", time.Now)
	yesterday := startSecure(t, func() time.Time { return time.Now().Add(-48 * time.Hour) })
	for name, f := range map[string]struct {
		cert *tls.Certificate
		node *corev3.Node
		code codes.Code
		say  string
	}{
		"no certificate":          {nil, workloadNode(t, "payments-0.shop", "shop", "pay"), codes.Unauthenticated, "present a client certificate of trust domain cluster.local"},
		"another namespace":       {pay, workloadNode(t, "payments-0.bank", "bank", "pay"), codes.PermissionDenied, `namespace "bank" and service account "pay"`},
		"another account":         {pay, workloadNode(t, "payments-0.shop", "shop", "admin"), codes.PermissionDenied, "spiffe://cluster.local/ns/shop/sa/pay"},
		"another node id":         {pay, workloadNode(t, "payments-0.bank", "shop", "pay"), codes.PermissionDenied, `node "payments-0.bank" is not <instance>.shop`},
		"no metadata":             {pay, &corev3.Node{Id: "payments-0.shop"}, codes.PermissionDenied, `namespace ""`},
		"a foreign trust domain":  {certificate(t, foreign, "other.example", "shop", "pay"), workloadNode(t, "payments-0.shop", "shop", "pay"), codes.Unavailable, ""},
		"a root that is not ours": {certificate(t, stranger, "cluster.local", "shop", "pay"), workloadNode(t, "payments-0.shop", "shop", "pay"), codes.Unavailable, ""},
		"an expired certificate":  {certificate(t, yesterday.a, "cluster.local", "shop", "pay"), workloadNode(t, "payments-0.shop", "shop", "pay"), codes.Unavailable, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := s.ask(t, f.cert, f.node)
			if err == nil || grpcstatus.Code(err) != f.code || !strings.Contains(err.Error(), f.say) {
				t.Errorf("%v, %v; want %s and %q", r.GetResources(), err, f.code, f.say)
			}
		})
	}
}
