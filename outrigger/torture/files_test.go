package torture

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testContainer(t *testing.T) *container {
	t.Helper()
	c, err := openContainer(filepath.Join(t.TempDir(), "shop_pod_uid", "app"), time.Now)
	if err != nil {
		t.Fatal(err)
	}
	c.streams = map[string]*source{"stdout": {id: 1}, "stderr": {id: 2}}
	t.Cleanup(func() {
		if !c.removed {
			_ = c.file.Close() // the test is over
		}
	})
	return c
}

// files returns what is there, oldest first, by kind, and the numbers of the
// stdout lines in each.
func files(t *testing.T, c *container) (out []string) {
	t.Helper()
	names, err := filepath.Glob(c.path + "*")
	if err != nil {
		t.Fatal(err)
	}
	names = append(names[1:], names[0]) // the active one sorts first
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		in, what := io.Reader(f), "plain"
		if strings.HasSuffix(name, ".gz") {
			what = "gz"
			if in, err = gzip.NewReader(f); err != nil {
				t.Fatal(err)
			}
		}
		if name == c.path {
			what = "active"
		}
		text, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close() // it was read
		var numbers []string
		for l := range strings.Lines(string(text)) {
			if h, _, ok := parse([]byte(strings.TrimSuffix(l, "\n"))); ok {
				numbers = append(numbers, fmt.Sprint(h.number))
			}
		}
		out = append(out, what+" "+strings.Join(numbers, ","))
	}
	return out
}

func TestRotationIsKubelets(t *testing.T) {
	c := testContainer(t)
	want := []string{
		"plain 0|active 1",
		"gz 0|plain 1|active 2",
		"gz 0|gz 1|plain 2|active 3",
		"gz 0|gz 1|gz 2|plain 3|active 4",
		"gz 1|gz 2|gz 3|plain 4|active 5", // five files, so the oldest goes
		"gz 2|gz 3|gz 4|plain 5|active 6",
	}
	if err := c.line("stdout", 10, 1, plain); err != nil {
		t.Fatal(err)
	}
	for i, w := range want {
		before, err := inode(c.path)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.rotate(); err != nil {
			t.Fatal(err)
		}
		if err := c.line("stdout", 10, 1, plain); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(files(t, c), "|"); got != w {
			t.Fatalf("after rotation %d: %s, want %s", i+1, got, w)
		}
		newest, err := c.rotated()
		if err != nil {
			t.Fatal(err)
		}
		// The newest rotated file is the one that was written, by rename.
		if now, err := inode(newest[len(newest)-1]); err != nil || now != before {
			t.Errorf("the rotated file has inode %d, the active one had %d (%v)", now, before, err)
		}
	}
	for n, w := range c.streams["stdout"].lines {
		if gone := !w.generation.deleted.IsZero(); gone != (n < 2) {
			t.Errorf("line %d: deleted is %v", n, gone)
		}
	}
}

func TestCompressionLeavesNothingHalf(t *testing.T) {
	c := testContainer(t)
	if err := c.rotate(); err != nil {
		t.Fatal(err)
	}
	left := c.path + ".20200101-000000.tmp"
	if err := os.WriteFile(left, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.rotate(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("%s is there still: %v", left, err)
	}
}

func TestRemovalLeavesNothing(t *testing.T) {
	c := testContainer(t)
	for range 3 {
		if err := c.line("stderr", 10, 3, plain); err != nil {
			t.Fatal(err)
		}
		if err := c.rotate(); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(c.folder)); !os.IsNotExist(err) {
		t.Errorf("the pod's folder is there still: %v", err)
	}
	for n, w := range c.streams["stderr"].lines {
		if w.generation.deleted.IsZero() {
			t.Errorf("line %d does not know that it is deleted", n)
		}
	}
	if err := c.line("stderr", 10, 1, plain); err == nil {
		t.Error("a removed container wrote a line")
	}
}

func TestPartsAreOneLine(t *testing.T) {
	c := testContainer(t)
	if err := c.interleaved(200, 4, 2, nil); err != nil {
		t.Fatal(err)
	}
	var joined [2]string
	names, err := filepath.Glob(c.path + "*")
	if err != nil || len(names) != 2 {
		t.Fatalf("%v: %v", names, err)
	}
	for _, name := range []string{names[1], names[0]} { // the rotated one first
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(text)) {
			f := strings.SplitN(strings.TrimSuffix(l, "\n"), " ", 4)
			if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
				t.Error(err)
			}
			i := 0
			if f[1] == "stderr" {
				i = 1
			}
			joined[i] += f[3]
			if f[2] == "F" {
				h, rest, ok := parse([]byte(joined[i]))
				if whole, _ := h.whole(rest); !ok || !whole {
					t.Errorf("%s: %q", f[1], joined[i])
				}
			}
		}
	}
	for _, s := range c.streams {
		if b := s.lines[0].bytes; b < 200+4*40 {
			t.Errorf("stream %d: %d bytes counted", s.id, b)
		}
	}
}
