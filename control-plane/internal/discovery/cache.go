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
	"sync/atomic"
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
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// absent is recorded as the version of a name about which a client was told
// that it does not exist, so that it is told once.
const absent = "absent"

// orderTimeout bounds how long a listener or route is kept back from an Envoy
// that does not acknowledge the clusters that it refers to.
const orderTimeout = 2 * time.Second

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
	wanted   atomic.Bool // one has come; what nobody asks for is not made
	set      *xds.Set    // nil before the first publish, and where it is not wanted
	all      scope
	overlays map[string]map[string]served // namespace, route: what is served there instead
	waiting  map[string]*waiting          // by type
}

// asker is whose a request is, as far as it matters for the answer.
type asker struct {
	dp        xds.DataPlane
	view      string // key of its view; Envoy only
	namespace string
	account   string
	inbound   string // the listener that is for it alone; "" where its id names none
}

// foreign reports whether a listener is for another node alone. What is served
// under its name may be the zero value.
func (a asker) foreign(name string, s served) bool {
	if !strings.HasPrefix(name, xds.InboundPrefix) {
		return false
	}
	// A client has proved its service account, and with it not which pod it is.
	return name != a.inbound || s.Resource != nil && a.account != "" && s.ServiceAccount != a.account
}

// view is what Envoys with the same listeners get for wildcards.
type view struct {
	node    xds.EnvoyNode
	built   *xds.EnvoyView
	all     scope // listeners and clusters
	watches map[*watch]struct{}
	streams int // that hold the view; the last one to end drops it
}

// client is one stream of an Envoy. Envoy answers by itself what a route sends
// to a cluster that it does not have or has no endpoints for yet, so that
// listeners and routes are kept back until it has acknowledged both.
type client struct {
	node      *corev3.Node // of the stream's last request that had one
	connected time.Time
	acked     map[string]map[string]struct{} // clusters and endpoints: type, name
	held      map[*watch]struct{}
}

// watch is one client waiting for one type. Its owner is the stream: a watch is
// answered at most once, and the client's next request opens another.
type watch struct {
	asker
	plane    *plane
	own      *view   // Envoy only
	client   *client // Envoy only
	typeURL  string
	names    map[string]struct{}
	wildcard bool
	// returned is what the client has: version by name, or absent.
	returned map[string]string
	// fullState: every response lists all that exists (SotW for LDS and CDS).
	fullState bool
	// due is when what is held back is pushed all the same; zero: nothing is.
	due    time.Time
	answer func(a *answer)

	mu     sync.Mutex  // held while it is looked whether there is something to tell
	closed atomic.Bool // it is answered, or was ended
}

// answer is what a watch is told.
type answer struct {
	resources []served
	removed   []string
	returned  map[string]string
	late      bool // something was held back for orderTimeout, in vain
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
	now   func() time.Time
	// wake says that sweep may be due earlier than it last said; timedOut that
	// a response of a type was not held back any longer. Neither may block.
	wake     func()
	timedOut func(typeURL string)
	// moving is told of endpoints before they are put in force. It is called without
	// a lock of the cache.
	moving func(seen time.Time, dp xds.DataPlane, endpoints []*xds.Resource)

	// publishing is held while a mesh is put in force: what it is made into is encoded
	// under it, and not under mu. The mesh, the sets and what views are built of change
	// only with both held.
	publishing sync.Mutex

	// tables is held while mesh, the sets and what planes serve are changed, for a
	// moment, with mu held too. To read them one of the two is enough.
	tables sync.RWMutex

	mu      sync.RWMutex
	mesh    *mesh.Mesh // nil until the first publish: nothing is answered
	planes  map[xds.DataPlane]*plane
	views   map[string]*view
	clients map[*corev3.Node]*client // by the node that the library puts in a stream's requests
	// removal is when the next resource is to be removed, or earlier; zero: there is
	// none.
	removal time.Time
}

func newConfigCache(grace time.Duration, now func() time.Time, wake func(), timedOut func(string)) *configCache {
	c := &configCache{
		grace: grace, now: now, wake: wake, timedOut: timedOut, moving: func(time.Time, xds.DataPlane, []*xds.Resource) {},
		planes: map[xds.DataPlane]*plane{}, views: map[string]*view{}, clients: map[*corev3.Node]*client{},
	}
	for _, dp := range xds.DataPlanes() {
		p := &plane{all: scope{}, overlays: map[string]map[string]served{}, waiting: map[string]*waiting{}}
		for _, t := range xds.TypeURLs() {
			p.all[t] = map[string]served{}
			p.waiting[t] = newWaiting()
		}
		c.planes[dp] = p
	}
	c.planes[xds.Outrigger].wanted.Store(true)
	return c
}

// published is what a publish changed, by type, and how much there is now.
type published struct {
	changed map[string]int
	total   map[xds.DataPlane]map[string]int
}

// publish puts a mesh in force and answers the watches that it concerns, types
// in make-before-break order. seen is when what led to it was seen.
func (c *configCache) publish(m *mesh.Mesh, seen time.Time) (out published, err error) {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	// Build everything before changing anything: a failure leaves all in force.
	sets := map[xds.DataPlane]*xds.Set{}
	for dp, p := range c.planes {
		if !p.wanted.Load() {
			continue
		}
		if sets[dp], err = xds.Build(m, dp, p.set); err != nil {
			return out, err
		}
	}
	c.mu.Lock()
	was := maps.Clone(c.views)
	c.mu.Unlock()
	views := map[string]*xds.EnvoyView{}
	for k, v := range was {
		if views[k], err = sets[xds.Envoy].EnvoyView(v.node, v.built); err != nil {
			return out, fmt.Errorf("view of an Envoy: %w", err)
		}
	}
	for dp, p := range c.planes {
		if p.set != nil {
			c.moving(seen, dp, moved(p.set.Of(xds.EndpointType), sets[dp].Of(xds.EndpointType)))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, v := range c.views {
		if v == was[k] {
			continue
		}
		// It has come meanwhile.
		if views[k], err = sets[xds.Envoy].EnvoyView(v.node, v.built); err != nil {
			return out, fmt.Errorf("view of an Envoy: %w", err)
		}
	}
	now := c.now()
	first := c.mesh == nil
	var concerns []concern
	c.tables.Lock()
	c.mesh = m
	for dp, set := range sets {
		p := c.planes[dp]
		p.set = set
		cn := concern{p, map[string][]string{}, c.overlay(p, now)}
		for _, t := range xds.TypeURLs() {
			cn.names[t] = c.merge(p.all[t], p.set.Of(t), t == xds.ListenerType, now)
		}
		concerns = append(concerns, cn)
	}
	c.tables.Unlock()
	out = c.count(concerns)
	for _, cn := range concerns {
		for _, t := range xds.TypeURLs() {
			if first { // whoever waits is answered, if only that there is nothing
				cn.names[t] = cn.p.waiting[t].names()
			}
		}
	}
	var dirty []*view
	for k, v := range c.views {
		if first || !v.built.Equal(views[k]) {
			dirty = append(dirty, v)
		}
		c.rebuilt(v, views[k], now)
	}
	c.tell(concerns, dirty)
	return out, nil
}

// moved are those of the resources that were there before, and are others now.
func moved(before, now xds.Resources) []*xds.Resource {
	var out []*xds.Resource
	for name, r := range now {
		if old := before[name]; old != nil && old != r && !xds.SameContent(old.Version, r.Version) {
			out = append(out, r)
		}
	}
	return out
}

// update does what publish does for a mesh that differs only by ch from the one in
// force, at the cost of what differs. On an error that mesh may be in force or not.
func (c *configCache) update(m *mesh.Mesh, ch mesh.Change, seen time.Time) (out published, err error) {
	c.publishing.Lock()
	defer c.publishing.Unlock()
	if c.mesh == nil {
		return out, errors.New("an update of no mesh")
	}
	updates := map[xds.DataPlane]*xds.Update{}
	for dp, p := range c.planes {
		if p.set == nil {
			continue
		}
		if updates[dp], err = p.set.Prepare(m, ch); err != nil {
			return out, err
		}
		endpoints := slices.DeleteFunc(updates[dp].Endpoints(), func(r *xds.Resource) bool {
			old := p.set.Of(xds.EndpointType)[r.Name]
			return old != nil && xds.SameContent(old.Version, r.Version)
		})
		c.moving(seen, dp, endpoints)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	var dirty []*view
	for _, v := range c.views {
		if updates[xds.Envoy].Views(v.node, v.built) {
			dirty = append(dirty, v)
		}
	}
	var concerns []concern
	c.tables.Lock()
	c.mesh = m
	for dp, update := range updates {
		p := c.planes[dp]
		cn := concern{p: p, names: map[string][]string{}}
		for t, names := range update.Commit() {
			for _, name := range names {
				if c.mergeOne(p.all[t], name, p.set.Of(t)[name], t == xds.ListenerType, now) {
					cn.names[t] = append(cn.names[t], name)
				}
			}
		}
		concerns = append(concerns, cn)
	}
	c.tables.Unlock()
	for _, v := range dirty {
		built, viewErr := c.planes[xds.Envoy].set.EnvoyView(v.node, v.built)
		if viewErr != nil {
			err = errors.Join(err, fmt.Errorf("view of an Envoy: %w", viewErr))
			continue
		}
		c.rebuilt(v, built, now)
	}
	out = c.count(concerns)
	c.tell(concerns, dirty)
	return out, err
}

// want makes what a kind of data plane is told, from when the first of them comes.
func (c *configCache) want(dp xds.DataPlane) error {
	p := c.planes[dp]
	if p.wanted.Load() {
		return nil
	}
	c.publishing.Lock()
	defer c.publishing.Unlock()
	if p.wanted.Load() {
		return nil
	}
	if c.mesh != nil {
		set, err := xds.Build(c.mesh, dp, nil)
		if err != nil {
			return err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.tables.Lock()
		defer c.tables.Unlock()
		now := c.now()
		p.set = set
		c.overlay(p, now)
		for _, t := range xds.TypeURLs() {
			c.merge(p.all[t], set.Of(t), t == xds.ListenerType, now)
		}
	}
	p.wanted.Store(true)
	return nil
}

// concern is what is other than it was for a data plane.
type concern struct {
	p        *plane
	names    map[string][]string
	overlaid map[string][]string // by namespace
}

// rebuilt puts a view in force.
func (c *configCache) rebuilt(v *view, built *xds.EnvoyView, now time.Time) {
	v.built = built
	c.merge(v.all[xds.ListenerType], built.Listeners, true, now)
	c.merge(v.all[xds.ClusterType], built.Clusters, false, now)
}

// tell answers the watches that are concerned.
func (c *configCache) tell(concerns []concern, dirty []*view) {
	for _, t := range xds.TypeURLs() {
		for _, cn := range concerns {
			c.notify(cn.p, t, cn.names[t])
			if t == xds.RouteType {
				for namespace, names := range cn.overlaid {
					c.notifyIn(cn.p, namespace, names)
				}
			}
		}
		for _, v := range dirty {
			c.notifyView(v, t)
		}
	}
}

func (c *configCache) count(concerns []concern) published {
	out := published{map[string]int{}, map[xds.DataPlane]map[string]int{}}
	for _, cn := range concerns {
		for t, names := range cn.names {
			out.changed[t] += len(names)
		}
		for _, names := range cn.overlaid {
			out.changed[xds.RouteType] += len(names)
		}
		total := map[string]int{}
		for _, t := range xds.TypeURLs() {
			total[t] = len(cn.p.set.Of(t))
		}
		for _, routes := range cn.p.set.Overlays() {
			total[xds.RouteType] += len(routes)
		}
		out.total[cn.p.set.DataPlane] = total
	}
	return out
}

// overlay brings the routes of namespaces to what is wanted, and returns the names
// that changed by namespace. Where there is one that all share, what is there
// instead of it goes at once.
func (c *configCache) overlay(p *plane, now time.Time) map[string][]string {
	want, shared := p.set.Overlays(), p.set.Of(xds.RouteType)
	for namespace := range want {
		if p.overlays[namespace] == nil {
			p.overlays[namespace] = map[string]served{}
		}
	}
	changed := map[string][]string{}
	for namespace, have := range p.overlays {
		for name := range have {
			if want[namespace][name] == nil && shared[name] != nil {
				delete(have, name)
				changed[namespace] = append(changed[namespace], name)
			}
		}
		changed[namespace] = append(changed[namespace], c.merge(have, want[namespace], false, now)...)
		if len(have) == 0 {
			delete(p.overlays, namespace)
		}
	}
	return changed
}

// merge brings what is served of a type to what is wanted, and returns the
// names that changed. A listener goes at once; what listeners and routes refer
// to stays for the grace period.
func (c *configCache) merge(have map[string]served, want xds.Resources, atOnce bool, now time.Time) []string {
	var names []string
	for name, r := range want {
		if c.mergeOne(have, name, r, atOnce, now) {
			names = append(names, name)
		}
	}
	for name := range have {
		if _, ok := want[name]; !ok && c.mergeOne(have, name, nil, atOnce, now) {
			names = append(names, name)
		}
	}
	return names
}

// mergeOne does so for one name; want is nil where nothing is wanted. It reports
// whether something changed.
func (c *configCache) mergeOne(have map[string]served, name string, want *xds.Resource, atOnce bool, now time.Time) bool {
	old, ok := have[name]
	switch {
	case want != nil && ok && old.Version == want.Version:
		if !old.removeAt.IsZero() {
			old.removeAt = time.Time{}
			have[name] = old
		}
		return false
	case want != nil:
		have[name] = served{Resource: want, since: now}
		return true
	case !ok || !old.removeAt.IsZero():
		return false
	case atOnce || c.grace == 0:
		delete(have, name)
		return true
	}
	old.removeAt = now.Add(c.grace)
	have[name] = old
	if next := earlier(c.removal, old.removeAt); next != c.removal {
		c.removal = next
		c.wake()
	}
	return false
}

// sweep removes and pushes what is due and returns when more will be (zero:
// nothing is).
func (c *configCache) sweep() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for _, cl := range c.clients {
		c.retry(cl)
	}
	if c.removal.IsZero() || c.removal.After(now) {
		return c.nextDue()
	}
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
	locked := func(have map[string]served) []string {
		c.tables.Lock()
		defer c.tables.Unlock()
		return due(have)
	}
	// Removals go the other way round: first what refers, then what is referred to.
	types := xds.TypeURLs()
	slices.Reverse(types)
	for _, t := range types {
		for _, p := range c.planes {
			c.notify(p, t, locked(p.all[t]))
			if t != xds.RouteType {
				continue
			}
			for namespace, have := range p.overlays {
				c.notifyIn(p, namespace, locked(have))
				if len(have) == 0 {
					c.tables.Lock()
					delete(p.overlays, namespace)
					c.tables.Unlock()
				}
			}
		}
		for _, v := range c.views {
			if len(due(v.all[t])) > 0 {
				c.notifyView(v, t)
			}
		}
	}
	c.removal = c.nextRemoval()
	return c.nextDue()
}

func (c *configCache) nextDue() time.Time {
	next := c.removal
	for _, cl := range c.clients {
		for w := range cl.held {
			next = earlier(next, w.due)
		}
	}
	return next
}

func (c *configCache) nextRemoval() time.Time {
	var next time.Time
	look := func(have map[string]served) {
		for _, s := range have {
			next = earlier(next, s.removeAt)
		}
	}
	for _, p := range c.planes {
		for _, have := range p.all {
			look(have)
		}
		for _, have := range p.overlays {
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

// earlier of two times, of which zero is none.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

func (c *configCache) notify(p *plane, typeURL string, names []string) {
	for _, w := range p.waiting[typeURL].of(names) {
		c.tryAnswer(w)
	}
}

// notifyIn tells those of a namespace that routes have changed for them.
func (c *configCache) notifyIn(p *plane, namespace string, names []string) {
	for _, w := range p.waiting[xds.RouteType].of(names) {
		if w.namespace == namespace {
			c.tryAnswer(w)
		}
	}
}

func (c *configCache) notifyView(v *view, typeURL string) {
	for w := range maps.Clone(v.watches) {
		if w.typeURL == typeURL {
			c.tryAnswer(w)
		}
	}
}

// tryAnswer answers and closes the watch if there is something to tell. For an
// Envoy's it is called with the cache's lock held.
func (c *configCache) tryAnswer(w *watch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return
	}
	c.tables.RLock()
	a := c.compute(w)
	c.tables.RUnlock()
	if a == nil {
		if !w.due.IsZero() {
			w.client.held[w] = struct{}{}
			c.wake()
		} else if w.client != nil {
			delete(w.client.held, w)
		}
		return
	}
	c.forget(w)
	if a.late {
		c.timedOut(w.typeURL)
	}
	w.answer(a)
}

// retry looks again at what is held back from a client.
func (c *configCache) retry(cl *client) {
	for _, t := range xds.TypeURLs() {
		for w := range maps.Clone(cl.held) {
			if w.typeURL == t {
				c.tryAnswer(w)
			}
		}
	}
}

// ready reports whether the client has acknowledged every cluster that a
// listener or route leads to, with its endpoints. A cluster that it is not to
// have is not waited for: its share of the requests is answered 500.
func (w *watch) ready(s served) bool {
	if w.own == nil || w.client == nil {
		return true
	}
	for _, name := range s.Reaches {
		if _, ok := w.own.all[xds.ClusterType][name]; !ok {
			continue
		}
		if _, ok := w.client.acked[xds.ClusterType][name]; !ok {
			return false
		}
		_, discovered := w.plane.all[xds.EndpointType][name] // else they are in the cluster
		if _, ok := w.client.acked[xds.EndpointType][name]; discovered && !ok {
			return false
		}
	}
	return true
}

// lookup finds a resource as the client of the watch sees it.
func (w *watch) lookup(name string) (served, bool) {
	if w.own != nil {
		if s, ok := w.own.all[w.typeURL][name]; ok {
			return s, true
		}
	}
	if w.typeURL == xds.RouteType {
		if s, ok := w.plane.overlays[w.namespace][name]; ok {
			return s, true
		}
	}
	s, ok := w.plane.all[w.typeURL][name]
	if w.typeURL == xds.ListenerType && w.foreign(name, s) {
		return served{}, false
	}
	return s, ok
}

// compute says what the client of a watch has to be told; nil for nothing. It
// notes on the watch what is held back.
func (c *configCache) compute(w *watch) *answer {
	w.due = time.Time{}
	if c.mesh == nil {
		return nil
	}
	now := c.now()
	a := &answer{returned: maps.Clone(w.returned)}
	if a.returned == nil {
		a.returned = map[string]string{}
	}
	var wanted map[string]served // by wildcard
	if w.wildcard && w.own != nil {
		wanted = w.own.all[w.typeURL]
	}
	news := false
	see := func(name string, s served, exists bool) {
		known, told := w.returned[name]
		if exists && known != s.Version && !w.ready(s) {
			since := s.since
			if since.Before(w.client.connected) {
				since = w.client.connected
			}
			if due := since.Add(orderTimeout); now.Before(due) {
				w.due = earlier(w.due, due)
				return
			}
			a.late = true
		}
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
	if !w.due.IsZero() && w.fullState {
		return nil // a response without what is held back would remove it
	}
	// A wildcard that finds nothing is answered once, so that Envoy can finish
	// its start.
	if w.due.IsZero() && w.wildcard && len(w.returned) == 0 && len(a.returned) == 0 {
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
//
// Only for an Envoy's watch the cache's lock is taken. What makes that enough for
// the others: a watch waits before it looks, and what it looks at is changed before
// those who wait are looked for.
func (c *configCache) open(w *watch, node *corev3.Node) func() {
	w.asker = whose(node)
	w.plane = c.planes[w.dp]
	if w.dp == xds.Envoy {
		c.mu.Lock()
		defer c.mu.Unlock()
		w.own = c.views[w.view]
		w.client = c.clients[node]
		if w.own != nil {
			w.own.watches[w] = struct{}{}
		}
	}
	w.plane.waiting[w.typeURL].add(w)
	c.tryAnswer(w)
	return func() {
		if w.closed.Load() {
			return
		}
		if w.dp == xds.Envoy {
			c.mu.Lock()
			defer c.mu.Unlock()
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		c.forget(w)
	}
}

// forget ends a watch. It is called with the watch's lock held, and for an Envoy's
// with that of the cache.
func (c *configCache) forget(w *watch) {
	w.plane.waiting[w.typeURL].remove(w)
	if w.own != nil {
		delete(w.own.watches, w)
	}
	if w.client != nil {
		delete(w.client.held, w)
	}
	// Last: whoever sees it may change what the watch looks at.
	w.closed.Store(true)
}

// connect begins to follow what a stream of an Envoy acknowledges, until
// disconnect.
func (c *configCache) connect() *client {
	return &client{connected: c.now(), acked: map[string]map[string]struct{}{}, held: map[*watch]struct{}{}}
}

// knownBy says which node stands in the stream's requests from now on. It is
// how a watch is told whose it is: the library passes the pointer on.
func (c *configCache) knownBy(cl *client, node *corev3.Node) {
	if cl == nil || node == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.clients, cl.node)
	cl.node = node
	c.clients[node] = cl
}

func (c *configCache) disconnect(cl *client) {
	if cl == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.clients, cl.node)
}

// acknowledged takes all that a client now has of a type, and pushes what was
// held back for it.
func (c *configCache) acknowledged(cl *client, typeURL string, versions map[string]string) {
	if cl == nil || (typeURL != xds.ClusterType && typeURL != xds.EndpointType) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	has := make(map[string]struct{}, len(versions))
	for name := range versions {
		has[name] = struct{}{}
	}
	cl.acked[typeURL] = has
	c.retry(cl)
}

// holding reports whether something is held back from a client.
func (c *configCache) holding(cl *client) bool {
	if cl == nil {
		return false
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	return len(cl.held) > 0
}

// hold makes sure that there is a view for the listeners of a node until it is
// released as often as it was held.
func (c *configCache) hold(node xds.EnvoyNode) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	key := node.Key()
	v := c.views[key]
	if v == nil {
		v = &view{node: node, built: &xds.EnvoyView{}, watches: map[*watch]struct{}{}, all: scope{
			xds.ListenerType: {}, xds.ClusterType: {},
		}}
		if c.mesh != nil {
			if v.built, err = c.planes[xds.Envoy].set.EnvoyView(node, nil); err != nil {
				return err
			}
			c.merge(v.all[xds.ListenerType], v.built.Listeners, true, now)
			c.merge(v.all[xds.ClusterType], v.built.Clusters, false, now)
		}
		c.views[key] = v
	}
	v.streams++
	return nil
}

// missing names the upstreams of a view that no Service has.
func (c *configCache) missing(key string) []string {
	if key == "" {
		return nil
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
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
func (c *configCache) current(a asker, typeURL, name string) (served, bool) {
	w, unlock := c.reading(a, typeURL)
	defer unlock()
	return w.lookup(name)
}

// reading returns what looks resources up as a node sees them, until unlock.
func (c *configCache) reading(a asker, typeURL string) (w *watch, unlock func()) {
	w = &watch{asker: a, plane: c.planes[a.dp], typeURL: typeURL}
	if a.dp == xds.Envoy {
		c.mu.RLock()
		w.own = c.views[a.view]
		return w, c.mu.RUnlock
	}
	c.tables.RLock()
	return w, c.tables.RUnlock
}

// since is when the first of the names of a type began to be served as it is to a
// node; zero where none is served.
func (c *configCache) since(a asker, typeURL string, names []string) (out time.Time) {
	if len(names) == 0 {
		return out
	}
	w, unlock := c.reading(a, typeURL)
	defer unlock()
	for _, name := range names {
		if s, ok := w.lookup(name); ok {
			out = earlier(out, s.since)
		}
	}
	return out
}

// foreign reports whether a node asks for a listener that is for another alone.
func (c *configCache) foreign(a asker, typeURL, name string) bool {
	if typeURL != xds.ListenerType || !strings.HasPrefix(name, xds.InboundPrefix) {
		return false
	}
	w, unlock := c.reading(a, typeURL)
	defer unlock()
	if w.own != nil {
		if _, ok := w.own.all[typeURL][name]; ok {
			return false
		}
	}
	return a.foreign(name, w.plane.all[typeURL][name])
}

// sets returns a copy of what was built last for each data plane, or would be where
// none has come; nil before the first publish.
func (c *configCache) sets() (map[xds.DataPlane]*xds.Set, error) {
	c.mu.RLock()
	m := c.mesh
	out := make(map[xds.DataPlane]*xds.Set, len(c.planes))
	for dp, p := range c.planes {
		if p.set != nil {
			out[dp] = p.set.Clone()
		}
	}
	c.mu.RUnlock()
	if m == nil {
		return nil, nil
	}
	for dp := range c.planes {
		if out[dp] != nil {
			continue
		}
		var err error
		if out[dp], err = xds.Build(m, dp, nil); err != nil {
			return nil, err
		}
	}
	return out, nil
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
	return c.open(w, req.GetNode()), nil
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
	return c.open(w, req.GetNode()), nil
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

// whose tells what matters of a node. That it may say so of itself, the tracker
// has seen to.
func whose(node *corev3.Node) asker {
	said := func(key string) string { return node.GetMetadata().GetFields()[key].GetStringValue() }
	a := asker{dp: xds.DataPlaneOf(node.GetUserAgentName()), namespace: said(bootstrap.MetaNamespace), account: said(bootstrap.MetaServiceAccount)}
	// A namespace has no dot in it, and the name of a pod may have.
	id := node.GetId()
	if i := strings.LastIndexByte(id, '.'); i > 0 && (a.namespace == "" || a.namespace == id[i+1:]) {
		a.inbound = xds.InboundListenerName(id[i+1:], id[:i])
	}
	if a.dp == xds.Envoy {
		if n, err := xds.ParseEnvoyNode(node.GetMetadata()); err == nil { // else the stream is refused for it
			a.view = n.Key()
		}
	}
	return a
}

func errUnservedType(typeURL string) error {
	return status.Errorf(codes.InvalidArgument, "xDS type %q is not served; served are %s", typeURL, strings.Join(xds.TypeURLs(), ", "))
}
