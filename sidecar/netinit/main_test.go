package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/netnstest"
)

const (
	envMain = "OUTRIGGER_TEST_NETINIT" // this binary is netinit
	envDeny = "OUTRIGGER_TEST_DENY"    // as seccomp (all of netlink) or an old kernel (netfilter's) does
)

func TestMain(m *testing.M) {
	if os.Getenv(envMain) != "" {
		deny(os.Getenv(envDeny))
		main()
	}
	goleak.VerifyTestMain(m)
}

// deny makes socket(2) fail as a seccomp profile without netlink does, or a
// kernel without netfilter's.
func deny(what string) {
	var family []unix.SockFilter
	jump := func(code uint16, k uint32, t, f uint8) {
		family = append(family, unix.SockFilter{Code: code, K: k, Jt: t, Jf: f})
	}
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	errno, protocol := uint32(unix.EPERM), false
	switch what {
	case "":
		return
	case "netfilter":
		errno, protocol = uint32(unix.EPROTONOSUPPORT), true
	}
	jump(load, 0, 0, 0) // the number of the call
	jump(equal, unix.SYS_SOCKET, 0, 5)
	jump(load, 16, 0, 0) // its first argument
	jump(equal, unix.AF_NETLINK, 0, 3)
	jump(load, 32, 0, 0) // its third one
	if protocol {
		jump(equal, unix.NETLINK_NETFILTER, 0, 1)
	} else {
		jump(equal, unix.NETLINK_NETFILTER, 0, 0)
	}
	jump(ret, unix.SECCOMP_RET_ERRNO|errno, 0, 0)
	jump(ret, unix.SECCOMP_RET_ALLOW, 0, 0)
	prog := unix.SockFprog{Len: uint16(len(family)), Filter: &family[0]}
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		panic(err)
	}
	if _, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog))); e != 0 {
		panic(e)
	}
}

// netinit runs the program in pod and returns its exit code and what it wrote.
func netinit(t *testing.T, pod *netnstest.Space, attr *syscall.SysProcAttr, env string, args ...string) (int, string) {
	t.Helper()
	var out []byte
	var err error
	pod.Do(func() {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), envMain+"=1", envDeny+"="+env, "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = attr
		out, err = cmd.CombinedOutput()
	})
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		return exit.ExitCode(), string(out)
	}
	return 0, string(out)
}

func TestItSetsChecksAndCleans(t *testing.T) {
	pod, _ := netnstest.Pair(t, true)
	expect := func(code int, said string, args ...string) {
		t.Helper()
		if got, out := netinit(t, pod, nil, "", args...); got != code || !strings.Contains(out, said) {
			t.Errorf("netinit %v: %d, want %d and %q\n%s", args, got, code, said, out)
		}
	}
	expect(exitNotCaptured, "should arrive at port 15001", "--check")
	expect(0, `"outrigger.backend":"nftables"`)
	expect(0, `"outrigger.checked":4`, "--check")
	expect(0, "traffic is captured", "--skip-check", "--exclude-outbound-ports=80", "--log-format=text")
	expect(exitNotCaptured, "192.0.2.1:80", "--check")
	expect(0, "no longer captured", "--clean")
	expect(exitNotCaptured, "should arrive", "--check")
	expect(exitUsage, "exclude each other", "--check", "--clean")
	expect(exitUsage, `"ebpf"`, "--backend=ebpf")
	expect(exitUsage, `"http"`, "--exclude-inbound-ports=http")
	expect(0, "-exclude-uids", "--help")
	expect(0, "netinit", "--version")
}

func TestWithoutCapability(t *testing.T) {
	pod, _ := netnstest.Pair(t, false)
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
	for _, args := range [][]string{nil, {"--clean"}, {"--backend=iptables"}} {
		code, out := netinit(t, pod, user, "", args...)
		if code != exitNotPermitted {
			t.Errorf("%v: %d", args, code)
		}
		for _, want := range []string{"NET_ADMIN", "uid 65532", "securityContext.capabilities.add", "outrigger-cni"} {
			if !strings.Contains(out, want) {
				t.Errorf("%v: %q is missing in %s", args, want, out)
			}
		}
	}
	// With the CNI plugin the init container has none, and needs none.
	if code, out := netinit(t, pod, nil, "", "--skip-check"); code != 0 {
		t.Fatalf("%d\n%s", code, out)
	}
	if code, out := netinit(t, pod, user, "", "--check"); code != 0 || !strings.Contains(out, `"outrigger.checked":1`) {
		t.Errorf("%d\n%s", code, out)
	}
}

// As the injector's init container is: root with one capability and no other.
func TestOneCapabilityIsEnough(t *testing.T) {
	if _, err := exec.LookPath("setpriv"); err != nil {
		t.Skip("SKIPPED: there is no setpriv: install util-linux")
	}
	pod, _ := netnstest.Pair(t, true)
	var out []byte
	var err error
	pod.Do(func() {
		cmd := exec.CommandContext(t.Context(), "setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+net_admin", "--", "/proc/"+strconv.Itoa(os.Getpid())+"/exe", "--exclude-outbound-ports=80")
		cmd.Env = append(os.Environ(), envMain+"=1", "GORACE=atexit_sleep_ms=0")
		out, err = cmd.CombinedOutput()
	})
	if err != nil || !bytes.Contains(out, []byte(`"outrigger.checked":2`)) || !bytes.Contains(out, []byte(`"outrigger.ipv6":true`)) {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSeccomp(t *testing.T) {
	pod, _ := netnstest.Pair(t, false)
	if code, out := netinit(t, pod, nil, "netlink"); code != exitNotPermitted || !strings.Contains(out, "seccomp") || !strings.Contains(out, "AF_NETLINK") {
		t.Errorf("%d\n%s", code, out)
	}
}

func TestKernelWithoutNFTables(t *testing.T) {
	pod, _ := netnstest.Pair(t, true)
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	for _, c := range []struct{ backend, want string }{
		{"nftables", "CONFIG_NF_TABLES"},
		{"iptables", "use --backend nftables"},
		{"auto", "install the CNI plugin"},
	} {
		if code, out := netinit(t, pod, nil, "netfilter", "--backend="+c.backend); code != exitUnsupported || !strings.Contains(out, c.want) {
			t.Errorf("%s: %d\n%s", c.backend, code, out)
		}
	}
	t.Setenv("PATH", path)
	if !netnstest.Tools(t, "iptables-legacy-restore") {
		t.Skip("SKIPPED: there is no iptables-legacy: run deploy/testbed/build.sh cluster, or install iptables")
	}
	if code, out := netinit(t, pod, nil, "netfilter"); code != 0 || !strings.Contains(out, "iptables-legacy-restore") || !strings.Contains(out, `"outrigger.checked":4`) {
		t.Errorf("%d\n%s", code, out)
	}
	if code, out := netinit(t, pod, nil, "netfilter", "--clean"); code != 0 {
		t.Errorf("%d\n%s", code, out)
	}
	if code, out := netinit(t, pod, nil, "", "--check"); code != exitNotCaptured {
		t.Errorf("after --clean: %d\n%s", code, out)
	}
}

// Nothing of /proc/sys is written: containers have it read-only.
func TestReadOnlySysctls(t *testing.T) {
	pod, _ := netnstest.Pair(t, true)
	attr := &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var out []byte
	var err error
	pod.Do(func() {
		cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "mount --make-rprivate / && mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && ! echo 1 2>/dev/null >/proc/sys/net/ipv4/ip_forward && exec /proc/$PPID/exe")
		cmd.Env = append(os.Environ(), envMain+"=1")
		cmd.SysProcAttr = attr
		out, err = cmd.CombinedOutput()
	})
	if err != nil || !bytes.Contains(out, []byte(`"outrigger.checked":4`)) {
		t.Errorf("%v\n%s", err, out)
	}
}

// What it is made of is small: it is in every pod.
func TestItIsSmallAndStatic(t *testing.T) {
	const most = 9 << 20
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", dir+"/netinit", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(dir + "/netinit")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("netinit has %.1f MB, stripped", float64(info.Size())/1e6)
	if info.Size() > most {
		t.Errorf("netinit has %d bytes, more than %d", info.Size(), most)
	}
	deps, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, heavy := range []string{"google.golang.org/grpc", "github.com/envoyproxy/go-control-plane", "k8s.io/"} {
		if strings.Contains(string(deps), "\n"+heavy) {
			t.Errorf("it links %s", heavy)
		}
	}
}

// It ends when it is told to.
func TestItEndsInTime(t *testing.T) {
	pod, outside := netnstest.Pair(t, false)
	outside.Run("ip", "route", "add", "blackhole", "192.0.2.1/32")
	began := time.Now()
	code, out := netinit(t, pod, nil, "", "--check")
	if took := time.Since(began); code != exitNotCaptured || took > 10*time.Second {
		t.Errorf("%d after %s\n%s", code, took, out)
	}
}
