package redirect_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/netinit/netnstest"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/original"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/redirect"
	"github.com/outrigger-mesh/outrigger/sidecar/netinit/rules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for a busy machine. What is expected not to arrive is expected to
// be refused, or to arrive elsewhere, so that nothing waits for so long.
const patience = 20 * time.Second

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

// pod is a namespace with a proxy that says where a connection was meant to go.
type pod struct {
	*netnstest.Space
	outside *netnstest.Space
	backend redirect.Backend
}

// serve answers each connection with a line: what the listener is called, and
// the original destination where the connection was redirected.
func serve(t *testing.T, s *netnstest.Space, name, address string) {
	t.Helper()
	l := s.Listen("tcp", address)
	ended := make(chan struct{})
	t.Cleanup(func() { _ = l.Close(); <-ended })
	go func() {
		defer close(ended)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			dst, err := original.Destination(c)
			if local := c.LocalAddr().(*net.TCPAddr).AddrPort(); err != nil || dst == netip.AddrPortFrom(local.Addr().Unmap(), local.Port()) {
				fmt.Fprintln(c, name)
			} else {
				fmt.Fprintln(c, name, dst)
			}
			_ = c.Close()
		}
	}()
}

// newPod has a proxy on its ports, an application on 8080 and 8081, and outside of it
// servers on 80 and 81.
func newPod(t *testing.T, b redirect.Backend, ipv6 bool) pod {
	t.Helper()
	in, out := netnstest.Pair(t, ipv6)
	p := pod{in, out, b}
	any4 := ""
	if !ipv6 {
		any4 = "0.0.0.0"
	}
	for _, l := range []struct {
		in   *netnstest.Space
		name string
		port string
	}{
		{in, "outbound", "15001"},
		{in, "inbound", "15006"},
		{in, "app", "8080"},
		{in, "app", "8081"},
		{in, "health", "15021"},
		{in, "metrics", "15020"},
		{out, "server", "80"},
		{out, "server", "81"},
	} {
		serve(t, l.in, l.name, net.JoinHostPort(any4, l.port))
	}
	return p
}

func (p pod) apply(t *testing.T, args ...string) redirect.Result {
	t.Helper()
	var res redirect.Result
	var err error
	p.Do(func() {
		res, err = redirect.Apply(t.Context(), config(t, args...), p.backend, slog.New(slog.DiscardHandler))
	})
	if err != nil {
		t.Fatal(err)
	}
	p.verify(t, args...)
	return res
}

func (p pod) verify(t *testing.T, args ...string) {
	t.Helper()
	var err error
	p.Do(func() { _, err = redirect.Verify(t.Context(), config(t, args...)) })
	if err != nil {
		t.Errorf("Verify %v: %v", args, err)
	}
}

// asks dials and returns what answered.
func asks(t *testing.T, s *netnstest.Space, uid int, from, address string) string {
	t.Helper()
	c, err := s.Dial(uid, from, address, patience)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

func (p pod) want(t *testing.T, uid int, address, want string) {
	t.Helper()
	if got := asks(t, p.Space, uid, "", address); got != want {
		t.Errorf("uid %d calls %s: %q, want %q", uid, address, got, want)
	}
}

func (p pod) wantInbound(t *testing.T, address, want string) {
	t.Helper()
	if got := asks(t, p.outside, 0, "", address); got != want {
		t.Errorf("from outside to %s: %q, want %q", address, got, want)
	}
}

// backends runs fn for each that this machine has, in pods with and without IPv6.
func backends(t *testing.T, fn func(t *testing.T, p pod, ipv6 bool)) {
	t.Helper()
	for _, b := range []struct {
		name    string
		backend redirect.Backend
		program string
	}{
		{"nftables", redirect.NFTables, ""},
		{"iptables-nft", redirect.IPTables, "iptables-nft-restore"},
		{"iptables-legacy", redirect.IPTables, "iptables-legacy-restore"},
	} {
		for _, ipv6 := range []bool{true, false} {
			name := b.name + "/IPv4 only"
			if ipv6 {
				name = b.name + "/IPv4 and IPv6"
			}
			t.Run(name, func(t *testing.T) {
				if b.program != "" {
					if !netnstest.Tools(t, b.program) {
						t.Skipf("SKIPPED: there is no %s: run deploy/testbed/build.sh cluster, or install iptables", b.program)
					}
					only(t, b.program)
				}
				fn(t, newPod(t, b.backend, ipv6), ipv6)
			})
		}
	}
}

func hosts(ipv6 bool, port string, v4, v6 string) []string {
	out := []string{net.JoinHostPort(v4, port)}
	if ipv6 {
		out = append(out, net.JoinHostPort(v6, port))
	}
	return out
}

func TestCapture(t *testing.T) {
	backends(t, func(t *testing.T, p pod, ipv6 bool) {
		beyond := hosts(ipv6, "80", netnstest.Beyond4, netnstest.Beyond6)
		self := hosts(ipv6, "8080", netnstest.Pod4, netnstest.Pod6)
		loopback := hosts(ipv6, "8080", "127.0.0.1", "::1")
		for _, a := range beyond {
			p.want(t, 1000, a, "server")
		}
		if res := p.apply(t); res.IPv6 != ipv6 {
			t.Errorf("%+v, want IPv6 %v", res, ipv6)
		}
		for _, a := range beyond {
			p.want(t, 1000, a, "outbound "+a)
			p.want(t, 0, a, "outbound "+a)
			p.want(t, rules.ProxyUID, a, "server")
		}
		for _, a := range self {
			p.want(t, 1000, a, "app")
			p.want(t, rules.ProxyUID, a, "inbound "+a) // a call to the pod's own Service
			p.wantInbound(t, a, "inbound "+a)
		}
		for _, a := range loopback {
			p.want(t, 1000, a, "app")
			p.want(t, rules.ProxyUID, a, "app")
		}
		for i, a := range self {
			from := []string{"127.0.0.6", "::6"}[i]
			if got := asks(t, p.Space, rules.ProxyUID, from, a); got != "app" {
				t.Errorf("delivery from %s to %s: %q, want app", from, a, got)
			}
		}
		for _, a := range hosts(ipv6, "15021", netnstest.Pod4, netnstest.Pod6) {
			p.wantInbound(t, a, "health")
			p.want(t, rules.ProxyUID, a, "health")
		}
		for _, a := range hosts(ipv6, "15020", netnstest.Pod4, netnstest.Pod6) {
			p.wantInbound(t, a, "metrics")
		}
	})
}

func TestExclusions(t *testing.T) {
	backends(t, func(t *testing.T, p pod, ipv6 bool) {
		beyond80 := hosts(ipv6, "80", netnstest.Beyond4, netnstest.Beyond6)
		beyond81 := hosts(ipv6, "81", netnstest.Beyond4, netnstest.Beyond6)
		near80 := hosts(ipv6, "80", netnstest.Outside4, netnstest.Outside6)
		self := hosts(ipv6, "8080", netnstest.Pod4, netnstest.Pod6)
		self1 := hosts(ipv6, "8081", netnstest.Pod4, netnstest.Pod6)
		each := func(list []string, check func(a string)) {
			for _, a := range list {
				check(a)
			}
		}
		captured := func(a string) { t.Helper(); p.want(t, 1000, a, "outbound "+a) }
		direct := func(a string) { t.Helper(); p.want(t, 1000, a, "server") }

		p.apply(t, "--exclude-outbound-ports=81,443")
		each(beyond80, captured)
		each(beyond81, direct)

		p.apply(t, "--exclude-outbound-cidrs=198.51.100.0/24,2001:db8:7::/48")
		each(beyond80, direct)
		each(near80, captured)

		p.apply(t, "--include-outbound-cidrs=198.51.100.0/25,2001:db8:7::/48", "--exclude-outbound-ports=81")
		each(beyond80, captured)
		each(beyond81, direct)
		each(near80, direct)

		p.apply(t, "--include-outbound-cidrs=*")
		each(near80, captured)

		p.apply(t, "--exclude-uids=1000,1001")
		each(beyond80, direct)
		each(beyond80, func(a string) { p.want(t, 1002, a, "outbound "+a) })

		p.apply(t, "--exclude-inbound-ports=8081")
		each(self, func(a string) { p.wantInbound(t, a, "inbound "+a) })
		each(self1, func(a string) { p.wantInbound(t, a, "app"); p.want(t, rules.ProxyUID, a, "app") })
		each(beyond80, captured)

		p.apply(t, "--proxy-uid=2000", "--outbound-port=15006", "--inbound-port=15001")
		each(beyond80, func(a string) {
			p.want(t, rules.ProxyUID, a, "inbound "+a) // the listener of 15006
			p.want(t, 2000, a, "server")
		})
		each(self, func(a string) { p.wantInbound(t, a, "outbound "+a) })
	})
}

// Applying again changes nothing, applying something else replaces all of it, and
// connections that exist live on, captured as they were.
func TestIdempotence(t *testing.T) {
	backends(t, func(t *testing.T, p pod, ipv6 bool) {
		echo := p.Listen("tcp", ":15099")
		p.apply(t, "--outbound-port=15099")
		a := net.JoinHostPort(netnstest.Beyond4, "80")
		c, err := p.Dial(1000, "", a, patience)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		served, err := echo.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = served.Close() }()
		lives := func() {
			t.Helper()
			deadline := time.Now().Add(patience)
			_, _ = c.SetDeadline(deadline), served.SetDeadline(deadline)
			b := make([]byte, 4)
			if _, err := c.Write([]byte("ping")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(served, b); err != nil || string(b) != "ping" {
				t.Fatalf("%q, %v", b, err)
			}
			if _, err := served.Write([]byte("pong")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "pong" {
				t.Fatalf("%q, %v", b, err)
			}
			if dst, err := original.Destination(served); err != nil || dst.String() != a {
				t.Errorf("original destination %v, %v", dst, err)
			}
		}
		lives()
		for range 3 {
			p.apply(t, "--exclude-outbound-ports=81")
			lives()
		}
		p.want(t, 1000, a, "outbound "+a)
		p.want(t, 1000, net.JoinHostPort(netnstest.Beyond4, "81"), "server")
		p.apply(t)
		p.want(t, 1000, net.JoinHostPort(netnstest.Beyond4, "81"), "outbound "+net.JoinHostPort(netnstest.Beyond4, "81"))
		lives()
		if ipv6 {
			if n := strings.Count(p.Run("ip", "-6", "address", "show", "dev", "lo"), "::6/128"); n != 1 {
				t.Errorf("::6/128 is %d times on lo", n)
			}
		}
		p.Do(func() { err = redirect.Clean(t.Context()) })
		if err != nil {
			t.Fatal(err)
		}
		p.want(t, 1000, a, "server")
		p.wantInbound(t, net.JoinHostPort(netnstest.Pod4, "8080"), "app")
		if strings.Contains(p.Run("ip", "-6", "address", "show", "dev", "lo"), "::6/128") {
			t.Error("::6/128 remains on lo")
		}
		p.Do(func() { _, err = redirect.Verify(t.Context(), rules.Default()) })
		if !errors.Is(err, redirect.ErrMissing) {
			t.Errorf("Verify after Clean: %v", err)
		}
		p.Do(func() { err = redirect.Clean(t.Context()) })
		if err != nil {
			t.Errorf("Clean of nothing: %v", err)
		}
	})
}

// The most that flags allow fits into one batch.
func TestTheLongestLists(t *testing.T) {
	backends(t, func(t *testing.T, p pod, ipv6 bool) {
		c := rules.Default()
		for i := range rules.MaxItems {
			c.ExcludeInboundPorts = append(c.ExcludeInboundPorts, uint16(20000+i))
			c.ExcludeOutboundPorts = append(c.ExcludeOutboundPorts, uint16(30000+i))
			c.ExcludeUIDs = append(c.ExcludeUIDs, uint32(5000+i))
			c.ExcludeOutboundCIDRs = append(c.ExcludeOutboundCIDRs, netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 32))
			c.IncludeOutboundCIDRs = append(c.IncludeOutboundCIDRs, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i)}), 24))
		}
		var err, verr error
		p.Do(func() {
			_, err = redirect.Apply(t.Context(), c, p.backend, slog.New(slog.DiscardHandler))
			_, verr = redirect.Verify(t.Context(), c)
		})
		if err != nil || verr != nil {
			t.Fatal(err, verr)
		}
		a := net.JoinHostPort(netnstest.Beyond4, "80")
		p.want(t, 1000, a, "outbound "+a)
		c.ExcludeInboundPorts = append(c.ExcludeInboundPorts, 1)
		if _, err := redirect.Apply(context.Background(), c, p.backend, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "at most 128") {
			t.Errorf("one too many: %v", err)
		}
	})
}

// Rules of another backend are taken away by those that replace them, and what
// others have set in the same tables stays.
func TestChangeOfBackend(t *testing.T) {
	if !netnstest.Tools(t, "iptables-nft-restore") {
		t.Skip("SKIPPED: there is no iptables: run deploy/testbed/build.sh cluster, or install iptables")
	}
	p := newPod(t, redirect.NFTables, true)
	p.Run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "9999", "-j", "RETURN")
	a := net.JoinHostPort(netnstest.Beyond4, "80")
	for _, b := range []redirect.Backend{redirect.NFTables, redirect.IPTables, redirect.NFTables, redirect.IPTables} {
		p.backend = b
		other := []string{"--exclude-outbound-ports=81", "--exclude-outbound-ports=80"}
		p.apply(t, other[0])
		p.want(t, 1000, a, "outbound "+a)
		p.apply(t, other[1])
		p.want(t, 1000, a, "server")
		if !strings.Contains(p.Run("iptables-nft-save", "-t", "nat"), "--dport 9999 -j RETURN") {
			t.Fatal("a rule that is not ours is gone")
		}
		if has := strings.Contains(p.Run("iptables-nft-save", "-t", "nat"), "OUTRIGGER"); has != (b == redirect.IPTables) {
			t.Errorf("after %s our chains in iptables are there: %v", b, has)
		}
	}
}

func TestAutoTakesNFTables(t *testing.T) {
	p := newPod(t, redirect.Auto, false)
	if res := p.apply(t); res.Backend != redirect.NFTables {
		t.Errorf("%+v", res)
	}
}

// A pod whose only IPv6 addresses are link-local is captured there too.
func TestLinkLocalOnly(t *testing.T) {
	p, _ := netnstest.Pair(t, false)
	p.Do(func() { _ = os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("0"), 0o600) })
	var log bytes.Buffer
	var res redirect.Result
	var err error
	p.Do(func() {
		res, err = redirect.Apply(t.Context(), rules.Default(), redirect.NFTables, slog.New(slog.NewTextHandler(&log, nil)))
	})
	if err != nil || !res.IPv6 || log.Len() > 0 {
		t.Errorf("%+v, %v, %s", res, err, &log)
	}
	// Where lo refuses, IPv4 is captured and the log says what is not.
	p, _ = netnstest.Pair(t, false)
	p.Do(func() {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("0"), 0o600)
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0o600)
		res, err = redirect.Apply(t.Context(), rules.Default(), redirect.NFTables, slog.New(slog.NewTextHandler(&log, nil)))
	})
	if err != nil || res.IPv6 || !strings.Contains(log.String(), "IPv6 is not captured") {
		t.Errorf("%+v, %v, %s", res, err, &log)
	}
}

// Where IPv6 matters and cannot be captured, nothing starts.
func TestIPv6ThatCannotBeCapturedIsAnError(t *testing.T) {
	p, _ := netnstest.Pair(t, true)
	var err error
	p.Do(func() {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0o600)
		_, err = redirect.Apply(t.Context(), rules.Default(), redirect.NFTables, slog.New(slog.DiscardHandler))
	})
	if err == nil || !strings.Contains(err.Error(), "net.ipv6.conf.lo.disable_ipv6") {
		t.Errorf("err = %v", err)
	}
}

// only hides the other variants of iptables: PATH has the programs of one.
func only(t *testing.T, program string) {
	t.Helper()
	variant := strings.TrimSuffix(program, "-restore")
	dir := t.TempDir()
	for _, name := range []string{variant, variant + "-restore", variant + "-save", "ip", "nft"} {
		for _, name := range []string{name, strings.Replace(name, "iptables", "ip6tables", 1)} {
			path, err := exec.LookPath(name)
			if err != nil {
				continue
			}
			if path, err = filepath.EvalSymlinks(path); err != nil {
				t.Fatal(err)
			}
			// By its own name: iptables is one program that looks at it.
			script := fmt.Sprintf("#!/bin/bash\nexec -a %s %s \"$@\"\n", name, path)
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Setenv("PATH", dir)
}
