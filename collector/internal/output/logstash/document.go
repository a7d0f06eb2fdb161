package logstash

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of the encoder.
const (
	maxDepth     = 100  // of nested attributes
	maxFragments = 4096 // resources whose fields are kept encoded
)

// encoder writes records as the JSON documents that Beats send: the names of ECS as
// nested objects, because pipelines say [kubernetes][pod][name], and @metadata. It
// allocates nothing once the record's resource was seen. It is for one goroutine.
type encoder struct {
	metadata  []byte // `"@metadata":{...}`
	fragments map[*record.Resource]shared
	list      []field
	stamp     []byte // what fields of the list point to
	offset    int64
	truncated int64
	second    int64 // that prefix belongs to
	prefix    []byte
}

// field of a document that is being nested. Of two with one name the one with the
// higher rank counts.
type field struct {
	name  string
	text  string // the value, where other is nil
	other any
	rank  int8
}

// null is a field's other value where that is null.
type null struct{}

// shared is what all records of a resource have in common, for the short way
// encoded and for the long way not.
type shared struct {
	members []byte // each with a comma before it
	fields  []field
}

func newEncoder(beat, version string) *encoder {
	m := appendString([]byte(`"@metadata":{"beat":`), beat)
	m = appendString(append(m, `,"type":"_doc","version":`...), version)
	return &encoder{metadata: append(m, '}'), fragments: map[*record.Resource]shared{}}
}

// document appends the record. After an error b holds a part of it.
func (e *encoder) document(b []byte, r *record.Record) ([]byte, error) {
	b = append(b, '{')
	b = append(b, e.metadata...)
	for name := range r.Attributes {
		if meets(name) {
			return e.structured(b, r)
		}
	}
	b = append(b, `,"@timestamp":"`...)
	b = e.timestamp(b, r.Time)
	b = append(b, `","message":`...)
	b = appendString(b, r.Body)
	b = append(b, e.fragment(r.Resource).members...)
	service := r.Service
	if service == "" && r.Resource != nil {
		service = r.Resource.Service
	}
	b = appendMember(b, `,"service":{"name":`, service, "}")
	b = appendMember(b, `,"stream":`, r.Stream, "")
	b = appendMember(b, `,"trace":{"id":`, r.TraceID, "}")
	b = appendMember(b, `,"span":{"id":`, r.SpanID, "}")
	if r.Level != "" || r.Origin.Path != "" || r.TruncatedBytes > 0 {
		b = append(b, `,"log":{`...)
		b = appendMember(b, `"level":`, r.Level, ",")
		if r.Origin.Path != "" {
			b = appendMember(b, `"file":{"path":`, r.Origin.Path, "},")
			b = append(strconv.AppendInt(append(b, `"offset":`...), r.Origin.Offset, 10), ',')
		}
		if r.TruncatedBytes > 0 {
			b = strconv.AppendInt(append(b, `"truncated_bytes":`...), int64(r.TruncatedBytes), 10)
		}
		b = append(trimComma(b), '}')
	}
	if len(r.Attributes) == 0 {
		return append(b, '}'), nil
	}
	e.list = e.list[:0]
	e.attributes(r)
	return e.nest(append(b, ','))
}

// meets reports whether an attribute belongs into, or instead of, one of the members
// that the short way writes.
func meets(name string) bool {
	part, _, _ := strings.Cut(name, ".")
	switch part {
	case "@metadata", "@timestamp", "message", "service", "stream", "trace", "span", "log", "container", "host", "kubernetes", "orchestrator":
		return true
	}
	return false
}

// appendMember appends a text between before and after, unless it is empty.
func appendMember(b []byte, before, value, after string) []byte {
	if value == "" {
		return b
	}
	return append(appendString(append(b, before...), value), after...)
}

// fragment returns what all records of a resource have in common; but for the
// service's name, which a record may know better. When too many are kept, all are
// forgotten: those in use come back at once.
func (e *encoder) fragment(res *record.Resource) shared {
	if f, ok := e.fragments[res]; ok {
		return f
	}
	if len(e.fragments) >= maxFragments {
		clear(e.fragments)
	}
	var f shared
	if res != nil {
		r := record.Record{Resource: res}
		for name, value := range r.Fields() {
			text, ok := value.(string)
			if ok && name != record.Timestamp && name != record.Message && name != record.ServiceName {
				f.fields = append(f.fields, field{name: name, text: text, rank: 1})
			}
		}
		if len(f.fields) > 0 {
			e.list = append(e.list[:0], f.fields...)
			f.members, _ = e.nest([]byte{','}) // all are texts
			f.members = f.members[:len(f.members)-1]
		}
	}
	e.fragments[res] = f
	return f
}

// structured goes the long way, for attributes with the names of other fields.
func (e *encoder) structured(b []byte, r *record.Record) ([]byte, error) {
	resource := e.fragment(r.Resource) // uses the list too
	e.list = e.list[:0]
	e.attributes(r)
	e.list = append(e.list, resource.fields...)
	e.stamp = e.timestamp(e.stamp[:0], r.Time)
	e.list = append(e.list, field{name: record.Timestamp, other: &e.stamp, rank: 2}, field{name: record.Message, text: r.Body, rank: 2})
	if r.Resource != nil {
		e.text(record.ServiceName, r.Resource.Service, -1)
	}
	e.text(record.ServiceName, r.Service, 2)
	e.text(record.LogLevel, r.Level, 2)
	e.text(record.TraceID, r.TraceID, 2)
	e.text(record.SpanID, r.SpanID, 2)
	e.text(record.StreamName, r.Stream, 2)
	if r.Origin.Path != "" {
		e.text(record.FilePath, r.Origin.Path, 2)
		e.offset = r.Origin.Offset
		e.list = append(e.list, field{name: record.FileOffset, other: &e.offset, rank: 2})
	}
	if r.TruncatedBytes > 0 {
		e.truncated = int64(r.TruncatedBytes)
		e.list = append(e.list, field{name: record.TruncatedBytes, other: &e.truncated, rank: 2})
	}
	return e.nest(append(b, ','))
}

func (e *encoder) attributes(r *record.Record) {
	for name, value := range r.Attributes {
		if name == "@metadata" { // ours
			continue
		}
		f := field{name: name}
		switch v := value.(type) {
		case string:
			f.text = v
		case nil:
			f.other = null{}
		default:
			f.other = value
		}
		e.list = append(e.list, f)
	}
}

func (e *encoder) text(name, value string, rank int8) {
	if value != "" {
		e.list = append(e.list, field{name: name, text: value, rank: rank})
	}
}

// nest appends the fields in e.list, whose names have dots, as nested members, and
// closes the object. What has a value and parts becomes an object with the value as
// "value". A name with an empty part stays as it is.
func (e *encoder) nest(b []byte) ([]byte, error) {
	// A name's parts must follow it at once: "a", "a.b", "a-b".
	slices.SortFunc(e.list, func(x, y field) int { return cmp.Or(compare(x.name, y.name), cmp.Compare(y.rank, x.rank)) })
	e.list = slices.CompactFunc(e.list, func(x, y field) bool { return x.name == y.name })
	var err error
	kept := e.list[:0]
	for _, f := range e.list {
		if name := f.name; name == "" || strings.Contains(name, "..") || name[0] == '.' || name[len(name)-1] == '.' {
			if b, err = appendField(b, name, f); err != nil {
				return b, err
			}
			continue
		}
		kept = append(kept, f)
	}
	if b, err = members(b, kept, 0); err != nil {
		return b, err
	}
	clear(e.list[:cap(e.list)]) // keeps nothing of the record
	return append(trimComma(b), '}'), nil
}

// appendField appends a member with a comma behind it.
func appendField(b []byte, name string, f field) ([]byte, error) {
	b = append(appendString(b, name), ':')
	switch v := f.other.(type) {
	case nil:
		b = appendString(b, f.text)
	case null:
		b = append(b, "null"...)
	case *int64:
		b = strconv.AppendInt(b, *v, 10)
	case *[]byte:
		b = append(append(append(b, '"'), *v...), '"')
	default:
		var err error
		if b, err = appendValue(b, v, 0); err != nil {
			return b, fmt.Errorf("attribute %q: %w", shorten(f.name), err)
		}
	}
	return append(b, ','), nil
}

func trimComma(b []byte) []byte {
	if len(b) > 0 && b[len(b)-1] == ',' {
		return b[:len(b)-1]
	}
	return b
}

// compare orders names with the dot before every other character.
func compare(x, y string) int {
	for i := range min(len(x), len(y)) {
		a, b := x[i], y[i]
		if a == b {
			continue
		}
		if a == '.' {
			return -1
		}
		if b == '.' {
			return 1
		}
		return cmp.Compare(a, b)
	}
	return cmp.Compare(len(x), len(y))
}

// members appends the fields, whose names have the first skip bytes in common, each
// with a comma behind it.
func members(b []byte, list []field, skip int) ([]byte, error) {
	var err error
	for i := 0; i < len(list); {
		part, _, nested := strings.Cut(list[i].name[skip:], ".")
		end := skip + len(part)
		j := i + 1
		for j < len(list) && strings.HasPrefix(list[j].name[skip:], part) && len(list[j].name) > end && list[j].name[end] == '.' {
			j++
		}
		if !nested && j == i+1 {
			if b, err = appendField(b, part, list[i]); err != nil {
				return b, err
			}
			i = j
			continue
		}
		b = append(appendString(b, part), ':', '{')
		inner := list[i:j]
		if !nested {
			if b, err = appendField(b, valueName(inner[1:], end+1), inner[0]); err != nil {
				return b, err
			}
			inner = inner[1:]
		}
		if b, err = members(b, inner, end+1); err != nil {
			return b, err
		}
		b = append(trimComma(b), '}', ',')
		i = j
	}
	return b, nil
}

// valueName is "value", with as many underscores as make it free.
func valueName(list []field, skip int) string {
	for name := "value"; ; name += "_" {
		if !slices.ContainsFunc(list, func(f field) bool {
			part, _, _ := strings.Cut(f.name[skip:], ".")
			return part == name
		}) {
			return name
		}
	}
}

func programVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		if v := strings.TrimPrefix(info.Main.Version, "v"); v != "" && v != "(devel)" {
			return v
		}
	}
	return "0.0.0"
}

// timestamp appends the time as record.Fields writes it. Records come in order of
// time, so most share their second with the one before.
func (e *encoder) timestamp(b []byte, t time.Time) []byte {
	if second := t.Unix(); second != e.second || len(e.prefix) == 0 {
		e.prefix = t.UTC().AppendFormat(e.prefix[:0], "2006-01-02T15:04:05")
		e.second = second
	}
	b = append(b, e.prefix...)
	b = append(b, ".000000000Z"...)
	for i, n := len(b)-2, t.Nanosecond(); n > 0; i, n = i-1, n/10 {
		b[i] = byte('0' + n%10)
	}
	return b
}

const hexDigits = "0123456789abcdef"

// plainByte says which bytes need no second look in a JSON string.
var plainByte = func() (t [256]bool) {
	for c := ' '; c < utf8.RuneSelf; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// appendString appends a JSON string. What is not UTF-8 becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if plainByte[c] {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r != utf8.RuneError || size > 1 {
				i += size
				continue
			}
			b = append(b, s[start:i]...)
			b = append(b, "\uFFFD"...)
			i++
			start = i
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		i++
		start = i
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

// appendValue appends a value as encoding/json gives it.
func appendValue(b []byte, v any, depth int) ([]byte, error) {
	if depth > maxDepth {
		return b, fmt.Errorf("is nested more than %d deep", maxDepth)
	}
	var err error
	switch v := v.(type) {
	case nil:
		return append(b, "null"...), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case string:
		return appendString(b, v), nil
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 {
			return strconv.AppendInt(b, int64(v), 10), nil
		}
		text, err := json.Marshal(v) // knows JSON's rules, and that it has no NaN
		if err != nil {
			return b, fmt.Errorf("JSON has no such number: %w", err)
		}
		return append(b, text...), nil
	case int:
		return strconv.AppendInt(b, int64(v), 10), nil
	case int64:
		return strconv.AppendInt(b, v, 10), nil
	case []any:
		b = append(b, '[')
		for _, x := range v {
			if b, err = appendValue(b, x, depth+1); err != nil {
				return b, err
			}
			b = append(b, ',')
		}
		return append(trimComma(b), ']'), nil
	case map[string]any:
		b = append(b, '{')
		for name, x := range v {
			b = append(appendString(b, name), ':')
			if b, err = appendValue(b, x, depth+1); err != nil {
				return b, err
			}
			b = append(b, ',')
		}
		return append(trimComma(b), '}'), nil
	default:
		return b, fmt.Errorf("JSON has nothing for a Go %T", v)
	}
}
