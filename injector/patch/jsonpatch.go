package patch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// operation of RFC 6902. Only add, remove and move are used: add replaces a
// member that is there (section 4.1), so it holds whether or not the other side
// writes out an empty one.
type operation struct {
	Op    string          `json:"op"`
	From  string          `json:"from,omitempty"`
	Path  string          `json:"path"`
	Value json.RawMessage `json:"value,omitempty"`
}

// maxAlign bounds the work to align two arrays: beyond this product of their
// differing lengths the elements are replaced one by one.
const maxAlign = 1 << 20

// JSONPatch returns the RFC 6902 patch that makes patched of original, "[]"
// where they are equal. It is precise: arrays of named objects are aligned by
// their names, others by their longest common subsequence, so that what is
// inserted costs one operation and no neighbour is touched.
//
// Compare like with like. A pod as the API server sent it may hold fields that
// our types do not know; give the same Go type's encoding of both, and the patch
// leaves those fields alone.
func JSONPatch(original, patched []byte) ([]byte, error) {
	a, err := decodeJSON(original)
	if err != nil {
		return nil, fmt.Errorf("original: %w", err)
	}
	b, err := decodeJSON(patched)
	if err != nil {
		return nil, fmt.Errorf("patched: %w", err)
	}
	ops := []operation{}
	if err := diff(&ops, "", a, b); err != nil {
		return nil, err
	}
	return json.Marshal(ops)
}

func decodeJSON(data []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber() // int64 survives
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("there is more after the first value")
	}
	return v, nil
}

func add(ops *[]operation, path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	*ops = append(*ops, operation{Op: "add", Path: path, Value: raw})
	return nil
}

func diff(ops *[]operation, path string, a, b any) error {
	if reflect.DeepEqual(a, b) {
		return nil
	}
	switch a := a.(type) {
	case map[string]any:
		if b, ok := b.(map[string]any); ok {
			return diffObjects(ops, path, a, b)
		}
	case []any:
		if b, ok := b.([]any); ok {
			return diffArrays(ops, path, a, b)
		}
	}
	return add(ops, path, b)
}

func diffObjects(ops *[]operation, path string, a, b map[string]any) error {
	for _, k := range slices.Sorted(maps.Keys(a)) {
		if _, stays := b[k]; !stays {
			*ops = append(*ops, operation{Op: "remove", Path: path + "/" + escape(k)})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		p := path + "/" + escape(k)
		old, there := a[k]
		if !there {
			if err := add(ops, p, b[k]); err != nil {
				return err
			}
			continue
		}
		if err := diff(ops, p, old, b[k]); err != nil {
			return err
		}
	}
	return nil
}

func diffArrays(ops *[]operation, path string, a, b []any) error {
	if names, ok := named(a); ok {
		if wanted, ok := named(b); ok {
			return diffNamed(ops, path, a, b, names, wanted)
		}
	}
	start := 0
	for start < len(a) && start < len(b) && reflect.DeepEqual(a[start], b[start]) {
		start++
	}
	end := 0
	for end < len(a)-start && end < len(b)-start && reflect.DeepEqual(a[len(a)-1-end], b[len(b)-1-end]) {
		end++
	}
	a, b = a[start:len(a)-end], b[start:len(b)-end]
	at := start // index in the array as it is patched so far
	i, j := 0, 0
	for _, pair := range append(align(a, b), [2]int{len(a), len(b)}) {
		for ; i < pair[0]; i++ {
			*ops = append(*ops, operation{Op: "remove", Path: path + "/" + strconv.Itoa(at)})
		}
		for ; j < pair[1]; j++ {
			if err := add(ops, path+"/"+strconv.Itoa(at), b[j]); err != nil {
				return err
			}
			at++
		}
		i, j, at = i+1, j+1, at+1 // the pair itself stays
	}
	return nil
}

// named returns the names of an array's elements by their index, where all are
// objects with names that differ.
func named(list []any) (names []string, ok bool) {
	seen := make(map[string]bool, len(list))
	for _, v := range list {
		o, _ := v.(map[string]any)
		name, _ := o["name"].(string)
		if name == "" || seen[name] {
			return nil, false
		}
		seen[name] = true
		names = append(names, name)
	}
	return names, true
}

// diffNamed moves and patches what stays, whatever fields of it we do not know.
func diffNamed(ops *[]operation, path string, a, b []any, names, wanted []string) error {
	a, names = slices.Clone(a), slices.Clone(names) // as they are patched so far
	stays := make(map[string]bool, len(wanted))
	for _, name := range wanted {
		stays[name] = true
	}
	for i := len(a) - 1; i >= 0; i-- {
		if !stays[names[i]] {
			*ops = append(*ops, operation{Op: "remove", Path: path + "/" + strconv.Itoa(i)})
			a, names = slices.Delete(a, i, i+1), slices.Delete(names, i, i+1)
		}
	}
	for j, name := range wanted {
		to := path + "/" + strconv.Itoa(j)
		k := slices.Index(names, name)
		if k < 0 {
			if err := add(ops, to, b[j]); err != nil {
				return err
			}
			a, names = slices.Insert(a, j, b[j]), slices.Insert(names, j, name)
			continue
		}
		if k != j {
			*ops = append(*ops, operation{Op: "move", From: path + "/" + strconv.Itoa(k), Path: to})
			v := a[k]
			a, names = slices.Insert(slices.Delete(a, k, k+1), j, v), slices.Insert(slices.Delete(names, k, k+1), j, name)
		}
		if err := diff(ops, to, a[j], b[j]); err != nil {
			return err
		}
	}
	return nil
}

// align returns the index pairs of a longest common subsequence.
func align(a, b []any) [][2]int {
	if len(a)*len(b) > maxAlign || len(a) == 0 || len(b) == 0 {
		return nil
	}
	n, m := len(a), len(b)
	best := make([]int, (n+1)*(m+1))
	at := func(i, j int) *int { return &best[i*(m+1)+j] }
	for i := n - 1; i >= 0; i-- {
		for j := m - 1; j >= 0; j-- {
			if reflect.DeepEqual(a[i], b[j]) {
				*at(i, j) = *at(i+1, j+1) + 1
			} else {
				*at(i, j) = max(*at(i+1, j), *at(i, j+1))
			}
		}
	}
	var pairs [][2]int
	for i, j := 0, 0; i < n && j < m; {
		switch {
		case reflect.DeepEqual(a[i], b[j]):
			pairs = append(pairs, [2]int{i, j})
			i, j = i+1, j+1
		case *at(i+1, j) >= *at(i, j+1):
			i++
		default:
			j++
		}
	}
	return pairs
}

// escape writes a member's name as a JSON Pointer token (RFC 6901, section 3).
func escape(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "~", "~0"), "/", "~1")
}

func unescape(s string) string {
	return strings.ReplaceAll(strings.ReplaceAll(s, "~1", "/"), "~0", "~")
}

// apply applies a patch that JSONPatch made to a document that may hold more
// than the one it was made of. It returns the changed document.
func apply(doc any, patch []byte) (any, error) {
	var ops []operation
	if err := json.Unmarshal(patch, &ops); err != nil {
		return nil, err
	}
	for _, op := range ops {
		var value any
		var err error
		switch op.Op {
		case "add":
			if value, err = decodeJSON(op.Value); err != nil {
				return nil, err
			}
		case "move":
			if value, err = at(doc, strings.Split(op.From, "/")[1:]); err != nil {
				return nil, fmt.Errorf("move %s: %w", op.From, err)
			}
			if doc, err = applyAt(doc, strings.Split(op.From, "/")[1:], "remove", nil); err != nil {
				return nil, fmt.Errorf("move %s: %w", op.From, err)
			}
			op.Op = "add"
		}
		if op.Path == "" {
			doc = value
			continue
		}
		if doc, err = applyAt(doc, strings.Split(op.Path[1:], "/"), op.Op, value); err != nil {
			return nil, fmt.Errorf("%s %s: %w", op.Op, op.Path, err)
		}
	}
	return doc, nil
}

// at is the value at a path.
func at(doc any, path []string) (any, error) {
	for _, token := range path {
		switch d := doc.(type) {
		case map[string]any:
			doc = d[unescape(token)]
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(d) {
				return nil, fmt.Errorf("%q is no index of an array of %d", token, len(d))
			}
			doc = d[i]
		default:
			return nil, fmt.Errorf("%q is in neither an object nor an array", token)
		}
	}
	return doc, nil
}

func applyAt(doc any, path []string, op string, value any) (any, error) {
	key, last := unescape(path[0]), len(path) == 1
	switch d := doc.(type) {
	case map[string]any:
		switch {
		case !last:
			child := d[key]
			if child == nil {
				child = map[string]any{} // our types write out an empty object that the document leaves out
			}
			child, err := applyAt(child, path[1:], op, value)
			d[key] = child
			return d, err
		case op == "add":
			d[key] = value
		default:
			delete(d, key)
		}
		return d, nil
	case []any:
		i, err := strconv.Atoi(key)
		if err != nil || i < 0 || i > len(d) || i == len(d) && (!last || op != "add") {
			return nil, fmt.Errorf("%q is no index of an array of %d", key, len(d))
		}
		switch {
		case !last:
			d[i], err = applyAt(d[i], path[1:], op, value)
			return d, err
		case op == "add":
			return slices.Insert(d, i, value), nil
		default:
			return slices.Delete(d, i, i+1), nil
		}
	default:
		return nil, fmt.Errorf("%q is in neither an object nor an array", key)
	}
}
