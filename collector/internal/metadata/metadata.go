// Package metadata knows what Kubernetes knows of the pods of this node, for
// the records that package tail reads: labels, annotations, workload, image, ids.
//
// It asks little. At the start the kubelet is asked once for its pods; then one
// watch, of this node's pods only, tells of every change, and one watch of the
// metadata of namespaces of their labels. A pod folder that nobody has told of is
// asked of the kubelet again, all that are open in one request, at growing
// intervals. A restarted collector starts from its cache file, and in the steady
// state there is no request at all but the two watches.
//
// What is known of a pod outlives it until Config.InUse says that its logs are
// through, so that the last line of a pod is no barer than its first.
//
// It does not know files or outputs. The rights that it needs, in a ClusterRole
// (a field selector cannot be written there):
//
//	rules:
//	- apiGroups: [""]
//	  resources: [pods, namespaces]
//	  verbs: [list, watch]
//	- apiGroups: [""]
//	  resources: [nodes/pods]    # Kubernetes 1.33 and newer
//	  verbs: [get]
//	- apiGroups: [""]
//	  resources: [nodes/proxy]   # older; leave it out where nodes/pods is enough:
//	  verbs: [get]               # it opens more of the kubelet than /pods
//
// Without the right to ask the kubelet, or without a kubelet, the watch alone
// serves; without the API server, the kubelet alone does, but for the labels of
// namespaces.
package metadata

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/kube"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Defaults and limits.
const (
	DefaultMaxPods       = 1024
	DefaultMaxNamespaces = 20_000
	DefaultJitter        = 5 * time.Second
	// keepGone is how long a deleted pod that nothing is read of is kept: its folder
	// may not have been seen yet.
	keepGone = 5 * time.Minute
	// maxVariants resources are kept per pod (containers and their restarts).
	maxVariants = 256
	// asks of the kubelet before a pod counts as unknown to it.
	asks = 3
)

// Config of a Store. Every source may be left out.
type Config struct {
	Node string
	// API is a client of the API server, Kubelet one of this node's kubelet
	// (https://127.0.0.1:10250, or the node's address).
	API, Kubelet *kube.Client
	// CacheFile keeps what is known over a restart. Empty: nothing does.
	CacheFile string
	// MaxPods bounds the pods that are known at a time, ended ones included.
	MaxPods int
	// InUse reports whether records of the pod may still come or be on their way. It
	// gets the UID that the path has. It is called from Run. Nil: none are.
	InUse func(uid string) bool
	// Jitter bounds the random wait before the watches start. Default 5 s.
	Jitter time.Duration
	// AskEvery is the shortest time between two questions to the kubelet. Default 2 s.
	AskEvery   time.Duration
	Log        *slog.Logger
	Registerer prometheus.Registerer
}

// Store is safe for concurrent use. Run has to run for it to learn anything.
type Store struct {
	cfg        Config
	metrics    *metrics
	generation atomic.Uint64
	wake       chan struct{} // somebody asked for a pod that is not known

	mu         sync.Mutex
	pods       map[string]*entry // by UID and by that of the path of a static pod
	lru        *list.List        // of *entry; the longest unused first
	unknown    map[string]*question
	namespaces map[string]map[string]string
	// The state of the sources.
	podsSettled, namespacesSettled bool // listed once, or there is no such source or right
	round                          int  // of lists
	dirty                          bool // the cache file is older
}

// entry is a pod and the resources made of it.
type entry struct {
	pod      *pod
	at       *list.Element
	round    int       // of the list that had it last
	gone     time.Time // zero while it lives
	variants map[variant]*described
}

type variant struct {
	container string
	restart   int
}

type described struct {
	from, to *record.Resource
}

// question is a pod that was asked for and is not known.
type question struct {
	since time.Time
	asked int
}

type metrics struct {
	pods     prometheus.GaugeFunc
	evicted  prometheus.Counter
	bare     prometheus.Counter
	failures *prometheus.CounterVec
	asked    prometheus.Counter
}

// New makes a Store, with what its cache file knows.
func New(cfg Config) (*Store, error) {
	cfg.MaxPods = cmp.Or(cfg.MaxPods, DefaultMaxPods)
	cfg.AskEvery = cmp.Or(cfg.AskEvery, 2*time.Second)
	if cfg.MaxPods < 1 {
		return nil, fmt.Errorf("metadata: maxPods is %d: write at least 1", cfg.MaxPods)
	}
	if cfg.API != nil && cfg.Node == "" {
		return nil, errors.New("metadata: node is empty: the watch is of one node's pods; give its name")
	}
	if cfg.InUse == nil {
		cfg.InUse = func(string) bool { return false }
	}
	s := &Store{
		cfg: cfg, wake: make(chan struct{}, 1),
		pods: map[string]*entry{}, lru: list.New(), unknown: map[string]*question{}, namespaces: map[string]map[string]string{},
		podsSettled: cfg.API == nil, namespacesSettled: cfg.API == nil,
	}
	if err := s.register(); err != nil {
		return nil, err
	}
	s.load()
	return s, nil
}

func (s *Store) register() error {
	s.metrics = &metrics{
		pods: prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "outrigger_metadata_pods", Help: "Pods whose metadata is kept, ended ones included."}, func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return float64(s.lru.Len())
		}),
		evicted:  prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_metadata_evicted_total", Help: "Pods forgotten because there were more than maxPods, while records of them may still come."}),
		bare:     prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_metadata_unknown_pods_total", Help: "Pods that have logs and that neither the kubelet nor the API server knows: their records have only what the path says."}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_metadata_failures_total", Help: "Failed requests for metadata and failed writes of its cache, by source. They are tried again."}, []string{"source"}),
		asked:    prometheus.NewCounter(prometheus.CounterOpts{Name: "outrigger_metadata_kubelet_requests_total", Help: "Requests to the kubelet for its pods."}),
	}
	if s.cfg.Registerer == nil {
		return nil
	}
	return errors.Join(s.cfg.Registerer.Register(s.metrics.pods), s.cfg.Registerer.Register(s.metrics.evicted), s.cfg.Registerer.Register(s.metrics.bare),
		s.cfg.Registerer.Register(s.metrics.failures), s.cfg.Registerer.Register(s.metrics.asked))
}

// Generation changes whenever a resource that was handed out may have changed.
func (s *Store) Generation() uint64 { return s.generation.Load() }

// Resource returns what the path says of a container with all that is known of
// its pod added, or from itself where nothing is. Equal arguments give the same
// pointer until Generation has changed. complete is false while more may soon
// become known: the caller may hold its records for a time that it bounds, and
// asks again meanwhile.
func (s *Store) Resource(from *record.Resource) (res *record.Resource, complete bool) {
	if from == nil || from.PodUID == "" {
		return from, true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.pods[from.PodUID]
	// A static pod's UID comes from an annotation, which anybody may write.
	if e == nil || e.pod.Namespace != from.Namespace || e.pod.Name != from.Pod {
		return from, s.ask(from.PodUID)
	}
	s.lru.MoveToBack(e.at)
	labels, ok := s.namespaces[from.Namespace]
	complete = ok || s.namespacesSettled
	key := variant{from.Container, from.Restart}
	if d := e.variants[key]; d != nil && same(d.from, from) {
		return d.to, complete
	}
	if len(e.variants) >= maxVariants {
		clear(e.variants) // a container that restarts without end
		s.generation.Add(1)
	}
	d := &described{from: from, to: e.pod.describe(from, labels)}
	if e.variants == nil {
		e.variants = map[variant]*described{}
	}
	e.variants[key] = d
	return d.to, complete
}

// same reports whether two paths say the same.
func same(a, b *record.Resource) bool {
	return a == b || a.Cluster == b.Cluster && a.Node == b.Node && a.Service == b.Service && a.Namespace == b.Namespace && a.Pod == b.Pod
}

// ask notes that a pod is wanted, and reports whether asking is in vain.
func (s *Store) ask(uid string) (vain bool) {
	q := s.unknown[uid]
	if q == nil {
		if s.podsSettled && s.cfg.Kubelet == nil && s.cfg.API == nil {
			return true
		}
		if len(s.unknown) >= s.cfg.MaxPods { // any one makes room; it will be asked for again
			for k := range s.unknown {
				delete(s.unknown, k)
				break
			}
		}
		s.unknown[uid] = &question{since: time.Now()}
		select {
		case s.wake <- struct{}{}:
		default:
		}
		return false
	}
	return s.vain(q)
}

// vain: the watch has told of every pod for some time, or does not work, and the
// kubelet has said often enough that it has no such pod.
func (s *Store) vain(q *question) bool {
	return s.podsSettled && (s.cfg.Kubelet == nil && time.Since(q.since) > 2*s.cfg.AskEvery || q.asked >= asks)
}

// The kubelet's word does not bring back a pod that the watch has seen the end
// of, and a pod that only the kubelet knows is kept like an ended one until the
// watch confirms it: its end may never be told.
const byKubelet = -1

// put takes in the state of a pod, from a list of the API server (its round) or
// byKubelet.
func (s *Store) put(p *pod, round int) {
	if p.UID == "" || p.Namespace == "" || p.Name == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.pods[p.UID]
	if e == nil && p.Static != "" {
		e = s.pods[p.Static] // the kubelet told of the file; this is its mirror
	}
	if e != nil && (e.pod.Name != p.Name || e.pod.Namespace != p.Namespace) {
		e = nil
	}
	if e == nil {
		e = &entry{pod: p, round: round}
		if round == byKubelet {
			e.gone = time.Now()
		}
		e.at = s.lru.PushBack(e)
		s.index(e)
		s.dirty = true
		_, wanted := s.unknown[p.UID]
		_, static := s.unknown[p.Static]
		if wanted || static {
			s.generation.Add(1)
		}
		delete(s.unknown, p.UID)
		delete(s.unknown, p.Static)
		s.bound()
		return
	}
	if round != byKubelet {
		e.round, e.gone = round, time.Time{}
	}
	if e.pod.UID != p.UID && p.Static == "" && e.pod.Static == p.UID { // the kubelet's word on a pod whose mirror is known
		p.UID, p.Static, p.Service = e.pod.UID, e.pod.Static, e.pod.Service
	}
	p.merge(e.pod)
	if p.equal(e.pod) {
		return
	}
	s.unindex(e)
	e.pod = p
	s.index(e)
	s.changed(e)
}

// changed: what was made of the entry is void.
func (s *Store) changed(e *entry) {
	s.dirty = true
	if len(e.variants) > 0 {
		e.variants = nil
		s.generation.Add(1)
	}
}

func (s *Store) index(e *entry) {
	s.pods[e.pod.UID] = e
	// Another pod's own UID goes before an annotation.
	if other := s.pods[e.pod.Static]; e.pod.Static != "" && (other == nil || other.pod.UID != e.pod.Static) {
		s.pods[e.pod.Static] = e
	}
}

func (s *Store) unindex(e *entry) {
	for _, uid := range []string{e.pod.UID, e.pod.Static} {
		if s.pods[uid] == e {
			delete(s.pods, uid)
		}
	}
}

func (s *Store) remove(e *entry) {
	s.unindex(e)
	s.lru.Remove(e.at)
	s.dirty = true
}

// bound makes room: pods that ended first, then those that were longest unused.
func (s *Store) bound() {
	for s.lru.Len() > s.cfg.MaxPods {
		victim := s.lru.Front()
		for at := victim; at != nil; at = at.Next() {
			if e, ok := at.Value.(*entry); ok && !e.gone.IsZero() {
				victim = at
				break
			}
		}
		e, ok := victim.Value.(*entry)
		if !ok {
			return
		}
		s.remove(e)
		if len(e.variants) > 0 {
			s.metrics.evicted.Inc()
			s.generation.Add(1)
		}
	}
}

// leave marks a deleted pod; it is kept until its logs are through.
func (s *Store) leave(uid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.pods[uid]; e != nil && e.gone.IsZero() {
		e.gone = time.Now()
	}
}

// sweep forgets the pods that ended and whose logs are through.
func (s *Store) sweep(now time.Time) {
	s.mu.Lock()
	var ended []*entry
	for at := s.lru.Front(); at != nil; at = at.Next() {
		if e, ok := at.Value.(*entry); ok && !e.gone.IsZero() && now.Sub(e.gone) >= keepGone {
			ended = append(ended, e)
		}
	}
	s.mu.Unlock()
	for _, e := range ended { // InUse may take its time, and locks of its own
		if s.cfg.InUse(e.pod.UID) || e.pod.Static != "" && s.cfg.InUse(e.pod.Static) {
			continue
		}
		s.mu.Lock()
		if !e.gone.IsZero() && s.pods[e.pod.UID] == e {
			s.remove(e)
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, q := range s.unknown {
		if now.Sub(q.since) >= keepGone && !s.cfg.InUse(uid) {
			delete(s.unknown, uid)
		}
	}
}

// Run asks and watches until ctx ends, and then writes the cache file.
func (s *Store) Run(ctx context.Context) error {
	var parts sync.WaitGroup
	run := func(part func(context.Context) error) {
		parts.Go(func() {
			if err := part(ctx); err != nil {
				s.cfg.Log.Error("metadata: a source ended", "error.message", err.Error())
			}
		})
	}
	if s.cfg.Kubelet != nil {
		run(s.askKubelet)
	}
	if s.cfg.API != nil {
		run(s.watchPods().Run)
		run(s.watchNamespaces().Run)
	}
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case now := <-tick.C:
			s.sweep(now)
			s.save()
		}
	}
	parts.Wait()
	s.save()
	return nil
}

// begin starts the count of a list, end marks the pods that it did not have.
func (s *Store) begin() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.round++
	return s.round
}

func (s *Store) end(round int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settle(&s.podsSettled)
	for at := s.lru.Front(); at != nil; at = at.Next() {
		if e, ok := at.Value.(*entry); ok && e.round < round && e.gone.IsZero() {
			e.gone = time.Now()
		}
	}
}

// settle notes that a source has said what it has to say, so that nobody waits
// for it any longer.
func (s *Store) settle(source *bool) {
	if !*source {
		*source = true
		s.generation.Add(1)
	}
}

func (s *Store) failed(source string) func(error) {
	return func(error) { s.metrics.failures.WithLabelValues(source).Inc() }
}

func (s *Store) watchPods() *kube.Watch[object] {
	round := 0
	fail := s.failed("pods")
	return &kube.Watch[object]{
		Client: s.cfg.API, Path: "/api/v1/pods", Query: url.Values{"fieldSelector": {"spec.nodeName=" + s.cfg.Node}}, Version: version,
		Jitter: cmp.Or(s.cfg.Jitter, DefaultJitter), Log: s.cfg.Log,
		Begin:  func() { round = s.begin() },
		Listed: func(o *object) { s.put(trim(o), round) },
		End:    func() { s.end(round) },
		Changed: func(t kube.Type, o *object) error {
			s.put(trim(o), round)
			if t == kube.Deleted {
				s.leave(o.Metadata.UID)
			}
			return nil
		},
		Failed: func(err error) {
			fail(err)
			if c := kube.Code(err); c == 401 || c == 403 { // nobody has to wait for what is forbidden
				s.mu.Lock()
				defer s.mu.Unlock()
				s.settle(&s.podsSettled)
			}
		},
	}
}

func (s *Store) watchNamespaces() *kube.Watch[object] {
	var listed map[string]map[string]string
	fail := s.failed("namespaces")
	return &kube.Watch[object]{
		Client: s.cfg.API, Path: "/api/v1/namespaces", Metadata: true, Version: version, Jitter: cmp.Or(s.cfg.Jitter, DefaultJitter), Log: s.cfg.Log,
		Begin: func() { listed = map[string]map[string]string{} },
		Listed: func(o *object) {
			if len(listed) < DefaultMaxNamespaces {
				listed[o.Metadata.Name] = namespaceLabels(o)
			}
		},
		End: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			for name := range s.namespaces {
				if _, ok := listed[name]; !ok && !s.used(name) {
					delete(s.namespaces, name)
				}
			}
			for name, labels := range listed {
				s.putNamespace(name, labels)
			}
			s.settle(&s.namespacesSettled)
			listed = nil
		},
		Changed: func(t kube.Type, o *object) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			if t != kube.Deleted {
				s.putNamespace(o.Metadata.Name, namespaceLabels(o))
			} else if !s.used(o.Metadata.Name) {
				delete(s.namespaces, o.Metadata.Name)
			}
			return nil
		},
		// Labels of namespaces are not worth the wait for an API server that is away.
		Failed: func(err error) {
			fail(err)
			s.mu.Lock()
			defer s.mu.Unlock()
			s.settle(&s.namespacesSettled)
		},
	}
}

// namespaceLabels never returns nil: no labels are known labels.
func namespaceLabels(o *object) map[string]string {
	if l := trimLabels(o.Metadata.Labels); l != nil {
		return l
	}
	return map[string]string{}
}

func (s *Store) used(namespace string) bool {
	for at := s.lru.Front(); at != nil; at = at.Next() {
		if e, ok := at.Value.(*entry); ok && e.pod.Namespace == namespace {
			return true
		}
	}
	return false
}

func (s *Store) putNamespace(name string, labels map[string]string) {
	old, known := s.namespaces[name]
	if known && maps.Equal(old, labels) || !known && len(s.namespaces) >= DefaultMaxNamespaces {
		return
	}
	s.namespaces[name] = labels
	for at := s.lru.Front(); at != nil; at = at.Next() {
		if e, ok := at.Value.(*entry); ok && e.pod.Namespace == name {
			s.changed(e)
		}
	}
}

// askKubelet asks at the start, and when pods are wanted that nobody told of.
func (s *Store) askKubelet(ctx context.Context) error {
	every, fail := s.cfg.AskEvery, s.failed("kubelet")
	healthy := true
	for first := true; ; first = false {
		if !first {
			select {
			case <-ctx.Done():
				return nil
			case <-s.wake:
			}
			if !s.pause(ctx, s.cfg.AskEvery/4) { // more folders come, and maybe the watch
				return nil
			}
		}
		for first || s.open() {
			first = false
			started := time.Now()
			s.metrics.asked.Inc()
			err := s.kubeletPods(ctx)
			if ctx.Err() != nil {
				return nil //nolint:nilerr // it failed because it was to end
			}
			if err != nil {
				fail(err)
				if healthy {
					s.cfg.Log.Warn("the kubelet does not tell its pods; trying again", "error.message", err.Error())
				}
			}
			healthy = err == nil
			if refused := kube.Code(err) == 401 || kube.Code(err) == 403; err == nil || refused {
				s.asked(started)
			}
			if err == nil && !s.open() {
				every = s.cfg.AskEvery
			}
			if !s.pause(ctx, every) {
				return nil
			}
			every = min(2*every, 15*s.cfg.AskEvery) // it did not help
		}
		every = s.cfg.AskEvery
	}
}

func (s *Store) kubeletPods(ctx context.Context) error {
	round := byKubelet
	if s.cfg.API == nil { // nobody else says what has ended
		round = s.begin()
	}
	_, err := kube.List(ctx, s.cfg.Kubelet, kube.Request{Path: "/pods"}, func(o *object) { s.put(trim(o), round) })
	if err == nil && round != byKubelet {
		s.end(round)
	}
	return err
}

// open reports whether a pod is wanted that the kubelet was not asked for often
// enough.
func (s *Store) open() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range s.unknown {
		if q.asked < asks {
			return true
		}
	}
	return false
}

// asked counts an answer of the kubelet against all that was wanted before.
func (s *Store) asked(started time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, q := range s.unknown {
		if q.since.Before(started) && q.asked < asks {
			if q.asked++; q.asked == asks {
				s.metrics.bare.Inc()
				s.generation.Add(1)
				s.cfg.Log.Debug("a pod is not known to the kubelet", "kubernetes.pod.uid", uid)
			}
		}
	}
}

func (s *Store) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
