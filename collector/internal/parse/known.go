package parse

import (
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// The fields that become a part of the record itself. Of the names of one kind
// the first that says something counts; the others stay attributes.
const (
	message = iota
	msg
	logLevel
	level
	severity
	lvl
	traceID
	traceID1
	traceID2
	traceID3
	spanID
	spanID1
	spanID2
	spanID3
	serviceName
	atTimestamp
	timeName
	timestamp
	ts
	traceparent
	knownFields
)

var knownNames = [knownFields]string{
	"message", "msg", "log.level", "level", "severity", "lvl", "trace.id", "trace_id", "traceId", "traceID",
	"span.id", "span_id", "spanId", "spanID", "service.name", "@timestamp", "time", "timestamp", "ts", "traceparent",
}

func knownIndex(name string) int {
	switch name {
	case "message":
		return message
	case "msg":
		return msg
	case "log.level":
		return logLevel
	case "level":
		return level
	case "severity":
		return severity
	case "lvl":
		return lvl
	case "trace.id":
		return traceID
	case "trace_id":
		return traceID1
	case "traceId":
		return traceID2
	case "traceID":
		return traceID3
	case "span.id":
		return spanID
	case "span_id":
		return spanID1
	case "spanId":
		return spanID2
	case "spanID":
		return spanID3
	case "service.name":
		return serviceName
	case "@timestamp":
		return atTimestamp
	case "time":
		return timeName
	case "timestamp":
		return timestamp
	case "ts":
		return ts
	case "traceparent":
		return traceparent
	}
	return -1
}

// known holds fields of one line that may be lifted, without boxing them.
type known struct {
	text [knownFields]string // not empty where the field is text
	// number of a level as bunyan and pino write it.
	number [lvl + 1]float64
	set    uint32 // bit i: field i is there, as text or number
}

// takeText keeps a field. It reports false for one that is not known, and for
// empty text, which means nothing.
func (k *known) takeText(name, value string) (taken, twice bool) {
	if len(name) > len("service.name") || value == "" {
		return false, false
	}
	i := knownIndex(name)
	if i < 0 {
		return false, false
	}
	twice = k.set&(1<<i) != 0
	k.text[i] = value
	k.set |= 1 << i
	return true, twice
}

// takeNumber keeps a level that is a number.
func (k *known) takeNumber(name string, value float64) (taken, twice bool) {
	if len(name) > len("log.level") {
		return false, false
	}
	i := knownIndex(name)
	if i < logLevel || i > lvl {
		return false, false
	}
	twice = k.set&(1<<i) != 0
	k.number[i] = value
	k.set |= 1 << i
	return true, twice
}

func (k *known) take(name string, v any) (taken bool) {
	switch v := v.(type) {
	case string:
		taken, _ = k.takeText(name, v)
	case float64:
		taken, _ = k.takeNumber(name, v)
	}
	return taken
}

// has reports whether a field of this name was taken.
func (k *known) has(name string) bool {
	if len(name) > len("service.name") || k.set == 0 {
		return false
	}
	i := knownIndex(name)
	return i >= 0 && k.set&(1<<i) != 0
}

// lift fills r from what is known, and puts the rest back into fields, which it
// returns; it makes them where they are nil.
func (k *known) lift(r *record.Record, fields map[string]any) map[string]any {
	if i := k.first(message, msg); i >= 0 {
		r.Body = k.text[i]
		k.set &^= 1 << i
	}
	for i := logLevel; i <= lvl; i++ {
		if k.set&(1<<i) == 0 {
			continue
		}
		l := levelOf(k.text[i])
		if k.text[i] == "" {
			l = Level(k.number[i])
		}
		if l != "" {
			r.Level = l
			k.set &^= 1 << i
			break
		}
	}
	if i := k.first(traceID, traceID3); i >= 0 && hex(k.text[i], 32) {
		r.TraceID = strings.ToLower(k.text[i])
		k.set &^= 1 << i
	}
	if i := k.first(spanID, spanID3); i >= 0 && hex(k.text[i], 16) {
		r.SpanID = strings.ToLower(k.text[i])
		k.set &^= 1 << i
	}
	if k.set&(1<<serviceName) != 0 {
		r.Service = k.text[serviceName]
		k.set &^= 1 << serviceName
	}
	for i := atTimestamp; i <= ts; i++ {
		if k.set&(1<<i) == 0 {
			continue
		}
		if t, ok := stamp(k.text[i]); ok {
			r.Time = t
			k.set &^= 1 << i
			break
		}
	}
	if k.set&(1<<traceparent) != 0 && r.TraceID == "" {
		r.TraceID = parentTrace(k.text[traceparent])
	}
	if k.set == 0 {
		return fields
	}
	if fields == nil {
		fields = make(map[string]any, 4)
	}
	for i, name := range knownNames {
		switch {
		case k.set&(1<<i) == 0:
		case k.text[i] != "":
			fields[name] = k.text[i]
		default:
			fields[name] = k.number[i]
		}
	}
	return fields
}

// first returns the first of the fields from i to j that is there, or -1.
func (k *known) first(i, j int) int {
	for ; i <= j; i++ {
		if k.set&(1<<i) != 0 {
			return i
		}
	}
	return -1
}

// parentTrace reads the trace id of a traceparent (W3C Trace Context, section
// 3.2): version-trace-parent-flags. The parent is another's span, not the
// line's.
func parentTrace(s string) string {
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || s[:2] == "ff" || !hex(s[3:35], 32) || !hex(s[36:52], 16) {
		return ""
	}
	return strings.ToLower(s[3:35])
}

// stamp reads RFC 3339, and what is as plain about its zone: an offset without
// its colon, a space for the T, and the date of HTTP servers' logs. Years that
// do not fit nanoseconds in 64 bits are no time.
func stamp(s string) (time.Time, bool) {
	if len(s) < len("2006-01-02T15:04:05Z") || len(s) > 40 {
		return time.Time{}, false
	}
	layout := time.RFC3339Nano
	switch {
	case s[2] == '/':
		layout = "02/Jan/2006:15:04:05 -0700"
	case s[10] == ' ':
		layout = "2006-01-02 15:04:05Z07:00"
		if n := len(s); n > 25 && s[n-6] == ' ' {
			layout = "2006-01-02 15:04:05 -0700"
		}
	case s[len(s)-5] == '+' || s[len(s)-5] == '-':
		layout = "2006-01-02T15:04:05-0700"
	}
	t, err := time.Parse(layout, s)
	if err != nil || t.Year() < 1970 || t.Year() > 2261 {
		return time.Time{}, false
	}
	return t.UTC(), true
}
