// Package pipeline carries log records from the files to one output, and
// accounts for every one of them.
//
//	files -> follower -> rules -> batch -> output -> ledger -> checkpoint
//
// Each output has a Pipeline of its own, with its own cursor over the files, so
// a dead output delays no other. A Pipeline reads only as much as its output
// has credit for. It owns what an output must not: retries, backoff, the circuit
// breaker, how many batches are under way, dead letters, and the rule that the
// checkpoint moves only when the backend has acknowledged a record or a stated
// cause has taken it.
//
// It does not know backends (package output) nor how files are followed
// (package tail). The collector's main makes the Pipelines and runs them.
package pipeline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/outrigger-mesh/outrigger/atomicfile"
	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Config of a Pipeline. Zero values mean the defaults.
type Config struct {
	Name    string      // of the output, as the user calls it
	Tail    tail.Config // what is followed; the pipeline adds the policy
	DataDir string      // checkpoints, dead letters and reasons
	// Rules decide on every record. Nil is an empty configuration's: parse, join
	// stack traces, keep all. New lets their quotas go on from what a former process
	// has counted.
	Rules *rules.Set
	// Meter, if there is one, is told of every record.
	Meter Meter

	MaxRecords int           // in a batch; default 2000
	MaxBytes   int           // of bodies in a batch; default 1 MiB
	Linger     time.Duration // that a batch waits to be full; default 200 ms

	InFlight      int   // records read and not settled; default 16384
	InFlightBytes int64 // of their bodies; default 16 MiB

	// CheckpointEvery is how often a checkpoint is saved that changed: what was acknowledged
	// since is sent again after a crash. Ten times as long as the last one took, if that
	// is more. Default 200 ms.
	CheckpointEvery time.Duration
	WriteTimeout    time.Duration // of one attempt; default 60 s
	StopTimeout     time.Duration // for the attempt that is under way at stop; default 10 s
	MinBackoff      time.Duration // default 100 ms
	MaxBackoff      time.Duration // default 30 s
	BreakerFailures uint32        // in a row that open the breaker; default 5
	BreakerOpen     time.Duration // at most, until it lets one attempt through; default 10 s
	MaxDeadLetters  int64         // bytes of the file; default 64 MiB

	Sweep time.Duration // default 500 ms
	// FullSweep is of everything, where hints are to be had. It becomes rarer, up to
	// twelve times, while it finds nothing that no hint told of. Default 5 s.
	FullSweep time.Duration
	// NoHints is for tests whose clock is a fake one: a goroutine that waits
	// for the kernel would stop it.
	NoHints bool
}

func (c Config) withDefaults() Config {
	def(&c.MaxRecords, 2000)
	def(&c.MaxBytes, 1<<20)
	def(&c.Linger, 200*time.Millisecond)
	def(&c.InFlight, 16384)
	def(&c.InFlightBytes, 16<<20)
	def(&c.CheckpointEvery, 200*time.Millisecond)
	def(&c.WriteTimeout, time.Minute)
	def(&c.StopTimeout, 10*time.Second)
	def(&c.MinBackoff, 100*time.Millisecond)
	def(&c.MaxBackoff, 30*time.Second)
	def(&c.BreakerFailures, 5)
	def(&c.BreakerOpen, 10*time.Second)
	def(&c.MaxDeadLetters, 64<<20)
	def(&c.Sweep, 500*time.Millisecond)
	def(&c.FullSweep, 5*time.Second)
	return c
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Pipeline carries records to one output. Run may be called once; Audit from
// any goroutine, before, during and after it.
type Pipeline struct {
	cfg     Config
	out     output.Output
	log     *slog.Logger
	metrics *Metrics
	tailM   *tail.Metrics

	book *book
	dead *deadLetters
	why  *reasons
	// whyFile is for New, then the saver, then Run's end.
	whyFile *keptFile
	// quotas, and quotasSaved, the rules' Counts of what it holds, likewise.
	quotas      *keptFile
	quotasSaved uint64
	queue       chan *batch
	spare       chan *batch   // to be filled again
	freed       chan struct{} // credit came back

	records atomic.Int64 // in flight
	bytes   atomic.Int64

	reading reading // of the reader alone

	// replaying: there may be files of replayed dead letters.
	replaying atomic.Bool

	traits  output.Traits
	breaker *breaker
	limiter *limiter
	// saveFailed is when the last failure to save was told. New uses it, and then the saver.
	saveFailed time.Time
}

// New opens the checkpoint and the dead letters. It fails where they could not
// be written later; a damaged checkpoint is set aside and told, and the files
// are read from their beginning.
func New(cfg Config, out output.Output, log *slog.Logger, m *Metrics, tm *tail.Metrics) (*Pipeline, error) {
	cfg = cfg.withDefaults()
	traits := out.Traits()
	traits.Concurrency = max(1, traits.Concurrency)
	if n := traits.MaxRecords; n > 0 {
		cfg.MaxRecords = min(cfg.MaxRecords, n)
	}
	if n := traits.MaxBytes; n > 0 {
		cfg.MaxBytes = min(cfg.MaxBytes, n)
	}
	log = log.With("outrigger.output", cfg.Name)
	if cfg.Rules == nil {
		var err error
		if cfg.Rules, err = rules.Compile(rules.Config{}, cfg.Name, []string{cfg.Name}); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(cfg.DataDir, 0o750); err != nil {
		return nil, fmt.Errorf("dataDir %s cannot be made: %w; name a folder that this user may write to", cfg.DataDir, err)
	}
	p := &Pipeline{
		cfg: cfg, out: out, log: log, metrics: m, tailM: tm,
		queue:  make(chan *batch, traits.Concurrency+1),
		spare:  make(chan *batch, 2*traits.Concurrency+2),
		freed:  make(chan struct{}, 1),
		traits: traits, limiter: newLimiter(traits.Concurrency, m.concurrency.WithLabelValues(cfg.Name)),
	}
	l, err := p.load()
	if err != nil {
		return nil, err
	}
	p.loadReasons()
	p.loadQuotas()
	p.book = newBook(l, cfg.Name, m)
	// The first save tells of a folder that cannot be written to before anything
	// is read. A disk that is full is no reason not to start: space may come, and
	// other outputs need none.
	if err := p.save(); err != nil {
		if !full(err) {
			return nil, err
		}
		p.tellSave(err)
	}
	p.dead = &deadLetters{path: filepath.Join(cfg.DataDir, cfg.Name+".dead-letters.ndjson"), max: cfg.MaxDeadLetters}
	p.replaying.Store(true) // a former process may have left some
	p.breaker = newBreaker(cfg, log, m)
	m.init(cfg.Name)
	return p, nil
}

// Run carries records until ctx ends. It then lets the attempt that is under
// way end, so that what the backend took is known, saves the checkpoint and
// returns the error of that, if any. It does not close the output.
func (p *Pipeline) Run(ctx context.Context) error {
	var hints *tail.Hints
	if !p.cfg.NoHints {
		h, err := tail.NewHints(p.log)
		if err != nil {
			p.log.Warn("no hints from the kernel; sweeping every folder instead, which costs more", "error.message", err.Error())
		} else {
			hints = h
		}
	}
	p.reading.programs = map[*record.Resource]*rules.Program{}
	tc := p.cfg.Tail
	tc.Policy = p.policy
	tc.Files = append(slices.Clone(tc.Files), p.replayed())
	f := tail.New(tc, p.book, p.log, p.tailM)

	var work sync.WaitGroup
	work.Go(func() { p.read(ctx, f, hints) })
	work.Go(func() { p.ship(ctx) })
	stopped := make(chan struct{})
	var saver sync.WaitGroup
	saver.Go(func() { p.keepSaving(stopped) })
	work.Wait()
	close(stopped)
	saver.Wait()

	p.saveReasons(true)
	p.saveQuotas(true) // before the checkpoint, as always
	errs := []error{p.save(), f.Close(), p.dead.close()}
	if hints != nil {
		errs = append(errs, hints.Close())
	}
	p.measure()
	return errors.Join(errs...)
}

// read drives the follower.
func (p *Pipeline) read(ctx context.Context, f *tail.Follower, hints *tail.Hints) {
	var signal chan struct{}
	var watch func(string)
	if hints != nil {
		signal, watch = hints.C, hints.Watch
	}
	ticker := time.NewTicker(p.cfg.Sweep)
	defer ticker.Stop()
	linger := time.NewTimer(time.Hour)
	defer linger.Stop()
	lastFull, lost, every := time.Now(), false, p.cfg.FullSweep
	f.Sweep(true, nil, watch)
	f.Missed() // the first finds all
	for ctx.Err() == nil {
		more := true
		for more && p.credit() && ctx.Err() == nil {
			more = f.Read(p.take)
			p.settleDropped()
		}
		waits := p.push(false)
		var freed chan struct{}
		if more || waits == 0 {
			freed = p.freed
		}
		var lingered <-chan time.Time
		if waits > 0 {
			linger.Reset(waits)
			lingered = linger.C
		}
		var full bool
		var changed []string
		select {
		case <-ctx.Done():
			return
		case <-freed:
			continue
		case <-lingered:
			continue
		case <-ticker.C:
			full = hints == nil || time.Since(lastFull) >= every
			f.Measure()
			p.book.clock(time.Now())
		case <-signal:
			// Writes come by the thousand; one look serves them all.
			pause(ctx, 20*time.Millisecond)
		}
		if hints != nil {
			written, folders, more := hints.Take()
			lost = lost || more
			for _, path := range written {
				f.Touch(path)
			}
			changed = folders
			full = full || lost && time.Since(lastFull) >= p.cfg.Sweep || p.above(folders)
		}
		routine := full && !lost && len(changed) == 0
		f.Sweep(full, changed, watch)
		if full {
			lastFull, lost = time.Now(), false
		}
		switch {
		case routine && f.Missed():
			every = p.cfg.FullSweep
		case routine:
			every = min(2*every, 12*p.cfg.FullSweep)
		}
	}
}

// above reports whether one of the folders is not a container's: a pod or a
// container came or went.
func (p *Pipeline) above(folders []string) bool {
	for _, folder := range folders {
		rel, err := filepath.Rel(p.cfg.Tail.Folder, folder)
		if err != nil || filepath.Dir(rel) == "." {
			return true
		}
	}
	return false
}

// credit reports whether reading is worth while. A quarter of the credit has to
// be free, or every record that comes back would cost a read of its own.
func (p *Pipeline) credit() bool {
	return p.records.Load() <= int64(p.cfg.InFlight)*3/4 && p.bytes.Load() <= p.cfg.InFlightBytes*3/4 &&
		!(p.full() && len(p.queue) == cap(p.queue))
}

// Audit is the account of an output, in bytes of log files.
type Audit struct {
	Output string `json:"output"`
	Kind   string `json:"kind"`
	// Breaker is closed, half-open or open.
	Breaker string        `json:"breaker"`
	Total   ledger.Totals `json:"total"`
	// Deleted is the part of Total in files that are gone and settled.
	Deleted ledger.Totals      `json:"deleted"`
	Files   []ledger.Statement `json:"files"`
	// Rows are the same sums by owner and hour.
	Rows []ledger.Row `json:"rows"`
}

// Audit returns the account as it stands.
func (p *Pipeline) Audit() Audit {
	p.book.mu.Lock()
	defer p.book.mu.Unlock()
	return Audit{
		Output: p.cfg.Name, Kind: p.out.Kind(), Breaker: p.breaker.name(),
		Total: p.book.l.Total(), Deleted: p.book.l.Past(), Files: p.book.l.Files(), Rows: p.book.l.Rows(),
	}
}

// Name of the output.
func (p *Pipeline) Name() string { return p.cfg.Name }

// InUse reports whether the account of a file of the pod with this UID is open.
func (p *Pipeline) InUse(uid string) bool {
	_, ok := p.book.Find(func(_, path string) bool { return strings.Contains(path, "_"+uid+"/") })
	return ok
}

// PendingIn is how many bytes of files below the folder are not settled.
func (p *Pipeline) PendingIn(folder string) int64 {
	p.book.mu.Lock()
	defer p.book.mu.Unlock()
	below := folder + string(filepath.Separator)
	return p.book.l.PendingOf(func(path string) bool { return strings.HasPrefix(path, below) })
}

// Why returns what was dropped and rejected since a moment, by owner and cause, with
// samples. Restarts do not move the moment; the reasons of the last seconds before a crash may
// be missing.
func (p *Pipeline) Why() (since time.Time, reasons []Reason) {
	return p.why.since, p.why.list(p.cfg.Name)
}

func (p *Pipeline) measure() {
	p.metrics.pending.WithLabelValues(p.cfg.Name).Set(float64(p.book.total().Pending))
	p.metrics.inFlight.WithLabelValues(p.cfg.Name).Set(float64(p.records.Load()))
}

// checkpointPath is also where a damaged one stood.
func (p *Pipeline) checkpointPath() string {
	return filepath.Join(p.cfg.DataDir, p.cfg.Name+".checkpoint")
}

func (p *Pipeline) load() (*ledger.Ledger, error) {
	path := p.checkpointPath()
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ledger.New(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	var l *ledger.Ledger
	if info.Size() > ledger.MaxCheckpoint {
		err = fmt.Errorf("%w: it has %d bytes", ledger.ErrDamaged, info.Size())
	} else {
		b, readErr := os.ReadFile(path)
		if readErr != nil {
			return nil, fmt.Errorf("checkpoint: %w", readErr)
		}
		l, err = ledger.Decode(b)
	}
	if err == nil {
		return l, nil
	}
	aside := path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000")
	if renameErr := os.Rename(path, aside); renameErr != nil {
		return nil, fmt.Errorf("checkpoint %s is damaged and cannot be set aside: %w", path, renameErr)
	}
	p.metrics.damaged.Inc()
	p.log.Error("the checkpoint is damaged; it was set aside and all files are read from their beginning, so lines may arrive twice",
		"file.path", aside, "error.message", err.Error())
	return ledger.New(), nil
}

// keepSaving saves the checkpoint while it changes. A disk that is full stops
// neither reading nor shipping: what is shipped and not saved would only be
// shipped twice after a crash.
func (p *Pipeline) keepSaving(stopped <-chan struct{}) {
	timer := time.NewTimer(p.cfg.CheckpointEvery)
	defer timer.Stop()
	for {
		select {
		case <-stopped:
			return
		case <-timer.C:
		}
		p.measure()
		begun := time.Now()
		p.saveQuotas(false) // before the checkpoint: what that settles has been counted
		if err := p.save(); err != nil {
			p.tellSave(err)
		}
		p.saveReasons(false)
		if err := p.clearReplayed(); err != nil {
			p.log.Warn("a file of replayed dead letters cannot be deleted", "error.message", err.Error())
		}
		timer.Reset(max(p.cfg.CheckpointEvery, 10*time.Since(begun)))
	}
}

func (p *Pipeline) tellSave(err error) {
	p.metrics.checkpointErrors.Inc()
	if time.Since(p.saveFailed) >= time.Minute {
		p.saveFailed = time.Now()
		p.log.Error("cannot save the checkpoint; until it is saved a crash would send lines twice", "file.path", p.cfg.DataDir, "error.message", err.Error())
	}
}

// full reports whether a file could not grow: no space, or over a quota or a
// limit on the size of files.
func full(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}

// save writes the checkpoint if it changed, by way of a second file, so that
// there is a whole one at every moment. The dead letters go first: the
// checkpoint must not say that a record is in them before it is.
func (p *Pipeline) save() error {
	if p.dead != nil {
		if err := p.dead.sync(); err != nil {
			return err
		}
	}
	b, epoch, err := p.book.snapshot()
	if err != nil || b == nil {
		return err
	}
	if err := atomicfile.Write(p.checkpointPath(), b, 0o600); err != nil {
		p.book.touch()
		return fmt.Errorf("checkpoint: %w; free space in dataDir %s, or move dataDir to a folder that this user may write to", err, p.cfg.DataDir)
	}
	p.book.saved(epoch)
	return nil
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
