package parse

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Limits of a parser that is made of a pattern.
const (
	MaxPattern  = 4096    // bytes of a specification
	MaxExpanded = 1 << 16 // bytes of a grok pattern with all that it names
	// MaxMatched bytes of a line are matched; a longer one has Failed. With a large
	// pattern it is fewer, down to minMatched, so that the two multiplied, which
	// is the time that a match can take, are at most maxSteps: a pattern may come
	// from the annotation of any pod.
	MaxMatched = 64 << 10
	minMatched = 4 << 10
	maxSteps   = 1 << 25
)

// Parser fills a record from its Body. It is not changed by use and is safe for
// concurrent use.
type Parser interface {
	Parse(r *record.Record) Outcome
}

// Auto is the parser of a container that nothing is said about: [Record].
var Auto Parser = parserFunc(Record)

type parserFunc func(r *record.Record) Outcome

func (f parserFunc) Parse(r *record.Record) Outcome { return f(r) }

// Compile reads a specification:
//
//	auto             a JSON object becomes fields; text keeps its level and trace ids
//	json             as auto, and a line that is no JSON object has Failed
//	logfmt           name=value pairs become fields; values are text
//	none             the line as it is
//	regex:<regexp>   named groups become fields; __ in a name is a dot, since RE2
//	                 has none in names: (?P<http__request__method>\w+)
//	grok:<pattern>   %{NUMBER:http.response.status_code:int}; types are string,
//	                 int, long, float, double, bool, boolean
//
// Names are ECS names; message, log.level, trace.id and the like fill the
// record's own fields. A line that the parser does not match stays whole in the
// body, with what auto finds in text, and the Outcome says that it Failed.
func Compile(spec string) (Parser, error) {
	if len(spec) > MaxPattern {
		return nil, fmt.Errorf("parser %.40q...: %d bytes; at most %d are read", spec, len(spec), MaxPattern)
	}
	word, pattern, _ := strings.Cut(spec, ":")
	switch {
	case spec == "" || spec == "auto":
		return Auto, nil
	case spec == "json":
		return parserFunc(jsonOnly), nil
	case spec == "logfmt":
		return parserFunc(logfmt), nil
	case spec == "none":
		return parserFunc(nothing), nil
	case word == "regex" && pattern != "":
		return compileRegexp(pattern)
	case word == "grok" && pattern != "":
		return compileGrok(pattern)
	default:
		return nil, fmt.Errorf("parser %q is unknown; write auto, json, logfmt, none, regex:<regular expression> or grok:<pattern>", spec)
	}
}

func jsonOnly(r *record.Record) Outcome {
	out := Record(r)
	out.Failed = !out.Structured
	return out
}

func nothing(r *record.Record) Outcome {
	valid(r)
	return Outcome{}
}

func valid(r *record.Record) {
	if !utf8.ValidString(r.Body) {
		r.Body = strings.ToValidUTF8(r.Body, "\uFFFD")
	}
}

// failed is what becomes of a line that a parser does not match.
func failed(r *record.Record) Outcome {
	text(r)
	return Outcome{Failed: true}
}

// collected gathers the fields of one line that is not JSON.
type collected struct {
	fields map[string]any
	known  known
	left   int
}

// add keeps a field; of two with one name the first.
func (c *collected) add(name string, v any) {
	if s, ok := v.(string); ok {
		if c.known.has(name) {
			c.left++
			return
		}
		if taken, _ := c.known.takeText(name, s); taken {
			return
		}
	}
	if _, twice := c.fields[name]; twice || len(name) > record.MaxName || len(c.fields) >= record.MaxAttributes-knownFields {
		c.left++
		return
	}
	if c.fields == nil {
		c.fields = make(map[string]any, 8)
	}
	c.fields[name] = v
}

// finish fills r. The body is the message, or the line where it has none or
// something was left.
func (c *collected) finish(r *record.Record) Outcome {
	line := r.Body
	fields := c.known.lift(r, c.fields)
	if c.left > 0 {
		r.Body = line
	}
	if len(fields) > 0 {
		r.Attributes = fields
	}
	return Outcome{Structured: true, Left: c.left}
}

// logfmt reads name=value and name="va\"lue" pairs. Every word has to be a pair
// or a name alone, and one of them a pair; a name alone is true.
func logfmt(r *record.Record) Outcome {
	valid(r)
	var c collected
	s, pairs := strings.TrimSpace(r.Body), 0
	for s != "" {
		n := 0
		for n < len(s) && s[n] > ' ' && s[n] != '=' && s[n] != '"' {
			n++
		}
		if n == 0 || n < len(s) && s[n] == '"' {
			return failed(r)
		}
		name := s[:n]
		s = s[n:]
		if s == "" || s[0] != '=' {
			c.add(name, true)
			s = strings.TrimLeft(s, " \t\r\n")
			continue
		}
		pairs++
		s = s[1:]
		var value string
		if strings.HasPrefix(s, `"`) {
			quoted, err := strconv.QuotedPrefix(s)
			if err != nil {
				return failed(r)
			}
			if value, err = strconv.Unquote(quoted); err != nil {
				return failed(r)
			}
			value = strings.ToValidUTF8(value, "\uFFFD")
			s = s[len(quoted):]
			if s != "" && s[0] > ' ' {
				return failed(r)
			}
		} else {
			n := 0
			for n < len(s) && s[n] > ' ' {
				n++
			}
			value, s = s[:n], s[n:]
		}
		c.add(name, value)
		s = strings.TrimLeft(s, " \t\r\n")
	}
	if pairs == 0 {
		return failed(r)
	}
	return c.finish(r)
}

// group is a field that a part of a pattern becomes.
type group struct {
	index int // of the submatch
	name  string
	kind  kind
}

type kind uint8

const (
	asText kind = iota
	asInt
	asFloat
	asBool
)

// value converts a match. What is not of its kind stays text, since a field that
// is missing is worse than one of another type.
func (k kind) value(s string) any {
	switch k {
	case asInt, asFloat:
		// Integers too are float64, as from JSON, if it holds them.
		n, err := strconv.ParseFloat(s, 64)
		if err != nil || n-n != 0 || len(s) > 15 && k == asInt && strconv.FormatFloat(n, 'f', -1, 64) != s {
			return s
		}
		return n
	case asBool:
		if b, err := strconv.ParseBool(s); err == nil {
			return b
		}
		return s
	default:
		return s
	}
}

// pattern is a regular expression whose groups are fields. RE2 takes time
// linear in the line.
type pattern struct {
	re *regexp.Regexp
	// start is re at the start of the line. It is tried first, since it takes a
	// fraction of the time, and a match there is the one that re would find.
	start  *regexp.Regexp
	groups []group
	most   int // bytes of a line
}

// newPattern compiles an expression, and refuses one whose size leaves no line
// to be matched.
func newPattern(expr string) (*pattern, error) {
	re, err := regexp.Compile(expr)
	if err != nil {
		return nil, err
	}
	tree, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		return nil, err
	}
	prog, err := syntax.Compile(tree.Simplify())
	if err != nil {
		return nil, err
	}
	most := min(MaxMatched, maxSteps/len(prog.Inst))
	if most < minMatched {
		return nil, fmt.Errorf("it has %d steps; at most %d are taken", len(prog.Inst), maxSteps/minMatched)
	}
	start, err := regexp.Compile(`\A(?:` + expr + `)`)
	if err != nil {
		return nil, err
	}
	return &pattern{re: re, start: start, most: most}, nil
}

func compileRegexp(expr string) (Parser, error) {
	p, err := newPattern(expr)
	if err != nil {
		return nil, fmt.Errorf("parser regex:%s: %w; write a small one, as RE2 reads it (no look-around, no back references)", expr, err)
	}
	for i, name := range p.re.SubexpNames() {
		if name != "" {
			p.groups = append(p.groups, group{index: i, name: strings.ReplaceAll(name, "__", ".")})
		}
	}
	if len(p.groups) == 0 {
		return nil, fmt.Errorf("parser regex:%s has no named group, so it would find no field; write (?P<message>...) for what is wanted", expr)
	}
	return p, nil
}

// Parse makes fields of the groups that matched something.
func (p *pattern) Parse(r *record.Record) Outcome {
	valid(r)
	if len(r.Body) > p.most {
		return failed(r)
	}
	at := p.start.FindStringSubmatchIndex(r.Body)
	if at == nil {
		at = p.re.FindStringSubmatchIndex(r.Body)
	}
	if at == nil {
		return failed(r)
	}
	var c collected
	for _, g := range p.groups {
		from, to := at[2*g.index], at[2*g.index+1]
		if from < 0 || from == to {
			continue
		}
		c.add(g.name, g.kind.value(r.Body[from:to]))
	}
	return c.finish(r)
}
