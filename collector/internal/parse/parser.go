package parse

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
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
//	auto    a JSON object becomes fields; text keeps its level and trace ids
//	json    as auto, and a line that is no JSON object has Failed
//	none    the line as it is
//
// A line that the parser does not match stays whole in the body, and the Outcome
// says that it Failed.
func Compile(spec string) (Parser, error) {
	switch word, _, _ := strings.Cut(spec, ":"); word {
	case "", "auto":
		return Auto, nil
	case "json":
		return parserFunc(jsonOnly), nil
	case "none":
		return parserFunc(nothing), nil
	default:
		return nil, fmt.Errorf("parser %q is unknown; write auto, json or none", spec)
	}
}

func jsonOnly(r *record.Record) Outcome {
	out := Record(r)
	out.Failed = !out.Structured
	return out
}

func nothing(r *record.Record) Outcome {
	if !utf8.ValidString(r.Body) {
		r.Body = strings.ToValidUTF8(r.Body, "\uFFFD")
	}
	return Outcome{}
}
