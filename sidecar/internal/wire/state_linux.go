package wire

import "syscall"

// tcpCloseWait is TCP_CLOSE_WAIT of linux/tcp_states.h: the peer has closed its
// direction.
const tcpCloseWait = 8

// halfClosed reports whether the peer has closed its direction, whatever is still
// to be read.
func halfClosed(fd int) bool {
	// The state is the first byte of struct tcp_info, of which the kernel gives as
	// much as is asked for. Every system that the sidecar is built for is
	// little-endian.
	v, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_INFO)
	return err == nil && v&0xff == tcpCloseWait
}
