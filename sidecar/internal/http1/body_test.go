package http1_test

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// TestBodyEnds says where a body ends in a stream that goes on behind it,
// whatever portions it comes in.
func TestBodyEnds(t *testing.T) {
	f := func(framing http1.Framing, length int64, stream, data, trailers, rest string) {
		t.Helper()
		for n := 1; n <= len(stream); n++ {
			d := http1.Body{}
			d.Reset(framing, length)
			var got []byte
			i := 0
			for !d.Done() && i < len(stream) {
				m, part, _, err := d.Next([]byte(stream[i:min(i+n, len(stream))]))
				if err != nil {
					t.Fatalf("%v %q in portions of %d: %v", framing, stream, n, err)
				}
				i += m
				got = append(got, part...)
			}
			if err := d.End(); err != nil {
				t.Errorf("%v %q in portions of %d: %v", framing, stream, n, err)
			}
			var fields []string
			for _, h := range d.Trailers() {
				fields = append(fields, fmt.Sprintf("%s=%s", h.Name, h.Value))
			}
			if string(got) != data || stream[i:] != rest || strings.Join(fields, ",") != trailers {
				t.Errorf("%v %q in portions of %d: data %q, trailers %q, rest %q; want %q, %q, %q",
					framing, stream, n, got, fields, stream[i:], data, trailers, rest)
			}
		}
	}
	f(http1.None, 0, "GET", "", "", "GET")
	f(http1.Length, 0, "GET", "", "", "GET")
	f(http1.Length, 5, "helloGET", "hello", "", "GET")
	f(http1.UntilClose, 0, "hello", "hello", "", "")
	f(http1.Chunked, 0, "0\r\n\r\nGET", "", "", "GET")
	f(http1.Chunked, 0, "5\r\nhello\r\n0\r\n\r\nGET", "hello", "", "GET")
	f(http1.Chunked, 0, "0005\r\nhello\r\nA\r\n, world!!!\r\n00\r\n\r\nGET", "hello, world!!!", "", "GET")
	f(http1.Chunked, 0, "a\r\nhello\r\n0\r\n\r\n0\r\n\r\nGET", "hello\r\n0\r\n", "", "GET")
	f(http1.Chunked, 0, "1;a=b ;c\r\nx\r\n0;last\r\n\r\nGET", "x", "", "GET")
	f(http1.Chunked, 0, "1\r\nx\r\n0\r\nX-Sum: 9\r\nx-empty:\r\n\r\nGET", "x", "X-Sum=9,x-empty=", "GET")
}

// TestBodyTruncated says which streams may not end where they do.
func TestBodyTruncated(t *testing.T) {
	f := func(framing http1.Framing, length int64, stream, want string) {
		t.Helper()
		var d http1.Body
		d.Reset(framing, length)
		if _, _, _, err := d.Next([]byte(stream)); err != nil {
			t.Fatal(err)
		}
		if got := verdict(d.End()); got != want {
			t.Errorf("%v of %d, %q: %s, want %s", framing, length, stream, got, want)
		}
	}
	f(http1.None, 0, "", "<nil>")
	f(http1.Length, 0, "", "<nil>")
	f(http1.Length, 5, "hello", "<nil>")
	f(http1.Length, 5, "hell", "400 truncated")
	f(http1.UntilClose, 0, "", "<nil>")
	f(http1.Chunked, 0, "", "400 truncated")
	f(http1.Chunked, 0, "0\r\n", "400 truncated")
}

// TestBodyErrorIsFinal: after an error nothing more is read as data.
func TestBodyErrorIsFinal(t *testing.T) {
	var d http1.Body
	d.Reset(http1.Chunked, 0)
	for _, b := range []string{"x", "5\r\nhello"} {
		if n, data, done, err := d.Next([]byte(b)); n != 0 || data != nil || done || verdict(err) != "400 bad_chunk" {
			t.Errorf("Next(%q) = %d, %q, %v, %v", b, n, data, done, err)
		}
	}
	if got := verdict(d.End()); got != "400 bad_chunk" {
		t.Errorf("End: %s", got)
	}
}

// TestManySmallExtensions: an extension of at most 16 bytes is free, however
// many chunks have one.
func TestManySmallExtensions(t *testing.T) {
	stream := bytes.Repeat([]byte("1;a=0123456789abc\r\nx\r\n"), 100)
	stream = append(stream, "0\r\n\r\n"...)
	data, n, err := unchunk(&http1.Body{Limits: &small}, stream, 64)
	if err != nil || len(data) != 100 || n != len(stream) {
		t.Errorf("%d bytes of data, %d consumed of %d: %v", len(data), n, len(stream), err)
	}
}

// TestChunksWritten: what is written in chunks is read back, and a trailer
// that would be rejected is not written.
func TestChunksWritten(t *testing.T) {
	var b []byte
	for _, s := range []string{"hello", strings.Repeat("x", 300), "\r\n0\r\n\r\n"} {
		b = http1.AppendChunkHeader(b, len(s))
		b = append(b, s...)
		b = append(b, http1.ChunkEnd...)
	}
	b = http1.AppendLastChunk(b, []http1.Header{
		{Name: []byte("X-Sum"), Value: []byte("1\r\n2")},
		{Name: []byte("Content-Length"), Value: []byte("5")},
		{Name: []byte("bad name"), Value: []byte("x")},
	})
	var d http1.Body
	data, n, err := unchunk(&d, b, 10)
	if err != nil || n != len(b) || string(data) != "hello"+strings.Repeat("x", 300)+"\r\n0\r\n\r\n" {
		t.Fatalf("read back %q, %d of %d bytes: %v", data, n, len(b), err)
	}
	if got := d.Trailers(); len(got) != 1 || string(got[0].Name) != "X-Sum" || string(got[0].Value) != "1  2" {
		t.Errorf("%d trailers, %v", len(got), got)
	}
	if got := string(http1.AppendLastChunk(nil, nil)); got != "0\r\n\r\n" {
		t.Errorf("last chunk %q", got)
	}
}

func TestChunkOfNothingPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("a chunk of no bytes was written; it ends the body")
		}
	}()
	http1.AppendChunkHeader(nil, 0)
}

// TestEveryReasonIsTested: each reason that errors.go names is expected by a
// message in testdata/rejects.txtar.
func TestEveryReasonIsTested(t *testing.T) {
	source, err := os.ReadFile("errors.go")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range load(t, "rejects.txtar").Files {
		want, _, _ := strings.Cut(string(f.Data), "\n")
		_, reason, _ := strings.Cut(want, " ")
		seen[reason] = true
	}
	declared := regexp.MustCompile(`(?m)^\tReason\w+ += "(\w+)"`).FindAllSubmatch(source, -1)
	if len(declared) < 40 {
		t.Fatalf("only %d reasons found in errors.go", len(declared))
	}
	for _, m := range declared {
		if !seen[string(m[1])] {
			t.Errorf("no message is rejected for %s", m[1])
		}
	}
}
