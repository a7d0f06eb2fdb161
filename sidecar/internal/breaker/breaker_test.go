package breaker_test

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/breaker"
)

// TestScripts walks each story in testdata: commands and, under "----", the
// trace that they must leave.
func TestScripts(t *testing.T) {
	golden.Scripts(t, "testdata/*.txt", func(t *testing.T, script string) (trace string) {
		synctest.Test(t, func(t *testing.T) { trace = runScript(t, script) })
		return trace
	})
}

func runScript(t *testing.T, script string) string {
	var trace strings.Builder
	start := time.Now()
	at := func() string { return fmt.Sprintf("%6s ", time.Since(start).Round(time.Millisecond)) }
	var b *breaker.Breaker
	var held []breaker.Ticket
	ids := 0
	for line := range strings.Lines(script) {
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		arg := func(i int, def string) string {
			if len(f) > i {
				return f[i]
			}
			return def
		}
		times := 1
		if n := len(f); n > 1 && strings.HasPrefix(f[n-1], "x") {
			times, _ = strconv.Atoi(f[n-1][1:])
			f = f[:n-1]
		}
		switch f[0] {
		case "breaker":
			b = breaker.New(policy(t, f[1:]), "shop/payments:80", time.Now(), func() string { ids++; return fmt.Sprintf("e%d", ids) },
				func(e breaker.Evidence) {
					fails := 0
					for _, r := range e.Requests {
						if r.Failure || r.Slow {
							fails++
						}
					}
					fmt.Fprintf(&trace, "%s  %s: %s -> %s: %s [%d requests, %d bad]\n", at(), e.ID, e.From, e.To, e.Reason, len(e.Requests), fails)
				})
		case "wait":
			time.Sleep(duration(t, f[1]))
		case "call": // call STATUS [DURATION] [xN]
			for range times {
				v := b.Allow(time.Now())
				fmt.Fprintf(&trace, "%scall: %s\n", at(), verdict(v))
				if !v.Admit {
					continue
				}
				o := outcome(t, arg(1, "200"))
				o.At, o.Duration = time.Now(), duration(t, arg(2, "5ms"))
				time.Sleep(o.Duration)
				b.Done(v.Ticket, &o)
			}
		case "begin":
			v := b.Allow(time.Now())
			fmt.Fprintf(&trace, "%sbegin: %s\n", at(), verdict(v))
			held = append(held, v.Ticket)
		case "abandon":
			b.Abandon(held[0])
			held = held[1:]
		case "end":
			o := outcome(t, f[1])
			o.At, o.Duration = time.Now(), 5*time.Millisecond
			b.Done(held[0], &o)
			held = held[1:]
		case "state":
			s, left := b.State(time.Now())
			fmt.Fprintf(&trace, "%sstate: %s, probes in %s\n", at(), s, left)
		default:
			t.Fatalf("unknown command %q", f[0])
		}
	}
	return trace.String()
}

func verdict(v breaker.Verdict) string {
	switch {
	case v.Admit && v.Rejected:
		return "admitted, would have been rejected (" + v.State.String() + ")"
	case v.Admit:
		return "admitted (" + v.State.String() + ")"
	}
	return fmt.Sprintf("rejected (%s), retry after %s", v.State, v.RetryAfter)
}

func outcome(t *testing.T, s string) breaker.Outcome {
	o := breaker.Outcome{Endpoint: "127.0.0.1:9000"}
	o.Describe([]byte("4bf92f3577b34da6a3ce929d0e0e4736"), []byte("GET"), []byte("/pay"))
	switch s {
	case "connect-failure":
		o.Failed, o.Flags = breaker.FailConnectFailure, "UF"
	case "reset":
		o.Failed, o.Flags = breaker.FailReset, "UC"
	case "timeout":
		o.Failed, o.Flags = breaker.FailTimeout, "UT"
	default:
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		o.Status, o.Failed = n, breaker.StatusFailures(n)
	}
	return o
}

func policy(t *testing.T, args []string) breaker.Policy {
	p := breaker.Policy{Name: "shop/payments", Window: 10 * time.Second, OpenFor: 15 * time.Second, HalfOpenRequests: 3, MinimumRequests: 20, FailureOn: breaker.FailDefault}
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		switch k {
		case "consecutive":
			n, _ := strconv.Atoi(v)
			p.ConsecutiveFailures = uint32(n)
		case "ratio":
			p.FailureRatio, _ = strconv.ParseFloat(v, 64)
		case "slow":
			p.SlowCallThreshold = duration(t, v)
		case "slowratio":
			p.SlowCallRatio, _ = strconv.ParseFloat(v, 64)
		case "min":
			n, _ := strconv.Atoi(v)
			p.MinimumRequests = uint32(n)
		case "observe":
			p.Observe = true
		case "failureOn":
			f, err := breaker.ParseFailures(strings.Split(v, ","))
			if err != nil {
				t.Fatal(err)
			}
			p.FailureOn = f
		default:
			t.Fatalf("unknown setting %q", a)
		}
	}
	return p
}

func duration(t *testing.T, s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestParseFailuresNamesTheWord(t *testing.T) {
	if f, err := breaker.ParseFailures([]string{"unavailable", "reset"}); err != nil || f != breaker.FailReset|breaker.GRPCFailures(14) {
		t.Errorf("a gRPC status: %v, %v", f, err)
	}
	if _, err := breaker.ParseFailures([]string{"5xx", "sometimes"}); err == nil || !strings.Contains(err.Error(), `"sometimes"`) {
		t.Fatalf("err = %v", err)
	}
}

// An outcome may become known long after the response began: a stream that is
// cut. The breaker then opens at that time, not in the past.
func TestOutcomeThatIsKnownLateCountsWhenItIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := breaker.New(breaker.Policy{Name: "p", ConsecutiveFailures: 1, Window: time.Second, OpenFor: time.Minute, FailureOn: breaker.FailDefault},
			"shop/payments:80", time.Now(), func() string { return "e" }, func(breaker.Evidence) {})
		begun := time.Now()
		v := b.Allow(begun)
		time.Sleep(time.Hour)
		b.Done(v.Ticket, &breaker.Outcome{At: begun, Duration: time.Millisecond, Ended: time.Now(), Failed: breaker.FailReset})
		if s, left := b.State(time.Now()); s != breaker.Open || left != time.Minute {
			t.Errorf("%v, probes in %v; want open for a minute", s, left)
		}
	})
}
