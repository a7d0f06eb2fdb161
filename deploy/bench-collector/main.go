// Command bench-collector measures what it costs to ship a node's log lines: CPU
// seconds for a GB, MB a second on one processor, and memory; beside the
// OpenTelemetry Collector of deploy/peers/otelcol, on the same files in the same
// run.
//
// The collector under test has one processor to itself and GOMAXPROCS=1, this
// program with the servers that are sent to has the other. The servers count and
// store nothing, so that they are not what is measured. MB are 1,000,000 bytes of
// log files, as the runtime writes them.
//
// It ends all that it has started. Needs taskset.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Getenv)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-collector:", err)
		os.Exit(1)
	}
}

// plan is how much is measured.
type plan struct {
	collector, peer string
	cache           string
	docs            string
	bytes           int64
	rounds          int
	paced           time.Duration // of each measurement of memory
	quick           bool
}

const (
	containers = 50
	idle       = 5000
	pace       = 10_000_000 // bytes a second
	oneRound   = 10 * time.Minute
)

func parse(args []string, getenv func(string) string) (plan, error) {
	p := plan{bytes: 1_000_000_000, rounds: 3, paced: 30 * time.Second, docs: "docs/bench-collector.md"}
	if getenv("BENCH_QUICK") == "1" {
		p.bytes, p.rounds, p.paced, p.docs, p.quick = 200_000_000, 1, 8*time.Second, "", true
	}
	fs := flag.NewFlagSet("bench-collector", flag.ContinueOnError)
	fs.StringVar(&p.collector, "collector", "bin/collector", "the collector")
	fs.StringVar(&p.peer, "peer", ".cache/peers/otelcol/otelcol", "an OpenTelemetry Collector; where there is none it is left out")
	fs.StringVar(&p.cache, "cache", ".cache/bench", "folder for collector.json and what is read")
	fs.StringVar(&p.docs, "docs", p.docs, "page to write; empty is none")
	fs.Int64Var(&p.bytes, "bytes", p.bytes, "of log files")
	fs.IntVar(&p.rounds, "rounds", p.rounds, "how often each is measured; the median counts")
	if err := fs.Parse(args); err != nil {
		return p, err
	}
	if p.rounds < 1 || p.bytes < 1_000_000 {
		return p, errors.New("--rounds and --bytes: at least 1 and 1000000")
	}
	if _, err := os.Stat(p.collector); err != nil {
		return p, fmt.Errorf("--collector: %w", err)
	}
	return p, nil
}

// contestant is a collector with a way out.
type contestant struct {
	name, to string
	command  []string // the configuration's path is added
	config   string   // template
}

func (p plan) contestants(ctx context.Context, dir string) (out []contestant, notes []string) {
	ours := []string{p.collector, "--config"}
	for _, c := range []struct{ to, output string }{
		{"null", "discard: {}"},
		{"bulk", `elasticsearch: {addresses: ["http://%s"]}`},
		{"forward", `fluentd: {address: "%s"}`},
		{"otlp", `otlp: {endpoint: "http://%s"}`},
	} {
		config := fmt.Sprintf(ourConfig, strings.ReplaceAll(c.output, "%s", "{{.Backend}}"))
		// Which outputs there are, the collector knows itself.
		if err := check(ctx, dir, ours, config); err != nil {
			notes = append(notes, fmt.Sprintf("outrigger to %s is not measured: the collector has no such output", c.to))
			continue
		}
		out = append(out, contestant{"outrigger", c.to, ours, config})
	}
	if _, err := os.Stat(p.peer); err != nil {
		return out, append(notes, "The OpenTelemetry Collector is not measured: deploy/peers/otelcol.sh builds it.")
	}
	peer := []string{p.peer, "--config"}
	return append(out,
			contestant{"otelcol", "null", peer, fmt.Sprintf(peerConfig, "  nop:\n", "nop")},
			contestant{"otelcol", "otlp", peer, fmt.Sprintf(peerConfig, peerOTLP, "otlp_http")},
		), append(notes, "The OpenTelemetry Collector sends OTLP over HTTP with gzip: no version of its elasticsearchexporter could be built where this was measured.",
			"Fluent Bit and Vector are not measured: neither could be had where this was measured.")
}

const ourConfig = `admin: {{.Admin}}
dataDir: {{.Data}}
node: bench
logs:
  folder: {{.Logs}}
  outputs: [o]
outputs:
  o: { %s }
`

const peerConfig = `extensions:
  file_storage: {directory: {{.Data}}}
receivers:
  file_log:
    include: [{{.Logs}}/*/*/*.log]
    start_at: beginning
    include_file_path: true
    storage: file_storage
    retry_on_failure: {enabled: true, max_elapsed_time: 0s}
    operators: [{type: container}]
processors:
  batch: {send_batch_size: 1000, send_batch_max_size: 1000, timeout: 200ms}
exporters:
%s
service:
  extensions: [file_storage]
  telemetry: {metrics: {level: none}, logs: {level: warn}}
  pipelines:
    logs: {receivers: [file_log], processors: [batch], exporters: [%s]}
`

const peerOTLP = `  otlp_http:
    endpoint: http://{{.Backend}}
    compression: gzip
    retry_on_failure: {enabled: true, max_elapsed_time: 0s}
    sending_queue: {enabled: true, queue_size: 10, num_consumers: 2, block_on_overflow: true}
`

func check(ctx context.Context, dir string, command []string, config string) error {
	path := filepath.Join(dir, "check.yaml")
	config = strings.NewReplacer("{{.Admin}}", "127.0.0.1:0", "{{.Data}}", dir, "{{.Logs}}", dir, "{{.Backend}}", "127.0.0.1:1").Replace(config)
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return err
	}
	return exec.CommandContext(ctx, command[0], append(command[1:], path, "--check")...).Run()
}

func run(ctx context.Context, args []string, getenv func(string) string) error {
	p, err := parse(args, getenv)
	if err != nil {
		return err
	}
	work := filepath.Join(p.cache, "collector-run")
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.MkdirAll(work, 0o755); err != nil {
		return err
	}
	work, err = filepath.Abs(work)
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }() // it is remade anyway
	say("writing %d MB of lines", p.bytes/1e6)
	logs := filepath.Join(work, "pods")
	written, err := writeAll(logs, p.bytes)
	if err != nil {
		return err
	}
	contestants, notes := p.contestants(ctx, work)
	all := results{Machine: machine(), Bytes: written.bytes, Lines: written.lines, Rounds: p.rounds, Notes: notes, Targets: targets()}
	b := &bench{plan: p, work: work, logs: logs, written: written}
	for round := range p.rounds {
		for _, c := range contestants {
			ctx, cancel := context.WithTimeout(ctx, oneRound)
			r, err := b.throughput(ctx, c)
			cancel()
			if err != nil {
				all.Notes = append(all.Notes, fmt.Sprintf("%s to %s failed: %v", c.name, c.to, err))
				say("%s to %s: %v", c.name, c.to, err)
				continue
			}
			say("round %d: %s to %s: %.1f MB/s, %.1f CPU seconds/GB, at most %.0f MiB", round+1, c.name, c.to, r.Rate, r.CPU, r.RSS)
			all.add(r)
		}
	}
	for _, c := range contestants {
		if c.to != "bulk" && (c.to != "otlp" || c.name == "outrigger") {
			continue
		}
		for _, m := range []string{"paced", "idle", "down"} {
			r, err := b.memory(ctx, c, m)
			if err != nil {
				all.Notes = append(all.Notes, fmt.Sprintf("memory of %s, %s, failed: %v", c.name, m, err))
				say("%s %s: %v", c.name, m, err)
				continue
			}
			say("%s %s: at most %.0f MiB, %.3f processors", c.name, m, r.RSS, r.CPU)
			all.Memory = append(all.Memory, r)
		}
	}
	text, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(p.cache, "collector.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	fmt.Println(all.table())
	if p.docs != "" {
		return os.WriteFile(p.docs, []byte(all.page()), 0o644)
	}
	return ctx.Err()
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench-collector: "+format+"\n", args...)
}
