package apptest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// detects tries ports whose protocol nobody has declared, and TLS that is led by
// server name: what Envoy is told must mean there what it means to our sidecar.
func detects(t *testing.T, plane dataPlane) {
	t.Helper()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path) }))
	t.Cleanup(web.Close)
	greeter := accepting(t, func(c net.Conn) { _, _ = io.WriteString(c, "220 hello\r\n"); _, _ = io.Copy(c, c) })
	echo := accepting(t, func(c net.Conn) { _, _ = io.Copy(c, c) })
	a, b := secure(t, "a"), secure(t, "b")

	var services strings.Builder
	for name, port := range map[string]string{"web": web.Listener.Addr().String(), "greeter": greeter, "echo": echo, "tls-a": a, "tls-b": b} {
		_, target, _ := net.SplitHostPort(port)
		fmt.Fprintf(&services, `apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: shop}
spec: {selector: {app: %[1]s}, ports: [{name: any, port: 80, targetPort: %[2]s}]}
---
apiVersion: outrigger.dev/v1alpha1
kind: Workload
metadata: {name: %[1]s, namespace: shop, labels: {app: %[1]s}}
spec: {serviceAccount: %[1]s, endpoints: [{address: 127.0.0.1}]}
---
`, name, target)
	}
	c := startControlPlane(t, map[string]string{"mesh.yaml": services.String(), "route.yaml": `apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: a, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: tls-a, port: 80}]
  hostnames: [a.example.com, "*.a.example.com"]
  rules: [{backendRefs: [{name: tls-a, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: b, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: tls-a, port: 80}]
  hostnames: ["*.example.com"]
  rules: [{backendRefs: [{name: tls-b, port: 80}]}]
`})
	if problems := c.problems(t); len(problems) > 0 {
		t.Fatalf("the control plane does not take the folder:\n%s", strings.Join(problems, "\n"))
	}
	to := map[string]string{}
	where := place{dir: t.TempDir(), admin: freeAddress(t), config: bootstrap.Config{
		Namespace: "shop", Workload: "caller", Instance: "caller-0", ServiceAccount: "caller", ControlPlane: c.xds,
	}}
	for _, name := range []string{"web", "greeter", "echo", "tls-a", "tls-b"} {
		to[name] = freeAddress(t)
		where.config.Upstreams = append(where.config.Upstreams, bootstrap.Upstream{Service: name, Namespace: "shop", Port: 80, Listen: listen(t, to[name])})
	}
	p := plane.start(t, where)
	eventually(t, 10*time.Second, func() string { return p.starting(t) })

	eventually(t, 10*time.Second, func() string {
		if a := call(http.MethodGet, "http://"+to["web"]+"/found"); a.status != http.StatusOK {
			return fmt.Sprintf("HTTP: %v", a)
		}
		return ""
	})
	mark := p.process().stdout.size()
	want(t, "status of a request", call(http.MethodGet, "http://"+to["web"]+"/logged").status, http.StatusOK)
	eventually(t, 5*time.Second, func() string {
		if len(accessLog(t, p.process(), mark, "/logged")) != 1 {
			return "HTTP on a port of unknown protocol is not logged request by request"
		}
		return ""
	})
	want(t, "the greeting of a server that speaks first", talk(t, to["greeter"], "", 11), "220 hello\r\n")
	want(t, "bytes that are not HTTP", talk(t, to["echo"], "*1\r\n$4\r\nPING\r\n", 14), "*1\r\n$4\r\nPING\r\n")
	for name, server := range map[string]string{"a.example.com": "a", "x.y.a.example.com": "a", "c.example.com": "b", "other.test": "", "": ""} {
		want(t, "the server for "+name, ask(to["tls-a"], name), server)
	}
	want(t, "TLS on a port of unknown protocol", ask(to["tls-b"], "whatever.test"), "b")
	if why := p.refused(t); why != "" {
		t.Errorf("configuration is refused:\n%s", why)
	}
}

func TestDetectionOnSidecars(t *testing.T) {
	t.Parallel()
	detects(t, ourSidecar{})
}

func TestDetectionOnEnvoy(t *testing.T) {
	t.Parallel()
	detects(t, realEnvoy{envoyBinary(t)})
}

// accepting serves each connection with handle until the test ends.
func accepting(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				handle(c)
			}()
		}
	}()
	return l.Addr().String()
}

// secure is a TLS server that says its name.
func secure(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	return accepting(t, func(c net.Conn) { _, _ = io.WriteString(tls.Server(c, config), name) })
}

// talk says something and returns the first n bytes of the answer.
func talk(t *testing.T, address, say string, n int) string {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, say); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, n)
	m, _ := io.ReadFull(c, b)
	return string(b[:m])
}

// ask returns which server a client of TLS reaches by a name; empty where none.
func ask(address, serverName string) string {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", address, &tls.Config{ServerName: serverName, InsecureSkipVerify: true})
	if err != nil {
		return ""
	}
	defer func() { _ = c.Close() }()
	b := make([]byte, 1)
	n, _ := io.ReadFull(c, b)
	return string(b[:n])
}
