package webhook

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	admissionv1 "k8s.io/api/admission/v1"

	"github.com/outrigger-mesh/outrigger/injector/patch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func handler(t testing.TB) *Handler {
	t.Helper()
	h, err := New(patch.Settings{Image: "outrigger/sidecar:1.0", ControlPlane: "cp:15012", NativeSidecar: true}, Cluster{}, slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// issue writes a self-signed certificate for 127.0.0.1 and returns it in PEM.
func issue(t *testing.T, dir, name string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, data := range map[string][]byte{"tls.crt": cert, "tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})} {
		if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert
}

type endpoint struct {
	url    string
	client *http.Client
}

// serve runs the real server over HTTPS on loopback until the test ends.
func serve(t *testing.T, h http.Handler) endpoint {
	t.Helper()
	dir := t.TempDir()
	ca := issue(t, dir, "webhook")
	cert, err := NewCertificate(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), slog.New(slog.DiscardHandler), prometheus.NewRegistry(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	srv := Server(h, cert.Get, nil, slog.New(slog.DiscardHandler))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(ln, "", "") }()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("ServeTLS: %v", err)
		}
	})
	return endpoint{"https://" + ln.Addr().String(), &http.Client{Transport: tr}}
}

func (e endpoint) post(t *testing.T, path, contentType, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, e.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := e.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode, string(b)
}

// review is what an API server sends (1.34), around a pod.
func review(pod, change string) string {
	r := `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"705ab4f5-6393-11e8-b7cc-42010a800002",` +
		`"kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},` +
		`"requestKind":{"group":"","version":"v1","kind":"Pod"},"requestResource":{"group":"","version":"v1","resource":"pods"},` +
		`"namespace":"shop","operation":"CREATE","userInfo":{"username":"system:serviceaccount:kube-system:replicaset-controller"},` +
		`"object":` + pod + `,"oldObject":null,"dryRun":false,"options":{"kind":"CreateOptions","apiVersion":"meta.k8s.io/v1"}}}`
	if from, to, ok := strings.Cut(change, " => "); ok {
		if !strings.Contains(r, from) {
			panic("no " + from)
		}
		r = strings.Replace(r, from, to, 1)
	}
	return r
}

const web = `{"kind":"Pod","apiVersion":"v1","metadata":{"generateName":"web-6b7f-","namespace":"shop","creationTimestamp":null,"labels":{"pod-template-hash":"6b7f"},` +
	`"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-6b7f","uid":"5a5b","controller":true}]},` +
	`"spec":{"fromTheFuture":true,"containers":[{"name":"app","image":"shop/web:1","resources":{},"alsoNew":1}]},"status":{}}`

func TestMutate(t *testing.T) {
	h := handler(t)
	e := serve(t, h.Endpoint())
	f := func(name, body, wantResult string, check func(t *testing.T, r *admissionv1.AdmissionResponse)) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			before := testutil.ToFloat64(h.results.WithLabelValues(wantResult))
			code, text := e.post(t, "/mutate", "application/json", body)
			if code != http.StatusOK {
				t.Fatalf("%d: %s", code, text)
			}
			var got admissionv1.AdmissionReview
			if err := json.Unmarshal([]byte(text), &got); err != nil {
				t.Fatal(err)
			}
			if got.APIVersion != "admission.k8s.io/v1" || got.Kind != "AdmissionReview" || got.Response == nil || got.Response.UID != "705ab4f5-6393-11e8-b7cc-42010a800002" || got.Request != nil {
				t.Fatalf("answer %s", text)
			}
			if got := testutil.ToFloat64(h.results.WithLabelValues(wantResult)) - before; got != 1 {
				t.Errorf("outrigger_injections_total{result=%q} rose by %v", wantResult, got)
			}
			check(t, got.Response)
		})
	}
	unpatched := func(t *testing.T, r *admissionv1.AdmissionResponse) {
		t.Helper()
		if !r.Allowed || r.Patch != nil || r.PatchType != nil {
			t.Errorf("response %+v", r)
		}
	}
	injected := func(t *testing.T, r *admissionv1.AdmissionResponse) {
		t.Helper()
		if !r.Allowed || r.PatchType == nil || *r.PatchType != admissionv1.PatchTypeJSONPatch {
			t.Fatalf("response %+v", r)
		}
		var ops []struct{ Op, Path string }
		if err := json.Unmarshal(r.Patch, &ops); err != nil {
			t.Fatal(err)
		}
		var paths []string
		for _, op := range ops {
			paths = append(paths, op.Op+" "+op.Path)
		}
		// Nothing that the user wrote is touched, whether we know it or not.
		if got := strings.Join(paths, ", "); got != "add /metadata/annotations, add /spec/initContainers, add /spec/volumes" {
			t.Errorf("patch: %s", got)
		}
		if !bytes.Contains(r.Patch, []byte(`"--workload=web"`)) {
			t.Errorf("the workload is not the Deployment's: %s", r.Patch)
		}
	}
	f("a pod", review(web, ""), resultInjected, injected)
	f("a dry run", review(web, `"dryRun":false => "dryRun":true`), resultInjected, injected)
	f("not a pod", review(web, `"resource":"pods"} => "resource":"configmaps"}`), resultIgnored, unpatched)
	f("an update", review(web, `"CREATE" => "UPDATE"`), resultIgnored, unpatched)
	f("an ephemeral container", review(web, `"namespace":"shop","operation" => "subResource":"ephemeralcontainers","namespace":"shop","operation"`), resultIgnored, unpatched)
	f("the pod says no", review(web, `"pod-template-hash" => "outrigger.dev/injection":"disabled","pod-template-hash"`), resultSkipped, unpatched)
	f("hostNetwork", review(web, `"fromTheFuture":true => "hostNetwork":true`), resultSkipped, func(t *testing.T, r *admissionv1.AdmissionResponse) {
		if !r.Allowed || !strings.Contains(string(r.Patch), `"outrigger.dev/status":"skipped"`) {
			t.Errorf("response %+v", r)
		}
	})
	f("a bad annotation", review(web, `"labels" => "annotations":{"outrigger.dev/log-level":"loud"},"labels"`), resultDenied, func(t *testing.T, r *admissionv1.AdmissionResponse) {
		want := `outrigger: annotation outrigger.dev/log-level="loud": write debug, info, warn or error`
		if r.Allowed || r.Result == nil || r.Result.Message != want || r.Patch != nil {
			t.Errorf("response %+v", r)
		}
	})
	f("a typo", review(web, `"labels" => "annotations":{"outrigger.dev/upsteams":"x"},"labels"`), resultInjected, func(t *testing.T, r *admissionv1.AdmissionResponse) {
		if len(r.Warnings) != 1 || r.Warnings[0] != "outrigger: annotation outrigger.dev/upsteams is not known and has no effect" {
			t.Errorf("warnings %q", r.Warnings)
		}
	})
}

func TestMalformed(t *testing.T) {
	h := handler(t)
	e := serve(t, h.Endpoint())
	n := 0.0
	f := func(contentType, body string, wantCode int, want string) {
		t.Helper()
		n++
		code, text := e.post(t, "/mutate", contentType, body)
		if code != wantCode || !strings.Contains(text, want) {
			t.Errorf("got %d %q, want %d %q", code, text, wantCode, want)
		}
		if got := testutil.ToFloat64(h.results.WithLabelValues(resultMalformed)); got != n {
			t.Errorf("counted %v, want %v", got, n)
		}
	}
	f("text/plain", review(web, ""), 415, "a review is application/json")
	f("application/json", "", 400, "not an AdmissionReview")
	f("application/json", "[]", 400, "not an AdmissionReview")
	f("application/json", "{}", 400, "set admissionReviewVersions: [v1]")
	f("application/json", review(web, "admission.k8s.io/v1\" => admission.k8s.io/v1beta1\""), 400, `apiVersion "admission.k8s.io/v1beta1"`)
	f("application/json", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}`, 400, "no request with a uid")
	f("application/json", review(`{"spec":{"containers":"none"}}`, ""), 400, "cannot be read")
	f("application/json", review(`null`, ""), 400, "cannot be read")
	f("application/json", `{"x":"`+strings.Repeat("x", MaxBody)+`"}`, 413, "over 3145728 bytes")
	if code, _ := e.post(t, "/other", "application/json", "{}"); code != 404 {
		t.Errorf("/other: %d", code)
	}
	resp, err := e.client.Get(e.url + "/mutate")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 405 {
		t.Errorf("GET /mutate: %d", resp.StatusCode)
	}
}

// A replaced pair of files is served at the next look; half a pair is not, and
// the old one serves on.
func TestCertificateIsReplaced(t *testing.T) {
	dir := t.TempDir()
	issue(t, dir, "old")
	now := time.Now()
	reg := prometheus.NewRegistry()
	c, err := NewCertificate(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), slog.New(slog.DiscardHandler), reg, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	f := func(want string, failures float64) {
		t.Helper()
		got, err := c.Get(nil)
		if err != nil || got.Leaf.Subject.CommonName != want {
			t.Errorf("certificate %v, %v; want %s", got.Leaf.Subject, err, want)
		}
		if n := testutil.ToFloat64(c.failures); n != failures {
			t.Errorf("%v failures, want %v", n, failures)
		}
	}
	f("old", 0)
	other := t.TempDir()
	issue(t, other, "new")
	copyFile := func(name string) {
		data, err := os.ReadFile(filepath.Join(other, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		stamp := time.Now().Add(time.Minute)
		if err := os.Chtimes(filepath.Join(dir, name), stamp, stamp); err != nil {
			t.Fatal(err)
		}
	}
	copyFile("tls.crt")
	f("old", 0) // not looked yet
	now = now.Add(CheckEvery)
	f("old", 1) // the key is still the old one's
	copyFile("tls.key")
	now = now.Add(CheckEvery)
	f("new", 1)
	if err := os.Remove(filepath.Join(dir, "tls.key")); err != nil {
		t.Fatal(err)
	}
	now = now.Add(CheckEvery)
	f("new", 2)
	if _, err := NewCertificate(filepath.Join(dir, "none"), filepath.Join(dir, "none"), slog.New(slog.DiscardHandler), prometheus.NewRegistry(), time.Now); err == nil || !strings.Contains(err.Error(), "mount the Secret") {
		t.Errorf("missing files: %v", err)
	}
}

// Whatever is posted: no panic, and an answer that allows without a patch that
// cannot be parsed.
func FuzzMutate(f *testing.F) {
	f.Add([]byte(review(web, "")))
	f.Add([]byte(review(web, `"fromTheFuture":true => "hostNetwork":true`)))
	f.Add([]byte(review(web, `"labels" => "annotations":{"outrigger.dev/upstreams":"a.b:1=127.0.0.1:1"},"labels"`)))
	f.Add([]byte(review(`{"spec":{"containers":[{"name":"outrigger-proxy","image":"auto","securityContext":{}},{"name":"x"}]}}`, "")))
	f.Add([]byte(review(`{}`, "")))
	h := handler(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, err := h.review(body)
		if err != nil {
			return
		}
		var got admissionv1.AdmissionReview
		if err := json.Unmarshal(answer, &got); err != nil || got.Response == nil || got.Response.UID == "" {
			t.Fatalf("answer %s: %v", answer, err)
		}
		if got.Response.Patch != nil && !json.Valid(got.Response.Patch) {
			t.Fatalf("patch %s", got.Response.Patch)
		}
		if !got.Response.Allowed && got.Response.Result.Message == "" {
			t.Fatal("refused without a word")
		}
	})
}
