// Package parse finds out what a log line says: a JSON object becomes the
// fields of a record under their Elastic Common Schema names, anything else
// stays text with the level it plainly states.
//
// It knows field names. It does not know where a line comes from or goes to,
// and it never refuses one: what cannot be understood stays in the body.
package parse

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// MaxDepth of nested objects that are flattened into dotted names. What lies
// deeper stays an object.
const MaxDepth = 16

// Outcome says how a line was understood.
type Outcome struct {
	Structured bool
	// Failed says that the line is not what its parser was made for. It stays
	// whole in the body.
	Failed bool
	// Left is the number of fields that were not lifted into attributes, because
	// there were more than record.MaxAttributes, the name was longer than
	// record.MaxName, or two fields had one name. The body is then the whole
	// line, so that nothing is lost.
	Left int
}

// Record fills r from its Body: Body, Level, TraceID, SpanID, Time, Attributes
// and Service. Bytes that are not UTF-8 become U+FFFD, since no
// backend takes them.
func Record(r *record.Record) Outcome {
	if !utf8.ValidString(r.Body) {
		r.Body = strings.ToValidUTF8(r.Body, "\uFFFD")
	}
	if body := strings.TrimSpace(r.Body); len(body) > 2 && body[0] == '{' && body[len(body)-1] == '}' {
		if quick(r, body) {
			return Outcome{Structured: true}
		}
		if object, ok := decode(body); ok {
			return structured(r, object)
		}
	}
	text(r)
	return Outcome{}
}

// decode reads a JSON object. Numbers become float64, but for those that a
// float64 would change (an id of 17 digits, nanoseconds since 1970): they keep
// their digits, as text.
func decode(body string) (object map[string]any, ok bool) {
	if !longNumber(body) {
		return object, json.Unmarshal([]byte(body), &object) == nil
	}
	d := json.NewDecoder(strings.NewReader(body))
	d.UseNumber()
	if d.Decode(&object) != nil {
		return nil, false
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, false
	}
	exact(object)
	return object, true
}

// longNumber reports whether there may be a number in s that a float64 does not
// hold: more than 15 digits in a row, or an exponent of three.
func longNumber(s string) bool {
	run := 0
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			if run++; run > 15 {
				return true
			}
		case (c == 'e' || c == 'E') && run > 0:
			run = 13
		case (c == '+' || c == '-') && run == 13:
		default:
			run = 0
		}
	}
	return false
}

// exact replaces the numbers within v, which is a map or a list, in place.
func exact(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = exact(x)
		}
	case []any:
		for i, x := range v {
			v[i] = exact(x)
		}
	case json.Number:
		n, err := v.Float64()
		if err != nil || !strings.ContainsAny(string(v), ".eE") && strconv.FormatFloat(n, 'f', -1, 64) != string(v) {
			return string(v)
		}
		return n
	}
	return v
}

// structured is the whole of what is done with an object. It is slow, and right
// for every object; quick is for those of which nothing is left.
func structured(r *record.Record, object map[string]any) Outcome {
	out := Outcome{Structured: true}
	line := r.Body
	f := flattener{fields: make(map[string]any, len(object))}
	f.object("", object, 1)
	out.Left = f.left

	var known known
	for name, v := range f.fields {
		if known.take(name, v) {
			delete(f.fields, name)
		}
	}
	fields := known.lift(r, f.fields)
	if over := len(fields) - record.MaxAttributes; over > 0 {
		for _, name := range slices.Sorted(maps.Keys(fields))[record.MaxAttributes:] {
			delete(fields, name)
		}
		out.Left += over
	}
	if out.Left > 0 {
		r.Body = line
	}
	if len(fields) > 0 {
		r.Attributes = fields
	}
	return out
}

type flattener struct {
	fields map[string]any
	left   int
}

// object visits names in order, so that the same line gives the same record
// whichever of two equal names comes first in the map.
func (f *flattener) object(prefix string, o map[string]any, depth int) {
	for _, k := range slices.Sorted(maps.Keys(o)) {
		name := k
		if prefix != "" {
			name = prefix + "." + k
		}
		v := o[k]
		if sub, ok := v.(map[string]any); ok && len(sub) > 0 && depth < MaxDepth {
			if len(name) > record.MaxName {
				f.left++
				continue
			}
			f.object(name, sub, depth+1)
			continue
		}
		if _, twice := f.fields[name]; twice || len(name) > record.MaxName || name == "" {
			f.left++
			continue
		}
		f.fields[name] = v
	}
}

// Level returns the ECS level that a field means, or "". Numbers are those of
// bunyan and pino (10 trace to 60 fatal).
func Level(v any) string {
	switch v := v.(type) {
	case string:
		return levelOf(v)
	case float64:
		switch v {
		case 10:
			return "trace"
		case 20:
			return "debug"
		case 30:
			return "info"
		case 40:
			return "warn"
		case 50:
			return "error"
		case 60:
			return "fatal"
		}
	}
	return ""
}

// hex reports whether s has n hexadecimal digits that are not all zero (W3C
// Trace Context, section 3.2.2: an id of zeros is no id).
func hex(s string, n int) bool {
	if len(s) != n || strings.Trim(s, "0") == "" {
		return false
	}
	for i := range n {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F') {
			return false
		}
	}
	return true
}

// levelOf is Level of a word, in any case.
func levelOf(s string) string {
	if len(s) < 3 || len(s) > 12 {
		return ""
	}
	var lower [12]byte
	for i := range len(s) {
		c := s[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		lower[i] = c
	}
	switch string(lower[:len(s)]) {
	case "trace":
		return "trace"
	case "debug":
		return "debug"
	case "info", "information", "notice":
		return "info"
	case "warn", "warning":
		return "warn"
	case "error", "err":
		return "error"
	case "fatal", "critical", "crit", "panic", "dpanic", "alert", "emerg", "emergency":
		return "fatal"
	}
	return ""
}
