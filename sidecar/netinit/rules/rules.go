// Package rules says which TCP connections of a pod are led to its proxy, as
// data.
//
// It is pure: it knows addresses, ports and users, and the order in which they
// are asked for. How rules get into a kernel is package redirect's business.
// Command netinit, the CNI plugin and their check call it, so that all three
// mean the same rules.
package rules

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// ProxyUID is the user that the proxy runs as unless it is told otherwise.
const ProxyUID = 1337

// MaxItems of one list of exclusions or inclusions: each is a rule that every
// new connection may have to pass.
const MaxItems = 128

// Addresses that the proxy delivers inbound connections from, so that these
// meet no rule. The one of IPv6 has to be added to lo.
var (
	Delivery4 = netip.AddrFrom4([4]byte{127, 0, 0, 6})
	Delivery6 = netip.AddrFrom16([16]byte{15: 6})
)

// Config is what is captured and what is not. The zero value is invalid; begin
// with Default.
type Config struct {
	// ProxyUID is the user of the proxy. What it sends is never captured, but
	// for its calls to the pod itself.
	ProxyUID uint32
	// OutboundPort and InboundPort are where the proxy listens.
	OutboundPort, InboundPort uint16
	// ExcludeInboundPorts of the pod are reached directly. PortMetrics and
	// PortHealth of package bootstrap always are.
	ExcludeInboundPorts []uint16
	// ExcludeOutboundPorts and ExcludeOutboundCIDRs are called directly.
	ExcludeOutboundPorts []uint16
	ExcludeOutboundCIDRs []netip.Prefix
	// IncludeOutboundCIDRs, where there are any, are all that is captured of
	// what the pod calls, less the exclusions.
	IncludeOutboundCIDRs []netip.Prefix
	// ExcludeUIDs call directly, whatever they call.
	ExcludeUIDs []uint32
}

// Default captures everything.
func Default() Config {
	return Config{ProxyUID: ProxyUID, OutboundPort: bootstrap.PortOutbound, InboundPort: bootstrap.PortInbound}
}

// Validate says what is wrong with c, by the names of netinit's flags.
func (c Config) Validate() error {
	switch {
	case c.ProxyUID == 0:
		return errors.New("--proxy-uid 0 is root, which everything in the pod might be and then escape the proxy: run the proxy as a user of its own, 1337")
	case c.OutboundPort == 0 || c.InboundPort == 0:
		return fmt.Errorf("--outbound-port %d and --inbound-port %d: write ports from 1 to 65535", c.OutboundPort, c.InboundPort)
	case c.OutboundPort == c.InboundPort:
		return fmt.Errorf("--outbound-port and --inbound-port are both %d: the proxy could not tell what leaves the pod from what comes in; write two ports", c.OutboundPort)
	}
	for _, l := range []struct {
		flag string
		n    int
	}{
		{"exclude-inbound-ports", len(c.ExcludeInboundPorts)},
		{"exclude-outbound-ports", len(c.ExcludeOutboundPorts)},
		{"exclude-outbound-cidrs", len(c.ExcludeOutboundCIDRs)},
		{"include-outbound-cidrs", len(c.IncludeOutboundCIDRs)},
		{"exclude-uids", len(c.ExcludeUIDs)},
	} {
		if l.n > MaxItems {
			return fmt.Errorf("--%s has %d items: at most %d, because each is a rule that new connections pass; write wider CIDRs or fewer ports", l.flag, l.n, MaxItems)
		}
	}
	for _, p := range []uint16{c.OutboundPort, c.InboundPort} {
		if slices.Contains(c.ExcludeInboundPorts, p) {
			return fmt.Errorf("--exclude-inbound-ports names %d, a port of the proxy itself, which nobody calls directly: remove it", p)
		}
	}
	return nil
}

// ParsePorts reads a comma list of ports; an empty one has none. Blanks around
// items are allowed, repetitions count once.
func ParsePorts(s string) ([]uint16, error) {
	return parse(s, "a port from 1 to 65535; write a comma list, for example 9092,5432", func(item string) (uint16, bool) {
		n, err := strconv.ParseUint(item, 10, 16)
		return uint16(n), err == nil && n != 0
	})
}

// ParseCIDRs reads a comma list of prefixes and addresses, which stand for
// themselves alone. "*" is everything.
func ParseCIDRs(s string) ([]netip.Prefix, error) {
	if strings.TrimSpace(s) == "*" {
		return []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}, nil
	}
	return parse(s, "a CIDR; write a comma list, for example 10.0.0.0/8,fd00::/8", func(item string) (netip.Prefix, bool) {
		p, err := netip.ParsePrefix(item)
		if a, aerr := netip.ParseAddr(item); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		// A mapped address is IPv4 on the wire and would match nothing.
		return p.Masked(), err == nil && !p.Addr().Is4In6()
	})
}

// ParseUIDs reads a comma list of user ids.
func ParseUIDs(s string) ([]uint32, error) {
	return parse(s, "a user id; write a comma list of numbers, for example 101,65534", func(item string) (uint32, bool) {
		n, err := strconv.ParseUint(item, 10, 32)
		// The highest one means "no user" to the kernel.
		return uint32(n), err == nil && n != math.MaxUint32
	})
}

func parse[T comparable](s, what string, one func(string) (T, bool)) ([]T, error) {
	if strings.TrimSpace(s) == "" {
		return nil, nil
	}
	var out []T
	for item := range strings.SplitSeq(s, ",") {
		v, ok := one(strings.TrimSpace(item))
		if !ok {
			return nil, fmt.Errorf("%q is not %s", strings.TrimSpace(item), what)
		}
		if !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out, nil
}

// Rule is asked of the first packet of a TCP connection. All that is set has to
// hold; the first rule of a chain that holds decides.
type Rule struct {
	// Loopback: the packet leaves by lo, which everything does that the pod
	// sends to itself, whatever the address.
	Loopback bool
	Source   netip.Prefix
	Dest     netip.Prefix
	NotDest  netip.Prefix
	Port     uint16 // destination
	// UID of the process, where HasUID.
	UID    uint32
	HasUID bool
	// Redirect is the port of the proxy; 0 leaves the connection as it is.
	Redirect uint16
}

// Rules of one IP version.
type Rules struct {
	IPv6 bool
	// Output is asked of what the pod sends, Prerouting of what comes in. What
	// passes through a chain to its end is left as it is.
	Output, Prerouting []Rule
}

// Connection is the first packet of one.
type Connection struct {
	Loopback     bool // leaves by lo
	Source, Dest netip.Addr
	Port         uint16 // destination
	UID          uint32
}

// Decide is what a kernel does with a connection that passes chain: the port of
// the proxy, or 0 where it is left as it is.
func Decide(chain []Rule, c Connection) uint16 {
	for _, r := range chain {
		if r.holds(c) {
			return r.Redirect
		}
	}
	return 0
}

func (r Rule) holds(c Connection) bool {
	return (!r.Loopback || c.Loopback) &&
		(!r.Source.IsValid() || r.Source.Contains(c.Source)) &&
		(!r.Dest.IsValid() || r.Dest.Contains(c.Dest)) &&
		(!r.NotDest.IsValid() || !r.NotDest.Contains(c.Dest)) &&
		(r.Port == 0 || r.Port == c.Port) &&
		(!r.HasUID || r.UID == c.UID)
}

// Make makes the rules of one IP version. Their order is the invariant of this
// package: nothing that the proxy delivers to the application, and nothing that
// it sends out of the pod, is ever redirected, whatever c excludes or includes;
// exclusions only leave.
func Make(c Config, ipv6 bool) Rules {
	delivery, loopback := Delivery4, netip.PrefixFrom(netip.AddrFrom4([4]byte{127}), 8)
	if ipv6 {
		delivery, loopback = Delivery6, netip.PrefixFrom(netip.IPv6Loopback(), 128)
	}
	r := Rules{IPv6: ipv6}
	add := func(chain *[]Rule, rule Rule) { *chain = append(*chain, rule) }

	direct := slices.Compact(slices.Sorted(slices.Values(append([]uint16{bootstrap.PortMetrics, bootstrap.PortHealth}, c.ExcludeInboundPorts...))))
	for _, p := range direct {
		add(&r.Prerouting, Rule{Port: p})
	}
	add(&r.Prerouting, Rule{Redirect: c.InboundPort})

	// The proxy delivers an inbound connection.
	add(&r.Output, Rule{Loopback: true, Source: netip.PrefixFrom(delivery, delivery.BitLen())})
	// The proxy calls the pod that it is in, because a Service of it led there:
	// that is an inbound connection like any other.
	for _, p := range direct {
		add(&r.Output, Rule{Loopback: true, UID: c.ProxyUID, HasUID: true, Port: p})
	}
	add(&r.Output, Rule{Loopback: true, UID: c.ProxyUID, HasUID: true, NotDest: loopback, Redirect: c.InboundPort})
	// The containers of the pod talk among themselves.
	add(&r.Output, Rule{Loopback: true})
	// The proxy calls out.
	add(&r.Output, Rule{UID: c.ProxyUID, HasUID: true})
	add(&r.Output, Rule{Dest: loopback})
	for _, uid := range c.ExcludeUIDs {
		add(&r.Output, Rule{UID: uid, HasUID: true})
	}
	for _, p := range c.ExcludeOutboundPorts {
		add(&r.Output, Rule{Port: p})
	}
	for _, p := range c.ExcludeOutboundCIDRs {
		if p.Addr().Is6() == ipv6 {
			add(&r.Output, Rule{Dest: p})
		}
	}
	if len(c.IncludeOutboundCIDRs) == 0 {
		add(&r.Output, Rule{Redirect: c.OutboundPort})
	}
	for _, p := range c.IncludeOutboundCIDRs {
		if p.Addr().Is6() == ipv6 {
			add(&r.Output, Rule{Dest: p, Redirect: c.OutboundPort})
		}
	}
	return r
}

// String is the rule in words; no two rules that differ have the same.
func (r Rule) String() string {
	var on []string
	if r.Loopback {
		on = append(on, "over lo")
	}
	if r.Source.IsValid() {
		on = append(on, "from "+r.Source.String())
	}
	if r.HasUID {
		on = append(on, "by uid "+strconv.FormatUint(uint64(r.UID), 10))
	}
	if r.Dest.IsValid() {
		on = append(on, "to "+r.Dest.String())
	}
	if r.NotDest.IsValid() {
		on = append(on, "not to "+r.NotDest.String())
	}
	if r.Port != 0 {
		on = append(on, "to port "+strconv.Itoa(int(r.Port)))
	}
	if len(on) == 0 {
		on = append(on, "everything")
	}
	if r.Redirect == 0 {
		return strings.Join(on, ", ") + ": leave"
	}
	return strings.Join(on, ", ") + ": redirect to " + strconv.Itoa(int(r.Redirect))
}
