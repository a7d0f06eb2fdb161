package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

var server *testbed.Server

func TestMain(m *testing.M) { testbed.Main(m, func(s *testbed.Server) { server = s }) }

// eventually polls until ok returns "", which else says what is missing.
func eventually(t *testing.T, stderr *log, ok func() string) {
	t.Helper()
	missing := ""
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if missing = ok(); missing == "" {
			return
		}
	}
	stderr.mu.Lock()
	defer stderr.mu.Unlock()
	t.Fatalf("%s\n%s", missing, &stderr.b)
}

// kubeconfig writes how to reach the test's API server.
func kubeconfig(t *testing.T, s *testbed.Server) string {
	t.Helper()
	c := clientcmdapi.NewConfig()
	c.Clusters["testbed"] = &clientcmdapi.Cluster{Server: s.Config.Host, CertificateAuthorityData: s.CA}
	c.AuthInfos["admin"] = &clientcmdapi.AuthInfo{ClientCertificateData: s.Config.CertData, ClientKeyData: s.Config.KeyData}
	c.Contexts["testbed"] = &clientcmdapi.Context{Cluster: "testbed", AuthInfo: "admin"}
	c.CurrentContext = "testbed"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// In a cluster the control plane makes its root in a Secret, gives it to meshed
// namespaces, signs for pods that prove themselves with their tokens, and serves
// what the API server holds.
func TestInACluster(t *testing.T) {
	s := server.Need(t)
	admin, err := kubernetes.NewForConfig(s.Config)
	if err != nil {
		t.Fatal(err)
	}
	core := admin.CoreV1()
	id := time.Now().UnixNano() % 1e9
	system, shop := fmt.Sprint("system-", id), fmt.Sprint("shop-", id)
	for _, ns := range []*corev1.Namespace{
		{ObjectMeta: metav1.ObjectMeta{Name: system}},
		{ObjectMeta: metav1.ObjectMeta{Name: shop, Labels: map[string]string{"outrigger.dev/injection": "enabled"}}},
	} {
		if _, err := core.Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	config := kubeconfig(t, s)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr log
	done := make(chan error, 1)
	go func() {
		done <- execute(ctx, []string{
			"--kubernetes", "--kubeconfig", config, "--namespace", system, "--pod-name", "outrigger-control-plane-0", "--xds-address", "127.0.0.1:0",
			"--admin-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0", "--xds-tls-address", "127.0.0.1:0",
		}, io.Discard, &stderr)
	}()
	get := func(at, path string) (int, string) {
		resp, err := http.Get("http://" + stderr.field("outrigger."+at+"_address") + path)
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
	eventually(t, &stderr, func() string {
		if status, body := get("health", "/ready"); status != http.StatusOK {
			return body
		}
		return ""
	})
	for path, want := range map[string]int{"/live": 200, "/metrics": 200, "/debug/mesh": 404, "/debug/xds": 404} {
		if status, _ := get("health", path); status != want {
			t.Errorf("off loopback, %s: %d, want %d", path, status, want)
		}
	}
	if _, body := get("health", "/metrics"); !strings.Contains(body, `outrigger_kube_synced{kind="Service"} 1`) {
		t.Error("the metrics do not say that Services are synced")
	}

	// What changes in the cluster changes the mesh.
	if _, err := core.Services(shop).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "payments"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, &stderr, func() string {
		if _, body := get("admin", "/debug/mesh"); !strings.Contains(body, shop+"/payments:80") {
			return body
		}
		return ""
	})

	// The roots arrive where pods mount them, and verify the control plane, which
	// gives a pod its certificate for its token.
	var roots string
	eventually(t, &stderr, func() string {
		m, err := core.ConfigMaps(shop).Get(t.Context(), "outrigger-roots", metav1.GetOptions{})
		if err != nil {
			return err.Error()
		}
		roots = m.Data["root.crt"]
		return ""
	})
	secret, err := core.Secrets(system).Get(t.Context(), "outrigger-authority", metav1.GetOptions{})
	if err != nil || string(secret.Data["root.crt"]) != roots || roots == "" {
		t.Fatalf("the Secret and the ConfigMap differ: %v", err)
	}
	if _, err := core.ServiceAccounts(shop).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "payments"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, err := core.Pods(shop).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "payments-1"}, Spec: corev1.PodSpec{ServiceAccountName: "payments", Containers: []corev1.Container{{Name: "app", Image: "app"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for audience, want := range map[string]bool{"outrigger": true, "vault": false} {
		token, err := core.ServiceAccounts(shop).CreateToken(t.Context(), "payments", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			Audiences: []string{audience}, BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
		}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		proved, err := sign(t, stderr.field("outrigger.xds_tls_address"), "outrigger-control-plane."+system+".svc", roots, token.Status.Token)
		if (err == nil) != want || want && proved.SPIFFE() != "spiffe://cluster.local/ns/"+shop+"/sa/payments" {
			t.Errorf("audience %s: %s, %v", audience, proved, err)
		}
	}

	// An exchange of the root is one command a step.
	rotate := func() (string, error) {
		var stdout bytes.Buffer
		err := execute(t.Context(), []string{"--kubernetes", "--kubeconfig", config, "--namespace", system, "--rotate-root"}, &stdout, io.Discard)
		return stdout.String(), err
	}
	if said, err := rotate(); err != nil || !strings.Contains(said, "Secret "+system+"/outrigger-authority: add: ") || !strings.Contains(said, "in 24h0m0s") {
		t.Errorf("%q, %v", said, err)
	}
	if said, err := rotate(); err == nil || !strings.Contains(err.Error(), "the next step is possible from") || said != "" {
		t.Errorf("%q, %v", said, err)
	}
	eventually(t, &stderr, func() string {
		m, err := core.ConfigMaps(shop).Get(t.Context(), "outrigger-roots", metav1.GetOptions{})
		if err != nil {
			return err.Error()
		}
		if n := strings.Count(m.Data["root.crt"], "BEGIN CERTIFICATE"); n != 2 || !strings.HasPrefix(m.Data["root.crt"], roots) {
			return fmt.Sprintf("the namespace has %d roots, want the old and the new one", n)
		}
		return ""
	})
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// A control plane that starts while the API server is away says that it lives and
// is not ready, and goes on when the API server is back.
func TestStartsBeforeTheAPIServer(t *testing.T) {
	s := server.Need(t)
	config := kubeconfig(t, s)
	s.StopAPI()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr log
	done := make(chan error, 1)
	go func() {
		done <- execute(ctx, []string{
			"--kubernetes", "--kubeconfig", config, "--namespace", "default", "--xds-address", "127.0.0.1:0",
			"--admin-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0", "--xds-tls-address", "127.0.0.1:0",
		}, io.Discard, &stderr)
	}()
	answers := func(path string, want int) {
		t.Helper()
		eventually(t, &stderr, func() string {
			resp, err := http.Get("http://" + stderr.field("outrigger.health_address") + path)
			if err != nil {
				return err.Error()
			}
			defer func() { _ = resp.Body.Close() }()
			if resp.StatusCode != want {
				return fmt.Sprintf("%s: %d, want %d", path, resp.StatusCode, want)
			}
			return ""
		})
	}
	answers("/live", http.StatusOK)
	answers("/ready", http.StatusServiceUnavailable)
	if err := s.StartAPI(); err != nil {
		t.Fatal(err)
	}
	answers("/ready", http.StatusOK)
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

// sign asks for a certificate as a proxy does.
func sign(t *testing.T, address, name, roots, token string) (identity.Identity, error) {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(roots)) {
		t.Fatal("no roots")
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: name,
	})))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, k)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), signing.Authorization, signing.Bearer(token)), 30*time.Second)
	defer cancel()
	var out structpb.Struct
	if err := conn.Invoke(ctx, signing.Method, signing.Request{CSR: csr}.Encode(), &out); err != nil {
		return identity.Identity{}, err
	}
	r, err := signing.DecodeResponse(&out)
	if err != nil {
		return identity.Identity{}, err
	}
	return identity.OfCertificate(r.Chain[0])
}

// Settings that do not go together are refused with the remedy.
func TestSettingsOfACluster(t *testing.T) {
	for want, args := range map[string][]string{
		"exclude each other":                               {"--kubernetes", "--config", "x"},
		"--kubeconfig needs --kubernetes":                  {"--kubeconfig", "x", "--config", "x"},
		"pods prove themselves":                            {"--kubernetes", "--join-token", "shop/payments"},
		"--rotate-root needs --authority-dir":              {"--rotate-root"},
		"--dry-run needs --config":                         {"--kubernetes", "--dry-run"},
		"--kubernetes: no way to the API server":           {"--kubernetes", "--kubeconfig", "/nowhere/at/all"},
		"--xds-tls-address needs --authority-dir":          {"--config", "x", "--xds-tls-address", "127.0.0.1:0"},
		"--rotate-root: folder /nowhere/at/all: it holds ": {"--rotate-root", "--authority-dir", "/nowhere/at/all"},
	} {
		if err := execute(t.Context(), args, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", args, err, want)
		}
	}
}
