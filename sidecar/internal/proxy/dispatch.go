package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
)

// Mutual is how a proxy takes mutual TLS from other proxies of the mesh.
type Mutual struct {
	// Config requires and verifies a certificate of the peer.
	Config *tls.Config
	// Peer is the SPIFFE ID that a handshake has proved.
	Peer func(*tls.ConnectionState) (string, error)
	// IsMesh tells a proxy's ClientHello, by its ALPN, from that of an application,
	// whose TLS is none of ours.
	IsMesh func(alpn []string) bool
	// Self is our own SPIFFE ID.
	Self string
	// Strict refuses callers without mutual TLS.
	Strict bool
}

// protocols that a port may be declared to speak (table.Destination.Protocol,
// bootstrap.Inbound.Protocol).
const (
	protocolHTTP = "http"
	protocolTCP  = "tcp"
	protocolTLS  = "tls"
	protocolAuto = "auto"
)

// target is where the connections of a port go.
type target struct {
	protocol string
	// cluster of connections that are carried as bytes.
	cluster string
	// byServerName replaces cluster for TLS; nil where it does not.
	byServerName func(name string) (cluster string, ok bool)
}

// serve is the life of a connection: mutual TLS where the peer is a proxy of the
// mesh, then what the port speaks, or what the first bytes show.
// m is nil where callers are taken in clear.
func (p *path) serve(ctx context.Context, c *listener.Conn, m *Mutual, find func() target) {
	who := caller{source: c.RemoteAddr().String()}
	to := find()
	if m != nil {
		var ok bool
		if who, ok = p.authenticate(ctx, c, m, who, to.protocol); !ok {
			return
		}
	}
	if p.capture != nil && who.identity == "" {
		leave, ok := p.capture.enter(c)
		defer leave()
		if !ok {
			p.refuseClear(c, who, to.protocol)
			return
		}
	}
	r := detect.Result{Protocol: detect.Opaque}
	switch to.protocol {
	case protocolHTTP: // whatever else is said is refused by the codec, with the reason
		r.Protocol = p.version(c)
	case protocolAuto, protocolTLS:
		var err error
		if r, err = p.sniff(c, to.protocol == protocolTLS); err != nil {
			return
		}
	}
	switch {
	case r.Protocol == detect.HTTP1 && to.protocol != protocolTLS:
		p.serveHTTP1(ctx, c, who)
	case r.Protocol == detect.HTTP2 && to.protocol != protocolTLS:
		p.serveHTTP2(ctx, c, who)
	default:
		cluster, refused := to.cluster, p.authorized(&who)
		if refused != "" {
			cluster = ""
		}
		if to.byServerName != nil {
			var ok bool
			if cluster, ok = to.byServerName(r.ServerName); !ok {
				cluster, refused = "", "no route of "+p.key+" has the server name "+quoted(r.ServerName)+": add it to the hostnames of a TLSRoute"
			}
		}
		p.relay(ctx, c, who, cluster, refused, r, to.protocol == protocolAuto && c.Empty())
	}
}

// version of HTTP that begins; HTTP1 where it is neither, whose codec says why.
func (p *path) version(c *listener.Conn) detect.Protocol {
	// Nobody is in a hurry: some clients connect before they have anything to say.
	if c.Empty() && c.FillIdle(time.Now().Add(idleTimeout)) != nil {
		return detect.HTTP1
	}
	if r, err := p.look(c, time.Now().Add(headTimeout)); err == nil && r.Protocol == detect.HTTP2 {
		return detect.HTTP2
	}
	return detect.HTTP1
}

// sniff looks at the first bytes until they show what is spoken, though not for
// longer than sniffTimeout: a server that speaks first must not wait. declared
// TLS is waited for.
func (p *path) sniff(c *listener.Conn, declared bool) (detect.Result, error) {
	opaque := detect.Result{Protocol: detect.Opaque}
	by := time.Now().Add(sniffTimeout)
	if declared {
		by = time.Now().Add(headTimeout)
	} else if p.Seen.ServerFirst(p.key, time.Now()) {
		return opaque, nil
	}
	r, err := p.look(c, by)
	switch {
	case err == nil:
		p.Seen.Found(p.key, r.Protocol, time.Now())
		return r, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return opaque, nil
	case c.Empty():
		return opaque, err
	default:
		return opaque, nil // half-closed after a few bytes: they are carried
	}
}

// look reads until the bytes show what is spoken, or until by.
func (p *path) look(c *listener.Conn, by time.Time) (detect.Result, error) {
	c.ReadBy(by)
	for {
		if !c.Empty() {
			if r := detect.Detect(c.Unread()); r.Protocol != detect.More {
				return r, nil
			}
		}
		if err := c.Fill(); err != nil {
			return detect.Result{Protocol: detect.Opaque}, err
		}
	}
}

// authenticate takes mutual TLS from a proxy of the mesh, and says who it is.
// Callers in clear pass where that is permitted.
func (p *path) authenticate(ctx context.Context, c *listener.Conn, m *Mutual, who caller, protocol string) (caller, bool) {
	patient := m.Strict || protocol == protocolHTTP || protocol == protocolTLS
	by := time.Now().Add(sniffTimeout)
	if patient {
		if c.Empty() && c.FillIdle(time.Now().Add(idleTimeout)) != nil {
			return who, false
		}
		by = time.Now().Add(headTimeout)
	} else if p.Seen.ServerFirst(p.key, time.Now()) {
		return who, true
	}
	r, err := p.look(c, by)
	switch {
	case err == nil:
	case !patient && errors.Is(err, os.ErrDeadlineExceeded):
		return who, true // a server that speaks first, or nothing that we know
	case c.Empty():
		return who, false // it has come and gone, as probes do
	}
	if r.Protocol != detect.TLS || !m.IsMesh(r.ALPN) {
		if !m.Strict {
			return who, true
		}
		p.refuseClear(c, who, protocol)
		return who, false
	}
	t, err := handshake(ctx, c, m.Config)
	if err == nil {
		state := t.ConnectionState()
		who.identity, err = m.Peer(&state)
	}
	if err != nil {
		p.Metrics.ProtocolError("downstream", "handshake_refused")
		p.refuseConn(c, who, protocol, accesslog.DPE, "handshake_refused: "+err.Error())
		return who, false
	}
	if id, err := identity.Parse(who.identity); err == nil {
		who.account = id.Namespace + "/" + id.ServiceAccount
	}
	who.proof = []byte("By=" + m.Self + ";URI=" + who.identity)
	return who, true
}

// plaintextRefused is what a caller without mutual TLS is told where it is asked for.
const plaintextRefused = "plaintext_refused: this workload takes mutual TLS only; call it through a sidecar of the mesh, or make its mtls permissive"

func (p *path) refuseClear(c *listener.Conn, who caller, protocol string) {
	p.Metrics.ProtocolError("downstream", "plaintext_refused")
	p.refuseConn(c, who, protocol, accesslog.DPE, plaintextRefused)
}

// handshake goes on over TLS. What has been read of c is the handshake's.
func handshake(ctx context.Context, c *listener.Conn, cfg *tls.Config) (*tls.Conn, error) {
	t := tls.Server(&replayed{TCPConn: c.TCP(), early: append([]byte(nil), c.Unread()...)}, cfg)
	c.Release()
	if err := c.TCP().SetDeadline(time.Now().Add(headTimeout)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, headTimeout)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	c.Secure(t)
	return t, nil
}

// replayed is a connection of which some bytes have been read already.
type replayed struct {
	*net.TCPConn
	early []byte
}

// Read implements io.Reader.
func (r *replayed) Read(b []byte) (int, error) {
	if len(r.early) > 0 {
		n := copy(b, r.early)
		if r.early = r.early[n:]; len(r.early) == 0 {
			r.early = nil
		}
		return n, nil
	}
	return r.TCPConn.Read(b)
}

// refuseConn logs a connection that is not served.
func (p *path) refuseConn(c *listener.Conn, who caller, protocol string, flags accesslog.Flags, why string) {
	now := time.Now()
	p.Log.Write(&accesslog.Entry{
		Start: now, Direction: p.direction(), Protocol: protocol, Destination: p.key, Source: who.source, Flags: flags, Detail: why,
		Config: p.table.Load().Version,
	})
	_ = c.CloseWrite()
}

// quoted is a name from a stranger, for people.
func quoted(s string) string {
	if s == "" {
		return `"" (none was sent)`
	}
	return `"` + s + `"`
}
