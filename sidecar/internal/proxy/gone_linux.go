package proxy

import (
	"net"
	"syscall"
)

// tcpClose is TCP_CLOSE of linux/tcp_states.h.
const tcpClose = 7

// gone reports whether the connection has ended for both directions, as it has
// after a reset.
func gone(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true // closed by this process
	}
	state := 0
	err = raw.Control(func(fd uintptr) {
		// The state is the first byte of struct tcp_info, of which the kernel gives
		// as much as is asked for. Every system that the sidecar is built for is
		// little-endian.
		v, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		if err == nil {
			state = v & 0xff
		}
	})
	return err != nil || state == tcpClose
}
