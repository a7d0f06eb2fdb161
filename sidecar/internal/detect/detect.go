// Package detect tells from the first bytes of a connection what is spoken on
// it, and remembers of each destination what was found.
//
// It knows how HTTP/1.x, HTTP/2 with prior knowledge and TLS begin; everything
// else is bytes. It knows neither connections nor clocks: package proxy reads,
// asks Detect after each read, and acts on the answer.
package detect

import "bytes"

// MaxBytes is how much of a connection is looked at. What has not shown itself
// by then is Opaque: a request line and a ClientHello that the sidecar accepts
// fit.
const MaxBytes = 16 << 10

// Protocol is what is spoken.
type Protocol uint8

// The answers of Detect. More is the zero value.
const (
	// More: the bytes are the beginning of more than one protocol.
	More Protocol = iota
	// HTTP1 is a request line of HTTP/1.0 or HTTP/1.1 (RFC 9112, 3).
	HTTP1
	// HTTP2 is the preface of HTTP/2 (RFC 9113, 3.4), without TLS.
	HTTP2
	// TLS is a whole ClientHello (RFC 8446, 4.1.2).
	TLS
	// Opaque is anything else, to be carried as bytes.
	Opaque
)

// String is the protocol in a word, for logs and metrics.
func (p Protocol) String() string {
	switch p {
	case More:
		return "more"
	case HTTP1:
		return "http1"
	case HTTP2:
		return "http2"
	case TLS:
		return "tls"
	default:
		return "opaque"
	}
}

// Result is what Detect found.
type Result struct {
	Protocol Protocol
	// ServerName of a TLS connection (RFC 6066, 3) in lower case. Empty where the
	// client named none, or what it named is no DNS name: such a connection can be
	// led nowhere by name. Of an encrypted ClientHello it is the outer name, which
	// is all that can be seen.
	ServerName string
	// ALPN is what a TLS client offers (RFC 7301), in its order and as it came.
	ALPN []string
}

// preface is what a client of HTTP/2 sends first (RFC 9113, 3.4).
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// Detect says what a connection that begins with b speaks. An answer other than
// More does not change whatever bytes follow, and MaxBytes always give one.
//
// Every request that http1.ParseRequest accepts within its default limits is
// HTTP1; what follows the beginning of a request line may still be no HTTP. A
// server name and ALPN are those that crypto/tls reads. Detect allocates only
// for a whole ClientHello.
func Detect(b []byte) Result {
	b = b[:min(len(b), MaxBytes)]
	var r Result
	switch {
	case len(b) == 0:
	case b[0] == recordHandshake:
		r = clientHello(b)
	default:
		r.Protocol = plain(b)
	}
	if r.Protocol == More && len(b) == MaxBytes {
		r.Protocol = Opaque
	}
	return r
}

// plain tells HTTP from what is not.
func plain(b []byte) Protocol {
	n := min(len(b), len(preface))
	if string(b[:n]) == preface[:n] {
		if n == len(preface) {
			return HTTP2
		}
		return More
	}
	return requestLine(b)
}

// maxMethod is the longest method that http1.ParseRequest takes.
const maxMethod = 32

// requestLine decides as soon as no other protocol is likely: at the slash that
// begins the target of a usual method, at the scheme of an absolute target, and
// else at the version, since other protocols have lines of words too (SIP, RTSP,
// the inline commands of Redis).
func requestLine(b []byte) Protocol {
	i := 0
	for i < len(b) && inMethod(b[i]) {
		i++
	}
	switch {
	case i > maxMethod:
		return Opaque
	case i == len(b):
		return More
	case i == 0 || b[i] != ' ':
		return Opaque
	}
	usual := isUsual(b[:i])
	target := b[i+1:]
	switch {
	case len(target) == 0:
		return More
	case !inTarget(target[0]):
		return Opaque
	case usual && (target[0] == '/' || hasScheme(target)):
		return HTTP1
	}
	end := 0
	for end < len(target) && inTarget(target[end]) {
		end++
	}
	if end == len(target) {
		return More
	}
	if target[end] != ' ' {
		return Opaque
	}
	const version = "HTTP/1."
	rest := target[end+1:]
	n := min(len(rest), len(version))
	switch {
	case string(rest[:n]) != version[:n]:
		return Opaque
	case n < len(version):
		return More
	}
	return HTTP1
}

// inMethod and inTarget are the bytes that package http1 takes there.
func inMethod(c byte) bool {
	return 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}

func inTarget(c byte) bool { return c > ' ' && c != 0x7f && c != '#' }

// isUsual reports whether the method is one of RFC 9110 and RFC 5789 whose target
// is a path or a URI. CONNECT is not: its target could be anything's argument.
func isUsual(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH":
		return true
	}
	return false
}

func hasScheme(target []byte) bool {
	const secure, open = "https://", "http://"
	return len(target) >= len(open) && bytes.EqualFold(target[:len(open)], []byte(open)) ||
		len(target) >= len(secure) && bytes.EqualFold(target[:len(secure)], []byte(secure))
}
