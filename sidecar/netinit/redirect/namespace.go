package redirect

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

// permitted says early and clearly what the kernel would say late and briefly.
func permitted() error {
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return nil //nolint:nilerr // the kernel decides, this is for the message only
	}
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		if v, ok := strings.CutPrefix(s.Text(), "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			if err == nil && caps&(1<<unix.CAP_NET_ADMIN) == 0 {
				return fmt.Errorf("%w: rules of a network namespace are set with the capability NET_ADMIN, which this process (uid %d) has not: %s", ErrNotPermitted, os.Geteuid(), remedyPermission)
			}
		}
	}
	return nil
}

// ipv6State is how much of IPv6 a namespace has.
type ipv6State int

const (
	noIPv6        ipv6State = iota // not in the kernel, or disabled
	linkLocalIPv6                  // no address that is reached from beyond the link
	globalIPv6
)

// ipv6 reads it from the addresses there are: a kernel without IPv6 has no such
// file. Link-local addresses may come a little later, so that where there are
// none it counts whether IPv6 is disabled.
func ipv6() (ipv6State, error) {
	b, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, os.ErrNotExist) {
		return noIPv6, nil
	}
	if err != nil {
		return noIPv6, fmt.Errorf("read which IPv6 addresses there are: %w", err)
	}
	state := noIPv6
	for line := range strings.Lines(string(b)) {
		// address, index, prefix length, scope, flags, name
		f := strings.Fields(line)
		if len(f) != 6 {
			continue
		}
		state = max(state, linkLocalIPv6)
		if f[3] == "00" && f[5] != "lo" {
			state = globalIPv6
		}
	}
	if state == noIPv6 && enabled() {
		state = linkLocalIPv6
	}
	return state, nil
}

// enabled: an interface may get an IPv6 address.
func enabled() bool {
	files, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/disable_ipv6")
	if err != nil {
		return false
	}
	return slices.ContainsFunc(files, func(f string) bool {
		b, err := os.ReadFile(f)
		name := filepath.Base(filepath.Dir(f))
		return err == nil && name != "all" && name != "default" && strings.TrimSpace(string(b)) == "0"
	})
}

// hasDelivery: the address that the proxy delivers from is on lo.
func hasDelivery() bool {
	b, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	return err == nil && bytes.Contains(b, fmt.Appendf(nil, "%x ", rules.Delivery6.As16()))
}

// prepare sets lo up, as CNI does at about the same time, and gives it the
// address that the proxy delivers IPv6 from.
func prepare(log *slog.Logger) (ipv6State, error) {
	if err := loopbackUp(); err != nil {
		return noIPv6, fmt.Errorf("set lo up: %w", err)
	}
	state, err := ipv6()
	if err != nil || state == noIPv6 || hasDelivery() {
		return state, err
	}
	err = onLoopback(unix.SIOCSIFADDR)
	switch {
	case err == nil || errors.Is(err, unix.EEXIST):
		return state, nil
	case state == linkLocalIPv6:
		log.Warn("IPv6 is not captured: the pod has link-local addresses only and lo takes no other", "error.message", err.Error())
		return noIPv6, nil
	}
	return state, fmt.Errorf("add %s/128 to lo, from where the proxy delivers IPv6: %w: is net.ipv6.conf.lo.disable_ipv6 set while other interfaces have IPv6? Set it to 0, or net.ipv6.conf.all.disable_ipv6 to 1", rules.Delivery6, err)
}

func removeDelivery() error {
	if !hasDelivery() {
		return nil
	}
	if err := onLoopback(unix.SIOCDIFADDR); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("remove %s from lo: %w", rules.Delivery6, err)
	}
	return nil
}

func loopbackUp() error {
	return ioctl(unix.AF_INET, func(fd int) error {
		ifr, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
			return err
		}
		if ifr.Uint16()&unix.IFF_UP != 0 {
			return nil
		}
		ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
	})
}

// onLoopback adds Delivery6 to lo, or takes it off.
func onLoopback(request uint) error {
	return ioctl(unix.AF_INET6, func(fd int) error {
		ifr, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); err != nil {
			return err
		}
		// struct in6_ifreq of linux/ipv6.h
		req := struct {
			address [16]byte
			bits    uint32
			index   uint32
		}{rules.Delivery6.As16(), 128, ifr.Uint32()}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&req))); errno != 0 { //nolint:gosec // the kernel reads a struct that outlives the call
			return errno
		}
		return nil
	})
}

func ioctl(family int, do func(fd int) error) (err error) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	return do(fd)
}
