package discovery

import (
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// maxWaves bounds the changes of one resource that are under way at once. When
// more come, they count as one with the last.
const maxWaves = 8

// propagation follows each change of endpoints until every proxy that asks for
// them has acknowledged it, or one after it. Of a proxy that refuses it, or ends,
// nothing is waited for. Its methods are called with the tracker's lock held.
type propagation struct {
	observe func(time.Duration)
	targets map[target]*audience
}

// target is a resource as a kind of data plane has it.
type target struct {
	dp   xds.DataPlane
	name string
}

// audience is who asks for a resource, and what they have not acknowledged yet,
// oldest first.
type audience struct {
	streams map[*stream]struct{}
	waves   []*wave
}

type wave struct {
	version string
	seen    time.Time
	waiting map[*stream]struct{}
	last    time.Time // of the acknowledgements
}

func (p *propagation) join(s *stream, name string) {
	t := target{s.dp, name}
	a := p.targets[t]
	if a == nil {
		a = &audience{streams: map[*stream]struct{}{}}
		p.targets[t] = a
	}
	a.streams[s] = struct{}{}
}

func (p *propagation) leave(s *stream, name string) {
	t := target{s.dp, name}
	a := p.targets[t]
	if a == nil {
		return
	}
	delete(a.streams, s)
	p.settle(a, s, len(a.waves), time.Time{})
	if len(a.streams) == 0 {
		delete(p.targets, t)
	}
}

// begin notes that a resource is about to change. has says which version a stream
// has, and whether it has been sent one that it has not answered.
func (p *propagation) begin(seen time.Time, dp xds.DataPlane, r *xds.Resource, has func(*stream) (version string, owes bool)) {
	a := p.targets[target{dp, r.Name}]
	if a == nil {
		return
	}
	w := &wave{version: r.Version, seen: seen, waiting: make(map[*stream]struct{}, len(a.streams))}
	for s := range a.streams {
		if version, owes := has(s); owes || !xds.SameContent(version, r.Version) {
			w.waiting[s] = struct{}{}
		} else { // what was between is not sent any more
			p.settle(a, s, len(a.waves), seen)
		}
	}
	if len(w.waiting) == 0 {
		return
	}
	if n := len(a.waves); n == maxWaves {
		w.seen = a.waves[n-1].seen
		a.waves = a.waves[:n-1]
	}
	a.waves = append(a.waves, w)
}

// acknowledged notes that a stream has a version, and with it all before.
func (p *propagation) acknowledged(s *stream, name, version string, now time.Time) {
	a := p.targets[target{s.dp, name}]
	if a == nil {
		return
	}
	for i := len(a.waves) - 1; i >= 0; i-- {
		if xds.SameContent(a.waves[i].version, version) {
			p.settle(a, s, i+1, now)
			return
		}
	}
}

// refused notes that a stream will not have what is under way to it.
func (p *propagation) refused(s *stream, name string) {
	if a := p.targets[target{s.dp, name}]; a != nil {
		p.settle(a, s, len(a.waves), time.Time{})
	}
}

// settle takes a stream from the first n waves. now is zero where it has not
// acknowledged them.
func (p *propagation) settle(a *audience, s *stream, n int, now time.Time) {
	done := false
	for _, w := range a.waves[:n] {
		if _, waits := w.waiting[s]; !waits {
			continue
		}
		delete(w.waiting, s)
		if !now.IsZero() {
			w.last = now
		}
		if len(w.waiting) == 0 {
			done = true
			if !w.last.IsZero() {
				p.observe(w.last.Sub(w.seen))
			}
		}
	}
	if done {
		a.waves = slices.DeleteFunc(a.waves, func(w *wave) bool { return len(w.waiting) == 0 })
	}
}

// oldest is when the oldest change was seen that is under way; zero where none is.
func (p *propagation) oldest() time.Time {
	var out time.Time
	for _, a := range p.targets {
		for _, w := range a.waves {
			out = earlier(out, w.seen)
		}
	}
	return out
}

// moving begins to follow changes of endpoints.
func (t *tracker) moving(seen time.Time, dp xds.DataPlane, endpoints []*xds.Resource) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, r := range endpoints {
		t.propagation.begin(seen, dp, r, func(s *stream) (string, bool) {
			ts := s.of(xds.EndpointType)
			for _, sent := range ts.pending {
				if _, ok := sent.resources[r.Name]; ok {
					return "", true
				}
			}
			return ts.acked[r.Name], false
		})
	}
}

// subscribe and unsubscribe keep ts.names.
func (t *tracker) subscribe(s *stream, ts *typeState, typeURL, name string) {
	ts.names[name] = struct{}{}
	if typeURL == xds.EndpointType {
		t.propagation.join(s, name)
	}
}

func (t *tracker) unsubscribe(s *stream, ts *typeState, typeURL, name string) {
	delete(ts.names, name)
	if typeURL == xds.EndpointType {
		t.propagation.leave(s, name)
	}
}

// pendingPropagation is the age of the oldest change under way, in seconds.
func (t *tracker) pendingPropagation() float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if at := t.propagation.oldest(); !at.IsZero() {
		return t.now().Sub(at).Seconds()
	}
	return 0
}
