package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/load"
)

// bench measures all peers in one scenario.
type bench struct {
	plan     plan
	world    *world
	scenario scenario
	out      io.Writer
	figures  map[string]*figures
}

// Times of a round beside the closed loop, whose length the plan says.
const (
	warmUp = 100 * time.Millisecond // of each loop
	settle = 300 * time.Millisecond // after a start, before memory is read
)

// measure runs memory first, each peer alone and new, then the rounds with all of
// them running. What fails at one peer is noted there; an error is one that ends
// everything.
func (b *bench) measure(ctx context.Context) error {
	fmt.Fprintf(b.out, "\n== %s: %s\n", b.scenario.name, b.scenario.title)
	for _, p := range b.plan.peers {
		b.figures[p.name] = &figures{open: map[int]*latency{}}
	}
	for _, p := range b.plan.peers {
		f := b.figures[p.name]
		err := b.memory(ctx, p, f)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		b.note(p, f, err)
	}
	active := map[string]*running{}
	defer func() {
		for _, r := range active {
			r.stop()
		}
	}()
	for _, p := range b.plan.peers {
		f := b.figures[p.name]
		if f.failed != "" {
			continue
		}
		r, err := b.launch(ctx, p, "rounds")
		active[p.name] = r
		b.note(p, f, err)
	}
	for i := range b.plan.rounds {
		fmt.Fprintf(b.out, "   round %d of %d:", i+1, b.plan.rounds)
		// Each round begins at another peer, so that none is always after the same.
		for j := range b.plan.peers {
			p := b.plan.peers[(i+j)%len(b.plan.peers)]
			f := b.figures[p.name]
			if f.failed != "" {
				continue
			}
			err := b.round(ctx, active[p.name], f)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				b.note(p, f, fmt.Errorf("round %d: %w", i+1, err))
				continue
			}
			fmt.Fprintf(b.out, " %s", p.name)
			if len(f.cpu) > 0 && p.name != "direct" {
				fmt.Fprintf(b.out, " %.1f us", f.cpu[len(f.cpu)-1])
			}
		}
		fmt.Fprintln(b.out)
	}
	for _, p := range b.plan.peers {
		if f := b.figures[p.name]; f.failed == "" && active[p.name] != nil {
			b.note(p, f, active[p.name].countLogs(f, true))
		}
	}
	return nil
}

func (b *bench) note(p peer, f *figures, err error) {
	if err == nil {
		return
	}
	f.failed = err.Error()
	kind := "FAILED"
	if errors.Is(err, errNot) {
		kind = "skipped"
	}
	fmt.Fprintf(b.out, "\n   %s: %s: %v\n", kind, p.name, err)
}

// launch starts a peer and lets it prove that it works.
func (b *bench) launch(ctx context.Context, p peer, phase string) (*running, error) {
	dir := filepath.Join(b.world.dir, b.scenario.name, p.name+"-"+phase)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return &running{}, err
	}
	r, err := p.launch(ctx, b.world, b.scenario, dir)
	if err != nil {
		return r, err
	}
	// It may not listen yet.
	for last := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if err = r.ended(); err != nil {
			return r, err
		}
		if err = b.check(ctx, r); err == nil || time.Now().After(last) || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		err = fmt.Errorf("warm-up: %w", err)
		for _, p := range r.proxies {
			if words := p.words(); words != "" {
				err = fmt.Errorf("%w; %s said: %s", err, p.name, words)
			}
		}
	}
	return r, err
}

func (b *bench) dial(ctx context.Context, r *running, conns, streams int) (*load.Client, error) {
	return load.Dial(ctx, load.Plan{Address: r.address, Protocol: b.scenario.protocol, Connections: conns, Streams: streams})
}

// check asks a few times.
func (b *bench) check(ctx context.Context, r *running) (err error) {
	c, err := b.dial(ctx, r, 1, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for range 3 {
		if _, err := c.Once(ctx, 1); err != nil {
			return err
		}
	}
	return c.Finish(ctx)
}

// memory measures what a new instance holds.
func (b *bench) memory(ctx context.Context, p peer, f *figures) error {
	r, err := b.launch(ctx, p, "memory")
	defer r.stop()
	if err != nil || len(r.proxies) == 0 {
		return err
	}
	time.Sleep(settle)
	if f.rss, err = resident(r.proxies); err != nil {
		return err
	}
	if f.rss64, err = b.idling(ctx, r, 64, nil); err != nil || !b.scenario.idle {
		return err
	}
	heap, before, err := r.heap(ctx)
	if err != nil {
		return err
	}
	// Too many connections fail only this figure.
	f.idle = b.plan.idle
	f.rss10k, err = b.idling(ctx, r, f.idle, func() error {
		h, g, err := r.heap(ctx)
		f.heap, f.routines = (h-heap)/float64(f.idle), (g-before)/float64(f.idle)
		return err
	})
	if err != nil {
		f.idleFailed, f.rss10k = err.Error(), 0
		fmt.Fprintf(b.out, "   FAILED: %s: %v\n", p.name, err)
		return nil
	}
	fmt.Fprintf(b.out, "   memory: %s: %d KiB, %d KiB with 64 and %d KiB with %d idle connections\n", p.name, f.rss, f.rss64, f.rss10k, f.idle)
	return nil
}

// idling opens connections, lets each have one answer, and reads the memory that
// is held while all of them idle.
func (b *bench) idling(ctx context.Context, r *running, n int, also func() error) (kb int, err error) {
	c, err := b.dial(ctx, r, n, 1)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if _, err := c.Once(ctx, 64); err != nil {
		return 0, fmt.Errorf("%d idle connections: %w", n, err)
	}
	time.Sleep(settle)
	if kb, err = resident(r.proxies); err == nil && also != nil {
		err = also()
	}
	return kb, err
}

var (
	heapAlloc = regexp.MustCompile(`(?m)^go_memstats_heap_alloc_bytes ([0-9.e+]+)$`)
	routines  = regexp.MustCompile(`(?m)^go_goroutines ([0-9]+)$`)
)

// readings of the heap of a sidecar: each makes some garbage, so that collections
// happen between them, and the least of all is little more than what is in use.
const readings = 300

// heap is what our sidecars say of their heap in use and their goroutines; zero
// for others.
func (r *running) heap(ctx context.Context) (heapBytes, goroutines float64, err error) {
	value := func(text string, is *regexp.Regexp) (float64, error) {
		found := is.FindStringSubmatch(text)
		if found == nil {
			return 0, fmt.Errorf("metrics of the sidecar: nothing matches %s", is)
		}
		return strconv.ParseFloat(found[1], 64)
	}
	for _, admin := range r.admins {
		var least, count float64
		for i := range readings {
			text, err := fetch(ctx, "http://"+admin+"/metrics")
			if err != nil {
				return 0, 0, fmt.Errorf("metrics of the sidecar: %w", err)
			}
			h, err := value(text, heapAlloc)
			if err != nil {
				return 0, 0, err
			}
			if least = min(least, h); i == 0 {
				least = h
			}
			if count, err = value(text, routines); err != nil {
				return 0, 0, err
			}
		}
		heapBytes += least
		goroutines += count
	}
	return heapBytes, goroutines, nil
}

// round measures one peer once: the closed loop, then each open one.
func (b *bench) round(ctx context.Context, r *running, f *figures) (err error) {
	c, err := b.dial(ctx, r, b.scenario.conns, b.scenario.streams)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	asked := func(res load.Result, err error) (load.Result, error) {
		f.sent += res.Requests
		return res, err
	}
	if _, err := asked(c.Closed(ctx, warmUp)); err != nil {
		return err
	}
	known := slices.Concat(r.proxies, r.others, []*process{b.world.upstream})
	before, err := look(r.proxies, known)
	if err != nil {
		return err
	}
	res, err := asked(c.Closed(ctx, b.plan.length))
	if err != nil {
		return err
	}
	after, err := look(r.proxies, known)
	if err != nil {
		return err
	}
	f.strangers = append(f.strangers, max(0, float64(after.busy-before.busy-(after.own-before.own)))/float64(workers*res.Took))
	used, n := after.proxies.minus(before.proxies), float64(res.Requests)
	f.rps = append(f.rps, res.Rate())
	f.cpu = append(f.cpu, micros(used.cpu)/n)
	f.cpuStat = append(f.cpuStat, micros(used.stat)/n)
	f.switches = append(f.switches, float64(used.switches)/n)
	for i, rate := range b.scenario.rates {
		if _, err := asked(c.Open(ctx, rate, warmUp)); err != nil {
			return err
		}
		// The first rate is the one that is compared; the others show what load does.
		d := b.plan.length * 3 / 4
		if i > 0 {
			d = b.plan.length / 4
		}
		before, err := use(r.proxies)
		if err != nil {
			return err
		}
		res, err := asked(c.Open(ctx, rate, d))
		if err != nil {
			return err
		}
		after, err := use(r.proxies)
		if err != nil {
			return err
		}
		l := f.open[rate]
		if l == nil {
			l = &latency{kept: 1}
			f.open[rate] = l
		}
		l.all.Merge(res.Latency)
		l.p50 = append(l.p50, micros(res.Latency.Quantile(0.5)))
		l.p99 = append(l.p99, micros(res.Latency.Quantile(0.99)))
		l.cpu = append(l.cpu, micros(after.minus(before).cpu)/float64(res.Requests))
		l.kept = min(l.kept, res.Rate()/float64(rate))
	}
	if err := c.Finish(ctx); err != nil {
		return err
	}
	return r.countLogs(f, false)
}

// glance is what was used up to a moment.
type glance struct {
	proxies   usage
	own, busy time.Duration // by the benchmark with all that it started; by anyone
}

func look(proxies, known []*process) (g glance, err error) {
	if g.proxies, err = use(proxies); err != nil {
		return g, err
	}
	if g.own, err = own(known); err != nil {
		return g, err
	}
	g.busy, err = busy()
	return g, err
}

// countLogs counts the lines of the access logs and empties them: they grow by
// tens of MiB a round. The last call waits for what is still buffered.
func (r *running) countLogs(f *figures, last bool) error {
	wait := 50 * time.Millisecond // for what is on its way
	if last {
		wait = 1200 * time.Millisecond // nginx flushes after a second
	}
	if len(r.logs) > 0 {
		time.Sleep(wait)
	}
	for _, log := range r.logs {
		n, err := countLines(log)
		if err != nil {
			return err
		}
		f.lines += n
		if err := os.Truncate(log, 0); err != nil {
			return err
		}
	}
	if last && len(r.logs) > 0 && f.sent > 0 {
		f.logged = float64(f.lines) / float64(f.sent*len(r.logs))
	}
	return nil
}

func countLines(path string) (int, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }() // it is only read
	buf, n := make([]byte, 1<<20), 0
	for {
		k, err := file.Read(buf)
		n += bytes.Count(buf[:k], []byte{'\n'})
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}
