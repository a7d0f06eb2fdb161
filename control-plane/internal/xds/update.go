package xds

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Update is what a mesh.Change makes different in a Set. It is made by
// Set.Prepare, which encodes, and takes effect by Commit, which does not.
type Update struct {
	set       *Set
	ports     map[string]*portSet
	instances map[string]*instanceSet // nil is gone
}

// Prepare makes what is different of s in a Mesh that differs by c from the one
// that s has been built of. It costs what c names. The Set is only read; nobody may
// commit another Update to it meanwhile.
//
// An error is a broken invariant: c does not say what differs, or a message cannot
// be encoded.
func (s *Set) Prepare(m *mesh.Mesh, c mesh.Change) (*Update, error) {
	u := &Update{set: s, ports: map[string]*portSet{}, instances: map[string]*instanceSet{}}
	for _, n := range c.Services {
		svc := m.Service(n)
		if svc == nil {
			return nil, fmt.Errorf("service %s/%s has changed and does not exist", n.Namespace, n.Name)
		}
		for _, p := range svc.Ports {
			key := mesh.Key(svc.Namespace, svc.Name, p.Number)
			old := s.ports[key]
			if old == nil {
				return nil, fmt.Errorf("port %s has changed and is new", key)
			}
			ps, err := buildPort(svc, p, s.DataPlane, old)
			if err != nil {
				return nil, fmt.Errorf("port %s for data plane %s: %w", key, s.DataPlane, err)
			}
			if ps.shape != old.shape || ps.endpoints != old.endpoints {
				u.ports[key] = ps
			}
		}
	}
	if s.DataPlane == GRPC {
		return u, nil
	}
	for _, n := range c.Instances {
		name := InboundListenerName(n.Namespace, n.Name)
		in := m.Instance(n)
		if in == nil {
			u.instances[name] = nil
			continue
		}
		is, err := buildInstance(in, s.DataPlane, s.instances[name])
		if err != nil {
			return nil, fmt.Errorf("pod %s/%s for data plane %s: %w", n.Namespace, n.Name, s.DataPlane, err)
		}
		u.instances[name] = is
	}
	return u, nil
}

// Endpoints are the endpoints that Commit will put in force. Some may be as they
// were.
func (u *Update) Endpoints() []*Resource {
	out := make([]*Resource, 0, len(u.ports))
	for _, ps := range u.ports {
		out = append(out, ps.endpoints)
	}
	return out
}

// Commit changes the Set. It returns the names of the resources that may differ, by
// type: what is there now, Set.Of and Set.Overlays say.
func (u *Update) Commit() map[string][]string {
	s := u.set
	names := map[string][]string{}
	note := func(typeURL string, r *Resource) { names[typeURL] = append(names[typeURL], r.Name) }
	for _, key := range slices.Sorted(maps.Keys(u.ports)) {
		ps, old := u.ports[key], s.ports[key]
		s.add(key, ps)
		note(EndpointType, ps.endpoints)
		if ps.shape != old.shape {
			note(ClusterType, ps.cluster)
			for _, l := range ps.listeners {
				note(ListenerType, l)
			}
			if ps.route != nil {
				note(RouteType, ps.route)
			}
		}
		if s.DataPlane != Envoy {
			names[ListenerType] = append(names[ListenerType], s.moveHosts(key, old.hosts, ps.hosts)...)
		}
	}
	for name, is := range u.instances {
		names[ListenerType] = append(names[ListenerType], name)
		delete(s.types[ListenerType], name)
		if is == nil {
			delete(s.instances, name)
			continue
		}
		s.instances[name] = is
		if is.listener != nil {
			s.types[ListenerType][name] = is.listener
		}
	}
	return names
}

// moveHosts replaces the listeners of a port by the addresses of its endpoints, and
// returns the names that may lead elsewhere now.
func (s *Set) moveHosts(key string, old, now []*Resource) []string {
	names := map[string]*Resource{} // nil: no listener of the port any more
	for _, l := range old {
		names[l.Name] = nil
	}
	for _, l := range now {
		if was := names[l.Name]; was == nil {
			names[l.Name] = l
		}
	}
	all := s.types[ListenerType]
	var moved []string
	for name, l := range names {
		before := s.owners[name]
		i, had := slices.BinarySearchFunc(before, key, func(o owner, k string) int { return cmp.Compare(o.key, k) })
		if had && before[i].listener == l {
			continue
		}
		// Where a virtual IP has the name, it keeps it.
		free := all[name] == nil || len(before) > 0 && all[name] == before[0].listener
		after := slices.Clone(before)
		switch {
		case had && l == nil:
			after = slices.Delete(after, i, i+1)
		case had:
			after[i].listener = l
		case l != nil:
			after = slices.Insert(after, i, owner{key, l})
		}
		if len(after) == 0 {
			delete(s.owners, name)
		} else {
			s.owners[name] = after
		}
		if !free {
			continue
		}
		moved = append(moved, name)
		if len(after) == 0 {
			delete(all, name)
		} else {
			all[name] = after[0].listener
		}
	}
	return moved
}

// Views says whether an Envoy's view may be another after Commit. It is asked
// before.
func (u *Update) Views(n EnvoyNode, v *EnvoyView) bool {
	for key, ps := range u.ports {
		old := u.set.ports[key]
		if ps.shape != old.shape && (n.Capture || v.Clusters[key] != nil) {
			return true
		}
		if n.Capture && !slices.Equal(ps.hosts, old.hosts) {
			return true
		}
	}
	if !n.Capture {
		return false
	}
	_, own := u.instances[InboundListenerName(n.Namespace, n.Instance)]
	return own
}

// Clone returns a copy that an Update of s does not change.
func (s *Set) Clone() *Set {
	out := *s
	out.types, out.overlays = make(map[string]Resources, len(s.types)), make(map[string]Resources, len(s.overlays))
	for t, rs := range s.types {
		out.types[t] = maps.Clone(rs)
	}
	for n, rs := range s.overlays {
		out.overlays[n] = maps.Clone(rs)
	}
	out.ports, out.instances, out.owners = maps.Clone(s.ports), maps.Clone(s.instances), maps.Clone(s.owners)
	return &out
}
