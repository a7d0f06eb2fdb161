package http1

import "math/bits"

// Body follows the framing of one message body through a stream of bytes that
// arrives in any portions. It holds no data, only where in the framing it is;
// of the trailers it keeps a copy, in storage that is used again.
//
// The zero value is a message without a body.
type Body struct {
	// Limits on chunk extensions and trailers; nil means the defaults. It is
	// read and kept by Reset.
	Limits *Limits

	lim     Limits
	framing Framing
	state   bodyState
	// left is what remains of the body (Length) or of the chunk (Chunked).
	left   int64
	digits int
	ext    int // extension bytes of this chunk
	extSum int // extension bytes of all chunks, less the free ones
	raw    []byte
	lines  int
	fields []Header
	err    *Error
}

type bodyState uint8

const (
	chunkSize   bodyState = iota // in the digits of a chunk size
	chunkExt                     // in the extensions
	chunkSizeLF                  // before the LF of the size line
	chunkData                    // left bytes of data
	chunkDataCR                  // before the CR behind the data
	chunkDataLF                  // before the LF behind the data
	trailers                     // in the trailer section
	finished
)

// Reset starts a body framed by f; length counts only for Length. Trailers of
// the last body are no longer valid.
func (d *Body) Reset(f Framing, length int64) {
	*d = Body{Limits: d.Limits, framing: f, raw: d.raw[:0], fields: d.fields[:0]}
	switch f {
	case UntilClose:
	case Chunked:
		d.lim = d.Limits.resolved()
	case Length:
		d.left = length
		if length <= 0 {
			d.state = finished
		}
	default:
		d.state = finished
	}
}

// Done reports whether the body is complete, so that nothing more is to be
// read for it. It is true at once for None and for a Length of 0.
func (d *Body) Done() bool {
	return d.state == finished || d.framing == 0
}

// Next takes in bytes from the start of b: framing, which it checks and drops,
// then at most one span of data, which it returns as a part of b. consumed
// counts both. It is to be called again with the rest of b until b is used up
// or done is true; what then remains of b belongs to the next message. It
// always consumes something, unless b is empty or the body is done.
//
// The chunks' sizes say nothing to the receiver of the data: a chunk may come
// in many spans, and the caller frames them anew. An error is an *Error and
// final.
func (d *Body) Next(b []byte) (consumed int, data []byte, done bool, err error) {
	if d.err != nil {
		return 0, nil, false, d.err
	}
	if d.Done() {
		return 0, nil, true, nil
	}
	switch d.framing {
	case Length:
		n := d.take(b)
		if d.left == 0 {
			d.state = finished
		}
		return n, b[:n:n], d.state == finished, nil
	case Chunked:
		return d.nextChunked(b)
	default:
		return len(b), b, false, nil
	}
}

// Left is how many bytes of a body of known Length are still to come; 0 for other
// bodies, and when it is done.
func (d *Body) Left() int64 {
	if d.framing != Length || d.Done() {
		return 0
	}
	return d.left
}

// Passed takes in that n of the bytes that are Left went by without having been
// given to Next.
func (d *Body) Passed(n int64) {
	d.left -= n
	if d.left == 0 {
		d.state = finished
	}
}

// End is to be called when the stream ends. It returns nil if that is where
// the body ends too, else an *Error with ReasonTruncated.
func (d *Body) End() error {
	switch {
	case d.err != nil:
		return d.err
	case d.Done() || d.framing == UntilClose:
		d.state = finished
		return nil
	default:
		return d.fail(ReasonTruncated)
	}
}

// Trailers of a chunked body that is done, in order, case preserved. They are
// valid until Reset.
func (d *Body) Trailers() []Header { return d.fields }

// take consumes data of the body or chunk from b.
func (d *Body) take(b []byte) int {
	n := len(b)
	if int64(n) > d.left {
		n = int(d.left)
	}
	d.left -= int64(n)
	return n
}

func (d *Body) fail(reason string) *Error {
	d.err = newError(reason, -1)
	return d.err
}

func (d *Body) nextChunked(b []byte) (consumed int, data []byte, done bool, err error) {
	i := 0
	for i < len(b) {
		if d.state == chunkData {
			n := d.take(b[i:])
			if d.left == 0 {
				d.state = chunkDataCR
			}
			return i + n, b[i : i+n : i+n], false, nil
		}
		reason := ""
		if d.state == trailers {
			reason = d.trailerByte(b[i])
		} else {
			reason = d.framingByte(b[i])
		}
		if reason != "" {
			return i, nil, false, d.fail(reason)
		}
		i++
		if d.state == finished {
			return i, nil, true, nil
		}
	}
	return i, nil, false, nil
}

// framingByte takes in a byte that is neither data nor in the trailers, and
// returns a reason if it may not stand there.
func (d *Body) framingByte(c byte) string {
	switch d.state {
	case chunkSize:
		return d.sizeByte(c)
	case chunkExt:
		switch {
		case c == '\r':
			d.state = chunkSizeLF
			d.extSum += max(0, d.ext-freeChunkExt)
			return ""
		case class[c]&isValue == 0:
			return ReasonChunkExtension
		}
		d.ext++
		if d.ext > d.lim.MaxChunkExt ||
			d.extSum+d.ext-freeChunkExt > d.lim.MaxChunkExtTotal {
			return ReasonChunkExtension
		}
		return ""
	case chunkSizeLF:
		if c != '\n' {
			return ReasonChunk
		}
		d.state = chunkData
		if d.left == 0 {
			d.state = trailers
		}
		d.digits, d.ext = 0, 0
		return ""
	case chunkDataCR:
		if c != '\r' {
			return ReasonChunk
		}
		d.state = chunkDataLF
		return ""
	default: // chunkDataLF
		if c != '\n' {
			return ReasonChunk
		}
		d.state = chunkSize
		return ""
	}
}

func (d *Body) sizeByte(c byte) string {
	var v int64
	switch {
	case isDigit(c):
		v = int64(c - '0')
	case 'a' <= lower(c) && lower(c) <= 'f':
		v = int64(lower(c)-'a') + 10
	case d.digits == 0:
		return ReasonChunk
	case c == '\r':
		d.state = chunkSizeLF
		return ""
	case c == ';':
		d.state = chunkExt
		d.ext = 1
		return ""
	default:
		return ReasonChunk
	}
	d.digits++
	if d.digits > 16 || bits.Len64(uint64(d.left)) > 63-4 {
		return ReasonChunkOverflow
	}
	d.left = d.left<<4 | v
	return ""
}

// trailerByte takes in a byte of the trailer section, which ends with an empty
// line. Lines are checked when the section is whole; only what bounds it is
// checked before.
func (d *Body) trailerByte(c byte) string {
	n := len(d.raw)
	if n >= d.lim.MaxTrailerBytes {
		return ReasonTrailersTooLarge
	}
	if n > 0 && d.raw[n-1] == '\r' && c != '\n' {
		return ReasonBareCR
	}
	if c == '\n' && (n == 0 || d.raw[n-1] != '\r') {
		return ReasonBareLF
	}
	d.raw = append(d.raw, c)
	if c != '\n' {
		return ""
	}
	if n > 1 && d.raw[n-2] != '\n' {
		d.lines++
		if d.lines > d.lim.MaxTrailers {
			return ReasonTrailersTooLarge
		}
		return ""
	}
	if reason := d.parseTrailers(); reason != "" {
		return reason
	}
	d.state = finished
	return ""
}

func (d *Body) parseTrailers() string {
	for i := 0; i < len(d.raw)-2; {
		if c := d.raw[i]; c == ' ' || c == '\t' {
			return ReasonObsFold
		}
		var f Header
		next, reason := field(&f, d.raw, i)
		if reason != "" {
			return reason
		}
		if forbiddenTrailer(f.Name) {
			return ReasonForbiddenTrailer
		}
		f.kind = plain
		d.fields = append(d.fields, f)
		i = next
	}
	return ""
}
