package xdsclient

import (
	"fmt"
	"math"
	"strings"
	"time"

	xdstypev3 "github.com/cncf/xds/go/xds/type/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// What Envoy's own fields have no word for travels under this key of the
// metadata, as a TypedStruct of one of these types.
const (
	metadataKey     = "outrigger.dev"
	breakerTypeName = "outrigger.dev.v1alpha1.CircuitBreaker"
	retryTypeName   = "outrigger.dev.v1alpha1.RetryPolicy"
)

// typed returns our metadata of the type, or nil. Metadata of a type that is
// not known is for a later version of the sidecar, and ignored.
func typed(m *corev3.Metadata, typeName string) (*structpb.Struct, error) {
	a := m.GetTypedFilterMetadata()[metadataKey]
	if a == nil || !a.MessageIs((*xdstypev3.TypedStruct)(nil)) {
		return nil, nil // absent is not a failure
	}
	var t xdstypev3.TypedStruct
	if err := proto.Unmarshal(a.GetValue(), &t); err != nil {
		return nil, fmt.Errorf("metadata.typed_filter_metadata[%s]: %w", metadataKey, err)
	}
	if t.GetTypeUrl()[strings.LastIndexByte(t.GetTypeUrl(), '/')+1:] != typeName {
		return nil, nil // of another type
	}
	return t.GetValue(), nil
}

// members reads a Struct. Members that are absent or null leave what they are
// read into; one of a wrong type is the error that err returns, the first wins.
// Members that nobody reads are ignored.
type members struct {
	path   string
	fields map[string]*structpb.Value
	fault  *error
}

func newMembers(path string, s *structpb.Struct) members {
	return members{path: path, fields: s.GetFields(), fault: new(error)}
}

func (m members) err() error { return *m.fault }

func (m members) wrong(name, want string, v *structpb.Value) {
	if *m.fault != nil {
		return
	}
	said := fmt.Sprint(v.AsInterface())
	if _, ok := v.GetKind().(*structpb.Value_StringValue); ok {
		said = fmt.Sprintf("%q", said)
	}
	*m.fault = fmt.Errorf("%s.%s: %.100s is not %s", m.path, name, said, want)
}

// get returns nil for a member that is absent or null.
func (m members) get(name string) *structpb.Value {
	v := m.fields[name]
	switch v.GetKind().(type) {
	case nil, *structpb.Value_NullValue:
		return nil
	}
	return v
}

func (m members) text(name string, out *string) {
	v := m.get(name)
	if v == nil {
		return
	}
	s, ok := v.GetKind().(*structpb.Value_StringValue)
	if !ok {
		m.wrong(name, "a string", v)
		return
	}
	*out = s.StringValue
}

func (m members) count(name string, out *uint32) {
	v := m.get(name)
	if v == nil {
		return
	}
	n, ok := v.GetKind().(*structpb.Value_NumberValue)
	if !ok || n.NumberValue < 0 || n.NumberValue > math.MaxUint32 || n.NumberValue != math.Trunc(n.NumberValue) {
		m.wrong(name, "a whole number from 0 to 4294967295", v)
		return
	}
	*out = uint32(n.NumberValue)
}

func (m members) ratio(name string, out *float64) {
	v := m.get(name)
	if v == nil {
		return
	}
	n, ok := v.GetKind().(*structpb.Value_NumberValue)
	if !ok || !(n.NumberValue >= 0 && n.NumberValue <= 1) {
		m.wrong(name, "a number from 0 to 1", v)
		return
	}
	*out = n.NumberValue
}

func (m members) duration(name string, out *time.Duration) {
	v := m.get(name)
	if v == nil {
		return
	}
	_, isText := v.GetKind().(*structpb.Value_StringValue)
	d, err := time.ParseDuration(v.GetStringValue())
	if !isText || err != nil || d < 0 {
		m.wrong(name, `a duration such as "800ms"`, v)
		return
	}
	*out = d
}

func (m members) words(name string, out *[]string) {
	v := m.get(name)
	if v == nil {
		return
	}
	l, ok := v.GetKind().(*structpb.Value_ListValue)
	if !ok {
		m.wrong(name, "a list of strings", v)
		return
	}
	for _, w := range l.ListValue.GetValues() {
		s, ok := w.GetKind().(*structpb.Value_StringValue)
		if !ok {
			m.wrong(name, "a list of strings", v)
			return
		}
		*out = append(*out, s.StringValue)
	}
}

// object is ok where the member is there and is a Struct.
func (m members) object(name string) (members, bool) {
	v := m.get(name)
	if v == nil {
		return members{}, false
	}
	s, ok := v.GetKind().(*structpb.Value_StructValue)
	if !ok {
		m.wrong(name, "an object", v)
		return members{}, false
	}
	return members{path: m.path + "." + name, fields: s.StructValue.GetFields(), fault: m.fault}, true
}

func breakerMetadata(meta *corev3.Metadata, out *table.Cluster) error {
	s, err := typed(meta, breakerTypeName)
	if s == nil || err != nil {
		return err
	}
	m := newMembers("metadata.CircuitBreaker", s)
	m.text("policy", &out.Policy)
	observe, err := mode(m)
	if err != nil {
		return err
	}
	if t, ok := m.object("trip"); ok {
		if out.Breaker, err = trip(t, out.Policy, observe); err != nil {
			return err
		}
	}
	if !observe {
		return m.err()
	}
	// In Observe the standard fields enforce nothing, so everything is here.
	out.LimitsObserve = true
	if l, ok := m.object("limits"); ok {
		l.count("connections", &out.Limits.Connections)
		l.count("pendingRequests", &out.Limits.PendingRequests)
		l.count("requests", &out.Limits.Requests)
		l.count("retries", &out.Limits.Retries)
	}
	out.Outlier = nil
	if e, ok := m.object("ejection"); ok {
		out.Outlier = ejection(e)
	}
	return m.err()
}

func mode(m members) (observe bool, err error) {
	mode := "Enforce"
	m.text("mode", &mode)
	if mode != "Enforce" && mode != "Observe" {
		return false, fmt.Errorf("%s.mode: %.100q is neither Enforce nor Observe", m.path, mode)
	}
	return mode == "Observe", m.err()
}

func trip(t members, policy string, observe bool) (*breaker.Policy, error) {
	p := &breaker.Policy{Name: policy, Observe: observe, FailureOn: breaker.FailDefault}
	t.count("consecutiveFailures", &p.ConsecutiveFailures)
	t.ratio("failureRatio", &p.FailureRatio)
	t.duration("slowCallThreshold", &p.SlowCallThreshold)
	t.ratio("slowCallRatio", &p.SlowCallRatio)
	t.count("minimumRequests", &p.MinimumRequests)
	t.duration("window", &p.Window)
	t.duration("openFor", &p.OpenFor)
	t.count("halfOpenRequests", &p.HalfOpenRequests)
	var on []string
	t.words("failureOn", &on)
	if len(on) > 0 {
		f, err := breaker.ParseFailures(on)
		if err != nil {
			return nil, fmt.Errorf("%s.failureOn: %w", t.path, err)
		}
		p.FailureOn = f
	}
	if err := t.err(); err != nil {
		return nil, err
	}
	// Ratios need a window, and an open breaker an end.
	if (p.FailureRatio > 0 || p.SlowCallRatio > 0) && p.Window <= 0 {
		return nil, fmt.Errorf("%s.window: it is missing", t.path)
	}
	if p.OpenFor <= 0 {
		return nil, fmt.Errorf("%s.openFor: it is missing", t.path)
	}
	return p, nil
}

// ejection is the policy of an Observe, with Envoy's defaults.
func ejection(e members) *outlier.Policy {
	p := &outlier.Policy{Observe: true, Interval: 10 * time.Second, BaseEjectionTime: 30 * time.Second, MaxEjectionPercent: 10}
	e.count("consecutive5xx", &p.Consecutive5xx)
	e.count("consecutiveGatewayErrors", &p.ConsecutiveGatewayErrors)
	e.duration("interval", &p.Interval)
	e.duration("baseEjectionTime", &p.BaseEjectionTime)
	e.count("maxEjectionPercent", &p.MaxEjectionPercent)
	if f, ok := e.object("failurePercentage"); ok {
		f.count("threshold", &p.FailurePercentage.Threshold)
		f.count("minimumHosts", &p.FailurePercentage.MinimumHosts)
		f.count("requestVolume", &p.FailurePercentage.RequestVolume)
	}
	return p
}

func retryMetadata(meta *corev3.Metadata, out *retry.Policy) error {
	s, err := typed(meta, retryTypeName)
	if s == nil || err != nil {
		return err
	}
	m := newMembers("metadata.RetryPolicy", s)
	m.text("policy", &out.Name)
	var on []string
	m.words("idempotentOn", &on)
	if out.IdempotentOn, err = retry.ParseConditions(on); err != nil {
		return fmt.Errorf("%s.idempotentOn: %w", m.path, err)
	}
	return m.err()
}

func endpointMetadata(meta *corev3.Metadata, out *balance.Endpoint) error {
	m := newMembers("metadata.filter_metadata["+metadataKey+"]", meta.GetFilterMetadata()[metadataKey])
	m.text("instance", &out.Instance)
	m.text("workload", &out.Workload)
	return m.err()
}
