package apptest

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// TestBadInput: what is wrong is said where the user looks, with its name and
// the remedy, and what ran before goes on.
func TestBadInput(t *testing.T) {
	t.Parallel()
	t.Run("files", badFiles)
	t.Run("control plane cannot start", badControlPlane)
	t.Run("sidecar cannot start", badSidecar)
	t.Run("control plane is not there", noControlPlane)
	t.Run("state folder is damaged", damagedState)
}

// mentions fails the test where text lacks one of the words.
func mentions(t *testing.T, what, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("%s does not mention %q:\n%s", what, w, text)
		}
	}
}

func badFiles(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	limit := policy(breaker, "shipping", "limits: {requests: 100}")
	r.apply(t, "policies.yaml", limit)
	for _, bad := range []struct {
		name, file, text string
		words            []string
	}{
		{"broken YAML", "broken.yaml", "kind: Service\nmetadata: {name: [\n", []string{"broken.yaml", "is not YAML"}},
		{"an unknown kind", "kind.yaml", "apiVersion: outrigger.dev/v1alpha1\nkind: CircuitBraker\nmetadata: {name: x, namespace: shop}\n", []string{"kind.yaml:", "CircuitBraker", "CircuitBreaker"}},
		{"an unknown field", "field.yaml", strings.Replace(policy(breaker, "shipping", "limits: {request: 5}"), "name: shipping, namespace", "name: field, namespace", 1), []string{"field.yaml:", "request", "requests"}},
		{"a policy for a Service that does not exist", "ghost.yaml", policy(breaker, "ghost", "limits: {requests: 5}"), []string{"CircuitBreaker shop/ghost", "ghost.yaml:", "spec.targetRefs[0].name", "no usable Service shop/ghost", "create it"}},
		{"two policies for one target", "second.yaml", strings.Replace(limit, "name: shipping, namespace", "name: zweite, namespace", 1), []string{"CircuitBreaker shop/zweite", "second.yaml:", "shop/shipping already applies to Service shop/shipping", "remove this targetRef"}},
		{"an endpoint without address", "address.yaml", "apiVersion: outrigger.dev/v1alpha1\nkind: Workload\nmetadata: {name: adrift, namespace: shop, labels: {app: shipping}}\nspec: {endpoints: [{ports: {http: 80}}]}\n", []string{"Workload shop/adrift", "address.yaml:", "spec.endpoints[0].address", "write the IP address"}},
		{"a policy that was good", "policies.yaml", strings.Replace(limit, "100", "0", 1), []string{"CircuitBreaker shop/shipping", "policies.yaml:", "spec.limits.requests", "0 is not a limit", "stays in force"}},
	} {
		t.Run(strings.ReplaceAll(bad.name, " ", "_"), func(t *testing.T) {
			problems := r.apply(t, bad.file, bad.text)
			if len(problems) != 1 {
				t.Errorf("%d problems, want 1:\n%s", len(problems), strings.Join(problems, "\n"))
			}
			mentions(t, "/debug/problems", strings.Join(problems, "\n"), bad.words...)
			mentions(t, "the log", r.process.stderr.String(), "problem: ")
			r.works(t, "with it")
			r.process.running(t)
			r.proxy.process().running(t)
			if n := metric(t, r.place.admin, "outrigger_limit_max", `limit="requests"`); n != 100 {
				t.Errorf("the policy that was in force has a limit of %d requests, want 100", n)
			}

			// A dry run says the same, and fails.
			dry := launch(t, "dry-run", program("control-plane"), "--config", r.mesh, "--dry-run")
			if code := dry.exits(t); code != 1 {
				t.Errorf("the dry run ended with %d, want 1", code)
			}
			words := bad.words
			if words[len(words)-1] == "stays in force" { // a dry run has no memory
				words = words[:len(words)-1]
			}
			mentions(t, "the dry run", dry.stderr.String(), words...)

			if bad.file == "policies.yaml" {
				problems = r.apply(t, bad.file, limit)
			} else {
				before := metric(t, r.admin, "outrigger_rebuild_total")
				if err := os.Remove(filepath.Join(r.mesh, bad.file)); err != nil {
					t.Fatal(err)
				}
				eventually(t, 5*time.Second, func() string {
					if metric(t, r.admin, "outrigger_rebuild_total") == before {
						return "the control plane has not seen that the file is gone"
					}
					return ""
				})
				problems = r.problems(t)
			}
			if len(problems) > 0 {
				t.Errorf("mended, and still:\n%s", strings.Join(problems, "\n"))
			}
		})
	}
	if n := metric(t, r.admin, "outrigger_xds_nacks_total"); n != 0 {
		t.Errorf("bad input has led to %d NACKs", n)
	}
}

// taken is an address at which somebody listens.
func taken(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// refuses fails the test where the program does not end with 1 and these words.
func refuses(t *testing.T, name string, args []string, words ...string) {
	t.Helper()
	p := launch(t, name, program(name), args...)
	if code := p.exits(t); code != 1 {
		t.Errorf("%s %v ended with %d, want 1", name, args, code)
	}
	mentions(t, name+"'s last word", p.stderr.String(), words...)
}

func badControlPlane(t *testing.T) {
	t.Parallel()
	busy, dir := taken(t), t.TempDir()
	f := func(words []string, args ...string) {
		t.Helper()
		refuses(t, "control-plane", args, words...)
	}
	f([]string{"--xds-address " + busy + " is in use", "another port"}, "--config", dir, "--xds-address", busy, "--admin-address", freeAddress(t))
	f([]string{"--admin-address " + busy + " is in use", "another port"}, "--config", dir, "--xds-address", freeAddress(t), "--admin-address", busy)
	f([]string{"--config " + dir + "/nowhere", "no such file", "give an existing folder"}, "--config", dir+"/nowhere")
	f([]string{"--config is missing", "--config ./mesh"})
	f([]string{"--xds-address 0.0.0.0:1234", "loopback", "127.0.0.1:"}, "--config", dir, "--xds-address", "0.0.0.0:1234")
}

func badSidecar(t *testing.T) {
	t.Parallel()
	busy := taken(t)
	f := func(words []string, args ...string) {
		t.Helper()
		refuses(t, "sidecar", append([]string{"--namespace", "shop", "--metrics-address", "", "--health-address", ""}, args...), words...)
	}
	caller := []string{"--workload", "caller", "--admin-address", freeAddress(t)}
	f([]string{"--upstream payments.shop:80=" + busy, busy + " is in use", "another port"}, append(caller, "--upstream", "payments.shop:80="+busy)...)
	f([]string{"--inbound http:" + busy, busy + " is in use", "another port"}, append(caller, "--inbound", busy+"=127.0.0.1:8080")...)
	f([]string{"--admin-address", busy + " is in use", "another port"}, "--workload", "caller", "--admin-address", busy)
	f([]string{"--workload is empty", "name the workload"})
	f([]string{`"payments.shop=`, "the service has no port", "for example payments.shop:80=127.0.0.1:4001"}, append(caller, "--upstream", "payments.shop="+busy)...)
	f([]string{"10.1.2.3:15010", "loopback"}, append(caller, "--control-plane", "10.1.2.3:15010", "--upstream", "payments.shop:80="+freeAddress(t))...)
}

// noControlPlane: a sidecar that has nobody to ask says so and waits; one that
// has been told once starts from what it was told.
func noControlPlane(t *testing.T) {
	t.Parallel()
	upstream, nobody := freeAddress(t), freeAddress(t)
	alone := ourSidecar{}.start(t, place{admin: freeAddress(t), config: bootstrap.Config{
		Namespace: "shop", Workload: "caller", Instance: "caller-0", ServiceAccount: "caller", ControlPlane: nobody,
		Upstreams: []bootstrap.Upstream{{Service: "shipping", Namespace: "shop", Port: 80, Listen: listen(t, upstream)}},
	}})
	eventually(t, 10*time.Second, func() string {
		if why := alone.starting(t); !strings.Contains(why, nobody) {
			return fmt.Sprintf("/ready says %q and does not name %s", why, nobody)
		}
		if !strings.Contains(alone.process().stderr.String(), nobody+`","error.message"`) {
			return "no word on the control plane in its log"
		}
		return ""
	})
	mentions(t, "the log", alone.process().stderr.String(), nobody, "Check that it runs and that --control-plane is its address", "connection refused")
	if a := call(http.MethodGet, "http://"+upstream+"/ok"); a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "is the control plane reachable?") {
		t.Errorf("a request to a sidecar that knows nothing: %v", a)
	}
	alone.process().running(t)

	state := filepath.Join(t.TempDir(), "state")
	r := newRig(t, "--state-dir", state)
	r.proxy.process().stop(t)
	r.process.kill()
	r.startSidecar(t, "--state-dir", state)
	eventually(t, 5*time.Second, func() string { return r.proxy.starting(t) })
	r.works(t, "from the last good configuration")
	r.controlPlane.start(t)
	eventually(t, 15*time.Second, func() string { return r.settled(t, 1) })
	r.works(t, "with the control plane again")
}

// damagedState: a file that is not what was written is set aside, and the
// control plane asked.
func damagedState(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "state")
	r := newRig(t, "--state-dir", state)
	r.proxy.process().stop(t)
	file := filepath.Join(state, "caller-0.xds")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r.startSidecar(t, "--state-dir", state)
	eventually(t, 5*time.Second, func() string { return r.proxy.starting(t) })
	r.works(t, "with a damaged file")
	mentions(t, "the log", r.proxy.process().stderr.String(), file, "damaged", "set aside")
	if _, err := os.Stat(file + ".damaged"); err != nil {
		t.Error(err)
	}
}
