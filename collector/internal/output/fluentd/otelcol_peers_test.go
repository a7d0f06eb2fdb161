//go:build peers

package fluentd

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRealOpenTelemetryCollector sends to the OpenTelemetry Collector's receiver of
// the forward protocol, which writes what it got to a file, and compares.
func TestRealOpenTelemetryCollector(t *testing.T) {
	binary, err := filepath.Abs("../../../../.cache/peers/otelcol/otelcol")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Skipf("SKIPPED: no OpenTelemetry Collector at %s: build it by deploy/peers/otelcol.sh", binary)
	}
	dir := t.TempDir()
	ln := listen(t)
	address, out := ln.Addr().String(), filepath.Join(dir, "out.json")
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`receivers:
  fluent_forward: {endpoint: %s}
exporters:
  file: {path: %s, flush_interval: 100ms}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    logs: {receivers: [fluent_forward], exporters: [file]}
`, address, out)
	file := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	server := exec.Command(binary, "--config", file)
	server.Stdout, server.Stderr = t.Output(), t.Output()
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Signal(syscall.SIGTERM)
		if err := server.Wait(); err != nil {
			t.Errorf("the collector ended badly: %v", err)
		}
	})

	var want []map[string]string
	for _, cfg := range []Config{{}, {Compression: "gzip"}, {Compression: "gzip", Window: 1}} {
		cfg.Address, cfg.MaxChunkBytes = address, 64<<10
		o := newForwardOutput(t, cfg)
		records := plain(2000)
		for i, r := range records {
			r.Body = fmt.Sprintf("%s %d %d", cfg.Compression, cfg.Window, i)
			want = append(want, map[string]string{
				"body": r.Body, "time": fmt.Sprint(r.Time.UnixNano()), "fluent.tag": "kube.shop.payments",
				"kubernetes.pod.name": r.Resource.Pod, "log.offset": fmt.Sprint(r.Origin.Offset),
			})
		}
		got := write(t, o, records)
		for began := time.Now(); got.Err != nil && time.Since(began) < 30*time.Second; { // it starts
			time.Sleep(100 * time.Millisecond)
			got = write(t, o, records)
		}
		if !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	var got []map[string]string
	for began := time.Now(); len(got) < len(want) && time.Since(began) < 30*time.Second; time.Sleep(100 * time.Millisecond) {
		got = written(t, out)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		if len(diff) > 4000 {
			diff = diff[:4000]
		}
		t.Errorf("%d of %d events: %s", len(got), len(want), diff)
	}
}

// written returns what the collector has written, in order.
func written(t *testing.T, path string) (out []map[string]string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		return nil // not there yet
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var l struct {
			ResourceLogs []struct {
				ScopeLogs []struct {
					LogRecords []struct {
						TimeUnixNano string
						Body         struct{ StringValue string }
						Attributes   []struct {
							Key   string
							Value map[string]any
						}
					}
				}
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return out // half written
		}
		for _, r := range l.ResourceLogs {
			for _, s := range r.ScopeLogs {
				for _, e := range s.LogRecords {
					event := map[string]string{"body": e.Body.StringValue, "time": e.TimeUnixNano}
					for _, a := range e.Attributes {
						switch a.Key {
						case "fluent.tag", "kubernetes.pod.name", "log.offset":
							for _, v := range a.Value {
								event[a.Key] = fmt.Sprint(v)
							}
						}
					}
					out = append(out, event)
				}
			}
		}
	}
	return out
}
