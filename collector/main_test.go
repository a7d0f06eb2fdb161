package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/pipeline"
)

// laptop is a collector with the embedded store, run from its configuration.
type laptop struct {
	t      *testing.T
	dir    string
	config string
	admin  string
	expose string
}

func newLaptop(t *testing.T) *laptop {
	t.Helper()
	l := &laptop{t: t, dir: t.TempDir(), admin: freePort(t), expose: freePort(t)}
	l.config = l.file("collector.yaml", fmt.Sprintf(`
admin: %s
dataDir: %s/data
node: n1
logs: {folder: %s/pods, outputs: [local], batch: {linger: 10ms}}
metrics: {host: true, expose: %s, scrape: [{job: self, address: %s, interval: 1s}]}
outputs: {local: {store: {folder: %s/store}}}
`, l.admin, l.dir, l.dir, l.expose, l.admin, l.dir))
	if err := os.Mkdir(l.dir+"/pods", 0o750); err != nil {
		t.Fatal(err)
	}
	return l
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

func (l *laptop) file(name, text string) string {
	l.t.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		l.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		l.t.Fatal(err)
	}
	return path
}

// start runs the collector and returns what stops it.
func (l *laptop) start() (stop func()) {
	l.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	var stderr bytes.Buffer
	go func() { done <- execute(ctx, []string{"--config", l.config, "--reload", "50ms"}, io.Discard, &stderr) }()
	l.eventually("/ready", func(body string) bool { return body == "ready\n" })
	return func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Errorf("%v\n%s", err, stderr.String())
		}
	}
}

func (l *laptop) eventually(path string, ok func(body string) bool) {
	l.t.Helper()
	l.ask(l.admin, path, ok)
}

func (l *laptop) ask(address, path string, ok func(body string) bool) {
	l.t.Helper()
	body := ""
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		r, err := http.Get("http://" + address + path)
		if err != nil {
			continue
		}
		b, err := io.ReadAll(r.Body)
		if err := errors.Join(err, r.Body.Close()); err != nil {
			l.t.Fatal(err)
		}
		if body = string(b); ok(body) {
			return
		}
	}
	l.t.Fatalf("%s: %s", path, body)
}

func lines(body string) int { return strings.Count(body, "\n") }

// A line that a container wrote is found by its words and by its fields, once,
// before and after a restart; the audit closes; metrics are to be had.
func TestFromFileToSearch(t *testing.T) {
	l := newLaptop(t)
	const log = "pods/shop_cart-7d9c8b5f6d-x2vzq_u1/app/0.log"
	// The store refuses what is older than its retention.
	hour := time.Now().UTC().Truncate(time.Hour).Format("2006-01-02T15:04:")
	l.file(log, hour+"00.1Z stdout F {\"level\":\"warn\",\"message\":\"card declined\",\"trace_id\":\"4bf92f3577b34da6a3ce929d0e0e4736\"}\n"+
		hour+"00.2Z stderr F plain text\n")
	const all = "/api/v1/logs?since=24h&query="
	stop := l.start()
	l.eventually(all+"declined", func(b string) bool {
		return lines(b) == 1 && strings.Contains(b, `"service.name":"cart"`) && strings.Contains(b, `"log.level":"warn"`) && strings.Contains(b, "4bf92f3577b34da6a3ce929d0e0e4736")
	})
	l.eventually(all+"kubernetes.namespace:shop", func(b string) bool { return lines(b) == 2 })
	l.eventually("/api/v1/audit", func(b string) bool {
		var a struct{ Outputs []pipeline.Audit }
		if err := json.Unmarshal([]byte(b), &a); err != nil {
			t.Fatal(err)
		}
		o := a.Outputs[0]
		return o.Output == "local" && o.Kind == "store" && o.Total.Pending == 0 && o.Total.Written > 0 && o.Total.Written == o.Total.Acknowledged
	})
	l.eventually("/metrics", func(b string) bool {
		return strings.Contains(b, `outrigger_log_records_total{output="local",result="acknowledged"} 2`)
	})
	l.ask(l.expose, "/metrics", func(b string) bool {
		return strings.Contains(b, "node_load1 ") && strings.Contains(b, `job="self"`)
	})
	stop()
	l.file(log, hour+"00.3Z stdout F while it was away\n")
	stop = l.start()
	l.eventually(all+"kubernetes.namespace:shop", func(b string) bool { return lines(b) == 3 })
	l.eventually("/metrics", func(b string) bool {
		return strings.Contains(b, `outrigger_log_records_total{output="local",result="acknowledged"} 1`)
	})
	stop()
}

func TestWhatIsRefused(t *testing.T) {
	l := newLaptop(t)
	f := func(want string, args ...string) {
		t.Helper()
		var stderr bytes.Buffer
		err := execute(t.Context(), args, io.Discard, &stderr)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v; want %q", args, err, want)
		}
	}
	f("--config is missing")
	f("unexpected argument", "--config", l.config, "x")
	f("no such file", "--config", l.dir+"/none.yaml")
	f(`line 1: unknown key "log"; known here are admin, dataDir`, "--config", l.file("bad.yaml", "log: {}\n"))
	f("--log-format", "--config", l.config, "--log-format", "xml")
	f("only a loopback address", "--config", l.file("open.yaml", "admin: 0.0.0.0:0\nmetrics: {expose: 127.0.0.1:0}\n"))

	stop := l.start()
	defer stop()
	f("admin: "+l.admin+" is in use", "--config", l.config)
	f("is in use by another collector", "--config", l.file("other.yaml", fmt.Sprintf("admin: 127.0.0.1:0\ndataDir: %s/data\nmetrics: {expose: 127.0.0.1:0}\n", l.dir)))
	f("metrics.expose: "+l.expose+" is in use", "--config", l.file("third.yaml", fmt.Sprintf("admin: 127.0.0.1:0\ndataDir: %s/data2\nmetrics: {expose: %s}\n", l.dir, l.expose)))
}

func TestCheckAndVersion(t *testing.T) {
	l := newLaptop(t)
	var out bytes.Buffer
	if err := execute(t.Context(), []string{"--check", "--config", l.config}, &out, io.Discard); err != nil || !strings.Contains(out.String(), "is right") {
		t.Errorf("--check: %v, %q", err, out.String())
	}
	if _, err := os.Stat(l.dir + "/data"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("--check made the data folder: %v", err)
	}
	out.Reset()
	if err := execute(t.Context(), []string{"--version"}, &out, io.Discard); !errors.Is(err, flag.ErrHelp) || out.Len() == 0 {
		t.Errorf("--version: %v, %q", err, out.String())
	}
}

// A changed configuration is applied without losing a line; one that is wrong, or
// whose parts cannot be made, changes nothing and is told of.
func TestReload(t *testing.T) {
	l := newLaptop(t)
	text, err := os.ReadFile(l.config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(l.config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const log = "pods/shop_cart-7d9c8b5f6d-x2vzq_u1/app/0.log"
	now := time.Now().UTC().Format("2006-01-02T15:04:05.")
	line := func(i int) { l.file(log, fmt.Sprintf("%s%03dZ stdout F line %d\n", now, i, i)) }
	const all = "/api/v1/logs?since=24h&limit=1000&query=kubernetes.namespace:shop"
	stop := l.start()
	metric := func(want string) {
		t.Helper()
		l.eventually("/metrics", func(b string) bool { return strings.Contains(b, want+"\n") })
	}
	line(1)
	write("logs: {folder: x, folders: y}")
	metric(`outrigger_config_reloads_total{result="refused"} 1`)
	metric(`outrigger_config_refused 1`)
	line(2)
	write(strings.Replace(string(text), "store: {folder", "elasticsearch: {caFile: /none, addresses: [https://127.0.0.1:1]}}, other: {store: {folder", 1) + "# changed\n")
	metric(`outrigger_config_reloads_total{result="refused"} 2`)
	line(3)
	write(strings.Replace(string(text), "node: n1", "node: n2", 1))
	metric(`outrigger_config_reloads_total{result="applied"} 1`)
	metric(`outrigger_config_refused 0`)
	line(4)
	l.eventually(all, func(b string) bool { return lines(b) == 4 && strings.Contains(b, `"host.name":"n2"`) })
	stop()
}

// What is pushed as OTLP is answered when it is on the disk, and found like any
// log; the account closes for it too, and a restart neither loses nor repeats it.
func TestPushedLogs(t *testing.T) {
	l := newLaptop(t)
	text, err := os.ReadFile(l.config)
	if err != nil {
		t.Fatal(err)
	}
	otlp := freePort(t)
	config := strings.Replace(string(text), "outputs: [local],", "outputs: [local], inputs: {otlp: {address: \""+otlp+"\"}}, rules: [{name: noise, match: {body: noise}, drop: true}],", 1)
	if err := os.WriteFile(l.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	push := func(body string) {
		t.Helper()
		at := time.Now().UnixNano()
		request := fmt.Sprintf(`{"resourceLogs":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"cart"}}]},
 "scopeLogs":[{"logRecords":[{"timeUnixNano":"%d","severityNumber":13,"body":{"stringValue":%q},"attributes":[{"key":"order.id","value":{"intValue":"7"}}]}]}]}]}`, at, body)
		r, err := http.Post("http://"+otlp+"/v1/logs", "application/json", strings.NewReader(request))
		if err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(r.Body)
		if err := errors.Join(err, r.Body.Close()); err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("%d %s %v", r.StatusCode, answer, err)
		}
	}
	const all = "/api/v1/logs?since=24h&query=service.name:cart"
	stop := l.start()
	push("card declined")
	push("noise")
	l.eventually(all, func(b string) bool {
		return lines(b) == 1 && strings.Contains(b, `"order.id":7`) && strings.Contains(b, `"log.level":"warn"`)
	})
	l.eventually("/api/v1/audit", func(b string) bool {
		var a struct{ Outputs []pipeline.Audit }
		if err := json.Unmarshal([]byte(b), &a); err != nil {
			t.Fatal(err)
		}
		o := a.Outputs[0].Total
		return o.Pending == 0 && o.Records == 1 && o.DroppedRecords["rule"] == 1 && o.Written == o.Acknowledged+o.Dropped["rule"]
	})
	l.eventually("/api/v1/why", func(b string) bool { return strings.Contains(b, `"rule": "noise"`) && strings.Contains(b, `"noise"`) })
	l.eventually("/api/v1/cost", func(b string) bool { return strings.Contains(b, `"workload": "cart"`) })
	stop()
	stop = l.start()
	push("again")
	l.eventually(all, func(b string) bool { return lines(b) == 2 })
	stop()
}
