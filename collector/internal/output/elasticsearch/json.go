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

// appendList writes all of a list as text where it holds values of several kinds:
// no mapping that a list makes takes them.
func appendList(b []byte, list []any, level int) ([]byte, error) {
	kinds := kindsOf(list)
	mixed := kinds&(kinds-1) != 0
	b = append(b, '[')
	for i, v := range list {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if _, text := v.(string); mixed && v != nil && !text {
			b, err = appendAsText(b, v)
		} else {
			b, err = appendValue(b, v, level)
		}
		if err != nil {
			return b, err
		}
	}
	return append(b, ']'), nil
}

// kindsOf returns a bit for each kind of value in a list, and in the lists in it.
func kindsOf(list []any) (kinds uint8) {
	for _, v := range list {
		switch v := v.(type) {
		case nil:
		case string:
			kinds |= 1
		case bool:
			kinds |= 2
		case map[string]any:
			kinds |= 4
		case []any:
			kinds |= kindsOf(v)
		default: // numbers
			kinds |= 8
		}
	}
	return kinds
}

// appendAsText appends a value as a string that holds its JSON.
func appendAsText(b []byte, v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil { // a NaN somewhere in it, or a type that JSON does not have
		if text, err = appendValue(nil, v, 0); err != nil {
			return b, err
		}
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
