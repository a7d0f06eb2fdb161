package installation

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilversion "k8s.io/apimachinery/pkg/util/version"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
)

// Level of a finding.
type Level string

// The levels. A Warning does not make a check fail.
const (
	OK      Level = "ok"
	Warning Level = "warning"
	Failure Level = "failure"
)

// Finding is the result of one check.
type Finding struct {
	// Check is what was looked at, in a word or two; it does not change.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Text is what was found.
	Text string `json:"text"`
	// Remedy is the command or the value that mends it; empty where all is well.
	Remedy string `json:"remedy,omitempty"`
}

// Versions of Kubernetes that something begins with.
var (
	oldest         = utilversion.MustParseGeneric("1.27")
	nativeSidecars = utilversion.MustParseGeneric("1.29")
)

// Supported says why a version of Kubernetes is too old; nil where it is not.
func Supported(kube string) error {
	v, err := utilversion.ParseGeneric(kube)
	if err != nil {
		return fmt.Errorf("the version of Kubernetes %q: %w", kube, err)
	}
	if v.LessThan(oldest) {
		return fmt.Errorf("the cluster is Kubernetes %s, and %s is the oldest that is supported: upgrade it first", kube, oldest)
	}
	return nil
}

// When certificates are said to end soon.
const (
	authoritySoon = 30 * 24 * time.Hour
	// The injector renews its certificate at half of its 30 days.
	servingSoon = 7 * 24 * time.Hour
)

// checking gathers findings. What cannot be looked at, for example for want of
// permission, is a warning that says so, never silence.
type checking struct {
	c        *Client
	rel      *chart.Release
	in       Installation
	now      time.Time
	findings []Finding
}

func (k *checking) ok(check, format string, args ...any) {
	k.findings = append(k.findings, Finding{check, OK, fmt.Sprintf(format, args...), ""})
}

func (k *checking) warn(check, remedy, format string, args ...any) {
	k.findings = append(k.findings, Finding{check, Warning, fmt.Sprintf(format, args...), remedy})
}

func (k *checking) fail(check, remedy, format string, args ...any) {
	k.findings = append(k.findings, Finding{check, Failure, fmt.Sprintf(format, args...), remedy})
}

// unseen is the finding of what could not be looked at.
func (k *checking) unseen(check string, err error) {
	k.warn(check, "ask as somebody who may, or see that the API server answers", "could not be looked at: %v", err)
}

// See is Installed for who may not be allowed to know: that is a finding then.
func (c *Client) See(ctx context.Context, namespace string) (Installation, []Finding, error) {
	in, err := c.Installed(ctx, namespace)
	if !apierrors.IsForbidden(err) {
		return in, nil, err
	}
	k := &checking{c: c}
	k.unseen("installation", err)
	return Installation{}, k.findings, nil
}

// Before looks at what an installation needs of the cluster. rel is what would
// be installed.
func (c *Client) Before(ctx context.Context, rel *chart.Release, in Installation, now time.Time) []Finding {
	k := &checking{c: c, rel: rel, in: in, now: now}
	k.kubernetes()
	k.permissions(ctx)
	k.podSecurity(ctx)
	k.otherMeshes(ctx)
	k.gatewayAPI(ctx)
	return k.findings
}

// After looks at an installation. rel is what this program would install.
func (c *Client) After(ctx context.Context, rel *chart.Release, in Installation, now time.Time) []Finding {
	k := &checking{c: c, rel: rel, in: in, now: now}
	k.version()
	k.parts(ctx)
	k.crds(ctx)
	k.authority(ctx)
	k.webhook(ctx)
	k.meshedPods(ctx)
	return k.findings
}

func (k *checking) kubernetes() {
	const check, native = "kubernetes", "native sidecars"
	text, err := k.c.Version()
	if err != nil {
		k.fail(check, "see that kubectl version answers with the same --kubeconfig and --context", "%v", err)
		return
	}
	v, err := utilversion.ParseGeneric(text)
	switch {
	case err != nil:
		k.unseen(check, err)
		return
	case v.LessThan(oldest):
		k.fail(check, "upgrade the cluster", "it is %s; %s is the oldest that is supported", text, oldest)
	default:
		k.ok(check, "%s", text)
	}
	if v.LessThan(nativeSidecars) {
		k.warn(native, "upgrade the cluster to 1.29, or know that sidecars start with the application, not before it", "Kubernetes before %s has none: sidecars are plain containers", nativeSidecars)
	} else {
		k.ok(native, "the cluster has them: sidecars start before and end after the application")
	}
}

// permissions asks for each kind of the release whether we may write it.
func (k *checking) permissions(ctx context.Context) {
	const check = "permissions"
	var missing []string
	asked := map[string]bool{}
	objects := slices.Concat(k.rel.CRDs, k.rel.Objects)
	for _, o := range objects {
		gvk := o.GroupVersionKind()
		m, err := k.c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			continue // said by install, for PodMonitors
		}
		for _, verb := range []string{"create", "patch"} {
			attrs := &authorizationv1.ResourceAttributes{Namespace: o.GetNamespace(), Verb: verb, Group: gvk.Group, Version: gvk.Version, Resource: m.Resource.Resource}
			key := verb + " " + m.Resource.GroupResource().String()
			if asked[key] {
				continue
			}
			asked[key] = true
			review, err := k.c.kube.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: attrs}}, metav1.CreateOptions{})
			if err != nil {
				k.unseen(check, err)
				return
			}
			if !review.Status.Allowed {
				missing = append(missing, key)
			}
		}
	}
	slices.Sort(missing)
	if len(missing) > 0 {
		k.fail(check, "install as a cluster administrator, for example kubectl create clusterrolebinding <name> --clusterrole cluster-admin --user <you>", "you may not %s", strings.Join(missing, ", "))
		return
	}
	k.ok(check, "you may do all %d things that an installation does", len(asked))
}

// enabled namespaces have the label of injection.
func (k *checking) enabled(ctx context.Context) ([]corev1.Namespace, error) {
	list, err := k.c.kube.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: labelInjection + "=enabled"})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// podSecurity: redirecting from within the pod needs NET_ADMIN, which the
// levels baseline and restricted refuse.
func (k *checking) podSecurity(ctx context.Context) {
	const check = "pod security"
	namespaces, err := k.enabled(ctx)
	if err != nil {
		k.unseen(check, err)
		return
	}
	cni, err := k.c.find(ctx, object(kinds()[4], k.namespace(), "outrigger-cni"))
	if err != nil {
		k.unseen(check, err)
		return
	}
	wanted := slices.ContainsFunc(k.rel.Objects, func(o *unstructured.Unstructured) bool { return o.GetName() == "outrigger-cni" })
	var strict []string
	for _, ns := range namespaces {
		if level := ns.Labels[labelEnforce]; level == "baseline" || level == "restricted" {
			strict = append(strict, ns.Name+" ("+level+")")
		}
	}
	switch {
	case len(strict) > 0 && cni == nil && !wanted:
		k.fail(check, "set cni.enabled=true, so that the node redirects their traffic and pods need no privilege", "the namespaces %s enforce a level that refuses the init container which redirects traffic", strings.Join(strict, ", "))
	case len(strict) > 0:
		k.ok(check, "%s are strict, and the CNI plugin spares their pods the privilege", strings.Join(strict, ", "))
	default:
		k.ok(check, "no namespace with sidecars refuses what they need")
	}
}

func (k *checking) namespace() string {
	if k.in.Namespace != "" {
		return k.in.Namespace
	}
	return Namespace
}

// otherMeshes knows the others by their webhooks and by the marks they put on
// namespaces.
func (k *checking) otherMeshes(ctx context.Context) {
	const check = "other meshes"
	hooks, err := k.c.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().List(ctx, metav1.ListOptions{})
	if err != nil {
		k.unseen(check, err)
		return
	}
	names := []struct{ part, mesh string }{
		{"istio", "Istio"}, {"linkerd", "Linkerd"}, {"kuma", "Kuma"}, {"kong-mesh", "Kong Mesh"}, {"consul", "Consul"}, {"osm-", "Open Service Mesh"}, {"traefik-mesh", "Traefik Mesh"},
	}
	there := map[string]bool{}
	for _, h := range hooks.Items {
		for _, n := range names {
			if strings.Contains(h.Name, n.part) {
				there[n.mesh] = true
			}
		}
	}
	namespaces, err := k.enabled(ctx)
	if err != nil {
		k.unseen(check, err)
		return
	}
	var both []string
	for _, ns := range namespaces {
		_, revision := ns.Labels["istio.io/rev"]
		switch {
		case ns.Labels["istio-injection"] == "enabled", revision, ns.Labels["istio.io/dataplane-mode"] != "" && ns.Labels["istio.io/dataplane-mode"] != "none",
			ns.Annotations["linkerd.io/inject"] == "enabled", ns.Annotations["linkerd.io/inject"] == "ingress", ns.Labels["kuma.io/sidecar-injection"] == "enabled":
			both = append(both, ns.Name)
		}
	}
	switch mesh := strings.Join(slices.Sorted(maps.Keys(there)), ", "); {
	case len(both) > 0:
		k.fail(check, "take the label of one of them from each namespace, and restart its pods", "the namespaces %s ask for two meshes, whose redirections would catch each other's traffic", strings.Join(both, ", "))
	case mesh != "":
		k.warn(check, "mesh namespaces with one of them only", "%s is in the cluster too", mesh)
	default:
		k.ok(check, "there are none")
	}
}

func (k *checking) gatewayAPI(ctx context.Context) {
	const check = "gateway api"
	crd, err := k.c.find(ctx, crdObject("httproutes.gateway.networking.k8s.io"))
	switch {
	case err != nil:
		k.unseen(check, err)
	case crd == nil:
		k.warn(check, "kubectl apply --server-side -f https://github.com/kubernetes-sigs/gateway-api/releases/download/v1.6.3/standard-install.yaml", "it is not installed: there are no HTTPRoutes, and all else works")
	default:
		v := crd.GetAnnotations()["gateway.networking.k8s.io/bundle-version"]
		if v == "" {
			v = "of a version that does not say so"
		}
		k.ok(check, "%s", v)
	}
}

func (k *checking) version() {
	const check = "version"
	in, ours := k.in.Version, k.rel.Version
	a, ok := parseVersion(in)
	b, ok2 := parseVersion(ours)
	switch {
	case in == ours:
		k.ok(check, "%s, as this program", in)
	case !ok || !ok2:
		k.warn(check, "use the command line of the same build", "%s is installed and this program is %s; builds that are no releases cannot be compared", in, ours)
	case a.compare(b) < 0:
		k.warn(check, "outrigger upgrade --wait", "%s is installed, and this program is %s", in, ours)
	default:
		k.warn(check, "use the command line of the same version", "%s is installed, and this program is %s: it may not know all that is new", in, ours)
	}
}

func (k *checking) parts(ctx context.Context) {
	found := 0
	for _, o := range k.rel.Objects {
		if o.GetKind() != "Deployment" && o.GetKind() != "DaemonSet" {
			continue
		}
		check := strings.TrimPrefix(o.GetName(), "outrigger-")
		optional := o.GetKind() == "DaemonSet"
		have, err := k.c.find(ctx, o)
		if err != nil {
			k.unseen(check, err)
			continue
		}
		if have == nil {
			if !optional {
				k.fail(check, "outrigger upgrade --wait puts it back", "%s is not there", id(o))
			}
			continue
		}
		found++
		why, err := k.c.unready(ctx, o)
		switch {
		case err != nil:
			k.unseen(check, err)
		case why != "":
			k.fail(check, fmt.Sprintf("kubectl describe %s %s --namespace %s, and kubectl logs of its pods", strings.ToLower(o.GetKind()), o.GetName(), o.GetNamespace()), "%s", why)
		case o.GetKind() == "DaemonSet":
			n, _, err := unstructured.NestedInt64(have.Object, "status", "numberAvailable")
			if err != nil {
				n = 0
			}
			k.ok(check, "works on %d nodes", n)
		default:
			n, _, err := unstructured.NestedInt64(have.Object, "status", "availableReplicas")
			if err != nil {
				n = 0
			}
			k.ok(check, "%d replicas work", n)
			if n < 2 {
				k.findings[len(k.findings)-1] = Finding{check, Warning, fmt.Sprintf("%d replica works: when its node is lost, so is this part for a while", n), "set " + lowerCamel(check) + ".replicas=2 where the cluster has two nodes"}
			}
		}
	}
}

func lowerCamel(s string) string {
	if head, tail, ok := strings.Cut(s, "-"); ok && tail != "" {
		return head + strings.ToUpper(tail[:1]) + tail[1:]
	}
	return s
}

// crds: that they are there, served, and what this version needs, which the API
// server is asked by a dry run.
func (k *checking) crds(ctx context.Context) {
	for _, want := range k.rel.CRDs {
		check := "crd " + strings.TrimSuffix(want.GetName(), ".outrigger.dev")
		have, err := k.c.find(ctx, want)
		if err != nil {
			k.unseen(check, err)
			continue
		}
		if have == nil {
			k.fail(check, "outrigger upgrade, or kubectl apply --server-side -f deploy/crds", "it is not there: policies of this kind cannot be written, and those that were are gone")
			continue
		}
		why, err := unestablished(have)
		if err != nil || why != "" {
			k.fail(check, "kubectl describe crd "+want.GetName(), "it is not served: %s", errors.Join(err, text(why)))
			continue
		}
		then, err := k.c.apply(ctx, want, true)
		if apierrors.IsForbidden(err) {
			k.ok(check, "established; whether it is this version's only somebody may say who may change it")
			continue
		}
		if err != nil {
			k.unseen(check, err)
			continue
		}
		same, err := sameSpec(have, then)
		switch {
		case err != nil:
			k.unseen(check, err)
		case !same:
			k.fail(check, "outrigger upgrade, or kubectl apply --server-side -f deploy/crds", "it is another version's than %s: fields may be missing, or dropped when they are written", k.rel.Version)
		default:
			k.ok(check, "established, as this version has it")
		}
	}
}

type text string

func (t text) Error() string { return string(t) }

func sameSpec(a, b *unstructured.Unstructured) (bool, error) {
	x, err := as[apiextensionsv1.CustomResourceDefinition](a)
	if err != nil {
		return false, err
	}
	y, err := as[apiextensionsv1.CustomResourceDefinition](b)
	if err != nil {
		return false, err
	}
	return equality.Semantic.DeepEqual(x.Spec, y.Spec), nil
}

// certificates decodes all in a PEM text.
func certificates(b []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("a certificate that cannot be read: %w", err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return out, nil
}

// life reports how long a certificate still lives: enough, too short or none.
func (k *checking) life(check, what, remedy string, c *x509.Certificate, soon time.Duration) {
	switch left := c.NotAfter.Sub(k.now); {
	case left <= 0:
		k.fail(check, remedy, "%s ended on %s", what, c.NotAfter.UTC().Format(time.RFC3339))
	case c.NotBefore.After(k.now):
		k.fail(check, "see that the clocks of this machine and of the cluster's nodes agree", "%s begins only on %s", what, c.NotBefore.UTC().Format(time.RFC3339))
	case left < soon:
		k.warn(check, remedy, "%s ends in %s, on %s", what, days(left), c.NotAfter.UTC().Format(time.RFC3339))
	default:
		k.ok(check, "%s lives for %s more", what, days(left))
	}
}

func days(d time.Duration) string {
	if d < 48*time.Hour {
		return d.Round(time.Minute).String()
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

func (k *checking) secret(ctx context.Context, check, name, remedy string) map[string][]byte {
	s, err := k.c.kube.CoreV1().Secrets(k.in.Namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		k.fail(check, remedy, "Secret %s/%s is not there", k.in.Namespace, name)
		return nil
	case err != nil:
		k.unseen(check, err)
		return nil
	}
	return s.Data
}

// authority: what signs workload certificates, and the roots that pods trust.
func (k *checking) authority(ctx context.Context) {
	const check = "authority"
	rotate := fmt.Sprintf("kubectl exec --namespace %s deployment/%s -- /control-plane --kubernetes --rotate-root, step by step", k.in.Namespace, controlPlane)
	data := k.secret(ctx, check, authority, "the control plane makes it at its start: kubectl logs --namespace "+k.in.Namespace+" deployment/"+controlPlane)
	if data == nil {
		return
	}
	certs, err := certificates(data["ca.crt"])
	if err != nil {
		k.fail(check, "restore Secret "+authority+" from a backup, or delete it and restart the control plane and then all meshed pods", "ca.crt of Secret %s: %v", authority, err)
		return
	}
	k.life(check, "the signing certificate", rotate, certs[0], authoritySoon)
	list, err := certificates(data["root.crt"])
	if err != nil {
		k.fail(check, "restore Secret "+authority+" from a backup", "root.crt of Secret %s: %v", authority, err)
		return
	}
	pool := x509.NewCertPool()
	for _, c := range list {
		pool.AddCert(c)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool, CurrentTime: k.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		k.fail(check, "restore Secret "+authority+" from a backup", "the signing certificate does not belong to the roots: %v", err)
	}
	k.roots(ctx, data["root.crt"])
}

// roots: every namespace with meshed pods has the authority's.
func (k *checking) roots(ctx context.Context, want []byte) {
	const check = "roots"
	meshed, err := k.c.meshed(ctx)
	if err != nil {
		k.unseen(check, err)
		return
	}
	list, err := k.c.kube.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + roots})
	if err != nil {
		k.unseen(check, err)
		return
	}
	have := map[string]string{}
	for _, m := range list.Items {
		have[m.Namespace] = m.Data["root.crt"]
	}
	wrong := map[string]bool{}
	all := map[string]bool{}
	for _, m := range meshed {
		all[m.Namespace] = true
		if !bytes.Equal(bytes.TrimSpace([]byte(have[m.Namespace])), bytes.TrimSpace(want)) {
			wrong[m.Namespace] = true
		}
	}
	if len(wrong) > 0 {
		k.fail(check, "kubectl logs --namespace "+k.in.Namespace+" deployment/"+controlPlane+": it writes them, and says why it cannot", "ConfigMap %s is missing or is not the authority's in %s: sidecars there do not trust the control plane", roots, strings.Join(slices.Sorted(maps.Keys(wrong)), ", "))
		return
	}
	k.ok(check, "the %d namespaces with meshed pods have the authority's", len(all))
}

// webhook: that it is there, that the API server can verify the injector, and
// that it reaches it, which a dry run of a pod shows.
func (k *checking) webhook(ctx context.Context) {
	const check, serving, reachable = "webhook", "webhook certificate", "webhook reachable"
	conf, err := k.c.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(ctx, webhook, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		k.fail(check, "outrigger upgrade --wait puts it back", "MutatingWebhookConfiguration %s is not there: no pod gets a sidecar", webhook)
		return
	}
	if err != nil {
		k.unseen(check, err)
		return
	}
	remedy := "kubectl rollout restart deployment/" + injector + " --namespace " + k.in.Namespace + "; its log says why it could not be kept"
	usable := true
	for _, h := range conf.Webhooks {
		cas, err := certificates(h.ClientConfig.CABundle)
		if err != nil {
			k.fail(check, remedy, "caBundle of %s: %v", h.Name, err)
			usable = false
			continue
		}
		newest := slices.MaxFunc(cas, func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
		if newest.NotAfter.Before(k.now) {
			k.fail(check, remedy, "caBundle of %s ended on %s", h.Name, newest.NotAfter.UTC().Format(time.RFC3339))
			usable = false
		}
	}
	if !usable {
		return
	}
	k.ok(check, "failure policy %s", policy(conf))
	if data := k.secret(ctx, serving, servingSecret, remedy); data != nil {
		k.serving(serving, remedy, conf, data["tls.crt"])
	}
	k.reach(ctx, reachable, conf)
}

func policy(conf *admissionregistrationv1.MutatingWebhookConfiguration) string {
	if len(conf.Webhooks) == 0 || conf.Webhooks[0].FailurePolicy == nil {
		return string(admissionregistrationv1.Fail)
	}
	return string(*conf.Webhooks[0].FailurePolicy)
}

// serving: the injector's certificate, and that each caBundle verifies it.
func (k *checking) serving(check, remedy string, conf *admissionregistrationv1.MutatingWebhookConfiguration, pemText []byte) {
	chain, err := certificates(pemText)
	if err != nil {
		k.fail(check, remedy, "tls.crt of Secret %s: %v", servingSecret, err)
		return
	}
	for _, h := range conf.Webhooks {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(h.ClientConfig.CABundle)
		opts := x509.VerifyOptions{Roots: pool, Intermediates: x509.NewCertPool(), CurrentTime: k.now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		if s := h.ClientConfig.Service; s != nil {
			opts.DNSName = s.Name + "." + s.Namespace + ".svc"
		}
		for _, c := range chain[1:] {
			opts.Intermediates.AddCert(c)
		}
		var invalid x509.CertificateInvalidError
		if _, err := chain[0].Verify(opts); errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			break // said below
		} else if err != nil {
			k.fail(check, remedy, "the API server cannot verify the injector by caBundle of %s: %v", h.Name, err)
			return
		}
	}
	k.life(check, "it", remedy, chain[0], servingSoon)
}

// reach creates a pod that asks for a sidecar, as a dry run, and looks whether
// it gets one. The webhook is called for dry runs too.
func (k *checking) reach(ctx context.Context, check string, conf *admissionregistrationv1.MutatingWebhookConfiguration) {
	no := false
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "outrigger-check-", Labels: map[string]string{labelInjection: "enabled"}},
		Spec:       corev1.PodSpec{AutomountServiceAccountToken: &no, Containers: []corev1.Container{{Name: "check", Image: "check"}}},
	}
	got, err := k.c.kube.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	network := "see that the API server reaches nodes at port 15017 (firewall or security group of the nodes), and kubectl get endpointslices --namespace " + k.in.Namespace + " -l kubernetes.io/service-name=" + injector
	switch {
	case err != nil && strings.Contains(err.Error(), "failed calling webhook"):
		k.fail(check, network, "pods that ask for a sidecar are not created: %v", err)
	case err != nil:
		k.warn(check, "ask as somebody who may create pods in namespace default", "a pod could not be tried: %v", err)
	case got.Annotations[annotationState] == injected:
		k.ok(check, "a pod that asks gets a sidecar")
	case policy(conf) == string(admissionregistrationv1.Ignore):
		k.fail(check, network, "a pod that asks gets none; with failure policy Ignore it runs without")
	default:
		k.fail(check, "kubectl get mutatingwebhookconfiguration "+webhook+" -o yaml: do its selectors take pods labelled "+labelInjection+"=enabled?", "a pod that asks was not sent to the injector (status %q: %s)", got.Annotations[annotationState], got.Annotations["outrigger.dev/reason"])
	}
}

// meshedPods: whether their sidecars are of a version that the control plane
// understands.
func (k *checking) meshedPods(ctx context.Context) {
	const check = "sidecars"
	meshed, err := k.c.meshed(ctx)
	if err != nil {
		k.unseen(check, err)
		return
	}
	var tooOld, old, ahead []Meshed
	unknown := 0
	for _, m := range meshed {
		n, ok := behind(m.Version, k.in.Version)
		switch {
		case m.Version == k.in.Version:
		case !ok:
			unknown++
		case n > maxSkew:
			tooOld = append(tooOld, m)
		case n < 0:
			ahead = append(ahead, m)
		default:
			old = append(old, m)
		}
	}
	list := func(m []Meshed) string { return strings.Join(restarts(m), "\n") }
	switch {
	case len(tooOld) > 0:
		k.fail(check, list(tooOld), "%d of %d are more than %d minor versions behind %s and may not understand it", len(tooOld), len(meshed), maxSkew, k.in.Version)
	case len(ahead) > 0:
		k.warn(check, "outrigger upgrade --wait, or "+list(ahead), "%d of %d are ahead of the control plane %s", len(ahead), len(meshed), k.in.Version)
	case len(old) > 0:
		k.warn(check, list(old), "%d of %d are of an older version than %s, which is understood", len(old), len(meshed), k.in.Version)
	case unknown > 0 && !known(k.in.Version, k.in.Version):
		k.ok(check, "%d, %d of them of another build; builds that are no releases cannot be compared", len(meshed), unknown)
	case unknown > 0:
		k.warn(check, "name the sidecar's image by a release", "%d of %d have an image whose tag is no release: nothing can be said of their version", unknown, len(meshed))
	default:
		k.ok(check, "%d, all of version %s", len(meshed), k.in.Version)
	}
}
