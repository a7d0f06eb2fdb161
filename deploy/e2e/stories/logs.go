package stories

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// What the collectors make of logs and Events, as their search has it.

// record is what a search finds, under the names of the Elastic Common Schema.
type record map[string]any

func (r record) text(field string) string {
	s, _ := r[field].(string)
	return s
}

// number of the line that app lines printed, 0 if it is another's.
func (r record) number() int {
	text, ok := strings.CutPrefix(r.text("message"), "line ")
	n, err := strconv.Atoi(text)
	if !ok || err != nil {
		return 0
	}
	return n
}

// lacks says which of the fields the record has not, or with another value.
func (r record) lacks(fields map[string]string) error {
	var errs []error
	for name, want := range fields {
		if got := r.text(name); got != want {
			errs = append(errs, fmt.Errorf("%s is %q, not %q", name, got, want))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%q of pod %s: %w", r.text("message"), r.text("kubernetes.pod.name"), errors.Join(errs...))
	}
	return nil
}

// atCollectors asks the collector of each node.
func (sc *scene) atCollectors(ctx context.Context, ask func(ctx context.Context, node, address string) error) error {
	nodes, err := sc.Client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("the nodes: %w", err)
	}
	for _, n := range nodes.Items {
		if err := sc.collector(ctx, n.Name, func(ctx context.Context, address string) error { return ask(ctx, n.Name, address) }); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return nil
}

// found is what a search finds at the collectors of all nodes, the oldest first on each.
func (sc *scene) found(ctx context.Context, query string) ([]record, error) {
	var out []record
	return out, sc.atCollectors(ctx, func(ctx context.Context, _, address string) error {
		text, err := sc.outrigger(ctx, "--collector", address, "logs", "search", query, "--limit", "10000", "--output", "json")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			var r record
			if err := json.Unmarshal([]byte(line), &r); err != nil {
				return fmt.Errorf("what the search found: %w: %s", err, line)
			}
			out = append(out, r)
		}
		return nil
	})
}

// lines is the query of what the pods of the scene wrote: Events of them are found as well.
func (sc *scene) lines() string {
	return "kubernetes.namespace:" + sc.namespace + " AND NOT event.dataset:kubernetes.event"
}

// printer is a pod that prints lines on node-2; meta is added to its metadata as flow YAML.
func (sc *scene) printer(name, meta, args string) string {
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s%s}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 2
  containers:
  - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [lines, %s]}
`, name, sc.namespace, meta, args)
}

// once checks that the lines of app lines are all there, from the first to the last that
// is, each once.
func once(records []record) error {
	seen := map[int]int{}
	last := 0
	for _, r := range records {
		n := r.number()
		seen[n]++
		last = max(last, n)
	}
	var wrong []string
	for n := range last {
		if seen[n+1] != 1 {
			wrong = append(wrong, fmt.Sprintf("line %d is there %d times", n+1, seen[n+1]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("of %d lines: %s", last, strings.Join(wrong[:min(len(wrong), 10)], ", "))
	}
	return nil
}

// metadata: each line of a pod is found once, with all that Kubernetes knows of the pod
// when it is read; those of pods that lived for a moment as well.
func metadata(ctx context.Context, sc *scene) error {
	if err := sc.start(ctx, fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: numbers, namespace: %s}
spec:
  selector: {matchLabels: {app: numbers}}
  template:
    metadata: {labels: {app: numbers, team: blue, app.kubernetes.io/part-of: shop}}
    spec:
      terminationGracePeriodSeconds: 2
      containers:
      - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [lines]}
`, sc.namespace), "numbers"); err != nil {
		return err
	}
	pods, err := sc.Pods(ctx, sc.namespace, "app=numbers")
	if err != nil || len(pods) != 1 {
		return fmt.Errorf("%d pods of numbers, not 1: %w", len(pods), err)
	}
	if err := sc.described(ctx, &pods[0]); err != nil {
		return err
	}
	return sc.brief(ctx)
}

// described: the label team of a pod that prints is changed from blue to green.
func (sc *scene) described(ctx context.Context, p *corev1.Pod) error {
	query := "kubernetes.pod.name:" + p.Name + " AND " + sc.lines()
	fields := map[string]string{
		"kubernetes.namespace": sc.namespace, "kubernetes.pod.uid": string(p.UID),
		"kubernetes.deployment.name": "numbers", "service.name": "numbers", "host.name": p.Spec.NodeName, "stream": "stdout",
		"container.name": "app", "container.image.name": "outrigger-e2e/app:here",
		"kubernetes.labels.app": "numbers", "kubernetes.labels.app_kubernetes_io_part-of": "shop",
	}
	// The kubelet tells these some time after the first lines.
	later := map[string]string{"kubernetes.pod.ip": p.Status.PodIP}
	_, later["container.id"], _ = strings.Cut(p.Status.ContainerStatuses[0].ContainerID, "://")
	const team = "kubernetes.labels.team"
	var records []record
	until := func(what string, enough func(colours map[string]int) bool) error {
		return cluster.WaitFor(ctx, time.Minute, what, func(ctx context.Context) error {
			var err error
			if records, err = sc.found(ctx, query); err != nil {
				return err
			}
			colours := map[string]int{}
			for _, r := range records {
				colours[r.text(team)]++
			}
			if !enough(colours) {
				return fmt.Errorf("found lines of team %v", colours)
			}
			return nil
		})
	}
	if err := until("lines with the labels of their pod", func(c map[string]int) bool { return c["blue"] > 0 }); err != nil {
		return err
	}
	_, err := sc.Client.CoreV1().Pods(sc.namespace).Patch(ctx, p.Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"team":"green"}}}`), metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("label pod %s: %w", p.Name, err)
	}
	if err := until("lines with the new label", func(c map[string]int) bool { return c["green"] >= 20 }); err != nil {
		return err
	}
	sc.requests += len(records)
	if err := once(records); err != nil {
		return err
	}
	slices.SortFunc(records, func(a, b record) int { return a.number() - b.number() })
	last := "blue"
	started := 0
	for _, r := range records {
		if err := r.lacks(fields); err != nil {
			return err
		}
		err := r.lacks(later)
		switch {
		case err == nil && started == 0:
			started = r.number()
		case err != nil && (started > 0 || last == "green"):
			return err
		}
		if last == "green" || r.text(team) == "green" {
			last = "green"
		}
		if r.text(team) != last {
			return fmt.Errorf("%q is of team %q after one of team %s", r.text("message"), r.text(team), last)
		}
	}
	sc.report("metadata: %d lines; the container's id and the pod's address are there from line %d on", len(records), started)
	return nil
}

// brief: the pods of a Job print a line and end, and are deleted at once.
func (sc *scene) brief(ctx context.Context) error {
	const pods = 5
	if err := sc.Apply(ctx, fmt.Sprintf(`
apiVersion: batch/v1
kind: Job
metadata: {name: brief, namespace: %s}
spec:
  completions: %[2]d
  parallelism: %[2]d
  ttlSecondsAfterFinished: 0
  template:
    metadata: {labels: {team: brief}}
    spec:
      restartPolicy: Never
      containers:
      - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [lines, --count=1]}
`, sc.namespace, pods)); err != nil {
		return err
	}
	if err := cluster.WaitFor(ctx, 2*time.Minute, "the Job and its pods to be gone", func(ctx context.Context) error {
		_, err := sc.Client.BatchV1().Jobs(sc.namespace).Get(ctx, "brief", metav1.GetOptions{})
		if err == nil {
			return errors.New("the Job is there")
		}
		if !apierrors.IsNotFound(err) {
			return err
		}
		list, err := sc.Client.CoreV1().Pods(sc.namespace).List(ctx, metav1.ListOptions{LabelSelector: "team=brief"})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods are there", len(list.Items))
		}
		return err
	}); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, time.Minute, "the lines of pods that are gone", func(ctx context.Context) error {
		records, err := sc.found(ctx, "kubernetes.job.name:brief AND "+sc.lines())
		if err != nil {
			return err
		}
		names := map[string]bool{}
		for _, r := range records {
			names[r.text("kubernetes.pod.name")] = true
			if err := r.lacks(map[string]string{"message": "line 1", "kubernetes.labels.team": "brief", "container.image.name": "outrigger-e2e/app:here"}); err != nil {
				return err
			}
		}
		if len(records) != pods || len(names) != pods {
			return fmt.Errorf("%d lines of %d pods, not one of each of %d", len(records), len(names), pods)
		}
		sc.requests += pods
		return nil
	})
}

// kubelet: a pod that starts while the API server is away has its labels all the same: its
// kubelet tells them, and the same ones as the API server says later.
func kubelet(ctx context.Context, sc *scene) error {
	const node, pod = "node-2", "static-node-2"
	// The kubelet asks the API server whose a token is, and remembers it for two minutes. A
	// collector asks its kubelet when it starts, so that it is remembered now; later the
	// kubelet would refuse it until the API server is back.
	if err := sc.kill(ctx, "app.kubernetes.io/name=outrigger-collector"); err != nil {
		return err
	}
	if err := collectorsReady(ctx, sc.Cluster); err != nil {
		return err
	}
	if err := pause(ctx, 5*time.Second); err != nil { // the first question is answered
		return err
	}
	away := time.Now()
	err := sc.WithoutAPI(ctx, func(ctx context.Context) error {
		if err := sc.StaticPod(node, "static", fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: static, namespace: %s, labels: {app: static, team: node}}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [lines, --every=100ms]}
`, sc.namespace)); err != nil {
			return err
		}
		if err := cluster.WaitFor(ctx, time.Minute, "the static pod to print", func(context.Context) error {
			text, err := sc.NodeLog(node, sc.namespace, pod)
			if err == nil && !strings.Contains(text, "line 10\n") {
				err = errors.New("it has not")
			}
			return err
		}); err != nil {
			return err
		}
		return pause(ctx, 12*time.Second) // lines wait for what is known of their pod for 5 s at most
	})
	took := time.Since(away)
	defer func() { _ = sc.StaticPod(node, "static", "") }() // it would outlive its namespace
	if err != nil {
		return err
	}
	if err := sc.ready(ctx, pod); err != nil {
		return err
	}
	mirror, err := sc.Client.CoreV1().Pods(sc.namespace).Get(ctx, pod, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("the mirror of the static pod: %w", err)
	}
	since, now := mirror.CreationTimestamp, time.Now()
	var before, after int
	if err := cluster.WaitFor(ctx, time.Minute, "lines of the static pod from before and after the API server knew of it", func(ctx context.Context) error {
		records, err := sc.found(ctx, "kubernetes.pod.name:"+pod+" AND "+sc.lines())
		if err != nil {
			return err
		}
		if err := once(records); err != nil {
			return err
		}
		before, after = 0, 0
		for _, r := range records {
			if err := r.lacks(map[string]string{
				"kubernetes.labels.app": "static", "kubernetes.labels.team": "node", "container.image.name": "outrigger-e2e/app:here", "service.name": "static", "host.name": node,
			}); err != nil {
				return err
			}
			at, err := time.Parse(time.RFC3339Nano, r.text("@timestamp"))
			switch {
			case err != nil:
				return err
			case at.Before(since.Time):
				before++
			case at.After(now):
				after++
			}
		}
		if before < 50 || after < 20 {
			return fmt.Errorf("%d before and %d after", before, after)
		}
		sc.requests = len(records)
		return nil
	}); err != nil {
		return err
	}
	sc.report("kubelet: the API server was away for %.0f s; %d lines were labelled by what the kubelet told, %d by the API server", took.Seconds(), before, after)
	return nil
}

// events: what kubelet and others say of a pod is found once, also when the collector
// that reads the Events is another in the end.
func events(ctx context.Context, sc *scene) error {
	if err := sc.Apply(ctx, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: nowhere, namespace: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: absent, image: "outrigger-e2e/absent:here", imagePullPolicy: Never}
---
apiVersion: v1
kind: Pod
metadata: {name: unwell, namespace: %[1]s}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: outrigger-e2e/app:here
    imagePullPolicy: Never
    args: [serve]
    readinessProbe: {httpGet: {path: /status/500, port: 8080}, periodSeconds: 1}
`, sc.namespace)); err != nil {
		return err
	}
	for _, e := range []struct{ pod, container, reason, level string }{
		{"nowhere", "", "Scheduled", "info"}, {"nowhere", "absent", "ErrImageNeverPull", "warn"}, {"unwell", "app", "Started", "info"}, {"unwell", "app", "Unhealthy", "warn"},
	} {
		if err := sc.told(ctx, e.pod, e.reason, map[string]string{
			"kubernetes.pod.name": e.pod, "kubernetes.namespace": sc.namespace, "log.level": e.level, "kubernetes.container.name": e.container,
			"kubernetes.event.involved_object.kind": "Pod", "kubernetes.event.involved_object.name": e.pod, "kubernetes.event.involved_object.namespace": sc.namespace,
		}); err != nil {
			return err
		}
	}
	if err := sc.somebodySays(ctx, "first"); err != nil {
		return err
	}
	// The one that reads ends in order, and comes back: nothing is read twice or left out.
	lease, err := sc.Client.CoordinationV1().Leases(system).Get(ctx, "outrigger-collector-events", metav1.GetOptions{})
	if err != nil || lease.Spec.HolderIdentity == nil {
		return fmt.Errorf("who reads the Events: %v, %w", lease, err)
	}
	if err := sc.Client.CoreV1().Pods(system).Delete(ctx, *lease.Spec.HolderIdentity, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("end the collector that reads the Events: %w", err)
	}
	if err := cluster.WaitFor(ctx, time.Minute, "another collector to read the Events", func(ctx context.Context) error {
		l, err := sc.Client.CoordinationV1().Leases(system).Get(ctx, "outrigger-collector-events", metav1.GetOptions{})
		if err == nil && (l.Spec.HolderIdentity == nil || *l.Spec.HolderIdentity == "" || *l.Spec.HolderIdentity == *lease.Spec.HolderIdentity) {
			err = errors.New("nobody new does")
		}
		return err
	}); err != nil {
		return err
	}
	if err := collectorsReady(ctx, sc.Cluster); err != nil {
		return err
	}
	if err := sc.somebodySays(ctx, "second"); err != nil {
		return err
	}
	return sc.told(ctx, "told", "First", nil)
}

// somebodySays writes an Event, and waits until it is found.
func (sc *scene) somebodySays(ctx context.Context, word string) error {
	reason := strings.ToUpper(word[:1]) + word[1:]
	if err := sc.Apply(ctx, fmt.Sprintf(`
apiVersion: events.k8s.io/v1
kind: Event
metadata: {name: %s, namespace: %s}
type: Normal
reason: %s
action: Saying
note: it was said %[1]s
eventTime: %[4]q
reportingController: example.com/teller
reportingInstance: teller-1
regarding: {apiVersion: apps/v1, kind: Deployment, name: told, namespace: %[2]s}
`, word, sc.namespace, reason, time.Now().UTC().Format("2006-01-02T15:04:05.000000Z"))); err != nil {
		return err
	}
	return sc.told(ctx, "told", reason, map[string]string{
		"message": "it was said " + word, "kubernetes.namespace": sc.namespace, "service.name": "example.com/teller", "kubernetes.deployment.name": "told", "kubernetes.event.action": "Saying",
		"kubernetes.event.involved_object.kind": "Deployment", "kubernetes.event.involved_object.name": "told", "event.dataset": "kubernetes.event",
	})
}

// told waits until an Event of an object is found with its fields: once, or once for each
// time that it was counted up.
func (sc *scene) told(ctx context.Context, object, reason string, fields map[string]string) error {
	query := "event.dataset:kubernetes.event AND kubernetes.namespace:" + sc.namespace + " AND kubernetes.event.involved_object.name:" + object + " AND event.action:" + reason
	return cluster.WaitFor(ctx, 90*time.Second, "the Event "+reason, func(ctx context.Context) error {
		records, err := sc.found(ctx, query)
		if err != nil {
			return err
		}
		if len(records) == 0 {
			return errors.New("it is not found")
		}
		seen := map[string]bool{}
		for _, r := range records {
			if err := r.lacks(fields); err != nil {
				return err
			}
			id := fmt.Sprint(r.text("kubernetes.event.name"), " for the time ", r["kubernetes.event.count"])
			if seen[id] {
				return fmt.Errorf("%s is found twice", id)
			}
			seen[id] = true
		}
		sc.requests += len(records)
		return nil
	})
}

// accounts: what a rule and an annotation leave out is in the account of the logs and has
// its reason, and nothing else is missing.
func accounts(ctx context.Context, sc *scene) error {
	const lines, kept = 200, 180 // the installation has a rule that drops every tenth of this namespace
	if err := sc.Apply(ctx, sc.printer("counted", "", "--count=200, --every=10ms, --stay")+
		sc.printer("silent", ", annotations: {outrigger.dev/logs: \"off\"}", "--count=200, --every=10ms, --stay")); err != nil {
		return err
	}
	for _, pod := range []string{"counted", "silent"} {
		if err := sc.ready(ctx, pod); err != nil {
			return err
		}
	}
	if err := cluster.WaitFor(ctx, time.Minute, "the lines that are kept", func(ctx context.Context) error {
		records, err := sc.found(ctx, sc.lines())
		if err != nil {
			return err
		}
		seen := map[int]bool{}
		for _, r := range records {
			n := r.number()
			if r.text("kubernetes.pod.name") != "counted" || n == 0 || n%10 == 0 || seen[n] {
				return fmt.Errorf("%q of pod %s should not be there, or not twice", r.text("message"), r.text("kubernetes.pod.name"))
			}
			seen[n] = true
		}
		if len(seen) != kept {
			return fmt.Errorf("%d lines of %d", len(seen), kept)
		}
		return nil
	}); err != nil {
		return err
	}
	sc.requests += 2 * lines
	return sc.collector(ctx, "node-2", func(ctx context.Context, address string) error {
		ask := func(ctx context.Context, args ...string) (string, error) {
			out, err := sc.outrigger(ctx, append([]string{"--collector", address, "logs"}, args...)...)
			return string(out), err
		}
		if err := cluster.WaitFor(ctx, 30*time.Second, "the account of the namespace to close", func(ctx context.Context) error {
			text, err := ask(ctx, "audit", "--by", "namespace")
			if err != nil {
				return fmt.Errorf("%w: %s", err, text)
			}
			return closed(text, sc.namespace)
		}); err != nil {
			return err
		}
		for pod, want := range map[string]string{"counted": "cause rule: every-tenth", "silent": "annotation outrigger.dev/logs: off"} {
			text, err := ask(ctx, "why", pod, "--namespace", sc.namespace)
			if err != nil {
				return err
			}
			if !strings.Contains(text, want) {
				return fmt.Errorf("why %s does not name %q: %s", pod, want, text)
			}
			sc.report("accounts: %s", strings.TrimSpace(text))
		}
		return nil
	})
}

// closed reads the row of a namespace in the account: what was written is acknowledged or
// dropped, by a rule, and nothing is pending.
func closed(account, namespace string) error {
	for line := range strings.Lines(account) {
		f := strings.Fields(line)
		if len(f) < 5 || f[0] != namespace {
			continue
		}
		var n [4]int
		for i := range n {
			var err error
			if n[i], err = strconv.Atoi(f[i+1]); err != nil {
				return fmt.Errorf("%q: %w", line, err)
			}
		}
		written, acknowledged, dropped, pending := n[0], n[1], n[2], n[3]
		causes := strings.Join(f[5:], " ")
		if written != acknowledged+dropped || pending != 0 || acknowledged == 0 || dropped == 0 || !strings.HasPrefix(causes, "rule ") || strings.Contains(causes, ", ") {
			return errors.New(strings.TrimSpace(line))
		}
		return nil
	}
	return fmt.Errorf("namespace %s is not in it: %s", namespace, account)
}
