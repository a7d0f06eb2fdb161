package rules

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/internal/multiline"
	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Annotations of pods. Each also with .<container> behind it, which goes before
// that of the pod. They go before those of other collectors.
const (
	AnnotationLogs      = "outrigger.dev/logs"      // off, or a specification of package parse
	AnnotationMultiline = "outrigger.dev/multiline" // a specification of package multiline
	AnnotationSample    = "outrigger.dev/sample"    // the share that is kept: 0.1 or 10%
	AnnotationRedact    = "outrigger.dev/redact"    // kinds with commas between, or all
	AnnotationOutput    = "outrigger.dev/output"    // names of outputs with commas between
)

// Of other collectors.
const (
	fluentExclude   = "fluentbit.io/exclude"
	fluentParser    = "fluentbit.io/parser"
	vectorExclude   = "vector.dev/exclude" // a label
	vectorContainer = "vector.dev/exclude-containers"
	elastic         = "co.elastic.logs"
)

// fluentParsers are those that Fluent Bit comes with and that are the same here.
var fluentParsers = map[string]string{
	"docker": "auto", "cri": "auto", "json": "json", "logfmt": "logfmt",
	"nginx": "grok:%{NGINXACCESS}", "apache": "grok:%{COMMONAPACHELOG}", "apache2": "grok:%{COMBINEDAPACHELOG}",
}

// annotations reads those of one container's pod.
type annotations struct {
	set *Set
	p   *Program
	res *record.Resource
	// own: the pod has an annotation of ours that decides whether and how its
	// logs are read, so those of others are not asked.
	own bool
}

func (s *Set) annotate(p *Program, res *record.Resource) {
	a := annotations{set: s, p: p, res: res}
	a.ours()
	a.vector()
	a.fluent()
	a.elastic()
	want := &p.annotation
	want.any = want.redact != nil || want.sample != "" || want.stdout != "" || want.stderr != "" || want.route != ""
}

func (a *annotations) problem(name, value, remedy string) {
	const most = 32 // of a container
	if len(a.p.problems) < most {
		a.p.problems = append(a.p.problems, fmt.Sprintf("annotation %.120s: %.120q: %s", name, value, remedy))
	}
}

// find finds an annotation of ours.
func (a *annotations) find(name string) (key, value string, ok bool) {
	key = name + "." + a.res.Container
	if value, ok = a.res.Annotations[key]; ok {
		return key, strings.TrimSpace(value), true
	}
	value, ok = a.res.Annotations[name]
	return name, strings.TrimSpace(value), ok
}

func (a *annotations) ours() {
	want := &a.p.annotation
	if key, value, ok := a.find(AnnotationLogs); ok {
		if value == "off" || value == "false" {
			a.own = true
			a.off(key, value)
		} else if parser, err := parse.Compile(value); err != nil {
			a.problem(key, value, err.Error()+"; or off")
		} else {
			a.own = true
			a.p.parser, want.parser = parser, true
		}
	}
	if key, value, ok := a.find(AnnotationMultiline); ok {
		if l, err := multiline.Compile(value); err != nil {
			a.problem(key, value, err.Error())
		} else {
			a.p.lines, want.lines = l, true
		}
	}
	if key, value, ok := a.find(AnnotationSample); ok {
		number, percent := strings.CutSuffix(value, "%")
		rate, err := strconv.ParseFloat(number, 64)
		if percent {
			rate /= 100
		}
		if err != nil || !(rate >= 0 && rate <= 1) {
			a.problem(key, value, "write the share that is kept, such as 0.1 or 10%")
		} else {
			want.sample, want.below = "annotation "+key, share(rate)
		}
	}
	if key, value, ok := a.find(AnnotationRedact); ok {
		rd, unknown := kindsOf(list(value))
		if len(unknown) > 0 || len(rd.finders) == 0 {
			a.problem(key, value, "write all, or some of card, email, token, ip, iban with commas between")
		}
		if len(rd.finders) > 0 {
			want.redact = rd
		}
	}
	if key, value, ok := a.find(AnnotationOutput); ok {
		known, here := false, false
		for _, name := range list(value) {
			if !slices.Contains(a.set.outputs, name) {
				a.problem(key, value, fmt.Sprintf("no output that gets logs is called %q; there is %s", name, strings.Join(a.set.outputs, ", ")))
				continue
			}
			known = true
			here = here || name == a.set.output
		}
		if known {
			want.route, want.here = "annotation "+key, here
		}
	}
}

func (a *annotations) off(key, value string) {
	if a.p.off == "" {
		a.p.off = "annotation " + key + ": " + value
	}
}

// yes reads the value of a peer's annotation.
func (a *annotations) yes(key, value string) bool {
	switch strings.ToLower(value) {
	case "true":
		return true
	case "false":
		return false
	}
	a.problem(key, value, "write true or false")
	return false
}

func (a *annotations) vector() {
	if value, ok := a.res.Labels[vectorExclude]; ok && a.yes("label "+vectorExclude, value) && !a.own {
		a.p.off = "label " + vectorExclude + ": " + value
	}
	if value, ok := a.res.Annotations[vectorContainer]; ok && slices.Contains(list(value), a.res.Container) && !a.own {
		a.off(vectorContainer, value)
	}
	a.others("vector.dev/", func(key string) bool { return key == vectorContainer })
}

func (a *annotations) fluent() {
	for _, stream := range [...]string{"", "stdout", "stderr"} {
		if key, value, ok := a.fluentKey(fluentExclude, stream); ok && a.yes(key, value) && !a.own {
			switch stream {
			case "stdout":
				a.p.annotation.stdout = "annotation " + key
			case "stderr":
				a.p.annotation.stderr = "annotation " + key
			default:
				a.off(key, value)
			}
		}
		key, value, ok := a.fluentKey(fluentParser, stream)
		if !ok {
			continue
		}
		spec, known := fluentParsers[value]
		if !known {
			a.problem(key, value, "the parser is not known here; write one of "+strings.Join(slices.Sorted(maps.Keys(fluentParsers)), ", ")+", or use "+AnnotationLogs)
			continue
		}
		parser, err := parse.Compile(spec)
		if err != nil || a.own {
			continue
		}
		a.p.annotation.parser = true
		if stream == "" {
			a.p.parser = parser
		} else {
			a.p.parse(parser, []string{stream})
		}
	}
	a.others("fluentbit.io/", func(key string) bool {
		return strings.HasPrefix(key, fluentExclude) || strings.HasPrefix(key, fluentParser)
	})
}

// fluentKey finds name[_stream][-container].
func (a *annotations) fluentKey(name, stream string) (key, value string, ok bool) {
	if stream != "" {
		name += "_" + stream
	}
	key = name + "-" + a.res.Container
	if value, ok = a.res.Annotations[key]; ok {
		return key, strings.TrimSpace(value), true
	}
	value, ok = a.res.Annotations[name]
	return name, strings.TrimSpace(value), ok
}

// elastic reads Filebeat's hints: co.elastic.logs/x, or for one container
// co.elastic.logs.<container>/x.
func (a *annotations) elastic() {
	get := func(name string) (key, value string, ok bool) {
		key = elastic + "." + a.res.Container + "/" + name
		if value, ok = a.res.Annotations[key]; ok {
			return key, value, true
		}
		key = elastic + "/" + name
		value, ok = a.res.Annotations[key]
		return key, value, ok
	}
	if key, value, ok := get("enabled"); ok && strings.ToLower(value) != "true" {
		if strings.ToLower(value) != "false" {
			a.problem(key, value, "write true or false")
		} else if !a.own {
			a.off(key, value)
		}
	}
	if key, pattern, ok := get("multiline.pattern"); ok {
		_, negate, _ := get("multiline.negate")
		_, where, _ := get("multiline.match")
		kind := ""
		switch strings.ToLower(negate) + " " + where {
		case "true after":
			kind = "start:"
		case "false after", " after":
			kind = "continue:"
		case "false before", " before":
			kind = "unfinished:"
		case "true before":
			kind = "end:"
		}
		if typ, value, ok := get("multiline.type"); ok && value != "pattern" {
			a.problem(typ, value, "only pattern means the same here; use "+AnnotationMultiline)
		} else if kind == "" {
			a.problem(key, pattern, "it needs multiline.match: after or before, and multiline.negate: true or false")
		} else if l, err := multiline.Compile(kind + pattern); err != nil {
			a.problem(key, pattern, err.Error())
		} else if !a.p.annotation.lines {
			a.p.lines, a.p.annotation.lines = l, true
		}
	}
	known := []string{"enabled", "multiline.pattern", "multiline.negate", "multiline.match", "multiline.type"}
	a.others(elastic, func(key string) bool {
		prefix, name, _ := strings.Cut(key, "/")
		if prefix != elastic && prefix != elastic+"."+a.res.Container {
			return true // of another container
		}
		// JSON is decoded without being asked for.
		return slices.Contains(known, name) || strings.HasPrefix(name, "json.")
	})
}

// others complains of annotations of one collector that mean nothing here.
func (a *annotations) others(prefix string, known func(key string) bool) {
	for _, key := range slices.Sorted(maps.Keys(a.res.Annotations)) {
		if strings.HasPrefix(key, prefix) && !known(key) {
			a.problem(key, a.res.Annotations[key], "it has no counterpart here and changes nothing")
		}
	}
}

func list(s string) []string {
	var out []string
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			out = append(out, part)
		}
	}
	return out
}
