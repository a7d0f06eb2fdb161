package main

import (
	"slices"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// parity says what each data plane makes of a policy where it applies.
type parity struct {
	Kind   string           `json:"kind"`
	Policy string           `json:"policy"`
	Target string           `json:"target"`
	Notes  []xds.ParityNote `json:"notes"`
}

func parityOf(m *mesh.Mesh) []parity {
	out := []parity{}
	for _, s := range m.Services {
		for _, p := range s.Ports {
			key := mesh.Key(s.Namespace, s.Name, p.Number)
			if notes := xds.MTLSParity(p); notes != nil {
				workloads := map[string]bool{}
				for _, e := range p.Endpoints {
					if e.MTLS && !workloads[e.Workload] {
						workloads[e.Workload] = true
						out = append(out, parity{"Workload", s.Namespace + "/" + e.Workload, key, notes})
					}
				}
			}
			if p.Breaker != nil {
				out = append(out, parity{"CircuitBreaker", p.Breaker.Policy, key, xds.BreakerParity(p.Breaker)})
			}
			out = appendRoutes(out, key, p.Routes)
			for _, c := range p.Consumers {
				out = appendRoutes(out, key+" for callers of "+c.Namespace, c.Routes)
			}
		}
	}
	for _, i := range m.Instances {
		for _, a := range i.Authorizations {
			if notes := xds.AuthorizationParity(a); notes != nil {
				out = append(out, parity{"AuthorizationPolicy", a.Policy, i.Namespace + "/" + i.Workload, notes})
			}
		}
	}
	return slices.CompactFunc(out, func(a, b parity) bool { return a.Kind == b.Kind && a.Policy == b.Policy && a.Target == b.Target })
}

func appendRoutes(out []parity, target string, routes []mesh.Route) []parity {
	for _, r := range routes {
		if r.Retry.Policy != "" && r.Retry.Policy != "default" {
			out = append(out, parity{"RetryPolicy", r.Retry.Policy, target + " " + r.Name, xds.RetryParity(r.Retry)})
		}
		if notes := xds.FilterParity(r); notes != nil {
			out = append(out, parity{"HTTPRoute", r.Name, target, notes})
		}
	}
	return out
}
