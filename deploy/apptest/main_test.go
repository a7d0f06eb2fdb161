package apptest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// programs are the binaries under test, by name.
var programs = []string{"control-plane", "sidecar", "shop"}

// built is the folder that holds them; set once, by TestMain.
var built string

// skipped counts the tests that a missing Envoy has cost.
var skipped atomic.Int32

func TestMain(m *testing.M) {
	if job := os.Getenv(jobVariable); job != "" {
		if err := work(job); err != nil {
			fmt.Fprintln(os.Stderr, "apptest:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

// work does the job of a process that again has started.
func work(job string) error {
	kind, name, _ := strings.Cut(job, ":")
	switch kind {
	case "interop":
		return interopJob(name)
	default:
		return fmt.Errorf("%s=%s is no job", jobVariable, job)
	}
}

func runTests(m *testing.M) int {
	built = os.Getenv("OUTRIGGER_BIN")
	if built == "" {
		dir, err := os.MkdirTemp("", "apptest-bin")
		if err != nil {
			fmt.Fprintln(os.Stderr, "apptest:", err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }() // what is left is in the temporary folder
		cmd := exec.Command("go", "build", "-o", dir+string(filepath.Separator), "./control-plane", "./sidecar", "./deploy/demo/shop")
		cmd.Dir = filepath.Join("..", "..")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "apptest: the programs cannot be built: %v\n%s", err, out)
			return 1
		}
		built = dir
	}
	for _, name := range programs {
		if _, err := os.Stat(program(name)); err != nil {
			fmt.Fprintf(os.Stderr, "apptest: OUTRIGGER_BIN has no %s (%v): run make build, or leave OUTRIGGER_BIN out\n", name, err)
			return 1
		}
	}
	code := m.Run()
	if n := skipped.Load(); n > 0 {
		fmt.Fprintf(os.Stderr, "SKIPPED: %d tests need a real Envoy: run deploy/apptest/envoy.sh\n", n)
	}
	return code
}

func program(name string) string { return filepath.Join(built, name) }

// envoyBinary returns the real Envoy, or skips the test.
func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("OUTRIGGER_ENVOY")
	if path == "" {
		var err error
		if path, err = filepath.Abs(filepath.Join("..", "..", ".cache", "envoy", "envoy")); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(path)
	if err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
		return path
	}
	const remedy = "run deploy/apptest/envoy.sh, or name an Envoy in OUTRIGGER_ENVOY"
	if os.Getenv("OUTRIGGER_REQUIRE_ENVOY") == "1" {
		t.Fatalf("there is no real Envoy at %s and OUTRIGGER_REQUIRE_ENVOY is 1: %s", path, remedy)
	}
	skipped.Add(1)
	t.Skipf("SKIPPED: there is no real Envoy at %s: %s", path, remedy)
	return ""
}
