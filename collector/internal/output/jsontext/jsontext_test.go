package jsontext_test

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

var oddText = []string{
	"", "plain", "with \"quotes\" and \\ back\\slashes", "a\x00b\x01\x1f\x7f", "tab\tnew\nline\r\b\f", "größe 漢字 🚀", "\u2028\u2029", "<script>&amp;</script>",
	"\xff\xfe broken \xe6\x97", "\xed\xa0\x80 a surrogate", "12345678\"", "1234567\x80", "\ufffd", strings.Repeat("x", 70_000), strings.Repeat("é\"", 5000),
}

// FuzzString: a string is written as encoding/json would.
func FuzzString(f *testing.F) {
	for _, s := range oddText {
		f.Add(s[:min(len(s), 40)])
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := jsontext.AppendString(nil, s)
		want, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var a, b string
		if err := json.Unmarshal(got, &a); err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		if err := json.Unmarshal(want, &b); err != nil || a != b {
			t.Fatalf("%q is written as %s; encoding/json writes %s", s, got, want)
		}
		if bytes.ContainsAny(got, "\n\r") {
			t.Fatalf("a line break in %q", got)
		}
	})
}

// FuzzNumber: a number is read back as it was.
func FuzzNumber(f *testing.F) {
	for _, n := range []float64{0, math.Copysign(0, -1), 1, -1, 0.1, 1 << 53, 1<<53 + 2, 1 << 63, 1e19, 1e21, 1e-7, math.MaxFloat64, math.SmallestNonzeroFloat64} {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, n float64) {
		text := jsontext.AppendFloat(nil, n)
		var back any
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if _, isText := back.(string); !isText && back != n || isText != (math.IsNaN(n) || math.IsInf(n, 0)) {
			t.Fatalf("%v is written as %s", n, text)
		}
	})
}

func TestTime(t *testing.T) {
	var c jsontext.Clock
	for _, at := range []time.Time{
		{},
		time.Unix(0, 0), time.Unix(0, 1), time.Unix(-1, 999_999_999), time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC), time.Date(2026, 11, 23, 3, 0, 0, 999_999_999, time.UTC),
		time.Date(2026, 11, 23, 3, 0, 1, 120_000_000, time.FixedZone("", -3600)), time.Date(12026, 1, 1, 0, 0, 0, 1, time.UTC), time.Date(-5, 1, 1, 0, 0, 0, 1, time.UTC), time.Date(0, 1, 1, 0, 0, 0, 1, time.UTC),
	} {
		want := (&record.Record{Time: at}).Fields()[record.Timestamp]
		if got := string(c.Append(nil, at)); got != want {
			t.Errorf("%v: %s; want %s", at, got, want)
		}
	}
}

// BenchmarkString writes lines as programs log them: text, and JSON with quotes.
func BenchmarkString(b *testing.B) {
	for name, s := range map[string]string{
		"text": "INFO  [worker-12] com.example.shop.OrderService - order 12345678 of customer 123456 accepted, reserved in warehouse fra-3 and handed to the carrier after 42 ms",
		"json": `{"level":"info","msg":"order accepted","order":12345678,"customer":"123456","warehouse":"fra-3","took":42.5,"thread":"worker-12","logger":"com.example.shop"}`,
	} {
		b.Run(name, func(b *testing.B) {
			var out []byte
			b.SetBytes(int64(len(s)))
			b.ReportAllocs()
			for b.Loop() {
				out = jsontext.AppendString(out[:0], s)
			}
		})
	}
}
