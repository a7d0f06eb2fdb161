package translate

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// Limits of an AuthorizationPolicy; every proxy that it applies to has all of it.
const (
	maxAuthorizationRules = 64
	maxAuthorizationParts = 64 // entries of from, and of to
	maxAuthorizationWords = 64 // entries of one list in them
	// All principals, methods and paths that a proxy is told of one policy: every
	// entry of to has the callers of its rule.
	maxAuthorizationTotal = 4096
)

// FailsClosed is the message of the Problem that says that an AuthorizationPolicy
// is invalid and denies. It is not true of one whose last valid version is in force.
const FailsClosed = "invalid, and no valid version of it is known: everything that it applies to is denied until it is corrected or deleted"

// addAuthorizationPolicies tells the pods that a policy names of it. Any number
// of policies may name the same target: all of them apply.
func (b *builder) addAuthorizationPolicies(in []*v1alpha1.AuthorizationPolicy) {
	for _, obj := range in {
		r := b.on(kindAuthorizationPolicy, obj)
		policy := b.authorization(r, obj)
		targets := b.authorizationTargets(r, obj)
		if r.bad && slices.ContainsFunc(*r.found, func(p Problem) bool { return p.Reason == ReasonInvalid }) {
			policy.Action = mesh.Deny
			policy.Rules = []mesh.AuthorizationRule{{Name: "invalid"}}
			if !policy.Observe {
				r.add("", ReasonInvalid, FailsClosed)
				// The consequence comes first: a status may cut off the rest.
				n := len(*r.found) - 1
				*r.found = slices.Insert((*r.found)[:n:n], 0, (*r.found)[n])
			}
		}
		reached := map[*pod][]uint16{}
		for i := range targets {
			b.protect(r, obj.Namespace, i, &targets[i], policy, reached)
		}
		for pd, ports := range reached {
			one := policy
			if !slices.Contains(ports, everyPort) {
				slices.Sort(ports)
				one.Ports = slices.Compact(ports)
			}
			one.Rules = slices.Clone(policy.Rules)
			pd.authorizations = append(pd.authorizations, one)
		}
		b.policyStatus(r, obj, obj.Spec.TargetRefs, func(i int) (keys, instances []string) {
			return keysOf(targets[i].ports), targets[i].instances
		})
	}
}

// everyPort is in the list of ports of a pod that a policy applies to as a whole;
// it keeps such a list from looking like an empty one.
const everyPort = 0

// authorizationTarget is one targetRef. One that names nothing that exists has
// neither a namespace nor ports.
type authorizationTarget struct {
	namespace bool
	service   *service
	ports     []*port
	instances []string
}

func (b *builder) authorizationTargets(r *report, obj *v1alpha1.AuthorizationPolicy) []authorizationTarget {
	out := make([]authorizationTarget, len(obj.Spec.TargetRefs))
	for i, ref := range obj.Spec.TargetRefs {
		field := at("spec.targetRefs", i)
		switch {
		case ref.Group == "" && ref.Kind == kindService:
			s, p, ok := b.serviceTarget(r, field, obj.Namespace, ref)
			switch {
			case !ok:
			case p != nil:
				out[i] = authorizationTarget{service: s, ports: []*port{p}}
			default:
				out[i] = authorizationTarget{service: s, ports: s.ports}
			}
		case ref.Group == "" && ref.Kind == kindNamespace:
			if string(ref.Name) != obj.Namespace {
				r.add(field+".name", ReasonTargetNotFound, "a policy applies to its own namespace only, which is %s; write that, or move the policy to %q", obj.Namespace, ref.Name)
				continue
			}
			if section := sectionName(ref); section != "" {
				r.add(field+".sectionName", ReasonInvalid, "a namespace has no port %q; delete it, or name a Service", section)
			}
			out[i].namespace = true
		default:
			r.add(field, ReasonUnsupported, `%s/%s cannot be a target; write group: "" and kind: Service or Namespace`, ref.Group, ref.Kind)
		}
	}
	return out
}

// protect adds the ports of pods that a target stands for to reached.
func (b *builder) protect(r *report, namespace string, i int, t *authorizationTarget, policy mesh.Authorization, reached map[*pod][]uint16) {
	bare := false
	for _, pd := range b.podsIn[namespace] {
		var ports []uint16
		switch {
		case t.namespace && pd.proxied:
			ports = []uint16{everyPort}
		case t.namespace:
			bare = true
		default:
			for _, l := range pd.leads {
				switch {
				case !slices.Contains(t.ports, l.port):
				case pd.captures(l.number):
					ports = append(ports, l.number)
				default:
					bare = true
				}
			}
		}
		if len(ports) > 0 {
			reached[pd] = append(reached[pd], ports...)
			t.instances = append(t.instances, pd.key.String())
		}
	}
	slices.Sort(t.instances)
	b.noRequests(r, i, t, policy)
	if !bare {
		return
	}
	what := "the namespace"
	if t.service != nil {
		what = "Service " + t.service.key.String()
	}
	// Without names: they change with every pod, and with them the message.
	r.note(at("spec.targetRefs", i), ReasonNotEnforced, "some pods of %s have no proxy, or do not capture the port: nothing enforces the policy there; have them injected, or remove the exclusion", what)
}

// noRequests tells of rules that ask for methods and paths where there are none.
func (b *builder) noRequests(r *report, i int, t *authorizationTarget, policy mesh.Authorization) {
	if !slices.ContainsFunc(policy.Rules, func(rl mesh.AuthorizationRule) bool { return len(rl.Methods)+len(rl.Paths) > 0 }) {
		return
	}
	what := "nothing"
	if policy.Action == mesh.Deny {
		what = "every connection of its callers"
	}
	for _, p := range t.ports {
		if !p.declared.MayBeHTTP() {
			r.note(at("spec.targetRefs", i), ReasonUnsupportedProtocol, "port %s of Service %s %s, which has no methods and no paths: a rule with some matches %s there; name another port, or write a rule without them",
				p.describe(), p.service.key, p.speaks(), what)
		}
	}
}

// authorization reads the policy. Where something is invalid r is bad and the
// rules mean nothing.
func (b *builder) authorization(r *report, obj *v1alpha1.AuthorizationPolicy) mesh.Authorization {
	spec := &obj.Spec
	checkTargetRefs(r, spec.TargetRefs)
	out := mesh.Authorization{Policy: keyOf(obj).String()}
	switch spec.Mode {
	case v1alpha1.ModeObserve:
		out.Observe = true
	case v1alpha1.ModeEnforce, "":
	default:
		r.add("spec.mode", ReasonInvalid, "%q is not a mode; write Observe or Enforce", spec.Mode)
	}
	switch spec.Action {
	case v1alpha1.ActionAllow, "":
		out.Action = mesh.Allow
	case v1alpha1.ActionDeny:
		out.Action = mesh.Deny
	default:
		r.add("spec.action", ReasonInvalid, "%q is not an action; write Allow or Deny", spec.Action)
	}
	if n := len(spec.Rules); n > maxAuthorizationRules {
		r.add("spec.rules", ReasonInvalid, "%d rules; at most %d, spread them over several policies", n, maxAuthorizationRules)
		return out
	}
	names := map[string]bool{}
	for i := range spec.Rules {
		rule := &spec.Rules[i]
		field := at("spec.rules", i)
		name := cmp.Or(rule.Name, strconv.Itoa(i))
		if errs := validation.IsDNS1123Subdomain(name); len(errs) > 0 {
			r.add(field+".name", ReasonInvalid, "%q cannot be a name; %s", name, nameRemedy)
		} else if names[name] {
			r.add(field+".name", ReasonInvalid, "%q names an earlier rule; give each rule its own name", name)
		}
		names[name] = true
		out.Rules = append(out.Rules, b.authorizationRule(r, field, name, obj.Namespace, rule)...)
	}
	total := 0
	for _, rl := range out.Rules {
		total += len(rl.Principals) + len(rl.Methods) + len(rl.Paths)
	}
	if total > maxAuthorizationTotal {
		r.add("spec.rules", ReasonInvalid, "come to %d callers, methods and paths, those of from counted for each entry of to; at most %d, spread them over several policies", total, maxAuthorizationTotal)
	}
	return out
}

// authorizationRule makes one rule of the mesh for each entry of to: in it any
// method goes with any path, which is not so between entries.
func (b *builder) authorizationRule(r *report, field, name, namespace string, in *v1alpha1.AuthorizationRule) []mesh.AuthorizationRule {
	if n := len(in.From); n > maxAuthorizationParts {
		r.add(field+".from", ReasonInvalid, "%d entries; at most %d", n, maxAuthorizationParts)
		return nil
	}
	if n := len(in.To); n > maxAuthorizationParts {
		r.add(field+".to", ReasonInvalid, "%d entries; at most %d", n, maxAuthorizationParts)
		return nil
	}
	var principals []string
	for i := range in.From {
		principals = append(principals, b.principals(r, at(field+".from", i), namespace, &in.From[i])...)
	}
	slices.Sort(principals)
	principals = slices.Compact(principals)
	if len(in.To) == 0 {
		return []mesh.AuthorizationRule{{Name: name, Principals: principals}}
	}
	var out []mesh.AuthorizationRule
	for i := range in.To {
		one := mesh.AuthorizationRule{Name: name, Principals: principals}
		if len(in.To) > 1 {
			// A slash is in no name, so that this is no other rule's.
			one.Name += "/" + strconv.Itoa(i)
		}
		operation(r, at(field+".to", i), &in.To[i], &one)
		out = append(out, one)
	}
	return out
}

// principals are the SPIFFE IDs of a source, exact ones and prefixes with a star
// at the end. They are never none unless r is bad: that would mean anybody.
func (b *builder) principals(r *report, field, namespace string, in *v1alpha1.AuthorizationSource) []string {
	bad := false
	fail := func(field, format string, args ...any) {
		r.add(field, ReasonInvalid, format, args...)
		bad = true
	}
	if len(in.ServiceAccounts)+len(in.Namespaces)+len(in.Principals) == 0 {
		fail(field, "sets none of serviceAccounts, namespaces and principals; set one, or delete from to mean every caller")
	}
	for _, l := range []struct {
		name string
		n    int
	}{{"serviceAccounts", len(in.ServiceAccounts)}, {"namespaces", len(in.Namespaces)}, {"principals", len(in.Principals)}} {
		if l.n > maxAuthorizationWords {
			fail(field+"."+l.name, "%d entries; at most %d, spread them over several entries of from", l.n, maxAuthorizationWords)
		}
	}
	if bad {
		return nil
	}
	var lists [][]string
	id := func(ns, account string) string {
		return identity.Identity{TrustDomain: b.trustDomain, Namespace: ns, ServiceAccount: account}.SPIFFE()
	}
	var accounts, namespaces, principals []string
	for i, sa := range in.ServiceAccounts {
		ns, name, ok := strings.Cut(sa, "/")
		if !ok {
			ns, name = namespace, sa
		}
		if len(validation.IsDNS1123Label(ns)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 {
			fail(at(field+".serviceAccounts", i), "%q is no service account; write <namespace>/<name>, or <name> for one of namespace %s", sa, namespace)
			continue
		}
		accounts = append(accounts, id(ns, name))
	}
	for i, ns := range in.Namespaces {
		if len(validation.IsDNS1123Label(ns)) > 0 {
			fail(at(field+".namespaces", i), "%q is not a namespace; %s", ns, nameRemedy)
			continue
		}
		namespaces = append(namespaces, id(ns, "")+"*")
	}
	for i, p := range in.Principals {
		if !isPrincipal(p) {
			fail(at(field+".principals", i), "%q is no SPIFFE ID; write spiffe://<trust domain>/ns/<namespace>/sa/<account>, the beginning of one and *, or * for everybody who proves an identity", p)
			continue
		}
		principals = append(principals, p)
	}
	if bad {
		return nil
	}
	for _, l := range [][]string{accounts, namespaces, principals} {
		if len(l) > 0 {
			lists = append(lists, l)
		}
	}
	out := lists[0]
	for _, l := range lists[1:] {
		out = both(out, l)
	}
	if len(out) == 0 {
		fail(field, "serviceAccounts, namespaces and principals exclude each other: an entry matches who is in each of its lists, so that nobody is in this one; write an entry of from for each")
	}
	return out
}

// isPrincipal: a whole ID is as strict as those in certificates, because what is
// written otherwise would never match.
func isPrincipal(s string) bool {
	prefix, wild := strings.CutSuffix(s, "*")
	if !wild {
		_, err := identity.Parse(s)
		return err == nil
	}
	return prefix == "" || strings.HasPrefix(prefix, "spiffe://") && !strings.ContainsAny(prefix, "* \t\r\n?#%") && len(prefix) <= 2048
}

// both returns what is in a and in b, which hold IDs and prefixes.
func both(a, b []string) []string {
	var out []string
	for _, x := range a {
		for _, y := range b {
			if within(x, y) {
				out = append(out, x)
			} else if within(y, x) {
				out = append(out, y)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// within says whether everything that x matches y matches too.
func within(x, y string) bool {
	prefix, wild := strings.CutSuffix(y, "*")
	if !wild {
		return x == y
	}
	return strings.HasPrefix(strings.TrimSuffix(x, "*"), prefix)
}

func operation(r *report, field string, in *v1alpha1.AuthorizationOperation, out *mesh.AuthorizationRule) {
	switch {
	case len(in.Methods)+len(in.Paths) == 0:
		r.add(field, ReasonInvalid, "sets neither methods nor paths; set one, or delete to to mean everything")
	case len(in.Methods) > maxAuthorizationWords:
		r.add(field+".methods", ReasonInvalid, "%d entries; at most %d", len(in.Methods), maxAuthorizationWords)
		return
	case len(in.Paths) > maxAuthorizationWords:
		r.add(field+".paths", ReasonInvalid, "%d entries; at most %d, spread them over several entries of to", len(in.Paths), maxAuthorizationWords)
		return
	}
	for i, m := range in.Methods {
		if !isToken(m) || m != strings.ToUpper(m) || strings.Contains(m, "*") {
			r.add(at(field+".methods", i), ReasonInvalid, "%q is not a method; write it in capitals, as in GET", m)
			continue
		}
		out.Methods = append(out.Methods, m)
	}
	slices.Sort(out.Methods)
	out.Methods = slices.Compact(out.Methods)
	for i, p := range in.Paths {
		pf := at(field+".paths", i)
		value, wild := strings.CutSuffix(p, "*")
		if strings.Contains(value, "*") {
			r.add(pf, ReasonInvalid, "%q has a * that is not at its end; write the path, or its beginning and *", p)
			continue
		}
		kind := mesh.Exact
		if wild {
			kind = mesh.Prefix
		}
		if wild && value == "" {
			value = "/"
		}
		if normalPath(r, pf, value, wild) {
			out.Paths = append(out.Paths, mesh.PathMatch{Kind: kind, Value: value})
		}
	}
	slices.SortFunc(out.Paths, func(a, b mesh.PathMatch) int {
		return cmp.Or(cmp.Compare(a.Value, b.Value), cmp.Compare(a.Kind, b.Kind))
	})
	out.Paths = slices.Compact(out.Paths)
}
