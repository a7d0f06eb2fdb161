// Package cluster is what the injector's audit and the command line ask a
// Kubernetes API: how it is reached, and which pods should be meshed.
//
// It knows client-go, and which objects are to be listed. It does not know what
// is to be said of a pod, which is package audit's.
package cluster

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/outrigger-mesh/outrigger/injector/audit"
	"github.com/outrigger-mesh/outrigger/injector/patch"
)

// Requests a second of one client.
const (
	queriesPerSecond = 50
	queryBurst       = 100
)

// pageSize is how many pods are asked for at once, and held in memory.
const pageSize = 500

// Connect makes a client of a kubeconfig file, and where that is empty of the
// files that kubectl would read or of the pod's own ServiceAccount. context is one
// of the kubeconfig; empty is the current one.
func Connect(kubeconfig, context, agent string) (kubernetes.Interface, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	conf, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("the cluster's address and credentials are not known: %w; give --kubeconfig, or set KUBECONFIG", err)
	}
	return New(conf, agent)
}

// New makes a client of a configuration. agent is how it names itself.
func New(conf *rest.Config, agent string) (kubernetes.Interface, error) {
	conf = rest.AddUserAgent(rest.CopyConfig(conf), agent)
	conf.QPS, conf.Burst = queriesPerSecond, queryBurst
	conf.AcceptContentTypes, conf.ContentType = "application/vnd.kubernetes.protobuf,application/json", "application/vnd.kubernetes.protobuf"
	client, err := kubernetes.NewForConfig(conf)
	if err != nil {
		return nil, fmt.Errorf("a client of the cluster: %w", err)
	}
	return client, nil
}

// Audit looks at the pods of a namespace, or of all where it is empty: at all of
// those in namespaces with the label of injection, and at those that have it
// themselves.
func Audit(ctx context.Context, client kubernetes.Interface, namespace string, s patch.Settings) (*audit.Report, error) {
	report := &audit.Report{Findings: []audit.Finding{}}
	known := map[string]*corev1.Namespace{}
	if namespace != "" {
		ns, err := client.CoreV1().Namespaces().Get(ctx, namespace, metav1.GetOptions{})
		if err != nil {
			return nil, fmt.Errorf("audit: %w", err)
		}
		known[namespace] = ns
	} else {
		list, err := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("audit: %w", err)
		}
		for i := range list.Items {
			known[list.Items[i].Name] = &list.Items[i]
		}
	}
	for name, ns := range known {
		if _, labelled := ns.Labels[patch.LabelInjection]; !labelled {
			continue
		}
		err := pods(ctx, client, name, "", func(pod *corev1.Pod) { report.Add(pod, ns, s) })
		if err != nil {
			return nil, err
		}
	}
	err := pods(ctx, client, namespace, patch.LabelInjection, func(pod *corev1.Pod) {
		ns := known[pod.Namespace]
		if ns == nil { // it is younger than the list
			ns = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: pod.Namespace}}
		}
		if _, labelled := ns.Labels[patch.LabelInjection]; !labelled {
			report.Add(pod, ns, s)
		}
	})
	if err != nil {
		return nil, err
	}
	report.Sort()
	return report, nil
}

// pods pages through the pods of a namespace.
func pods(ctx context.Context, client kubernetes.Interface, namespace, selector string, each func(*corev1.Pod)) error {
	options := metav1.ListOptions{LabelSelector: selector, Limit: pageSize}
	for {
		page, err := client.CoreV1().Pods(namespace).List(ctx, options)
		if err != nil {
			return fmt.Errorf("audit: list the pods of namespace %q: %w", namespace, err)
		}
		for i := range page.Items {
			each(&page.Items[i])
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return nil
		}
	}
}

// InjectorSettings are those that an installed injector was started with, as far
// as an audit needs them: read from the arguments of its Deployment.
func InjectorSettings(ctx context.Context, client kubernetes.Interface, namespace string) (patch.Settings, error) {
	s := patch.Settings{NativeSidecar: true}
	d, err := client.AppsV1().Deployments(namespace).Get(ctx, "outrigger-injector", metav1.GetOptions{})
	if err != nil {
		return s, fmt.Errorf("the injector's settings: %w", err)
	}
	for _, c := range d.Spec.Template.Spec.Containers {
		for _, arg := range slices.Concat(c.Command, c.Args) {
			name, value, set := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			on, err := strconv.ParseBool(value)
			on = on && err == nil || !set
			switch name {
			case "image":
				s.Image = value
			case "control-plane":
				s.ControlPlane = value
			case "envoy-image":
				s.EnvoyImage = value
			case "cni":
				s.CNI = on
			case "native-sidecar":
				s.NativeSidecar = on
			}
		}
	}
	if s.Image == "" {
		return s, fmt.Errorf("the injector's settings: Deployment %s/outrigger-injector has no argument --image=", namespace)
	}
	return s, nil
}
