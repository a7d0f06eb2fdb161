package xds

import (
	"slices"
	"strconv"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

const (
	filterHTTPRBAC    = "envoy.filters.http.rbac"
	filterNetworkRBAC = "envoy.filters.network.rbac"
)

// authorizations are those that apply to a port of a pod.
type authorizations []mesh.Authorization

// at picks what applies to a port; 0 stands for the ports that none names.
func (as authorizations) at(port uint16) authorizations {
	var out authorizations
	for _, a := range as {
		if len(a.Ports) == 0 || slices.Contains(a.Ports, port) {
			out = append(out, a)
		}
	}
	return out
}

// verdicts are the rules of one action: those that act, and those that are only
// evaluated. One that is nil has no policy.
type verdicts struct {
	action          mesh.Action
	enforce, shadow *rbacv3.RBAC
}

// verdicts has an entry for each action that some policy has, in the order of
// evaluation.
func (as authorizations) verdicts(requests bool, dp DataPlane) []verdicts {
	var out []verdicts
	for _, action := range []mesh.Action{mesh.Deny, mesh.Allow} {
		v := verdicts{action: action, enforce: as.rbac(action, false, requests), shadow: as.rbac(action, true, requests)}
		if v.enforce == nil && v.shadow == nil {
			continue
		}
		if dp == Envoy && action == mesh.Allow && v.enforce != nil && v.shadow != nil {
			// What Envoy says that it would have denied is by the shadow rules alone; a
			// further Allow denies nothing that another one allows.
			for name, policy := range v.enforce.GetPolicies() {
				v.shadow.Policies[name] = policy
			}
		}
		out = append(out, v)
	}
	return out
}

// enforced reports whether somebody may be turned away.
func (as authorizations) enforced() bool {
	return as.rbac(mesh.Deny, false, false) != nil || as.rbac(mesh.Allow, false, false) != nil
}

// rbac is nil where no policy is of the action and mode, or none could deny.
func (as authorizations) rbac(action mesh.Action, observe, requests bool) *rbacv3.RBAC {
	var out *rbacv3.RBAC
	for _, a := range as {
		if a.Action != action || a.Observe != observe {
			continue
		}
		if out == nil {
			out = &rbacv3.RBAC{Action: rbacv3.RBAC_ALLOW, Policies: map[string]*rbacv3.Policy{}}
			if action == mesh.Deny {
				out.Action = rbacv3.RBAC_DENY
			}
		}
		for _, r := range a.Rules {
			putRule(out.Policies, a.Policy, r.Name, &rbacv3.Policy{Permissions: []*rbacv3.Permission{permission(a.Action, r, requests)}, Principals: []*rbacv3.Principal{principal(r)}})
		}
		if len(a.Rules) == 0 && action == mesh.Allow {
			putRule(out.Policies, a.Policy, "", &rbacv3.Policy{Permissions: []*rbacv3.Permission{never()}, Principals: []*rbacv3.Principal{anybody()}})
		}
	}
	if action == mesh.Deny && len(out.GetPolicies()) == 0 {
		return nil
	}
	return out
}

// putRule names a rule <namespace>/<policy>[<rule>]. One that would take the place
// of another gets a name of its own.
func putRule(into map[string]*rbacv3.Policy, policy, rule string, p *rbacv3.Policy) {
	name := policy + "[" + rule + "]"
	for i := 2; into[name] != nil; i++ {
		if proto.Equal(into[name], p) {
			return
		}
		name = policy + "[" + rule + "#" + strconv.Itoa(i) + "]"
	}
	into[name] = p
}

// permission is what is called. Of a connection whose bytes are no requests, a
// method or path is not known: a Deny takes it to match, an Allow does not.
func permission(action mesh.Action, r mesh.AuthorizationRule, requests bool) *rbacv3.Permission {
	if len(r.Methods) == 0 && len(r.Paths) == 0 {
		return anything()
	}
	if !requests {
		if action == mesh.Deny {
			return anything()
		}
		return never()
	}
	var all []*rbacv3.Permission
	if len(r.Methods) > 0 {
		var methods []*rbacv3.Permission
		for _, m := range r.Methods {
			methods = append(methods, &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: &routev3.HeaderMatcher{
				Name: ":method", HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: stringMatcher(mesh.Exact, m)},
			}}})
		}
		all = append(all, &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: methods}}})
	}
	if len(r.Paths) > 0 {
		var paths []*rbacv3.Permission
		for _, p := range r.Paths {
			paths = append(paths, &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{
				Rule: &matcherv3.PathMatcher_Path{Path: pathMatcher(p)},
			}}})
		}
		all = append(all, &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: paths}}})
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: all}}}
}

// pathMatcher compares a path byte by byte: a prefix of an AuthorizationPolicy is
// one of text.
func pathMatcher(p mesh.PathMatch) *matcherv3.StringMatcher {
	switch p.Kind {
	case mesh.Prefix, mesh.Any:
		return prefixMatcher(p.Value)
	case mesh.Exact, mesh.Regex:
	}
	return stringMatcher(p.Kind, p.Value)
}

func prefixMatcher(prefix string) *matcherv3.StringMatcher {
	if prefix == "" { // which Envoy refuses
		return stringMatcher(mesh.Regex, ".*")
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: prefix}}
}

// principal is who calls.
func principal(r mesh.AuthorizationRule) *rbacv3.Principal {
	var all []*rbacv3.Principal
	if len(r.Principals) > 0 {
		all = append(all, oneOf(r.Principals))
	}
	if len(r.NotPrincipals) > 0 {
		all = append(all, &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: oneOf(r.NotPrincipals)}})
	}
	switch len(all) {
	case 0:
		return anybody()
	case 1:
		return all[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: all}}}
}

func oneOf(principals []string) *rbacv3.Principal {
	var ids []*rbacv3.Principal
	for _, p := range principals {
		a := &rbacv3.Principal_Authenticated{}
		if prefix, ok := strings.CutSuffix(p, "*"); !ok {
			a.PrincipalName = stringMatcher(mesh.Exact, p)
		} else if prefix != "" {
			a.PrincipalName = prefixMatcher(prefix)
		}
		ids = append(ids, &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: a}})
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ids}}}
}

func anybody() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
}

func anything() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
}

func never() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: anything()}}
}

// ofRequests are the filters that stand before the router.
func (as authorizations) ofRequests(dp DataPlane) []*hcmv3.HttpFilter {
	var out []*hcmv3.HttpFilter
	for _, v := range as.verdicts(true, dp) {
		f := &httprbacv3.RBAC{Rules: v.enforce, ShadowRules: v.shadow}
		if dp == Envoy {
			// Else both filters would count as one.
			f.RulesStatPrefix, f.ShadowRulesStatPrefix = v.statPrefix(), v.statPrefix()
		}
		out = append(out, &hcmv3.HttpFilter{Name: filterHTTPRBAC, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(f)}})
	}
	return out
}

// ofConnections are the filters that stand before the tcp_proxy.
func (as authorizations) ofConnections(dp DataPlane) []*listenerv3.Filter {
	var out []*listenerv3.Filter
	for _, v := range as.verdicts(false, dp) {
		out = append(out, &listenerv3.Filter{Name: filterNetworkRBAC, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed(&networkrbacv3.RBAC{
			Rules: v.enforce, ShadowRules: v.shadow, StatPrefix: v.statPrefix(),
		})}})
	}
	return out
}

func (v verdicts) statPrefix() string { return strings.ToLower(string(v.action)) + "." }

// AuthorizationParity tells what each data plane makes of an AuthorizationPolicy
// at the pods that it applies to.
func AuthorizationParity(a mesh.Authorization) []ParityNote {
	const noProxy = "a proxyless gRPC program has nobody that asks its callers"
	var p parity
	if a.Observe {
		p.note("mode", Approximated, "what would have been denied is counted in Envoy's shadow statistics, and not logged", Ignored, noProxy)
	}
	support, detail := Approximated, "connections that are no requests are judged at the first byte that the caller sends: a server that speaks first is not heard, unless the policy observes only"
	if a.Observe {
		support, detail = Honoured, ""
	}
	p.note("action", support, detail, Ignored, noProxy)
	if slices.ContainsFunc(a.Rules, func(r mesh.AuthorizationRule) bool { return len(r.Methods)+len(r.Paths) > 0 }) {
		p.note("rules.to", Approximated, "what comes over mutual TLS to a port of unknown protocol is carried as bytes, of which no method and no path is known: Deny matches, Allow does not",
			Ignored, noProxy)
	}
	return p
}
