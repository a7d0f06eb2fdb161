package http2

import (
	"bytes"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// section is a field section as it is decompressed and checked (RFC 9113
// section 8.2 and 8.3). A connection has one and uses it again and again.
type section struct {
	dec *hpack.Decoder

	// b holds names and values; fields says where.
	b      []byte
	fields []span

	method, scheme, authority, path, status span
	seen                                    pseudo
	cookies                                 int
	cookieBytes                             int

	// size is what RFC 9113 section 6.5.2 counts; left is what may still come.
	left    int
	most    int
	tooMuch bool
	reason  string // the first defect
}

// span is a field in section.b: the name, then the value behind it.
type span struct {
	at, name, value int32
	cookie          bool
}

// pseudo is a set of pseudo-header fields.
type pseudo uint8

const (
	sawMethod pseudo = 1 << iota
	sawScheme
	sawAuthority
	sawPath
	sawStatus
	sawRegular
)

func (s *section) init(maxBytes int) {
	s.dec = hpack.NewDecoder(tableSize, s.emit)
	s.dec.SetMaxStringLength(maxBytes)
}

// begin forgets the last section.
func (s *section) begin(maxBytes, maxFields int) {
	s.b, s.fields = s.b[:0], s.fields[:0]
	s.method, s.scheme, s.authority, s.path, s.status = span{}, span{}, span{}, span{}, span{}
	s.seen, s.cookies, s.cookieBytes = 0, 0, 0
	s.left, s.most, s.tooMuch, s.reason = maxBytes, maxFields, false, ""
	s.dec.SetEmitEnabled(true)
}

// trim gives large buffers back.
func (s *section) trim() {
	if cap(s.b) > 4<<10 {
		s.b = nil
	}
	if cap(s.fields) > 64 {
		s.fields = nil
	}
}

// emit takes a field from the decoder.
func (s *section) emit(f hpack.HeaderField) {
	s.left -= len(f.Name) + len(f.Value) + 32
	if s.left < 0 || len(s.fields) >= s.most {
		s.tooMuch = true
		// The rest only keeps the table in step.
		s.dec.SetEmitEnabled(false)
		return
	}
	sp := span{at: int32(len(s.b)), name: int32(len(f.Name)), value: int32(len(f.Value))}
	s.b = append(append(s.b, f.Name...), f.Value...)
	if s.reason != "" {
		return
	}
	value := s.value(sp)
	if !http1.ValidValue(value) {
		s.reason = ReasonValue
		return
	}
	if len(f.Name) > 0 && f.Name[0] == ':' {
		s.pseudo(f.Name, sp)
		return
	}
	s.seen |= sawRegular
	if !http1.ValidLowerName(s.name(sp)) {
		s.reason = ReasonName
		return
	}
	if f.Name == "cookie" {
		sp.cookie = true
		s.cookies++
		s.cookieBytes += len(f.Value) + len("; ")
	}
	s.fields = append(s.fields, sp)
}

func (s *section) pseudo(name string, sp span) {
	var bit pseudo
	var at *span
	switch name {
	case ":method":
		bit, at = sawMethod, &s.method
	case ":scheme":
		bit, at = sawScheme, &s.scheme
	case ":authority":
		bit, at = sawAuthority, &s.authority
	case ":path":
		bit, at = sawPath, &s.path
	case ":status":
		bit, at = sawStatus, &s.status
	}
	if at == nil || s.seen&(bit|sawRegular) != 0 {
		s.reason = ReasonPseudoHeader
		return
	}
	s.seen |= bit
	*at = sp
}

func (s *section) name(sp span) []byte  { return s.b[sp.at : sp.at+sp.name] }
func (s *section) value(sp span) []byte { return s.b[sp.at+sp.name : sp.at+sp.name+sp.value] }

// message is what a section says about its message besides the Head.
type message struct {
	length  int64 // -1: not given
	hasHost bool
	sawTE   bool
}

// into appends the regular fields to h, in bytes that are in arena, and returns
// the arena and a reason if they are malformed.
func (s *section) into(h *http1.Head, arena []byte, m *message) (_ []byte, reason string) {
	m.length = -1
	// Room for all at once, so that no slice is left in an old array.
	if need := len(s.b) + s.cookieBytes; cap(arena)-len(arena) < need {
		grown := make([]byte, len(arena), max(2*cap(arena), len(arena)+need, 512))
		copy(grown, arena)
		arena = grown
	}
	base := len(arena)
	arena = append(arena, s.b...)
	cookies := false
	for _, sp := range s.fields {
		at := base + int(sp.at)
		mid, end := at+int(sp.name), at+int(sp.name)+int(sp.value)
		name, value := arena[at:mid:mid], arena[mid:end:end]
		if sp.cookie && s.cookies > 1 {
			// One field, where the first was (RFC 9113 section 8.2.3).
			if cookies {
				continue
			}
			cookies = true
			value, arena = s.joinCookies(arena)
		}
		switch h.Append(name, value) {
		case http1.Sizing:
			n, ok := http1.ParseLength(value)
			if !ok || m.length >= 0 {
				return arena, ReasonLength
			}
			m.length = n
		case http1.Routing:
			if m.hasHost {
				return arena, ReasonHost
			}
			m.hasHost, h.Host = true, value
		case http1.OneConnection:
			return arena, ReasonConnectionField
		case http1.Accepting:
			if m.sawTE || !http1.EqualFold(value, "trailers") {
				return arena, ReasonConnectionField
			}
			m.sawTE = true
		default:
		}
	}
	return arena, ""
}

func (s *section) joinCookies(arena []byte) (value, _ []byte) {
	start, first := len(arena), true
	for _, sp := range s.fields {
		if !sp.cookie {
			continue
		}
		if !first { // also where the first one is empty
			arena = append(arena, "; "...)
		}
		first = false
		arena = append(arena, s.value(sp)...)
	}
	return arena[start:len(arena):len(arena)], arena
}

// keep copies a pseudo-header field's value to arena; into has made room for
// the bytes of s.b, which is where it is.
func (s *section) keep(sp span, base int, arena []byte) []byte {
	at := base + int(sp.at+sp.name)
	end := at + int(sp.value)
	return arena[at:end:end]
}

// request makes h of a section of a request. It returns the arena, and a reason
// if the request is malformed.
func (s *section) request(h *http1.Head, arena []byte, end bool) (_ []byte, reason string) {
	h.Reset()
	if s.reason != "" {
		return arena, s.reason
	}
	base := len(arena)
	var m message
	if arena, reason = s.into(h, arena, &m); reason != "" {
		return arena, reason
	}
	h.Minor = 1
	h.Method = s.keep(s.method, base, arena)
	switch {
	case s.seen&sawMethod == 0 || s.seen&sawStatus != 0:
		return arena, ReasonPseudoHeader
	case !http1.ValidMethod(h.Method):
		return arena, ReasonPseudoHeader
	}
	authority := s.keep(s.authority, base, arena)
	if s.seen&sawAuthority != 0 {
		if m.hasHost && !bytes.EqualFold(authority, h.Host) {
			return arena, ReasonHost
		}
		h.Host = authority
	}
	if !http1.ValidHost(h.Host) {
		return arena, ReasonHost
	}
	if string(h.Method) == "CONNECT" {
		// RFC 9113 section 8.5; extended CONNECT (RFC 8441) is not offered.
		if s.seen&(sawScheme|sawPath) != 0 || s.seen&sawAuthority == 0 {
			return arena, ReasonPseudoHeader
		}
		h.Target = authority
	} else {
		h.Target = s.keep(s.path, base, arena)
		scheme := s.keep(s.scheme, base, arena)
		switch {
		case s.seen&(sawScheme|sawPath) != sawScheme|sawPath:
			return arena, ReasonPseudoHeader
		case string(scheme) != "http" && string(scheme) != "https":
			return arena, ReasonPseudoHeader
		case !http1.ValidPath(h.Target, h.Method):
			return arena, ReasonPath
		}
	}
	switch {
	case end && m.length > 0:
		return arena, ReasonLength
	case end && m.length < 0:
		h.Framing, h.Length = http1.None, -1
	case m.length >= 0:
		h.Framing, h.Length = http1.Length, m.length
	default:
		h.Framing, h.Length = http1.Chunked, -1
	}
	return arena, ""
}

// response is request for a response to a request that was HEAD or was not.
func (s *section) response(h *http1.Head, arena []byte, end, isHead bool) (_ []byte, reason string) {
	h.Reset()
	if s.reason != "" {
		return arena, s.reason
	}
	base := len(arena)
	var m message
	if arena, reason = s.into(h, arena, &m); reason != "" {
		return arena, reason
	}
	if s.seen != sawStatus && s.seen != sawStatus|sawRegular {
		return arena, ReasonPseudoHeader
	}
	h.Host = nil
	status := s.keep(s.status, base, arena)
	if len(status) != 3 || status[0] < '1' || status[0] > '9' {
		return arena, ReasonPseudoHeader
	}
	n, err := strconv.ParseUint(string(status), 10, 16)
	if err != nil {
		return arena, ReasonPseudoHeader
	}
	h.Status, h.Minor = int(n), 1
	switch {
	case h.Status == 101:
		return arena, ReasonPseudoHeader // RFC 9113 section 8.6
	case h.Status < 200:
		if end || m.length > 0 {
			return arena, ReasonResponse
		}
		h.Bodiless(-1)
	case isHead || h.Status == 204 || h.Status == 304:
		h.Bodiless(m.length)
	case end && m.length > 0:
		return arena, ReasonLength
	case m.length >= 0:
		h.Framing, h.Length = http1.Length, m.length
	case end:
		h.Framing, h.Length = http1.None, -1
	default:
		h.Framing, h.Length = http1.Chunked, -1
	}
	return arena, ""
}

// trailers appends the fields of a trailer section to t.
func (s *section) trailers(t []http1.Header, arena []byte) (_ []http1.Header, _ []byte, reason string) {
	if s.reason != "" {
		return t, arena, s.reason
	}
	if s.seen&^sawRegular != 0 {
		return t, arena, ReasonPseudoHeader
	}
	if cap(arena)-len(arena) < len(s.b) {
		grown := make([]byte, len(arena), len(arena)+len(s.b))
		copy(grown, arena)
		arena = grown
	}
	base := len(arena)
	arena = append(arena, s.b...)
	for _, sp := range s.fields {
		at := base + int(sp.at)
		mid, end := at+int(sp.name), at+int(sp.name)+int(sp.value)
		name, value := arena[at:mid:mid], arena[mid:end:end]
		switch http1.ClassOf(name) {
		case http1.OneConnection:
			return t, arena, ReasonConnectionField
		case http1.Routing, http1.Sizing, http1.Accepting:
			continue // says nothing behind a body (RFC 9110 section 6.5.1)
		default:
			t = append(t, http1.Header{Name: name, Value: value})
		}
	}
	return t, arena, ""
}

// scratch holds a field while it is compressed.
type scratch []byte

// appendRequest compresses the head of a request.
func (e *encoder) appendRequest(dst []byte, h *http1.Head, ed *http1.Edit, scheme string, s *scratch) []byte {
	dst = e.begin(dst)
	connect := false
	switch string(h.Method) {
	case "GET":
		dst = append(dst, staticGET)
	case "POST":
		dst = append(dst, staticPOST)
	default:
		connect = string(h.Method) == "CONNECT"
		dst = e.field(dst, fieldMethod, h.Method)
	}
	if !connect {
		switch scheme {
		case "http":
			dst = append(dst, staticHTTP)
		default:
			dst = append(dst, staticHTTPS)
		}
		target := h.Target
		if ed != nil && ed.Target != nil {
			target = ed.Target
		}
		if target = http1.OriginForm(target); len(target) == 1 && target[0] == '/' {
			dst = append(dst, staticRoot)
		} else {
			dst = e.field(dst, fieldPath, target)
		}
	}
	if host := ed.Authority(h); len(host) > 0 {
		*s = http1.AppendValue((*s)[:0], host)
		dst = e.field(dst, fieldAuthority, *s)
	}
	return e.appendFields(dst, h, ed, s)
}

// appendResponse compresses the head of a response.
func (e *encoder) appendResponse(dst []byte, h *http1.Head, ed *http1.Edit, s *scratch) []byte {
	dst = e.begin(dst)
	if h.Status == 200 {
		dst = append(dst, static200)
	} else {
		*s = strconv.AppendInt((*s)[:0], int64(h.Status), 10)
		dst = e.field(dst, fieldStatus, *s)
	}
	return e.appendFields(dst, h, ed, s)
}

var (
	fieldMethod    = []byte(":method")
	fieldPath      = []byte(":path")
	fieldAuthority = []byte(":authority")
	fieldStatus    = []byte(":status")
	fieldLength    = []byte("content-length")
)

func (e *encoder) appendFields(dst []byte, h *http1.Head, ed *http1.Edit, s *scratch) []byte {
	for it := ed.Fields(h); it.Next(); {
		if it.OneHop() {
			continue
		}
		b := it.AppendName((*s)[:0])
		toLower(b)
		n := len(b)
		b = it.AppendValue(b)
		*s = b
		dst = e.field(dst, b[:n], trimSpace(b[n:]))
	}
	if n := ed.Announces(h); n >= 0 {
		*s = strconv.AppendInt((*s)[:0], n, 10)
		dst = e.field(dst, fieldLength, *s)
	}
	return dst
}

// appendTrailers compresses a trailer section. Fields that may not stand in one
// are left out.
func (e *encoder) appendTrailers(dst []byte, t []http1.Header, s *scratch) []byte {
	dst = e.begin(dst)
	for i := range t {
		f := &t[i]
		if !http1.ValidName(f.Name) || http1.ForbiddenTrailer(f.Name) {
			continue
		}
		b := append((*s)[:0], f.Name...)
		toLower(b)
		n := len(b)
		b = http1.AppendValue(b, f.Value)
		*s = b
		dst = e.field(dst, b[:n], trimSpace(b[n:]))
	}
	return dst
}

func toLower(b []byte) {
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c | 0x20
		}
	}
}

func trimSpace(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}
