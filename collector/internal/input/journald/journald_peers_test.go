//go:build peers

package journald

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The real systemd-journald, with a namespace of its own, and the real
// journalctl: entries arrive while both run, across rotations of the journal and a
// restart of the input, each once.
func TestRealJournald(t *testing.T) {
	const daemon = "/lib/systemd/systemd-journald"
	if _, err := os.Stat(daemon); err != nil || os.Getuid() != 0 {
		t.Skip("SKIPPED: no " + daemon + " or not root: install systemd and run as root")
	}
	if _, err := exec.LookPath(DefaultBinary); err != nil {
		t.Skip("SKIPPED: no journalctl: install systemd")
	}
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil || strings.TrimSpace(string(id)) == "" {
		t.Skip("SKIPPED: /etc/machine-id is missing or empty: systemd-machine-id-setup makes it")
	}
	namespace := fmt.Sprintf("outrigger%d", os.Getpid())
	run := "/run/systemd/journal." + namespace
	t.Cleanup(func() {
		_ = os.RemoveAll(run)
		for _, dir := range []string{"/var/log/journal", "/run/log/journal"} {
			_ = os.RemoveAll(filepath.Join(dir, strings.TrimSpace(string(id))+"."+namespace))
		}
	})
	cmd := exec.Command(daemon, namespace)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var conn net.Conn
	eventually(t, "journald listens", func() bool { conn, err = net.Dial("unixgram", run+"/socket"); return err == nil })
	defer func() { _ = conn.Close() }()
	send := func(message string) {
		t.Helper()
		if _, err := fmt.Fprintf(conn, "MESSAGE=%s\nPRIORITY=4\nSYSLOG_IDENTIFIER=tester\nREQUEST=r1\n", message); err != nil {
			t.Fatal(err)
		}
	}
	mine := func(in *input) (n int) {
		for _, r := range in.records() {
			if r.Attributes["log.syslog.appname"] == "tester" {
				n++
			}
		}
		return n
	}
	cfg := Config{Namespace: namespace, CursorFile: filepath.Join(t.TempDir(), "cursor"), Node: "node-1"}
	for i := range 50 {
		send(fmt.Sprint("before ", i))
	}
	in := start(t, cfg)
	eventually(t, "what was there", func() bool { return mine(in) == 50 })
	for i := range 50 {
		send(fmt.Sprint("while ", i))
	}
	// A binary message of 100 kB, which journalctl writes as numbers.
	if _, err := conn.Write(append([]byte("SYSLOG_IDENTIFIER=tester\nMESSAGE="), append([]byte(strings.Repeat("\xff", 100_000)), '\n')...)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what came", func() bool { return mine(in) == 101 })
	time.Sleep(2 * linger) // the cursor follows its entries
	in.stop()
	for i := range 50 {
		send(fmt.Sprint("away ", i))
	}
	second := start(t, cfg)
	eventually(t, "what came meanwhile", func() bool { return mine(second) >= 50 })
	second.stop()
	seen := map[string]int{}
	for _, r := range append(in.records(), second.records()...) {
		if r.Attributes["log.syslog.appname"] != "tester" {
			continue
		}
		seen[r.Body]++
		if r.Resource.Node != "node-1" || len(r.Body) < 100 && (r.Level != "warn" || r.Attributes["journald.custom.request"] != "r1" || r.Attributes["process.pid"] != float64(os.Getpid())) {
			t.Errorf("%+v", r)
		}
	}
	if len(seen) != 151 {
		t.Errorf("%d different entries, want 151", len(seen))
	}
	for body, n := range seen {
		if n != 1 {
			t.Errorf("%.60q %d times", body, n)
		}
	}
}
