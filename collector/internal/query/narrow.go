package query

import (
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// maxIndexed is how much of a word is indexed, in bytes. Longer words (base64,
// minified code) are found by their beginning and checked by the compiled query.
const maxIndexed = 64

// keyMark begins the index term of a field's value. It is no letter, so no word
// of a message is such a term; and not ASCII, so that FTS5's ascii tokenizer
// takes it as part of the term.
const keyMark = "¤"

// keys are the fields whose whole values are indexed.
func keys() []string {
	return []string{
		record.ServiceName, record.Namespace, record.PodName, record.LogLevel, record.TraceID, record.EventDataset,
		"http.response.status_code", "outrigger.evidence.id",
	}
}

func isKey(field string) bool {
	for _, k := range keys() {
		if k == field {
			return true
		}
	}
	return false
}

// Terms returns what to index of a record, separated by spaces, each at most
// once a field: the words of its texts and identifiers and a term for every
// value of the fields that are searched most. Its characters are ASCII letters,
// ASCII digits and non-ASCII, which FTS5's tokenizer "ascii" keeps together: what
// a word is, is decided here alone, for the index and for the query.
func Terms(fields map[string]any) string {
	var b strings.Builder
	seen := make(map[string]struct{}, 32)
	add := func(term string) bool {
		term = cut(term)
		if _, dup := seen[term]; !dup {
			seen[term] = struct{}{}
			b.WriteString(term)
			b.WriteByte(' ')
		}
		return true
	}
	words := func(v any) bool {
		eachWord(text(v), add)
		return false
	}
	for _, name := range texts() {
		anyOf(lookup(fields, name), words)
	}
	anyOf(lookup(fields, "error.stack_trace"), words)
	for _, name := range identifiers() {
		anyOf(lookup(fields, name), words)
	}
	for _, name := range keys() {
		anyOf(lookup(fields, name), func(v any) bool {
			add(keyTerm(name, text(v)))
			return false
		})
	}
	return b.String()
}

// keyTerm is the term of a field's value: a hash, because values hold
// separators. Two values may share one; the compiled query tells them apart.
func keyTerm(field, lower string) string {
	if n, ok := number(lower); ok { // 500, 500.0 and 5e2 are one value
		lower = strconv.FormatFloat(n, 'f', -1, 64)
	}
	return keyMark + strconv.FormatUint(fnv1a(field, "\x00", lower), 36)
}

// fnv1a is the 64-bit FNV-1a hash. The terms are stored, so it never changes.
func fnv1a(parts ...string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for _, s := range parts {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 0x100000001b3
		}
	}
	return h
}

func cut(word string) string {
	if len(word) <= maxIndexed {
		return word
	}
	n := maxIndexed
	for n > 0 && !utf8.RuneStart(word[n]) {
		n--
	}
	return word[:n]
}

// Plan says which records can match a query. Every record that matches is among
// its candidates; not every candidate matches.
type Plan struct {
	// Match is an FTS5 expression over the Terms of the records; empty where the
	// index cannot help and every record is a candidate.
	Match string
	// From and To bound @timestamp, both included; zero where the query says
	// nothing.
	From, To time.Time
}

// Narrow makes the plan of a query.
func Narrow(e Expr) Plan {
	var p Plan
	p.Match, _ = narrow(e)
	parts, ok := e.(And)
	if !ok {
		parts = And{e}
	}
	for _, part := range parts {
		c, ok := part.(Compare)
		if !ok || c.Field != record.Timestamp || c.Time.IsZero() {
			continue
		}
		switch c.Op {
		case Greater, GreaterEqual:
			if p.From.IsZero() || c.Time.After(p.From) {
				p.From = c.Time
			}
		case Less, LessEqual:
			if p.To.IsZero() || c.Time.Before(p.To) {
				p.To = c.Time
			}
		}
	}
	return p
}

// narrow returns the FTS5 expression and whether there is one.
func narrow(e Expr) (string, bool) {
	switch e := e.(type) {
	case And:
		var parts []string
		for _, x := range e {
			if s, ok := narrow(x); ok {
				parts = append(parts, s)
			}
		}
		return combine(parts, " AND ")
	case Or:
		var parts []string
		for _, x := range e {
			s, ok := narrow(x)
			if !ok { // one side can match anything
				return "", false
			}
			parts = append(parts, s)
		}
		return combine(parts, " OR ")
	case Match:
		value := e.Value.lower()
		if e.Field == "" || isText(e.Field) {
			return narrowWords(value)
		}
		if isKey(e.Field) && value.Literal() {
			return `"` + keyTerm(e.Field, value[0]) + `"`, true
		}
		// An identifier's words are indexed. A number is equal to however it is
		// written, so its words say nothing.
		if _, isNumber := number(value[0]); slices.Contains(identifiers(), e.Field) && !(value.Literal() && isNumber) {
			return narrowWords(value)
		}
	}
	// Not: the records without the words of a candidate are no candidates'
	// complement. Compare, Exists: the index does not hold them.
	return "", false
}

// narrowWords asks for every word of the pattern; the order is for the compiled
// query. A word with a gap is asked for by its beginning.
func narrowWords(value Pattern) (string, bool) {
	var parts []string
	for _, w := range value.words() {
		switch {
		case len(w[0]) > maxIndexed:
			parts = append(parts, `"`+cut(w[0])+`" *`)
		case w.Literal():
			parts = append(parts, `"`+w[0]+`"`)
		case w[0] != "":
			parts = append(parts, `"`+w[0]+`" *`)
		}
	}
	return combine(parts, " AND ")
}

func combine(parts []string, op string) (string, bool) {
	switch len(parts) {
	case 0:
		return "", false
	case 1:
		return parts[0], true
	default:
		return "(" + strings.Join(parts, op) + ")", true
	}
}
