package http1_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// small limits, so that messages which pass them can be read.
var small = http1.Limits{
	MaxHeadBytes: 512, MaxHeaders: 8, MaxLine: 64,
	MaxChunkExt: 32, MaxChunkExtTotal: 64, MaxTrailerBytes: 128, MaxTrailers: 4,
}

// raw joins lines in which escapes are Go's.
func raw(t *testing.T, lines []string) []byte {
	t.Helper()
	s, err := strconv.Unquote(`"` + strings.Join(lines, "") + `"`)
	if err != nil {
		t.Fatalf("%q: %v", lines, err)
	}
	return []byte(s)
}

func load(t *testing.T, name string) *txtar.Archive {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return txtar.Parse(text)
}

// verdict is "status reason" of an *Error, or the error's text.
func verdict(err error) string {
	var e *http1.Error
	if errors.As(err, &e) {
		return fmt.Sprintf("%d %s", e.Status, e.Reason)
	}
	return fmt.Sprint(err)
}

// parser is ParseRequest or ParseResponse with all but the bytes given.
type parser func(h *http1.Head, b []byte) (int, error)

func asRequest(lim *http1.Limits) parser {
	return func(h *http1.Head, b []byte) (int, error) { return http1.ParseRequest(h, b, lim) }
}

func asResponse(lim *http1.Limits, method string) parser {
	return func(h *http1.Head, b []byte) (int, error) { return http1.ParseResponse(h, b, lim, []byte(method)) }
}

// feed parses b in portions of n bytes, each time into a buffer elsewhere, and
// stops at the first answer other than ErrIncomplete.
func feed(h *http1.Head, parse parser, b []byte, n int) (int, error) {
	h.Reset()
	for end := min(n, len(b)); ; end = min(end+n, len(b)) {
		got, err := parse(h, append([]byte(nil), b[:end]...))
		if !errors.Is(err, http1.ErrIncomplete) || end == len(b) {
			return got, err
		}
	}
}

// unchunk reads a chunked body in portions of n bytes to its end, and returns
// the data and what was consumed.
func unchunk(d *http1.Body, b []byte, n int) (data []byte, consumed int, err error) {
	d.Reset(http1.Chunked, 0)
	for consumed < len(b) {
		m, part, done, err := d.Next(b[consumed:min(consumed+n, len(b))])
		consumed += m
		data = append(data, part...)
		if err != nil || done {
			return data, consumed, err
		}
		if m == 0 {
			return data, consumed, errors.New("nothing consumed")
		}
	}
	return data, consumed, d.End()
}

func TestRejects(t *testing.T) {
	for _, f := range load(t, "rejects.txtar").Files {
		t.Run(f.Name, func(t *testing.T) {
			lines := strings.Split(strings.TrimSuffix(string(f.Data), "\n"), "\n")
			want, b := lines[0], raw(t, lines[2:])
			for _, n := range []int{max(len(b), 1), 1, 3} {
				var err error
				var h http1.Head
				kind, _, _ := strings.Cut(f.Name, "/")
				switch kind {
				case "request":
					_, err = feed(&h, asRequest(&small), b, n)
				case "response":
					_, err = feed(&h, asResponse(&small, "GET"), b, n)
				case "chunked":
					_, _, err = unchunk(&http1.Body{Limits: &small}, b, n)
				case "path":
					if _, _, e := http1.NormalizePath(nil, b); e != nil {
						err = e
					}
				default:
					t.Fatalf("no parser %q", kind)
				}
				if got := verdict(err); got != want {
					t.Errorf("in portions of %d: %s, want %s (%s)", n, got, want, lines[1])
				}
			}
		})
	}
}
