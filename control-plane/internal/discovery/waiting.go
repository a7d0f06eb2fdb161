package discovery

import (
	"maps"
	"slices"
	"sync"
)

// waiting are the watches of one type and data plane, by the names that they wait
// for. It is safe for concurrent use, and holds its lock for nothing else.
type waiting struct {
	mu     sync.Mutex
	byName map[string]map[*watch]struct{}
}

func newWaiting() *waiting { return &waiting{byName: map[string]map[*watch]struct{}{}} }

func (g *waiting) add(w *watch) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for name := range w.names {
		ws := g.byName[name]
		if ws == nil {
			ws = map[*watch]struct{}{}
			g.byName[name] = ws
		}
		ws[w] = struct{}{}
	}
}

func (g *waiting) remove(w *watch) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for name := range w.names {
		ws := g.byName[name]
		delete(ws, w)
		if len(ws) == 0 {
			delete(g.byName, name)
		}
	}
}

// of returns who waits for one of the names, each once.
func (g *waiting) of(names []string) []*watch {
	if len(names) == 0 {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(names) == 1 {
		return slices.Collect(maps.Keys(g.byName[names[0]]))
	}
	all := map[*watch]struct{}{}
	for _, n := range names {
		maps.Copy(all, g.byName[n])
	}
	return slices.Collect(maps.Keys(all))
}

// names are all that somebody waits for.
func (g *waiting) names() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.byName))
}
