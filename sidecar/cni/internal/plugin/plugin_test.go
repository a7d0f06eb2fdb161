package plugin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/plugin"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/pods"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/netnstest"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
)

func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" { // copies of this binary are the plugin
		os.Exit(plugin.Main(os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

const patience = 20 * time.Second

// node is where pods are made: plugins, an API server and the network around.
type node struct {
	t       *testing.T
	outside *netnstest.Space
	bin     string // folder of plugins
	asked   atomic.Int32
	answer  atomic.Pointer[func(w http.ResponseWriter)]
	entry   string // of the plugin in the configuration
	main    string // the plugin that gives pods their network
}

// uid of the pod that the tests make.
const uid = "11111111-2222-3333-4444-555555555555"

// newNode has a main plugin that does nothing: its pods have their network
// already.
func newNode(t *testing.T, outside *netnstest.Space) *node {
	t.Helper()
	t.Setenv("GORACE", "atexit_sleep_ms=0") // plugins are short
	n := &node{t: t, outside: outside, bin: t.TempDir(), main: `{"type":"main"}`}
	n.file("main", "#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = ADD ] || exit 0\necho '"+`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"interface":0,"address":"10.77.0.2/24","gateway":"10.77.0.1"}],"dns":{"nameservers":["10.96.0.10"]}}`+"'\n")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	n.file(plugin.Name, string(self))
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n.asked.Add(1)
		(*n.answer.Load())(w)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	_ = s.Listener.Close()
	s.Listener = outside.Listen("tcp4", "127.0.0.1:0")
	s.StartTLS()
	t.Cleanup(s.Close)
	k, err := pods.Config{Server: s.URL, Token: "t", CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	n.file(plugin.Kubeconfig, string(k))
	n.config(plugin.Config{ProxyUID: 1337, Backend: redirect.Auto, ExcludeNamespaces: []string{"kube-system"}})
	n.pod(uid, nil)
	return n
}

func (n *node) file(name, content string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.bin, name), []byte(content), 0o700); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) config(c plugin.Config) {
	n.t.Helper()
	entry, err := c.Entry()
	if err != nil {
		n.t.Fatal(err)
	}
	n.entry = string(entry)
}

func (n *node) answers(fn func(w http.ResponseWriter)) { n.answer.Store(&fn) }

// pod is what the API server says.
func (n *node) pod(uid string, annotations map[string]string) {
	n.t.Helper()
	a, err := json.Marshal(annotations)
	if err != nil {
		n.t.Fatal(err)
	}
	n.answers(func(w http.ResponseWriter) {
		fmt.Fprintf(w, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web-0","namespace":"shop","uid":%q,"annotations":%s},"spec":{"containers":[{"name":"app"}],"initContainers":[{"name":"outrigger-proxy"}]}}`, uid, a)
	})
}

func injected(more ...string) map[string]string {
	a := map[string]string{"outrigger.dev/status": "injected"}
	for i := 0; i < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

// runtime is what containerd does, by the library that it uses.
func (n *node) runtime(pod *netnstest.Space, namespace string, do func(ctx context.Context, c *libcni.CNIConfig, l *libcni.NetworkConfigList, r *libcni.RuntimeConf) error) error {
	n.t.Helper()
	list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":"1.0.0","name":"test","plugins":[%s,%s]}`, n.main, n.entry))
	if err != nil {
		n.t.Fatal(err)
	}
	args := [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", namespace}, {"K8S_POD_NAME", "web-0"}, {"K8S_POD_INFRA_CONTAINER_ID", "c1"}, {"K8S_POD_UID", uid}}
	if namespace == "" {
		args = nil
	}
	n.outside.Do(func() {
		c := libcni.NewCNIConfigWithCacheDir([]string{n.bin}, n.t.TempDir(), nil)
		err = do(n.t.Context(), c, list, &libcni.RuntimeConf{ContainerID: "c1", NetNS: pod.Path(), IfName: "eth0", Args: args})
	})
	return err
}

func (n *node) add(pod *netnstest.Space, namespace string) (types.Result, error) {
	n.t.Helper()
	var res types.Result
	err := n.runtime(pod, namespace, func(ctx context.Context, c *libcni.CNIConfig, l *libcni.NetworkConfigList, r *libcni.RuntimeConf) (err error) {
		res, err = c.AddNetworkList(ctx, l, r)
		return err
	})
	return res, err
}

// captured says where a connection to beyond arrives: with the proxy, or at the
// server.
func captured(t *testing.T, pod *netnstest.Space, address string) string {
	t.Helper()
	c, err := pod.Dial(1000, "", address, patience)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func greet(t *testing.T, s *netnstest.Space, address, with string) {
	t.Helper()
	l := s.Listen("tcp", address)
	ended := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-ended })
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, with)
			_ = c.Close()
		}
	}()
}

func TestAdd(t *testing.T) {
	beyond4, beyond6 := net.JoinHostPort(netnstest.Beyond4, "80"), net.JoinHostPort(netnstest.Beyond6, "80")
	for _, c := range []struct {
		name      string
		namespace string
		pod       map[string]string
		want      string
		asked     int32
	}{
		{"meshed", "shop", injected(), "proxy", 1},
		{"meshed, capture said", "shop", injected("outrigger.dev/capture", "true"), "proxy", 1},
		{"ambassador ports only", "shop", injected("outrigger.dev/capture", "false"), "server", 1},
		{"not meshed", "shop", map[string]string{"a": "b"}, "server", 1},
		{"skipped", "shop", map[string]string{"outrigger.dev/status": "skipped"}, "server", 1},
		{"port excluded", "shop", injected("outrigger.dev/exclude-outbound-ports", "80, 443"), "server", 1},
		{"network excluded", "shop", injected("outrigger.dev/exclude-outbound-cidrs", "198.51.100.0/24,2001:db8::/32"), "server", 1},
		{"network not included", "shop", injected("outrigger.dev/include-outbound-cidrs", "10.96.0.0/12"), "server", 1},
		{"excluded namespace", "kube-system", nil, "server", 0},
		{"no pod", "", nil, "server", 0},
		{"static pod", "shop", map[string]string{"kubernetes.io/config.mirror": "x"}, "server", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod, outside := netnstest.Pair(t, true)
			greet(t, pod, ":15001", "proxy")
			greet(t, outside, ":80", "server")
			n := newNode(t, outside)
			n.pod(uid, c.pod)
			if c.name == "static pod" {
				n.pod("the mirror's", c.pod)
			}
			res, err := n.add(pod, c.namespace)
			if err != nil {
				t.Fatal(err)
			}
			// The result of the plugin before is handed on.
			var b bytes.Buffer
			if err := res.PrintTo(&b); err != nil || !strings.Contains(b.String(), "10.77.0.2/24") || !strings.Contains(b.String(), "10.96.0.10") || !strings.Contains(b.String(), `"eth0"`) {
				t.Errorf("%s, %v", &b, err)
			}
			for _, a := range []string{beyond4, beyond6} {
				if got := captured(t, pod, a); got != c.want {
					t.Errorf("%s: %q, want %q", a, got, c.want)
				}
			}
			if got := n.asked.Load(); got != c.asked {
				t.Errorf("the API server was asked %d times, want %d", got, c.asked)
			}
			// A second time is no other, and the end of the pod is no work.
			if _, err := n.add(pod, c.namespace); err != nil {
				t.Error(err)
			}
			if err := n.runtime(pod, c.namespace, func(ctx context.Context, c *libcni.CNIConfig, l *libcni.NetworkConfigList, r *libcni.RuntimeConf) error {
				return c.DelNetworkList(ctx, l, r)
			}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestItFailsClosed(t *testing.T) {
	status := func(code int) func(w http.ResponseWriter) {
		return func(w http.ResponseWriter) { w.WriteHeader(code) }
	}
	for _, c := range []struct {
		name   string
		set    func(n *node)
		code   uint
		errors []string
	}{
		{"the API server is broken", func(n *node) { n.answers(status(500)) }, types.ErrTryAgainLater, []string{"shop/web-0", "does not start", "500", "is the API server reached"}},
		{"forbidden", func(n *node) { n.answers(status(403)) }, types.ErrTryAgainLater, []string{"403", "may the ServiceAccount outrigger-cni get pods"}},
		{"the token expired", func(n *node) { n.answers(status(401)) }, types.ErrTryAgainLater, []string{"the token expired because the DaemonSet"}},
		{"the pod is gone", func(n *node) { n.answers(status(404)) }, types.ErrTryAgainLater, []string{"deleted meanwhile"}},
		{"another pod of that name", func(n *node) { n.pod("another", injected()) }, types.ErrTryAgainLater, []string{"another pod of that name", uid}},
		{"no credentials", func(n *node) { _ = os.Remove(filepath.Join(n.bin, plugin.Kubeconfig)) }, types.ErrTryAgainLater, []string{"does the DaemonSet outrigger-cni run on this node"}},
		{"a bad list", func(n *node) { n.pod(uid, injected("outrigger.dev/exclude-inbound-ports", "http")) }, types.ErrInvalidNetworkConfig, []string{"outrigger.dev/exclude-inbound-ports", `"http" is not a port`}},
		{"a bad switch", func(n *node) { n.pod(uid, injected("outrigger.dev/capture", "maybe")) }, types.ErrTryAgainLater, []string{`outrigger.dev/capture="maybe"`, "write true or false"}},
		{"a bad configuration", func(n *node) { n.entry = `{"type":"outrigger-cni","outrigger":{"proxyUid":1337,"unknown":1}}` }, types.ErrInvalidNetworkConfig, []string{"unknown"}},
		{"not chained", func(n *node) { n.main, n.entry = n.entry, n.main }, types.ErrInvalidNetworkConfig, []string{"not the first plugin"}},
		{"rules are refused", func(n *node) {
			n.pod(uid, injected())
			n.config(plugin.Config{ProxyUID: 1337, Backend: redirect.IPTables})
			n.t.Setenv("PATH", "/bin/nowhere")
		}, types.ErrInternal, []string{"shop/web-0 is meshed and its traffic cannot be captured, so it does not start", "use --backend nftables"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod, outside := netnstest.Pair(t, false)
			n := newNode(t, outside)
			n.file("main", "#!/bin/sh\n/bin/cat >/dev/null\necho '"+`{"cniVersion":"1.0.0","ips":[]}`+"'\n")
			c.set(n)
			_, err := n.add(pod, "shop")
			var e *types.Error
			if !errors.As(err, &e) || e.Code != c.code {
				t.Fatalf("err = %#v, want code %d", err, c.code)
			}
			for _, want := range c.errors {
				if !strings.Contains(e.Error(), want) {
					t.Errorf("%q is missing in %v", want, e)
				}
			}
		})
	}
}

func TestCheck(t *testing.T) {
	pod, outside := netnstest.Pair(t, true)
	n := newNode(t, outside)
	n.pod(uid, injected())
	check := func() error {
		return n.runtime(pod, "shop", func(ctx context.Context, c *libcni.CNIConfig, l *libcni.NetworkConfigList, r *libcni.RuntimeConf) error {
			if _, err := c.AddNetworkList(ctx, l, r); err != nil {
				return err
			}
			return c.CheckNetworkList(ctx, l, r)
		})
	}
	n.file("main", "#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = ADD ] || exit 0\necho '"+`{"cniVersion":"1.0.0","ips":[]}`+"'\n")
	if err := check(); err != nil {
		t.Error(err)
	}
	// With its rules gone: CHECK alone.
	var err error
	pod.Do(func() { err = redirect.Clean(t.Context()) })
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.exec("CHECK", pod.Path(), `{"cniVersion":"1.0.0","name":"test","type":"outrigger-cni","prevResult":{"cniVersion":"1.0.0"}}`)
	if err == nil || !strings.Contains(out, redirect.ErrMissing.Error()) {
		t.Errorf("%v: %s", err, out)
	}
	// STATUS of CNI 1.1.
	if out, err := n.exec("STATUS", "", `{"cniVersion":"1.1.0","name":"test","type":"outrigger-cni"}`); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if err := os.Remove(filepath.Join(n.bin, plugin.Kubeconfig)); err != nil {
		t.Fatal(err)
	}
	if out, err := n.exec("STATUS", "", `{"cniVersion":"1.1.0","name":"test","type":"outrigger-cni"}`); err == nil || !strings.Contains(out, "has no credentials") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := n.exec("VERSION", "", `{"cniVersion":"1.1.0"}`); err != nil || !strings.Contains(out, `"1.0.0"`) {
		t.Errorf("%v: %s", err, out)
	}
	// The pod and its namespace are gone.
	if out, err := n.exec("DEL", "", `{"cniVersion":"1.0.0","name":"test","type":"outrigger-cni"}`); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// exec runs the plugin by hand.
func (n *node) exec(command, ns, stdin string) (string, error) {
	n.t.Helper()
	var out []byte
	var err error
	n.outside.Do(func() {
		cmd := exec.CommandContext(n.t.Context(), filepath.Join(n.bin, plugin.Name))
		cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID=c1", "CNI_NETNS="+ns, "CNI_IFNAME=eth0", "CNI_PATH="+n.bin,
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID="+uid)
		cmd.Stdin = strings.NewReader(stdin)
		out, err = cmd.CombinedOutput()
	})
	return string(out), err
}

// Behind the bridge plugin that clusters use.
func TestBehindBridge(t *testing.T) {
	outside, pod := netnstest.New(t), netnstest.New(t)
	bin, err := testbed.Bin()
	if err != nil {
		t.Fatal(err)
	}
	outside.Run("ip", "link", "set", "lo", "up")
	outside.Run("ip", "address", "add", netnstest.Beyond4+"/32", "dev", "lo")
	outside.Run("ip", "address", "add", netnstest.Beyond6+"/128", "dev", "lo", "nodad")
	n := newNode(t, outside)
	for _, p := range []string{"bridge", "host-local", "loopback"} {
		b, err := os.ReadFile(filepath.Join(bin, p))
		if errors.Is(err, os.ErrNotExist) {
			t.Skipf("SKIPPED: there is no plugin %s in %s: deploy/testbed/build.sh cluster builds it", p, bin)
		}
		n.file(p, string(b))
	}
	n.main = fmt.Sprintf(`{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.244.1.0/24"}],[{"subnet":"fd00:244:1::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}`, t.TempDir())
	n.pod(uid, injected("outrigger.dev/exclude-outbound-ports", "81"))
	if _, err := n.add(pod, "shop"); err != nil {
		t.Fatal(err)
	}
	greet(t, pod, ":15001", "proxy")
	greet(t, pod, ":15006", "inbound")
	greet(t, outside, ":81", "server")
	for _, host := range []string{netnstest.Beyond4, netnstest.Beyond6} {
		if got := captured(t, pod, net.JoinHostPort(host, "80")); got != "proxy" {
			t.Errorf("%s: %q", host, got)
		}
		if got := captured(t, pod, net.JoinHostPort(host, "81")); got != "server" {
			t.Errorf("%s port 81: %q", host, got)
		}
	}
	for _, host := range []string{"10.244.1.2", "fd00:244:1::2"} {
		if got := captured(t, outside, net.JoinHostPort(host, "8080")); got != "inbound" {
			t.Errorf("%s: %q", host, got)
		}
	}
}
