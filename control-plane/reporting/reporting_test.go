package reporting_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/reporting"
)

func example() reporting.Report {
	return reporting.Report{
		Node: "storefront-7d.x.shop", Workload: "storefront",
		Breakers: []reporting.Breaker{{"shop/payments", "shop/payments:80", reporting.Open}, {"shop/payments", "shop/payments:81", reporting.HalfOpen}},
		Changes: []reporting.Change{{
			ID: "br-0123456789", Policy: "shop/payments", Target: "shop/payments:80", State: reporting.Open, Observe: true,
			Time: time.Date(2026, 5, 1, 3, 0, 0, 123456789, time.UTC), Reason: "failure ratio 0.60 >= 0.50 over 10s (12 of 20)",
		}},
	}
}

func TestRoundTrip(t *testing.T) {
	for _, want := range []reporting.Report{example(), {Node: "a.b", Workload: "a"}} {
		got, err := reporting.Decode(want.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

// What a proxy may have more of than fits is cut, so that the rest arrives.
func TestEncodeCuts(t *testing.T) {
	r := example()
	r.Changes[0].Reason = "line\nline " + strings.Repeat("é", reporting.MaxReason)
	for i := range 2 * reporting.MaxChanges {
		r.Changes = append(r.Changes, reporting.Change{ID: fmt.Sprint("br-", i), Policy: "a/b", Target: "a/b:1", State: reporting.Closed, Time: r.Changes[0].Time, Reason: "line\nline " + strings.Repeat("é", reporting.MaxReason)})
	}
	r.Breakers = nil
	for i := range reporting.MaxBreakers + 1 {
		r.Breakers = append(r.Breakers, reporting.Breaker{Policy: "a/b", Target: fmt.Sprintf("a/b:%d", i), State: reporting.Closed})
	}
	got, err := reporting.Decode(r.Encode())
	if err != nil || len(got.Breakers) != reporting.MaxBreakers || len(got.Changes) != reporting.MaxChanges {
		t.Fatalf("%d breakers, %d changes, %v", len(got.Breakers), len(got.Changes), err)
	}
	if c := got.Changes[reporting.MaxChanges-1]; c.ID != fmt.Sprint("br-", 2*reporting.MaxChanges-1) || !strings.HasPrefix(c.Reason, "line line é") || !strings.HasSuffix(c.Reason, "...") {
		t.Errorf("%+v", c)
	}
}

// What is of another kind, too long or no name is refused by its field.
func TestDecodeRefuses(t *testing.T) {
	const good = `{"node":"a.b","workload":"a","breakers":[{"policy":"a/b","target":"a/b:1","state":"open"}],
		"changes":[{"id":"br-1","policy":"a/b","target":"a/b:1","state":"open","time":"2026-05-01T03:00:00Z","reason":"x"}],"later":{}}`
	parse := func(text string) *structpb.Struct {
		var s structpb.Struct
		if err := protojson.Unmarshal([]byte(text), &s); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		return &s
	}
	if _, err := reporting.Decode(parse(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, want string }{
		{`"node":"a.b"`, `"node":"a"`, "node: "},
		{`"node":"a.b"`, `"node":7`, "node: it is no string"},
		{`"node":"a.b",`, ``, "node: it is no string"},
		{`"node":"a.b"`, `"node":"` + strings.Repeat("a", 400) + `.b"`, "node: 402 bytes"},
		{`"node":"a.b"`, `"node":"A.b"`, "node: "},
		{`"workload":"a"`, `"workload":"a b"`, "workload: "},
		{`"policy":"a/b","target"`, `"policy":"a/b/c","target"`, "breakers[0].policy: "},
		{`"target":"a/b:1","state":"open"}]`, `"target":"a/b","state":"open"}]`, "breakers[0].target: "},
		{`"state":"open"}]`, `"state":"ajar"}]`, `breakers[0].state: "ajar"`},
		{`"breakers":[`, `"breakers":[{"policy":"a/b","target":"a/b:1","state":"open"},`, "breakers[1].target: a/b:1 is there twice"},
		{`"breakers":[`, `"breakers":[1,`, "breakers[0]: it is no object"},
		{`"breakers":[`, `"breakers":[` + strings.Repeat(`{},`, reporting.MaxBreakers), "breakers: 1025 items"},
		{`"changes":[`, `"changes":[` + strings.Repeat(`{},`, reporting.MaxChanges), "changes: 17 items"},
		{`"changes":[`, `"changes":{},"x":[`, "changes: it is no list"},
		{`"id":"br-1"`, `"id":"br 1"`, "changes[0].id: "},
		{`"state":"open","time"`, `"state":"half-open","time"`, "changes[0].state: "},
		{`2026-05-01T03:00:00Z`, `1926-05-01T03:00:00Z`, "changes[0].time: "},
		{`"reason":"x"`, `"reason":"x\u001b[31m"`, "changes[0].reason: "},
		{`"reason":"x"`, `"reason":"` + strings.Repeat("x", 600) + `"`, "changes[0].reason: 600 bytes"},
		{`"reason":"x"`, `"reason":"x","observe":"yes"`, "changes[0].observe: "},
	} {
		text := strings.Replace(good, c.from, c.to, 1)
		if text == good {
			t.Fatalf("%s is not in the example", c.from)
		}
		if r, err := reporting.Decode(parse(text)); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%s: %+v, %v; want %s", c.to, r, err, c.want)
		}
	}
}

func FuzzDecode(f *testing.F) {
	text, err := protojson.Marshal(example().Encode())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"breakers":[null],"changes":[{"time":"9999-12-31T23:59:59-23:59"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var s structpb.Struct
		if protojson.Unmarshal(text, &s) != nil {
			return
		}
		r, err := reporting.Decode(&s)
		if err != nil {
			return
		}
		again, err := reporting.Decode(r.Encode())
		if err != nil {
			t.Fatalf("%+v cannot be read again: %v", r, err)
		}
		if d := cmp.Diff(r, again); d != "" {
			t.Fatalf("(-first +again):\n%s", d)
		}
	})
}
