package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// SourceAnnotation says where an object was read, as "payments.yaml:12". The
// reader of a folder sets it; problems repeat it.
const SourceAnnotation = "outrigger.dev/source"

// KindFile is the Kind of a Problem with a file rather than with an object in
// it; the Name is the file's.
const KindFile = "File"

// Reason classifies a Problem in the words of GEP-713 and the Gateway API, so
// that it can be the reason of a status condition as it is.
type Reason string

// The reasons.
const (
	// ReasonInvalid: a value is out of range, malformed or missing. The object,
	// or the part that the message names, is not applied.
	ReasonInvalid = Reason(gatewayv1.PolicyReasonInvalid)
	// ReasonConflicted: an older object claims the same target or name.
	ReasonConflicted = Reason(gatewayv1.PolicyReasonConflicted)
	// ReasonTargetNotFound: a targetRef names nothing that exists.
	ReasonTargetNotFound = Reason(gatewayv1.PolicyReasonTargetNotFound)
	// ReasonUnsupported: valid, but this version does not honour it.
	ReasonUnsupported Reason = "Unsupported"
	// ReasonNoMatchingParent: a parentRef names no Service, or no port of it.
	ReasonNoMatchingParent = Reason(gatewayv1.RouteReasonNoMatchingParent)
	// ReasonBackendNotFound: a backendRef names no Service, or no port of it.
	ReasonBackendNotFound = Reason(gatewayv1.RouteReasonBackendNotFound)
	// ReasonRefNotPermitted: a reference into another namespace.
	ReasonRefNotPermitted = Reason(gatewayv1.RouteReasonRefNotPermitted)
	// ReasonInvalidKind: a reference to a kind that cannot be a backend.
	ReasonInvalidKind = Reason(gatewayv1.RouteReasonInvalidKind)
	// ReasonUnsupportedProtocol: HTTP routing or retries for a port that does
	// not speak HTTP.
	ReasonUnsupportedProtocol = Reason(gatewayv1.RouteReasonUnsupportedProtocol)
	// ReasonIncompatibleFilters: filters that exclude each other in one rule.
	ReasonIncompatibleFilters = Reason(gatewayv1.RouteReasonIncompatibleFilters)
	// ReasonNotEnforced: nothing stands where the policy would be enforced.
	ReasonNotEnforced Reason = "NotEnforced"
)

// Problem is one thing that is wrong with one object.
type Problem struct {
	Kind      string
	Namespace string
	Name      string
	// Source is file:line, or empty for objects that come from a cluster.
	Source string
	// Field is the path of the offending field, or empty.
	Field  string
	Reason Reason
	// Message names the value and the remedy.
	Message string
}

// String returns "CircuitBreaker shop/payments (payments.yaml:1):
// spec.trip.failureRatio: message".
func (p Problem) String() string {
	var s strings.Builder
	s.WriteString(p.Kind)
	name := p.Name
	if p.Namespace != "" {
		name = p.Namespace + "/" + p.Name
	}
	switch {
	case p.Source == "" || p.Source == name:
		s.WriteString(" " + name)
	case p.Kind == KindFile:
		s.WriteString(" " + p.Source)
	case name == "":
		s.WriteString(" in " + p.Source)
	default:
		s.WriteString(" " + name + " (" + p.Source + ")")
	}
	if p.Field != "" {
		s.WriteString(": " + p.Field)
	}
	s.WriteString(": " + p.Message)
	return s.String()
}

// sortProblems sorts by object, field and text and removes repetitions.
func sortProblems(ps []Problem) []Problem {
	slices.SortFunc(ps, func(a, b Problem) int {
		return cmp.Or(
			cmp.Compare(a.Kind, b.Kind),
			cmp.Compare(a.Namespace, b.Namespace),
			cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.Source, b.Source),
			cmp.Compare(a.Field, b.Field),
			cmp.Compare(a.Reason, b.Reason),
			cmp.Compare(a.Message, b.Message),
		)
	})
	return slices.Compact(ps)
}

// report collects the problems of one object, or of a part of it.
type report struct {
	b   *builder
	at  Problem
	bad bool
	// found gathers what its status is made of, over all parts of the object.
	found *[]Problem
}

func (b *builder) on(kind string, o metav1.Object) *report {
	return &report{
		b: b, found: new([]Problem),
		at: Problem{Kind: kind, Namespace: o.GetNamespace(), Name: o.GetName(), Source: source(o)},
	}
}

// part is a report on a part of the same object that can be bad on its own.
func (r *report) part() *report { return &report{b: r.b, at: r.at, found: r.found} }

// add reports a problem and marks the object, or the part, as bad.
func (r *report) add(field string, reason Reason, format string, args ...any) {
	*r.found = append(*r.found, r.note(field, reason, format, args...))
	r.bad = true
}

// note reports a problem that keeps nothing of the object from being used.
func (r *report) note(field string, reason Reason, format string, args ...any) Problem {
	p := r.at
	p.Field, p.Reason, p.Message = field, reason, fmt.Sprintf(format, args...)
	r.b.problems = append(r.b.problems, p)
	return p
}

// remark is a note on an object that need not be meant for a mesh. In a cluster
// it is none: kube-system and others' controllers are full of such objects, and
// whoever refers to one is told then. In a folder somebody wrote it for us.
func (r *report) remark(field string, reason Reason, format string, args ...any) {
	if r.at.Source != "" {
		r.note(field, reason, format, args...)
	}
}

func source(o metav1.Object) string { return o.GetAnnotations()[SourceAnnotation] }

func parenthesised(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func at(field string, i int) string { return fmt.Sprintf("%s[%d]", field, i) }
