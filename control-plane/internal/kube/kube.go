// Package kube is the control plane's only door to the Kubernetes API.
//
// It knows informers, which objects a mesh is made of and how a cluster keeps
// the authority's keys, roots and tokens; it does not know what the objects mean.
// main connects and runs a Cluster; rebuild loads from its Source, package
// authority uses its Secret and its TokenVerifier.
//
// What a cluster may do, and what becomes of it here:
//
//   - The API server is away: the last state stays in force. Requests of informers
//     wait until it answers again, so that recovery takes seconds. The log says so
//     once a minute.
//   - A CRD is missing, or does not serve the version that is needed: a Problem
//     names it and the remedy; it is looked for every few seconds.
//   - A kind may not be read: a Problem says so, and where it has never been read,
//     the cluster does not count as synced, because what cannot be read may forbid
//     something.
//
// What its role must allow:
//
//   - everywhere: get, list and watch services, pods, namespaces, endpointslices
//     (discovery.k8s.io), httproutes, grpcroutes, tlsroutes and referencegrants
//     (gateway.networking.k8s.io), circuitbreakers, retrypolicies and
//     authorizationpolicies (outrigger.dev)
//   - everywhere, to prove pods and to give out roots: create tokenreviews
//     (authentication.k8s.io); create configmaps; get, list, watch and update
//     configmaps of the name outrigger-roots
//   - in its own namespace: create secrets; get and update secrets of the name
//     outrigger-authority
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/discovery"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
)

// Prefix of labels and annotations that are ours.
const Prefix = "outrigger.dev/"

const (
	// contactEvery is how often the API server is asked whether it is there, and
	// how often while it is not.
	contactEvery = 5 * time.Second
	awayEvery    = time.Second
	// sayAwayEvery is how often the log says that it is away.
	sayAwayEvery = time.Minute
	// requestTimeout of everything that does not watch.
	requestTimeout = 10 * time.Second
	userAgent      = "outrigger-control-plane"
)

// Options of a connection. Log and Registry are required.
type Options struct {
	// Config of the connection. Where nil, that of the file Kubeconfig, or, where
	// that is empty too, the one that a pod finds.
	Config     *rest.Config
	Kubeconfig string
	// Namespace of the control plane.
	Namespace string
	Log       *slog.Logger
	Registry  prometheus.Registerer
}

// Cluster is a connection. Make it with Connect and run it with Run.
type Cluster struct {
	o         Options
	log       *slog.Logger
	config    *rest.Config
	http      *http.Client
	client    client.Client
	cache     cache.Cache
	discovery *discovery.DiscoveryClient
	contact   *contact
	suspect   chan struct{} // a request has failed as if the API server were away
	source    *Source
	roots     *Roots // nil where none are distributed
	metrics   metrics
}

// Connect prepares a connection; it asks nothing of the API server yet.
func Connect(o Options) (*Cluster, error) {
	config := o.Config
	if config == nil {
		var err error
		if config, err = find(o.Kubeconfig); err != nil {
			return nil, fmt.Errorf("no way to the API server: %w; in a pod, mount its service account's token; elsewhere, name a kubeconfig", err)
		}
	}
	config = rest.CopyConfig(config)
	config.UserAgent = userAgent
	// The API server's own fairness limits us.
	config.QPS = -1

	c := &Cluster{o: o, log: o.Log, config: config, contact: &contact{back: make(chan struct{})}, suspect: make(chan struct{}, 1), metrics: newMetrics(o.Registry)}
	close(c.contact.back)
	var err error
	if c.http, err = rest.HTTPClientFor(config); err != nil {
		return nil, fmt.Errorf("connect to the API server %s: %w", config.Host, err)
	}
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	mapper := meta.NewDefaultRESTMapper(nil)
	for _, k := range kinds() {
		k.addTo(mapper)
	}
	// Informers need no discovery: whether a kind is there, the Source finds out.
	// Others may use kinds that are not in our table.
	dynamic, err := apiutil.NewDynamicRESTMapper(config, c.http)
	if err != nil {
		return nil, fmt.Errorf("discovery of the API server %s: %w", config.Host, err)
	}
	if c.client, err = client.New(config, client.Options{HTTPClient: c.http, Scheme: scheme, Mapper: dynamic}); err != nil {
		return nil, fmt.Errorf("a client for the API server %s: %w", config.Host, err)
	}
	if c.discovery, err = discovery.NewDiscoveryClientForConfigAndClient(config, c.http); err != nil {
		return nil, fmt.Errorf("a client for the API server %s: %w", config.Host, err)
	}
	c.source = newSource(c)
	by := map[client.Object]cache.ByObject{}
	for _, k := range kinds() {
		by[k.object()] = cache.ByObject{Field: k.field, Transform: k.transform}
	}
	if c.cache, err = cache.New(config, cache.Options{
		HTTPClient: c.http, Scheme: scheme, Mapper: mapper, ByObject: by, NewInformer: c.newInformer,
		DefaultWatchErrorHandler: func(_ context.Context, _ *toolscache.Reflector, err error) {
			c.log.Debug("an informer begins anew", "error.message", err.Error())
		},
	}); err != nil {
		return nil, fmt.Errorf("a cache of the API server %s: %w", config.Host, err)
	}
	return c, nil
}

func find(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		return rest.InClusterConfig()
	}
	return clientcmd.BuildConfigFromFlags("", kubeconfig)
}

// newScheme knows the types that are read and written.
func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, gatewayv1.Install, v1alpha1.AddToScheme} {
		if err := add(s); err != nil {
			return nil, fmt.Errorf("register types: %w", err)
		}
	}
	return s, nil
}

// Source is what a mesh is made of.
func (c *Cluster) Source() *Source { return c.source }

// Config of the connection, for those who need a client of their own. It must
// not be changed.
func (c *Cluster) Config() *rest.Config { return c.config }

// Client reads from and writes to the API server, not to a cache.
func (c *Cluster) Client() client.Client { return c.client }

// Run follows the cluster until ctx ends, then returns nil.
func (c *Cluster) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer utilnet.CloseIdleConnectionsFor(c.http.Transport)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { c.stayInContact(ctx) })
	wg.Go(func() { c.source.run(ctx) })
	if c.roots != nil {
		wg.Go(func() { c.roots.run(ctx) })
	}
	err := c.cache.Start(ctx)
	cancel()
	if err != nil {
		return fmt.Errorf("informers: %w", err)
	}
	return nil
}

// contact is what is known of the API server's whereabouts.
type contact struct {
	mu   sync.Mutex
	back chan struct{} // closed while it is there
	last time.Time
	err  error
}

// state is nil while the API server answers.
func (c *contact) state() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// wait until it is there.
func (c *contact) wait(ctx context.Context) error {
	c.mu.Lock()
	back := c.back
	c.mu.Unlock()
	select {
	case <-back:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// set reports how long it was away where that has ended.
func (c *contact) set(err error, now time.Time) (away time.Duration, was bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was = c.err != nil
	switch {
	case err == nil && was:
		away = now.Sub(c.last)
		close(c.back)
	case err != nil && !was:
		c.back = make(chan struct{})
		if c.last.IsZero() {
			c.last = now // it has never been there
		}
	}
	if c.err = err; err == nil {
		c.last = now
	}
	return away, was
}

// Reach waits until the API server answers, for those who need it before Run. Its
// error is that of ctx.
func (c *Cluster) Reach(ctx context.Context) error {
	var said time.Time
	for {
		err := c.ask(ctx)
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if now := time.Now(); now.Sub(said) >= sayAwayEvery {
			said = now
			c.log.Warn("the API server cannot be reached; waiting for it", "url.full", c.config.Host, "error.message", err.Error())
		}
		if !sleep(ctx, awayEvery) {
			return ctx.Err()
		}
	}
}

// stayInContact asks for nothing but a sign of life.
func (c *Cluster) stayInContact(ctx context.Context) {
	var said time.Time
	for {
		err := c.ask(ctx)
		if ctx.Err() != nil {
			return
		}
		now := time.Now()
		away, was := c.contact.set(err, now)
		every := contactEvery
		if err == nil {
			c.metrics.contact.Set(float64(now.Unix()))
			if was {
				c.log.Info("the API server is back", "url.full", c.config.Host, "away", away.Round(time.Second).String())
				said = time.Time{}
			}
		} else {
			every = awayEvery
			if now.Sub(said) >= sayAwayEvery {
				said = now
				c.log.Warn("the API server cannot be reached; the last state stays in force", "url.full", c.config.Host, "error.message", err.Error())
			}
		}
		next := time.NewTimer(every)
		select {
		case <-ctx.Done():
			next.Stop()
			return
		case <-next.C:
		case <-c.hurry(err):
			next.Stop()
		}
	}
}

// hurry is suspicion, which is of no use while the API server is known to be away.
func (c *Cluster) hurry(away error) <-chan struct{} {
	if away != nil {
		return nil
	}
	return c.suspect
}

func (c *Cluster) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := c.discovery.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	if refused(err) || apierrors.IsTooManyRequests(err) {
		return nil // who refuses is there
	}
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("no answer in %s: %w", requestTimeout, err)
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

type metrics struct {
	synced  *prometheus.GaugeVec
	contact prometheus.Gauge
	events  *prometheus.CounterVec
	roots   *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) metrics {
	m := metrics{
		synced: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_kube_synced", Help: "1 where all objects of a kind are known, 0 where they are not: not read yet, not readable, or its CRD is missing.",
		}, []string{"kind"}),
		contact: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "outrigger_kube_last_contact_timestamp_seconds", Help: "When the API server answered last, in Unix time.",
		}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_kube_events_total", Help: "Events of watches, by kind and by whether they change anything that is read.",
		}, []string{"kind", "effect"}),
		roots: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_kube_roots_total", Help: "What became of the ConfigMaps of roots: created, repaired, foreign (somebody else's, left alone), failed.",
		}, []string{"result"}),
	}
	reg.MustRegister(m.synced, m.contact, m.events, m.roots)
	return m
}

// RouteLogs sends what the Kubernetes libraries say to log: errors as they are,
// all else at level debug. It sets what these libraries keep in globals, so that
// only main calls it, once.
func RouteLogs(log *slog.Logger) {
	l := logr.FromSlogHandler(log.Handler()).V(4) // slog's debug is -4
	klog.SetLogger(l)
	ctrllog.SetLogger(l)
}
