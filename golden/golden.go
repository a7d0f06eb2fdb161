// Package golden compares what a test makes with what a file of testdata says,
// and rewrites the file when the test runs with -update. It knows the forms of
// these files, which is all it knows: what is in their sections is the test's
// business.
//
//   - [Cases]: a txtar archive, a sentence on top that says what it shows, then
//     inputs and wants, each a section with a name of the test's choice.
//   - [Pairs]: a txtar archive whose every section is an input, followed by a
//     section "want".
//   - [Scripts]: a comment that says what happens, commands, "----", their trace.
//   - [File]: one file without inputs, all of it made by the test.
//
// A file says no more and no less than its test reads: a missing section and a
// section that nothing asked for are errors. With -update only wants change;
// sections keep their order, a new want goes behind all that was asked for before
// it, and a file whose test failed for another reason is left alone.
//
// Only tests call it. The flag -update is defined here, once for all of them.
package golden

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "rewrite the expectations in golden files")

const (
	wantName  = "want"   // of the second section of a pair
	separator = "----\n" // between a script and its trace
)

type role int

const (
	unread role = iota
	input
	want
)

type section struct {
	txtar.File
	role role
}

// Case is an archive under test. It is for the goroutine of its test only.
type Case struct {
	t        *testing.T
	path     string
	sections []section
	last     int // the furthest section asked for; a new want goes behind it
}

// Cases runs fn, as a subtest named after the file, for each archive that glob
// finds; that none is found is an error, as is an archive that does not begin
// with a sentence, or has two sections of one name. When fn returns, every
// section must have been asked for.
func Cases(t *testing.T, glob string, fn func(t *testing.T, c *Case)) {
	t.Helper()
	each(t, glob, func(t *testing.T, path, text string) {
		t.Helper()
		ar := parse(t, path, text)
		c := &Case{t: t, path: path, last: -1}
		for _, f := range ar.Files {
			if c.index(f.Name) >= 0 {
				t.Fatalf("%s has two sections %q", path, f.Name)
			}
			c.sections = append(c.sections, section{File: f})
		}
		fn(t, c)
		ar.Files = ar.Files[:0]
		for _, s := range c.sections {
			if s.role == unread {
				t.Errorf("%s: nothing asked for section %q: correct its name, or remove it", path, s.Name)
			}
			ar.Files = append(ar.Files, s.File)
		}
		rewrite(t, path, string(txtar.Format(ar)))
	})
}

// Input is the content of a section, which has to exist.
func (c *Case) Input(name string) string {
	c.t.Helper()
	text, ok := c.Lookup(name)
	if !ok {
		c.t.Fatalf("%s has no section %q", c.path, name)
	}
	return text
}

// Lookup is the content of a section that may be missing, and whether it is there.
func (c *Case) Lookup(name string) (string, bool) {
	c.t.Helper()
	i := c.index(name)
	if i < 0 {
		return "", false
	}
	return c.read(i), true
}

// Inputs are the sections whose names begin with prefix, in their order, with
// their names behind it. There has to be one.
func (c *Case) Inputs(prefix string) []txtar.File {
	c.t.Helper()
	var out []txtar.File
	for i := range c.sections {
		if name, ok := strings.CutPrefix(c.sections[i].Name, prefix); ok {
			out = append(out, txtar.File{Name: name, Data: []byte(c.read(i))})
		}
	}
	if len(out) == 0 {
		c.t.Fatalf("%s has no section %q", c.path, prefix+"*")
	}
	return out
}

// Want compares got with a section, which has to exist, and with -update makes
// it the section's content. It fails the test and lets it go on.
func (c *Case) Want(name, got string) {
	c.t.Helper()
	i := c.index(name)
	switch {
	case i >= 0 && c.sections[i].role != unread:
		c.t.Fatalf("%s: section %q is read already: a want has one value, and is no input", c.path, name)
	case i < 0 && !*update:
		c.t.Errorf("%s has no section %q; -update adds it:\n%s", c.path, name, got)
		return
	case i < 0:
		i = c.last + 1
		c.sections = slices.Insert(c.sections, i, section{File: txtar.File{Name: name}})
	}
	c.last, c.sections[i].role = max(c.last, i), want
	compare(c.t, c.path+": "+name, string(c.sections[i].Data), got)
	if *update {
		c.sections[i].Data = storable(c.t, name, got)
	}
}

func (c *Case) index(name string) int {
	return slices.IndexFunc(c.sections, func(s section) bool { return s.Name == name })
}

func (c *Case) read(i int) string {
	c.t.Helper()
	s := &c.sections[i]
	if s.role == want {
		c.t.Fatalf("%s: section %q is a want and cannot be an input", c.path, s.Name)
	}
	s.role, c.last = input, max(c.last, i)
	return string(s.Data)
}

// Pairs runs fn for each section that is an input of each archive that glob
// finds, as a subtest named after the file and then the section, and compares
// what fn returns with the section "want" that follows. fn must not call
// t.Parallel. The archive begins with a sentence.
func Pairs(t *testing.T, glob string, fn func(t *testing.T, name, input string) (want string)) {
	t.Helper()
	each(t, glob, func(t *testing.T, path, text string) {
		t.Helper()
		ar := parse(t, path, text)
		out := &txtar.Archive{Comment: ar.Comment}
		for rest := ar.Files; len(rest) > 0; {
			in := rest[0]
			rest = rest[1:]
			if in.Name == wantName {
				t.Fatalf("%s: section %d, %q, does not follow an input", path, len(ar.Files)-len(rest), wantName)
			}
			out.Files = append(out.Files, in)
			var have []txtar.File
			if len(rest) > 0 && rest[0].Name == wantName {
				have, rest = rest[:1], rest[1:]
			}
			t.Run(in.Name, func(t *testing.T) {
				got := fn(t, in.Name, string(in.Data))
				if len(have) == 0 && !*update {
					t.Errorf("%s: no section %q follows %q; -update adds it:\n%s", path, wantName, in.Name, got)
					return
				}
				if *update {
					have = []txtar.File{{Name: wantName, Data: storable(t, in.Name, got)}}
					return
				}
				compare(t, path+": "+in.Name, string(have[0].Data), got)
			})
			out.Files = append(out.Files, have...) // as it was, if -run left the subtest out
		}
		rewrite(t, path, string(txtar.Format(out)))
	})
}

// Scripts runs fn, as a subtest named after the file, with what stands before
// the line "----" of each file that glob finds, and compares the trace it
// returns with what stands behind. The first line is a comment: "#" and a
// sentence. fn reads the commands, and skips comments.
func Scripts(t *testing.T, glob string, fn func(t *testing.T, script string) (trace string)) {
	t.Helper()
	each(t, glob, func(t *testing.T, path, text string) {
		t.Helper()
		if first, _, _ := strings.Cut(text, "\n"); !strings.HasPrefix(first, "#") || strings.Trim(first, "# \t") == "" {
			t.Fatalf("%s does not say what it shows: begin it with # and a sentence", path)
		}
		script, trace, ok := strings.Cut(text, "\n"+separator)
		script = strings.TrimSuffix(script, "\n") + "\n"
		if !ok && !*update {
			t.Fatalf("%s has no line %q; -update adds it", path, strings.TrimSpace(separator))
		}
		got := fn(t, script)
		compare(t, path, trace, got)
		rewrite(t, path, script+separator+got)
	})
}

// File compares got with a whole file, or with -update makes it the file's
// content.
func File(t *testing.T, path, got string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !(*update && os.IsNotExist(err)) {
		t.Fatalf("%v; -update writes it", err)
	}
	compare(t, path, string(b), got)
	rewrite(t, path, got)
}

func each(t *testing.T, glob string, fn func(t *testing.T, path, text string)) {
	t.Helper()
	files, err := filepath.Glob(glob)
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files %s: %v", glob, err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), filepath.Ext(path)), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			fn(t, path, string(text))
		})
	}
}

func parse(t *testing.T, path, text string) *txtar.Archive {
	t.Helper()
	ar := txtar.Parse([]byte(text))
	if strings.TrimSpace(string(ar.Comment)) == "" {
		t.Fatalf("%s does not say what it shows: begin it with a sentence", path)
	}
	return ar
}

// compare leaves the comparison to a test without -update.
func compare(t *testing.T, what, want, got string) {
	t.Helper()
	if *update {
		return
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s: -want +got, and -update rewrites it:\n%s", what, d)
	}
}

// storable is got as a section's content, which an archive must give back as it
// is: it ends with a newline, and has no line that begins a section.
func storable(t *testing.T, name, got string) []byte {
	t.Helper()
	if back := txtar.Parse([]byte("-- x --\n" + got)); len(back.Files) != 1 || string(back.Files[0].Data) != got {
		t.Errorf("%s does not end with a newline, or has a line of the form -- name --; a golden file cannot hold it:\n%s", name, got)
	}
	return []byte(got)
}

// rewrite writes the file, with -update.
func rewrite(t *testing.T, path, text string) {
	t.Helper()
	if !*update || t.Failed() {
		return
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
