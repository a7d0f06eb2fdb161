// Package tail follows the container logs of a node through rotation, and reads
// them as logical lines.
//
// The folder is laid out as kubelet does it:
//
//	<namespace>_<pod>_<uid>/<container>/<restart>.log
//	<namespace>_<pod>_<uid>/<container>/<restart>.log.20261123-195300     rotated
//	<namespace>_<pod>_<uid>/<container>/<restart>.log.20261123-195300.gz  not read, counted
//
// The log file is the buffer: a Follower reads only when it is asked to and
// stops when it is told to, so a slow backend costs no memory. Each output has
// a Follower of its own. It keeps every file open that it has not read to the
// end, because kubelet deletes without asking.
//
// Identity of a file generation is device, inode and a hash of its first line,
// which carries a nanosecond stamp. It is verified before every turn of
// reading, so a reused inode or a file overwritten in place is never resumed at
// another file's offset.
//
// The package knows files and the format of the Container Runtime Interface. It
// does not know outputs, batches or what a line means (package pipeline).
package tail

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/cri"
	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a Follower.
const (
	// Chunk bytes are read at once, into one buffer for all files.
	Chunk = 64 << 10
	// Quantum bytes are read of one container before the next has its turn.
	Quantum = 4 * Chunk
	// MaxLine bytes of one physical line are kept; the rest is cut and counted.
	MaxLine = record.MaxBody + 256
	// firstLine bytes at most make the identity.
	firstLine = 1024
)

// Entry is one logical line: its record, whose body is not parsed yet, and the
// physical lines that it is made of. The identity of a generation in Spans is
// the one in Book.
type Entry struct {
	Record *record.Record
	Spans  []cri.Span
}

// Book is the account that a Follower keeps its place in.
type Book interface {
	Open(file, path string) ledger.Position
	Written(file string, size int64)
	GiveUp(file string, from int64, cause ledger.Cause) int64
	Gone(file string)
	Absent(keep func(file string) bool) []ledger.Statement
}

// Config of a Follower.
type Config struct {
	Folder        string // as /var/log/pods
	Cluster, Node string
	// Grace is how long a rotated or deleted generation must have been quiet
	// before it counts as finished: a runtime goes on writing to the old file
	// until it has opened the new one. Default 1 s.
	Grace time.Duration
	// MaxDeleted bytes unread of deleted files are kept on the disk by holding
	// them open; beyond it the oldest is given up and counted. Default 1 GiB.
	MaxDeleted int64
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Metrics of all Followers of a process.
type Metrics struct {
	Malformed *prometheus.CounterVec // problem
	Skipped   *prometheus.CounterVec // reason
	Errors    *prometheus.CounterVec // operation
}

// NewMetrics registers the metrics.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		Malformed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_malformed_lines_total", Help: "Lines that are not in the CRI format, by problem. They are shipped whole."}, []string{"problem"}),
		Skipped:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_skipped_files_total", Help: "Files in the log folder that are not read, by reason (gzip: a rotated generation that was compressed before it was seen)."}, []string{"reason"}),
		Errors:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_read_errors_total", Help: "Failed operations on log files and folders. They are tried again."}, []string{"operation"}),
	}
	return m, errors.Join(reg.Register(m.Malformed), reg.Register(m.Skipped), reg.Register(m.Errors))
}

// Follower follows all logs of a folder for one output. It is not safe for
// concurrent use: one goroutine calls Sweep and Read in turn.
type Follower struct {
	cfg     Config
	book    Book
	log     *slog.Logger
	metrics *Metrics

	logs    map[string]*containerLog   // by the path of the live file
	folders map[string][]*containerLog // by its folder
	ready   []*containerLog            // may have bytes to read; in turn
	skipped map[string]int             // paths reported as not read: the round in which they were last seen
	round   int                        // of full sweeps
	swept   bool                       // one sweep saw everything
	buf     []byte
	emit    func(Entry) bool
}

// containerLog is all generations of one <restart>.log.
type containerLog struct {
	path     string // of the live file
	resource *record.Resource
	gens     []*generation // oldest first
	joiner   cri.Joiner
	budget   int // bytes left of its turn
	queued   bool
	waiting  bool // has to be looked at again when time has passed
	relist   bool // so has its folder: a file of it has no name
}

// New returns a Follower that has read nothing yet.
func New(cfg Config, book Book, log *slog.Logger, m *Metrics) *Follower {
	if cfg.Grace == 0 {
		cfg.Grace = time.Second
	}
	if cfg.MaxDeleted == 0 {
		cfg.MaxDeleted = 1 << 30
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Follower{
		cfg: cfg, book: book, log: log, metrics: m,
		logs: map[string]*containerLog{}, folders: map[string][]*containerLog{}, skipped: map[string]int{}, buf: make([]byte, Chunk),
	}
}

// Close closes all files. What was read and not settled is read again by the
// next Follower.
func (f *Follower) Close() error {
	var errs []error
	for _, l := range f.logs {
		for _, g := range l.gens {
			errs = append(errs, g.close())
		}
	}
	return errors.Join(errs...)
}

// Sweep looks for new, renamed and deleted files: in the named containers'
// folders, or in everything if full. It also makes those logs ready that wait
// for time to pass. visit, which may be nil, is called with each folder before
// it is listed, so that a watch put on it misses nothing.
func (f *Follower) Sweep(full bool, folders []string, visit func(folder string)) {
	if full {
		f.sweepAll(visit)
	} else {
		for _, folder := range folders {
			f.sweepContainer(folder, visit)
		}
		for _, l := range f.logs {
			if l.relist {
				f.sweepContainer(filepath.Dir(l.path), nil)
			}
		}
	}
	for _, l := range f.logs {
		if l.waiting {
			f.enqueue(l)
		}
	}
	f.boundDeleted()
}

// Measure notes the sizes of the logs that wait for their turn. While there is no
// credit nobody reads them, and what is pending in them is to be known all the same.
func (f *Follower) Measure() {
	for _, l := range slices.Clone(f.ready) { // a file found to be another one joins the queue
		for _, g := range slices.Clone(l.gens) {
			if g.file != nil && !g.replaced {
				f.verify(l, g)
			}
		}
	}
}

// Touch makes the log of a live file ready: somebody wrote to it.
func (f *Follower) Touch(path string) {
	if l := f.logs[path]; l != nil {
		f.enqueue(l)
	}
}

func (f *Follower) enqueue(l *containerLog) {
	if !l.queued {
		l.queued = true
		f.ready = append(f.ready, l)
	}
}

// forget drops a log of which nothing is left.
func (f *Follower) forget(l *containerLog) {
	folder := filepath.Dir(l.path)
	delete(f.logs, l.path)
	f.folders[folder] = slices.DeleteFunc(f.folders[folder], func(x *containerLog) bool { return x == l })
	if len(f.folders[folder]) == 0 {
		delete(f.folders, folder)
	}
}

func (f *Follower) sweepAll(visit func(string)) {
	complete := true
	f.round++
	seen := map[string]bool{}
	for _, pod := range f.list(f.cfg.Folder, visit, &complete) {
		if strings.Count(pod, "_") != 2 {
			f.skip(filepath.Join(f.cfg.Folder, pod), "not_a_pod")
			continue
		}
		dir := filepath.Join(f.cfg.Folder, pod)
		for _, container := range f.list(dir, visit, &complete) {
			folder := filepath.Join(dir, container)
			seen[folder] = true
			if !f.sweepContainer(folder, visit) {
				complete = false
			}
		}
	}
	if !complete {
		return
	}
	for folder := range f.folders {
		if !seen[folder] {
			f.sweepContainer(folder, nil)
		}
	}
	maps.DeleteFunc(f.skipped, func(_ string, round int) bool { return round < f.round })
	if !f.swept {
		f.swept = true
		f.settleAbsent()
	}
}

// settleAbsent closes the accounts of generations that were deleted while no
// collector ran. It waits for the first sweep that saw everything: a folder
// that is not mounted yet has lost nothing.
func (f *Follower) settleAbsent() {
	here := map[string]bool{}
	for _, l := range f.logs {
		for _, g := range l.gens {
			here[g.id] = true
		}
	}
	for _, s := range f.book.Absent(func(file string) bool { return here[file] }) {
		f.log.Warn("log file was deleted or compressed while the collector was away; its unread end is lost",
			"log.file.path", s.Path, "outrigger.lost_bytes", s.Pending, "outrigger.cause", ledger.RotatedAway.String())
	}
}

// list returns the names of folders in a folder. One that has just been deleted
// is empty.
func (f *Follower) list(dir string, visit func(string), complete *bool) []string {
	if visit != nil {
		visit(dir)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		if dir == f.cfg.Folder || !errors.Is(err, fs.ErrNotExist) {
			*complete = false
			f.failed("list", dir, err)
		}
		return nil
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

func (f *Follower) failed(operation, path string, err error) {
	f.metrics.Errors.WithLabelValues(operation).Inc()
	f.log.Warn("cannot "+operation+" a log; trying again with the next sweep", "log.file.path", path, "error.message", err.Error())
}

func (f *Follower) skip(path, reason string) {
	_, known := f.skipped[path]
	f.skipped[path] = f.round
	if !known {
		f.metrics.Skipped.WithLabelValues(reason).Inc()
		f.log.Info("file is not read", "log.file.path", path, "outrigger.reason", reason)
	}
}

// logName matches what kubelet and the runtimes write.
var logName = regexp.MustCompile(`^(\d+)\.log(\.\d{8}-\d{6})?(\.gz|\.tmp)?$`)

// sweepContainer brings the generations of a container's logs up to date. It
// reports whether it saw everything.
func (f *Follower) sweepContainer(folder string, visit func(string)) bool {
	if visit != nil {
		visit(folder)
	}
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.failed("list", folder, err)
		return false
	}
	complete := true
	present := map[string][]string{} // live path -> generations by age; the live one last
	for _, e := range entries {
		m := logName.FindStringSubmatch(e.Name())
		path := filepath.Join(folder, e.Name())
		switch {
		case m == nil:
			f.skip(path, "not_a_log")
		case m[3] == ".gz":
			f.skipGzip(path)
		case m[3] == ".tmp":
		default:
			live := filepath.Join(folder, m[1]+".log")
			present[live] = append(present[live], path)
		}
	}
	for live, paths := range present {
		slices.SortFunc(paths, func(a, b string) int {
			if a == live || b == live {
				return len(b) - len(a) // the stamp makes a rotated name longer
			}
			return strings.Compare(a, b)
		})
		l := f.logs[live]
		if l == nil {
			l = &containerLog{path: live, resource: f.resource(live)}
			f.logs[live] = l
			f.folders[folder] = append(f.folders[folder], l)
		}
		for _, path := range paths {
			if err := f.find(l, path); err != nil {
				complete = false
				f.failed("open", path, err)
			}
		}
	}
	for _, l := range f.folders[folder] {
		f.missing(l, present[l.path])
	}
	return complete
}

// skipGzip counts a compressed generation, unless it is what became of one that
// was followed here: that one is still open, or was read to its end.
func (f *Follower) skipGzip(path string) {
	plain := strings.TrimSuffix(path, ".gz")
	for _, l := range f.folders[filepath.Dir(path)] {
		for _, g := range l.gens {
			if g.path == plain {
				f.skipped[path] = f.round
				return
			}
		}
	}
	f.skip(path, "gzip")
}

// find makes sure that the file at path is among the generations of l.
func (f *Follower) find(l *containerLog, path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // renamed meanwhile; the next sweep sees where to
	}
	if err != nil {
		return err
	}
	dev, ino, err := numbers(info)
	if err != nil {
		return err
	}
	for _, g := range l.gens {
		// A rotated file never gets its first name back: if the inode of one has
		// that name, it was deleted and the inode is used again.
		if reused := path == l.path && g.path != l.path; g.dev == dev && g.ino == ino && !g.replaced && !reused {
			if g.path != path {
				g.path = path
				f.reopenAccount(g)
			}
			g.missingSince = time.Time{}
			if info.Size() != g.offset {
				g.again = true
				f.enqueue(l)
			}
			if info.Size() != g.size && g.file != nil {
				f.verify(l, g) // so that what is pending is known without reading it
			}
			return nil
		}
	}
	g := &generation{path: path, dev: dev, ino: ino}
	if err := g.open(); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errOther) {
			return nil
		}
		return err
	}
	l.gens = append(l.gens, g)
	f.enqueue(l)
	f.verify(l, g)
	return nil
}

func (f *Follower) reopenAccount(g *generation) {
	if g.id != "" {
		f.book.Open(g.id, g.path)
	}
}

// missing marks the generations that are not under any of the paths any more. A
// rename may be half seen, so a file that still has a name gets some time.
func (f *Follower) missing(l *containerLog, paths []string) {
	now := f.cfg.Now()
	l.relist = false
	for _, g := range slices.Clone(l.gens) {
		if g.gone || g.replaced || slices.Contains(paths, g.path) {
			continue
		}
		if g.missingSince.IsZero() {
			g.missingSince = now
		}
		if g.unlinked() || now.Sub(g.missingSince) >= 2*f.cfg.Grace {
			if g.file != nil {
				f.verify(l, g)
			}
			g.gone = true
			f.enqueue(l)
		} else {
			l.relist = true
		}
	}
}

// boundDeleted gives up the oldest deleted generations while their unread bytes
// are over the limit: they occupy a disk on which nobody can see them.
func (f *Follower) boundDeleted() {
	total := int64(0)
	type held struct {
		l *containerLog
		g *generation
	}
	var all []held
	for _, l := range f.logs {
		for _, g := range l.gens {
			if g.gone && g.file != nil {
				total += max(0, g.size-g.offset)
				all = append(all, held{l, g})
			}
		}
	}
	slices.SortFunc(all, func(a, b held) int { return a.g.missingSince.Compare(b.g.missingSince) })
	for _, h := range all {
		if total <= f.cfg.MaxDeleted {
			return
		}
		total -= max(0, h.g.size-h.g.offset)
		f.giveUp(h.g, ledger.RotatedAway)
		f.remove(h.l, h.g)
	}
}

// giveUp drops what was not read of a generation.
func (f *Follower) giveUp(g *generation, cause ledger.Cause) {
	if g.id == "" {
		return
	}
	if n := f.book.GiveUp(g.id, g.unread(), cause); n > 0 {
		f.log.Warn("the unread end of a log file is lost", "log.file.path", g.path, "outrigger.lost_bytes", n, "outrigger.cause", cause.String())
	}
}

func (f *Follower) remove(l *containerLog, g *generation) {
	if err := g.close(); err != nil {
		f.failed("close", g.path, err)
	}
	if g.id != "" {
		f.book.Gone(g.id)
	}
	l.gens = slices.DeleteFunc(l.gens, func(x *generation) bool { return x == g })
}

// resource is what the path of a live file says of where it comes from.
func (f *Follower) resource(path string) *record.Resource {
	container := filepath.Dir(path)
	pod := strings.SplitN(filepath.Base(filepath.Dir(container)), "_", 3)
	restart, err := strconv.Atoi(strings.TrimSuffix(filepath.Base(path), ".log"))
	if err != nil { // more digits than an int has
		restart = -1
	}
	r := &record.Resource{Cluster: f.cfg.Cluster, Node: f.cfg.Node, Container: filepath.Base(container), Restart: restart}
	if len(pod) == 3 {
		r.Namespace, r.Pod, r.PodUID, r.Service = pod[0], pod[1], pod[2], record.Workload(pod[1])
	}
	return r
}

// String says where every log stands, for tests and debugging.
func (f *Follower) String() string {
	var b strings.Builder
	for _, path := range slices.Sorted(maps.Keys(f.logs)) {
		for _, g := range f.logs[path].gens {
			fmt.Fprintf(&b, "%s %s at %d of %d gone=%v\n", g.id, g.path, g.offset, g.size, g.gone)
		}
	}
	return b.String()
}
