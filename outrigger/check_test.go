package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/outrigger/installation"
)

// authority signs certificates for one test.
type testAuthority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T, life time.Duration) *testAuthority {
	t.Helper()
	a := &testAuthority{t: t}
	a.cert, a.key, a.pem = certify(t, &x509.Certificate{Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil, life)
	return a
}

func (a *testAuthority) leaf(life time.Duration) (cert []byte, key *ecdsa.PrivateKey) {
	a.t.Helper()
	_, key, cert = certify(a.t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, a.cert, a.key, life)
	return cert, key
}

func certify(t *testing.T, template, parent *x509.Certificate, parentKey *ecdsa.PrivateKey, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-24*365*time.Hour), time.Now().Add(life)
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// injector answers reviews as the injector does, over TLS on loopback.
func fakeInjector(t *testing.T, a *testAuthority) string {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var review admissionv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			t.Error(err)
			return
		}
		patch := admissionv1.PatchTypeJSONPatch
		review.Response = &admissionv1.AdmissionResponse{
			UID: review.Request.UID, Allowed: true, PatchType: &patch,
			Patch: []byte(`[{"op":"add","path":"/metadata/annotations","value":{"outrigger.dev/status":"injected"}}]`),
		}
		if err := json.NewEncoder(w).Encode(review); err != nil {
			t.Error(err)
		}
	}))
	cert, key := a.leaf(time.Hour)
	block, _ := pem.Decode(cert)
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{{Certificate: [][]byte{block.Bytes}, PrivateKey: key}}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL + "/mutate"
}

// found runs check and returns its findings by name.
func (r *rig) found(args ...string) (map[string]installation.Finding, error) {
	r.t.Helper()
	out, diag, err := r.run(append([]string{"check", "-o", "json", "--release", "v1.4.0"}, args...)...)
	var rep report
	if e := json.Unmarshal([]byte(out), &rep); e != nil {
		r.t.Fatalf("%v: %v\n%s%s", e, err, out, diag)
	}
	m := map[string]installation.Finding{}
	for _, f := range append(rep.Cluster, rep.Installation...) {
		if old, ok := m[f.Check]; !ok || old.Level == installation.OK {
			m[f.Check] = f
		}
		if (f.Level == installation.OK) != (f.Remedy == "") {
			r.t.Errorf("%s is %s, and its remedy is %q", f.Check, f.Level, f.Remedy)
		}
	}
	return m, err
}

// expect fails unless the check has that level and all words.
func (r *rig) expect(m map[string]installation.Finding, check string, level installation.Level, words ...string) {
	r.t.Helper()
	f, ok := m[check]
	if !ok || f.Level != level {
		r.t.Errorf("%s: %+v, want %s", check, f, level)
		return
	}
	for _, w := range words {
		if !strings.Contains(f.Text+"\n"+f.Remedy, w) {
			r.t.Errorf("%s: %q is missing in %+v", check, w, f)
		}
	}
}

// secret writes a Secret of the installation.
func (r *rig) secret(name string, data map[string][]byte) {
	r.t.Helper()
	secrets := r.kube.CoreV1().Secrets(r.namespace)
	if err := secrets.Delete(r.t.Context(), name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		r.t.Fatal(err)
	}
	if _, err := secrets.Create(r.t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}, metav1.CreateOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// hooks changes the webhooks.
func (r *rig) hooks(change func(*admissionregistrationv1.MutatingWebhook)) {
	r.t.Helper()
	all := r.kube.AdmissionregistrationV1().MutatingWebhookConfigurations()
	conf, err := all.Get(r.t.Context(), "outrigger-injector", metav1.GetOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range conf.Webhooks {
		change(&conf.Webhooks[i])
	}
	if _, err := all.Update(r.t.Context(), conf, metav1.UpdateOptions{}); err != nil {
		r.t.Fatal(err)
	}
}

// A cluster before an installation: what is wrong with it is found.
func TestCheckBefore(t *testing.T) {
	r := newRig(t)
	m, err := r.found()
	if err != nil {
		t.Errorf("err = %v", err)
	}
	r.expect(m, "kubernetes", installation.OK, "v1.")
	r.expect(m, "native sidecars", installation.OK)
	r.expect(m, "permissions", installation.OK)
	r.expect(m, "pod security", installation.OK)
	r.expect(m, "other meshes", installation.OK)
	r.expect(m, "gateway api", installation.Warning, "kubectl apply")
	if _, ok := m["control-plane"]; ok {
		t.Error("it looked at an installation that is not there")
	}
	if _, _, err := r.run("check", "--strict"); err == nil {
		t.Error("--strict passes over a warning")
	}

	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: r.namespace + "-shop", Labels: map[string]string{
		"outrigger.dev/injection": "enabled", "pod-security.kubernetes.io/enforce": "restricted", "istio-injection": "enabled",
	}}}
	if _, err := r.kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // no controller would end the namespace
		if _, err := r.kube.CoreV1().Namespaces().Patch(context.Background(), ns.Name, types.MergePatchType, []byte(`{"metadata":{"labels":null}}`), metav1.PatchOptions{}); err != nil {
			t.Error(err)
		}
	})
	m, err = r.found()
	if err == nil {
		t.Error("exit code 0 with failures")
	}
	r.expect(m, "pod security", installation.Failure, ns.Name+" (restricted)", "cni.enabled=true")
	r.expect(m, "other meshes", installation.Failure, ns.Name)
	m, _ = r.found("--set", "cni.enabled=true")
	r.expect(m, "pod security", installation.OK)

	// Somebody who may do nothing: of these servers nobody fills the role view.
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "viewer"}, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "view"},
		Subjects: []rbacv1.Subject{{APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: "viewer"}},
	}
	if _, err := r.kube.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.kube.RbacV1().ClusterRoleBindings().Delete(context.Background(), binding.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	m = r.as("viewer").foundAnyway()
	r.expect(m, "permissions", installation.Failure, "create deployments.apps", "cluster administrator")
	r.expect(m, "other meshes", installation.Warning, "could not be looked at")
	r.expect(m, "installation", installation.Warning, "forbidden")
}

// as is the rig for another user.
func (r *rig) as(user string) *rig {
	r.t.Helper()
	other := *r
	conf := *server.Config
	conf.Impersonate.UserName = user
	other.kubeconfig = writeKubeconfig(r.t, &conf)
	return &other
}

func (r *rig) foundAnyway() map[string]installation.Finding {
	r.t.Helper()
	m, _ := r.found()
	return m
}

// An installation: well, and then one thing after the other is not.
func TestCheckAfter(t *testing.T) {
	r := newRig(t)
	r.controllers(nil)
	ca := newAuthority(t, 90*24*time.Hour)
	serving, _ := ca.leaf(20 * 24 * time.Hour)
	url := fakeInjector(t, ca)
	r.must("install", "--release", "v1.4.0")
	selectors := map[string]*metav1.LabelSelector{}
	r.hooks(func(h *admissionregistrationv1.MutatingWebhook) { selectors[h.Name] = h.ObjectSelector })
	well := func() {
		r.secret("outrigger-authority", map[string][]byte{"ca.crt": ca.pem, "root.crt": ca.pem})
		r.secret("outrigger-injector-certificate", map[string][]byte{"tls.crt": serving})
		r.hooks(func(h *admissionregistrationv1.MutatingWebhook) {
			h.ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url, CABundle: ca.pem}
			h.ObjectSelector = selectors[h.Name]
		})
	}
	well()
	var m map[string]installation.Finding
	eventually(t, func() bool {
		var err error
		m, err = r.found()
		return err == nil
	})
	for _, check := range []string{
		"version", "control-plane", "injector", "collector", "crd circuitbreakers", "crd retrypolicies", "crd authorizationpolicies",
		"authority", "roots", "webhook", "webhook certificate", "webhook reachable", "sidecars",
	} {
		r.expect(m, check, installation.OK)
	}
	out, _, err := r.run("check", "--release", "v1.4.0")
	if err != nil || !strings.Contains(out, "0 failures") || !strings.Contains(out, "installation\n") {
		t.Errorf("%v\n%s", err, out)
	}

	short := newAuthority(t, 5*24*time.Hour)
	ended := newAuthority(t, -time.Hour)
	for _, c := range []struct {
		name  string
		spoil func()
		check string
		level installation.Level
		words []string
	}{
		{"the authority ends soon", func() { r.secret("outrigger-authority", map[string][]byte{"ca.crt": short.pem, "root.crt": short.pem}) }, "authority", installation.Warning, []string{"ends in 4 days", "--rotate-root"}},
		{"the authority has ended", func() { r.secret("outrigger-authority", map[string][]byte{"ca.crt": ended.pem, "root.crt": ended.pem}) }, "authority", installation.Failure, []string{"ended on"}},
		{"the roots are another's", func() { r.secret("outrigger-authority", map[string][]byte{"ca.crt": ca.pem, "root.crt": short.pem}) }, "authority", installation.Failure, []string{"does not belong to the roots"}},
		{"the authority is garbage", func() { r.secret("outrigger-authority", map[string][]byte{"ca.crt": []byte("x")}) }, "authority", installation.Failure, []string{"there is no certificate"}},
		{"no authority", func() {
			if err := r.kube.CoreV1().Secrets(r.namespace).Delete(t.Context(), "outrigger-authority", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "authority", installation.Failure, []string{"is not there"}},
		{"the serving certificate has ended", func() {
			cert, _ := ca.leaf(-time.Minute)
			r.secret("outrigger-injector-certificate", map[string][]byte{"tls.crt": cert})
		}, "webhook certificate", installation.Failure, []string{"ended on", "rollout restart"}},
		{"the serving certificate is another's", func() {
			cert, _ := short.leaf(time.Hour)
			r.secret("outrigger-injector-certificate", map[string][]byte{"tls.crt": cert})
		}, "webhook certificate", installation.Failure, []string{"cannot verify the injector"}},
		{"no caBundle", func() {
			r.hooks(func(h *admissionregistrationv1.MutatingWebhook) { h.ClientConfig.CABundle = nil })
		}, "webhook", installation.Failure, []string{"there is no certificate"}},
		{"the injector does not answer", func() {
			nowhere := "https://127.0.0.1:1/mutate"
			r.hooks(func(h *admissionregistrationv1.MutatingWebhook) { h.ClientConfig.URL = &nowhere })
		}, "webhook reachable", installation.Failure, []string{"failed calling webhook", "15017"}},
		{"it does not answer, and that is ignored", func() {
			nowhere, ignore := "https://127.0.0.1:1/mutate", admissionregistrationv1.Ignore
			r.hooks(func(h *admissionregistrationv1.MutatingWebhook) {
				h.ClientConfig.URL, h.FailurePolicy = &nowhere, &ignore
			})
		}, "webhook reachable", installation.Failure, []string{"runs without"}},
		{"the selectors take nobody", func() {
			fail := admissionregistrationv1.Fail
			r.hooks(func(h *admissionregistrationv1.MutatingWebhook) {
				h.FailurePolicy = &fail
				h.ObjectSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"never": "ever"}}
			})
		}, "webhook reachable", installation.Failure, []string{"was not sent"}},
		{"an old sidecar", func() {
			r.pod("old", "outrigger/sidecar:v1.3.0")
			roots := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "outrigger-roots"}, Data: map[string]string{"root.crt": string(ca.pem)}}
			if _, err := r.kube.CoreV1().ConfigMaps(r.namespace+"-apps").Create(t.Context(), roots, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "sidecars", installation.Warning, []string{"older version", "deployment/old"}},
		{"a pod without the roots", func() {
			if err := r.kube.CoreV1().ConfigMaps(r.namespace+"-apps").Delete(t.Context(), "outrigger-roots", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "roots", installation.Failure, []string{r.namespace + "-apps"}},
		{"a sidecar that is too old", func() { r.pod("older", "outrigger/sidecar:v1.0.9") }, "sidecars", installation.Failure, []string{"more than 3", "deployment/older"}},
		{"an older program", func() {
			if _, err := r.kube.CoreV1().ConfigMaps(r.namespace).Patch(t.Context(), "outrigger-installation", types.MergePatchType, []byte(`{"data":{"version":"v1.3.0"}}`), metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "version", installation.Warning, []string{"outrigger upgrade"}},
		{"a CRD of another version", func() {
			crds := apiextensionsclient.NewForConfigOrDie(server.Config).ApiextensionsV1().CustomResourceDefinitions()
			if _, err := crds.Patch(t.Context(), "retrypolicies.outrigger.dev", types.JSONPatchType, []byte(`[{"op":"remove","path":"/spec/names/shortNames"}]`), metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
		}, "crd retrypolicies", installation.Failure, []string{"another version"}},
	} {
		well()
		c.spoil()
		// The API server learns of webhooks with a little delay.
		t.Log(c.name)
		var m map[string]installation.Finding
		var err error
		eventually(t, func() bool { m, err = r.found(); return m[c.check].Level == c.level })
		if (err != nil) != (c.level == installation.Failure) && c.name != "an older program" {
			t.Errorf("%s: exit %v", c.name, err)
		}
		r.expect(m, c.check, c.level, c.words...)
	}

	if err := r.kube.AppsV1().Deployments(r.namespace).Delete(t.Context(), "outrigger-injector", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	r.expect(r.foundAnyway(), "injector", installation.Failure, "is not there", "outrigger upgrade")
}

// eventually waits for what the API server does in its own time.
func eventually(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Error("it did not come to that")
}

func TestReportIsForPeople(t *testing.T) {
	var b bytes.Buffer
	report{Cluster: []installation.Finding{{Check: "kubernetes", Level: installation.OK, Text: "v1.37.2"}, {Check: "pod security", Level: installation.Failure, Text: "shop is strict", Remedy: "one\ntwo"}}}.print(&b)
	want := "cluster\n  ok       kubernetes                 v1.37.2\n  failure  pod security               shop is strict\n           -> one\n           -> two\noutrigger is not installed\n1 ok, 0 warnings, 1 failures\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", &b, want)
	}
}
