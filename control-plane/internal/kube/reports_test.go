package kube_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
)

// issuer is an authority, and a way to report as whom it says.
type issuer struct{ *authority.Authority }

func newIssuer(t *testing.T) issuer {
	t.Helper()
	a, err := authority.Open(t.Context(), authority.Options{
		Store: authority.Folder(filepath.Join(t.TempDir(), "authority")), TrustDomain: "cluster.local", Names: []string{"127.0.0.1"}, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return issuer{a}
}

func (i issuer) certificate(t *testing.T, ns, account string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	r, err := i.Sign(identity.Identity{TrustDomain: "cluster.local", Namespace: ns, ServiceAccount: account}, csr)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{r.Chain[0].Raw}, PrivateKey: key}
}

// serve takes reports for a replica, and returns a way to send them.
func (i issuer) serve(t *testing.T, reports *kube.Reports) func(*tls.Certificate, reporting.Report) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(i.Credentials()))
	reports.Register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	pool := x509.NewCertPool()
	for _, c := range i.Roots() {
		pool.AddCert(c)
	}
	return func(cert *tls.Certificate, r reporting.Report) error {
		conf := &tls.Config{RootCAs: pool}
		if cert != nil {
			conf.Certificates = []tls.Certificate{*cert}
		}
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(conf)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return conn.Invoke(ctx, reporting.Method, r.Encode(), new(emptypb.Empty))
	}
}

// proxies are those that are connected, all of which have what they ask for, but
// for those that refuse it.
type proxies struct {
	nodes   []string
	refused []string
}

func (p proxies) options() kube.ReportsOptions {
	return kube.ReportsOptions{
		TrustDomain: "cluster.local",
		Nodes: func() map[string]bool {
			out := map[string]bool{}
			for _, n := range p.nodes {
				out[n] = true
			}
			return out
		},
		Progress: func(want []discovery.Interest) []discovery.Progress {
			out := make([]discovery.Progress, len(want))
			for i, w := range want {
				if !slices.ContainsFunc(w.Names, func(n discovery.Name) bool {
					return n.Type == xds.ClusterType && strings.HasSuffix(n.Name, "/payments:80")
				}) {
					continue
				}
				out[i] = discovery.Progress{Subscribed: len(p.nodes), Applied: len(p.nodes) - len(p.refused), Rejected: len(p.refused), Reasons: p.refused}
			}
			return out
		},
	}
}

// printed is what kubectl get prints of an object: by column.
func printed(t *testing.T, r *rig, resource, name string) map[string]any {
	t.Helper()
	web, err := rest.HTTPClientFor(server.Config)
	if err != nil {
		t.Fatal(err)
	}
	q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.Config.Host+"/apis/outrigger.dev/v1alpha1/namespaces/"+r.ns+"/"+resource+"/"+name, nil)
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
	resp, err := web.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var table metav1.Table
	if err := json.NewDecoder(resp.Body).Decode(&table); err != nil || len(table.Rows) != 1 {
		t.Fatalf("%d rows, %v", len(table.Rows), err)
	}
	out := map[string]any{}
	for i, c := range table.ColumnDefinitions {
		out[c.Name] = table.Rows[0].Cells[i]
	}
	return out
}

// A proxy reports for itself and for no other.
func TestWhoMayReport(t *testing.T) {
	r := prepare(t)
	r.create(t, r.pod("storefront-0", "storefront"), r.pod("other-0", "other"))
	i := newIssuer(t)
	a := r.reporting(t, "a", kube.StatusOptions{}, proxies{}.options())
	send := i.serve(t, a.reports)
	own := i.certificate(t, r.ns, "storefront")
	report := reporting.Report{Node: "storefront-0." + r.ns, Workload: "storefront"}
	eventually(t, func() string {
		if err := send(own, report); err != nil {
			return err.Error()
		}
		return ""
	})
	for name, c := range map[string]struct {
		cert *tls.Certificate
		node string
		code codes.Code
		say  string
	}{
		"no certificate":            {nil, report.Node, codes.Unauthenticated, "present a client certificate"},
		"another namespace's pod":   {own, "storefront-0.bank", codes.PermissionDenied, "is not <pod>." + r.ns},
		"from another namespace":    {i.certificate(t, "bank", "storefront"), report.Node, codes.PermissionDenied, "is not <pod>.bank"},
		"another account's pod":     {own, "other-0." + r.ns, codes.PermissionDenied, `service account "other"`},
		"a pod that is not there":   {own, "storefront-1." + r.ns, codes.FailedPrecondition, "no pod"},
		"something that is no node": {own, "storefront", codes.InvalidArgument, "node: "},
	} {
		t.Run(name, func(t *testing.T) {
			err := send(c.cert, reporting.Report{Node: c.node, Workload: "x"})
			if grpcstatus.Code(err) != c.code || !strings.Contains(err.Error(), c.say) {
				t.Errorf("%v; want %s and %q", err, c.code, c.say)
			}
		})
	}
}

// What the proxies of two replicas say is summed by the leader, shown by kubectl
// get and told in Events, each once. When a replica goes, what it knew goes.
func TestReportsAreSummed(t *testing.T) {
	r := prepare(t)
	r.install(t, reported...)
	r.create(t, r.service("payments"), r.pod("storefront-0", "storefront"), r.pod("checkout-0", "checkout"), r.pod("b", "control-plane"))
	p := breaker(r, "payments")
	p.Spec.Mode = v1alpha1.ModeObserve
	eventually(t, func() string {
		if err := r.admin.Create(t.Context(), p); err != nil {
			return err.Error()
		}
		return ""
	})
	i := newIssuer(t)
	o := kube.StatusOptions{Settle: time.Millisecond}
	storefront, checkout := "storefront-0."+r.ns, "checkout-0."+r.ns
	a := r.reporting(t, "a", o, proxies{nodes: []string{storefront}}.options())
	eventually(t, func() string {
		if a.log.count("outrigger.leader=true") == 0 {
			return "nobody leads"
		}
		return ""
	})
	b := r.reporting(t, "b", o, proxies{nodes: []string{checkout, "x"}, refused: []string{"x: cluster " + r.ns + "/payments:80: no"}}.options())

	at := time.Now().Add(-time.Minute).Truncate(time.Second)
	policy, target := r.ns+"/payments", r.ns+"/payments:80"
	trip := reporting.Change{ID: "br-aaaa", Policy: policy, Target: target, State: reporting.Open, Time: at, Reason: "5 consecutive failures >= 5"}
	send := func(p *replica, node, account string, state reporting.State, changes ...reporting.Change) {
		t.Helper()
		to, cert := i.serve(t, p.reports), i.certificate(t, r.ns, account)
		eventually(t, func() string {
			err := to(cert, reporting.Report{
				Node: node, Workload: account, Changes: changes,
				Breakers: []reporting.Breaker{{Policy: policy, Target: target, State: state}, {Policy: "made/up", Target: target, State: state}, {Policy: policy, Target: "made/up:80", State: state}},
			})
			if err != nil {
				return err.Error()
			}
			return ""
		})
	}
	send(a, storefront, "storefront", reporting.Closed)
	send(b, checkout, "checkout", reporting.Open, trip)

	shows := func(want map[string]any) {
		t.Helper()
		eventually(t, func() string {
			got := printed(t, r, "circuitbreakers", "payments")
			maps.DeleteFunc(got, func(column string, _ any) bool { _, ok := want[column]; return !ok })
			return cmp.Diff(want, got)
		})
	}
	shows(map[string]any{"Mode": "Observe", "Closed": 1.0, "Open": 1.0, "Applied": "2/3", "Reason": trip.Reason, "Accepted": "True"})
	t.Logf("%v", printed(t, r, "circuitbreakers", "payments"))
	get(t, r, p, "payments")
	want := &v1alpha1.LastTrip{Time: metav1.NewTime(at.Local()), Caller: r.ns + "/checkout (checkout-0)", Target: target, Reason: trip.Reason, Evidence: "outrigger why br-aaaa"}
	if d := cmp.Diff(want, p.Status.LastTrip); d != "" {
		t.Errorf("last trip (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"x: cluster " + r.ns + "/payments:80: no"}, p.Status.Proxies.Reasons); d != "" || p.Status.Proxies.Rejected != 1 {
		t.Errorf("%+v", p.Status.Proxies)
	}

	// It closes again.
	closed := trip
	closed.ID, closed.State, closed.Time, closed.Reason = "br-bbbb", reporting.Closed, at.Add(30*time.Second), "3 of 3 probes succeeded"
	send(b, checkout, "checkout", reporting.Closed, trip, closed)
	shows(map[string]any{"Closed": 2.0, "Open": 0.0, "Reason": trip.Reason})
	events := func() []string {
		var list corev1.EventList
		if err := r.admin.List(t.Context(), &list, client.InNamespace(r.ns)); err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range list.Items {
			out = append(out, fmt.Sprintf("%s %s on %s %s: %s", e.Type, e.Reason, e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Message))
		}
		slices.Sort(out)
		return out
	}
	wantEvents := []string{
		"Normal BreakerClosed on CircuitBreaker payments: " + target + ", called by " + r.ns + "/checkout (checkout-0): 3 of 3 probes succeeded (outrigger why br-bbbb)",
		"Warning BreakerOpened on CircuitBreaker payments: " + target + ", called by " + r.ns + "/checkout (checkout-0): 5 consecutive failures >= 5 (outrigger why br-aaaa)",
		"Warning RejectedByProxy on CircuitBreaker payments: 1 of 3 proxies refuse it and go on with the version before; x: cluster " + target + ": no",
	}
	eventually(t, func() string { return cmp.Diff(wantEvents, events()) })

	var m corev1.ConfigMap
	get(t, r, &m, kube.ReportPrefix+"b")
	if len(m.OwnerReferences) != 1 || m.OwnerReferences[0].Name != "b" || m.Labels[kube.LabelReport] != "true" || m.Labels[kube.ManagedBy] != kube.ManagedByValue {
		t.Errorf("%+v", m.ObjectMeta)
	}

	// The leader goes: the other knows what its own proxies say, and says nothing twice.
	a.stop()
	shows(map[string]any{"Closed": 1.0, "Open": 0.0, "Applied": "1/2", "Reason": trip.Reason})
	if d := cmp.Diff(wantEvents, events()); d != "" {
		t.Errorf("Events (-want +got):\n%s", d)
	}
	b.stop()
	var left corev1.ConfigMapList
	if err := r.admin.List(t.Context(), &left, client.InNamespace(r.ns), client.MatchingLabels{kube.LabelReport: "true"}); err != nil || len(left.Items) != 0 {
		t.Errorf("%d ConfigMaps left, %v", len(left.Items), err)
	}
}
