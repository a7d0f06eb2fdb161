package query

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Parse reads a query. The empty query is All. Errors are *SyntaxError.
func Parse(text string) (Expr, error) {
	if len(text) > MaxLength {
		return nil, &SyntaxError{Column: 1, Problem: fmt.Sprintf("the query is %d bytes long", len(text)), Remedy: fmt.Sprintf("at most %d are allowed", MaxLength)}
	}
	p := &parser{text: text}
	if i := strings.IndexFunc(text, func(r rune) bool { return r == utf8.RuneError || r == 0 }); i >= 0 {
		return nil, p.fail(i, "this is not a character of UTF-8 text", "remove it")
	}
	p.space()
	if p.end() {
		return All{}, nil
	}
	e, err := p.or("")
	if err != nil {
		return nil, err
	}
	if !p.end() { // or stops at the end or at a parenthesis that it did not open
		return nil, p.fail(p.at, "')' closes nothing", "remove it or put it into quotes")
	}
	return e, nil
}

// parser is a recursive descent over the text. field is the field of a group of
// values, field:(a OR b), and empty outside of one.
type parser struct {
	text  string
	at    int // bytes
	depth int
	terms int
}

func (p *parser) fail(at int, problem, remedy string) error {
	return &SyntaxError{Column: utf8.RuneCountInString(p.text[:at]) + 1, Problem: problem, Remedy: remedy}
}

func (p *parser) end() bool { return p.at >= len(p.text) }

// peek returns the next byte, 0 at the end. NUL is refused before parsing.
func (p *parser) peek() byte {
	if p.end() {
		return 0
	}
	return p.text[p.at]
}

func (p *parser) space() {
	p.at = len(p.text) - len(strings.TrimLeftFunc(p.text[p.at:], unicode.IsSpace))
}

func (p *parser) enter(at int) error {
	if p.depth++; p.depth > MaxDepth {
		return p.fail(at, fmt.Sprintf("more than %d parentheses and NOTs are inside one another", MaxDepth), "split the query")
	}
	return nil
}

func (p *parser) leave() { p.depth-- }

func (p *parser) or(field string) (Expr, error) {
	var parts Or
	for {
		e, err := p.and(field)
		if err != nil {
			return nil, err
		}
		if inner, ok := e.(Or); ok {
			parts = append(parts, inner...)
		} else {
			parts = append(parts, e)
		}
		if !p.keyword("or") {
			break
		}
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return parts, nil
}

func (p *parser) and(field string) (Expr, error) {
	var parts And
	for {
		e, err := p.not(field)
		if err != nil {
			return nil, err
		}
		if inner, ok := e.(And); ok {
			parts = append(parts, inner...)
		} else {
			parts = append(parts, e)
		}
		if p.keyword("and") {
			continue
		}
		p.space()
		if p.end() || p.peek() == ')' || p.ahead("or") {
			break
		}
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return parts, nil
}

func (p *parser) not(field string) (Expr, error) {
	p.space()
	at := p.at
	if !p.keyword("not") {
		return p.primary(field)
	}
	if err := p.enter(at); err != nil {
		return nil, err
	}
	defer p.leave()
	e, err := p.not(field)
	if err != nil {
		return nil, err
	}
	return Not{e}, nil
}

func (p *parser) primary(field string) (Expr, error) {
	p.space()
	at := p.at
	switch c := p.peek(); {
	case p.end():
		return nil, p.fail(at, "the query ends where a word or a condition should follow", "complete it or remove the last operator")
	case c == '(':
		return p.group(field)
	case c == ')':
		return nil, p.fail(at, "')' stands where a word or a condition should", "put something between the parentheses")
	case c == '"':
		text, err := p.quoted()
		if err != nil {
			return nil, err
		}
		return p.match(at, field, Pattern{text})
	case field == "" && (c == ':' || c == '<' || c == '>'):
		return nil, p.fail(at, fmt.Sprintf("'%c' has no field name before it", c), "write field:value, or put the text into quotes")
	}
	for _, op := range []string{"AND", "OR"} {
		if p.ahead(op) {
			return nil, p.fail(at, op+" stands where a word or a condition should", "complete the query, or put the word into quotes to search for it")
		}
	}
	if field != "" {
		value, err := p.word(false)
		if err != nil {
			return nil, err
		}
		return p.match(at, field, value)
	}
	name, err := p.word(true)
	if err != nil {
		return nil, err
	}
	after := p.at
	p.space()
	switch p.peek() {
	case ':', '<', '>':
	default:
		p.at = after
		return p.match(at, "", name)
	}
	if !name.Literal() {
		return nil, p.fail(at, "a field name holds no *", "name the field")
	}
	return p.condition(name[0])
}

// group reads "(" expression ")".
func (p *parser) group(field string) (Expr, error) {
	at := p.at
	if err := p.enter(at); err != nil {
		return nil, err
	}
	defer p.leave()
	p.at++
	e, err := p.or(field)
	if err != nil {
		return nil, err
	}
	p.space()
	if p.peek() != ')' {
		return nil, p.fail(at, "'(' is not closed", "add ')' or put the text into quotes")
	}
	p.at++
	return e, nil
}

// condition reads what follows a field name: ":" value, or a comparison.
func (p *parser) condition(field string) (Expr, error) {
	if p.peek() == ':' {
		p.at++
		p.space()
	}
	at := p.at
	switch p.peek() {
	case '<', '>':
		op := Op(p.text[at : at+1])
		p.at++
		if p.peek() == '=' {
			op += "="
			p.at++
		}
		return p.compare(at, field, op)
	case '(':
		return p.group(field)
	case '"':
		text, err := p.quoted()
		if err != nil {
			return nil, err
		}
		return p.match(at, field, Pattern{text})
	}
	value, err := p.operand(field)
	if err != nil {
		return nil, err
	}
	return p.match(at, field, value)
}

// operand reads a bare value after "field:" or "field>".
func (p *parser) operand(field string) (Pattern, error) {
	at := p.at
	if p.end() || p.peek() == ')' || p.peek() == '(' || p.ahead("and") || p.ahead("or") || p.ahead("not") {
		return nil, p.fail(at, fmt.Sprintf("field %q has no value", field), fmt.Sprintf("write %s:value, or %s:* for records that have the field; an operator as a value goes into quotes", escape(field), escape(field)))
	}
	return p.word(false)
}

func (p *parser) compare(at int, field string, op Op) (Expr, error) {
	p.space()
	var text string
	if p.peek() == '"' {
		s, err := p.quoted()
		if err != nil {
			return nil, err
		}
		text = s
	} else {
		value, err := p.operand(field)
		if err != nil {
			return nil, err
		}
		text = strings.Join(value, "*")
	}
	c := Compare{Field: field, Op: op, Text: text}
	if n, ok := number(text); ok {
		c.Number = n
	} else if t, ok := instant(text); ok {
		c.Time = t
	} else {
		return nil, p.fail(at, fmt.Sprintf("%s %s compares with %q, which is neither a number nor a time", field, op, text),
			"write a number such as 500 or a time such as 2026-11-23T03:00:00Z, or put the whole text into quotes to search for it")
	}
	return c, p.count(at)
}

func (p *parser) match(at int, field string, value Pattern) (Expr, error) {
	if err := p.count(at); err != nil {
		return nil, err
	}
	if slices.Equal(value, Pattern{"", ""}) { // a lone asterisk
		if field == "" {
			return All{}, nil
		}
		return Exists{field}, nil
	}
	return Match{field, value}, nil
}

func (p *parser) count(at int) error {
	if p.terms++; p.terms > MaxTerms {
		return p.fail(at, fmt.Sprintf("the query has more than %d words and conditions", MaxTerms), "split it")
	}
	return nil
}

// quoted reads a text in double quotes; a backslash takes the next character
// literally.
func (p *parser) quoted() (string, error) {
	at := p.at
	p.at++
	var b strings.Builder
	for !p.end() {
		switch c := p.text[p.at]; c {
		case '"':
			p.at++
			return b.String(), nil
		case '\\':
			if p.at++; p.end() {
				continue
			}
			c = p.text[p.at]
			fallthrough
		default:
			b.WriteByte(c)
			p.at++
		}
	}
	return "", p.fail(at, "the quotes are not closed", `add '"', or write \" for a quotation mark`)
}

// word reads a bare word; its unescaped asterisks are gaps. A name ends at an
// operator, a value may hold one (field:10:30).
func (p *parser) word(name bool) (Pattern, error) {
	at := p.at
	var parts Pattern
	var b strings.Builder
	for !p.end() {
		r, size := utf8.DecodeRuneInString(p.text[p.at:])
		if unicode.IsSpace(r) || r == '(' || r == ')' || r == '"' || name && (r == ':' || r == '<' || r == '>') {
			break
		}
		p.at += size
		switch r {
		case '*':
			parts = append(parts, b.String())
			b.Reset()
		case '\\':
			if p.end() {
				return nil, p.fail(p.at-1, "a backslash ends the query", `write \\ for a backslash`)
			}
			r, size = utf8.DecodeRuneInString(p.text[p.at:])
			p.at += size
			fallthrough
		default:
			b.WriteRune(r)
		}
	}
	if p.at == at {
		return nil, p.fail(at, "a word or a value should stand here", "complete the query")
	}
	parts = append(parts, b.String())
	// "**" is "*": an empty part in the middle says nothing.
	for i := len(parts) - 2; i > 0; i-- {
		if parts[i] == "" {
			parts = slices.Delete(parts, i, i+1)
		}
	}
	return parts, nil
}

// keyword takes the operator if it comes next.
func (p *parser) keyword(word string) bool {
	p.space()
	if !p.ahead(word) {
		return false
	}
	p.at += len(word)
	return true
}

// ahead reports whether the operator is the next word. What is followed by an
// escape or an asterisk is another word; so is the name of a field.
func (p *parser) ahead(word string) bool {
	rest := p.text[p.at:]
	if len(rest) < len(word) || !strings.EqualFold(rest[:len(word)], word) {
		return false
	}
	next, _ := utf8.DecodeRuneInString(rest[len(word):])
	return len(rest) == len(word) || unicode.IsSpace(next) || next == '(' || next == ')' || next == '"'
}

func isKeyword(s string) bool {
	return strings.EqualFold(s, "and") || strings.EqualFold(s, "or") || strings.EqualFold(s, "not")
}

func special(r rune) bool {
	return unicode.IsSpace(r) || strings.ContainsRune(`():<>"*\`, r)
}

// number reads a decimal number; NaN, infinities and hexadecimal are not numbers
// of this language.
func number(s string) (float64, bool) {
	if s == "" || strings.Trim(s, "0123456789+-.eE") != "" {
		return 0, false
	}
	n, err := strconv.ParseFloat(s, 64)
	return n, err == nil && !math.IsInf(n, 0)
}

// instant reads a time: RFC 3339, or a date or local time taken as UTC.
func instant(s string) (time.Time, bool) {
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), true
		}
	}
	return time.Time{}, false
}
