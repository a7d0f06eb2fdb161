// Package proxy is the request path of the sidecar.
//
// outbound.go and inbound.go hold the path as one list each: a layer a line,
// with its reason. The layers are methods of exchange, one request and its
// response; they ask the pure packages (route, balance, breaker, retry) for
// decisions and carry them out on connections that upstream lends. The proxy
// knows HTTP through http1 only, and nothing of xDS.
//
// What is redirected here has neither list of its own nor one destination:
// capture.go finds out for each connection where it was going, takes one of the
// two paths for what the mesh knows, and has passthrough.go carry the rest.
//
// Every connection has one goroutine, owned by listener.Group. While a request
// body that did not come at once is sent on, it has a second one, which the
// first waits for.
package proxy

import (
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/overload"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// Limits and timeouts of the path.
const (
	// headTimeout is how long a client may take for a request's head once it
	// has begun (slowloris).
	headTimeout = 10 * time.Second
	// idleTimeout closes a connection on which no request comes.
	idleTimeout = time.Hour
	// writeTimeout is how long one write to the client may take (slow read).
	writeTimeout = 60 * time.Second
	// bodyTimeout is how long a client may be silent in the middle of a body.
	bodyTimeout = 60 * time.Second
	// halfCloseGrace is how long a client that has closed its direction, and perhaps
	// left, is still answered.
	halfCloseGrace = 5 * time.Second
	// maxReplay is how much of a request's body is kept for another attempt. A
	// request with more is not retried once some of it has been sent.
	maxReplay = 64 << 10
	// maxAttempts bounds attempts whatever a policy says.
	maxAttempts = 11
	// maxUnprocessed bounds the attempts that follow one which an HTTP/2 server said
	// it had not looked at.
	maxUnprocessed = 3
	// tcpIdleTimeout ends a relayed connection that carries nothing.
	tcpIdleTimeout = time.Hour
	// tcpIdleCheck is how often a silent direction looks whether the other one
	// is silent too.
	tcpIdleCheck = time.Minute
)

var limits = http1.Limits{}

// Proxy is what the paths of all listeners share. Its fields are set once,
// before any of the Serve functions is called.
type Proxy struct {
	Node     bootstrap.Config
	Table    *table.Current
	Clusters *upstream.Clusters
	Conns    *listener.Group
	Log      *accesslog.Log
	Metrics  *telemetry.Metrics
	Spans    *telemetry.Spans // nil: none are exported
	Mutual   *Mutual          // nil: callers are taken in clear
	Seen     *detect.Memory
	Overload *overload.Monitor // nil: nothing is shed

	copies atomic.Int32 // mirrored requests under way
}

// layer is one step of a path. It returns false when the request has been
// answered and the rest of the path is not for it.
type layer struct {
	Name, Reason string
	do           func(*exchange) bool
}

// path is one direction through the proxy.
type path struct {
	*Proxy
	outbound bool
	layers   []layer
	// table is what the control plane says.
	table *table.Current
	// key is what logs and metrics call the destination.
	key    string
	series *telemetry.Destination
	http2  *http2.Config

	// asked is the destination's name in the table, and pin the address that the
	// application called, where it was captured: of an outbound path.
	asked string
	pin   netip.AddrPort

	// app is where an inbound path leads, and port its port where capture, which says
	// what is asked of callers, is not nil.
	app     *application
	capture *Capture
	port    uint16
}

// HTTP2 bounds HTTP/2 connections on a side, downstream or upstream, and counts
// what is refused on them.
func HTTP2(side string, m *telemetry.Metrics) *http2.Config {
	return &http2.Config{OnProtocolError: func(reason string) { m.ProtocolError(side, reason) }}
}

func (p *path) direction() string {
	if p.outbound {
		return "outbound"
	}
	return "inbound"
}

// Layers describes both paths for people: the lists of outbound.go and
// inbound.go.
func Layers() map[string][]string {
	out := map[string][]string{}
	for name, list := range map[string][]layer{"outbound": outboundLayers(), "inbound": inboundLayers()} {
		for _, l := range list {
			out[name] = append(out[name], l.Name+": "+l.Reason)
		}
	}
	return out
}

func draw() float64 { return rand.Float64() }
