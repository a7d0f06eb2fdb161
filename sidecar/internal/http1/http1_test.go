package http1_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

const typical = "POST /api/v1/payments?currency=EUR HTTP/1.1\r\n" +
	"Host: payments.shop.svc.cluster.local:8080\r\n" +
	"User-Agent: Go-http-client/1.1\r\n" +
	"Accept: application/json\r\n" +
	"Accept-Encoding: gzip\r\n" +
	"Content-Type: application/json\r\n" +
	"Content-Length: 27\r\n" +
	"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n" +
	"Authorization: Bearer eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0\r\n" +
	"\r\n"

const typicalResponse = "HTTP/1.1 200 OK\r\nDate: Mon, 01 Jun 2026 10:00:00 GMT\r\nContent-Type: application/json\r\n" +
	"Transfer-Encoding: chunked\r\nServer: x\r\nX-Request-Id: 8a6e0804-2bd0-4672-b79d-d97027f9071a\r\n\r\n"

func typicalEdit() *http1.Edit {
	return &http1.Edit{
		Target: []byte("/api/v1/payments?currency=EUR"),
		Set: []http1.Pair{
			{Name: "Traceparent", Value: []byte("00-4bf92f3577b34da6a3ce929d0e0e4736-b7ad6b7169203331-01")},
			{Name: "X-Outrigger-Attempt", Value: []byte("1")},
		},
		Remove: []string{"x-outrigger-breaker"},
	}
}

// TestNothingIsAllocated: a request and its response, parsed, streamed and
// written with everything at hand, allocate nothing; nor does waiting for the
// rest of a head.
func TestNothingIsAllocated(t *testing.T) {
	var (
		h    http1.Head
		d    http1.Body
		dst  = make([]byte, 0, 4096)
		path = make([]byte, 0, 256)
		req  = []byte(typical)
		resp = []byte(typicalResponse)
		body = []byte("b;x=y\r\nhello world\r\n0\r\nX-Sum: 1\r\n\r\n")
		post = []byte("POST")
		edit = typicalEdit()
		odd  = []byte("/a/%2e/./b%c3?c")
	)
	f := func(what string, run func()) {
		t.Helper()
		run()
		if n := testing.AllocsPerRun(100, run); n != 0 {
			t.Errorf("%s: %v allocations", what, n)
		}
	}
	f("request", func() {
		if _, err := http1.ParseRequest(&h, req, nil); err != nil {
			t.Fatal(err)
		}
		dst = http1.AppendRequestHead(dst[:0], &h, edit)
	})
	f("request in two parts", func() {
		if _, err := http1.ParseRequest(&h, req[:100], nil); !errors.Is(err, http1.ErrIncomplete) {
			t.Fatal(err)
		}
		if _, err := http1.ParseRequest(&h, req, nil); err != nil {
			t.Fatal(err)
		}
	})
	f("path", func() {
		if _, _, err := http1.NormalizePath(path, odd); err != nil {
			t.Fatal(err)
		}
	})
	f("response", func() {
		if _, err := http1.ParseResponse(&h, resp, nil, post); err != nil {
			t.Fatal(err)
		}
		dst = http1.AppendResponseHead(dst[:0], &h, edit)
	})
	f("body", func() {
		d.Reset(http1.Chunked, 0)
		for b := body; ; {
			n, data, done, err := d.Next(b)
			if err != nil {
				t.Fatal(err)
			}
			if done {
				break
			}
			dst = http1.AppendChunkHeader(dst[:0], max(len(data), 1))
			b = b[n:]
		}
		dst = http1.AppendLastChunk(dst[:0], d.Trailers())
	})
}

// TestPipelined: heads are consumed one by one from one buffer, with one Head.
func TestPipelined(t *testing.T) {
	b := []byte("GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: b\r\nX: y\r\n\r\nGET /3 HT")
	var h http1.Head
	var got []string
	for {
		n, err := http1.ParseRequest(&h, b, nil)
		if errors.Is(err, http1.ErrIncomplete) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, string(h.Target)+" "+string(h.Host)+" "+string(h.Get("x")))
		b = b[n:]
	}
	if s := strings.Join(got, ", "); s != "/1 a , /2 b y" || string(b) != "GET /3 HT" {
		t.Errorf("%s; left %q", s, b)
	}
}

// TestHeadIsLookedUpWithoutCase also tells a missing header from an empty one.
func TestHeadIsLookedUpWithoutCase(t *testing.T) {
	var h http1.Head
	if _, err := http1.ParseRequest(&h, []byte("GET / HTTP/1.1\r\nHost: a\r\nX-Y: 1\r\nx-y: 2\r\nE:\r\n\r\n"), nil); err != nil {
		t.Fatal(err)
	}
	if got := h.Get("x-Y"); string(got) != "1" {
		t.Errorf("x-Y is %q", got)
	}
	if got := h.Get("e"); got == nil || len(got) != 0 {
		t.Errorf("e is %#v", got)
	}
	if got := h.Get("z"); got != nil {
		t.Errorf("z is %#v", got)
	}
}

// TestBuiltByHand: a head that no parser has seen is written with the same
// care: what is no token is left out, line ends become spaces, and fields of
// the connection are not copied.
func TestBuiltByHand(t *testing.T) {
	h := http1.Head{
		Status: 503, Reason: []byte("Service\r\nUnavailable"), Framing: http1.Length, Length: 4,
		Headers: []http1.Header{
			{Name: []byte("x-outrigger-breaker"), Value: []byte("p\r\nopen")},
			{Name: []byte("Content-Length"), Value: []byte("99")},
			{Name: []byte("Transfer-Encoding"), Value: []byte("chunked")},
			{Name: []byte("Connection"), Value: []byte("x")},
			{Name: []byte("bad\r\nname"), Value: []byte("x")},
			{Name: []byte(""), Value: []byte("x")},
		},
	}
	f := func(h *http1.Head, e *http1.Edit, want string) {
		t.Helper()
		if got := string(http1.AppendResponseHead(nil, h, e)); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	f(&h, &http1.Edit{Close: true}, "HTTP/1.1 503 Service  Unavailable\r\nx-outrigger-breaker: p  open\r\nContent-Length: 4\r\nConnection: close\r\n\r\n")
	f(&http1.Head{Status: 200, Framing: http1.None}, nil, "HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n")
	f(&http1.Head{Status: 200, Framing: http1.None}, &http1.Edit{NoBody: true}, "HTTP/1.1 200 \r\n\r\n")
	f(&http1.Head{Status: 204, Framing: http1.None}, nil, "HTTP/1.1 204 \r\n\r\n")
	f(&http1.Head{Status: 100, Framing: http1.None}, nil, "HTTP/1.1 100 \r\n\r\n")
	f(&http1.Head{Status: 304, Framing: http1.None}, nil, "HTTP/1.1 304 \r\n\r\n")
	f(&http1.Head{Status: 200, Framing: http1.UntilClose}, nil, "HTTP/1.1 200 \r\nConnection: close\r\n\r\n")
	f(&http1.Head{Status: 200}, &http1.Edit{Framing: http1.Chunked}, "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n")
}

// TestSlowHeadIsCheap: a head of 60 KiB that comes byte by byte is parsed anew
// only when a line is complete, so its cost grows with its bytes and not with
// their square.
func TestSlowHeadIsCheap(t *testing.T) {
	b := []byte("GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 60<<10) + "\r\n\r\n")
	var h http1.Head
	parsed := 0
	for end := 1; end <= len(b); end++ {
		// A parse sets Method again; a look at the new bytes does not.
		h.Method = nil
		_, err := http1.ParseRequest(&h, b[:end], nil)
		if end < len(b) && !errors.Is(err, http1.ErrIncomplete) || end == len(b) && err != nil {
			t.Fatalf("%d bytes: %v", end, err)
		}
		if h.Method != nil {
			parsed++
		}
	}
	if want := 4; parsed != want {
		t.Errorf("parsed %d times, want %d: once a line", parsed, want)
	}
}

// TestBodyBehindTheHeadIsNotLookedAt: a head ends at its empty line, whatever
// follows.
func TestBodyBehindTheHeadIsNotLookedAt(t *testing.T) {
	head := []byte("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
	var h http1.Head
	n, err := http1.ParseRequest(&h, append(bytes.Clone(head), "\n\x00\r\n"...), nil)
	if err != nil || n != len(head) {
		t.Errorf("%d, %v", n, err)
	}
}
