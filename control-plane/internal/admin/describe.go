package admin

import (
	"fmt"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Describe writes a mesh for people: a line for each port, route, policy and
// endpoint.
func Describe(m *mesh.Mesh) string {
	if m == nil {
		return "no mesh has been built yet\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "trust domain %s, %d services\n", m.TrustDomain, len(m.Services))
	for _, s := range m.Services {
		for _, p := range s.Ports {
			fmt.Fprintf(&b, "\n%s  %s", mesh.Key(s.Namespace, s.Name, p.Number), p.Protocol)
			if p.Name != "" {
				fmt.Fprintf(&b, " (%s)", p.Name)
			}
			for _, ip := range s.VIPs {
				fmt.Fprintf(&b, " %s", ip)
			}
			b.WriteByte('\n')
			for _, r := range p.Routes {
				describeRoute(&b, r)
			}
			describeNames(&b, p)
			if p.Protocol.IsHTTP() {
				fmt.Fprintf(&b, "  retry budget %d %%, at least %d\n", p.Budget.Percent, p.Budget.MinConcurrency)
			}
			describeBreaker(&b, p.Breaker)
			for _, e := range p.Endpoints {
				ready := "ready"
				if !e.Ready {
					ready = "not ready"
				}
				fmt.Fprintf(&b, "  endpoint %s %s", e.Address, ready)
				for _, f := range []struct{ name, value string }{{"instance", e.Instance}, {"workload", e.Workload}, {"zone", e.Zone}} {
					if f.value != "" {
						fmt.Fprintf(&b, " %s=%s", f.name, f.value)
					}
				}
				b.WriteByte('\n')
			}
			if len(p.Endpoints) == 0 {
				b.WriteString("  no endpoints: every call is answered 503 UH\n")
			}
		}
	}
	return b.String()
}

func describeNames(b *strings.Builder, p mesh.Port) {
	for _, n := range p.ServerNames {
		fmt.Fprintf(b, "  server name %s of TLSRoute %s: ->", n.Name, n.Route)
		if len(n.Backends) == 0 {
			b.WriteString(" refused, no backend")
		}
		for _, be := range n.Backends {
			fmt.Fprintf(b, " %s*%d", mesh.Key(be.Namespace, be.Service, be.Port), be.Weight)
		}
		b.WriteByte('\n')
	}
	if p.OnlyServerNames {
		b.WriteString("  other server names: refused\n")
	}
}

func describeRoute(b *strings.Builder, r mesh.Route) {
	fmt.Fprintf(b, "  route %s:", r.Name)
	if r.Match.Method != "" {
		fmt.Fprintf(b, " %s", r.Match.Method)
	}
	if r.Match.Path.Kind != mesh.Any {
		fmt.Fprintf(b, " path %s %s", r.Match.Path.Kind, r.Match.Path.Value)
	}
	for _, h := range r.Match.Headers {
		fmt.Fprintf(b, " header %s %s %q", h.Name, h.Kind, h.Value)
	}
	for _, q := range r.Match.Query {
		fmt.Fprintf(b, " query %s %s %q", q.Name, q.Kind, q.Value)
	}
	b.WriteString(" ->")
	if len(r.Backends) == 0 {
		b.WriteString(" 500, no backend")
	}
	for _, be := range r.Backends {
		fmt.Fprintf(b, " %s*%d", mesh.Key(be.Namespace, be.Service, be.Port), be.Weight)
	}
	if r.Timeout > 0 {
		fmt.Fprintf(b, " timeout %s", r.Timeout)
	}
	if r.Retry.Attempts > 0 {
		fmt.Fprintf(b, " retry %s: %d on %s", r.Retry.Policy, r.Retry.Attempts, strings.Join(r.Retry.On, ","))
		if len(r.Retry.IdempotentOn) > 0 {
			fmt.Fprintf(b, " (idempotent: %s)", strings.Join(r.Retry.IdempotentOn, ","))
		}
	}
	b.WriteByte('\n')
}

func describeBreaker(b *strings.Builder, c *mesh.CircuitBreaker) {
	if c == nil {
		return
	}
	mode := "Enforce"
	if c.Observe {
		mode = "Observe"
	}
	fmt.Fprintf(b, "  circuit breaker %s %s:", c.Policy, mode)
	if t := c.Trip; t != nil {
		if t.ConsecutiveFailures > 0 {
			fmt.Fprintf(b, " trips after %d failures in a row;", t.ConsecutiveFailures)
		}
		if t.FailureRatio > 0 {
			fmt.Fprintf(b, " trips at a failure ratio of %g;", t.FailureRatio)
		}
		if t.SlowCallThreshold > 0 {
			fmt.Fprintf(b, " trips when %g of the calls take %s;", t.SlowCallRatio, t.SlowCallThreshold)
		}
		fmt.Fprintf(b, " over %s, of %d requests; open for %s;", t.Window, t.MinimumRequests, t.OpenFor.Round(time.Millisecond))
	}
	for _, l := range []struct {
		name  string
		value *uint32
	}{
		{"connections", c.Limits.Connections},
		{"pending", c.Limits.PendingRequests},
		{"requests", c.Limits.Requests},
		{"retries", c.Limits.Retries},
	} {
		if l.value != nil {
			fmt.Fprintf(b, " at most %d %s;", *l.value, l.name)
		}
	}
	if e := c.Ejection; e != nil {
		fmt.Fprintf(b, " ejects endpoints for %s, %d %% at most;", e.BaseEjectionTime, e.MaxEjectionPercent)
	}
	b.WriteByte('\n')
}
