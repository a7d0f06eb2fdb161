package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// asked runs a command line against a collector that answers with h.
func asked(t *testing.T, h http.HandlerFunc, stdin string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	var out, diag bytes.Buffer
	args = append([]string{"--collector", strings.TrimPrefix(server.URL, "http://")}, args...)
	err = execute(t.Context(), args, strings.NewReader(stdin), &out, &diag)
	return out.String(), diag.String(), err
}

func TestSearchReadsDownwards(t *testing.T) {
	out, _, err := asked(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/logs" || r.URL.Query().Get("query") != `service.name:payments AND "declined"` || r.URL.Query().Get("since") != "10m" {
			t.Errorf("asked %s", r.URL)
		}
		fmt.Fprintln(w, `{"@timestamp":"2026-11-23T03:00:02.000000000Z","service.name":"payments","log.level":"error","message":"second","trace.id":"ab"}`)
		fmt.Fprintln(w, `{"@timestamp":"2026-11-23T03:00:01.000000000Z","service.name":"payments","log.level":"info","message":"first"}`)
	}, "", "logs", "search", `service.name:payments AND "declined"`, "--since", "10m")
	if err != nil {
		t.Fatal(err)
	}
	want := "2026-11-23T03:00:01.000 payments     info  first\n2026-11-23T03:00:02.000 payments     error second trace.id=ab\n"
	if out != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

func TestARefusalIsPassedOn(t *testing.T) {
	_, _, err := asked(t, func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, `query: column 5: a value is missing after ':'`, http.StatusBadRequest)
	}, "", "logs", "search", "name:")
	if err == nil || !strings.Contains(err.Error(), "column 5") {
		t.Errorf("err = %v", err)
	}
}

func TestNoCollectorNamesTheAddressAndTheRemedy(t *testing.T) {
	var out, diag bytes.Buffer
	err := execute(t.Context(), []string{"--collector", "127.0.0.1:1", "logs", "search"}, nil, &out, &diag)
	if err == nil || !strings.Contains(err.Error(), "127.0.0.1:1") || !strings.Contains(err.Error(), "--collector") {
		t.Errorf("err = %v", err)
	}
}

func TestWhyShowsTheArithmeticAndTheRequests(t *testing.T) {
	out, _, err := asked(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/api/v1/evidence/br-1" {
			t.Errorf("asked %s", r.URL)
		}
		fmt.Fprint(w, `{"@timestamp":"2026-11-23T03:00:02Z","service.name":"storefront","outrigger.breaker.policy":"shop/payments","outrigger.breaker.from":"closed",
			"outrigger.breaker.state":"open","outrigger.breaker.reason":"failure ratio 0.62 >= 0.50 over 10s (31 of 50)","outrigger.destination":"shop/payments:80",
			"outrigger.evidence.requests":[{"@timestamp":"2026-11-23T03:00:01Z","trace.id":"ab","http.request.method":"POST","url.path":"/pay",
			"destination.address":"127.0.0.1:5001","http.response.status_code":500,"outrigger.response_flags":"-","event.duration":3000000,"outrigger.failure":true}]}`)
	}, "", "why", "br-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"shop/payments: closed -> OPEN", "31 of 50", "POST /pay", "500", "3ms", "outrigger why ab"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}

func TestWhyExplainsTheFlagsOfARequest(t *testing.T) {
	out, _, err := asked(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, `{"@timestamp":"2026-11-23T03:00:02Z","service.name":"storefront","message":"POST /pay -> 503 UO","outrigger.response_flags":"UO","outrigger.destination":"shop/payments:80","error.message":"circuit breaker shop/payments is open"}`)
	}, "", "why", "4bf92f3577b34da6a3ce929d0e0e4736")
	if err != nil || !strings.Contains(out, "UO: a circuit breaker or limit rejected the call (circuit breaker shop/payments is open)") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestInjectSaysWhatItDid(t *testing.T) {
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {containers: [{name: web, image: web}]}\n"
	out, diag, err := asked(t, nil, pod, "inject", "-f", "-")
	if err != nil || !strings.Contains(out, "outrigger-proxy") || !strings.Contains(diag, "web") {
		t.Errorf("%v\n%s\n%s", err, out, diag)
	}
}
