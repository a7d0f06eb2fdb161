package http1_test

import (
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// What passes to HTTP/2 is what passes to HTTP/1.1, without what only frames it.
func TestFieldsAreThoseOfTheWrittenHead(t *testing.T) {
	const in = "POST http://svc.test?q HTTP/1.1\r\nHost: svc.test\r\nConnection: close, x-hop, TE\r\nX-Hop: 1\r\nKeep-Alive: 5\r\n" +
		"TE: gzip, trailers\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\nX-A: 1\r\nX-B: 2\r\nX-C: 3\r\n\r\n"
	var h http1.Head
	if _, err := http1.ParseRequest(&h, []byte(in), nil); err != nil {
		t.Fatal(err)
	}
	e := &http1.Edit{
		Remove: []string{"x-a"},
		Set:    []http1.Pair{{Name: "x-b", Value: []byte("4\n5")}, {Name: "Host", Value: []byte("other.test")}, {Name: "Connection", Value: []byte("x-c")}},
		Add:    []http1.Pair{{Name: "X-C", Value: []byte("6")}},
	}
	var b []byte
	for it := e.Fields(&h); it.Next(); {
		if it.OneHop() {
			continue
		}
		b = append(it.AppendName(b), ": "...)
		b = append(it.AppendValue(b), "\r\n"...)
	}
	want := "TE: trailers\r\nTrailer: x-t\r\nX-C: 3\r\nx-b: 4 5\r\nX-C: 6\r\n"
	if string(b) != want {
		t.Errorf("fields are %q, want %q", b, want)
	}
	written := string(http1.AppendRequestHead(nil, &h, e))
	for line := range strings.Lines(want) {
		if !strings.Contains(written, line) {
			t.Errorf("%q is not in the head %q", line, written)
		}
	}
	if a := string(e.Authority(&h)); a != "other.test" {
		t.Errorf("authority %q", a)
	}
	if a := string((*http1.Edit)(nil).Authority(&h)); a != "svc.test" {
		t.Errorf("authority without an edit %q", a)
	}
	if n := testing.AllocsPerRun(100, func() {
		for it := e.Fields(&h); it.Next(); {
			b = it.AppendValue(it.AppendName(b[:0]))
		}
	}); n != 0 {
		t.Errorf("a walk allocates %v times", n)
	}
}

func TestOriginForm(t *testing.T) {
	for in, want := range map[string]string{
		"/a?b": "/a?b", "*": "*", "http://svc.test": "/", "https://svc.test/x?y": "/x?y", "http://svc.test?q": "/?q",
	} {
		if got := string(http1.OriginForm([]byte(in))); got != want {
			t.Errorf("%q has the origin form %q, want %q", in, got, want)
		}
	}
}

func TestAnnouncedLengths(t *testing.T) {
	bodiless := &http1.Head{Status: 200}
	bodiless.Bodiless(7)
	for _, test := range []struct {
		name string
		h    *http1.Head
		e    *http1.Edit
		want int64
	}{
		{"a known length", &http1.Head{Framing: http1.Length, Length: 5}, nil, 5},
		{"an edited length", &http1.Head{Framing: http1.Chunked}, &http1.Edit{Framing: http1.Length, Length: 6}, 6},
		{"chunks", &http1.Head{Framing: http1.Chunked}, nil, -1},
		{"no body", &http1.Head{Framing: http1.None}, nil, -1},
		{"a response to HEAD", bodiless, nil, 7},
		{"204", &http1.Head{Status: 204, Framing: http1.Length, Length: 0}, nil, -1},
	} {
		if got := test.e.Announces(test.h); got != test.want {
			t.Errorf("%s: %d, want %d", test.name, got, test.want)
		}
	}
}

// Append knows the fields that HTTP/2 forbids or says in another way.
func TestAppendedFieldsAreClassified(t *testing.T) {
	var h http1.Head
	for name, want := range map[string]http1.Class{
		"x": http1.EndToEnd, "host": http1.Routing, "content-length": http1.Sizing, "te": http1.Accepting, "expect": http1.Expecting,
		"connection": http1.OneConnection, "upgrade": http1.OneConnection, "transfer-encoding": http1.OneConnection,
		"keep-alive": http1.OneConnection, "proxy-connection": http1.OneConnection, "http2-settings": http1.OneConnection,
	} {
		if got := h.Append([]byte(name), []byte("100-continue")); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
		if got := http1.ClassOf([]byte(name)); got != want {
			t.Errorf("%s in trailers is %v, want %v", name, got, want)
		}
	}
	if !h.Expect100 || len(h.Headers) != 3 {
		t.Errorf("the head has %d headers, expects %v", len(h.Headers), h.Expect100)
	}
}

func TestValidity(t *testing.T) {
	for value, want := range map[string]bool{
		"": true, "a b\tc": true, "caf\xe9": true, " a": false, "a ": false, "a\t": false, "a\nb": false, "a\rb": false, "a\x00": false, "a\x7f": false,
	} {
		if got := http1.ValidValue([]byte(value)); got != want {
			t.Errorf("value %q: %v", value, got)
		}
	}
	for name, want := range map[string]bool{"": false, "a-b_c": true, "A": false, "a b": false, "a:": false, "é": false} {
		if got := http1.ValidLowerName([]byte(name)); got != want {
			t.Errorf("name %q: %v", name, got)
		}
	}
	for _, test := range []struct {
		path, method string
		want         bool
	}{
		{"/", "GET", true},
		{"/a?b", "GET", true},
		{"", "GET", false},
		{"*", "GET", false},
		{"*", "OPTIONS", true},
		{"/a b", "GET", false},
		{"/#", "GET", false},
		{"a", "GET", false},
		{"/\x01", "GET", false},
	} {
		if got := http1.ValidPath([]byte(test.path), []byte(test.method)); got != test.want {
			t.Errorf("path %q of %s: %v", test.path, test.method, got)
		}
	}
}
