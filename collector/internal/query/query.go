// Package query is the language in which people search logs. It reads like
// Kibana's:
//
//	service.name:payments AND http.response.status_code>=500 "card declined" NOT log.level:debug
//
// It knows how a query is written (Parse, String), which records it matches
// (Compile) and how a full-text index can find candidates for it (Terms,
// Narrow). It knows no database and does no I/O. Package store calls it for
// searches and for the live tail, so both follow the same rules: the index only
// proposes, the compiled query decides.
//
// # The language
//
//	card                       the word in the message
//	"card declined"            these words in this order
//	declin*                    a word that begins so; * stands for any characters
//	service.name:payments      a field's whole value, in upper or lower case
//	message:"card declined"    words in a text field
//	http.response.status_code>=500, @timestamp<2026-11-23T03:00:00Z
//	field:*                    the record has the field
//	log.level:(warn OR error)  several values of one field
//	a b, a AND b, a OR b, NOT a, (a OR b) c
//
// NOT binds tighter than AND, AND tighter than OR; AND, OR and NOT are operators
// in upper and lower case. A backslash takes a character literally. Words
// without a field are looked for in the message and error.message, and as a
// whole in the identifiers (trace.id, span.id, http.request.id,
// outrigger.evidence.id). message, error.message and error.stack_trace are text
// and matched by words; every other field is matched as a whole value. Of a list
// any element may match.
package query

import (
	"fmt"
	"strings"
	"time"
)

// Limits of a query. They bound what one search can cost before it has begun.
const (
	MaxLength = 4096 // bytes of a query
	MaxDepth  = 32   // parentheses and NOTs inside one another
	MaxTerms  = 64   // words, phrases, field conditions
)

// Expr is a parsed query: All, And, Or, Not, Match, Exists or Compare. It is not
// changed once made and can be used by several goroutines.
type Expr interface {
	// String writes the query so that Parse gives an equal one back.
	String() string
	level() int // how tightly it binds when printed
}

// All matches every record: the empty query.
type All struct{}

// And matches where all of its parts do. It has at least two; none is an And.
type And []Expr

// Or matches where one of its parts does. It has at least two; none is an Or.
type Or []Expr

// Not matches where X does not, which includes records without X's field.
type Not struct{ X Expr }

// Match compares a field with a value. An empty Field stands for the fields that
// plain words are looked for in.
type Match struct {
	Field string
	Value Pattern
}

// Exists matches records that have the field with a value other than null.
type Exists struct{ Field string }

// Compare compares a field with a number or, where Time is not zero, a time.
// Records whose field is neither do not match.
type Compare struct {
	Field  string
	Op     Op
	Text   string // the value as it was written
	Number float64
	Time   time.Time
}

// Pattern is a text with gaps: the literal parts between the asterisks. One part
// is a plain text; {"pay", ""} is pay*.
type Pattern []string

// Literal reports whether the pattern has no asterisk.
func (p Pattern) Literal() bool { return len(p) == 1 }

// Op is a comparison.
type Op string

// The comparisons.
const (
	Greater      Op = ">"
	GreaterEqual Op = ">="
	Less         Op = "<"
	LessEqual    Op = "<="
)

// SyntaxError says where a query cannot be read, why, and what to write instead.
type SyntaxError struct {
	Column  int // of the character, the first is 1
	Problem string
	Remedy  string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("query, column %d: %s; %s", e.Column, e.Problem, e.Remedy)
}

const (
	levelOr = iota
	levelAnd
	levelNot
	levelTerm
)

func (All) level() int     { return levelTerm }
func (And) level() int     { return levelAnd }
func (Or) level() int      { return levelOr }
func (Not) level() int     { return levelNot }
func (Match) level() int   { return levelTerm }
func (Exists) level() int  { return levelTerm }
func (Compare) level() int { return levelTerm }

func (All) String() string   { return "*" }
func (a And) String() string { return join(a, " AND ", levelAnd) }
func (o Or) String() string  { return join(o, " OR ", levelOr) }
func (n Not) String() string { return "NOT " + within(n.X, levelNot) }

func (m Match) String() string {
	if m.Field == "" {
		return m.Value.String()
	}
	return escape(m.Field) + ":" + m.Value.String()
}

func (e Exists) String() string  { return escape(e.Field) + ":*" }
func (c Compare) String() string { return escape(c.Field) + string(c.Op) + quote(c.Text) }

func (p Pattern) String() string {
	if p.Literal() {
		return quote(p[0])
	}
	parts := make([]string, len(p))
	for i, s := range p {
		parts[i] = escape(s)
	}
	return strings.Join(parts, "*")
}

func join(parts []Expr, between string, level int) string {
	texts := make([]string, len(parts))
	for i, p := range parts {
		texts[i] = within(p, level)
	}
	return strings.Join(texts, between)
}

func within(e Expr, level int) string {
	if e.level() < level {
		return "(" + e.String() + ")"
	}
	return e.String()
}

// quote writes a literal value: bare where that reads back the same.
func quote(s string) string {
	if s != "" && !isKeyword(s) && !strings.ContainsFunc(s, special) {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// escape writes a name or a part of a pattern, which cannot stand in quotes.
func escape(s string) string {
	var b strings.Builder
	if isKeyword(s) {
		b.WriteByte('\\')
	}
	for _, r := range s {
		if special(r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	return b.String()
}
