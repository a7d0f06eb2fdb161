package authz_test

import (
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/authz"
)

const (
	storefront = "spiffe://cluster.local/ns/shop/sa/storefront"
	stranger   = "spiffe://cluster.local/ns/other/sa/default"
)

func any1() []authz.Node { return []authz.Node{{Op: authz.Any}} }

func from(ids ...string) []authz.Node {
	n := authz.Node{Op: authz.Or}
	for _, id := range ids {
		n.Kids = append(n.Kids, authz.Node{Op: authz.Principal, Value: id})
	}
	return []authz.Node{n}
}

func to(method, prefix string) []authz.Node {
	return []authz.Node{{Op: authz.And, Kids: []authz.Node{{Op: authz.Method, Value: method}, {Op: authz.PathPrefix, Value: prefix}}}}
}

// What a set of policies says to callers, each line with the reason that a user
// reads.
func TestDecide(t *testing.T) {
	read := authz.Rule{Name: "shop/read[0]", Permissions: to("GET", "/api/"), Principals: from(storefront)}
	admin := authz.Rule{Name: "shop/admin[ops]", Permissions: any1(), Principals: []authz.Node{{Op: authz.PrincipalPrefix, Value: "spiffe://cluster.local/ns/ops/"}}}
	nobody := authz.Rule{Name: "shop/closed[]", Permissions: []authz.Node{{Op: authz.Not, Kids: any1()}}, Principals: any1()}
	strangers := authz.Rule{Name: "shop/no-strangers[0]", Permissions: any1(), Principals: []authz.Node{{Op: authz.Not, Kids: []authz.Node{{Op: authz.PrincipalPrefix, Value: "spiffe://cluster.local/ns/shop/"}}}}}
	get := func(who, path string) authz.Request {
		return authz.Request{Principal: who, HTTP: true, Method: []byte("GET"), Path: []byte(path)}
	}
	allow := authz.Set{Enforced: []authz.Rule{admin, read}}
	deny := authz.Set{Deny: true, Enforced: []authz.Rule{strangers}}
	for _, c := range []struct {
		name string
		p    *authz.Policy
		r    authz.Request
		want authz.Decision
	}{
		{"no policy", nil, get("", "/"), authz.Decision{}},
		{"allowed", &authz.Policy{Sets: []authz.Set{allow}}, get(storefront, "/api/x"), authz.Decision{}},
		{"allowed by another rule", &authz.Policy{Sets: []authz.Set{allow}}, get("spiffe://cluster.local/ns/ops/sa/x", "/"), authz.Decision{}},
		{"other path", &authz.Policy{Sets: []authz.Set{allow}}, get(storefront, "/apix"), authz.Decision{Denied: true, Reason: "allowed by none of shop/admin, shop/read", Policy: "shop/admin"}},
		{"other caller", &authz.Policy{Sets: []authz.Set{allow}}, get(stranger, "/api/x"), authz.Decision{Denied: true, Reason: "allowed by none of shop/admin, shop/read", Policy: "shop/admin"}},
		{"clear text has no identity", &authz.Policy{Sets: []authz.Set{allow}}, get("", "/api/x"), authz.Decision{Denied: true, Reason: "allowed by none of shop/admin, shop/read", Policy: "shop/admin"}},
		{"bytes have no method", &authz.Policy{Sets: []authz.Set{allow}}, authz.Request{Principal: storefront}, authz.Decision{Denied: true, Reason: "allowed by none of shop/admin, shop/read", Policy: "shop/admin"}},
		{"an Allow without rules", &authz.Policy{Sets: []authz.Set{{Enforced: []authz.Rule{nobody}}}}, get(storefront, "/"), authz.Decision{Denied: true, Reason: "allowed by none of shop/closed", Policy: "shop/closed"}},
		{"a filter whose rules are empty", &authz.Policy{Sets: []authz.Set{{Enforced: []authz.Rule{}}}}, get(storefront, "/"), authz.Decision{Denied: true, Reason: "no rule allows anything"}},
		{"deny wins", &authz.Policy{Sets: []authz.Set{deny, allow}}, get("spiffe://cluster.local/ns/ops/sa/x", "/"), authz.Decision{Denied: true, Reason: "denied by shop/no-strangers[0]", Policy: "shop/no-strangers"}},
		{"clear text is a stranger too", &authz.Policy{Sets: []authz.Set{deny}}, get("", "/"), authz.Decision{Denied: true, Reason: "denied by shop/no-strangers[0]", Policy: "shop/no-strangers"}},
		{"observed", &authz.Policy{Sets: []authz.Set{{Deny: true, Observed: []authz.Rule{strangers}}}}, get(stranger, "/"), authz.Decision{Observed: "denied by shop/no-strangers[0]", ObservedPolicy: "shop/no-strangers"}},
		{"observed and enforced", &authz.Policy{Sets: []authz.Set{{Deny: true, Observed: []authz.Rule{strangers}}, allow}}, get(stranger, "/"), authz.Decision{
			Denied: true, Reason: "allowed by none of shop/admin, shop/read", Policy: "shop/admin", Observed: "denied by shop/no-strangers[0]", ObservedPolicy: "shop/no-strangers",
		}},
	} {
		if got := c.p.Decide(&c.r); got != c.want {
			t.Errorf("%s: %+v\nwant %+v", c.name, got, c.want)
		}
	}
	p, r := &authz.Policy{Sets: []authz.Set{deny, {Enforced: []authz.Rule{read}}}}, get(storefront, "/api/x")
	if n := testing.AllocsPerRun(100, func() {
		if p.Decide(&r).Denied {
			t.Error("denied")
		}
	}); n != 0 {
		t.Errorf("%v allocations for a request that is allowed", n)
	}
}
