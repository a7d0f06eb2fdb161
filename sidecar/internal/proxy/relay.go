package proxy

import (
	"cmp"
	"context"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// relayAttempts is how many endpoints a connection is tried at: nothing has been
// sent, so another one is always safe.
const relayAttempts = 3

// stream is what is known of a connection that is to be carried as bytes.
type stream struct {
	// Cluster that it goes to. Empty: nothing is configured for it, as Refused
	// says, and it is refused.
	Cluster string
	Refused string
	Caller  caller
	// Protocol for the log: tcp, or tls with the ServerName that the client asked
	// for. Empty is tcp.
	Protocol   string
	ServerName string
	// Early are bytes of the client that have been read. Release, which may be nil,
	// is called once, when they are not needed any more.
	Early   []byte
	Release func()
	// Memory learns who speaks first on destination Key, where it is set and Early
	// is empty.
	Memory *detect.Memory
	Key    string
}

// relay carries a connection, with what has been read of it, to an endpoint of
// the cluster, or, where that is empty, refuses it for the reason given. learn says that nobody has spoken yet and that who does is worth
// remembering.
func (p *path) relay(ctx context.Context, c *listener.Conn, who caller, clusterName, refused string, r detect.Result, learn bool) {
	s := stream{Cluster: clusterName, Refused: refused, Early: c.Unread(), Release: c.Release, Caller: who}
	if r.Protocol == detect.TLS {
		s.Protocol, s.ServerName = "tls", r.ServerName
	}
	if learn {
		s.Memory, s.Key = p.Seen, p.key
	}
	if p.capture != nil && who.identity == "" {
		p.capture.lasts(c)
	}
	// Its deadlines are the tunnel's from here on.
	_ = c.TCP().SetDeadline(time.Time{})
	p.carry(ctx, c.Transport(), s)
}

// carry takes a connection, a *net.TCPConn or a *tls.Conn above one, to an
// endpoint of the stream's cluster. The breaker
// counts failures to connect; what is said on the connection is not ours. Unless
// both sides end it in order, both see a reset: a stream that was cut must not
// look complete.
func (p *path) carry(ctx context.Context, c net.Conn, s stream) {
	start := time.Now()
	e := accesslog.Entry{
		Start: start, Direction: p.direction(), Protocol: cmp.Or(s.Protocol, "tcp"), TLSServerName: s.ServerName,
		Destination: p.key, Source: s.Caller.source, PeerIdentity: s.Caller.identity,
	}
	t := p.table.Load()
	e.Config = t.Version
	var trace telemetry.TraceContext
	trace.Begin(nil, false)
	e.TraceID, e.SpanID = trace.TraceID[:], trace.SpanID[:]
	p.series.TCPOpened()
	defer func() {
		e.Duration = time.Since(start)
		p.series.TCPClosed(e.BytesIn, e.BytesOut)
		p.Log.Write(&e)
	}()
	release := sync.OnceFunc(func() {
		if s.Release != nil {
			s.Release()
		}
	})
	defer release()
	resetOnClose(c, true)
	if s.Cluster == "" {
		e.Flags, e.Detail = accesslog.NR, s.Refused
		return
	}
	if p.app != nil {
		t = p.app.table
	}
	cluster := p.Clusters.For(t, s.Cluster)
	if cluster == nil {
		e.Flags, e.Detail = accesslog.NC, "the control plane knows no cluster "+s.Cluster
		return
	}
	defer cluster.ReleaseRequest()
	if !cluster.AcquireRequest() {
		observe := cluster.Config().LimitsObserve
		p.overLimit(cluster, &e, "requests", observe)
		if !observe {
			return
		}
	}
	up := p.connect(ctx, cluster, &e, trace.TraceID[:])
	if up == nil {
		return
	}
	e.Upstream = up.Endpoint.Name
	if p.outbound {
		e.PeerIdentity = up.Peer()
	}
	if e.PeerIdentity != "" {
		e.Security = "mutual_tls"
	}
	defer up.Endpoint.Discard(up)
	w := tunnelling{down: c, up: up.Transport(), early: s.Early, release: release, idle: tcpIdleTimeout}
	if s.Memory != nil && len(s.Early) == 0 {
		w.first = func(server bool) { remember(s.Memory, s.Key, server, start, time.Now()) }
	}
	w.run()
	e.BytesIn, e.BytesOut = w.in, w.out
	e.Flags, e.Detail = w.flags, w.detail
}

func (p *path) connect(ctx context.Context, cluster *upstream.Cluster, e *accesslog.Entry, traceID []byte) *upstream.Conn {
	var tried []*upstream.Endpoint
	b := cluster.Breaker()
	for range relayAttempts {
		var v breaker.Verdict
		if b != nil {
			v = b.Allow(time.Now())
			if v.Rejected {
				e.Breaker = b.Policy().Name
				p.Metrics.Rejected(p.key, e.Breaker, "breaker", b.Policy().Observe)
			}
			if !v.Admit {
				e.Flags, e.Detail = accesslog.UO, "circuit breaker "+e.Breaker+" is "+v.State.String()
				return nil
			}
		}
		ep := p.pick(cluster, tried)
		if ep == nil {
			if b != nil {
				b.Abandon(v.Ticket)
			}
			e.Flags, e.Detail = accesslog.UH, cluster.Name+" has no healthy endpoint"
			return nil
		}
		tried = append(tried, ep)
		e.Attempts++
		p.series.Attempt(e.Attempts > 1)
		start := time.Now()
		up, err := ep.Dial(ctx, time.Time{})
		if limit := upstream.LimitOf(err); limit != "" {
			if b != nil {
				b.Abandon(v.Ticket)
			}
			p.overLimit(cluster, e, string(limit), false)
			return nil
		}
		now := time.Now()
		cluster.Record(now, ep, outlier.Result{LocalOrigin: err != nil})
		if b != nil {
			o := breaker.Outcome{At: start, Duration: now.Sub(start), Endpoint: ep.Name, Flags: "-"}
			if err != nil {
				o.Failed, o.Flags = breaker.FailConnectFailure, "UF"
			}
			o.Describe(traceID, nil, nil)
			b.Done(v.Ticket, &o)
		}
		if err == nil {
			e.Flags, e.Detail = 0, "" // of the attempts before
			if up.Over != "" {
				p.overLimit(cluster, e, string(up.Over), true)
			}
			return up
		}
		e.Upstream, e.Flags, e.Detail = ep.Name, accesslog.UF, "cannot connect to "+ep.Name+": "+err.Error()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(rand.Int64N(int64(25 * time.Millisecond)))):
		}
	}
	return nil
}

// overLimit counts what a limit rejected, or in Observe mode would have.
func (p *path) overLimit(c *upstream.Cluster, e *accesslog.Entry, limit string, observe bool) {
	e.Breaker = c.Config().Policy
	p.Metrics.Rejected(p.key, e.Breaker, limit, observe)
	if !observe {
		e.Flags, e.Detail = accesslog.UO, "limit on "+limit+" is reached"
	}
}
