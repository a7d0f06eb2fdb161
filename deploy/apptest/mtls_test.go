package apptest

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// trust is a control plane with an authority.
type trust struct {
	*controlPlane
	dir, address string
}

func newTrust(t *testing.T, files map[string]string) *trust {
	t.Helper()
	tr := &trust{dir: filepath.Join(t.TempDir(), "authority"), address: freeAddress(t)}
	tr.controlPlane = &controlPlane{
		owner: t, mesh: t.TempDir(), xds: freeAddress(t), admin: freeAddress(t),
		arguments: []string{"--authority-dir", tr.dir, "--xds-tls-address", tr.address},
	}
	for name, text := range files {
		tr.put(t, name, text)
	}
	tr.start(t)
	return tr
}

// agent runs a sidecar that has the certificate of a workload of the shop, and
// returns where it serves it.
func (tr *trust) agent(t *testing.T, instance, account string) (sds string) {
	t.Helper()
	dir := t.TempDir()
	token, err := exec.Command(program("control-plane"), "--authority-dir", tr.dir, "--join-token", "shop/"+account).Output()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "token")
	if err := os.WriteFile(file, token, 0o600); err != nil {
		t.Fatal(err)
	}
	sds = "unix://" + filepath.Join(dir, "sds.sock")
	health := freeAddress(t)
	p := launch(t, instance+"/agent", program("sidecar"), "--namespace", "shop", "--workload", account, "--instance", instance+"-agent", "--service-account", account,
		"--control-plane", tr.address, "--control-plane-ca", filepath.Join(tr.dir, "root.crt"), "--join-token-file", file, "--sds-address", sds,
		"--admin-address", "", "--metrics-address", "", "--health-address", health)
	eventually(t, 10*time.Second, func() string {
		p.running(t)
		if status, text := get("http://" + health + "/ready"); status != 200 {
			return "the agent of " + instance + " is not ready: " + text
		}
		return ""
	})
	return sds
}

// fetch gets what an agent serves.
func fetch(t *testing.T, sds string) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	conn, err := grpc.NewClient(sds, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	r, err := secretv3.NewSecretDiscoveryServiceClient(conn).FetchSecrets(t.Context(), &discoveryv3.DiscoveryRequest{ResourceNames: []string{bootstrap.SecretCertificate, bootstrap.SecretRoots}})
	if err != nil {
		t.Fatal(err)
	}
	var cert, roots tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&cert); err != nil {
		t.Fatal(err)
	}
	if err := r.GetResources()[1].UnmarshalTo(&roots); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), cert.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots.GetValidationContext().GetTrustedCa().GetInlineBytes())
	return pair, pool
}

// over makes a request on a TLS connection of its own.
func over(conf *tls.Config, address string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := (&tls.Dialer{Config: conf}).DialContext(ctx, "tcp", address)
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprint(c, "GET /ok HTTP/1.1\r\nHost: shipping\r\n\r\n"); err != nil {
		return 0, err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

func strictWorkload(account, address string) string {
	return strings.Replace(workload("shipping", address), "serviceAccount: shipping\n", "serviceAccount: "+account+"\n  mtls: Strict\n", 1)
}

// TestEnvoysSpeakMutualTLS: two real Envoys get certificates from our authority
// by our SDS and configuration over TLS, and speak mutual TLS with each other,
// and with a client of crypto/tls. Whoever proves nothing, or is not who the
// configuration says, gets nothing.
func TestEnvoysSpeakMutualTLS(t *testing.T) {
	t.Parallel()
	envoy := realEnvoy{envoyBinary(t)}
	house := newWarehouse(t)
	strict, permissive, upstream := freeAddress(t), freeAddress(t), freeAddress(t)
	tr := newTrust(t, map[string]string{"service.yaml": shippingService, "workload.yaml": strictWorkload("shipping", strict)})
	run := func(instance, account string, change func(c *bootstrap.Config)) (sds string) {
		t.Helper()
		sds = tr.agent(t, instance, account)
		c := bootstrap.Config{
			Namespace: "shop", Workload: account, Instance: instance, ServiceAccount: account, TrustDomain: "cluster.local",
			ControlPlane: tr.address, ControlPlaneTLS: true, SDS: sds,
		}
		change(&c)
		p := envoy.start(t, place{dir: t.TempDir(), admin: freeAddress(t), config: c})
		eventually(t, 15*time.Second, func() string { return p.starting(t) })
		if why := p.refused(t); why != "" {
			t.Fatalf("%s has refused its configuration: %s", instance, why)
		}
		return sds
	}
	inbound := func(address string) []bootstrap.Inbound {
		return []bootstrap.Inbound{{Protocol: "http", Listen: listen(t, address), Forward: listen(t, house.addresses[0])}}
	}
	run("shipping-0", "shipping", func(c *bootstrap.Config) { c.MTLS, c.Inbounds = bootstrap.MTLSStrict, inbound(strict) })
	run("shipping-1", "shipping", func(c *bootstrap.Config) { c.MTLS, c.Inbounds = bootstrap.MTLSPermissive, inbound(permissive) })
	sds := run("caller-0", "caller", func(c *bootstrap.Config) {
		c.Upstreams = []bootstrap.Upstream{{Service: "shipping", Namespace: "shop", Port: 80, Listen: listen(t, upstream)}}
	})
	eventually(t, 10*time.Second, func() string {
		if a := call(http.MethodGet, "http://"+upstream+"/ok"); a.status != http.StatusOK {
			return "through both Envoys: " + a.String()
		}
		return ""
	})

	pair, roots := fetch(t, sds)
	client := func() *tls.Config {
		return &tls.Config{
			RootCAs: roots, Certificates: []tls.Certificate{pair}, NextProtos: []string{bootstrap.ProtocolMesh}, InsecureSkipVerify: true,
			VerifyConnection: func(cs tls.ConnectionState) error {
				if _, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots}); err != nil {
					return err
				}
				if got := cs.PeerCertificates[0].URIs[0].String(); got != "spiffe://cluster.local/ns/shop/sa/shipping" {
					return fmt.Errorf("it is %s", got)
				}
				return nil
			},
		}
	}
	for _, address := range []string{strict, permissive} {
		if status, err := over(client(), address); status != http.StatusOK {
			t.Errorf("a client of crypto/tls: %d, %v", status, err)
		}
	}
	if a := call(http.MethodGet, "http://"+permissive+"/ok"); a.status != http.StatusOK {
		t.Errorf("permissive, in clear: %v", a)
	}
	if a := call(http.MethodGet, "http://"+strict+"/ok"); a.status != 0 {
		t.Errorf("strict, in clear: %v", a)
	}
	nobody := client()
	nobody.Certificates = nil
	if status, err := over(nobody, strict); err == nil {
		t.Errorf("without a certificate: %d", status)
	}
	application := client()
	application.NextProtos = []string{"http/1.1"}
	if status, err := over(application, strict); err == nil {
		t.Errorf("as an application would, past the mesh: %d", status)
	}

	// The same address, said to be somebody else's: the caller is not to believe it.
	tr.apply(t, "workload.yaml", strictWorkload("impostor", strict))
	eventually(t, 10*time.Second, func() string {
		if a := call(http.MethodGet, "http://"+upstream+"/ok"); a.status != http.StatusServiceUnavailable {
			return "a destination that is not who it should be: " + a.String()
		}
		return ""
	})
}
