package rules

import (
	"regexp"
	"slices"
	"strconv"

	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// match is a condition: the first part is judged once for a container, the
// second for every record.
type match struct {
	namespaces, workloads, containers    []string
	labels, annotations, namespaceLabels map[string]string

	streams []string
	level   uint8
	body    *regexp.Regexp
	field   *field
}

type field struct {
	name   string
	equals *string
	exists *bool
	regex  *regexp.Regexp
}

func (m *match) resource(res *record.Resource) bool {
	workload := res.Workload
	if workload == "" {
		workload = res.Service
	}
	return anyOf(m.namespaces, res.Namespace) && anyOf(m.workloads, workload) && anyOf(m.containers, res.Container) &&
		allOf(m.labels, res.Labels) && allOf(m.annotations, res.Annotations) && allOf(m.namespaceLabels, res.NamespaceLabels)
}

func (m *match) record(r *record.Record) bool {
	if len(m.streams) > 0 && !slices.Contains(m.streams, r.Stream) || m.level > levels[r.Level] {
		return false
	}
	if m.body != nil && !m.body.MatchString(r.Body) {
		return false
	}
	return m.field == nil || m.field.matches(r)
}

func (f *field) matches(r *record.Record) bool {
	value, exists := value(r, f.name)
	switch {
	case f.exists != nil:
		return exists == *f.exists
	case f.equals != nil:
		return exists && value == *f.equals
	default:
		return exists && f.regex.MatchString(value)
	}
}

// value is a field as it is printed. Lists and objects have none, but exist;
// null is no value.
func value(r *record.Record, name string) (text string, exists bool) {
	if v, ok := r.Attributes[name]; ok {
		switch v := v.(type) {
		case string:
			return v, true
		case float64:
			return strconv.FormatFloat(v, 'f', -1, 64), true
		case bool:
			return strconv.FormatBool(v), true
		case nil:
			return "", false
		default:
			return "", true
		}
	}
	switch name {
	case record.Message:
		text = r.Body
	case record.LogLevel:
		text = r.Level
	case record.TraceID:
		text = r.TraceID
	case record.SpanID:
		text = r.SpanID
	case record.StreamName:
		text = r.Stream
	case record.FilePath:
		text = r.Origin.Path
	case record.ServiceName:
		if text = r.Service; text == "" && r.Resource != nil {
			text = r.Resource.Service
		}
	}
	if text == "" && r.Resource != nil {
		switch name {
		case record.Namespace, record.OrchNamespace:
			text = r.Resource.Namespace
		case record.PodName:
			text = r.Resource.Pod
		case record.KContainer, record.ContainerName:
			text = r.Resource.Container
		case record.HostName:
			text = r.Resource.Node
		case record.ImageName:
			text = r.Resource.Image
		}
	}
	return text, text != ""
}

// assign gives a field a value; it reports false where there is no room.
func assign(r *record.Record, name string, v any) bool {
	s, isText := v.(string)
	switch {
	case name == record.Message && isText:
		r.Body = s
		return true
	case name == record.LogLevel:
		if level := parse.Level(v); level != "" {
			r.Level = level
			return true
		}
	case name == record.ServiceName && isText:
		r.Service = s
		return true
	}
	if r.Attributes == nil {
		r.Attributes = map[string]any{}
	}
	if _, there := r.Attributes[name]; !there && len(r.Attributes) >= record.MaxAttributes {
		return false
	}
	r.Attributes[name] = v
	return true
}

func remove(r *record.Record, name string) {
	delete(r.Attributes, name)
	switch name {
	case record.LogLevel:
		r.Level = ""
	case record.TraceID:
		r.TraceID = ""
	case record.SpanID:
		r.SpanID = ""
	case record.ServiceName:
		r.Service = ""
	}
}

// anyOf reports whether one of the globs matches, or there is none.
func anyOf(globs []string, s string) bool {
	return len(globs) == 0 || slices.ContainsFunc(globs, func(g string) bool { return glob(g, s) })
}

// allOf reports whether every key is there with a value that its glob matches.
func allOf(globs, values map[string]string) bool {
	for k, g := range globs {
		if v, ok := values[k]; !ok || !glob(g, v) {
			return false
		}
	}
	return true
}

// glob matches the whole of s; * is any text, ? any byte. It takes time of
// len(pattern) * len(s) at most.
func glob(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
