package rules_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const day = 24 * time.Hour

// restarted returns the rules of a process that begins with what one before left.
func restarted(t *testing.T, config string, before *rules.Set, now time.Time) *rules.Set {
	t.Helper()
	b, err := json.Marshal(before.State(now))
	if err != nil {
		t.Fatal(err)
	}
	var state rules.State
	if err := json.Unmarshal(b, &state); err != nil {
		t.Fatal(err)
	}
	s := compile(t, config)
	if err := s.Restore(state, now); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before.State(now), s.State(now)); d != "" {
		t.Errorf("restored (-want +got):\n%s", d)
	}
	return s
}

// Each step writes a record of 100 bytes after a restart at that time; the day's quota
// is one and a half.
func TestQuotaOfADaySurvivesRestarts(t *testing.T) {
	const config = "quotas: [{name: q, bytesPerDay: 150, action: drop}]"
	shop := &record.Resource{Namespace: "shop"}
	s := compile(t, config)
	for i, step := range []struct {
		at   time.Time
		want rules.Cause
	}{
		{at, rules.Keep},
		{at.Add(time.Minute), rules.ByQuota},
		{at.Add(day), rules.Keep},     // a new day
		{at, rules.ByQuota},           // the clock went back: no second quota
		{at.Add(-day), rules.Keep},    // and the day before has its own
		{at.Add(-day), rules.ByQuota}, // but one only
		{at.Add(day), rules.ByQuota},  // forward again: what was used is used
		{at.Add(2 * day), rules.Keep}, // and the next day is whole
	} {
		s = restarted(t, config, s, step.at)
		if got := judged(s.For(shop), "f", int64(i)*100, step.at); got != step.want {
			t.Errorf("record %d at %v: %v; want %v", i, step.at, got, step.want)
		}
	}
	if left := s.State(at.Add(20 * day)); len(left) != 0 {
		t.Errorf("weeks later %v is kept", left)
	}
}

// What is read again after a restart is not counted again, and has its old verdict.
func TestQuotaCountsNothingTwice(t *testing.T) {
	const config = "quotas: [{name: q, bytesPerDay: 350, action: drop}, {name: other, bytesPerSecond: 1, action: warn}]"
	shop := &record.Resource{Namespace: "shop"}
	s := compile(t, config)
	want := []rules.Cause{rules.Keep, rules.Keep, rules.Keep, rules.ByQuota, rules.ByQuota}
	for range 3 {
		p := s.For(shop)
		for i, want := range want {
			if got := judged(p, "f", int64(i)*100, at); got != want {
				t.Errorf("record %d: %v; want %v", i, got, want)
			}
		}
		if state := s.State(at); len(state) != 1 || state[0].Days[0].Bytes != 500 {
			t.Fatalf("counted: %+v", state)
		}
		s = restarted(t, config, s, at)
	}
	other := compile(t, "quotas: [{name: new, bytesPerDay: 1, action: drop}]")
	if err := other.Restore(s.State(at), at); err != nil || len(other.State(at)) != 0 {
		t.Errorf("a quota that is gone: %v, %v", other.State(at), err)
	}
	// What was resumed is newer than a file.
	old := s.State(at)
	judged(s.For(shop), "g", 0, at)
	again := compile(t, config)
	again.Resume(s)
	if err := again.Restore(old, at); err != nil {
		t.Fatal(err)
	}
	if got := again.State(at)[0].Days[0].Bytes; got != 600 {
		t.Errorf("%d bytes after a reload; want 600", got)
	}
}

func TestStateThatIsRefused(t *testing.T) {
	for _, text := range []string{
		`[{"quota":"q","namespace":"a"},{"quota":"q","namespace":"a"}]`,
		`[{"quota":"q","days":[{"day":1,"bytes":-1}]}]`,
		`[{"quota":"q","days":[{"day":1,"bytes":9223372036854775807}]}]`,
		`[{"quota":"q","days":[{},{},{},{},{},{},{},{},{}]}]`,
		`[{"quota":"q","judged":[{"file":"","end":1}]}]`,
		`[{"quota":"q","judged":[{"file":"f","end":-1}]}]`,
		`[{"quota":"q","judged":[{"file":"f","end":5,"over":[[2,6]]}]}]`,
		`[{"quota":"q","judged":[{"file":"f","end":5,"over":[[2,4],[3,5]]}]}]`,
		`[{"quota":"q","namespace":"` + strings.Repeat("x", 5000) + `"}]`,
	} {
		var state rules.State
		if err := json.Unmarshal([]byte(text), &state); err != nil {
			t.Fatal(err)
		}
		s := compile(t, "quotas: [{name: q, bytesPerDay: 150, action: drop}]")
		if err := s.Restore(state, at); err == nil || len(s.State(at)) != 0 {
			t.Errorf("%.100s: error %v, taken %v", text, err, s.State(at))
		}
	}
}
