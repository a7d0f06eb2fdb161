package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const (
	// maxProbeBody is how much of an application's answer is read.
	maxProbeBody = 10 << 10
	// maxProbeTimeout bounds what a pod may ask for.
	maxProbeTimeout = 5 * time.Minute
	// probeAgent begins as kubelet's does, for applications look at that.
	probeAgent = "kube-probe/outrigger"
)

// Probes does for kubelet what it would do to the application, which it cannot
// reach without an identity: it calls the pod's own address from an address that
// the pod's rules leave alone. Only what was declared is probed; a stranger who
// asks again and again causes one probe of each at a time.
type Probes struct {
	declared map[string]bootstrap.Probe
	at, from netip.Addr

	mu      sync.Mutex
	running map[string]*probing
}

// probing is a probe that is being made; err is set before done is closed.
type probing struct {
	done chan struct{}
	err  error
}

// NewProbes makes Probes of what is declared by path, at an address of the pod and
// from the address that connections to the application come from.
func NewProbes(declared map[string]bootstrap.Probe, at, from netip.Addr) *Probes {
	return &Probes{declared: declared, at: at, from: from, running: map[string]*probing{}}
}

// ServeHTTP answers 200 where the application is well, 503 with the reason where it
// is not, and 404 for what was not declared.
func (ps *Probes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p, ok := ps.declared[r.URL.Path]
	if !ok {
		http.Error(w, "no probe was declared at this path: "+bootstrap.EnvProbes+" holds those of the pod", http.StatusNotFound)
		return
	}
	if err := ps.probe(r.Context(), r.URL.Path, p); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = io.WriteString(w, "ok\n") // who hangs up does not want to know
}

// probe makes the probe, or waits for one that is being made.
func (ps *Probes) probe(ctx context.Context, path string, p bootstrap.Probe) error {
	ps.mu.Lock()
	run := ps.running[path]
	if run != nil {
		ps.mu.Unlock()
		select {
		case <-run.done:
			return run.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	run = &probing{done: make(chan struct{})}
	ps.running[path] = run
	ps.mu.Unlock()
	// Not for this caller alone: others may wait for it by now.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(time.Duration(p.TimeoutSeconds)*time.Second, maxProbeTimeout))
	defer cancel()
	run.err = ps.once(ctx, p)
	ps.mu.Lock()
	delete(ps.running, path)
	ps.mu.Unlock()
	close(run.done)
	return run.err
}

func (ps *Probes) once(ctx context.Context, p bootstrap.Probe) error {
	switch {
	case p.HTTP != nil:
		return ps.http(ctx, p.HTTP)
	case p.TCP != nil:
		c, err := ps.dial(ctx, "tcp", ps.address(p.TCP.Port))
		if err != nil {
			return err
		}
		return c.Close()
	case p.GRPC != nil:
		return ps.grpc(ctx, p.GRPC)
	}
	return errors.New("the probe says nothing to do")
}

func (ps *Probes) address(port uint16) string { return netip.AddrPortFrom(ps.at, port).String() }

func (ps *Probes) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var d net.Dialer
	if ps.from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(ps.from, 0))
	}
	return d.DialContext(ctx, network, address)
}

func (ps *Probes) http(ctx context.Context, p *bootstrap.HTTPProbe) error {
	u, err := url.Parse(p.Path)
	if err != nil {
		u = &url.URL{Path: p.Path} // as kubelet does
	}
	u.Scheme, u.Host = "http", ps.address(p.Port)
	if strings.EqualFold(p.Scheme, "https") {
		u.Scheme = "https"
	}
	if !strings.HasPrefix(u.Path, "/") {
		u.Path = "/" + u.Path
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), http.NoBody)
	if err != nil {
		return err
	}
	req.Header = http.Header{"User-Agent": {probeAgent}, "Accept": {"*/*"}}
	req.Host = p.Host
	for name, values := range p.Headers {
		if http.CanonicalHeaderKey(name) == "Host" {
			if len(values) > 0 {
				req.Host = values[0]
			}
			continue
		}
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	t := &http.Transport{
		DialContext: ps.dial, DisableKeepAlives: true, DisableCompression: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10}, //nolint:gosec // kubelet does not verify either: a probe tells the application nothing
	}
	resp, err := t.RoundTrip(req) // which follows no redirect
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	// Read so that the application need not see a reset; what it says is its own.
	_, _ = io.CopyN(io.Discard, resp.Body, maxProbeBody)
	if resp.StatusCode < 200 || resp.StatusCode >= 400 {
		return fmt.Errorf("the application answers %s with status %d", p.Path, resp.StatusCode)
	}
	return nil
}

func (ps *Probes) grpc(ctx context.Context, p *bootstrap.GRPCProbe) (err error) {
	conn, err := grpc.NewClient("passthrough:///"+ps.address(p.Port),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithUserAgent(probeAgent),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return ps.dial(ctx, "tcp", address) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxProbeBody)),
	)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	resp, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: p.Service})
	if err != nil {
		return err
	}
	if s := resp.GetStatus(); s != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("the application says of service %q that it is %s", p.Service, s)
	}
	return nil
}
