package xdsclient

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbachttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	rbacnetworkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/authz"
)

// Limits of an RBAC filter.
const (
	maxRules = 4096 // policies of a filter
	maxNodes = 4096 // conditions of a rule
	maxDepth = 8    // of conditions in conditions
)

// decodeRBAC makes a policy of the RBAC filters of a chain, in their order; none
// is no policy. What it does not know is an error: it might be what keeps
// strangers out.
func decodeRBAC(filters []*anypb.Any) (*authz.Policy, error) {
	if len(filters) == 0 {
		return nil, nil //nolint:nilnil // everybody may call
	}
	out := &authz.Policy{}
	for i, a := range filters {
		var rules, shadow *rbacv3.RBAC
		m, err := a.UnmarshalNew()
		if err != nil {
			return nil, fmt.Errorf("rbac[%d]: %w", i, err)
		}
		switch f := m.(type) {
		case *rbachttpv3.RBAC:
			if f.GetMatcher() != nil || f.GetShadowMatcher() != nil {
				return nil, fmt.Errorf("rbac[%d].matcher: it is not supported; rules and shadow_rules are", i)
			}
			rules, shadow = f.GetRules(), f.GetShadowRules()
		case *rbacnetworkv3.RBAC:
			if f.GetMatcher() != nil || f.GetShadowMatcher() != nil {
				return nil, fmt.Errorf("rbac[%d].matcher: it is not supported; rules and shadow_rules are", i)
			}
			rules, shadow = f.GetRules(), f.GetShadowRules()
		default:
			return nil, fmt.Errorf("rbac[%d]: %q is not an RBAC filter", i, a.GetTypeUrl())
		}
		// A filter has one action here; where it has two it is two.
		for _, part := range []struct {
			field    string
			in       *rbacv3.RBAC
			observed bool
		}{{"shadow_rules", shadow, true}, {"rules", rules, false}} {
			if part.in == nil {
				continue
			}
			set, err := rbacSet(part.in, part.observed)
			if err != nil {
				return nil, fmt.Errorf("rbac[%d].%s.%w", i, part.field, err)
			}
			out.Sets = append(out.Sets, set)
		}
	}
	return out, nil
}

func rbacSet(in *rbacv3.RBAC, observed bool) (authz.Set, error) {
	var out authz.Set
	switch in.GetAction() {
	case rbacv3.RBAC_ALLOW:
	case rbacv3.RBAC_DENY:
		out.Deny = true
	default:
		return out, fmt.Errorf("action: %s is not supported; ALLOW and DENY are", in.GetAction())
	}
	if n := len(in.GetPolicies()); n > maxRules {
		return out, fmt.Errorf("policies: %d; at most %d", n, maxRules)
	}
	rules := make([]authz.Rule, 0, len(in.GetPolicies()))
	for _, name := range slices.Sorted(maps.Keys(in.GetPolicies())) {
		p := in.GetPolicies()[name]
		rule := authz.Rule{Name: name}
		if p.GetCondition() != nil || p.GetCheckedCondition() != nil {
			return out, fmt.Errorf("policies[%s].condition: it is not supported", name)
		}
		budget := maxNodes
		for i, n := range p.GetPermissions() {
			node, err := permission(n, 0, &budget)
			if err != nil {
				return out, fmt.Errorf("policies[%s].permissions[%d]: %w", name, i, err)
			}
			rule.Permissions = append(rule.Permissions, node)
		}
		for i, n := range p.GetPrincipals() {
			node, err := principal(n, 0, &budget)
			if err != nil {
				return out, fmt.Errorf("policies[%s].principals[%d]: %w", name, i, err)
			}
			rule.Principals = append(rule.Principals, node)
		}
		rules = append(rules, rule)
	}
	if observed {
		out.Observed = rules
	} else {
		out.Enforced = rules
	}
	return out, nil
}

var (
	errTooDeep = fmt.Errorf("conditions in conditions: at most %d deep", maxDepth)
	errTooMany = fmt.Errorf("too many conditions: at most %d", maxNodes)
)

func spend(depth int, budget *int) error {
	if *budget--; *budget < 0 {
		return errTooMany
	}
	if depth > maxDepth {
		return errTooDeep
	}
	return nil
}

// kids decodes the conditions in a condition.
func kids[T any](op authz.Op, in []T, depth int, budget *int, one func(T, int, *int) (authz.Node, error)) (authz.Node, error) {
	out := authz.Node{Op: op}
	for _, k := range in {
		n, err := one(k, depth+1, budget)
		if err != nil {
			return out, err
		}
		out.Kids = append(out.Kids, n)
	}
	return out, nil
}

func permission(in *rbacv3.Permission, depth int, budget *int) (authz.Node, error) {
	if err := spend(depth, budget); err != nil {
		return authz.Node{}, err
	}
	switch r := in.GetRule().(type) {
	case *rbacv3.Permission_Any:
		if r.Any {
			return authz.Node{Op: authz.Any}, nil
		}
		return authz.Node{}, errors.New("any: false is not supported")
	case *rbacv3.Permission_AndRules:
		return kids(authz.And, r.AndRules.GetRules(), depth, budget, permission)
	case *rbacv3.Permission_OrRules:
		return kids(authz.Or, r.OrRules.GetRules(), depth, budget, permission)
	case *rbacv3.Permission_NotRule:
		return kids(authz.Not, []*rbacv3.Permission{r.NotRule}, depth, budget, permission)
	case *rbacv3.Permission_Header:
		return methodIs(r.Header)
	case *rbacv3.Permission_UrlPath:
		return textIs(r.UrlPath.GetPath(), authz.Path, authz.PathPrefix)
	default:
		return authz.Node{}, fmt.Errorf("rule: %T is not supported", r)
	}
}

func methodIs(h *routev3.HeaderMatcher) (authz.Node, error) {
	if !strings.EqualFold(h.GetName(), ":method") || h.GetInvertMatch() || h.GetTreatMissingHeaderAsEmpty() {
		return authz.Node{}, fmt.Errorf("header %q: of headers only :method is supported, not inverted", h.GetName())
	}
	n, err := textIs(h.GetStringMatch(), authz.Method, authz.Any)
	if err == nil && n.Op != authz.Method {
		err = errors.New("header :method: an exact match is supported")
	}
	return n, err
}

func textIs(m *matcherv3.StringMatcher, exact, prefix authz.Op) (authz.Node, error) {
	if m.GetIgnoreCase() {
		return authz.Node{}, errors.New("ignore_case: it is not supported")
	}
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		return authz.Node{Op: exact, Value: p.Exact}, nil
	case *matcherv3.StringMatcher_Prefix:
		return authz.Node{Op: prefix, Value: p.Prefix}, nil
	default:
		return authz.Node{}, fmt.Errorf("string match %T is not supported; exact and prefix are", p)
	}
}

func principal(in *rbacv3.Principal, depth int, budget *int) (authz.Node, error) {
	if err := spend(depth, budget); err != nil {
		return authz.Node{}, err
	}
	switch id := in.GetIdentifier().(type) {
	case *rbacv3.Principal_Any:
		if id.Any {
			return authz.Node{Op: authz.Any}, nil
		}
		return authz.Node{}, errors.New("any: false is not supported")
	case *rbacv3.Principal_AndIds:
		return kids(authz.And, id.AndIds.GetIds(), depth, budget, principal)
	case *rbacv3.Principal_OrIds:
		return kids(authz.Or, id.OrIds.GetIds(), depth, budget, principal)
	case *rbacv3.Principal_NotId:
		return kids(authz.Not, []*rbacv3.Principal{id.NotId}, depth, budget, principal)
	case *rbacv3.Principal_Authenticated_:
		if id.Authenticated.GetPrincipalName() == nil {
			return authz.Node{Op: authz.Authenticated}, nil
		}
		return textIs(id.Authenticated.GetPrincipalName(), authz.Principal, authz.PrincipalPrefix)
	default:
		return authz.Node{}, fmt.Errorf("identifier: %T is not supported; any, authenticated and their combinations are", id)
	}
}
