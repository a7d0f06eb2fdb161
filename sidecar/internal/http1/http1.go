// Package http1 is the HTTP/1.1 codec of the sidecar: bytes in, messages out.
//
// It knows RFC 9112 (message syntax), the parts of RFC 9110 that decide where a
// message ends and which fields belong to one connection only, and one strict
// way to read each of them. It does not know connections, clocks, buffers'
// owners, routes or policies: package proxy reads bytes into a pooled buffer,
// calls ParseRequest or ParseResponse until a head is whole, streams the body
// through a Body, and writes the head for the other side with
// AppendRequestHead or AppendResponseHead.
//
// Two rules shape the package. First, a message that two honest
// implementations could read in two ways is rejected, never repaired, because
// every request-smuggling attack is such a message. Second, nothing that was
// framed by one side is copied to the other: bodies are re-framed and
// Content-Length, Transfer-Encoding and Connection are always written anew.
//
// Nothing here allocates once a Head's and a Body's slices have grown, except
// to check an IPv6 address in a Host and on the way to an error. No value is safe for concurrent use.
package http1

// Limits on what a peer may send. The zero value of a field, and a nil *Limits,
// mean the default. All are counted in bytes unless said otherwise.
type Limits struct {
	// MaxHeadBytes bounds a whole head, its final empty line included.
	// Default 64 KiB.
	MaxHeadBytes int
	// MaxHeaders bounds the number of header lines. Default 128.
	MaxHeaders int
	// MaxLine bounds the request line or status line without its CRLF.
	// Default 16 KiB.
	MaxLine int
	// MaxChunkExt bounds the extensions of one chunk. Default 256.
	MaxChunkExt int
	// MaxChunkExtTotal bounds the extensions of all chunks of one body; the
	// first 16 bytes of each chunk are free. Default 16 KiB.
	MaxChunkExtTotal int
	// MaxTrailerBytes bounds the trailer section, its final empty line
	// included. Default 8 KiB.
	MaxTrailerBytes int
	// MaxTrailers bounds the number of trailer lines. Default 32.
	MaxTrailers int
}

const (
	defaultMaxHeadBytes     = 64 << 10
	defaultMaxHeaders       = 128
	defaultMaxLine          = 16 << 10
	defaultMaxChunkExt      = 256
	defaultMaxChunkExtTotal = 16 << 10
	defaultMaxTrailerBytes  = 8 << 10
	defaultMaxTrailers      = 32

	// maxMethod is longer than any registered method.
	maxMethod = 32
	// maxConnectionOptions bounds the field names that Connection may list:
	// each is compared with each header.
	maxConnectionOptions = 32
	// freeChunkExt is the extension bytes a chunk that are not counted towards
	// MaxChunkExtTotal.
	freeChunkExt = 16
)

// orDefault is n, or def if n is not positive.
func orDefault(n, def int) int {
	if n <= 0 {
		return def
	}
	return n
}

// resolved is l with every default filled in.
func (l *Limits) resolved() Limits {
	var r Limits
	if l != nil {
		r = *l
	}
	r.MaxHeadBytes = orDefault(r.MaxHeadBytes, defaultMaxHeadBytes)
	r.MaxHeaders = orDefault(r.MaxHeaders, defaultMaxHeaders)
	r.MaxLine = orDefault(r.MaxLine, defaultMaxLine)
	r.MaxChunkExt = orDefault(r.MaxChunkExt, defaultMaxChunkExt)
	r.MaxChunkExtTotal = orDefault(r.MaxChunkExtTotal, defaultMaxChunkExtTotal)
	r.MaxTrailerBytes = orDefault(r.MaxTrailerBytes, defaultMaxTrailerBytes)
	r.MaxTrailers = orDefault(r.MaxTrailers, defaultMaxTrailers)
	return r
}

// Framing is how the end of a body is known (RFC 9112 section 6.3). Its zero
// value is no framing at all: in an Edit it means "as the Head says", and a
// parsed Head never has it.
type Framing uint8

const (
	// None says that the message has no body.
	None Framing = iota + 1
	// Length says that the body has a known number of bytes, which may be 0.
	Length
	// Chunked says that the body is in chunks, with trailers at its end.
	Chunked
	// UntilClose says that the body ends where the connection does; responses only.
	UntilClose
)

// String is the framing in a word, for logs.
func (f Framing) String() string {
	switch f {
	case None:
		return "none"
	case Length:
		return "length"
	case Chunked:
		return "chunked"
	case UntilClose:
		return "until_close"
	default:
		return "unset"
	}
}

// Head is the start line and the headers of a request or a response. A Head is
// reusable: parsing into it allocates nothing once its slice has grown.
//
// Every byte slice in it aliases the buffer given to ParseRequest or
// ParseResponse and is valid until that buffer changes. A Head may also be
// built by hand (for a local reply, or from HTTP/2) and written with
// AppendRequestHead or AppendResponseHead; then Framing must be set in it or
// in the Edit.
type Head struct {
	// Method and Target of a request, as sent.
	Method, Target []byte
	// Status and Reason of a response. Reason may be empty.
	Status int
	Reason []byte
	// Minor version: HTTP/1.Minor, 0 or 1.
	Minor int
	// Headers in the order and the case they came in, values trimmed.
	Headers []Header

	// Framing of the body that follows, and its Length in bytes where Framing
	// is Length; else Length is -1, save in the response to a HEAD request and
	// in a 304, where it is what Content-Length announced.
	Framing Framing
	Length  int64
	// Close: the sender closes the connection after this message: it said so,
	// or it speaks HTTP/1.0 and did not ask to keep it, or the body ends only
	// there.
	Close bool
	// Upgrade: the message carries Upgrade and Connection: upgrade, in HTTP/1.1.
	// It is never set for h2c, which would open a tunnel past every check made
	// on requests; such a request is to be answered as if it had not asked
	// (RFC 9110 section 7.8 allows that).
	Upgrade bool
	// UpgradeProto is the value of the first Upgrade header, whether or not it
	// is honoured.
	UpgradeProto []byte
	// Expect100: the client waits for 100 (Continue) before it sends the body.
	Expect100 bool
	// Host of a request: the Host header, equal to the target's authority if it
	// has one; in HTTP/1.0 without Host that authority, or empty.
	Host []byte

	// scanned counts the bytes of the last buffer that are known not to
	// complete a head; startLine says that its first line is complete. They
	// only save work: what is parsed is always the buffer given.
	scanned   int
	startLine bool
	flags     flags
}

// flags are what the header lines said, as seen so far.
type flags uint16

const (
	sawHost flags = 1 << iota
	sawContentLength
	sawTransferEncoding
	sawUpgrade
	sawTrailer
	sawH2C
	optClose     // Connection: close
	optKeepAlive // Connection: keep-alive
	optUpgrade   // Connection: upgrade
	optOthers    // Connection names other fields
	bodiless     // a response whose request or status forbids a body
)

// Header is one header or trailer line. Name keeps its case; Value has no
// white space around it.
type Header struct {
	Name, Value []byte

	kind kind
	// hop: a Connection header named this field, so it is not forwarded.
	hop bool
}

// Get is the value of the first header of that name, compared without case, or
// nil. A present but empty header gives an empty slice that is not nil.
func (h *Head) Get(name string) []byte {
	for i := range h.Headers {
		if EqualFold(h.Headers[i].Name, name) {
			return h.Headers[i].Value
		}
	}
	return nil
}

// Reset forgets everything but the storage. It must be called before a Head in
// which a parse ended with ErrIncomplete is used for another connection: until
// then the Head takes the next buffer for a longer version of the last one and
// may wait for a line end that it has already been given.
func (h *Head) Reset() {
	*h = Head{Headers: h.Headers[:0]}
}

// EqualFold reports whether b is s, ignoring the case of ASCII letters. Field
// names are ASCII, so no other folding applies.
func EqualFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i := 0; i < len(b); i++ {
		if b[i] != s[i] && lower(b[i]) != lower(s[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c | 0x20
	}
	return c
}
