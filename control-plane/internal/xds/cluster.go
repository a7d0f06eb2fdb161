package xds

import (
	"math"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const (
	// connectTimeout is how long a proxy tries one endpoint.
	connectTimeout = time.Second
	// noLimit in a threshold. Envoy takes a threshold that is absent for 1024.
	noLimit = math.MaxUint32
	// httpOptions is the key of typed_extension_protocol_options.
	httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
)

func cluster(key string, p mesh.Port, dp DataPlane) *clusterv3.Cluster {
	c := &clusterv3.Cluster{
		Name:                 key,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
		EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: fromADS()},
		ConnectTimeout:       durationpb.New(connectTimeout),
		LbPolicy:             clusterv3.Cluster_LEAST_REQUEST,
		LbConfig: &clusterv3.Cluster_LeastRequestLbConfig_{
			LeastRequestLbConfig: &clusterv3.Cluster_LeastRequestLbConfig{ChoiceCount: wrapperspb.UInt32(2)},
		},
		CircuitBreakers:  circuitBreakers(p, dp),
		OutlierDetection: outlierDetection(p.Breaker, dp),
	}
	if dp == GRPC {
		return c
	}
	if p.Protocol == mesh.HTTP2 || p.Protocol == mesh.GRPC {
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpOptions: packed(&httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
						Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
					},
				},
			},
		})}
	}
	if p.Protocol == mesh.Unknown && dp == Envoy {
		// What a connection has turned out to speak is gone on with. Our sidecar does so
		// by itself.
		c.TypedExtensionProtocolOptions = asDownstream()
	}
	c.Metadata = breakerMetadata(p.Breaker)
	if dp == Envoy {
		// Without this, Envoy sends requests to ejected and unready endpoints
		// once more than half of them are out: a breaker that closes under load.
		c.CommonLbConfig = &clusterv3.Cluster_CommonLbConfig{
			HealthyPanicThreshold: &typev3.Percent{Value: 0},
			// By default Envoy gathers changes of health for 1 s: the second endpoint
			// to be ejected would fail requests all that time.
			UpdateMergeWindow: durationpb.New(0),
		}
	}
	return c
}

// circuitBreakers states every threshold: what the user set, else no limit. In
// Observe none is enforced.
func circuitBreakers(p mesh.Port, dp DataPlane) *clusterv3.CircuitBreakers {
	var l mesh.Limits
	if p.Breaker != nil && !p.Breaker.Observe {
		l = p.Breaker.Limits
	}
	limit := func(v *uint32) *wrapperspb.UInt32Value {
		if v == nil {
			return wrapperspb.UInt32(noLimit)
		}
		return wrapperspb.UInt32(*v)
	}
	t := &clusterv3.CircuitBreakers_Thresholds{MaxRequests: limit(l.Requests)}
	if dp != GRPC {
		t.MaxConnections = limit(l.Connections)
		t.MaxPendingRequests = limit(l.PendingRequests)
		t.MaxRetries = limit(l.Retries)
		t.TrackRemaining = true
		// Envoy takes a budget to replace max_retries, so one that the user did
		// not write must not switch off the limit that the user did.
		if dp == Outrigger || l.Retries == nil {
			t.RetryBudget = &clusterv3.CircuitBreakers_Thresholds_RetryBudget{
				BudgetPercent:       &typev3.Percent{Value: float64(p.Budget.Percent)},
				MinRetryConcurrency: wrapperspb.UInt32(p.Budget.MinConcurrency),
			}
		}
	}
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{t}}
}

// outlierDetection states every enforcing field, because what is absent has a
// default of its own in Envoy (success rate: on) and another in gRPC.
func outlierDetection(b *mesh.CircuitBreaker, dp DataPlane) *clusterv3.OutlierDetection {
	if b == nil {
		return nil
	}
	if dp == GRPC {
		return outlierDetectionGRPC(b)
	}
	e := b.Ejection
	if e == nil && dp == Envoy {
		e = tripAsEjection(b.Trip)
	}
	if e == nil {
		return nil
	}
	enforcing := func(on bool) *wrapperspb.UInt32Value {
		if on && !b.Observe {
			return wrapperspb.UInt32(100)
		}
		return wrapperspb.UInt32(0)
	}
	od := &clusterv3.OutlierDetection{
		Consecutive_5Xx:                        count(e.Consecutive5xx),
		EnforcingConsecutive_5Xx:               enforcing(e.Consecutive5xx > 0),
		ConsecutiveGatewayFailure:              count(e.ConsecutiveGatewayErrors),
		EnforcingConsecutiveGatewayFailure:     enforcing(e.ConsecutiveGatewayErrors > 0),
		Interval:                               duration(e.Interval),
		BaseEjectionTime:                       duration(e.BaseEjectionTime),
		MaxEjectionPercent:                     wrapperspb.UInt32(e.MaxEjectionPercent),
		EnforcingSuccessRate:                   wrapperspb.UInt32(0),
		EnforcingFailurePercentage:             enforcing(e.FailurePercentage != nil),
		EnforcingConsecutiveLocalOriginFailure: wrapperspb.UInt32(0),
		EnforcingLocalOriginSuccessRate:        wrapperspb.UInt32(0),
		EnforcingFailurePercentageLocalOrigin:  wrapperspb.UInt32(0),
	}
	if f := e.FailurePercentage; f != nil {
		od.FailurePercentageThreshold = wrapperspb.UInt32(f.Threshold)
		od.FailurePercentageMinimumHosts = wrapperspb.UInt32(f.MinimumHosts)
		od.FailurePercentageRequestVolume = wrapperspb.UInt32(f.RequestVolume)
	}
	return od
}

// tripAsEjection approximates the service-level breaker for a proxy that can
// only eject endpoints: all of them may be out at once, for as long as the
// breaker would have been open. Nil where nothing of it can be said.
func tripAsEjection(t *mesh.Trip) *mesh.Ejection {
	if t == nil || (t.ConsecutiveFailures == 0 && t.FailureRatio == 0) {
		return nil
	}
	e := &mesh.Ejection{
		Consecutive5xx: t.ConsecutiveFailures, Interval: t.Window, BaseEjectionTime: t.OpenFor, MaxEjectionPercent: 100,
	}
	if t.FailureRatio > 0 {
		e.FailurePercentage = &mesh.FailurePercentage{
			Threshold: uint32(math.Round(t.FailureRatio * 100)), MinimumHosts: 1, RequestVolume: t.MinimumRequests,
		}
	}
	return e
}

// outlierDetectionGRPC says what gRPC understands (gRFC A50): a failure
// percentage, which must be exceeded, so that 100 could never eject. Counts of
// consecutive failures become "every request of an interval failed".
func outlierDetectionGRPC(b *mesh.CircuitBreaker) *clusterv3.OutlierDetection {
	if b.Observe {
		return nil
	}
	e := b.Ejection
	if e == nil {
		e = tripAsEjection(b.Trip)
	}
	if e == nil {
		return nil
	}
	f := e.FailurePercentage
	if f == nil {
		n := e.Consecutive5xx
		if n == 0 || (e.ConsecutiveGatewayErrors > 0 && e.ConsecutiveGatewayErrors < n) {
			n = e.ConsecutiveGatewayErrors
		}
		if n == 0 {
			return nil
		}
		f = &mesh.FailurePercentage{Threshold: 100, MinimumHosts: 1, RequestVolume: n}
	}
	return &clusterv3.OutlierDetection{
		Interval:                       duration(e.Interval),
		BaseEjectionTime:               duration(e.BaseEjectionTime),
		MaxEjectionPercent:             wrapperspb.UInt32(e.MaxEjectionPercent),
		EnforcingSuccessRate:           wrapperspb.UInt32(0),
		EnforcingFailurePercentage:     wrapperspb.UInt32(100),
		FailurePercentageThreshold:     wrapperspb.UInt32(min(f.Threshold, 99)),
		FailurePercentageMinimumHosts:  wrapperspb.UInt32(f.MinimumHosts),
		FailurePercentageRequestVolume: wrapperspb.UInt32(f.RequestVolume),
	}
}

func fromADS() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

// count leaves a counter that is not used absent.
func count(n uint32) *wrapperspb.UInt32Value {
	if n == 0 {
		return nil
	}
	return wrapperspb.UInt32(n)
}

// duration leaves a duration that is not set absent.
func duration(d time.Duration) *durationpb.Duration {
	if d <= 0 {
		return nil
	}
	return durationpb.New(d)
}
