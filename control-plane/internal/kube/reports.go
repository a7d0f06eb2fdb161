package kube

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
)

const (
	// reportExpires: three reports have not come.
	reportExpires = 3 * reporting.Every
	// reportGap is how soon after a report the next of the same proxy is taken.
	reportGap = 100 * time.Millisecond
	// mostReports is how many proxies may report to one replica: as many as may be
	// connected.
	mostReports = 10000
	// freshFor is how long a summary is good enough, at least; and it is for so many
	// times as long as it took to make it, so that very many proxies do not cost more
	// than a twentieth of a CPU, but for no longer than freshAtMost.
	freshFor    = lookEveryStatus / 2
	freshTimes  = 20
	freshAtMost = 20 * time.Second
)

// ReportsOptions say where what is known comes from. All are required.
type ReportsOptions struct {
	// Pod is the name of this replica.
	Pod string
	// TrustDomain that a proxy must be of.
	TrustDomain string
	State       func() *rebuild.State
	// Progress and Nodes are those of discovery.Server.
	Progress func([]discovery.Interest) []discovery.Progress
	Nodes    func() map[string]bool
}

// Reports gathers what the proxies that are connected to this replica say of their
// breakers and have acknowledged of their configuration, and tells the other
// replicas in a ConfigMap. Its methods are safe for concurrent use.
type Reports struct {
	c       *Cluster
	o       ReportsOptions
	counted *prometheus.CounterVec

	mu     sync.Mutex
	byNode map[string]proxyReport
	last   summary
	lastAt time.Time
	fresh  time.Duration // for how long it is

	published map[string]counts // by Run only

	pollMu sync.Mutex
	polled time.Time
	others map[string]other
}

type proxyReport struct {
	at     time.Time
	report reporting.Report
}

// CollectReports makes Reports. What Register adds must be served, and Run be run.
func (c *Cluster) CollectReports(o ReportsOptions) *Reports {
	r := &Reports{
		c: c, o: o, byNode: map[string]proxyReport{}, others: map[string]other{},
		counted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_proxy_reports_total", Help: "Reports of proxies on their circuit breakers: accepted, identity (not proved, or not of that pod), malformed, limited.",
		}, []string{"result"}),
	}
	c.o.Registry.MustRegister(r.counted)
	return r
}

// Register adds the service to a server that verifies the certificates of clients.
func (r *Reports) Register(s grpc.ServiceRegistrar) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: reporting.Service, HandlerType: (*reportHandler)(nil), Metadata: "control-plane/reporting",
		Methods: []grpc.MethodDesc{{MethodName: strings.TrimPrefix(reporting.Method, "/"+reporting.Service+"/"), Handler: func(srv any, ctx context.Context, decode func(any) error, around grpc.UnaryServerInterceptor) (any, error) {
			in := new(structpb.Struct)
			if err := decode(in); err != nil {
				return nil, err
			}
			h, ok := srv.(reportHandler)
			if !ok {
				return nil, grpcstatus.Error(codes.Internal, "nobody takes reports")
			}
			if around == nil {
				return h.take(ctx, in, time.Now())
			}
			return around(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: reporting.Method}, func(ctx context.Context, req any) (any, error) {
				in, ok := req.(*structpb.Struct)
				if !ok {
					return nil, grpcstatus.Error(codes.Internal, "no request")
				}
				return h.take(ctx, in, time.Now())
			})
		}}},
	}, reportHandler(r))
}

type reportHandler interface {
	take(ctx context.Context, in *structpb.Struct, now time.Time) (*emptypb.Empty, error)
}

// take is the call Report.
func (r *Reports) take(ctx context.Context, in *structpb.Struct, now time.Time) (*emptypb.Empty, error) {
	refuse := func(result string, code codes.Code, format string, args ...any) (*emptypb.Empty, error) {
		r.counted.WithLabelValues(result).Inc()
		return nil, grpcstatus.Errorf(code, format, args...)
	}
	id, err := proved(ctx, r.o.TrustDomain)
	if err != nil {
		return refuse("identity", codes.Unauthenticated, "%v", err)
	}
	report, err := reporting.Decode(in)
	if err != nil {
		return refuse("malformed", codes.InvalidArgument, "%v", err)
	}
	// A certificate says of which account a pod is; which pods are, the cluster does.
	pod, ok := strings.CutSuffix(report.Node, "."+id.Namespace)
	if !ok {
		return refuse("identity", codes.PermissionDenied, "node %q is not <pod>.%s, and its client has proved that it is %s", report.Node, id.Namespace, id)
	}
	p, ok := r.c.source.Pod(types.NamespacedName{Namespace: id.Namespace, Name: pod})
	if !ok {
		return refuse("identity", codes.FailedPrecondition, "no pod %s/%s is known here yet; report again later", id.Namespace, pod)
	}
	if p.Spec.ServiceAccountName != id.ServiceAccount {
		return refuse("identity", codes.PermissionDenied, "pod %s/%s is of service account %q, and its client has proved that it is %s", id.Namespace, pod, p.Spec.ServiceAccountName, id)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	old, known := r.byNode[report.Node]
	switch {
	case known && now.Sub(old.at) < reportGap:
		return refuse("limited", codes.ResourceExhausted, "the last report came %s ago; wait for %s", now.Sub(old.at), reportGap)
	case !known && len(r.byNode) >= mostReports:
		return refuse("limited", codes.ResourceExhausted, "%d proxies report here, the most that one replica takes", len(r.byNode))
	}
	for i := range report.Changes {
		c := &report.Changes[i]
		if !c.Time.After(now) {
			continue
		}
		// Its clock is ahead. The change came with this report, or an earlier one.
		c.Time = now
		if j := slices.IndexFunc(old.report.Changes, func(o reporting.Change) bool { return o.ID == c.ID }); j >= 0 {
			c.Time = old.report.Changes[j].Time
		}
	}
	r.byNode[report.Node] = proxyReport{now, report}
	r.counted.WithLabelValues("accepted").Inc()
	return &emptypb.Empty{}, nil
}

// proved is who the client is. That its certificate is good, the handshake has
// verified.
func proved(ctx context.Context, trustDomain string) (identity.Identity, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return identity.Identity{}, errors.New("the client is unknown")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return identity.Identity{}, errors.New("reports are taken from those who present a client certificate: get one from the authority (Sign) first")
	}
	id, err := identity.OfCertificate(info.State.PeerCertificates[0])
	if err == nil && id.TrustDomain != trustDomain {
		err = errors.New("it is of another trust domain than " + trustDomain)
	}
	return id, err
}

// own is what this replica knows.
func (r *Reports) own(now time.Time) summary {
	r.mu.Lock()
	defer r.mu.Unlock()
	state := r.o.State()
	if state == nil || now.Sub(r.lastAt) < r.fresh {
		return r.last
	}
	started := time.Now()
	defer func() { r.fresh = min(max(freshFor, freshTimes*time.Since(started)), freshAtMost) }()
	for node, p := range r.byNode {
		if now.Sub(p.at) > reportExpires {
			delete(r.byNode, node)
		}
	}
	s := summary{Time: now, Objects: map[string]counts{}}
	r.addProgress(s, state)
	r.addBreakers(s, state)
	maps.DeleteFunc(s.Objects, func(_ string, c counts) bool { return reflect.ValueOf(c).IsZero() })
	r.last, r.lastAt = s, now
	return s
}

// sum is what all replicas know. It asks the API server now and then.
func (r *Reports) sum(ctx context.Context) totals {
	now := time.Now()
	t := totals{}
	t.add(r.own(now))
	for _, s := range r.fromOthers(ctx, now) {
		t.add(s)
	}
	return t
}

// Run tells the other replicas until ctx ends.
func (r *Reports) Run(ctx context.Context) error {
	if !r.c.source.WaitSynced(ctx) {
		return nil
	}
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	var told time.Time
	failed := false
	for {
		select {
		case <-ctx.Done():
			if !told.IsZero() {
				r.withdraw(context.WithoutCancel(ctx))
			}
			return nil
		case now := <-tick.C:
			s := r.own(now)
			if s.Time.IsZero() || now.Sub(told) < tellAgain && reflect.DeepEqual(s.Objects, r.published) {
				continue
			}
			err := r.tell(ctx, s)
			switch {
			case err == nil:
				told, r.published, failed = now, s.Objects, false
			case ctx.Err() == nil && !failed:
				failed = true
				r.c.log.Warn("the other replicas cannot be told what the proxies that are connected here say", "error.message", err.Error())
			}
		}
	}
}

func marshal(s summary) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic("kube: cannot encode a summary: " + err.Error()) // it is made of what JSON can say
	}
	return b
}
