// Package torture is a kit that proves of a log collector that it loses nothing,
// or shows what it loses. It writes numbered lines as a container runtime does,
// rotates, compresses and deletes their files as kubelet does, kills and stops the
// collector, breaks the backend, and judges from the backend's side by a bitmap
// which lines came, how often, in which order and how late.
//
// The collector is a process that is known by its configuration only, so any
// collector can be graded. Of our own the kit also reads the account
// (/api/v1/audit): what did not arrive has to be in it, with a cause.
//
// The backends are the kit's own servers of real protocols: Elasticsearch's bulk
// API, the forward protocol, OTLP over HTTP. They are fakes in that they store
// nothing. A real Elasticsearch can be put behind the first.
//
// Command outrigger runs it; nothing else does.
package torture

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Options of a run. All fields but Folder have a default.
type Options struct {
	// Folder for the logs, the data, and result.json. It is emptied of an earlier
	// run.
	Folder string
	// Command of the collector and Config, the template of its configuration; they
	// may name {{.Logs}}, {{.Data}}, {{.Backend}}, {{.Output}}, {{.Admin}} and
	// {{.Config}}. Without Config it is our own.
	Command string
	Config  string
	Name    string // of the collector, for the table
	// Outputs are elasticsearch, forward and otlp.
	Outputs []string
	// Run names the scenarios; empty is all.
	Run []string
	// Elasticsearch is the URL of a real server behind the kit's; empty is none.
	Elasticsearch string
	Full          bool
	Seed          uint64
	Parallel      int // scenarios at once
	Out           io.Writer
}

// Result is one scenario at one output.
type Result struct {
	Scenario  string `json:"scenario"`
	Output    string `json:"output"`
	Collector string `json:"collector"`
	verdict
	Seconds  float64          `json:"seconds"`
	Audit    map[string]int64 `json:"audit,omitempty"` // bytes, by cause
	Pending  int64            `json:"pending"`         // bytes that the audit calls not settled at the end
	AuditOff int64            `json:"auditOff"`        // bytes by which the audit does not close
	// Unnamed is how many records the collector counts as rejected by a receiver that
	// did not say which.
	Unnamed  int      `json:"unnamed"`
	Skipped  string   `json:"skipped,omitempty"`
	Problems []string `json:"problems,omitempty"` // why it failed, beside the figures
	Seed     uint64   `json:"seed"`
}

// Failed says whether a line was lost that nothing explains, or something else
// went wrong that no figure excuses.
func (r Result) Failed() bool {
	return r.Skipped == "" && (r.Lost > 0 || r.Corrupted > 0 || r.AuditOff != 0 || len(r.Problems) > 0)
}

// keeping are the scenarios in which every answer reaches the collector and is not forgotten
// there, so that it has no reason to send anything twice.
var keeping = []string{
	"steady", "rotate-1-stopped", "rotate-2-stopped", "rotate-5-stopped", "silent", "rotate-fast", "copytruncate", "pods-200ms", "busy-items",
	"slow", "clock-step", "long-lines", "idle-files", "malformed", "symlink", "million-fields",
}

// broken says what else our own collector promises and did not keep: Elasticsearch, which
// knows our ids, has nothing twice, forward only what had to be sent again, and forward, which
// has one request after the other, has the lines of a stream in their order.
func (r Result) broken() (promises []string) {
	if r.Duplicated > 0 && (r.Output == "elasticsearch" || r.Output == "forward" && slices.Contains(keeping, r.Scenario)) {
		promises = append(promises, fmt.Sprintf("%d lines came twice for no reason", r.Duplicated))
	}
	if r.Disordered > 0 && r.Output == "forward" {
		promises = append(promises, fmt.Sprintf("%d lines came after a later one of their stream", r.Disordered))
	}
	return promises
}

// Outputs that the kit has a backend for.
func Outputs() []string { return []string{"elasticsearch", "forward", "otlp"} }

// Scenarios lists the names and what they do.
func Scenarios() [][2]string {
	var out [][2]string
	for _, s := range scenarios() {
		out = append(out, [2]string{s.name, s.what})
	}
	return out
}

// Run runs the scenarios at the outputs and returns the results in the order of
// the table. An error is one of the kit; what the collector does wrong is in the
// results.
func Run(ctx context.Context, o Options) ([]Result, error) {
	all := scenarios()
	var chosen []scenario
	for _, s := range all {
		if len(o.Run) == 0 || slices.Contains(o.Run, s.name) {
			chosen = append(chosen, s)
		}
	}
	for _, name := range o.Run {
		if !slices.ContainsFunc(all, func(s scenario) bool { return s.name == name }) {
			return nil, fmt.Errorf("--run %s: there is no such scenario; outrigger torture --list has all", name)
		}
	}
	for _, name := range o.Outputs {
		if !slices.Contains(Outputs(), name) {
			return nil, fmt.Errorf("--output %s: the kit has no such backend; it has %s", name, strings.Join(Outputs(), ", "))
		}
	}
	if o.Parallel < 1 {
		o.Parallel = 1
	}
	folder, err := filepath.Abs(filepath.Join(o.Folder, "run"))
	if err != nil {
		return nil, err
	}
	if err := removeAll(folder); err != nil {
		return nil, err
	}
	results := make([]Result, len(chosen)*len(o.Outputs))
	tokens := make(chan struct{}, o.Parallel)
	var group sync.WaitGroup
	var mu sync.Mutex
	errs := make([]error, len(results))
	for i, s := range chosen {
		for k, output := range o.Outputs {
			n := i*len(o.Outputs) + k
			tokens <- struct{}{}
			if ctx.Err() != nil {
				<-tokens
				errs[n] = ctx.Err()
				continue
			}
			group.Go(func() {
				defer func() { <-tokens }()
				r, err := one(ctx, o, filepath.Join(folder, s.name+"-"+output), s, output)
				if err != nil {
					errs[n] = fmt.Errorf("%s at %s: %w", s.name, output, err)
				}
				results[n] = r
				mu.Lock()
				defer mu.Unlock()
				fmt.Fprintln(o.Out, line(r))
			})
		}
	}
	group.Wait()
	return results, errors.Join(errs...)
}

// patience is how long nothing may move before what is missing counts as lost.
const patience = 20 * time.Second

// one runs a scenario at an output.
func one(ctx context.Context, o Options, dir string, s scenario, output string) (r Result, err error) {
	started := time.Now()
	r = Result{Scenario: s.name, Output: output, Collector: o.Name, Seed: o.Seed}
	if output == "forward" && slices.Contains([]string{"too-large", "rejects"}, s.name) {
		r.Skipped = "the forward protocol has no such answer"
		return r, nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit(o.Full))
	defer cancel()
	w := &world{
		full: o.Full, logs: filepath.Join(dir, "pods"), data: filepath.Join(dir, "data"), judge: newJudge(), clock: time.Now,
		rand: rand.New(rand.NewPCG(o.Seed, 1)), other: rand.New(rand.NewPCG(o.Seed, 2)),
	}
	for _, d := range []string{w.logs, w.data} {
		if err := os.MkdirAll(d, 0o755); err != nil { //nolint:gosec // as /var/log/pods
			return r, err
		}
	}
	defer func() {
		for _, f := range slices.Backward(w.cleanup) {
			err = errors.Join(err, f())
		}
		if err == nil && !r.Failed() {
			err = os.RemoveAll(dir)
		} else {
			err = errors.Join(err, os.RemoveAll(w.logs)) // its log and its data stay, for people
		}
	}()
	if err := w.prepare(o, output, s.name); err != nil {
		return r, err
	}
	defer w.backend.close()
	config := o.Config
	ours := config == ""
	if ours {
		config = ourConfig
		if s.name == "inode-reuse" { // a name in the spool would keep the inode
			config = strings.Replace(config, spoolLine, "", 1)
		}
	}
	admin, err := freeAddress()
	if err != nil {
		return r, err
	}
	w.collector, err = configure(dir, o.Command, config, settings{
		Logs: w.logs, Data: w.data, Backend: w.backend.address(), Output: w.backend.settings(), Admin: admin,
	}, ours)
	if err != nil {
		return r, err
	}
	if err := w.collector.start(); err != nil {
		return r, err
	}
	defer w.collector.kill()
	if err := w.collector.ready(ctx); err != nil {
		return r, err
	}

	problem := func(format string, args ...any) { r.Problems = append(r.Problems, fmt.Sprintf(format, args...)) }
	if err := s.run(ctx, w); err != nil {
		var no skipped
		if errors.As(err, &no) {
			r.Skipped = no.reason
			return r, nil
		}
		problem("%v", err)
	}
	w.backend.set(fault{})
	if err := errors.Join(w.backend.up(), w.settle(ctx, patience)); err != nil {
		problem("%v", err)
	}
	if err := w.backend.collect(ctx); err != nil {
		problem("%v", err)
	}
	w.settleAudit(ctx, &r)
	if _, crashes := w.collector.report(); len(crashes) > 0 {
		problem("the collector ended by itself %d times: %s", len(crashes), crashes[0])
	}
	if !w.collector.end(sigterm, 15*time.Second) {
		problem("the collector did not end within 15 s after SIGTERM")
	}
	absences, _ := w.collector.report()
	var dropped int64
	for _, n := range r.Audit {
		dropped += n
	}
	r.verdict = w.judge.verdict(w.sources, dropped, r.Unnamed, absences)
	if ours {
		r.Problems = append(r.Problems, r.broken()...)
	}
	r.Seconds = time.Since(started).Round(100 * time.Millisecond).Seconds()
	return r, nil
}

// limit of one scenario.
func limit(full bool) time.Duration {
	if full {
		return 15 * time.Minute
	}
	return 3 * time.Minute
}

// prepare starts the backend.
func (w *world) prepare(o Options, output, scenario string) (err error) {
	switch output {
	case "forward":
		w.backend, err = newForward(w.judge, "")
	case "otlp":
		w.backend, err = newOTLP(w.judge)
	default:
		var e *elasticsearch
		dataset := fmt.Sprintf("torture_%s_%d", strings.ReplaceAll(scenario, "-", "_"), time.Now().UnixNano())
		if e, err = newElasticsearch(w.judge, o.Elasticsearch, dataset); err == nil && o.Elasticsearch != "" {
			w.late = e.stored
		}
		w.backend = e
	}
	return err
}

// settleAudit reads the account of our own collector, as soon as nothing is
// pending in it.
func (w *world) settleAudit(ctx context.Context, r *Result) {
	if w.collector.admin == "" {
		return
	}
	for deadline := time.Now().Add(5 * time.Second); ; {
		a, err := w.collector.audit(ctx)
		switch {
		case err == nil:
			r.Audit, r.Pending, r.AuditOff = a.Dropped, a.Pending, a.off()
			if r.Unnamed, err = w.collector.unnamed(ctx); err != nil {
				r.Problems = append(r.Problems, err.Error())
				return
			}
			if a.Pending == 0 && a.off() == 0 || time.Now().After(deadline) {
				return
			}
		case time.Now().After(deadline) || ctx.Err() != nil:
			r.Problems = append(r.Problems, err.Error())
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}
