package manifests_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/manifests"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/translate"
	"github.com/outrigger-mesh/outrigger/golden"
)

// TestGolden reads the files under input/ of each testdata/*.txtar and compares
// the objects, by kind and name with their place, and the problems.
func TestGolden(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		dir := t.TempDir()
		for _, f := range c.Inputs("input/") {
			write(t, filepath.Join(dir, f.Name), string(f.Data))
		}
		objects, problems := newSource(dir).Load()
		c.Want("want/objects", strings.Join(names(objects), ""))
		c.Want("want/problems", strings.Join(lines(problems), ""))
	})
}

func newSource(dir string) *manifests.Source {
	return manifests.New(dir, slog.New(slog.DiscardHandler))
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// names lists the objects in the order in which they were read.
func names(o translate.Objects) []string {
	var out []string
	out = appendNames(out, "Namespace", o.Namespaces)
	out = appendNames(out, "Service", o.Services)
	out = appendNames(out, "Pod", o.Pods)
	out = appendNames(out, "EndpointSlice", o.EndpointSlices)
	out = appendNames(out, "HTTPRoute", o.HTTPRoutes)
	out = appendNames(out, "GRPCRoute", o.GRPCRoutes)
	out = appendNames(out, "TLSRoute", o.TLSRoutes)
	out = appendNames(out, "ReferenceGrant", o.ReferenceGrants)
	out = appendNames(out, "Workload", o.Workloads)
	out = appendNames(out, "CircuitBreaker", o.CircuitBreakers)
	out = appendNames(out, "RetryPolicy", o.RetryPolicies)
	return appendNames(out, "AuthorizationPolicy", o.AuthorizationPolicies)
}

func appendNames[P metav1.Object](out []string, kind string, in []P) []string {
	for _, o := range in {
		out = append(out, fmt.Sprintf("%s %s/%s %s\n", kind, o.GetNamespace(), o.GetName(), o.GetAnnotations()[translate.SourceAnnotation]))
	}
	return out
}

func lines(ps []translate.Problem) []string {
	var out []string
	for _, p := range ps {
		out = append(out, fmt.Sprintf("%s [%s]\n", p, p.Reason))
	}
	return out
}

// service is a file with one Service that has one port.
func service(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: shop}\nspec: {ports: [{port: %d}]}\n", name, port)
}

// expect loads and compares the Services, as name:port, and the problems, each
// by a part of it.
func expect(t *testing.T, s *manifests.Source, services string, problems ...string) {
	t.Helper()
	o, ps := s.Load()
	var got []string
	for _, svc := range o.Services {
		got = append(got, fmt.Sprintf("%s:%d", svc.Name, svc.Spec.Ports[0].Port))
	}
	if g := strings.Join(got, " "); g != services {
		t.Errorf("services: got %q, want %q", g, services)
	}
	if len(ps) != len(problems) {
		t.Errorf("problems: got %d, want %d:\n%s", len(ps), len(problems), strings.Join(lines(ps), ""))
		return
	}
	for i, want := range problems {
		if got := ps[i].String(); !strings.Contains(got, want) {
			t.Errorf("problem %d: got %q, want something with %q", i, got, want)
		}
	}
}

func TestBrokenFileKeepsItsLastGoodVersion(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	s := newSource(dir)
	write(t, path, service("a", 1)+"---\n"+service("b", 1))
	expect(t, s, "a:1 b:1")

	// A file is taken or left as a whole: a:2 has to wait as well.
	write(t, path, service("a", 2)+"---\n"+strings.Replace(service("b", 2), "ports: [", "ports: [[", 1))
	expect(t, s, "a:1 b:1", "File a.yaml:9: is not YAML: did not find expected ',' or ']'; the last good version stays in force")
	expect(t, s, "a:1 b:1", "stays in force")

	write(t, path, service("a", 3)+"---\n"+strings.Replace(service("b", 3), "ports", "prots", 1))
	expect(t, s, "a:1 b:1", "Service shop/b (a.yaml:9): spec.prots: unknown field; did you mean ports?; the last good version stays in force")

	// An editor that truncates before it writes does not delete the objects.
	write(t, path, "")
	expect(t, s, "a:1 b:1", "File a.yaml: is empty; delete the file to remove its objects; the last good version stays in force")

	// A kind that is not ours does not hold the file up.
	write(t, path, service("a", 4)+"---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n")
	expect(t, s, "a:4", "ConfigMap default/c (a.yaml:6): kind: ConfigMap (v1) is not supported and ignored")

	// A kind of our own group that does not exist would switch off a policy.
	write(t, path, service("a", 5)+"---\n{apiVersion: outrigger.dev/v1alpha1, kind: CircuitBraker, metadata: {name: c}}\n")
	expect(t, s, "a:4", "the last good version stays in force")

	write(t, path, "# nothing left\n")
	expect(t, s, "")
}

func TestFileThatWasNeverGoodGivesWhatCanBeRead(t *testing.T) {
	dir := t.TempDir()
	s := newSource(dir)
	broken := "---\nkind: [\n---\n"
	write(t, filepath.Join(dir, "a.yaml"), service("a", 1)+broken+service("b", 1))
	expect(t, s, "a:1 b:1", "is not YAML")
	write(t, filepath.Join(dir, "a.yaml"), service("a", 2)+broken)
	expect(t, s, "a:2", "is not YAML")
}

func TestDeletion(t *testing.T) {
	dir := t.TempDir()
	s := newSource(dir)
	write(t, filepath.Join(dir, "a.yaml"), service("a", 1))
	write(t, filepath.Join(dir, "sub", "b.yml"), service("b", 1))
	write(t, filepath.Join(dir, "sub", "c.json"), `{"apiVersion":"v1","kind":"Service","metadata":{"name":"c"},"spec":{"ports":[{"port":1}]}}`)
	expect(t, s, "a:1 b:1 c:1")
	remove(t, filepath.Join(dir, "a.yaml"))
	expect(t, s, "b:1 c:1")
	remove(t, filepath.Join(dir, "sub"))
	expect(t, s, "")
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func TestFolderThatGoesAwayKeepsWhatWasRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "mesh")
	s := newSource(dir)
	if err := s.Check(); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a missing folder: got error %v, want one that names %s", err, dir)
	}
	expect(t, s, "", "cannot be listed")

	write(t, filepath.Join(dir, "a.yaml"), service("a", 1))
	if err := s.Check(); err != nil {
		t.Error(err)
	}
	expect(t, s, "a:1")
	if err := os.Rename(dir, dir+"-away"); err != nil {
		t.Fatal(err)
	}
	expect(t, s, "a:1", dir+": cannot be listed: no such file or directory; what was read from it before stays in force")
	if err := os.Mkdir(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	expect(t, s, "")
}

func TestIgnoredFiles(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".hidden.yaml", ".git/a.yaml", "a.yaml~", "#a.yaml#", ".a.yaml.swp", "~a.yaml", "README.md", "a.yaml.bak", "a.yaml.tmp"} {
		write(t, filepath.Join(dir, name), service("ignored", 1))
	}
	write(t, filepath.Join(dir, "UPPER.YAML"), service("upper", 1))
	expect(t, newSource(dir), "upper:1")
}

func TestSymbolicLinks(t *testing.T) {
	// A mounted ConfigMap: ..data leads to the version in force, and is swapped
	// by a rename.
	dir := t.TempDir()
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(dir, "..2026_01", "a.yaml"), service("a", 1))
	write(t, filepath.Join(dir, "..2026_02", "a.yaml"), service("a", 2))
	link("..2026_01", "..data")
	link("..data/a.yaml", "a.yaml")
	s := newSource(dir)
	expect(t, s, "a:1")

	link("..2026_02", "..data_tmp")
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	expect(t, s, "a:2")

	// A link back up ends there; one to nowhere is reported.
	link(".", "loop")
	expect(t, s, "a:2")
	link("nowhere", "b.yaml")
	expect(t, s, "a:2", "File b.yaml: cannot be read: no such file or directory")
}

func TestLimits(t *testing.T) {
	dir := t.TempDir()
	s := newSource(dir)
	write(t, filepath.Join(dir, "big.yaml"), service("big", 1)+strings.Repeat("#", manifests.MaxFileSize))
	expect(t, s, "", "File big.yaml: cannot be read: larger than 4194304 bytes; split it")
	remove(t, filepath.Join(dir, "big.yaml"))

	for i := range manifests.MaxFiles + 1 {
		write(t, filepath.Join(dir, fmt.Sprintf("%05d.yaml", i)), "# empty\n")
	}
	expect(t, s, "", fmt.Sprintf("holds more than %d files", manifests.MaxFiles))
}

func TestUnchangedFilesKeepTheirObjects(t *testing.T) {
	dir := t.TempDir()
	s := newSource(dir)
	write(t, filepath.Join(dir, "a.yaml"), service("a", 1))
	write(t, filepath.Join(dir, "b.yaml"), service("b", 1))
	first, _ := s.Load()
	write(t, filepath.Join(dir, "b.yaml"), service("b", 2))
	second, _ := s.Load()
	if first.Services[0] != second.Services[0] {
		t.Error("a.yaml did not change and was parsed again")
	}
	if first.Services[1] == second.Services[1] {
		t.Error("b.yaml changed and was not parsed again")
	}
}
