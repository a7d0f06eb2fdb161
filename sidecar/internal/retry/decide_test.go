package retry_test

import (
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
)

func TestWordsMeanWhatEnvoyDocuments(t *testing.T) {
	resp := func(status int) retry.Outcome { return retry.Outcome{Status: status, GRPCStatus: retry.NoGRPC} }
	grpc := func(code int) retry.Outcome { return retry.Outcome{Status: 200, GRPCStatus: code} }
	fail := func(f retry.Failure) retry.Outcome { return retry.Outcome{GRPCStatus: retry.NoGRPC, Failure: f} }
	outcomes := []struct {
		name string
		o    retry.Outcome
	}{
		{"200", resp(200)},
		{"409", resp(409)},
		{"429", resp(429)},
		{"500", resp(500)},
		{"502", resp(502)},
		{"503", resp(503)},
		{"504", resp(504)},
		{"505", resp(505)},
		{"connect", fail(retry.ConnectFailure)},
		{"refused", fail(retry.RefusedStream)},
		{"unsent", fail(retry.ResetBeforeRequest)},
		{"reset", fail(retry.Reset)},
		{"slow", fail(retry.PerTryTimeout)},
		{"g0", grpc(0)},
		{"g1", grpc(1)},
		{"g4", grpc(4)},
		{"g8", grpc(8)},
		{"g13", grpc(13)},
		{"g14", grpc(14)},
	}
	f := func(word, want string) {
		t.Helper()
		c, err := retry.ParseConditions([]string{word})
		if err != nil {
			t.Fatal(err)
		}
		p := retry.Policy{On: c, Attempts: 1}
		var got []string
		for _, o := range outcomes {
			if p.Retriable([]byte("POST"), o.o) {
				got = append(got, o.name)
			}
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%s retries %q; want %q", word, g, want)
		}
		if c.String() != word {
			t.Errorf("String() = %q; want %q", c, word)
		}
	}
	f("5xx", "500 502 503 504 505 connect refused unsent reset slow")
	f("gateway-error", "502 503 504 connect refused unsent reset slow")
	f("reset", "connect refused unsent reset slow")
	f("reset-before-request", "connect unsent")
	f("connect-failure", "connect")
	f("refused-stream", "refused")
	f("retriable-4xx", "409")
	f("timeout", "slow")
	f("cancelled", "g1")
	f("deadline-exceeded", "g4")
	f("resource-exhausted", "g8")
	f("internal", "g13")
	f("unavailable", "g14")

	if _, err := retry.ParseConditions([]string{"5xx", "often"}); err == nil || !strings.Contains(err.Error(), `"often"`) || !strings.Contains(err.Error(), "gateway-error") {
		t.Errorf("ParseConditions(often) = %v; want an error that names the word and the known ones", err)
	}
}

func TestIdempotentConditionsSpareOtherMethods(t *testing.T) {
	p := retry.Policy{On: retry.OnConnectFailure, IdempotentOn: retry.OnGatewayError, Status: []int{425, 429}, Attempts: 2}
	f := func(method string, status int, want bool) {
		t.Helper()
		if got := p.Retriable([]byte(method), retry.Outcome{Status: status, GRPCStatus: retry.NoGRPC}); got != want {
			t.Errorf("%s %d: Retriable = %v; want %v", method, status, got, want)
		}
	}
	f("GET", 503, true)
	f("PUT", 503, true)
	f("POST", 503, false)
	f("get", 503, false)
	f("PATCH", 503, false)
	f("POST", 429, true)
	f("POST", 428, false)
	p.Attempts = 0
	f("GET", 503, false)
}

func TestBackoffGrowsFromTheBaseToTheMaximum(t *testing.T) {
	f := func(p retry.Policy, attempt int, want time.Duration) {
		t.Helper()
		if got := p.Backoff(attempt, 0.5); got != want/2 {
			t.Errorf("Backoff(%d, 0.5) of %+v = %v; want %v", attempt, p, got, want/2)
		}
		if got := p.Backoff(attempt, 0); got != 0 {
			t.Errorf("Backoff(%d, 0) = %v; want 0", attempt, got)
		}
	}
	f(retry.Policy{}, 1, 25*time.Millisecond)
	f(retry.Policy{}, 2, 75*time.Millisecond)
	f(retry.Policy{}, 3, 175*time.Millisecond)
	f(retry.Policy{}, 4, 250*time.Millisecond)
	f(retry.Policy{BackoffBase: time.Second, BackoffMax: time.Minute}, 5, 31*time.Second)
	f(retry.Policy{BackoffBase: time.Second, BackoffMax: time.Minute}, 6, time.Minute)
	f(retry.Policy{BackoffBase: time.Second, BackoffMax: time.Minute}, 1000, time.Minute)
	f(retry.Policy{BackoffBase: time.Second, BackoffMax: time.Minute}, 0, 0)
}

func TestBudgetIsTheLargerOfShareAndMinimum(t *testing.T) {
	f := func(b retry.Budget, active, retries int, want bool) {
		t.Helper()
		if got := b.Allows(active, retries); got != want {
			t.Errorf("%+v.Allows(%d active, %d retries) = %v; want %v", b, active, retries, got, want)
		}
	}
	b := retry.Budget{Percent: 20, MinConcurrency: 3}
	f(b, 1, 2, true)
	f(b, 1, 3, false)
	f(b, 100, 19, true)
	f(b, 100, 20, false)
	f(retry.Budget{}, 100, 0, false)
	f(retry.Budget{Percent: 100}, -1, 0, false)
}

func TestDecidingAllocatesNothing(t *testing.T) {
	p := retry.Policy{On: retry.On5xx, IdempotentOn: retry.OnReset, Status: []int{425}, Attempts: 2}
	method := []byte("GET")
	if n := testing.AllocsPerRun(100, func() {
		p.Retriable(method, retry.Outcome{Status: 404, GRPCStatus: retry.NoGRPC})
	}); n != 0 {
		t.Errorf("Retriable allocates %v times", n)
	}
}
