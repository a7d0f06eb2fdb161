package proxy

import (
	"context"
	"net"
	"strconv"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// inboundLayers is the path of a request from another workload to the
// application: no policy of the service is applied twice.
func inboundLayers() []layer {
	return []layer{
		{"trace", "joins or begins the trace first, so that every answer carries it", (*exchange).beginTrace},
		{"overload", "sheds with OM before memory runs out", (*exchange).shed},
		{"normalise", "the application sees the path that was matched", (*exchange).normalise},
		{"provenance", "who the caller is, only mutual TLS says", (*exchange).prove},
		{"authorise", "who may, by identity, method and path; 403 where it may not", (*exchange).authorize},
		{"application", "the only destination of an inbound port", (*exchange).findApplication},
		{"attempts", "one attempt: connection -> forward -> classify", (*exchange).attemptAll},
	}
}

// ServeInbound serves a port at which other workloads reach the application,
// until ctx ends.
func (p *Proxy) ServeInbound(ctx context.Context, l *net.TCPListener, in bootstrap.Inbound) error {
	// The application is a cluster of one endpoint without policies, so that
	// both directions share one engine.
	key := p.Node.Namespace + "/" + p.Node.Workload + ":" + strconv.Itoa(int(in.Forward.Port()))
	cluster := &table.Cluster{Name: "inbound/" + in.Listen.String(), Endpoints: []balance.Endpoint{
		{Address: in.Forward, Instance: p.Node.Instance, Workload: p.Node.Workload, Healthy: true, Weight: 1},
	}}
	var fixed table.Current
	fixed.Store(&table.Table{
		Destinations: map[string]*table.Destination{key: {
			Key: key, Protocol: in.Protocol, Cluster: cluster.Name,
			Routes: &route.Config{Name: key, Routes: []route.Route{{Name: "application", Clusters: []route.Weighted{{Cluster: cluster.Name, Weight: 1}}}}},
		}},
		Clusters: map[string]*table.Cluster{cluster.Name: cluster},
	})
	p.Clusters.Pin(cluster.Name)
	way := &path{Proxy: p, layers: inboundLayers(), table: &fixed, key: key, mutual: p.Mutual, series: p.Metrics.Destination(false, key), http2: HTTP2("downstream", p.Metrics)}
	to := target{protocol: in.Protocol, cluster: cluster.Name}
	return p.Conns.Serve(ctx, l, func(c *listener.Conn) { way.serve(ctx, c, func() target { return to }) })
}
