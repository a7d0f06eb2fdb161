package apptest

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// step is one thing that the mesh promises, tried on one kind of proxy.
type step struct {
	name string
	// envoy says what a real Envoy does instead; empty where both do the same.
	envoy    string
	policies string
	// problem is what the control plane has to say of the policies; empty where
	// nothing.
	problem string
	act     func(t *testing.T, w *world)
}

// per is what is expected of our sidecar, or of Envoy where the step says that
// it differs; a step that claims the same of both cannot use it.
func per[T any](t *testing.T, w *world, outrigger, envoy T) T {
	t.Helper()
	if w.differs == "" {
		t.Fatal("the step expects different things of the two proxies and does not say why")
	}
	if w.plane.name() == "envoy" {
		return envoy
	}
	return outrigger
}

// play tries every step on the data plane.
func play(t *testing.T, plane dataPlane) {
	t.Helper()
	w := newWorld(t, plane)
	for _, s := range steps(t) {
		ok := t.Run(strings.ReplaceAll(s.name, " ", "_"), func(t *testing.T) {
			w.differs = s.envoy
			w.policies(t, s.policies, s.problem)
			s.act(t, w)
		})
		parity := "both the same"
		if s.envoy != "" {
			parity = "Envoy: " + s.envoy
		}
		t.Logf("%-9s %-5v %s (%s)", plane.name(), ok, s.name, parity)
	}
	for _, p := range w.all {
		p.process().running(t)
		if why := p.refused(t); why != "" {
			t.Errorf("%s has refused configuration:\n%s", p.process().name, why)
		}
	}
	if n := metric(t, w.admin, "outrigger_xds_nacks_total"); n != 0 {
		t.Errorf("the control plane has counted %d NACKs", n)
	}
}

func TestShopOnSidecars(t *testing.T) {
	t.Parallel()
	play(t, ourSidecar{})
}

func TestShopOnEnvoy(t *testing.T) {
	t.Parallel()
	play(t, realEnvoy{envoyBinary(t)})
}

// want fails the test where a value is not what was to be expected.
func want[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// logged waits until the log of the storefront's proxy has n records of
// requests whose path begins with prefix.
func (w *world) logged(t *testing.T, mark int, prefix string, n int) []record {
	t.Helper()
	var out []record
	eventually(t, 3*time.Second, func() string {
		if out = accessLog(t, w.front.process(), mark, prefix); len(out) < n {
			return fmt.Sprintf("%d records of %s in the access log, want %d", len(out), prefix, n)
		}
		return ""
	})
	if len(out) != n {
		t.Errorf("%d records of %s in the access log, want %d", len(out), prefix, n)
	}
	return out
}

// mark is the place in the access log of the storefront's proxy from which the
// records of a step are read.
func (w *world) mark() int { return w.front.process().stdout.size() }

func flagged(rs []record, flag string) (n int) {
	for _, r := range rs {
		if slices.Contains(strings.Split(r.Flags, ","), flag) {
			n++
		}
	}
	return n
}

const (
	breaker = "---\napiVersion: outrigger.dev/v1alpha1\nkind: CircuitBreaker\nmetadata: {name: %[1]s, namespace: shop}\nspec:\n" +
		"  targetRefs: [{group: \"\", kind: Service, name: %[1]s}]\n"
	retryPolicy = "---\napiVersion: outrigger.dev/v1alpha1\nkind: RetryPolicy\nmetadata: {name: %[1]s, namespace: shop}\nspec:\n" +
		"  targetRefs: [{group: \"\", kind: Service, name: %[1]s}]\n"
	httpRoute = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: %[1]s, namespace: shop}\nspec:\n" +
		"  parentRefs: [{group: \"\", kind: Service, name: %[1]s, port: 80}]\n  rules:\n"
)

// policy is one of the heads above for a service, with the lines of its spec.
func policy(head, service string, lines ...string) string {
	return fmt.Sprintf(head, service) + "  " + strings.Join(lines, "\n  ") + "\n"
}

// split sends shares of payments to its two versions.
func split(v1, v2 int) string {
	return policy(httpRoute, "payments", fmt.Sprintf("- backendRefs: [{name: payments-v1, port: 80, weight: %d}, {name: payments-v2, port: 80, weight: %d}]", v1, v2))
}

// steps is the scenario. Each puts its policies in the place of those of the
// step before.
func steps(t *testing.T) []step {
	t.Helper()
	shipped, err := os.ReadFile(filepath.Join("..", "demo", "mesh", "policies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return []step{
		{
			name:     "a checkout passes with the policies of the demo",
			policies: string(shipped),
			act: func(t *testing.T, w *world) {
				for range 5 {
					if a := call(http.MethodGet, "http://"+w.storefront+"/checkout"); a.status != 200 || a.header.Get("X-Paid") != "now" {
						t.Fatal(a)
					}
				}
			},
		},
		{
			name: "without any policy a POST that failed is not made again",
			act: func(t *testing.T, w *world) {
				a := call(http.MethodPost, w.to("shipping", "/once/503/plain-post"))
				want(t, "status", a.status, 503)
				want(t, "attempts", len(w.shipping.attempts("/once/503/plain-post")), 1)
			},
		},
		{
			name:  "without any policy a GET that failed at a gateway is made again",
			envoy: "has no word for retries by method: a gateway error is not retried without a policy",
			act: func(t *testing.T, w *world) {
				a := call(http.MethodGet, w.to("shipping", "/once/503/plain-get"))
				want(t, "status", a.status, per(t, w, 200, 503))
				want(t, "attempts", len(w.shipping.attempts("/once/503/plain-get")), per(t, w, 2, 1))
			},
		},
		{
			name:     "weights 90 to 10",
			policies: split(90, 10),
			act: func(t *testing.T, w *world) {
				const n = 600 // the share of v2 has a standard deviation of 1.2 %
				before := w.paid()
				as := burst(n, 8, func(int) answer { return call(http.MethodPost, w.to("payments", "/pay")) })
				want(t, "answers 200", tally(as)[200], n)
				var got [2]int
				eventually(t, 3*time.Second, func() string {
					after := w.paid()
					got = [2]int{after[0] - before[0], after[1] - before[1]}
					if got[0]+got[1] != n {
						return fmt.Sprintf("payments has logged %v of %d requests", got, n)
					}
					return ""
				})
				if share := float64(got[1]) / n; share < 0.05 || share > 0.16 {
					t.Errorf("v2 has %.1f %% of the requests, want 10", 100*share)
				}
			},
		},
		{
			name: "routes by path, method and header, the rest is 404",
			policies: policy(httpRoute, "shipping",
				`- matches: [{path: {type: Exact, value: /ok/exact}}]`,
				`  backendRefs: [{name: shipping, port: 80}]`,
				`- matches: [{path: {type: PathPrefix, value: /ok}, method: POST}]`,
				`  backendRefs: [{name: shipping, port: 80}]`,
				`- matches: [{path: {type: PathPrefix, value: /ok}, headers: [{name: X-Tier, value: gold}]}]`,
				`  backendRefs: [{name: shipping, port: 80}]`,
				`- matches: [{queryParams: [{name: track, value: "7"}]}]`,
				`  backendRefs: [{name: shipping, port: 80}]`,
				`- matches: [{path: {type: RegularExpression, value: "/ok/[0-9]+"}}]`,
				`  backendRefs: [{name: shipping, port: 80}]`),
			act: func(t *testing.T, w *world) {
				mark := w.mark()
				f := func(status int, method, path string, headers ...string) {
					t.Helper()
					if a := call(method, w.to("shipping", path), headers...); a.status != status {
						t.Errorf("%s %s %v: %v, want %d", method, path, headers, a, status)
					}
				}
				f(200, "GET", "/ok/exact")
				f(404, "GET", "/ok/exact/not")
				f(200, "POST", "/ok/any")
				f(404, "GET", "/ok/any")
				f(404, "POST", "/okay")
				f(200, "GET", "/ok/any", "x-tier", "gold")
				f(404, "GET", "/ok/any", "x-tier", "golden")
				f(200, "GET", "/ok/any?track=7")
				f(404, "GET", "/ok/any?track=77")
				f(200, "GET", "/ok/42")
				f(404, "GET", "/ok/42x")
				f(200, "GET", "/ok/./exact") // one form of the path is matched
				records := w.logged(t, mark, "/ok", 12)
				for _, r := range records {
					if strings.Contains(r.Path, "?") {
						t.Errorf("the access log holds a query, which may hold secrets: %s", r.Path)
					}
				}
				if n := flagged(records, "NR"); n != 6 {
					t.Errorf("%d records have the flag NR, want 6", n)
				}
			},
		},
		{
			name: "a backend that is not there keeps its share, which is answered 500",
			policies: policy(httpRoute, "shipping",
				`- matches: [{path: {type: PathPrefix, value: /ok/none}}]`,
				`- backendRefs: [{name: shipping, port: 80, weight: 1}, {name: ghost, port: 80, weight: 1}]`),
			problem: "spec.rules[1].backendRefs[1].name: no usable Service shop/ghost; create it or correct the name",
			act: func(t *testing.T, w *world) {
				want(t, "without a backend", call(http.MethodGet, w.to("shipping", "/ok/none")).status, 500)
				got := tally(burst(100, 4, func(int) answer { return call(http.MethodGet, w.to("shipping", "/ok/half")) }))
				if got[200]+got[500] != 100 || got[200] < 25 || got[500] < 25 { // five standard deviations
					t.Errorf("answers by status: %v, want half with 200 and half with 500", got)
				}
			},
		},
		{
			name:     "a retry goes to the other instance",
			policies: policy(retryPolicy, "shipping", "retryOn: [gateway-error, connect-failure, reset]", "attempts: 2"),
			act: func(t *testing.T, w *world) {
				mark := w.mark()
				const n = 16
				same := 0
				for i := range n {
					path := fmt.Sprintf("/once/503/%d", i)
					a := call(http.MethodPost, w.to("shipping", path))
					want(t, "status", a.status, 200)
					seen := w.shipping.attempts(path)
					if len(seen) != 2 {
						t.Errorf("%s was tried at the instances %v, want two attempts", path, seen)
					} else if seen[0] == seen[1] {
						same++
					}
				}
				// Envoy draws again sixteen times before it takes any: of two instances it
				// meets the same one in one retry of 65,536.
				want(t, "retries at the same instance", same, 0)
				for _, r := range w.logged(t, mark, "/once", n) {
					want(t, "attempts in the access log", r.Attempts, 2)
					want(t, "flags in the access log", r.Flags, "-")
				}
			},
		},
		{
			name:     "a connection that is reset is made again where the policy says so",
			policies: policy(retryPolicy, "shipping", "retryOn: [reset]", "attempts: 1"),
			act: func(t *testing.T, w *world) {
				want(t, "status", call(http.MethodPost, w.to("shipping", "/reset/1")).status, 200)
				want(t, "attempts", len(w.shipping.attempts("/reset/1")), 2)
			},
		},
		{
			name:     "retries end, and the last answer is the caller's",
			policies: policy(retryPolicy, "shipping", "retryOn: [5xx]", "attempts: 2", "backoff: {base: 5ms}"),
			act: func(t *testing.T, w *world) {
				mark := w.mark()
				a := call(http.MethodGet, w.to("shipping", "/status/500/always"))
				want(t, "status", a.status, 500)
				want(t, "body", a.body, "as ordered\n")
				want(t, "attempts", len(w.shipping.attempts("/status/500/always")), 3)
				want(t, "flags in the access log", w.logged(t, mark, "/status", 1)[0].Flags, "URX")
			},
		},
		{
			name:     "single codes are retried, others not",
			policies: policy(retryPolicy, "shipping", "retryOnStatus: [429]", "attempts: 1"),
			act: func(t *testing.T, w *world) {
				want(t, "429", call(http.MethodPost, w.to("shipping", "/once/429/x")).status, 200)
				want(t, "418", call(http.MethodPost, w.to("shipping", "/once/418/x")).status, 418)
			},
		},
		{
			name: "a request that takes too long is 504",
			policies: policy(httpRoute, "shipping", `- backendRefs: [{name: shipping, port: 80}]`, `  timeouts: {request: 250ms}`) +
				policy(retryPolicy, "shipping", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				mark := w.mark()
				a := call(http.MethodGet, w.to("shipping", "/slow/5s"))
				want(t, "status", a.status, 504)
				if a.took < 240*time.Millisecond || a.took > 2*time.Second {
					t.Errorf("it took %s, want 250ms", a.took)
				}
				want(t, "flags in the access log", w.logged(t, mark, "/slow", 1)[0].Flags, "UT")
				want(t, "a quicker one", call(http.MethodGet, w.to("shipping", "/slow/10ms")).status, 200)
			},
		},
		{
			name:     "an attempt that takes too long is made again",
			policies: policy(retryPolicy, "shipping", "retryOn: [gateway-error]", "attempts: 1", "perTryTimeout: 250ms"),
			act: func(t *testing.T, w *world) {
				a := call(http.MethodPost, w.to("shipping", "/slowonce/5s/1"))
				want(t, "status", a.status, 200)
				want(t, "attempts", len(w.shipping.attempts("/slowonce/5s/1")), 2)
				if a.took > 2*time.Second {
					t.Errorf("it took %s, want little over 250ms", a.took)
				}
			},
		},
		{
			name:     "the limit on requests rejects what is beyond it",
			policies: policy(breaker, "shipping", "limits: {requests: 2}") + policy(retryPolicy, "shipping", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				mark, counted := w.mark(), w.front.overflow(t, "shipping")
				as := burst(6, 6, func(i int) answer {
					return call(http.MethodGet, w.to("shipping", fmt.Sprintf("/slow/700ms/limit/%d", i)))
				})
				got := tally(as)
				want(t, "answers 200", got[200], 2)
				want(t, "answers 503", got[503], 4)
				for _, a := range as {
					if a.status == 503 && a.took > 400*time.Millisecond {
						t.Errorf("a rejection took %s, want none to wait", a.took)
					}
				}
				want(t, "records with the flag UO", flagged(w.logged(t, mark, "/slow", 6), "UO"), 4)
				want(t, "counted as overflow", w.front.overflow(t, "shipping")-counted, 4)
				want(t, "when there is room again", call(http.MethodGet, w.to("shipping", "/ok/room")).status, 200)
			},
		},
		{
			name:     "Observe rejects nothing",
			policies: policy(breaker, "shipping", "mode: Observe", "limits: {requests: 1}", "trip: {consecutiveFailures: 2}") + policy(retryPolicy, "shipping", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				as := burst(4, 4, func(i int) answer {
					return call(http.MethodGet, w.to("shipping", fmt.Sprintf("/slow/100ms/observe/%d", i)))
				})
				want(t, "answers 200 beyond the limit", tally(as)[200], 4)
				for range 6 {
					want(t, "a failure that is passed on", call(http.MethodGet, w.to("shipping", "/status/500/observed")).status, 500)
				}
				want(t, "the request after", call(http.MethodGet, w.to("shipping", "/ok/after")).status, 200)
				want(t, "ejected", w.front.ejected(t, "shipping"), 0)
			},
		},
		{
			name: "the breaker opens, sheds, probes and closes",
			envoy: "approximated: no breaker for the service, each endpoint is ejected by itself, " +
				"and then it is 503 UH without our header; there is no half-open state: all traffic returns at once",
			policies: policy(breaker, "payments", "trip: {consecutiveFailures: 5, window: 1s, openFor: 1s, halfOpenRequests: 2}"),
			act: func(t *testing.T, w *world) {
				w.fail(t, 0, true)
				w.fail(t, 1, true)
				mark := w.mark()
				pay := func() answer { return call(http.MethodPost, w.to("payments", "/pay")) }
				failures := 0
				var a answer
				began := time.Now()
				for a = pay(); a.status == 500; a = pay() {
					if failures++; time.Since(began) > 5*time.Second {
						t.Fatalf("%d failures have opened nothing", failures)
					}
				}
				t.Logf("open after %d failures and %s", failures, time.Since(began).Round(time.Millisecond))
				want(t, "status when open", a.status, 503)
				// Envoy's main thread ejects while its worker sends a few more.
				if per(t, w, failures != 5, failures < 10 || failures > 30) {
					t.Errorf("%d failures opened it: want 5 in a row of the service, or of each of its endpoints", failures)
				}
				if got := a.header.Get("X-Outrigger-Breaker"); per(t, w, !strings.HasPrefix(got, "shop/payments open "), got != "") {
					t.Errorf("X-Outrigger-Breaker: %q", got)
				}
				want(t, "flag in the access log", flagged(w.logged(t, mark, "/pay", failures+1)[failures:], per(t, w, "UO", "UH")), 1)
				want(t, "endpoints ejected", w.front.ejected(t, "payments"), per(t, w, 0, 2))
				// A checkout goes on: the storefront takes the order and charges later.
				c := call(http.MethodGet, "http://"+w.storefront+"/checkout")
				want(t, "checkout", c.status, 200)
				want(t, "paid", c.header.Get("X-Paid"), "later")
				// While it is open nothing reaches payments.
				before := w.paid()
				if a := pay(); a.status == 503 {
					want(t, "requests at payments while it is open", w.paid(), before)
				}

				w.fail(t, 0, false)
				w.fail(t, 1, false)
				healed := time.Now()
				eventually(t, 8*time.Second, func() string {
					if a := pay(); a.status != 200 {
						return "a payment after openFor: " + a.String()
					}
					return ""
				})
				t.Logf("closed again %s after payments was healed", time.Since(healed).Round(time.Millisecond))
				// Envoy's sweep may return the endpoints one by one.
				eventually(t, 8*time.Second, func() string {
					if n := w.front.ejected(t, "payments"); n != 0 {
						return fmt.Sprintf("%d endpoints are ejected", n)
					}
					return ""
				})
				want(t, "answers 200", tally(burst(10, 1, func(int) answer { return pay() }))[200], 10)
			},
		},
		{
			name: "an instance that fails is ejected and comes back",
			policies: policy(breaker, "payments", "ejection: {consecutive5xx: 3, interval: 1s, baseEjectionTime: 1s, maxEjectionPercent: 50}") +
				policy(retryPolicy, "payments", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				w.fail(t, 0, true)
				w.fail(t, 1, true)
				pay := func(int) answer { return call(http.MethodPost, w.to("payments", "/pay")) }
				before := w.paid()
				for i := 0; w.front.ejected(t, "payments") == 0; i++ {
					if i > 20 {
						t.Fatal("20 failures have ejected nothing")
					}
					want(t, "status", pay(i).status, 500)
				}
				// The one that failed three times first; half may be out, so the other stays.
				out := 0
				if got := w.paid(); got[1]-before[1] == 3 {
					out = 1
				} else if got[0]-before[0] != 3 {
					t.Fatalf("failures of the two instances before one was ejected: %v to %v, want 3 of one", before, got)
				}
				w.fail(t, 1-out, false)
				before = w.paid()
				want(t, "answers 200 without the instance", tally(burst(20, 4, pay))[200], 20)
				want(t, "requests at the ejected instance", w.paid()[out], before[out])
				w.fail(t, out, false)
				eventually(t, 8*time.Second, func() string {
					burst(16, 8, pay)
					if w.paid()[out] == before[out] {
						return "the healed instance gets no request"
					}
					return ""
				})
			},
		},
		{
			name:     "an instance that fails at once gets no more than its share",
			policies: policy(retryPolicy, "freight", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				const n = 200
				got := tally(burst(n, 1, func(int) answer { return call(http.MethodPost, w.to("freight", "/trap")) }))
				if got[500] > n*7/10 || got[200]+got[500] != n { // half, and five standard deviations
					t.Errorf("answers by status: %v, want at most %d with 500", got, n*7/10)
				}
			},
		},
		{
			name:  "the limit on connections",
			envoy: "lets requests wait for a connection, as many as pendingRequests allows; our sidecar rejects what would need one more",
			policies: policy(breaker, "freight", "limits: {connections: 1}") +
				policy(retryPolicy, "freight", "attempts: 0"),
			act: func(t *testing.T, w *world) {
				as := burst(3, 3, func(i int) answer {
					return call(http.MethodGet, w.to("freight", fmt.Sprintf("/slow/300ms/connections/%d", i)))
				})
				got := tally(as)
				want(t, "answers 200", got[200], per(t, w, 1, 3))
				want(t, "answers 503", got[503], per(t, w, 2, 0))
			},
		},
		{
			name:     "an edit of a policy is in force within 2 s and fails no request",
			policies: split(1, 0),
			act: func(t *testing.T, w *world) {
				stop := make(chan struct{})
				failed := make(chan map[int]int)
				go func() {
					var as []answer
					for {
						select {
						case <-stop:
							got := tally(as)
							delete(got, 200)
							failed <- got
							return
						default:
							as = append(as, burst(4, 4, func(int) answer { return call(http.MethodPost, w.to("payments", "/pay")) })...)
						}
					}
				}()
				for i, text := range []string{split(0, 1), split(1, 0)} {
					version := 1 - i
					before := w.paid()[version]
					written := time.Now()
					w.put(t, "policies.yaml", text)
					eventually(t, 2*time.Second, func() string {
						if w.paid()[version] == before {
							return "the edit is not in force"
						}
						return ""
					})
					t.Logf("in force after %s", time.Since(written).Round(time.Millisecond))
					w.await(t)
				}
				close(stop)
				if got := <-failed; len(got) > 0 {
					t.Errorf("failed requests by status: %v", got)
				}
			},
		},
		{
			name: "an endpoint that moves is followed, and none is 503 UH",
			act: func(t *testing.T, w *world) {
				one := strings.Replace(w.workloads, workload("shipping", w.shipping.addresses...), workload("shipping", w.shipping.addresses[1]), 1)
				none := strings.Replace(w.workloads, workload("shipping", w.shipping.addresses...), "", 1)
				w.apply(t, "workloads.yaml", one)
				w.await(t)
				for range 10 {
					want(t, "instance", call(http.MethodGet, w.to("shipping", "/ok/moved")).header.Get("X-Instance"), "1")
				}
				w.apply(t, "workloads.yaml", none)
				w.await(t)
				mark := w.mark()
				want(t, "status without endpoints", call(http.MethodGet, w.to("shipping", "/ok/empty")).status, 503)
				want(t, "flags in the access log", w.logged(t, mark, "/ok/empty", 1)[0].Flags, "UH")
				w.apply(t, "workloads.yaml", w.workloads)
				w.await(t)
				want(t, "status when they are back", call(http.MethodGet, w.to("shipping", "/ok/back")).status, 200)
			},
		},
		{
			name: "without the control plane traffic goes on, and with it again policies do",
			policies: policy(retryPolicy, "shipping", "attempts: 0") +
				policy(httpRoute, "shipping", `- backendRefs: [{name: shipping, port: 80}]`),
			act: func(t *testing.T, w *world) {
				w.process.kill()
				as := burst(100, 4, func(i int) answer { return call(http.MethodGet, w.to("shipping", "/ok/alone")) })
				want(t, "answers 200", tally(as)[200], 100)
				want(t, "a checkout", call(http.MethodGet, "http://"+w.storefront+"/checkout").status, 200)
				w.controlPlane.start(t)
				w.await(t)
				w.policies(t, policy(httpRoute, "shipping", `- matches: [{path: {type: Exact, value: /ok/new}}]`, `  backendRefs: [{name: shipping, port: 80}]`), "")
				want(t, "the new route", call(http.MethodGet, w.to("shipping", "/ok/new")).status, 200)
				want(t, "what it does not match", call(http.MethodGet, w.to("shipping", "/ok/alone")).status, 404)
			},
		},
	}
}
