package http1

import (
	"errors"
	"strconv"
)

// ErrIncomplete says that the bytes so far are the beginning of a head: read
// more and call again with all of them. It is returned as it is, never wrapped.
var ErrIncomplete = errors.New("http1: the head is not complete yet")

// Error is a message that is not accepted. The connection it came on cannot be
// used again, because where the next message begins is not known.
type Error struct {
	// Reason is one of the Reason constants: a short stable token for logs and
	// for the label of a metric.
	Reason string
	// Status to answer a request with: 400, 414, 431, 501 or 505. For a
	// response head it is 502, what the client is to be told; a Body does not
	// know whose it is and says what a request would be answered.
	Status int
	// Detail says what was wrong, where, and what is expected. It quotes no
	// field values other than those that frame or route the message.
	Detail string
}

// Error is the reason and the detail.
func (e *Error) Error() string { return "http1: " + e.Reason + ": " + e.Detail }

// Reasons for which a message is rejected, in the order of its parts.
const (
	ReasonLeadingCRLF      = "leading_crlf"        // RFC 9112 section 2.2
	ReasonLeadingSpace     = "leading_space"       // RFC 9112 section 2.2
	ReasonRequestLine      = "request_line"        // RFC 9112 section 3
	ReasonMethod           = "bad_method"          // RFC 9110 section 9.1
	ReasonTarget           = "bad_target"          // RFC 9112 section 3.2
	ReasonTargetTooLong    = "target_too_long"     // RFC 9110 section 15.5.15
	ReasonVersion          = "bad_version"         // RFC 9110 section 15.6.6
	ReasonH2Preface        = "h2_preface"          // RFC 9113 section 3.4
	ReasonStatusLine       = "status_line"         // RFC 9112 section 4
	ReasonHeadTooLarge     = "head_too_large"      // RFC 6585 section 5
	ReasonTooManyHeaders   = "too_many_headers"    // RFC 6585 section 5
	ReasonBareLF           = "bare_lf"             // RFC 9112 section 2.2
	ReasonBareCR           = "bare_cr"             // RFC 9112 section 2.2
	ReasonControlByte      = "control_byte"        // RFC 9110 section 5.5
	ReasonObsFold          = "obs_fold"            // RFC 9112 section 5.2
	ReasonSpaceBeforeColon = "space_before_colon"  // RFC 9112 section 5.1
	ReasonEmptyName        = "empty_name"          // RFC 9110 section 5.1
	ReasonName             = "bad_name"            // RFC 9110 section 5.1
	ReasonNoColon          = "no_colon"            // RFC 9112 section 5
	ReasonConnection       = "bad_connection"      // RFC 9110 section 7.6.1
	ReasonMissingHost      = "missing_host"        // RFC 9112 section 3.2
	ReasonRepeatedHost     = "repeated_host"       // RFC 9112 section 3.2
	ReasonHost             = "bad_host"            // RFC 9112 section 3.2
	ReasonHostMismatch     = "host_mismatch"       // RFC 9112 section 3.2.2
	ReasonContentLength    = "bad_cl"              // RFC 9110 section 8.6
	ReasonRepeatedLength   = "dup_cl"              // RFC 9112 section 6.3
	ReasonBothLengths      = "cl_te"               // RFC 9112 section 6.1
	ReasonCoding           = "te_unknown"          // RFC 9112 section 6.1
	ReasonChunkedNotLast   = "te_chunked_not_last" // RFC 9112 section 6.1
	ReasonRepeatedCoding   = "te_repeated"         // RFC 9112 section 6.1
	ReasonCodingInHTTP10   = "te_http10"           // RFC 9112 section 6.1
	ReasonForbiddenBody    = "forbidden_body"      // RFC 9110 sections 8.6, 9.3.6
	ReasonChunk            = "bad_chunk"           // RFC 9112 section 7.1
	ReasonChunkOverflow    = "chunk_overflow"      // RFC 9112 section 7.1
	ReasonChunkExtension   = "chunk_ext"           // RFC 9112 section 7.1.1
	ReasonTrailersTooLarge = "trailers_too_large"  // RFC 6585 section 5
	ReasonForbiddenTrailer = "forbidden_trailer"   // RFC 9110 section 6.5.1
	ReasonTruncated        = "truncated"           // RFC 9112 section 8
	ReasonPathEscape       = "bad_escape"          // RFC 3986 section 2.1
	ReasonEncodedSeparator = "encoded_separator"   // %2F %5C %00
	ReasonPathByte         = "bad_path_byte"       // RFC 3986 section 3.3
	ReasonDotParameter     = "dot_parameter"       // "/..;" and "/.;"
	ReasonPathAboveRoot    = "path_above_root"     // RFC 3986 section 5.2.4
	ReasonAmbiguousDots    = "ambiguous_dots"      // "//" before "/../"
)

const (
	// reasonIncomplete becomes ErrIncomplete; it never leaves the package.
	reasonIncomplete = "incomplete"
	// badGateway is what a client is told of a response that was rejected.
	badGateway = 502
)

// explain is what a reason means, where that does not depend on the message.
func explain(reason string) string {
	switch reason {
	case ReasonLeadingCRLF:
		return "an empty line before the start line"
	case ReasonLeadingSpace:
		return "white space where a line begins"
	case ReasonRequestLine:
		return `the request line is not "METHOD SP target SP HTTP/1.x CRLF" with single spaces`
	case ReasonMethod:
		return "the method is not made of upper-case letters, digits, '-' and '_'"
	case ReasonTarget:
		return "the request target is not a path, an http URI, '*' of OPTIONS or host:port of CONNECT"
	case ReasonTargetTooLong:
		return "the request line is longer than allowed"
	case ReasonVersion:
		return "only HTTP/1.0 and HTTP/1.1 are spoken here"
	case ReasonH2Preface:
		return "the client speaks HTTP/2 with prior knowledge; set the port's protocol to http2"
	case ReasonStatusLine:
		return `the status line is not "HTTP/1.x SP 3DIGIT SP reason CRLF"`
	case ReasonHeadTooLarge:
		return "the head is longer than allowed"
	case ReasonTooManyHeaders:
		return "there are more header lines than allowed"
	case ReasonBareLF:
		return "a line ends with LF alone; lines end with CRLF"
	case ReasonBareCR:
		return "a CR is not followed by LF"
	case ReasonControlByte:
		return "a control byte in a field value"
	case ReasonObsFold:
		return "a folded header line; each header is one line"
	case ReasonSpaceBeforeColon:
		return "white space between a field name and its colon"
	case ReasonEmptyName:
		return "a header line without a name"
	case ReasonName:
		return "a field name is not a token"
	case ReasonNoColon:
		return "a header line without a colon"
	case ReasonConnection:
		return "Connection names more fields than allowed"
	case ReasonMissingHost:
		return "no Host header, or an empty one; HTTP/1.1 requires it"
	case ReasonRepeatedHost:
		return "more than one Host header"
	case ReasonHost:
		return "the host is not a name or an address with an optional port"
	case ReasonHostMismatch:
		return "the host in the request target and in the Host header differ"
	case ReasonContentLength:
		return "Content-Length is not a decimal number below 2^63"
	case ReasonRepeatedLength:
		return "Content-Length is given more than once"
	case ReasonBothLengths:
		return "both Content-Length and Transfer-Encoding are given"
	case ReasonCoding:
		return "the only transfer coding known is chunked"
	case ReasonChunkedNotLast:
		return "chunked is not the last transfer coding"
	case ReasonRepeatedCoding:
		return "a transfer coding is given more than once, or none is"
	case ReasonCodingInHTTP10:
		return "HTTP/1.0 has no Transfer-Encoding"
	case ReasonForbiddenBody:
		return "a body is announced where none may be"
	case ReasonChunk:
		return "the framing of a chunk is not hexadecimal size, CRLF, data, CRLF"
	case ReasonChunkOverflow:
		return "a chunk size has more than 16 digits or does not fit 63 bits"
	case ReasonChunkExtension:
		return "chunk extensions are longer than allowed, or hold control bytes"
	case ReasonTrailersTooLarge:
		return "the trailers are more or longer than allowed"
	case ReasonForbiddenTrailer:
		return "a trailer frames, routes or authenticates the message, which only headers may"
	case ReasonTruncated:
		return "the connection closed before the end of the body"
	case ReasonPathEscape:
		return "a '%' in the path is not followed by two hexadecimal digits"
	case ReasonEncodedSeparator:
		return "the path holds %2F, %5C or %00, which programs decode differently"
	case ReasonPathByte:
		return "the path holds a backslash, '#' or a control byte"
	case ReasonDotParameter:
		return "a path segment is '.' or '..' with a parameter"
	case ReasonPathAboveRoot:
		return "'..' climbs above the root"
	case ReasonAmbiguousDots:
		return "'..' after an empty segment, which programs resolve differently"
	default:
		return reason
	}
}

// statusOf is what a request with this defect is answered.
func statusOf(reason string) int {
	switch reason {
	case ReasonTargetTooLong:
		return 414
	case ReasonHeadTooLarge, ReasonTooManyHeaders, ReasonTrailersTooLarge:
		return 431
	case ReasonCoding:
		return 501
	case ReasonVersion, ReasonH2Preface:
		return 505
	default:
		return 400
	}
}

// newError is the rejection of a request for a reason found at byte at, or at
// no particular byte if at is negative.
func newError(reason string, at int) *Error {
	detail := explain(reason)
	if at >= 0 {
		detail += " (byte " + strconv.Itoa(at) + ")"
	}
	return &Error{Reason: reason, Status: statusOf(reason), Detail: detail}
}

// quoting adds the value at fault to the detail, at most 64 bytes of it.
func (e *Error) quoting(value []byte) *Error {
	const most = 64
	if len(value) > most {
		value = value[:most]
	}
	e.Detail += ": " + strconv.Quote(string(value))
	return e
}
