package installation

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
)

// Installation is what is in a cluster.
type Installation struct {
	// Version of the programs; empty where nothing is installed.
	Version string
	// ManagedBy is Manager where this command line installed it, else Helm or
	// whatever its label says.
	ManagedBy string
	Namespace string
	// Profile and Values (YAML) that it was installed with; known where ManagedBy is
	// Manager.
	Profile, Values string
}

// Keys of the record.
const (
	recordVersion = "version"
	recordProfile = "profile"
	recordValues  = "values.yaml"
)

// Installed finds the installation in namespace. It refuses one that is in
// another: the names of what belongs to the whole cluster are taken.
func (c *Client) Installed(ctx context.Context, namespace string) (Installation, error) {
	var in Installation
	hook, err := c.find(ctx, object(kinds()[0], "", webhook))
	if err != nil && !apierrors.IsForbidden(err) { // who may not look may still ask for the rest
		return in, err
	}
	if hook != nil {
		if hooks, _, err := unstructured.NestedSlice(hook.Object, "webhooks"); err == nil && len(hooks) > 0 {
			if m, ok := hooks[0].(map[string]any); ok {
				if at, _, err := unstructured.NestedString(m, "clientConfig", "service", "namespace"); err == nil && at != "" && at != namespace {
					return in, fmt.Errorf("outrigger is installed in namespace %s, and there can be one in a cluster: give --namespace %[1]s", at)
				}
			}
		}
	}
	d, err := c.kube.AppsV1().Deployments(namespace).Get(ctx, controlPlane, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return in, nil
	}
	if err != nil {
		return in, fmt.Errorf("what is installed: %w", err)
	}
	in = Installation{Version: d.Labels[chart.LabelVersion], ManagedBy: d.Labels[chart.LabelManagedBy], Namespace: namespace}
	m, err := c.kube.CoreV1().ConfigMaps(namespace).Get(ctx, record, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
	case err != nil:
		return in, fmt.Errorf("what is installed: %w", err)
	default:
		in.Profile, in.Values = m.Data[recordProfile], m.Data[recordValues]
		// A label cannot hold every version.
		in.Version = m.Data[recordVersion]
	}
	return in, nil
}

// ByOther says who else manages the installation, and what to use instead.
func (in Installation) ByOther() error {
	switch {
	case in.Version == "" || in.ManagedBy == Manager:
		return nil
	case in.ManagedBy == "Helm":
		return fmt.Errorf("outrigger %s in namespace %s was installed with Helm: go on with helm upgrade and helm uninstall", in.Version, in.Namespace)
	default:
		return fmt.Errorf("outrigger %s in namespace %s is managed by %q, not by this command line: go on with that, or remove it first", in.Version, in.Namespace, in.ManagedBy)
	}
}

// Plan is what is to be put into a cluster.
type Plan struct {
	Release   *chart.Release
	Namespace string
	// Profile and Values are kept for the next upgrade. No secrets are in them.
	Profile, Values string
	// DryRun has the API server check everything, and changes nothing.
	DryRun bool
	// Wait until it works; the time is ctx'.
	Wait bool
	// Out is told what happens, a line each.
	Out io.Writer
}

// Apply puts the release into the cluster: the namespace and the CRDs, what
// programs need, the programs, and the webhook at last; then it removes what
// earlier releases had and this one has not. Nothing is changed where an object
// of that name belongs to somebody else. It may be called again after an error
// and goes on from there.
func (c *Client) Apply(ctx context.Context, p Plan) error {
	var first, middle, last []*unstructured.Unstructured
	for _, o := range p.Release.Objects {
		switch o.GetKind() {
		case "Namespace":
			first = append(first, o)
		case "MutatingWebhookConfiguration":
			last = append(last, o)
		default:
			middle = append(middle, o)
		}
	}
	middle = append(middle, p.record())
	slices.SortStableFunc(middle, chart.Order)
	if err := c.foreign(ctx, slices.Concat(middle, last)); err != nil {
		return err
	}
	first, there, err := c.namespace(ctx, first, p)
	if err != nil {
		return err
	}
	send := func(objects []*unstructured.Unstructured) error {
		for _, o := range objects {
			if err := c.send(ctx, o, p, there); err != nil {
				return err
			}
		}
		return nil
	}
	waitFor := func(objects []*unstructured.Unstructured) error {
		if p.DryRun {
			return nil
		}
		return c.wait(ctx, objects, p.Out)
	}
	if err := send(first); err != nil {
		return err
	}
	if err := send(p.Release.CRDs); err != nil {
		return err
	}
	// The control plane looks for its kinds at its start.
	if err := waitFor(p.Release.CRDs); err != nil {
		return err
	}
	if err := send(middle); err != nil {
		return err
	}
	if p.Wait {
		if err := waitFor(middle); err != nil {
			return err
		}
	}
	if err := send(last); err != nil {
		return err
	}
	if p.Wait {
		if err := waitFor(last); err != nil {
			return err
		}
	}
	return c.prune(ctx, p, slices.Concat(first, middle, last))
}

// record is the ConfigMap that says how it was installed.
func (p Plan) record() *unstructured.Unstructured {
	o := object(corev1.SchemeGroupVersion.WithKind("ConfigMap"), p.Namespace, record)
	o.SetLabels(map[string]string{
		"app.kubernetes.io/name": "outrigger", chart.LabelComponent: "installation", chart.LabelPartOf: "outrigger", chart.LabelManagedBy: Manager,
		"app.kubernetes.io/instance": chart.Name,
	})
	o.Object["data"] = map[string]any{recordVersion: p.Release.Version, recordProfile: p.Profile, recordValues: p.Values}
	return o
}

// foreign refuses objects that somebody else has made under our names.
func (c *Client) foreign(ctx context.Context, objects []*unstructured.Unstructured) error {
	var whose []string
	for _, o := range objects {
		have, err := c.find(ctx, o)
		if err != nil {
			return err
		}
		if have == nil || have.GetLabels()[chart.LabelManagedBy] == Manager {
			continue
		}
		by := have.GetLabels()[chart.LabelManagedBy]
		if by == "" {
			by = "nobody that says so"
		}
		whose = append(whose, id(o)+" (managed by "+by+")")
	}
	if len(whose) > 0 {
		return fmt.Errorf("these are there already and are not this command line's: %s; remove them, or go on with what made them", strings.Join(whose, ", "))
	}
	return nil
}

// namespace decides about the release's namespace: one that is there and is not
// ours stays as it is, so that uninstall does not take it away. there says
// whether objects can be put into it.
func (c *Client) namespace(ctx context.Context, objects []*unstructured.Unstructured, p Plan) (apply []*unstructured.Unstructured, there bool, err error) {
	ns, err := c.kube.CoreV1().Namespaces().Get(ctx, p.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return objects, !p.DryRun, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("namespace %s: %w", p.Namespace, err)
	}
	if ns.Status.Phase == corev1.NamespaceTerminating {
		return nil, false, fmt.Errorf("namespace %s is being deleted: wait until it is gone (kubectl get namespace %[1]s)", p.Namespace)
	}
	if ns.Labels[chart.LabelManagedBy] == Manager {
		return objects, true, nil
	}
	fmt.Fprintf(p.Out, "Namespace %s is there and stays as it is\n", p.Namespace)
	if level := ns.Labels[labelEnforce]; level == "baseline" || level == "restricted" {
		fmt.Fprintf(p.Out, "warning: namespace %s enforces Pod Security %s, under which the collector's and the CNI plugin's pods are refused: kubectl label namespace %[1]s --overwrite %s=privileged\n", p.Namespace, level, labelEnforce)
	}
	return nil, true, nil
}

const labelEnforce = "pod-security.kubernetes.io/enforce"

// send applies an object and says what became of it.
func (c *Client) send(ctx context.Context, o *unstructured.Unstructured, p Plan, there bool) error {
	have, err := c.find(ctx, o)
	if err != nil {
		return err
	}
	asIf := o
	if p.DryRun && !there && o.GetNamespace() != "" {
		// A dry run cannot make the namespace; any other shows as much.
		asIf = o.DeepCopy()
		asIf.SetNamespace(metav1.NamespaceDefault)
	}
	got, err := c.apply(ctx, asIf, p.DryRun)
	if errors.Is(err, errNoKind) && o.GetKind() == "PodMonitor" {
		return fmt.Errorf("%w: install the Prometheus operator's CustomResourceDefinitions, or leave podMonitors.enabled false", err)
	}
	if err != nil {
		return err
	}
	did := "configured"
	switch {
	case have == nil:
		did = "created"
	case have.GetResourceVersion() == got.GetResourceVersion() && !p.DryRun, p.DryRun && have.GetGeneration() == got.GetGeneration():
		did = "unchanged"
	}
	if p.DryRun {
		did = "would be " + did
	}
	fmt.Fprintf(p.Out, "%s %s\n", id(o), did)
	return nil
}

// prune removes what bears our labels and is not among keep.
func (c *Client) prune(ctx context.Context, p Plan, keep []*unstructured.Unstructured) error {
	kept := map[string]bool{}
	for _, o := range keep {
		kept[id(o)] = true
	}
	have, err := c.owned(ctx, p.Namespace)
	if err != nil {
		return err
	}
	for _, o := range have {
		if kept[id(o)] {
			continue
		}
		if p.DryRun {
			fmt.Fprintf(p.Out, "%s would be removed: this release has none\n", id(o))
			continue
		}
		if _, err := c.remove(ctx, o); err != nil {
			return err
		}
		fmt.Fprintf(p.Out, "%s removed: this release has none\n", id(o))
	}
	return nil
}

// Removal is what is to be taken out of a cluster.
type Removal struct {
	Namespace string
	// CRDs and with them every policy that users wrote.
	CRDs []*unstructured.Unstructured
	// KeepNamespace keeps it and the authority in it, so that a later installation
	// is trusted by the sidecars of this one.
	KeepNamespace bool
	DryRun        bool
	Out           io.Writer
}

// Remove takes the installation out: the webhook first, so that no pod waits for
// an injector that is gone; then all that bears our labels; the roots in
// namespaces where no pod is meshed any more; the namespace, if it is ours.
// What is not there is passed over.
func (c *Client) Remove(ctx context.Context, r Removal) error {
	objects, err := c.owned(ctx, r.Namespace)
	if err != nil {
		return err
	}
	meshed, err := c.meshed(ctx)
	if err != nil {
		return err
	}
	rootMaps, err := c.rootMaps(ctx, meshed)
	if err != nil {
		return err
	}
	objects = append(objects, rootMaps...)
	objects = append(objects, r.CRDs...)
	ns, err := c.find(ctx, object(corev1.SchemeGroupVersion.WithKind("Namespace"), "", r.Namespace))
	if err != nil {
		return err
	}
	if ns != nil && ns.GetLabels()[chart.LabelManagedBy] == Manager && !r.KeepNamespace {
		objects = append(objects, ns)
	} else {
		objects = append(objects, object(corev1.SchemeGroupVersion.WithKind("Secret"), r.Namespace, servingSecret))
	}
	n := 0
	for _, o := range objects {
		if r.DryRun {
			have, err := c.find(ctx, o)
			if err != nil {
				return err
			}
			if have != nil {
				fmt.Fprintf(r.Out, "%s would be removed\n", id(o))
				n++
			}
			continue
		}
		was, err := c.remove(ctx, o)
		if err != nil {
			return err
		}
		if was {
			fmt.Fprintf(r.Out, "%s removed\n", id(o))
			n++
		}
	}
	if n == 0 {
		fmt.Fprintf(r.Out, "nothing of outrigger was in namespace %s\n", r.Namespace)
	}
	left(r.Out, meshed)
	return nil
}

// rootMaps are the ConfigMaps with the roots, where nobody mounts them any more.
func (c *Client) rootMaps(ctx context.Context, meshed []Meshed) ([]*unstructured.Unstructured, error) {
	used := map[string]bool{}
	for _, m := range meshed {
		used[m.Namespace] = true
	}
	list, err := c.kube.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + roots})
	if err != nil {
		return nil, fmt.Errorf("list ConfigMaps %s: %w", roots, err)
	}
	var out []*unstructured.Unstructured
	for _, m := range list.Items {
		if !used[m.Namespace] {
			out = append(out, object(corev1.SchemeGroupVersion.WithKind("ConfigMap"), m.Namespace, m.Name))
		}
	}
	return out, nil
}

// Meshed is a pod with a sidecar.
type Meshed struct {
	Namespace, Name string
	// Owner is what made the pod, as kubectl names it; empty for a bare pod.
	Owner string
	// Version is the tag of the sidecar's image; empty where it has none.
	Version string
}

// meshed lists all pods with a sidecar that have not completed.
func (c *Client) meshed(ctx context.Context) ([]Meshed, error) {
	var out []Meshed
	opts := metav1.ListOptions{Limit: pageSize}
	for {
		pods, err := c.kube.CoreV1().Pods("").List(ctx, opts)
		if err != nil {
			return nil, fmt.Errorf("list pods: %w", err)
		}
		for _, p := range pods.Items {
			if p.Annotations[annotationState] != injected || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
				continue
			}
			m := Meshed{Namespace: p.Namespace, Name: p.Name}
			for _, ctr := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
				if ctr.Name == proxyContainer {
					m.Version = tag(ctr.Image)
				}
			}
			if o := metav1.GetControllerOf(&p); o != nil {
				m.Owner = owner(*o, p.Labels)
			}
			out = append(out, m)
		}
		if opts.Continue = pods.Continue; opts.Continue == "" {
			return out, nil
		}
	}
}

// tag of an image; empty where it is pinned by digest only.
func tag(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if i := strings.LastIndexByte(image, ':'); i > strings.LastIndexByte(image, '/') {
		return image[i+1:]
	}
	return ""
}

// owner names who restarts a pod: of a ReplicaSet the Deployment that it is of.
func owner(o metav1.OwnerReference, labels map[string]string) string {
	name := o.Name
	kind := strings.ToLower(o.Kind)
	if hash := labels["pod-template-hash"]; kind == "replicaset" && hash != "" {
		kind, name = "deployment", strings.TrimSuffix(name, "-"+hash)
	}
	return kind + "/" + name
}

// maxListed pods or owners are named; of the rest their number.
const maxListed = 20

// left says which pods keep their sidecar, and how they lose it.
func left(out io.Writer, meshed []Meshed) {
	if len(meshed) == 0 {
		return
	}
	fmt.Fprintf(out, "%d pods keep their sidecar and its last configuration until they are restarted; their certificates are not renewed any more:\n", len(meshed))
	for _, line := range restarts(meshed) {
		fmt.Fprintln(out, "  "+line)
	}
}

// restarts are the commands that give pods another sidecar, or none.
func restarts(meshed []Meshed) []string {
	commands := map[string]bool{}
	for _, m := range meshed {
		kind, _, _ := strings.Cut(m.Owner, "/")
		switch kind {
		case "deployment", "statefulset", "daemonset":
			commands[fmt.Sprintf("kubectl rollout restart %s --namespace %s", m.Owner, m.Namespace)] = true
		default:
			commands[fmt.Sprintf("kubectl delete pod %s --namespace %s", m.Name, m.Namespace)] = true
		}
	}
	all := slices.Sorted(maps.Keys(commands))
	if n := len(all) - maxListed; n > 0 {
		all = append(all[:maxListed], fmt.Sprintf("... and %d more", n))
	}
	return all
}

// TooOld are the meshed pods whose sidecar a control plane of version to would
// not understand, and the commands that mend it.
func (c *Client) TooOld(ctx context.Context, to string) error {
	meshed, err := c.meshed(ctx)
	if err != nil {
		return err
	}
	old := slices.DeleteFunc(meshed, func(m Meshed) bool {
		n, ok := behind(m.Version, to)
		return !ok || n <= maxSkew
	})
	if len(old) == 0 {
		return nil
	}
	return fmt.Errorf("%d pods have a sidecar that is more than %d minor versions behind %s, which would not understand it any more; restart them first, under the version that is installed:\n  %s", len(old), maxSkew, to, strings.Join(restarts(old), "\n  "))
}
