package stories

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/deploy/chart"
	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// system is the namespace of the product.
const system = "outrigger-system"

// values of the installation, beside those of the profile: the images are here.
const values = `
image: {tag: here, pullPolicy: Never}
sidecar: {envoyImage: "outrigger-e2e/envoy:here"}
`

// Install puts the Gateway API and the product into the cluster and waits for it.
func (s *Stories) Install(ctx context.Context) error {
	began := time.Now()
	crds, err := os.ReadFile(filepath.Join(s.Folder, "gateway-api.yaml"))
	if err != nil {
		return fmt.Errorf("the Gateway API: %w", err)
	}
	if err := s.Cluster.Apply(ctx, string(crds)); err != nil {
		return err
	}
	profile, err := os.ReadFile(filepath.Join(s.Root, "deploy", "profiles", "kubeadm.yaml"))
	if err != nil {
		return fmt.Errorf("the profile: %w", err)
	}
	under, err := chart.Values(profile)
	if err != nil {
		return fmt.Errorf("the profile: %w", err)
	}
	over, err := chart.Values([]byte(values))
	if err != nil {
		return fmt.Errorf("values: %w", err)
	}
	release, err := chart.Render(ctx, chart.Merge(under, over), chart.Options{Namespace: system, KubeVersion: "v1.37.2"})
	if err != nil {
		return err
	}
	if err := s.Cluster.Apply(ctx, "{apiVersion: v1, kind: Namespace, metadata: {name: "+system+"}}"); err != nil {
		return err
	}
	for _, objects := range [][]*unstructured.Unstructured{release.CRDs, release.Objects} {
		for _, o := range objects {
			text, err := yaml.Marshal(o.Object)
			if err != nil {
				return fmt.Errorf("the chart: %w", err)
			}
			if err := s.Cluster.Apply(ctx, string(text)); err != nil {
				return err
			}
		}
	}
	for _, d := range []string{"outrigger-control-plane", "outrigger-injector"} {
		if err := s.Cluster.Available(ctx, system, d); err != nil {
			return err
		}
	}
	if err := s.collectorsReady(ctx); err != nil {
		return err
	}
	s.Report("Outrigger is installed after %.1f s", time.Since(began).Seconds())
	return nil
}

// collectorsReady waits until the collector of each node is.
func (s *Stories) collectorsReady(ctx context.Context) error {
	return collectorsReady(ctx, s.Cluster)
}

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
