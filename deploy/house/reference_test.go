package house

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/token"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/golden"
)

// entry is a line of docs/reference.md.
type entry struct{ program, name, text string }

// TestReferenceIsComplete: docs/reference.md holds every flag, metric and
// annotation that the code defines, in the words of the code.
func TestReferenceIsComplete(t *testing.T) {
	var flags, metrics, annotations []entry
	sources(t, func(path string, file *ast.File) {
		program, _, _ := strings.Cut(path, "/")
		switch {
		case program == "program":
			program = "all but outrigger"
		case strings.HasPrefix(path, "sidecar/netinit/"):
			program = "netinit"
		case strings.HasPrefix(path, "sidecar/cni/"):
			program = "outrigger-cni"
		}
		if program == "deploy" || program == "golden" { // what only tests have
			return
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if e, ok := flagOf(n); ok {
					e.program = program
					flags = append(flags, e)
				}
				if e, ok := metricOf(n.Args); ok {
					e.program = program
					metrics = append(metrics, e)
				}
			case *ast.CompositeLit:
				if e, ok := metricOf(fieldsOf(n)); ok {
					e.program = program
					metrics = append(metrics, e)
				}
			case *ast.ValueSpec:
				for i, v := range n.Values {
					if s, ok := literal(v); ok && regexp.MustCompile(`^outrigger\.dev/[a-z-]+$`).MatchString(s) && i < len(n.Names) {
						annotations = append(annotations, entry{program, s, comment(n)})
					}
				}
			}
			return true
		})
	})
	if len(flags) < 30 || len(metrics) < 30 {
		t.Fatalf("only %d flags and %d metrics found: are they defined in another way now?", len(flags), len(metrics))
	}
	var b strings.Builder
	b.WriteString("# Reference\n\nGenerated from the code by `make golden`: do not edit.\n")
	section(&b, "Flags", "flag", "--", flags)
	section(&b, "Metrics", "metric", "", metrics)
	section(&b, "Labels and annotations", "name", "", annotations)
	golden.File(t, filepath.Join(root, "docs", "reference.md"), b.String())
}

func section(b *strings.Builder, title, what, prefix string, es []entry) {
	fmt.Fprintf(b, "\n## %s\n\n| program | %s | |\n|---|---|---|\n", title, what)
	slices.SortFunc(es, func(x, y entry) int { return cmp.Or(cmp.Compare(x.program, y.program), cmp.Compare(x.name, y.name)) })
	es = slices.Compact(es)
	for _, e := range es {
		fmt.Fprintf(b, "| %s | `%s%s` | %s |\n", e.program, prefix, e.name, strings.ReplaceAll(strings.TrimSpace(e.text), "|", `\|`))
	}
}

// flagOf recognises the definitions of package flag and of pflag: the name, or
// the name and a one-letter shorthand, then a default, then the usage.
func flagOf(c *ast.CallExpr) (entry, bool) {
	sel, ok := c.Fun.(*ast.SelectorExpr)
	if !ok || !regexp.MustCompile(`^(String|Bool|Int|Int64|Uint|Float64|Duration|Text|Func|BoolFunc|StringArray|StringSlice)(Var)?P?$`).MatchString(sel.Sel.Name) {
		return entry{}, false
	}
	var words []string
	for _, a := range c.Args {
		words = append(words, texts(a))
	}
	i := slices.IndexFunc(words, func(w string) bool { return regexp.MustCompile(`^[a-z][a-z-]+$`).MatchString(w) })
	if i < 0 || i > 1 || len(words) < 3 {
		if sel.Sel.Name != "Func" || len(words) < 2 || i != 0 {
			return entry{}, false
		}
		return entry{name: words[0], text: words[1]}, words[1] != ""
	}
	usage := words[len(words)-1]
	if sel.Sel.Name == "Func" {
		usage = words[1]
	}
	return entry{name: words[i], text: usage}, usage != ""
}

// metricOf recognises a metric by its name and takes the text behind it for its
// help.
func metricOf(args []ast.Expr) (entry, bool) {
	for i, a := range args {
		name, ok := literal(a)
		if !ok || !regexp.MustCompile(`^(outrigger|node|scrape)_[a-z0-9_]+$`).MatchString(name) && name != "up" {
			continue
		}
		for _, next := range args[i+1:] {
			if help := texts(next); strings.Contains(help, " ") {
				return entry{name: name, text: help}, true
			}
		}
	}
	return entry{}, false
}

func fieldsOf(c *ast.CompositeLit) []ast.Expr {
	var out []ast.Expr
	for _, e := range c.Elts {
		if kv, ok := e.(*ast.KeyValueExpr); ok {
			if k, ok := kv.Key.(*ast.Ident); ok && (k.Name == "Name" || k.Name == "Help") {
				out = append(out, kv.Value)
			}
			continue
		}
		out = append(out, e)
	}
	return out
}

func literal(e ast.Expr) (string, bool) {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(l.Value)
	return s, err == nil
}

// texts joins the literals of a concatenation; what is computed shows as "...".
func texts(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, _ := literal(e)
		return s
	case *ast.BinaryExpr:
		return texts(e.X) + texts(e.Y)
	case *ast.CallExpr, *ast.Ident, *ast.SelectorExpr:
		return ""
	}
	return ""
}

func comment(v *ast.ValueSpec) string {
	for _, g := range []*ast.CommentGroup{v.Doc, v.Comment} {
		if g != nil {
			return strings.Join(strings.Fields(g.Text()), " ")
		}
	}
	return ""
}
