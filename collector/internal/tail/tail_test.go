package tail_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is a node's log folder with a follower on it, whose clock stands still.
type node struct {
	t       *testing.T
	folder  string
	now     time.Time
	ledger  *ledger.Ledger
	f       *tail.Follower
	metrics *tail.Metrics
	stamp   int
	config  tail.Config
}

func start(t *testing.T) *node {
	t.Helper()
	m, err := tail.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, folder: t.TempDir(), now: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC), ledger: ledger.New(), metrics: m}
	n.config = tail.Config{Folder: n.folder, Cluster: "c1", Node: "n1", Now: func() time.Time { return n.now }}
	n.follow()
	t.Cleanup(func() { n.stop() })
	return n
}

func (n *node) follow() {
	n.f = tail.New(n.config, n.ledger, slog.New(slog.DiscardHandler), n.metrics)
}

func (n *node) stop() {
	if err := n.f.Close(); err != nil {
		n.t.Error(err)
	}
}

// restart is what a new process finds: the checkpoint and the files.
func (n *node) restart() {
	n.t.Helper()
	n.stop()
	b, err := n.ledger.Encode()
	if err != nil {
		n.t.Fatal(err)
	}
	if n.ledger, err = ledger.Decode(b); err != nil {
		n.t.Fatal(err)
	}
	n.follow()
}

func (n *node) path(name string) string { return filepath.Join(n.folder, name) }

// write appends lines as a runtime does, each with a stamp of its own.
func (n *node) write(name string, lines ...string) {
	n.t.Helper()
	var b strings.Builder
	for _, l := range lines {
		n.stamp++
		fmt.Fprintf(&b, "2026-11-23T02:00:00.%09dZ stdout %s\n", n.stamp, l)
	}
	n.raw(name, b.String())
}

func (n *node) raw(name, text string) {
	n.t.Helper()
	path := n.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		n.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		n.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// read takes what is there now, at most max records.
func (n *node) read(max int) []tail.Entry {
	n.t.Helper()
	n.f.Sweep(true, nil, nil)
	var out []tail.Entry
	for len(out) < max && n.f.Read(func(e tail.Entry) bool { out = append(out, e); return len(out) < max }) {
	}
	return out
}

// settle acknowledges entries.
func (n *node) settle(es ...tail.Entry) {
	for _, e := range es {
		for _, s := range e.Spans {
			n.ledger.Settle(s.File, ledger.Span{Start: s.Start, End: s.End}, ledger.Acknowledged)
		}
	}
	n.must(n.ledger.Check())
}

// want reads until nothing comes for ten seconds, settles it, and compares.
func (n *node) want(bodies ...string) []tail.Entry {
	n.t.Helper()
	var all []tail.Entry
	var got []string
	for range 20 {
		es := n.read(1 << 20)
		n.settle(es...)
		for _, e := range es {
			got = append(got, e.Record.Body)
		}
		all = append(all, es...)
		n.now = n.now.Add(500 * time.Millisecond)
	}
	if d := cmp.Diff(bodies, got); d != "" {
		n.t.Errorf("lines (-want +got):\n%s\n%v", d, n.f)
	}
	return all
}

// closed fails the test unless every byte is settled.
func (n *node) closed(dropped map[string]int64) {
	n.t.Helper()
	total := n.ledger.Total()
	if d := cmp.Diff(dropped, total.Dropped); d != "" || total.Pending != 0 {
		n.t.Errorf("account %+v does not close; dropped (-want +got):\n%s", total, d)
	}
}

const cart = "shop_cart-7d9c8b5f6d-x2vzq_u1/app/0.log"

func TestWhereARecordComesFrom(t *testing.T) {
	n := start(t)
	n.write(cart, "F hello")
	e := n.want("hello")[0]
	want := &record.Record{
		Time: time.Date(2026, 11, 23, 2, 0, 0, 1, time.UTC), Observed: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC), Stream: "stdout", Body: "hello",
		Resource: &record.Resource{Cluster: "c1", Node: "n1", Namespace: "shop", Pod: "cart-7d9c8b5f6d-x2vzq", PodUID: "u1", Container: "app", Service: "cart"},
		Origin:   record.Origin{File: "84f6eac7880e-5fcd5154a1c42133", Path: n.path(cart), Offset: 0, End: 46},
	}
	if d := cmp.Diff(want, e.Record); d != "" {
		t.Errorf("record (-want +got):\n%s", d)
	}
	n.closed(nil)
}

// kubelet renames, and the runtime goes on writing to the old file until it has
// opened the new one. Two rotations pass between two looks.
func TestRotation(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2")
	n.want("1", "2")
	n.write(cart, "F 3")
	n.must(os.Rename(n.path(cart), n.path(cart+".20261123-030000")))
	n.write(cart+".20261123-030000", "F 4")
	n.write(cart, "F 5")
	n.must(os.Rename(n.path(cart), n.path(cart+".20261123-030100")))
	n.write(cart, "F 6")
	first := n.read(1 << 20)
	n.settle(first...)
	n.write(cart+".20261123-030000", "F 4b") // late
	if len(first) != 2 {
		t.Errorf("%d lines before the first file was quiet; want 2", len(first))
	}
	n.want("4b", "5", "6")
	n.restart()
	n.write(cart, "F 7")
	n.want("7")
	n.closed(nil)
}

// A logical line begins in one generation and ends in the next, the collector
// restarts in between, and a line of the other stream lies within.
func TestPartialAcrossRotationAndRestart(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "P be")
	n.raw(cart, "2026-11-23T02:00:00.5Z stderr F in between\n")
	n.want("1", "in between")
	n.must(os.Rename(n.path(cart), n.path(cart+".20261123-030000")))
	n.restart()
	n.want()
	n.write(cart, "P gin", "F end", "F 2")
	n.want("beginend", "2")
	n.closed(nil)
}

// A file overwritten in place is read from its start, whether it is now shorter
// or, by the time of the next look, longer.
func TestOverwrittenInPlace(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2", "P open")
	n.want("1", "2")
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 3")
	n.want("open", "3")
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 4", "F 5", "F 6", "F 7", "F 8")
	n.want("4", "5", "6", "7", "8")
	n.closed(nil)

	// What was seen and not read is lost, and said to be.
	n.write(cart, "F 9", "F 10")
	if es := n.read(1); len(es) != 1 || es[0].Record.Body != "9" {
		t.Fatalf("read %v", es)
	} else {
		n.settle(es...)
	}
	n.must(os.Truncate(n.path(cart), 0))
	n.write(cart, "F 11")
	n.want("11")
	n.closed(map[string]int64{"truncated": 43})
}

// The pod is deleted with bytes unread: the open file still has them.
func TestDeleted(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2", "P unfinished")
	n.raw(cart, "2026-11-23T02:00:01Z stdout F torn")
	es := n.read(1)
	n.settle(es...)
	n.must(os.RemoveAll(n.path("shop_cart-7d9c8b5f6d-x2vzq_u1")))
	n.want("2", "unfinishedtorn")
	n.closed(nil)
	if files := n.ledger.Files(); len(files) != 0 {
		t.Errorf("accounts of deleted files stay open: %+v", files)
	}
}

// Deleted files may occupy the disk only so much; beyond it the oldest goes,
// counted.
func TestDeletedOverTheLimit(t *testing.T) {
	n := start(t)
	n.config.MaxDeleted = 200
	n.stop()
	n.follow()
	const one, two = "a_a_1/app/0.log", "b_b_2/app/0.log"
	for i := range 4 {
		n.write(one, fmt.Sprint("F a", i)) // 43 bytes each
		n.write(two, fmt.Sprint("F b", i))
	}
	n.f.Sweep(true, nil, nil)
	n.settle(n.read(1)...) // makes both sizes known
	n.must(os.Remove(n.path(one)))
	n.f.Sweep(true, nil, nil)
	n.now = n.now.Add(time.Second)
	n.must(os.Remove(n.path(two)))
	n.want("b0", "b1", "b2", "b3")
	n.closed(map[string]int64{"rotated_away": 3 * 43})
}

// Gone while no collector ran: the account closes with the cause, but not
// before everything could be seen.
func TestDeletedWhileAway(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2")
	n.settle(n.read(1)...)
	folder := n.folder
	n.must(os.RemoveAll(n.path("shop_cart-7d9c8b5f6d-x2vzq_u1")))
	n.must(os.Rename(folder, folder+"-away"))
	n.restart()
	n.read(1)
	if p := n.ledger.Total().Pending; p != 42 {
		t.Errorf("pending is %d while the folder cannot be listed; want 42", p)
	}
	n.must(os.Rename(folder+"-away", folder))
	n.want()
	n.closed(map[string]int64{"rotated_away": 42})
}

// The file that a checkpoint knows was deleted and another one has its inode.
// Truncating gives the same picture on every file system.
func TestInodeReused(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1", "F 2")
	n.want("1", "2")
	n.stop()
	f, err := os.OpenFile(n.path(cart), os.O_WRONLY|os.O_TRUNC, 0) // keeps the inode
	n.must(err)
	n.must(f.Close())
	n.write(cart, "F 3", "F 4", "F 5")
	n.restart()
	n.want("3", "4", "5")
	n.closed(nil)
}

func TestHeldUntilTheFirstLineIsWhole(t *testing.T) {
	n := start(t)
	n.raw(cart, "2026-11-23T02:00:00Z stdo")
	n.want()
	n.raw(cart, "ut F 1\n2026-11-23T02:00:01Z stdout F 2")
	n.want("1")
	n.raw(cart, "nd\n")
	n.want("2nd")
	n.closed(nil)
}

func TestMalformedLinesAreShippedWhole(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.raw(cart, "goroutine 1 [running]:\n\n2026-11-23T02:00:00Z stdout Q x\n")
	n.write(cart, "F 2")
	n.want("1", "goroutine 1 [running]:", "", "2026-11-23T02:00:00Z stdout Q x", "2")
	n.closed(nil)
	if c := testutil.ToFloat64(n.metrics.Malformed.WithLabelValues("bad_time")); c != 2 {
		t.Errorf("malformed lines counted: %v; want 2", c)
	}
}

// A line of 5 MiB in one piece costs no more memory than the limit and stops nothing.
func TestLongLine(t *testing.T) {
	n := start(t)
	const size = 5 << 20
	n.write(cart, "F before", "F "+strings.Repeat("x", size), "F after")
	var es []tail.Entry
	for range 100 {
		es = append(es, n.read(1<<20)...)
	}
	if len(es) != 3 || es[2].Record.Body != "after" {
		t.Fatalf("%d records; want 3", len(es))
	}
	if r := es[1].Record; len(r.Body) != record.MaxBody || r.TruncatedBytes != size-record.MaxBody {
		t.Errorf("body of %d bytes, %d cut; want %d and %d", len(r.Body), r.TruncatedBytes, record.MaxBody, size-record.MaxBody)
	}
	n.settle(es...)
	n.closed(nil)
}

// A container that writes a lot waits for its turn like all others.
func TestFairShare(t *testing.T) {
	n := start(t)
	const loud, quiet = "a_loud_1/app/0.log", "b_quiet_2/app/0.log"
	line := "F " + strings.Repeat("x", 1000)
	for range 4 * tail.Quantum / 1000 {
		n.write(loud, line)
	}
	n.write(quiet, "F quiet")
	for i, e := range n.read(1 << 20) {
		if e.Record.Resource.Pod != "quiet" {
			continue
		}
		if i > (tail.Quantum+tail.Chunk)/1000 {
			t.Errorf("the quiet container had to wait for %d lines of the loud one", i)
		}
		return
	}
	t.Error("the quiet container had no turn")
}

// Credit for one record at a time: the turns are the same.
func TestFairShareOfLittleCredit(t *testing.T) {
	n := start(t)
	line := "F " + strings.Repeat("x", 1000)
	for range 2 * tail.Quantum / 1000 {
		n.write("a_loud_1/app/0.log", line)
	}
	n.write("b_quiet_2/app/0.log", "F quiet")
	n.f.Sweep(true, nil, nil)
	for i := range 2 * tail.Quantum / 1000 {
		quiet := false
		n.f.Read(func(e tail.Entry) bool { quiet = e.Record.Resource.Pod == "quiet"; return false })
		if quiet {
			if i > (tail.Quantum+tail.Chunk)/1000 {
				t.Errorf("waited for %d lines", i)
			}
			return
		}
	}
	t.Error("the quiet container had no turn")
}

func TestNotRead(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.raw(cart+".20261123-020000.gz", "\x1f\x8b")
	n.raw(cart+".20261123-020000.gz.tmp", "")
	n.raw("shop_cart-7d9c8b5f6d-x2vzq_u1/app/notes.txt", "x\n")
	n.raw("README/x/0.log", "x\n")
	n.want("1")
	for reason, want := range map[string]float64{"damaged_gzip": 1, "not_a_log": 2, "not_a_pod": 1} {
		if got := testutil.ToFloat64(n.metrics.Skipped.WithLabelValues(reason)); got != want {
			t.Errorf("skipped as %s: %v; want %v", reason, got, want)
		}
	}
}

// Compressed after it was read: nothing is skipped. kubelet deletes the plain
// file, whose inode the next live file may get.
func TestCompressedAfterReading(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	n.want("1")
	n.must(os.Rename(n.path(cart), n.path(cart+".20261123-030000")))
	n.write(cart, "F 2")
	n.want("2")
	n.raw(cart+".20261123-030000.gz", "\x1f\x8b")
	n.must(os.Remove(n.path(cart + ".20261123-030000")))
	n.must(os.Rename(n.path(cart), n.path(cart+".20261123-030100")))
	n.write(cart, "F 3") // often the inode that was just freed
	n.want("3")
	n.write(cart, "F 4")
	n.want("4")
	n.closed(nil)
	if got := testutil.ToFloat64(n.metrics.Skipped.WithLabelValues("gzip")); got != 0 {
		t.Errorf("skipped as gzip: %v; want 0", got)
	}
}

// Hints name the file that was written to and the folder that changed.
func TestHints(t *testing.T) {
	n := start(t)
	n.write(cart, "F 1")
	h, err := tail.NewHints(slog.New(slog.DiscardHandler))
	n.must(err)
	n.f.Sweep(true, nil, h.Watch)
	n.settle(n.read(10)...)
	n.write(cart, "F 2")
	n.write(strings.Replace(cart, "0.log", "1.log", 1), "F restarted")
	var got []string
	deadline := time.After(5 * time.Second)
	for len(got) < 2 {
		select {
		case <-h.C:
		case <-deadline:
			t.Fatalf("no hints; read %v", got)
		}
		written, changed, _ := h.Take()
		for _, path := range written {
			n.f.Touch(path)
		}
		n.f.Sweep(false, changed, h.Watch)
		for n.f.Read(func(e tail.Entry) bool { got = append(got, e.Record.Body); return true }) {
		}
	}
	n.must(h.Close())
	if d := cmp.Diff([]string{"2", "restarted"}, got); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

// Only the newest rotated generation may still be written to; a backlog of older
// ones does not wait a second for each.
func TestBacklogDoesNotWaitForEachGeneration(t *testing.T) {
	n := start(t)
	for i, name := range []string{".20261123-010000", ".20261123-020000", ".20261123-030000", ""} {
		n.write(cart+name, fmt.Sprintf("F line %d", i))
		at := n.now.Add(time.Duration(i-4) * time.Hour)
		n.must(os.Chtimes(n.path(cart+name), at, at))
	}
	bodies := func() (out []string) {
		es := n.read(100)
		n.settle(es...)
		for _, e := range es {
			out = append(out, e.Record.Body)
		}
		return out
	}
	if d := cmp.Diff([]string{"line 0", "line 1", "line 2"}, bodies()); d != "" {
		t.Errorf("at once (-want +got):\n%s", d)
	}
	n.write(cart+".20261123-030000", "F late")
	n.now = n.now.Add(900 * time.Millisecond)
	if d := cmp.Diff([]string{"late"}, bodies()); d != "" {
		t.Errorf("within the grace (-want +got):\n%s", d)
	}
	n.now = n.now.Add(time.Second)
	if d := cmp.Diff([]string{"line 3"}, bodies()); d != "" {
		t.Errorf("after it (-want +got):\n%s", d)
	}
	n.closed(nil)
}

// What is pending is known without reading it, whoever has no credit.
func TestMeasureWithoutCredit(t *testing.T) {
	n := start(t)
	n.write(cart, "F one", "F two")
	n.settle(n.read(1)...)
	n.write(cart, "F three")
	n.f.Measure()
	if total := n.ledger.Total(); total.Written != 134 || total.Pending != 90 {
		t.Errorf("three lines are written and one is settled; the account is %+v", total)
	}
	n.want("two", "three")
	n.closed(nil)
}
