package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/plugin"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/pods"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 30 * time.Second

// What becomes of a configuration that is joined, and of one that is left again.
func TestConfigurations(t *testing.T) {
	entry, err := plugin.Config{ProxyUID: 1337, Backend: redirect.Auto, ExcludeNamespaces: []string{"kube-system"}}.Entry()
	if err != nil {
		t.Fatal(err)
	}
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		path := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(path, []byte(c.Input("before")), 0o600); err != nil {
			t.Fatal(err)
		}
		text := func(o object, err error) string {
			if err != nil {
				return strings.ReplaceAll(err.Error(), path, "FILE") + "\n"
			}
			b, err := encode(o)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		_, o, list, err := readConfig(path)
		if err != nil {
			c.Want("joined", text(nil, err))
			return
		}
		if !list {
			if o, err = listOf(o); err != nil {
				t.Fatal(err)
			}
		}
		joined, changed, err := chain(o, entry)
		c.Want("joined", text(joined, err))
		if err != nil {
			return
		}
		if !changed {
			t.Error("it says that nothing changes")
		}
		// libcni, which runtimes read it with, finds the plugins in their order.
		l, err := libcni.ConfListFromBytes([]byte(text(joined, nil)))
		if err != nil || l.Plugins[len(l.Plugins)-1].Network.Type == "" {
			t.Errorf("libcni: %v", err)
		}
		if _, again, err := chain(joined, entry); again || err != nil {
			t.Errorf("once more: %v, %v", again, err)
		}
		left, changed, err := unchain(joined)
		if err != nil || !changed {
			t.Errorf("unchain: %v, %v", changed, err)
		}
		if again, changed, err := unchain(left); changed || err != nil {
			t.Errorf("unchain once more: %v, %v, %v", again, changed, err)
		}
		c.Want("left", text(left, err))
	})
}

// host is a node's folders with an installer.
type host struct {
	t                          *testing.T
	bin, conf, secrets, health string
	log                        *output
	stop                       func() error
}

// output is written and read at a time.
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

const flannel = `{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"hairpinMode":true,"mtu":1450}},{"type":"portmap","capabilities":{"portMappings":true}}]}`

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, bin: t.TempDir(), conf: t.TempDir(), secrets: t.TempDir(), log: &output{}}
	h.write(filepath.Join(h.secrets, "token"), "first\n")
	h.write(filepath.Join(h.secrets, "ca.crt"), "authority")
	return h
}

func (h *host) write(path, content string) {
	h.t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) read(path string) string {
	h.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// run starts the installer; stop ends it and returns what Run did.
func (h *host) run(args ...string) {
	h.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	h.health = l.Addr().String()
	if err := l.Close(); err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.t.Context())
	ended := make(chan error, 1)
	args = append([]string{"--bin-dir=" + h.bin, "--conf-dir=" + h.conf, "--token-file=" + filepath.Join(h.secrets, "token"), "--ca-file=" + filepath.Join(h.secrets, "ca.crt"), "--health-address=" + h.health, "--log-format=text", "--interval=2s"}, args...)
	go func() { ended <- Run(ctx, args, Environment{APIServer: "https://10.96.0.1:443"}, io.Discard, h.log) }()
	stopped := sync.OnceValue(func() error { cancel(); return <-ended })
	h.stop = stopped
	h.t.Cleanup(func() { _ = stopped() })
}

// until waits for what has to come.
func (h *host) until(what string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("%s did not happen\n%s", what, h.log)
		}
	}
}

func (h *host) ready() string {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + h.health + "/ready")
	if err != nil {
		return err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// types of the plugins in a list.
func pluginTypes(content string) []string {
	var l struct {
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal([]byte(content), &l); err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, p := range l.Plugins {
		out = append(out, p.Type)
	}
	return out
}

func (h *host) types(name string) string {
	b, err := os.ReadFile(filepath.Join(h.conf, name))
	if err != nil {
		return ""
	}
	return strings.Join(pluginTypes(string(b)), " ")
}

func TestInstall(t *testing.T) {
	h := newHost(t)
	ready := filepath.Join(t.TempDir(), "ready")
	h.run("--ready-file="+ready, "--exclude-namespaces=kube-system,mesh", "--proxy-uid=2000")
	h.until("not ready", func() bool { return strings.Contains(h.ready(), "there is no CNI configuration yet") })
	if _, err := os.Stat(ready); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the ready file: %v", err)
	}

	// The network plugin comes.
	list := filepath.Join(h.conf, "10-flannel.conflist")
	h.write(list, flannel)
	h.until("ready", func() bool { return h.ready() == "ready" })
	if got := h.types("10-flannel.conflist"); got != "flannel portmap outrigger-cni" {
		t.Errorf("plugins %s", got)
	}
	if s := h.read(list); !strings.Contains(s, `"mtu": 1450`) || !strings.Contains(s, `"proxyUID": 2000`) || !strings.Contains(s, `"mesh"`) {
		t.Error(s)
	}
	if info, err := os.Stat(list); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the mode changed: %v, %v", info.Mode(), err)
	}
	h.until("the ready file", func() bool { _, err := os.Stat(ready); return err == nil })
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(h.bin, plugin.Name)
	if got := h.read(binary); got != string(self) {
		t.Error("the binary is another")
	}
	if info, err := os.Stat(binary); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	credentials := filepath.Join(h.bin, plugin.Kubeconfig)
	if info, err := os.Stat(credentials); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	k, err := pods.Load(credentials)
	if err != nil || k.Token != "first" || k.Server != "https://10.96.0.1:443" || string(k.CA) != "authority" {
		t.Errorf("%+v, %v", k, err)
	}

	// The token is renewed, as kubelet does it: by a rename.
	h.write(filepath.Join(h.secrets, "next"), "second")
	if err := os.Rename(filepath.Join(h.secrets, "next"), filepath.Join(h.secrets, "token")); err != nil {
		t.Fatal(err)
	}
	h.until("the new token", func() bool { k, err := pods.Load(credentials); return err == nil && k.Token == "second" })

	// Whatever is damaged is mended.
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	h.until("the binary again", func() bool { _, err := os.Stat(binary); return err == nil })
	if err := os.Chmod(credentials, 0o644); err != nil {
		t.Fatal(err)
	}
	h.until("the mode again", func() bool { info, err := os.Stat(credentials); return err == nil && info.Mode().Perm() == 0o600 })
	h.write(list, strings.Replace(flannel, "1450", "1400", 1))
	h.until("the entry again", func() bool { return h.types("10-flannel.conflist") == "flannel portmap outrigger-cni" })
	if s := h.read(list); !strings.Contains(s, `1400`) {
		t.Errorf("what the network plugin wrote is gone: %s", s)
	}

	// A broken configuration is said, and left to its owner.
	h.write(list, `{"plugins":`)
	h.until("not ready", func() bool { return strings.Contains(h.ready(), "unexpected end of JSON") })
	if h.read(list) != `{"plugins":` {
		t.Error("it was changed")
	}
	h.write(list, flannel)
	h.until("ready", func() bool { return h.ready() == "ready" })

	// Another network plugin takes over, by a name that sorts before.
	h.write(filepath.Join(h.conf, "05-cilium.conflist"), `{"name":"cilium","cniVersion":"1.0.0","plugins":[{"type":"cilium-cni"}]}`)
	h.until("the other list", func() bool { return h.types("05-cilium.conflist") == "cilium-cni outrigger-cni" })

	// Not asked to remove anything, it leaves all as it is.
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if got := h.types("05-cilium.conflist"); got != "cilium-cni outrigger-cni" {
		t.Errorf("after the end: %s", got)
	}
	if _, err := os.Stat(ready); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the ready file remains: %v", err)
	}
	entries, err := filepath.Glob(filepath.Join(h.conf, ".*"))
	if more, _ := filepath.Glob(filepath.Join(h.bin, ".*")); err != nil || len(entries)+len(more) > 0 {
		t.Errorf("left behind: %v %v", entries, more)
	}

	// Asked to, by hand, it takes its entry out of every list.
	if err := Uninstall([]string{"--bin-dir=" + h.bin, "--conf-dir=" + h.conf}, Environment{}, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	if a, b := h.types("05-cilium.conflist"), h.types("10-flannel.conflist"); a != "cilium-cni" || b != "flannel portmap" {
		t.Errorf("%s; %s", a, b)
	}
	if left, err := os.ReadDir(h.bin); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// A configuration of one plugin becomes a list, beside it.
func TestASingleConfiguration(t *testing.T) {
	h := newHost(t)
	conf := filepath.Join(h.conf, "10-calico.conf")
	h.write(conf, `{"name":"k8s-pod-network","cniVersion":"0.3.1","type":"calico","mtu":1440}`)
	h.run("--remove-on-exit")
	h.until("the list", func() bool { return h.types(generated) == "calico outrigger-cni" })
	h.write(conf, `{"name":"k8s-pod-network","cniVersion":"0.3.1","type":"calico","mtu":1400}`)
	h.until("the change", func() bool { return strings.Contains(h.read(filepath.Join(h.conf, generated)), "1400") })
	// It becomes a list by itself.
	h.write(filepath.Join(h.conf, "10-calico.conflist"), `{"name":"k8s-pod-network","cniVersion":"0.3.1","plugins":[{"type":"calico"}]}`)
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	h.until("the calico list", func() bool {
		return h.types("10-calico.conflist") == "calico outrigger-cni" && h.types(generated) == ""
	})
	if err := h.stop(); err != nil {
		t.Fatal(err)
	}
	if got := h.types("10-calico.conflist"); got != "calico" {
		t.Errorf("after the end: %s", got)
	}
	if left, err := os.ReadDir(h.bin); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}

// Who takes our entry out again and again is told about, and not raced.
func TestAFight(t *testing.T) {
	h := newHost(t)
	list := filepath.Join(h.conf, "05-cilium.conflist")
	const mine = `{"name":"cilium","cniVersion":"1.0.0","plugins":[{"type":"cilium-cni"}]}`
	h.write(list, mine)
	h.run()
	writes := 0
	h.until("the warning", func() bool {
		if h.types("05-cilium.conflist") == "cilium-cni outrigger-cni" {
			writes++
			h.write(list, mine)
		}
		return strings.Contains(h.log.String(), "cni.exclusive=false")
	})
	if writes < fights {
		t.Errorf("%d writes", writes)
	}
}

func TestANamedConfiguration(t *testing.T) {
	h := newHost(t)
	h.write(filepath.Join(h.conf, "00-multus.conf"), `{"name":"multus","cniVersion":"0.3.1","type":"multus"}`)
	h.write(filepath.Join(h.conf, "10-main.conflist"), flannel)
	h.run("--conflist=10-main.conflist")
	h.until("ready", func() bool { return h.ready() == "ready" })
	if got := h.types("10-main.conflist"); got != "flannel portmap outrigger-cni" {
		t.Errorf("%s", got)
	}
	if _, err := os.Stat(filepath.Join(h.conf, generated)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "--api-server is empty"},
		{[]string{"--api-server=http://x"}, "a token is not sent in clear"},
		{[]string{"--api-server=https://x", "--interval=1ms"}, "write 1s or more"},
		{[]string{"--api-server=https://x", "--conflist=../x"}, "the name of a file"},
		{[]string{"--proxy-uid=0"}, `"0" is not a user id above 0`},
		{[]string{"--backend=x"}, "write auto, nftables or iptables"},
	} {
		if err := Run(t.Context(), c.args, Environment{}, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want %q", c.args, err, c.want)
		}
	}
}

// A file that changes between reading and writing is not overwritten.
func TestARace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("theirs"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := write(path, []byte("ours"), 0o644, []byte("before")); !errors.Is(err, errRaced) {
		t.Errorf("err = %v", err)
	}
	if err := write(path, []byte("ours"), 0o644, []byte("theirs")); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
	if s, ok := info.Sys().(*syscall.Stat_t); !ok || int(s.Uid) != os.Geteuid() {
		t.Errorf("%+v", s)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}
