package proxy

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
)

const (
	// passthroughConnect is how long connecting to an original destination may take.
	passthroughConnect = 10 * time.Second
	// passthroughIdle ends a connection that carries nothing. It is long, for what is
	// outside of the mesh is none of ours; keep-alives find peers that are gone.
	passthroughIdle = 24 * time.Hour
	// routePassthrough is the route in the log of such a connection.
	routePassthrough = "passthrough"
)

// whyPassthrough is what the log says beside the reason: nothing where all is in
// order.
var whyPassthrough = map[string]string{
	"no_service": "",
	"no_answer":  "no_answer: the control plane has not said within " + answerTimeout.String() + " what is behind the address: is it reachable?",
	"limit":      "limit: connections to as many destinations as one proxy may have are open",
}

// passthrough carries the bytes of a captured connection to where its client
// wanted to go.
func (cp *Capture) passthrough(ctx context.Context, c *listener.Conn, to netip.AddrPort, reason string) {
	e := accesslog.Entry{
		Start: time.Now(), Direction: "outbound", Protocol: "tcp", Destination: to.String(), Upstream: to.String(), Source: c.Remote().String(),
		Route: routePassthrough, Detail: whyPassthrough[reason], Config: cp.Table.Load().Version, Attempts: 1,
	}
	cp.metrics.Passthrough(reason)
	cp.outside.TCPOpened()
	defer func() {
		e.Duration = time.Since(e.Start)
		cp.outside.TCPClosed(e.BytesIn, e.BytesOut)
		cp.Log.Write(&e)
	}()
	down := c.TCP()
	resetOnClose(down, true)
	dialer := net.Dialer{Timeout: passthroughConnect, KeepAlive: 30 * time.Second}
	up, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		e.Flags, e.Detail = accesslog.UF, "cannot connect to "+to.String()+": "+err.Error()
		return
	}
	defer func() { _ = up.Close() }()
	defer cp.own(up)()
	_ = down.SetDeadline(time.Time{})
	w := tunnelling{down: down, up: up, idle: passthroughIdle}
	w.run()
	e.BytesIn, e.BytesOut = w.in, w.out
	if e.Flags = w.flags; w.detail != "" {
		e.Detail = w.detail
	}
}

// own remembers our end of a connection while it lasts: rules that redirect even
// our own connections would have us pass them through for ever.
func (cp *Capture) own(c net.Conn) (forget func()) {
	a, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return func() {}
	}
	cp.mu.Lock()
	cp.ways[a] = true
	cp.mu.Unlock()
	return func() {
		cp.mu.Lock()
		delete(cp.ways, a)
		cp.mu.Unlock()
	}
}

func (cp *Capture) isOwn(client netip.AddrPort) bool {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	return cp.ways[client]
}
