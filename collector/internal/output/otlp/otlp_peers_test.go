//go:build peers

package otlp

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestRealOpenTelemetryCollector sends to the OpenTelemetry Collector's own
// receiver, which writes what it got to a file, and compares.
func TestRealOpenTelemetryCollector(t *testing.T) {
	binary, err := filepath.Abs("../../../../.cache/peers/otelcol/otelcol")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(binary); err != nil {
		t.Skipf("SKIPPED: no OpenTelemetry Collector at %s: build it by deploy/peers/otelcol.sh", binary)
	}
	dir := t.TempDir()
	web, rpc, out := free(t), free(t), filepath.Join(dir, "out.json")
	config := fmt.Sprintf(`receivers:
  otlp: {protocols: {http: {endpoint: %s}, grpc: {endpoint: %s}}}
exporters:
  file: {path: %s, flush_interval: 100ms}
service:
  telemetry: {metrics: {level: none}}
  pipelines:
    logs: {receivers: [otlp], exporters: [file]}
`, web, rpc, out)
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

	var want []string
	for _, cfg := range []Config{
		{Endpoint: "http://" + web},
		{Endpoint: "http://" + web, Compression: "none"},
		{Endpoint: "http://" + rpc, Protocol: "grpc"},
		{Endpoint: "http://" + rpc, Protocol: "grpc", Compression: "none"},
	} {
		o := newOutput(t, cfg, nil)
		records := batch(500)
		for i, r := range records {
			r.Body = fmt.Sprintf("%s %s %d", cfg.Protocol, cfg.Compression, i)
			want = append(want, r.Body)
		}
		records[7].Attributes = map[string]any{"n": 1.5, "ok": true, "list": []any{"a", nil}, "map": map[string]any{"x": "größe"}}
		records[8].Body, want[len(want)-492] = "\xff", "\uFFFD"
		got := o.Write(t.Context(), records)
		for began := time.Now(); got.Err != nil && time.Since(began) < 30*time.Second; { // it starts
			time.Sleep(100 * time.Millisecond)
			got = o.Write(t.Context(), records)
		}
		if !clean(got) {
			t.Fatalf("%+v", got)
		}
	}
	var records []map[string]any
	for began := time.Now(); len(records) < len(want) && time.Since(began) < 30*time.Second; time.Sleep(100 * time.Millisecond) {
		records = read(t, out)
	}
	var bodies []string
	for _, r := range records {
		bodies = append(bodies, fmt.Sprint(r["body"].(map[string]any)["stringValue"]))
	}
	if diff := cmp.Diff(want, bodies); diff != "" {
		t.Fatalf("%d records: %s", len(bodies), diff)
	}
	line := records[7]
	attributes := line["attributes"]
	delete(line, "attributes")
	delete(line, "body")
	if diff := cmp.Diff(map[string]any{
		"timeUnixNano": "1795402800000000012", "observedTimeUnixNano": "1795402801000000012", "severityNumber": 13.0, "severityText": "warn",
		"traceId": "4bf92f3577b34da6a3ce929d0e0e4736", "spanId": "00f067aa0ba902b7",
	}, line); diff != "" {
		t.Error(diff)
	}
	text, err := json.Marshal(attributes)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{
		`{"key":"n","value":{"doubleValue":1.5}}`, `{"key":"ok","value":{"boolValue":true}}`, `{"key":"log.iostream","value":{"stringValue":"stderr"}}`,
		`{"key":"map","value":{"kvlistValue":{"values":[{"key":"x","value":{"stringValue":"größe"}}]}}}`, `{"key":"log.file.path","value":{"stringValue":"/p"}}`,
	} {
		if !strings.Contains(string(text), part) {
			t.Errorf("%s\nis not in %s", part, text)
		}
	}
}

// read returns the records that the collector has written, in order.
func read(t *testing.T, path string) (out []map[string]any) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		return nil // not there yet
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var l struct {
			ResourceLogs []struct {
				ScopeLogs []struct {
					LogRecords []map[string]any
				}
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &l); err != nil {
			return out // half written
		}
		for _, r := range l.ResourceLogs {
			for _, s := range r.ScopeLogs {
				out = append(out, s.LogRecords...)
			}
		}
	}
	return out
}

// free returns an address that nobody listens at.
func free(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String()
}
