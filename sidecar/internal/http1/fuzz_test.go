package http1_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// longest bounds inputs, since feeding them byte by byte copies their square.
const longest = 4 << 10

// seed adds the messages of the golden files whose names begin with kind.
func seed(f *testing.F, archive, kind string) {
	f.Helper()
	t := &testing.T{}
	for _, file := range load(t, archive).Files {
		text := strings.TrimSuffix(string(file.Data), "\n")
		switch {
		case archive == "rejects.txtar" && strings.HasPrefix(file.Name, kind):
			f.Add(raw(t, strings.Split(text, "\n")[2:]))
		case archive == "accepts.txtar" && strings.Contains(file.Name, "| "+kind):
			f.Add(append(raw(t, strings.Split(text, "\n")), "5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n"...))
		}
	}
}

// result is what a parse says, without the errors' details.
func result(h *http1.Head, n int, err error) string {
	if err != nil {
		return verdict(err)
	}
	return fmt.Sprintf("%d bytes: %s", n, describe(h, http1.AppendRequestHead(nil, requestable(h), nil)))
}

// requestable is h, or a copy that can be written as a request.
func requestable(h *http1.Head) *http1.Head {
	if h.Framing != http1.UntilClose {
		return h
	}
	c := *h
	c.Framing = http1.None
	return &c
}

// canonical is the headers as net/http would hold them, without those that it
// moves elsewhere or changes.
func canonical(headers []http1.Header) http.Header {
	c := http.Header{}
	for _, f := range headers {
		c.Add(string(f.Name), string(f.Value))
	}
	return moved(c)
}

func moved(h http.Header) http.Header {
	h = h.Clone()
	if h == nil {
		h = http.Header{}
	}
	for _, name := range []string{"Host", "Transfer-Encoding", "Trailer", "Pragma", "Cache-Control", "Content-Length", "Connection"} {
		h.Del(name)
	}
	return h
}

// samePortions fails unless b, in portions, gives the result it gives at once.
func samePortions(t *testing.T, parse parser, b []byte) (h *http1.Head, n int, err error) {
	h = &http1.Head{}
	n, err = parse(h, b)
	want := result(h, n, err)
	for _, size := range []int{1, 5} {
		var g http1.Head
		m, e := feed(&g, parse, b, size)
		if got := result(&g, m, e); got != want {
			t.Fatalf("%q in portions of %d: %s\nat once: %s", b, size, got, want)
		}
	}
	return h, n, err
}

// forwardable is the headers that belong in a forwarded head.
func forwardable(headers []http1.Header) (names []string) {
	for _, f := range headers {
		switch strings.ToLower(string(f.Name)) {
		case "connection", "content-length", "transfer-encoding", "te", "trailer":
		default:
			names = append(names, string(f.Name)+": "+string(f.Value))
		}
	}
	return names
}

// sameBody compares the body behind a head of n bytes, and where it ends, with
// what net/http makes of them.
func sameBody(t *testing.T, h *http1.Head, b []byte, n int, r io.ReadCloser, rest *bufio.Reader, trailer *http.Header) {
	var d http1.Body
	d.Reset(h.Framing, h.Length)
	var data []byte
	end := n
	for end < len(b) && !d.Done() {
		m, part, _, err := d.Next(b[end:])
		if err != nil {
			return // stricter than net/http; FuzzBody looks closer
		}
		end += m
		data = append(data, part...)
	}
	theirs, err := io.ReadAll(r)
	if e := d.End(); e != nil {
		// net/http ends a chunked body without the line end of the last chunk.
		if err == nil && h.Framing == http1.Length {
			t.Fatalf("%q: %v, but net/http reads %q", b, e, theirs)
		}
		return
	}
	if err != nil || !bytes.Equal(data, theirs) {
		t.Fatalf("%q: the body is %q, but to net/http %q, %v", b, data, theirs, err)
	}
	behind, err := io.ReadAll(rest)
	if err != nil || !bytes.Equal(behind, b[end:]) {
		t.Fatalf("%q: the next message begins with %q, but to net/http with %q, %v", b, b[end:], behind, err)
	}
	if h.Framing == http1.Chunked {
		want := http.Header{}
		for _, f := range d.Trailers() {
			want.Add(string(f.Name), string(f.Value))
		}
		got := (*trailer).Clone()
		for name, values := range got {
			if values == nil {
				delete(got, name) // announced and not sent
			}
		}
		if len(want)+len(got) > 0 && !cmp.Equal(want, got) {
			t.Fatalf("%q: trailers differ from net/http's (-ours +theirs)\n%s", b, cmp.Diff(want, got))
		}
	}
}

// FuzzParseRequest: a request reads the same whatever portions it comes in;
// one that is accepted is accepted by net/http, which reads the same method,
// target, host, headers, body and end in it; and written again it reads the
// same, less what belongs to the connection.
func FuzzParseRequest(f *testing.F) {
	seed(f, "rejects.txtar", "request/")
	seed(f, "accepts.txtar", "request")
	f.Add([]byte(typical))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > longest {
			return
		}
		_, _, _ = samePortions(t, asRequest(&small), b)
		h, n, err := samePortions(t, asRequest(nil), b)
		if err != nil {
			return
		}
		if string(h.Method) != "CONNECT" {
			if _, _, e := http1.NormalizePath(nil, h.Target); e != nil {
				return
			}
		}

		rest := bufio.NewReader(bytes.NewReader(b))
		r, err := http.ReadRequest(rest)
		if err != nil {
			t.Fatalf("%q: accepted, but to net/http: %v", b, err)
		}
		if r.Method != string(h.Method) || r.RequestURI != string(h.Target) || r.ProtoMinor != h.Minor || r.Close != h.Close ||
			!strings.EqualFold(r.Host, string(h.Host)) {
			t.Fatalf("%q: %s %s 1.%d host %q close %v, but to net/http %s %s 1.%d host %q close %v", b,
				h.Method, h.Target, h.Minor, h.Host, h.Close, r.Method, r.RequestURI, r.ProtoMinor, r.Host, r.Close)
		}
		if d := cmp.Diff(canonical(h.Headers), moved(r.Header)); d != "" {
			t.Fatalf("%q: headers differ from net/http's (-ours +theirs)\n%s", b, d)
		}
		if (len(r.TransferEncoding) > 0) != (h.Framing == http1.Chunked) || h.Framing == http1.Length && r.ContentLength != h.Length {
			t.Fatalf("%q: %v %d, but to net/http %v %d", b, h.Framing, h.Length, r.TransferEncoding, r.ContentLength)
		}
		sameBody(t, h, b, n, r.Body, rest, &r.Trailer)

		edit := &http1.Edit{KeepUpgrade: h.Upgrade, Close: h.Close}
		if len(h.Host) == 0 {
			edit.Set = []http1.Pair{{Name: "Host", Value: []byte("a")}}
		}
		written := http1.AppendRequestHead(nil, h, edit)
		var g http1.Head
		m, err := http1.ParseRequest(&g, written, &http1.Limits{MaxHeadBytes: 1 << 20, MaxHeaders: 1000})
		if err != nil || m != len(written) {
			t.Fatalf("%q is written as %q, which is not accepted: %v", b, written, err)
		}
		if string(g.Method) != string(h.Method) || string(g.Target) != string(h.Target) || g.Framing != h.Framing ||
			g.Length != h.Length || g.Upgrade != h.Upgrade || g.Close != h.Close || g.Expect100 != h.Expect100 {
			t.Fatalf("%q is written as %q, which reads otherwise", b, written)
		}
		again := http1.AppendRequestHead(nil, &g, &http1.Edit{KeepUpgrade: g.Upgrade, Close: g.Close})
		if d := cmp.Diff(string(written), string(again)); d != "" {
			t.Fatalf("%q is written as %q and then as %q", b, written, again)
		}
		for _, line := range forwardable(g.Headers) {
			if edit.Set == nil && !strings.HasPrefix(strings.ToLower(line), "host") && !strings.Contains(strings.Join(forwardable(h.Headers), "\n"), line) {
				t.Fatalf("%q is written as %q, which has a new header %q", b, written, line)
			}
		}
	})
}

// FuzzParseResponse is FuzzParseRequest for responses, to GET, HEAD and CONNECT.
func FuzzParseResponse(f *testing.F) {
	seed(f, "rejects.txtar", "response/")
	seed(f, "accepts.txtar", "response")
	f.Add([]byte(typicalResponse))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > longest {
			return
		}
		_, _, _ = samePortions(t, asResponse(&small, "GET"), b)
		for _, method := range []string{"GET", "HEAD", "CONNECT"} {
			h, n, err := samePortions(t, asResponse(nil, method), b)
			if err != nil {
				continue
			}
			rest := bufio.NewReader(bytes.NewReader(b))
			r, err := http.ReadResponse(rest, &http.Request{Method: method})
			if err != nil {
				t.Fatalf("%q: accepted, but to net/http: %v", b, err)
			}
			if r.StatusCode != h.Status || r.ProtoMinor != h.Minor {
				t.Fatalf("%q: %d 1.%d, but to net/http %d 1.%d", b, h.Status, h.Minor, r.StatusCode, r.ProtoMinor)
			}
			if d := cmp.Diff(canonical(h.Headers), moved(r.Header)); d != "" {
				t.Fatalf("%q: headers differ from net/http's (-ours +theirs)\n%s", b, d)
			}
			if method != "CONNECT" || h.Status >= 300 {
				sameBody(t, h, b, n, r.Body, rest, &r.Trailer)
			}

			written := http1.AppendResponseHead(nil, h, &http1.Edit{KeepUpgrade: h.Upgrade, Close: h.Close})
			var g http1.Head
			m, err := http1.ParseResponse(&g, written, &http1.Limits{MaxHeadBytes: 1 << 20, MaxHeaders: 1000}, []byte(method))
			if err != nil || m != len(written) {
				t.Fatalf("%q is written as %q, which is not accepted: %v", b, written, err)
			}
			if g.Status != h.Status || string(g.Reason) != string(h.Reason) || g.Framing != h.Framing || g.Length != h.Length ||
				g.Upgrade != h.Upgrade || g.Close != h.Close {
				t.Fatalf("%q is written as %q, which reads otherwise", b, written)
			}
			again := http1.AppendResponseHead(nil, &g, &http1.Edit{KeepUpgrade: g.Upgrade, Close: g.Close})
			if d := cmp.Diff(string(written), string(again)); d != "" {
				t.Fatalf("%q is written as %q and then as %q", b, written, again)
			}
		}
	})
}

// FuzzBody: a chunked body reads the same whatever portions it comes in; one
// that is accepted is accepted by net/http with the same data; and written
// again in other chunks it reads the same.
func FuzzBody(f *testing.F) {
	seed(f, "rejects.txtar", "chunked/")
	f.Add([]byte("5;a=b\r\nhello\r\n10\r\n0123456789abcdef\r\n0\r\nX-Sum: 1\r\ny:\r\n\r\nGET"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > longest {
			return
		}
		d := http1.Body{Limits: &small}
		data, n, err := unchunk(&d, b, len(b)+1)
		trailers := http1.AppendLastChunk(nil, d.Trailers())
		for _, size := range []int{1, 5} {
			g := http1.Body{Limits: &small}
			again, m, e := unchunk(&g, b, size)
			if !bytes.Equal(again, data) || m != n || verdict(e) != verdict(err) || !bytes.Equal(http1.AppendLastChunk(nil, g.Trailers()), trailers) {
				t.Fatalf("%q in portions of %d: %q, %d bytes, %v; at once %q, %d, %v", b, size, again, m, e, data, n, err)
			}
		}
		if err != nil {
			return
		}
		theirs, err := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(b)))
		if err != nil || !bytes.Equal(theirs, data) {
			t.Fatalf("%q: %q, but to net/http %q, %v", b, data, theirs, err)
		}

		var written []byte
		for part := data; len(part) > 0; {
			k := min(len(part), 3)
			written = http1.AppendChunkHeader(written, k)
			written = append(append(written, part[:k]...), http1.ChunkEnd...)
			part = part[k:]
		}
		written = append(written, trailers...)
		g := http1.Body{}
		again, m, err := unchunk(&g, written, 7)
		if err != nil || m != len(written) || !bytes.Equal(again, data) || len(g.Trailers()) != len(d.Trailers()) {
			t.Fatalf("%q is written as %q, which reads %q, %v", b, written, again, err)
		}
		for i, f := range d.Trailers() {
			if h := g.Trailers()[i]; !bytes.Equal(f.Name, h.Name) || !bytes.Equal(f.Value, h.Value) {
				t.Fatalf("%q: trailer %q: %q is read as %q: %q", b, f.Name, f.Value, h.Name, h.Value)
			}
		}
	})
}

// FuzzNormalizePath: normalising twice is normalising once; the result means
// what the input means once its escapes are decoded and its dots resolved; and
// it holds nothing that could be resolved or decoded to another path.
func FuzzNormalizePath(f *testing.F) {
	seed(f, "rejects.txtar", "path/")
	for _, s := range []string{"/", "/a/./b/../c//d/", "/%2e%2E/%7e?x=/../y", "http://a.b:80/c?d", "*", "/é;v=1/.../..a"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, target []byte) {
		before := bytes.Clone(target)
		p, q, e := http1.NormalizePath(make([]byte, 3, 20), target)
		if !bytes.Equal(before, target) {
			t.Fatalf("%q was changed to %q", before, target)
		}
		if e != nil {
			if !errors.As(error(e), new(*http1.Error)) || e.Status != 400 {
				t.Fatalf("%q: %v", target, e)
			}
			return
		}
		if string(p) == "*" {
			return
		}
		whole := http1.AppendTarget(nil, p, q)
		p2, q2, e := http1.NormalizePath(nil, whole)
		if e != nil || !bytes.Equal(p, p2) || !bytes.Equal(q, q2) || (q == nil) != (q2 == nil) {
			t.Fatalf("%q becomes %q and then %q, %q, %v", target, whole, p2, q2, e)
		}
		if _, err := url.ParseRequestURI(string(whole)); err != nil {
			t.Fatalf("%q becomes %q: %v", target, whole, err)
		}

		in, _, _ := strings.Cut(string(target), "?")
		if _, after, absolute := strings.Cut(in, "://"); absolute && in[0] != '/' {
			_, in, _ = strings.Cut(after, "/")
			in = "/" + in
		}
		meant, err := url.PathUnescape(in)
		if err != nil {
			t.Fatalf("%q is accepted: %v", target, err)
		}
		got, err := url.PathUnescape(string(p))
		if err != nil {
			t.Fatal(err)
		}
		if path.Clean(meant) != path.Clean(got) || len(got) > 1 && strings.TrimSuffix(got, "/") != path.Clean(got) {
			t.Fatalf("%q means %q, but becomes %q", target, path.Clean(meant), got)
		}
		for _, c := range p {
			if c <= ' ' || c >= 0x7f || strings.IndexByte(`\#?"<>[]^{}|`+"`", c) >= 0 {
				t.Fatalf("%q becomes %q", target, p)
			}
		}
	})
}
