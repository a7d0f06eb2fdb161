package webhook

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Namespaces knows the labels of namespaces, which a review does not hold. Safe
// for concurrent use.
type Namespaces struct {
	factory informers.SharedInformerFactory
	store   cache.Store
}

// NewNamespaces asks nobody yet.
func NewNamespaces(client kubernetes.Interface) (*Namespaces, error) {
	factory := informers.NewSharedInformerFactory(client, 0)
	informer := factory.Core().V1().Namespaces().Informer()
	err := informer.SetTransform(func(v any) (any, error) { // labels are all that is asked for
		ns, ok := v.(*corev1.Namespace)
		if !ok {
			return v, nil
		}
		out := &corev1.Namespace{}
		out.Name, out.Labels, out.ResourceVersion = ns.Name, ns.Labels, ns.ResourceVersion
		return out, nil
	})
	if err != nil {
		return nil, fmt.Errorf("watch namespaces: %w", err)
	}
	return &Namespaces{factory: factory, store: informer.GetStore()}, nil
}

// Run watches until ctx ends.
func (n *Namespaces) Run(ctx context.Context) error {
	n.factory.Start(ctx.Done())
	<-ctx.Done()
	n.factory.Shutdown()
	return nil
}

// Labels of a namespace; none where it is not known (yet). They are not to be
// changed. A nil Namespaces knows none.
func (n *Namespaces) Labels(name string) map[string]string {
	if n == nil {
		return nil
	}
	v, ok, err := n.store.GetByKey(name)
	if err != nil || !ok {
		return nil
	}
	if ns, ok := v.(*corev1.Namespace); ok {
		return ns.Labels
	}
	return nil
}
