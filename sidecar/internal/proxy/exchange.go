package proxy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// exchange is one request and its response: what both versions of HTTP have in
// common. It is part of the downstream that it belongs to and used again with
// it; nothing in it is shared between connections.
type exchange struct {
	*path
	caller
	ctx  context.Context //nolint:containedctx // the life of the listener; an exchange has no other
	down downstream

	req   http1.Head
	edit  http1.Edit
	pairs [5]http1.Pair

	start, ended time.Time
	deadline     time.Time // of the request with all attempts; zero is none
	trace        telemetry.TraceContext
	parent       [55]byte  // traceparent as written
	attempt      [2]byte   // x-outrigger-attempt as written
	pathBuf      [256]byte // of a path that was not normal; a longer one is allocated
	targetBuf    []byte
	urlPath      []byte
	query        []byte
	lookups      []byte // joined header values, for routes

	table   *table.Table
	dest    *table.Destination
	route   *route.Route
	backend *route.Weighted // of the route
	cluster *upstream.Cluster
	held    bool // a request of the cluster's limit
	tried   []*upstream.Endpoint
	fwd     forwarding // the attempt being made

	replay     []byte // what was read of the request's body
	replayable bool   // replay is all of it so far
	bodyDone   bool   // the whole body has been read
	pumped     int64  // bytes of the body that a pump sent beyond replay

	grpc       bool // the request is a gRPC call
	grpcStatus int  // retry.NoGRPC until known
	status     int
	flags      accesslog.Flags
	upstream   string
	rejected   string // policy that rejected, or would have
	denied     string // authorization policy that denied
	observed   string // what one in Observe mode would have denied it for
	detail     string
	attempts   int
	bytesOut   int64
	answered   bool // the head of the response is on its way to the client
	mustClose  bool // an HTTP/1.1 connection cannot serve another request
}

// caller is who is at the other end of a connection.
type caller struct {
	source   string // address
	identity string // SPIFFE ID that mutual TLS has proved; empty in clear
	account  string // its <namespace>/<service account>, for metrics
	proof    []byte // what the application is told of it
}

// protocol of the request, for metrics.
func (x *exchange) protocol() telemetry.Protocol {
	if x.grpc {
		return telemetry.GRPC
	}
	if _, ok := x.down.(*h2Down); ok {
		return telemetry.HTTP2
	}
	return telemetry.HTTP1
}

// logged are the names of protocols in the access log.
var logged = [...]string{telemetry.HTTP1: "http", telemetry.HTTP2: "http2", telemetry.GRPC: "grpc"}

// begin prepares for a request whose first bytes are here.
func (x *exchange) begin() {
	x.start = time.Now()
	x.deadline = time.Time{}
	x.req.Reset()
	x.edit = http1.Edit{}
	x.bodyDone, x.replayable, x.pumped = true, true, 0
	x.grpc, x.grpcStatus = false, retry.NoGRPC
	x.status, x.flags, x.upstream, x.rejected, x.detail = 0, 0, "", "", ""
	x.denied, x.observed = "", ""
	x.attempts, x.bytesOut, x.answered, x.mustClose = 0, 0, false, false
	x.trace = telemetry.TraceContext{}
}

// forget drops what must not outlive the request, for the exchange goes back to
// a pool.
func (x *exchange) forget() {
	x.path, x.ctx, x.down, x.caller = nil, nil, nil, caller{}
	x.urlPath, x.query = nil, nil
	x.table, x.dest, x.route, x.backend, x.cluster, x.held = nil, nil, nil, nil, nil, false
	x.edit, x.pairs = http1.Edit{}, [5]http1.Pair{}
	clear(x.tried)
	x.lookups, x.replay, x.tried = x.lookups[:0], x.replay[:0], x.tried[:0]
	if cap(x.replay) > wire.BufferSize {
		x.replay = nil // one large body should not stay in the pool
	}
	x.fwd.forget()
}

// run takes a request whose head has been read down the path.
func (x *exchange) run() {
	x.grpc = isGRPC(x.req.Get("content-type"))
	for i := range x.layers {
		if !x.layers[i].do(x) {
			break
		}
	}
	if x.held {
		x.cluster.ReleaseRequest()
	}
	if x.route != nil && len(x.route.Mirrors) > 0 {
		x.mirror()
	}
	x.finish()
}

// protocolError answers what the codec refused. What it quotes of the request
// goes to the client alone: a target or a Host may hold a password or a token.
func (x *exchange) protocolError(bad *http1.Error) bool {
	x.Metrics.ProtocolError("downstream", bad.Reason)
	x.flags |= accesslog.DPE
	x.reply(bad.Status, bad.Reason+": "+bad.Detail)
	plain, _, _ := strings.Cut(bad.Detail, `: "`)
	x.detail = bad.Reason + ": " + plain
	return false
}

// shed answers before memory runs out (Envoy's overload manager).
func (x *exchange) shed() bool {
	if !x.Overload.Shed() {
		return true
	}
	x.flags |= accesslog.OM
	x.mustClose = true // what comes next would only be shed too
	return x.reply(503, "overloaded: the sidecar has too little memory for another request")
}

func (x *exchange) beginTrace() bool {
	x.trace.Begin(x.req.Get("traceparent"), x.Spans.Sample(draw()))
	x.pairs[0] = http1.Pair{Name: "traceparent", Value: x.trace.AppendTraceparent(x.parent[:0])}
	x.edit.Set = x.pairs[:1]
	if x.req.Get("x-request-id") == nil {
		x.pairs[1] = http1.Pair{Name: "x-request-id", Value: x.trace.TraceID[:]}
		x.edit.Set = x.pairs[:2]
	}
	return true
}

func (x *exchange) normalise() bool {
	if string(x.req.Method) == "CONNECT" {
		x.flags |= accesslog.DPE
		x.mustClose = true // what follows is the tunnel that it asked for
		return x.reply(405, "CONNECT is not allowed through this port")
	}
	p, q, err := http1.NormalizePath(x.pathBuf[:0], x.req.Target)
	if err != nil {
		x.mustClose = true
		return x.protocolError(err)
	}
	x.urlPath, x.query = p, q
	if q == nil {
		x.edit.Target = p
	} else {
		x.targetBuf = http1.AppendTarget(x.targetBuf[:0], p, q)
		x.edit.Target = x.targetBuf
	}
	x.edit.KeepUpgrade = x.req.Upgrade
	return true
}

func (x *exchange) findDestination() bool {
	x.table = x.path.table.Load()
	x.dest = x.table.Destinations[x.asked]
	if x.dest == nil || x.dest.Missing || x.dest.Routes == nil {
		x.flags |= accesslog.NC
		why := "the control plane knows no service " + x.key + ": check the name and the port"
		if x.dest == nil {
			why = "no configuration for " + x.key + " has arrived: is the control plane reachable?"
		}
		return x.reply(503, why)
	}
	return true
}

func (x *exchange) findRoute() bool {
	x.route = x.dest.Routes.Match(&route.Request{Method: x.req.Method, Path: x.urlPath, RawQuery: x.query, Headers: x})
	if x.route == nil {
		x.flags |= accesslog.NR
		return x.reply(404, "no route of "+x.key+" matches this request")
	}
	timeout := x.route.Timeout
	if timeout > 0 {
		x.deadline = x.start.Add(timeout)
	}
	return true
}

// Lookup presents headers to routes: several of one name as one value.
func (x *exchange) Lookup(name string) ([]byte, bool) {
	var first []byte
	joined := -1
	for i := range x.req.Headers {
		h := &x.req.Headers[i]
		switch {
		case !http1.EqualFold(h.Name, name):
		case first == nil:
			first = h.Value
		default:
			if joined < 0 {
				joined = len(x.lookups)
				x.lookups = append(x.lookups, first...)
			}
			x.lookups = append(append(x.lookups, ", "...), h.Value...)
		}
	}
	if joined >= 0 {
		return x.lookups[joined:], true
	}
	return first, first != nil
}

func (x *exchange) findCluster() bool {
	x.backend = x.route.Choose(rand.Uint64())
	if x.backend == nil {
		return x.reply(500, "route "+x.route.Name+" has no backend that could be used")
	}
	x.cluster = x.Clusters.For(x.table, x.backend.Cluster)
	if x.cluster == nil {
		x.flags |= accesslog.NC
		return x.reply(500, "route "+x.route.Name+" names "+x.backend.Cluster+", which does not exist")
	}
	return true
}

func (x *exchange) findApplication() bool {
	x.table = x.path.table.Load()
	x.route = &x.app.route
	x.backend = &x.route.Clusters[0]
	x.cluster = x.Clusters.For(x.app.table, x.app.cluster)
	x.held = true
	x.cluster.AcquireRequest()
	return true
}

func (x *exchange) limitRequests() bool {
	x.held = true
	if x.cluster.AcquireRequest() {
		return true
	}
	cfg := x.cluster.Config()
	x.Metrics.Rejected(x.key, cfg.Policy, "requests", cfg.LimitsObserve)
	x.rejected = cfg.Policy
	if cfg.LimitsObserve {
		return true
	}
	return x.overflow("limit of " + strconv.Itoa(int(cfg.Limits.Requests)) + " requests in flight is reached")
}

// overflow answers what a limit rejects.
func (x *exchange) overflow(why string) bool {
	x.flags |= accesslog.UO
	policy := x.cluster.Config().Policy
	return x.reply(503, policy+": "+why, http1.Pair{Name: "x-outrigger-breaker", Value: []byte(policy + " limit 0")})
}

// overflowOpen answers what an open breaker rejects, and says when to come back.
func (x *exchange) overflowOpen(b *breaker.Breaker, v breaker.Verdict) bool {
	x.flags |= accesslog.UO
	policy := b.Policy().Name
	seconds := strconv.Itoa(int((v.RetryAfter + time.Second - 1) / time.Second))
	return x.reply(503, "circuit breaker "+policy+" is "+v.State.String()+" for "+x.cluster.Name,
		http1.Pair{Name: "x-outrigger-breaker", Value: []byte(policy + " " + v.State.String() + " " + seconds)},
		http1.Pair{Name: "retry-after", Value: []byte(seconds)})
}

// reply answers the request ourselves. It returns false: the path ends.
func (x *exchange) reply(status int, why string, headers ...http1.Pair) bool {
	x.status, x.detail = status, why
	if x.answered { // too late for a status: the client sees a broken response
		x.down.cut()
		return false
	}
	x.answered = true
	x.mustClose = x.mustClose || !x.bodyDone
	h := http1.Head{Status: status, Minor: 1}
	e := http1.Edit{Set: append(headers, http1.Pair{Name: "server", Value: []byte("outrigger")},
		http1.Pair{Name: "x-outrigger-response-flags", Value: []byte(x.flags.String())})}
	var text []byte
	if x.grpc {
		x.replyGRPC(&h, &e)
	} else {
		text = []byte("outrigger: " + why + "\n")
		e.Framing, e.Length = http1.Length, int64(len(text))
		e.Set = append(e.Set, http1.Pair{Name: "content-type", Value: []byte("text/plain; charset=utf-8")})
		if string(x.req.Method) == "HEAD" {
			text = nil
		}
	}
	err := x.down.writeHead(&h, &e, len(text) == 0)
	if err == nil && len(text) > 0 {
		x.bytesOut = int64(len(text))
		err = x.down.writeBody(text, true)
	}
	if err == nil {
		err = x.down.flush()
	}
	if err != nil {
		x.clientGone(result{why: why})
	}
	return false
}

// clientGone ends an exchange that the client broke off.
func (x *exchange) clientGone(r result) {
	x.down.cut()
	x.flags |= r.flags
	x.detail = r.why
	if r.flags&accesslog.DPE == 0 {
		x.flags |= accesslog.DC
	}
	if !x.answered {
		x.status = 0
	}
}

// finish counts and logs the request: once, whatever became of it.
func (x *exchange) finish() {
	x.ended = time.Now()
	d := x.ended.Sub(x.start)
	m := telemetry.Request{Protocol: x.protocol(), Status: x.status, GRPCStatus: int8(x.grpcStatus), Flags: x.flags}
	e := accesslog.Entry{
		Start: x.start, Duration: d, Direction: x.direction(), Protocol: logged[m.Protocol],
		Method: x.req.Method, Path: x.urlPath, Host: x.req.Host, UserAgent: x.req.Get("user-agent"), RequestID: x.req.Get("x-request-id"),
		Status: x.status, GRPCStatus: int8(x.grpcStatus), Flags: x.flags, Destination: x.key, Upstream: x.upstream, Source: x.source, Attempts: x.attempts,
		BytesIn: int64(len(x.replay)) + x.pumped, BytesOut: x.bytesOut, Breaker: x.rejected, Denied: x.denied, Observed: x.observed, Detail: x.detail, PeerIdentity: x.identity,
	}
	if x.outbound {
		e.PeerIdentity = x.fwd.peer
	}
	if e.PeerIdentity != "" {
		m.Secure, e.Security = true, "mutual_tls"
		if !x.outbound {
			m.Peer = x.account
		}
	}
	x.series.Observe(m, d)
	if x.urlPath == nil { // not normalised: cut the query off all the same
		e.Path, _, _ = bytes.Cut(x.req.Target, []byte("?"))
	}
	if x.route != nil {
		e.Route = x.route.Name
	}
	if x.table != nil {
		e.Config = x.table.Version
	}
	if x.trace.SpanID != [16]byte{} {
		e.TraceID, e.SpanID = x.trace.TraceID[:], x.trace.SpanID[:]
		if x.trace.Joined {
			e.ParentID = x.trace.ParentID[:]
		}
		if e.RequestID == nil {
			e.RequestID = e.TraceID
		}
	}
	x.Log.Write(&e)
	if x.trace.Sampled && x.Spans != nil {
		x.Spans.Record(telemetry.Span{
			Context: &x.trace, Outbound: x.outbound, Method: string(x.req.Method), Path: string(x.urlPath), Status: x.status, Flags: x.flags.String(),
			Destination: x.key, Upstream: x.upstream, Attempts: x.attempts, Start: x.start, End: x.ended,
		})
	}
}
