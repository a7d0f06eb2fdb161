package multiline_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/collector/internal/multiline"
	"github.com/outrigger-mesh/outrigger/golden"
)

// Each line of an input is judged. In the trace ">" begins a record, "|" joins
// it, and "?" begins one that was held although nothing joined it.
func TestTraces(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		spec := "auto"
		if s, ok := c.Lookup("spec"); ok {
			spec = strings.TrimSpace(s)
		}
		c.Want("records", render(compile(t, spec).Grouper(), c.Input("lines")))
	})
}

func compile(t testing.TB, spec string) *multiline.Language {
	t.Helper()
	l, err := multiline.Compile(spec)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func render(g multiline.Grouper, lines string) string {
	marks, all := []byte{}, strings.Split(strings.TrimSuffix(lines, "\n"), "\n")
	for i, line := range all {
		joins, open := g.Line([]byte(line))
		switch {
		case joins:
			if marks[i-1] == '?' {
				marks[i-1] = '>'
			}
			marks = append(marks, '|')
		case open:
			marks = append(marks, '?')
		default:
			marks = append(marks, '>')
		}
	}
	var b strings.Builder
	for i, line := range all {
		fmt.Fprintln(&b, strings.TrimRight(string(marks[i])+" "+line, " "))
	}
	return b.String()
}

// Two streams are interleaved line by line; each has its own grouper.
func TestStreamsDoNotMix(t *testing.T) {
	l := compile(t, "auto")
	out, err := l.Grouper(), l.Grouper()
	f := func(g *multiline.Grouper, line string, joins, open bool) {
		t.Helper()
		if j, o := g.Line([]byte(line)); j != joins || o != open {
			t.Errorf("Line(%q) = %v, %v; want %v, %v", line, j, o, joins, open)
		}
	}
	f(&out, "panic: a", false, true)
	f(&err, "Traceback (most recent call last):", false, true)
	f(&out, "", true, true)
	f(&err, `  File "a.py", line 1, in f`, true, true)
	f(&out, "goroutine 1 [running]:", true, true)
	f(&err, "ValueError: x", true, true)
	f(&out, "GET / 200", false, false)
	f(&err, "GET / 200", false, false)
}

func TestResetBeginsAnother(t *testing.T) {
	for _, spec := range []string{"auto", "start:^x"} {
		g := compile(t, spec).Grouper()
		g.Line([]byte("java.lang.Error: x"))
		g.Reset()
		if joins, open := g.Line([]byte("\tat A.f(A.java:1)")); joins || !open {
			t.Errorf("%s: after Reset, a frame joins = %v, open = %v; want false, true", spec, joins, open)
		}
		if joins, _ := g.Line([]byte("\tat A.g(A.java:1)")); !joins {
			t.Errorf("%s: the next frame does not join", spec)
		}
	}
}

// A record of too many lines is cut, and its rest stays together.
func TestLimit(t *testing.T) {
	for _, spec := range []string{"java", "start:^java", "continue:^\t", "end:^$"} {
		g := compile(t, spec).Grouper()
		var begins []int
		for i := range 2*multiline.MaxLines + 1 {
			line := "\tat A.f(A.java:1)"
			if i == 0 {
				line = "java.lang.StackOverflowError"
			}
			if joins, _ := g.Line([]byte(line)); !joins {
				begins = append(begins, i)
			}
		}
		if fmt.Sprint(begins) != "[0 1000 2000]" {
			t.Errorf("%s: records begin at %v; want 0, 1000 and 2000", spec, begins)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	for spec, want := range map[string]string{
		"cobol":         `no language is called "cobol"; write auto, none, or some of dotnet, go, java`,
		"java,":         `no language is called ""`,
		"begin:^x":      `"begin" is not a kind of pattern; write start:`,
		"start:":        "has 0 bytes; give it 1 to 4096",
		"start:(":       "missing closing )",
		"start:(?!not)": "no look-around",
		"end:" + strings.Repeat("x", multiline.MaxPattern+1): "has 4097 bytes",
	} {
		if _, err := multiline.Compile(spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Compile(%.40q): %v; want it to say %q", spec, err, want)
		}
	}
}

var ordinary = []string{
	`10.0.0.1 - - [25/Nov/2026:12:00:00 +0000] "GET /index.html HTTP/1.1" 200 612 "-" "Mozilla/5.0 (X11; Linux x86_64)"`,
	`2026-11-25T12:00:00.001Z  INFO 1 --- [main] c.e.shop.Cart : started in 3.2 seconds (process running for 4)`,
	`{"@timestamp":"2026-11-25T12:00:00.001Z","log.level":"info","message":"GET /pay -> 200 1.2ms","http.response.status_code":200}`,
	`time=2026-11-25T12:00:00.001Z level=info msg="checkout done" order=1234`,
	`Starting the service with 8 workers`,
	`    indented text of something else`,
	``,
}

func TestOrdinaryLinesAreNotHeld(t *testing.T) {
	l := compile(t, "auto")
	for _, line := range ordinary {
		g, text := l.Grouper(), []byte(line)
		if joins, open := g.Line(text); joins || open {
			t.Errorf("Line(%q) = %v, %v; want false, false", line, joins, open)
		}
		if n := testing.AllocsPerRun(100, func() { g.Line(text) }); n != 0 {
			t.Errorf("Line(%q) allocates %v times; want 0", line, n)
		}
	}
}

func BenchmarkOrdinary(b *testing.B) {
	l := compile(b, "auto")
	for i, name := range []string{"access", "spring", "json", "logfmt", "prose", "indented"} {
		b.Run(name, func(b *testing.B) {
			g, text := l.Grouper(), []byte(ordinary[i])
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				g.Line(text)
			}
		})
	}
}

func BenchmarkTrace(b *testing.B) {
	g, text := compile(b, "auto").Grouper(), []byte("\tat com.example.shop.Cart.checkout(Cart.java:42)")
	b.ReportAllocs()
	for b.Loop() {
		g.Line(text)
	}
}

// Whatever the lines: no panic, nothing is said of the future that Reset does
// not undo, and a stream judged twice is judged the same.
func FuzzLines(f *testing.F) {
	f.Add("auto", "panic: a\n\ngoroutine 1 [running]:\nmain.f()\n\t/a.go:1\n(\n[\n-\n")
	f.Add("auto", "Traceback (most recent call last):\n  File \"a\"\nX: y\n\nDuring handling of the above exception\n")
	f.Add("start:^x", "x\ny")
	f.Fuzz(func(t *testing.T, spec, lines string) {
		l, err := multiline.Compile(spec)
		if err != nil {
			return
		}
		a, b := l.Grouper(), l.Grouper()
		held := false
		for i, line := range strings.Split(lines, "\n") {
			joins, open := a.Line([]byte(line))
			if j, o := b.Line([]byte(line)); j != joins || o != open {
				t.Fatalf("line %d: %v, %v and then %v, %v", i, joins, open, j, o)
			}
			if joins && !held {
				t.Fatalf("line %d joins a record that was not held", i)
			}
			held = open
		}
	})
}
