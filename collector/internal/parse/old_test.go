package parse_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// The way through encoding/json and maps, which the way in one pass must agree
// with.

func old(r *record.Record) (parse.Outcome, bool) {
	if !utf8.ValidString(r.Body) {
		r.Body = strings.ToValidUTF8(r.Body, "\uFFFD")
	}
	if body := strings.TrimSpace(r.Body); len(body) > 2 && body[0] == '{' && body[len(body)-1] == '}' {
		if object, ok := oldDecode(body); ok {
			return oldStructured(r, object), true
		}
	}
	return parse.Outcome{}, false
}

// oldDecode reads a JSON object. Numbers become float64, but for those that a
// float64 would change (an id of 17 digits, nanoseconds since 1970): they keep
// their digits, as text.
func oldDecode(body string) (object map[string]any, ok bool) {
	if !oldLongNumber(body) {
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
	oldExact(object)
	return object, true
}

// oldLongNumber reports whether there may be a number in s that a float64 does not
// hold: more than 15 digits in a row, or an exponent of three.
func oldLongNumber(s string) bool {
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

// oldExact replaces the numbers within v, which is a map or a list, in place.
func oldExact(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = oldExact(x)
		}
	case []any:
		for i, x := range v {
			v[i] = oldExact(x)
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

func oldStructured(r *record.Record, object map[string]any) parse.Outcome {
	out := parse.Outcome{Structured: true}
	line := r.Body
	f := oldFlattener{fields: make(map[string]any, len(object))}
	f.object("", object, 1)
	fields := f.fields
	out.Left = f.left

	if name, s, ok := oldFirst(fields, "message", "msg"); ok {
		r.Body = s
		delete(fields, name)
	}
	for _, name := range [...]string{"log.level", "level", "severity", "lvl"} {
		if level := parse.Level(fields[name]); level != "" {
			r.Level = level
			delete(fields, name)
			break
		}
	}
	if name, s, ok := oldFirst(fields, "trace.id", "trace_id", "traceId", "traceID"); ok && oldHex(s, 32) {
		r.TraceID = strings.ToLower(s)
		delete(fields, name)
	}
	if name, s, ok := oldFirst(fields, "span.id", "span_id", "spanId", "spanID"); ok && oldHex(s, 16) {
		r.SpanID = strings.ToLower(s)
		delete(fields, name)
	}
	if name, s, ok := oldFirst(fields, "service.name"); ok {
		r.Service = s
		delete(fields, name)
	}
	for _, name := range [...]string{"@timestamp", "time", "timestamp", "ts"} {
		if t, ok := oldStamp(fields[name]); ok {
			r.Time = t
			delete(fields, name)
			break
		}
	}
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

type oldFlattener struct {
	fields map[string]any
	left   int
}

// object visits names in order, so that the same line gives the same record
// whichever of two equal names comes first in the map.
func (f *oldFlattener) object(prefix string, o map[string]any, depth int) {
	for _, k := range slices.Sorted(maps.Keys(o)) {
		name := k
		if prefix != "" {
			name = prefix + "." + k
		}
		v := o[k]
		if sub, ok := v.(map[string]any); ok && len(sub) > 0 && depth < parse.MaxDepth {
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

// oldFirst returns the first of the names whose value is a string with text in it.
func oldFirst(fields map[string]any, names ...string) (name, value string, ok bool) {
	for _, name := range names {
		if s, ok := fields[name].(string); ok && s != "" {
			return name, s, true
		}
	}
	return "", "", false
}

// oldStamp reads RFC 3339. Years that do not fit nanoseconds in 64 bits are no time.
func oldStamp(v any) (time.Time, bool) {
	s, ok := v.(string)
	if !ok || len(s) < len("2006-01-02T15:04:05Z") || len(s) > 40 {
		return time.Time{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 1970 || t.Year() > 2261 {
		return time.Time{}, false
	}
	return t.UTC(), true
}

// oldHex reports whether s has n hexadecimal digits that are not all zero (W3C
// Trace Context, section 3.2.2: an id of zeros is no id).
func oldHex(s string, n int) bool {
	if len(s) != n || strings.Trim(s, "0") == "" {
		return false
	}
	return !bytes.ContainsFunc([]byte(s), func(c rune) bool {
		return (c < '0' || c > '9') && (c < 'a' || c > 'f') && (c < 'A' || c > 'F')
	})
}

func FuzzAgreesWithOldWay(f *testing.F) {
	for _, line := range agreeing {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		if strings.Contains(line, "traceparent") {
			return // is lifted since
		}
		at := time.Unix(0, 0)
		want, got := record.Record{Time: at, Body: line}, record.Record{Time: at, Body: line}
		wanted, ok := old(&want)
		out := parse.Record(&got)
		if out.Structured != ok {
			t.Fatalf("Record(%q): structured %v; want %v", line, out.Structured, ok)
		}
		if !ok {
			return
		}
		if !got.Time.Equal(want.Time) && want.Time.Equal(at) {
			return // a time that the old way did not read
		}
		// Not go-cmp, which takes for ever on deeply nested lists.
		if !reflect.DeepEqual(want, got) || out != wanted {
			t.Fatalf("Record(%q): %+v, want %+v\ngot  %+v\nwant %+v", line, out, wanted, got, want)
		}
	})
}

var agreeing = []string{
	`{"message":"m","a":{"b":[1,{"c":null}],"d":{}},"e":[],"f":true,"g":false,"h":null}`,
	`{"msg":"","message":"x","level":30,"lvl":"warn","log":{"level":"loud"},"log.level":5}`,
	`{"a":1,"a":{"b":2}}`, `{"a.b":1,"a":{"b":2}}`, `{"a":{"b":1},"a":{"c":2}}`, `{"a":{"b":1},"a":2}`, `{"a":{"b":1},"a":{}}`, `{"level":"info","level":{"a":1}}`, `{"level":{"a":1},"level":"info"}`, `{"a.b":{"c":1},"a":{"b":{"d":2}}}`, `{"level":"info","level":"warn"}`, `{"msg":1,"msg":"x"}`, `{"":{"a":1},"a":2}`, `{"":1}`,
	`{"n":[0,-0,1e5,1.5E-3,123456789012345,1234567890123456,12345678901234567,1e400,-1e400,0.1,1763931600.1234567]}`,
	`{"n":01}`, `{"n":1.}`, `{"n":.5}`, `{"n":-}`, `{"n":1e}`, `{"n":+1}`, `{"n":1 2}`, `{"a":1,}`, `{,}`, `{"a"}`, `{"a":}`, `{"a":tru}`, `{"a":"\x"}`, `{"a":[1,]}`,
	`{"s":"\u0041\ud83d\ude00\ud83dx\ude00 \/\b\f\n\r\t\"\\","\u006d\u0073g":"m"}`, `{"s":"\ud83d\u12"}`, `{"s":"\u12G4"}`, "{\"s\":\"a\tb\"}",
	` {"a" : 1 , "b" : [ 1 , 2 ] , "c" : { "d" : { } } } `, `{"a":1}}`, `{"a":{"b":1}`, "{\"a\":\"\xff\"}", "\u00a0{\"a\":1}\u2003",
	`{"trace_id":"4bf92f3577b34da6a3ce929d0e0e4736","span.id":"00f067aa0ba902b7","traceID":"x","time":"2026-11-23T04:00:00.5+01:00","ts":"2026-11-23T04:00:00Z"}`,
	`{"trace":{"id":""},"trace_id":"zz","@timestamp":"yesterday","service":{"name":"pay"},"service.name":1}`,
	`{"a":` + strings.Repeat(`{"a":`, 20) + `1` + strings.Repeat(`}`, 21),
	`{"a":` + strings.Repeat(`[`, 100) + strings.Repeat(`]`, 100) + `}`,
	`{"` + strings.Repeat("n", 300) + `":1}`,
	manyFields(250), manyFields(256), manyFields(257), manyFields(300),
	access,
}

func manyFields(n int) string {
	var b strings.Builder
	b.WriteString(`{"level":"loud","msg":"m"`)
	for i := range n {
		b.WriteString(`,"f` + strconv.Itoa(i) + `":` + strconv.Itoa(i))
	}
	return b.String() + "}"
}

const access = `{"@timestamp":"2026-11-23T03:00:01.123456Z","log.level":"info","message":"GET /pay -> 200 1.2ms","service.name":"web","service.node.name":"web-1","kubernetes.namespace":"shop","event.dataset":"outrigger.access","outrigger.direction":"outbound","network.protocol":"http1","http.request.method":"GET","url.path":"/pay","url.domain":"payments.shop","user_agent.original":"curl/8.5.0","http.request.id":"a9a8f5d2","http.response.status_code":200,"outrigger.response_flags":"-","event.duration":1200000,"http.request.body.bytes":0,"http.response.body.bytes":512,"outrigger.destination":"payments.shop.svc.cluster.local","outrigger.route":"default","destination.address":"10.0.0.7:8080","source.address":"10.0.0.3:51234","outrigger.security":"mutual_tls","outrigger.attempts":1,"trace.id":"4bf92f3577b34da6a3ce929d0e0e4736","span.id":"00f067aa0ba902b7"}`

func BenchmarkAccess(b *testing.B) {
	f := func(name string, fn func(r *record.Record)) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(access)))
			b.ReportAllocs()
			for b.Loop() {
				r := record.Record{Body: access}
				fn(&r)
			}
		})
	}
	f("one_pass", func(r *record.Record) { parse.Record(r) })
	f("maps", func(r *record.Record) { old(r) })
}

var plainLines = map[string]string{
	"access": `10.0.0.1 - - [25/Nov/2026:12:00:00 +0000] "GET /index.html?id=1234 HTTP/1.1" 200 612 "https://shop.example.com/cart" "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/1"`,
	"spring": `2026-11-25T12:00:00.001Z  INFO 1 --- [nio-8080-exec-1] c.e.shop.Cart                            : checkout of order 12345678 done in 32 ms, 12 items, total 1234.56 EUR, customer 987654321 region eu`,
	"prose":  `Checkout of order 12345678 done in 32 ms, 12 items, total 1234.56 EUR, customer 987654321 in region eu-west-1, paid by card, shipped by carrier, expected on the day after tomorrow, thank you and so on.`,
	"logfmt": `ts=2026-11-25T12:00:00.001Z caller=main.go:42 level=info msg="checkout done" order=12345678 items=12 total=1234.56 currency=EUR customer=987654321 region=eu-west-1 trace_id=4bf92f3577b34da6a3ce929d0e0e47`,
}

func TestTextAllocatesNothing(t *testing.T) {
	for name, line := range plainLines {
		r := record.Record{Body: line}
		if n := testing.AllocsPerRun(100, func() { parse.Record(&r) }); n != 0 {
			t.Errorf("%s: Record allocates %v times; want 0", name, n)
		}
	}
}

func BenchmarkText(b *testing.B) {
	for name, line := range plainLines {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(line)))
			b.ReportAllocs()
			r := record.Record{Body: line}
			for b.Loop() {
				parse.Record(&r)
			}
		})
	}
}
