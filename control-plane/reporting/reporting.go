// Package reporting is what a proxy tells the control plane of its circuit
// breakers: one gRPC call whose messages are well-known types, so that a client
// needs no generated code of ours.
//
//	/outrigger.v1.Reporting/Report
//	  request   google.protobuf.Struct {
//	    node: <pod>.<namespace>, workload,
//	    breakers: [{policy, target, state}],
//	    changes:  [{id, policy, target, state, observe, time, reason}]}
//	  response  google.protobuf.Empty
//
// A report is all that there is to say, and takes the place of the one before. It
// is sent on each change, on each connection, and every Every. Fields that are not
// known are ignored, so that a newer proxy can talk to an older control plane.
//
// It is a contract: it knows the form of the messages and their limits, and
// neither who may report for which proxy nor what becomes of it.
package reporting

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"
)

// Names of the call.
const (
	Service = "outrigger.v1.Reporting"
	Method  = "/" + Service + "/Report"
)

// Every is how often a report is repeated that has not changed. One that has not
// come for three times as long is of a proxy that is gone.
const Every = 60 * time.Second

// Limits of a report.
const (
	// MaxBreakers is how many destinations one proxy may have.
	MaxBreakers = 1024
	MaxChanges  = 16
	MaxReason   = 512 // bytes
	maxNode     = 253 + 1 + 63
	maxWorkload = 253
	maxPolicy   = 63 + 1 + 253
	maxTarget   = 63 + 1 + 63 + 1 + 5
	maxID       = 64
)

// State of a breaker.
type State string

// The states. In Observe mode it is what the state would be.
const (
	Closed   State = "closed"
	Open     State = "open"
	HalfOpen State = "half-open"
)

// Report is what one proxy says.
type Report struct {
	// Node is the xDS node id, <pod>.<namespace>.
	Node     string
	Workload string
	Breakers []Breaker
	// Changes are the last, oldest first.
	Changes []Change
}

// Breaker is the one that the proxy keeps for a port.
type Breaker struct {
	Policy string // <namespace>/<name> of the CircuitBreaker
	Target string // <namespace>/<service>:<port>
	State  State
}

// Change is a breaker that has opened or closed.
type Change struct {
	ID             string // of the evidence
	Policy, Target string
	State          State // Open or Closed
	// Observe: it is what would have happened.
	Observe bool
	Time    time.Time
	// Reason with its arithmetic.
	Reason string
}

// Encode writes the report. What exceeds a limit is cut off.
func (r Report) Encode() *structpb.Struct {
	breakers := make([]*structpb.Value, 0, len(r.Breakers))
	for _, b := range r.Breakers[:min(len(r.Breakers), MaxBreakers)] {
		breakers = append(breakers, object(map[string]*structpb.Value{"policy": text(b.Policy), "target": text(b.Target), "state": text(string(b.State))}))
	}
	changes := make([]*structpb.Value, 0, MaxChanges)
	for _, c := range r.Changes[max(len(r.Changes)-MaxChanges, 0):] {
		changes = append(changes, object(map[string]*structpb.Value{
			"id": text(c.ID), "policy": text(c.Policy), "target": text(c.Target), "state": text(string(c.State)), "observe": structpb.NewBoolValue(c.Observe),
			"time": text(c.Time.UTC().Format(time.RFC3339Nano)), "reason": text(cut(c.Reason)),
		}))
	}
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		"node": text(r.Node), "workload": text(r.Workload), "breakers": list(breakers), "changes": list(changes),
	}}
}

func text(s string) *structpb.Value { return structpb.NewStringValue(strings.ToValidUTF8(s, "")) }

func object(fields map[string]*structpb.Value) *structpb.Value {
	return structpb.NewStructValue(&structpb.Struct{Fields: fields})
}

func list(values []*structpb.Value) *structpb.Value {
	return structpb.NewListValue(&structpb.ListValue{Values: values})
}

func cut(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > MaxReason {
		s = strings.ToValidUTF8(s[:MaxReason-3], "") + "..."
	}
	return s
}

// Decode reads what Encode writes. An error names the field.
func Decode(s *structpb.Struct) (Report, error) {
	d := decoder{}
	top := s.GetFields()
	r := Report{
		Node:     d.name("node", top["node"], maxNode, "."),
		Workload: d.name("workload", top["workload"], maxWorkload, ""),
	}
	seen := map[[2]string]bool{}
	for i, f := range d.list("breakers", top["breakers"], MaxBreakers) {
		at := func(name string) string { return fmt.Sprintf("breakers[%d].%s", i, name) }
		b := Breaker{
			Policy: d.name(at("policy"), f["policy"], maxPolicy, "/"), Target: d.name(at("target"), f["target"], maxTarget, "/:"),
			State: d.state(at("state"), f["state"], Closed, Open, HalfOpen),
		}
		if k := [2]string{b.Policy, b.Target}; seen[k] {
			d.fail(at("target"), "%s is there twice", b.Target)
		} else {
			seen[k] = true
		}
		r.Breakers = append(r.Breakers, b)
	}
	for i, f := range d.list("changes", top["changes"], MaxChanges) {
		at := func(name string) string { return fmt.Sprintf("changes[%d].%s", i, name) }
		r.Changes = append(r.Changes, Change{
			ID:     d.name(at("id"), f["id"], maxID, ""),
			Policy: d.name(at("policy"), f["policy"], maxPolicy, "/"), Target: d.name(at("target"), f["target"], maxTarget, "/:"),
			State: d.state(at("state"), f["state"], Closed, Open), Observe: d.flag(at("observe"), f["observe"]),
			Time: d.time(at("time"), f["time"]), Reason: d.words(at("reason"), f["reason"]),
		})
	}
	if d.err != nil {
		return Report{}, d.err
	}
	return r, nil
}

// decoder keeps the first error.
type decoder struct{ err error }

func (d *decoder) fail(field, format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...))
	}
}

// list is one of objects; none where it is absent.
func (d *decoder) list(field string, v *structpb.Value, most int) []map[string]*structpb.Value {
	if v == nil {
		return nil
	}
	l, ok := v.GetKind().(*structpb.Value_ListValue)
	if !ok {
		d.fail(field, "it is no list")
		return nil
	}
	values := l.ListValue.GetValues()
	if len(values) > most {
		d.fail(field, "%d items; at most %d", len(values), most)
		return nil
	}
	out := make([]map[string]*structpb.Value, 0, len(values))
	for i, v := range values {
		o, ok := v.GetKind().(*structpb.Value_StructValue)
		if !ok {
			d.fail(fmt.Sprintf("%s[%d]", field, i), "it is no object")
			return nil
		}
		out = append(out, o.StructValue.GetFields())
	}
	return out
}

func (d *decoder) string(field string, v *structpb.Value, most int) string {
	s, ok := v.GetKind().(*structpb.Value_StringValue)
	switch {
	case !ok:
		d.fail(field, "it is no string")
	case len(s.StringValue) > most:
		d.fail(field, "%d bytes; at most %d", len(s.StringValue), most)
	default:
		return s.StringValue
	}
	return ""
}

// name is one of Kubernetes, or some with these characters between them, in this
// order and once each; the last dot counts.
func (d *decoder) name(field string, v *structpb.Value, most int, between string) string {
	s := d.string(field, v, most)
	rest := s
	for _, b := range between {
		i := strings.LastIndexByte(rest, byte(b))
		if b != '.' {
			i = strings.IndexByte(rest, byte(b))
		}
		if i < 0 || !plain(rest[:i]) {
			d.fail(field, "%q is not names with %q between them", s, between)
			return ""
		}
		rest = rest[i+1:]
	}
	if !plain(rest) {
		d.fail(field, "%q is no name", s)
		return ""
	}
	return s
}

// plain says whether it has the letters of a name (RFC 1123), if not its form.
func plain(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return false
		}
	}
	return s != ""
}

func (d *decoder) state(field string, v *structpb.Value, allowed ...State) State {
	s := State(d.string(field, v, maxID))
	for _, a := range allowed {
		if s == a {
			return s
		}
	}
	d.fail(field, "%q is none of %q", s, allowed)
	return ""
}

func (d *decoder) flag(field string, v *structpb.Value) bool {
	if v == nil {
		return false
	}
	b, ok := v.GetKind().(*structpb.Value_BoolValue)
	if !ok {
		d.fail(field, "it is neither true nor false")
		return false
	}
	return b.BoolValue
}

func (d *decoder) time(field string, v *structpb.Value) time.Time {
	s := d.string(field, v, maxID)
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 2000 || t.Year() > 9998 { // which JSON can say in any zone
		d.fail(field, "%q is no time as RFC 3339 has it", s)
		return time.Time{}
	}
	return t.UTC()
}

func (d *decoder) words(field string, v *structpb.Value) string {
	s := d.string(field, v, MaxReason)
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		d.fail(field, "it has characters that are no text")
		return ""
	}
	return s
}
