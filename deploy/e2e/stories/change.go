package stories

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// What changes under load, and nobody who calls must notice. The servers do what most
// programs do: at SIGTERM they stop, without waiting for the world to hear of it.

// world starts web with some pods and load that calls it, and waits for the first calls.
func (sc *scene) world(ctx context.Context, replicas int, web, load string) error {
	if err := sc.start(ctx, sc.server("web", replicas, "", web), "web"); err != nil {
		return err
	}
	return sc.start(ctx, sc.load("http://web/", load), "load")
}

// rollout: every pod of a Deployment is replaced, twice.
func rollout(ctx context.Context, sc *scene) error {
	if err := sc.world(ctx, 3, "", ""); err != nil {
		return err
	}
	for _, what := range []string{"the first rolling update", "the second rolling update"} {
		if err := sc.during(ctx, what, func(ctx context.Context) error {
			if err := sc.Restart(ctx, sc.namespace, "web"); err != nil {
				return err
			}
			return sc.Available(ctx, sc.namespace, "web")
		}); err != nil {
			return err
		}
	}
	return nil
}

// scale: up and down under load; to zero, where calls are refused and say why, and back.
func scale(ctx context.Context, sc *scene) error {
	if err := sc.world(ctx, 2, "", ""); err != nil {
		return err
	}
	to := func(n int) func(context.Context) error {
		return func(ctx context.Context) error {
			if err := sc.Scale(ctx, sc.namespace, "web", n); err != nil {
				return err
			}
			return sc.Available(ctx, sc.namespace, "web")
		}
	}
	for _, n := range []int{5, 1, 3} {
		if err := sc.during(ctx, fmt.Sprintf("scaled to %d", n), to(n)); err != nil {
			return err
		}
	}
	if err := to(0)(ctx); err != nil {
		return err
	}
	loads, err := sc.Pods(ctx, sc.namespace, "app=load")
	if err != nil || len(loads) != 1 {
		return fmt.Errorf("%d pods of load: %w", len(loads), err)
	}
	// Nobody is there: the proxy says so, at once.
	if err := cluster.WaitFor(ctx, time.Minute, "calls to nobody to be refused with 503", func(ctx context.Context) error {
		answers, err := sc.try(ctx, loads[0].Name, "http://web/")
		if err != nil {
			return err
		}
		if a := answers[0]; a.Status != 503 || a.Seconds > 3 {
			return fmt.Errorf("%d %s after %.1f s", a.Status, a.Error, a.Seconds)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := to(2)(ctx); err != nil {
		return err
	}
	began := time.Now()
	if err := cluster.WaitFor(ctx, 20*time.Second, "answers again", func(ctx context.Context) error {
		return all200(sc.try(ctx, loads[0].Name, "--fresh", "--count=10", "http://web/"))
	}); err != nil {
		return err
	}
	sc.report("scale: served again %.1f s after the pods were available", time.Since(began).Seconds())
	return sc.during(ctx, "back from zero", func(ctx context.Context) error { return pause(ctx, 2*time.Second) })
}

// drain: a node is emptied, the product's own pods among the others, as kubectl drain does.
func drain(ctx context.Context, sc *scene) error {
	spread := "topologySpreadConstraints: [{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: web}}}]"
	// Whatever else is drained, the load stays.
	if err := sc.world(ctx, 4, spread, "nodeName: node-1"); err != nil {
		return err
	}
	budget := "\n---\n{apiVersion: policy/v1, kind: PodDisruptionBudget, metadata: {name: web, namespace: " + sc.namespace + "}, spec: {minAvailable: 2, selector: {matchLabels: {app: web}}}}"
	if err := sc.Apply(ctx, budget); err != nil {
		return err
	}
	const node = "node-2"
	defer func() { _ = sc.cordon(context.WithoutCancel(ctx), node, false) }() // other stories need it
	err := sc.during(ctx, node+" is drained", func(ctx context.Context) error {
		if err := sc.cordon(ctx, node, true); err != nil {
			return err
		}
		return sc.evictAll(ctx, node)
	})
	if err != nil {
		return err
	}
	return sc.during(ctx, node+" is back", func(ctx context.Context) error {
		if err := sc.cordon(ctx, node, false); err != nil {
			return err
		}
		if err := sc.Restart(ctx, sc.namespace, "web"); err != nil {
			return err
		}
		return sc.Available(ctx, sc.namespace, "web")
	})
}

func (sc *scene) cordon(ctx context.Context, node string, yes bool) error {
	_, err := sc.Client.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, fmt.Appendf(nil, `{"spec":{"unschedulable":%v}}`, yes), metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("cordon %s: %w", node, err)
	}
	return nil
}

// evictAll evicts the pods of a node until none is left but those of DaemonSets.
func (sc *scene) evictAll(ctx context.Context, node string) error {
	return cluster.WaitFor(ctx, 4*time.Minute, node+" to be empty", func(ctx context.Context) error {
		list, err := sc.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err != nil {
			return err
		}
		var left []string
		for _, p := range list.Items {
			if ownedBy(&p, "DaemonSet") || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
				continue
			}
			left = append(left, p.Namespace+"/"+p.Name)
			if p.DeletionTimestamp != nil {
				continue
			}
			err := sc.Client.PolicyV1().Evictions(p.Namespace).Evict(ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace}})
			if err != nil && !apierrors.IsTooManyRequests(err) && !apierrors.IsNotFound(err) {
				return err
			}
		}
		if len(left) > 0 {
			return errors.New("there are still " + strings.Join(left, ", "))
		}
		return nil
	})
}

func ownedBy(p *corev1.Pod, kind string) bool {
	for _, o := range p.OwnerReferences {
		if o.Kind == kind {
			return true
		}
	}
	return false
}

// controlPlane: all of it is killed at once, and stays away for a while. Calls go on;
// new pods of the callee are taken in as soon as it is back.
func controlPlane(ctx context.Context, sc *scene) error {
	if err := sc.world(ctx, 2, "", ""); err != nil {
		return err
	}
	if err := sc.during(ctx, "the control plane is killed", func(ctx context.Context) error {
		if err := sc.kill(ctx, "app.kubernetes.io/name=outrigger-control-plane"); err != nil {
			return err
		}
		return sc.Available(ctx, system, "outrigger-control-plane")
	}); err != nil {
		return err
	}
	if err := sc.during(ctx, "the control plane is away for 15 s", func(ctx context.Context) error {
		if err := sc.Scale(ctx, system, "outrigger-control-plane", 0); err != nil {
			return err
		}
		away := pause(ctx, 15*time.Second)
		// Whatever became of the wait, the other stories need it.
		ctx = context.WithoutCancel(ctx)
		return errors.Join(away, sc.Scale(ctx, system, "outrigger-control-plane", 2), sc.Available(ctx, system, "outrigger-control-plane"))
	}); err != nil {
		return err
	}
	if err := sc.during(ctx, "a rolling update afterwards", func(ctx context.Context) error {
		if err := sc.Restart(ctx, sc.namespace, "web"); err != nil {
			return err
		}
		return sc.Available(ctx, sc.namespace, "web")
	}); err != nil {
		return err
	}
	return sc.during(ctx, "a rolling update of the control plane", func(ctx context.Context) error {
		if err := sc.Restart(ctx, system, "outrigger-control-plane"); err != nil {
			return err
		}
		return sc.Available(ctx, system, "outrigger-control-plane")
	})
}

// kill ends pods of the product without grace, and waits for their controller to see it.
func (sc *scene) kill(ctx context.Context, selector string) error {
	now := int64(0)
	err := sc.Client.CoreV1().Pods(system).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return fmt.Errorf("kill the pods of %s: %w", selector, err)
	}
	return pause(ctx, 2*time.Second)
}

// collectors: those of both nodes are killed. Calls go on, and what was logged
// meanwhile is found afterwards.
func collectors(ctx context.Context, sc *scene) error {
	if err := sc.world(ctx, 2, "", ""); err != nil {
		return err
	}
	if err := sc.during(ctx, "the collectors are killed", func(ctx context.Context) error {
		if err := sc.kill(ctx, "app.kubernetes.io/name=outrigger-collector"); err != nil {
			return err
		}
		return collectorsReady(ctx, sc.Cluster)
	}); err != nil {
		return err
	}
	// Every call that a proxy wrote down is found; the account of the files closes.
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	for _, w := range webs {
		if err := sc.collector(ctx, w.Spec.NodeName, func(ctx context.Context, address string) error {
			return cluster.WaitFor(ctx, 30*time.Second, "the account of the logs to close", func(ctx context.Context) error {
				out, err := sc.outrigger(ctx, "--collector", address, "logs", "audit")
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			})
		}); err != nil {
			return err
		}
	}
	return nil
}

// rotation: certificates that live for a minute are exchanged again and again.
func rotation(ctx context.Context, sc *scene) error {
	ttl := func(ctx context.Context, value string) error {
		d, err := sc.Client.AppsV1().Deployments(system).Get(ctx, "outrigger-control-plane", metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("the control plane: %w", err)
		}
		args := d.Spec.Template.Spec.Containers[0].Args
		for i, a := range args {
			if strings.HasPrefix(a, "--certificate-ttl=") {
				args[i] = "--certificate-ttl=" + value
			}
		}
		if _, err := sc.Client.AppsV1().Deployments(system).Update(ctx, d, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("the control plane: %w", err)
		}
		return sc.Available(ctx, system, "outrigger-control-plane")
	}
	if err := ttl(ctx, "1m"); err != nil {
		return err
	}
	defer func() { _ = ttl(context.WithoutCancel(ctx), "24h") }() // what comes after has other certificates
	if err := sc.label(ctx, "outrigger.dev/mtls", "strict"); err != nil {
		return err
	}
	if err := sc.world(ctx, 2, "", ""); err != nil {
		return err
	}
	webs, err := sc.injected(ctx, "app=web")
	if err != nil {
		return err
	}
	const metric = "outrigger_certificate_expiry_timestamp_seconds"
	exchanged, last := 0, 0.0
	err = sc.during(ctx, "certificates of one minute", func(ctx context.Context) error {
		return cluster.WaitFor(ctx, 5*time.Minute, "three exchanges of a certificate", func(ctx context.Context) error {
			expiry, found, err := sc.metric(ctx, &webs[0], metric, `kind="workload"`)
			if err == nil && !found {
				expiry, found, err = sc.metric(ctx, &webs[0], metric)
			}
			if err != nil {
				return err
			}
			if !found {
				return errors.New("the proxy has no " + metric)
			}
			if last != 0 && expiry != last {
				exchanged++
			}
			last = expiry
			if exchanged < 3 {
				if err := pause(ctx, time.Second); err != nil {
					return err
				}
				return fmt.Errorf("%d so far", exchanged)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	sc.report("rotation: %d exchanges", exchanged)
	return nil
}
