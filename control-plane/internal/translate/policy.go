package translate

import (
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// target is what a policy is attached to: an object, or with a section a port
// of a Service or a rule of an HTTPRoute.
type target struct {
	kind string
	key
	section string
}

func (t target) String() string {
	s := t.kind + " " + t.key.String()
	switch {
	case t.section == "":
		return s
	case t.kind == kindService:
		return "port " + t.section + " of " + s
	default:
		return "rule " + t.section + " of " + s
	}
}

// claims holds who has which target. Policies come oldest first, so whoever
// claims a target first keeps it (GEP-713, conflict resolution).
type claims map[target]key

// take claims t for policy k. Who comes second is told who was first; a policy
// that names a target twice is not told anything.
func (c claims) take(r *report, field string, t target, k key) bool {
	winner, taken := c[t]
	switch {
	case !taken:
		c[t] = k
		return true
	case winner != k:
		r.add(field, ReasonConflicted, "%s %s already applies to %s and is older or first by name; remove this targetRef, or change that policy",
			r.at.Kind, winner, t)
	}
	return false
}

// maxTargetRefs is the limit that the policy types state.
const maxTargetRefs = 16

func checkTargetRefs(r *report, refs []gatewayv1.LocalPolicyTargetReferenceWithSectionName) {
	if n := len(refs); n < 1 || n > maxTargetRefs {
		r.add("spec.targetRefs", ReasonInvalid, "%d entries; write 1 to %d", n, maxTargetRefs)
	}
}

// serviceTarget resolves a reference to a Service or a port of it. The port is
// nil where the whole Service is meant.
func (b *builder) serviceTarget(r *report, field, namespace string, ref gatewayv1.LocalPolicyTargetReferenceWithSectionName) (*service, *port, bool) {
	k := key{namespace, string(ref.Name)}
	s := b.services[k]
	if s == nil {
		r.add(field+".name", ReasonTargetNotFound, "no usable Service %s; create it in the policy's namespace or correct the name", k)
		return nil, nil, false
	}
	section := sectionName(ref)
	if section == "" {
		return s, nil, true
	}
	p := s.byName(section)
	if p == nil {
		r.add(field+".sectionName", ReasonTargetNotFound, "no port named %q; Service %s has %s", section, k, s.describePorts())
		return nil, nil, false
	}
	return s, p, true
}

// portsOr is the port, or all of the Service where it is nil.
func (s *service) portsOr(p *port) []*port {
	if p == nil {
		return s.ports
	}
	return []*port{p}
}

func sectionName(ref gatewayv1.LocalPolicyTargetReferenceWithSectionName) string {
	return string(deref(ref.SectionName, ""))
}

// ratio reads a number in (0, 1] that is written as plain decimal digits.
func ratio(r *report, field, s string) float64 {
	v, err := strconv.ParseFloat(s, 64)
	plain := strings.Trim(s, "0123456789.") == ""
	if err != nil || !plain || !(v > 0 && v <= 1) {
		r.add(field, ReasonInvalid, "%q is not a share; write a number over 0 and at most 1, as in \"0.5\"", s)
		return 0
	}
	return v
}

// duration returns d, or otherwise where it is nil; low and high are the
// bounds, both allowed.
func duration(r *report, field string, d *metav1.Duration, otherwise, low, high time.Duration) time.Duration {
	if d == nil {
		return otherwise
	}
	if d.Duration < low || d.Duration > high {
		r.add(field, ReasonInvalid, "%s is out of range; write %s to %s", short(d.Duration), short(low), short(high))
		return otherwise
	}
	return d.Duration
}

// short writes 10m rather than 10m0s.
func short(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// The bounds of durations for which the types state none: proxies count in
// milliseconds, and beyond a day a typing error is likelier than a wish.
const (
	minDuration = time.Millisecond
	maxDuration = 24 * time.Hour
)

// number returns *n, or otherwise where it is nil.
func number(r *report, field string, n *uint32, otherwise, low, high uint32) uint32 {
	if n == nil {
		return otherwise
	}
	if *n < low || *n > high {
		if high == maxNumber {
			r.add(field, ReasonInvalid, "%d is too small; write %d or more", *n, low)
		} else {
			r.add(field, ReasonInvalid, "%d is out of range; write %d to %d", *n, low, high)
		}
		return otherwise
	}
	return *n
}

// maxNumber is no upper bound.
const maxNumber = ^uint32(0)

// words checks the words of a list and returns them sorted, each once.
func words(r *report, field string, in []string, known func(string) (string, bool), remedy string) []string {
	var out []string
	for i, w := range in {
		word, ok := known(w)
		if !ok {
			r.add(at(field, i), ReasonInvalid, "%q is not a known condition; write %s", w, remedy)
			continue
		}
		out = append(out, word)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
