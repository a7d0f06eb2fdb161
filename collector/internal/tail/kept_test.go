package tail_test

import (
	"compress/gzip"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const folder = "shop_cart-7d9c8b5f6d-x2vzq_u1"

// compress does what kubelet does to the older generations: by way of a
// temporary file, so that the copy has another inode.
func (n *node) compress(name string) {
	n.t.Helper()
	b, err := os.ReadFile(n.path(name))
	n.must(err)
	f, err := os.Create(n.path(name + ".tmp"))
	n.must(err)
	z := gzip.NewWriter(f)
	_, err = z.Write(b)
	n.must(err)
	n.must(z.Close())
	n.must(f.Close())
	n.must(os.Rename(n.path(name+".tmp"), n.path(name+".gz")))
	n.must(os.Remove(n.path(name)))
}

func (n *node) rename(from, to string) {
	n.t.Helper()
	n.must(os.Rename(n.path(from), n.path(to)))
}

func spooled(t *testing.T) *node {
	t.Helper()
	n := start(t)
	n.stop()
	n.config.Spool = filepath.Join(t.TempDir(), "spool")
	n.follow()
	return n
}

// links returns the names in the spool.
func (n *node) links() (out []string) {
	n.t.Helper()
	if _, err := os.Stat(n.config.Spool); err == nil {
		n.must(filepath.WalkDir(n.config.Spool, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				out = append(out, path)
			}
			return err
		}))
	}
	return out
}

// Five rotations while the collector is away: one generation is plain, the older ones are
// compressed, one of them was half read.
func TestCompressedWhileAway(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2", "P 3a")
	n.settle(n.read(1)...)
	n.stop()
	for i := range 4 {
		stamped := fmt.Sprintf("%s.20261123-02000%d", cart, i)
		n.rename(cart, stamped)
		n.write(cart, fmt.Sprintf("F 3b%d", i), "F line")
		if i < 3 {
			n.compress(stamped)
		}
	}
	n.follow()
	n.want("2", "3a3b0", "line", "3b1", "line", "3b2", "line", "3b3", "line")
	n.closed(nil)
	n.restart() // nothing of them is read a second time
	n.want()
	n.closed(nil)
	for i := range 3 {
		n.must(os.Remove(n.path(fmt.Sprintf("%s.20261123-02000%d.gz", cart, i))))
	}
	n.want()
	if files := n.ledger.Files(); len(files) != 2 {
		t.Errorf("%d accounts are open with two files left: %+v", len(files), files)
	}
}

// A crash before the first checkpoint, and then the file is a compressed one: its
// records have the ids that they had. A record of which more lines were found the second
// time has another id than the shorter one, or a backend would take it for that.
func TestOriginsOutliveACrash(t *testing.T) {
	n := start(t)
	n.stop()
	n.config.Policy = func(*record.Resource) tail.Policy {
		return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
	}
	n.follow()
	n.write(cart, "F 1", "F trace:", "F  a")
	first := n.want("1", "trace:\n a")
	n.stop()
	n.ledger = ledger.New() // no checkpoint
	n.write(cart, "F  b")
	n.rename(cart, cart+".20261123-020000")
	n.compress(cart + ".20261123-020000")
	n.write(cart, "F 2")
	n.follow()
	again := n.want("1", "trace:\n a\n b", "2")
	if first[0].Record.Origin.File != again[0].Record.Origin.File || first[0].Record.Origin.Offset != again[0].Record.Origin.Offset {
		t.Errorf("the same line has the origins %+v and %+v", first[0].Record.Origin, again[0].Record.Origin)
	}
	if first[1].Record.Origin.Offset != again[1].Record.Origin.Offset || first[1].Record.Origin.File == again[1].Record.Origin.File {
		t.Errorf("records of two and three lines have the origins %+v and %+v", first[1].Record.Origin, again[1].Record.Origin)
	}
}

// Once only the compressed copy has a name, the inode of the file is let go: the next log file
// may get it, and must not be taken for this one.
func TestCompressedLetsItsInodeGo(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1")
	n.want("1")
	n.rename(cart, cart+".20261123-020000")
	n.write(cart, "F 2")
	n.want("2")
	n.compress(cart + ".20261123-020000")
	n.want()
	var paths []string
	for _, s := range n.ledger.Files() {
		paths = append(paths, s.Path)
	}
	slices.Sort(paths)
	if d := cmp.Diff([]string{n.path(cart), n.path(cart + ".20261123-020000.gz")}, paths); d != "" {
		t.Errorf("open accounts (-want +got):\n%s", d)
	}
	n.rename(cart, cart+".20261123-020100")
	n.write(cart, "F 3")
	n.want("3")
	n.closed(nil)
}

// Compressed while it is read: the copy is not read again, even after a restart.
func TestCompressedWhileRead(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "F 2", "F 3")
	n.settle(n.read(1)...)
	n.rename(cart, cart+".20261123-020000")
	n.write(cart, "F 4")
	n.compress(cart + ".20261123-020000")
	n.want("2", "3", "4")
	n.restart()
	n.want()
	n.closed(nil)
	if got := len(n.links()); got != 1 {
		t.Errorf("%d names in the spool with one file in use: %v", got, n.links())
	}
}

func TestDamagedGzip(t *testing.T) {
	n := start(t)
	stamped := cart + ".20261123-020000"
	var lines []string
	for i := range 20_000 {
		lines = append(lines, fmt.Sprintf("F %d %x", i, i*i*7919))
	}
	n.write(stamped, lines...)
	n.compress(stamped)
	b, err := os.ReadFile(n.path(stamped + ".gz"))
	n.must(err)
	b[len(b)/2] ^= 0xff
	n.must(os.WriteFile(n.path(stamped+".gz"), b, 0o600))
	n.write(cart, "F live")
	var got int
	for range 40 {
		es := n.read(1 << 20)
		n.settle(es...)
		got += len(es)
		n.now = n.now.Add(500 * time.Millisecond)
	}
	total := n.ledger.Total()
	if got < 1000 || got > len(lines) || total.Dropped["unreadable"] == 0 || total.Pending != 0 {
		t.Errorf("%d lines of a damaged file; account %+v", got, total)
	}
}

// A pod is deleted while the collector is away; the spool has kept its log, and
// lets it go when its last line is settled.
func TestSpoolOutlivesDeletionAndRestart(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1", "F 2", "F 3")
	n.settle(n.read(1)...)
	n.write(cart, "F 4")
	n.rename(cart, cart+".20261123-020000")
	n.write(cart, "F 5")
	n.read(1) // sees both
	n.stop()
	n.must(os.RemoveAll(n.path(folder)))
	n.follow()
	n.want("2", "3", "4", "5")
	n.closed(nil)
	if left := n.links(); len(left) != 0 {
		t.Errorf("settled and deleted, but the spool has %v", left)
	}
	if entries, err := os.ReadDir(n.config.Spool); err != nil || len(entries) != 0 {
		t.Errorf("folders stay in the spool: %v, %v", entries, err)
	}
}

func TestSpoolOnAnotherFileSystem(t *testing.T) {
	n := start(t)
	n.stop()
	n.config.Spool = "/proc/outrigger-spool"
	n.follow()
	n.write(cart, "F 1")
	n.want("1")
	n.closed(nil)
	if got := testutil.ToFloat64(n.metrics.Errors.WithLabelValues("link")); got == 0 {
		t.Error("no error is counted")
	}
}

func TestDeletedOverTheLimitLeavesTheSpool(t *testing.T) {
	n := spooled(t)
	n.stop()
	n.config.MaxDeleted = 10
	n.follow()
	n.write(cart, "F 1", "F 2")
	n.settle(n.read(1)...)
	n.must(os.RemoveAll(n.path(folder)))
	n.want()
	n.closed(map[string]int64{"rotated_away": 42})
	if left := n.links(); len(left) != 0 {
		t.Errorf("given up, but the spool has %v", left)
	}
}

// trace joins lines that begin with a space, and waits after a line that ends in a colon.
type trace struct{ in bool }

func (g *trace) Line(text []byte) (joins, open bool) {
	joins = g.in && strings.HasPrefix(string(text), " ")
	g.in = joins || strings.HasSuffix(string(text), ":")
	return joins, g.in
}
func (g *trace) Reset() { g.in = false }

// Records of several lines: streams apart, over a rotation, over a restart; the
// last one waits a second for more.
func TestMultiLine(t *testing.T) {
	n := start(t)
	n.stop()
	n.config.Policy = func(*record.Resource) tail.Policy {
		return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
	}
	n.follow()
	n.write(cart, "F plain", "F panic:", "F  at a")
	n.raw(cart, "2026-11-23T02:00:01Z stderr F other\n")
	es := n.read(10)
	if len(es) != 2 || es[0].Record.Body != "plain" || es[1].Record.Body != "other" {
		t.Fatalf("got %d records", len(es))
	}
	n.settle(es...)
	n.restart()
	n.rename(cart, cart+".20261123-020000")
	n.write(cart, "F  at b", "F end", "F last:", "F  x")
	n.want("panic:\n at a\n at b", "end", "last:\n x")
	n.closed(nil)
}

func TestOff(t *testing.T) {
	n := start(t)
	n.stop()
	n.config.Policy = func(r *record.Resource) tail.Policy {
		if r.Pod == "quiet-0" {
			return tail.Policy{Off: "annotation outrigger.dev/logs: off"}
		}
		return tail.Policy{}
	}
	n.follow()
	n.write("shop_quiet-0_u2/app/0.log", "F 1", "F 2")
	n.write(cart, "F 3")
	n.want("3")
	n.closed(map[string]int64{"rule": 84})
}

// A new log waits for what the API knows of its pod, but not for ever; what it
// says later counts from then on.
func TestMetadata(t *testing.T) {
	n := start(t)
	n.stop()
	var known *record.Resource
	generation := uint64(0)
	n.config.Resource = func(from *record.Resource) (*record.Resource, bool) {
		if known == nil {
			return from, false
		}
		return known, true
	}
	n.config.Generation = func() uint64 { return generation }
	n.follow()
	n.write(cart, "F 1")
	if es := n.read(10); len(es) != 0 {
		t.Fatalf("%d records before the pod is known", len(es))
	}
	n.now = n.now.Add(6 * time.Second)
	es := n.read(10)
	if len(es) != 1 || es[0].Record.Resource.Labels != nil {
		t.Fatalf("after the wait: %+v", es)
	}
	n.settle(es...)
	known = &record.Resource{Namespace: "shop", Labels: map[string]string{"app": "cart"}}
	generation++
	n.write(cart, "F 2")
	if es = n.read(10); len(es) != 1 || es[0].Record.Resource != known {
		t.Fatalf("once it is known: %+v", es)
	}
	n.settle(es...)
	n.closed(nil)
}

func TestDocker(t *testing.T) {
	n := start(t)
	outside := t.TempDir()
	target := filepath.Join(outside, "abc-json.log")
	n.must(os.WriteFile(target, []byte(`{"log":"one \"1\"\n","stream":"stdout","time":"2026-11-23T03:00:00.000000005Z"}
{"log":"tw","stream":"stderr","time":"2026-11-23T03:00:01Z"}
{"log":"three\n","stream":"stdout","time":"2026-11-23T03:00:02Z"}
{"log":"o\n","stream":"stderr","time":"2026-11-23T03:00:03Z"}
{"log":5}
`), 0o600))
	n.must(os.MkdirAll(filepath.Dir(n.path(cart)), 0o750))
	n.must(os.Symlink(target, n.path(cart)))
	n.want() // nobody has said that links may lead there
	if got := testutil.ToFloat64(n.metrics.Skipped.WithLabelValues("link_outside")); got != 1 {
		t.Errorf("skipped as link_outside: %v; want 1", got)
	}
	n.stop()
	n.config.Linked = []string{outside}
	n.follow()
	es := n.want(`one "1"`, "three", "two", `{"log":5}`)
	if len(es) == 4 && (es[0].Record.Stream != "stdout" || es[2].Record.Stream != "stderr" || es[2].Record.Time.Second() != 1) {
		t.Errorf("streams or times are wrong: %+v", es[2].Record)
	}
	n.closed(nil)
}

// A pipe in place of a log must not stop the reader.
func TestPipe(t *testing.T) {
	n := start(t)
	n.must(os.MkdirAll(filepath.Dir(n.path(cart)), 0o750))
	n.must(mkfifo(n.path(cart)))
	n.write("shop_web-0_u3/app/0.log", "F 1")
	n.want("1")
}

func TestFiles(t *testing.T) {
	n := start(t)
	n.stop()
	dir := t.TempDir()
	n.config.Files = []tail.Files{{Patterns: []string{filepath.Join(dir, "*.log")}, Resource: record.Resource{Service: "nginx"}, Format: tail.Text}}
	n.follow()
	path := filepath.Join(dir, "access.log")
	add := func(text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		n.must(err)
		_, err = f.WriteString(text)
		n.must(err)
		n.must(f.Close())
	}
	add("GET /1\nGET /2\n")
	es := n.want("GET /1", "GET /2")
	if r := es[0].Record; r.Resource.Service != "nginx" || r.Resource.Node != "n1" || r.Stream != "" {
		t.Errorf("record %+v", r)
	}
	add("GET /3\n")
	n.must(os.Rename(path, path+".1"))
	add("GET /4\n")
	n.stop() // rotated while away
	n.follow()
	n.want("GET /3", "GET /4")
	n.must(os.Rename(path+".1", path+".2"))
	n.must(os.Rename(path, path+".1"))
	add("GET /5\n")
	n.want("GET /5")
	n.closed(nil)
}

// Reading costs two allocations for a thousand lines and more, not one a line.
func BenchmarkRead(b *testing.B) {
	m, err := tail.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	path := filepath.Join(dir, cart)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		b.Fatal(err)
	}
	var text strings.Builder
	const lines = 100_000
	for i := range lines {
		fmt.Fprintf(&text, "2026-11-23T02:00:00.%09dZ stdout F %d %s\n", i, i, strings.Repeat("GET /cart 200 ", 11))
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(text.Len()))
	b.ReportAllocs()
	for b.Loop() {
		f := tail.New(tail.Config{Folder: dir}, ledger.New(), slog.New(slog.DiscardHandler), m)
		f.Sweep(true, nil, nil)
		n := 0
		for f.Read(func(tail.Entry) bool { n++; return true }) {
		}
		if err := f.Close(); err != nil || n != lines {
			b.Fatal(n, err)
		}
	}
}

// A file that was taken for deleted comes back: its account goes on.
func TestBackAgain(t *testing.T) {
	n := spooled(t)
	n.write(cart, "F 1")
	n.settle(n.read(1)...)
	n.must(os.Rename(n.path(cart), n.path("aside")))
	n.f.Sweep(true, nil, nil)
	n.now = n.now.Add(10 * time.Second)
	for range 3 { // deleted, as it seems, and read to its end; not settled in a checkpoint yet
		n.f.Sweep(true, nil, nil)
		n.f.Read(func(tail.Entry) bool { return true })
	}
	n.must(os.MkdirAll(filepath.Dir(n.path(cart)), 0o750))
	n.must(os.Rename(n.path("aside"), n.path(cart)))
	n.write(cart, "F 2")
	n.want("2")
	n.closed(nil)
	n.restart()
	n.want()
	n.closed(nil)
}

// A hint about a folder of single files is no hint about a container.
func TestHintOfAFolderOfFiles(t *testing.T) {
	n := start(t)
	n.stop()
	dir := t.TempDir()
	n.config.Files = []tail.Files{{Patterns: []string{filepath.Join(dir, "0.log")}, Resource: record.Resource{Service: "x"}, Format: tail.Text}}
	n.follow()
	n.must(os.WriteFile(filepath.Join(dir, "0.log"), []byte("one\n"), 0o600))
	n.f.Sweep(false, []string{dir}, nil)
	var got []string
	n.f.Read(func(e tail.Entry) bool {
		got = append(got, e.Record.Body+" of "+e.Record.Resource.Service)
		return true
	})
	if len(got) != 1 || got[0] != "one of x" {
		t.Errorf("got %q", got)
	}
}

// Each output has a Follower; what they keep on the disk is one figure.
func TestDeletedBytesAreOfAllOutputs(t *testing.T) {
	n := start(t)
	other := tail.New(n.config, ledger.New(), slog.New(slog.DiscardHandler), n.metrics)
	n.write(cart, "F 1")
	for _, f := range []*tail.Follower{n.f, other} {
		f.Sweep(true, nil, nil)
	}
	n.must(os.Remove(n.path(cart)))
	for _, want := range []float64{42, 84} {
		f := n.f
		if want > 42 {
			f = other
		}
		f.Sweep(true, nil, nil)
		f.Sweep(true, nil, nil)
		if got := testutil.ToFloat64(n.metrics.Deleted); got != want {
			t.Errorf("%v bytes are kept; want %v", got, want)
		}
	}
	n.must(other.Close())
	if got := testutil.ToFloat64(n.metrics.Deleted); got != 42 {
		t.Errorf("%v bytes are kept after one has ended; want 42", got)
	}
}
