package ledger_test

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
)

// Acknowledgements come in any order; the offset waits for the oldest record,
// and what is above it is known exactly.
func TestOutOfOrder(t *testing.T) {
	l := ledger.New()
	l.Open("f", "/0.log", "shop/cart-0")
	l.Written("f", 500)
	f := func(start, end int64, c ledger.Cause, added int64, want ledger.Position) {
		t.Helper()
		if n := l.Settle("f", ledger.Span{Start: start, End: end}, c); n != added {
			t.Errorf("Settle(%d, %d) = %d; want %d", start, end, n, added)
		}
		if d := cmp.Diff(want, l.Open("f", "/0.log", "shop/cart-0")); d != "" {
			t.Errorf("after Settle(%d, %d), position (-want +got):\n%s", start, end, d)
		}
		if err := l.Check(); err != nil {
			t.Error(err)
		}
	}
	type spans = []ledger.Span
	f(200, 300, ledger.Acknowledged, 100, ledger.Position{Above: spans{{Start: 200, End: 300}}})
	f(400, 500, ledger.Rejected, 100, ledger.Position{Above: spans{{Start: 200, End: 300}, {Start: 400, End: 500}}})
	f(200, 300, ledger.Acknowledged, 0, ledger.Position{Above: spans{{Start: 200, End: 300}, {Start: 400, End: 500}}})
	f(0, 100, ledger.Acknowledged, 100, ledger.Position{Offset: 100, Above: spans{{Start: 200, End: 300}, {Start: 400, End: 500}}})
	f(100, 200, ledger.Acknowledged, 100, ledger.Position{Offset: 300, Above: spans{{Start: 400, End: 500}}})
	f(250, 450, ledger.Acknowledged, 100, ledger.Position{Offset: 500, Above: spans{}})
	want := ledger.Totals{Written: 500, Acknowledged: 400, Dropped: map[string]int64{"rejected": 100}}
	if d := cmp.Diff(want, l.Total()); d != "" {
		t.Errorf("totals (-want +got):\n%s", d)
	}
}

// A file is truncated while two records of it are on their way: what was not
// read is dropped with its cause, what was read stays pending until its verdict
// comes, and the account closes then. The totals never shrink.
func TestGiveUpAndRetire(t *testing.T) {
	l := ledger.New()
	l.Open("f", "/0.log", "shop/cart-0")
	l.Written("f", 100)
	l.Settle("f", ledger.Span{Start: 0, End: 10}, ledger.Acknowledged)
	if n := l.GiveUp("f", 30, ledger.Truncated); n != 70 {
		t.Errorf("GiveUp = %d; want 70", n)
	}
	l.Gone("f")
	want := ledger.Totals{Written: 100, Acknowledged: 10, Dropped: map[string]int64{"truncated": 70}, Pending: 20}
	if d := cmp.Diff(want, l.Total()); d != "" || len(l.Files()) != 1 {
		t.Errorf("%d files; totals (-want +got):\n%s", len(l.Files()), d)
	}
	l.Acknowledge("f", ledger.Span{Start: 10, End: 30}, 5)
	want.Acknowledged, want.Dropped["too_long"], want.Pending = 25, 5, 0
	if d := cmp.Diff(want, l.Total()); d != "" || len(l.Files()) != 0 {
		t.Errorf("%d files; totals (-want +got):\n%s", len(l.Files()), d)
	}
}

func TestAbsent(t *testing.T) {
	l := ledger.New()
	for _, file := range []string{"here", "settled", "lost"} {
		l.Open(file, "/"+file, "shop/cart-0")
		l.Written(file, 10)
	}
	l.Settle("settled", ledger.Span{End: 10}, ledger.Acknowledged)
	l.Settle("lost", ledger.Span{Start: 4, End: 6}, ledger.Acknowledged)
	lost := l.Absent(func(file string) bool { return file == "here" })
	if len(lost) != 1 || lost[0].File != "lost" || lost[0].Pending != 8 {
		t.Errorf("Absent = %+v; want 8 bytes of lost", lost)
	}
	want := ledger.Totals{Written: 30, Acknowledged: 12, Dropped: map[string]int64{"rotated_away": 8}, Pending: 10}
	if d := cmp.Diff(want, l.Total()); d != "" {
		t.Errorf("totals (-want +got):\n%s", d)
	}
}

func TestCheckpoint(t *testing.T) {
	l := ledger.New()
	l.Open("f", "/var/log/pods/shop_cart-0_u/cart/0.log", "shop/cart-0")
	l.Written("f", 100)
	l.Acknowledge("f", ledger.Span{Start: 0, End: 10}, 3)
	l.Settle("f", ledger.Span{Start: 40, End: 60}, ledger.Rejected)
	b, err := l.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ledger.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(l.Files(), back.Files()); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
	if d := cmp.Diff(l.Open("f", "p", "shop/cart-0"), back.Open("f", "p", "shop/cart-0")); d != "" {
		t.Errorf("position (-want +got):\n%s", d)
	}
	for i := range b {
		broken := bytes.Clone(b)
		broken[i] ^= 1
		if _, err := ledger.Decode(broken); !errors.Is(err, ledger.ErrDamaged) {
			t.Fatalf("byte %d changed: %v; want ErrDamaged", i, err)
		}
		if _, err := ledger.Decode(b[:i]); !errors.Is(err, ledger.ErrDamaged) {
			t.Fatalf("cut at %d: %v; want ErrDamaged", i, err)
		}
	}
}

// A thousand records settled in random order, some twice, across checkpoints:
// the account closes to the byte and the position is never ahead.
func TestRandomOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	const n = 1000
	l := ledger.New()
	l.Open("f", "/0.log", "shop/cart-0")
	l.Written("f", n*7)
	done := make([]bool, n)
	for step, i := range rng.Perm(n) {
		l.Settle("f", ledger.Span{Start: int64(i) * 7, End: int64(i)*7 + 7}, ledger.Cause(rng.IntN(3)))
		done[i] = true
		if step%97 != 0 {
			continue
		}
		b, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if l, err = ledger.Decode(b); err != nil {
			t.Fatal(err)
		}
		p := l.Open("f", "/0.log", "shop/cart-0")
		for r, d := range done {
			start := int64(r) * 7
			covered := start < p.Offset
			for _, s := range p.Above {
				covered = covered || start >= s.Start && start < s.End
			}
			if covered != d {
				t.Fatalf("record %d is settled: %v; its position says %v", r, d, covered)
			}
		}
	}
	if total := l.Total(); total.Pending != 0 || l.Open("f", "", "shop/cart-0").Offset != n*7 {
		t.Errorf("at the end %+v", total)
	}
}

// Whatever Decode takes balances and is written back as the same ledger. Half
// of the inputs get a right header, or the fuzzer would never pass the checksum.
func FuzzDecode(f *testing.F) {
	l := ledger.New()
	l.Open("f", "/0.log", "shop/cart-0")
	l.Settle("f", ledger.Span{Start: 4, End: 9}, ledger.Acknowledged)
	b, err := l.Encode()
	if err != nil {
		f.Fatal(err)
	}
	_, body, _ := bytes.Cut(b, []byte{'\n'})
	f.Add(b, false)
	f.Add(body, true)
	f.Add([]byte("outrigger-checkpoint 1 00000000 0\n"), false)
	table := crc32.MakeTable(crc32.Castagnoli)
	f.Fuzz(func(t *testing.T, b []byte, head bool) {
		if head {
			b = append(fmt.Appendf(nil, "outrigger-checkpoint 1 %08x %d\n", crc32.Checksum(b, table), len(b)), b...)
		}
		l, err := ledger.Decode(b)
		if err != nil {
			if !errors.Is(err, ledger.ErrDamaged) {
				t.Fatalf("error %v is not ErrDamaged", err)
			}
			return
		}
		if err := l.Check(); err != nil {
			t.Fatal(err)
		}
		again, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ledger.Decode(again)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(l.Files(), back.Files()); d != "" {
			t.Fatal(d)
		}
	})
}

// The rows by owner and hour add up to the whole, whatever the hour in which
// something was settled, and through a checkpoint.
func TestRows(t *testing.T) {
	at := time.Date(2026, 11, 23, 3, 10, 0, 0, time.UTC)
	l := ledger.New()
	l.Clock(at)
	l.Open("a", "/a", "shop/cart-0")
	l.Open("b", "/b", "shop/web-0")
	l.Written("a", 100)
	l.Written("b", 50)
	l.Count("a", ledger.Acknowledged, 2)
	l.Settle("a", ledger.Span{End: 40}, ledger.Acknowledged)
	l.Clock(at.Add(time.Hour))
	l.Count("a", ledger.ByRule, 3)
	l.Settle("a", ledger.Span{Start: 40, End: 100}, ledger.ByRule)
	l.Gone("a")
	hour := at.Truncate(time.Hour)
	want := []ledger.Row{
		{Owner: "shop/cart-0", Hour: hour, Totals: ledger.Totals{Written: 100, Acknowledged: 40, Records: 2, Pending: 60}},
		{Owner: "shop/web-0", Hour: hour, Totals: ledger.Totals{Written: 50, Pending: 50}},
		{Owner: "shop/cart-0", Hour: hour.Add(time.Hour), Totals: ledger.Totals{Dropped: map[string]int64{"rule": 60}, DroppedRecords: map[string]int64{"rule": 3}, Pending: -60}},
	}
	b, err := l.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ledger.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []*ledger.Ledger{l, back} {
		if d := cmp.Diff(want, x.Rows()); d != "" {
			t.Errorf("rows (-want +got):\n%s", d)
		}
		if err := x.Check(); err != nil {
			t.Error(err)
		}
	}
	back.Clock(at.Add((ledger.KeepRows + 1) * time.Hour))
	want = []ledger.Row{{Totals: ledger.Totals{Written: 150, Acknowledged: 40, Records: 2, Dropped: map[string]int64{"rule": 60}, DroppedRecords: map[string]int64{"rule": 3}, Pending: 50}}}
	if d := cmp.Diff(want, back.Rows()); d != "" {
		t.Errorf("rows a day later (-want +got):\n%s", d)
	}
	if err := back.Check(); err != nil {
		t.Error(err)
	}
}

// A checkpoint of a version that had no rows is taken, with one row for all.
func TestCheckpointWithoutRows(t *testing.T) {
	body := []byte(`{"files":[{"file":"f","path":"/0.log","written":100,"settled":{"acknowledged":40},"offset":40}],"past":{"written":10,"settled":{"rejected":10},"offset":0}}`)
	b := append(fmt.Appendf(nil, "outrigger-checkpoint 1 %08x %d\n", crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)), len(body)), body...)
	l, err := ledger.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	want := []ledger.Row{{Totals: ledger.Totals{Written: 110, Acknowledged: 40, Dropped: map[string]int64{"rejected": 10}, Pending: 60}}}
	if d := cmp.Diff(want, l.Rows()); d != "" {
		t.Errorf("rows (-want +got):\n%s", d)
	}
	if p := l.Open("f", "/0.log", "shop/cart-0"); p.Offset != 40 {
		t.Errorf("position %+v", p)
	}
}

// Whatever a path has in it, it comes back; what is no UTF-8 comes back as JSON has it.
func TestCheckpointOfOddNames(t *testing.T) {
	l := ledger.New()
	for _, path := range []string{"", `a"b`, `a\b`, "a\nb\x7f", "ä\u2028<&>", "a\xffb"} {
		l.Open("f"+path, path, path)
		l.Written("f"+path, 1)
		l.Settle("f"+path, ledger.Span{Start: 0, End: 1}, ledger.ByQuota)
	}
	b, err := l.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ledger.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	want := l.Files()
	for i := range want {
		want[i].Path, want[i].File = strings.ToValidUTF8(want[i].Path, "\ufffd"), strings.ToValidUTF8(want[i].File, "\ufffd")
	}
	if d := cmp.Diff(want, back.Files()); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
}

func many() *ledger.Ledger {
	l := ledger.New()
	l.Clock(time.Unix(1_800_000_000, 0))
	for i := range 5000 {
		file := fmt.Sprintf("fd01-%x-5fcd5154a1c42133", i)
		pod := fmt.Sprintf("shop_orders-%d", i)
		l.Open(file, "/var/log/pods/"+pod+"_8c1f4a4e-0000-4000-8000-000000000000/app/0.log", strings.Replace(pod, "_", "/", 1))
		l.Written(file, 300)
		l.Count(file, ledger.Acknowledged, 1)
		l.Settle(file, ledger.Span{Start: 0, End: 200}, ledger.Acknowledged)
	}
	return l
}

// A checkpoint is one piece of memory, or it would make the most that the collector needs.
func TestCheckpointCostsItsSize(t *testing.T) {
	l := many()
	b, err := l.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(5, func() { _, err = l.Encode() }); err != nil || n > 10 {
		t.Errorf("%v allocations for a checkpoint of %d bytes; %v", n, len(b), err)
	}
}

func BenchmarkEncode(b *testing.B) {
	l := many()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := l.Encode(); err != nil {
			b.Fatal(err)
		}
	}
}
