// Package authz decides whether a caller may do what it asks for.
//
// It is pure, and knows what Envoy's RBAC filters say, as far as identities,
// methods and paths go. A Policy is made by xdsclient out of the filters of a
// listener, and asked by the proxy for each request or connection. Whatever it
// does not know is refused when the policy is made, so that it never lets in
// whom it should not.
package authz

import "strings"

// Policy is what a port asks of those who call it. Nil lets everybody in. It is
// never changed once made.
type Policy struct {
	// Sets in the order in which they are asked. The first that denies decides.
	Sets []Set
}

// Set is one RBAC filter: rules of one action, those in force and those that
// only observe.
type Set struct {
	// Deny: who matches a rule is denied. Else who matches none is.
	Deny bool
	// Enforced and Observed are the rules, by name. Nil says that the filter has
	// none of the kind, which is not the same as an Allow with none that matches.
	Enforced, Observed []Rule
}

// Rule matches when one of its Permissions and one of its Principals do.
type Rule struct {
	// Name is <namespace>/<policy>[<rule>].
	Name        string
	Permissions []Node
	Principals  []Node
}

// Op is what a Node compares.
type Op uint8

// The operations. Method, Path and PathPrefix never match a connection of which
// nobody reads requests.
const (
	Any           Op = iota // everything
	And                     // all of Kids
	Or                      // one of Kids
	Not                     // not Kids[0]
	Authenticated           // whoever has proved an identity
	Principal               // the identity Value
	PrincipalPrefix
	Method
	Path
	PathPrefix
)

// Node is one condition.
type Node struct {
	Op    Op
	Value string
	Kids  []Node
}

// Request is what is asked for. The byte slices are only read, and not kept.
type Request struct {
	// Principal is the SPIFFE ID that the caller has proved; empty in clear.
	Principal string
	// HTTP: Method and Path (normalised, without the query) are those of a request.
	HTTP         bool
	Method, Path []byte
}

// Decision is what became of a request. Of several reasons it names the first.
type Decision struct {
	Denied bool
	// Rule that denied, or the policies of which none allowed, in words; empty
	// where it is not denied.
	Reason string
	// Policy is <namespace>/<name> of the first of these.
	Policy string
	// Observed is what a policy in Observe mode would have denied it for, and
	// ObservedPolicy its name; both empty otherwise.
	Observed, ObservedPolicy string
}

// Decide asks all sets. It allocates only to explain.
func (p *Policy) Decide(r *Request) Decision {
	var d Decision
	if p == nil {
		return d
	}
	for i := range p.Sets {
		s := &p.Sets[i]
		if s.Observed != nil && d.Observed == "" {
			d.Observed, d.ObservedPolicy = s.judge(s.Observed, r)
		}
		if s.Enforced != nil && !d.Denied {
			d.Reason, d.Policy = s.judge(s.Enforced, r)
			d.Denied = d.Reason != ""
		}
	}
	return d
}

// judge returns why the rules deny, and by which policy; nothing where they do
// not.
func (s *Set) judge(rules []Rule, r *Request) (reason, policy string) {
	for i := range rules {
		if !rules[i].matches(r) {
			continue
		}
		if s.Deny {
			return "denied by " + rules[i].Name, policyOf(rules[i].Name)
		}
		return "", ""
	}
	if s.Deny {
		return "", ""
	}
	if len(rules) == 0 {
		return "no rule allows anything", ""
	}
	return "allowed by none of " + policies(rules), policyOf(rules[0].Name)
}

// maxNamed is how many policies a reason names.
const maxNamed = 4

func policies(rules []Rule) string {
	var names []string
	for i := range rules {
		p := policyOf(rules[i].Name)
		if len(names) > 0 && names[len(names)-1] == p {
			continue
		}
		if len(names) == maxNamed {
			return strings.Join(names, ", ") + " and others"
		}
		names = append(names, p)
	}
	return strings.Join(names, ", ")
}

func policyOf(rule string) string {
	if at := strings.LastIndexByte(rule, '['); at > 0 {
		return rule[:at]
	}
	return rule
}

func (r *Rule) matches(q *Request) bool { return oneOf(r.Permissions, q) && oneOf(r.Principals, q) }

func oneOf(nodes []Node, q *Request) bool {
	for i := range nodes {
		if nodes[i].matches(q) {
			return true
		}
	}
	return false
}

func (n *Node) matches(q *Request) bool {
	switch n.Op {
	case Any:
		return true
	case And:
		for i := range n.Kids {
			if !n.Kids[i].matches(q) {
				return false
			}
		}
		return true
	case Or:
		return oneOf(n.Kids, q)
	case Not:
		return !n.Kids[0].matches(q)
	case Authenticated:
		return q.Principal != ""
	case Principal:
		return q.Principal != "" && q.Principal == n.Value
	case PrincipalPrefix:
		return q.Principal != "" && strings.HasPrefix(q.Principal, n.Value)
	case Method:
		return q.HTTP && string(q.Method) == n.Value
	case Path:
		return q.HTTP && string(q.Path) == n.Value
	case PathPrefix:
		return q.HTTP && len(q.Path) >= len(n.Value) && string(q.Path[:len(n.Value)]) == n.Value
	}
	return false
}
