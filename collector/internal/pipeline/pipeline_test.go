package pipeline_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/pipeline"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// backend is an output that keeps bodies and answers as it is told.
type backend struct {
	mu       sync.Mutex
	answer   func(batch []*record.Record) output.Result // nil: takes everything
	got      map[string]int
	attempts []attempt

	concurrency int
}

type attempt struct {
	at   time.Time
	size int
}

func (*backend) Kind() string            { return "fake" }
func (b *backend) Traits() output.Traits { return output.Traits{Concurrency: b.concurrency} }
func (*backend) Close() error            { return nil }

func (b *backend) Write(_ context.Context, batch []*record.Record) output.Result {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.attempts = append(b.attempts, attempt{time.Now(), len(batch)})
	var r output.Result
	if b.answer != nil {
		r = b.answer(batch)
	}
	if r.Err != nil || r.TooLarge {
		return r
	}
	out := map[int]bool{}
	for _, i := range r.Retry {
		out[i] = true
	}
	for _, x := range r.Rejected {
		out[x.Index] = true
	}
	if b.got == nil {
		b.got = map[string]int{}
	}
	for i, rec := range batch {
		if !out[i] {
			b.got[rec.Body]++
		}
	}
	return r
}

func (b *backend) count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := 0
	for _, c := range b.got {
		n += c
	}
	return n
}

func (b *backend) sizes() (out []int) {
	for _, a := range b.attempts {
		out = append(out, a.size)
	}
	return out
}

type rig struct {
	t   *testing.T
	cfg pipeline.Config
	reg *prometheus.Registry
	m   *pipeline.Metrics
	tm  *tail.Metrics

	written atomic.Int64
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{t: t, reg: prometheus.NewRegistry()}
	r.cfg = pipeline.Config{Name: "out", Tail: tail.Config{Folder: t.TempDir(), Node: "n1"}, DataDir: t.TempDir(), NoHints: true}
	var err error
	if r.m, err = pipeline.NewMetrics(r.reg); err != nil {
		t.Fatal(err)
	}
	if r.tm, err = tail.NewMetrics(r.reg); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) open(b *backend) *pipeline.Pipeline {
	r.t.Helper()
	p, err := pipeline.New(r.cfg, b, slog.New(slog.DiscardHandler), r.m, r.tm)
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// run starts a pipeline and returns what stops it and waits.
func (r *rig) run(p *pipeline.Pipeline) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Error(err)
		}
	}
}

func (r *rig) write(log string, from, to int) {
	r.t.Helper()
	var b strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&b, "2026-11-23T02:00:00.%09dZ stdout F line %d\n", i, i)
	}
	path := filepath.Join(r.cfg.Tail.Folder, log)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		r.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := f.WriteString(b.String()); err != nil {
		r.t.Fatal(err)
	}
	r.written.Add(int64(b.Len()))
	if err := f.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// deadLetters returns the bodies in the dead letters by their reason.
func (r *rig) deadLetters() map[string]string {
	r.t.Helper()
	out := map[string]string{}
	f, err := os.Open(filepath.Join(r.cfg.DataDir, "out.dead-letters.ndjson"))
	if errors.Is(err, os.ErrNotExist) {
		return out
	}
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var d struct {
			Reason string
			Record map[string]any
		}
		if err := json.Unmarshal(lines.Bytes(), &d); err != nil {
			r.t.Fatalf("dead letter %q: %v", lines.Text(), err)
		}
		out[d.Record["body"].(string)] = d.Reason
	}
	return out
}

func (r *rig) metric(name string, labels ...string) float64 {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	series:
		for _, m := range f.GetMetric() {
			for _, want := range labels {
				found := false
				for _, l := range m.GetLabel() {
					found = found || l.GetName()+"="+l.GetValue() == want
				}
				if !found {
					continue series
				}
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

const cart = "shop_cart-0_u1/app/0.log"

// Every kind of verdict in one batch: three are taken, two are sent again alone
// and later than the backend asked, one is a dead letter. The account closes.
func TestVerdicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 6)
		first := true
		b := &backend{answer: func(batch []*record.Record) output.Result {
			if !first {
				return output.Result{}
			}
			first = false
			return output.Result{Retry: []int{1, 4}, Rejected: []output.Rejection{{Index: 2, Reason: "mapper_parsing_exception"}}, RetryAfter: 7 * time.Second}
		}}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(30 * time.Second)
		stop()
		if d := cmp.Diff([]int{6, 2}, b.sizes()); d != "" {
			t.Fatalf("attempts (-want +got):\n%s", d)
		}
		if wait := b.attempts[1].at.Sub(b.attempts[0].at); wait != 7*time.Second {
			t.Errorf("sent again after %v; the backend asked for 7s", wait)
		}
		if d := cmp.Diff(map[string]string{"line 2": "mapper_parsing_exception"}, r.deadLetters()); d != "" {
			t.Errorf("dead letters (-want +got):\n%s", d)
		}
		a := p.Audit()
		if a.Total.Pending != 0 || a.Total.Dropped["rejected"] != 47 || a.Total.Written != 6*47 {
			t.Errorf("account %+v", a.Total)
		}
		for name, want := range map[string]float64{"outrigger_output_retries_total": 1, "outrigger_log_dropped_total": 1, "outrigger_log_pending_bytes": 0, "outrigger_log_bytes_total": 5 * 47} {
			if got := r.metric(name); got != want {
				t.Errorf("%s = %v; want %v", name, got, want)
			}
		}
		if got := r.metric("outrigger_log_records_total", "result=acknowledged"); got != 5 {
			t.Errorf("records acknowledged: %v; want 5", got)
		}
		if problems, err := testutil.GatherAndLint(r.reg); err != nil || len(problems) > 0 {
			t.Errorf("metrics: %v %v", problems, err)
		}
	})
}

// A backend that is down: backoff, then the breaker opens and lets one attempt
// through, at last each ten seconds; nothing is read beyond the credit, nothing is lost.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.InFlight = 100
		r.write(cart, 0, 1000)
		down := true
		b := &backend{answer: func([]*record.Record) output.Result {
			if down {
				return output.Result{Err: errors.New("connection refused")}
			}
			return output.Result{}
		}}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(60 * time.Second)
		synctest.Wait()
		b.mu.Lock()
		if n := len(b.attempts); n < 5+8 || n > 5+16 {
			t.Errorf("%d attempts in a minute; want the 5 that open the breaker, and probes after 0.5, 1, 2, 4, 8 and 10 s or half of that", n)
		}
		down = false
		b.mu.Unlock()
		if s := r.metric("outrigger_output_breaker_state"); s != 2 {
			t.Errorf("breaker state is %v; want 2 (open)", s)
		}
		if n := r.metric("outrigger_log_in_flight_records"); n < 100 || n > 110 {
			t.Errorf("%v records in flight; the credit is 100", n)
		}
		if a := p.Audit(); a.Breaker != "open" || a.Total.Acknowledged != 0 || a.Total.Pending != a.Total.Written || a.Total.Written == 0 {
			t.Errorf("account while down: %+v", a)
		}
		time.Sleep(60 * time.Second)
		synctest.Wait()
		if n := b.count(); n != 1000 {
			t.Errorf("%d lines after it came back; want 1000", n)
		}
		stop()
		if a := p.Audit(); a.Breaker != "closed" || a.Total.Pending != 0 {
			t.Errorf("account at the end: %+v", a.Total)
		}
	})
}

// How long after a backend is back shipping goes on: short outages have short ends.
func TestRecovery(t *testing.T) {
	for outage, most := range map[time.Duration]time.Duration{
		2 * time.Second:  2500 * time.Millisecond,
		5 * time.Second:  5 * time.Second,
		10 * time.Minute: 10 * time.Second,
	} {
		t.Run(outage.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.write(cart, 0, 1000)
				began := time.Now()
				var probes []time.Time
				var arrived time.Time
				b := &backend{}
				b.answer = func([]*record.Record) output.Result {
					if time.Since(began) < outage {
						probes = append(probes, time.Now())
						return output.Result{Err: errors.New("connection refused")}
					}
					if arrived.IsZero() {
						arrived = time.Now()
					}
					return output.Result{}
				}
				stop := r.run(r.open(b))
				time.Sleep(outage + time.Minute)
				synctest.Wait()
				stop()
				b.mu.Lock()
				defer b.mu.Unlock()
				if late := arrived.Sub(began) - outage; arrived.IsZero() || late > most {
					t.Errorf("shipping goes on %v after an outage of %v; want %v at most", late, outage, most)
				}
				for i := 6; i < len(probes); i++ {
					if gap := probes[i].Sub(probes[i-1]); gap < firstProbe/2 || gap > 10*time.Second {
						t.Errorf("probe %d comes %v after the one before", i, gap)
					}
				}
			})
		})
	}
}

const firstProbe = 500 * time.Millisecond

// What the backend asks for holds for all senders, with the breaker open or not.
func TestRetryAfterHoldsEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.MaxRecords = 100
		r.write(cart, 0, 2000)
		asked, busy := 0, time.Time{}
		b := &backend{concurrency: 4}
		b.answer = func([]*record.Record) output.Result {
			// What was under way when another was answered comes at the same time.
			if since := time.Since(busy); since > 0 && since < 20*time.Second {
				t.Errorf("request %d comes %v after an answer that asked for 20s", asked, since)
			}
			if asked++; asked%5 == 0 || asked > 10 && asked < 18 {
				busy = time.Now()
				return output.Result{Err: errors.New("429"), RetryAfter: 20 * time.Second}
			}
			return output.Result{}
		}
		stop := r.run(r.open(b))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		stop()
		if n := b.count(); n != 2000 {
			t.Errorf("%d lines; want 2000", n)
		}
		if asked < 24 {
			t.Errorf("%d requests", asked)
		}
	})
}

// 413 halves the batch until the one record that is too large is alone.
func TestTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 8)
		b := &backend{answer: func(batch []*record.Record) output.Result {
			for _, rec := range batch {
				if rec.Body == "line 5" {
					return output.Result{Err: errors.New("413"), TooLarge: true}
				}
			}
			return output.Result{}
		}}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(5 * time.Second)
		stop()
		if d := cmp.Diff([]int{8, 4, 4, 2, 1, 1, 2}, b.sizes()); d != "" {
			t.Errorf("attempts (-want +got):\n%s", d)
		}
		if d := cmp.Diff(map[string]string{"line 5": "the backend refused it as too large: 413"}, r.deadLetters()); d != "" {
			t.Errorf("dead letters (-want +got):\n%s", d)
		}
		if n := b.count(); n != 7 || p.Audit().Total.Pending != 0 {
			t.Errorf("%d lines arrived, %+v", n, p.Audit().Total)
		}
	})
}

// An output that names a record twice, or one that is not there, is not
// believed at all.
func TestVerdictOutOfRange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 3)
		answers := []output.Result{{Retry: []int{3}}, {Retry: []int{1}, Rejected: []output.Rejection{{Index: 1}}}}
		b := &backend{answer: func([]*record.Record) output.Result {
			if len(answers) == 0 {
				return output.Result{}
			}
			a := answers[0]
			answers = answers[1:]
			return a
		}}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(5 * time.Second)
		stop()
		if d := cmp.Diff([]int{3, 3, 3}, b.sizes()); d != "" || p.Audit().Total.Pending != 0 {
			t.Errorf("account %+v; attempts (-want +got):\n%s", p.Audit().Total, d)
		}
	})
}

// Stopped while an attempt is under way: its answer is waited for, so nothing
// is sent twice after the restart.
func TestCleanRestartSendsNothingTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.MaxRecords = 10
		r.write(cart, 0, 500)
		b := &backend{answer: func([]*record.Record) output.Result {
			time.Sleep(100 * time.Millisecond)
			return output.Result{}
		}}
		for i := range 12 {
			stop := r.run(r.open(b))
			time.Sleep(time.Duration(170+37*i) * time.Millisecond)
			stop()
		}
		stop := r.run(r.open(b))
		time.Sleep(20 * time.Second)
		stop()
		if len(b.got) != 500 || b.count() != 500 {
			t.Errorf("%d lines arrived, %d of them different; want 500 each once", b.count(), len(b.got))
		}
	})
}

func TestDamagedCheckpointIsSetAside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 3)
		path := filepath.Join(r.cfg.DataDir, "out.checkpoint")
		if err := os.WriteFile(path, []byte("outrigger-checkpoint 1 00000000 2\n{}"), 0o600); err != nil {
			t.Fatal(err)
		}
		b := &backend{}
		stop := r.run(r.open(b))
		time.Sleep(5 * time.Second)
		stop()
		aside, err := filepath.Glob(path + ".damaged-*")
		if err != nil || len(aside) != 1 || b.count() != 3 || r.metric("outrigger_log_checkpoint_damaged_total") != 1 {
			t.Errorf("set aside %v, %v; %d lines read; want one file and 3 lines", aside, err, b.count())
		}
	})
}

// The dead letters are at their limit: records are dropped and counted, and
// the rest goes on. Moved away, the file begins anew.
func TestDeadLettersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.MaxDeadLetters = 1500
		r.write(cart, 0, 10)
		b := &backend{answer: func(batch []*record.Record) output.Result {
			var out output.Result
			for i := range batch {
				out.Rejected = append(out.Rejected, output.Rejection{Index: i, Reason: "no"})
			}
			return out
		}}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(5 * time.Second)
		kept := len(r.deadLetters())
		full := r.metric("outrigger_log_dead_letters_total", "result=full")
		if kept == 0 || kept+int(full) != 10 || p.Audit().Total.Pending != 0 {
			t.Errorf("%d kept, %v over the limit; want 10 together", kept, full)
		}
		path := filepath.Join(r.cfg.DataDir, "out.dead-letters.ndjson")
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
		r.write(cart, 10, 11)
		time.Sleep(5 * time.Second)
		stop()
		if d := cmp.Diff(map[string]string{"line 10": "no"}, r.deadLetters()); d != "" {
			t.Errorf("after it was moved away (-want +got):\n%s", d)
		}
	})
}

func TestDataDirThatCannotBeWritten(t *testing.T) {
	r := newRig(t)
	r.cfg.DataDir = filepath.Join(r.cfg.DataDir, "file")
	if err := os.WriteFile(r.cfg.DataDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := pipeline.New(r.cfg, &backend{}, slog.New(slog.DiscardHandler), r.m, r.tm)
	if err == nil || !strings.Contains(err.Error(), r.cfg.DataDir) {
		t.Errorf("error %v does not name %s", err, r.cfg.DataDir)
	}
}

// Containers write and rotate while the backend fails in every way and the
// collector is stopped and killed again and again. Every line arrives or is a
// dead letter. A kill, which takes the process back to an older checkpoint, may
// send again what was not in it; nothing else may.
func TestEveryLineIsAccountedFor(t *testing.T) {
	for _, kills := range []bool{false, true} {
		t.Run(fmt.Sprintf("kills=%v", kills), func(t *testing.T) {
			r := newRig(t)
			r.cfg.NoHints = false
			r.cfg.MaxRecords, r.cfg.Linger, r.cfg.InFlight = 50, 5*time.Millisecond, 300
			r.cfg.MinBackoff, r.cfg.MaxBackoff, r.cfg.BreakerOpen = time.Millisecond, 10*time.Millisecond, 10*time.Millisecond
			r.cfg.CheckpointEvery, r.cfg.Sweep, r.cfg.FullSweep = 10*time.Millisecond, 20*time.Millisecond, 200*time.Millisecond
			r.cfg.Tail.Grace = 100 * time.Millisecond
			rng := rand.New(rand.NewPCG(7, 7))
			b := &backend{answer: func(batch []*record.Record) output.Result {
				switch rng.IntN(8) {
				case 0:
					return output.Result{Err: errors.New("503")}
				case 1:
					return output.Result{TooLarge: len(batch) > 10, Err: errors.New("413")}
				case 2:
					var out output.Result
					for i := range batch {
						switch rng.IntN(4) {
						case 0:
							out.Retry = append(out.Retry, i)
						case 1:
							if strings.HasSuffix(batch[i].Body, "7") {
								out.Rejected = append(out.Rejected, output.Rejection{Index: i, Reason: "seven"})
							}
						}
					}
					return out
				}
				return output.Result{}
			}}
			const containers, lines = 5, 2000
			var writers sync.WaitGroup
			for c := range containers {
				writers.Go(func() {
					log := fmt.Sprintf("shop_cart-%d_u%d/app/0.log", c, c)
					for i := 0; i < lines; i += 50 {
						r.write(log, c*lines+i, c*lines+i+50)
						if i%500 == 450 {
							path := filepath.Join(r.cfg.Tail.Folder, log)
							if err := os.Rename(path, fmt.Sprintf("%s.20261123-%06d", path, i)); err != nil {
								t.Error(err)
							}
						}
						time.Sleep(5 * time.Millisecond)
					}
				})
			}
			checkpoint := filepath.Join(r.cfg.DataDir, "out.checkpoint")
			for range 8 {
				p := r.open(b)
				stop := r.run(p)
				time.Sleep(40 * time.Millisecond)
				old, err := os.ReadFile(checkpoint)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(40 * time.Millisecond)
				stop()
				if kills {
					if err := os.WriteFile(checkpoint, old, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			p := r.open(b)
			stop := r.run(p)
			writers.Wait()
			deadline := time.Now().Add(30 * time.Second)
			for time.Now().Before(deadline) {
				if a := p.Audit(); a.Total.Written == r.written.Load() && a.Total.Pending == 0 {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			stop()
			dead := r.deadLetters()
			missing, twice := 0, 0
			for i := range containers * lines {
				body := fmt.Sprintf("line %d", i)
				n := b.got[body]
				if _, ok := dead[body]; ok && n == 0 {
					n = 1
				}
				switch {
				case n == 0:
					missing++
				case n > 1:
					twice++
				}
			}
			if missing > 0 || !kills && twice > 0 {
				t.Errorf("%d lines are missing, %d arrived twice\n%+v", missing, twice, p.Audit().Total)
			}
			if a := p.Audit(); a.Total.Pending != 0 || a.Total.Written == 0 {
				t.Errorf("account %+v", a.Total)
			}
			t.Logf("%d attempts, %d dead letters, %d twice", len(b.attempts), len(dead), twice)
		})
	}
}

// The folder of the checkpoints goes away, as on a full disk: shipping goes on,
// what is wrong is told once with the folder's name, and the checkpoint is
// saved when it can be. Nothing is sent twice.
func TestCheckpointThatCannotBeSaved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.cfg.DataDir = filepath.Join(r.cfg.DataDir, "data")
		r.write(cart, 0, 3)
		b := &backend{}
		var log strings.Builder
		p, err := pipeline.New(r.cfg, b, slog.New(slog.NewTextHandler(&log, nil)), r.m, r.tm)
		if err != nil {
			t.Fatal(err)
		}
		stop := r.run(p)
		time.Sleep(2 * time.Second)
		if err := os.Rename(r.cfg.DataDir, r.cfg.DataDir+"-away"); err != nil {
			t.Fatal(err)
		}
		r.write(cart, 3, 6)
		time.Sleep(20 * time.Second)
		if n := b.count(); n != 6 {
			t.Errorf("%d lines shipped; want 6", n)
		}
		if err := os.Rename(r.cfg.DataDir+"-away", r.cfg.DataDir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		stop()
		if n := strings.Count(log.String(), "cannot save the checkpoint"); n != 1 || !strings.Contains(log.String(), r.cfg.DataDir) {
			t.Errorf("told %d times:\n%s", n, log.String())
		}
		if n := r.metric("outrigger_log_checkpoint_errors_total"); n < 10 {
			t.Errorf("%v failures counted", n)
		}
		stop = r.run(r.open(b))
		time.Sleep(5 * time.Second)
		stop()
		if n := b.count(); n != 6 {
			t.Errorf("%d lines after a restart; want 6", n)
		}
	})
}

// One file of plain lines to an output that takes everything at once.
func BenchmarkPipeline(b *testing.B) {
	dir := b.TempDir()
	path := filepath.Join(dir, "pods", cart)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		b.Fatal(err)
	}
	var text strings.Builder
	for i := 0; text.Len() < 64<<20; i++ {
		fmt.Fprintf(&text, "2026-11-23T02:00:00.%09dZ stdout F GET /cart/items/%d 200 in 12 ms from 10.0.0.1 agent=%s\n", i, i, strings.Repeat("x", 100))
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(text.Len()))
	for b.Loop() {
		reg := prometheus.NewRegistry()
		m, err := pipeline.NewMetrics(reg)
		if err != nil {
			b.Fatal(err)
		}
		tm, err := tail.NewMetrics(reg)
		if err != nil {
			b.Fatal(err)
		}
		p, err := pipeline.New(pipeline.Config{Name: "out", Tail: tail.Config{Folder: filepath.Join(dir, "pods")}, DataDir: b.TempDir()}, discard{}, slog.New(slog.DiscardHandler), m, tm)
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		for a := p.Audit(); a.Total.Written == 0 || a.Total.Pending > 0; a = p.Audit() {
			time.Sleep(5 * time.Millisecond)
		}
		cancel()
		if err := <-done; err != nil {
			b.Fatal(err)
		}
	}
}

type discard struct{}

func (discard) Kind() string                                              { return "discard" }
func (discard) Traits() output.Traits                                     { return output.Traits{} }
func (discard) Close() error                                              { return nil }
func (discard) Write(context.Context, []*record.Record) (r output.Result) { return r }

// Dead letters are sent again when somebody says so: with the fields and the origin
// that they had, in the account of a file of their own, which goes when it is settled.
// What is rejected again is a dead letter again.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 4)
		refuse := map[string]bool{"line 1": true, "line 2": true}
		origins := map[string][]record.Origin{}
		b := &backend{}
		b.answer = func(batch []*record.Record) (res output.Result) {
			for i, rec := range batch {
				origins[rec.Body] = append(origins[rec.Body], rec.Origin)
				if refuse[rec.Body] {
					res.Rejected = append(res.Rejected, output.Rejection{Index: i, Reason: "no such field"})
				}
				if rec.Resource.Pod == "" || rec.Stream != "stdout" {
					t.Errorf("%q came without its pod or stream: %+v", rec.Body, rec)
				}
			}
			return res
		}
		p := r.open(b)
		stop := r.run(p)
		time.Sleep(10 * time.Second)
		if got := r.deadLetters(); len(got) != 2 {
			t.Fatalf("dead letters %v", got)
		}
		delete(refuse, "line 1")
		if n, err := p.Replay(); err != nil || n == 0 {
			t.Fatalf("Replay = %d, %v", n, err)
		}
		time.Sleep(20 * time.Second)
		stop()
		if d := cmp.Diff(map[string]string{"line 2": "no such field"}, r.deadLetters()); d != "" {
			t.Errorf("dead letters after the replay (-want +got):\n%s", d)
		}
		if b.got["line 1"] != 1 || b.got["line 2"] != 0 {
			t.Errorf("the backend has %v", b.got)
		}
		for _, line := range []string{"line 1", "line 2"} {
			if o := origins[line]; len(o) != 2 || o[0] != o[1] {
				t.Errorf("%s has the origins %+v", line, o)
			}
		}
		if left, err := filepath.Glob(filepath.Join(r.cfg.DataDir, "out.replay", "*")); err != nil || len(left) != 0 {
			t.Errorf("replayed files stay: %v, %v", left, err)
		}
		if a := p.Audit().Total; a.Pending != 0 || a.Written != a.Acknowledged+a.Dropped["rejected"] {
			t.Errorf("account %+v", a)
		}
		if n, err := r.open(b).Replay(); err != nil || n == 0 {
			t.Errorf("Replay of one letter = %d, %v", n, err)
		}
	})
}

// Why records were dropped is known after a restart, and after a crash.
func TestReasonsSurvive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.write(cart, 0, 3)
		b := &backend{answer: func(batch []*record.Record) output.Result {
			return output.Result{Rejected: []output.Rejection{{Index: 0, Reason: "no"}}}
		}}
		p := r.open(b)
		since, none := p.Why()
		if len(none) != 0 || !since.Equal(time.Now()) {
			t.Errorf("at first: since %v, %v", since, none)
		}
		stop := r.run(p)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		_, want := p.Why()
		if len(want) != 1 || want[0].Pod != "cart-0" || want[0].Rule != "no" || want[0].Records != 1 || want[0].Samples[0] != "line 0" {
			t.Errorf("reasons: %+v", want)
		}
		for _, ended := range []string{"a crash", "a restart"} {
			if ended == "a restart" {
				stop()
			}
			again, got := r.open(b).Why()
			if d := cmp.Diff(want, got); d != "" || !again.Equal(since) {
				t.Errorf("after %s: since %v; want %v (-want +got):\n%s", ended, again, since, d)
			}
		}
	})
}

// What a namespace has used of its day is known after a restart and after a crash.
func TestQuotaSurvives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		b := &backend{}
		var stop func()
		for i, want := range []int{2, 2, 2} {
			var err error
			c := rules.Config{Quotas: []rules.Quota{{Name: "q", BytesPerDay: 13, Action: "drop"}}}
			if r.cfg.Rules, err = rules.Compile(c, "out", []string{"out"}); err != nil {
				t.Fatal(err)
			}
			r.write(cart, 3*i, 3*i+3)
			switch i {
			case 1: // crashed: what the next finds is what was on the disk then
				crashed := t.TempDir()
				if err := os.CopyFS(crashed, os.DirFS(r.cfg.DataDir)); err != nil {
					t.Fatal(err)
				}
				stop()
				r.cfg.DataDir = crashed
			case 2:
				stop()
			}
			stop = r.run(r.open(b))
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if n := b.count(); n != want {
				t.Errorf("after start %d: %d lines; the quota is two a day", i+1, n)
			}
		}
		stop()
		path := filepath.Join(r.cfg.DataDir, "out.quotas")
		if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		r.open(b)
		if _, err := os.Stat(path + ".damaged"); err != nil {
			t.Error(err)
		}
	})
}
