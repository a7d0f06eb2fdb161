package xdsclient

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// kind is one of the four types of resource, in the order in which they refer
// to each other.
type kind int

const (
	listeners kind = iota
	routes
	clusters
	endpoints
	kinds
)

const typePrefix = "type.googleapis.com/envoy.config."

func (k kind) typeURL() string {
	return typePrefix + [kinds]string{
		"listener.v3.Listener", "route.v3.RouteConfiguration", "cluster.v3.Cluster", "endpoint.v3.ClusterLoadAssignment",
	}[k]
}

// String is the word for logs and metrics.
func (k kind) String() string {
	return [kinds]string{"listener", "route", "cluster", "endpoints"}[k]
}

func kindOf(typeURL string) (kind, bool) {
	for k := range kinds {
		if k.typeURL() == typeURL {
			return k, true
		}
	}
	return 0, false
}

// listenerPrefix makes the name of a listener out of a destination's key;
// inboundPrefix begins the name of the one for those who call.
const (
	listenerPrefix = "outbound/"
	inboundPrefix  = "inbound/"
)

// patience is how long a new configuration waits for what it refers to before
// it is published without it.
const patience = 2 * time.Second

// resource is what is known of one name.
type resource struct {
	// answered: a version was accepted, or the name does not exist.
	answered bool
	missing  bool
	version  string
	// rejected says why the version that arrived last is not in force.
	rejected string
	// generation changes with the content; 0 is never one.
	generation uint64
	sum        [sha256.Size]byte
	raw        []byte // kept only for the file

	// One of these, by kind; not changed once set.
	listener  listener
	inbound   *table.Inbound
	routes    *route.Config
	cluster   *cluster
	endpoints []balance.Endpoint
}

// decode fills in the field of the kind.
func (r *resource) decode(k kind, name string, b []byte) (err error) {
	switch k {
	case listeners:
		if strings.HasPrefix(name, inboundPrefix) {
			r.inbound, err = decodeInbound(b)
			return err
		}
		r.listener, err = decodeListener(b)
	case routes:
		r.routes, err = decodeRoutes(b)
	case clusters:
		var c cluster
		c, err = decodeCluster(b)
		r.cluster = &c
	case endpoints:
		r.endpoints, err = decodeEndpoints(b)
	case kinds:
	}
	return err
}

// store holds the resources of the wanted destinations and makes Tables of
// them. It does no I/O; time is an argument. Its owner serialises the calls.
type store struct {
	keepRaw    bool
	wanted     map[string]bool
	inbound    string                      // name of the listener for those who call; empty: none
	res        [kinds]map[string]*resource // exactly those that are subscribed
	spare      [kinds]map[string]*resource // from the file, not referred to yet
	generation uint64

	// What the table in force is made of.
	dests    map[string]publishedDestination
	clusters map[string]publishedCluster
	callers  publishedInbound
	waiting  map[string]time.Time // since when, by what is waited for
}

type publishedDestination struct {
	*table.Destination
	generation [2]uint64 // of the listener and the routes
	version    string
}

type publishedCluster struct {
	*table.Cluster
	generation [2]uint64 // of the cluster and its endpoints
	version    string
}

type publishedInbound struct {
	*table.Inbound
	version string
}

func newStore(keepRaw bool) *store {
	s := &store{keepRaw: keepRaw, wanted: map[string]bool{}, waiting: map[string]time.Time{}}
	for k := range kinds {
		s.res[k], s.spare[k] = map[string]*resource{}, map[string]*resource{}
	}
	return s
}

// accept takes in a version of a resource. The error says what is wrong with it;
// what was accepted before stays in force. A name that is not subscribed to is
// ignored.
func (s *store) accept(k kind, name, version string, raw []byte) error {
	r := s.res[k][name]
	if r == nil {
		return nil
	}
	sum := sha256.Sum256(raw)
	if r.answered && !r.missing && r.sum == sum {
		r.version, r.rejected = version, ""
		return nil
	}
	next := resource{answered: true, version: version, sum: sum}
	if err := next.decode(k, name, raw); err != nil {
		err = fmt.Errorf("%s %s: %w", k, name, err)
		r.rejected = err.Error()
		return err
	}
	if s.keepRaw {
		next.raw = raw
	}
	s.generation++
	next.generation = s.generation
	*r = next
	return nil
}

// remove takes in that a name does not exist. It reports whether that is news.
func (s *store) remove(k kind, name string) bool {
	r := s.res[k][name]
	if r == nil || r.missing {
		return false
	}
	s.generation++
	*r = resource{answered: true, missing: true, generation: s.generation}
	return true
}

// restore keeps a resource of an earlier run until it is subscribed to.
func (s *store) restore(k kind, name, version string, raw []byte, missing bool) error {
	s.generation++
	r := &resource{answered: true, missing: missing, version: version, generation: s.generation}
	if !missing {
		if err := r.decode(k, name, raw); err != nil {
			return fmt.Errorf("%s %s: %w", k, name, err)
		}
		r.sum, r.raw = sha256.Sum256(raw), raw
	}
	s.spare[k][name] = r
	return nil
}

// forgetSpare drops what was restored and never subscribed to.
func (s *store) forgetSpare() {
	for k := range kinds {
		clear(s.spare[k])
	}
}

// refs are the clusters that requests of a configuration may go to.
func refs(c *route.Config) []string {
	var out []string
	for i := range c.Routes {
		for _, w := range c.Routes[i].Clusters {
			if w.Weight > 0 {
				out = append(out, w.Cluster)
			}
		}
		for _, m := range c.Routes[i].Mirrors {
			out = append(out, m.Cluster)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// destinationRefs are the clusters of a published destination.
func destinationRefs(d *table.Destination) []string {
	var out []string
	if d.Routes != nil {
		out = refs(d.Routes)
	}
	if d.Cluster != "" {
		out = append(out, d.Cluster)
	}
	return append(out, nameRefs(d.ServerNames)...)
}

// nameRefs are the clusters that server names lead to.
func nameRefs(names []table.ServerName) []string {
	var out []string
	for i := range names {
		for _, w := range names[i].Clusters {
			out = append(out, w.Cluster)
		}
	}
	return out
}

// needed follows the references from the wanted destinations. Clusters of the
// configuration in force stay until another one is published.
func (s *store) needed() [kinds]map[string]bool {
	var need [kinds]map[string]bool
	for k := range kinds {
		need[k] = map[string]bool{}
	}
	add := func(names ...string) {
		for _, n := range names {
			need[clusters][n] = true
		}
	}
	if s.inbound != "" {
		need[listeners][s.inbound] = true
	}
	for key := range s.wanted {
		name := listenerPrefix + key
		need[listeners][name] = true
		if d, ok := s.dests[key]; ok {
			add(destinationRefs(d.Destination)...)
		}
		l := s.res[listeners][name]
		if l == nil || !l.answered || l.missing {
			continue
		}
		add(l.listener.clusters()...)
		if l.listener.routeName != "" {
			need[routes][l.listener.routeName] = true
		}
	}
	for name := range need[routes] {
		if r := s.res[routes][name]; r != nil && r.routes != nil {
			add(refs(r.routes)...)
		}
	}
	for name := range need[clusters] {
		if c := s.res[clusters][name]; c != nil && c.cluster != nil {
			need[endpoints][c.cluster.eds] = true
		}
	}
	return need
}

// reconcile makes the subscriptions what is needed and returns the difference,
// sorted. What an earlier run knew is taken over, and may need more.
func (s *store) reconcile() (subscribe, unsubscribe [kinds][]string) {
	for again := true; again; {
		again = false
		for k, names := range s.needed() {
			for name := range names {
				if s.res[k][name] != nil {
					continue
				}
				r := s.spare[k][name]
				delete(s.spare[k], name)
				if again = again || r != nil; r == nil {
					r = &resource{}
				}
				s.res[k][name] = r
				subscribe[k] = append(subscribe[k], name)
			}
		}
	}
	for k, names := range s.needed() {
		for name := range s.res[k] {
			if !names[name] {
				delete(s.res[k], name)
				unsubscribe[k] = append(unsubscribe[k], name)
			}
		}
		slices.Sort(subscribe[k])
		slices.Sort(unsubscribe[k])
	}
	return subscribe, unsubscribe
}

// build makes the Table of what is known at now, or returns nil where it would
// say nothing new. What refers to something unknown waits for it, patience at
// the most; next is when build has to be called again for that, zero for never.
func (s *store) build(now time.Time) (t *table.Table, next time.Time) {
	waiting := map[string]time.Time{}
	// hold reports whether there is patience left.
	hold := func(what string) bool {
		since, ok := s.waiting[what]
		if !ok {
			since = now
		}
		waiting[what] = since
		due := since.Add(patience)
		if !now.Before(due) {
			return false
		}
		if next.IsZero() || due.Before(next) {
			next = due
		}
		return true
	}

	type looked struct {
		cluster publishedCluster
		ok      bool // there is something to publish, or nothing to wait for
	}
	seen := map[string]looked{}
	look := func(name string) (publishedCluster, bool) {
		if l, ok := seen[name]; ok {
			return l.cluster, l.ok
		}
		old, had := s.clusters[name]
		c, settled := s.candidateCluster(name, old, had)
		l := looked{c, true}
		if !settled && hold("cluster "+name) {
			l = looked{old, had}
		}
		seen[name] = l
		return l.cluster, l.ok
	}

	dests := make(map[string]publishedDestination, len(s.wanted))
	for key := range s.wanted {
		old, had := s.dests[key]
		d, settled := s.candidateDestination(key, old, had)
		if d.Destination != nil {
			for _, ref := range destinationRefs(d.Destination) {
				_, ok := look(ref)
				settled = settled && ok
			}
		}
		if !settled && hold("destination "+key) || d.Destination == nil {
			d = old
		}
		if d.Destination != nil {
			dests[key] = d
		}
	}
	found := map[string]publishedCluster{}
	for _, d := range dests {
		for _, ref := range destinationRefs(d.Destination) {
			if c, _ := look(ref); c.Cluster != nil {
				found[ref] = c
			}
		}
	}
	s.waiting = waiting
	var callers publishedInbound // none where there is no such workload: it lets nobody in
	if l := s.res[listeners][s.inbound]; l != nil {
		callers = publishedInbound{l.inbound, l.version}
	}
	same := callers.Inbound == s.callers.Inbound && maps.EqualFunc(dests, s.dests, func(a, b publishedDestination) bool { return a.Destination == b.Destination }) &&
		maps.EqualFunc(found, s.clusters, func(a, b publishedCluster) bool { return a.Cluster == b.Cluster })
	if same {
		return nil, next
	}
	s.dests, s.clusters, s.callers = dests, found, callers
	return s.table(), next
}

// candidateDestination is what the newest resources say of a wanted key; nil
// where they are not complete. It is settled where nothing needs to be waited
// for, leaving the clusters aside.
func (s *store) candidateDestination(key string, old publishedDestination, had bool) (d publishedDestination, settled bool) {
	l := s.res[listeners][listenerPrefix+key]
	if l == nil || !l.answered {
		return d, true // nothing in force can be out of date
	}
	generation, version := [2]uint64{l.generation, 0}, l.version
	out := table.Destination{Key: key, Service: cmp.Or(l.listener.service, key), Protocol: l.listener.protocol, Routes: l.listener.inline, Cluster: l.listener.cluster, ServerNames: l.listener.serverNames}
	settled = true
	switch {
	case l.missing:
		out.Missing = true
	case l.listener.routeName != "":
		r := s.res[routes][l.listener.routeName]
		switch {
		case r == nil || !r.answered:
			return d, false
		case r.missing:
			// Routes may go just before their listener does.
			out.Missing = true
			settled = !had || old.Missing
		}
		out.Routes = r.routes
		generation[1] = r.generation
		version += "/" + r.version
	}
	if out.Missing {
		out.Protocol, out.Cluster = "", ""
	}
	if had && old.generation == generation {
		return old, settled
	}
	return publishedDestination{&out, generation, version}, settled
}

// candidateCluster is what the newest resources say of a cluster; nil where it
// does not exist. It is settled where nothing needs to be waited for. Clusters
// and endpoints that are in force and vanish are waited for: a route without
// them may be on its way.
func (s *store) candidateCluster(name string, old publishedCluster, had bool) (c publishedCluster, settled bool) {
	r := s.res[clusters][name]
	switch {
	case r == nil || !r.answered:
		return c, r != nil && r.rejected != ""
	case r.missing:
		return c, !had
	}
	e := s.res[endpoints][r.cluster.eds]
	settled = e != nil && (e.answered || e.rejected != "") && (!e.missing || !had || len(old.Endpoints) == 0)
	generation, version := [2]uint64{r.generation, 0}, r.version
	out := r.cluster.Cluster
	out.Name = name
	if e != nil {
		out.Endpoints = e.endpoints
		generation[1] = e.generation
		version += "/" + e.version
	}
	if had && old.generation == generation {
		return old, settled
	}
	return publishedCluster{&out, generation, version}, settled
}

// table is the Table of what is published.
func (s *store) table() *table.Table {
	t := &table.Table{
		Destinations: make(map[string]*table.Destination, len(s.dests)),
		Clusters:     make(map[string]*table.Cluster, len(s.clusters)),
	}
	h := sha256.New()
	for _, key := range slices.Sorted(maps.Keys(s.dests)) {
		d := s.dests[key]
		t.Destinations[key] = d.Destination
		// A hash never fails to write.
		_, _ = fmt.Fprintf(h, "d\x00%s\x00%s\x00%t\x00", key, d.version, d.Missing)
	}
	for _, name := range slices.Sorted(maps.Keys(s.clusters)) {
		c := s.clusters[name]
		t.Clusters[name] = c.Cluster
		_, _ = fmt.Fprintf(h, "c\x00%s\x00%s\x00", name, c.version)
	}
	if s.callers.Inbound != nil {
		t.Inbound = s.callers.Inbound
		_, _ = fmt.Fprintf(h, "i\x00%s\x00", s.callers.version)
	}
	t.Version = hex.EncodeToString(h.Sum(nil)[:8])
	return t
}

// captured reports whether a key is an address that was called, and not a service.
func captured(key string) bool {
	_, err := netip.ParseAddrPort(key)
	return err == nil
}

// allAnswered reports whether the wanted destinations are published, or their
// configuration was rejected, which the control plane has been told. Who calls a
// captured address waits for it alone.
func (s *store) allAnswered() bool {
	if l := s.res[listeners][s.inbound]; s.inbound != "" && (l == nil || !l.answered && l.rejected == "") {
		return false
	}
	for key := range s.wanted {
		if _, ok := s.dests[key]; ok || captured(key) {
			continue
		}
		l := s.res[listeners][listenerPrefix+key]
		if l == nil {
			return false
		}
		if !l.answered {
			if l.rejected == "" {
				return false
			}
			continue
		}
		if r := s.res[routes][l.listener.routeName]; r == nil || r.answered || r.rejected == "" {
			return false
		}
	}
	return true
}

// saved is one resource as the file keeps it.
type saved struct {
	kind    kind
	name    string
	version string
	raw     []byte
	missing bool
}

// snapshot lists what was accepted, in order.
func (s *store) snapshot() []saved {
	var out []saved
	for k := range kinds {
		for _, name := range slices.Sorted(maps.Keys(s.res[k])) {
			if r := s.res[k][name]; r.answered {
				out = append(out, saved{k, name, r.version, r.raw, r.missing})
			}
		}
	}
	return out
}

// versions of the subscribed resources of a kind, for a control plane that is
// met again.
func (s *store) versions(k kind) map[string]string {
	out := map[string]string{}
	for name, r := range s.res[k] {
		if r.answered && !r.missing && r.version != "" {
			out[name] = r.version
		}
	}
	return out
}
