package http1_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// describe is everything a Head says, a line each, and then the head as it is
// forwarded.
func describe(h *http1.Head, forwarded []byte) string {
	var s strings.Builder
	if h.Status != 0 {
		fmt.Fprintf(&s, "response %d %q HTTP/1.%d", h.Status, h.Reason, h.Minor)
	} else {
		fmt.Fprintf(&s, "request %s %s HTTP/1.%d host=%q", h.Method, h.Target, h.Minor, h.Host)
	}
	fmt.Fprintf(&s, " framing=%v length=%d", h.Framing, h.Length)
	for _, f := range []struct {
		on   bool
		word string
	}{{h.Close, "close"}, {h.Upgrade, "upgrade"}, {h.Expect100, "expect100"}} {
		if f.on {
			s.WriteString(" " + f.word)
		}
	}
	if h.UpgradeProto != nil {
		fmt.Fprintf(&s, " proto=%q", h.UpgradeProto)
	}
	s.WriteString("\nforwarded:\n")
	for line := range strings.Lines(string(forwarded)) {
		s.WriteString(strings.Trim(fmt.Sprintf("%q", line), `"`) + "\n")
	}
	return s.String()
}

// edits are the ways of forwarding that testdata/accepts.txtar names.
var edits = map[string]*http1.Edit{
	"as it is": nil,
	"upgrade":  {KeepUpgrade: true},
	"close":    {Close: true},
	"kept":     {KeepAlive: true},
	"chunked":  {Framing: http1.Chunked},
	"rewritten": {
		Target: []byte("/new"),
		Set: []http1.Pair{
			{Name: "Host", Value: []byte("b.shop:8080")},
			{Name: "x-request-id", Value: []byte("new")},
			{Name: "X-Injected", Value: []byte("a\r\nEvil: b")},
			{Name: "Content-Length", Value: []byte("9")},
			{Name: "Connection", Value: []byte("x-request-id")},
			{Name: "bad name", Value: []byte("x")},
		},
		Add:    []http1.Pair{{Name: "X-Forwarded-For", Value: []byte("10.0.0.1")}},
		Remove: []string{"x-secret", "HOST", "Transfer-Encoding"},
	},
}

// TestAccepts parses each message of testdata/accepts.txtar and compares what
// was understood and what is forwarded with the file that follows it. The name
// says how: "<what> | request, <edit>" or "<what> | response to <method>, <edit>".
func TestAccepts(t *testing.T) {
	golden.Pairs(t, "testdata/accepts.txtar", func(t *testing.T, name, message string) string {
		_, how, _ := strings.Cut(name, " | ")
		how, edit, _ := strings.Cut(how, ", ")
		e, known := edits[edit]
		if !known {
			t.Fatalf("no edit %q", edit)
		}
		b := raw(t, strings.Split(strings.TrimSuffix(message, "\n"), "\n"))
		parse, encode := asRequest(nil), http1.AppendRequestHead
		if method, ok := strings.CutPrefix(how, "response to "); ok {
			parse, encode = asResponse(nil, method), http1.AppendResponseHead
		}
		got := ""
		for _, n := range []int{1, 7, len(b)} {
			var h http1.Head
			m, err := feed(&h, parse, b, n)
			if err != nil {
				t.Fatalf("in portions of %d: %v", n, err)
			}
			if m != len(b) {
				t.Errorf("consumed %d of %d bytes", m, len(b))
			}
			again := describe(&h, encode(nil, &h, e))
			if got != "" && got != again {
				t.Errorf("in portions of %d: %s", n, cmp.Diff(got, again))
			}
			got = again
		}
		return got
	})
}
