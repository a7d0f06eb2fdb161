package outlier_test

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
)

// TestScripts walks each story in testdata: commands and, under "----", the
// trace that they must leave.
//
//	policy key=value...          a detector with this policy
//	endpoints a b c              the endpoints of the cluster
//	a 200 503x5 local            results of endpoint a, one or several of a kind
//	wait 10s                     time passes
//	sweep                        the sweep of the owner's timer
//	ejected                      which endpoints are out
func TestScripts(t *testing.T) {
	golden.Scripts(t, "testdata/*.txt", runScript)
}

func runScript(t *testing.T, script string) string {
	var trace strings.Builder
	start := time.Unix(1_000_000, 0)
	now := start
	var d *outlier.Detector
	addrs := map[string]netip.AddrPort{}
	names := map[netip.AddrPort]string{}
	var order []string
	show := func(e outlier.Event) {
		mode := ""
		if e.Observe {
			mode = " (observe)"
		}
		fmt.Fprintf(&trace, "%5s %s: %s%s, %s: %s\n", e.At.Sub(start), names[e.Endpoint], e.Action, mode, e.Cause, e.Reason)
	}
	for line := range strings.Lines(script) {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		switch f[0] {
		case "policy":
			p := policy(t, f[1:])
			if d == nil {
				d = outlier.New(p)
			} else {
				d.SetPolicy(p)
			}
		case "endpoints":
			order = f[1:]
			var list []netip.AddrPort
			for _, name := range order {
				a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, name[0]}), 80)
				addrs[name], names[a] = a, name
				list = append(list, a)
			}
			d.SetEndpoints(list)
		case "wait":
			dur, err := time.ParseDuration(f[1])
			if err != nil {
				t.Fatal(err)
			}
			now = now.Add(dur)
		case "sweep":
			for _, e := range d.Sweep(now) {
				show(e)
			}
		case "ejected":
			var out []string
			for _, name := range order {
				if d.Ejected(addrs[name]) {
					out = append(out, name)
				}
			}
			fmt.Fprintf(&trace, "%5s ejected: %v\n", now.Sub(start), out)
		default:
			a, ok := addrs[f[0]]
			if !ok {
				a = netip.MustParseAddrPort("192.0.2.1:1")
			}
			for _, word := range f[1:] {
				kind, times, ok := strings.Cut(word, "x")
				n := 1
				var err error
				if ok {
					if n, err = strconv.Atoi(times); err != nil {
						t.Fatal(err)
					}
				}
				r := outlier.Result{LocalOrigin: kind == "local"}
				if !r.LocalOrigin {
					if r.Status, err = strconv.Atoi(kind); err != nil {
						t.Fatal(err)
					}
				}
				for range n {
					if e, ok := d.Record(now, a, r); ok {
						show(e)
					}
				}
			}
		}
	}
	return trace.String()
}

func policy(t *testing.T, words []string) outlier.Policy {
	p := outlier.Policy{Interval: 10 * time.Second, BaseEjectionTime: 30 * time.Second, MaxEjectionPercent: 50}
	for _, w := range words {
		k, v, _ := strings.Cut(w, "=")
		if k == "base" {
			d, err := time.ParseDuration(v)
			if err != nil {
				t.Fatal(err)
			}
			p.BaseEjectionTime = d
			continue
		}
		if k == "observe" {
			p.Observe = true
			continue
		}
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		*map[string]*uint32{
			"5xx": &p.Consecutive5xx, "gateway": &p.ConsecutiveGatewayErrors, "max": &p.MaxEjectionPercent,
			"threshold": &p.FailurePercentage.Threshold, "hosts": &p.FailurePercentage.MinimumHosts, "volume": &p.FailurePercentage.RequestVolume,
		}[k] = uint32(n)
	}
	return p
}

func TestSuccessesAllocateNothing(t *testing.T) {
	d := outlier.New(outlier.Policy{Consecutive5xx: 5, Interval: time.Second, MaxEjectionPercent: 50})
	a := netip.MustParseAddrPort("10.0.0.1:80")
	d.SetEndpoints([]netip.AddrPort{a})
	now := time.Unix(1, 0)
	if n := testing.AllocsPerRun(100, func() { d.Record(now, a, outlier.Result{Status: 200}) }); n != 0 {
		t.Errorf("Record allocates %v times", n)
	}
}
