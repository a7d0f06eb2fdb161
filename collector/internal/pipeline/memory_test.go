package pipeline

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/tail"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// nowhere is an output that is never asked.
type nowhere struct{ output.Output }

func (nowhere) Traits() output.Traits { return output.Traits{} }

// begin opens a pipeline as each process does.
func begin(t *testing.T, folder, config string) *Pipeline {
	t.Helper()
	m, err := NewMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	c := rules.Config{}
	if config != "" {
		c.Quotas = []rules.Quota{{Name: config, BytesPerDay: 1000, Action: "drop"}}
	}
	set, err := rules.Compile(c, "out", []string{"out"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := New(Config{Name: "out", DataDir: folder, Rules: set, Tail: tail.Config{Folder: t.TempDir()}}, nowhere{}, slog.New(slog.DiscardHandler), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func dropped(p *Pipeline, pod, body string, observed time.Time) {
	p.why.note(&record.Record{Time: observed.Add(-time.Second), Observed: observed, Body: body, Resource: &record.Resource{Namespace: "shop", Pod: pod}}, ledger.ByRule, "no-health", 10)
}

// Why lines were dropped is known after a restart, and for seven days.
func TestReasonsOutliveTheProcess(t *testing.T) {
	folder, now := t.TempDir(), time.Now().UTC()
	p := begin(t, folder, "")
	dropped(p, "cart", "GET /healthz", now)
	dropped(p, "old", "GET /", now.Add(-8*24*time.Hour))
	p.saveMemory(now)
	_, since := p.Why()

	p = begin(t, folder, "")
	dropped(p, "cart", "GET /healthz again", now)
	got, again := p.Why()
	want := []Reason{{
		Output: "out", Namespace: "shop", Pod: "cart", Cause: "rule", Rule: "no-health", Records: 2, Bytes: 20,
		Last: now.Add(-time.Second), Noted: now, Samples: []string{"GET /healthz", "GET /healthz again"},
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if !again.Equal(since) || since.IsZero() {
		t.Errorf("known since %v; want %v", again, since)
	}
	p.saveMemory(now.Add(8 * 24 * time.Hour))
	if got, since := begin(t, folder, "").Why(); len(got) != 0 || since.Before(now.Truncate(time.Minute)) {
		t.Errorf("eight days later: %+v since %v", got, since)
	}
}

// A crash does not give a namespace its day again.
func TestQuotasOutliveTheProcess(t *testing.T) {
	folder, at := t.TempDir(), time.Date(2026, 11, 26, 23, 59, 0, 0, time.UTC)
	cart := &record.Resource{Namespace: "shop", Pod: "cart"}
	judge := func(p *Pipeline, offset int64, at time.Time) rules.Cause {
		return p.cfg.Rules.For(cart).Apply(&record.Record{Time: at, Body: strings.Repeat("x", 600), Resource: cart, Origin: record.Origin{File: "f", Offset: offset, End: offset + 600}}).Cause
	}
	p := begin(t, folder, "daily")
	if got := judge(p, 0, at); got != rules.Keep {
		t.Fatalf("the first: %v", got)
	}
	p.saveMemory(at)
	p = begin(t, folder, "daily")
	if got := judge(p, 600, at); got != rules.ByQuota {
		t.Errorf("after a restart: %v; want over the quota", got)
	}
	p.saveMemory(at)
	p = begin(t, folder, "daily")
	if got := judge(p, 1200, at.Add(time.Hour)); got != rules.Keep {
		t.Errorf("the next day: %v", got)
	}
	if got := judge(p, 1800, at); got != rules.ByQuota {
		t.Errorf("the day before, late: %v", got)
	}
	if got := judge(begin(t, folder, "another"), 2400, at); got != rules.Keep {
		t.Errorf("of a quota with another name: %v", got)
	}
}

func TestDamagedMemoryIsSetAside(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "out.memory.json")
	if err := os.WriteFile(path, []byte(`{"version":1,"reasons":[{"cau`), 0o600); err != nil {
		t.Fatal(err)
	}
	p := begin(t, folder, "")
	if got, since := p.Why(); len(got) != 0 || since.IsZero() {
		t.Errorf("%+v since %v", got, since)
	}
	if _, err := os.Stat(path + ".damaged"); err != nil {
		t.Error(err)
	}
	p.saveMemory(time.Now())
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestMemoryIsStrict(t *testing.T) {
	long := strings.Repeat("x", maxSample+4)
	for text, want := range map[string]string{
		`{"version":2}`:       "version 2",
		`{"version":1} {}`:    "something follows",
		`{"version":1,"x":0}`: "unknown field",
		`{"version":1,"reasons":[{"cause":"acknowledged"}]}`:                                               "not known",
		`{"version":1,"reasons":[{"cause":"rule","records":-1}]}`:                                          "-1 records",
		`{"version":1,"reasons":[{"cause":"rule","samples":["","","",""]}]}`:                               "4 samples",
		`{"version":1,"reasons":[{"cause":"rule","samples":["` + long + `"]}]}`:                            "260 bytes",
		`{"version":1,"reasons":[` + strings.Repeat(`{"cause":"rule"},`, 5000) + `{}]}`:                    "5001 reasons",
		`{"version":1,"quotas":[{"quota":""}]}`:                                                            "needs a name",
		`{"version":1,"quotas":[{"quota":"q","days":[{"day":1,"bytes":-1}]}]}`:                             "-1 bytes",
		`{"version":1,"quotas":[` + strings.Repeat(`{"quota":"q"},`, 2000) + `{"quota":"q"}]}`:             "2001 usages",
		`{"version":1,"quotas":[{"quota":"q","days":[` + strings.Repeat(`{"day":1},`, 8) + `{"day":1}]}]}`: "9 days",
	} {
		if _, err := decodeMemory([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v; want %s", text, err, want)
		}
	}
}

// Whatever is taken over can be written and taken over again.
func FuzzMemory(f *testing.F) {
	f.Add([]byte(`{"version":1,"since":"2026-11-26T00:00:00Z","reasons":[{"output":"","namespace":"shop","cause":"quota","records":3,"bytes":9,"last":"2026-11-26T00:00:00Z","noted":"2026-11-26T00:00:00Z","samples":["a"]}],"quotas":[{"quota":"q","namespace":"shop","days":[{"day":20783,"bytes":7}]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decodeMemory(b)
		if err != nil {
			return
		}
		w := newReasons()
		w.restore(m, time.Now())
		set, err := rules.Compile(rules.Config{Quotas: []rules.Quota{{Name: "q", BytesPerDay: 10, Action: "drop"}}}, "out", nil)
		if err != nil {
			t.Fatal(err)
		}
		set.Restore(m.Quotas)
		again, err := json.Marshal(memory{Version: memoryVersion, Since: w.since(), Reasons: w.list(""), Quotas: set.Usages()})
		if err != nil {
			t.Skip(err) // a year that JSON cannot hold
		}
		if _, err := decodeMemory(again); err != nil {
			t.Errorf("%v: %s", err, again)
		}
	})
}
