package listener

import (
	"net"
	"net/netip"
)

// Local is the address at which the connection was accepted. That of IPv4 on a
// socket of IPv6 is IPv4.
func (c *Conn) Local() netip.AddrPort { return unmapped(c.LocalAddr()) }

// Remote is the address of the client, as Local.
func (c *Conn) Remote() netip.AddrPort { return unmapped(c.RemoteAddr()) }

func unmapped(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := t.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap().WithZone(""), p.Port())
}
