// Package tail follows the container logs of a node through rotation, and reads
// them as logical lines.
//
// The folder is laid out as kubelet does it:
//
//	<namespace>_<pod>_<uid>/<container>/<restart>.log
//	<namespace>_<pod>_<uid>/<container>/<restart>.log.20261123-195300     rotated
//	<namespace>_<pod>_<uid>/<container>/<restart>.log.20261123-195300.gz  the older ones
//
// Beside it, or instead, single files are followed (Files).
//
// The log file is the buffer: a Follower reads only when it is asked to and
// stops when it is told to, so a slow backend costs no memory. Each output has
// a Follower of its own, and a spool: second names of the files that are not
// settled yet, because kubelet deletes without asking.
//
// Identity of a file generation is device, inode and a hash of its first line,
// which carries a nanosecond stamp. It is verified before every turn of
// reading, so a reused inode or a file overwritten in place is never resumed at
// another file's offset. Of a compressed generation, which is a file of its own,
// the hash alone finds the account.
//
// The package knows files and the format of the Container Runtime Interface. It
// does not know outputs, batches or what a line means (package pipeline).
package tail

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
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

// Entry is one record: its fields, whose body is not parsed yet, and the
// physical lines that it is made of. The identity of a generation in Spans is
// the one in Book.
type Entry struct {
	Record *record.Record
	Spans  []cri.Span
}

// Grouper puts the lines of one stream together that make one record (package
// multiline).
type Grouper interface {
	// Line takes the next line. It joins the record before it, or begins one; open
	// says that more may follow.
	Line(text []byte) (joins, open bool)
	// Reset: the record before was let go.
	Reset()
}

// Policy says how the logs of a container are read.
type Policy struct {
	// Off is why they are not read at all; empty if they are.
	Off string
	// Grouper makes the grouper of a stream; nil takes each line for itself.
	Grouper func() Grouper
}

// Files are single files that are followed: those of programs that write no
// container logs, and the journals of inputs that are pushed.
type Files struct {
	// Patterns of package filepath, absolute.
	Patterns []string
	// Resource of all records, but for Node and Cluster.
	Resource record.Resource
	// Format of the lines; empty means text.
	Format Format
	// Decode reads a line of the format Envelope into a record.
	Decode func(line []byte, r *record.Record) error
	// Own: rotated files are read although nobody saw them before: they are a journal's.
	Own bool
}

// Format of the lines of a file.
type Format string

// The formats. A container's log is CRI's, or Docker's where its first byte says so.
const (
	Text     Format = "text"
	CRI      Format = "cri"
	Docker   Format = "docker"
	Envelope Format = "envelope"
)

// Book is the account that a Follower keeps its place in.
type Book interface {
	Open(file, path, owner string) ledger.Position
	Written(file string, size int64)
	GiveUp(file string, from int64, cause ledger.Cause) int64
	Gone(file string)
	Find(match func(file, path string) bool) (file string, ok bool)
	// Settled reports whether nothing of the generation is pending, and a crash
	// would not change that.
	Settled(file string) bool
	Absent(keep func(file string) bool) []ledger.Statement
}

// Config of a Follower.
type Config struct {
	Folder        string // as /var/log/pods; empty where there are no containers
	Files         []Files
	Cluster, Node string
	// Linked are the folders outside of Folder into which symbolic links may lead,
	// as Docker's do. Other links are not read: who may write a log must not choose
	// what the collector reads.
	Linked []string
	// Spool is the folder for second names of files that are not settled, on the
	// file system of Folder. Empty keeps them by open files only, which a restart
	// ends.
	Spool string
	// Policy of a container; nil means the zero Policy for all.
	Policy func(*record.Resource) Policy
	// Resource adds what is known to what the path says; not complete while more may
	// come, for which a new log waits up to MetadataWait (default 5 s). It is asked
	// again when Generation has changed. Nil knows nothing.
	Resource     func(from *record.Resource) (r *record.Resource, complete bool)
	Generation   func() uint64
	MetadataWait time.Duration
	// Hold is how long a record that may go on waits for its next line. Default 1 s.
	Hold time.Duration
	// Grace is how long a rotated or deleted generation must have been quiet
	// before it counts as finished: a runtime goes on writing to the old file
	// until it has opened the new one. Default 1 s.
	Grace time.Duration
	// MaxDeleted bytes unread of deleted files are kept on the disk; beyond it the
	// oldest is given up and counted. Default 1 GiB.
	MaxDeleted int64
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Metrics of all Followers of a process.
type Metrics struct {
	Malformed *prometheus.CounterVec // problem
	Skipped   *prometheus.CounterVec // reason
	Errors    *prometheus.CounterVec // operation
	Deleted   prometheus.Gauge
}

// NewMetrics registers the metrics.
func NewMetrics(reg prometheus.Registerer) (*Metrics, error) {
	m := &Metrics{
		Malformed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_malformed_lines_total", Help: "Lines that are not in the CRI format, by problem. They are shipped whole."}, []string{"problem"}),
		Skipped:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_skipped_files_total", Help: "Files in the log folder that are not read, by reason."}, []string{"reason"}),
		Errors:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "outrigger_log_read_errors_total", Help: "Failed operations on log files and folders. They are tried again."}, []string{"operation"}),
		Deleted:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "outrigger_log_deleted_bytes", Help: "Unread bytes of deleted log files that are kept on the disk, the sum of all outputs."}),
	}
	return m, errors.Join(reg.Register(m.Malformed), reg.Register(m.Skipped), reg.Register(m.Errors), reg.Register(m.Deleted))
}

// Follower follows all logs of a node for one output. It is not safe for
// concurrent use: one goroutine calls Sweep and Read in turn.
type Follower struct {
	cfg     Config
	book    Book
	log     *slog.Logger
	metrics *Metrics

	logs    map[string]*containerLog   // by the path of the live file
	folders map[string][]*containerLog // by its folder
	ready   []*containerLog            // may have bytes to read; in turn
	leaving []leaving
	// What a sweep has to do, so that it does not look through all logs for it.
	waiting map[*containerLog]struct{}    // to be looked at again when time has passed
	relist  map[*containerLog]struct{}    // a file of it has no name: so has its folder
	gone    map[*generation]*containerLog // deleted
	spent   map[*generation]*containerLog // read to its end, and its link may go when it is settled
	skipped map[string]int                // paths reported as not read: the round in which they were last seen
	round   int                           // of full sweeps
	swept   bool                          // one sweep saw everything
	noSpool bool                          // links cannot be made here
	deleted int64                         // unread bytes of deleted files, as the gauge has them
	linked  bool                          // one could be made
	missed  bool                          // a full sweep found what no hint told of
	stale   bool                          // a listing shows what is not so any more, or may do so
	buf     []byte
	headBuf [firstLine]byte
	slab    slab
	emit    func(Entry) bool
}

// containerLog is all generations of one <restart>.log, or of one of Files.
type containerLog struct {
	path     string           // of the live file
	input    *Files           // nil for a container's
	from     *record.Resource // what the path says
	resource *record.Resource
	policy   Policy
	since    stamp                 // when it was found
	known    uint64                // generation of the metadata that resource is from
	gens     []*generation         // oldest first
	joiner   *cri.Joiner           // nil while no line is open
	held     [cri.Stderr + 1]*held // nil but in a turn, or while a record of the stream is open
	budget   int                   // bytes left of its turn
	complete bool                  // or waited for long enough
	queued   bool
}

// owner is for the account: namespace/pod.
func (l *containerLog) owner() string {
	if l.input != nil {
		return "node/" + l.input.Resource.Service
	}
	return l.from.Namespace + "/" + l.from.Pod
}

// New returns a Follower that has read nothing yet.
func New(cfg Config, book Book, log *slog.Logger, m *Metrics) *Follower {
	if cfg.Grace == 0 {
		cfg.Grace = time.Second
	}
	if cfg.Hold == 0 {
		cfg.Hold = time.Second
	}
	if cfg.MetadataWait == 0 {
		cfg.MetadataWait = 5 * time.Second
	}
	if cfg.MaxDeleted == 0 {
		cfg.MaxDeleted = 1 << 30
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Policy == nil {
		cfg.Policy = func(*record.Resource) Policy { return Policy{} }
	}
	f := &Follower{
		cfg: cfg, book: book, log: log, metrics: m,
		logs: map[string]*containerLog{}, folders: map[string][]*containerLog{},
		waiting: map[*containerLog]struct{}{}, relist: map[*containerLog]struct{}{}, gone: map[*generation]*containerLog{}, spent: map[*generation]*containerLog{},
		skipped: map[string]int{}, buf: make([]byte, Chunk),
	}
	f.restore()
	return f
}

// Close closes all files. What was read and not settled is read again by the
// next Follower.
func (f *Follower) Close() error {
	f.tellDeleted(0)
	var errs []error
	for _, l := range f.logs {
		for _, g := range l.gens {
			errs = append(errs, g.close())
		}
	}
	return errors.Join(errs...)
}

// Missed reports whether full sweeps since the last call found a file or a change that nobody
// had told of: hints cannot be relied on here.
func (f *Follower) Missed() bool {
	m := f.missed
	f.missed = false
	return m
}

// logOf returns the log of a live file, and makes it where there is none.
func (f *Follower) logOf(live string) *containerLog {
	if l := f.logs[live]; l != nil {
		return l
	}
	live = strings.Clone(live) // it may be the beginning of an older file's path
	l := &containerLog{path: live, from: f.resource(live), since: stampOf(f.cfg.Now())}
	f.add(l)
	return l
}

func (f *Follower) add(l *containerLog) {
	l.resource = l.from
	folder := filepath.Dir(l.path)
	f.logs[l.path] = l
	f.folders[folder] = append(f.folders[folder], l)
}

// prepare brings resource and policy up to date, and reports whether the log may
// be read: a new one waits for a while rather than go without what the API knows.
func (f *Follower) prepare(l *containerLog) bool {
	if l.input != nil || f.cfg.Resource == nil {
		if !l.complete {
			l.complete = true
			l.policy = f.cfg.Policy(l.resource)
		}
		return true
	}
	generation := uint64(0)
	if f.cfg.Generation != nil {
		generation = f.cfg.Generation()
	}
	if l.complete && l.known == generation {
		return true
	}
	r, complete := f.cfg.Resource(l.from)
	if !complete && !l.complete && l.since.until(stampOf(f.cfg.Now())) < f.cfg.MetadataWait {
		f.wait(l)
		return false
	}
	if r != l.resource || !l.complete {
		l.resource = r
		l.policy = f.cfg.Policy(r)
		for s, h := range l.held {
			if !h.open() {
				l.held[s] = nil // the policy may have another grouper
			}
		}
	}
	l.complete, l.known = true, generation
	return true
}

// Sweep looks for new, renamed and deleted files: in the named containers'
// folders, or in everything if full. It also makes those logs ready that wait
// for time to pass. visit, which may be nil, is called with each folder before
// it is listed, so that a watch put on it misses nothing.
func (f *Follower) Sweep(full bool, folders []string, visit func(folder string)) {
	if full {
		f.missed = false
		f.sweepAll(visit)
	} else {
		defer func(m bool) { f.missed = m }(f.missed) // what a hint told was not missed
		for _, folder := range folders {
			f.sweepHinted(folder, visit)
		}
		for _, l := range slices.Collect(maps.Keys(f.relist)) {
			if _, still := f.relist[l]; still { // another log of its folder may have come first
				f.sweepHinted(filepath.Dir(l.path), nil)
			}
		}
	}
	for l := range f.waiting {
		f.enqueue(l)
	}
	f.boundDeleted()
	f.release()
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

// wait has the log looked at again by the next sweep.
func (f *Follower) wait(l *containerLog) { f.waiting[l] = struct{}{} }

// forget drops a log of which nothing is left.
func (f *Follower) forget(l *containerLog) {
	folder := filepath.Dir(l.path)
	delete(f.logs, l.path)
	delete(f.waiting, l)
	delete(f.relist, l)
	f.folders[folder] = slices.DeleteFunc(f.folders[folder], func(x *containerLog) bool { return x == l })
	if len(f.folders[folder]) == 0 {
		delete(f.folders, folder)
	}
}

func (f *Follower) sweepAll(visit func(string)) {
	complete := true
	f.round++
	seen := map[string]bool{}
	if f.cfg.Folder != "" {
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
	}
	for i := range f.cfg.Files {
		if !f.sweepFiles(&f.cfg.Files[i], visit, seen) {
			complete = false
		}
	}
	if !complete {
		return
	}
	for folder, ls := range f.folders {
		if !seen[folder] && ls[0].input == nil {
			f.sweepHinted(folder, nil)
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
	for _, x := range f.leaving {
		here[x.id] = true
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

// logName takes the name of a file apart as kubelet and the runtimes write it: base is <restart>.log,
// and it may have a stamp behind it, and .gz or .tmp. A pattern would cost memory for every file.
func logName(name string) (base string, temporary, ok bool) {
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	restart, rest, found := strings.Cut(name, ".log")
	if !found || !digits(restart) {
		return "", false, false
	}
	base = name[:len(restart)+len(".log")]
	rest, temporary = strings.CutSuffix(rest, ".tmp")
	if !temporary {
		rest = strings.TrimSuffix(rest, ".gz")
	}
	day, clock, dash := strings.Cut(strings.TrimPrefix(rest, "."), "-")
	stamped := rest != "" && rest[0] == '.' && dash && len(day) == 8 && len(clock) == 6 && digits(day) && digits(clock)
	return base, temporary, rest == "" || stamped
}

// sweepHinted brings the logs in a folder up to date.
func (f *Follower) sweepHinted(folder string, visit func(string)) {
	if f.isContainer(folder) {
		f.sweepContainer(folder, visit)
	} else {
		f.sweepFolder(folder, visit)
	}
}

// maxListings of a folder are made in one sweep.
const maxListings = 4

// sweepContainer brings the generations of a container's logs up to date. It
// reports whether it saw everything.
//
// What has a name in the listing may be another file by the time it is opened: then the one
// that was listed has a name that the listing does not show, and comes before the other. So
// the folder is listed again after a new file, until there is none.
func (f *Follower) sweepContainer(folder string, visit func(string)) (complete bool) {
	if visit != nil {
		visit(folder)
	}
	for i := range maxListings {
		f.stale = false
		if complete = f.listContainer(folder, i == maxListings-1); !f.stale {
			break
		}
	}
	return complete
}

// listContainer is one look of sweepContainer. One that finds itself stale takes nothing for
// missing unless it is the last.
func (f *Follower) listContainer(folder string, last bool) bool {
	entries, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.failed("list", folder, err)
		return false
	}
	var present []*listing // one for each live path; rarely more than two
	of := func(live string) *listing {
		for _, n := range present {
			if n.live == live {
				return n
			}
		}
		return nil
	}
	for _, e := range entries {
		base, temporary, ok := logName(e.Name())
		path := folder + string(filepath.Separator) + e.Name()
		if !ok {
			f.skip(path, "not_a_log")
			continue
		}
		if temporary { // kubelet is compressing into it
			continue
		}
		if e.Type()&fs.ModeSymlink != 0 && !f.leadsToLogs(path) {
			continue
		}
		live := path[:len(path)-len(e.Name())+len(base)]
		n := of(live)
		if n == nil {
			n = &listing{live: live}
			present = append(present, n)
		}
		n.add(path)
		if path == live {
			n.linked = e.Type()&fs.ModeSymlink != 0
		}
	}
	complete := true
	for _, n := range present {
		if !f.bring(f.logOf(n.live), n) {
			complete = false
		}
	}
	for _, l := range f.folders[folder] {
		n := of(l.path)
		if n == nil {
			n = &listing{live: l.path}
			f.bring(l, n)
		}
		if !f.stale || last {
			f.place(l, n)
			f.missing(l, n)
		}
	}
	return complete
}

// listing are the names of one log that are in its folder.
type listing struct {
	live   string
	plain  []string // by age, the live one last
	gz     []string // by age
	holes  []string // ages of files of the log that are not read
	linked bool     // the live one is a symbolic link
}

func (n *listing) add(path string) {
	if strings.HasSuffix(path, ".gz") {
		n.gz = append(n.gz, path)
		return
	}
	n.plain = append(n.plain, path)
	slices.SortFunc(n.plain, func(a, b string) int {
		if a == n.live || b == n.live {
			return len(b) - len(a) // the stamp makes a rotated name longer
		}
		return strings.Compare(a, b)
	})
}

// bring makes sure that the files of these names are among the generations of l. What it adds is
// in its place after place.
func (f *Follower) bring(l *containerLog, n *listing) (complete bool) {
	complete = true
	for _, g := range l.gens {
		g.named = false
	}
	failed := func(path string, err error) {
		complete = false
		f.failed("open", path, err)
		for _, g := range l.gens {
			g.named = g.named || g.path == path // as far as is known
		}
	}
	for _, path := range n.plain {
		if err := f.find(l, path); err != nil {
			failed(path, err)
		}
	}
	slices.Sort(n.gz)
	for _, path := range n.gz {
		if err := f.findGzip(l, n, path); err != nil {
			failed(path, err)
		}
	}
	return complete
}

// place gives the generations that have names their places, and notes whether they follow the
// one before.
func (f *Follower) place(l *containerLog, n *listing) {
	l.order()
	for i, g := range l.gens {
		switch {
		case !g.named:
		case i == 0:
			if g.after == unknown {
				s := adjacent
				if l.open() { // what was before it had to be given up
					s = apart
				}
				f.succeed(l, g, s)
			}
		case f.follows(l, l.gens[i-1], g, n):
			f.succeed(l, g, adjacent)
		case g.after == unknown:
			f.succeed(l, g, apart)
		}
	}
}

// follows reports whether the listing proves that no generation lay between older and g. The
// oldest is deleted first, so what came after a file that still has a name has one as well.
func (f *Follower) follows(l *containerLog, older, g *generation, n *listing) bool {
	if older.replaced {
		return true // its end lets go what is open
	}
	if !older.named {
		return n.linked && f.rotatedAside(l, older)
	}
	return !slices.ContainsFunc(n.holes, func(age string) bool { return l.age(older) <= age && age < l.age(g) })
}

// rotatedAside is follows for a log that is a symbolic link: its files are rotated where it
// leads to, as Docker does, and the listing does not show them.
func (f *Follower) rotatedAside(l *containerLog, older *generation) bool {
	target, err := filepath.EvalSymlinks(l.path)
	if err != nil {
		return false
	}
	info, err := os.Stat(target + ".1")
	if err != nil {
		return older.file != nil && !older.unlinked()
	}
	dev, ino, err := numbers(info)
	return err == nil && dev == older.dev && ino == older.ino
}

// order gives the fresh generations their places. The known are in order
// already. One without a name is not compared with: the oldest is deleted first, so it stays
// before the new ones, whatever the clocks of kubelet and of the file system say.
func (l *containerLog) order() {
	var fresh []*generation
	for _, g := range l.gens {
		if g.fresh {
			fresh = append(fresh, g)
		}
	}
	if len(fresh) == 0 {
		return
	}
	l.gens = slices.DeleteFunc(l.gens, func(g *generation) bool { return g.fresh })
	slices.SortStableFunc(fresh, func(a, b *generation) int { return strings.Compare(l.age(a), l.age(b)) })
	for _, g := range fresh {
		g.fresh = false
		age := l.age(g)
		i := slices.IndexFunc(l.gens, func(o *generation) bool { return o.named && l.age(o) > age })
		if i < 0 {
			i = len(l.gens)
		}
		l.gens = slices.Insert(l.gens, i, g)
	}
}

// age is a text that sorts the generations of a log that have names. A rotated one has its
// stamp there, or, of a single file's, whose names change with each rotation, the time when it
// was last written to.
func (l *containerLog) age(g *generation) string {
	rotated := strings.TrimSuffix(strings.TrimPrefix(g.path, l.path), ".gz")
	switch {
	case rotated == "":
		return "~"
	case l.input != nil && !l.input.Own:
		return g.modified.time().Format("20060102-150405.000000000")
	default:
		return rotated[1:]
	}
}

// leadsToLogs reports whether the symbolic link at path leads to where logs may be.
func (f *Follower) leadsToLogs(path string) bool {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			f.failed("follow", path, err)
		}
		return false
	}
	for _, folder := range append([]string{f.cfg.Folder}, f.cfg.Linked...) {
		if strings.HasPrefix(target, filepath.Clean(folder)+string(filepath.Separator)) {
			return true
		}
	}
	f.skip(path, "link_outside")
	return false
}

// findGzip makes sure that a compressed generation is among those of l, as a file to be read or
// as the copy of one that is.
func (f *Follower) findGzip(l *containerLog, n *listing, path string) error {
	plain := strings.TrimSuffix(path, ".gz")
	for _, g := range l.gens {
		if g.path == path || g.path == plain || g.gzPath == path {
			if g.path != path {
				g.gzPath = path
			}
			g.named = true
			return nil
		}
	}
	for _, o := range slices.Clone(l.gens) {
		// It may be the copy of one whose first line was not whole when we last looked, or is
		// another by now.
		if !o.named && !o.finished && !o.replaced && o.gz == nil && f.open(l, o) == nil {
			f.verify(l, o)
		}
	}
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		f.stale = true
		return nil
	}
	if err != nil {
		return err
	}
	g := &generation{path: path, modified: stampOf(info.ModTime()), named: true, fresh: true}
	if g.dev, g.ino, err = numbers(info); err != nil {
		return err
	}
	if err := f.open(l, g); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errOther) {
			f.stale = true
			return nil
		}
		return err
	}
	g.size, err = inflatedSize(g.file, info.Size())
	if err == nil {
		err = f.identify(l, g, true)
	}
	if err != nil {
		f.skip(path, "damaged_gzip")
		n.holes = append(n.holes, l.age(g))
		f.log.Warn("a compressed log file cannot be read; it is left out and counted", "log.file.path", path, "error.message", err.Error())
		return g.close()
	}
	for _, o := range l.gens {
		if o.id == g.id && g.id != "" { // it was renamed and compressed since we last looked
			o.gzPath, o.path, o.named = path, plain, true
			return g.close()
		}
	}
	if g.id == "" { // empty
		f.skip(path, "empty")
		return g.close()
	}
	f.book.Written(g.id, g.size)
	l.gens = append(l.gens, g)
	f.missed, f.stale = true, true
	f.enqueue(l)
	return nil
}

// find makes sure that the file at path is among the generations of l.
func (f *Follower) find(l *containerLog, path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		f.stale = true // renamed meanwhile; the next listing shows where to
		return nil
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
		if reused := path == l.path && g.path != l.path; g.dev == dev && g.ino == ino && g.gz == nil && !g.replaced && !reused && f.renamed(g, path, info.Size()) {
			if g.path != path {
				g.path = path
				f.reopenAccount(l, g)
				if g.id != "" && !g.finished {
					f.keep(l, g) // its name was not known when it could have got a link
				}
			}
			g.missingSince, g.named = 0, true
			if g.restored {
				g.restored, g.gone = false, false
				delete(f.gone, g)
				f.reopenAccount(l, g)
			}
			// Another file of the same size may have the inode, or have overwritten it.
			other := stampOf(info.ModTime()) != g.modified
			if info.Size() != g.offset || other {
				g.again = true
				f.enqueue(l)
			}
			if (info.Size() != g.size || other) && g.file != nil {
				f.missed = true
				f.verify(l, g) // so that what is pending is known without reading it
			}
			f.closeIdle(g)
			return nil
		}
	}
	if path == l.path {
		path = l.path // one text in memory, not two
	}
	g := &generation{path: path, dev: dev, ino: ino, named: true, fresh: true}
	if err := f.open(l, g); err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errOther) {
			f.stale = true
			return nil
		}
		return err
	}
	l.gens = append(l.gens, g)
	f.missed, f.stale = true, true
	f.enqueue(l)
	f.verify(l, g)
	return nil
}

// renamed reports whether the file at path, which has the inode of g, is g. One that is neither
// open nor in the spool does not keep its inode: another file may have got it, and may have been
// rotated before we saw it.
func (f *Follower) renamed(g *generation, path string, size int64) bool {
	if g.path == path || g.file != nil || g.link != "" || g.id == "" {
		return true
	}
	if size < g.size {
		return false
	}
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return true // nothing is read of it before it can be opened and verified
	}
	same, err := f.same(&generation{file: file, first: g.first, hash: g.hash})
	if closed := file.Close(); closed != nil {
		f.failed("close", path, closed)
	}
	return same || err != nil
}

func (f *Follower) reopenAccount(l *containerLog, g *generation) {
	if g.id != "" {
		f.book.Open(g.id, g.path, l.owner())
	}
}

// missing marks the generations that are not under any of the paths any more. A
// rename may be half seen, so a file that still has a name gets some time.
func (f *Follower) missing(l *containerLog, n *listing) {
	now := stampOf(f.cfg.Now())
	delete(f.relist, l)
	for _, g := range slices.Clone(l.gens) {
		if g.gzPath != "" && !slices.Contains(n.gz, g.gzPath) {
			g.gzPath = ""
		}
		copied := g.gzPath != "" && !slices.Contains(n.plain, g.path) // its compressed copy alone is left
		if g.gone || g.replaced || g.named && !copied {
			if g.gone && g.restored {
				g.restored = false // kubelet has deleted it
				f.enqueue(l)
			}
			continue
		}
		if first := g.missingSince == 0; first {
			g.missingSince = now
			if len(n.plain)+len(n.gz) > 0 {
				// It may have been renamed and compressed while the folder was listed, and
				// have a name that this listing is too old for.
				f.relist[l] = struct{}{}
				continue
			}
		}
		if g.unlinked() || g.gz != nil || g.missingSince.until(now) >= 2*f.cfg.Grace {
			if g.file != nil {
				f.verify(l, g)
			}
			g.gone = true
			f.gone[g] = l
			f.enqueue(l)
		} else {
			f.relist[l] = struct{}{}
		}
	}
}

// maxGone deleted generations are kept at most, whatever their size.
const maxGone = 10_000

// boundDeleted gives up the oldest deleted generations while their unread bytes
// are over the limit: they occupy a disk on which nobody can see them.
func (f *Follower) boundDeleted() {
	total := int64(0)
	type held struct {
		l *containerLog
		g *generation
	}
	var all []held
	for g, l := range f.gone {
		if !g.finished {
			total += max(0, g.size-g.offset)
			all = append(all, held{l, g})
		}
	}
	f.tellDeleted(total)
	if total <= f.cfg.MaxDeleted && len(all) <= maxGone {
		return
	}
	slices.SortFunc(all, func(a, b held) int { return cmp.Compare(a.g.missingSince, b.g.missingSince) })
	for i, h := range all {
		if total <= f.cfg.MaxDeleted && len(all)-i <= maxGone {
			return
		}
		total -= max(0, h.g.size-h.g.offset)
		f.giveUp(h.g, ledger.RotatedAway)
		if i := slices.Index(h.l.gens, h.g); i+1 < len(h.l.gens) {
			f.succeed(h.l, h.l.gens[i+1], apart)
		}
		f.remove(h.l, h.g)
		f.enqueue(h.l) // so that what is open is let go
	}
}

// tellDeleted sets this Follower's part of a gauge that all outputs share.
func (f *Follower) tellDeleted(total int64) {
	f.metrics.Deleted.Add(float64(total - f.deleted))
	f.deleted = total
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

// remove drops a generation of which nothing is left to read. Its account is
// closed when the last of its bytes is settled; until then its link stays.
func (f *Follower) remove(l *containerLog, g *generation) {
	f.shut(g)
	if g.id != "" {
		f.leaving = append(f.leaving, leaving{g.id, f.linkPath(l, g.link)})
	} else {
		f.unlink(f.linkPath(l, g.link))
	}
	delete(f.gone, g)
	delete(f.spent, g)
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
