package parse_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

type attrs = map[string]any

func TestParsers(t *testing.T) {
	runtime := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	f := func(spec, line string, want record.Record, out parse.Outcome) {
		t.Helper()
		p, err := parse.Compile(spec)
		if err != nil {
			t.Error(err)
			return
		}
		if want.Time.IsZero() {
			want.Time = runtime
		}
		if want.Body == "" {
			want.Body = line
		}
		got := record.Record{Time: runtime, Body: line}
		if o := p.Parse(&got); o != out {
			t.Errorf("%s: Parse(%q) = %+v; want %+v", spec, line, o, out)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: Parse(%q), -want +got:\n%s", spec, line, d)
		}
	}
	ok, failed := parse.Outcome{Structured: true}, parse.Outcome{Failed: true}
	f("auto", `{"a":1}`, record.Record{Attributes: attrs{"a": 1.0}}, ok)
	f("json", `{"a":1}`, record.Record{Attributes: attrs{"a": 1.0}}, ok)
	f("json", "ERROR: text", record.Record{Level: "error"}, failed)
	f("none", `{"level":"error"}`, record.Record{}, parse.Outcome{})
	f("none", "caf\xe9", record.Record{Body: "caf\uFFFD"}, parse.Outcome{})

	f("logfmt", `ts=2026-11-23T02:00:00Z level=warn msg="disk \"a\" full" free=0 dry trace_id=`+trace, record.Record{
		Time: runtime.Add(-time.Hour), Level: "warn", Body: `disk "a" full`, TraceID: trace, Attributes: attrs{"free": "0", "dry": true},
	}, ok)
	f("logfmt", "a= b=x=y", record.Record{Attributes: attrs{"a": "", "b": "x=y"}}, ok)
	f("logfmt", "just words", record.Record{}, failed)
	f("logfmt", `msg="open level=error`, record.Record{Level: "error"}, failed)
	f("logfmt", `=x`, record.Record{}, failed)
	f("logfmt", `a=1 a=2`, record.Record{Attributes: attrs{"a": "1"}}, parse.Outcome{Structured: true, Left: 1})
	f("logfmt", `msg=m msg=n`, record.Record{}, parse.Outcome{Structured: true, Left: 1})

	re := `regex:^(?P<log__level>\w+) (?P<http__request__method>GET|POST) (?P<message>.*)$`
	f(re, "warn GET slow", record.Record{Level: "warn", Body: "slow", Attributes: attrs{"http.request.method": "GET"}}, ok)
	f(re, "nothing like it", record.Record{}, failed)
	f(re, "warn GET "+strings.Repeat("x", parse.MaxMatched), record.Record{}, failed)

	combined := `10.0.0.1 - bob [25/Nov/2026:12:00:00 +0100] "GET /cart?x=1 HTTP/1.1" 503 612 "-" "curl/8.5.0"`
	fields := attrs{
		"source.address": "10.0.0.1", "user.name": "bob", "http.request.method": "GET", "url.original": "/cart?x=1", "http.version": "1.1",
		"http.response.status_code": 503.0, "user_agent.original": "curl/8.5.0",
	}
	at := time.Date(2026, 11, 25, 11, 0, 0, 0, time.UTC)
	with := func(name string) attrs {
		out := attrs{name: 612.0}
		for k, v := range fields {
			out[k] = v
		}
		return out
	}
	f("grok:%{COMBINEDAPACHELOG}", combined, record.Record{Time: at, Attributes: with("http.response.body.size")}, ok)
	f("grok:%{NGINXACCESS}", combined, record.Record{Time: at, Attributes: with("http.response.body.bytes")}, ok)
	f("grok:%{NGINXERROR}", `2026/11/25 12:00:00 [warn] 7#8: *15 upstream slow`, record.Record{
		Level: "warn", Body: "upstream slow", Attributes: attrs{"process.pid": 7.0, "process.thread.id": 8.0, "nginx.error.connection_id": 15.0},
	}, ok)
	f("grok:^%{TIMESTAMP_ISO8601:@timestamp} %{LOGLEVEL:log.level} %{NUMBER:took:float} %{WORD:ok:bool} %{GREEDYDATA:message}$", "2026-11-23 02:00:00.5Z ERROR 1.5 true it broke", record.Record{
		Time: runtime.Add(-time.Hour + time.Second/2), Level: "error", Body: "it broke", Attributes: attrs{"took": 1.5, "ok": true},
	}, ok)
	f("grok:id=%{DATA:id:int}$", "id=12345678901234567", record.Record{Attributes: attrs{"id": "12345678901234567"}}, ok)
	f("grok:^%{UUID:id}$", "no", record.Record{}, failed)
	for _, ip := range []string{"2001:db8::1", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "1:2:3:4:5:6:7:8", "10.0.0.1"} {
		f("grok:%{IP:a}", "at 12:00:00 from "+ip+" to a.example.com", record.Record{Attributes: attrs{"a": ip}}, ok)
	}
	f("grok:%{IPORHOST:a} %{MONTH:b}", "web-1.example.com Nov", record.Record{Attributes: attrs{"a": "web-1.example.com", "b": "Nov"}}, ok)
	f("grok:^%{IP:a}|%{IP:a}", "10.0.0.1", record.Record{Attributes: attrs{"a": "10.0.0.1"}}, ok)
}

func TestCompileRefuses(t *testing.T) {
	f := func(spec, want string) {
		t.Helper()
		if _, err := parse.Compile(spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Compile(%.60q): %v; want it to say %q", spec, err, want)
		}
	}
	f("xml", "write auto, json, logfmt, none, regex:")
	f("regex:", "unknown")
	f("regex:(", "missing closing )")
	f("regex:abc", "has no named group")
	f("grok:%{NUMBER}", "names no field")
	f("grok:%{NUMBR:x}", "there is NUMBER")
	f("grok:%{ZZZ:x}", "write IP, NUMBER")
	f("grok:%{NUMBER:x:integer}", "write string, int")
	f("grok:%{NUMBER:x y}", "is no reference")
	f("grok:%{NUMBER:x}(", "missing closing )")
	f("regex:(?P<a>"+strings.Repeat("x{1000}", 9)+")", "at most 8192 are taken")
	f("regex:"+strings.Repeat("x", parse.MaxPattern), "at most 4096")
}

// Whatever the library calls a pattern can be compiled.
func TestEveryPatternOfTheLibrary(t *testing.T) {
	names := parse.Patterns()
	if len(names) < 100 {
		t.Errorf("%d patterns; want 100 at least", len(names))
	}
	for _, name := range names {
		if _, err := parse.Compile("grok:%{" + name + ":x}"); err != nil {
			t.Error(err)
		}
	}
}

func TestLevelsOfText(t *testing.T) {
	for line, want := range map[string]string{
		"I1125 12:00:00.000000       1 main.go:5] ok":  "info",
		"E1125 12:00:00.000000       1 main.go:5] bad": "error",
		"F1125 12:00:00.000000       1 main.go:5] bad": "fatal",
		"I1125 is a road": "",
		"<34>1 2026-11-25T12:00:00Z host su - - - failed": "fatal",
		"<11>Nov 25 12:00:00 host su: failed":             "error",
		"<191>x":                                          "debug",
		"<192>x":                                          "",
		"<html>":                                          "",
		"2026-11-25 12:00:00.000 UTC [1] LOG:  database system is ready":    "info",
		"2026-11-25 12:00:00.000 UTC [1] FATAL:  role does not exist":       "fatal",
		"2026-11-25 12:00:00.000 UTC [1] STATEMENT:  SELECT 1":              "info",
		"2026/11/25 12:00:00 [warn] 7#7: *1 upstream":                       "warn",
		"2026/11/25 12:00:00 [emerg] 1#1: no config":                        "fatal",
		"2026/11/25 12:00:00 listening on :8080":                            "",
		"2026-11-25 12:00:00,123 INFO  [main] c.e.Cart - started":           "info",
		"2026-11-25T12:00:00.001Z  WARN 1 --- [main] c.e.Cart : slow":       "warn",
		"12:00:00.001 [http-nio-1] ERROR c.e.Cart - broken":                 "error",
		"2026-11-25 12:00:00,123 - shop.cart - CRITICAL - gone":             "fatal",
		"2026-11-25T12:00:00.000Z\tinfo\tshop/cart.go:12\tdone":             "info",
		"2026-11-25T12:00:00.000Z\tDEBUG\tshop/cart.go:12\tdone":            "debug",
		"[2026-11-25 12:00:03] production.ERROR: empty":                     "error",
		"[25-Nov-2026 12:00:00] NOTICE: ready":                              "info",
		"[12:00:00 WRN] slow":                                               "warn",
		"[Wed Nov 25 12:00:00.000000 2026] [mpm_event:notice] [pid 1] AH00": "",
		"E, [2026-11-25T12:00:00.000001 #1] ERROR -- : bad":                 "error",
		"INFO:root:started":                                               "info",
		"INFO[0000] started":                                              "info",
		"WARNING: careful":                                                "warn",
		"fail: Shop.Cart[0]":                                              "error",
		"info: Microsoft.Hosting.Lifetime[14]":                            "info",
		"info and more":                                                   "",
		"\x1b[31mERROR\x1b[0m[0001] bad":                                  "error",
		"2026-11-25T12:00:00Z \x1b[32mINFO\x1b[0m shop: ok":               "info",
		"2026-11-25 12:00:00 main: an ERROR in prose":                     "",
		`10.0.0.1 - - [25/Nov/2026:12:00:00 +0000] "GET /ERROR HTTP/1.1"`: "",
		"ERRORS are fun":                                                  "",
		"time=x level=WARN":                                               "warn",
		"ERROR but level=info":                                            "info",
		"sublevel=error":                                                  "",
		"level=":                                                          "",
		"SEVERE":                                                          "",
	} {
		r := record.Record{Body: line}
		parse.Record(&r)
		if r.Level != want {
			t.Errorf("Record(%q): level %q; want %q", line, r.Level, want)
		}
	}
}

func TestTraceparent(t *testing.T) {
	const header = "00-" + trace + "-00f067aa0ba902b7-01"
	for line, want := range map[string]string{
		`{"traceparent":"` + header + `"}`:                                   trace,
		"GET / traceparent=" + header:                                        trace,
		`GET / traceparent="` + header + `"`:                                 trace,
		"GET / traceparent=" + header + " trace_id=" + trace[:31] + "7":      trace[:31] + "7",
		"traceparent=00-" + strings.Repeat("0", 32) + "-00f067aa0ba902b7-01": "",
		"traceparent=ff" + header[2:]:                                        "",
		"traceparent=00":                                                     "",
	} {
		r := record.Record{Body: line}
		parse.Record(&r)
		if r.TraceID != want || r.SpanID != "" {
			t.Errorf("Record(%q): trace %q, span %q; want %q and none", line, r.TraceID, r.SpanID, want)
		}
	}
}

// Whatever the specification and the line: no panic, the limits hold, the
// result can be sent, and a line that failed is whole.
func FuzzParser(f *testing.F) {
	f.Add("logfmt", `a=1 b="x\n" c`)
	f.Add("grok:%{COMBINEDAPACHELOG}", `1.1.1.1 - - [25/Nov/2026:12:00:00 +0100] "GET / HTTP/1.1" 200 1 "-" "-"`)
	f.Add("regex:(?P<a__b>.)(?P<level>.*)", "xwarn")
	f.Add("json", "{")
	f.Fuzz(func(t *testing.T, spec, line string) {
		p, err := parse.Compile(spec)
		if err != nil {
			return
		}
		r := record.Record{Body: line}
		out := p.Parse(&r)
		if len(r.Attributes) > record.MaxAttributes || !utf8.ValidString(r.Body) {
			t.Fatalf("%d attributes, body %q", len(r.Attributes), r.Body)
		}
		if out.Failed && r.Body != strings.ToValidUTF8(line, "\uFFFD") {
			t.Fatalf("failed, and the body is %q", r.Body)
		}
		if _, err := json.Marshal(r.Fields()); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkParser(b *testing.B) {
	for spec, line := range map[string]string{
		"logfmt":                    plainLines["logfmt"],
		"grok:%{COMBINEDAPACHELOG}": plainLines["access"] + `"`,
		`regex:^(?P<source__address>\S+) \S+ \S+ \[(?P<timestamp>[^]]+)\] "(?P<http__request__method>\S+) (?P<url__original>\S+)`: plainLines["access"],
	} {
		name, _, _ := strings.Cut(spec, ":")
		b.Run(name, func(b *testing.B) {
			p, err := parse.Compile(spec)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(line)))
			b.ReportAllocs()
			for b.Loop() {
				r := record.Record{Body: line}
				if out := p.Parse(&r); out.Failed {
					b.Fatal("it failed")
				}
			}
		})
	}
}
