package discovery

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// absent is recorded as the version of a name about which a client was told
// that it does not exist, so that it is told once.
const absent = "absent"

// served is a resource that clients may get, and since when.
type served struct {
	*xds.Resource
	since time.Time
	// removeAt is set once the mesh has dropped the resource; it is served until
	// then, for the clients that have not yet got the routes without it.
	removeAt time.Time
}

// scope is the resources of one type that a client may see. Its maps are
// replaced or changed only under the cache's lock.
type scope map[string]map[string]served

// plane holds what a kind of data plane is told and who waits for changes.
type plane struct {
	set    *xds.Set
	all    scope
	byName map[string]map[string]map[*watch]struct{} // type, name
}

// view is what Envoys with the same listeners get for wildcards.
type view struct {
	node    xds.EnvoyNode
	built   *xds.EnvoyView
	all     scope // listeners and clusters
	watches map[*watch]struct{}
	streams int // that hold the view; the last one to end drops it
}

// watch is one client waiting for one type. Its owner is the stream: a watch is
// answered at most once, and the client's next request opens another.
type watch struct {
	plane    *plane
	view     *view // Envoy only
	typeURL  string
	names    map[string]struct{}
	wildcard bool
	// returned is what the client has: version by name, or absent.
	returned map[string]string
	// fullState: every response lists all that exists (SotW for LDS and CDS).
	fullState bool
	answer    func(a *answer)
}

// answer is what a watch is told.
type answer struct {
	resources []served
	removed   []string
	returned  map[string]string
}

// configCache holds the encoded resources once per data plane, whatever the
// number of clients, and implements go-control-plane's cache interface. That
// library keeps the protocol's state (streams, nonces, subscriptions); its own
// caches are not used, because they leave a name that does not exist
// unanswered, count SotW versions from zero after a restart, and want a copy of
// all resources for each Envoy.
//
// Versions are hashes of content, for SotW over all that the client has.
type configCache struct {
	grace time.Duration

	mu     sync.Mutex
	mesh   *mesh.Mesh // nil until the first publish: nothing is answered
	planes map[xds.DataPlane]*plane
	views  map[string]*view
}

func newConfigCache(grace time.Duration) *configCache {
	c := &configCache{grace: grace, planes: map[xds.DataPlane]*plane{}, views: map[string]*view{}}
	for _, dp := range xds.DataPlanes() {
		p := &plane{all: scope{}, byName: map[string]map[string]map[*watch]struct{}{}}
		for _, t := range xds.TypeURLs() {
			p.all[t] = map[string]served{}
			p.byName[t] = map[string]map[*watch]struct{}{}
		}
		c.planes[dp] = p
	}
	return c
}

// publish puts a mesh in force and answers the watches that it concerns, types
// in make-before-break order. It returns how many resources changed by type,
// and when the first deferred removal is due (zero: none).
func (c *configCache) publish(m *mesh.Mesh, now time.Time) (changed map[string]int, next time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Build everything before changing anything: a failure leaves all in force.
	sets := map[xds.DataPlane]*xds.Set{}
	for dp, p := range c.planes {
		if sets[dp], err = xds.Build(m, dp, p.set); err != nil {
			return nil, time.Time{}, err
		}
	}
	views := map[string]*xds.EnvoyView{}
	for k, v := range c.views {
		if views[k], err = sets[xds.Envoy].EnvoyView(v.node); err != nil {
			return nil, time.Time{}, fmt.Errorf("view of an Envoy: %w", err)
		}
	}
	first := c.mesh == nil
	c.mesh = m
	changed = map[string]int{}
	type concern struct {
		p     *plane
		names map[string][]string
	}
	var concerns []concern
	for dp, p := range c.planes {
		p.set = sets[dp]
		names := map[string][]string{}
		for _, t := range xds.TypeURLs() {
			names[t] = c.merge(p.all[t], p.set.Of(t), t, now)
			changed[t] += len(names[t])
		}
		concerns = append(concerns, concern{p, names})
	}
	dirty := map[*view]bool{}
	for k, v := range c.views {
		if !v.built.Equal(views[k]) {
			dirty[v] = true
		}
		v.built = views[k]
		c.merge(v.all[xds.ListenerType], v.built.Listeners, xds.ListenerType, now)
		c.merge(v.all[xds.ClusterType], v.built.Clusters, xds.ClusterType, now)
	}
	for _, t := range xds.TypeURLs() {
		for _, cn := range concerns {
			if first {
				cn.names[t] = slices.Collect(maps.Keys(cn.p.byName[t]))
			}
			c.notify(cn.p, t, cn.names[t])
		}
		for _, v := range c.views {
			if first || dirty[v] {
				c.notifyView(v, t)
			}
		}
	}
	return changed, c.nextRemoval(), nil
}

// merge brings what is served of a type to what is wanted, and returns the
// names that changed. A listener goes at once; what listeners and routes refer
// to stays for the grace period.
func (c *configCache) merge(have map[string]served, want xds.Resources, typeURL string, now time.Time) []string {
	var names []string
	for name, r := range want {
		old, ok := have[name]
		if ok && old.Version == r.Version {
			if !old.removeAt.IsZero() {
				old.removeAt = time.Time{}
				have[name] = old
			}
			continue
		}
		have[name] = served{Resource: r, since: now}
		names = append(names, name)
	}
	for name, s := range have {
		if _, ok := want[name]; ok || !s.removeAt.IsZero() {
			continue
		}
		if typeURL == xds.ListenerType || c.grace == 0 {
			delete(have, name)
			names = append(names, name)
			continue
		}
		s.removeAt = now.Add(c.grace)
		have[name] = s
	}
	return names
}

// sweep removes what is due and returns when the next removal is (zero: none).
func (c *configCache) sweep(now time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	due := func(have map[string]served) []string {
		var names []string
		for name, s := range have {
			if !s.removeAt.IsZero() && !s.removeAt.After(now) {
				delete(have, name)
				names = append(names, name)
			}
		}
		return names
	}
	// Removals go the other way round: first what refers, then what is referred to.
	types := xds.TypeURLs()
	slices.Reverse(types)
	for _, t := range types {
		for _, p := range c.planes {
			c.notify(p, t, due(p.all[t]))
		}
		for _, v := range c.views {
			if len(due(v.all[t])) > 0 {
				c.notifyView(v, t)
			}
		}
	}
	return c.nextRemoval()
}

func (c *configCache) nextRemoval() time.Time {
	var next time.Time
	look := func(have map[string]served) {
		for _, s := range have {
			if !s.removeAt.IsZero() && (next.IsZero() || s.removeAt.Before(next)) {
				next = s.removeAt
			}
		}
	}
	for _, p := range c.planes {
		for _, have := range p.all {
			look(have)
		}
	}
	for _, v := range c.views {
		for _, have := range v.all {
			look(have)
		}
	}
	return next
}

func (c *configCache) notify(p *plane, typeURL string, names []string) {
	concerned := map[*watch]struct{}{}
	for _, n := range names {
		maps.Copy(concerned, p.byName[typeURL][n])
	}
	for w := range concerned {
		c.tryAnswer(w)
	}
}

func (c *configCache) notifyView(v *view, typeURL string) {
	for w := range maps.Clone(v.watches) {
		if w.typeURL == typeURL {
			c.tryAnswer(w)
		}
	}
}

// tryAnswer answers and closes the watch if there is something to tell.
func (c *configCache) tryAnswer(w *watch) {
	if a := c.compute(w); a != nil {
		c.forget(w)
		w.answer(a)
	}
}

// lookup finds a resource as the client of the watch sees it.
func (w *watch) lookup(name string) (served, bool) {
	if w.view != nil {
		if s, ok := w.view.all[w.typeURL][name]; ok {
			return s, true
		}
	}
	s, ok := w.plane.all[w.typeURL][name]
	return s, ok
}

// compute says what the client of a watch has to be told; nil for nothing.
func (c *configCache) compute(w *watch) *answer {
	if c.mesh == nil {
		return nil
	}
	a := &answer{returned: maps.Clone(w.returned)}
	if a.returned == nil {
		a.returned = map[string]string{}
	}
	var wanted map[string]served // by wildcard
	if w.wildcard && w.view != nil {
		wanted = w.view.all[w.typeURL]
	}
	news := false
	see := func(name string, s served, exists bool) {
		known, told := w.returned[name]
		switch {
		case exists && known != s.Version:
			a.resources = append(a.resources, s)
			a.returned[name] = s.Version
			news = true
		case exists && w.fullState:
			a.resources = append(a.resources, s)
		case !exists && (!told || known != absent):
			a.removed = append(a.removed, name)
			a.returned[name] = absent
			news = true
		}
	}
	for name := range w.names {
		s, ok := w.lookup(name)
		see(name, s, ok)
	}
	for name, s := range wanted {
		if _, named := w.names[name]; !named {
			see(name, s, true)
		}
	}
	for name, version := range w.returned {
		if _, named := w.names[name]; named {
			continue
		}
		if _, ok := wanted[name]; ok {
			continue
		}
		delete(a.returned, name)
		if w.wildcard && version != absent {
			a.removed = append(a.removed, name)
			news = true
		}
	}
	// A wildcard that finds nothing is answered once, so that Envoy can finish
	// its start.
	if w.wildcard && len(w.returned) == 0 && len(a.returned) == 0 {
		a.returned[absent] = absent
		news = true
	}
	if !news {
		return nil
	}
	slices.SortFunc(a.resources, func(x, y served) int { return strings.Compare(x.Name, y.Name) })
	slices.Sort(a.removed)
	return a
}

// open answers the watch at once if there is something to tell, else keeps it.
// The function it returns ends the watch; it may be called more than once.
func (c *configCache) open(w *watch, dp xds.DataPlane, viewKey string) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.plane = c.planes[dp]
	w.view = c.views[viewKey]
	if a := c.compute(w); a != nil {
		w.answer(a)
		return func() {}
	}
	for name := range w.names {
		ws := w.plane.byName[w.typeURL][name]
		if ws == nil {
			ws = map[*watch]struct{}{}
			w.plane.byName[w.typeURL][name] = ws
		}
		ws[w] = struct{}{}
	}
	if w.view != nil {
		w.view.watches[w] = struct{}{}
	}
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.forget(w)
	}
}

func (c *configCache) forget(w *watch) {
	for name := range w.names {
		ws := w.plane.byName[w.typeURL][name]
		delete(ws, w)
		if len(ws) == 0 {
			delete(w.plane.byName[w.typeURL], name)
		}
	}
	if w.view != nil {
		delete(w.view.watches, w)
	}
}

// hold makes sure that there is a view for the listeners of a node until it is
// released as often as it was held.
func (c *configCache) hold(node xds.EnvoyNode, now time.Time) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := node.Key()
	v := c.views[key]
	if v == nil {
		v = &view{node: node, built: &xds.EnvoyView{}, watches: map[*watch]struct{}{}, all: scope{
			xds.ListenerType: {}, xds.ClusterType: {},
		}}
		if c.mesh != nil {
			if v.built, err = c.planes[xds.Envoy].set.EnvoyView(node); err != nil {
				return err
			}
			c.merge(v.all[xds.ListenerType], v.built.Listeners, xds.ListenerType, now)
			c.merge(v.all[xds.ClusterType], v.built.Clusters, xds.ClusterType, now)
		}
		c.views[key] = v
	}
	v.streams++
	return nil
}

// missing names the upstreams of a view that no Service has.
func (c *configCache) missing(key string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if v := c.views[key]; v != nil {
		return v.built.Missing
	}
	return nil
}

func (c *configCache) release(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v := c.views[key]
	if v == nil {
		return
	}
	if v.streams--; v.streams == 0 {
		delete(c.views, key)
	}
}

// current returns what is served under a name to a node.
func (c *configCache) current(dp xds.DataPlane, viewKey, typeURL, name string) (served, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return (&watch{plane: c.planes[dp], view: c.views[viewKey], typeURL: typeURL}).lookup(name)
}

// sets returns what was built last for each data plane; nil before the first
// publish.
func (c *configCache) sets() map[xds.DataPlane]*xds.Set {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mesh == nil {
		return nil
	}
	out := make(map[xds.DataPlane]*xds.Set, len(c.planes))
	for dp, p := range c.planes {
		out[dp] = p.set
	}
	return out
}

// CreateWatch implements cache.ConfigWatcher for SotW.
func (c *configCache) CreateWatch(req *cachev3.Request, sub cachev3.Subscription, out chan cachev3.Response) (func(), error) {
	typeURL := req.GetTypeUrl()
	if !slices.Contains(xds.TypeURLs(), typeURL) {
		return nil, errUnservedType(typeURL)
	}
	w := &watch{
		typeURL: typeURL, names: sub.SubscribedResources(), wildcard: sub.IsWildcard(), returned: sub.ReturnedResources(),
		fullState: cachev3.ResourceRequiresFullStateInSotw(typeURL),
	}
	w.answer = func(a *answer) {
		res := make([]*anypb.Any, 0, len(a.resources))
		for _, r := range a.resources {
			res = append(res, r.Any)
		}
		// The channel is made by the library with room for every type, and a
		// type has at most one watch, so this does not block.
		out <- &cachev3.PassthroughResponse{
			Request: req, ReturnedResources: a.returned,
			DiscoveryResponse: &discoveryv3.DiscoveryResponse{
				VersionInfo: versionOf(a.returned), Resources: res, ResourceErrors: notFound(a.removed), TypeUrl: typeURL,
			},
		}
	}
	dp, key := whose(req.GetNode())
	return c.open(w, dp, key), nil
}

// CreateDeltaWatch implements cache.ConfigWatcher for delta.
func (c *configCache) CreateDeltaWatch(req *cachev3.DeltaRequest, sub cachev3.Subscription, out chan cachev3.DeltaResponse) (func(), error) {
	typeURL := req.GetTypeUrl()
	if !slices.Contains(xds.TypeURLs(), typeURL) {
		return nil, errUnservedType(typeURL)
	}
	// A name in a subscription is answered even if the client was told of it
	// before (xDS protocol, "subscribing to resources"), except for what it says
	// to have from an earlier stream.
	returned := maps.Clone(sub.ReturnedResources())
	for _, name := range req.GetResourceNamesSubscribe() {
		if _, has := req.GetInitialResourceVersions()[name]; !has {
			delete(returned, name)
		}
	}
	w := &watch{typeURL: typeURL, names: sub.SubscribedResources(), wildcard: sub.IsWildcard(), returned: returned}
	w.answer = func(a *answer) {
		res := make([]*discoveryv3.Resource, 0, len(a.resources))
		for _, r := range a.resources {
			res = append(res, &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Any})
		}
		// As for SotW: the channel has room for every type twice.
		out <- &cachev3.DeltaPassthroughResponse{
			DeltaRequest: req, NextVersionMap: a.returned,
			DeltaDiscoveryResponse: &discoveryv3.DeltaDiscoveryResponse{
				SystemVersionInfo: versionOf(a.returned), Resources: res, RemovedResources: a.removed, TypeUrl: typeURL,
			},
		}
	}
	dp, key := whose(req.GetNode())
	return c.open(w, dp, key), nil
}

// Fetch implements cache.ConfigFetcher; REST is not served.
func (c *configCache) Fetch(context.Context, *cachev3.Request) (cachev3.Response, error) {
	return nil, errors.New("xDS over REST is not served: use ADS over gRPC")
}

// notFound says in SotW, to clients that know xDS TP3, which names do not exist.
// The others see a response without them.
func notFound(names []string) []*discoveryv3.ResourceError {
	var out []*discoveryv3.ResourceError
	for _, n := range names {
		out = append(out, &discoveryv3.ResourceError{
			ResourceName: &discoveryv3.ResourceName{Name: n},
			ErrorDetail:  &rpcstatus.Status{Code: int32(codes.NotFound), Message: "no such resource in the mesh"},
		})
	}
	return out
}

// versionOf is a hash over the names and versions that a client has.
func versionOf(returned map[string]string) string {
	h := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(returned)) {
		if v := returned[name]; v != absent {
			// A hash never fails to write.
			_, _ = fmt.Fprintf(h, "%s\x00%s\x00", name, v)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// whose tells the data plane of a node and, for an Envoy, the key of its view.
func whose(node *corev3.Node) (xds.DataPlane, string) {
	dp := xds.DataPlaneOf(node.GetUserAgentName())
	if dp != xds.Envoy {
		return dp, ""
	}
	n, err := xds.ParseEnvoyNode(node.GetMetadata())
	if err != nil {
		return dp, "" // the stream is refused for it, by the tracker
	}
	return dp, n.Key()
}

func errUnservedType(typeURL string) error {
	return status.Errorf(codes.InvalidArgument, "xDS type %q is not served; served are %s", typeURL, strings.Join(xds.TypeURLs(), ", "))
}
