package stories

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// conformance runs the Gateway API's own tests of the profiles MESH-HTTP and
// MESH-GRPC. Its requests are the tests, its failures those that failed.
func conformance(ctx context.Context, sc *scene) error {
	log, err := os.Create(filepath.Join(sc.folder, "logs", "conformance.log"))
	if err != nil {
		return fmt.Errorf("the log: %w", err)
	}
	defer func() { _ = log.Close() }()
	cmd := exec.CommandContext(ctx, filepath.Join(sc.bin, "conformance.test"), "-test.v", "-test.timeout=20m")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "KUBECONFIG="+sc.Kubeconfig)
	err = cmd.Run()
	text, readErr := os.ReadFile(log.Name())
	if readErr != nil {
		return fmt.Errorf("the log: %w", readErr)
	}
	var failed []string
	for _, m := range regexp.MustCompile(`(?m)^    --- (PASS|FAIL): TestConformance/(\S+)`).FindAllStringSubmatch(string(text), -1) {
		sc.requests++
		if m[1] == "FAIL" {
			sc.failed++
			failed = append(failed, m[2])
		}
	}
	if err != nil {
		return fmt.Errorf("%w: failed: %s; see %s", err, strings.Join(failed, ", "), log.Name())
	}
	if sc.requests == 0 {
		return fmt.Errorf("no test has run: see %s", log.Name())
	}
	sc.report("conformance: the report is %s", filepath.Join(sc.folder, "conformance.yaml"))
	return nil
}
