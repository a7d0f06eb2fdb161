package golden_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/golden"
)

// A golden test fails its own test, so each one here runs in a process of its
// own: TestUser, with the name of a use and the folder of its files.
const (
	useVariable    = "OUTRIGGER_GOLDEN_USE"
	folderVariable = "OUTRIGGER_GOLDEN_FOLDER"
)

// uses are what a user of the package writes.
var uses = map[string]func(t *testing.T, glob string){
	"cases": func(t *testing.T, glob string) {
		golden.Cases(t, glob, func(_ *testing.T, c *golden.Case) {
			sum := ""
			for _, f := range c.Inputs("input/") {
				sum += f.Name + ":" + string(f.Data)
			}
			c.Want("want/sum", sum)
			if more, ok := c.Lookup("more"); ok {
				c.Want("want/more", strings.ToUpper(more))
			}
			c.Want("want/in", strings.ToUpper(c.Input("input/in")))
		})
	},
	"a want read as an input": func(t *testing.T, glob string) {
		golden.Cases(t, glob, func(_ *testing.T, c *golden.Case) {
			c.Want("a", "x\n")
			c.Input("a")
		})
	},
	"an input written as a want": func(t *testing.T, glob string) {
		golden.Cases(t, glob, func(_ *testing.T, c *golden.Case) { c.Want("a", c.Input("a")+"more\n") })
	},
	"a want that begins a section": func(t *testing.T, glob string) {
		golden.Cases(t, glob, func(_ *testing.T, c *golden.Case) { c.Want("a", "-- b --\n") })
	},
	"pairs": func(t *testing.T, glob string) {
		golden.Pairs(t, glob, func(t *testing.T, name, in string) string {
			if name == "fatal" {
				t.Fatal("for another reason")
			}
			return name + " " + strings.ToUpper(in)
		})
	},
	"scripts": func(t *testing.T, glob string) {
		golden.Scripts(t, glob, func(t *testing.T, script string) string {
			if strings.Contains(script, "fatal") {
				t.Fatal("for another reason")
			}
			return strings.ToUpper(script)
		})
	},
	"file": func(t *testing.T, path string) { golden.File(t, path, "made\n") },
}

func TestUser(t *testing.T) {
	use, ok := uses[os.Getenv(useVariable)]
	if !ok {
		t.Skip("the other tests run this one")
	}
	use(t, os.Getenv(folderVariable))
}

// run is a run of go test with these arguments by a user whose one golden file,
// f.txt, is before, or missing: what the test says, and the file afterwards.
func run(t *testing.T, use, before string, args ...string) (output, after string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f.txt")
	if before != "" {
		if err := os.WriteFile(path, []byte(before), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-test.run=^TestUser$"}, args...)...)
	// The race detector sleeps for a second at every exit.
	c.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", useVariable+"="+use, folderVariable+"="+path)
	out, err := c.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if passed := strings.HasPrefix(string(out), "PASS\n"); passed != (err == nil) {
		t.Fatalf("%v:\n%s", err, out)
	}
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(out), string(b)
}

// checks returns three checks of one use: that a file passes, and that -update
// leaves it as it is; that it fails with want, and that -update makes it after;
// that it fails with want, and that -update fails too and leaves it as it is.
func checks(t *testing.T, use string) (passes func(file string), updates, fails func(file, want, after string)) {
	passes = func(file string) {
		t.Helper()
		for _, args := range [][]string{nil, {"-update"}} {
			out, after := run(t, use, file, args...)
			if !strings.HasPrefix(out, "PASS\n") {
				t.Errorf("%s: %q %v: %s", use, file, args, out)
			}
			if d := cmp.Diff(file, after); d != "" {
				t.Errorf("%s: %q %v became (-before +after):\n%s", use, file, args, d)
			}
		}
	}
	says := func(file, want string, args ...string) (after string) {
		t.Helper()
		out, after := run(t, use, file, args...)
		if strings.HasPrefix(out, "PASS\n") || !strings.Contains(out, want) {
			t.Errorf("%s: %q %v: want %q in\n%s", use, file, args, want, out)
		}
		return after
	}
	updates = func(file, want, after string) {
		t.Helper()
		if got := says(file, want); got != file {
			t.Errorf("%s: %q became %q without -update", use, file, got)
		}
		out, got := run(t, use, file, "-update")
		if !strings.HasPrefix(out, "PASS\n") {
			t.Errorf("%s: %q with -update: %s", use, file, out)
		}
		if d := cmp.Diff(after, got); d != "" {
			t.Errorf("%s: %q with -update (-want +got):\n%s", use, file, d)
		}
		passes(got)
	}
	fails = func(file, want, updateSays string) {
		t.Helper()
		for _, r := range []struct {
			want string
			args []string
		}{{want: want}, {want: updateSays, args: []string{"-update"}}} {
			if got := says(file, r.want, r.args...); got != file {
				t.Errorf("%s: %q %v became %q", use, file, r.args, got)
			}
		}
	}
	return passes, updates, fails
}

func TestCases(t *testing.T) {
	passes, updates, fails := checks(t, "cases")
	passes("Text.\n-- input/in --\nx\n-- want/sum --\nin:x\n-- want/in --\nX\n")
	passes("Any order.\n-- want/in --\nX\n-- want/more --\n-- want/sum --\nin:x\n-- more --\n-- input/in --\nx\n")

	updates("A value.\n-- want/in --\nY\n-- input/in --\nx\n-- want/sum --\nin:x\n", "want/in: -want +got",
		"A value.\n-- want/in --\nX\n-- input/in --\nx\n-- want/sum --\nin:x\n")
	updates("New wants go behind what was asked for before.\n-- input/in --\nx\n-- more --\ny\n", `no section "want/sum"; -update adds it`,
		"New wants go behind what was asked for before.\n-- input/in --\nx\n-- want/sum --\nin:x\n-- more --\ny\n-- want/more --\nY\n-- want/in --\nX\n")

	same := func(file, want string) { t.Helper(); fails(file, want, want) }
	same("-- input/in --\nx\n-- want/sum --\nin:x\n-- want/in --\nX\n", "does not say what it shows")
	same("Too much.\n-- input/in --\nx\n-- inputs --\n-- want/sum --\nin:x\n-- want/in --\nX\n", `nothing asked for section "inputs"`)
	same("Twice.\n-- input/in --\nx\n-- input/in --\nx\n-- want/sum --\nin:x\n", `two sections "input/in"`)
	same("Nothing.\n-- want/sum --\n", `no section "input/*"`)
	same("Too little.\n-- input/other --\nx\n-- want/sum --\nother:x\n", `no section "input/in"`)
	same("", "no golden files")

	_, _, fails = checks(t, "a want read as an input")
	same("Text.\n-- a --\nx\n", "is a want and cannot be an input")
	_, _, fails = checks(t, "an input written as a want")
	same("Text.\n-- a --\nx\n", "is read already")
	_, _, fails = checks(t, "a want that begins a section")
	fails("Text.\n-- a --\n", "-want +got", "cannot hold it")
}

func TestPairs(t *testing.T) {
	passes, updates, fails := checks(t, "pairs")
	passes("Text.\n-- a --\nx\n-- want --\na X\n-- b --\ny\n-- want --\nb Y\n")
	updates("Text.\n-- a --\nx\n-- b --\ny\n-- want --\nother\n", `no section "want" follows "a"`,
		"Text.\n-- a --\nx\n-- want --\na X\n-- b --\ny\n-- want --\nb Y\n")
	fails("-- a --\nx\n-- want --\na X\n", "does not say what it shows", "does not say what it shows")
	fails("Text.\n-- a --\nx\n-- want --\na X\n-- want --\n", `section 3, "want", does not follow an input`, "does not follow")
	fails("Text.\n-- a --\nx\n-- want --\n-- fatal --\nx\n-- want --\nkept\n", "a: -want +got", "for another reason")
	fails("An empty input leaves no newline.\n-- a --\n-- want --\na\n", "-want +got", "does not end with a newline")

	// A want whose subtest does not run stays.
	file := "Text.\n-- a --\nx\n-- want --\nold\n-- b --\ny\n-- want --\nold\n-- c --\nz\n"
	_, after := run(t, "pairs", file, "-update", "-test.run=^TestUser$/f/b")
	if d := cmp.Diff(strings.Replace(file, "y\n-- want --\nold", "y\n-- want --\nb Y", 1), after); d != "" {
		t.Errorf("with -run (-want +got):\n%s", d)
	}
}

func TestScripts(t *testing.T) {
	passes, updates, fails := checks(t, "scripts")
	passes("# a b\nc\n----\n# A B\nC\n")
	updates("# a b\nc\n----\n# A B\nD\n", "-want +got", "# a b\nc\n----\n# A B\nC\n")
	updates("# a b\nc", "no line \"----\"", "# a b\nc\n----\n# A B\nC\n")
	fails("c\n----\nC\n", "does not say what it shows", "does not say what it shows")
	fails("# \n----\n# \n", "does not say what it shows", "does not say what it shows")
	fails("# fatal\n----\n", "for another reason", "for another reason")
}

func TestFile(t *testing.T) {
	passes, updates, _ := checks(t, "file")
	passes("made\n")
	updates("else\n", "-want +got", "made\n")
	updates("", "-update writes it", "made\n")
}
