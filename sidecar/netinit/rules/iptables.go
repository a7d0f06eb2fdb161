package rules

import (
	"strconv"
	"strings"
)

// Names of our chains in the table nat of iptables.
const (
	ChainOutput     = "OUTRIGGER_OUTPUT"
	ChainPrerouting = "OUTRIGGER_INBOUND"
)

// Jumps lead from the kernel's chains into ours, as iptables-save prints them
// behind -A.
var Jumps = []string{
	"PREROUTING -p tcp -j " + ChainPrerouting,
	"OUTPUT -p tcp -j " + ChainOutput,
}

// IPTables are the rules as lines of iptables-save, beginning with -A.
func (r Rules) IPTables() []string {
	var out []string
	for _, rule := range r.Prerouting {
		out = append(out, rule.iptables(ChainPrerouting))
	}
	for _, rule := range r.Output {
		out = append(out, rule.iptables(ChainOutput))
	}
	return out
}

func (r Rule) iptables(chain string) string {
	w := []string{"-A", chain}
	if r.Source.IsValid() {
		w = append(w, "-s", r.Source.String())
	}
	if r.Dest.IsValid() && r.Dest.Bits() > 0 { // iptables-save does not print "everything"
		w = append(w, "-d", r.Dest.String())
	}
	if r.NotDest.IsValid() {
		w = append(w, "!", "-d", r.NotDest.String())
	}
	if r.Loopback {
		w = append(w, "-o", "lo")
	}
	if r.Port != 0 || r.Redirect != 0 {
		w = append(w, "-p", "tcp")
	}
	if r.Port != 0 {
		w = append(w, "-m", "tcp", "--dport", strconv.Itoa(int(r.Port)))
	}
	if r.HasUID {
		w = append(w, "-m", "owner", "--uid-owner", strconv.FormatUint(uint64(r.UID), 10))
	}
	if r.Redirect == 0 {
		return strings.Join(append(w, "-j", "RETURN"), " ")
	}
	return strings.Join(append(w, "-j", "REDIRECT", "--to-ports", strconv.Itoa(int(r.Redirect))), " ")
}
