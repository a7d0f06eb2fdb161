package proxy

import (
	"context"
	"math/rand/v2"
	"net"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// outboundLayers is the path of a request from the application to a service.
func outboundLayers() []layer {
	return []layer{
		{"trace", "joins or begins the trace first, so that every answer carries it", (*exchange).beginTrace},
		{"overload", "sheds with OM before memory runs out", (*exchange).shed},
		{"normalise", "one form of the path is matched, counted and forwarded", (*exchange).normalise},
		{"destination", "what the control plane says of the service; NC where it has none", (*exchange).findDestination},
		{"route", "the first match wins; NR where none does", (*exchange).findRoute},
		{"redirect", "a route that leads elsewhere answers by itself", (*exchange).redirect},
		{"cluster", "draws the backend by weight", (*exchange).findCluster},
		{"rewrite", "path, host and header fields as the route and the backend say", (*exchange).rewrite},
		{"requests", "the limit on requests in flight; UO beyond it", (*exchange).limitRequests},
		// { for each attempt:
		{"attempts", "breaker -> retry budget -> balance -> connection -> forward -> classify, again while the retry policy says so", (*exchange).attemptAll},
		// }
	}
}

// ServeOutbound serves an ambassador port for the destination key until ctx
// ends. What it speaks is what the control plane says: it is asked for each
// connection.
func (p *Proxy) ServeOutbound(ctx context.Context, l *net.TCPListener, key string) error {
	way := &path{Proxy: p, outbound: true, layers: outboundLayers(), table: p.Table, asked: key, key: key, series: p.Metrics.Destination(true, key), http2: HTTP2("downstream", p.Metrics)}
	return p.Conns.Serve(ctx, l, func(c *listener.Conn) { way.serve(ctx, c, nil, way.outboundTarget) })
}

// pick chooses the endpoint of an attempt. An application that has called one by its
// address, as it does with headless Services, gets that one.
func (p *path) pick(c *upstream.Cluster, tried []*upstream.Endpoint) *upstream.Endpoint {
	if p.pin.IsValid() {
		if e := c.At(p.pin); e != nil {
			return e
		}
	}
	return c.Pick(tried)
}

// outboundTarget is where a connection of an ambassador port goes.
func (p *path) outboundTarget() target {
	d := p.table.Load().Destinations[p.asked]
	if d == nil || d.Missing {
		return target{protocol: protocolHTTP} // which can say so
	}
	t := target{protocol: d.Protocol, cluster: d.Cluster}
	if d.Protocol == protocolTLS && len(d.ServerNames) > 0 {
		t.byServerName = func(name string) (string, bool) { return d.ByServerName(name, rand.Uint64()) }
	}
	return t
}
