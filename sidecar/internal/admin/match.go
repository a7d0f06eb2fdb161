package admin

import (
	"strings"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

// matchText is a match as one line for people.
func matchText(m *route.Match) string {
	var parts []string
	add := func(what, value string) {
		if value != "" {
			parts = append(parts, what+" "+value)
		}
	}
	add("method", m.Method)
	add("path", m.Path)
	add("prefix", m.Prefix)
	if m.PathRegex != nil {
		add("path ~", m.PathRegex.String())
	}
	values := func(what string, vs []route.Value) {
		for _, v := range vs {
			if v.Regex != nil {
				add(what, v.Name+" ~ "+v.Regex.String())
			} else {
				add(what, v.Name+" = "+v.Exact)
			}
		}
	}
	values("header", m.Headers)
	values("query", m.Query)
	if len(parts) == 0 {
		return "all"
	}
	return strings.Join(parts, ", ")
}
