package kube

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// RootsConfigMap is the ConfigMap from which pods take the roots, and RootsKey its
// only key.
const (
	RootsConfigMap = "outrigger-roots"
	RootsKey       = "root.crt"
)

// Labels and annotations by which namespaces and pods say that they are meshed.
const (
	LabelInjection   = Prefix + "injection"
	Enabled          = "enabled"
	AnnotationStatus = Prefix + "status"
	StatusInjected   = "injected"
)

const (
	// How long a namespace that failed waits.
	retryAtFirst = 200 * time.Millisecond
	retryAtMost  = 30 * time.Second
	// repairEvery is how often one namespace is repaired: while two replicas do not
	// have the same roots, which a mounted folder may take a minute for, each undoes
	// what the other does.
	repairEvery = 3 * time.Second
)

// Roots keeps RootsConfigMap in each namespace that is meshed. Any number of
// replicas may do so at once: each writes what it finds different, and nothing
// else. One that is ours is kept right in any namespace, and never deleted: a pod
// may have mounted it.
type Roots struct {
	c      *Cluster
	bundle func() []byte
	reload func(context.Context) error
	queue  workqueue.TypedRateLimitingInterface[string] // of namespaces

	// What follows belongs to run.
	foreign  map[string]bool      // namespaces of which the log has told
	repaired map[string]time.Time // when, of the last repairEvery
}

// DistributeRoots has Run keep bundle, in PEM, in the namespaces that are meshed.
// It must be called before Run. reload is called before something that differs is
// overwritten: it may be this replica that has not heard of a change yet. Changed
// must be called when bundle returns something else.
func (c *Cluster) DistributeRoots(bundle func() []byte, reload func(context.Context) error) *Roots {
	r := &Roots{
		c: c, bundle: bundle, reload: reload, foreign: map[string]bool{}, repaired: map[string]time.Time{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryAtFirst, retryAtMost)),
	}
	c.source.mu.Lock() // Ready may be asked already
	defer c.source.mu.Unlock()
	c.roots = r
	return r
}

// Changed has every namespace looked at again.
func (r *Roots) Changed() {
	for _, n := range r.c.source.namespaces() {
		r.queue.Add(n)
	}
}

// look is called for every object that has changed.
func (r *Roots) look(t *table, name types.NamespacedName, old, now client.Object) {
	switch t.gvk.Kind {
	case kindNamespace:
		r.queue.Add(name.Name)
	case kindPod:
		if meshed(old) != meshed(now) {
			r.queue.Add(name.Namespace)
		}
	case kindConfigMap:
		r.queue.Add(name.Namespace)
	}
}

// meshed is 1 for a pod that has a proxy or asks for one, else 0.
func meshed(o client.Object) int {
	if p, ok := o.(*corev1.Pod); ok && (p.Annotations[AnnotationStatus] == StatusInjected || p.Labels[LabelInjection] == Enabled) {
		return 1
	}
	return 0
}

// namespaces are the names of all.
func (s *Source) namespaces() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []string
	for name := range s.tables[kindNamespace].rows {
		out = append(out, name.Name)
	}
	return out
}

// rootsIn returns what is known of a namespace: whether it needs the roots and the
// ConfigMap that is there, or nil.
func (s *Source) rootsIn(namespace string) (needed bool, have *corev1.ConfigMap) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	n, ok := get[*corev1.Namespace](s, kindNamespace, types.NamespacedName{Name: namespace})
	if !ok || n.DeletionTimestamp != nil || n.Status.Phase == corev1.NamespaceTerminating {
		return false, nil
	}
	have, _ = get[*corev1.ConfigMap](s, kindConfigMap, types.NamespacedName{Namespace: namespace, Name: RootsConfigMap})
	return n.Labels[LabelInjection] == Enabled || s.meshed[namespace] > 0, have
}

// run works until ctx ends, from when everything is known.
func (r *Roots) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		<-ctx.Done()
		r.queue.ShutDown()
	})
	if !r.c.source.WaitSynced(ctx) {
		return
	}
	for {
		namespace, end := r.queue.Get()
		if end {
			return
		}
		if err := r.keep(ctx, namespace); err != nil && ctx.Err() == nil {
			r.c.metrics.roots.WithLabelValues("failed").Inc()
			if r.queue.NumRequeues(namespace) == 2 { // once; conflicts solve themselves before
				r.c.log.Warn("the roots cannot be written; pods that start there wait", "orchestrator.namespace", namespace, "error.message", err.Error())
			}
			r.queue.AddRateLimited(namespace)
		} else {
			r.queue.Forget(namespace)
		}
		r.queue.Done(namespace)
	}
}

// keep makes one namespace right.
func (r *Roots) keep(ctx context.Context, namespace string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	needed, have := r.c.source.rootsIn(namespace)
	switch {
	case have == nil && !needed:
		return nil
	case have == nil:
		return r.create(ctx, namespace)
	case !ours(have):
		r.leave(namespace, needed)
		return nil
	case right(have, r.bundle()):
		return nil
	}
	now := time.Now()
	if wait := r.repaired[namespace].Add(repairEvery).Sub(now); wait > 0 {
		r.queue.AddAfter(namespace, wait)
		return nil
	}
	maps.DeleteFunc(r.repaired, func(_ string, at time.Time) bool { return now.Sub(at) > repairEvery })
	if err := r.reload(ctx); err != nil {
		return fmt.Errorf("read the roots again, because those of ConfigMap %s/%s differ: %w", namespace, RootsConfigMap, err)
	}
	return r.repair(ctx, namespace)
}

func (r *Roots) create(ctx context.Context, namespace string) error {
	err := r.c.client.Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: RootsConfigMap, Labels: map[string]string{ManagedBy: ManagedByValue}},
		Data:       map[string]string{RootsKey: string(r.bundle())},
	})
	switch {
	case apierrors.IsAlreadyExists(err), apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause), apierrors.IsNotFound(err):
		return nil // the watch tells
	case err != nil:
		return fmt.Errorf("create ConfigMap %s/%s: %w", namespace, RootsConfigMap, err)
	}
	r.c.metrics.roots.WithLabelValues("created").Inc()
	r.c.log.Info("roots given to a namespace", "orchestrator.namespace", namespace)
	return nil
}

// repair works on the ConfigMap as it is now and whole: what is in the cache is
// trimmed.
func (r *Roots) repair(ctx context.Context, namespace string) error {
	var have corev1.ConfigMap
	if err := r.c.client.Get(ctx, types.NamespacedName{Namespace: namespace, Name: RootsConfigMap}, &have); apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read ConfigMap %s/%s: %w", namespace, RootsConfigMap, err)
	}
	bundle := r.bundle()
	if !ours(&have) || right(&have, bundle) {
		return nil
	}
	have.Data, have.BinaryData = map[string]string{RootsKey: string(bundle)}, nil
	if err := r.c.client.Update(ctx, &have); err != nil {
		return fmt.Errorf("repair ConfigMap %s/%s: %w", namespace, RootsConfigMap, err)
	}
	r.repaired[namespace] = time.Now()
	r.c.metrics.roots.WithLabelValues("repaired").Inc()
	r.c.log.Info("roots of a namespace brought up to date", "orchestrator.namespace", namespace)
	return nil
}

// leave says once that a ConfigMap is not ours.
func (r *Roots) leave(namespace string, needed bool) {
	if !needed || r.foreign[namespace] {
		return
	}
	r.foreign[namespace] = true
	r.c.metrics.roots.WithLabelValues("foreign").Inc()
	r.c.log.Warn("a ConfigMap of our name is not ours and is left alone, so that pods there have no roots; delete it, or label it "+ManagedBy+"="+ManagedByValue,
		"orchestrator.namespace", namespace, "orchestrator.resource.name", RootsConfigMap)
}

func ours(m *corev1.ConfigMap) bool { return m.Labels[ManagedBy] == ManagedByValue }

func right(m *corev1.ConfigMap, bundle []byte) bool {
	return bytes.Equal([]byte(m.Data[RootsKey]), bundle) && len(m.Data) == 1 && len(m.BinaryData) == 0
}
