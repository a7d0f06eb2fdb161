package apptest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// key is the name of a service of the shop on the wire.
func key(service string) string { return "shop/" + service + ":80" }

// controlPlane is a control plane and the folder that it watches.
type controlPlane struct {
	mesh, xds, admin string
	process          *process
	arguments        []string   // further ones
	owner            *testing.T // it ends with this test, whichever step has restarted it
}

// startControlPlane runs a control plane on a folder with these files, by
// name, and waits until it is ready.
func startControlPlane(t *testing.T, files map[string]string) *controlPlane {
	t.Helper()
	c := &controlPlane{owner: t, mesh: t.TempDir(), xds: freeAddress(t), admin: freeAddress(t)}
	for name, text := range files {
		c.put(t, name, text)
	}
	c.start(t)
	return c
}

func (c *controlPlane) start(t *testing.T) {
	t.Helper()
	c.process = launch(c.owner, "control-plane", program("control-plane"), append([]string{
		"--config", c.mesh, "--xds-address", c.xds, "--admin-address", c.admin, "--log-format", "text",
	}, c.arguments...)...)
	eventually(t, 10*time.Second, func() string {
		c.process.running(t)
		if status, text := get("http://" + c.admin + "/ready"); status != 200 {
			return "the control plane is not ready: " + text
		}
		return ""
	})
}

// put replaces a file of the folder as editors do, by a rename.
func (c *controlPlane) put(t *testing.T, name, text string) {
	t.Helper()
	next := filepath.Join(c.mesh, "."+name+".next")
	if err := errors.Join(os.WriteFile(next, []byte(text), 0o600), os.Rename(next, filepath.Join(c.mesh, name))); err != nil {
		t.Fatal(err)
	}
}

// apply replaces a file and waits until the control plane has built the mesh
// anew. It returns the problems that there are then.
func (c *controlPlane) apply(t *testing.T, name, text string) []string {
	t.Helper()
	before := metric(t, c.admin, "outrigger_rebuild_total")
	c.put(t, name, text)
	eventually(t, 5*time.Second, func() string {
		if metric(t, c.admin, "outrigger_rebuild_total") == before {
			return "the control plane has not taken " + name + " up"
		}
		return ""
	})
	return c.problems(t)
}

// problems lists what is wrong with the objects, one line each.
func (c *controlPlane) problems(t *testing.T) []string {
	t.Helper()
	var report struct {
		Problems []struct{ Kind, Namespace, Name, Source, Field, Message string }
	}
	getJSON(t, "http://"+c.admin+"/debug/problems", &report)
	var out []string
	for _, p := range report.Problems {
		out = append(out, fmt.Sprintf("%s %s/%s (%s): %s: %s", p.Kind, p.Namespace, p.Name, p.Source, p.Field, p.Message))
	}
	return out
}

// proxies is what /debug/proxies shows.
type proxies struct {
	Proxies []struct {
		ID, DataPlane string
		Applied       bool
		Types         []struct {
			Type string
			Nack *struct{ Reason string }
		}
	}
}

// settled says why not all of so many proxies have applied what is in force,
// or is empty. It waits for nothing, and fails the test on a NACK.
func (c *controlPlane) settled(t *testing.T, count int) string {
	t.Helper()
	var s proxies
	getJSON(t, "http://"+c.admin+"/debug/proxies", &s)
	n := 0
	for _, p := range s.Proxies {
		for _, ty := range p.Types {
			if ty.Nack != nil {
				t.Fatalf("%s %s has refused its %s: %s", p.DataPlane, p.ID, ty.Type, ty.Nack.Reason)
			}
		}
		if !p.Applied {
			return p.ID + " has not applied the configuration"
		}
		n++
	}
	if n != count {
		return fmt.Sprintf("%d proxies are connected, want %d", n, count)
	}
	return ""
}

// world is the shop, its control plane and the proxies beside it:
//
//	caller -> storefront's proxy -> storefront -> storefront's proxy -> catalog
//	                                                                 -> cart
//	                                                                 -> payments-0 (v1), through a proxy of its own
//	                                                                 -> payments-1 (v2)
//	                                                                 -> shipping-0, shipping-1
//
// storefront, catalog, cart and payments are the program of the demo; shipping
// is played by this test, so that it can fail and be slow to order.
type world struct {
	*controlPlane
	plane      dataPlane
	storefront string            // address of the proxy in front of it
	upstreams  map[string]string // service -> ambassador port of the storefront's proxy
	front      proxy
	payments   [2]*process
	paymentsAt [2]string // the programs' own addresses, past the mesh
	shipping   *warehouse
	all        []proxy
	connected  int    // of all, those that have something to ask the control plane for
	workloads  string // the file as it is at the start
	differs    string // what the step that runs says of Envoy
}

func newWorld(t *testing.T, plane dataPlane) *world {
	t.Helper()
	w := &world{plane: plane, upstreams: map[string]string{}, shipping: newWarehouse(t)}
	services, err := os.ReadFile(filepath.Join("..", "demo", "mesh", "services.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	shop := func(role string, more ...string) (*process, string) {
		address := freeAddress(t)
		return launch(t, role, program("shop"), append([]string{"--role", role, "--listen", address}, more...)...), address
	}
	var catalogAt, cartAt string
	_, catalogAt = shop("catalog")
	_, cartAt = shop("cart")
	for i := range w.payments {
		w.payments[i], w.paymentsAt[i] = shop("payments")
	}
	var calls []string
	for _, service := range []string{"catalog", "cart", "payments", "shipping", "freight"} {
		w.upstreams[service] = freeAddress(t)
		if service != "shipping" && service != "freight" {
			calls = append(calls, "--"+service, w.upstreams[service])
		}
	}
	_, storefrontAt := shop("storefront", calls...)
	w.storefront = freeAddress(t)
	paymentsInbound := freeAddress(t)

	w.workloads = workload("storefront", w.storefront) + workload("catalog", catalogAt) + workload("cart", cartAt) +
		workload("payments", paymentsInbound, w.paymentsAt[1]) + workload("shipping", w.shipping.addresses...)
	w.controlPlane = startControlPlane(t, map[string]string{
		"services.yaml":  string(services) + moreServices,
		"workloads.yaml": w.workloads,
	})

	dir := t.TempDir()
	start := func(role string, upstreams []bootstrap.Upstream, in bootstrap.Inbound) proxy {
		p := plane.start(t, place{dir: dir, admin: freeAddress(t), config: bootstrap.Config{
			Namespace: "shop", Workload: role, Instance: role + "-0", ServiceAccount: role, ControlPlane: w.xds,
			Upstreams: upstreams, Inbounds: []bootstrap.Inbound{in},
		}})
		w.all = append(w.all, p)
		if len(upstreams) > 0 || plane.name() == "envoy" { // our sidecar needs nobody to open an inbound port
			w.connected++
		}
		return p
	}
	var upstreams []bootstrap.Upstream
	for service, address := range w.upstreams {
		upstreams = append(upstreams, bootstrap.Upstream{Service: service, Namespace: "shop", Port: 80, Listen: listen(t, address)})
	}
	w.front = start("storefront", upstreams, bootstrap.Inbound{Protocol: "http", Listen: listen(t, w.storefront), Forward: listen(t, storefrontAt)})
	start("payments", nil, bootstrap.Inbound{Protocol: "http", Listen: listen(t, paymentsInbound), Forward: listen(t, w.paymentsAt[0])})
	w.await(t)
	return w
}

// await waits until every proxy has applied what is in force.
func (w *world) await(t *testing.T) {
	t.Helper()
	quiet := 0
	eventually(t, 15*time.Second, func() string {
		why := w.settled(t, w.connected)
		for _, p := range w.all {
			if s := p.starting(t); s != "" {
				why = s
			}
		}
		// What was accepted may make a proxy ask for more: only when it stays quiet
		// has all of it been applied.
		if quiet++; why != "" {
			quiet = 0
		} else if quiet < 3 {
			return "the proxies have just settled"
		}
		return why
	})
}

// policies puts these policies in force in place of those before, on every
// proxy. The control plane must have this problem with them, or none.
func (w *world) policies(t *testing.T, text, problem string) {
	t.Helper()
	got := strings.Join(w.apply(t, "policies.yaml", "# what the step asks for\n"+text), "\n")
	if (got == "") != (problem == "") || !strings.Contains(got, problem) {
		t.Fatalf("the control plane says %q of the policies, want %q", got, problem)
	}
	w.await(t)
}

const moreServices = `---
apiVersion: v1
kind: Service
metadata: {name: payments-v1, namespace: shop}
spec:
  selector: {app: payments, version: "0"}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: payments-v2, namespace: shop}
spec:
  selector: {app: payments, version: "1"}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: shipping, namespace: shop}
spec:
  selector: {app: shipping}
  ports: [{name: http, port: 80, targetPort: http}]
---
# Another name for shipping, and so another pool of connections.
apiVersion: v1
kind: Service
metadata: {name: freight, namespace: shop}
spec:
  selector: {app: shipping}
  ports: [{name: http, port: 80, targetPort: http}]
`

// workload is the object that says where an application runs. Its instances
// have the labels version: "0", "1" and so on.
func workload(name string, addresses ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "---\napiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: %[1]s, namespace: shop, labels: {app: %[1]s}}\nspec:\n  serviceAccount: %[1]s\n  endpoints:\n", name)
	for i, a := range addresses {
		host, port, _ := net.SplitHostPort(a)
		fmt.Fprintf(&b, "  - {name: %s-%d, address: %s, ports: {http: %s}, labels: {version: %q}}\n", name, i, host, port, fmt.Sprint(i))
	}
	return b.String()
}

// answer is what a caller sees of one request.
type answer struct {
	status int // 0 where there was no answer
	header http.Header
	body   string
	took   time.Duration
	err    error
}

func (a answer) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d after %s: %.200q %v", a.status, a.took.Round(time.Millisecond), a.body, a.header)
}

// caller has connections of its own, and never waits longer than 20 s.
var caller = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// call makes a request; headers are pairs of name and value.
func call(method, url string, headers ...string) answer {
	req, err := http.NewRequestWithContext(context.Background(), method, url, nil)
	if err != nil {
		return answer{err: err}
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	start := time.Now()
	resp, err := caller.Do(req)
	if err != nil {
		return answer{err: err, took: time.Since(start)}
	}
	b, err := io.ReadAll(resp.Body)
	err = errors.Join(err, resp.Body.Close())
	return answer{status: resp.StatusCode, header: resp.Header, body: string(b), took: time.Since(start), err: err}
}

func get(url string) (status int, text string) {
	a := call(http.MethodGet, url)
	if a.err != nil {
		return 0, a.err.Error()
	}
	return a.status, a.body
}

func getJSON(t *testing.T, url string, into any) {
	t.Helper()
	status, text := get(url)
	if status != http.StatusOK {
		t.Fatalf("%s: %d %s", url, status, text)
	}
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%s: %v\n%s", url, err, text)
	}
}

// to is a URL at which the storefront calls a service.
func (w *world) to(service, path string) string { return "http://" + w.upstreams[service] + path }

// burst makes n requests, so many at once, and returns the answers.
func burst(n, atOnce int, request func(i int) answer) []answer {
	out := make([]answer, n)
	var wg sync.WaitGroup
	for k := range atOnce {
		wg.Go(func() {
			for i := k; i < n; i += atOnce {
				out[i] = request(i)
			}
		})
	}
	wg.Wait()
	return out
}

// tally counts answers by status; 0 is no answer.
func tally(as []answer) map[int]int {
	out := map[int]int{}
	for _, a := range as {
		if a.err != nil {
			out[0]++
			continue
		}
		out[a.status]++
	}
	return out
}

// paid counts what both instances of payments have logged: the payments
// that they took, or failed.
func (w *world) paid() [2]int {
	var out [2]int
	for i, p := range w.payments {
		s := p.stdout.String()
		out[i] = strings.Count(s, `"message":"payment `)
	}
	return out
}

// fail makes an instance of payments fail, or heals it, past the mesh.
func (w *world) fail(t *testing.T, instance int, failing bool) {
	t.Helper()
	what := "heal"
	if failing {
		what = "fail"
	}
	if a := call(http.MethodPost, "http://"+w.paymentsAt[instance]+"/demo/"+what); a.status != http.StatusOK {
		t.Fatalf("payments-%d: %v", instance, a)
	}
}

// warehouse is the two instances of shipping. They do what the path says:
//
//	/ok/...             200
//	/status/<code>/...  answers that
//	/once/<code>/...    answers that to the first attempt at this path, 200 to the others
//	/slow/<duration>/...      200 after that
//	/slowonce/<duration>/...  200, after that on the first attempt at this path
//	/trap               instance 0 takes 5 ms, instance 1 answers 500 at once
//	/reset/...          takes the request and closes the connection on the first attempt
type warehouse struct {
	addresses []string

	mu   sync.Mutex
	seen map[string][]int // path -> instance of each attempt
	now  int              // requests in progress
}

func newWarehouse(t *testing.T) *warehouse {
	t.Helper()
	w := &warehouse{seen: map[string][]int{}}
	for i := range 2 {
		address := freeAddress(t)
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { w.serve(i, rw, r) }), ReadHeaderTimeout: 5 * time.Second}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				t.Errorf("shipping-%d: %v", i, err)
			}
		}()
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			<-done
		})
		w.addresses = append(w.addresses, address)
	}
	return w
}

func (w *warehouse) serve(instance int, rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	first := len(w.seen[r.URL.Path]) == 0
	w.seen[r.URL.Path] = append(w.seen[r.URL.Path], instance)
	w.now++
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.now--
		w.mu.Unlock()
	}()
	rw.Header().Set("X-Instance", fmt.Sprint(instance))
	parts := strings.Split(r.URL.Path, "/")
	order, value := parts[1], ""
	if len(parts) > 2 {
		value = parts[2]
	}
	code := 0
	_, _ = fmt.Sscan(value, &code)
	wait, _ := time.ParseDuration(value)
	switch {
	case order == "status", order == "once" && first:
		http.Error(rw, "as ordered", code)
		return
	case order == "slow", order == "slowonce" && first:
		select {
		case <-time.After(wait):
		case <-r.Context().Done():
			return
		}
	case order == "trap" && instance == 1:
		http.Error(rw, "as ordered", http.StatusInternalServerError)
		return
	case order == "trap":
		time.Sleep(5 * time.Millisecond)
	case order == "reset" && first:
		panic(http.ErrAbortHandler)
	}
	_, _ = io.WriteString(rw, "shipped\n") // a caller that has gone needs no answer
}

// attempts returns which instances have seen a path, in order.
func (w *warehouse) attempts(path string) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]int(nil), w.seen[path]...)
}
