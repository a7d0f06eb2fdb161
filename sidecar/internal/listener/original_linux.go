package listener

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// soOriginalDst is SO_ORIGINAL_DST of SOL_IP and IP6T_SO_ORIGINAL_DST of SOL_IPV6.
const soOriginalDst = 80

// OriginalDestination is where the client of a redirected connection wanted to
// go. It is the local address where the connection was not redirected and the
// system keeps track of connections; where it does not there is an error.
func (c *Conn) OriginalDestination() (to netip.AddrPort, err error) {
	local := c.Local()
	raw, err := c.TCP().SyscallConn()
	if err != nil {
		return to, err
	}
	cerr := raw.Control(func(fd uintptr) {
		// The calls are those for other options of the same size or a larger one: what
		// the kernel fills in is a struct sockaddr_in or sockaddr_in6.
		if local.Addr().Is4() { // also on a socket of IPv6, which then has a mapped address
			var m *unix.IPv6Mreq
			if m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); err == nil {
				to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])), binary.BigEndian.Uint16(m.Multiaddr[2:4]))
			}
			return
		}
		var m *unix.IPv6MTUInfo
		if m, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); err == nil {
			port := binary.NativeEndian.AppendUint16(nil, m.Addr.Port)
			to = netip.AddrPortFrom(netip.AddrFrom16(m.Addr.Addr), binary.BigEndian.Uint16(port))
		}
	})
	if cerr != nil {
		return to, cerr
	}
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("the connection was not redirected: %w", os.NewSyscallError("getsockopt SO_ORIGINAL_DST", err))
	}
	return to, nil
}
