package xds

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"
)

// DumpedResource is a Resource for people: its content as JSON.
type DumpedResource struct {
	Name string `json:"name"`
	// Namespace whose nodes alone get it; empty for all.
	Namespace string          `json:"namespace,omitempty"`
	Version   string          `json:"version"`
	Resource  json.RawMessage `json:"resource"`
}

// Dump renders resources by name, in order.
func Dump(rs Resources) ([]DumpedResource, error) {
	out := make([]DumpedResource, 0, len(rs))
	for _, name := range slices.Sorted(maps.Keys(rs)) {
		r := rs[name]
		j, err := JSON(r)
		if err != nil {
			return nil, err
		}
		out = append(out, DumpedResource{Name: r.Name, Version: r.Version, Resource: j})
	}
	return out, nil
}

// Dump renders the whole set: type URL -> resources. Those of a namespace alone
// stand behind those that are shared.
func (s *Set) Dump() (map[string][]DumpedResource, error) {
	out := make(map[string][]DumpedResource, len(s.types))
	for t, rs := range s.types {
		d, err := Dump(rs)
		if err != nil {
			return nil, err
		}
		out[t] = d
	}
	for _, namespace := range slices.Sorted(maps.Keys(s.overlays)) {
		d, err := Dump(s.overlays[namespace])
		if err != nil {
			return nil, err
		}
		for i := range d {
			d[i].Namespace = namespace
		}
		out[RouteType] = append(out[RouteType], d...)
	}
	return out, nil
}

// JSON renders the content of a resource. Unlike protojson's own output, which
// varies its white space on purpose, equal resources give equal bytes.
func JSON(r *Resource) ([]byte, error) {
	m, err := r.Any.UnmarshalNew()
	if err != nil {
		return nil, fmt.Errorf("decode %s: %w", r.Name, err)
	}
	b, err := protojson.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", r.Name, err)
	}
	var v any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("render %s: %w", r.Name, err)
	}
	b, err = json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("render %s: %w", r.Name, err)
	}
	return b, nil
}
