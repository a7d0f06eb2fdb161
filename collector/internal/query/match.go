package query

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// identifiers are looked for by a plain word as a whole, so that a pasted trace
// or request id finds its records.
func identifiers() []string {
	return []string{record.TraceID, record.SpanID, "http.request.id", "outrigger.evidence.id"}
}

// texts are the fields that are searched by plain words.
func texts() []string { return []string{record.Message, "error.message"} }

// isText reports whether the field is matched by words and not as a whole.
func isText(field string) bool {
	return field == record.Message || field == "error.message" || field == "error.stack_trace"
}

// Compile makes the function that decides whether the query matches a record,
// given as record.Record's Fields: flat dotted names (names nested in maps are
// found too). The function keeps nothing and can be called by several
// goroutines.
func Compile(e Expr) func(fields map[string]any) bool {
	switch e := e.(type) {
	case And:
		parts := compileAll(e)
		return func(f map[string]any) bool {
			for _, match := range parts {
				if !match(f) {
					return false
				}
			}
			return true
		}
	case Or:
		parts := compileAll(e)
		return func(f map[string]any) bool {
			for _, match := range parts {
				if match(f) {
					return true
				}
			}
			return false
		}
	case Not:
		match := Compile(e.X)
		return func(f map[string]any) bool { return !match(f) }
	case Exists:
		return func(f map[string]any) bool { return anyOf(lookup(f, e.Field), func(v any) bool { return v != nil }) }
	case Compare:
		return func(f map[string]any) bool { return anyOf(lookup(f, e.Field), e.holds) }
	case Match:
		return compileMatch(e)
	default: // All, and nil: the empty query
		return func(map[string]any) bool { return true }
	}
}

func compileAll(parts []Expr) []func(map[string]any) bool {
	out := make([]func(map[string]any) bool, len(parts))
	for i, e := range parts {
		out[i] = Compile(e)
	}
	return out
}

func compileMatch(m Match) func(map[string]any) bool {
	value := m.Value.lower()
	whole := func(v any) bool { return value.matchesValue(v) }
	words := value.words()
	inText := func(v any) bool {
		if len(words) == 0 { // punctuation only: there is no word to look for
			return strings.Contains(text(v), value[0])
		}
		return phraseIn(words, text(v))
	}
	switch {
	case m.Field == "":
		return func(f map[string]any) bool {
			for _, name := range texts() {
				if anyOf(lookup(f, name), inText) {
					return true
				}
			}
			for _, name := range identifiers() {
				if anyOf(lookup(f, name), func(v any) bool { return value.glob(text(v)) }) {
					return true
				}
			}
			return false
		}
	case isText(m.Field):
		return func(f map[string]any) bool { return anyOf(lookup(f, m.Field), inText) }
	default:
		return func(f map[string]any) bool { return anyOf(lookup(f, m.Field), whole) }
	}
}

// lookup finds a field by its dotted name, also where a part of the path is
// nested. It returns nil where there is none.
func lookup(f map[string]any, name string) any {
	if v, ok := f[name]; ok {
		return v
	}
	for i := range len(name) {
		if name[i] != '.' {
			continue
		}
		if inner, ok := f[name[:i]].(map[string]any); ok {
			if v := lookup(inner, name[i+1:]); v != nil {
				return v
			}
		}
	}
	return nil
}

// anyOf asks for a value or for the elements of a list.
func anyOf(v any, holds func(any) bool) bool {
	switch v := v.(type) {
	case nil:
		return false
	case []any:
		for _, x := range v {
			if anyOf(x, holds) {
				return true
			}
		}
		return false
	case []string:
		for _, x := range v {
			if holds(x) {
				return true
			}
		}
		return false
	default:
		return holds(v)
	}
}

func (c Compare) holds(v any) bool {
	if !c.Time.IsZero() {
		var t time.Time
		switch v := v.(type) {
		case time.Time:
			t = v
		case string:
			parsed, ok := instant(v)
			if !ok {
				return false
			}
			t = parsed
		default:
			return false
		}
		return c.Op.holds(t.Compare(c.Time))
	}
	n, ok := numeric(v)
	if !ok {
		return false
	}
	switch {
	case n < c.Number:
		return c.Op.holds(-1)
	case n > c.Number:
		return c.Op.holds(1)
	case n == c.Number:
		return c.Op.holds(0)
	default: // NaN
		return false
	}
}

func (o Op) holds(order int) bool {
	switch o {
	case Greater:
		return order > 0
	case GreaterEqual:
		return order >= 0
	case Less:
		return order < 0
	case LessEqual:
		return order <= 0
	default:
		return false
	}
}

// numeric reads a field's value as a number. Strings count: logfmt has no others.
func numeric(v any) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, true
	case float32:
		return float64(v), true
	case int:
		return float64(v), true
	case int32:
		return float64(v), true
	case int64:
		return float64(v), true
	case uint32:
		return float64(v), true
	case uint64:
		return float64(v), true
	case json.Number:
		return number(v.String())
	case string:
		return number(v)
	default:
		return 0, false
	}
}

// text writes a field's value as a query would name it, in lower case.
func text(v any) string {
	switch v := v.(type) {
	case string:
		return strings.ToLower(v)
	case bool:
		return strconv.FormatBool(v)
	case time.Time:
		return strings.ToLower(v.UTC().Format(time.RFC3339Nano))
	case map[string]any:
		return "" // an object has fields, not a value
	}
	if n, ok := numeric(v); ok {
		return strconv.FormatFloat(n, 'f', -1, 64)
	}
	return strings.ToLower(fmt.Sprint(v))
}

func (p Pattern) lower() Pattern {
	out := make(Pattern, len(p))
	for i, s := range p {
		out[i] = strings.ToLower(s)
	}
	return out
}

// matchesValue compares the pattern, which is in lower case, with a whole value.
// A number is equal to however it is written.
func (p Pattern) matchesValue(v any) bool {
	if _, isMap := v.(map[string]any); isMap {
		return false
	}
	if !p.Literal() {
		return p.glob(text(v))
	}
	if text(v) == p[0] {
		return true
	}
	if _, isString := v.(string); isString {
		return false
	}
	want, ok := number(p[0])
	if !ok {
		return false
	}
	got, ok := numeric(v)
	return ok && got == want
}

// glob matches with a gap between the parts. Taking every part at its first
// place is enough, because only the last one is tied to the end.
func (p Pattern) glob(s string) bool {
	first, last := p[0], p[len(p)-1]
	if len(p) == 1 {
		return s == first
	}
	if !strings.HasPrefix(s, first) || len(s) < len(first)+len(last) || !strings.HasSuffix(s, last) {
		return false
	}
	s = s[len(first) : len(s)-len(last)]
	for _, part := range p[1 : len(p)-1] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return true
}
