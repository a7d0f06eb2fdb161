// Package original asks the kernel where a redirected connection was meant to
// go.
//
// The check of package check and tests call it.
package original

import (
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// option is SO_ORIGINAL_DST of linux/netfilter_ipv4.h, and IP6T_SO_ORIGINAL_DST
// of linux/netfilter_ipv6/ip6_tables.h.
const option = 80

// Destination is where the peer of an accepted connection dialed to. For a
// connection that was not redirected it is the local address.
func Destination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	local, ok := c.LocalAddr().(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%s is no TCP address", c.LocalAddr())
	}
	var dst netip.AddrPort
	var got error
	err = raw.Control(func(fd uintptr) {
		if local.IP.To4() != nil {
			dst, got = ipv4(int(fd))
		} else {
			dst, got = ipv6(int(fd))
		}
	})
	if err == nil {
		err = got
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("SO_ORIGINAL_DST of a connection to %s: %w", local, err)
	}
	return dst, nil
}

// ipv4 borrows a getter whose buffer is large enough for struct sockaddr_in.
func ipv4(fd int) (netip.AddrPort, error) {
	m, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, option)
	if err != nil {
		return netip.AddrPort{}, err
	}
	b := m.Multiaddr // family, port, address
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3])), nil
}

// ipv6 borrows a getter that begins with struct sockaddr_in6.
func ipv6(fd int) (netip.AddrPort, error) {
	m, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, option)
	if err != nil {
		return netip.AddrPort{}, err
	}
	// The port is in network order in memory, whatever the processor's is.
	port := m.Addr.Port<<8 | m.Addr.Port>>8
	return netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), port), nil
}
