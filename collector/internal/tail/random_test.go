package tail_test

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// A script is bytes: what kubelet, the runtimes, the clock and up to two collectors do to two
// logs, in any order. The world knows every line that was written, and which of them may be
// lost, because they were deleted before a collector could see them.

// world is a folder of logs, those who write them, and those who read them.
type world struct {
	dir, folder string
	script      []byte
	now         time.Time
	stamp       int
	logs        []*runtimeLog
	lines       []*wline
	readers     []*reader
	trace       []string
	ambush      func() // done at the next moment at which a collector is in the middle of something
	countdown   int
	ambushed    bool
	junk        int
	off         bool
	generation  uint64
	errs        []string

	grouping, waits bool
}

// runtimeLog is one <restart>.log as the runtime sees it.
type runtimeLog struct {
	name string
	gens []*wgen // that have a name, oldest first
	live *wgen   // where the runtime writes; it may have been renamed already
}

type wgen struct {
	log       *runtimeLog
	plain     string // its name, or empty
	gz        string // the name of its copy, or empty
	lines     []*wline
	half      string  // the end of the last line, which is not written yet
	seen      [2]bool // the collector has looked when the file had a name, and has what keeps it
	truncated bool
	linked    [2]bool // it did so when it could make a link
	next      *wgen   // the one after it
	nextS     [2]bool // seen
}

type wline struct {
	n       int
	log     *runtimeLog
	stream  int
	full    bool
	bytes   int64
	gen     *wgen
	mayEnd  [2]bool // what begins before it or in it may end with it
	mayLose [2]bool
}

// reader is a collector with one output.
type reader struct {
	w       *world
	k       int
	l       *ledger.Ledger
	f       *tail.Follower
	m       *tail.Metrics
	config  tail.Config
	pending []tail.Entry
	saved   []byte       // the checkpoint on the disk
	emitted map[int]int  // how often, since the checkpoint
	settled map[int]bool // of those
	keptE   map[int]int  // both as the checkpoint has them
	keptS   map[int]bool
	last    map[string]int // of a stream, since the process began
	taken   uint64
	onDisk  uint64
	at      map[string]uint64
}

// The book of a reader says that a generation is settled when a checkpoint says so.
func (r *reader) Open(file, path, owner string) ledger.Position {
	r.w.tick()
	return r.l.Open(file, path, owner)
}
func (r *reader) Written(file string, size int64) { r.w.tick(); r.l.Written(file, size) }
func (r *reader) GiveUp(file string, from int64, c ledger.Cause) int64 {
	return r.l.GiveUp(file, from, c)
}
func (r *reader) Gone(file string) { delete(r.at, file); r.l.Gone(file) }
func (r *reader) Find(match func(file, path string) bool) (string, bool) {
	r.w.tick()
	return r.l.Find(match)
}
func (r *reader) Absent(keep func(string) bool) []ledger.Statement { return r.l.Absent(keep) }
func (r *reader) Settled(file string) bool {
	if !r.l.Settled(file) {
		delete(r.at, file)
		return false
	}
	if at, ok := r.at[file]; ok {
		return r.onDisk > at
	}
	r.at[file] = r.taken
	return false
}

// Handle: the follower tells of a file that is none of its own when it has listed a folder and
// not yet opened what is in it.
func (r *reader) Enabled(context.Context, slog.Level) bool { return true }

func (r *reader) Handle(_ context.Context, rec slog.Record) error {
	if rec.Message == "file is not read" {
		r.w.tick()
	}
	return nil
}
func (r *reader) WithAttrs([]slog.Attr) slog.Handler { return r }
func (r *reader) WithGroup(string) slog.Handler      { return r }

func (w *world) tick() {
	if w.ambush == nil {
		return
	}
	if w.countdown--; w.countdown > 0 {
		return
	}
	do := w.ambush
	w.ambush, w.ambushed = nil, true
	do()
}

func (w *world) failf(format string, args ...any) {
	w.errs = append(w.errs, fmt.Sprintf(format, args...))
}

func (w *world) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

func (w *world) must(err error) {
	if err != nil {
		w.failf("the world is broken: %v", err)
	}
}

func (w *world) byte() int {
	if len(w.script) == 0 {
		return 0
	}
	b := w.script[0]
	w.script = w.script[1:]
	return int(b)
}

func newWorld(dir string, script []byte) *world {
	w := &world{dir: dir, folder: filepath.Join(dir, "pods"), script: script, now: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)}
	flags := w.byte()
	w.grouping, w.waits = flags&1 != 0, flags&2 != 0
	w.must(os.MkdirAll(w.folder, 0o750))
	for i := range 1 + flags>>2&1 {
		w.logs = append(w.logs, &runtimeLog{name: fmt.Sprintf("shop_cart_u1/app/%d.log", i)})
	}
	for k := range 1 + flags>>3&1 {
		m, err := tail.NewMetrics(prometheus.NewRegistry())
		w.must(err)
		r := &reader{w: w, k: k, l: ledger.New(), m: m, emitted: map[int]int{}, settled: map[int]bool{}, at: map[string]uint64{}}
		r.config = tail.Config{Folder: w.folder, Now: func() time.Time { return w.now }, Policy: w.policy, Generation: func() uint64 { return w.generation }}
		if flags>>4&3 != 0 {
			r.config.Spool = filepath.Join(dir, fmt.Sprintf("spool%d", k))
		}
		r.config.Resource = func(from *record.Resource) (*record.Resource, bool) {
			c := *from // what is known of it has changed
			return &c, !w.waits || w.generation > 0
		}
		w.readers = append(w.readers, r)
		r.checkpoint()
		r.follow()
	}
	w.note("spool=%v grouping=%v waits=%v logs=%d readers=%d", w.readers[0].config.Spool != "", w.grouping, w.waits, len(w.logs), len(w.readers))
	return w
}

func (w *world) policy(*record.Resource) tail.Policy {
	p := tail.Policy{}
	if w.grouping {
		p.Grouper = func() tail.Grouper { return &trace{} }
	}
	if w.off {
		p.Off = "off"
	}
	return p
}

func (r *reader) follow() {
	r.last, r.pending = map[string]int{}, nil
	r.f = tail.New(r.config, r, slog.New(r), r.m)
	r.sweep(true) // as package pipeline does
}

func clone[K comparable, V any](m map[K]V) map[K]V {
	out := make(map[K]V, len(m))
	for k, v := range m {
		out[k] = v
	}
	return out
}

func (r *reader) checkpoint() {
	r.taken++
	b, err := r.l.Encode()
	r.w.must(err)
	r.saved, r.onDisk = b, r.taken
	r.keptE, r.keptS = map[int]int{}, clone(r.settled)
	for n, times := range r.emitted {
		if r.settled[n] {
			r.keptE[n] = times
		}
	}
}

// restart: what was settled since the checkpoint comes again.
func (r *reader) restart() {
	r.w.must(r.f.Close())
	l, err := ledger.Decode(r.saved)
	r.w.must(err)
	r.l, r.at = l, map[string]uint64{}
	r.emitted, r.settled = clone(r.keptE), clone(r.keptS)
	for _, g := range r.w.all() {
		g.seen[r.k] = g.linked[r.k]
	}
	for _, x := range r.w.lines { // what is read again may have been deleted
		if r.w.off || x.gen.plain == "" && x.gen.gz == "" && !x.gen.linked[r.k] {
			r.lose(x)
		}
	}
	r.follow()
}

func (w *world) all() (out []*wgen) {
	for _, l := range w.logs {
		out = append(out, l.gens...)
	}
	return out
}

// lose: the line may be lost, and what is before it or after it has no end or beginning.
func (r *reader) lose(x *wline) {
	if !r.settled[x.n] {
		x.mayLose[r.k] = true
	}
}

var token = regexp.MustCompile(`^(?: ?\d+;)+:?$`)

func (r *reader) emit(e tail.Entry) {
	var ns []int
	for _, part := range strings.Split(e.Record.Body, "\n") {
		if !token.MatchString(part) {
			r.w.failf("reader %d: body %q", r.k, e.Record.Body)
			return
		}
		for _, n := range tokens(part) {
			if n >= len(r.w.lines) {
				r.w.failf("reader %d: nobody wrote %q", r.k, e.Record.Body)
				return
			}
			ns = append(ns, n)
		}
	}
	first := r.w.lines[ns[0]]
	key := fmt.Sprint(first.log.name, first.stream)
	for i, n := range ns {
		r.emitted[n]++
		if last, ok := r.last[key]; ok && n <= last {
			r.w.failf("reader %d: line %d comes after %d", r.k, n, last)
		}
		r.last[key] = n
		if i > 0 {
			if p := r.w.seenBefore(r.w.lines[n], ns[i-1]); p == nil || p.n != ns[i-1] {
				r.w.failf("reader %d: %q is joined wrongly", r.k, e.Record.Body)
			}
		}
	}
	if p := r.w.previous(first); p != nil && !p.full && !r.w.mayBreak(r.k, p, first) {
		r.w.failf("reader %d: %q has lost its beginning, line %d", r.k, e.Record.Body, p.n)
	}
	r.pending = append(r.pending, e)
}

func (w *world) mayBreak(k int, p, next *wline) bool {
	return p.mayLose[k] || next.mayLose[k] || p.mayEnd[k] || next.mayEnd[k]
}

// previous is the line before x in its stream.
func (w *world) previous(x *wline) *wline {
	for n := x.n - 1; n >= 0; n-- {
		if p := w.lines[n]; p.log == x.log && p.stream == x.stream {
			return p
		}
	}
	return nil
}

// seenBefore is previous, but for lines that were overwritten in place: that there was anything
// cannot be known if nobody looked.
func (w *world) seenBefore(x *wline, n int) *wline {
	p := w.previous(x)
	for p != nil && p.n > n && p.gen.truncated {
		p = w.previous(p)
	}
	return p
}

func tokens(body string) (out []int) {
	for _, t := range strings.FieldsFunc(body, func(c rune) bool { return c < '0' || c > '9' }) {
		n, err := strconv.Atoi(t)
		if err == nil {
			out = append(out, n)
		}
	}
	return out
}

func (r *reader) settle(es []tail.Entry) {
	for _, e := range es {
		for _, s := range e.Spans {
			r.l.Settle(s.File, ledger.Span{Start: s.Start, End: s.End}, ledger.Acknowledged)
		}
		for _, n := range tokens(e.Record.Body) {
			r.settled[n] = true
		}
	}
	r.w.must(r.l.Check())
}

func (r *reader) read(credit int) {
	for credit > 0 && r.f.Read(func(e tail.Entry) bool {
		r.emit(e)
		r.w.tick()
		credit--
		return credit > 0
	}) {
	}
}

// sweep: what it saw while nothing else happened is kept from then on.
func (r *reader) sweep(full bool) {
	r.w.ambushed = false
	if full {
		r.f.Sweep(true, nil, nil)
	} else {
		r.f.Sweep(false, []string{filepath.Join(r.w.folder, "shop_cart_u1/app")}, nil)
	}
	if r.w.ambushed {
		return
	}
	for _, g := range r.w.all() {
		whole := len(g.lines) > 1 || len(g.lines) == 1 && g.half == ""
		if g.plain != "" && (r.config.Spool == "" || whole) || g.gz != "" && r.config.Spool == "" {
			g.seen[r.k] = true
		}
		if g.plain != "" && r.config.Spool != "" && whole {
			g.linked[r.k] = true
		}
		if g.gz != "" && g.plain == "" {
			g.seen[r.k] = true // open, until it is read or we end
		}
		for _, o := range r.w.all() {
			if o.next == g && whole && (r.config.Spool == "" || g.linked[r.k]) {
				o.nextS[r.k] = true
			}
		}
	}
}

func (w *world) path(name string) string { return filepath.Join(w.folder, name) }

func (w *world) write(g *wgen, text string) {
	f, err := os.OpenFile(w.path(g.plain), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		w.must(err)
		return
	}
	_, err = f.WriteString(text)
	w.must(errors.Join(err, f.Close(), os.Chtimes(w.path(g.plain), w.now, w.now)))
}

// whole writes the end of the line that is half written.
func (w *world) whole(g *wgen) {
	if g != nil && g.half != "" {
		w.write(g, g.half)
		g.half = ""
	}
}

func (w *world) writeLine(l *runtimeLog, kind int) {
	if l.live == nil {
		g := &wgen{log: l, plain: l.name}
		if n := len(l.gens); n > 0 {
			l.gens[n-1].next = g
		}
		w.must(os.MkdirAll(filepath.Dir(w.path(l.name)), 0o750))
		l.gens = append(l.gens, g)
		l.live = g
		w.write(g, "")
	}
	g := l.live
	w.whole(g)
	x := &wline{n: len(w.lines), log: l, stream: kind & 1, full: kind&6 != 0, gen: g}
	flag, text := "F", fmt.Sprintf("%d;", x.n)
	if !x.full {
		flag = "P"
	}
	if p := w.previous(x); w.grouping && (p == nil || p.full) && x.full {
		switch kind >> 3 & 3 {
		case 0:
			text += ":"
		case 1:
			text = " " + text
		}
	}
	w.stamp++
	line := fmt.Sprintf("2026-11-23T02:00:00.%09dZ %s %s %s\n", w.stamp, [...]string{"stdout", "stderr"}[x.stream], flag, text)
	x.bytes = int64(len(line))
	for _, r := range w.readers {
		x.mayLose[r.k] = w.off
	}
	w.lines = append(w.lines, x)
	g.lines = append(g.lines, x)
	if kind>>5 == 7 && !w.off {
		g.half = line[len(line)/2:]
		line = line[:len(line)/2]
	}
	w.note("write %d to %s: %.60q", x.n, g.plain, line)
	w.write(g, line)
}

func (w *world) rotate(l *runtimeLog) {
	g := l.live
	if g == nil || g.plain != l.name {
		return
	}
	w.whole(g)
	w.stamp++
	to := fmt.Sprintf("%s.20261123-%06d", l.name, w.stamp)
	w.note("rotate to %s", to)
	w.must(os.Rename(w.path(g.plain), w.path(to)))
	g.plain = to
}

// reopen: the runtime lets go of the renamed file, and the next line makes a new one.
func (w *world) reopen(l *runtimeLog) {
	if g := l.live; g != nil && g.plain != l.name {
		w.whole(g)
		w.note("reopen %s", l.name)
		l.live = nil
	}
}

// compress in two steps: the copy is there, and the file is not.
func (w *world) compress(l *runtimeLog, steps int) {
	for _, g := range l.gens {
		if g == l.live || g.plain == "" || g.plain == l.name {
			continue
		}
		if g.gz == "" {
			b, err := os.ReadFile(w.path(g.plain))
			w.must(err)
			f, err := os.Create(w.path(g.plain + ".tmp"))
			w.must(err)
			z := gzip.NewWriter(f)
			_, err = z.Write(b)
			w.must(errors.Join(err, z.Close(), f.Close()))
			g.gz = g.plain + ".gz"
			w.note("compress to %s", g.gz)
			w.must(os.Rename(w.path(g.plain+".tmp"), w.path(g.gz)))
			if steps--; steps == 0 {
				return
			}
		}
		w.note("remove %s", g.plain)
		w.must(os.Remove(w.path(g.plain)))
		g.plain = ""
		return
	}
}

// remove deletes all names of a generation.
func (w *world) remove(g *wgen) {
	w.whole(g)
	for _, name := range []string{g.plain, g.gz} {
		if name != "" {
			w.note("delete %s", name)
			w.must(os.Remove(w.path(name)))
		}
	}
	for _, r := range w.readers {
		for _, x := range g.lines {
			if !g.seen[r.k] {
				r.lose(x)
			}
		}
		if len(g.lines) > 0 && (g.next == nil || !g.nextS[r.k]) { // that nothing is between them cannot be known
			for s := range 2 {
				for i := len(g.lines) - 1; i >= 0; i-- {
					if g.lines[i].stream == s {
						g.lines[i].mayEnd[r.k] = true
						break
					}
				}
			}
			w.endAll(r.k, g.log)
		}
	}
	g.plain, g.gz = "", ""
	if g.log.live == g {
		g.log.live = nil
	}
	g.log.gens = slices.DeleteFunc(g.log.gens, func(o *wgen) bool { return o == g })
}

// endAll: what is open in a log now may end.
func (w *world) endAll(k int, l *runtimeLog) {
	for s := range 2 {
		for n := len(w.lines) - 1; n >= 0; n-- {
			if x := w.lines[n]; x.log == l && x.stream == s {
				x.mayEnd[k] = true
				break
			}
		}
	}
}

// truncate is what copytruncate does: another generation begins.
func (w *world) truncate(l *runtimeLog) {
	g := l.live
	if g == nil || len(g.lines) == 0 {
		return
	}
	w.whole(g)
	w.note("truncate %s", g.plain)
	next := &wgen{log: l, plain: g.plain}
	for _, r := range w.readers {
		for _, x := range g.lines {
			if r.emitted[x.n] == 0 || !r.settled[x.n] {
				r.lose(x)
			}
		}
		w.endAll(r.k, l)
	}
	w.now = w.now.Add(5 * time.Millisecond) // or a file of the same size cannot be told from it
	w.must(os.Truncate(w.path(g.plain), 0))
	g.plain, g.truncated = "", true
	l.gens[slices.Index(l.gens, g)] = next
	for _, o := range l.gens {
		if o.next == g {
			o.next = next
		}
	}
	l.live = next
}

// happen does something that is not the collector's.
func (w *world) happen(op, arg int) {
	l := w.logs[arg%len(w.logs)]
	switch op % 12 {
	default:
		w.writeLine(l, arg)
	case 4, 5:
		w.rotate(l)
	case 6:
		w.reopen(l)
	case 7, 8:
		w.compress(l, 1+arg>>1&1)
	case 9:
		if len(l.gens) > 1 {
			w.remove(l.gens[0])
		}
	case 10:
		w.rotate(l)
		w.reopen(l)
		w.writeLine(l, arg)
	case 11:
		switch arg >> 1 & 3 {
		case 0:
			for len(l.gens) > 0 {
				w.remove(l.gens[0])
			}
		case 1:
			w.truncate(l)
		}
	}
}

func (w *world) step() {
	op, arg := w.byte(), w.byte()
	r := w.readers[arg%len(w.readers)]
	switch op % 32 {
	default:
		w.happen(op%32, arg)
	case 12, 13, 14:
		w.note("%d sweeps all", r.k)
		r.sweep(true)
	case 15, 16:
		w.note("%d sweeps the folder", r.k)
		r.sweep(false)
	case 17:
		w.note("%d sweeps nothing", r.k)
		w.ambushed = true
		r.f.Sweep(false, nil, nil)
	case 18, 19, 20:
		w.note("%d reads", r.k)
		r.read(1 << 20)
	case 21:
		w.note("%d reads %d", r.k, 1+arg>>1&3)
		r.read(1 + arg>>1&3)
	case 22, 23:
		w.note("%d settles all", r.k)
		r.settle(r.pending)
		r.pending = nil
		r.checkpoint()
	case 24:
		if len(r.pending) > 0 {
			i := arg >> 1 % len(r.pending)
			w.note("%d settles %q", r.k, r.pending[i].Record.Body)
			r.settle(r.pending[i : i+1])
			r.pending = slices.Delete(slices.Clone(r.pending), i, i+1)
		}
	case 25:
		r.f.Touch(w.path(w.logs[0].name))
		w.note("%d measures", r.k)
		r.f.Measure()
	case 26, 27:
		d := [...]time.Duration{100 * time.Millisecond, 600 * time.Millisecond, 1100 * time.Millisecond, 3 * time.Second, 70 * time.Second}[arg%5]
		w.note("%v pass", d)
		w.now = w.now.Add(d)
	case 28:
		if arg&1 == 0 {
			r.checkpoint()
		}
		w.note("%d restarts", r.k)
		r.restart()
	case 29:
		sub, subArg := w.byte(), w.byte()
		w.countdown = 1 + arg%4
		w.note("in the middle of something, after %d", w.countdown)
		w.ambush = func() { w.note("in the middle:"); w.happen(4+sub%8, subArg) }
		w.junk++
		if _, err := os.Stat(w.path("shop_cart_u1/app")); err == nil {
			w.must(os.WriteFile(w.path(fmt.Sprintf("shop_cart_u1/app/x%d", w.junk)), nil, 0o600))
		}
	case 30:
		w.note("all read and time passes")
		w.drain(3)
	case 31:
		switch {
		case arg%4 != 0:
			w.now = w.now.Add(70 * time.Second)
			w.drain(2)
			w.note("70s pass, all read")
		default:
			w.off = !w.off
			w.generation++
			w.note("off=%v", w.off)
			if w.off {
				for _, x := range w.lines {
					for _, r := range w.readers {
						r.lose(x)
					}
				}
			}
			for _, l := range w.logs {
				if l.live != nil {
					w.whole(l.live)
				}
			}
		}
	}
}

// drain lets all readers come to rest.
func (w *world) drain(rounds int) {
	for range rounds {
		for _, r := range w.readers {
			r.sweep(true)
			r.read(1 << 20)
			r.settle(r.pending)
			r.pending = nil
			r.checkpoint()
		}
		w.now = w.now.Add(700 * time.Millisecond)
	}
}

// run does the script and returns what is wrong.
func run(dir string, script []byte) (w *world) {
	w = newWorld(dir, script)
	defer func() {
		for _, r := range w.readers {
			w.must(r.f.Close())
		}
	}()
	for len(w.script) > 0 && len(w.errs) == 0 {
		w.step()
	}
	w.ambush = nil
	if w.off {
		w.off = false
		w.generation++
	}
	for _, l := range w.logs {
		w.whole(l.live)
	}
	w.note("the end")
	w.drain(24)
	for _, r := range w.readers {
		r.check(false)
	}
	if len(w.errs) > 0 {
		return w
	}
	w.note("all is deleted")
	for _, l := range w.logs {
		for len(l.gens) > 0 {
			w.remove(l.gens[0])
		}
	}
	w.must(os.RemoveAll(w.path("shop_cart_u1")))
	w.drain(16)
	for _, r := range w.readers {
		r.check(true)
	}
	w.descriptors()
	return w
}

// descriptors: none of the files that are gone is open.
func (w *world) descriptors() {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return // not here
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, w.dir) {
			w.failf("%s is open", to)
		}
	}
}

func (r *reader) check(empty bool) {
	w := r.w
	lost := false
	var acknowledged int64
	for _, x := range w.lines {
		times := r.emitted[x.n]
		open := !empty && times == 0 && !x.full && !x.mayLose[r.k]
		switch {
		case open: // it is waiting for its end, perhaps
			for n := x.n + 1; n < len(w.lines); n++ {
				if y := w.lines[n]; y.log == x.log && y.stream == x.stream && r.emitted[n] > 0 {
					w.failf("reader %d: line %d is lost", r.k, x.n)
					break
				}
			}
		case times == 0 && !x.mayLose[r.k]:
			w.failf("reader %d: line %d is lost", r.k, x.n)
		case times > 1:
			w.failf("reader %d: line %d comes %d times", r.k, x.n, times)
		}
		lost = lost || x.mayLose[r.k]
		if r.settled[x.n] {
			acknowledged += x.bytes
		}
	}
	total := r.l.Total()
	if total.Acknowledged != acknowledged {
		w.failf("reader %d: %d bytes are acknowledged, the account says %+v", r.k, acknowledged, total)
	}
	if !lost && len(total.Dropped) > 0 {
		w.failf("reader %d: account says that bytes are dropped: %+v", r.k, total)
	}
	if !empty {
		return
	}
	dropped := int64(0)
	for _, n := range total.Dropped {
		dropped += n
	}
	if total.Pending != 0 || total.Written != total.Acknowledged+dropped {
		w.failf("reader %d: account does not close: %+v", r.k, total)
	}
	if files := r.l.Files(); len(files) > 0 {
		w.failf("reader %d: accounts stay open: %+v", r.k, files)
	}
	if r.config.Spool != "" {
		err := filepath.WalkDir(r.config.Spool, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				w.failf("reader %d: the spool keeps %s", r.k, path)
			}
			return nil
		})
		w.must(err)
	}
	if s := r.f.String(); s != "" {
		w.failf("reader %d: is left with %s", r.k, s)
	}
}

func (w *world) report() string {
	return strings.Join(w.trace, "\n") + "\n" + strings.Join(w.errs, "\n")
}

func randomScript(seed uint64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	script := make([]byte, 20+rnd.IntN(120))
	for i := range script {
		script[i] = byte(rnd.Uint32())
	}
	return script
}

func runIn(t *testing.T, script []byte) *world {
	t.Helper()
	dir, err := os.MkdirTemp(os.Getenv("OUTRIGGER_RANDOM_DIR"), "random") //nolint:usetesting // one for each script, gone with it
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}()
	return run(dir, script)
}

// shrink leaves pairs of bytes out as long as something stays wrong.
func shrink(t *testing.T, script []byte) []byte {
	t.Helper()
	for size := len(script) / 2; size >= 1; size /= 2 {
		for i := 1; i+size <= len(script); {
			shorter := slices.Delete(slices.Clone(script), i, i+size)
			if w := runIn(t, shorter); len(w.errs) > 0 {
				script = shorter
			} else {
				i++
			}
		}
	}
	return script
}

func TestRandom(t *testing.T) {
	first, count := uint64(1), uint64(200)
	if s := os.Getenv("OUTRIGGER_RANDOM_SEEDS"); s != "" { // as 1000-2000
		if _, err := fmt.Sscanf(s, "%d-%d", &first, &count); err != nil {
			t.Fatal(err)
		}
		count -= first
	}
	failures := 0
	for seed := first; seed < first+count; seed++ {
		script := randomScript(seed)
		if w := runIn(t, script); len(w.errs) > 0 {
			script = shrink(t, script)
			w = runIn(t, script)
			t.Errorf("seed %d, script %x:\n%s", seed, script, w.report())
			if failures++; failures == 5 {
				t.FailNow()
			}
		}
	}
}

func FuzzRandom(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(randomScript(seed))
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 400 {
			return
		}
		if w := runIn(t, script); len(w.errs) > 0 {
			t.Errorf("script %x:\n%s", script, w.report())
		}
	})
}
