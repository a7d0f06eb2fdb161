package elasticsearch

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/jsontext"
)

// appendValue appends a value of an attribute. level is how deep in objects it
// lies; an object below maxLevel becomes text, since Elasticsearch refuses
// documents that are nested deeper. It fails for types that JSON does not have.
func appendValue(b []byte, v any, level int) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return append(b, "null"...), nil
	case string:
		return jsontext.AppendString(b, v), nil
	case bool:
		return strconv.AppendBool(b, v), nil
	case float64:
		return jsontext.AppendFloat(b, v), nil
	case int64:
		return strconv.AppendInt(b, v, 10), nil
	case int:
		return strconv.AppendInt(b, int64(v), 10), nil
	case map[string]any:
		if level >= maxLevel {
			return appendAsText(b, v)
		}
		return appendObject(b, v, level)
	case []any:
		return appendList(b, v, level)
	}
	text, err := json.Marshal(v)
	if err != nil {
		return b, fmt.Errorf("a value of type %T: %w", v, err)
	}
	return append(b, text...), nil
}

func appendObject(b []byte, m map[string]any, level int) ([]byte, error) {
	names := make([]string, 0, len(m))
	dedot := false
	for k := range m {
		names = append(names, k)
		dedot = dedot || clean(k) != k
		for p := range parents(k) {
			if v, ok := m[p]; ok && !holdsObjects(v) {
				dedot = true
			}
		}
	}
	slices.Sort(names)
	var renamed []string
	b = append(b, '{')
	for i, k := range names {
		if i > 0 {
			b = append(b, ',')
		}
		name := k
		if dedot {
			name = underscored(k)
		}
		if name != k {
			for _, taken := m[name]; taken || slices.Contains(renamed, name); _, taken = m[name] {
				name += "_"
			}
			renamed = append(renamed, name)
		}
		b = append(jsontext.AppendString(b, name), ':')
		var err error
		if b, err = appendValue(b, m[k], level+1+strings.Count(name, ".")); err != nil {
			return b, err
		}
	}
	return append(b, '}'), nil
}

// appendList writes the objects of a list as text where it holds other things
// too: no mapping takes both.
func appendList(b []byte, list []any, level int) ([]byte, error) {
	objects, others := 0, 0
	for _, v := range list {
		switch v.(type) {
		case nil:
		case map[string]any:
			objects++
		default:
			others++
		}
	}
	b = append(b, '[')
	for i, v := range list {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if m, ok := v.(map[string]any); ok && objects > 0 && others > 0 {
			b, err = appendAsText(b, m)
		} else {
			b, err = appendValue(b, v, level)
		}
		if err != nil {
			return b, err
		}
	}
	return append(b, ']'), nil
}

// appendAsText appends an object as a string that holds its JSON.
func appendAsText(b []byte, m map[string]any) ([]byte, error) {
	text, err := json.Marshal(m)
	if err != nil {
		return b, fmt.Errorf("an object: %w", err)
	}
	return jsontext.AppendString(b, string(text)), nil
}

// holdsObjects reports whether a value may stand beside values whose dotted names
// begin with its own.
func holdsObjects(v any) bool {
	switch v := v.(type) {
	case nil, map[string]any:
		return true
	case []any:
		for _, x := range v {
			if !holdsObjects(x) {
				return false
			}
		}
		return true
	}
	return false
}
