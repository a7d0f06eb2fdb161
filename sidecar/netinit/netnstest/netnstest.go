// Package netnstest makes network namespaces for tests: a pod and what is
// outside of it, joined by a veth pair. Nothing of the machine's own network is
// touched.
//
// Only tests call it, as root; without root they are skipped.
package netnstest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// Addresses. Beyond4 and Beyond6 are on the far side of Outside, as an address
// in the Internet is.
const (
	Pod4     = "10.77.0.2"
	Pod6     = "fd77::2"
	Outside4 = "10.77.0.1"
	Outside6 = "fd77::1"
	Beyond4  = "198.51.100.7"
	Beyond6  = "2001:db8:7::7"
)

// Space is a network namespace. Its methods may be called at a time.
type Space struct {
	t  *testing.T
	ns netns.NsHandle
}

// New makes an empty namespace, in which lo is down, or skips the test.
func New(t *testing.T) *Space {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: network namespaces need root: run this test as root, nothing outside of them is changed")
	}
	s := &Space{t: t}
	var err error
	onThread(func() { s.ns, err = netns.New() })
	if err != nil {
		t.Skipf("SKIPPED: this machine makes no network namespace (%v): run the test where CAP_SYS_ADMIN is given", err)
	}
	t.Cleanup(func() {
		if err := s.ns.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Pair makes a pod and its outside. The pod has a default route to it, of both
// versions of IP where ipv6, else of IPv4 only and IPv6 disabled.
func Pair(t *testing.T, ipv6 bool) (pod, outside *Space) {
	t.Helper()
	pod, outside = New(t), New(t)
	outside.Run("ip", "link", "add", "veth0", "type", "veth", "peer", "name", "eth0", "netns", pod.Path())
	if !ipv6 {
		pod.Do(func() { write(t, "/proc/sys/net/ipv6/conf/all/disable_ipv6", "1") })
	}
	for _, s := range []*Space{pod, outside} {
		s.Run("ip", "link", "set", "lo", "up")
	}
	pod.Run("ip", "address", "add", Pod4+"/24", "dev", "eth0")
	outside.Run("ip", "address", "add", Outside4+"/24", "dev", "veth0")
	outside.Run("ip", "address", "add", Beyond4+"/32", "dev", "lo")
	pod.Run("ip", "link", "set", "eth0", "up")
	outside.Run("ip", "link", "set", "veth0", "up")
	pod.Run("ip", "route", "add", "default", "via", Outside4)
	if ipv6 {
		pod.Run("ip", "address", "add", Pod6+"/64", "dev", "eth0", "nodad")
		outside.Run("ip", "address", "add", Outside6+"/64", "dev", "veth0", "nodad")
		outside.Run("ip", "address", "add", Beyond6+"/128", "dev", "lo", "nodad")
		pod.Run("ip", "-6", "route", "add", "default", "via", Outside6)
	}
	return pod, outside
}

// Path of the namespace, for programs that take one.
func (s *Space) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(s.ns)) }

// Do runs fn on a thread in the namespace. Sockets that fn itself opens, and
// programs that it starts, are in there; goroutines that it starts are not.
func (s *Space) Do(fn func()) {
	s.t.Helper()
	var err error
	onThread(func() {
		if err = netns.Set(s.ns); err == nil {
			fn()
		}
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// onThread runs fn on a thread that ends with it, whatever fn made of it.
func onThread(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and not unlocked: the thread ends
		fn()
	}()
	<-done
}

// Run runs a program in the namespace and fails the test where it fails.
func (s *Space) Run(name string, args ...string) string {
	s.t.Helper()
	var out []byte
	var err error
	s.Do(func() { out, err = exec.Command(name, args...).CombinedOutput() }) //nolint:gosec // the test names it
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Listen opens a TCP listener that ends with the test.
func (s *Space) Listen(network, address string) *net.TCPListener {
	s.t.Helper()
	var l net.Listener
	var err error
	s.Do(func() { l, err = net.Listen(network, address) })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

// Dial connects as user uid, from address from where it is not empty.
func (s *Space) Dial(uid int, from, address string, timeout time.Duration) (net.Conn, error) {
	var c net.Conn
	var err error
	s.Do(func() {
		d := net.Dialer{Timeout: timeout}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		// Of this thread only, which ends with Do.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETFSUID, uintptr(uid), 0, 0); errno != 0 {
			err = errno
			return
		}
		c, err = d.Dial("tcp", address)
	})
	return c, err
}

// Tools puts Debian's nftables and iptables that the cluster of the tests was
// built with on PATH, for this test, and says whether program can then be run.
func Tools(t *testing.T, program string) bool {
	t.Helper()
	if dir := debian(t); dir != "" {
		t.Setenv("PATH", os.Getenv("PATH")+":"+filepath.Join(dir, "usr/sbin")) //nolint:forbidigo // a test's environment
		lib, err := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu*"))
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("LD_LIBRARY_PATH", strings.Join(lib, ":"))
		if len(lib) > 0 {
			t.Setenv("XTABLES_LIBDIR", filepath.Join(lib[0], "xtables"))
		}
	}
	_, err := exec.LookPath(program)
	return err == nil
}

// debian is the folder that deploy/testbed/build.sh unpacks, or empty.
func debian(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		d := filepath.Join(dir, ".cache/testbed/debian")
		if _, err := os.Stat(filepath.Join(d, "done")); err == nil {
			return d
		}
	}
	return ""
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
}
