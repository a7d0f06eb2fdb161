package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// ControllerName is whose entries in the status of routes and policies are ours.
const ControllerName gatewayv1.GatewayController = Prefix + "control-plane"

// How many entries a status may have, others' included.
const (
	maxParents   = 32 // Gateway API, RouteStatus.parents
	maxAncestors = 16 // GEP-713
)

// entry is one of status.parents or status.ancestors, which differ in the name of
// the reference only.
type entry = gatewayv1.RouteParentStatus

// written is the status of an object as it is.
type written struct {
	list, ref string // the names of the fields
	most      int
	entries   []entry
	empty     bool
	// Of policies; the last two of CircuitBreakers.
	proxies  *v1alpha1.Proxies
	breakers *v1alpha1.Breakers
	lastTrip *v1alpha1.LastTrip
}

// read returns the status of an object; ok is false for kinds that we write none
// of.
func read(o client.Object) (w written, ok bool) {
	switch o := o.(type) {
	case *gatewayv1.HTTPRoute:
		w = route(o.Status.RouteStatus)
	case *gatewayv1.GRPCRoute:
		w = route(o.Status.RouteStatus)
	case *gatewayv1.TLSRoute:
		w = route(o.Status.RouteStatus)
	case *v1alpha1.CircuitBreaker:
		w = policy(o.Status.Ancestors, o.Status.Proxies)
		w.breakers, w.lastTrip = o.Status.Breakers, o.Status.LastTrip
		w.empty = w.empty && w.breakers == nil && w.lastTrip == nil
	case *v1alpha1.RetryPolicy:
		w = policy(o.Status.Ancestors, o.Status.Proxies)
	case *v1alpha1.AuthorizationPolicy:
		w = policy(o.Status.Ancestors, o.Status.Proxies)
	default:
		return w, false
	}
	return w, true
}

func route(s gatewayv1.RouteStatus) written {
	return written{list: "parents", ref: "parentRef", most: maxParents, entries: s.Parents, empty: len(s.Parents) == 0}
}

func policy(ancestors []gatewayv1.PolicyAncestorStatus, p *v1alpha1.Proxies) written {
	w := written{list: "ancestors", ref: "ancestorRef", most: maxAncestors, proxies: p, empty: len(ancestors) == 0 && p == nil}
	for _, a := range ancestors {
		w.entries = append(w.entries, entry{ParentRef: a.AncestorRef, ControllerName: a.ControllerName, Conditions: a.Conditions})
	}
	return w
}

// ours says whether some entry is.
func (w written) ours() bool {
	return slices.ContainsFunc(w.entries, func(e entry) bool { return e.ControllerName == ControllerName })
}

// wanted is what a status is to say.
type wanted struct {
	// entries that are ours, in the order of the spec. Their conditions need no
	// times.
	entries []entry
	// counts says that the fields below are known. What is nil is to be absent, but
	// for a last trip: that stays until there is a later one.
	counts   bool
	proxies  *v1alpha1.Proxies
	breakers *v1alpha1.Breakers
	lastTrip *v1alpha1.LastTrip
}

// op is one of a JSON Patch (RFC 6902).
type op struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch is the way from what is to what is wanted; none where there is nothing to
// do. It names nothing of others', so that nothing of it can be changed or lost:
// fields that we do not know, the order. It applies to this very version of the
// object only.
type patch struct {
	ops []op
	// conditions says that there is more in it than counts.
	conditions bool
	// newly are the entries whose conditions have changed, or are of another
	// generation; full is how many found no room.
	newly []entry
	full  int
}

// change makes the patch. Conditions keep the time of their last transition unless
// their status changes.
func change(o client.Object, want wanted, now metav1.Time) patch {
	have, ok := read(o)
	if !ok {
		return patch{}
	}
	var p patch
	list := "/status/" + have.list
	var gone []int
	missing := slices.Clone(want.entries)
	for i, e := range have.entries {
		if e.ControllerName != ControllerName {
			continue
		}
		j := slices.IndexFunc(missing, func(m entry) bool { return sameRef(m.ParentRef, e.ParentRef) })
		if j < 0 {
			gone = append(gone, i)
			continue
		}
		next := missing[j]
		missing = slices.Delete(missing, j, j+1)
		next.Conditions = since(e.Conditions, next.Conditions, now)
		if equality.Semantic.DeepEqual(e.Conditions, next.Conditions) && equality.Semantic.DeepEqual(e.ParentRef, next.ParentRef) {
			continue
		}
		p.ops = append(p.ops, op{"replace", fmt.Sprintf("%s/%d", list, i), have.wire(next)})
		p.newly = append(p.newly, next)
	}
	slices.Reverse(gone) // so that the index of the next is still right
	for _, i := range gone {
		p.ops = append(p.ops, op{Op: "remove", Path: fmt.Sprintf("%s/%d", list, i)})
	}
	room := have.most - (len(have.entries) - len(gone))
	if p.full = len(missing) - room; p.full > 0 {
		missing = missing[:room]
	}
	p.full = max(p.full, 0)
	fresh := []any{}
	for _, e := range missing {
		e.Conditions = since(nil, e.Conditions, now)
		fresh = append(fresh, have.wire(e))
		p.newly = append(p.newly, e)
	}
	p.conditions = len(p.ops)+len(fresh) > 0
	counts := want.fields(have)
	if have.empty {
		if len(fresh) == 0 && len(counts) == 0 {
			return p
		}
		status := map[string]any{have.list: fresh}
		for _, c := range counts {
			status[strings.TrimPrefix(c.Path, "/status/")] = c.Value
		}
		p.ops = []op{{"add", "/status", status}}
		return p.of(o)
	}
	if len(have.entries) == 0 && len(fresh) > 0 {
		p.ops = append(p.ops, op{"add", list, fresh})
	} else {
		for _, f := range fresh {
			p.ops = append(p.ops, op{"add", list + "/-", f})
		}
	}
	p.ops = append(p.ops, counts...)
	return p.of(o)
}

// of has the patch apply to this version of the object only.
func (p patch) of(o client.Object) patch {
	if len(p.ops) > 0 {
		p.ops = slices.Insert(p.ops, 0, op{"test", "/metadata/resourceVersion", o.GetResourceVersion()})
	}
	return p
}

func (p patch) encode() []byte {
	b, err := json.Marshal(p.ops)
	if err != nil {
		panic("kube: cannot encode a patch: " + err.Error()) // it is made of what JSON can say
	}
	return b
}

// wire is the entry with the names that the kind has for its fields.
func (w written) wire(e entry) any {
	return map[string]any{w.ref: e.ParentRef, "controllerName": e.ControllerName, "conditions": e.Conditions}
}

// fields are the changes of what is beside the entries.
func (want wanted) fields(have written) []op {
	var out []op
	if !want.counts || have.list != "ancestors" {
		return nil
	}
	set := func(name string, had, has bool, same bool, value any) {
		switch path := "/status/" + name; {
		case has && !same:
			out = append(out, op{"add", path, value}) // or replace
		case had && !has:
			out = append(out, op{Op: "remove", Path: path})
		}
	}
	set("proxies", have.proxies != nil, want.proxies != nil, equality.Semantic.DeepEqual(have.proxies, want.proxies), want.proxies)
	set("breakers", have.breakers != nil, want.breakers != nil, equality.Semantic.DeepEqual(have.breakers, want.breakers), want.breakers)
	if t := want.lastTrip; t != nil && (have.lastTrip == nil || t.Time.Unix() > have.lastTrip.Time.Unix()) {
		out = append(out, op{"add", "/status/lastTrip", t})
	}
	return out
}

// since fills in when each condition got its status.
func since(had, want []metav1.Condition, now metav1.Time) []metav1.Condition {
	out := slices.Clone(want)
	for i := range out {
		out[i].LastTransitionTime = now
		if old := meta.FindStatusCondition(had, out[i].Type); old != nil && old.Status == out[i].Status {
			out[i].LastTransitionTime = old.LastTransitionTime
		}
	}
	return out
}

// entriesOf are the entries that the statuses of one object make.
func entriesOf(in []translate.Status) []entry {
	out := make([]entry, 0, len(in))
	for _, s := range in {
		out = append(out, entry{ParentRef: s.Ref, ControllerName: ControllerName, Conditions: s.Conditions})
	}
	return out
}

// sameRef says whether two references are to the same, as the Gateway API fills in
// what is absent.
func sameRef(a, b gatewayv1.ParentReference) bool {
	return a.Name == b.Name && or(a.Group, gatewayv1.GroupName) == or(b.Group, gatewayv1.GroupName) && or(a.Kind, "Gateway") == or(b.Kind, "Gateway") &&
		or(a.Namespace, "") == or(b.Namespace, "") && or(a.SectionName, "") == or(b.SectionName, "") && or(a.Port, 0) == or(b.Port, 0)
}

func or[T cmp.Ordered](p *T, absent T) T {
	if p == nil {
		return absent
	}
	return *p
}
