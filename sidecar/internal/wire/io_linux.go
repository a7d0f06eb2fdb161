//go:build linux && !race

package wire

import (
	"syscall"
	"unsafe"
)

// The sockets do not block, so neither do these calls: a few microseconds, in
// which the kernel may carry bytes over loopback to where they are read. The
// scheduler is not told of them. Where it is, it hands the processor to another
// thread whenever a look at it falls into such a call, which at some ten thousand
// calls a second is all the time, and costs more than the calls.

func readFD(fd int, b []byte) (int, error) {
	n, _, e := syscall.RawSyscall(syscall.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))) //nolint:gosec // for the kernel, which is done with b when it returns
	return result(n, e)
}

func writeFD(fd int, b []byte) (int, error) {
	n, _, e := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))) //nolint:gosec // as in readFD
	return result(n, e)
}

func peekFD(fd int, b []byte) (int, error) {
	n, _, e := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0) //nolint:gosec // as in readFD
	return result(n, e)
}

func result(n uintptr, e syscall.Errno) (int, error) {
	if e == 0 {
		return int(n), nil
	}
	if e == syscall.EAGAIN {
		return 0, errAgain
	}
	return 0, e
}

// errAgain is made once: putting an Errno into an interface allocates.
var errAgain error = syscall.EAGAIN
