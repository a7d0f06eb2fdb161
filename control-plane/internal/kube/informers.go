package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// Reasons of Problems with a cluster rather than with an object.
const (
	// ReasonNotServed: the CRD is missing, or has no version that can be read.
	ReasonNotServed translate.Reason = "NotServed"
	// ReasonForbidden: the control plane's role does not suffice.
	ReasonForbidden translate.Reason = "Forbidden"
)

const (
	// lookEvery is how often it is looked for CRDs that are missing.
	lookEvery = 2 * time.Second
	// syncEvery is how often it is looked whether an informer has read everything.
	syncEvery = 50 * time.Millisecond
)

// run keeps an informer for each kind that can be read, until ctx ends.
func (s *Source) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		for _, t := range s.lookFor(ctx) {
			if err := s.start(ctx, t, &wg); err != nil {
				s.mu.Lock()
				t.state = unknown // again
				s.mu.Unlock()
				s.c.log.Error("a kind cannot be read", "outrigger.object.kind", t.gvk.Kind, "error.message", err.Error())
			}
		}
		s.settle()
		if !sleep(ctx, lookEvery) {
			return
		}
	}
}

// needed says whether a kind is read at all.
func (s *Source) needed(t *table) bool { return t.mesh || s.c.roots != nil }

// lookFor returns the kinds that need an informer now, and stops those of CRDs
// that are gone.
func (s *Source) lookFor(ctx context.Context) (start []*table) {
	if s.c.contact.wait(ctx) != nil {
		return nil
	}
	served := served{c: s.c}
	for _, k := range kinds() {
		t := s.tables[k.gvk.Kind]
		s.mu.RLock()
		state, failed := t.state, t.failed
		s.mu.RUnlock()
		running := state == reading || state == known
		switch {
		case !s.needed(t), running && (!t.custom || !apierrors.IsNotFound(failed)):
			continue
		case !t.custom:
			start = append(start, t)
			continue
		}
		why, gone, err := served.missing(ctx, k)
		switch {
		case err != nil: // nobody knows; ask again
		case why == "" && !running:
			start = append(start, t)
		case why != "":
			if running {
				if err := s.c.cache.RemoveInformer(ctx, t.object()); err != nil {
					s.c.log.Warn("an informer cannot be stopped", "outrigger.object.kind", k.gvk.Kind, "error.message", err.Error())
					continue
				}
			}
			s.lose(t, why, gone)
		}
	}
	return start
}

// lose notes that a kind is not served. Its objects stay in force unless they are
// gone with the CRD.
func (s *Source) lose(t *table, why string, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.state == absent && t.absent == why {
		return
	}
	t.life++ // what the old informer still says does not count
	t.state, t.absent, t.failed = absent, why, nil
	s.c.metrics.synced.WithLabelValues(t.gvk.Kind).Set(0)
	if gone {
		for name, r := range t.rows {
			delete(t.rows, name)
			s.moved(t, name, r.object, nil)
		}
	}
	s.tell(Change{Rest: true})
}

// start begins to read a kind.
func (s *Source) start(ctx context.Context, t *table, wg *sync.WaitGroup) error {
	s.mu.Lock()
	t.life++
	life := t.life
	t.state, t.failed = reading, nil
	s.mu.Unlock()
	s.c.metrics.synced.WithLabelValues(t.gvk.Kind).Set(0)
	informer, err := s.c.cache.GetInformer(ctx, t.object(), cache.BlockUntilSynced(false))
	if err != nil {
		return err
	}
	put := func(o any) {
		if o, ok := o.(client.Object); ok {
			s.put(t, life, client.ObjectKeyFromObject(o), o)
		}
	}
	registration, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    put,
		UpdateFunc: func(_, o any) { put(o) },
		DeleteFunc: func(o any) {
			if last, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
				namespace, name, err := toolscache.SplitMetaNamespaceKey(last.Key)
				if err == nil {
					s.put(t, life, types.NamespacedName{Namespace: namespace, Name: name}, nil)
				}
				return
			}
			if o, ok := o.(client.Object); ok {
				s.put(t, life, client.ObjectKeyFromObject(o), nil)
			}
		},
	})
	if err != nil {
		return err
	}
	wg.Go(func() {
		for !registration.HasSynced() {
			if !sleep(ctx, syncEvery) || !s.lives(t, life) {
				return
			}
		}
		s.know(t, life)
		s.settle()
	})
	return nil
}

func (s *Source) lives(t *table, life int) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return t.life == life
}

// know notes that all objects of a kind have been read.
func (s *Source) know(t *table, life int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.life != life {
		return
	}
	for name, r := range t.rows {
		if r.life != life {
			delete(t.rows, name)
			s.moved(t, name, r.object, nil)
		}
	}
	t.state, t.absent = known, ""
	s.c.metrics.synced.WithLabelValues(t.gvk.Kind).Set(1)
	s.tell(Change{Rest: true}) // at least a Problem is solved
}

// settle closes synced when nothing is open any more.
func (s *Source) settle() {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, t := range s.tables {
		if s.open(t) {
			return
		}
	}
	s.syncedOnce.Do(func() { close(s.synced) })
}

// newInformer is what the cache makes informers with. Their requests wait while
// the API server is away, so that they do not learn to wait long; and how they end
// is noted.
func (c *Cluster) newInformer(lw toolscache.ListerWatcher, o runtime.Object, resync time.Duration, by toolscache.Indexers) toolscache.SharedIndexInformer {
	inner := toolscache.ToListerWatcherWithContext(lw)
	return toolscache.NewSharedIndexInformer(&toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			if err := c.contact.wait(ctx); err != nil {
				return nil, err
			}
			out, err := inner.ListWithContext(ctx, opts)
			c.source.note(o, err)
			return out, err
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			if err := c.contact.wait(ctx); err != nil {
				return nil, err
			}
			out, err := inner.WatchWithContext(ctx, opts)
			c.source.note(o, err)
			return out, err
		},
	}, o, resync, by)
}

// note keeps what became of the last request for a kind.
func (s *Source) note(of runtime.Object, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	var network *url.Error
	if errors.As(err, &network) {
		select {
		case s.c.suspect <- struct{}{}:
		default:
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tables {
		if reflect.TypeOf(of) != reflect.TypeOf(t.object()) {
			continue
		}
		bad := func(err error) bool { return refused(err) || unreadable(err) }
		was, is := bad(t.failed), bad(err)
		t.failed = err
		switch {
		case is && !was:
			s.c.log.Warn("a kind cannot be read; what was read of it before stays in force", "outrigger.object.kind", t.gvk.Kind, "error.message", err.Error())
			s.tell(Change{Rest: true})
		case was && !is:
			s.tell(Change{Rest: true})
		}
	}
}

func refused(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) }

// unreadable says that the API server answered with what cannot be decoded: that
// neither a status says nor the network.
func unreadable(err error) bool {
	var network *url.Error
	var status apierrors.APIStatus
	return err != nil && !errors.As(err, &network) && !errors.As(err, &status) && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, context.DeadlineExceeded)
}

// problems are those of the cluster. It is called with mu held.
func (s *Source) problems() []translate.Problem {
	var out []translate.Problem
	for _, k := range kinds() {
		t := s.tables[k.gvk.Kind]
		switch {
		case !s.needed(t):
		case t.state == absent:
			out = append(out, translate.Problem{Kind: "CustomResourceDefinition", Name: k.crd(), Reason: ReasonNotServed, Message: t.absent})
		case refused(t.failed):
			out = append(out, translate.Problem{
				Kind: k.gvk.Kind, Name: "*", Reason: ReasonForbidden,
				Message: fmt.Sprintf("cannot be read: %v; let the control plane's ClusterRole get, list and watch %s", t.failed, k.resource),
			})
		case unreadable(t.failed):
			out = append(out, translate.Problem{
				Kind: k.gvk.Kind, Name: "*", Reason: translate.ReasonInvalid,
				Message: fmt.Sprintf("one of them is not what its CRD says, and what was read before stays in force: %v; correct or delete it", t.failed),
			})
		}
	}
	return out
}

// served asks what the API server serves, each thing once.
type served struct {
	c      *Cluster
	lists  map[schema.GroupVersion]resources
	groups map[string][]string
}

type resources struct {
	names []string
	err   error
}

// missing says why a kind cannot be read, empty where it can, and whether it is
// gone altogether rather than served in other versions.
func (s *served) missing(ctx context.Context, k kind) (why string, gone bool, err error) {
	r := s.of(ctx, k.gvk.GroupVersion())
	if r.err != nil || slices.Contains(r.names, k.resource) {
		return "", false, r.err
	}
	versions, err := s.versions(ctx, k.gvk.Group)
	if err != nil {
		return "", false, err
	}
	var others []string
	for _, v := range versions {
		r := s.of(ctx, schema.GroupVersion{Group: k.gvk.Group, Version: v})
		if r.err != nil {
			return "", false, r.err
		}
		if slices.Contains(r.names, k.resource) {
			others = append(others, v)
		}
	}
	remedy := "run outrigger install, which brings it"
	if k.gvk.Group == gatewayv1.GroupName {
		remedy = "kubectl apply the standard channel of Gateway API 1.5 or newer, or run outrigger install"
	}
	if len(others) > 0 {
		return fmt.Sprintf("%s is served in %s only, and %s is needed: what was read before stays in force; %s", k.gvk.Kind, strings.Join(others, ", "), k.gvk.Version, remedy), false, nil
	}
	return fmt.Sprintf("it is not installed, so that no %s has an effect; %s", k.gvk.Kind, remedy), true, nil
}

// of returns what a group version has; nothing where there is no such version.
func (s *served) of(ctx context.Context, gv schema.GroupVersion) resources {
	if r, ok := s.lists[gv]; ok {
		return r
	}
	var list metav1.APIResourceList
	err := s.get(ctx, &list, "/apis", gv.Group, gv.Version)
	r := resources{err: err}
	for _, a := range list.APIResources {
		r.names = append(r.names, a.Name)
	}
	if s.lists == nil {
		s.lists = map[schema.GroupVersion]resources{}
	}
	s.lists[gv] = r
	return r
}

func (s *served) versions(ctx context.Context, group string) ([]string, error) {
	if v, ok := s.groups[group]; ok {
		return v, nil
	}
	var g metav1.APIGroup
	if err := s.get(ctx, &g, "/apis", group); err != nil {
		return nil, err
	}
	out := []string{}
	for _, v := range g.Versions {
		out = append(out, v.Version)
	}
	if s.groups == nil {
		s.groups = map[string][]string{}
	}
	s.groups[group] = out
	return out, nil
}

// get leaves into as it is where there is nothing.
func (s *served) get(ctx context.Context, into runtime.Object, path ...string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := s.c.discovery.RESTClient().Get().AbsPath(path...).Do(ctx).Into(into)
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
