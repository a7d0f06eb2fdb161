package proxy

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/telemetry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// relayAttempts is how many endpoints a connection is tried at: nothing has been
// sent, so another one is always safe.
const relayAttempts = 3

// relay carries a TCP connection to an endpoint of the cluster. The breaker
// counts failures to connect; what is said on the connection is not ours.
func (p *path) relay(ctx context.Context, c *listener.Conn, who caller, clusterName, serverName string) {
	start := time.Now()
	e := accesslog.Entry{Start: start, Direction: p.direction(), Protocol: "tcp", Destination: p.key, Source: who.source, PeerIdentity: who.identity, TLSServerName: serverName}
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
	cluster := p.Clusters.For(t, clusterName)
	if cluster == nil {
		e.Flags, e.Detail = accesslog.NC, "the control plane knows no cluster "+clusterName
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
	defer up.Endpoint.Discard(up)
	e.BytesIn, e.BytesOut = tunnel(c.TCP(), up.TCP())
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
		ep := cluster.Pick(tried)
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

// tunnel carries bytes both ways until both sides have ended, passing each half-
// close on. It returns the bytes from a to b and from b to a. Either side being
// silent is fine as long as the other is not, for tcpIdleTimeout.
func tunnel(a, b *net.TCPConn) (ab, ba int64) {
	var last atomic.Int64
	last.Store(time.Now().UnixNano())
	var wg sync.WaitGroup
	wg.Go(func() { ab = carry(b, a, &last) })
	ba = carry(a, b, &last)
	wg.Wait()
	return ab, ba
}

// carry copies from src to dst until src ends, in the kernel where the system
// can. An error on either side ends both, so that the other direction does not
// wait for a peer that is gone.
func carry(dst, src *net.TCPConn, last *atomic.Int64) (n int64) {
	for src.SetReadDeadline(time.Now().Add(tcpIdleCheck)) == nil {
		m, err := io.Copy(dst, src)
		n += m
		if m > 0 {
			last.Store(time.Now().UnixNano())
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && time.Since(time.Unix(0, last.Load())) < tcpIdleTimeout {
			continue // the other direction is alive
		}
		if err == nil {
			_ = dst.CloseWrite() // EOF: the other direction may go on
			return n
		}
		break
	}
	_ = dst.Close()
	_ = src.Close()
	return n
}
