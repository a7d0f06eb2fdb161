package rules

import (
	"flag"
	"fmt"
	"strconv"
)

// Register defines the flags of c, which holds their defaults: those of Default,
// which the usages name.
func (c *Config) Register(fs *flag.FlagSet) {
	fs.Func("proxy-uid", "user id of the proxy, whose own calls are not captured (default 1337)", func(s string) error {
		uids, err := ParseUIDs(s)
		if err != nil || len(uids) != 1 {
			return fmt.Errorf("%q is not a user id", s)
		}
		c.ProxyUID = uids[0]
		return nil
	})
	fs.Func("outbound-port", "port of the proxy for what leaves the pod (default 15001)", port(&c.OutboundPort))
	fs.Func("inbound-port", "port of the proxy for what comes into the pod (default 15006)", port(&c.InboundPort))
	fs.Func("exclude-inbound-ports", "comma list of ports of the pod that are reached without the proxy; 15020 and 15021 always are", list(&c.ExcludeInboundPorts, ParsePorts))
	fs.Func("exclude-outbound-ports", "comma list of ports that are called without the proxy", list(&c.ExcludeOutboundPorts, ParsePorts))
	fs.Func("exclude-outbound-cidrs", "comma list of CIDRs that are called without the proxy", list(&c.ExcludeOutboundCIDRs, ParseCIDRs))
	fs.Func("include-outbound-cidrs", "comma list of CIDRs; where given, only calls to these are captured", list(&c.IncludeOutboundCIDRs, ParseCIDRs))
	fs.Func("exclude-uids", "comma list of user ids that call without the proxy", list(&c.ExcludeUIDs, ParseUIDs))
}

func port(to *uint16) func(string) error {
	return func(s string) error {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("%q is not a port from 1 to 65535", s)
		}
		*to = uint16(n)
		return nil
	}
}

func list[T any](to *[]T, parse func(string) ([]T, error)) func(string) error {
	return func(s string) error {
		v, err := parse(s)
		*to = v
		return err
	}
}
