package proxy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

const (
	// maxCopies is how many mirrored requests a proxy has under way. What is beyond
	// is not mirrored, and counted.
	maxCopies = 128
	// copyTimeout bounds a mirrored request, for nobody waits for it.
	copyTimeout = 15 * time.Second
)

// mirror sends copies of a request that has been answered where its route says
// so (Gateway API, HTTPRequestMirrorFilter). Only a request whose body was kept
// whole, 64 KiB at most, can be copied; others are counted as not mirrored.
func (x *exchange) mirror() {
	if x.cluster == nil || x.attempts == 0 || x.req.Upgrade {
		return // it went nowhere, or it is a conversation
	}
	p := x.Proxy // the exchange is another's by the time that a copy ends
	for i := range x.route.Mirrors {
		m := &x.route.Mirrors[i]
		if m.Numerator < m.Denominator && rand.Uint32N(m.Denominator) >= m.Numerator {
			continue
		}
		whole := x.bodyDone && x.replayable
		if !whole || p.copies.Add(1) > maxCopies {
			if whole {
				p.copies.Add(-1)
			}
			x.Metrics.Rejected(m.Cluster, x.route.Name, "mirror", false)
			continue
		}
		c := x.copyFor(m.Cluster)
		if !x.Conns.Go(func() {
			defer p.copies.Add(-1)
			c.run()
		}) {
			p.copies.Add(-1)
		}
	}
}

// copied is the exchange of a copy, and its caller: it has the body at hand and
// reads no answer.
type copied struct {
	exchange
	body []byte
}

// copyFor makes a copy that shares no memory with x.
func (x *exchange) copyFor(cluster string) *copied {
	c := &copied{body: bytes.Clone(x.replay)}
	c.path = &path{
		Proxy: x.Proxy, outbound: true, layers: mirrorLayers(), table: x.path.table, key: cluster,
		series: x.Metrics.Destination(true, cluster), http2: x.http2,
	}
	c.ctx, c.down, c.caller = context.WithoutCancel(x.ctx), c, x.caller
	c.begin()
	c.deadline = c.start.Add(copyTimeout)
	c.table, c.trace = x.table, x.trace
	c.dest = &table.Destination{Key: cluster, Protocol: protocolHTTP}
	c.route = &route.Route{Name: x.route.Name + " (mirror)", Clusters: []route.Weighted{{Cluster: cluster, Weight: 1}}, Retry: retry.Policy{}}
	c.backend = &c.route.Clusters[0]
	c.bodyDone = len(c.body) == 0
	c.req = x.req
	c.req.Expect100 = false // the body is here
	c.req.Method, c.req.Target, c.req.Host = bytes.Clone(x.req.Method), bytes.Clone(x.req.Target), bytes.Clone(x.req.Host)
	c.req.Headers = slices.Clone(x.req.Headers)
	for i := range c.req.Headers {
		h := &c.req.Headers[i]
		h.Name, h.Value = bytes.Clone(h.Name), bytes.Clone(h.Value)
	}
	c.urlPath = bytes.Clone(x.urlPath)
	c.edit = http1.Edit{Target: bytes.Clone(x.edit.Target), Remove: slices.Clone(x.edit.Remove)}
	for _, p := range x.edit.Set {
		if p.Name != "x-outrigger-attempt" {
			c.edit.Set = append(c.edit.Set, http1.Pair{Name: p.Name, Value: bytes.Clone(p.Value)})
		}
	}
	for _, p := range x.edit.Add {
		c.edit.Add = append(c.edit.Add, http1.Pair{Name: p.Name, Value: bytes.Clone(p.Value)})
	}
	return c
}

// mirrorLayers is the path of a copy: no policy of the route is applied twice,
// and nothing is tried again.
func mirrorLayers() []layer {
	return []layer{
		{"cluster", "the mirror's", (*exchange).findCluster},
		{"requests", "the limit on requests in flight; not mirrored beyond it", (*exchange).limitRequests},
		{"attempts", "one attempt, whose answer is thrown away", (*exchange).attemptAll},
	}
}

func (c *copied) readBody(bool) ([]byte, bool, error) {
	b := c.body
	c.body = nil
	return b, true, nil
}
func (c *copied) bodyTrailers() []http1.Header                   { return nil }
func (c *copied) interruptBody()                                 {}
func (c *copied) resumeBody()                                    {}
func (c *copied) gone() bool                                     { return false }
func (c *copied) interim(*http1.Head) error                      { return nil }
func (c *copied) writeHead(*http1.Head, *http1.Edit, bool) error { return nil }
func (c *copied) writeBody([]byte, bool) error                   { return nil }
func (c *copied) writeTrailers([]http1.Header) error             { return nil }
func (c *copied) flush() error                                   { return nil }
func (c *copied) cut()                                           {}
