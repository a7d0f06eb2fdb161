package upstream

import (
	"context"
	"syscall"

	"golang.org/x/sys/unix"
)

// choosePortLate has the system choose a port when it connects and not when it
// binds: connections to different addresses may then share one.
func choosePortLate(_ context.Context, _, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		// Where it is not known there are fewer ports, and that is all.
		_ = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
}
