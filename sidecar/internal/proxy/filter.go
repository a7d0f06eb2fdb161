package proxy

import (
	"slices"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/authz"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

// redirect answers for a route that leads elsewhere (Gateway API,
// HTTPRequestRedirectFilter).
func (x *exchange) redirect() bool {
	r := x.route.Redirect
	if r == nil {
		return true
	}
	// The application speaks in clear with its sidecar.
	location := r.AppendLocation(nil, "http", x.req.Host, x.urlPath, x.query)
	headers := []http1.Pair{{Name: "location", Value: location}}
	headers = append(append(headers, r.Response.Set...), r.Response.Add...)
	return x.reply(r.Status, "route "+x.route.Name+" redirects", headers...)
}

// rewrite changes what is sent to the backend. What is logged is what the client
// asked for.
func (x *exchange) rewrite() bool {
	if x.route.Path != nil {
		p := x.route.Path.Append(nil, x.urlPath)
		p, _, err := http1.NormalizePath(nil, p)
		if err != nil {
			return x.reply(500, "route "+x.route.Name+" makes a path that cannot be: "+err.Reason)
		}
		x.edit.Target = p
		if x.query != nil {
			x.edit.Target = http1.AppendTarget(nil, p, x.query)
		}
	}
	if x.route.Host != nil {
		x.edit.Set = append(x.edit.Set, http1.Pair{Name: "host", Value: x.route.Host})
	}
	if c := x.backend.Request; c != nil {
		x.change(c)
	}
	return true
}

// change gives the user's word precedence over ours; what it does is done again
// for each attempt, with x.edit.
func (x *exchange) change(c *route.Change) {
	ours := slices.Clone(x.edit.Set)
	for _, p := range c.Set {
		ours = slices.DeleteFunc(ours, func(o http1.Pair) bool { return o.Name == p.Name })
	}
	for _, name := range c.Remove {
		ours = slices.DeleteFunc(ours, func(o http1.Pair) bool { return o.Name == name })
	}
	x.edit.Set = append(ours, c.Set...)
	x.edit.Add = append(x.edit.Add, c.Add...)
	x.edit.Remove = append(x.edit.Remove, c.Remove...)
}

// authorize asks what the control plane says of those who call the application:
// for each request, so that a connection outlives no right.
func (x *exchange) authorize() bool {
	if x.port == 0 {
		return true // an ambassador port has no policies
	}
	in := x.Table.Load().Inbound
	if in == nil {
		x.flags |= accesslog.NC
		return x.reply(503, "the control plane has not said who may call")
	}
	p := in.Port(x.port).HTTPAuthorization
	if p == nil {
		return true
	}
	d := p.Decide(&authz.Request{Principal: x.identity, HTTP: true, Method: x.req.Method, Path: x.urlPath})
	x.judged(d)
	if !d.Denied {
		return true
	}
	x.denied = d.Policy
	// Which policy it was is for the callee's log: a stranger need not know.
	x.reply(403, "access denied")
	x.detail = d.Reason + x.asWhom()
	return false
}

// authorized asks the same for a connection that is carried as bytes. The reason
// is not empty where it may not be.
func (p *path) authorized(c *caller) (reason string) {
	if p.port == 0 {
		return ""
	}
	in := p.Table.Load().Inbound
	if in == nil {
		return "the control plane has not said who may call"
	}
	d := in.Port(p.port).BytesAuthorization.Decide(&authz.Request{Principal: c.identity})
	if d.Observed != "" {
		p.Metrics.Rejected(p.key, d.ObservedPolicy, "authorization", true)
	}
	if !d.Denied {
		return ""
	}
	p.Metrics.Rejected(p.key, d.Policy, "authorization", false)
	return d.Reason + c.asWhom()
}

// judged counts what was denied, or would have been.
func (x *exchange) judged(d authz.Decision) {
	if d.Observed != "" {
		x.observed = d.Observed
		x.Metrics.Rejected(x.key, d.ObservedPolicy, "authorization", true)
	}
	if d.Denied {
		x.Metrics.Rejected(x.key, d.Policy, "authorization", false)
	}
}

// asWhom ends a reason.
func (c *caller) asWhom() string {
	if c.identity == "" {
		return ", for a caller without identity"
	}
	return ", for " + c.identity
}
