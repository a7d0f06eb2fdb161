package logstash

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func decode(t *testing.T, data []byte) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatalf("%s: %v", data, err)
	}
	return out
}

func TestNesting(t *testing.T) {
	e := newEncoder("b", "v")
	f := func(fields map[string]any, want string) {
		t.Helper()
		e.list = e.list[:0]
		for name, v := range fields {
			f := field{name: name, other: v}
			if v == nil {
				f.other = null{}
			}
			e.list = append(e.list, f)
		}
		got, err := e.nest([]byte("{"))
		if err != nil || string(got) != want {
			t.Errorf("%v = %s, %v; want %s", fields, got, err, want)
		}
	}
	f(map[string]any{}, `{}`)
	f(map[string]any{"a": 1.0, "b.c": "x", "b.d.e": nil, "b.d.f": true}, `{"a":1,"b":{"c":"x","d":{"e":null,"f":true}}}`)
	f(map[string]any{"a": "x", "a.b": "y", "a-b": "z"}, `{"a":{"value":"x","b":"y"},"a-b":"z"}`)
	f(map[string]any{"a": "x", "a.value": "y", "a.value_.z": "z"}, `{"a":{"value__":"x","value":"y","value_":{"z":"z"}}}`)
	f(map[string]any{"a.b": 1.0, "a.b.c": 2.0, "a.bc": 3.0}, `{"a":{"b":{"value":1,"c":2},"bc":3}}`)
	f(map[string]any{"": 1.0, ".": 2.0, "a.": 3.0, "a..b": 4.0, "a.b": 5.0, ".a": 6.0}, `{"":1,".":2,".a":6,"a.":3,"a..b":4,"a":{"b":5}}`)
	f(map[string]any{"a": []any{}, "b": []any{1.5, "x\n\"\\\x00\xff"}, "c": map[string]any{"d.e": 1e300}}, `{"a":[],"b":[1.5,"x\n\"\\\u0000�"],"c":{"d.e":1e+300}}`)
}

// The short way says the same as the long one.
func TestShortWay(t *testing.T) {
	e := newEncoder("b", "v")
	full := &record.Resource{Namespace: "bank", Service: "x", Pod: "p", PodUID: "u", Cluster: "c", Node: "n", Container: "a", Labels: map[string]string{"app.kubernetes.io/name": "y"}, WorkloadKind: "Deployment", Workload: "x", PodIP: "10.0.0.1", ContainerID: "abc", Image: "i"}
	at := time.Date(2026, 11, 23, 3, 0, 0, 50, time.UTC)
	for _, r := range []record.Record{
		{Time: at, Body: "x\ty", Resource: full},
		{Time: at, Resource: full, Service: "said", Level: "warn", TraceID: "t", SpanID: "s", Stream: "stdout", TruncatedBytes: 7, Origin: record.Origin{Path: "/p", Offset: 3}},
		{Time: at.Add(time.Second), Resource: &record.Resource{}, Level: "info"},
		{Resource: full, TruncatedBytes: 1},
		{Time: at},
		{Time: at, Resource: full, Level: "info", Attributes: map[string]any{"http.x": 1.0, "http.y.z": nil, "a": "b", "logs": true, "": ".", "a.": 1.5}},
	} {
		short, err := e.document(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		long, err := e.structured([]byte("{"+string(e.metadata)), &r)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(decode(t, long), decode(t, short)); diff != "" {
			t.Error(diff)
		}
	}
}

// An attribute with the name of another field gives way to it where record.Fields
// says so.
func TestPrecedence(t *testing.T) {
	e := newEncoder("b", "v")
	names := []string{"@timestamp", "@metadata", "message", "log.level", "trace.id", "span.id", "stream", "service.name", "kubernetes.pod.name", "log.file.path", "log.offset", "log.truncated_bytes", "x", "container.id"}
	for _, r := range []record.Record{
		{Resource: &record.Resource{Service: "payments", Pod: "p"}},
		{Resource: &record.Resource{Service: "payments", ContainerID: "c"}, Service: "said", Level: "warn", TraceID: "t", SpanID: "s", Stream: "stdout", TruncatedBytes: 7, Origin: record.Origin{Path: "/p", Offset: 3}},
		{},
	} {
		r.Attributes = map[string]any{}
		for _, name := range names {
			r.Attributes[name] = "attribute"
		}
		got, err := e.document(nil, &r)
		if err != nil {
			t.Fatal(err)
		}
		doc := decode(t, got)
		for name, value := range r.Fields() {
			at := any(doc)
			for part := range strings.SplitSeq(name, ".") {
				m, ok := at.(map[string]any)
				if !ok {
					t.Fatalf("%s: %s", name, got)
				}
				at = m[part]
			}
			if name != "@metadata" && fmt.Sprint(at) != fmt.Sprint(value) {
				t.Errorf("%s = %v; want %v", name, at, value)
			}
		}
	}
}

func TestEncodingAllocatesNothing(t *testing.T) {
	e := newEncoder("outrigger", "1")
	records := batch(100)
	for i, r := range records {
		if i%3 == 0 {
			r.Attributes = map[string]any{"log.x": "the long way", "n": 1.0}
		} else if i%2 == 0 {
			r.Attributes = map[string]any{"http.response.status_code": 402.0, "http.request.method": "POST", "url.path": "/pay", "ok": true, "none": nil}
		}
	}
	b := make([]byte, 0, 1<<20)
	encode := func() {
		b = b[:0]
		for _, r := range records {
			var err error
			if b, err = e.document(b, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := testing.AllocsPerRun(100, encode); got != 0 {
		t.Errorf("%v allocations in 100 records; want none", got)
	}
	for range maxFragments + 10 {
		if _, err := e.document(nil, batch(1)[0]); err != nil {
			t.Fatal(err)
		}
	}
	if len(e.fragments) > maxFragments {
		t.Errorf("%d fragments", len(e.fragments))
	}
}

func BenchmarkDocument(b *testing.B) {
	for _, attributes := range []map[string]any{nil, {"http.response.status_code": 402.0, "http.request.method": "POST", "url.path": "/pay", "ok": true}} {
		name := "plain"
		if attributes != nil {
			name = "structured"
		}
		b.Run(name, func(b *testing.B) {
			e := newEncoder("outrigger", "1")
			records := batch(1000)
			for _, r := range records {
				r.Body, r.Attributes = strings.Repeat("x", 200), attributes
			}
			var buf []byte
			b.SetBytes(200 * 1000)
			b.ReportAllocs()
			for b.Loop() {
				buf = buf[:0]
				for _, r := range records {
					var err error
					if buf, err = e.document(buf, r); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// FuzzDocument: any record becomes valid JSON that holds its body.
func FuzzDocument(f *testing.F) {
	f.Add("line", "a", "b.c", "a.b", "value")
	f.Add("\xff\x00\u2028\"", "", ".", "a..", "log")
	f.Fuzz(func(t *testing.T, body, x, y, z, value string) {
		r := &record.Record{Body: body, Level: "info", Resource: &record.Resource{Pod: value}}
		e := newEncoder("b", "v")
		for range 2 {
			got, err := e.document(nil, r)
			if err != nil {
				t.Fatal(err)
			}
			doc := decode(t, got)
			message := doc["message"]
			if m, ok := message.(map[string]any); ok { // an attribute such as message.x
				message = m["value"]
				if m["value_"] != nil {
					message = nil // which of them is hard to say
				}
			}
			want, err := json.Marshal(body)
			if err != nil {
				t.Fatal(err)
			}
			var text string
			if err := json.Unmarshal(want, &text); err != nil {
				t.Fatal(err)
			}
			if message != nil && message != text {
				t.Fatalf("message %q; want %q", message, text)
			}
			r.Attributes = map[string]any{x: value, y: 1.5, z: nil}
		}
	})
}

// FuzzReadAck: any six bytes are an acknowledgement or an error.
func FuzzReadAck(f *testing.F) {
	f.Add([]byte("2A\x00\x00\x00\x01"))
	f.Add([]byte("1A\x00"))
	f.Add([]byte("\x15\x03\x01\x00\x02\x02"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := readAck(strings.NewReader(string(data)))
		if ok := len(data) >= 6 && string(data[:2]) == "2A"; ok != (err == nil) {
			t.Fatalf("%q: %v", data, err)
		}
	})
}
