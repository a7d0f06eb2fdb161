package stories

import (
	"context"
	"errors"
	"fmt"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// jobs: Jobs with a sidecar end as they would without: they complete, they fail as
// often as they may, they are ended at their deadline, and a CronJob does each.
func jobs(ctx context.Context, sc *scene) error {
	if err := sc.Apply(ctx, fmt.Sprintf(`
apiVersion: batch/v1
kind: CronJob
metadata: {name: every-minute, namespace: %s}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: OnFailure
          containers:
          - {name: app, image: "outrigger-e2e/app:here", imagePullPolicy: Never, args: [job, --url=http://web/]}
`, sc.namespace)); err != nil {
		return err
	}
	if err := sc.start(ctx, sc.server("web", 1, "", ""), "web"); err != nil {
		return err
	}
	if err := sc.Apply(ctx, sc.job("completes", `"--url=http://web/", "--calls=5"`, "completions: 3\n  parallelism: 3")+
		sc.job("fails", `"--url=http://web/", "--exit=3"`, "backoffLimit: 1")+
		sc.job("late", `"--url=http://web/", "--sleep=10m"`, "activeDeadlineSeconds: 15")); err != nil {
		return err
	}
	if err := sc.jobEnds(ctx, "completes", batchv1.JobComplete); err != nil {
		return err
	}
	sc.requests += 15
	pods, err := sc.Pods(ctx, sc.namespace, "job-name=completes")
	if err != nil {
		return err
	}
	if len(pods) != 3 {
		return fmt.Errorf("%d pods of completes, not 3", len(pods))
	}
	for _, p := range pods {
		if p.Annotations["outrigger.dev/status"] != "injected" || p.Status.Phase != corev1.PodSucceeded {
			return fmt.Errorf("pod %s: outrigger.dev/status %q, %s", p.Name, p.Annotations["outrigger.dev/status"], p.Status.Phase)
		}
	}
	if err := sc.jobEnds(ctx, "fails", batchv1.JobFailed); err != nil {
		return err
	}
	j, err := sc.Client.BatchV1().Jobs(sc.namespace).Get(ctx, "fails", metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("job fails: %w", err)
	}
	if j.Status.Failed != 2 {
		return fmt.Errorf("job fails has failed %d times, not twice", j.Status.Failed)
	}
	if pods, err = sc.Pods(ctx, sc.namespace, "job-name=fails"); err != nil {
		return err
	}
	for _, p := range pods {
		for _, s := range p.Status.ContainerStatuses {
			if s.Name == "app" && (s.State.Terminated == nil || s.State.Terminated.ExitCode != 3) {
				return fmt.Errorf("the container of pod %s has not ended with 3: %v", p.Name, s.State)
			}
		}
	}
	if err := sc.jobEnds(ctx, "late", batchv1.JobFailed); err != nil {
		return err
	}
	if err := cluster.WaitFor(ctx, time.Minute, "the pods of the late job to be gone", func(ctx context.Context) error {
		list, err := sc.Client.CoreV1().Pods(sc.namespace).List(ctx, metav1.ListOptions{LabelSelector: "job-name=late"})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("pod %s is %s", list.Items[0].Name, list.Items[0].Status.Phase)
		}
		return err
	}); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, 2*time.Minute, "a Job of the CronJob to complete", func(ctx context.Context) error {
		list, err := sc.Client.BatchV1().Jobs(sc.namespace).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, j := range list.Items {
			if len(j.OwnerReferences) == 1 && j.OwnerReferences[0].Kind == "CronJob" && j.Status.Succeeded == 1 {
				return nil
			}
		}
		return errors.New("none has")
	})
}
