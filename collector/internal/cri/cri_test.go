package cri_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/cri"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestParse(t *testing.T) {
	at := time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC)
	f := func(in string, want cri.Line, problem cri.Problem) {
		t.Helper()
		got, p := cri.Parse([]byte(in))
		if d := cmp.Diff(want, got); d != "" || p != problem {
			t.Errorf("Parse(%q): problem %v, want %v; line (-want +got):\n%s", in, p, problem, d)
		}
	}
	raw := func(in string, problem cri.Problem) {
		t.Helper()
		f(in, cri.Line{Text: []byte(in)}, problem)
	}
	f("2026-11-23T03:00:00.000000005Z stdout F hello  world", cri.Line{Time: at, Stream: cri.Stdout, Text: []byte("hello  world")}, cri.OK)
	f("2026-11-23T03:00:00.000000005Z stderr P half", cri.Line{Time: at, Stream: cri.Stderr, Partial: true, Text: []byte("half")}, cri.OK)
	f("2026-11-23T05:30:00.000000005+02:30 stdout F x", cri.Line{Time: at, Stream: cri.Stdout, Text: []byte("x")}, cri.OK)
	f("2026-11-22T22:00:00.000000005-05:00 stdout F x", cri.Line{Time: at, Stream: cri.Stdout, Text: []byte("x")}, cri.OK)
	f("2026-11-23T03:00:00Z stdout F x", cri.Line{Time: at.Truncate(time.Second), Stream: cri.Stdout, Text: []byte("x")}, cri.OK)
	f("2026-11-23T03:00:00.5Z stdout F x", cri.Line{Time: at.Truncate(time.Second).Add(time.Second / 2), Stream: cri.Stdout, Text: []byte("x")}, cri.OK)
	f("2026-11-23T03:00:00.000000005Z stdout P:extra x", cri.Line{Time: at, Stream: cri.Stdout, Partial: true, Text: []byte("x")}, cri.OK)
	f("2026-11-23T03:00:00.000000005Z stdout F ", cri.Line{Time: at, Stream: cri.Stdout, Text: []byte{}}, cri.OK) // an empty line
	f("2026-11-23T03:00:00.000000005Z stdout F", cri.Line{Time: at, Stream: cri.Stdout}, cri.OK)
	raw("", cri.BadTime)
	raw("panic: runtime error", cri.BadTime)
	raw("2026-02-30T03:00:00Z stdout F x", cri.BadTime)
	raw("2026-11-23T03:00:00.Z stdout F x", cri.BadTime)
	raw("2026-11-23T03:00:00.0000000001Z stdout F x", cri.BadTime)
	raw("2026-11-23T03:00:00Z stdlog F x", cri.BadStream)
	raw("2026-11-23T03:00:00Z stdout X x", cri.BadTag)
	raw("2026-11-23T03:00:00Z stdout", cri.BadTag)
}

func TestParseAllocatesNothing(t *testing.T) {
	line := []byte("2026-11-23T03:00:00.000000005+02:00 stdout F GET /cart 200")
	if n := testing.AllocsPerRun(100, func() { cri.Parse(line) }); n != 0 {
		t.Errorf("Parse allocates %v times; want 0", n)
	}
}

// Parts of the two streams are interleaved, a malformed line falls between
// them, and the last part is in the next generation of the file.
func TestJoin(t *testing.T) {
	var j cri.Joiner
	var got []string
	file, offset := "a", int64(0)
	add := func(line string) {
		l, p := cri.Parse([]byte(line))
		end := offset + int64(len(line)) + 1
		if out, ok := j.Add(l, p, 0, cri.Span{File: file, Start: offset, End: end}); ok {
			got = append(got, fmt.Sprintf("%v %s %v %v", out.Stream, out.Text, out.Spans, out.Problem))
		}
		offset = end
	}
	const stamp = "2026-11-23T03:00:00Z "
	add(stamp + "stdout P o1 ")
	add(stamp + "stdout P o2 ")
	add(stamp + "stderr P e1 ")
	add("not CRI")
	add(stamp + "stderr F e2")
	file, offset = "b", 0
	if !j.Open() {
		t.Error("Open() = false with stdout unfinished")
	}
	add(stamp + "stdout F o3")
	add(stamp + "stdout F whole")
	want := []string{
		" not CRI [{a 102 110}] bad_time",
		"stderr e1 e2 [{a 68 102} {a 110 143}] ok",
		"stdout o1 o2 o3 [{a 0 68} {b 0 33}] ok",
		"stdout whole [{b 33 69}] ok",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("joined (-want +got):\n%s", d)
	}
	if j.Open() {
		t.Error("Open() = true with nothing waiting")
	}
}

func TestJoinCutsAtTheLimit(t *testing.T) {
	var j cri.Joiner
	part := bytes.Repeat([]byte("x"), 16<<10)
	end := int64(0)
	for range 2 * record.MaxBody / len(part) {
		j.Add(cri.Line{Stream: cri.Stdout, Partial: true, Text: part}, cri.OK, 0, cri.Span{Start: end, End: end + 1})
		end++
	}
	out, ok := j.Add(cri.Line{Stream: cri.Stdout, Text: []byte("end")}, cri.OK, 7, cri.Span{Start: end, End: end + 1})
	if !ok || len(out.Text) != record.MaxBody || out.Cut != record.MaxBody+3+7 || len(out.Spans) != 1 {
		t.Errorf("joined %v, %d bytes, %d cut, %d spans; want %d bytes, %d cut, 1 span", ok, len(out.Text), out.Cut, len(out.Spans), record.MaxBody, record.MaxBody+10)
	}
}

// Whatever the bytes: no panic, and a line that is refused comes back whole.
func FuzzParse(f *testing.F) {
	f.Add([]byte("2026-11-23T03:00:00.000000005Z stdout F hello"))
	f.Add([]byte("2026-11-23T03:00:00+14:59 stderr P:x "))
	f.Fuzz(func(t *testing.T, line []byte) {
		l, p := cri.Parse(line)
		if p != cri.OK {
			if !bytes.Equal(l.Text, line) || l.Stream != cri.None || !l.Time.IsZero() {
				t.Fatalf("refused line came back as %+v", l)
			}
			return
		}
		stamp, _, _ := strings.Cut(string(line), " ")
		want, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil || !want.Equal(l.Time) {
			t.Fatalf("time of %q is %v; package time says %v, %v", line, l.Time, want, err)
		}
		if !bytes.HasSuffix(line, l.Text) {
			t.Fatalf("text %q is not the end of %q", l.Text, line)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	line := []byte("2026-11-23T03:00:00.000000005Z stdout F GET /cart 200 in 12 ms")
	b.SetBytes(int64(len(line)))
	for b.Loop() {
		cri.Parse(line)
	}
}
