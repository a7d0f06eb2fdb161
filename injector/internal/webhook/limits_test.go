package webhook

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// A stranger that floods the endpoint is turned away; others are not.
func TestRateOfACaller(t *testing.T) {
	h := handler(t)
	e := h.Endpoint()
	ask := func(from string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/mutate", nil)
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		e.ServeHTTP(w, r)
		return w.Code
	}
	codes := map[int]int{}
	for i := range 3 * burstPerCaller {
		codes[ask(fmt.Sprintf("192.0.2.1:%d", 1000+i))]++
	}
	if codes[http.StatusMethodNotAllowed] < burstPerCaller || codes[http.StatusTooManyRequests] == 0 || len(codes) != 2 {
		t.Errorf("answers %v", codes)
	}
	if got := testutil.ToFloat64(h.rejected.WithLabelValues(causeRate)); got != float64(codes[http.StatusTooManyRequests]) {
		t.Errorf("counted %v", got)
	}
	if code := ask("192.0.2.2:1000"); code != http.StatusMethodNotAllowed {
		t.Errorf("another caller: %d", code)
	}
	l := e.(*limiter)
	for i := range 2 * maxCallers {
		l.of(fmt.Sprint(i))
	}
	if n := len(l.callers); n > maxCallers {
		t.Errorf("%d callers are remembered", n)
	}
}

// At most maxInFlight are looked at; who leaves while waiting is not.
func TestInFlight(t *testing.T) {
	rejected := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "x"}, []string{"cause"})
	hold, began := make(chan struct{}), make(chan struct{}, maxInFlight)
	l := limit(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		began <- struct{}{}
		<-hold
	}), slog.New(slog.DiscardHandler), rejected)
	var all sync.WaitGroup
	for range maxInFlight {
		all.Go(func() {
			l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", nil))
		})
	}
	for range maxInFlight {
		<-began
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodPost, "/mutate", nil))
	if got := testutil.ToFloat64(rejected.WithLabelValues(causeGone)); got != 1 {
		t.Errorf("%v left while they waited", got)
	}
	close(hold)
	all.Wait()
}

// A bug of ours ends one review, not the webhook, and is told.
func TestPanic(t *testing.T) {
	rejected := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "x"}, []string{"cause"})
	var log strings.Builder
	l := limit(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("oh") }), slog.New(slog.NewTextHandler(&log, nil)), rejected)
	w := httptest.NewRecorder()
	l.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/mutate", nil))
	if w.Code != http.StatusInternalServerError || testutil.ToFloat64(rejected.WithLabelValues(causePanic)) != 1 || !strings.Contains(log.String(), "limits_test.go") {
		t.Errorf("%d, %s", w.Code, log.String())
	}
}

// With --client-ca a caller without a certificate, or with one of somebody else,
// does not get as far as HTTP.
func TestCallersProveThemselves(t *testing.T) {
	dir := t.TempDir()
	ca, pair := clientPair(t)
	_, foreign := clientPair(t)
	file := filepath.Join(dir, "callers.crt")
	if err := os.WriteFile(file, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	callers, err := Callers(file)
	if err != nil {
		t.Fatal(err)
	}
	issue(t, dir, "webhook")
	cert, err := NewCertificate(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"), slog.New(slog.DiscardHandler), prometheus.NewRegistry(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	srv := Server(handler(t).Endpoint(), cert.Get, callers, slog.New(slog.DiscardHandler))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(ln, "", "") }()
	ask := func(certs ...tls.Certificate) error {
		tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: certs}, DisableKeepAlives: true}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+ln.Addr().String()+"/mutate", strings.NewReader(review(web, "")))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return err
	}
	if err := ask(pair); err != nil {
		t.Errorf("the API server: %v", err)
	}
	if ask() == nil || ask(foreign) == nil {
		t.Error("a stranger was answered")
	}
	_ = srv.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
	if _, err := Callers(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "--client-ca") {
		t.Error(err)
	}
	if _, err := Callers(filepath.Join(dir, "tls.key")); err == nil || !strings.Contains(err.Error(), "holds no certificate") {
		t.Error(err)
	}
}

func clientPair(t *testing.T) (ca []byte, pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// While the API server is away, Events fail, are counted, and hold up nobody; a
// queue that is full drops.
func TestEventsOfACutOffInjector(t *testing.T) {
	client, err := kubernetes.NewForConfig(&rest.Config{Host: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEvents(client, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	ev := func(i int) Event {
		return Event{About: corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: fmt.Sprint(i)}, Reason: ReasonSkipped, Message: strings.Repeat("ä", maxMessage)}
	}
	for i := range eventQueue + 7 {
		e.Tell(ev(i))
	}
	if got := testutil.ToFloat64(e.results.WithLabelValues("dropped")); got != 7 {
		t.Errorf("%v dropped", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	for end := time.Now().Add(30 * time.Second); testutil.ToFloat64(e.results.WithLabelValues("failed")) < 3; {
		if time.Now().After(end) {
			t.Fatal("nothing fails")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	(*Events)(nil).Tell(ev(0))
}

// busy is a pod of the size that people have: two containers, their environment,
// mounts and probes.
func busy(i int) string {
	env := strings.Repeat(`{"name":"SETTING","value":"of some length, as they are in charts"},`, 30)
	container := func(name string) string {
		return `{"name":"` + name + `","image":"registry.example/shop/` + name + `:1.2.3","ports":[{"name":"http","containerPort":8080,"protocol":"TCP"}],` +
			`"env":[` + strings.TrimSuffix(env, ",") + `],"resources":{"requests":{"cpu":"100m","memory":"128Mi"},"limits":{"memory":"256Mi"}},` +
			`"volumeMounts":[{"name":"config","mountPath":"/etc/config"},{"name":"kube-api-access-abcde","readOnly":true,"mountPath":"/var/run/secrets/kubernetes.io/serviceaccount"}],` +
			`"livenessProbe":{"httpGet":{"path":"/live","port":"http","scheme":"HTTP"},"timeoutSeconds":1,"periodSeconds":10},"readinessProbe":{"httpGet":{"path":"/ready","port":8080,"scheme":"HTTP"},"timeoutSeconds":1}}`
	}
	return review(fmt.Sprintf(`{"kind":"Pod","apiVersion":"v1","metadata":{"generateName":"web-%d-","namespace":"shop","labels":{"app":"web","pod-template-hash":"%d"},`, i, i)+
		fmt.Sprintf(`"ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"web-%d","uid":"5a5b","controller":true}]},`, i)+
		`"spec":{"volumes":[{"name":"config","configMap":{"name":"config","defaultMode":420}},{"name":"kube-api-access-abcde","projected":{"sources":[{"serviceAccountToken":{"expirationSeconds":3607,"path":"token"}}],"defaultMode":420}}],`+
		`"containers":[`+container("web")+`,`+container("cache")+`],"restartPolicy":"Always","terminationGracePeriodSeconds":30,"dnsPolicy":"ClusterFirst","serviceAccountName":"web","securityContext":{},"schedulerName":"default-scheduler"},"status":{}}`, "")
}

// 200 pods a second, as the API server would send them, over HTTPS. The times are
// printed, because they are the machine's as much as ours: what is asserted is
// that the work of both sides fits into two cores at that pace, with a half to
// spare.
func TestPace(t *testing.T) {
	const perSecond, clients = 200, 8
	pods := 1000
	if raceOn {
		pods = 100
	}
	e := serve(t, handler(t).Endpoint())
	took := make([]time.Duration, pods)
	var all sync.WaitGroup
	work := make(chan int)
	for range clients {
		all.Go(func() {
			for i := range work {
				body := busy(i)
				begin := time.Now()
				code, text := e.post(t, "/mutate", "application/json", body)
				took[i] = time.Since(begin)
				if code != http.StatusOK || !strings.Contains(text, `"allowed":true`) {
					t.Errorf("%d: %s", code, text)
				}
			}
		})
	}
	begin, used := time.Now(), cpu(t)
	for i := range pods {
		time.Sleep(time.Until(begin.Add(time.Duration(i) * time.Second / perSecond)))
		work <- i
	}
	close(work)
	all.Wait()
	each := (cpu(t) - used) / time.Duration(pods)
	slices.Sort(took)
	t.Logf("%.0f pods/s: p50 %s, p99 %s, longest %s; %s of CPU a pod, caller included",
		float64(pods)/time.Since(begin).Seconds(), took[pods/2], took[pods*99/100], took[pods-1], each)
	if most := time.Second / perSecond; each > most && !raceOn { // of the 10 ms that two cores have for each
		t.Errorf("%s of CPU a pod, at most %s", each, most)
	}
}

// cpu is what this process has used.
func cpu(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkMutate(b *testing.B) {
	h := handler(b)
	body := []byte(busy(1))
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.review(body); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pods/s")
}
