package http1_test

import (
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// TestNormalizePath says what a target's path becomes. What is rejected is in
// testdata/rejects.txtar.
func TestNormalizePath(t *testing.T) {
	f := func(in, want string) {
		t.Helper()
		path, query, err := http1.NormalizePath([]byte("before"), []byte(in))
		if err != nil {
			t.Errorf("%q: %v", in, err)
			return
		}
		got := string(http1.AppendTarget(nil, path, query))
		if got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
		path, query, err = http1.NormalizePath(nil, []byte(got))
		if again := string(http1.AppendTarget(nil, path, query)); err != nil || again != got {
			t.Errorf("%q becomes %q and then %q, %v", in, got, again, err)
		}
	}
	f("/", "/")
	f("*", "*")
	f("/a/b", "/a/b")
	f("/a/b/", "/a/b/")
	f("/a-b.c_d~e!$&'()*+,;=:@", "/a-b.c_d~e!$&'()*+,;=:@")

	// absolute form
	f("http://a", "/")
	f("http://a/", "/")
	f("HTTP://a:80/b?c", "/b?c")
	f("https://a?c", "/?c")

	// escapes
	f("/%61%7e%2D", "/a~-")
	f("/%c3%a9", "/%C3%A9")
	f("/é", "/%C3%A9")
	f("/%25", "/%25")
	f("/%252e%252e/", "/%252e%252e/")
	f("/a%3fb%23c", "/a%3Fb%23c")
	f(`/<a>"{b}|[c]^`+"`", "/%3Ca%3E%22%7Bb%7D%7C%5Bc%5D%5E%60")

	// dots
	f("/.", "/")
	f("/./", "/")
	f("/a/.", "/a/")
	f("/a/./b", "/a/b")
	f("/a/..", "/")
	f("/a/../", "/")
	f("/a/b/../c", "/a/c")
	f("/a/b/../../c", "/c")
	f("/a/%2E%2e/c", "/c")
	f("/.hidden/..x/...", "/.hidden/..x/...")
	f("/...;a/.b;c", "/...;a/.b;c")
	f("/a;v=1/b", "/a;v=1/b")

	// empty segments
	f("//", "/")
	f("//a", "/a")
	f("/a//b///c//", "/a/b/c/")
	f("/a/.//b", "/a/b")

	// the query is not touched
	f("/a?", "/a?")
	f("/a?b=%2f..//%zz\\[]", "/a?b=%2f..//%zz\\[]")
	f("/a/../b?c/../d?e", "/b?c/../d?e")
}

// TestNormalPathIsNotCopied: the common case aliases the target.
func TestNormalPathIsNotCopied(t *testing.T) {
	target := []byte("/a/b?c")
	path, query, err := http1.NormalizePath(nil, target)
	if err != nil || &path[0] != &target[0] || &query[0] != &target[5] {
		t.Errorf("%q, %q, %v", path, query, err)
	}
}
