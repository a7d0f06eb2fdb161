package rules

import (
	"flag"
	"fmt"
	"strconv"
)

// Register defines the flags of c, which holds their defaults.
func (c *Config) Register(fs *flag.FlagSet) {
	port := func(to *uint16, name, usage string) {
		fs.Func(name, fmt.Sprintf("%s (default %d)", usage, *to), func(s string) error {
			n, err := strconv.ParseUint(s, 10, 16)
			if err != nil || n == 0 {
				return fmt.Errorf("%q is not a port from 1 to 65535", s)
			}
			*to = uint16(n)
			return nil
		})
	}
	fs.Func("proxy-uid", fmt.Sprintf("user id of the proxy, whose own calls are not captured (default %d)", c.ProxyUID), func(s string) error {
		uids, err := ParseUIDs(s)
		if err != nil || len(uids) != 1 {
			return fmt.Errorf("%q is not a user id", s)
		}
		c.ProxyUID = uids[0]
		return nil
	})
	port(&c.OutboundPort, "outbound-port", "port of the proxy for what leaves the pod")
	port(&c.InboundPort, "inbound-port", "port of the proxy for what comes into the pod")
	list(fs, &c.ExcludeInboundPorts, ParsePorts, "exclude-inbound-ports", "comma list of ports of the pod that are reached without the proxy; 15020 and 15021 always are")
	list(fs, &c.ExcludeOutboundPorts, ParsePorts, "exclude-outbound-ports", "comma list of ports that are called without the proxy")
	list(fs, &c.ExcludeOutboundCIDRs, ParseCIDRs, "exclude-outbound-cidrs", "comma list of CIDRs that are called without the proxy")
	list(fs, &c.IncludeOutboundCIDRs, ParseCIDRs, "include-outbound-cidrs", "comma list of CIDRs; where given, only calls to these are captured")
	list(fs, &c.ExcludeUIDs, ParseUIDs, "exclude-uids", "comma list of user ids that call without the proxy")
}

func list[T any](fs *flag.FlagSet, to *[]T, parse func(string) ([]T, error), name, usage string) {
	fs.Func(name, usage, func(s string) error {
		v, err := parse(s)
		*to = v
		return err
	})
}
