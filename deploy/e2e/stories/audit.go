package stories

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/outrigger-mesh/outrigger/deploy/e2e/cluster"
)

// audit: pods that should be meshed and are not are found, each with its cause: one that
// was created while the injector was away, and one on its node's network.
func audit(ctx context.Context, sc *scene) error {
	if err := sc.Apply(ctx, sc.caller("host", "", "hostNetwork: true")); err != nil {
		return err
	}
	policy := func(ctx context.Context, p string) error {
		patch := fmt.Appendf(nil, `[{"op":"replace","path":"/webhooks/0/failurePolicy","value":%[1]q},{"op":"replace","path":"/webhooks/1/failurePolicy","value":%[1]q}]`, p)
		_, err := sc.Client.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(ctx, "outrigger-injector", types.JSONPatchType, patch, metav1.PatchOptions{})
		if err != nil {
			return fmt.Errorf("the webhook: %w", err)
		}
		return nil
	}
	back := func(ctx context.Context) error {
		if err := sc.Scale(ctx, system, "outrigger-injector", 2); err != nil {
			return err
		}
		if err := sc.Available(ctx, system, "outrigger-injector"); err != nil {
			return err
		}
		return policy(ctx, "Fail")
	}
	if err := policy(ctx, "Ignore"); err != nil {
		return err
	}
	if err := sc.Scale(ctx, system, "outrigger-injector", 0); err != nil {
		return err
	}
	err := sc.Available(ctx, system, "outrigger-injector")
	if err == nil {
		err = sc.start(ctx, sc.server("missed", 1, "", ""), "missed")
	}
	if backErr := back(context.WithoutCancel(ctx)); err == nil {
		err = backErr
	}
	if err != nil {
		return err
	}
	if err := sc.start(ctx, sc.server("meshed", 1, "", ""), "meshed"); err != nil {
		return err
	}
	return cluster.WaitFor(ctx, time.Minute, "the audit to find both", func(ctx context.Context) error {
		out, err := sc.outrigger(ctx, "audit", "--namespace", sc.namespace, "--output", "json")
		var report struct {
			Findings []struct{ Namespace, Pod, Owner, Cause, Message, Command string }
		}
		if jsonErr := json.Unmarshal(out, &report); jsonErr != nil {
			return fmt.Errorf("outrigger audit: %w: %w: %s", jsonErr, err, out)
		}
		causes := map[string]string{}
		for _, f := range report.Findings {
			if f.Namespace == sc.namespace {
				causes[f.Pod+f.Owner] = f.Cause
				sc.report("audit: %s: %s; %s", f.Pod, f.Message, f.Command)
			}
		}
		if len(causes) != 2 || causes["host"] != "host-network" {
			return fmt.Errorf("it says %v", causes)
		}
		return nil
	})
}

// outrigger runs the command line as a user would, against this cluster. What it
// printed is there even when it ended with an error.
func (sc *scene) outrigger(ctx context.Context, args ...string) ([]byte, error) {
	return command(ctx, sc.Cluster, sc.bin, args...)
}

func command(ctx context.Context, c *cluster.Cluster, bin string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "outrigger"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return out, fmt.Errorf("outrigger %v: %w: %s", args, err, exit.Stderr)
	}
	return out, err
}
