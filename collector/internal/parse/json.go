package parse

import (
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// maxNesting of values that quick reads; what is deeper is left to the slow way.
const maxNesting = 64

// quick fills r from a JSON object in one pass, without an object in between. It
// does all that structured does for lines of which nothing is left; for every
// other line, also one that is not JSON, it reports false and leaves r as it
// was. Names and text without escapes share the memory of the body.
func quick(r *record.Record, body string) bool {
	p := reader{s: body, i: 1}
	if !p.object("", 1) {
		return false
	}
	if p.space(); p.i != len(p.s) {
		return false
	}
	if len(p.fields)+bits.OnesCount32(p.known.set) > record.MaxAttributes {
		return false
	}
	fields := p.known.lift(r, p.fields)
	if len(fields) > 0 {
		r.Attributes = fields
	}
	return true
}

// reader goes through an object. Its methods report false where the line is for
// the slow way.
type reader struct {
	s      string
	i      int
	fields map[string]any
	known  known
	// objects that were flattened. That one of them has the name of another field
	// is for the slow way.
	objects []string
	room    [8]string
}

func (p *reader) space() {
	for p.i < len(p.s) {
		switch p.s[p.i] {
		case ' ', '\t', '\n', '\r':
			p.i++
		default:
			return
		}
	}
}

// peek is the next byte that is no space, or 0.
func (p *reader) peek() byte {
	if p.i < len(p.s) && p.s[p.i] > ' ' {
		return p.s[p.i]
	}
	if p.space(); p.i < len(p.s) {
		return p.s[p.i]
	}
	return 0
}

// object reads the fields behind an opening brace up to the closing one.
func (p *reader) object(prefix string, depth int) bool {
	if p.peek() == '}' {
		p.i++
		return true
	}
	for {
		if p.peek() != '"' {
			return false
		}
		name, ok := p.text()
		if !ok || name == "" || p.peek() != ':' {
			return false
		}
		p.i++
		if prefix != "" {
			name = prefix + "." + name
		}
		if len(name) > record.MaxName || !p.field(name, depth) {
			return false
		}
		switch p.peek() {
		case ',':
			p.i++
		case '}':
			p.i++
			return true
		default:
			return false
		}
	}
}

// field reads a value and keeps it.
func (p *reader) field(name string, depth int) bool {
	switch c := p.peek(); {
	case c == '"':
		s, ok := p.text()
		if !ok {
			return false
		}
		if taken, twice := p.known.takeText(name, s); taken {
			return !twice && !p.there(name)
		}
		return p.put(name, s)
	case c == '{':
		p.i++
		if p.peek() == '}' {
			p.i++
			return p.put(name, map[string]any{})
		}
		if depth >= MaxDepth {
			v, ok := p.deep(depth)
			return ok && p.put(name, v)
		}
		if p.there(name) || p.known.has(name) || slices.Contains(p.objects, name) {
			return false
		}
		if p.objects == nil {
			p.objects = p.room[:0]
		}
		p.objects = append(p.objects, name)
		return p.object(name, depth+1)
	case c == '-' || '0' <= c && c <= '9':
		n, exact, ok := p.number()
		if !ok {
			return false
		}
		if exact != "" {
			return p.put(name, exact)
		}
		if taken, twice := p.known.takeNumber(name, n); taken {
			return !twice && !p.there(name)
		}
		return p.put(name, n)
	default:
		v, ok := p.value(depth)
		return ok && p.put(name, v)
	}
}

func (p *reader) there(name string) bool {
	_, there := p.fields[name]
	return there || len(p.objects) > 0 && slices.Contains(p.objects, name)
}

// put adds an attribute; a second of its name is for the slow way.
func (p *reader) put(name string, v any) bool {
	if p.fields == nil {
		// As many as there may be, for most lines.
		p.fields = make(map[string]any, min(strings.Count(p.s[p.i:], ",")+1, 32))
	}
	n := len(p.fields)
	p.fields[name] = v
	return len(p.fields) == n+1 && n < record.MaxAttributes && !p.known.has(name) && (len(p.objects) == 0 || !slices.Contains(p.objects, name))
}

// value reads any value that is not flattened.
func (p *reader) value(depth int) (any, bool) {
	if depth > maxNesting {
		return nil, false
	}
	switch c := p.peek(); c {
	case '"':
		return p.text()
	case '{':
		p.i++
		return p.deep(depth)
	case '[':
		p.i++
		return p.list(depth)
	case 't':
		return true, p.word("true")
	case 'f':
		return false, p.word("false")
	case 'n':
		return nil, p.word("null")
	default:
		n, exact, ok := p.number()
		if exact != "" {
			return exact, ok
		}
		return n, ok
	}
}

func (p *reader) word(w string) bool {
	if !strings.HasPrefix(p.s[p.i:], w) {
		return false
	}
	p.i += len(w)
	return true
}

func (p *reader) list(depth int) (any, bool) {
	out := []any{}
	if p.peek() == ']' {
		p.i++
		return out, true
	}
	for {
		v, ok := p.value(depth + 1)
		if !ok {
			return nil, false
		}
		out = append(out, v)
		switch p.peek() {
		case ',':
			p.i++
		case ']':
			p.i++
			return out, true
		default:
			return nil, false
		}
	}
}

// deep reads an object that stays one, behind its opening brace.
func (p *reader) deep(depth int) (any, bool) {
	out := map[string]any{}
	if p.peek() == '}' {
		p.i++
		return out, true
	}
	for {
		if p.peek() != '"' {
			return nil, false
		}
		name, ok := p.text()
		if !ok || p.peek() != ':' {
			return nil, false
		}
		p.i++
		v, ok := p.value(depth + 1)
		if !ok {
			return nil, false
		}
		out[name] = v
		switch p.peek() {
		case ',':
			p.i++
		case '}':
			p.i++
			return out, true
		default:
			return nil, false
		}
	}
}

// number reads a number. exact holds its digits where a float64 would change
// them.
func (p *reader) number() (n float64, exact string, ok bool) {
	s, i := p.s, p.i
	from := i
	if i < len(s) && s[i] == '-' {
		i++
	}
	first := i
	var whole int64
	for i < len(s) && s[i]-'0' <= 9 {
		if i-first < 15 {
			whole = whole*10 + int64(s[i]-'0')
		}
		i++
	}
	count := i - first
	if count == 0 || count > 1 && s[first] == '0' {
		return 0, "", false
	}
	fraction := false
	if i < len(s) && s[i] == '.' {
		fraction = true
		i++
		point := i
		for i < len(s) && s[i]-'0' <= 9 {
			i++
		}
		if i == point {
			return 0, "", false
		}
	}
	if i < len(s) && s[i]|0x20 == 'e' {
		fraction = true
		i++
		if i < len(s) && (s[i] == '+' || s[i] == '-') {
			i++
		}
		point := i
		for i < len(s) && s[i]-'0' <= 9 {
			i++
		}
		if i == point {
			return 0, "", false
		}
	}
	p.i = i
	text := s[from:i]
	if !fraction && count <= 15 {
		if text[0] != '-' {
			return float64(whole), "", true
		}
		if whole != 0 {
			return -float64(whole), "", true
		}
	}
	n, err := strconv.ParseFloat(text, 64)
	if err != nil || !fraction && strconv.FormatFloat(n, 'f', -1, 64) != text {
		return 0, text, true
	}
	return n, "", true
}

// text reads a string from its opening quote on.
func (p *reader) text() (string, bool) {
	s, i := p.s, p.i+1
	for from := i; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			p.i = i + 1
			return s[from:i], true
		case c == '\\':
			return p.escaped(from)
		case c < ' ':
			return "", false
		}
	}
	return "", false
}

// escaped reads a string with escapes; from is behind its opening quote.
func (p *reader) escaped(from int) (string, bool) {
	s := p.s
	end := from // the closing quote
	for ; end < len(s) && s[end] != '"'; end++ {
		if s[end] == '\\' {
			end++
		}
	}
	if end >= len(s) {
		return "", false
	}
	b := make([]byte, 0, end-from)
	for i := from; i < end; {
		c := s[i]
		if c < ' ' {
			return "", false
		}
		if c != '\\' {
			b = append(b, c)
			i++
			continue
		}
		i++
		switch s[i] {
		case '"', '\\', '/':
			b = append(b, s[i])
		case 'b':
			b = append(b, '\b')
		case 'f':
			b = append(b, '\f')
		case 'n':
			b = append(b, '\n')
		case 'r':
			b = append(b, '\r')
		case 't':
			b = append(b, '\t')
		case 'u':
			r, ok := code(s[i+1 : end])
			if !ok {
				return "", false
			}
			i += 4
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if strings.HasPrefix(s[i+1:end], `\u`) {
					if low, ok = code(s[i+3 : end]); !ok {
						return "", false
					}
				}
				if r = utf16.DecodeRune(r, low); r != utf8.RuneError {
					i += 6
				}
			}
			b = utf8.AppendRune(b, r)
		default:
			return "", false
		}
		i++
	}
	p.i = end + 1
	return string(b), true
}

// code reads the four digits of an escape.
func code(s string) (rune, bool) {
	if len(s) < 4 {
		return 0, false
	}
	var r rune
	for _, c := range []byte(s[:4]) {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}
