package manifests

import (
	"bytes"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
)

// lineOf returns the line of the file on which the field is, or the first line
// of the document where it is not found. It looks for the keys of the path one
// after the other rather than parsing: a line that is near enough beats none.
func (d document) lineOf(field string) int {
	at, line := 0, d.line
	for _, k := range steps(field) {
		if k == "" {
			continue
		}
		i := findKey(d.text[at:], k)
		if i < 0 {
			break
		}
		line += bytes.Count(d.text[at:at+i], []byte("\n"))
		at += i
	}
	return line
}

// steps are the keys of a path; list indices are left out.
func steps(field string) []string {
	if field == "" {
		return nil
	}
	out := strings.Split(field, ".")
	for i, s := range out {
		out[i], _, _ = strings.Cut(s, "[")
	}
	return out
}

// findKey returns where k stands as the key of a map, in YAML or JSON, or -1.
func findKey(text []byte, k string) int {
	for at := 0; ; {
		i := bytes.Index(text[at:], []byte(k))
		if i < 0 {
			return -1
		}
		i += at
		rest := bytes.TrimLeft(text[i+len(k):], `"' `)
		before := byte('\n')
		if i > 0 {
			before = text[i-1]
		}
		if bytes.HasPrefix(rest, []byte(":")) && strings.IndexByte("\n \t\"'{,", before) >= 0 {
			return i
		}
		at = i + len(k)
	}
}

// items cuts the document of a list into those of its n items, each with the
// line it begins on. A list that is not written as one hyphen a line for each
// item, such as JSON, is not cut: all items have the whole.
func (d document) items(n int) []document {
	out := make([]document, n)
	for i := range out {
		out[i] = d
	}
	begin := findKey(d.text, "items")
	if begin < 0 {
		return out
	}
	var starts []int
	indent := -1
	at := begin
	for l := range bytes.Lines(d.text[begin:]) {
		content := bytes.TrimLeft(l, " ")
		if bytes.HasPrefix(content, []byte("- ")) {
			if indent < 0 {
				indent = len(l) - len(content)
			}
			if len(l)-len(content) == indent {
				starts = append(starts, at)
			}
		}
		at += len(l)
	}
	if len(starts) != n {
		return out
	}
	for i, start := range starts {
		end := len(d.text)
		if i+1 < n {
			end = starts[i+1]
		}
		out[i] = document{text: d.text[start:end], line: d.line + bytes.Count(d.text[:start], []byte("\n"))}
	}
	return out
}

var badDuration = regexp.MustCompile(`duration "?([^"]*)"?$`)

// badValue explains an error of a type that decodes itself, which names the
// value and not the field, and looks for the field that has the value.
func (d document) badValue(err error) (field, message string) {
	m := badDuration.FindStringSubmatch(err.Error())
	if m == nil {
		return "", err.Error()
	}
	message = fmt.Sprintf("%q is not a duration; write numbers with h, m, s or ms, as in 1m30s or 250ms", m[1])
	if m[1] == "" {
		return "", message
	}
	key := regexp.MustCompile(`([A-Za-z0-9]+)["']?\s*:\s*["']?` + regexp.QuoteMeta(m[1]) + `["']?\s*(?:[,}#\r\n]|$)`)
	if f := key.FindSubmatch(d.text); f != nil {
		field = string(f[1])
	}
	return field, message
}

// nearest returns the known field that is closest to an unknown one, or "".
func nearest(obj any, path string) string {
	keys := steps(path)
	if len(keys) == 0 {
		return ""
	}
	t := reflect.TypeOf(obj)
	for _, k := range keys[:len(keys)-1] {
		f, ok := fields(t)[k]
		if !ok {
			return ""
		}
		t = f
	}
	wrong := keys[len(keys)-1]
	best, bestDistance := "", 1+max(1, len(wrong)/3)
	names := fields(t)
	for _, name := range sortedKeys(names) {
		if strings.EqualFold(name, wrong) {
			return name
		}
		if d := distance(name, wrong); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	return best
}

func sortedKeys(m map[string]reflect.Type) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// fields are the JSON names of a struct's fields with their types, seen
// through pointers, lists and inlined structs.
func fields(t reflect.Type) map[string]reflect.Type {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
		t = t.Elem()
	}
	out := map[string]reflect.Type{}
	if t.Kind() != reflect.Struct {
		return out
	}
	for i := range t.NumField() {
		f := t.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && (name == "" || options == "inline"):
			for k, v := range fields(f.Type) {
				out[k] = v
			}
		case name != "" && name != "-":
			out[name] = f.Type
		}
	}
	return out
}

// distance is Levenshtein's, with neighbours that changed places counted once.
func distance(a, b string) int {
	rows := [3][]int{}
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
	}
	before, above, row := rows[0], rows[1], rows[2]
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		before, above, row = above, row, before
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			row[j] = min(above[j]+1, row[j-1]+1, above[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				row[j] = min(row[j], before[j-2]+1)
			}
		}
	}
	return row[len(b)]
}
