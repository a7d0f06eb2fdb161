package parse_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const trace = "4bf92f3577b34da6a3ce929d0e0e4736"

func TestRecord(t *testing.T) {
	runtime := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	f := func(line string, want record.Record, left int) {
		t.Helper()
		got := record.Record{Time: runtime, Body: line}
		if want.Time.IsZero() {
			want.Time = runtime
		}
		out := parse.Record(&got)
		if d := cmp.Diff(want, got); d != "" || out.Left != left {
			t.Errorf("Record(%.80q): %d fields left, want %d; (-want +got):\n%s", line, out.Left, left, d)
		}
	}
	type attrs = map[string]any
	f(`{"@timestamp":"2026-11-23T04:00:00.5+01:00","message":"card declined","log":{"level":"WARN"},"trace":{"id":"`+strings.ToUpper(trace)+`"},"span.id":"00f067aa0ba902b7","service":{"name":"payments","version":"2"},"http":{"response":{"status_code":402}},"tags":["a"],"empty":{}}`,
		record.Record{
			Time: runtime.Add(time.Second / 2), Body: "card declined", Level: "warn", TraceID: trace, SpanID: "00f067aa0ba902b7",
			Service:    "payments",
			Attributes: attrs{"service.version": "2", "http.response.status_code": 402.0, "tags": []any{"a"}, "empty": attrs{}},
		}, 0)
	f(`{"time":"2026-11-23T02:00:00Z","level":30,"msg":"pino","traceId":"`+trace+`"}`, record.Record{Time: runtime.Add(-time.Hour), Body: "pino", Level: "info", TraceID: trace}, 0)
	// A field that does not mean what its name promises stays where it is.
	f(`{"time":1700000000,"level":"loud","message":{"a":1},"trace_id":"xyz"}`,
		record.Record{
			Body:       `{"time":1700000000,"level":"loud","message":{"a":1},"trace_id":"xyz"}`,
			Attributes: attrs{"time": 1700000000.0, "level": "loud", "message.a": 1.0, "trace_id": "xyz"},
		}, 0)
	// A number that a float64 would change keeps its digits, as text.
	f(`{"msg":"m","id":12345678901234567,"ts":1763931600123456789,"ids":[1,9007199254740993],"o":{"id":-9007199254740993},"pi":3.141592653589793238,"whole":1000000000000000000000,"big":1e400,"ok":0.1}`,
		record.Record{Body: "m", Attributes: attrs{
			"id": "12345678901234567", "ts": "1763931600123456789", "ids": []any{1.0, "9007199254740993"}, "o.id": "-9007199254740993",
			"pi": 3.141592653589793, "whole": 1e21, "big": "1e400", "ok": 0.1,
		}}, 0)
	// Two fields of one name: the body keeps the line.
	f(`{"msg":"m","a.b":1,"a":{"b":2}}`, record.Record{Body: `{"msg":"m","a.b":1,"a":{"b":2}}`, Attributes: attrs{"a.b": 2.0}}, 1)
	f(`{"msg":"m","`+strings.Repeat("n", record.MaxName+1)+`":1}`, record.Record{Body: `{"msg":"m","` + strings.Repeat("n", record.MaxName+1) + `":1}`}, 1)
	f(`{"a":1} trailing`, record.Record{Body: `{"a":1} trailing`}, 0)
	f(`{broken}`, record.Record{Body: `{broken}`}, 0)
	f(`ts=2026-11-23T03:00:00Z level=error trace_id=`+trace+` msg="disk full"`, record.Record{Body: `ts=2026-11-23T03:00:00Z level=error trace_id=` + trace + ` msg="disk full"`, Level: "error", TraceID: trace}, 0)
	f("[warning] low on memory", record.Record{Body: "[warning] low on memory", Level: "warn"}, 0)
	f("ERROR: no such host", record.Record{Body: "ERROR: no such host", Level: "error"}, 0)
	f("error handling is fun", record.Record{Body: "error handling is fun"}, 0)
	f("trace_id="+strings.Repeat("0", 32), record.Record{Body: "trace_id=" + strings.Repeat("0", 32)}, 0)
	f("caf\xe9", record.Record{Body: "caf\uFFFD"}, 0)
	f("", record.Record{}, 0)
}

func TestTooManyFieldsKeepTheLine(t *testing.T) {
	o := map[string]any{"message": "m"}
	for i := range record.MaxAttributes + 10 {
		o[fmt.Sprintf("f%03d", i)] = i
	}
	line, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	r := record.Record{Body: string(line)}
	out := parse.Record(&r)
	if out.Left != 10 || len(r.Attributes) != record.MaxAttributes || r.Body != string(line) {
		t.Errorf("left %d, %d attributes, body %.20q; want 10, %d and the line", out.Left, len(r.Attributes), r.Body, record.MaxAttributes)
	}
}

// Whatever the line: no panic, the limits hold, and the result can be sent.
func FuzzRecord(f *testing.F) {
	f.Add(`{"message":"m","a":{"b":[1,{"c":null}]}}`)
	f.Add("level=warn \xff")
	f.Fuzz(func(t *testing.T, line string) {
		r := record.Record{Body: line}
		parse.Record(&r)
		if len(r.Attributes) > record.MaxAttributes || !utf8.ValidString(r.Body) {
			t.Fatalf("%d attributes, body %q", len(r.Attributes), r.Body)
		}
		if _, err := json.Marshal(r.Fields()); err != nil {
			t.Fatal(err)
		}
	})
}
