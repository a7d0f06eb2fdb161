package tail_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// quiet is what a node with many logs costs while they are silent.
type quiet struct {
	f         *tail.Follower
	config    tail.Config
	book      *ledger.Ledger
	hints     *tail.Hints
	now       time.Time
	one       string // a log
	follower  int64  // bytes a log: what the package keeps, with the account
	restarted int64  // the same of a follower that begins with a checkpoint and a spool
	account   int64
	watchings int64
}

// heap is what lives.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// silent makes logs of one line each, reads and settles them, and closes the files.
func silent(tb testing.TB, logs int) *quiet {
	tb.Helper()
	m, err := tail.NewMetrics(prometheus.NewRegistry())
	if err != nil {
		tb.Fatal(err)
	}
	q := &quiet{now: time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)}
	dir := tb.TempDir()
	folder := filepath.Join(dir, "pods")
	for i := range logs {
		q.one = filepath.Join(folder, fmt.Sprintf("shop_orders-%d_%08x-0000-4000-8000-%012x", i, i, i), "app", "0.log")
		if err := os.MkdirAll(filepath.Dir(q.one), 0o750); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(q.one, fmt.Appendf(nil, "2026-11-23T02:00:00.%09dZ stdout F one\n", i), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	q.hints, err = tail.NewHints(slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := q.hints.Close(); err != nil {
			tb.Error(err)
		}
	})
	empty := heap()
	for _, path := range walk(tb, folder) {
		q.hints.Watch(path)
	}
	watching := heap()
	q.book = ledger.New()
	q.book.Clock(q.now)
	q.config = tail.Config{
		Folder: folder, Cluster: "c1", Node: "n1", Spool: filepath.Join(dir, "spool"), Now: func() time.Time { return q.now },
		Policy: func(*record.Resource) tail.Policy {
			return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
		},
	}
	q.f = tail.New(q.config, q.book, slog.New(slog.DiscardHandler), m)
	tb.Cleanup(func() {
		if err := q.f.Close(); err != nil {
			tb.Error(err)
		}
	})
	settle := func(e tail.Entry) bool {
		for _, s := range e.Spans {
			q.book.Count(s.File, ledger.Acknowledged, 1)
			q.book.Settle(s.File, ledger.Span{Start: s.Start, End: s.End}, ledger.Acknowledged)
		}
		return true
	}
	for range 3 { // by the second the files have been quiet for long enough to be closed
		q.f.Sweep(true, nil, nil)
		for q.f.Read(settle) {
		}
		q.now = q.now.Add(2 * time.Minute)
	}
	both := heap()
	b, err := q.book.Encode()
	if err != nil {
		tb.Fatal(err)
	}
	before := heap()
	copied, err := ledger.Decode(b) // it shares the paths with nobody
	if err != nil {
		tb.Fatal(err)
	}
	q.account = (heap() - before) / int64(logs)
	runtime.KeepAlive(b)
	runtime.KeepAlive(copied)
	q.follower = (both - watching) / int64(logs)
	q.watchings = (watching - empty) / int64(logs)
	// A restarted one begins with what the spool has.
	before = heap()
	again := tail.New(q.config, copied, slog.New(slog.DiscardHandler), m)
	tb.Cleanup(func() {
		if err := again.Close(); err != nil {
			tb.Error(err)
		}
	})
	for range 3 {
		again.Sweep(true, nil, nil)
		for again.Read(settle) {
		}
		q.now = q.now.Add(2 * time.Minute)
	}
	q.restarted = q.account + (heap()-before)/int64(logs)
	if t := q.book.Total(); t.Pending != 0 || t.Records != int64(logs) {
		tb.Fatalf("account %+v of %d lines", t, logs)
	}
	return q
}

func walk(tb testing.TB, folder string) (folders []string) {
	tb.Helper()
	err := filepath.WalkDir(folder, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return err
	})
	if err != nil {
		tb.Fatal(err)
	}
	return folders
}

// A silent log is a path, a resource, a place in a file and an account.
func TestSilentLogIsSmall(t *testing.T) {
	q := silent(t, 700)
	t.Logf("bytes a log: follower with account %d, after a restart %d, account by itself %d, watches %d", q.follower, q.restarted, q.account, q.watchings)
	if most := int64(1600); q.follower > most || q.restarted > most {
		t.Errorf("a silent log takes %d bytes, its account included, and %d after a restart; want at most %d", q.follower, q.restarted, most)
	}
	if most := int64(300); q.watchings > most {
		t.Errorf("the watches of a silent log take %d bytes; want at most %d", q.watchings, most)
	}
}

// A sweep after a hint costs what the hint is about, not the number of logs.
func BenchmarkHintedSweep(b *testing.B) {
	q := silent(b, 5000)
	b.ReportAllocs()
	for b.Loop() {
		q.f.Touch(q.one)
		q.f.Sweep(false, nil, nil)
		q.f.Read(func(tail.Entry) bool { return true })
	}
}

// So it does where nothing is to be done at all.
func BenchmarkEmptySweep(b *testing.B) {
	q := silent(b, 5000)
	b.ReportAllocs()
	for b.Loop() {
		q.f.Sweep(false, nil, nil)
	}
}

func BenchmarkFullSweep(b *testing.B) {
	q := silent(b, 5000)
	b.ReportAllocs()
	for b.Loop() {
		q.f.Sweep(true, nil, nil)
	}
}

// open counts the files that this process has open below a folder.
func open(t *testing.T, folder string) (n int) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && strings.HasPrefix(target, folder) {
			n++
		}
	}
	return n
}

// The file of a silent log is closed without a hint, and goes on where it stood, be it written to,
// rotated or deleted.
func TestSilentLogIsClosed(t *testing.T) {
	n := spooled(t)
	const web, db = "shop_web-0_u3/app/0.log", "shop_db-0_u4/app/0.log"
	n.write(cart, "F 1")
	n.write(web, "F 1", "P be")
	n.write(db, "F 1")
	if es := n.read(10); len(es) != 3 {
		t.Fatalf("%d records", len(es))
	} else {
		n.settle(es...)
	}
	if got := open(t, n.folder); got != 3 {
		t.Errorf("%d files are open; want 3", got)
	}
	n.now = n.now.Add(2 * time.Minute)
	n.want()
	if got := open(t, n.folder); got != 0 {
		t.Errorf("%d files are open of three silent logs", got)
	}
	n.write(cart, "F 2")
	n.write(db, "F 2")
	n.remove(db)
	n.rename(web, web+".20261123-030000")
	n.write(web, "F gin")
	es := n.want("2", "begin", "2") // what was deleted might be about to be seen again
	n.closed(nil)
	if len(es) == 3 && es[2].Record.Resource.Pod != "db-0" {
		t.Errorf("the last is of %s", es[2].Record.Resource.Pod)
	}
}

// A silent log is written to again, rotated and compressed before anybody looks: the link leads
// to what was not read, for the compressed copy alone is no name of the file.
func TestSilentLogIsCompressedUnread(t *testing.T) {
	for _, between := range []bool{false, true} {
		n := spooled(t)
		n.write(cart, "F 1")
		n.want("1")
		n.now = n.now.Add(2 * time.Minute)
		n.want()
		if got := open(t, n.folder); got != 0 {
			t.Errorf("%d files are open of a silent log", got)
		}
		n.write(cart, "F 2", "P be")
		n.rename(cart, cart+".20261123-030000")
		n.write(cart, "F gin", "F 3")
		if between {
			n.f.Sweep(true, nil, nil)
		}
		n.compress(cart + ".20261123-030000")
		n.want("2", "begin", "3")
		n.closed(nil)
	}
}
