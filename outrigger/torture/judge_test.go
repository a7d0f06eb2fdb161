package torture

import (
	"bytes"
	"slices"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// wrote returns a source of n lines and their texts.
func wrote(id uint32, n, filling int, k kind) (*source, [][]byte) {
	s := &source{id: id, name: "shop/pod/app/stdout"}
	var texts [][]byte
	for i := range n {
		h := head{source: id, number: uint32(i), written: int64(1000 + i), filling: filling + i, kind: k}
		s.lines = append(s.lines, written{at: h.written, bytes: 100, generation: &generation{}})
		texts = append(texts, h.line())
	}
	return s, texts
}

func TestTheJudgeCatches(t *testing.T) {
	at := time.Unix(0, 2e6)
	for name, c := range map[string]struct {
		kind    kind
		tamper  func(texts [][]byte) [][]byte
		dropped int64
		want    verdict
	}{
		"nothing wrong":    {plain, func(t [][]byte) [][]byte { return t }, 0, verdict{Arrived: 10}},
		"a lost line":      {plain, func(t [][]byte) [][]byte { return append(t[:3:3], t[4:]...) }, 0, verdict{Arrived: 9, Lost: 1}},
		"the last line":    {plain, func(t [][]byte) [][]byte { return t[:9] }, 0, verdict{Arrived: 9, Lost: 1}},
		"everything":       {plain, func([][]byte) [][]byte { return nil }, 0, verdict{Lost: 10}},
		"an explained one": {plain, func(t [][]byte) [][]byte { return t[:9] }, 100, verdict{Arrived: 9, Explained: 1, Dropped: 100}},
		"one explained of two": {plain, func(t [][]byte) [][]byte { return t[:8] }, 199, verdict{
			Arrived: 8, Explained: 1, Lost: 1, Dropped: 199, Unequal: 99,
		}},
		"an audit that says too much": {plain, func(t [][]byte) [][]byte { return t }, 7, verdict{Arrived: 10, Dropped: 7, Unequal: 7}},
		"a duplicate":                 {plain, func(t [][]byte) [][]byte { return append(t, t[4]) }, 0, verdict{Arrived: 10, Duplicated: 1}},
		"another order": {plain, func(t [][]byte) [][]byte { t[2], t[3] = t[3], t[2]; return t }, 0, verdict{
			Arrived: 10, Disordered: 1,
		}},
		"a changed filling":  {plain, func(t [][]byte) [][]byte { t[5][len(t[5])-1] ^= 1; return t }, 0, verdict{Arrived: 9, Lost: 1, Corrupted: 1}},
		"a changed number":   {plain, func(t [][]byte) [][]byte { t[5][len(mark)+2] ^= 1; return t }, 0, verdict{Arrived: 9, Lost: 1, Alien: 1}},
		"two joined":         {plain, func(t [][]byte) [][]byte { t[5] = append(t[5], t[6]...); return append(t[:6:6], t[7:]...) }, 0, verdict{Arrived: 8, Lost: 2, Corrupted: 1}},
		"a cut plain line":   {plain, func(t [][]byte) [][]byte { t[5] = t[5][:len(t[5])-3]; return t }, 0, verdict{Arrived: 9, Lost: 1, Corrupted: 1}},
		"a cut long line":    {long, func(t [][]byte) [][]byte { t[5] = t[5][:len(t[5])-30]; return t }, 30, verdict{Arrived: 10, Cut: 1, Dropped: 30}},
		"a wrong long line":  {long, func(t [][]byte) [][]byte { t[5][len(t[5])-30] ^= 1; return t }, 0, verdict{Arrived: 9, Lost: 1, Corrupted: 1}},
		"one in garbage":     {embedded, func(t [][]byte) [][]byte { t[5] = append([]byte("\xff\x00"), append(t[5], 0)...); return t }, 0, verdict{Arrived: 10}},
		"a text of others'":  {plain, func(t [][]byte) [][]byte { return append(t, []byte("hello"), nil, []byte(mark)) }, 0, verdict{Arrived: 10, Alien: 3}},
		"a source of others": {plain, func(t [][]byte) [][]byte { _, o := wrote(9, 1, 0, plain); return append(t, o...) }, 0, verdict{Arrived: 10}},
	} {
		t.Run(name, func(t *testing.T) {
			s, texts := wrote(1, 10, 60, c.kind)
			j := newJudge()
			for _, text := range c.tamper(texts) {
				j.arrive(text, at)
			}
			got := j.verdict([]*source{s}, c.dropped, 0, nil)
			got.Samples, got.P50, got.P99, got.Max = nil, 0, 0, 0
			c.want.Written = 10
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestWhatNobodyCouldHaveIsKubelets(t *testing.T) {
	second := func(n int64) time.Time { return time.Unix(n, 0) }
	s := &source{id: 1}
	for _, w := range []struct{ at, deleted int64 }{
		{at: 12, deleted: 18}, // within the absence
		{at: 9, deleted: 18},  // before it
		{at: 12, deleted: 21}, // after it
		{at: 12},              // still there
	} {
		g := &generation{}
		if w.deleted != 0 {
			g.deleted = second(w.deleted)
		}
		s.lines = append(s.lines, written{at: second(w.at).UnixNano(), bytes: 10, generation: g})
	}
	v := newJudge().verdict([]*source{s}, 0, 0, []absence{{second(1), second(2)}, {second(10), second(20)}})
	if v.Kubelet != 1 || v.Lost != 3 {
		t.Errorf("%d are kubelet's and %d lost", v.Kubelet, v.Lost)
	}
}

func TestWhatAReceiverDidNotNameIsExplainedByNumber(t *testing.T) {
	s, texts := wrote(1, 5, 10, plain)
	j := newJudge()
	j.arrive(texts[0], time.Time{})
	if v := j.verdict([]*source{s}, 0, 3, nil); v.Explained != 3 || v.Lost != 1 {
		t.Errorf("%+v", v)
	}
}

func TestASecretThatArrivesIsLeaked(t *testing.T) {
	s, texts := wrote(1, 2, 10, plain)
	s.lines[1].secret = true
	j := newJudge()
	j.arrive(texts[0], time.Time{})
	if v := j.verdict([]*source{s}, 0, 0, nil); v.Leaked != 0 || v.Lost != 0 || v.Written != 1 {
		t.Errorf("before: %+v", v)
	}
	j.arrive(texts[1], time.Time{})
	if v := j.verdict([]*source{s}, 0, 0, nil); v.Leaked != 1 {
		t.Errorf("after: %+v", v)
	}
}

func TestFillingsAreTextOfTheirLength(t *testing.T) {
	for number := range uint32(7) {
		for n := range 300 {
			b := appendFilling(nil, number, n)
			if len(b) != n || !utf8.Valid(b) || bytes.IndexByte(b, '\n') >= 0 {
				t.Fatalf("number %d, %d bytes: %q", number, n, b)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	_, texts := wrote(3, 2, 20, plain)
	f.Add(texts[0])
	f.Add([]byte("x" + mark + "1 2 3 99999999999999999999 - 0 "))
	f.Fuzz(func(t *testing.T, text []byte) {
		h, rest, ok := parse(text)
		if ok && h.filling < 1<<20 && h.filling >= 0 {
			if whole, _ := h.whole(rest); whole && !bytes.HasSuffix(text, h.line()) {
				t.Errorf("%q is whole, but not a line", text)
			}
		}
	})
}

func TestWhatElseIsPromised(t *testing.T) {
	for _, name := range keeping {
		if !slices.ContainsFunc(scenarios(), func(s scenario) bool { return s.name == name }) {
			t.Errorf("%s is no scenario", name)
		}
	}
	for _, c := range []struct {
		result Result
		want   int
	}{
		{Result{Scenario: "sigkill", Output: "forward", verdict: verdict{Duplicated: 5}}, 0},
		{Result{Scenario: "sigkill", Output: "elasticsearch", verdict: verdict{Duplicated: 5, Disordered: 5}}, 1},
		{Result{Scenario: "sigkill", Output: "otlp", verdict: verdict{Duplicated: 5, Disordered: 5}}, 0},
		{Result{Scenario: "rotate-fast", Output: "forward", verdict: verdict{Duplicated: 5, Disordered: 5}}, 2},
		{Result{Scenario: "rotate-fast", Output: "forward", verdict: verdict{Arrived: 5}}, 0},
	} {
		if got := c.result.broken(); len(got) != c.want {
			t.Errorf("%s at %s: %q; want %d", c.result.Scenario, c.result.Output, got, c.want)
		}
	}
}
