package proxy

import (
	"context"
	"net"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
)

// outboundLayers is the path of a request from the application to a service.
func outboundLayers() []layer {
	return []layer{
		{"trace", "joins or begins the trace first, so that every answer carries it", (*exchange).beginTrace},
		{"normalise", "one form of the path is matched, counted and forwarded", (*exchange).normalise},
		{"destination", "what the control plane says of the service; NC where it has none", (*exchange).findDestination},
		{"route", "the first match wins; NR where none does", (*exchange).findRoute},
		{"cluster", "draws the backend by weight", (*exchange).findCluster},
		{"requests", "the limit on requests in flight; UO beyond it", (*exchange).limitRequests},
		// { for each attempt:
		{"attempts", "breaker -> retry budget -> balance -> connection -> forward -> classify, again while the retry policy says so", (*exchange).attemptAll},
		// }
	}
}

// ServeOutbound serves an ambassador port for the destination key until ctx
// ends. The protocol is the one that the control plane gives: it is asked for
// each connection.
func (p *Proxy) ServeOutbound(ctx context.Context, l *net.TCPListener, key string) error {
	way := &path{Proxy: p, outbound: true, layers: outboundLayers(), table: p.Table, key: key}
	return p.Conns.Serve(ctx, l, func(c *listener.Conn) {
		if d := p.Table.Load().Destinations[key]; d != nil && d.Protocol == "tcp" {
			way.relay(ctx, c, d.Cluster)
			return
		}
		way.serveHTTP1(ctx, c, caller{source: c.RemoteAddr().String()})
	})
}
