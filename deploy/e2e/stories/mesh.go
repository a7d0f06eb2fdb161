package stories

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

const injection = "outrigger.dev/injection"

// labelled: a namespace with running pods is labelled and its pods restarted; they get
// the sidecar, everything they did before still works, and calls between them are
// mutual TLS, which both ends write down.
func labelled(ctx context.Context, sc *scene) error {
	if err := sc.start(ctx, sc.server("web", 2, "", "")+sc.server("front", 1, "", ""), "web", "front"); err != nil {
		return err
	}
	if err := sc.label(ctx, injection, "enabled"); err != nil {
		return err
	}
	for _, d := range []string{"web", "front"} {
		if err := sc.Restart(ctx, sc.namespace, d); err != nil {
			return err
		}
	}
	for _, d := range []string{"web", "front"} {
		if err := sc.Available(ctx, sc.namespace, d); err != nil {
			return err
		}
	}
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	fronts, err := sc.injected(ctx, "app=front")
	if err != nil {
		return err
	}
	front := fronts[0].Name
	if err := all200(sc.get(ctx, front, "--count=50", "http://web/hello")); err != nil {
		return err
	}
	// By the address of a pod, past any Service, and to itself.
	for _, url := range []string{"http://" + webs[0].Status.PodIP + ":8080/direct", "http://front/self", "http://localhost:8080/loopback"} {
		if err := all200(sc.get(ctx, front, url)); err != nil {
			return fmt.Errorf("%s: %w", url, err)
		}
	}
	// A protocol in which the server speaks first.
	out, err := sc.Exec(ctx, sc.namespace, front, "app", "/app", "tcp", "web:9000")
	if err != nil {
		return err
	}
	if !strings.Contains(out, "hello from web-") || !strings.Contains(out, "ping") {
		return fmt.Errorf("tcp web:9000 said %q", out)
	}
	return cluster.WaitFor(ctx, 20*time.Second, "access logs of both ends to have the calls", func(ctx context.Context) error {
		secured, from := 0, ""
		for _, w := range webs {
			records, err := sc.records(ctx, w.Name, "outrigger.access")
			if err != nil {
				return err
			}
			for _, r := range records {
				if r["url.path"] == "/hello" && r["outrigger.direction"] == "inbound" && r["outrigger.security"] == "mutual_tls" {
					secured++
					from = fmt.Sprint(r["outrigger.peer.identity"])
				}
			}
		}
		if want := "spiffe://cluster.local/ns/" + sc.namespace + "/sa/default"; secured != 50 || from != want {
			return fmt.Errorf("%d of 50 calls came by mutual TLS, the last from %q, not %q", secured, from, want)
		}
		records, err := sc.records(ctx, front, "outrigger.access")
		if err != nil {
			return err
		}
		called := 0
		for _, r := range records {
			if r["url.path"] == "/hello" && r["outrigger.direction"] == "outbound" && r["http.response.status_code"] == 200.0 {
				called++
			}
		}
		if called != 50 {
			return fmt.Errorf("the caller wrote down %d of 50 calls", called)
		}
		return nil
	})
}

// strict: where mutual TLS is asked for, a caller without a sidecar is refused, one with a
// sidecar is served, and probes of the kubelet still pass.
func strict(ctx context.Context, sc *scene) error {
	if err := sc.label(ctx, "outrigger.dev/mtls", "strict"); err != nil {
		return err
	}
	off := `labels: {outrigger.dev/injection: disabled}`
	if err := sc.start(ctx, sc.server("web", 2, "", "")+sc.caller("member", "", "")+sc.caller("stranger", off, ""), "web"); err != nil {
		return err
	}
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	for _, p := range []string{"member", "stranger"} {
		if err := sc.ready(ctx, p); err != nil {
			return err
		}
	}
	if err := all200(sc.get(ctx, "member", "--count=20", "http://web/")); err != nil {
		return fmt.Errorf("a member: %w", err)
	}
	for _, url := range []string{"http://web/", "http://" + webs[0].Status.PodIP + ":8080/"} {
		answers, err := sc.try(ctx, "stranger", "--fresh", "--count=5", "--timeout=5s", url)
		if err != nil {
			return err
		}
		for _, a := range answers {
			if a.Error == "" {
				return fmt.Errorf("a stranger who called %s in clear text was answered %d", url, a.Status)
			}
		}
	}
	// Some periods of the probes later the pods are still ready.
	if err := pause(ctx, 5*time.Second); err != nil {
		return err
	}
	if err := sc.Available(ctx, sc.namespace, "web"); err != nil {
		return err
	}
	// Permissive again: the stranger is served.
	if err := sc.label(ctx, "outrigger.dev/mtls", "permissive"); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, 20*time.Second, "a stranger to be served where it is permitted", func(ctx context.Context) error {
		return all200(sc.try(ctx, "stranger", "--fresh", "http://web/"))
	})
}

// authorization: who may call is said by service account and path; what would be denied
// is told before it is.
func authorization(ctx context.Context, sc *scene) error {
	accounts := ""
	for _, a := range []string{"alice", "bob"} {
		accounts += "\n---\n{apiVersion: v1, kind: ServiceAccount, metadata: {name: " + a + ", namespace: " + sc.namespace + "}}"
	}
	if err := sc.start(ctx, accounts+sc.server("web", 1, "", "")+sc.caller("alice", "", "serviceAccountName: alice")+sc.caller("bob", "", "serviceAccountName: bob"), "web"); err != nil {
		return err
	}
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	for _, p := range []string{"alice", "bob"} {
		if err := sc.ready(ctx, p); err != nil {
			return err
		}
		if err := all200(sc.get(ctx, p, "http://web/private")); err != nil {
			return fmt.Errorf("%s without a policy: %w", p, err)
		}
	}
	policy := func(mode, action, rules string) string {
		return fmt.Sprintf(`
apiVersion: outrigger.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: web, namespace: %s}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  mode: %s
  action: %s
  rules: %s
`, sc.namespace, mode, action, rules)
	}
	is := func(who, path string, status int) error {
		return cluster.WaitFor(ctx, 20*time.Second, fmt.Sprintf("%s to get %d for %s", who, status, path), func(ctx context.Context) error {
			answers, err := sc.try(ctx, who, "http://web"+path)
			if err != nil {
				return err
			}
			if a := answers[0]; a.Status != status {
				return fmt.Errorf("it is %d %s", a.Status, a.Error)
			}
			return nil
		})
	}
	steps := []struct {
		policy      string
		who, path   string
		status      int
		other, also string
		otherStatus int
	}{
		// What would be denied is served.
		{policy("Observe", "Allow", "[{name: alice, from: [{serviceAccounts: [alice]}]}]"), "alice", "/private", 200, "bob", "/observed", 200},
		{policy("Enforce", "Allow", "[{name: alice, from: [{serviceAccounts: [alice]}]}]"), "bob", "/private", 403, "alice", "/private", 200},
		{policy("Enforce", "Deny", `[{name: admin, to: [{paths: ["/admin*"]}]}]`), "alice", "/admin/x", 403, "bob", "/private", 200},
	}
	for _, s := range steps {
		if err := sc.Apply(ctx, s.policy); err != nil {
			return err
		}
		if err := is(s.who, s.path, s.status); err != nil {
			return err
		}
		if err := is(s.other, s.also, s.otherStatus); err != nil {
			return err
		}
	}
	if err := sc.Delete(ctx, policy("Enforce", "Deny", "[]")); err != nil {
		return err
	}
	if err := is("alice", "/admin/x", http.StatusOK); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, 20*time.Second, "the access log to name the policy", func(ctx context.Context) error {
		records, err := sc.records(ctx, webs[0].Name, "outrigger.access")
		if err != nil {
			return err
		}
		var denied, observed bool
		for _, r := range records {
			named := strings.Contains(fmt.Sprint(r["outrigger.authorization.policy"], r["outrigger.authorization.observed"]), sc.namespace+"/web")
			denied = denied || r["http.response.status_code"] == 403.0 && named
			observed = observed || r["url.path"] == "/observed" && r["http.response.status_code"] == 200.0 && fmt.Sprint(r["outrigger.authorization.observed"]) != "<nil>"
		}
		if !denied || !observed {
			return fmt.Errorf("denied with the policy's name: %v; observed: %v", denied, observed)
		}
		return nil
	})
}

// envoy: a pod asks for a real Envoy as its proxy; calls to it and from it are mutual
// TLS with pods that have ours.
func envoy(ctx context.Context, sc *scene) error {
	with := `annotations: {outrigger.dev/proxy: envoy}`
	if err := sc.start(ctx, sc.server("web", 1, with, "")+sc.server("ours", 1, "", ""), "web", "ours"); err != nil {
		return err
	}
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	ours, err := sc.injected(ctx, "app=ours")
	if err != nil {
		return err
	}
	if err := cluster.WaitFor(ctx, 20*time.Second, "answers by Envoy", func(ctx context.Context) error {
		return all200(sc.try(ctx, ours[0].Name, "http://web/first"))
	}); err != nil {
		return err
	}
	if err := all200(sc.get(ctx, ours[0].Name, "--count=50", "http://web/to-envoy")); err != nil {
		return fmt.Errorf("to Envoy: %w", err)
	}
	if err := all200(sc.get(ctx, webs[0].Name, "--count=50", "http://ours/from-envoy")); err != nil {
		return fmt.Errorf("from Envoy: %w", err)
	}
	return cluster.WaitFor(ctx, 20*time.Second, "our access log to have the calls by mutual TLS", func(ctx context.Context) error {
		records, err := sc.records(ctx, ours[0].Name, "outrigger.access")
		if err != nil {
			return err
		}
		n := map[string]int{}
		for _, r := range records {
			if r["outrigger.security"] == "mutual_tls" {
				n[fmt.Sprint(r["url.path"])]++
			}
		}
		if n["/from-envoy"] != 50 || n["/to-envoy"] != 50 {
			return fmt.Errorf("by mutual TLS: %v", n)
		}
		return nil
	})
}
