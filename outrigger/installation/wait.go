package installation

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

// poll is the time between two looks at what is waited for.
const poll = 500 * time.Millisecond

// wait looks until all of objects are ready, and says on out what it waits for
// whenever that changes. It ends with ctx; the error then says what is missing.
func (c *Client) wait(ctx context.Context, objects []*unstructured.Unstructured, out io.Writer) error {
	said := map[string]string{}
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		missing := map[string]string{}
		for _, o := range objects {
			why, err := c.unready(ctx, o)
			if err != nil && ctx.Err() == nil {
				why = err.Error() // the API server may be away for a moment
			}
			if why != "" {
				missing[id(o)] = why
			}
		}
		if ctx.Err() != nil {
			missing = said // what was asked after the end says nothing
		}
		if len(missing) == 0 && ctx.Err() == nil {
			return nil
		}
		for _, name := range slices.Sorted(maps.Keys(missing)) {
			if said[name] != missing[name] {
				fmt.Fprintf(out, "waiting for %s: %s\n", name, missing[name])
			}
		}
		said = missing
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w while waiting for %s; what has been installed stays, and the same command goes on from there", context.Cause(ctx), sentence(missing))
		case <-tick.C:
		}
	}
}

func sentence(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+" ("+m[k]+")")
	}
	return strings.Join(out, ", ")
}

// unready says what an object still lacks; empty where nothing, or where its
// kind has nothing to wait for.
func (c *Client) unready(ctx context.Context, o *unstructured.Unstructured) (string, error) {
	switch o.GetKind() {
	case "Deployment", "DaemonSet", "CustomResourceDefinition", "MutatingWebhookConfiguration":
	default:
		return "", nil
	}
	have, err := c.find(ctx, o)
	if err != nil {
		return "", err
	}
	if have == nil {
		return "it is not there", nil
	}
	switch o.GetKind() {
	case "Deployment":
		return c.unreadyDeployment(ctx, have)
	case "DaemonSet":
		return c.unreadyDaemonSet(ctx, have)
	case "CustomResourceDefinition":
		return unestablished(have)
	default:
		return noBundle(have), nil
	}
}

// as decodes u into the struct of its kind.
func as[T any](u *unstructured.Unstructured) (*T, error) {
	var out T
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &out); err != nil {
		return nil, fmt.Errorf("%s: %w", id(u), err)
	}
	return &out, nil
}

func (c *Client) unreadyDeployment(ctx context.Context, u *unstructured.Unstructured) (string, error) {
	d, err := as[appsv1.Deployment](u)
	if err != nil {
		return "", err
	}
	want := int32(1)
	if d.Spec.Replicas != nil {
		want = *d.Spec.Replicas
	}
	s := d.Status
	switch {
	case s.ObservedGeneration < d.Generation:
		return "no controller has looked at it yet", nil
	case s.UpdatedReplicas < want:
		return c.because(ctx, d.Namespace, d.Spec.Selector, fmt.Sprintf("%d of %d replicas are new", s.UpdatedReplicas, want)), nil
	case s.AvailableReplicas < want:
		return c.because(ctx, d.Namespace, d.Spec.Selector, fmt.Sprintf("%d of %d replicas are available", s.AvailableReplicas, want)), nil
	case s.Replicas > s.UpdatedReplicas:
		return fmt.Sprintf("%d old replicas still end", s.Replicas-s.UpdatedReplicas), nil
	}
	return "", nil
}

func (c *Client) unreadyDaemonSet(ctx context.Context, u *unstructured.Unstructured) (string, error) {
	d, err := as[appsv1.DaemonSet](u)
	if err != nil {
		return "", err
	}
	s := d.Status
	switch {
	case s.ObservedGeneration < d.Generation:
		return "no controller has looked at it yet", nil
	case s.UpdatedNumberScheduled < s.DesiredNumberScheduled:
		return c.because(ctx, d.Namespace, d.Spec.Selector, fmt.Sprintf("%d of %d nodes have the new one", s.UpdatedNumberScheduled, s.DesiredNumberScheduled)), nil
	case s.NumberAvailable < s.DesiredNumberScheduled:
		return c.because(ctx, d.Namespace, d.Spec.Selector, fmt.Sprintf("it is available on %d of %d nodes", s.NumberAvailable, s.DesiredNumberScheduled)), nil
	}
	return "", nil
}

// because adds to what the first pod that is not ready says about itself.
func (c *Client) because(ctx context.Context, namespace string, selector *metav1.LabelSelector, what string) string {
	pods, err := c.kube.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(selector), Limit: pageSize})
	if err != nil {
		return what // the reason is an extra
	}
	for _, p := range pods.Items {
		if why := podTrouble(p); why != "" {
			return what + "; " + p.Name + ": " + why
		}
	}
	return what
}

// podTrouble is why a pod does not run, in Kubernetes' words.
func podTrouble(p corev1.Pod) string {
	for _, cond := range p.Status.Conditions {
		if cond.Type == corev1.PodScheduled && cond.Status == corev1.ConditionFalse {
			return cond.Reason + ": " + cond.Message
		}
	}
	for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		switch {
		case s.State.Waiting != nil && s.State.Waiting.Reason != "ContainerCreating" && s.State.Waiting.Reason != "PodInitializing":
			why := s.State.Waiting.Reason
			if s.State.Waiting.Message != "" {
				why += ": " + s.State.Waiting.Message
			}
			if t := s.LastTerminationState.Terminated; t != nil && t.Message != "" {
				why += ": " + t.Message
			}
			return why
		case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
			return fmt.Sprintf("container %s ended with exit code %d", s.Name, s.State.Terminated.ExitCode)
		}
	}
	return ""
}

func unestablished(u *unstructured.Unstructured) (string, error) {
	crd, err := as[apiextensionsv1.CustomResourceDefinition](u)
	if err != nil {
		return "", err
	}
	why := "it is not established yet"
	for _, cond := range crd.Status.Conditions {
		switch {
		case cond.Type == apiextensionsv1.Established && cond.Status == apiextensionsv1.ConditionTrue:
			return "", nil
		case cond.Type == apiextensionsv1.NamesAccepted && cond.Status == apiextensionsv1.ConditionFalse:
			why = cond.Message
		}
	}
	return why, nil
}

// noBundle: until the injector has written its CA, the API server cannot call it.
func noBundle(u *unstructured.Unstructured) string {
	hooks, _, err := unstructured.NestedSlice(u.Object, "webhooks")
	if err != nil || len(hooks) == 0 {
		return "it has no webhooks"
	}
	for _, h := range hooks {
		m, ok := h.(map[string]any)
		if !ok {
			continue
		}
		if bundle, _, err := unstructured.NestedString(m, "clientConfig", "caBundle"); err != nil || bundle == "" {
			return "the injector has not written its caBundle yet"
		}
	}
	return ""
}
