package discovery

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// Name of a resource.
type Name struct{ Type, Name string }

// Interest is some resources, of which somebody wants to know how many of those
// who ask for them have them.
type Interest struct {
	Names []Name
	// Inbound are ids of nodes: of an Envoy among them, all listeners whose names
	// begin with inbound/ count as named.
	Inbound []string
	// Namespace whose nodes alone count; empty counts all.
	Namespace string
}

// Progress is how far resources have come.
type Progress struct {
	// Subscribed nodes have asked for at least one of the resources that are served.
	// Of these, Applied have acknowledged all that they asked for as it is served
	// now, and Rejected have refused one and not accepted it since.
	Subscribed, Applied, Rejected int
	// Reasons of refusals, "<node id>: <reason>", sorted, at most maxReasons. A node
	// whose reason names other resources of the response only is not among them.
	Reasons []string
}

const (
	maxReasons = 3
	// maxReason is how much of a node's words is repeated, in bytes.
	maxReason = 512
)

// progress of one node towards one Interest.
type progress struct {
	behind, rejected bool
	reason           string
}

// Progress says how far each Interest has come, over the nodes that are connected
// here. It looks at each subscription of the types in question once, which costs
// about a microsecond: a third of a second for 10000 nodes with 30 names each.
func (s *Server) Progress(want []Interest) []Progress {
	l := look{want: want, named: map[string]map[string][]int{}, inbound: map[string][]int{}, served: map[servedKey]served{}}
	for i, w := range want {
		for _, n := range w.Names {
			l.of(n.Type)[n.Name] = append(l.of(n.Type)[n.Name], i)
		}
		for _, id := range w.Inbound {
			l.of(xds.ListenerType)
			l.inbound[id] = append(l.inbound[id], i)
		}
	}
	out := make([]Progress, len(want))
	if len(l.named) == 0 {
		return out
	}
	// One stream at a time: data planes are answered in between.
	for _, k := range s.tracker.newest() {
		id, seen := s.tracker.progress(k, &l)
		for i, p := range seen {
			o := &out[i]
			o.Subscribed++
			switch {
			case p.rejected:
				o.Rejected++
			case !p.behind:
				o.Applied++
			}
			if p.reason != "" {
				o.Reasons = append(o.Reasons, id+": "+p.reason)
			}
		}
	}
	for i := range out {
		slices.Sort(out[i].Reasons)
		out[i].Reasons = out[i].Reasons[:min(len(out[i].Reasons), maxReasons)]
	}
	return out
}

// look is one call of Progress.
type look struct {
	want    []Interest
	named   map[string]map[string][]int // type, name: Interests
	inbound map[string][]int            // node: Interests
	served  map[servedKey]served        // what has been looked up already
}

// servedKey is whatever the answer of the cache depends on, where it depends on no
// single node.
type servedKey struct {
	dp                       xds.DataPlane
	namespace, typeURL, name string
}

func (l *look) of(typeURL string) map[string][]int {
	m := l.named[typeURL]
	if m == nil {
		m = map[string][]int{}
		l.named[typeURL] = m
	}
	return m
}

// current is what is served to the node of a stream; ok is false where nothing is.
func (l *look) current(c *configCache, s *stream, typeURL, name string) (served, bool) {
	if s.dp == xds.Envoy || typeURL == xds.ListenerType {
		return c.current(s.asker, typeURL, name)
	}
	k := servedKey{s.dp, s.namespace, typeURL, name}
	if cur, ok := l.served[k]; ok {
		return cur, cur.Resource != nil
	}
	cur, _ := c.current(s.asker, typeURL, name)
	l.served[k] = cur
	return cur, cur.Resource != nil
}

// Nodes are the ids of the data planes that are connected.
func (s *Server) Nodes() map[string]bool {
	streams := s.tracker.all()
	out := make(map[string]bool, len(streams))
	for _, st := range streams {
		if id := st.id(); id != "" {
			out[id] = true
		}
	}
	return out
}

// newest are the streams that count: of a node that has come back before its old
// stream was found dead, the new one.
func (t *tracker) newest() []streamKey {
	streams := t.all()
	byNode := make(map[string]streamKey, len(streams))
	for k, s := range streams {
		id := s.id()
		if id == "" {
			continue
		}
		if other, ok := byNode[id]; !ok || cmp.Or(s.connected.Compare(streams[other].connected), cmp.Compare(k.id, other.id)) > 0 {
			byNode[id] = k
		}
	}
	return slices.Collect(maps.Values(byNode))
}

// progress looks at the subscriptions of a stream.
func (t *tracker) progress(k streamKey, l *look) (id string, seen map[int]progress) {
	s := t.find(k)
	if s == nil {
		return "", nil // it has ended meanwhile
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	seen = map[int]progress{}
	for typeURL, named := range l.named {
		ts := s.types[typeURL]
		if ts == nil {
			continue
		}
		note := func(name string, concerned []int) {
			for _, i := range concerned {
				if only := l.want[i].Namespace; only != "" && only != s.namespace {
					continue
				}
				cur, ok := l.current(t.cache, s, typeURL, name)
				if !ok {
					return
				}
				p := seen[i]
				p.behind = p.behind || !xds.SameContent(cur.Version, ts.acked[name])
				if ts.refused(name) {
					p.rejected = true
					p.reason = cmp.Or(p.reason, ts.reasonFor(name))
				}
				seen[i] = p
			}
		}
		visit := func(name string) {
			note(name, named[name])
			if s.dp == xds.Envoy && typeURL == xds.ListenerType && strings.HasPrefix(name, xds.InboundPrefix) {
				note(name, l.inbound[s.node])
			}
		}
		for name := range ts.names {
			visit(name)
		}
		// By wildcard.
		for name := range ts.acked {
			if _, named := ts.names[name]; !named {
				visit(name)
			}
		}
		if ts.nack == nil {
			continue
		}
		for name := range ts.nack.Resources {
			_, named := ts.names[name]
			if _, had := ts.acked[name]; !named && !had {
				visit(name)
			}
		}
	}
	return s.node, seen
}

func (ts *typeState) refused(name string) bool {
	if ts.nack == nil {
		return false
	}
	_, ok := ts.nack.Resources[name]
	return ok
}

// reasonFor is the reason of a refusal, where it may be about the resource: a
// response is refused as a whole, and good words name what is at fault.
func (ts *typeState) reasonFor(name string) string {
	reason := ts.nack.Reason
	if !strings.Contains(reason, name) {
		for other := range ts.names {
			if strings.Contains(reason, other) {
				return ""
			}
		}
		for other := range ts.nack.Resources {
			if strings.Contains(reason, other) {
				return ""
			}
		}
	}
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "") + "..."
	}
	return reason
}
