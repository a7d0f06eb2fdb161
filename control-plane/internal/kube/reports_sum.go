package kube

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/discovery"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/rebuild"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
)

const (
	mostReasons = 3 // v1alpha1.Proxies
	// mostChanges of one policy are told, the newest; recent is how old they may be.
	mostChanges = 8
	recent      = 10 * time.Minute
)

// summary is what one replica knows, as it tells the others.
type summary struct {
	Time time.Time `json:"time"`
	// Objects by <kind>/<namespace>/<name>. One of which there is nothing to count is
	// absent.
	Objects map[string]counts `json:"objects"`
	// Truncated: there were more.
	Truncated bool `json:"truncated,omitempty"`
}

// counts are those of one object.
type counts struct {
	Subscribed int32    `json:"subscribed,omitempty"`
	Applied    int32    `json:"applied,omitempty"`
	Rejected   int32    `json:"rejected,omitempty"`
	Reasons    []string `json:"reasons,omitempty"`

	Closed   int32              `json:"closed,omitempty"`
	Open     int32              `json:"open,omitempty"`
	HalfOpen int32              `json:"halfOpen,omitempty"`
	LastTrip *v1alpha1.LastTrip `json:"lastTrip,omitempty"`
	// Changes of not long ago, oldest first.
	Changes []breakerChange `json:"changes,omitempty"`
}

// breakerChange is a breaker that has opened or closed.
type breakerChange struct {
	ID      string          `json:"id"`
	Caller  string          `json:"caller"`
	Target  string          `json:"target"`
	State   reporting.State `json:"state"`
	Observe bool            `json:"observe,omitempty"`
	Time    time.Time       `json:"time"`
	Reason  string          `json:"reason"`
}

func (k objectKey) String() string { return k.kind + "/" + k.Namespace + "/" + k.Name }

func parseKey(s string) (objectKey, bool) {
	kind, rest, _ := strings.Cut(s, "/")
	namespace, name, ok := strings.Cut(rest, "/")
	return objectKey{kind, types.NamespacedName{Namespace: namespace, Name: name}}, ok
}

// accepted are the statuses that say so.
func accepted(in []translate.Status) []translate.Status {
	return slices.DeleteFunc(slices.Clone(in), func(s translate.Status) bool {
		return !meta.IsStatusConditionTrue(s.Conditions, string(gatewayv1.PolicyConditionAccepted))
	})
}

// addProgress counts who has what is in force of each object.
func (r *Reports) addProgress(s summary, state *rebuild.State) {
	vips := map[string][]netip.AddrPort{}
	for _, svc := range state.Mesh.Services {
		for _, p := range svc.Ports {
			for _, ip := range svc.VIPs {
				k := mesh.Key(svc.Namespace, svc.Name, p.Number)
				vips[k] = append(vips[k], netip.AddrPortFrom(ip, p.Number))
			}
		}
	}
	// One a policy, because a proxy counts once; one a parent of a route, which may
	// be for the proxies of one namespace alone.
	var keys []string
	var wants []discovery.Interest
	for _, st := range accepted(state.Statuses) {
		k := objectKey{st.Kind, types.NamespacedName{Namespace: st.Namespace, Name: st.Name}}.String()
		if len(keys) == 0 || keys[len(keys)-1] != k || st.Consumer != wants[len(wants)-1].Namespace {
			keys, wants = append(keys, k), append(wants, discovery.Interest{Namespace: st.Consumer})
		}
		w := &wants[len(wants)-1]
		for _, key := range st.Keys {
			w.Names = append(w.Names, carriers(st.Kind, key, vips[key])...)
		}
		for _, instance := range st.Instances {
			namespace, pod, _ := strings.Cut(instance, "/")
			w.Names = append(w.Names, discovery.Name{Type: xds.ListenerType, Name: xds.InboundListenerName(namespace, pod)})
			w.Inbound = append(w.Inbound, pod+"."+namespace)
		}
	}
	for i, p := range r.o.Progress(wants) {
		c := s.Objects[keys[i]]
		c.Subscribed += int32(p.Subscribed)
		c.Applied += int32(p.Applied)
		c.Rejected += int32(p.Rejected)
		c.Reasons = reasons(c.Reasons, p.Reasons)
		s.Objects[keys[i]] = c
	}
}

// carriers are the resources that carry an object to those who call a port.
func carriers(kind, key string, vips []netip.AddrPort) []discovery.Name {
	switch kind {
	case "CircuitBreaker":
		return []discovery.Name{{Type: xds.ClusterType, Name: key}}
	case "RetryPolicy", "HTTPRoute", "GRPCRoute":
		return []discovery.Name{{Type: xds.RouteType, Name: key}}
	case "TLSRoute":
		out := []discovery.Name{{Type: xds.ListenerType, Name: xds.ListenerName(key)}}
		for _, at := range vips {
			out = append(out, discovery.Name{Type: xds.ListenerType, Name: xds.VIPListenerName(at)})
		}
		return out
	}
	return nil // it is carried by the listeners of instances
}

// addBreakers counts what proxies report. What is of no policy of the mesh, or of a
// port that it does not protect, counts nowhere. It is called with the lock held.
func (r *Reports) addBreakers(s summary, state *rebuild.State) {
	protects := map[reporting.Breaker]bool{}
	for _, svc := range state.Mesh.Services {
		for _, p := range svc.Ports {
			if p.Breaker != nil {
				protects[reporting.Breaker{Policy: p.Breaker.Policy, Target: mesh.Key(svc.Namespace, svc.Name, p.Number)}] = true
			}
		}
	}
	connected := r.o.Nodes()
	for node, p := range r.byNode {
		pod, namespace, _ := cutLast(node)
		caller := namespace + "/" + p.report.Workload + " (" + pod + ")"
		if connected[node] { // else it may have gone to another replica
			for _, b := range p.report.Breakers {
				if !protects[reporting.Breaker{Policy: b.Policy, Target: b.Target}] {
					continue
				}
				c := s.Objects["CircuitBreaker/"+b.Policy]
				switch b.State {
				case reporting.Open:
					c.Open++
				case reporting.HalfOpen:
					c.HalfOpen++
				case reporting.Closed:
					c.Closed++
				}
				s.Objects["CircuitBreaker/"+b.Policy] = c
			}
		}
		for _, b := range p.report.Changes {
			if !protects[reporting.Breaker{Policy: b.Policy, Target: b.Target}] {
				continue
			}
			c := s.Objects["CircuitBreaker/"+b.Policy]
			if b.State == reporting.Open {
				c.LastTrip = later(c.LastTrip, &v1alpha1.LastTrip{
					Time: metav1.NewTime(b.Time.Truncate(time.Second)), Caller: caller, Target: b.Target, Reason: b.Reason, Evidence: why(b.ID),
				})
			}
			if s.Time.Sub(b.Time) < recent {
				c.Changes = append(c.Changes, breakerChange{b.ID, caller, b.Target, b.State, b.Observe, b.Time, b.Reason})
			}
			s.Objects["CircuitBreaker/"+b.Policy] = c
		}
	}
	for k, c := range s.Objects {
		c.Changes = newest(c.Changes)
		s.Objects[k] = c
	}
}

// why is the command that shows evidence.
func why(id string) string { return "outrigger why " + id }

func cutLast(node string) (pod, namespace string, ok bool) {
	i := strings.LastIndexByte(node, '.')
	if i < 0 {
		return "", "", false
	}
	return node[:i], node[i+1:], true
}

// newest are the last of some changes, in the order of their time.
func newest(in []breakerChange) []breakerChange {
	slices.SortFunc(in, func(a, b breakerChange) int {
		return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Caller, b.Caller), cmp.Compare(a.ID, b.ID))
	})
	return in[max(len(in)-mostChanges, 0):]
}

// later of two trips, of which nil is none.
func later(a, b *v1alpha1.LastTrip) *v1alpha1.LastTrip {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	case cmp.Or(a.Time.Time.Compare(b.Time.Time), cmp.Compare(b.Caller, a.Caller), cmp.Compare(b.Evidence, a.Evidence)) < 0:
		return b
	}
	return a
}

// reasons are the first of both.
func reasons(a, b []string) []string {
	out := slices.Concat(a, b)
	slices.Sort(out)
	out = slices.Compact(out)
	return out[:min(len(out), mostReasons)]
}

// totals are the counts of all replicas.
type totals map[objectKey]counts

func (t totals) add(s summary) {
	for name, c := range s.Objects {
		k, ok := parseKey(name)
		if !ok {
			continue
		}
		sum := t[k]
		for _, n := range []struct {
			to   *int32
			more int32
		}{
			{&sum.Subscribed, c.Subscribed},
			{&sum.Applied, c.Applied},
			{&sum.Rejected, c.Rejected},
			{&sum.Closed, c.Closed},
			{&sum.Open, c.Open},
			{&sum.HalfOpen, c.HalfOpen},
		} {
			*n.to += min(max(n.more, 0), mostReports*reporting.MaxBreakers)
		}
		sum.Reasons = reasons(sum.Reasons, c.Reasons)
		sum.LastTrip = later(sum.LastTrip, c.LastTrip)
		sum.Changes = slices.Concat(sum.Changes, c.Changes)
		t[k] = sum
	}
}

// fill says in a status what is counted. Where no target has accepted the policy
// there is nothing to count.
func (t totals) fill(w *wanted, k objectKey, of []translate.Status) {
	w.counts = true
	if len(accepted(of)) == 0 {
		return
	}
	c := t[k]
	w.proxies = &v1alpha1.Proxies{
		Summary: share(c.Applied, c.Subscribed), Applied: c.Applied, Subscribed: c.Subscribed, Rejected: c.Rejected, Reasons: c.Reasons,
	}
	if c.Closed+c.Open+c.HalfOpen > 0 {
		w.breakers = &v1alpha1.Breakers{Closed: c.Closed, Open: c.Open, HalfOpen: c.HalfOpen}
	}
	w.lastTrip = c.LastTrip
}
