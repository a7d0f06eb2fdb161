// Package installation is the command line's door to a Kubernetes cluster: it puts
// the rendered chart into one, takes it out again, waits, and looks what is
// wrong.
//
// It knows the Kubernetes API and the names of our objects in it. It knows
// neither flags nor the chart's values; package main renders and prints.
package installation

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
)

// Manager is who we are to the cluster: the field manager of what we apply, and
// the label app.kubernetes.io/managed-by.
const Manager = "outrigger"

// Names of our objects.
const (
	Namespace       = "outrigger-system"
	controlPlane    = "outrigger-control-plane"
	injector        = "outrigger-injector"
	webhook         = "outrigger-injector"
	authority       = "outrigger-authority"
	servingSecret   = "outrigger-injector-certificate"
	roots           = "outrigger-roots"
	record          = "outrigger-installation" // ConfigMap: how it was installed
	proxyContainer  = "outrigger-proxy"
	labelInjection  = "outrigger.dev/injection"
	annotationState = "outrigger.dev/status"
	injected        = "injected"
)

// pageSize bounds one answer of a list.
const pageSize = 500

// Client talks to one cluster. It is safe for concurrent use.
type Client struct {
	kube    kubernetes.Interface
	dynamic dynamic.Interface
	mapper  meta.ResettableRESTMapper
	host    string
}

// Connect reads a kubeconfig: the file, or where that is empty $KUBECONFIG, the
// one in the home folder, or the pod's service account. What the API server warns
// of is written to warnings, each once.
func Connect(kubeconfig, kubeContext string, warnings io.Writer) (*Client, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	conf, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: kubeContext}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("how to reach the cluster: %w; give --kubeconfig and --context, as to kubectl", err)
	}
	// We ask one thing after the other; the API server's own fairness does the rest.
	conf.QPS = -1
	conf.WarningHandler = rest.NewWarningWriter(warnings, rest.WarningWriterOptions{Deduplicate: true})
	return New(conf)
}

// New returns a client of the cluster that conf says how to reach.
func New(conf *rest.Config) (*Client, error) {
	kube, err := kubernetes.NewForConfig(conf)
	if err != nil {
		return nil, fmt.Errorf("the cluster: %w", err)
	}
	dyn, err := dynamic.NewForConfig(conf)
	if err != nil {
		return nil, fmt.Errorf("the cluster: %w", err)
	}
	return &Client{kube: kube, dynamic: dyn, mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(kube.Discovery())), host: conf.Host}, nil
}

// Version of the API server, such as v1.37.2.
func (c *Client) Version() (string, error) {
	v, err := c.kube.Discovery().ServerVersion()
	if err != nil {
		return "", fmt.Errorf("the cluster at %s does not answer: %w", c.host, err)
	}
	return v.GitVersion, nil
}

// errNoKind: the cluster does not serve that kind.
var errNoKind = errors.New("the cluster does not know this kind")

// resource finds how objects of a kind are reached; in namespace where they are
// in one.
func (c *Client) resource(gvk schema.GroupVersionKind, namespace string) (dynamic.ResourceInterface, error) {
	m, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		c.mapper.Reset() // its CRD may be new
		m, err = c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	}
	if meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("%s %s: %w", gvk.GroupVersion(), gvk.Kind, errNoKind)
	}
	if err != nil {
		return nil, fmt.Errorf("kind %s: %w", gvk.Kind, err)
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return c.dynamic.Resource(m.Resource).Namespace(namespace), nil
	}
	return c.dynamic.Resource(m.Resource), nil
}

func (c *Client) resourceOf(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	return c.resource(o.GroupVersionKind(), o.GetNamespace())
}

// find returns the object as it is in the cluster, nil where it is not there.
func (c *Client) find(ctx context.Context, o *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	r, err := c.resourceOf(o)
	if errors.Is(err, errNoKind) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	have, err := r.Get(ctx, o.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", id(o), err)
	}
	return have, nil
}

// apply sends o by server-side apply; what others have written to fields that o
// names is overruled.
func (c *Client) apply(ctx context.Context, o *unstructured.Unstructured, dryRun bool) (*unstructured.Unstructured, error) {
	r, err := c.resourceOf(o)
	if err != nil {
		return nil, err
	}
	opts := metav1.ApplyOptions{FieldManager: Manager, Force: true}
	if dryRun {
		opts.DryRun = []string{metav1.DryRunAll}
	}
	got, err := r.Apply(ctx, o.GetName(), o, opts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", id(o), err)
	}
	return got, nil
}

// remove deletes o and reports whether it was there.
func (c *Client) remove(ctx context.Context, o *unstructured.Unstructured) (bool, error) {
	r, err := c.resourceOf(o)
	if errors.Is(err, errNoKind) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	propagation := metav1.DeletePropagationBackground
	err = r.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &propagation})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", id(o), err)
	}
	return true, nil
}

// id names an object for people.
func id(o *unstructured.Unstructured) string {
	if o.GetNamespace() == "" {
		return o.GetKind() + " " + o.GetName()
	}
	return o.GetKind() + " " + o.GetNamespace() + "/" + o.GetName()
}

// kinds that the chart makes or has made, but for the namespace and the CRDs,
// which are never pruned.
func kinds() []schema.GroupVersionKind {
	out := []schema.GroupVersionKind{}
	for _, s := range []string{
		"admissionregistration.k8s.io/v1 MutatingWebhookConfiguration", "monitoring.coreos.com/v1 PodMonitor", "autoscaling/v2 HorizontalPodAutoscaler",
		"policy/v1 PodDisruptionBudget", "apps/v1 DaemonSet", "apps/v1 Deployment", "v1 Service", "networking.k8s.io/v1 NetworkPolicy", "v1 ConfigMap",
		"rbac.authorization.k8s.io/v1 RoleBinding", "rbac.authorization.k8s.io/v1 Role", "rbac.authorization.k8s.io/v1 ClusterRoleBinding",
		"rbac.authorization.k8s.io/v1 ClusterRole", "v1 ServiceAccount", "v1 ResourceQuota",
	} {
		version, kind, _ := strings.Cut(s, " ")
		out = append(out, schema.FromAPIVersionAndKind(version, kind))
	}
	return out
}

// owned lists what we have installed, in the order in which it is to go: the
// webhook first, then workloads, then what they need.
func (c *Client) owned(ctx context.Context, namespace string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for _, gvk := range kinds() {
		r, err := c.resource(gvk, namespace)
		if errors.Is(err, errNoKind) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list, err := r.List(ctx, metav1.ListOptions{LabelSelector: chart.LabelPartOf + "=outrigger," + chart.LabelManagedBy + "=" + Manager})
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", gvk.Kind, err)
		}
		for i := range list.Items {
			out = append(out, &list.Items[i])
		}
	}
	return out, nil
}

func crdObject(name string) *unstructured.Unstructured {
	return object(apiextensionsv1.SchemeGroupVersion.WithKind("CustomResourceDefinition"), "", name)
}

func object(gvk schema.GroupVersionKind, namespace, name string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{}
	o.SetGroupVersionKind(gvk)
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}
