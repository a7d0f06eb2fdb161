package rules

import (
	"math"
	"sync"
	"sync/atomic"

	"github.com/outrigger-mesh/outrigger/collector/internal/multiline"
	"github.com/outrigger-mesh/outrigger/collector/internal/parse"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Cause says why a record is not sent. Keep is the zero value.
type Cause uint8

// The causes.
const (
	Keep    Cause = iota
	ByRule        // a drop or sample of a rule or an annotation
	ByQuota       // the namespace's quota
	Routed        // it goes to other outputs
)

// String is the value of the metric label.
func (c Cause) String() string {
	switch c {
	case Keep:
		return "keep"
	case ByRule:
		return "rule"
	case ByQuota:
		return "quota"
	case Routed:
		return "routed"
	default:
		return "unknown"
	}
}

// Verdict is what became of a record.
type Verdict struct {
	Cause Cause
	// Rule, quota or annotation that decided. With Keep it is empty, or the quota
	// that was exceeded and does not drop this record.
	Rule string
	// ParseFailed: the record's parser did not match; the body is the whole line.
	ParseFailed bool
	// FieldsLeft is how many fields were left in the body (see parse.Outcome) or
	// could not be set because there were too many.
	FieldsLeft int
	// Redacted is how many secrets were replaced.
	Redacted int
}

type actionKind uint8

const (
	doParse actionKind = iota
	doMultiline
	doDrop
	doKeep
	doSample
	doRedact
	doRename
	doRemove
	doSet
	doRoute
)

type pair struct{ from, to string }

// rule is one that was checked. It is not changed.
type rule struct {
	name   string
	match  *match
	action actionKind

	parser parse.Parser
	lines  *multiline.Language
	below  uint64 // of sample
	redact *redactor
	names  []pair
	here   bool // the route names this output
}

// Set is the rules of one output. It is safe for concurrent use.
type Set struct {
	output  string
	outputs []string
	lines   *multiline.Language
	rules   []*rule
	quotas  []*quota

	counts atomic.Uint64 // how often a quota of a day counted

	mu     sync.Mutex
	usages map[usageKey]*usage
}

// Compile makes the rules for one output; outputs are the names of all that get
// logs, which routes may name. The error is that of Validate.
func Compile(c Config, output string, outputs []string) (*Set, error) {
	if outputs == nil {
		outputs = []string{output}
	}
	return c.compile(output, outputs)
}

// For selects what applies to a container. It costs some time: keep the Program
// as long as the Resource.
func (s *Set) For(res *record.Resource) *Program {
	if res == nil {
		res = &record.Resource{}
	}
	p := &Program{parser: parse.Auto, lines: s.lines, annotation: asked{here: true}}
	s.annotate(p, res)
	var parser, lines bool
	for _, r := range s.rules {
		if !r.match.resource(res) {
			continue
		}
		switch r.action {
		case doParse:
			// What the pod says of itself goes before what is said of all.
			if !parser && !p.annotation.parser {
				p.parse(r.parser, r.match.streams)
				parser = len(r.match.streams) == 0
			}
		case doMultiline:
			if !lines && !p.annotation.lines {
				p.lines, lines = r.lines, true
			}
		default:
			p.rules = append(p.rules, r)
		}
	}
	for _, q := range s.quotas {
		if anyOf(q.namespaces, res.Namespace) {
			p.usage = s.usage(q, res.Namespace)
			break
		}
	}
	p.plain = len(p.rules) == 0 && p.usage == nil && !p.annotation.any
	return p
}

// Program is what becomes of one container's records. It is for one goroutine.
type Program struct {
	parser parse.Parser
	// of the streams; nil is parser
	stdout, stderr parse.Parser
	lines          *multiline.Language
	rules          []*rule
	usage          *usage
	annotation     asked
	plain          bool // nothing but a parser
	off            string
	problems       []string
}

// asked is what the pod's annotations ask for.
type asked struct {
	any            bool // one of those below
	parser, lines  bool
	redact         *redactor
	sample         string // the annotation that asks for it
	below          uint64
	stdout, stderr string // the annotation that excludes the stream
	route          string
	here           bool
}

// Off is not empty if the container's logs are not to be read, and says why.
func (p *Program) Off() string { return p.off }

// Multiline says how lines are joined; never nil.
func (p *Program) Multiline() *multiline.Language { return p.lines }

// Problems are annotations that were not understood or cannot be honoured.
func (p *Program) Problems() []string { return p.problems }

// parse sets a parser for some streams, or all; one that is there stays.
func (p *Program) parse(parser parse.Parser, streams []string) {
	if len(streams) == 0 {
		p.parser = parser
		return
	}
	for _, s := range streams {
		switch {
		case s == "stdout" && p.stdout == nil:
			p.stdout = parser
		case s == "stderr" && p.stderr == nil:
			p.stderr = parser
		}
	}
}

// Apply parses r, then applies the rules in their order and the quota. It
// changes r. A record that is not kept was redacted all the same, so that it may
// be shown as a sample. Attributes share the memory of the body.
func (p *Program) Apply(r *record.Record) Verdict {
	bytes := int64(len(r.Body))
	parser := p.parser
	if p.stdout != nil && r.Stream == "stdout" {
		parser = p.stdout
	} else if p.stderr != nil && r.Stream == "stderr" {
		parser = p.stderr
	}
	var out parse.Outcome
	if r.Attributes == nil { // else it came with fields of its own, and is parsed
		out = parser.Parse(r)
	}
	v := Verdict{ParseFailed: out.Failed, FieldsLeft: out.Left}
	if !p.plain {
		p.judge(r, &v, bytes)
	}
	return v
}

func (p *Program) judge(r *record.Record, v *Verdict, bytes int64) {
	a := &p.annotation
	if a.redact != nil {
		v.Redacted += a.redact.record(r)
	}
	kept := false
	here, route := a.here, a.route
	for _, rule := range p.rules {
		if v.Cause != Keep && rule.action != doRedact || kept && (rule.action == doDrop || rule.action == doSample) {
			continue
		}
		if !rule.match.record(r) {
			continue
		}
		switch rule.action {
		case doDrop:
			v.Cause, v.Rule = ByRule, rule.name
		case doKeep:
			kept = true
		case doSample:
			if !keeps(rule.below, rule.name, &r.Origin) {
				v.Cause, v.Rule = ByRule, rule.name
			}
		case doRedact:
			v.Redacted += rule.redact.record(r)
		case doRoute:
			here, route = rule.here, rule.name
		default:
			v.FieldsLeft += rule.edit(r)
		}
	}
	switch {
	case v.Cause != Keep:
		return
	case a.stdout != "" && r.Stream == "stdout":
		v.Cause, v.Rule = ByRule, a.stdout
	case a.stderr != "" && r.Stream == "stderr":
		v.Cause, v.Rule = ByRule, a.stderr
	case !here:
		v.Cause, v.Rule = Routed, route
	case !kept && a.sample != "" && !keeps(a.below, a.sample, &r.Origin):
		v.Cause, v.Rule = ByRule, a.sample
	case !kept && p.usage != nil && p.usage.over(r, bytes):
		q := p.usage.quota
		v.Rule = q.name
		if !keeps(q.below, q.name, &r.Origin) {
			v.Cause = ByQuota
		}
	}
}

func keeps(below uint64, purpose string, o *record.Origin) bool {
	return below == math.MaxUint64 || below > 0 && chosen(purpose, o) < below
}

// edit renames, removes or sets fields, and reports how many found no room.
func (c *rule) edit(r *record.Record) (left int) {
	for _, n := range c.names {
		switch c.action {
		case doRename:
			v, ok := r.Attributes[n.from]
			if !ok {
				continue
			}
			delete(r.Attributes, n.from)
			if !assign(r, n.to, v) {
				left++
			}
		case doRemove:
			remove(r, n.from)
		default:
			if !assign(r, n.from, n.to) {
				left++
			}
		}
	}
	return left
}
