// Package testbed runs a real kube-apiserver with its etcd on loopback, for tests
// of what talks to a cluster.
//
// It knows how the two are started, where deploy/testbed/build.sh puts them, and
// how they end; there are no nodes and no controllers, so tests write the status
// of pods and the EndpointSlices themselves. A package's TestMain calls Main;
// each test works in a namespace of its own.
package testbed

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// startWithin is how long the API server may take to become ready; on a machine
// that is busy with a build it takes its time.
const startWithin = 90 * time.Second

// Server is a running API server. Its Config is that of a member of
// system:masters; copy it before changing it.
type Server struct {
	Config *rest.Config
	// CA is the root of the API server's certificate, in PEM.
	CA []byte

	dir       string
	etcd, api *process
	apiArgs   []string
}

// Need skips the test, and says how to mend that, where the servers have not
// been built.
func (s *Server) Need(t *testing.T) *Server {
	t.Helper()
	if s == nil {
		t.Skip("SKIPPED: no kube-apiserver and etcd in .cache/testbed/bin: deploy/testbed/build.sh api builds them (some minutes, once)")
	}
	return s
}

// Main is the body of a TestMain: it starts a Server, hands it to use, runs the
// tests and ends it. The Server is nil where it has not been built; tests call
// Need. A server that does not start fails the package.
func Main(m *testing.M, use func(*Server)) {
	os.Exit(run(m, use))
}

func run(m *testing.M, use func(*Server)) int {
	s, err := Start()
	if errors.Is(err, errNotBuilt) {
		return m.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testbed:", err)
		return 1
	}
	defer s.Stop()
	use(s)
	return m.Run()
}

var errNotBuilt = errors.New("not built")

// Bin is the folder of the binaries, whether or not they are there.
func Bin() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("where are we: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, ".golangci.yml")); err == nil {
			return filepath.Join(dir, ".cache", "testbed", "bin"), nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("not in a checkout of the project")
		}
		dir = up
	}
}

// Start runs etcd and the API server until Stop.
func Start() (_ *Server, err error) {
	bin, err := Bin()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"etcd", "kube-apiserver"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, errNotBuilt
		}
	}
	dir, err := os.MkdirTemp("", "outrigger-testbed-")
	if err != nil {
		return nil, fmt.Errorf("a folder: %w", err)
	}
	s := &Server{dir: dir}
	defer func() {
		if err != nil {
			s.Stop()
		}
	}()
	pki, err := newPKI(dir)
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(3)
	if err != nil {
		return nil, err
	}
	etcd, peer := "http://"+ports[0], "http://"+ports[1]
	if s.etcd, err = start(filepath.Join(bin, "etcd"), "--name=testbed", "--data-dir="+filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level=warn",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=testbed="+peer); err != nil {
		return nil, err
	}
	_, port, _ := strings.Cut(ports[2], ":")
	in := func(name string) string { return filepath.Join(dir, name) }
	s.apiArgs = []string{
		filepath.Join(bin, "kube-apiserver"),
		"--etcd-servers=" + etcd, "--secure-port=" + port, "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
		"--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true", "--cert-dir=" + dir,
		"--tls-cert-file=" + in("apiserver.crt"), "--tls-private-key-file=" + in("apiserver.key"), "--client-ca-file=" + in("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local", "--service-account-key-file=" + in("sa.key"), "--service-account-signing-key-file=" + in("sa.key"),
		// Nobody here would create the ServiceAccounts that the plugin wants.
		"--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
	}
	s.CA = pki.ca
	s.Config = &rest.Config{
		Host: "https://" + ports[2], QPS: 1000, Burst: 2000,
		TLSClientConfig: rest.TLSClientConfig{CAData: pki.ca, CertData: pki.adminCert, KeyData: pki.adminKey},
	}
	return s, s.StartAPI()
}

// StartAPI starts the API server again after StopAPI, with all that it knew.
func (s *Server) StartAPI() error {
	var err error
	if s.api, err = start(s.apiArgs[0], s.apiArgs[1:]...); err != nil {
		return err
	}
	return s.ready()
}

// StopAPI takes the API server away, as an outage does.
func (s *Server) StopAPI() { s.api.stop() }

// Stop ends both and removes what they wrote.
func (s *Server) Stop() {
	s.api.stop()
	s.etcd.stop()
	_ = os.RemoveAll(s.dir)
}

func (s *Server) ready() error {
	conf, err := rest.TLSConfigFor(s.Config)
	if err != nil {
		return fmt.Errorf("credentials: %w", err)
	}
	conf.MinVersion = tls.VersionTLS12
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}, Timeout: 5 * time.Second}
	last := errors.New("not asked yet")
	for end := time.Now().Add(startWithin); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		select {
		case <-s.api.done:
			return fmt.Errorf("kube-apiserver ended:\n%s", s.api.output.String())
		case <-s.etcd.done:
			return fmt.Errorf("etcd ended:\n%s", s.etcd.output.String())
		default:
		}
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, s.Config.Host+"/readyz", nil)
		if err != nil {
			return fmt.Errorf("the address: %w", err)
		}
		resp, err := client.Do(req)
		if err != nil {
			last = err
			continue
		}
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		last = errors.New(resp.Status)
	}
	return fmt.Errorf("kube-apiserver is not ready after %s: %w\n%s", startWithin, last, s.api.output.String())
}

// process is a child that ends with its parent.
type process struct {
	cmd    *exec.Cmd
	done   chan struct{}
	output *tail
}

func start(path string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{}), output: &tail{}}
	p.cmd.Stdout, p.cmd.Stderr = p.output, p.output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) stop() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// tail keeps the last 16 KiB that were written.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - 16<<10; n > 0 {
		t.b = bytes.Clone(t.b[n:])
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}

func freePorts(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("a free port: %w", err)
		}
		defer func() { _ = l.Close() }()
		out = append(out, net.JoinHostPort("127.0.0.1", strconv.Itoa(l.Addr().(*net.TCPAddr).Port)))
	}
	return out, nil
}

type pki struct{ ca, adminCert, adminKey []byte }

// newPKI writes what the API server needs into dir.
func newPKI(dir string) (pki, error) {
	var p pki
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p, fmt.Errorf("a key: %w", err)
	}
	caTemplate := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "testbed"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	ca, err := x509.CreateCertificate(rand.Reader, caTemplate, caTemplate, caKey.Public(), caKey)
	if err != nil {
		return p, fmt.Errorf("the root: %w", err)
	}
	p.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca})
	serial := int64(1)
	leaf := func(t *x509.Certificate) (cert, key []byte, err error) {
		serial++
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("a key: %w", err)
		}
		t.SerialNumber, t.NotBefore, t.NotAfter = big.NewInt(serial), caTemplate.NotBefore, caTemplate.NotAfter
		t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		der, err := x509.CreateCertificate(rand.Reader, t, caTemplate, k.Public(), caKey)
		if err != nil {
			return nil, nil, fmt.Errorf("a certificate: %w", err)
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			return nil, nil, fmt.Errorf("a key: %w", err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), nil
	}
	if p.adminCert, p.adminKey, err = leaf(&x509.Certificate{Subject: pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}}); err != nil {
		return p, err
	}
	server, serverKey, err := leaf(&x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver"}, DNSNames: []string{"localhost", "kubernetes.default.svc"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	if err != nil {
		return p, err
	}
	// Of the forms of a key the API server takes SEC 1 for tokens.
	tokens, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return p, fmt.Errorf("a key: %w", err)
	}
	sec1, err := x509.MarshalECPrivateKey(tokens)
	if err != nil {
		return p, fmt.Errorf("a key: %w", err)
	}
	saKey := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})
	for name, text := range map[string][]byte{"ca.crt": p.ca, "apiserver.crt": server, "apiserver.key": serverKey, "sa.key": saKey} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return p, fmt.Errorf("write: %w", err)
		}
	}
	return p, nil
}
