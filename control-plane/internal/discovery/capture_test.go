package discovery_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netns"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const (
	podIP      = "10.77.0.2"
	podIP6     = "fd77::2"
	outsideIP  = "10.77.0.1"
	outsideIP6 = "fd77::1"
	envoyUID   = 1337
)

// captured is the mesh of TestEnvoyInACapturedPod, whose pod is web-0.
func captured(mode mesh.MTLS) *mesh.Mesh {
	http := func(key, endpoint string, identities ...string) []mesh.Port {
		return []mesh.Port{{
			Number: 80, Protocol: mesh.HTTP1, Identities: identities,
			Endpoints: []mesh.Endpoint{{Address: netip.MustParseAddrPort(endpoint), Ready: true, MTLS: len(identities) > 0}},
			Routes:    []mesh.Route{{Name: "default", Backends: []mesh.Backend{{Namespace: "shop", Service: key, Port: 80, Weight: 1}}}},
		}}
	}
	strip, moved := "/", "/new"
	payments := http("payments", outsideIP+":9001")
	payments[0].Routes = append([]mesh.Route{
		{
			Name: "shop/r/strip", Match: mesh.Match{Path: mesh.PathMatch{Kind: mesh.Prefix, Value: "/strip"}},
			Filters: &mesh.Filters{
				Request: mesh.HeaderChange{Set: []mesh.Header{{Name: "x-note", Value: "100%"}}}, Rewrite: &mesh.Rewrite{Host: "other", Path: &mesh.PathChange{ReplacePrefix: &strip}},
			},
			Backends: []mesh.Backend{{
				Namespace: "shop", Service: "payments", Port: 80, Weight: 1,
				Filters: &mesh.Filters{Request: mesh.HeaderChange{Add: []mesh.Header{{Name: "x-note", Value: "%PROTOCOL%"}}}},
			}},
		},
		{
			Name: "shop/r/old", Match: mesh.Match{Path: mesh.PathMatch{Kind: mesh.Prefix, Value: "/old"}},
			Filters: &mesh.Filters{Redirect: &mesh.Redirect{Scheme: "https", Port: 443, Host: "shop.example", Path: &mesh.PathChange{ReplacePrefix: &moved}, Status: 301}},
		},
	}, payments[0].Routes...)
	const web, db = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/db"
	return &mesh.Mesh{
		TrustDomain: "cluster.local",
		Services: []mesh.Service{
			{Namespace: "shop", Name: "db", Ports: []mesh.Port{{
				Number: 5432, Protocol: mesh.TCP, Identities: []string{db},
				Endpoints: []mesh.Endpoint{{Address: netip.MustParseAddrPort(outsideIP + ":5433"), Ready: true, MTLS: true}},
			}}},
			{Namespace: "shop", Name: "payments", VIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd96::1")}, Ports: payments},
			{Namespace: "shop", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.96.0.2")}, Ports: http("web", podIP+":8080", web)},
		},
		Instances: []mesh.Instance{{
			Namespace: "shop", Name: "web-0", Workload: "web", ServiceAccount: "web", MTLS: mode,
			Ports: []mesh.InstancePort{{Number: 5432, Protocol: mesh.TCP}, {Number: 8080, Protocol: mesh.HTTP1}},
			Authorizations: []mesh.Authorization{
				{Policy: "shop/admin", Action: mesh.Deny, Rules: []mesh.AuthorizationRule{{Name: "0", Paths: []mesh.PathMatch{{Kind: mesh.Prefix, Value: "/admin"}}, NotPrincipals: []string{db}}}, Ports: []uint16{8080}},
				{Policy: "shop/callers", Action: mesh.Allow, Ports: []uint16{5432, 8080}, Rules: []mesh.AuthorizationRule{
					{Name: "self", Principals: []string{web}}, {Name: "open", Paths: []mesh.PathMatch{{Kind: mesh.Prefix, Value: "/open"}}},
				}},
			},
		}},
	}
}

// TestEnvoyInACapturedPod is a pod in a network namespace of its own, whose
// traffic is redirected as netinit does, with a real Envoy that knows nothing but
// the bootstrap of such a pod: calls to a Service, to nobody that the mesh knows,
// to a single endpoint, to the pod's own Service, and from outside.
func TestEnvoyInACapturedPod(t *testing.T) {
	envoy, pod, outside := envoyBinary(t), newSpace(t), newSpace(t)
	pair(t, pod, outside)
	redirect(t, pod)

	a := newAuthority(t, "cluster.local", time.Now)
	s := newServer(discovery.Options{})
	publish(t, s, captured(mesh.Permissive))
	var plain net.Listener
	controlPlane := outside.listen(outsideIP + ":15012")
	var err error
	if plain, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- s.Serve(ctx, plain, discovery.Secure{
			Listener: controlPlane, Credentials: a.Credentials(), TrustDomain: "cluster.local", MaxAge: a.MaxConnectionAge(), Register: a.Register,
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})

	folder := t.TempDir()
	if err := os.Chmod(filepath.Dir(folder), 0o711); err != nil { // Envoy is another user
		t.Fatal(err)
	}
	socket := filepath.Join(folder, "sds.sock")
	serveSecrets(t, socket, certificate(t, a, "cluster.local", "shop", "web"), a.Roots())
	b, err := bootstrap.Config{
		Namespace: "shop", Workload: "web", Instance: "web-0", ServiceAccount: "web", TrustDomain: "cluster.local",
		ControlPlane: outsideIP + ":15012", ControlPlaneTLS: true, SDS: "unix://" + socket,
		Capture: true, Addresses: []netip.Addr{netip.MustParseAddr(podIP), netip.MustParseAddr(podIP6)},
	}.Envoy("127.0.0.1:15000")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(folder, "envoy.json")
	if err := os.WriteFile(file, b, 0o644); err != nil { // Envoy is another user
		t.Fatal(err)
	}

	say := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			_, _ = fmt.Fprintf(w, "%s %s from %s for %s %q", name, r.RequestURI, host, r.Host, r.Header["X-Note"])
		})
	}
	serveHTTP(t, outside.listen(outsideIP+":9001"), say("payments"))
	serveHTTP(t, pod.listen("[::]:8080"), say("web")) // of both families
	serveGreeting(t, outside.listen(outsideIP+":9002"), "stranger")
	serveGreeting(t, pod.listen("0.0.0.0:5432"), "database")
	serveGreeting(t, pod.listen("0.0.0.0:7000"), "unknown")
	pool := x509.NewCertPool()
	for _, c := range a.Roots() {
		pool.AddCert(c)
	}
	serveGreeting(t, tls.NewListener(outside.listen(outsideIP+":5433"), &tls.Config{
		Certificates: []tls.Certificate{*certificate(t, a, "cluster.local", "shop", "db")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
		MinVersion: tls.VersionTLS13, NextProtos: []string{bootstrap.ProtocolMesh},
	}), "other database")

	log := pod.start(envoyUID, envoy, "-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "--file-flush-interval-msec", "20",
		"--drain-time-s", "1", "--drain-strategy", "immediate") // else what was let in before a change stays for 10 minutes
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Envoy: %.20000s\nstatus: %+v", log, s.Status())
		}
	})
	eventually(t, "Envoy has applied everything", func() bool {
		st := s.Status()
		_, err := outside.get("http://" + podIP + ":8080/open")
		return len(st) == 1 && st[0].Applied && err == nil
	})

	f := func(what string, from *space, url, want string) {
		t.Helper()
		got, err := from.get(url)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	greeted := func(what string, from *space, address, want string) {
		t.Helper()
		if got := from.greeting(address); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	f("a Service at its virtual IP", pod, "http://10.96.0.1/a", "200 payments /a from "+podIP)
	f("a prefix that is cut off, and the headers of a rule and its backend", pod, "http://10.96.0.1/strip/a?q=1", `200 payments /a?q=1 from 10.77.0.2 for other ["100%" "%PROTOCOL%"]`)
	f("nothing is left but the prefix", pod, "http://10.96.0.1/strip", "200 payments / from")
	f("a redirect", pod, "http://10.96.0.1/old/a?q=1", "301 https://shop.example/new/a?q=1")
	greeted("what no Service has passes through", pod, outsideIP+":9002", "stranger")
	greeted("an endpoint of a Service without virtual IP, by mutual TLS", pod, outsideIP+":5433", "other database")
	f("the pod's own Service, by mutual TLS", pod, "http://10.96.0.2/a", "200 web /a from 127.0.0.6")
	f("from outside in clear, as a rule allows", outside, "http://"+podIP+":8080/open", "200 web /open from 127.0.0.6")
	f("from outside in clear, as none does", outside, "http://"+podIP+":8080/a", "403")
	f("a path that is denied", pod, "http://10.96.0.2/admin", "403")
	f("the same path in disguise", pod, "http://10.96.0.2//%61dmin", "403")
	greeted("bytes in clear, of whose rules none can match", outside, podIP+":5432", "")
	for account, want := range map[string]string{"web": "database", "db": ""} {
		c, err := outside.dial(podIP + ":5432")
		if err != nil {
			t.Fatal(err)
		}
		secured := tls.Client(c, &tls.Config{
			Certificates: []tls.Certificate{*certificate(t, a, "cluster.local", "shop", account)}, NextProtos: []string{bootstrap.ProtocolMesh},
			MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // it is the caller that is tested
		})
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(secured, "hello\n")
		line, _ := bufio.NewReader(secured).ReadString('\n')
		if got := strings.TrimSpace(line); got != want {
			t.Errorf("bytes by mutual TLS from %s: %q, want %q", account, got, want)
		}
		_ = c.Close()
	}
	if c, err := outside.dial(podIP + ":5432"); err != nil {
		t.Error(err)
	} else {
		_ = c.SetDeadline(time.Now().Add(3 * time.Second)) // longer than the proxy waits to hear what is spoken
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("who says nothing is told %q", b)
		}
		_ = c.Close()
	}
	greeted("a port that no Service has, whose server speaks first", outside, podIP+":7000", "unknown")
	f("IPv6: a Service at its virtual IP", pod, "http://[fd96::1]/a", "200 payments /a from "+podIP)
	f("IPv6: from outside in clear, as a rule allows", outside, "http://["+podIP6+"]:8080/open", "200 web /open from ::6")
	f("IPv6: from outside in clear, as none does", outside, "http://["+podIP6+"]:8080/a", "403")
	if got, err := outside.get("http://" + podIP + ":15006/"); err == nil {
		t.Errorf("the proxy's own port: %q", got)
	}
	if got, err := pod.get("http://" + podIP + ":15001/"); err == nil {
		t.Errorf("the proxy's own port, from inside: %q", got)
	}
	eventually(t, "the access log names the workload", func() bool {
		return strings.Contains(log.String(), `"service.name":"web"`) && strings.Contains(log.String(), `"outrigger.destination":"shop/payments:80"`)
	})

	publish(t, s, captured(mesh.Strict))
	eventually(t, "nobody is let in in clear", func() bool {
		got, err := outside.get("http://" + podIP + ":8080/open")
		return err != nil && got == "" && outside.greeting(podIP+":7000") == ""
	})
	f("strict: the pod's own Service, by mutual TLS", pod, "http://10.96.0.2/a", "200 web /a from 127.0.0.6")
	m := captured(mesh.Strict)
	m.Instances = nil
	publish(t, s, m)
	eventually(t, "a pod that the control plane does not know serves nobody", func() bool {
		got, err := pod.get("http://10.96.0.2/a")
		return err == nil && strings.HasPrefix(got, "503")
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("OUTRIGGER_ENVOY")
	if path == "" {
		var err error
		if path, err = filepath.Abs("../../../.cache/envoy/envoy"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if os.Getenv("OUTRIGGER_REQUIRE_ENVOY") == "1" {
		t.Fatalf("there is no real Envoy at %s and OUTRIGGER_REQUIRE_ENVOY is 1: run deploy/apptest/envoy.sh", path)
	}
	t.Skipf("SKIPPED: there is no real Envoy at %s: run deploy/apptest/envoy.sh, or name one in OUTRIGGER_ENVOY", path)
	return ""
}

// serveSecrets is what a sidecar does for an Envoy beside it.
func serveSecrets(t *testing.T, path string, cert *tls.Certificate, roots []*x509.Certificate) {
	t.Helper()
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	block := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	private, ok := cert.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		t.Fatalf("key of type %T", cert.PrivateKey)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	var bundle []byte
	for _, c := range roots {
		bundle = append(bundle, block("CERTIFICATE", c.Raw)...)
	}
	cache := cachev3.NewLinearCache(resourcev3.SecretType, cachev3.WithInitialResources(map[string]types.Resource{
		bootstrap.SecretCertificate: &tlsv3.Secret{Name: bootstrap.SecretCertificate, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(block("CERTIFICATE", cert.Certificate[0])), PrivateKey: inline(block("PRIVATE KEY", der)),
		}}},
		bootstrap.SecretRoots: &tlsv3.Secret{Name: bootstrap.SecretRoots, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(bundle),
		}}},
	}))
	lis, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, envoyUID, envoyUID); err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	secretv3.RegisterSecretDiscoveryServiceServer(g, serverv3.NewServer(t.Context(), cache, nil))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.Serve(lis); err != nil {
			t.Errorf("SDS: %v", err)
		}
	})
	t.Cleanup(func() { g.Stop(); wg.Wait() })
}

func serveHTTP(t *testing.T, lis net.Listener, h http.Handler) {
	t.Helper()
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	t.Cleanup(func() { _ = s.Close(); wg.Wait() })
}

// serveGreeting speaks first.
func serveGreeting(t *testing.T, lis net.Listener, text string) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				_, _ = io.WriteString(c, text+"\n")
				_, _ = io.Copy(io.Discard, c) // until the caller has read it
			})
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
}

// space is a network namespace of this test.
type space struct {
	t  *testing.T
	ns netns.NsHandle
}

func newSpace(t *testing.T) *space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: network namespaces need root; nothing outside of them is changed")
	}
	s := &space{t: t}
	var err error
	onThread(func() { s.ns, err = netns.New() })
	if err != nil {
		t.Skipf("SKIPPED: this machine makes no network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := s.ns.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// onThread runs f on a thread that ends with it.
func onThread(f func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // and not unlocked
		f()
	})
	wg.Wait()
}

// do runs f on a thread in the namespace.
func (s *space) do(f func()) {
	s.t.Helper()
	var err error
	onThread(func() {
		if err = netns.Set(s.ns); err == nil {
			f()
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *space) ip(args ...string) {
	s.t.Helper()
	var out []byte
	var err error
	s.do(func() { out, err = exec.CommandContext(s.t.Context(), "ip", args...).CombinedOutput() })
	if err != nil {
		s.t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func (s *space) listen(address string) (l net.Listener) {
	s.t.Helper()
	var err error
	s.do(func() { l, err = net.Listen("tcp", address) })
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

func (s *space) dial(address string) (c net.Conn, err error) {
	s.do(func() { c, err = net.DialTimeout("tcp", address, 5*time.Second) })
	return c, err
}

// get returns the status and body of an answer.
func (s *space) get(url string) (string, error) {
	r, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		s.t.Fatal(err)
	}
	address := r.URL.Host
	if r.URL.Port() == "" {
		address += ":80"
	}
	c, err := s.dial(address)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", r.URL.RequestURI(), r.URL.Host); err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), r)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return fmt.Sprintf("%d %s%s", resp.StatusCode, resp.Header.Get("Location"), body), err
}

// greeting says something and returns the line that the server begins with.
func (s *space) greeting(address string) string {
	c, err := s.dial(address)
	if err != nil {
		return ""
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	r := bufio.NewReader(c)
	if strings.HasSuffix(address, ":5432") {
		_, _ = io.WriteString(c, "hello\n") // connections are judged at the caller's first byte
		_, _ = io.WriteString(c, "hello\n")
		rest, _ := io.ReadAll(r)
		return strings.TrimSpace(string(rest))
	}
	line, _ := r.ReadString('\n')
	return strings.TrimSpace(line)
}

// start runs a program in the namespace until the test ends.
func (s *space) start(uid uint32, name string, args ...string) *output {
	s.t.Helper()
	out := &output{}
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	var err error
	s.do(func() { err = cmd.Start() })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return out
}

type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// pair joins a pod to what is outside of it.
func pair(t *testing.T, pod, outside *space) {
	t.Helper()
	outside.ip("link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(pod.ns)))
	pod.ip("link", "set", "lo", "up")
	outside.ip("link", "set", "lo", "up")
	pod.ip("address", "add", podIP+"/24", "dev", "eth0")
	outside.ip("address", "add", outsideIP+"/24", "dev", "veth0")
	pod.ip("address", "add", podIP6+"/64", "dev", "eth0", "nodad")
	outside.ip("address", "add", outsideIP6+"/64", "dev", "veth0", "nodad")
	pod.ip("address", "add", "::6/128", "dev", "lo")
	pod.ip("link", "set", "eth0", "up")
	outside.ip("link", "set", "veth0", "up")
	pod.ip("route", "add", "default", "via", outsideIP)
	pod.ip("-6", "route", "add", "default", "via", outsideIP6)
}

// redirect is what netinit does, without exclusions.
func redirect(t *testing.T, pod *space) {
	t.Helper()
	c, err := nftables.New(nftables.WithNetNSFd(int(pod.ns)))
	if err != nil {
		t.Fatal(err)
	}
	meta := func(key expr.MetaKey, value []byte) []expr.Any {
		return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
	}
	header := func(offset uint32, op expr.CmpOp, value ...byte) []expr.Any {
		return []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(len(value))},
			&expr.Cmp{Op: op, Register: 1, Data: value},
		}
	}
	lo := meta(expr.MetaKeyOIFNAME, append([]byte("lo"), make([]byte, 14)...))
	uid := meta(expr.MetaKeySKUID, binaryutil.NativeEndian.PutUint32(envoyUID))
	tcp := meta(expr.MetaKeyL4PROTO, []byte{6})
	leave := []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}
	to := func(port uint16) []expr.Any {
		return []expr.Any{&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)}, &expr.Redir{RegisterProtoMin: 1}}
	}
	for _, f := range []struct {
		family              nftables.TableFamily
		source, destination uint32
		inbound, loopback   []byte
	}{
		{nftables.TableFamilyIPv4, 12, 16, []byte{127, 0, 0, 6}, []byte{127}},
		{nftables.TableFamilyIPv6, 8, 24, net.ParseIP("::6"), net.IPv6loopback},
	} {
		table := c.AddTable(&nftables.Table{Family: f.family, Name: "outrigger"})
		chain := func(name string, hook *nftables.ChainHook) func(...[]expr.Any) {
			ch := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest})
			return func(parts ...[]expr.Any) {
				c.AddRule(&nftables.Rule{Table: table, Chain: ch, Exprs: slices.Concat(parts...)})
			}
		}
		out := chain("output", nftables.ChainHookOutput)
		out(lo, header(f.source, expr.CmpOpEq, f.inbound...), leave)
		out(lo, uid, header(f.destination, expr.CmpOpNeq, f.loopback...), tcp, to(bootstrap.PortInbound))
		out(lo, leave)
		out(uid, leave)
		out(header(f.destination, expr.CmpOpEq, f.loopback...), leave)
		out(tcp, to(bootstrap.PortOutbound))
		chain("prerouting", nftables.ChainHookPrerouting)(tcp, to(bootstrap.PortInbound))
	}
	if err := c.Flush(); err != nil {
		t.Skipf("SKIPPED: this kernel redirects nothing by nftables: %v", err)
	}
}
