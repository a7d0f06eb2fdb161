package discovery

import (
	"slices"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// maxWaves bounds the changes of one resource that are under way at once. When
// more come, they count as one with the last.
const maxWaves = 8

// propagation follows each change of endpoints until every proxy that asks for
// them has acknowledged it, or one after it. Of a proxy that refuses it, or ends,
// nothing is waited for. Its methods are safe for concurrent use.
type propagation struct {
	observe func(time.Duration)

	mu      sync.Mutex
	targets map[target]*audience
}

// target is a resource as a kind of data plane has it.
type target struct {
	dp   xds.DataPlane
	name string
}

// audience is who asks for a resource and which versions they have, and the changes
// that some have not acknowledged yet, oldest first.
type audience struct {
	streams map[*stream]has
	waves   []*wave
}

// has are the versions that a stream was sent and has acknowledged last.
type has struct{ sent, acknowledged string }

type wave struct {
	version string
	seen    time.Time
	waiting map[*stream]struct{}
	last    time.Time // of the acknowledgements
}

func (p *propagation) join(s *stream, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := target{s.dp, name}
	a := p.targets[t]
	if a == nil {
		a = &audience{streams: map[*stream]has{}}
		p.targets[t] = a
	}
	if _, is := a.streams[s]; !is {
		a.streams[s] = has{}
	}
}

func (p *propagation) leave(s *stream, name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
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

// moving notes that resources are about to change.
func (p *propagation) moving(seen time.Time, dp xds.DataPlane, endpoints []*xds.Resource) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range endpoints {
		if a := p.targets[target{dp, r.Name}]; a != nil {
			p.begin(a, seen, r.Version)
		}
	}
}

func (p *propagation) begin(a *audience, seen time.Time, version string) {
	w := &wave{version: version, seen: seen, waiting: make(map[*stream]struct{}, len(a.streams))}
	for s, h := range a.streams {
		if h.sent == h.acknowledged && xds.SameContent(h.acknowledged, version) {
			p.settle(a, s, len(a.waves), seen) // what was between is not sent any more
			continue
		}
		w.waiting[s] = struct{}{}
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

// sent notes that a stream is being sent a version.
func (p *propagation) sent(s *stream, name, version string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.targets[target{s.dp, name}]; a != nil {
		if h, is := a.streams[s]; is {
			h.sent = version
			a.streams[s] = h
		}
	}
}

// acknowledged notes that a stream has a version, and with it all before.
func (p *propagation) acknowledged(s *stream, name, version string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.targets[target{s.dp, name}]
	if a == nil {
		return
	}
	if h, is := a.streams[s]; is {
		h.acknowledged = version
		a.streams[s] = h
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
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.targets[target{s.dp, name}]; a != nil {
		p.settle(a, s, len(a.waves), time.Time{})
	}
}

// settle takes a stream from the first n waves. It is called with the lock held. now is zero where it has not
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

// pending is the age of the oldest change under way, in seconds; 0 where none is.
func (p *propagation) pending(now time.Time) float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var oldest time.Time
	for _, a := range p.targets {
		for _, w := range a.waves {
			oldest = earlier(oldest, w.seen)
		}
	}
	if oldest.IsZero() {
		return 0
	}
	return now.Sub(oldest).Seconds()
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
