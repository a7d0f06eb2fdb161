package stories

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// system is the namespace of the product.
const system = "outrigger-system"

// values of the installation, beside those of the profile: the images are here, their
// tag is the version that the programs were built with.
const values = `
image: {pullPolicy: Never}
sidecar: {envoyImage: "outrigger-e2e/envoy:here"}
collector:
  kubernetes: {kubelet: verified}
  logs:
    inputs: {events: {}}
    rules: [{name: every-tenth, match: {namespaces: [accounts], body: "^line [0-9]*0$"}, drop: true}]
`

// Install puts the Gateway API and the product into the cluster, as a user would,
// and waits for it.
func (s *Stories) Install(ctx context.Context) error {
	began := time.Now()
	crds, err := os.ReadFile(filepath.Join(s.Folder, "gateway-api.yaml"))
	if err != nil {
		return fmt.Errorf("the Gateway API: %w", err)
	}
	if err := s.Cluster.Apply(ctx, string(crds)); err != nil {
		return err
	}
	file := filepath.Join(s.Folder, "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o644); err != nil {
		return fmt.Errorf("values: %w", err)
	}
	out, err := command(ctx, s.Cluster, s.Bin, "install", "--profile", "kubeadm", "--values", file, "--wait")
	if err != nil {
		return fmt.Errorf("%w\n%s%s", err, out, s.Cluster.Describe(context.WithoutCancel(ctx), system))
	}
	if err := collectorsReady(ctx, s.Cluster); err != nil {
		return err
	}
	s.Report("Outrigger is installed after %.1f s", time.Since(began).Seconds())
	return nil
}

// collectorsReady waits until the collector of each node is.
func collectorsReady(ctx context.Context, c *cluster.Cluster) error {
	err := cluster.WaitFor(ctx, 2*time.Minute, "the collectors to be ready", func(ctx context.Context) error {
		d, err := c.Client.AppsV1().DaemonSets(system).Get(ctx, "outrigger-collector", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if st := d.Status; st.ObservedGeneration < d.Generation || st.DesiredNumberScheduled == 0 || st.NumberReady != st.DesiredNumberScheduled || st.UpdatedNumberScheduled != st.DesiredNumberScheduled {
			return fmt.Errorf("%d of %d", st.NumberReady, st.DesiredNumberScheduled)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w%s", err, c.Describe(context.WithoutCancel(ctx), system))
	}
	return nil
}

// proxied says whether the pod has our proxy, and it is ready.
func proxied(p *corev1.Pod) error {
	if p.Annotations["outrigger.dev/status"] != "injected" {
		return fmt.Errorf("pod %s is not injected: outrigger.dev/status is %q", p.Name, p.Annotations["outrigger.dev/status"])
	}
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == proxy {
			if !s.Ready {
				return fmt.Errorf("the proxy of pod %s is not ready", p.Name)
			}
			return nil
		}
	}
	return fmt.Errorf("pod %s has no container %s", p.Name, proxy)
}

// proxy is the name of the sidecar's container.
const proxy = "outrigger-proxy"
