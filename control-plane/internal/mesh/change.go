package mesh

import (
	"cmp"
	"slices"
)

// Change says what of a Mesh is not as it was in the one before. Everything else
// is equal.
type Change struct {
	// Services that both have, whose ports differ in Endpoints and Identities only.
	Services []Name
	// Instances that are new, gone or different.
	Instances []Name
}

// Empty says that nothing differs.
func (c Change) Empty() bool { return len(c.Services)+len(c.Instances) == 0 }

// Name of a Service or of an Instance.
type Name struct{ Namespace, Name string }

// Service returns the one of a name; nil where there is none.
func (m *Mesh) Service(n Name) *Service {
	i, ok := slices.BinarySearchFunc(m.Services, n, func(s Service, n Name) int { return compare(s.Namespace, s.Name, n) })
	if !ok {
		return nil
	}
	return &m.Services[i]
}

// Instance returns the one of a name; nil where there is none.
func (m *Mesh) Instance(n Name) *Instance {
	i, ok := m.instance(n)
	if !ok {
		return nil
	}
	return &m.Instances[i]
}

func (m *Mesh) instance(n Name) (int, bool) {
	return slices.BinarySearchFunc(m.Instances, n, func(i Instance, n Name) int { return compare(i.Namespace, i.Name, n) })
}

func compare(namespace, name string, n Name) int {
	return cmp.Or(cmp.Compare(namespace, n.Namespace), cmp.Compare(name, n.Name))
}

// With returns a Mesh that has the Services in place of those of the same names,
// which there must be, and the Instances, of which nil is none. It shares the rest.
func (m *Mesh) With(services []Service, instances map[Name]*Instance) *Mesh {
	out := *m
	if len(services) > 0 {
		out.Services = slices.Clone(m.Services)
		for _, s := range services {
			*out.Service(Name{s.Namespace, s.Name}) = s
		}
	}
	if len(instances) > 0 {
		out.Instances = slices.Clone(m.Instances)
		for n, in := range instances {
			i, had := out.instance(n)
			switch {
			case had && in != nil:
				out.Instances[i] = *in
			case had:
				out.Instances = slices.Delete(out.Instances, i, i+1)
			case in != nil:
				out.Instances = slices.Insert(out.Instances, i, *in)
			}
		}
		if len(out.Instances) == 0 {
			out.Instances = nil
		}
	}
	return &out
}
