package stories

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// What the stories find in every scene: pods that call, and what the proxies of
// pods write and count.

// caller is a pod that sleeps until it is asked to call; meta is added to the
// metadata as flow YAML.
func (sc *scene) caller(name, meta, spec string) string {
	if meta != "" {
		meta = ", " + meta
	}
	if spec != "" {
		spec = "\n  " + spec
	}
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: %s%s}
spec:%s
  terminationGracePeriodSeconds: 2
  containers:
  - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [serve]}
`, name, sc.namespace, meta, spec)
}

// load is a Deployment of one pod, called load, that calls the target for ever.
func (sc *scene) load(target, spec string) string {
	if spec != "" {
		spec = "\n      " + spec
	}
	return fmt.Sprintf(`
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: load, namespace: %[1]s}
spec:
  replicas: 1
  selector: {matchLabels: {app: load}}
  template:
    metadata: {labels: {app: load}}
    spec:%[3]s
      terminationGracePeriodSeconds: 2
      containers:
      - name: app
        image: outrigger-e2e/app:here
        imagePullPolicy: Never
        args: [load, "--target=%[2]s"]
        readinessProbe: {exec: {command: [/app, stats]}, periodSeconds: 1}
`, sc.namespace, target, spec)
}

// loadStats is what app stats prints.
type loadStats struct {
	Requests, Failed int
	Codes            map[string]int
	SlowestMS        int64
	Errors           []string
}

func (sc *scene) stats(ctx context.Context) (loadStats, error) {
	var s loadStats
	pods, err := sc.Pods(ctx, sc.namespace, "app=load")
	if err != nil {
		return s, err
	}
	if len(pods) != 1 {
		return s, fmt.Errorf("%d pods of load, not 1", len(pods))
	}
	out, err := sc.Exec(ctx, sc.namespace, pods[0].Name, "app", "/app", "stats")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("what app stats printed: %w", err)
	}
	return s, nil
}

// during does something while the Deployment load calls, and a moment longer, and fails
// when one of its calls did. What was called before does not count.
func (sc *scene) during(ctx context.Context, what string, do func(context.Context) error) error {
	before, err := sc.stats(ctx)
	if err != nil {
		return err
	}
	doErr := do(ctx)
	if doErr == nil {
		doErr = pause(ctx, 3*time.Second)
	}
	after, err := sc.stats(context.WithoutCancel(ctx))
	if err != nil {
		return errors.Join(doErr, err)
	}
	requests, failed := after.Requests-before.Requests, after.Failed-before.Failed
	sc.requests += requests
	sc.failed += failed
	sc.report("%s: %s: %d requests, %d failed, slowest so far %d ms", sc.namespace, what, requests, failed, after.SlowestMS)
	switch {
	case doErr != nil:
		return fmt.Errorf("%s: %w", what, doErr)
	case failed > 0:
		return fmt.Errorf("%s: %d of %d requests failed: the last of them: %s", what, failed, requests, strings.Join(after.Errors, "\n    "))
	case requests == 0:
		return fmt.Errorf("%s: nothing was called meanwhile", what)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// ready waits until a pod is.
func (sc *scene) ready(ctx context.Context, name string) error {
	return cluster.WaitFor(ctx, 2*time.Minute, "pod "+name+" to be ready", func(ctx context.Context) error {
		p, err := sc.Client.CoreV1().Pods(sc.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return errors.New(string(p.Status.Phase))
	})
}

// start applies objects and waits for the Deployments named.
func (sc *scene) start(ctx context.Context, objects string, deployments ...string) error {
	if err := sc.Apply(ctx, objects); err != nil {
		return err
	}
	for _, d := range deployments {
		if err := sc.Available(ctx, sc.namespace, d); err != nil {
			return err
		}
	}
	return nil
}

// injected waits until the pods that a selector chooses, at least one, are ready
// and have our proxy.
func (sc *scene) injected(ctx context.Context, selector string) ([]corev1.Pod, error) {
	var pods []corev1.Pod
	err := cluster.WaitFor(ctx, time.Minute, "the pods of "+selector+" to have a proxy", func(ctx context.Context) error {
		var err error
		if pods, err = sc.Pods(ctx, sc.namespace, selector); err != nil {
			return err
		}
		if len(pods) == 0 {
			return errors.New("there are none")
		}
		for i := range pods {
			if err := proxied(&pods[i]); err != nil {
				return err
			}
		}
		return nil
	})
	return pods, err
}

// label sets a label of the story's namespace; an empty value removes it.
func (sc *scene) label(ctx context.Context, name, value string) error {
	v := "null"
	if value != "" {
		v = `"` + value + `"`
	}
	_, err := sc.Client.CoreV1().Namespaces().Patch(ctx, sc.namespace, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:%s}}}`, name, v), metav1.PatchOptions{})
	if err != nil {
		return fmt.Errorf("label namespace %s: %w", sc.namespace, err)
	}
	return nil
}

// records are the lines of JSON that a pod's proxy wrote, in a dataset such as
// outrigger.access.
func (sc *scene) records(ctx context.Context, pod, dataset string) ([]map[string]any, error) {
	text, err := sc.ContainerLog(ctx, sc.namespace, pod, proxy, 0)
	if err != nil {
		return nil, err
	}
	var out []map[string]any
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r map[string]any
		if json.Unmarshal(lines.Bytes(), &r) == nil && (dataset == "" || r["event.dataset"] == dataset) {
			out = append(out, r)
		}
	}
	return out, lines.Err()
}

// metric is the sum of the samples of a metric that a pod's proxy has, of those
// whose line contains every one of the texts.
func (sc *scene) metric(ctx context.Context, pod *corev1.Pod, name string, texts ...string) (sum float64, found bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+pod.Status.PodIP+":15020/metrics", nil)
	if err != nil {
		return 0, false, fmt.Errorf("metrics of %s: %w", pod.Name, err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, false, fmt.Errorf("metrics of %s: %w", pod.Name, err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, 1<<20)
next:
	for lines.Scan() {
		line := lines.Text()
		if rest, ok := strings.CutPrefix(line, name); !ok || (rest[0] != '{' && rest[0] != ' ') {
			continue
		}
		for _, t := range texts {
			if !strings.Contains(line, t) {
				continue next
			}
		}
		var v float64
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' ')+1:], &v); err != nil {
			return 0, false, fmt.Errorf("metrics of %s: %q: %w", pod.Name, line, err)
		}
		sum, found = sum+v, true
	}
	return sum, found, lines.Err()
}

// all200 fails unless every answer is 200.
func all200(answers []answer, err error) error {
	if err != nil {
		return err
	}
	for _, a := range answers {
		if a.Status != http.StatusOK {
			return fmt.Errorf("an answer is %d %s %s, not 200", a.Status, a.Error, strings.TrimSpace(a.Body))
		}
	}
	return nil
}
