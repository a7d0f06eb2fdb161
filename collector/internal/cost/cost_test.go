package cost_test

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/cost"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

var start = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func TestReport(t *testing.T) {
	m := cost.New(start)
	cart := &record.Resource{Namespace: "shop", Workload: "cart"}
	web := &record.Resource{Namespace: "shop", Service: "web"}
	for i := range 100 {
		m.Add(cart, &record.Record{Body: fmt.Sprintf("checkout of order %d done in %d.%dms from 10.0.0.%d:8080", i, i, i, i), Attributes: map[string]any{"a": 1.0, "b": 2.0}}, 100, false)
	}
	for i, user := range []string{"ann", "bob", "eve", "joe"} {
		m.Add(cart, &record.Record{Body: "user " + user + " logged in (ok)"}, 50, i == 0)
	}
	m.Add(web, &record.Record{Body: `/orders/17/items id=8f14e45f, took 3s`}, 10, true)
	got := m.Report(start.Add(time.Hour))
	want := cost.Report{Since: start, Until: start.Add(time.Hour), Lines: 105, Bytes: 10210, Rows: []cost.Row{
		{
			Namespace: "shop", Workload: "cart", Lines: 104, Bytes: 10200, Fields: 200, DroppedLines: 1, DroppedBytes: 50, Share: 10200.0 / 10210,
			Templates: []cost.Template{
				{
					Pattern: "checkout of order <*> done in <*> from <*>", Example: "checkout of order 0 done in 0.0ms from 10.0.0.0:8080",
					Match: `^\s*checkout\s+of\s+order\s+\S+\s+done\s+in\s+\S+\s+from\s+\S+\s*$`, Lines: 100, Bytes: 10000, Share: 10000.0 / 10200, WouldSave: 240000,
				},
				{
					Pattern: "user <*> logged in (ok)", Example: "user ann logged in (ok)",
					Match: `^\s*user\s+\S+\s+logged\s+in\s+\(ok\)\s*$`, Lines: 4, Bytes: 200, Share: 200.0 / 10200, WouldSave: 3600,
				},
			},
		},
		{
			Namespace: "shop", Workload: "web", Lines: 1, Bytes: 10, DroppedLines: 1, DroppedBytes: 10, Share: 10.0 / 10210,
			Templates: []cost.Template{{
				Pattern: "/orders/<*>/items id=<*>, took <*>", Example: "/orders/17/items id=8f14e45f, took 3s",
				Match: `^\s*/orders/\S+/items\s+id=\S+,\s+took\s+\S+\s*$`, Lines: 1, Bytes: 10, Share: 1,
			}},
		},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("Report (-want +got):\n%s", d)
	}
}

// After a few hundred lines a share is compared, and stands for the rest.
func TestEstimate(t *testing.T) {
	m := cost.New(start)
	res := &record.Resource{Namespace: "shop", Workload: "cart"}
	for i := range 100_000 {
		body := "GET /cart"
		if i%4 == 0 {
			body = "cache miss on the way"
		}
		m.Add(res, &record.Record{Body: body, Origin: record.Origin{File: "f", Offset: int64(i) * 61}}, 10, false)
	}
	row := m.Report(start.Add(time.Second)).Rows[0]
	if row.Lines != 100_000 || len(row.Templates) != 2 {
		t.Fatalf("%d lines, %d templates; want 100000, 2", row.Lines, len(row.Templates))
	}
	if n := row.Templates[1].Lines; n < 22_500 || n > 27_500 {
		t.Errorf("a quarter of the lines is estimated as %d; want about 25000", n)
	}
}

// Names without end are counted, all together.
func TestBounds(t *testing.T) {
	m := cost.New(start)
	for i := range 3 * cost.MaxRows {
		m.Add(&record.Resource{Namespace: "n", Workload: fmt.Sprint("w", i)}, &record.Record{Body: "a " + strings.Repeat("x", i%7) + letters(i)}, 1, false)
	}
	one := &record.Resource{Namespace: "n", Workload: "w1"}
	for i := range 10_000 {
		m.Add(one, &record.Record{Body: letters(i) + " of many words " + letters(i*7)}, 1, false)
	}
	r := m.Report(start.Add(time.Second))
	if len(r.Rows) != cost.MaxRows+1 || r.Lines != 3*cost.MaxRows+10_000 {
		t.Errorf("%d rows, %d lines; want %d, %d", len(r.Rows), r.Lines, cost.MaxRows+1, 3*cost.MaxRows+10_000)
	}
	if n := len(r.Rows[0].Templates); n != cost.TopTemplates+1 || r.Rows[0].Templates[n-1].Pattern != cost.Rest {
		t.Errorf("%d templates; want %d and the rest", n, cost.TopTemplates)
	}
}

func letters(i int) string {
	var b []byte
	for ; i > 0; i /= 26 {
		b = append(b, byte('a'+i%26))
	}
	return "q" + string(b)
}

func TestConcurrent(t *testing.T) {
	m := cost.New(start)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				m.Add(&record.Resource{Namespace: "n", Workload: fmt.Sprint(i % 3)}, &record.Record{Body: fmt.Sprint("line ", i, " of ", letters(i%50))}, g, false)
			}
		})
	}
	for range 10 {
		m.Report(start.Add(time.Minute))
	}
	wg.Wait()
	if r := m.Report(start.Add(time.Minute)); r.Lines != 8000 || r.Bytes != 2000*6 || len(r.Rows) != 3 {
		t.Errorf("%d lines, %d bytes, %d rows; want 8000, 12000, 3", r.Lines, r.Bytes, len(r.Rows))
	}
	m.Reset(start)
	if r := m.Report(start); r.Lines != 0 || len(r.Rows) != 0 {
		t.Errorf("after Reset: %d lines, %d rows", r.Lines, len(r.Rows))
	}
}

func TestAddAllocatesNothing(t *testing.T) {
	m := cost.New(start)
	res := &record.Resource{Namespace: "shop", Workload: "cart"}
	r := record.Record{Body: "checkout of order 12345 done in 32ms", Origin: record.Origin{File: "1-2-3"}}
	m.Add(res, &r, 100, false)
	if n := testing.AllocsPerRun(1000, func() { r.Origin.Offset += 100; m.Add(res, &r, 100, false) }); n != 0 {
		t.Errorf("Add allocates %v times; want 0", n)
	}
}

func BenchmarkAdd(b *testing.B) {
	m := cost.New(start)
	res := &record.Resource{Namespace: "shop", Workload: "cart"}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		r := record.Record{Body: "checkout of order 12345 done in 32ms, 12 items, total 1234.56 EUR, customer 987654321 in region eu-west-1", Origin: record.Origin{File: "1-2-3"}}
		for pb.Next() {
			r.Origin.Offset += 200
			m.Add(res, &r, 200, false)
		}
	})
}

// Whatever the lines: the counts add up, and each template's expression compiles
// and matches its example.
func FuzzTemplates(f *testing.F) {
	f.Add("user ann logged in\nuser bob logged in\nx 1\n\n(")
	f.Add("<*> a\n1 a\n" + strings.Repeat("w ", 100))
	f.Fuzz(func(t *testing.T, lines string) {
		m := cost.New(start)
		n := 0
		for line := range strings.SplitSeq(strings.ToValidUTF8(lines, "?"), "\n") {
			m.Add(&record.Resource{}, &record.Record{Body: line}, 1, false)
			n++
		}
		r := m.Report(start.Add(time.Second))
		var sum int64
		for _, tm := range r.Rows[0].Templates {
			sum += tm.Lines
			if !utf8.ValidString(tm.Example) {
				t.Fatalf("example %q", tm.Example)
			}
			if re, err := regexp.Compile(tm.Match); err != nil || tm.Pattern != cost.Rest && !re.MatchString(tm.Example) {
				t.Fatalf("%q does not match its example %q: %v", tm.Match, tm.Example, err)
			}
		}
		if n <= 256 && sum != int64(n) {
			t.Fatalf("templates have %d lines; want %d", sum, n)
		}
	})
}
