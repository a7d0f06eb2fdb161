package translate

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Status is what is to be said of one reference of an object: an entry of
// status.parents of a route, or of status.ancestors of a policy. Routes without
// a Service as parent have none: they are another controller's.
type Status struct {
	Kind      string
	Namespace string
	Name      string
	// Generation of the object that was looked at.
	Generation int64
	// Ref is the parentRef of a route as its spec has it, or the ancestorRef of a
	// policy. No two of one object are equal.
	Ref gatewayv1.ParentReference
	// Conditions have everything but the time of their last transition: Accepted
	// for all, ResolvedRefs for routes too.
	Conditions []metav1.Condition
	// Keys are the ports concerned, by mesh.Key, sorted: an object is in force when
	// the proxies that ask for them have acknowledged it. A route that was not
	// accepted has those it would be attached to where they are known.
	Keys []string
	// Consumer is the namespace whose proxies alone are concerned, for a consumer
	// route; empty for what is for all.
	Consumer string
	// Instances are the pods whose proxies enforce an AuthorizationPolicy, as
	// <namespace>/<pod>, sorted; nil for other kinds.
	Instances []string
}

// status gathers the entries of one object.
type status struct {
	r          *report
	generation int64
}

func statusOf(r *report, o metav1.Object) status { return status{r, o.GetGeneration()} }

// add adds an entry unless the object has one with the same reference.
func (s status) add(ref gatewayv1.ParentReference, consumer string, keys, instances []string, conditions ...metav1.Condition) {
	b := s.r.b
	for i := len(b.statuses) - 1; i >= 0; i-- {
		o := &b.statuses[i]
		if o.Kind != s.r.at.Kind || o.Namespace != s.r.at.Namespace || o.Name != s.r.at.Name {
			break
		}
		if sameRef(o.Ref, ref) {
			return
		}
	}
	for i := range conditions {
		conditions[i].ObservedGeneration = s.generation
	}
	b.statuses = append(b.statuses, Status{
		Kind: s.r.at.Kind, Namespace: s.r.at.Namespace, Name: s.r.at.Name, Generation: s.generation,
		Ref: *ref.DeepCopy(), Conditions: conditions, Keys: sortedOnce(keys), Consumer: consumer, Instances: sortedOnce(instances),
	})
}

func sortedOnce(in []string) []string {
	out := slices.Clone(in)
	slices.Sort(out)
	return slices.Compact(out)
}

func sameRef(a, b gatewayv1.ParentReference) bool {
	same := a.Name == b.Name
	same = same && deref(a.Group, gatewayGroup) == deref(b.Group, gatewayGroup) && deref(a.Kind, "Gateway") == deref(b.Kind, "Gateway")
	same = same && deref(a.Namespace, "") == deref(b.Namespace, "") && deref(a.SectionName, "") == deref(b.SectionName, "")
	return same && deref(a.Port, 0) == deref(b.Port, 0)
}

// A message repeats so many problems, and has so many bytes. Kubernetes takes
// 32 KiB, but people read it, and an object may have 16 of them.
const (
	maxSaid    = 4
	maxMessage = 4096
)

// condition is true where there are no problems; else it has the reason of the
// first, in the words that the kind has for it, and says all.
func condition[T, R ~string](kind T, reason R, problems []Problem, words func(Reason) string) metav1.Condition {
	if len(problems) == 0 {
		return metav1.Condition{Type: string(kind), Status: metav1.ConditionTrue, Reason: string(reason)}
	}
	var said []string
	for i, p := range problems {
		if i == maxSaid {
			said = append(said, fmt.Sprintf("and %d more", len(problems)-i))
			break
		}
		text := p.Message
		if p.Field != "" {
			text = p.Field + ": " + text
		}
		said = append(said, text)
	}
	message := strings.Join(said, "\n")
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "") + "..."
	}
	return metav1.Condition{Type: string(kind), Status: metav1.ConditionFalse, Reason: words(problems[0].Reason), Message: message}
}

// about returns the problems of the i-th entry of a list of references, and those
// of the whole object.
func about(problems []Problem, list string, i int) []Problem {
	var out []Problem
	entry := at(list, i)
	for _, p := range problems {
		if !inList(p, list) || p.Field == entry || strings.HasPrefix(p.Field, entry+".") {
			out = append(out, p)
		}
	}
	return out
}

// inList says whether the problem is one of an entry of the list.
func inList(p Problem, list string) bool { return strings.HasPrefix(p.Field, list+"[") }

// policyStatus adds the entries of a policy, one a target. There is room for as
// many as a valid policy has (GEP-713).
func (b *builder) policyStatus(r *report, o metav1.Object, refs []gatewayv1.LocalPolicyTargetReferenceWithSectionName, concerned func(i int) (keys, instances []string)) {
	st := statusOf(r, o)
	for i, t := range refs[:min(len(refs), maxTargetRefs)] {
		ns := gatewayv1.Namespace(o.GetNamespace())
		ref := gatewayv1.ParentReference{Group: &t.Group, Kind: &t.Kind, Name: t.Name, SectionName: t.SectionName}
		if t.Group != "" || t.Kind != kindNamespace {
			ref.Namespace = &ns
		}
		keys, instances := concerned(i)
		st.add(ref, "", keys, instances,
			condition(gatewayv1.PolicyConditionAccepted, gatewayv1.PolicyReasonAccepted, about(*r.found, "spec.targetRefs", i), policyReason))
	}
}

// policyReason is the word that GEP-713 has for a reason.
func policyReason(r Reason) string {
	switch r {
	case ReasonConflicted, ReasonTargetNotFound:
		return string(r)
	default:
		return string(gatewayv1.PolicyReasonInvalid)
	}
}

// keysOf are the keys of ports.
func keysOf(ports []*port) []string {
	var out []string
	for _, p := range ports {
		out = append(out, mesh.Key(p.service.namespace, p.service.name, p.Number))
	}
	return out
}

// SortStatuses sorts by object, in place; the entries of one keep their order,
// which is that of its spec.
func SortStatuses(in []Status) []Status {
	slices.SortStableFunc(in, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return in
}
