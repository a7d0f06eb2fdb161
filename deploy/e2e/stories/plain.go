package stories

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// plain proves the cluster and not the product: two Deployments, one on each node,
// call each other by name, and a Job that calls too completes.
func plain(ctx context.Context, sc *scene) error {
	if err := sc.Apply(ctx, sc.server("left", 1, "", "nodeName: node-1")+sc.server("right", 2, "", "nodeName: node-2")); err != nil {
		return err
	}
	for _, d := range []string{"left", "right"} {
		if err := sc.Available(ctx, sc.namespace, d); err != nil {
			return err
		}
	}
	pods, err := sc.Pods(ctx, sc.namespace, "app=left")
	if err != nil || len(pods) != 1 {
		return fmt.Errorf("%d pods of left, not 1: %w", len(pods), err)
	}
	seen := map[string]bool{}
	// kube-proxy takes a second at most to know of a pod that has become ready.
	if err := cluster.WaitFor(ctx, 20*time.Second, "answers of 3 pods", func(ctx context.Context) error {
		for _, url := range []string{"http://right/", "http://right." + sc.namespace + ".svc.cluster.local/", "http://left/"} {
			answers, err := sc.try(ctx, pods[0].Name, "--fresh", "--count=10", url)
			if err := all200(answers, err); err != nil {
				return fmt.Errorf("%s: %w", url, err)
			}
			for _, a := range answers {
				seen[a.pod()] = true
			}
		}
		if len(seen) != 3 {
			return fmt.Errorf("only %v have answered", slices.Sorted(maps.Keys(seen)))
		}
		return nil
	}); err != nil {
		return err
	}
	if err := all200(sc.get(ctx, pods[0].Name, "--fresh", "--count=50", "http://right/")); err != nil {
		return err
	}
	if err := sc.Apply(ctx, sc.job("calls", "--url=http://right/", "")); err != nil {
		return err
	}
	return sc.jobEnds(ctx, "calls", batchv1.JobComplete)
}

// server is a Deployment of the app with its Service on port 80. Meta is added to the
// metadata of the pods and spec to their specification, as flow YAML.
func (sc *scene) server(name string, replicas int, meta, spec string) string {
	if spec != "" {
		spec = "\n      " + spec
	}
	if meta != "" {
		meta = ", " + meta
	}
	return fmt.Sprintf(`
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}%[4]s}
    spec:%[5]s
      containers:
      - name: app
        image: outrigger-e2e/app:here
        imagePullPolicy: Never
        args: [serve, --tcp=:9000]
        ports: [{name: http, containerPort: 8080}, {name: tcp, containerPort: 9000}]
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  selector: {app: %[1]s}
  ports: [{name: http, port: 80, targetPort: http}, {name: tcp, port: 9000, targetPort: tcp}]
`, name, sc.namespace, replicas, meta, spec)
}

// job is a Job of the app; args are flow YAML strings, spec is added to the Job's.
func (sc *scene) job(name, args, spec string) string {
	if spec != "" {
		spec = "\n  " + spec
	}
	return fmt.Sprintf(`
---
apiVersion: batch/v1
kind: Job
metadata: {name: %s, namespace: %s}
spec:%s
  template:
    spec:
      restartPolicy: Never
      containers:
      - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [job, %s]}
`, name, sc.namespace, spec, args)
}

// jobEnds waits until a Job has come to the end that is expected.
func (sc *scene) jobEnds(ctx context.Context, name string, how batchv1.JobConditionType) error {
	return cluster.WaitFor(ctx, 2*time.Minute, "Job "+name+" to be "+string(how), func(ctx context.Context) error {
		j, err := sc.Client.BatchV1().Jobs(sc.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range j.Status.Conditions {
			if c.Type == how && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("active %d, succeeded %d, failed %d, %v", j.Status.Active, j.Status.Succeeded, j.Status.Failed, j.Status.Conditions)
	})
}

// answer is what app get says of a call.
type answer struct {
	Status  int
	Header  map[string][]string
	Body    string
	Error   string
	Seconds float64
}

// pod that answered, by what it says of itself.
func (a answer) pod() string {
	var body struct{ Pod string }
	if json.Unmarshal([]byte(a.Body), &body) != nil {
		return ""
	}
	return body.Pod
}

// get calls from the container app of a pod, and counts: each call that got no answer,
// or one above 499, failed.
func (sc *scene) get(ctx context.Context, pod string, args ...string) ([]answer, error) {
	answers, err := sc.try(ctx, pod, args...)
	for _, a := range answers {
		sc.requests++
		if a.Error != "" || a.Status > 499 {
			sc.failed++
		}
	}
	return answers, err
}

// try is get for calls that may fail: they do not count.
func (sc *scene) try(ctx context.Context, pod string, args ...string) ([]answer, error) {
	out, err := sc.Exec(ctx, sc.namespace, pod, "app", append([]string{"/app", "get"}, args...)...)
	if err != nil {
		return nil, err
	}
	var answers []answer
	for line := range strings.Lines(out) {
		var a answer
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			return nil, fmt.Errorf("what app get printed: %w: %s", err, line)
		}
		answers = append(answers, a)
	}
	if len(answers) == 0 {
		return nil, errors.New("app get printed nothing")
	}
	return answers, nil
}
