package route

import (
	"regexp"
	"slices"
	"strconv"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// Change sets, adds and removes header fields. Names are in lower case. It is
// never changed once made; what a request needs of it is ready to be written.
type Change struct {
	// Set is in place of all fields of the same names.
	Set []http1.Pair
	// Add leaves the fields of the same names alone.
	Add []http1.Pair
	// Remove is done before Set and Add.
	Remove []string
}

// Empty reports whether the Change does nothing.
func (c *Change) Empty() bool { return len(c.Set) == 0 && len(c.Add) == 0 && len(c.Remove) == 0 }

// Then is a Change that does what c does and then what d does. Neither shares
// memory with it.
func (c Change) Then(d Change) Change {
	out := Change{Set: slices.Clone(c.Set), Add: slices.Clone(c.Add), Remove: slices.Clone(c.Remove)}
	drop := func(name string) {
		is := func(p http1.Pair) bool { return p.Name == name }
		out.Set, out.Add = slices.DeleteFunc(out.Set, is), slices.DeleteFunc(out.Add, is)
	}
	for _, name := range d.Remove {
		drop(name)
		if !slices.Contains(out.Remove, name) {
			out.Remove = append(out.Remove, name)
		}
	}
	set := map[string]bool{}
	for _, p := range d.Set {
		if !set[p.Name] {
			drop(p.Name)
			set[p.Name] = true
		}
		out.Set = append(out.Set, p)
	}
	for _, p := range d.Add {
		// What replaces a field may stand twice, which adds it.
		if slices.ContainsFunc(out.Set, func(s http1.Pair) bool { return s.Name == p.Name }) {
			out.Set = append(out.Set, p)
		} else {
			out.Add = append(out.Add, p)
		}
	}
	return out
}

// PathRewrite is what becomes of a path. Where neither Full nor Regex is set,
// From is replaced by Prefix.
type PathRewrite struct {
	// Full replaces the whole path.
	Full string
	// From and Prefix are whole path elements (Gateway API, ReplacePrefixMatch):
	// neither ends in a slash, so that "/" is empty.
	From, Prefix string
	// Regex replaces every match by Substitution, in which \1 is the first group
	// and \0 the match (Envoy's RegexMatchAndSubstitute).
	Regex        *regexp.Regexp
	Substitution []byte // in the template form of package regexp
}

// Append appends the new path to dst. It begins with a slash whatever the
// configuration says.
func (r *PathRewrite) Append(dst, path []byte) []byte {
	at := len(dst)
	switch {
	case r.Full != "":
		dst = append(dst, r.Full...)
	case r.Regex != nil:
		last := 0
		for _, m := range r.Regex.FindAllSubmatchIndex(path, maxReplacements) {
			dst = append(dst, path[last:m[0]]...)
			dst = r.Regex.Expand(dst, r.Substitution, path, m)
			last = m[1]
		}
		dst = append(dst, path[last:]...)
	case len(path) >= len(r.From) && string(path[:len(r.From)]) == r.From:
		dst = append(append(dst, r.Prefix...), path[len(r.From):]...)
	default:
		dst = append(dst, path...)
	}
	if len(dst) == at || dst[at] != '/' {
		dst = slices.Insert(dst, at, '/')
	}
	return dst
}

// maxReplacements bounds the matches of a PathRewrite that are replaced.
const maxReplacements = 64

// Substitution turns Envoy's form of a replacement, where \1 is a group and \\ a
// backslash, into that of package regexp.
func Substitution(s string) []byte {
	var out []byte
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '$':
			out = append(out, "$$"...)
		case c == '\\' && i+1 < len(s) && s[i+1] >= '0' && s[i+1] <= '9':
			i++
			out = append(out, '$', '{', s[i], '}')
		case c == '\\' && i+1 < len(s) && s[i+1] == '\\':
			i++
			out = append(out, '\\')
		default:
			out = append(out, c)
		}
	}
	return out
}

// Redirect answers a request with another place. What is empty stays as the
// request has it.
type Redirect struct {
	Status int // 301, 302, 303, 307 or 308
	Scheme string
	Host   string
	Port   uint16
	Path   *PathRewrite
	// Response changes the answer's header.
	Response Change
}

// AppendLocation appends the URL to which a request with the Host, the path and
// the query (nil: none) is led. scheme is the one that it came by.
func (r *Redirect) AppendLocation(dst []byte, scheme string, host, path, query []byte) []byte {
	name, port := splitPort(host)
	from := scheme
	if r.Scheme != "" {
		scheme = r.Scheme
	}
	if scheme != from && (port == defaultPort(from) || port == defaultPort(scheme)) {
		port = "" // of the scheme that it was
	}
	dst = append(append(dst, scheme...), "://"...)
	if r.Host != "" {
		dst, port = append(dst, r.Host...), ""
	} else {
		dst = append(dst, name...)
	}
	if r.Port != 0 {
		port = strconv.Itoa(int(r.Port))
	}
	if port != "" && port != defaultPort(scheme) {
		dst = append(append(dst, ':'), port...)
	}
	if r.Path != nil {
		dst = r.Path.Append(dst, path)
	} else {
		dst = append(dst, path...)
	}
	if query != nil {
		dst = append(append(dst, '?'), query...)
	}
	return dst
}

func defaultPort(scheme string) string {
	if scheme == "https" {
		return "443"
	}
	return "80"
}

// splitPort splits a Host; an IPv6 address is in brackets.
func splitPort(host []byte) (name []byte, port string) {
	for i := len(host) - 1; i >= 0; i-- {
		switch c := host[i]; {
		case c == ':':
			return host[:i], string(host[i+1:])
		case c < '0' || c > '9':
			return host, ""
		}
	}
	return host, ""
}
