package rules_test

import (
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

func parse(args string) (rules.Config, error) {
	c := rules.Default()
	fs := flag.NewFlagSet("netinit", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	c.Register(fs)
	if err := fs.Parse(strings.Fields(args)); err != nil {
		return c, err
	}
	return c, c.Validate()
}

func TestRules(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		cfg, err := parse(c.Input("flags"))
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range []string{"IPv4", "IPv6"} {
			r := rules.Make(cfg, family == "IPv6")
			var b strings.Builder
			for _, chain := range []struct {
				name  string
				rules []rules.Rule
			}{{"prerouting", r.Prerouting}, {"output", r.Output}} {
				fmt.Fprintln(&b, chain.name)
				for _, rule := range chain.rules {
					fmt.Fprintln(&b, "  "+rule.String())
				}
			}
			c.Want(family, b.String())
			c.Want(family+" iptables", strings.Join(r.IPTables(), "\n")+"\n")
		}
	})
}

func TestFlags(t *testing.T) {
	many := make([]string, rules.MaxItems+1)
	for i := range many {
		many[i] = fmt.Sprint(i + 1)
	}
	for args, want := range map[string]string{
		"--proxy-uid=0":                             "root",
		"--proxy-uid=envoy":                         `"envoy" is not a user id`,
		"--proxy-uid=1,2":                           `"1,2" is not a user id`,
		"--outbound-port=0":                         `"0" is not a port`,
		"--inbound-port=65536":                      `"65536" is not a port`,
		"--inbound-port=15001":                      "both 15001",
		"--exclude-inbound-ports=http":              `"http" is not a port`,
		"--exclude-inbound-ports=80,":               `"" is not a port`,
		"--exclude-inbound-ports=15006":             "a port of the proxy itself",
		"--exclude-outbound-ports=-1":               `"-1" is not a port`,
		"--exclude-outbound-cidrs=10.0.0.0/33":      `"10.0.0.0/33" is not a CIDR`,
		"--include-outbound-cidrs=::ffff:10.0.0.1":  `"::ffff:10.0.0.1" is not a CIDR`,
		"--include-outbound-cidrs=fe80::1%eth0":     `"fe80::1%eth0" is not a CIDR`,
		"--exclude-uids=4294967295":                 `"4294967295" is not a user id`,
		"--exclude-uids=" + strings.Join(many, ","): "at most 128",
	} {
		if _, err := parse(args); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v; want it to say %q", args, err, want)
		}
	}
	c, err := parse("--exclude-uids=7,7 --exclude-outbound-cidrs=10.1.2.3/8,fd00::1")
	if err != nil || len(c.ExcludeUIDs) != 1 || c.ExcludeOutboundCIDRs[0] != netip.MustParsePrefix("10.0.0.0/8") || c.ExcludeOutboundCIDRs[1] != netip.MustParsePrefix("fd00::1/128") {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := parse("--include-outbound-cidrs=*"); err != nil || len(c.IncludeOutboundCIDRs) != 2 {
		t.Errorf("*: %+v, %v", c, err)
	}
}

// Whatever is excluded and included, no connection runs in a circle: what the
// proxy delivers and what it sends out is left alone, and what it sends to the
// pod itself goes to the inbound side only.
func TestNothingOpensALoop(t *testing.T) {
	const seeds = 3000
	for seed := range uint64(seeds) {
		r := rand.New(rand.NewPCG(seed, 1))
		addrs := func(ipv6 bool) netip.Addr {
			all := []string{"10.0.0.1", "10.0.0.2", "127.0.0.1", "127.0.0.6", "192.0.2.1"}
			if ipv6 {
				all = []string{"fd00::1", "fd00::2", "::1", "::6", "2001:db8::1"}
			}
			return netip.MustParseAddr(all[r.IntN(len(all))])
		}
		cfg := rules.Default()
		ports := []uint16{80, 15001, 15006, 15020, 15021, 15090}
		for range r.IntN(4) {
			cfg.ExcludeInboundPorts = append(cfg.ExcludeInboundPorts, []uint16{80, 15090}[r.IntN(2)])
			cfg.ExcludeOutboundPorts = append(cfg.ExcludeOutboundPorts, ports[r.IntN(len(ports))])
			cfg.ExcludeUIDs = append(cfg.ExcludeUIDs, []uint32{0, 7, rules.ProxyUID}[r.IntN(3)])
			a, b := addrs(r.IntN(2) == 0), addrs(r.IntN(2) == 0)
			cfg.ExcludeOutboundCIDRs = append(cfg.ExcludeOutboundCIDRs, netip.PrefixFrom(a, r.IntN(a.BitLen()+1)).Masked())
			if r.IntN(2) == 0 {
				cfg.IncludeOutboundCIDRs = append(cfg.IncludeOutboundCIDRs, netip.PrefixFrom(b, r.IntN(b.BitLen()+1)).Masked())
			}
		}
		if err := cfg.Validate(); err != nil {
			t.Fatal(err)
		}
		ipv6 := r.IntN(2) == 0
		made := rules.Make(cfg, ipv6)
		for range 50 {
			p := rules.Connection{Loopback: r.IntN(2) == 0, Source: addrs(ipv6), Dest: addrs(ipv6), Port: ports[r.IntN(len(ports))], UID: []uint32{0, 7, 1000, rules.ProxyUID}[r.IntN(4)]}
			got := rules.Decide(made.Output, p)
			delivers := p.Source == rules.Delivery4 || p.Source == rules.Delivery6
			switch {
			case p.Loopback && delivers && got != 0,
				p.UID == rules.ProxyUID && got == cfg.OutboundPort,
				p.UID == rules.ProxyUID && !p.Loopback && got != 0,
				p.UID != rules.ProxyUID && got == cfg.InboundPort,
				p.Loopback && p.UID != rules.ProxyUID && got != 0,
				p.Dest.IsLoopback() && got != 0,
				!p.Loopback && slices.Contains(cfg.ExcludeUIDs, p.UID) && got != 0,
				!p.Loopback && slices.Contains(cfg.ExcludeOutboundPorts, p.Port) && got != 0:
				t.Fatalf("seed %d: %+v with %+v is led to %d", seed, p, cfg, got)
			}
			if in := rules.Decide(made.Prerouting, p); (in == 0) != (slices.Contains(cfg.ExcludeInboundPorts, p.Port) || p.Port == 15020 || p.Port == 15021) {
				t.Fatalf("seed %d: inbound %+v with %+v is led to %d", seed, p, cfg, in)
			}
		}
	}
}
