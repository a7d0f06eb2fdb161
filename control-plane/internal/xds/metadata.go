package xds

import (
	"time"

	xdstypev3 "github.com/cncf/xds/go/xds/type/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const (
	// MetadataKey is the key of all metadata of ours.
	MetadataKey = "outrigger.dev"
	// BreakerMetadataType is the type_url inside a cluster's TypedStruct.
	BreakerMetadataType = "type.googleapis.com/outrigger.dev.v1alpha1.CircuitBreaker"
	// RetryMetadataType is the type_url inside a route's TypedStruct.
	RetryMetadataType = "type.googleapis.com/outrigger.dev.v1alpha1.RetryPolicy"
)

// fields collects the members of a Struct; a member that is zero is left out.
type fields map[string]*structpb.Value

func (f fields) text(name, v string) {
	if v != "" {
		f[name] = structpb.NewStringValue(v)
	}
}

func (f fields) count(name string, v uint32) {
	if v != 0 {
		f[name] = structpb.NewNumberValue(float64(v))
	}
}

func (f fields) limit(name string, v *uint32) {
	if v != nil {
		f[name] = structpb.NewNumberValue(float64(*v))
	}
}

func (f fields) ratio(name string, v float64) {
	if v != 0 {
		f[name] = structpb.NewNumberValue(v)
	}
}

func (f fields) duration(name string, v time.Duration) {
	if v != 0 {
		f[name] = structpb.NewStringValue(v.String())
	}
}

func (f fields) words(name string, v []string) {
	if len(v) == 0 {
		return
	}
	list := &structpb.ListValue{}
	for _, w := range v {
		list.Values = append(list.Values, structpb.NewStringValue(w))
	}
	f[name] = structpb.NewListValue(list)
}

func (f fields) object(name string, v fields) {
	if len(v) > 0 {
		f[name] = structpb.NewStructValue(&structpb.Struct{Fields: v})
	}
}

func typedMetadata(typeURL string, f fields) *corev3.Metadata {
	return &corev3.Metadata{TypedFilterMetadata: map[string]*anypb.Any{
		MetadataKey: packed(&xdstypev3.TypedStruct{TypeUrl: typeURL, Value: &structpb.Struct{Fields: f}}),
	}}
}

func breakerMetadata(b *mesh.CircuitBreaker) *corev3.Metadata {
	if b == nil {
		return nil
	}
	f := fields{}
	f.text("policy", b.Policy)
	f.text("mode", "Enforce")
	if b.Observe {
		f.text("mode", "Observe")
		limits := fields{}
		limits.limit("connections", b.Limits.Connections)
		limits.limit("pendingRequests", b.Limits.PendingRequests)
		limits.limit("requests", b.Limits.Requests)
		limits.limit("retries", b.Limits.Retries)
		f.object("limits", limits)
	}
	if t := b.Trip; t != nil {
		trip := fields{}
		trip.count("consecutiveFailures", t.ConsecutiveFailures)
		trip.ratio("failureRatio", t.FailureRatio)
		trip.duration("slowCallThreshold", t.SlowCallThreshold)
		trip.ratio("slowCallRatio", t.SlowCallRatio)
		trip.count("minimumRequests", t.MinimumRequests)
		trip.duration("window", t.Window)
		trip.duration("openFor", t.OpenFor)
		trip.count("halfOpenRequests", t.HalfOpenRequests)
		trip.words("failureOn", t.FailureOn)
		f.object("trip", trip)
	}
	if e := b.Ejection; e != nil {
		ejection := fields{}
		ejection.count("consecutive5xx", e.Consecutive5xx)
		ejection.count("consecutiveGatewayErrors", e.ConsecutiveGatewayErrors)
		ejection.duration("interval", e.Interval)
		ejection.duration("baseEjectionTime", e.BaseEjectionTime)
		ejection.count("maxEjectionPercent", e.MaxEjectionPercent)
		if p := e.FailurePercentage; p != nil {
			percentage := fields{}
			percentage.count("threshold", p.Threshold)
			percentage.count("minimumHosts", p.MinimumHosts)
			percentage.count("requestVolume", p.RequestVolume)
			ejection.object("failurePercentage", percentage)
		}
		f.object("ejection", ejection)
	}
	return typedMetadata(BreakerMetadataType, f)
}

func retryMetadata(r mesh.Retry) *corev3.Metadata {
	if r.Policy == "" && len(r.IdempotentOn) == 0 {
		return nil
	}
	f := fields{}
	f.text("policy", r.Policy)
	f.words("idempotentOn", r.IdempotentOn)
	return typedMetadata(RetryMetadataType, f)
}
