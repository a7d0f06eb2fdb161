package query_test

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/collector/internal/query"
	"github.com/outrigger-mesh/outrigger/golden"
)

// TestGolden runs every file of testdata: queries and what the parser makes of
// them, how a record set answers, what the index is asked for.
func TestGolden(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		var records []map[string]any
		if lines, ok := c.Lookup("records"); ok {
			for line := range strings.Lines(lines) {
				var f map[string]any
				if err := json.Unmarshal([]byte(line), &f); err != nil {
					t.Fatalf("records: %v in %s", err, line)
				}
				records = append(records, f)
			}
		}
		var out strings.Builder
		for line := range strings.Lines(c.Input("queries")) {
			line = strings.TrimSuffix(line, "\n")
			fmt.Fprintf(&out, "%s\n", line)
			e, err := query.Parse(line)
			if err != nil {
				fmt.Fprintf(&out, "  error: %v\n", err)
				continue
			}
			fmt.Fprintf(&out, "  parsed: %v\n", e)
			if p := query.Narrow(e); p.Match != "" || !p.From.IsZero() || !p.To.IsZero() {
				fmt.Fprintf(&out, "  index: %s", p.Match)
				if !p.From.IsZero() {
					fmt.Fprintf(&out, " from %s", p.From)
				}
				if !p.To.IsZero() {
					fmt.Fprintf(&out, " to %s", p.To)
				}
				fmt.Fprintln(&out)
			}
			match := query.Compile(e)
			var ids []string
			for _, r := range records {
				if match(r) {
					ids = append(ids, fmt.Sprint(r["id"]))
				}
			}
			if records != nil {
				fmt.Fprintf(&out, "  matches: %s\n", strings.Join(ids, " "))
			}
		}
		c.Want("want", out.String())
	})
}

func TestLimits(t *testing.T) {
	f := func(name, text, want string) {
		t.Helper()
		_, err := query.Parse(text)
		if want == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			return
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v; want %q in it", name, err, want)
		}
	}
	f("length at the limit", strings.Repeat("a", query.MaxLength), "")
	f("length", strings.Repeat("a", query.MaxLength+1), "4097 bytes")
	f("terms at the limit", strings.Repeat("a ", query.MaxTerms), "")
	f("terms", strings.Repeat("a ", query.MaxTerms+1), "more than 64")
	f("depth at the limit", strings.Repeat("(", query.MaxDepth)+"a"+strings.Repeat(")", query.MaxDepth), "")
	f("depth", strings.Repeat("(", query.MaxDepth+1)+"a"+strings.Repeat(")", query.MaxDepth+1), "more than 32")
	f("depth of NOT", strings.Repeat("NOT ", query.MaxDepth+1)+"a", "more than 32")
	f("not UTF-8", "a\xff", "not a character")
}

// FuzzParse: what is printed reads back as the same query, and the index never
// hides a record that the query matches.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		`service.name:payments AND http.response.status_code>=500 "card declined" NOT log.level:debug`,
		`log.level:(warn OR error) kubernetes.pod.name:pay*-0`, `a* *b *c* a*b \* \and "and"`, `@timestamp>"2026-11-23"`, `f:* * NOT (a OR b)`, `"\"\\"`, `f : 1`, `f:>5`, `http.request.id:"a-b"`, `http.request.id:1.0`,
	} {
		f.Add(s, "card declined: payments-0 \"x\" 4bf92f", "payments")
	}
	f.Fuzz(func(t *testing.T, text, message, service string) {
		e, err := query.Parse(text)
		if err != nil {
			return
		}
		printed := e.String()
		if len(printed) > query.MaxLength { // quotes and AND make it longer
			return
		}
		again, err := query.Parse(printed)
		if err != nil {
			t.Fatalf("%q prints as %q, which does not parse: %v", text, printed, err)
		}
		if !reflect.DeepEqual(e, again) {
			t.Fatalf("%q prints as %q, which is another query: %#v, was %#v", text, printed, again, e)
		}
		fields := map[string]any{"message": message, "service.name": service, "http.response.status_code": float64(len(message)), "trace.id": service, "http.request.id": service}
		if query.Compile(e)(fields) && !candidate(query.Narrow(e).Match, query.Terms(fields)) {
			t.Fatalf("%q matches %v, but the index does not propose it: %s not in %q", text, fields, query.Narrow(e).Match, query.Terms(fields))
		}
	})
}

// candidate evaluates the FTS5 subset that Narrow writes, as FTS5 would.
func candidate(match, terms string) bool {
	if match == "" {
		return true
	}
	set := strings.Fields(terms)
	rest := match
	var expr func() bool
	expr = func() bool {
		if strings.HasPrefix(rest, "(") {
			rest = rest[1:]
			v := expr()
			for {
				if after, ok := strings.CutPrefix(rest, " AND "); ok {
					rest = after
					w := expr()
					v = v && w
				} else if after, ok := strings.CutPrefix(rest, " OR "); ok {
					rest = after
					w := expr()
					v = v || w
				} else {
					break
				}
			}
			rest = strings.TrimPrefix(rest, ")")
			return v
		}
		word, after, _ := strings.Cut(rest[1:], `"`)
		rest = after
		prefix := false
		if after, ok := strings.CutPrefix(rest, " *"); ok {
			rest, prefix = after, true
		}
		for _, s := range set {
			if s == word || prefix && strings.HasPrefix(s, word) {
				return true
			}
		}
		return false
	}
	v := expr()
	if rest != "" {
		panic("not read: " + rest)
	}
	return v
}
