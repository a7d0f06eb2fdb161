package pods_test

import (
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/outrigger-mesh/outrigger/deploy/testbed"
	"github.com/outrigger-mesh/outrigger/sidecar/cni/internal/pods"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// serve answers every request with what fn writes.
func serve(t *testing.T, fn http.HandlerFunc) pods.Config {
	t.Helper()
	s := httptest.NewUnstartedServer(fn)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return pods.Config{Server: s.URL, Token: "t0ken", CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})}
}

const good = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","namespace":"ns","uid":"u1","annotations":{"a":"b"}},"spec":{"initContainers":[{"name":"i"}],"containers":[{"name":"c","image":"x"}]}}`

func TestGet(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	for _, c := range []struct {
		name, answer string
		status       int
		want         string // in the error; empty for none
		asked        int32
	}{
		{"found", good, 200, "", 1},
		{"not found", `{"kind":"Status"}`, 404, pods.ErrNotFound.Error(), 1},
		{"token expired", `{"kind":"Status"}`, 401, pods.ErrUnauthorized.Error(), 1},
		{"forbidden", `no pods for you`, 403, "no pods for you", 1},
		{"overloaded", `later`, 429, "429", 3},
		{"broken", `oops`, 500, "500", 3},
		{"redirect", ``, 302, "302", 1},
		{"no JSON", `<html>`, 200, "invalid character", 1},
		{"another object", strings.Replace(good, `"Pod"`, `"PodList"`, 1), 200, "not the v1 Pod ns/p", 1},
		{"another pod", strings.Replace(good, `"p"`, `"q"`, 1), 200, "not the v1 Pod ns/p", 1},
		{"no containers", strings.Replace(good, `"containers"`, `"ephemeral"`, 1), 200, "not the v1 Pod ns/p", 1},
		{"empty", `{}`, 200, "not the v1 Pod ns/p", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int32
			cfg := serve(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				if r.URL.Path != "/api/v1/namespaces/ns/pods/p" || r.Header.Get("Authorization") != "Bearer t0ken" {
					t.Errorf("%s %s", r.URL, r.Header)
				}
				if c.status == 302 {
					w.Header().Set("Location", "https://192.0.2.1/")
				}
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.answer)
			})
			p, err := pods.Get(t.Context(), cfg, "ns", "p")
			if c.want == "" {
				want := pods.Pod{UID: "u1", Annotations: map[string]string{"a": "b"}, Containers: []string{"i", "c"}}
				if d := cmp.Diff(want, p); err != nil || d != "" {
					t.Errorf("%v %s", err, d)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("err = %v, want %q", err, c.want)
			}
			if n := asked.Load(); n != c.asked {
				t.Errorf("asked %d times, want %d", n, c.asked)
			}
		})
	}
}

func TestItTrustsOneAuthorityOnly(t *testing.T) {
	cfg := serve(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, good) })
	cfg.CA = []byte("nothing")
	if _, err := pods.Get(t.Context(), cfg, "ns", "p"); err == nil || !strings.Contains(err.Error(), "no certificate in PEM") {
		t.Errorf("err = %v", err)
	}
	cfg.CA = []byte(foreignCA)
	if _, err := pods.Get(t.Context(), cfg, "ns", "p"); err == nil {
		t.Error("a server of another authority was believed")
	}
	cfg.Server = strings.Replace(cfg.Server, "https", "http", 1)
	if _, err := pods.Get(t.Context(), cfg, "ns", "p"); err == nil || !strings.Contains(err.Error(), "write https://") {
		t.Errorf("err = %v", err)
	}
}

func TestKubeconfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k")
	want := pods.Config{Server: "https://10.96.0.1:443", CA: []byte("ca"), Token: "t"}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(string(b))
	got, err := pods.Load(path)
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
	// Others read it too.
	k, err := clientcmd.LoadFromFile(path)
	if err != nil || k.Clusters["outrigger-cni"].Server != want.Server || string(k.Clusters["outrigger-cni"].CertificateAuthorityData) != "ca" || k.AuthInfos["outrigger-cni"].Token != "t" || k.CurrentContext != "outrigger-cni" {
		t.Errorf("%+v, %v", k, err)
	}
	for _, bad := range []string{"", "{}", "apiVersion: v1", `{"kind":"Config","insecure":true}`, strings.Replace(string(b), `"token": "t"`, `"token": ""`, 1)} {
		write(bad)
		if _, err := pods.Load(path); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// With a real API server and the right to get pods, no more.
func TestRealAPIServer(t *testing.T) {
	s := server.Need(t)
	k, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	const ns = "cni-pods"
	if _, err := k.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web-0", Namespace: ns, Annotations: map[string]string{"outrigger.dev/status": "injected"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "x"}, {Name: "outrigger-proxy", Image: "y"}}},
	}
	made, err := k.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	account, err := k.CoreV1().ServiceAccounts(ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "outrigger-cni"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: ns}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}}}}
	if _, err := k.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: ns}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: ns},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Name: account.Name, Namespace: ns}},
	}
	if _, err := k.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	token, err := k.CoreV1().ServiceAccounts(ns).CreateToken(t.Context(), account.Name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := pods.Config{Server: s.Config.Host, CA: s.CA, Token: token.Status.Token}
	var got pods.Pod
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // the authorizer learns of the binding by a watch
		if got, err = pods.Get(t.Context(), cfg, ns, "web-0"); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil || got.UID != string(made.UID) || got.Annotations["outrigger.dev/status"] != "injected" || !slices.Contains(got.Containers, "outrigger-proxy") {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := pods.Get(t.Context(), cfg, ns, "web-1"); !errors.Is(err, pods.ErrNotFound) {
		t.Errorf("err = %v", err)
	}
	cfg.Token = "none"
	if _, err := pods.Get(t.Context(), cfg, ns, "web-0"); !errors.Is(err, pods.ErrUnauthorized) {
		t.Errorf("err = %v", err)
	}
}

const foreignCA = `-----BEGIN CERTIFICATE-----
MIIBfDCCASGgAwIBAgIURBQ8fphjeCNjfYm00ZJZxc3C/hwwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHYW5vdGhlcjAgFw0yNjExMjUxOTUwMTlaGA8yMTI2MTEwMTE5
NTAxOVowEjEQMA4GA1UEAwwHYW5vdGhlcjBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABPBYYaHgk3WuPND459gmISFAeJXAhfbOpaG1/+8Qy852tLMk5I6kFb4D4SDT
thqWoG+j7z14V53YwugAZdd7GCijUzBRMB0GA1UdDgQWBBQAfDvxNKOlwqu/OOZz
X3JvDxBWQTAfBgNVHSMEGDAWgBQAfDvxNKOlwqu/OOZzX3JvDxBWQTAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0kAMEYCIQCErvIBIaSSDpEwuZyUOKsGiWTk
TfAZNLrfrLs1bex3mgIhAMmcFPnUIyV8X8ZwMqhv4rX+++g42OGhQVEVleAhDMnE
-----END CERTIFICATE-----
`
