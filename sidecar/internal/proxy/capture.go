package proxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
)

// Limits and timeouts of capture.
const (
	// maxCaptured bounds the captured destinations that the control plane is asked
	// about at a time, below xdsclient.MaxWanted.
	maxCaptured = 1000
	// maxApplications bounds the ports of the application that are remembered, beside
	// those that the control plane names: a stranger may try them all.
	maxApplications = 256
	// answerTimeout is how long the first connection to an address waits for the
	// control plane to say what is behind it.
	answerTimeout = 2 * time.Second
	// silentFor is how long nobody waits again at an address of which it has said
	// nothing.
	silentFor = 30 * time.Second
	// captureIdle is after how long without a connection an address is given up.
	captureIdle = 10 * time.Minute
	// captureSweep is how often that is looked at.
	captureSweep = time.Minute
	// checkEvery is how often redirection is tried until it works, and checkTimeout
	// how long each try may take.
	checkEvery   = 5 * time.Second
	checkTimeout = 2 * time.Second
)

// sourceIPv4 and sourceIPv6 are where connections to the application come from, so
// that the rules of netinit know them and leave them alone.
var (
	sourceIPv4 = netip.MustParseAddr("127.0.0.6")
	sourceIPv6 = netip.MustParseAddr("::6")
)

// SourceFor is the address from which the proxy of a captured pod calls the
// application at an address of the pod.
func SourceFor(to netip.Addr) netip.Addr {
	if to.Unmap().Is4() {
		return sourceIPv4
	}
	return sourceIPv6
}

// Destinations is who is asked about captured addresses: the answer comes in the
// Table, under the same key.
type Destinations interface {
	Want(keys ...string) error
	Forget(keys ...string)
}

// Capture serves the traffic of a pod that is redirected to it: what the
// application sends, to the service that has the address or, where none has it, to
// the address itself; and what others send to the application, as the control
// plane says that they may. Make it with NewCapture.
type Capture struct {
	*Proxy
	metrics            *telemetry.Capture
	strict, permissive *Mutual // nil without an identity
	outward, inward    []layer
	http2              *http2.Config
	application        *telemetry.Destination
	outside            *telemetry.Destination
	called, served     places

	outPort, inPort uint16
	redirected      atomic.Pointer[string] // why it is not known to work; nil when it does
	probes          chan netip.AddrPort    // clients that came where only check goes

	mu    sync.Mutex
	clear map[*listener.Conn]func() // callers in clear, and how to end them
	ways  map[netip.AddrPort]bool   // our ends of connections that pass through
}

// NewCapture makes a Capture of a Proxy, whose Mutual is what strict and
// permissive callers are asked for. m must be from NewCapture of telemetry.
func NewCapture(p *Proxy, wanted Destinations, m func(destinations func() int) *telemetry.Capture) *Capture {
	cp := &Capture{
		Proxy: p, outward: outboundLayers(), inward: inboundLayers(), http2: HTTP2("downstream", p.Metrics),
		application: p.Metrics.Destination(false, p.Node.Namespace+"/"+p.Node.Workload+":0"),
		outside:     p.Metrics.Destination(true, "passthrough/passthrough:0"),
		probes:      make(chan netip.AddrPort, 8),
		clear:       map[*listener.Conn]func(){},
		ways:        map[netip.AddrPort]bool{},
	}
	if p.Mutual != nil {
		strict, permissive := *p.Mutual, *p.Mutual
		strict.Strict, permissive.Strict = true, false
		cp.strict, cp.permissive = &strict, &permissive
	}
	cp.called = places{
		max:   maxCaptured,
		open:  func(pl *place) error { return wanted.Want(pl.key) },
		close: func(pl *place) { wanted.Forget(pl.key) },
	}
	cp.served = places{max: maxApplications, open: cp.openApplication, close: func(pl *place) { p.Clusters.Unpin(applicationCluster(pl.to)) }}
	cp.metrics = m(cp.called.len)
	cp.notRedirected("the redirection of the pod's traffic has not been tried yet")
	return cp
}

// Restore takes addresses over that an earlier run had captured, so that they are
// wanted before they are used, and given up where they are not.
func (cp *Capture) Restore(keys []string) {
	now := time.Now()
	for _, key := range keys {
		if to, err := netip.ParseAddrPort(key); err == nil {
			if pl := cp.called.take(to, false, now); pl != nil {
				cp.called.leave(pl, now)
			}
		}
	}
}

// Captured is what the application calls, by address.
func (cp *Capture) Captured() []CapturedDestination { return cp.called.list() }

// Redirected says why the pod's traffic is not known to be redirected here; nil
// when it is.
func (cp *Capture) Redirected() error {
	if why := cp.redirected.Load(); why != nil {
		return errors.New(*why)
	}
	return nil
}

func (cp *Capture) notRedirected(why string) { cp.redirected.Store(&why) }

// Serve serves the listeners to which netinit redirects, until ctx ends. All that
// it started but connections, which are the group's, has ended when it returns.
func (cp *Capture) Serve(ctx context.Context, outbound, inbound *net.TCPListener) error {
	cp.outPort, cp.inPort = portOf(outbound), portOf(inbound)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { cp.sweep(ctx) })
	wg.Go(func() { cp.watch(ctx) })
	wg.Go(func() { cp.check(ctx) })
	var failed error
	wg.Go(func() {
		failed = cp.Conns.Serve(ctx, outbound, func(c *listener.Conn) { cp.serveOutbound(ctx, c) })
		cancel()
	})
	err := cp.Conns.Serve(ctx, inbound, func(c *listener.Conn) { cp.serveInbound(ctx, c) })
	cancel()
	wg.Wait()
	if errors.Is(err, context.Canceled) {
		err = failed
	}
	return err
}

func portOf(l *net.TCPListener) uint16 {
	a, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0
	}
	return a.AddrPort().Port()
}

// ours reports whether an address is one of the pod's own.
func (cp *Capture) ours(a netip.Addr) bool { return slices.Contains(cp.Node.Addresses, a) }

// loops reports whether a connection would come back to us.
func (cp *Capture) loops(c *listener.Conn, to netip.AddrPort) bool {
	if to == c.Local() {
		return true // nobody redirected it
	}
	here := cp.ours(to.Addr()) || to.Addr().IsLoopback() || to.Addr() == c.Local().Addr()
	return here && (to.Port() == cp.outPort || to.Port() == cp.inPort)
}

// serveOutbound serves a connection of the application.
func (cp *Capture) serveOutbound(ctx context.Context, c *listener.Conn) {
	to, err := c.OriginalDestination()
	switch {
	case err != nil:
		cp.refuse(c, true, c.Local(), "not_redirected", err.Error())
		return
	case cp.loops(c, to), cp.isOwn(c.Remote()):
		cp.refuse(c, true, to, "loop", loop)
		return
	}
	pl := cp.called.take(to, false, time.Now())
	if pl == nil {
		cp.passthrough(ctx, c, to, "limit")
		return
	}
	d, reason := cp.ask(ctx, pl)
	if reason != "" {
		// It is not needed any more: what lasts for days must not keep a place.
		cp.called.leave(pl, time.Now())
		if cp.isOwn(c.Remote()) { // the connection may have been quicker than who made it
			cp.refuse(c, true, to, "loop", loop)
			return
		}
		cp.passthrough(ctx, c, to, reason)
		return
	}
	defer func() { cp.called.leave(pl, time.Now()) }()
	way := cp.wayTo(pl, d)
	way.serve(ctx, c, nil, way.outboundTarget)
}

const loop = "the connection leads back to the proxy: call the application's own port, and run the proxy as the user that netinit was told"

// ask is what the control plane says of a captured address, waited for where it
// is new. The reason is not empty where it is none of the mesh's.
func (cp *Capture) ask(ctx context.Context, pl *place) (d *table.Destination, reason string) {
	var timeout <-chan time.Time
	for {
		changed := cp.Table.Changed()
		if d = cp.Table.Load().Destinations[pl.key]; d != nil {
			cp.called.isForeign(pl, d.Missing)
			if d.Missing {
				return nil, "no_service"
			}
			return d, ""
		}
		if timeout == nil {
			if time.Now().Before(cp.called.silentUntil(pl)) {
				return nil, "no_answer"
			}
			t := time.NewTimer(answerTimeout)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-timeout:
			cp.called.isSilent(pl, time.Now().Add(silentFor))
			return nil, "no_answer"
		case <-ctx.Done():
			return nil, "no_answer"
		}
	}
}

// wayTo is the path to a service. A captured address may get another service.
func (cp *Capture) wayTo(pl *place, d *table.Destination) *path {
	if way := pl.way.Load(); way != nil && way.key == d.Service {
		return way
	}
	way := &path{
		Proxy: cp.Proxy, outbound: true, layers: cp.outward, table: cp.Table, asked: pl.key, key: d.Service, pin: pl.to,
		series: cp.Metrics.Destination(true, d.Service), http2: cp.http2,
	}
	pl.way.Store(way)
	return way
}

// serveInbound serves a connection to the application.
func (cp *Capture) serveInbound(ctx context.Context, c *listener.Conn) {
	to, err := c.OriginalDestination()
	switch {
	case err != nil:
		cp.refuse(c, false, c.Local(), "not_redirected", err.Error())
		return
	case cp.ours(to.Addr()) && to.Port() == cp.outPort && cp.ours(c.Remote().Addr()):
		select {
		case cp.probes <- c.Remote():
		default:
		}
		return
	case cp.loops(c, to):
		cp.refuse(c, false, to, "not_redirected", "the connection was made to the proxy itself: call a port of the application")
		return
	case !cp.ours(to.Addr()):
		cp.refuse(c, false, to, "not_ours", "the pod has no such address: it has "+fmt.Sprint(cp.Node.Addresses))
		return
	}
	in := cp.Table.Load().Inbound
	if in == nil {
		cp.refuse(c, false, to, "not_configured", notConfigured(cp.Node))
		return
	}
	var mutual *Mutual
	switch in.MTLS {
	case bootstrap.MTLSStrict:
		if mutual = cp.strict; mutual == nil {
			cp.refuse(c, false, to, "no_identity", "mutual TLS is asked for and this sidecar has no certificate: give it a join token and the control plane's roots")
			return
		}
	case bootstrap.MTLSPermissive:
		mutual = cp.permissive
	}
	_, named := in.Ports[to.Port()]
	pl := cp.served.take(to, named, time.Now())
	if pl == nil {
		cp.refuse(c, false, to, "limit", "connections to "+strconv.Itoa(maxApplications)+" ports of the application are open already")
		return
	}
	defer func() { cp.served.leave(pl, time.Now()) }()
	way := pl.way.Load()
	way.serve(ctx, c, mutual, func() target { return target{protocol: in.Port(to.Port()).Protocol, cluster: way.app.cluster} })
}

func notConfigured(n bootstrap.Config) string {
	return "the control plane has not said what is asked of those who call " + n.InboundName() + ", or knows no such pod"
}

func applicationCluster(to netip.AddrPort) string { return "inbound/" + to.String() }

// openApplication makes the path to a port of the application.
func (cp *Capture) openApplication(pl *place) error {
	app := newApplication(applicationCluster(pl.to), balance.Endpoint{
		Address: pl.to, Instance: cp.Node.Instance, Workload: cp.Node.Workload, Healthy: true, Weight: 1,
	}, SourceFor(pl.to.Addr()))
	cp.Clusters.Pin(app.cluster)
	pl.way.Store(&path{
		Proxy: cp.Proxy, layers: cp.inward, table: cp.Table, key: cp.Node.Namespace + "/" + cp.Node.Workload + ":" + strconv.Itoa(int(pl.to.Port())),
		app: app, capture: cp, port: pl.to.Port(), series: cp.application, http2: cp.http2,
	})
	return nil
}

// refuse closes a connection that is not served.
func (cp *Capture) refuse(c *listener.Conn, outbound bool, to netip.AddrPort, reason, why string) {
	p := path{outbound: outbound}
	cp.metrics.Refused(p.direction(), reason)
	cp.Log.Write(&accesslog.Entry{
		Start: time.Now(), Direction: p.direction(), Protocol: "tcp", Destination: to.String(), Source: c.Remote().String(),
		Flags: accesslog.NR, Detail: reason + ": " + why, Config: cp.Table.Load().Version,
	})
	c.Abort()
}

// enter takes note of a caller in clear, until leave. It is not ok where callers in
// clear are not served any more.
func (cp *Capture) enter(c *listener.Conn) (leave func(), ok bool) {
	cp.mu.Lock()
	cp.clear[c] = c.End
	cp.mu.Unlock()
	leave = func() {
		cp.mu.Lock()
		delete(cp.clear, c)
		cp.mu.Unlock()
	}
	// Either this sees a change, or watch sees the caller.
	in := cp.Table.Load().Inbound
	return leave, in != nil && in.MTLS != bootstrap.MTLSStrict
}

// lasts says of a caller in clear that it will make no further request: ending its
// connection means to cut it.
func (cp *Capture) lasts(c *listener.Conn) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.clear[c] != nil {
		cp.clear[c] = c.Abort
	}
}

// watch ends the connections in clear when mutual TLS becomes strict.
func (cp *Capture) watch(ctx context.Context) {
	for {
		changed := cp.Table.Changed()
		if in := cp.Table.Load().Inbound; in != nil && in.MTLS == bootstrap.MTLSStrict {
			cp.mu.Lock()
			for c, end := range cp.clear {
				cp.metrics.Refused("inbound", "became_strict")
				end()
				delete(cp.clear, c)
			}
			cp.mu.Unlock()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (cp *Capture) sweep(ctx context.Context) {
	tick := time.NewTicker(captureSweep)
	defer tick.Stop()
	for {
		select {
		case now := <-tick.C:
			cp.called.sweep(now.Add(-captureIdle))
			cp.served.sweep(now.Add(-captureIdle))
		case <-ctx.Done():
			return
		}
	}
}

// check finds out whether the pod's traffic is redirected, until it is: what this
// process sends to an address of the pod comes in at the inbound listener, by the
// rule for a call to the pod's own Service. That outbound traffic of others is
// redirected cannot be seen from here; netinit has looked at it.
func (cp *Capture) check(ctx context.Context) {
	for ctx.Err() == nil {
		err := error(nil)
		for _, a := range cp.Node.Addresses {
			err = errors.Join(err, cp.checkOne(ctx, netip.AddrPortFrom(a, cp.outPort)))
		}
		if err == nil {
			cp.redirected.Store(nil)
			return
		}
		cp.notRedirected(err.Error())
		select {
		case <-time.After(checkEvery + rand.N(time.Second)):
		case <-ctx.Done():
		}
	}
}

func (cp *Capture) checkOne(ctx context.Context, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	// Binding is enough to see that the address is there.
	var binder net.ListenConfig
	source, err := binder.ListenPacket(ctx, "udp", netip.AddrPortFrom(SourceFor(to.Addr()), 0).String())
	if err != nil {
		return fmt.Errorf("the address from which the application is called is not there: %w: has netinit run, which adds it to lo?", err)
	}
	_ = source.Close()
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return fmt.Errorf("a connection to this pod's address %s was not redirected to the proxy: %w: has netinit run, and does the proxy run as the user that it was told?", to.Addr(), err)
	}
	defer func() { _ = c.Close() }()
	us, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return err
	}
	for {
		select {
		case who := <-cp.probes:
			if who == us {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("a connection to this pod's address %s did not come in at port %d: has netinit run, and does the proxy run as the user that it was told?", to.Addr(), cp.inPort)
		}
	}
}
