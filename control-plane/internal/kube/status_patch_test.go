package kube

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
)

var (
	now  = metav1.NewTime(time.Date(2026, 5, 1, 3, 0, 0, 0, time.UTC))
	then = metav1.NewTime(now.Add(-time.Hour))
)

// at is an entry about a target, of whom and with what status.
func at(target string, whose gatewayv1.GatewayController, status metav1.ConditionStatus, since metav1.Time) gatewayv1.PolicyAncestorStatus {
	return gatewayv1.PolicyAncestorStatus{
		AncestorRef: gatewayv1.ParentReference{Name: gatewayv1.ObjectName(target)}, ControllerName: whose,
		Conditions: []metav1.Condition{{Type: "Accepted", Status: status, Reason: "x", LastTransitionTime: since}},
	}
}

func ask(targets ...string) wanted {
	var w wanted
	for _, t := range targets {
		a := at(t, ControllerName, metav1.ConditionTrue, metav1.Time{})
		w.entries = append(w.entries, entry{ParentRef: a.AncestorRef, ControllerName: a.ControllerName, Conditions: a.Conditions})
	}
	return w
}

// told are the operations of a patch in short: "add /path value", where of a value
// that has entries their targets and times are shown.
func told(p patch) string {
	var out []string
	for _, o := range p.ops {
		text, _ := json.Marshal(o.Value)
		var v any
		_ = json.Unmarshal(text, &v)
		out = append(out, strings.TrimSpace(o.Op+" "+o.Path+" "+shorten(v)))
	}
	return strings.Join(out, "\n")
}

func shorten(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case []any:
		var out []string
		for _, x := range v {
			out = append(out, shorten(x))
		}
		return "[" + strings.Join(out, " ") + "]"
	case map[string]any:
		if ref, ok := v["ancestorRef"].(map[string]any); ok {
			return fmt.Sprint(ref["name"], "@", v["conditions"].([]any)[0].(map[string]any)["lastTransitionTime"])
		}
		text, _ := json.Marshal(v)
		if a, ok := v["ancestors"]; ok {
			text, _ = json.Marshal(map[string]any{"ancestors": shorten(a), "others": len(v) - 1})
		}
		return string(text)
	}
	return fmt.Sprint(v)
}

const others = gatewayv1.GatewayController("example.com/x")

// Only what is ours is named in a patch, and only where it differs.
func TestChange(t *testing.T) {
	const test = "test /metadata/resourceVersion 7\n"
	yes, no := metav1.ConditionTrue, metav1.ConditionFalse
	many := []gatewayv1.PolicyAncestorStatus{}
	for i := range 15 {
		many = append(many, at(fmt.Sprint("o", i), others, yes, then))
	}
	proxies := &v1alpha1.Proxies{Summary: "1/1", Applied: 1, Subscribed: 1}
	counted := ask("a")
	counted.counts, counted.proxies = true, proxies
	for _, c := range []struct {
		name string
		have v1alpha1.CircuitBreakerStatus
		want wanted
		ops  string
		full int
	}{
		{"nothing to say", v1alpha1.CircuitBreakerStatus{}, ask(), "", 0},
		{"the first status", v1alpha1.CircuitBreakerStatus{}, ask("a", "b"), test + `add /status {"ancestors":"[a@2026-05-01T03:00:00Z b@2026-05-01T03:00:00Z]","others":0}`, 0},
		{"the same again", v1alpha1.CircuitBreakerStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{at("x", others, no, then), at("a", ControllerName, yes, then)}}, ask("a"), "", 0},
		{
			"another status has a new time",
			v1alpha1.CircuitBreakerStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{at("a", others, no, then), at("a", ControllerName, no, then)}},
			ask("a"),
			test + "replace /status/ancestors/1 a@2026-05-01T03:00:00Z", 0,
		},
		{
			"ours go from the end, and twice is once",
			v1alpha1.CircuitBreakerStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{
				at("gone", ControllerName, yes, then), at("x", others, yes, then), at("a", ControllerName, yes, then), at("a", ControllerName, yes, then),
			}},
			ask("a", "b"),
			test + "remove /status/ancestors/3\nremove /status/ancestors/0\nadd /status/ancestors/- b@2026-05-01T03:00:00Z", 0,
		},
		{"others fill it", v1alpha1.CircuitBreakerStatus{Ancestors: many}, ask("a", "b", "c"), test + "add /status/ancestors/- a@2026-05-01T03:00:00Z", 2},
		{
			"counts alone",
			v1alpha1.CircuitBreakerStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{at("a", ControllerName, yes, then)}, Breakers: &v1alpha1.Breakers{Open: 1}},
			counted,
			test + `add /status/proxies {"applied":1,"rejected":0,"subscribed":1,"summary":"1/1"}` + "\nremove /status/breakers", 0,
		},
		{"counts that nobody knows yet", v1alpha1.CircuitBreakerStatus{Ancestors: []gatewayv1.PolicyAncestorStatus{at("a", ControllerName, yes, then)}, Proxies: proxies}, ask("a"), "", 0},
		{"the first list beside counts", v1alpha1.CircuitBreakerStatus{Proxies: proxies}, ask("a"), test + "add /status/ancestors [a@2026-05-01T03:00:00Z]", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := change(&v1alpha1.CircuitBreaker{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "7"}, Status: c.have}, c.want, now)
			if d := cmp.Diff(c.ops, told(p)); d != "" || p.full != c.full {
				t.Errorf("%d without room; operations (-want +got):\n%s", p.full, d)
			}
		})
	}
}

// The last trip stays until there is a later one.
func TestLastTripStays(t *testing.T) {
	trip := func(at metav1.Time) *v1alpha1.LastTrip { return &v1alpha1.LastTrip{Time: at, Reason: "r"} }
	have := &v1alpha1.CircuitBreaker{Status: v1alpha1.CircuitBreakerStatus{LastTrip: trip(then)}}
	for _, c := range []struct {
		trip *v1alpha1.LastTrip
		n    int
	}{{nil, 0}, {trip(then), 0}, {trip(metav1.NewTime(then.Add(-time.Second))), 0}, {trip(now), 2}} {
		if p := change(have, wanted{counts: true, lastTrip: c.trip}, now); len(p.ops) != c.n {
			t.Errorf("%+v: %s", c.trip, told(p))
		}
	}
}

// What one replica tells has room in a ConfigMap, whatever there is to tell.
func TestFit(t *testing.T) {
	s := summary{Time: now.Time, Objects: map[string]counts{}}
	for i := range 6000 {
		s.Objects[fmt.Sprintf("CircuitBreaker/ns/%05d", i)] = counts{
			Applied: 1, Reasons: []string{strings.Repeat("r", 300)}, LastTrip: &v1alpha1.LastTrip{Caller: "shop/x (y)", Target: "shop/payments:80", Reason: strings.Repeat("r", 100)},
		}
	}
	text := fit(s)
	var got summary
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if len(text) > mostTold || len(text) < mostTold/2 || !got.Truncated || len(got.Objects) < 1000 {
		t.Errorf("%d bytes, %d objects", len(text), len(got.Objects))
	}
	if _, ok := got.Objects["CircuitBreaker/ns/00000"]; !ok {
		t.Error("the first is not there")
	}
}

// Sums do not overflow by what somebody writes into a ConfigMap, nor fall below
// zero.
func TestTotalsOfNonsense(t *testing.T) {
	s := summary{Objects: map[string]counts{"CircuitBreaker/a/b": {Applied: -5, Subscribed: 1<<31 - 1}, "nonsense": {}, "": {}}}
	total := totals{}
	for range mostReplicas {
		total.add(s)
	}
	if len(total) != 1 {
		t.Errorf("%d objects", len(total))
	}
	for _, c := range total {
		if c.Applied != 0 || c.Subscribed <= 0 {
			t.Errorf("%+v", c)
		}
	}
}
