package manifests

import (
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/control-plane/api/v1alpha1"
)

func TestSplit(t *testing.T) {
	f := func(in string, want ...string) {
		t.Helper()
		var got []string
		for _, d := range split([]byte(in)) {
			got = append(got, strings.Repeat(".", d.line)+strings.TrimSpace(string(d.text)))
		}
		if strings.Join(got, "|") != strings.Join(want, "|") {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	// Each document with as many dots before it as the line it begins on.
	f("")
	f("---\n---\n# only a comment\n---\n")
	f("a: 1\n", ".a: 1")
	f("a: 1\n---\nb: 2", ".a: 1", "...b: 2")
	f("# top\n\n---\n# more\na: 1\n...\n---\nb: 2\n", ".....a: 1", "........b: 2")
	f("a: 1\r\n---\r\nb: 2\r\n", ".a: 1", "...b: 2")
	f("--- {a: 1}\n--- # two\nb: 2\n", ".{a: 1}", "...b: 2")
	f("%YAML 1.2\n---\na: 1\n", "...a: 1")
	f("a: |\n  ---\n  x\n---x: 1\n", ".a: |\n  ---\n  x\n---x: 1")
}

func TestNearest(t *testing.T) {
	f := func(path, want string) {
		t.Helper()
		if got := nearest(&v1alpha1.CircuitBreaker{}, path); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	f("spec.trip.failureRati", "failureRatio")
	f("spec.trip.failureratio", "failureRatio")
	f("spec.targetRefs[0].sectonName", "sectionName")
	f("spec.targetRefs[0].nam", "name")
	f("metadata.nmae", "name")
	f("spce", "spec")
	f("spec.trip.completelyDifferent", "")
	f("spec.unknown.name", "")
	f("", "")
}

// FuzzParse reads anything as a file. It must come back, and every problem and
// object must have its place in the file.
func FuzzParse(f *testing.F) {
	f.Add("a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n---\n{apiVersion: v1, kind: List, items: [{kind: Service, apiVersion: v1}]}\n")
	f.Add("a.json", `{"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"name":"a"}}]} []`)
	f.Add("a.yaml", "apiVersion: outrigger.dev/v1alpha1\nkind: CircuitBreaker\nmetadata: {name: x}\nspec: {trip: {openFor: 10x}, limts: {}}\n")
	f.Add("a.yaml", "a: &a [*a, *a]\n...\n%YAML\n---\n\t- x")
	f.Fuzz(func(t *testing.T, name, content string) {
		p := parse(name, []byte(content))
		if len(p.problems) != len(p.blocking) {
			t.Errorf("%d problems, %d of them classified", len(p.problems), len(p.blocking))
		}
		last := strings.Count(content, "\n") + 1
		for _, pr := range p.problems {
			if pr.Reason == "" || pr.Message == "" {
				t.Errorf("a problem says too little: %#v", pr)
			}
		}
		for _, o := range p.objects {
			if o.id.name == "" || o.id.namespace == "" || o.source == "" {
				t.Errorf("an object without a name or place: %#v", o.id)
			}
		}
		for _, d := range split([]byte(content)) {
			if d.line < 1 || d.line > last {
				t.Errorf("a document begins on line %d of %d", d.line, last)
			}
		}
	})
}
