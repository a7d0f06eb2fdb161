package kube_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/authority"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/kube"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// token asks the API server for one of a service account, bound to a pod where
// one is given.
func (r *rig) token(t *testing.T, account string, pod *corev1.Pod, audiences ...string) string {
	t.Helper()
	hour := int64(3600)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, ExpirationSeconds: &hour}}
	if pod != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	if err := r.admin.SubResource("token").Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: r.meta(account)}, request); err != nil {
		t.Fatal(err)
	}
	return request.Status.Token
}

// A pod's own token proves its service account, and nothing else proves anything:
// no other audience, no token without a pod, no forgery, and none of a pod that is
// gone.
func TestTokens(t *testing.T) {
	r := run(t)
	pod, done := r.pod("payments-1", "payments"), r.pod("payments-job", "payments")
	r.create(t, &corev1.ServiceAccount{ObjectMeta: r.meta("payments")}, pod, done)
	verifier := r.TokenVerifier("example.org")
	verify := func(token string) (identity.Identity, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return verifier.Verify(ctx, token)
	}
	own := r.token(t, "payments", pod, kube.Audience)
	want := identity.Identity{TrustDomain: "example.org", Namespace: r.ns, ServiceAccount: "payments"}
	if id, err := verify(own); err != nil || id != want {
		t.Fatalf("%v, %v", id, err)
	}
	if id, err := verify(r.token(t, "payments", pod, "other", kube.Audience)); err != nil || id != want {
		t.Errorf("for two audiences: %v, %v", id, err)
	}
	refused := func(name, token string, reason authority.Reason, words ...string) {
		t.Helper()
		id, err := verify(token)
		var refusal *authority.Refusal
		if !errors.As(err, &refusal) || refusal.Reason != reason || id != (identity.Identity{}) {
			t.Errorf("%s: %v, %v; want it refused as %s", name, id, err, reason)
			return
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v; want it to say %q", name, err, w)
			}
		}
		if strings.Contains(err.Error(), token) && token != "" && token != "x" {
			t.Errorf("%s: the refusal holds the token", name)
		}
	}
	refused("another audience", r.token(t, "payments", pod, "vault"), authority.TokenRejected, `audience "[vault]"`)
	refused("the API server's audience", r.token(t, "payments", pod), authority.TokenRejected, "kubernetes.default.svc")
	refused("bound to no pod", r.token(t, "payments", nil, kube.Audience), authority.TokenUnbound, "bound to no pod")
	parts := strings.Split(own, ".")
	forged := strings.Join([]string{parts[0], base64.RawURLEncoding.EncodeToString([]byte(`{"iss":"https://evil.example","aud":["outrigger"],"sub":"system:serviceaccount:kube-system:default","exp":4000000000}`)), parts[2]}, ".")
	refused("another issuer", forged, authority.TokenRejected, "https://evil.example")
	refused("garbage", "x", authority.TokenRejected, "not a service account token")
	refused("three parts of garbage", "a.b.c", authority.TokenRejected, "not a service account token")

	// One that has ended, as the kubelet would say, is no pod to be proved.
	jobs := r.token(t, "payments", done, kube.Audience)
	done.Status.Phase = corev1.PodSucceeded
	if err := r.admin.Status().Update(t.Context(), done); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string {
		if _, ok := r.Source().Pod(r.name("payments-job")); ok {
			return "the completed pod is still known"
		}
		return ""
	})
	refused("a completed pod", jobs, authority.TokenUnbound, "has ended")

	if err := r.admin.Delete(t.Context(), pod, client.GracePeriodSeconds(0)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	eventually(t, func() string { // the API server's own cache may be a moment late
		if _, err := verify(own); err == nil {
			return "the token of a deleted pod is accepted"
		}
		return ""
	})
	t.Logf("refused %s after its pod was deleted", time.Since(began).Round(time.Millisecond))
	gone := func(name string) {
		t.Helper()
		_, err := verify(own)
		var refusal *authority.Refusal
		// The API server may remember that the token was good; we look for the pod.
		if !errors.As(err, &refusal) || refusal.Reason != authority.TokenRejected && refusal.Reason != authority.TokenUnbound {
			t.Errorf("%s: %v", name, err)
		}
	}
	gone("a deleted pod")
	again := r.pod("payments-1", "payments") // of the same name
	r.create(t, again)
	gone("an earlier pod of that name")
}

// Who may not ask the API server refuses everybody, and says what is missing.
func TestTokensWithoutPermission(t *testing.T) {
	r := prepare(t, func(c *rest.Config) { c.Impersonate = rest.ImpersonationConfig{UserName: "nobody"} })
	_, err := r.TokenVerifier("example.org").Verify(t.Context(), "x")
	var refusal *authority.Refusal
	if !errors.As(err, &refusal) || refusal.Reason != authority.NotPossible || !strings.Contains(err.Error(), "tokenreviews") {
		t.Errorf("%v", err)
	}
}

// Replicas that start at once end with the same root, and one that comes later
// uses it; who has the Secret made by somebody else fills it.
func TestReplicasShareTheAuthority(t *testing.T) {
	r := prepare(t)
	open := func() *authority.Authority {
		a, err := authority.Open(t.Context(), authority.Options{
			Store: r.Secret(), TrustDomain: "example.org", Verifier: r.TokenVerifier("example.org"), Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Error(err)
			return nil
		}
		return a
	}
	for _, filled := range []bool{false, true} {
		secret := &corev1.Secret{ObjectMeta: r.meta(kube.AuthoritySecret), Data: map[string][]byte{"note": []byte("ours")}}
		if filled {
			r.create(t, secret)
		}
		all := make([]*authority.Authority, 8)
		var wg sync.WaitGroup
		for i := range all {
			wg.Go(func() { all[i] = open() })
		}
		wg.Wait()
		for _, a := range append(all, open()) {
			if a == nil || !a.Roots()[0].Equal(all[0].Roots()[0]) {
				t.Fatal("two replicas have different roots")
			}
		}
		if err := r.admin.Get(t.Context(), client.ObjectKeyFromObject(secret), secret); err != nil {
			t.Fatal(err)
		}
		if string(secret.Data["root.crt"]) != string(all[0].Bundle()) || len(secret.Data["ca.key"]) == 0 || secret.Data["token.key"] != nil || filled != (string(secret.Data["note"]) == "ours") {
			t.Errorf("filled before: %t; the Secret holds %d keys", filled, len(secret.Data))
		}
		if err := r.admin.Delete(t.Context(), secret); err != nil {
			t.Fatal(err)
		}
	}
}

// An exchange of the root goes through the Secret, and others pick it up.
func TestRotationInTheSecret(t *testing.T) {
	r := prepare(t)
	a, err := authority.Open(t.Context(), authority.Options{Store: r.Secret(), TrustDomain: "example.org", Verifier: r.TokenVerifier("example.org"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	changes := 0
	a.OnChange(func() { changes++ })
	first := a.Roots()[0]
	for i, step := range []authority.Step{authority.StepAdd, authority.StepSign, authority.StepRemove} {
		files, err := r.Secret().Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		next, did, err := authority.Rotate(files, "example.org", time.Hour, time.Now().Add(time.Duration(i)*2*time.Hour))
		if err != nil || did != step {
			t.Fatalf("%s, %v; want %s", did, err, step)
		}
		if err := r.Secret().Replace(t.Context(), files, next); err != nil {
			t.Fatal(err)
		}
		if err := r.Secret().Replace(t.Context(), files, next); !errors.Is(err, authority.ErrChanged) {
			t.Errorf("%s twice: %v", step, err)
		}
		if changed, err := a.Reload(t.Context()); err != nil || !changed {
			t.Errorf("%s: changed %t, %v", step, changed, err)
		}
	}
	if len(a.Roots()) != 1 || a.Roots()[0].Equal(first) || changes != 3 {
		t.Errorf("%d roots, changed %d times", len(a.Roots()), changes)
	}
	if files, err := r.Secret().Load(t.Context()); err != nil || len(files) != 3 {
		t.Errorf("%d files, %v", len(files), err)
	}
}

// distributor is a rig that gives out a bundle, which the test may change.
type distributor struct {
	*rig
	roots *kube.Roots

	mu     sync.Mutex
	bundle string
	asked  int
}

func distribute(t *testing.T) *distributor {
	d := &distributor{rig: prepare(t), bundle: "ROOT 1\n"}
	d.roots = d.DistributeRoots(func() []byte {
		d.mu.Lock()
		defer d.mu.Unlock()
		return []byte(d.bundle)
	}, func(context.Context) error {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.asked++
		return nil
	})
	return d
}

// Two replicas that do not have the same roots do not write without end.
func TestRootsInDispute(t *testing.T) {
	one, two := distribute(t), distribute(t)
	two.bundle = "ROOT 2\n"
	two.ns = one.ns
	m := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: one.ns}}
	change(t, one.rig, m, func(n *corev1.Namespace) { n.Labels = map[string]string{kube.LabelInjection: kube.Enabled} })
	for _, d := range []*distributor{one, two} {
		d.start()
		d.wait(t)
	}
	repairs := func() float64 {
		return one.metric(t, "outrigger_kube_roots_total", "result=repaired") + two.metric(t, "outrigger_kube_roots_total", "result=repaired")
	}
	began := time.Now()
	eventually(t, func() string {
		if n := repairs(); n < 4 {
			return fmt.Sprint(n, " repairs")
		}
		return ""
	})
	if took := time.Since(began); took < 2*time.Second {
		t.Errorf("4 repairs in %s", took)
	}
	two.mu.Lock()
	two.bundle = "ROOT 1\n" // it has heard
	two.mu.Unlock()
	two.roots.Changed()
	eventually(t, func() string { return one.holds(t, one.ns, "ROOT 1\n") })
}

// holds says what is wrong with the roots of a namespace.
func (r *rig) holds(t *testing.T, namespace, want string) string {
	t.Helper()
	var m corev1.ConfigMap
	err := r.admin.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: kube.RootsConfigMap}, &m)
	if apierrors.IsNotFound(err) {
		return "there is no ConfigMap in " + namespace
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Data) != 1 || m.Data[kube.RootsKey] != want || m.Labels[kube.ManagedBy] != kube.ManagedByValue {
		return fmt.Sprintf("%s holds %q, labels %v; want %q", namespace, m.Data, m.Labels, want)
	}
	return ""
}

// Meshed namespaces get the roots, edits are undone, a new bundle reaches all; what
// is somebody else's is left alone, and nothing is written where nobody asked.
func TestRootsAreKept(t *testing.T) {
	d := distribute(t)
	named := func(suffix string) string { return d.ns + "-" + suffix }
	label := map[string]string{kube.LabelInjection: kube.Enabled}
	for _, ns := range []string{"enabled", "pod", "plain", "foreign", "late"} {
		o := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: named(ns)}}
		if ns == "enabled" || ns == "foreign" {
			o.Labels = label
		}
		d.create(t, o)
	}
	foreign := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: named("foreign"), Name: kube.RootsConfigMap}, Data: map[string]string{"mine": "x"}}
	d.create(t, foreign)
	d.start()
	d.wait(t)
	eventually(t, func() string { return d.holds(t, named("enabled"), "ROOT 1\n") })
	eventually(t, func() string {
		if d.log.count("is not ours and is left alone") != 1 {
			return "nobody is told of the ConfigMap that is not ours"
		}
		return ""
	})

	// A pod that asks for it, where the namespace does not.
	pod := d.pod("one", "default")
	pod.Namespace, pod.Labels = named("pod"), label
	injected := d.pod("one", "default")
	injected.Namespace, injected.Annotations = named("late"), map[string]string{kube.AnnotationStatus: kube.StatusInjected}
	plain := d.pod("one", "default")
	plain.Namespace = named("plain")
	d.create(t, plain, pod, injected)
	eventually(t, func() string { return d.holds(t, named("pod"), "ROOT 1\n") })
	eventually(t, func() string { return d.holds(t, named("late"), "ROOT 1\n") })

	// Edits and deletions, as an administrator's hand makes them.
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: named("enabled"), Name: kube.RootsConfigMap}}
	change(t, d.rig, m, func(m *corev1.ConfigMap) {
		m.Data = map[string]string{kube.RootsKey: "EVIL\n", "more": "x"}
		m.Annotations = map[string]string{"example.com/note": "stays"}
	})
	began := time.Now()
	eventually(t, func() string { return d.holds(t, named("enabled"), "ROOT 1\n") })
	t.Logf("repaired after %s", time.Since(began).Round(time.Millisecond))
	if err := d.admin.Get(t.Context(), client.ObjectKeyFromObject(m), m); err != nil || m.Annotations["example.com/note"] != "stays" {
		t.Errorf("annotations %v, %v", m.Annotations, err)
	}
	d.mu.Lock()
	if d.asked == 0 {
		t.Error("roots were overwritten without a look at what they are now")
	}
	d.mu.Unlock()
	if err := d.admin.Delete(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return d.holds(t, named("enabled"), "ROOT 1\n") })

	d.mu.Lock()
	d.bundle = "ROOT 1\nROOT 2\n"
	d.mu.Unlock()
	d.roots.Changed()
	for _, ns := range []string{"enabled", "pod", "late"} {
		eventually(t, func() string { return d.holds(t, named(ns), "ROOT 1\nROOT 2\n") })
	}
	if err := d.admin.Get(t.Context(), client.ObjectKeyFromObject(foreign), foreign); err != nil || foreign.Data["mine"] != "x" || len(foreign.Data) != 1 {
		t.Errorf("somebody else's: %v, %v", foreign.Data, err)
	}
	for _, ns := range []string{named("plain"), "kube-system"} {
		if said := d.holds(t, ns, ""); said != "there is no ConfigMap in "+ns {
			t.Error(said)
		}
	}
}

// The role that the package asks for suffices, for all of it.
func TestTheRoleSuffices(t *testing.T) {
	verbs := func(v ...string) []string { return v }
	read := verbs("get", "list", "watch")
	rules := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"services", "pods", "namespaces"}, Verbs: read},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: read},
		{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"httproutes", "grpcroutes", "tlsroutes", "referencegrants"}, Verbs: read},
		{APIGroups: []string{"outrigger.dev"}, Resources: []string{"circuitbreakers", "retrypolicies", "authorizationpolicies"}, Verbs: read},
		{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: verbs("create")},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: verbs("create")},
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{kube.RootsConfigMap}, Verbs: verbs("get", "list", "watch", "update")},
	}
	own := []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: verbs("create")},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{kube.AuthoritySecret}, Verbs: verbs("get", "update")},
	}
	const account = "system:serviceaccount:test:control-plane"
	r := prepare(t, func(c *rest.Config) {
		c.Impersonate = rest.ImpersonationConfig{UserName: account, Groups: []string{"system:serviceaccounts", "system:authenticated"}}
	})
	subjects := []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: account}}
	r.create(t,
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: r.ns}, Rules: rules},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: r.ns}, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: r.ns}},
		&rbacv1.Role{ObjectMeta: r.meta("own"), Rules: own},
		&rbacv1.RoleBinding{ObjectMeta: r.meta("own"), Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "own"}},
	)
	var a *authority.Authority
	eventually(t, func() string { // the API server learns of roles a moment later
		var err error
		if a, err = authority.Open(t.Context(), authority.Options{
			Store: r.Secret(), TrustDomain: "example.org", Verifier: r.TokenVerifier("example.org"), Log: slog.New(slog.DiscardHandler),
		}); err != nil {
			return err.Error()
		}
		return ""
	})
	roots := r.DistributeRoots(a.Bundle, func(ctx context.Context) error { _, err := a.Reload(ctx); return err })
	a.OnChange(roots.Changed)
	r.start()
	r.wait(t)
	if _, problems := r.Source().Load(); slices.ContainsFunc(problems, func(p translate.Problem) bool { return p.Reason == kube.ReasonForbidden }) {
		t.Errorf("%v", problems)
	}
	pod := r.pod("payments-1", "payments")
	pod.Labels = map[string]string{kube.LabelInjection: kube.Enabled}
	r.create(t, &corev1.ServiceAccount{ObjectMeta: r.meta("payments")}, pod)
	if id, err := r.TokenVerifier("example.org").Verify(t.Context(), r.token(t, "payments", pod, kube.Audience)); err != nil || id.ServiceAccount != "payments" {
		t.Errorf("%v, %v", id, err)
	}
	eventually(t, func() string { return r.holds(t, r.ns, string(a.Bundle())) })
	old, err := r.Secret().Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	next, _, err := authority.Rotate(old, "example.org", time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Secret().Replace(t.Context(), old, next); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() string { return r.holds(t, r.ns, string(next["root.crt"])) })
}
