package check_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/check"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/netnstest"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(t *testing.T, args ...string) rules.Config {
	t.Helper()
	c := rules.Default()
	fs := flag.NewFlagSet("", flag.ContinueOnError)
	c.Register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return c
}

func apply(t *testing.T, pod *netnstest.Space, args ...string) {
	t.Helper()
	var err error
	pod.Do(func() {
		_, err = redirect.Apply(t.Context(), config(t, args...), redirect.NFTables, slog.New(slog.DiscardHandler))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// run checks as uid, without the means to become another one where uid is not 0.
func run(t *testing.T, pod *netnstest.Space, uid int, args ...string) (string, error) {
	t.Helper()
	var log bytes.Buffer
	var err error
	began := time.Now()
	pod.Do(func() {
		if uid != 0 {
			// Of this thread only, and for good: it ends with Do.
			if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
				t.Error(errno)
				return
			}
		}
		err = check.Run(t.Context(), config(t, args...), slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	})
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the check took %s", took)
	}
	return log.String(), err
}

func TestCaptured(t *testing.T) {
	for _, c := range []struct {
		name string
		uid  int
		args []string
		log  string // what it says
	}{
		{"root", 0, nil, "outrigger.checked=4"},
		{"nobody special", 65532, nil, "outrigger.checked=2"},
		{"the proxy's user", rules.ProxyUID, nil, "calls of this user are never captured"},
		{"the proxy's user checks the inbound side", rules.ProxyUID, nil, "outrigger.checked=2"},
		{"ports excluded", 65532, []string{"--exclude-outbound-ports=80,443,8080", "--exclude-inbound-ports=80"}, "outrigger.checked=2"},
		{"other ports", 0, []string{"--outbound-port=4140", "--inbound-port=4143", "--proxy-uid=2102"}, "outrigger.checked=4"},
		{"nobody's address excluded", 0, []string{"--exclude-outbound-cidrs=192.0.2.0/24,2001:db8::/32"}, "outrigger.checked=4"},
		{"inclusions", 65532, []string{"--include-outbound-cidrs=10.96.0.0/12,fd00:96::/112"}, "outrigger.checked=2"},
		{"nothing outbound", 0, []string{"--exclude-outbound-cidrs=*"}, "outbound traffic is not checked: by these flags"},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod, _ := netnstest.Pair(t, true)
			apply(t, pod, c.args...)
			log, err := run(t, pod, c.uid, c.args...)
			if err != nil || !strings.Contains(log, c.log) {
				t.Errorf("%v\n%s\nwant %q", err, log, c.log)
			}
		})
	}
	t.Run("IPv4 only", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, false)
		apply(t, pod)
		if log, err := run(t, pod, 0); err != nil || !strings.Contains(log, "outrigger.checked=2") {
			t.Errorf("%v\n%s", err, log)
		}
	})
	t.Run("no default route", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, true)
		pod.Run("ip", "route", "del", "default")
		pod.Run("ip", "-6", "route", "del", "default")
		apply(t, pod)
		if log, err := run(t, pod, 0); err != nil || !strings.Contains(log, "outrigger.checked=4") {
			t.Errorf("%v\n%s", err, log)
		}
	})
	t.Run("no network", func(t *testing.T) {
		pod := netnstest.New(t)
		apply(t, pod)
		if log, err := run(t, pod, 0); err != nil || !strings.Contains(log, "nothing could be checked") {
			t.Errorf("%v\n%s", err, log)
		}
	})
}

func TestNotCaptured(t *testing.T) {
	t.Run("no rules", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, true)
		log, err := run(t, pod, 65532)
		if !errors.Is(err, check.ErrNotCaptured) {
			t.Fatalf("%v\n%s", err, log)
		}
		for _, want := range []string{"uid 65532", "192.0.2.1:80 should arrive at port 15001", "but it", "outrigger-cni"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q is missing in %v", want, err)
			}
		}
	})
	t.Run("other ports", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, false)
		apply(t, pod, "--outbound-port=4140")
		if _, err := run(t, pod, 65532); !errors.Is(err, check.ErrNotCaptured) || !strings.Contains(err.Error(), "it was refused") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("only IPv4", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, true)
		apply(t, pod)
		var err error
		pod.Do(func() { err = redirect.Clean(t.Context()) })
		if err != nil {
			t.Fatal(err)
		}
		pod.Run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
		apply(t, pod)
		pod.Run("sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
		pod.Run("ip", "address", "add", netnstest.Pod6+"/64", "dev", "eth0", "nodad")
		pod.Run("ip", "-6", "route", "add", "default", "via", netnstest.Outside6)
		if _, err := run(t, pod, 65532); !errors.Is(err, check.ErrNotCaptured) || !strings.Contains(err.Error(), "uid 65532 to [") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("the proxy's calls to itself", func(t *testing.T) {
		pod, _ := netnstest.Pair(t, false)
		apply(t, pod, "--proxy-uid=7")
		if _, err := run(t, pod, rules.ProxyUID); !errors.Is(err, check.ErrNotCaptured) || !strings.Contains(err.Error(), "10.77.0.2:80 should arrive at port 15006") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("somebody answers for nobody's address", func(t *testing.T) {
		pod, outside := netnstest.Pair(t, false)
		outside.Run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
		outside.Listen("tcp4", "192.0.2.1:80")
		if _, err := run(t, pod, 65532); !errors.Is(err, check.ErrNotCaptured) || !strings.Contains(err.Error(), "accepted by somebody else") {
			t.Errorf("err = %v", err)
		}
	})
	t.Run("asked to end", func(t *testing.T) {
		pod, outside := netnstest.Pair(t, false)
		outside.Run("ip", "route", "add", "blackhole", "192.0.2.1/32")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		var err error
		pod.Do(func() { err = check.Run(ctx, rules.Default(), slog.New(slog.DiscardHandler)) })
		if err == nil {
			t.Error("it went on")
		}
	})
}

// The container is restarted while the proxy runs: its ports are in use.
func TestThePortsAreInUse(t *testing.T) {
	for _, network := range []string{"tcp", "tcp4"} {
		pod, _ := netnstest.Pair(t, network == "tcp")
		for _, port := range []string{"15001", "15006"} {
			l := pod.Listen(network, net.JoinHostPort("", port))
			ended := make(chan struct{})
			t.Cleanup(func() { _ = l.Close(); <-ended })
			go func() {
				defer close(ended)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_ = c.Close()
				}
			}()
		}
		if _, err := run(t, pod, 0); !errors.Is(err, check.ErrNotCaptured) {
			t.Errorf("without rules: %v", err)
		}
		apply(t, pod)
		if log, err := run(t, pod, 0); err != nil || !strings.Contains(log, "the port is in use") || !strings.Contains(log, "the check found traffic captured") {
			t.Errorf("%v\n%s", err, log)
		}
	}
}
