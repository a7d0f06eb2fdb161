package rules_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v2"

	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/record"
	"github.com/outrigger-mesh/outrigger/golden"
)

func config(t testing.TB, text string) rules.Config {
	t.Helper()
	var c rules.Config
	if err := yaml.UnmarshalStrict([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func compile(t testing.TB, text string) *rules.Set {
	t.Helper()
	s, err := rules.Compile(config(t, text), "es", []string{"es", "local"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var at = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

// The lines are judged with the rules, for the output es. Each line has the form
// "namespace/workload/container stream text".
func TestRules(t *testing.T) {
	golden.Cases(t, "testdata/rules/*.txtar", func(t *testing.T, c *golden.Case) {
		s := compile(t, c.Input("rules.yaml"))
		programs := map[string]*rules.Program{}
		var b strings.Builder
		for i, line := range strings.Split(strings.TrimSuffix(c.Input("lines"), "\n"), "\n") {
			where, rest, _ := strings.Cut(line, " ")
			stream, text, _ := strings.Cut(rest, " ")
			p := programs[where]
			if p == nil {
				of := strings.Split(where, "/")
				p = s.For(&record.Resource{Namespace: of[0], Workload: of[1], Container: of[2], Labels: map[string]string{"app": of[1]}})
				programs[where] = p
			}
			r := record.Record{Time: at, Stream: stream, Body: text, Origin: record.Origin{File: where, Offset: int64(i) * 100, End: int64(i+1) * 100}}
			v := p.Apply(&r)
			fmt.Fprintf(&b, "%s %s", v.Cause, v.Rule)
			if v.ParseFailed || v.FieldsLeft != 0 || v.Redacted != 0 {
				fmt.Fprintf(&b, " failed=%v left=%d redacted=%d", v.ParseFailed, v.FieldsLeft, v.Redacted)
			}
			fmt.Fprintf(&b, "\n    %s%q %v\n", level(r.Level), r.Body, r.Attributes)
		}
		c.Want("verdicts", b.String())
	})
}

func level(s string) string {
	if s == "" {
		return ""
	}
	return s + " "
}

// The pod has the annotations and labels (label:key); its container is app.
func TestAnnotations(t *testing.T) {
	golden.Cases(t, "testdata/annotations/*.txtar", func(t *testing.T, c *golden.Case) {
		var b strings.Builder
		for _, pod := range c.Inputs("pod ") {
			res := &record.Resource{Namespace: "shop", Container: "app", Annotations: map[string]string{}, Labels: map[string]string{}}
			for line := range strings.SplitSeq(strings.TrimSpace(string(pod.Data)), "\n") {
				key, value, _ := strings.Cut(line, "=")
				if label, ok := strings.CutPrefix(key, "label:"); ok {
					res.Labels[label] = value
				} else {
					res.Annotations[key] = value
				}
			}
			p := compile(t, "{}").For(res)
			fmt.Fprintf(&b, "%s: off=%q multiline=%s\n", pod.Name, p.Off(), p.Multiline())
			for _, problem := range p.Problems() {
				fmt.Fprintf(&b, "    %s\n", problem)
			}
			for _, stream := range []string{"stdout", "stderr"} {
				r := record.Record{Time: at, Stream: stream, Body: `level=warn msg="mail a@example.com"`}
				v := p.Apply(&r)
				fmt.Fprintf(&b, "    %s: %s %q %d redacted: %q\n", stream, v.Cause, v.Rule, v.Redacted, r.Body)
			}
		}
		c.Want("programs", b.String())
	})
}

func TestValidate(t *testing.T) {
	golden.Cases(t, "testdata/refused/*.txtar", func(t *testing.T, c *golden.Case) {
		_, err := rules.Compile(config(t, c.Input("rules.yaml")), "es", []string{"es", "local"})
		if err == nil {
			t.Fatal("it is not refused")
		}
		c.Want("error", err.Error()+"\n")
	})
	if err := config(t, "rules: [{name: a, route: [nowhere]}]").Validate(); err != nil {
		t.Errorf("Validate, which does not know the outputs: %v", err)
	}
}

// A share is kept, the same at every repetition, and that of two rules is not
// the same records.
func TestSample(t *testing.T) {
	s := compile(t, "rules: [{name: a, sample: {rate: 0.5}}, {name: b, sample: {rate: 0.5}}]")
	var runs [2][]bool
	took := map[string]int{}
	for i := range runs {
		p := s.For(&record.Resource{})
		for n := range 10000 {
			r := record.Record{Body: "x", Origin: record.Origin{File: "f", Offset: int64(n) * 57}}
			v := p.Apply(&r)
			runs[i] = append(runs[i], v.Cause == rules.Keep)
			took[v.Rule]++
		}
	}
	if d := cmp.Diff(runs[0], runs[1]); d != "" {
		t.Error("two runs keep different records")
	}
	for rule, share := range map[string]float64{"a": 0.5, "b": 0.25, "": 0.25} {
		if got := float64(took[rule]) / 20000; got < share-0.03 || got > share+0.03 {
			t.Errorf("%q decided %.3f of the records; want about %.2f", rule, got, share)
		}
	}
}

func judged(p *rules.Program, file string, offset int64, when time.Time) rules.Cause {
	r := record.Record{Time: when, Stream: "stdout", Body: strings.Repeat("x", 100), Origin: record.Origin{File: file, Offset: offset, End: offset + 100}}
	return p.Apply(&r).Cause
}

func TestQuota(t *testing.T) {
	s := compile(t, "quotas: [{name: q, match: {namespaces: [shop]}, bytesPerSecond: 100, action: drop}]")
	p := s.For(&record.Resource{Namespace: "shop"})
	run := func(p *rules.Program, file string, step time.Duration) (dropped []int) {
		for i := range 30 {
			if judged(p, file, int64(i)*100, at.Add(time.Duration(i)*step)) != rules.Keep {
				dropped = append(dropped, i)
			}
		}
		return dropped
	}
	want := fmt.Sprint([]int{10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29})
	if got := fmt.Sprint(run(p, "flood", 0)); got != want {
		t.Errorf("3,000 bytes at once: dropped %v; want %v", got, want)
	}
	// The same again has the same verdicts, in part also.
	if got := fmt.Sprint(run(p, "flood", 0)); got != want {
		t.Errorf("3,000 bytes sent again: dropped %v; want %v", got, want)
	}
	if got := judged(p, "flood", 500, at); got != rules.Keep {
		t.Errorf("one that was kept is %v when it comes again", got)
	}
	// A backlog of two files, read one after the other and all at once, is what
	// it was when it was written.
	other := compile(t, "quotas: [{name: q, bytesPerSecond: 200, action: drop}]").For(&record.Resource{Namespace: "shop"})
	for _, file := range []string{"a", "b"} {
		if got := run(other, file, time.Second); len(got) != 0 {
			t.Errorf("backlog of %s: dropped %v; want none", file, got)
		}
	}
	// Each namespace has its own count.
	if got := judged(s.For(&record.Resource{Namespace: "other"}), "f", 0, at); got != rules.Keep {
		t.Errorf("another namespace: %v", got)
	}
}

func TestQuotaOfADay(t *testing.T) {
	p := compile(t, "quotas: [{name: q, bytesPerDay: 150, action: drop}]").For(&record.Resource{Namespace: "shop"})
	for i, want := range []rules.Cause{rules.Keep, rules.ByQuota, rules.Keep} {
		if got := judged(p, "f", int64(i)*100, at.Add(time.Duration(i/2)*24*time.Hour)); got != want {
			t.Errorf("record %d: %v; want %v", i, got, want)
		}
	}
}

// A reload with another limit goes on counting, and repeats old verdicts.
func TestQuotaResumes(t *testing.T) {
	old := compile(t, "quotas: [{name: q, bytesPerDay: 150, action: drop}, {name: gone, bytesPerDay: 1, action: warn}]")
	p := old.For(&record.Resource{Namespace: "shop"})
	judged(p, "f", 0, at)
	judged(p, "f", 100, at)
	s := compile(t, "quotas: [{name: q, bytesPerDay: 350, action: drop}]")
	s.Resume(old)
	p = s.For(&record.Resource{Namespace: "shop"})
	for i, want := range []rules.Cause{rules.Keep, rules.ByQuota, rules.Keep, rules.ByQuota} {
		if got := judged(p, "f", int64(i)*100, at); got != want {
			t.Errorf("record %d after the reload: %v; want %v", i, got, want)
		}
	}
}

func TestNoRulesCostNothing(t *testing.T) {
	p := compile(t, "{}").For(&record.Resource{Namespace: "shop"})
	r := record.Record{Body: "10.0.0.1 GET /index.html 200"}
	if n := testing.AllocsPerRun(100, func() { p.Apply(&r) }); n != 0 {
		t.Errorf("Apply allocates %v times; want 0", n)
	}
}

const plain = `10.0.0.1 - - [25/Nov/2026:12:00:00 +0000] "GET /index.html?id=1234 HTTP/1.1" 200 612 "https://shop.example.com/cart" "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/1"`

func BenchmarkApply(b *testing.B) {
	f := func(name, text string) {
		b.Run(name, func(b *testing.B) {
			p := compile(b, text).For(&record.Resource{Namespace: "shop"})
			r := record.Record{Time: at, Stream: "stdout", Body: plain, Origin: record.Origin{File: "1-2-3"}}
			b.ReportAllocs()
			for b.Loop() {
				r.Origin.Offset += 200
				r.Origin.End = r.Origin.Offset + 200
				p.Apply(&r)
			}
		})
	}
	f("none", "{}")
	f("level", "rules: [{name: a, match: {level: error}, drop: true}]")
	f("body", "rules: [{name: a, match: {body: 'GET /healthz'}, drop: true}]")
	f("sample", "rules: [{name: a, sample: {rate: 0.5}}]")
	f("redact", "rules: [{name: a, redact: {kinds: [card, email, token, iban]}}]")
	f("quota", "quotas: [{name: a, bytesPerSecond: 1000000000, action: drop}]")
	b.Run("quota_shared", func(b *testing.B) {
		s := compile(b, "quotas: [{name: a, bytesPerSecond: 1000000000, action: drop}]")
		b.RunParallel(func(pb *testing.PB) {
			p := s.For(&record.Resource{Namespace: "shop"})
			r := record.Record{Time: at, Stream: "stdout", Body: plain, Origin: record.Origin{File: fmt.Sprint(&pb)}}
			for pb.Next() {
				r.Origin.Offset += 200
				r.Origin.End = r.Origin.Offset + 200
				p.Apply(&r)
			}
		})
	})
}

// Whatever a pod's annotations say: no panic, and what is not understood is said.
func FuzzAnnotations(f *testing.F) {
	f.Add("outrigger.dev/logs", "regex:(?P<a>.)", "co.elastic.logs/multiline.pattern", "^x")
	f.Add("outrigger.dev/sample", "NaN", "outrigger.dev/redact", "all")
	f.Add("fluentbit.io/parser_stdout-app", "nginx", "vector.dev/exclude-containers", ",")
	s := compile(f, "{}")
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 string) {
		p := s.For(&record.Resource{Container: "app", Annotations: map[string]string{key1: value1, key2: value2}, Labels: map[string]string{key1: value1}})
		if p.Multiline() == nil || len(p.Problems()) > 32 {
			t.Fatalf("multiline %v, %d problems", p.Multiline(), len(p.Problems()))
		}
		if strings.HasPrefix(key1, "fluentbit.io/") && p.Off() == "" && len(p.Problems()) == 0 && !strings.HasPrefix(key1, "fluentbit.io/exclude") && !strings.HasPrefix(key1, "fluentbit.io/parser") {
			t.Fatalf("%q is ignored without a word", key1)
		}
		r := record.Record{Time: at, Stream: "stdout", Body: "level=info a@example.com " + value1}
		p.Apply(&r)
	})
}
