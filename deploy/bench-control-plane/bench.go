package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/deploy/bench/measure"
	"github.com/outrigger-mesh/outrigger/deploy/testbed"
)

// bench is the measurement of one size.
type bench struct {
	plan
	services int
	dir, bin string
	out      io.Writer

	api      *api
	plane    *process
	xds      string // address
	admin    string // address
	fleet    *process
	synced   chan struct{}
	bytes    chan int64
	fleetErr chan error

	mu       sync.Mutex
	pending  map[int][]pendingChange // by Service, oldest first
	changing map[int]bool            // Services that the API server has not answered for yet
	delays   measure.Histogram       // of the changes that count
	patches  measure.Histogram       // how long the API server took for those
	longest  time.Duration
	late     int // patches that failed
	lastErr  error
}

type pendingChange struct {
	n     int
	sent  time.Time
	count bool
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(b.out, "%6d Services: "+format+"\n", append([]any{b.services}, args...)...)
}

func (b *bench) measure(ctx context.Context) (_ *result, err error) {
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		return nil, err
	}
	r := &result{Services: b.services, Pods: b.pods, Endpoints: b.endpoints / b.services * b.services, Sidecars: b.sidecars}
	server, err := testbed.Start() //nolint:contextcheck // it waits for 90 s at the longest
	if err != nil {
		return nil, fmt.Errorf("a kube-apiserver, which deploy/testbed/build.sh api builds: %w", err)
	}
	defer server.Stop()
	if b.api, err = newAPI(server); err != nil {
		return nil, err
	}
	began := time.Now()
	etcd, err := etcdURL()
	if err != nil {
		return nil, err
	}
	if err := fill(ctx, etcd, b.plan, b.services); err != nil {
		return nil, err
	}
	if err := b.api.wait(ctx, b.plan, b.services); err != nil {
		return nil, err
	}
	r.FillSeconds = time.Since(began).Seconds()
	b.say("objects made in %.0f s", r.FillSeconds)

	if err := b.startPlane(ctx, r); err != nil {
		return nil, err
	}
	defer b.plane.stop()
	if err := b.startFleet(ctx, r); err != nil {
		return nil, err
	}
	defer b.fleet.stop()
	sidecar, err := b.startSidecar(ctx)
	if err != nil {
		return nil, err
	}
	defer sidecar.stop()
	if err := b.churn(ctx, r, sidecar); err != nil {
		return nil, err
	}
	return r, errors.Join(b.plane.ended(), b.fleet.ended(), sidecar.ended())
}

func (b *bench) startPlane(ctx context.Context, r *result) error {
	config, err := b.api.kubeconfig(b.dir)
	if err != nil {
		return err
	}
	began := time.Now()
	b.plane, err = start(b.dir, "control-plane", false, filepath.Join(b.bin, "control-plane"),
		"--kubernetes", "--kubeconfig", config, "--xds-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0")
	if err != nil {
		return err
	}
	line, err := b.plane.said(ctx, "outrigger.xds_address")
	if err == nil {
		b.xds, b.admin = fmt.Sprint(line["outrigger.xds_address"]), fmt.Sprint(line["outrigger.admin_address"])
		err = b.plane.ready(ctx, b.admin)
	}
	if err != nil {
		b.plane.stop()
		return err
	}
	r.ReadySeconds = time.Since(began).Seconds()
	if r.RSSEmpty, _, err = b.plane.memory(); err != nil {
		return err
	}
	b.say("control plane ready in %.1f s, %.0f MiB", r.ReadySeconds, r.RSSEmpty)
	return nil
}

// startFleet connects the sidecars and waits until they have what they use.
func (b *bench) startFleet(ctx context.Context, r *result) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	began := time.Now()
	if b.fleet, err = start(b.dir, "sidecars", true, self, sidecarArgs(b.xds, b.plan, b.services)...); err != nil {
		return err
	}
	b.synced, b.bytes, b.fleetErr = make(chan struct{}), make(chan int64, 1), make(chan error, 1)
	b.pending, b.changing = map[int][]pendingChange{}, map[int]bool{}
	go func() { b.fleetErr <- b.read(b.fleet.stdout) }() // ends with the process
	select {
	case <-b.synced:
	case err := <-b.fleetErr:
		return errors.Join(err, b.fleet.ended())
	case <-ctx.Done():
		return ctx.Err()
	}
	r.SyncedSeconds = time.Since(began).Seconds()
	total, err := b.received(ctx)
	r.BytesStart = float64(total) / float64(b.sidecars)
	b.say("%d sidecars have all that they use after %.1f s", b.sidecars, r.SyncedSeconds)
	return err
}

func (b *bench) read(r io.Reader) error {
	for lines := bufio.NewScanner(r); lines.Scan(); {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("the sidecars said %q: %w", lines.Text(), err)
		}
		switch {
		case e.Synced:
			close(b.synced)
		case e.Change > 0:
			b.arrived(e)
		default:
			b.bytes <- e.Bytes
		}
	}
	return errors.New("the sidecars have ended")
}

// received asks the sidecars how many bytes they have received.
func (b *bench) received(ctx context.Context) (int64, error) {
	if _, err := io.WriteString(b.fleet.stdin, "\n"); err != nil {
		return 0, fmt.Errorf("ask the sidecars: %w", err)
	}
	select {
	case n := <-b.bytes:
		return n, nil
	case err := <-b.fleetErr:
		return 0, err
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// arrived notes that the last of the sidecars has a change and all before.
func (b *bench) arrived(e event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	left := b.pending[e.Service][:0]
	for _, c := range b.pending[e.Service] {
		switch {
		case c.n > e.Change:
			left = append(left, c)
		case c.count:
			d := time.Unix(0, e.At).Sub(c.sent)
			b.delays.Record(d)
			b.longest = max(b.longest, d)
		}
	}
	b.pending[e.Service] = left
}

// startSidecar runs one that is real, with as many destinations.
func (b *bench) startSidecar(ctx context.Context) (*process, error) {
	args := []string{
		"--namespace", namespaceOf(podService(0, b.services)), "--workload", serviceName(podService(0, b.services)), "--instance", podName(0), "--control-plane", b.xds,
		"--admin-address", "", "--metrics-address", "",
	}
	ports, err := freePorts(b.uses + 1)
	if err != nil {
		return nil, err
	}
	for n, s := range destinations(0, b.services, b.uses) {
		args = append(args, "--upstream", serviceName(s)+"."+namespaceOf(s)+":80="+ports[n])
	}
	health := ports[b.uses]
	p, err := start(b.dir, "sidecar", false, filepath.Join(b.bin, "sidecar"), append(args, "--health-address", health)...)
	if err != nil {
		return nil, err
	}
	if err := p.ready(ctx, health); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// freePorts are loopback addresses that nobody listens at.
func freePorts(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = l.Close() }() // at the end, so that all are different
		out = append(out, l.Addr().String())
	}
	return out, nil
}

// churn changes endpoints for as long as it is to, and measures.
func (b *bench) churn(ctx context.Context, r *result, sidecar *process) error {
	used := map[int]bool{}
	for i := range b.sidecars {
		for _, s := range destinations(i, b.services, b.uses) {
			used[s] = true
		}
	}
	// In turns, so that two changes of one Service are far apart; every tenth is of
	// one that many use.
	var turns []int
	for s := range b.services {
		if s >= popular && used[s] {
			turns = append(turns, s)
		}
	}
	random := rand.New(rand.NewPCG(1, uint64(b.services)))
	random.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })

	type job struct {
		service, n int
		count      bool
	}
	jobs := make(chan job, b.rate)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for j := range jobs {
				b.patch(ctx, j.service, j.n, j.count)
			}
		})
	}
	defer wg.Wait()
	tick := time.NewTicker(time.Second / time.Duration(b.rate))
	defer tick.Stop()
	var from figures
	var measuring time.Time
	began := time.Now()
	for n := 1; ; n++ {
		select {
		case <-tick.C:
		case err := <-b.fleetErr:
			close(jobs)
			return errors.Join(err, b.fleet.ended())
		case <-ctx.Done():
			close(jobs)
			return ctx.Err()
		}
		if measuring.IsZero() && time.Since(began) > b.warm {
			var err error
			if from, err = b.figures(ctx); err != nil {
				close(jobs)
				return err
			}
			measuring = time.Now()
		}
		if !measuring.IsZero() && time.Since(measuring) > b.length {
			break
		}
		s := turns[n%len(turns)]
		if n%10 == 0 {
			s = n / 10 % popular
		}
		// Two changes of one Service at once might arrive in either order.
		for next := n; b.begin(s); next++ {
			s = turns[next%len(turns)]
		}
		jobs <- job{s, n, !measuring.IsZero()}
	}
	took := time.Since(measuring).Seconds()
	to, err := b.figures(ctx)
	close(jobs)
	if err != nil {
		return err
	}
	wg.Wait()
	settled := b.settled(ctx)
	return errors.Join(b.conclude(ctx, r, from, to, took, sidecar), settled)
}

// begin reports whether the Service is being changed, and notes that it is.
func (b *bench) begin(service int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.changing[service]
	b.changing[service] = true
	return was
}

func (b *bench) patch(ctx context.Context, service, n int, count bool) {
	sent := time.Now()
	b.mu.Lock()
	b.pending[service] = append(b.pending[service], pendingChange{n, sent, count})
	b.mu.Unlock()
	err := b.api.change(ctx, service, n)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.changing, service)
	if err != nil {
		b.late, b.lastErr = b.late+1, err
		return
	}
	if count {
		b.patches.Record(time.Since(sent))
	}
}

// settled waits until every change has got to where it goes.
func (b *bench) settled(ctx context.Context) error {
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		b.mu.Lock()
		open := 0
		for _, p := range b.pending {
			open += len(p)
		}
		failed, err := b.late, b.lastErr
		b.mu.Unlock()
		switch {
		case failed > 0:
			return fmt.Errorf("%d changes were not taken by the API server: %w", failed, err)
		case open == 0:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("%d changes have not got to all sidecars after a minute", open)
		}
		if err := errors.Join(ctx.Err(), b.plane.ended(), b.fleet.ended()); err != nil {
			return err
		}
	}
}

// figures are what is counted from the start.
type figures struct {
	plane, fleet, api, etcd, own time.Duration // CPU
	busy                         time.Duration // of all processors, for anyone
	waited                       time.Duration // of the control plane, for a processor
	bytes                        int64
}

func (b *bench) figures(ctx context.Context) (f figures, err error) {
	if f.plane, err = b.plane.cpu(); err != nil {
		return f, err
	}
	if f.fleet, err = b.fleet.cpu(); err != nil {
		return f, err
	}
	if f.own, err = cpuOf(os.Getpid()); err != nil {
		return f, err
	}
	if f.waited, err = b.plane.waited(); err != nil {
		return f, err
	}
	if f.busy, err = busy(); err != nil {
		return f, err
	}
	kids, err := children()
	if err != nil {
		return f, err
	}
	for name, pid := range kids {
		d, err := cpuOf(pid)
		if err != nil {
			continue // it has ended
		}
		switch {
		case strings.HasPrefix(name, "kube-apiserver"):
			f.api = d
		case name == "etcd":
			f.etcd = d
		}
	}
	f.bytes, err = b.received(ctx)
	return f, err
}

func (b *bench) conclude(ctx context.Context, r *result, from, to figures, took float64, sidecar *process) (err error) {
	if r.RSS, r.RSSMost, err = b.plane.memory(); err != nil {
		return err
	}
	if r.SidecarRSS, _, err = sidecar.memory(); err != nil {
		return err
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.mu.Lock()
	defer b.mu.Unlock()
	r.Changes = int(b.delays.Count())
	r.ChangesPerSecond = float64(r.Changes) / took
	r.P50, r.P99, r.Max = ms(b.delays.Quantile(0.5)), ms(b.delays.Quantile(0.99)), ms(b.longest)
	r.PatchP50, r.PatchP99 = ms(b.patches.Quantile(0.5)), ms(b.patches.Quantile(0.99))
	r.CPU = (to.plane - from.plane).Seconds() / took
	r.CPUSidecars = (to.fleet - from.fleet).Seconds() / took
	r.CPUAPI = (to.api - from.api + to.etcd - from.etcd).Seconds() / took
	ours := to.plane - from.plane + to.fleet - from.fleet + to.api - from.api + to.etcd - from.etcd + to.own - from.own
	r.CPUOthers = max(0, (to.busy-from.busy-ours).Seconds()/took)
	r.Waited = (to.waited - from.waited).Seconds() / took
	r.BytesPerSecond = float64(to.bytes-from.bytes) / took / float64(b.sidecars)
	text, err := get(ctx, "http://"+b.admin+"/metrics")
	if err != nil {
		return err
	}
	r.Updates, r.Builds = metric(text, `outrigger_rebuild_updates_total{result="published"}`), metric(text, `outrigger_rebuild_total{result="published"}`)
	r.Heap = metric(text, "go_memstats_heap_inuse_bytes") / (1 << 20)
	r.PropagationP99 = quantile(text, "outrigger_xds_propagation_seconds", 0.99) * 1000
	b.say("API server p50 %.0f ms, p99 %.0f ms; CPU: API server %.2f, control plane %.2f (waited %.2f), sidecars %.2f, other programs %.2f", r.PatchP50, r.PatchP99, r.CPUAPI, r.CPU, r.Waited, r.CPUSidecars, r.CPUOthers)
	b.say("p50 %.0f ms, p99 %.0f ms, max %.0f ms of %d changes; %.2f CPU, %.0f MiB (at most %.0f)", r.P50, r.P99, r.Max, r.Changes, r.CPU, r.RSS, r.RSSMost)
	return nil
}

// metric is the value of a series in Prometheus' text format; 0 where it is not
// there.
func metric(text, series string) float64 {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			v, _ := strconv.ParseFloat(strings.TrimSpace(value), 64) // it is Prometheus' own
			return v
		}
	}
	return 0
}

// quantile is the upper bound of the bucket in which a quantile of a histogram is.
func quantile(text, name string, q float64) float64 {
	total := metric(text, name+"_count")
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name+`_bucket{le="`)
		if !ok {
			continue
		}
		bound, count, _ := strings.Cut(rest, `"} `)
		n, _ := strconv.ParseFloat(strings.TrimSpace(count), 64) // it is Prometheus' own
		if n >= q*total && total > 0 {
			v, _ := strconv.ParseFloat(bound, 64) // +Inf too
			return v
		}
	}
	return 0
}
