package http1

import "strconv"

// Edit is what changes between the head that was read and the head that is
// written. Whatever it says, fields that belong to one connection are not
// copied: Connection and what it names, Keep-Alive, Proxy-Connection,
// HTTP2-Settings, Transfer-Encoding, Content-Length, TE other than "trailers",
// Upgrade unless KeepUpgrade. A nil *Edit changes nothing else.
type Edit struct {
	// Target replaces the target of a request, if not nil.
	Target []byte
	// Set adds headers at the end, in place of all headers of the same names.
	// A name may stand in it twice, which adds two. Names of fields that belong
	// to one connection are ignored, and so are names that are no tokens;
	// bytes that may not stand in a value become spaces.
	Set []Pair
	// Add is Set that leaves present headers of the same names alone.
	Add []Pair
	// Remove names headers to leave out. Host can be replaced, not removed.
	Remove []string
	// Close announces that the connection closes after this message.
	Close bool
	// KeepAlive announces that it stays open, for a client of HTTP/1.0 that
	// asked; HTTP/1.1 needs no word for it.
	KeepAlive bool
	// KeepUpgrade copies Upgrade and announces it in Connection.
	KeepUpgrade bool
	// Framing and Length of the body that the caller will write, if not zero;
	// else as the Head says. A request cannot be UntilClose; a response that
	// is gets Connection: close.
	Framing Framing
	Length  int64
	// NoBody says that a response answers HEAD or opens a tunnel, where the
	// Head was not parsed and cannot know: Framing None then invents no
	// Content-Length: 0.
	NoBody bool
}

// Pair is a header to write.
type Pair struct {
	Name  string
	Value []byte
}

// AppendRequestHead appends the request line and the headers of h, edited by
// e, with the empty line, to dst. The version is HTTP/1.1 whatever h came in
// (RFC 9112 section 2.3), so a Host is written even if h had none: the one in
// h.Host.
func AppendRequestHead(dst []byte, h *Head, e *Edit) []byte {
	if e == nil {
		e = &Edit{}
	}
	dst = append(dst, h.Method...)
	dst = append(dst, ' ')
	if e.Target != nil {
		dst = append(dst, e.Target...)
	} else {
		dst = append(dst, h.Target...)
	}
	dst = append(dst, " HTTP/1.1\r\n"...)
	framing, length := e.framing(h)
	if framing == UntilClose {
		panic("http1: a request body cannot end with the connection")
	}
	dst, wrote := e.appendFields(dst, h, framing)
	if !wrote.host {
		dst = append(dst, "Host: "...)
		dst = appendValue(dst, h.Host)
		dst = append(dst, "\r\n"...)
	}
	switch framing {
	case Length:
		dst = appendLength(dst, length)
	case Chunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	default:
	}
	return e.appendConnection(dst, e.Close, wrote)
}

// AppendResponseHead appends the status line and the headers of h, edited by
// e, with the empty line, to dst. The version is HTTP/1.1; whether the client
// can take chunks is for the caller to know, who chooses the framing.
func AppendResponseHead(dst []byte, h *Head, e *Edit) []byte {
	if e == nil {
		e = &Edit{}
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(h.Status), 10)
	dst = append(dst, ' ')
	dst = appendValue(dst, h.Reason)
	dst = append(dst, "\r\n"...)
	framing, length := e.framing(h)
	dst, wrote := e.appendFields(dst, h, framing)
	switch {
	case h.Status < 200 || h.Status == 204:
		// Neither framing field may stand here (RFC 9112 sections 6.1, 6.2).
	case framing == Length:
		dst = appendLength(dst, length)
	case framing == Chunked:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
	case framing == UntilClose:
		return e.appendConnection(dst, true, wrote)
	case h.flags&bodiless != 0:
		// What the length would have been, which HEAD and 304 may tell.
		if h.Length >= 0 {
			dst = appendLength(dst, h.Length)
		}
	case !e.NoBody && h.Status != 304:
		dst = append(dst, "Content-Length: 0\r\n"...)
	}
	return e.appendConnection(dst, e.Close, wrote)
}

// framing is what the body will be framed by.
func (e *Edit) framing(h *Head) (Framing, int64) {
	if e.Framing != 0 {
		return e.Framing, e.Length
	}
	return h.Framing, h.Length
}

func appendLength(dst []byte, n int64) []byte {
	dst = append(dst, "Content-Length: "...)
	dst = strconv.AppendInt(dst, n, 10)
	return append(dst, "\r\n"...)
}

// written is what appendFields wrote that the rest of the head depends on.
type written struct{ host, upgrade, te bool }

func (e *Edit) appendFields(dst []byte, h *Head, framing Framing) ([]byte, written) {
	it := Fields{h: h, e: e, framing: framing}
	for it.Next() {
		dst = it.AppendName(dst)
		dst = append(dst, ": "...)
		dst = it.AppendValue(dst)
		dst = append(dst, "\r\n"...)
	}
	return dst, it.wrote
}

// kindOf is the kind of a field that is not from a parser; a name that is no
// token is unclassified.
func kindOf(name string) kind {
	var buf [32]byte
	for i := 0; i < len(name); i++ {
		if class[name[i]]&isToken == 0 {
			return unclassified
		}
	}
	switch {
	case len(name) == 0:
		return unclassified
	case len(name) > len(buf):
		return plain // no field of another kind has so long a name
	default:
		return classify(buf[:copy(buf[:], name)])
	}
}

func isName(b []byte) bool {
	for _, c := range b {
		if class[c]&isToken == 0 {
			return false
		}
	}
	return len(b) > 0
}

func (e *Edit) sets(name []byte) bool {
	for i := range e.Set {
		if EqualFold(name, e.Set[i].Name) {
			return true
		}
	}
	return false
}

func (e *Edit) removes(name []byte) bool {
	for _, s := range e.Remove {
		if EqualFold(name, s) {
			return true
		}
	}
	return false
}

func acceptsTrailers(value []byte) bool {
	for rest := value; rest != nil; {
		var coding []byte
		if coding, rest = element(rest); EqualFold(coding, "trailers") {
			return true
		}
	}
	return false
}

// appendConnection writes the one Connection header and the empty line.
func (e *Edit) appendConnection(dst []byte, closes bool, w written) []byte {
	separator := "Connection: "
	option := func(on bool, name string) {
		if on {
			dst = append(dst, separator...)
			dst = append(dst, name...)
			separator = ", "
		}
	}
	option(closes, "close")
	option(e.KeepAlive && !closes, "keep-alive")
	option(w.upgrade, "Upgrade")
	option(w.te, "TE")
	if separator == ", " {
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}

// appendValue appends a value that no parser has checked: bytes that may not
// stand in a field value become spaces.
func appendValue(dst, value []byte) []byte {
	for {
		i := scanValue(value, 0)
		dst = append(dst, value[:i]...)
		if i == len(value) {
			return dst
		}
		dst = append(dst, ' ')
		value = value[i+1:]
	}
}

// AppendChunkHeader appends the line that precedes n bytes of chunk data. The
// caller writes the data and then ChunkEnd. It panics if n is not positive,
// because a chunk of no bytes would end the body; AppendLastChunk does that.
func AppendChunkHeader(dst []byte, n int) []byte {
	if n <= 0 {
		panic("http1: a chunk of no bytes ends the body")
	}
	dst = strconv.AppendInt(dst, int64(n), 16)
	return append(dst, "\r\n"...)
}

// ChunkEnd follows the data of every chunk but the last.
const ChunkEnd = "\r\n"

// AppendLastChunk appends the end of a chunked body with its trailers, if any.
// Trailers that may not stand there are left out, as Body rejects them.
func AppendLastChunk(dst []byte, trailers []Header) []byte {
	dst = append(dst, "0\r\n"...)
	for i := range trailers {
		f := &trailers[i]
		if !isName(f.Name) || forbiddenTrailer(f.Name) {
			continue
		}
		dst = append(dst, f.Name...)
		dst = append(dst, ": "...)
		dst = appendValue(dst, f.Value)
		dst = append(dst, "\r\n"...)
	}
	return append(dst, "\r\n"...)
}
