package route

import (
	"fmt"
	"math/bits"
	"regexp"
)

// Request is what routes look at. The byte slices are only read, and not kept.
type Request struct {
	Method []byte
	// Path without the query, normalised.
	Path []byte
	// RawQuery is what follows '?', still escaped.
	RawQuery []byte
	// Headers may be nil: no header matches then.
	Headers Headers
}

// Headers looks up a header by its name in lower case. A header that was sent
// several times is presented as one value, joined by commas (RFC 9110, 5.3).
type Headers interface {
	Lookup(name string) (value []byte, ok bool)
}

// Match returns the first route that the request matches, or nil. It allocates
// nothing, except to unescape a query value for a regular expression.
func (c *Config) Match(r *Request) *Route {
	for i := range c.Routes {
		if c.Routes[i].Match.matches(r) {
			return &c.Routes[i]
		}
	}
	return nil
}

func (m *Match) matches(r *Request) bool {
	switch {
	case m.Path != "":
		if string(r.Path) != m.Path {
			return false
		}
	case m.Prefix != "":
		if !hasPathPrefix(r.Path, m.Prefix) {
			return false
		}
	case m.PathRegex != nil:
		if !m.PathRegex.Match(r.Path) {
			return false
		}
	}
	if m.Method != "" && string(r.Method) != m.Method {
		return false
	}
	for i := range m.Headers {
		h := &m.Headers[i]
		if r.Headers == nil {
			return false
		}
		v, ok := r.Headers.Lookup(h.Name)
		if !ok || !h.accepts(v) {
			return false
		}
	}
	for i := range m.Query {
		if !m.Query[i].matchesQuery(r.RawQuery) {
			return false
		}
	}
	return true
}

// hasPathPrefix compares whole path elements. A slash at the end of the prefix
// means nothing (Gateway API, PathMatchPathPrefix).
func hasPathPrefix(path []byte, prefix string) bool {
	if prefix[len(prefix)-1] == '/' {
		prefix = prefix[:len(prefix)-1]
	}
	return len(path) >= len(prefix) && string(path[:len(prefix)]) == prefix &&
		(len(path) == len(prefix) || path[len(prefix)] == '/' || prefix == "")
}

func (v *Value) accepts(b []byte) bool {
	if v.Regex != nil {
		return v.Regex.Match(b)
	}
	return string(b) == v.Exact
}

// matchesQuery looks at the first parameter of the name; others of the same
// name do not count.
func (v *Value) matchesQuery(raw []byte) bool {
	for len(raw) > 0 {
		pair := raw
		raw = nil
		for i, b := range pair {
			if b == '&' {
				pair, raw = pair[:i], pair[i+1:]
				break
			}
		}
		name, value := pair, []byte(nil)
		for i, b := range pair {
			if b == '=' {
				name, value = pair[:i], pair[i+1:]
				break
			}
		}
		if len(pair) == 0 || !equalUnescaped(name, v.Name) {
			continue
		}
		if v.Regex == nil {
			return equalUnescaped(value, v.Exact)
		}
		return v.Regex.Match(unescaped(value))
	}
	return false
}

// next takes one unescaped byte off a query component: "+" is a space and "%XX"
// the byte XX; a '%' that begins no escape stands for itself.
func next(b []byte) (c byte, rest []byte) {
	switch {
	case b[0] == '+':
		return ' ', b[1:]
	case b[0] == '%' && len(b) >= 3:
		hi, ok1 := unhex(b[1])
		lo, ok2 := unhex(b[2])
		if ok1 && ok2 {
			return hi<<4 | lo, b[3:]
		}
	}
	return b[0], b[1:]
}

func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

func equalUnescaped(b []byte, want string) bool {
	for i := range len(want) {
		if len(b) == 0 {
			return false
		}
		var c byte
		if c, b = next(b); c != want[i] {
			return false
		}
	}
	return len(b) == 0
}

func unescaped(b []byte) []byte {
	plain := true
	for _, c := range b {
		plain = plain && c != '+' && c != '%'
	}
	if plain {
		return b
	}
	out := make([]byte, 0, len(b))
	for len(b) > 0 {
		var c byte
		c, b = next(b)
		out = append(out, c)
	}
	return out
}

// Pick chooses one of the route's clusters by weight; rnd is random. It is not
// ok where the weights add up to zero: the request is answered 500.
func (r *Route) Pick(rnd uint64) (cluster string, ok bool) {
	if w := r.Choose(rnd); w != nil {
		return w.Cluster, true
	}
	return "", false
}

// Choose is Pick with what goes with the cluster; nil where it is not ok.
func (r *Route) Choose(rnd uint64) *Weighted {
	var total uint64
	for i := range r.Clusters {
		total += uint64(r.Clusters[i].Weight)
	}
	point, _ := bits.Mul64(rnd, total)
	for i := range r.Clusters {
		w := uint64(r.Clusters[i].Weight)
		if point < w {
			return &r.Clusters[i]
		}
		point -= w
	}
	return nil
}

// MaxRegex bounds the length of an expression, in bytes.
const MaxRegex = 4096

// Compile makes an expression for Match and Value: RE2, matching the whole
// value. Expressions longer than MaxRegex are refused.
func Compile(expr string) (*regexp.Regexp, error) {
	if len(expr) > MaxRegex {
		return nil, fmt.Errorf("the regular expression has %d bytes; %d are allowed", len(expr), MaxRegex)
	}
	// Alone first: wrapped, an unbalanced expression may turn into another one.
	if _, err := regexp.Compile(expr); err != nil {
		return nil, err
	}
	return regexp.Compile(`\A(?:` + expr + `)\z`)
}

// CompilePart makes an expression for PathRewrite: RE2, matching anywhere.
// Expressions longer than MaxRegex are refused.
func CompilePart(expr string) (*regexp.Regexp, error) {
	if len(expr) > MaxRegex {
		return nil, fmt.Errorf("the regular expression has %d bytes; %d are allowed", len(expr), MaxRegex)
	}
	return regexp.Compile(expr)
}
