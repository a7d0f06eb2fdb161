// Package house tests the repository itself: that its documents name what
// exists, and that what exists is in its documents.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// TestArchitectureNamesWhatExists: each stop of the walks in ARCHITECTURE.md is
// `file.go: Symbol`, and the symbol is declared in that file.
func TestArchitectureNamesWhatExists(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	stops := regexp.MustCompile("`([a-z0-9/_.-]+\\.go): ([A-Za-z.]+)`").FindAllStringSubmatch(string(text), -1)
	if len(stops) < 25 {
		t.Fatalf("only %d stops found: has the form of the walks changed?", len(stops))
	}
	declared := map[string]map[string]bool{}
	for _, s := range stops {
		file, symbol := s[1], s[2]
		if declared[file] == nil {
			declared[file] = symbols(t, filepath.Join(root, file))
		}
		if !declared[file][symbol] {
			t.Errorf("ARCHITECTURE.md says %s: %s, which is not declared there", file, symbol)
		}
	}
}

func symbols(t *testing.T, file string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Errorf("ARCHITECTURE.md names %s: %v", file, err)
		return out
	}
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			name := d.Name.Name
			if d.Recv != nil {
				name = receiver(d.Recv.List[0].Type) + "." + name
			}
			out[name] = true
		case *ast.GenDecl:
			for _, s := range d.Specs {
				if ts, ok := s.(*ast.TypeSpec); ok {
					out[ts.Name.Name] = true
				}
			}
		}
	}
	return out
}

func receiver(e ast.Expr) string {
	if star, ok := e.(*ast.StarExpr); ok {
		e = star.X
	}
	if id, ok := e.(*ast.Ident); ok {
		return id.Name
	}
	return "?"
}

// sources calls f with every Go file of the module that is not a test.
func sources(t *testing.T, f func(path string, file *ast.File)) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && rel != "." || rel == "bin" || rel == "tools" || rel == "depskeep") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		f(rel, file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestNoPackageIsABucket: a package is named for what it knows.
func TestNoPackageIsABucket(t *testing.T) {
	sources(t, func(path string, _ *ast.File) {
		for part := range strings.SplitSeq(filepath.Dir(path), "/") {
			if slices.Contains([]string{"util", "utils", "common", "helpers", "types", "manager", "pkg", "cmd"}, part) {
				t.Errorf("%s: a folder named %s says nothing", path, part)
			}
		}
	})
}

// TestDocumentsNameFilesThatExist: relative links of the Markdown files lead
// somewhere.
func TestDocumentsNameFilesThatExist(t *testing.T) {
	for _, doc := range []string{"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"} {
		text, err := os.ReadFile(filepath.Join(root, doc))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range regexp.MustCompile(`\]\(([^)#:]+)\)`).FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(root, m[1])); err != nil {
				t.Errorf("%s links to %s: %v", doc, m[1], err)
			}
		}
	}
}
