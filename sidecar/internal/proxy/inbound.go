package proxy

import (
	"context"
	"net"
	"net/netip"
	"strconv"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
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
		{"admission", "what is asked of callers may have changed since the connection began", (*exchange).admit},
		{"provenance", "who the caller is, only mutual TLS says", (*exchange).prove},
		{"authorise", "who may, by identity, method and path; 403 where it may not", (*exchange).authorize},
		{"application", "the only destination of an inbound port", (*exchange).findApplication},
		{"attempts", "one attempt: connection -> forward -> classify", (*exchange).attemptAll},
	}
}

// application is a cluster of one endpoint without policies, so that both
// directions share one engine.
type application struct {
	table   *table.Table
	cluster string
	route   route.Route
}

func newApplication(cluster string, at balance.Endpoint, source netip.Addr) *application {
	c := &table.Cluster{Name: cluster, Endpoints: []balance.Endpoint{at}, Source: source}
	return &application{
		table:   &table.Table{Clusters: map[string]*table.Cluster{cluster: c}},
		cluster: cluster,
		route:   route.Route{Name: "application", Clusters: []route.Weighted{{Cluster: cluster, Weight: 1}}},
	}
}

// ServeInbound serves a port at which other workloads reach the application,
// until ctx ends.
func (p *Proxy) ServeInbound(ctx context.Context, l *net.TCPListener, in bootstrap.Inbound) error {
	app := newApplication("inbound/"+in.Listen.String(), balance.Endpoint{
		Address: in.Forward, Instance: p.Node.Instance, Workload: p.Node.Workload, Healthy: true, Weight: 1,
	}, netip.Addr{})
	p.Clusters.Pin(app.cluster)
	key := p.Node.Namespace + "/" + p.Node.Workload + ":" + strconv.Itoa(int(in.Forward.Port()))
	var fixed table.Current // it does not change with what the control plane says
	fixed.Store(app.table)
	way := &path{Proxy: p, layers: inboundLayers(), table: &fixed, key: key, app: app, series: p.Metrics.Destination(false, key), http2: HTTP2("downstream", p.Metrics)}
	to := target{protocol: in.Protocol, cluster: app.cluster}
	return p.Conns.Serve(ctx, l, func(c *listener.Conn) { way.serve(ctx, c, p.Mutual, func() target { return to }) })
}

// admit answers callers in clear that came before mutual TLS was asked for, and
// every one while it is not known what is asked.
func (x *exchange) admit() bool {
	if x.capture == nil {
		return true
	}
	x.table = x.path.table.Load()
	switch in := x.table.Inbound; {
	case in == nil:
		x.mustClose = true
		x.flags |= accesslog.NC
		return x.reply(503, notConfigured(x.Node))
	case in.MTLS == bootstrap.MTLSStrict && x.identity == "":
		x.mustClose = true
		x.flags |= accesslog.DPE
		x.Metrics.ProtocolError("downstream", "plaintext_refused")
		return x.reply(403, plaintextRefused)
	}
	return true
}
