package translate_test

import (
	"fmt"
	"strings"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
)

// dump writes a mesh so that people can read it and diffs are small. What has
// its default value is left out.
func dump(m *mesh.Mesh) string {
	var w strings.Builder
	line := func(depth int, format string, args ...any) {
		w.WriteString(strings.Repeat("  ", depth) + strings.TrimRight(fmt.Sprintf(format, args...), " ") + "\n")
	}
	for _, s := range m.Services {
		line(0, "service %s/%s %s", s.Namespace, s.Name, join(s.VIPs))
		for _, p := range s.Ports {
			line(1, "port %d %s %s", p.Number, p.Protocol, p.Name)
			if p.Budget != (mesh.RetryBudget{Percent: 20, MinConcurrency: 3}) {
				line(2, "budget %d%% min %d", p.Budget.Percent, p.Budget.MinConcurrency)
			}
			for _, e := range p.Endpoints {
				line(2, "endpoint %s%s%s%s%s%s%s", e.Address, option(" instance=", e.Instance), option(" workload=", e.Workload),
					option(" account=", e.ServiceAccount), option(" zone=", e.Zone), when(!e.Ready, " not ready"), when(e.MTLS, " mtls"))
			}
			for _, id := range p.Identities {
				line(2, "identity %s", id)
			}
			dumpRoutes(line, 2, p.Routes)
			for _, c := range p.Consumers {
				line(2, "for callers of %s", c.Namespace)
				dumpRoutes(line, 3, c.Routes)
			}
			for _, n := range p.ServerNames {
				line(2, "server name %s of %s", n.Name, n.Route)
				for _, b := range n.Backends {
					line(3, "to %s weight %d%s", mesh.Key(b.Namespace, b.Service, b.Port), b.Weight, when(b.Missing, " missing"))
				}
			}
			if p.OnlyServerNames {
				line(2, "no other server name")
			}
			if b := p.Breaker; b != nil {
				line(2, "breaker %s%s", b.Policy, when(b.Observe, " observe"))
				if t := b.Trip; t != nil {
					line(3, "trip%s%s%s minimum=%d window=%s open=%s halfopen=%d on %s",
						number(" consecutive=", t.ConsecutiveFailures), share(" ratio=", t.FailureRatio),
						when(t.SlowCallThreshold > 0, fmt.Sprintf(" slow>=%s ratio=%g", t.SlowCallThreshold, t.SlowCallRatio)),
						t.MinimumRequests, t.Window, t.OpenFor, t.HalfOpenRequests, strings.Join(t.FailureOn, ","))
				}
				if b.Limits != (mesh.Limits{}) {
					line(3, "limits%s%s%s%s", limit(" connections=", b.Limits.Connections), limit(" pending=", b.Limits.PendingRequests),
						limit(" requests=", b.Limits.Requests), limit(" retries=", b.Limits.Retries))
				}
				if e := b.Ejection; e != nil {
					line(3, "ejection%s%s interval=%s base=%s max=%d%%", number(" 5xx=", e.Consecutive5xx), number(" gateway=", e.ConsecutiveGatewayErrors),
						e.Interval, e.BaseEjectionTime, e.MaxEjectionPercent)
					if f := e.FailurePercentage; f != nil {
						line(4, "failures >= %d%% hosts=%d volume=%d", f.Threshold, f.MinimumHosts, f.RequestVolume)
					}
				}
			}
		}
	}
	for _, in := range m.Instances {
		line(0, "instance %s/%s %s workload=%s account=%s mtls=%s", in.Namespace, in.Name, join(in.Addresses), in.Workload, in.ServiceAccount, in.MTLS)
		for _, p := range in.Ports {
			line(1, "port %d %s", p.Number, p.Protocol)
		}
		for _, a := range in.Authorizations {
			line(1, "%s by %s%s%s", strings.ToLower(string(a.Action)), a.Policy, when(a.Observe, " observe"), option(" ports ", join(a.Ports)))
			for _, r := range a.Rules {
				line(2, "rule %s%s%s%s%s", r.Name, option(" from ", strings.Join(r.Principals, ",")), option(" not from ", strings.Join(r.NotPrincipals, ",")),
					option(" methods ", strings.Join(r.Methods, ",")), option(" paths ", paths(r.Paths)))
			}
		}
	}
	return w.String()
}

func dumpRoutes(line func(int, string, ...any), depth int, in []mesh.Route) {
	for _, r := range in {
		line(depth, "route %s: %s", r.Name, match(r.Match))
		dumpFilters(line, depth+1, r.Filters)
		for _, b := range r.Backends {
			line(depth+1, "to %s weight %d%s", mesh.Key(b.Namespace, b.Service, b.Port), b.Weight, when(b.Missing, " missing"))
			dumpFilters(line, depth+2, b.Filters)
		}
		if r.Timeout != 0 {
			line(depth+1, "timeout %s", r.Timeout)
		}
		if s := retry(r.Retry); s != retryDefault {
			line(depth+1, "%s", s)
		}
	}
}

// retryDefault is not worth a line below each route.
const retryDefault = "retry default attempts=2 on connect-failure,refused-stream,reset-before-request idempotent gateway-error,reset backoff=25ms..250ms"

func dumpFilters(line func(int, string, ...any), depth int, f *mesh.Filters) {
	if f == nil {
		return
	}
	change := func(what string, c mesh.HeaderChange) {
		for _, h := range c.Set {
			line(depth, "%s set %s: %s", what, h.Name, h.Value)
		}
		for _, h := range c.Add {
			line(depth, "%s add %s: %s", what, h.Name, h.Value)
		}
		if len(c.Remove) > 0 {
			line(depth, "%s remove %s", what, strings.Join(c.Remove, ","))
		}
	}
	path := func(p *mesh.PathChange) string {
		switch {
		case p == nil:
			return ""
		case p.Full != nil:
			return " path " + *p.Full
		default:
			return " prefix by " + deref(p.ReplacePrefix)
		}
	}
	change("request", f.Request)
	change("response", f.Response)
	if r := f.Redirect; r != nil {
		line(depth, "redirect %d%s%s%s%s", r.Status, option(" scheme ", r.Scheme), option(" host ", r.Host), when(r.Port > 0, fmt.Sprint(" port ", r.Port)), path(r.Path))
	}
	if r := f.Rewrite; r != nil {
		line(depth, "rewrite%s%s", option(" host ", r.Host), path(r.Path))
	}
	for _, m := range f.Mirrors {
		line(depth, "mirror %d/%d to %s", m.Numerator, m.Denominator, mesh.Key(m.Backend.Namespace, m.Backend.Service, m.Backend.Port))
	}
}

func paths(in []mesh.PathMatch) string {
	var out []string
	for _, p := range in {
		out = append(out, string(p.Kind)+" "+p.Value)
	}
	return strings.Join(out, ",")
}

// dumpStatus writes an entry a line, and below it what is not as it should be.
func dumpStatus(in []translate.Status) string {
	var w strings.Builder
	for _, s := range in {
		ref := s.Ref
		fmt.Fprintf(&w, "%s %s/%s on %s %s%s%s%s:", s.Kind, s.Namespace, s.Name, deref(ref.Kind), when(ref.Namespace != nil, string(deref(ref.Namespace))+"/"), ref.Name,
			option(" section ", string(deref(ref.SectionName))), when(ref.Port != nil, fmt.Sprint(" port ", deref(ref.Port))))
		for _, c := range s.Conditions {
			fmt.Fprintf(&w, " %s=%s", c.Type, c.Status)
			if c.Reason != c.Type {
				fmt.Fprintf(&w, "(%s)", c.Reason)
			}
			if c.ObservedGeneration != s.Generation {
				fmt.Fprintf(&w, " of generation %d, not %d", c.ObservedGeneration, s.Generation)
			}
		}
		fmt.Fprintf(&w, "%s%s%s\n", option(" keys ", strings.Join(s.Keys, ",")), option(" for callers of ", s.Consumer), option(" instances ", strings.Join(s.Instances, ",")))
		for _, c := range s.Conditions {
			if c.Message != "" {
				fmt.Fprintf(&w, "  %s: %s\n", c.Type, strings.ReplaceAll(c.Message, "\n", "\n    "))
			}
		}
	}
	return w.String()
}

func deref[T any](p *T) T {
	if p == nil {
		return *new(T)
	}
	return *p
}

func match(m mesh.Match) string {
	out := []string{"any"}
	if m.Path.Kind != mesh.Any {
		out = []string{fmt.Sprintf("%s %s", m.Path.Kind, m.Path.Value)}
	}
	if m.Method != "" {
		out = append(out, m.Method)
	}
	for _, h := range m.Headers {
		out = append(out, fmt.Sprintf("header %s %s %q", h.Name, h.Kind, h.Value))
	}
	for _, q := range m.Query {
		out = append(out, fmt.Sprintf("query %s %s %q", q.Name, q.Kind, q.Value))
	}
	return strings.Join(out, ", ")
}

func retry(r mesh.Retry) string {
	return fmt.Sprintf("retry %s attempts=%d on %s%s%s%s backoff=%s..%s", r.Policy, r.Attempts, strings.Join(r.On, ","),
		option(" idempotent ", strings.Join(r.IdempotentOn, ",")), when(len(r.Status) > 0, " status "+join(r.Status)),
		when(r.PerTryTimeout > 0, " pertry="+r.PerTryTimeout.String()), r.BackoffBase, r.BackoffMax)
}

func join[T any](in []T) string {
	var out []string
	for _, v := range in {
		out = append(out, fmt.Sprint(v))
	}
	return strings.Join(out, ",")
}

func option(name, value string) string { return when(value != "", name+value) }

func number(name string, n uint32) string { return when(n > 0, fmt.Sprint(name, n)) }

func share(name string, f float64) string { return when(f > 0, fmt.Sprint(name, f)) }

func limit(name string, n *uint32) string {
	if n == nil {
		return ""
	}
	return fmt.Sprint(name, *n)
}

func when(on bool, s string) string {
	if on {
		return s
	}
	return ""
}
