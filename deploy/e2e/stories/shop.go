package stories

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// shop: the demo's shop in the cluster. Its breaker is set in Observe mode first: it
// tells that it would have opened, and nothing is rejected. Enforced, it opens, the
// storefront serves on with its fallback, and the record says why.
func shop(ctx context.Context, sc *scene) error {
	services, err := os.ReadFile(filepath.Join(sc.root, "deploy", "demo", "mesh", "services.yaml"))
	if err != nil {
		return fmt.Errorf("the shop: %w", err)
	}
	policies, err := os.ReadFile(filepath.Join(sc.root, "deploy", "demo", "mesh", "policies.yaml"))
	if err != nil {
		return fmt.Errorf("the shop: %w", err)
	}
	objects := string(services)
	roles := []string{"catalog", "cart", "payments", "storefront"}
	for _, role := range roles {
		args := "--role=" + role + ", --listen=:8080"
		if role == "storefront" {
			args += ", --catalog=catalog, --cart=cart, --payments=payments"
		}
		objects += fmt.Sprintf(`
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: %[1]s, namespace: %[2]s}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec:
      serviceAccountName: %[1]s
      containers:
      - {name: shop, image: "outrigger-e2e/shop:here", imagePullPolicy: Never, args: [%[3]s], ports: [{name: http, containerPort: 8080}]}
`, role, sc.namespace, args)
	}
	observe := strings.Replace(string(policies), "mode: Enforce", "mode: Observe", 1)
	if observe == string(policies) {
		return errors.New("the demo's policies have no mode: Enforce any more")
	}
	if err := sc.start(ctx, objects, roles...); err != nil {
		return err
	}
	if err := sc.Apply(ctx, observe); err != nil {
		return err
	}
	if err := sc.start(ctx, sc.load("http://storefront/checkout", "")+sc.caller("user", "", ""), "load"); err != nil {
		return err
	}
	if err := sc.ready(ctx, "user"); err != nil {
		return err
	}
	fronts, err := sc.injected(ctx, "app=storefront")
	if err != nil {
		return err
	}
	front := fronts[0].Name
	failing := func(ctx context.Context, verb string) error {
		// At payments itself: through the Service it would be the breaker's business.
		pays, err := sc.injected(ctx, "app=payments")
		if err != nil {
			return err
		}
		return all200(sc.try(ctx, "user", "--method=POST", "http://"+pays[0].Status.PodIP+":8080/demo/"+verb))
	}
	// opened is the first record of the breaker, in a mode, since a time.
	opened := func(ctx context.Context, mode string, since time.Time) (map[string]any, error) {
		var found map[string]any
		err := cluster.WaitFor(ctx, 30*time.Second, "the breaker to open in mode "+mode, func(ctx context.Context) error {
			records, err := sc.records(ctx, front, "outrigger.breaker")
			if err != nil {
				return err
			}
			for _, r := range records {
				at, _ := time.Parse(time.RFC3339, fmt.Sprint(r["@timestamp"]))
				if r["outrigger.breaker.state"] == "open" && r["outrigger.breaker.mode"] == mode && at.After(since) {
					found = r
					return nil
				}
			}
			return fmt.Errorf("%d records, none of them that", len(records))
		})
		return found, err
	}
	if err := sc.during(ctx, "all is well", func(ctx context.Context) error { return pause(ctx, 5*time.Second) }); err != nil {
		return err
	}

	if err := sc.during(ctx, "payments fails, the breaker observes", func(ctx context.Context) error {
		began := time.Now()
		if err := failing(ctx, "fail"); err != nil {
			return err
		}
		r, err := opened(ctx, "Observe", began)
		if err != nil {
			return err
		}
		sc.report("shop: %s", r["message"])
		// It would be open; every call still reaches payments.
		return sc.rejections(ctx, front, false)
	}); err != nil {
		return err
	}

	if err := sc.during(ctx, "payments fails, the breaker enforces", func(ctx context.Context) error {
		began := time.Now()
		if err := sc.Apply(ctx, string(policies)); err != nil {
			return err
		}
		r, err := opened(ctx, "Enforce", began)
		if err != nil {
			return err
		}
		sc.report("shop: %s", r["message"])
		requests, _ := r["outrigger.evidence.requests"].([]any)
		if len(requests) == 0 || !strings.Contains(fmt.Sprint(r["outrigger.breaker.reason"]), "failure ratio") {
			return fmt.Errorf("the record does not say why: %v", r)
		}
		if err := sc.rejections(ctx, front, true); err != nil {
			return err
		}
		return sc.why(ctx, fronts[0].Spec.NodeName, fmt.Sprint(r["outrigger.evidence.id"]))
	}); err != nil {
		return err
	}

	return sc.during(ctx, "payments is well again", func(ctx context.Context) error {
		if err := failing(ctx, "heal"); err != nil {
			return err
		}
		return cluster.WaitFor(ctx, 40*time.Second, "charges to be made at once again", func(ctx context.Context) error {
			answers, err := sc.try(ctx, "user", "--count=20", "http://storefront/checkout")
			if err := all200(answers, err); err != nil {
				return err
			}
			for _, a := range answers {
				if paid := a.Header["X-Paid"]; len(paid) != 1 || paid[0] != "now" {
					return fmt.Errorf("paid: %v", paid)
				}
			}
			return nil
		})
	})
}

// rejections waits some seconds for calls that the storefront's proxy rejects because
// the breaker is open, and fails when there are some and should not, or the reverse.
func (sc *scene) rejections(ctx context.Context, front string, wanted bool) error {
	began := time.Now()
	if err := pause(ctx, 3*time.Second); err != nil {
		return err
	}
	records, err := sc.records(ctx, front, "outrigger.access")
	if err != nil {
		return err
	}
	n := 0
	for _, r := range records {
		at, _ := time.Parse(time.RFC3339, fmt.Sprint(r["@timestamp"]))
		if at.After(began) && strings.Contains(fmt.Sprint(r["outrigger.response_flags"]), "UO") {
			n++
		}
	}
	if wanted != (n > 0) {
		return fmt.Errorf("%d calls were rejected by the breaker in 3 s", n)
	}
	return nil
}

// why asks the first command that a person would type at 3 a.m.
func (sc *scene) why(ctx context.Context, node, id string) error {
	return sc.collector(ctx, node, func(ctx context.Context, address string) error {
		return cluster.WaitFor(ctx, 30*time.Second, "outrigger why "+id, func(ctx context.Context) error {
			out, err := sc.outrigger(ctx, "--collector", address, "why", id)
			if err != nil {
				return err
			}
			if !strings.Contains(string(out), "POST /pay") {
				return fmt.Errorf("it does not show the requests: %s", out)
			}
			return nil
		})
	})
}

// collector forwards a port to the collector of a node while ask runs.
func (sc *scene) collector(ctx context.Context, node string, ask func(ctx context.Context, address string) error) error {
	pods, err := sc.Pods(ctx, system, "app.kubernetes.io/name=outrigger-collector")
	if err != nil {
		return err
	}
	for _, p := range pods {
		if p.Spec.NodeName == node {
			address, stop, err := sc.Forward(ctx, system, p.Name, 15030)
			if err != nil {
				return err
			}
			defer stop()
			return ask(ctx, address)
		}
	}
	return errors.New("there is no collector on " + node)
}
