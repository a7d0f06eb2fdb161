// Package check finds out by connecting whether a pod's traffic is captured.
//
// It needs no privilege. It acts on the network namespace of the calling
// thread. What comes from outside cannot be checked from inside: a packet that
// never left the pod does not pass the rules for those that come in. So for the
// inbound side it makes the one connection from inside that these rules share a
// port with, the proxy's call to its own pod; that the rules are in place as a
// whole is known by package redirect, which reads them back, or by the CNI
// plugin, which did so.
//
// Command netinit calls it.
package check

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/original"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

// ErrNotCaptured says that a connection did not arrive where it should have.
var ErrNotCaptured = errors.New("traffic of this pod is not captured")

const (
	// dialTimeout of one connection. Captured, it takes no network and some
	// microseconds; not captured, it waits for an address that nobody has.
	dialTimeout = 1500 * time.Millisecond
	// total of a check.
	total = 4500 * time.Millisecond
)

const remedy = "was netinit run in this network namespace, with the same flags? With the CNI plugin: is outrigger-cni ready on this node, and in its CNI configuration? Delete the pod to have it set up again"

// Targets that are nobody's (RFC 5737, RFC 3849), so that a connection to them
// comes to an end only where it is captured.
var (
	nobody4 = netip.AddrFrom4([4]byte{192, 0, 2, 1})
	nobody6 = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1})
)

// ports tried for one that no exclusion names.
var ports = []uint16{80, 443, 8080, 9, 7, 10080, 20080, 30080, 40080, 50080, 60080}

// Run checks every IP version that the pod has, and returns ErrNotCaptured with
// what was expected, what happened and the remedy, within five seconds. What
// could not be checked is logged.
func Run(ctx context.Context, c rules.Config, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	addrs, err := own()
	if err != nil {
		return err
	}
	k := checker{c: c, log: log}
	for _, ipv6 := range []bool{false, true} {
		a, ok := addrs[ipv6]
		if !ok {
			log.Debug("this IP version is not checked: the pod has no address of it", "outrigger.ipv6", ipv6)
			continue
		}
		if err := k.family(ctx, ipv6, a); err != nil {
			return err
		}
	}
	if k.checked == 0 {
		log.Warn("nothing could be checked: see the reasons above")
		return nil
	}
	log.Info("the check found traffic captured", "outrigger.checked", k.checked)
	return nil
}

// own is one address of each IP version that the pod can be called at, with the
// network that it is in.
func own() (map[bool]netip.Prefix, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the pod's addresses: %w", err)
	}
	out := map[bool]netip.Prefix{}
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || p.Addr().IsLoopback() || p.Addr() == rules.Delivery6 || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		if _, ok := out[p.Addr().Is6()]; !ok {
			out[p.Addr().Is6()] = p
		}
	}
	return out, nil
}

type checker struct {
	c       rules.Config
	log     *slog.Logger
	checked int
}

func (k *checker) family(ctx context.Context, ipv6 bool, self netip.Prefix) error {
	made := rules.Make(k.c, ipv6)
	if err := k.outbound(ctx, made, self); err != nil {
		return err
	}
	return k.inbound(ctx, made, self)
}

// outbound: what somebody who is not the proxy sends out arrives at the proxy.
func (k *checker) outbound(ctx context.Context, made rules.Rules, self netip.Prefix) error {
	uid, can := k.user(func(uid uint32) bool { return uid != k.c.ProxyUID && !slices.Contains(k.c.ExcludeUIDs, uid) })
	if !can {
		k.log.Warn("outbound traffic is not checked: calls of this user are never captured; run the check as another one", "user.id", os.Geteuid())
		return nil
	}
	var unreachable error
	for _, dst := range k.targets(made, self, uid) {
		err := k.connect(ctx, uid, dst, k.c.OutboundPort)
		if nowhere(err) {
			unreachable = err
			continue
		}
		return err
	}
	if unreachable != nil {
		k.log.Warn("outbound traffic is not checked: the pod has no route to anywhere", "error.message", unreachable.Error(), "outrigger.ipv6", made.IPv6)
		return nil
	}
	k.log.Warn("outbound traffic is not checked: by these flags no address and port that would do is captured", "outrigger.ipv6", made.IPv6)
	return nil
}

// targets are what to connect to: nobody's address first, then, where inclusions
// or missing routes stand against it, the first ones of the inclusions and of the
// pod's own network.
func (k *checker) targets(made rules.Rules, self netip.Prefix, uid uint32) []netip.AddrPort {
	all := []netip.Addr{nobody4}
	if made.IPv6 {
		all = []netip.Addr{nobody6}
	}
	for _, p := range k.c.IncludeOutboundCIDRs {
		if p.Addr().Is6() == made.IPv6 {
			all = append(all, p.Addr(), p.Addr().Next())
		}
	}
	all = append(all, self.Masked().Addr().Next(), self.Masked().Addr().Next().Next())
	var out []netip.AddrPort
	for _, a := range all {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a == self.Addr() {
			continue
		}
		for _, port := range ports {
			if rules.Decide(made.Output, rules.Connection{Source: self.Addr(), Dest: a, Port: port, UID: uid}) == k.c.OutboundPort {
				out = append(out, netip.AddrPortFrom(a, port))
				break
			}
		}
	}
	return out
}

// inbound: what the proxy sends to its own pod arrives at its inbound side.
func (k *checker) inbound(ctx context.Context, made rules.Rules, self netip.Prefix) error {
	uid, can := k.user(func(uid uint32) bool { return uid == k.c.ProxyUID })
	if !can {
		k.log.Debug("inbound traffic is not checked by connecting: that takes the proxy's user", "user.id", os.Geteuid())
		return nil
	}
	for _, port := range ports {
		if rules.Decide(made.Output, rules.Connection{Loopback: true, Source: self.Addr(), Dest: self.Addr(), Port: port, UID: uid}) == k.c.InboundPort {
			err := k.connect(ctx, uid, netip.AddrPortFrom(self.Addr(), port), k.c.InboundPort)
			if nowhere(err) {
				k.log.Warn("inbound traffic is not checked: the pod's address is not usable yet", "error.message", err.Error(), "outrigger.ipv6", made.IPv6)
				return nil
			}
			return err
		}
	}
	k.log.Warn("inbound traffic is not checked: every port that would do is excluded", "outrigger.ipv6", made.IPv6)
	return nil
}

// user is one to connect as: who this process is, or whom it can become.
func (k *checker) user(fits func(uint32) bool) (uint32, bool) {
	if me := uint32(os.Geteuid()); fits(me) {
		return me, true
	}
	for _, uid := range []uint32{k.c.ProxyUID, 65534, 65532, 1000, 0} {
		if fits(uid) && become(uid, func() {}) {
			return uid, true
		}
	}
	return 0, false
}

// become runs fn on a thread of uid, which sockets made there belong to, and in
// the caller's network namespace. It is false where the process may not, which
// takes CAP_SETUID.
func become(uid uint32, fn func()) bool {
	if uid == uint32(os.Geteuid()) {
		fn()
		return true
	}
	// The namespace is the thread's, so the user has to be that one's for a moment.
	runtime.LockOSThread()
	before, err := unix.SetfsuidRetUid(int(uid))
	if err != nil {
		runtime.UnlockOSThread()
		return false
	}
	now, err := unix.SetfsuidRetUid(-1)
	ok := err == nil && now == int(uid)
	if ok {
		fn()
	}
	if _, err := unix.SetfsuidRetUid(before); err == nil {
		// Else the thread stays locked, and ends with the goroutine.
		runtime.UnlockOSThread()
	}
	return ok
}

// connect dials dst as uid and wants to arrive at port of the proxy.
func (k *checker) connect(ctx context.Context, uid uint32, dst netip.AddrPort, port uint16) error {
	expected := fmt.Sprintf("a connection of uid %d to %s should arrive at port %d of the proxy", uid, dst, port)
	fail := func(happened string) error {
		return fmt.Errorf("%w: %s, but %s; %s", ErrNotCaptured, expected, happened, remedy)
	}
	l, err := listen(ctx, dst.Addr().Is6(), port)
	inUse := errors.Is(err, unix.EADDRINUSE)
	if err != nil && !inUse {
		return fmt.Errorf("listen on port %d in the proxy's stead: %w", port, err)
	}
	if inUse {
		k.log.Info("the port is in use, probably by the proxy itself: whether a connection is accepted is checked, not where it was meant to go", "destination.port", port)
	} else {
		defer func() { _ = l.Close() }()
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	var conn net.Conn
	if !become(uid, func() { conn, err = dialer.DialContext(ctx, "tcp", dst.String()) }) {
		return fmt.Errorf("become uid %d to connect: not permitted", uid)
	}
	if nowhere(err) {
		return err
	}
	if err != nil {
		return fail(reason(err))
	}
	defer func() { _ = conn.Close() }()
	if inUse {
		k.checked++
		return nil
	}
	if err := l.SetDeadline(time.Now().Add(dialTimeout)); err != nil {
		return err
	}
	for {
		got, err := l.AcceptTCP()
		if err != nil {
			return fail("it was accepted by somebody else: it left the pod")
		}
		ours := got.RemoteAddr().String() == conn.LocalAddr().String()
		to, err := original.Destination(got)
		_ = got.Close()
		switch {
		case !ours:
			continue // somebody else's, who was captured too
		case err != nil:
			return fail("the kernel does not say where it was meant to go: " + err.Error())
		case to != dst:
			return fail("it seems to have been meant for " + to.String())
		}
		k.checked++
		return nil
	}
}

// nowhere: the kernel has no route, or no address to send from as long as IPv6
// looks for another who has it (RFC 4862), and so does not come to the rules.
func nowhere(err error) bool {
	return errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EADDRNOTAVAIL)
}

func listen(ctx context.Context, ipv6 bool, port uint16) (*net.TCPListener, error) {
	network, address := "tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), port)
	if ipv6 {
		network, address = "tcp6", netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, network, address.String())
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("%s is not a TCP address", address), l.Close())
	}
	return tcp, nil
}

func reason(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return "it was refused"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "it left the pod and nobody answered within " + dialTimeout.String()
	}
	return "it failed: " + strings.TrimSpace(err.Error())
}
