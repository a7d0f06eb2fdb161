package http1

import "encoding/binary"

// Classes of bytes, one bit each.
const (
	isToken  = 1 << iota // RFC 9110 section 5.6.2
	isMethod             // upper-case subset of a token
	isTarget             // may stand in a request target: no control, space, '#'
	isValue              // may stand in a field value: HTAB, SP, VCHAR, obs-text
	isHost               // may stand in a host name
	isPath               // pchar without '%', and '/' (RFC 3986 section 3.3)
	isUnreserved
	isHex
)

// class is indexed by byte.
var class = classes()

func classes() (t [256]uint8) {
	set := func(bit uint8, bytes string) {
		for i := 0; i < len(bytes); i++ {
			t[bytes[i]] |= bit
		}
	}
	const (
		upper = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
		lower = "abcdefghijklmnopqrstuvwxyz"
		digit = "0123456789"
		alnum = upper + lower + digit
	)
	set(isToken, alnum+"!#$%&'*+-.^_`|~")
	set(isMethod, upper+digit+"-_")
	set(isHost, alnum+"-._")
	set(isPath, alnum+"-._~!$&'()*+,;=:@/")
	set(isUnreserved, alnum+"-._~")
	set(isHex, digit+"ABCDEFabcdef")
	for c := 0x20; c < 256; c++ {
		if c == 0x7f {
			continue
		}
		t[c] |= isValue
		if c != ' ' && c != '#' {
			t[c] |= isTarget
		}
	}
	t['\t'] |= isValue
	return t
}

// scanValue is the index of the first byte of b[i:] that may not stand in a
// field value, or len(b).
func scanValue(b []byte, i int) int {
	const (
		ones  = 0x0101010101010101
		highs = 0x8080808080808080
	)
	for {
		// Eight bytes at a time: a high bit is set where a byte is below 0x20 or
		// is 0x7f. Borrows between bytes can only set too many bits, and then
		// the bytes are looked at one by one.
		for len(b)-i >= 8 {
			x := binary.LittleEndian.Uint64(b[i:])
			del := x ^ 0x7f*ones
			if ((x-0x20*ones)&^x|(del-ones)&^del)&highs != 0 {
				break
			}
			i += 8
		}
		end := min(i+8, len(b))
		for i < end && class[b[i]]&isValue != 0 {
			i++
		}
		if i < end || end == len(b) {
			return i
		}
	}
}

// kind is what the codec itself has to do with a field.
type kind uint8

const (
	unclassified     kind = iota // built by hand, not parsed
	plain                        // forwarded as it is
	host                         // request routing
	contentLength                // framing
	transferEncoding             // framing
	connection                   // connection options
	upgrade                      // forwarded only when upgrading
	te                           // forwarded as "trailers" only
	trailer                      // forwarded with chunked bodies only
	expect                       // forwarded; Head.Expect100
	hopByHop                     // never forwarded
)

func classify(name []byte) kind {
	switch len(name) {
	case 2:
		if EqualFold(name, "te") {
			return te
		}
	case 4:
		if EqualFold(name, "host") {
			return host
		}
	case 6:
		if EqualFold(name, "expect") {
			return expect
		}
	case 7:
		if EqualFold(name, "upgrade") {
			return upgrade
		}
		if EqualFold(name, "trailer") {
			return trailer
		}
	case 10:
		if EqualFold(name, "connection") {
			return connection
		}
		if EqualFold(name, "keep-alive") {
			return hopByHop
		}
	case 14:
		if EqualFold(name, "content-length") {
			return contentLength
		}
		// HTTP2-Settings travels with "Upgrade: h2c", which is never forwarded.
		if EqualFold(name, "http2-settings") {
			return hopByHop
		}
	case 16:
		if EqualFold(name, "proxy-connection") {
			return hopByHop
		}
	case 17:
		if EqualFold(name, "transfer-encoding") {
			return transferEncoding
		}
	}
	return plain
}

// endToEnd reports whether a Connection header that names this field is to be
// disobeyed: the field is meant for the far end or was set by the mesh, and
// letting a client strip it would let it strip its own trace, identity or
// provenance.
func endToEnd(name []byte) bool {
	if hasPrefixFold(name, "x-forwarded-") || hasPrefixFold(name, "x-outrigger-") ||
		hasPrefixFold(name, "x-b3-") || hasPrefixFold(name, "x-envoy-") ||
		hasPrefixFold(name, "content-") || hasPrefixFold(name, "grpc-") {
		return true
	}
	switch len(name) {
	case 2:
		return EqualFold(name, "b3")
	case 3:
		return EqualFold(name, "via")
	case 4:
		return EqualFold(name, "date")
	case 6:
		return EqualFold(name, "cookie") || EqualFold(name, "origin") || EqualFold(name, "accept")
	case 7:
		return EqualFold(name, "baggage")
	case 9:
		return EqualFold(name, "forwarded") || EqualFold(name, "x-real-ip")
	case 10:
		return EqualFold(name, "tracestate") || EqualFold(name, "set-cookie")
	case 11:
		return EqualFold(name, "traceparent")
	case 12:
		return EqualFold(name, "x-request-id")
	case 13:
		return EqualFold(name, "authorization") || EqualFold(name, "cache-control")
	default:
		return false
	}
}

// forbiddenTrailer reports whether a field may stand only in a head, because
// it frames, routes, authenticates or controls the message (RFC 9110 section
// 6.5.1) or because the mesh sets it.
func forbiddenTrailer(name []byte) bool {
	switch classify(name) {
	case plain:
	default:
		return true
	}
	for _, prefix := range [...]string{"if-", "x-forwarded-", "x-outrigger-", "x-b3-", "proxy-", "content-encoding", "content-range", "content-type"} {
		if hasPrefixFold(name, prefix) {
			return true
		}
	}
	for _, s := range [...]string{
		"authorization", "b3", "cache-control", "cookie", "forwarded", "max-forwards", "pragma", "range",
		"realm", "set-cookie", "traceparent", "tracestate", "www-authenticate", "x-request-id",
	} {
		if EqualFold(name, s) {
			return true
		}
	}
	return false
}

func hasPrefixFold(b []byte, prefix string) bool {
	return len(b) >= len(prefix) && EqualFold(b[:len(prefix)], prefix)
}

// field parses the header line at b[i:] into f and returns where the next line
// begins; or a reason and the byte at fault. The caller has seen that b[i] is
// there and that the line is neither empty nor folded.
func field(f *Header, b []byte, i int) (int, string) {
	start := i
	for i < len(b) && class[b[i]]&isToken != 0 {
		i++
	}
	if i == len(b) {
		return i, reasonIncomplete
	}
	if b[i] != ':' {
		return i, nameFault(b, i)
	}
	if i == start {
		return i, ReasonEmptyName
	}
	f.Name = b[start:i:i]
	i++
	for i < len(b) && (b[i] == ' ' || b[i] == '\t') {
		i++
	}
	start = i
	i = scanValue(b, i)
	if i+1 >= len(b) {
		if i < len(b) && b[i] != '\r' {
			return i, byteFault(b, i)
		}
		return i, reasonIncomplete
	}
	if b[i] != '\r' || b[i+1] != '\n' {
		return i, byteFault(b, i)
	}
	end := i
	for end > start && (b[end-1] == ' ' || b[end-1] == '\t') {
		end--
	}
	f.Value = b[start:end:end]
	return i + 2, ""
}

// nameFault says why b[i] does not belong behind a field name.
func nameFault(b []byte, i int) string {
	switch b[i] {
	case '\n':
		return ReasonBareLF
	case '\r':
		if i+1 < len(b) && b[i+1] != '\n' {
			return ReasonBareCR
		}
		return ReasonNoColon
	case ' ', '\t':
		for i < len(b) && (b[i] == ' ' || b[i] == '\t') {
			i++
		}
		if i < len(b) && b[i] == ':' {
			return ReasonSpaceBeforeColon
		}
	}
	return ReasonName
}

// byteFault says why b[i], which is not the CR of a CRLF, ends a field value.
func byteFault(b []byte, i int) string {
	switch b[i] {
	case '\n':
		return ReasonBareLF
	case '\r':
		return ReasonBareCR
	default:
		return ReasonControlByte
	}
}
