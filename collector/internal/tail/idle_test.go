package tail_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
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
	book      *ledger.Ledger
	hints     *tail.Hints
	now       time.Time
	one       string // a log
	follower  int64  // bytes a log: what the package keeps
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
	q.f = tail.New(tail.Config{
		Folder: folder, Cluster: "c1", Node: "n1", Spool: filepath.Join(dir, "spool"), Now: func() time.Time { return q.now },
		Policy: func(*record.Resource) tail.Policy {
			return tail.Policy{Grouper: func() tail.Grouper { return &trace{} }}
		},
	}, q.book, slog.New(slog.DiscardHandler), m)
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
		for _, path := range walk(tb, folder) {
			q.f.Touch(filepath.Join(path, "0.log"))
		}
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
	t.Logf("bytes a log: follower with account %d, account by itself %d, watches %d", q.follower, q.account, q.watchings)
	if most := int64(1600); q.follower > most {
		t.Errorf("a silent log takes %d bytes, its account included; want at most %d", q.follower, most)
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

func BenchmarkFullSweep(b *testing.B) {
	q := silent(b, 5000)
	b.ReportAllocs()
	for b.Loop() {
		q.f.Sweep(true, nil, nil)
	}
}
