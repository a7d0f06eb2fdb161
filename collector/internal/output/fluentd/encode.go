package fluentd

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/deflate"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of the encoder.
const (
	maxDepth     = 100  // of nested attributes; fluentd's decoder has a limit too
	maxFragments = 4096 // resources whose fields are kept encoded
)

// encoder writes records as msgpack entries: [EventTime, map]. It allocates nothing
// for a record without attributes, once the record's resource was seen. It is for
// one goroutine.
type encoder struct {
	fragments map[*record.Resource]*fragment
	second    int64 // that prefix belongs to
	prefix    []byte
	last      span // of the last entry
}

// span is where an entry has the fields of its resource, which others have, too.
type span struct {
	at       int // index of what was encoded
	fragment *fragment
}

// fragment is what all records of a resource have in common: its fields, encoded,
// but for the service's name, which a record may know better.
type fragment struct {
	data    []byte
	mark    deflate.Mark // of data
	count   int
	names   map[string]struct{} // of the fields
	service string
}

func newEncoder() *encoder {
	return &encoder{fragments: map[*record.Resource]*fragment{}, second: math.MinInt64}
}

// entry appends the record. After an error b holds a part of it.
func (e *encoder) entry(b []byte, r *record.Record) ([]byte, error) {
	t := r.Time
	if t.IsZero() {
		t = r.Observed
	}
	second := t.Unix()
	// EventTime has unsigned seconds of 32 bits.
	seconds := uint32(min(max(second, 0), math.MaxUint32))
	b = append(b, 0x92, 0xd7, 0x00)
	b = binary.BigEndian.AppendUint32(b, seconds)
	b = binary.BigEndian.AppendUint32(b, uint32(t.Nanosecond()))

	f := e.fragment(r.Resource)
	head := len(b)
	b = append(b, 0xdf, 0, 0, 0, 0) // map 32, counted below
	count := f.count
	e.last = span{len(b), f}
	b = append(b, f.data...)
	var err error
	for name, value := range r.Attributes {
		if f.owns(name) || r.Owns(name) {
			continue
		}
		b = appendString(b, name)
		if b, err = appendValue(b, value, 0); err != nil {
			return b, fmt.Errorf("attribute %q: %w", shorten(name), err)
		}
		count++
	}
	b = appendString(b, record.Timestamp)
	b = e.timestamp(b, r.Time)
	b = appendString(b, record.Message)
	b = appendString(b, r.Body)
	count += 2
	field := func(name, value string) {
		if value != "" {
			b = appendString(b, name)
			b = appendString(b, value)
			count++
		}
	}
	field(record.LogLevel, r.Level)
	field(record.TraceID, r.TraceID)
	field(record.SpanID, r.SpanID)
	field(record.StreamName, r.Stream)
	switch _, said := r.Attributes[record.ServiceName]; {
	case r.Service != "":
		field(record.ServiceName, r.Service)
	case !said:
		field(record.ServiceName, f.service)
	}
	if r.Origin.Path != "" {
		field(record.FilePath, r.Origin.Path)
		b = appendString(b, record.FileOffset)
		b = appendInt(b, r.Origin.Offset)
		count++
	}
	if r.TruncatedBytes > 0 {
		b = appendString(b, record.TruncatedBytes)
		b = appendInt(b, int64(r.TruncatedBytes))
		count++
	}
	binary.BigEndian.PutUint32(b[head+1:], uint32(count))
	return b, nil
}

func (f *fragment) owns(name string) bool {
	_, ok := f.names[name]
	return ok
}

// fragment returns the encoded fields of a resource. When too many are kept, all
// are forgotten: those in use come back at once.
func (e *encoder) fragment(res *record.Resource) *fragment {
	if f, ok := e.fragments[res]; ok {
		return f
	}
	if len(e.fragments) >= maxFragments {
		clear(e.fragments)
	}
	f := &fragment{names: map[string]struct{}{}}
	if res != nil {
		f.service = res.Service
		r := record.Record{Resource: res}
		fields := r.Fields()
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			text, ok := fields[name].(string)
			if !ok || name == record.Timestamp || name == record.Message || name == record.ServiceName {
				continue
			}
			f.data = appendString(f.data, name)
			f.data = appendString(f.data, text)
			f.names[name] = struct{}{}
			f.count++
		}
	}
	e.fragments[res] = f
	return f
}

// timestamp appends the time as record.Fields writes it. Records come in order of
// time, so most share their second with the one before.
func (e *encoder) timestamp(b []byte, t time.Time) []byte {
	if second := t.Unix(); second != e.second || len(e.prefix) == 0 {
		e.prefix = t.UTC().AppendFormat(e.prefix[:0], "2006-01-02T15:04:05")
		e.second = second
	}
	b = appendStringHead(b, len(e.prefix)+len(".000000000Z"))
	b = append(b, e.prefix...)
	b = append(b, ".000000000Z"...)
	for i, n := len(b)-2, t.Nanosecond(); n > 0; i, n = i-1, n/10 {
		b[i] = byte('0' + n%10)
	}
	return b
}

func appendStringHead(b []byte, n int) []byte {
	switch {
	case n < 32:
		return append(b, 0xa0|byte(n))
	case n <= math.MaxUint8:
		return append(b, 0xd9, byte(n))
	case n <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, 0xda), uint16(n))
	default:
		return binary.BigEndian.AppendUint32(append(b, 0xdb), uint32(n))
	}
}

// appendString appends a str; what is not UTF-8 in it stays as the line had it.
func appendString(b []byte, s string) []byte {
	return append(appendStringHead(b, len(s)), s...)
}

func appendInt(b []byte, n int64) []byte {
	switch {
	case n >= 0 && n < 128:
		return append(b, byte(n))
	case n >= -32 && n < 0:
		return append(b, byte(n))
	case n >= 0 && n <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, 0xce), uint32(n))
	default:
		return binary.BigEndian.AppendUint64(append(b, 0xd3), uint64(n))
	}
}

// appendValue appends a value as encoding/json gives it. A number without a
// fraction becomes an integer, as it was written in the line.
func appendValue(b []byte, v any, depth int) ([]byte, error) {
	if depth > maxDepth {
		return b, fmt.Errorf("is nested more than %d deep", maxDepth)
	}
	var err error
	switch v := v.(type) {
	case nil:
		return append(b, 0xc0), nil
	case bool:
		if v {
			return append(b, 0xc3), nil
		}
		return append(b, 0xc2), nil
	case string:
		return appendString(b, v), nil
	case float64:
		if v == math.Trunc(v) && math.Abs(v) < 1<<53 && !(v == 0 && math.Signbit(v)) {
			return appendInt(b, int64(v)), nil
		}
		return binary.BigEndian.AppendUint64(append(b, 0xcb), math.Float64bits(v)), nil
	case int:
		return appendInt(b, int64(v)), nil
	case int64:
		return appendInt(b, v), nil
	case []any:
		b = binary.BigEndian.AppendUint32(append(b, 0xdd), uint32(len(v)))
		for _, x := range v {
			if b, err = appendValue(b, x, depth+1); err != nil {
				return b, err
			}
		}
		return b, nil
	case map[string]any:
		b = binary.BigEndian.AppendUint32(append(b, 0xdf), uint32(len(v)))
		for name, x := range v {
			b = appendString(b, name)
			if b, err = appendValue(b, x, depth+1); err != nil {
				return b, err
			}
		}
		return b, nil
	default:
		return b, fmt.Errorf("msgpack has nothing for a Go %T", v)
	}
}

// appendHead appends what comes before the entries of a chunk: the array, the tag
// and the length of the entries.
func appendHead(b []byte, tag string, entries int) []byte {
	b = append(b, 0x93)
	b = appendString(b, tag)
	switch {
	case entries <= math.MaxUint8:
		return append(b, 0xc4, byte(entries))
	case entries <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, 0xc5), uint16(entries))
	default:
		return binary.BigEndian.AppendUint32(append(b, 0xc6), uint32(entries))
	}
}

// appendOption appends what comes after the entries.
func appendOption(b []byte, id string, size int, compression string) []byte {
	n := byte(2)
	if compression != "none" {
		n = 3
	}
	b = append(b, 0x80|n)
	b = appendString(b, "size")
	b = appendInt(b, int64(size))
	b = appendString(b, "chunk")
	b = appendString(b, id)
	if compression != "none" {
		b = appendString(b, "compressed")
		b = appendString(b, compression)
	}
	return b
}

// overhead is more than head and option take beside the entries.
func overhead(tag string) int { return len(tag) + 128 }
