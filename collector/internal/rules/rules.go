package rules

import (
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
	// Rule or quota that decided; empty for Keep, unless a quota of action warn
	// is exceeded.
	Rule string
	// ParseFailed: the record's parser did not match; the body is the whole line.
	ParseFailed bool
	// FieldsLeft is how many fields were left in the body, see parse.Outcome.
	FieldsLeft int
	// Redacted is how many secrets were replaced.
	Redacted int
}

// Set is the rules of one output. It is safe for concurrent use.
type Set struct {
	lines *multiline.Language
}

// Compile makes the rules for one output; outputs are the names of all, which
// routes may name.
func Compile(c Config, output string, outputs []string) (*Set, error) {
	lines, err := multiline.Compile("auto")
	if err != nil {
		return nil, err
	}
	return &Set{lines: lines}, nil
}

// For selects what applies to a container. It costs some time: keep the Program
// as long as the Resource.
func (s *Set) For(res *record.Resource) *Program {
	return &Program{parser: parse.Auto, lines: s.lines}
}

// Program is what becomes of one container's records. It is for one goroutine.
type Program struct {
	parser   parse.Parser
	lines    *multiline.Language
	off      string
	problems []string
}

// Off is not empty if the container's logs are not to be read, and says why.
func (p *Program) Off() string { return p.off }

// Multiline says how lines are joined; never nil.
func (p *Program) Multiline() *multiline.Language { return p.lines }

// Problems are annotations that were not understood or cannot be honoured.
func (p *Program) Problems() []string { return p.problems }

// Apply parses r, then applies the rules and quotas. It changes r, and sets its
// Level, Attributes and so on from its Body.
func (p *Program) Apply(r *record.Record) Verdict {
	out := p.parser.Parse(r)
	return Verdict{ParseFailed: out.Failed, FieldsLeft: out.Left}
}
