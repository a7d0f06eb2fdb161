package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// exchange is one request and its response. A connection has one, used again
// for each of its requests; nothing in it is shared between connections.
type exchange struct {
	*path
	ctx       context.Context //nolint:containedctx // the life of the listener; an exchange has no other
	conn      *listener.Conn
	source    string
	in        reader // from the client
	out       []byte // to whichever side is written to
	outPooled *[]byte

	req   http1.Head
	body  http1.Body
	edit  http1.Edit
	pairs [4]http1.Pair

	start     time.Time
	deadline  time.Time // of the request with all attempts; zero is none
	trace     telemetry.TraceContext
	parent    [55]byte  // traceparent as written
	attempt   [2]byte   // x-outrigger-attempt as written
	pathBuf   [256]byte // of a path that was not normal; a longer one is allocated
	targetBuf []byte
	urlPath   []byte
	query     []byte
	lookups   []byte // joined header values, for routes

	table   *table.Table
	dest    *table.Destination
	route   *route.Route
	cluster *upstream.Cluster
	held    bool // a request of the cluster's limit
	tried   []*upstream.Endpoint
	fwd     forwarding // the attempt being made

	replay     []byte // what was read of the request's body
	replayable bool   // replay is all of it so far
	bodyDone   bool   // the whole body has been read
	pumped     int64  // bytes of the body that a pump sent beyond replay

	status    int
	flags     accesslog.Flags
	upstream  string
	rejected  string // policy that rejected, or would have
	detail    string
	attempts  int
	bytesOut  int64
	answered  bool // the head of the response is on its way to the client
	mustClose bool
}

// serveHTTP serves the requests of one connection, in order, until it ends.
func (p *path) serveHTTP(ctx context.Context, c *listener.Conn) {
	x := &exchange{path: p, ctx: ctx, conn: c, source: c.RemoteAddr().String(), in: reader{nc: c.TCPConn}}
	if err := x.in.watch(); err != nil {
		return
	}
	defer x.in.release()
	defer x.releaseOut()
	for {
		if x.in.r == x.in.w {
			x.releaseOut()
			// The deadline first: Drain sets a nearer one on connections that idle.
			if c.SetReadDeadline(time.Now().Add(idleTimeout)) != nil {
				return
			}
			if !c.Idle() && !x.in.arrived() || x.in.wait() != nil {
				return
			}
			c.Busy()
		}
		if !x.serveOne() {
			return
		}
	}
}

// serveOne reads a head, takes the request down the path, and reports whether
// the connection can serve another.
func (x *exchange) serveOne() (again bool) {
	x.begin()
	n, err := x.readHead()
	if err != nil {
		return x.refuse(err)
	}
	x.in.pin(n)
	defer x.in.unpin()
	x.body.Limits = &limits
	x.body.Reset(x.req.Framing, x.req.Length)
	x.bodyDone = x.body.Done()
	x.replayable = true
	x.mustClose = x.req.Close || x.Conns.Draining()
	for i := range x.layers {
		if !x.layers[i].do(x) {
			break
		}
	}
	if x.held {
		x.cluster.ReleaseRequest()
	}
	x.finish()
	if !x.mustClose && !x.bodyDone {
		x.mustClose = true // where the next request begins is not known
	}
	if x.mustClose {
		x.lingeringClose()
	}
	return !x.mustClose
}

func (x *exchange) begin() {
	x.takeOut()
	x.start = time.Now()
	x.deadline = time.Time{}
	x.req.Reset()
	x.edit = http1.Edit{}
	x.lookups, x.replay, x.tried = x.lookups[:0], x.replay[:0], x.tried[:0]
	x.urlPath, x.query = nil, nil
	x.table, x.dest, x.route, x.cluster, x.held = nil, nil, nil, nil, false
	x.bodyDone, x.replayable, x.pumped = true, false, 0
	x.status, x.flags, x.upstream, x.rejected, x.detail = 0, 0, "", "", ""
	x.attempts, x.bytesOut, x.answered, x.mustClose = 0, 0, false, false
	x.trace = telemetry.TraceContext{}
	if cap(x.replay) > bufferSize {
		x.replay = nil // one large body should not stay with the connection
	}
}

func (x *exchange) takeOut() {
	if x.outPooled == nil {
		p, ok := buffers.Get().(*[]byte)
		if !ok {
			panic("proxy: the pool holds something else than buffers")
		}
		x.outPooled, x.out = p, (*p)[:0]
	}
}

// releaseOut gives the write buffer back while the connection idles.
func (x *exchange) releaseOut() {
	if x.outPooled != nil {
		buffers.Put(x.outPooled)
		x.outPooled, x.out = nil, nil
	}
}

func (x *exchange) readHead() (int, error) {
	if err := x.conn.SetReadDeadline(x.start.Add(headTimeout)); err != nil {
		return 0, err
	}
	for {
		if b := x.in.unread(); len(b) > 0 {
			n, err := http1.ParseRequest(&x.req, b, &limits)
			if !errors.Is(err, http1.ErrIncomplete) {
				return n, err
			}
		}
		if err := x.in.fill(); err != nil {
			return 0, err
		}
	}
}

// refuse answers a head that could not be read.
func (x *exchange) refuse(err error) bool {
	x.mustClose = true
	var bad *http1.Error
	switch {
	case errors.As(err, &bad):
		x.protocolError(bad)
	case errors.Is(err, os.ErrDeadlineExceeded) && x.in.r < x.in.w:
		x.Metrics.ProtocolError("downstream", "head_timeout")
		x.flags |= accesslog.DPE
		x.reply(408, "head_timeout: the request's head took longer than "+headTimeout.String())
	default: // the client went away before it had said anything: nothing to log
		return false
	}
	x.req.Reset() // what was parsed of it is not to be trusted
	x.finish()
	x.lingeringClose()
	return false
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
	x.dest = x.table.Destinations[x.key]
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
	name, ok := x.route.Pick(rand.Uint64())
	if !ok {
		return x.reply(500, "route "+x.route.Name+" has no backend that could be used")
	}
	x.cluster = x.Clusters.For(x.table, name)
	if x.cluster == nil {
		x.flags |= accesslog.NC
		return x.reply(500, "route "+x.route.Name+" names "+name+", which does not exist")
	}
	return true
}

func (x *exchange) findApplication() bool {
	x.table = x.path.table.Load()
	x.dest = x.table.Destinations[x.key]
	x.route = &x.dest.Routes.Routes[0]
	x.cluster = x.Clusters.For(x.table, x.dest.Cluster)
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
		x.mustClose = true
		return false
	}
	x.answered = true
	text := []byte("outrigger: " + why + "\n")
	h := http1.Head{Status: status, Minor: 1}
	e := http1.Edit{
		Framing: http1.Length, Length: int64(len(text)), Close: x.mustClose || !x.bodyDone, KeepAlive: x.req.Minor == 0,
		Set: append(headers, http1.Pair{Name: "content-type", Value: []byte("text/plain; charset=utf-8")}, http1.Pair{Name: "server", Value: []byte("outrigger")},
			http1.Pair{Name: "x-outrigger-response-flags", Value: []byte(x.flags.String())}),
	}
	x.out = http1.AppendResponseHead(x.out[:0], &h, &e)
	if string(x.req.Method) != "HEAD" {
		x.out = append(x.out, text...)
		x.bytesOut = int64(len(text))
	}
	if err := x.writeClient(x.out); err != nil {
		x.clientGone(result{why: why})
	}
	return false
}

func (x *exchange) writeClient(b []byte) error {
	if err := x.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := x.conn.Write(b)
	return err
}

// clientGone ends an exchange that the client broke off.
func (x *exchange) clientGone(r result) {
	x.mustClose = true
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
	now := time.Now()
	d := now.Sub(x.start)
	x.Metrics.Destination(x.outbound, x.key).Observe(telemetry.Request{Status: x.status, Flags: x.flags}, d)
	e := accesslog.Entry{
		Start: x.start, Duration: d, Direction: x.direction(), Protocol: "http",
		Method: x.req.Method, Path: x.urlPath, Host: x.req.Host, UserAgent: x.req.Get("user-agent"), RequestID: x.req.Get("x-request-id"),
		Status: x.status, Flags: x.flags, Destination: x.key, Upstream: x.upstream, Source: x.source, Attempts: x.attempts,
		BytesIn: int64(len(x.replay)) + x.pumped, BytesOut: x.bytesOut, Breaker: x.rejected, Detail: x.detail,
	}
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
			Destination: x.key, Upstream: x.upstream, Attempts: x.attempts, Start: x.start, End: now,
		})
	}
}

// lingeringClose lets the client read the answer before the connection ends:
// closing with its bytes unread would send a reset that overtakes it (RFC 9112,
// 9.6). What it still sends is thrown away, within bounds.
func (x *exchange) lingeringClose() {
	if x.bodyDone && x.in.r == x.in.w {
		return
	}
	const bytesMax, patience = 256 << 10, 500 * time.Millisecond
	if x.conn.CloseWrite() != nil || x.conn.SetReadDeadline(time.Now().Add(patience)) != nil {
		return
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(net.Conn(x.conn.TCPConn), bytesMax))
}
