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
	subscribed, behind, rejected bool
	reason                       string
}

// Progress says how far each Interest has come, over the nodes that are connected
// here. Its cost is that of looking at each subscription once.
func (s *Server) Progress(want []Interest) []Progress {
	named := map[Name][]int{}
	inbound := map[string][]int{}
	types := map[string]bool{}
	for i, w := range want {
		for _, n := range w.Names {
			named[n] = append(named[n], i)
			types[n.Type] = true
		}
		for _, id := range w.Inbound {
			inbound[id] = append(inbound[id], i)
			types[xds.ListenerType] = true
		}
	}
	out := make([]Progress, len(want))
	if len(types) == 0 {
		return out
	}
	// One stream at a time: data planes are answered in between.
	for _, k := range s.tracker.newest() {
		id, seen := s.tracker.progress(k, types, func(namespace string, dp xds.DataPlane, node string, n Name) []int {
			concerned := named[n]
			if dp == xds.Envoy && n.Type == xds.ListenerType && strings.HasPrefix(n.Name, xds.InboundPrefix) {
				concerned = slices.Concat(concerned, inbound[node])
			}
			return slices.DeleteFunc(slices.Clone(concerned), func(i int) bool { return want[i].Namespace != "" && want[i].Namespace != namespace })
		})
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

// Nodes are the ids of the data planes that are connected.
func (s *Server) Nodes() map[string]bool {
	s.tracker.mu.Lock()
	defer s.tracker.mu.Unlock()
	out := make(map[string]bool, len(s.tracker.streams))
	for _, st := range s.tracker.streams {
		if st.node != "" {
			out[st.node] = true
		}
	}
	return out
}

// newest are the streams that count: of a node that has come back before its old
// stream was found dead, the new one.
func (t *tracker) newest() []streamKey {
	t.mu.Lock()
	defer t.mu.Unlock()
	byNode := make(map[string]streamKey, len(t.streams))
	for k, s := range t.streams {
		if s.node == "" {
			continue
		}
		if other, ok := byNode[s.node]; !ok || cmp.Or(s.connected.Compare(t.streams[other].connected), cmp.Compare(k.id, other.id)) > 0 {
			byNode[s.node] = k
		}
	}
	return slices.Collect(maps.Values(byNode))
}

// progress looks at the subscriptions of a stream to these types. concerned says
// to which Interests a resource belongs.
func (t *tracker) progress(k streamKey, types map[string]bool, concerned func(namespace string, dp xds.DataPlane, node string, n Name) []int) (id string, seen map[int]progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.streams[k]
	if s == nil {
		return "", nil // it has ended meanwhile
	}
	seen = map[int]progress{}
	for typeURL := range types {
		ts := s.types[typeURL]
		if ts == nil {
			continue
		}
		look := func(name string) {
			for _, i := range concerned(s.namespace, s.dp, s.node, Name{typeURL, name}) {
				cur, ok := t.cache.current(s.asker, typeURL, name)
				if !ok {
					continue
				}
				p := seen[i]
				p.subscribed = true
				p.behind = p.behind || !xds.SameContent(cur.Version, ts.acked[name])
				if ts.refused(name) {
					p.rejected = true
					p.reason = cmp.Or(p.reason, ts.reasonFor(name))
				}
				seen[i] = p
			}
		}
		for name := range ts.names {
			look(name)
		}
		// By wildcard.
		for name := range ts.acked {
			if _, named := ts.names[name]; !named {
				look(name)
			}
		}
		if ts.nack == nil {
			continue
		}
		for name := range ts.nack.Resources {
			_, named := ts.names[name]
			if _, had := ts.acked[name]; !named && !had {
				look(name)
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
