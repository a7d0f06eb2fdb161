package http1

import "bytes"

// This file is what package http2 needs to read a message into a Head and to
// write a Head, edited, as HTTP/2: which fields pass is decided in one place
// for both versions.

// Fields walks over the fields that pass from a Head, edited, to the other
// side: those of the Head that belong to the message and were not removed or
// replaced, then those that the Edit sets and adds. The fields that frame the
// message are not among them.
//
//	for it := e.Fields(h); it.Next(); {
//		b = it.AppendName(b)
//		b = it.AppendValue(b)
//	}
//
// It is a value and allocates nothing.
type Fields struct {
	h       *Head
	e       *Edit
	framing Framing
	at      int // in h.Headers, then e.Set, then e.Add
	stage   uint8

	name  []byte // of a field of the Head
	pair  string // else the name in the Edit
	value []byte
	// checked says that a parser has looked at the value.
	checked bool
	kind    kind
	wrote   written
}

// Fields begins a walk. A nil Edit changes nothing; h and e must not change
// before its end.
func (e *Edit) Fields(h *Head) Fields {
	if e == nil {
		e = &noEdit
	}
	framing, _ := e.framing(h)
	return Fields{h: h, e: e, framing: framing}
}

// noEdit is what a nil *Edit means; nobody writes to it.
var noEdit Edit

var valueTrailers = []byte("trailers")

// Next goes to the next field and reports whether there is one.
func (it *Fields) Next() bool {
	if it.stage == 0 {
		for it.at < len(it.h.Headers) {
			f := &it.h.Headers[it.at]
			it.at++
			if it.passes(f) {
				return true
			}
		}
		it.stage, it.at = 1, 0
	}
	for ; it.stage <= 2; it.stage++ {
		pairs := it.e.Set
		if it.stage == 2 {
			pairs = it.e.Add
		}
		for it.at < len(pairs) {
			p := &pairs[it.at]
			it.at++
			if it.adds(p) {
				return true
			}
		}
		it.at = 0
	}
	return false
}

// passes takes f for the current field, if it passes.
func (it *Fields) passes(f *Header) bool {
	e, k := it.e, f.kind
	it.checked = k != unclassified
	if !it.checked {
		if !isName(f.Name) {
			return false
		}
		k = classify(f.Name)
	}
	it.value = f.Value
	switch k {
	case host:
		if e.sets(f.Name) {
			return false
		}
		it.wrote.host = true
	case expect:
		// HTTP/1.0 has no 100 (Continue) to wait for (RFC 9110 section 10.1.1).
		if f.kind == expect && it.h.Minor == 0 || e.sets(f.Name) || e.removes(f.Name) {
			return false
		}
	case plain:
		if f.hop || e.sets(f.Name) || e.removes(f.Name) {
			return false
		}
	case trailer:
		if it.framing != Chunked || e.sets(f.Name) || e.removes(f.Name) {
			return false
		}
	case upgrade:
		if !e.KeepUpgrade || it.h.flags&sawH2C != 0 {
			return false
		}
		it.wrote.upgrade = true
	case te:
		if it.wrote.te || !acceptsTrailers(f.Value) || e.removes(f.Name) {
			return false
		}
		it.wrote.te = true
		it.value, it.checked = valueTrailers, true
	default:
		return false
	}
	it.name, it.pair, it.kind = f.Name, "", k
	return true
}

// adds takes p for the current field, if it may be written.
func (it *Fields) adds(p *Pair) bool {
	k := kindOf(p.Name)
	switch k {
	case host:
		if it.wrote.host {
			return false // two hosts would be no host
		}
		it.wrote.host = true
	case plain, expect, trailer:
	default:
		return false
	}
	it.name, it.pair, it.value, it.checked, it.kind = nil, p.Name, p.Value, false, k
	return true
}

// AppendName appends the name of the current field, in the case it came in.
func (it *Fields) AppendName(dst []byte) []byte {
	if it.name != nil {
		return append(dst, it.name...)
	}
	return append(dst, it.pair...)
}

// AppendValue appends the value of the current field. Bytes that may not stand
// in a value have become spaces.
func (it *Fields) AppendValue(dst []byte) []byte {
	if it.checked {
		return append(dst, it.value...)
	}
	return appendValue(dst, it.value)
}

// OneHop reports whether the current field is Host or Upgrade, which HTTP/2
// says in another way or not at all (RFC 9113 sections 8.2.2 and 8.3.1).
func (it *Fields) OneHop() bool { return it.kind == host || it.kind == upgrade }

// Authority is the host of a request as edited: that of the first Set that names
// Host, else h.Host. It may be nil.
func (e *Edit) Authority(h *Head) []byte {
	if e != nil {
		for _, pairs := range [...][]Pair{e.Set, e.Add} {
			for i := range pairs {
				if kindOf(pairs[i].Name) == host && (len(h.Host) == 0 || e.sets(nameHost)) {
					return pairs[i].Value
				}
			}
		}
	}
	return h.Host
}

var nameHost = []byte("host")

// Announces is the Content-Length that a message in HTTP/2 has: the length of
// its body if that is known, or what a response to HEAD and a 304 tell; -1 if
// none.
func (e *Edit) Announces(h *Head) int64 {
	if e == nil {
		e = &noEdit
	}
	framing, length := e.framing(h)
	switch {
	case h.Status != 0 && h.Status < 200 || h.Status == 204:
		return -1
	case framing == Length:
		return length
	case framing == None && h.flags&bodiless != 0:
		return h.Length
	default:
		return -1
	}
}

// OriginForm is the path and query of a request target in origin form or
// absolute form, "*" as it is.
func OriginForm(target []byte) []byte {
	_, rest, ok := splitAbsolute(target)
	switch {
	case !ok:
		return target
	case len(rest) == 0:
		return []byte("/")
	case rest[0] == '?':
		return append([]byte("/"), rest...)
	default:
		return rest
	}
}

// Class is what a field that came over HTTP/2 means to the one who reads it.
type Class uint8

const (
	// EndToEnd fields pass as they are.
	EndToEnd Class = iota
	// Routing is Host.
	Routing
	// Sizing is Content-Length.
	Sizing
	// Accepting is TE.
	Accepting
	// Expecting is Expect.
	Expecting
	// OneConnection fields belong to one HTTP/1.1 connection: Connection,
	// Transfer-Encoding, Upgrade and their kin.
	OneConnection
)

// Append adds a field to h and says what it means. The caller has checked it
// with ValidLowerName and ValidValue. A field of Routing, Sizing or
// OneConnection is not added, for the Head says it otherwise or the message is
// malformed.
func (h *Head) Append(name, value []byte) Class {
	k := classify(name)
	var c Class
	switch k {
	case host:
		return Routing
	case contentLength:
		return Sizing
	case connection, upgrade, transferEncoding, hopByHop:
		return OneConnection
	case te:
		c = Accepting
	case expect:
		c = Expecting
		h.Expect100 = h.Expect100 || EqualFold(value, "100-continue")
	default:
	}
	h.Headers = append(h.Headers, Header{Name: name, Value: value, kind: k})
	return c
}

// Bodiless says that h is a response whose request or status forbids a body;
// Length is then what Content-Length announced, or -1.
func (h *Head) Bodiless(length int64) {
	h.flags |= bodiless
	h.Framing, h.Length = None, length
}

// ClassOf is what a field name in lower case means in a trailer section.
func ClassOf(name []byte) Class {
	switch classify(name) {
	case host:
		return Routing
	case contentLength:
		return Sizing
	case te:
		return Accepting
	case expect:
		return Expecting
	case connection, upgrade, transferEncoding, hopByHop:
		return OneConnection
	default:
		return EndToEnd
	}
}

// ForbiddenTrailer reports whether a field may stand in a head only (RFC 9110
// section 6.5.1): trailers of that name are not written.
func ForbiddenTrailer(name []byte) bool { return forbiddenTrailer(name) }

// ValidLowerName reports whether b is a field name as HTTP/2 has it: a token
// without upper-case letters (RFC 9113 section 8.2.1).
func ValidLowerName(b []byte) bool {
	for _, c := range b {
		if class[c]&isToken == 0 || 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return len(b) > 0
}

// ValidName reports whether b is a token.
func ValidName(b []byte) bool { return isName(b) }

// ValidValue reports whether b is a field value without control bytes and
// without white space at its ends.
func ValidValue(b []byte) bool {
	if len(b) == 0 {
		return true
	}
	if first, last := b[0], b[len(b)-1]; first == ' ' || first == '\t' || last == ' ' || last == '\t' {
		return false
	}
	return scanValue(b, 0) == len(b)
}

// AppendValue appends a value that nobody has checked: bytes that may not stand
// in a field value become spaces.
func AppendValue(dst, value []byte) []byte { return appendValue(dst, value) }

// ValidMethod reports whether b is a method as ParseRequest takes it.
func ValidMethod(b []byte) bool {
	for _, c := range b {
		if class[c]&isMethod == 0 {
			return false
		}
	}
	return 0 < len(b) && len(b) <= maxMethod
}

// ValidPath reports whether b is a :path: it begins with '/' and has no control
// bytes, spaces or '#', or is "*" of OPTIONS (RFC 9113 section 8.3.1).
func ValidPath(b, method []byte) bool {
	if len(b) == 0 || b[0] != '/' {
		return len(b) == 1 && b[0] == '*' && bytes.Equal(method, methodOptions)
	}
	for _, c := range b {
		if class[c]&isTarget == 0 {
			return false
		}
	}
	return true
}

var methodOptions = []byte("OPTIONS")

// ParseLength is the number in a Content-Length: digits only, below 2^63.
func ParseLength(b []byte) (int64, bool) { return parseLength(b) }
