// Package discovery serves what package xds makes to the data planes: xDS v3
// over ADS, state of the world and delta, on go-control-plane's server.
//
// It knows streams, who subscribed to what, and what each acknowledged or
// refused; it does not know Kubernetes, policies or how a resource is made.
// main publishes a Mesh whenever package rebuild has a new one and asks for
// Status; admin shows it.
//
// What a data plane may rely on:
//
//   - Resources are encoded once per kind of data plane and shared. A version is
//     a hash of the content: a delta client that comes back with
//     initial_resource_versions, even to a restarted control plane, is sent
//     nothing that it has. A SotW client is always answered after reconnecting,
//     because its protocol gives no way to say what it has.
//   - A name that does not exist is answered at once: delta by
//     removed_resources, SotW by a response without it that names it in
//     resource_errors (xDS TP3). grpc-go 1.85 reads neither for a name that it
//     never had, and waits 15 s by itself.
//   - What Envoys and gRPC programs are told is made when the first of them comes.
//   - Before the first Publish nothing is answered, so that a control plane that
//     has just started never says of a service that it does not exist.
//   - Additions are pushed in the order clusters, endpoints, listeners, routes.
//     Listeners are removed at once; routes, clusters and endpoints stay for a
//     grace period, for those who still hold what refers to them.
//   - An Envoy is sent a listener or route only after it has acknowledged the
//     clusters that it leads to and their endpoints: what is routed to a cluster
//     that is still warming is answered with an error. After 2 s it is sent all
//     the same, and counted. The others wait for what they need by themselves.
//   - Only an Envoy may ask with a wildcard; it gets the listeners that its node
//     metadata asks for and the clusters that those can reach.
//   - A route that is there once more for a namespace is what nodes get whose
//     metadata NAMESPACE that is; when it goes, they get the one that all share.
//   - The listener inbound/<namespace>/<pod> exists for the node <pod>.<namespace>
//     alone. To others it does not, and that they asked is counted.
//   - A stream is of the node that its first request names. Over TLS a stream needs a client certificate of the trust domain, and the
//     node may not be of another namespace or service account than that proves.
package discovery

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/log"
	"github.com/envoyproxy/go-control-plane/pkg/server/config"
	deltav3 "github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	restv3 "github.com/envoyproxy/go-control-plane/pkg/server/rest/v3"
	sotwv3 "github.com/envoyproxy/go-control-plane/pkg/server/sotw/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// Limits of what clients may ask for. A zero field takes its default.
type Limits struct {
	// Names that one stream may subscribe to, of each type. Default 1024.
	Names int
	// Streams in all. Default 10000.
	Streams int
}

const (
	defaultNames   = 1024
	defaultStreams = 10000
	defaultGrace   = 5 * time.Second
	// maxMessage bounds a request. The largest is a reconnecting client's list
	// of versions: 1024 names of at most 253+63 bytes stay far below.
	maxMessage = 1 << 20
	// maxStreamsPerConnection: a data plane needs one.
	maxStreamsPerConnection = 16
	// stopTimeout bounds the graceful stop.
	stopTimeout = 3 * time.Second
	// What a stranger may take at an address that a network reaches.
	maxHeader        = 32 << 10
	handshakeTimeout = 10 * time.Second
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
)

// Options of a Server.
type Options struct {
	Log      *slog.Logger
	Registry prometheus.Registerer
	// Grace is how long routes, clusters and endpoints are served after the mesh
	// dropped them. 0 takes the default of 5 s; negative is none.
	Grace  time.Duration
	Limits Limits
}

// Server serves xDS. Make it with New. Its methods are safe for concurrent use.
type Server struct {
	log     *slog.Logger
	metrics *metrics
	cache   *configCache
	tracker *tracker
	wake    chan struct{} // something may be due earlier than before
}

// New makes a Server that has nothing to serve until Publish.
func New(o Options) *Server {
	switch {
	case o.Grace == 0:
		o.Grace = defaultGrace
	case o.Grace < 0:
		o.Grace = 0
	}
	if o.Limits.Names == 0 {
		o.Limits.Names = defaultNames
	}
	if o.Limits.Streams == 0 {
		o.Limits.Streams = defaultStreams
	}
	s := &Server{log: o.Log, metrics: newMetrics(o.Registry), wake: make(chan struct{}, 1)}
	s.cache = newConfigCache(o.Grace, time.Now, func() {
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}, func(typeURL string) { s.metrics.ordering.WithLabelValues(shortType(typeURL)).Inc() })
	s.tracker = &tracker{
		cache: s.cache, log: o.Log, metrics: s.metrics, now: time.Now, limits: o.Limits, streams: map[streamKey]*stream{},
		propagation: propagation{observe: func(d time.Duration) { s.metrics.propagation.Observe(d.Seconds()) }, targets: map[target]*audience{}},
	}
	s.cache.moving = s.tracker.propagation.moving
	o.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "outrigger_xds_propagation_pending_seconds",
		Help: "Age of the oldest change of endpoints that some proxy that asks for them has not acknowledged; 0 where there is none.",
	}, func() float64 { return s.tracker.propagation.pending(time.Now()) }))
	return s
}

// Publish puts m in force and pushes what changed. m must not be changed
// afterwards. On an error the previous Mesh stays in force.
func (s *Server) Publish(m *mesh.Mesh) error { return s.Replace(m, time.Now()) }

// Replace is Publish of a Mesh that is made of what was seen at a time.
func (s *Server) Replace(m *mesh.Mesh, seen time.Time) error {
	done, err := s.cache.publish(m, seen)
	if err != nil {
		return fmt.Errorf("publish xDS: %w", err)
	}
	s.count(done)
	return nil
}

// Update is Replace of a Mesh that differs only by c from the one in force. It
// costs what differs. After an error the Mesh has to be published.
func (s *Server) Update(m *mesh.Mesh, c mesh.Change, seen time.Time) error {
	done, err := s.cache.update(m, c, seen)
	if err != nil {
		return fmt.Errorf("update xDS: %w", err)
	}
	s.count(done)
	return nil
}

func (s *Server) count(p published) {
	for dp, types := range p.total {
		for t, n := range types {
			s.metrics.resources.WithLabelValues(string(dp), shortType(t)).Set(float64(n))
		}
	}
	for t, n := range p.changed {
		s.metrics.changed.WithLabelValues(shortType(t)).Add(float64(n))
	}
}

// Status lists the connected data planes, by kind and node id.
func (s *Server) Status() []NodeStatus { return s.tracker.status() }

// Applied counts, for each kind of data plane, the nodes that have applied all
// that is served to them.
func (s *Server) Applied() []Applied { return count(s.Status()) }

func count(nodes []NodeStatus) []Applied {
	var out []Applied
	for _, dp := range xds.DataPlanes() {
		a := Applied{DataPlane: dp}
		for _, n := range nodes {
			if n.DataPlane != dp {
				continue
			}
			a.Total++
			if n.Applied {
				a.Applied++
			}
			for _, t := range n.Types {
				if t.Nack != nil {
					a.Rejected++
					break
				}
			}
		}
		out = append(out, a)
	}
	return out
}

// Sets returns what is served, for each data plane, or would be served where none
// has come; nil before the first Publish. It costs as much as a Publish.
func (s *Server) Sets() map[xds.DataPlane]*xds.Set {
	sets, err := s.cache.sets()
	if err != nil { // that could have been published
		s.log.Error("a data plane that has not come yet could not be served", "error.message", err.Error())
	}
	return sets
}

// ErrNotLoopback says that configuration would be served in clear to a network.
var ErrNotLoopback = errors.New("xDS without TLS is served on loopback only")

// CheckAddress refuses an address that is not loopback, because configuration
// is not served in clear off the machine.
func CheckAddress(a net.Addr) error {
	switch a := a.(type) {
	case *net.UnixAddr:
		return nil
	case *net.TCPAddr:
		if a.IP.IsLoopback() {
			return nil
		}
	}
	return fmt.Errorf("%w: %s is not; listen on 127.0.0.1:15010 or [::1]:15010", ErrNotLoopback, a)
}

// Secure is an address at which xDS is served to those who prove who they are.
type Secure struct {
	Listener net.Listener
	// Credentials verify a client's certificate where one is presented; a stream
	// needs one.
	Credentials credentials.TransportCredentials
	// TrustDomain of the mesh, which a client must be of.
	TrustDomain string
	// MaxAge of a connection, after which clients connect, and prove themselves,
	// again.
	MaxAge time.Duration
	// Register adds what else is served there.
	Register func(grpc.ServiceRegistrar)
}

// Serve answers in clear on lis, which must be a loopback address, and over TLS
// at the addresses in secure, until ctx ends, and returns nil once all streams
// have ended. It closes the listeners. Streams that do not end within 3 s are
// cut.
func (s *Server) Serve(ctx context.Context, lis net.Listener, secure ...Secure) error {
	if err := CheckAddress(lis.Addr()); err != nil {
		for _, sec := range secure {
			err = errors.Join(err, sec.Listener.Close())
		}
		return errors.Join(err, lis.Close())
	}
	streams, endStreams := context.WithCancel(context.WithoutCancel(ctx))
	defer endStreams()
	logger := libraryLogger(streams, s.log)
	withLogger := func(o *config.Opts) { o.Logger = logger }
	// An empty request means "everything" only for listeners and clusters.
	noWildcard := config.DeactivateLegacyWildcardForTypes([]string{xds.RouteType, xds.EndpointType})
	// One for all addresses, so that the numbers of streams are theirs alone.
	ads := serverv3.NewServerAdvanced(
		restv3.NewServer(s.cache, s.tracker),
		sotwv3.NewServer(streams, s.cache, s.tracker, withLogger, noWildcard, sotwv3.WithOrderedADS()),
		deltav3.NewServer(streams, s.cache, s.tracker, withLogger, noWildcard),
	)
	plain := grpc.NewServer(serverOptions()...)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(plain, ads)
	servers, listeners := []*grpc.Server{plain}, []net.Listener{lis}
	for _, sec := range secure {
		g := grpc.NewServer(append(serverOptions(), grpc.Creds(sec.Credentials), grpc.StreamInterceptor(s.guard(sec.TrustDomain)), //nolint:contextcheck // a stream brings its own
			grpc.MaxHeaderListSize(maxHeader), grpc.ConnectionTimeout(handshakeTimeout),
			grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, MaxConnectionAge: sec.MaxAge, MaxConnectionAgeGrace: keepaliveTimeout}))...)
		discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, ads)
		if sec.Register != nil {
			sec.Register(g)
		}
		servers, listeners = append(servers, g), append(listeners, sec.Listener)
	}

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.sweep(streams) })
	stopped := make(chan struct{})
	defer close(stopped)
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-stopped:
		}
		endStreams()
		var ends sync.WaitGroup
		for _, g := range servers {
			ends.Go(func() {
				cut := time.AfterFunc(stopTimeout, g.Stop)
				g.GracefulStop()
				cut.Stop()
			})
		}
		ends.Wait()
	})
	ended := make(chan error, len(servers))
	for i, g := range servers {
		wg.Go(func() {
			if err := g.Serve(listeners[i]); err != nil {
				ended <- fmt.Errorf("serve xDS on %s: %w", listeners[i].Addr(), err)
				return
			}
			ended <- nil
		})
	}
	err := <-ended // the first to end ends all
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func serverOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxConcurrentStreams(maxStreamsPerConnection),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// sweep removes what is past its grace period, and pushes what was held back
// for long enough, until ctx ends.
func (s *Server) sweep(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.wake:
		}
		timer.Stop()
		if next := s.cache.sweep(); !next.IsZero() {
			timer.Reset(max(time.Until(next), time.Millisecond))
		}
	}
}

func libraryLogger(ctx context.Context, l *slog.Logger) log.Logger {
	at := func(level slog.Level) func(string, ...any) {
		return func(format string, args ...any) {
			if l.Enabled(ctx, level) {
				l.Log(ctx, level, fmt.Sprintf(format, args...), "log.logger", "go-control-plane")
			}
		}
	}
	// Its information is one line per watch: detail.
	return log.LoggerFuncs{DebugFunc: at(slog.LevelDebug), InfoFunc: at(slog.LevelDebug), WarnFunc: at(slog.LevelWarn), ErrorFunc: at(slog.LevelError)}
}

type metrics struct {
	connected *prometheus.GaugeVec
	acks      *prometheus.CounterVec
	nacks     *prometheus.CounterVec
	refused   *prometheus.CounterVec
	resources *prometheus.GaugeVec
	changed   *prometheus.CounterVec
	ordering  *prometheus.CounterVec
	foreign   prometheus.Counter
	push      prometheus.Histogram

	propagation prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		connected: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_xds_connected", Help: "Data planes connected.",
		}, []string{"data_plane"}),
		acks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_xds_acks_total", Help: "Responses that a data plane acknowledged.",
		}, []string{"type"}),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_xds_nacks_total", Help: "Responses that a data plane rejected.",
		}, []string{"type"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_xds_refused_total", Help: "Streams ended because a limit was hit or a request was not acceptable.",
		}, []string{"reason"}),
		resources: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "outrigger_xds_resources", Help: "Resources that are served.",
		}, []string{"data_plane", "type"}),
		changed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_xds_resource_changes_total", Help: "Resources that a publish added, changed or removed, over all data planes.",
		}, []string{"type"}),
		ordering: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_xds_ordering_timeouts_total",
			Help: "Listeners and routes that an Envoy was sent without having acknowledged, for 2 s, the clusters that they lead to, by response.",
		}, []string{"type"}),
		foreign: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_xds_foreign_listeners_total",
			Help: "Subscriptions to the inbound listener of another pod, which are answered that it does not exist.",
		}),
		push: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "outrigger_xds_push_duration_seconds", Help: "From the publish of a change to its acknowledgement by a data plane.",
			Buckets:                     prometheus.ExponentialBuckets(0.001, 2, 15),
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
		}),
	}
	m.propagation = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "outrigger_xds_propagation_seconds", Help: "From when a change of endpoints was seen to its acknowledgement by the last of the proxies that ask for them.",
		Buckets:                     prometheus.ExponentialBuckets(0.001, 2, 15),
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100,
	})
	for _, dp := range xds.DataPlanes() {
		m.connected.WithLabelValues(string(dp))
	}
	for _, t := range xds.TypeURLs() {
		m.acks.WithLabelValues(shortType(t))
		m.nacks.WithLabelValues(shortType(t))
	}
	for _, t := range []string{xds.ListenerType, xds.RouteType} {
		m.ordering.WithLabelValues(shortType(t))
	}
	reg.MustRegister(m.connected, m.acks, m.nacks, m.refused, m.resources, m.changed, m.ordering, m.foreign, m.push, m.propagation)
	return m
}
