package wire

import (
	"net"
	"syscall"
)

// States of linux/tcp_states.h.
const (
	tcpClose     = 7 // it has ended for both directions, as it has after a reset
	tcpCloseWait = 8 // the peer has closed its direction
)

// state of a TCP connection; 0 where it cannot be told.
func state(fd int) int {
	// It is the first byte of struct tcp_info, of which the kernel gives as much as
	// is asked for. Every system that the sidecar is built for is little-endian.
	v, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_INFO)
	if err != nil {
		return 0
	}
	return v & 0xff
}

// halfClosed reports whether the peer has closed its direction, whatever is still
// to be read.
func halfClosed(fd int) bool { return state(fd) == tcpCloseWait }

// Ended reports whether a connection has ended for both directions.
func Ended(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true // closed by this process
	}
	ended := false
	err = raw.Control(func(fd uintptr) { ended = state(int(fd)) == tcpClose })
	return err != nil || ended
}
