package telemetry

import (
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

var node = bootstrap.Config{Namespace: "shop", Workload: "storefront", Instance: "storefront-0"}

func TestTraceparent(t *testing.T) {
	const caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	var c TraceContext
	c.Begin([]byte(caller), false)
	if !c.Joined || !c.Sampled || string(c.ParentID[:]) != "00f067aa0ba902b7" {
		t.Fatalf("did not join %s: %+v", caller, c)
	}
	next := string(c.AppendTraceparent(nil))
	if !strings.HasPrefix(next, "00-4bf92f3577b34da6a3ce929d0e0e4736-") || !strings.HasSuffix(next, "-01") || strings.Contains(next, "00f067aa0ba902b7") {
		t.Fatalf("next hop gets %s: the same trace with our span wanted", next)
	}
	for _, bad := range []string{
		"", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", "ff" + caller[2:], strings.ToUpper(caller), caller + "-x",
		"00-00000000000000000000000000000000-00f067aa0ba902b7-01", "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
	} {
		var c TraceContext
		c.Begin([]byte(bad), true)
		if c.Joined || !c.Sampled {
			t.Errorf("joined %q", bad)
		}
		var back TraceContext
		if !parseTraceparent(c.AppendTraceparent(nil), &back) {
			t.Errorf("a new trace is not valid: %s", c.AppendTraceparent(nil))
		}
	}
}

// Sampled is the lowest bit of the flags; the others are not ours to read.
func TestSampledIsTheLowestBit(t *testing.T) {
	for flags, want := range map[string]bool{"00": false, "01": true, "02": false, "03": true, "f0": false, "ff": true} {
		var c TraceContext
		if c.Begin([]byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"+flags), true); !c.Joined || c.Sampled != want {
			t.Errorf("flags %s: joined %t, sampled %t; want %t", flags, c.Joined, c.Sampled, want)
		}
	}
}

func FuzzTraceparent(f *testing.F) {
	f.Add([]byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"))
	f.Fuzz(func(t *testing.T, h []byte) {
		var c, back TraceContext
		c.Begin(h, true)
		if !parseTraceparent(c.AppendTraceparent(nil), &back) || back.TraceID != c.TraceID {
			t.Fatalf("%q became %s", h, c.AppendTraceparent(nil))
		}
	})
}

func TestSpanHasTheIDsOfTheHeader(t *testing.T) {
	exporter := tracetest.NewInMemoryExporter()
	s := newSpans(exporter, 1, node)
	var c TraceContext
	c.Begin([]byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), false)
	s.Record(Span{Context: &c, Outbound: true, Method: "GET", Path: "/pay", Status: 503, Flags: "UO", Destination: "shop/payments:80", Start: time.Unix(1, 0), End: time.Unix(2, 0)})
	unsampled := c
	unsampled.Sampled = false
	s.Record(Span{Context: &unsampled, Method: "GET"})
	if err := s.provider.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	spans := exporter.GetSpans()
	if len(spans) != 1 {
		t.Fatalf("%d spans; want the sampled one", len(spans))
	}
	got := spans[0]
	if got.SpanContext.SpanID().String() != string(c.SpanID[:]) || got.SpanContext.TraceID().String() != string(c.TraceID[:]) || got.Parent.SpanID().String() != "00f067aa0ba902b7" {
		t.Fatalf("span %s of trace %s below %s; header said %s", got.SpanContext.SpanID(), got.SpanContext.TraceID(), got.Parent.SpanID(), c.AppendTraceparent(nil))
	}
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkTraceContext(b *testing.B) {
	for name, header := range map[string][]byte{"new": nil, "joined": []byte("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				var c TraceContext
				c.Begin(header, false)
			}
		})
	}
}
