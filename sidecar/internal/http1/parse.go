package http1

import (
	"bytes"
	"net/netip"
)

// ParseRequest parses the head of a request at the start of b into h and
// returns its length in bytes, the empty line included; the body begins there.
//
// It returns ErrIncomplete if b holds only the beginning of a head: call again
// with the same bytes and more behind them, at the same address or another.
// Bytes fed in any portions give the result they give at once, and the cost
// stays proportional to the bytes and the lines. Any other error is an *Error.
// A nil lim means the defaults.
func ParseRequest(h *Head, b []byte, lim *Limits) (n int, err error) {
	l := lim.resolved()
	if h.waiting(b, &l) {
		return 0, ErrIncomplete
	}
	h.Reset()
	if len(b) == 0 {
		return 0, ErrIncomplete
	}
	if class[b[0]]&isMethod == 0 {
		return 0, newError(firstByteFault(b[0]), 0)
	}
	head := b[:min(len(b), l.MaxHeadBytes)]
	line := head[:min(len(head), l.MaxLine+2)]
	n, reason := h.requestLine(line)
	if reason != "" {
		tooLong := ReasonTargetTooLong
		if len(line) == l.MaxHeadBytes {
			tooLong = ReasonHeadTooLarge
		}
		return h.settle(b, line, n, reason, tooLong)
	}
	n, reason = h.fields(head, n, l.MaxHeaders)
	if reason != "" {
		h.startLine = true
		return h.settle(b, head, n, reason, ReasonHeadTooLarge)
	}
	if e := h.finishRequest(); e != nil {
		return 0, e
	}
	return n, nil
}

// ParseResponse is ParseRequest for a response. The framing of a response
// depends on the method of the request it answers (RFC 9112 section 6.3), so
// requestMethod must be that method, as it was sent.
//
// A response with a status of 1xx has no body and is not the last word, save
// 101, which ends the use of HTTP on the connection.
func ParseResponse(h *Head, b []byte, lim *Limits, requestMethod []byte) (n int, err error) {
	n, err = h.parseResponse(b, lim, requestMethod)
	if e, ok := err.(*Error); ok { //nolint:errorlint // never wrapped in this package
		e.Status = badGateway
	}
	return n, err
}

func (h *Head) parseResponse(b []byte, lim *Limits, requestMethod []byte) (n int, err error) {
	l := lim.resolved()
	if h.waiting(b, &l) {
		return 0, ErrIncomplete
	}
	h.Reset()
	if len(b) == 0 {
		return 0, ErrIncomplete
	}
	if b[0] != 'H' {
		return 0, newError(ReasonStatusLine, 0)
	}
	head := b[:min(len(b), l.MaxHeadBytes)]
	line := head[:min(len(head), l.MaxLine+2)]
	n, reason := h.statusLine(line)
	if reason != "" {
		return h.settle(b, line, n, reason, ReasonHeadTooLarge)
	}
	n, reason = h.fields(head, n, l.MaxHeaders)
	if reason != "" {
		h.startLine = true
		return h.settle(b, head, n, reason, ReasonHeadTooLarge)
	}
	if e := h.finishResponse(requestMethod); e != nil {
		return 0, e
	}
	return n, nil
}

// waiting reports whether b, a longer version of the buffer of the last call,
// brought nothing that could change its answer: neither a line end nor enough
// bytes to pass a limit.
func (h *Head) waiting(b []byte, l *Limits) bool {
	if h.scanned == 0 || len(b) < h.scanned || len(b) > l.MaxHeadBytes ||
		!h.startLine && len(b) > l.MaxLine+1 || bytes.IndexByte(b[h.scanned:], '\n') >= 0 {
		return false
	}
	h.scanned = len(b)
	return true
}

// settle turns a reason found at byte at of the window of b into a result. A
// defect counts only once the line it stands in is complete or has passed a
// limit, so that the answer does not depend on how the bytes arrived.
func (h *Head) settle(b, window []byte, at int, reason, tooLong string) (int, error) {
	cut := len(b) > len(window)
	switch {
	case reason == reasonIncomplete && cut:
		return 0, newError(tooLong, -1)
	case reason == reasonIncomplete || !cut && bytes.IndexByte(window[at:], '\n') < 0:
		h.scanned = len(b)
		return 0, ErrIncomplete
	default:
		return 0, newError(reason, at)
	}
}

func firstByteFault(c byte) string {
	switch c {
	case '\r', '\n':
		return ReasonLeadingCRLF
	case ' ', '\t':
		return ReasonLeadingSpace
	default:
		return ReasonMethod
	}
}

// requestLine parses the request line and returns where the next line begins,
// or a reason and the byte at fault.
func (h *Head) requestLine(b []byte) (int, string) {
	i := 0
	for i < len(b) && class[b[i]]&isMethod != 0 {
		i++
	}
	if i > maxMethod {
		return maxMethod, ReasonMethod
	}
	if i == len(b) {
		return i, reasonIncomplete
	}
	if b[i] != ' ' {
		return i, lineFault(b, i, ReasonMethod)
	}
	h.Method = b[:i:i]
	i++
	start := i
	for i < len(b) && class[b[i]]&isTarget != 0 {
		i++
	}
	if i == len(b) {
		return i, reasonIncomplete
	}
	if b[i] != ' ' {
		return i, lineFault(b, i, ReasonTarget)
	}
	if i == start {
		return i, ReasonRequestLine
	}
	h.Target = b[start:i:i]
	i++
	rest := b[i:]
	if len(rest) >= 10 && string(rest[:7]) == "HTTP/1." && (rest[7] == '1' || rest[7] == '0') && rest[8] == '\r' && rest[9] == '\n' {
		h.Minor = int(rest[7] - '0')
		return i + 10, ""
	}
	end := bytes.IndexByte(rest, '\n')
	if end < 0 {
		return i, reasonIncomplete
	}
	if at, reason := lineEnd(rest[:end]); reason != "" {
		return i + at, reason
	}
	version := rest[:end-1]
	switch {
	case !isVersion(version):
		return i, ReasonRequestLine
	case string(h.Method) == "PRI" && string(h.Target) == "*" && string(version) == "HTTP/2.0":
		return i, ReasonH2Preface
	default:
		return i, ReasonVersion
	}
}

// lineFault says why b[i] does not belong in a request line, other being the
// reason for a byte that is neither white space nor a line end.
func lineFault(b []byte, i int, other string) string {
	switch b[i] {
	case '\n':
		return ReasonBareLF
	case '\r':
		if i+1 < len(b) && b[i+1] != '\n' {
			return ReasonBareCR
		}
		return ReasonRequestLine
	case ' ', '\t':
		return ReasonRequestLine
	default:
		return other
	}
}

// lineEnd checks that a line, given up to its LF, ends with CR and has no other.
func lineEnd(line []byte) (int, string) {
	cr := bytes.IndexByte(line, '\r')
	switch {
	case cr < 0:
		return len(line), ReasonBareLF
	case cr != len(line)-1:
		return cr, ReasonBareCR
	default:
		return 0, ""
	}
}

// isVersion reports whether b is a well-formed HTTP version, known or not.
func isVersion(b []byte) bool {
	return len(b) == 8 && string(b[:5]) == "HTTP/" && isDigit(b[5]) && b[6] == '.' && isDigit(b[7])
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// statusLine parses the status line and returns where the next line begins, or
// a reason and the byte at fault. The space behind the status code may be
// missing where there is no reason phrase: many servers leave it out, and it
// cannot be misread.
func (h *Head) statusLine(b []byte) (int, string) {
	end := bytes.IndexByte(b, '\n')
	if end < 0 {
		return len(b), reasonIncomplete
	}
	if at, reason := lineEnd(b[:end]); reason != "" {
		return at, reason
	}
	line := b[: end-1 : end-1]
	if len(line) < 8 || !isVersion(line[:8]) {
		return 0, ReasonStatusLine
	}
	if line[5] != '1' || line[7] > '1' {
		return 0, ReasonVersion
	}
	h.Minor = int(line[7] - '0')
	if len(line) < 12 || line[8] != ' ' || line[9] < '1' || !isDigit(line[9]) || !isDigit(line[10]) || !isDigit(line[11]) {
		return 8, ReasonStatusLine
	}
	h.Status = int(line[9]-'0')*100 + int(line[10]-'0')*10 + int(line[11]-'0')
	if len(line) == 12 {
		return end + 1, ""
	}
	if line[12] != ' ' {
		return 12, ReasonStatusLine
	}
	h.Reason = line[13:]
	if at := scanValue(line, 13); at < len(line) {
		return at, ReasonStatusLine
	}
	return end + 1, ""
}

// fields parses the header lines of b[i:] and returns what is behind the empty
// line, or a reason and the byte at fault.
func (h *Head) fields(b []byte, i, most int) (int, string) {
	for {
		if i >= len(b) {
			return len(b), reasonIncomplete
		}
		switch b[i] {
		case '\r':
			if i+1 == len(b) {
				return i, reasonIncomplete
			}
			if b[i+1] != '\n' {
				return i, ReasonBareCR
			}
			return i + 2, ""
		case '\n':
			return i, ReasonBareLF
		case ' ', '\t':
			if len(h.Headers) == 0 {
				return i, ReasonLeadingSpace
			}
			return i, ReasonObsFold
		}
		if len(h.Headers) == most {
			return i, ReasonTooManyHeaders
		}
		if len(h.Headers) < cap(h.Headers) {
			h.Headers = h.Headers[:len(h.Headers)+1]
		} else {
			h.Headers = append(h.Headers, Header{})
		}
		f := &h.Headers[len(h.Headers)-1]
		next, reason := field(f, b, i)
		if reason != "" {
			return next, reason
		}
		f.kind, f.hop = classify(f.Name), false
		if f.kind != plain {
			if reason := h.note(f); reason != "" {
				return i, reason
			}
		}
		i = next
	}
}

// note takes in what a header says about the message itself.
func (h *Head) note(f *Header) string {
	switch f.kind {
	case host:
		if h.flags&sawHost != 0 && h.Status == 0 {
			return ReasonRepeatedHost
		}
		h.flags |= sawHost
		h.Host = f.Value
	case contentLength:
		if h.flags&sawContentLength != 0 || bytes.IndexByte(f.Value, ',') >= 0 {
			return ReasonRepeatedLength
		}
		n, ok := parseLength(f.Value)
		if !ok {
			return ReasonContentLength
		}
		h.flags |= sawContentLength
		h.Length = n
	case transferEncoding:
		if h.flags&sawTransferEncoding != 0 {
			return ReasonRepeatedCoding
		}
		if reason := codingFault(f.Value); reason != "" {
			return reason
		}
		h.flags |= sawTransferEncoding
	case connection:
		h.noteConnection(f.Value)
	case upgrade:
		if h.flags&sawUpgrade == 0 {
			h.UpgradeProto = f.Value
		}
		h.flags |= sawUpgrade
		for rest := f.Value; rest != nil; {
			var proto []byte
			if proto, rest = element(rest); hasPrefixFold(proto, "h2c") {
				h.flags |= sawH2C
			}
		}
	case trailer:
		h.flags |= sawTrailer
	case expect:
		if EqualFold(f.Value, "100-continue") {
			h.Expect100 = true
		}
	default:
	}
	return ""
}

func (h *Head) noteConnection(value []byte) {
	for rest := value; rest != nil; {
		var option []byte
		option, rest = element(rest)
		switch {
		case len(option) == 0:
		case EqualFold(option, "close"):
			h.flags |= optClose
		case EqualFold(option, "keep-alive"):
			h.flags |= optKeepAlive
		case EqualFold(option, "upgrade"):
			h.flags |= optUpgrade
		default:
			h.flags |= optOthers
		}
	}
}

// element splits the first element off a comma-separated list. The rest is nil
// when there is none.
func element(list []byte) (first, rest []byte) {
	if i := bytes.IndexByte(list, ','); i >= 0 {
		first, rest = list[:i], list[i+1:]
	} else {
		first = list
	}
	for len(first) > 0 && (first[0] == ' ' || first[0] == '\t') {
		first = first[1:]
	}
	for len(first) > 0 && (first[len(first)-1] == ' ' || first[len(first)-1] == '\t') {
		first = first[:len(first)-1]
	}
	return first, rest
}

// parseLength is a Content-Length: digits only, below 2^63.
func parseLength(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 19 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		if !isDigit(c) {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	// 19 digits fit 64 bits, so the sign bit alone tells an overflow.
	return int64(n), n < 1<<63
}

// codingFault says why a Transfer-Encoding is not exactly "chunked".
func codingFault(value []byte) string {
	if EqualFold(value, "chunked") {
		return ""
	}
	count, last, unknown, some := 0, false, false, false
	for rest := value; rest != nil; {
		var coding []byte
		coding, rest = element(rest)
		if len(coding) == 0 {
			continue
		}
		some = true
		last = EqualFold(coding, "chunked")
		if last {
			count++
		} else {
			unknown = true
		}
	}
	switch {
	case !some || count > 1:
		return ReasonRepeatedCoding
	case count == 1 && !last:
		return ReasonChunkedNotLast
	case unknown:
		return ReasonCoding
	default: // "chunked" and empty elements
		return ReasonRepeatedCoding
	}
}

// finish derives what requests and responses have in common.
func (h *Head) finish() *Error {
	h.Close = h.flags&optClose != 0 || h.Minor == 0 && h.flags&optKeepAlive == 0
	h.Upgrade = h.Minor == 1 && h.flags&(sawUpgrade|optUpgrade|sawH2C) == sawUpgrade|optUpgrade
	if h.flags&optOthers != 0 {
		if !h.markHops() {
			return newError(ReasonConnection, -1)
		}
	}
	if h.flags&sawContentLength == 0 {
		h.Length = -1
	}
	if h.flags&sawTransferEncoding == 0 {
		return nil
	}
	if h.flags&sawContentLength != 0 {
		return newError(ReasonBothLengths, -1)
	}
	if h.Minor == 0 {
		return newError(ReasonCodingInHTTP10, -1)
	}
	if h.flags&sawTrailer != 0 {
		return h.checkTrailer()
	}
	return nil
}

// checkTrailer rejects a Trailer header that announces a field which the codec
// acts upon when it stands in a head.
func (h *Head) checkTrailer() *Error {
	for i := range h.Headers {
		if h.Headers[i].kind != trailer {
			continue
		}
		for rest := h.Headers[i].Value; rest != nil; {
			var name []byte
			if name, rest = element(rest); classify(name) != plain {
				return newError(ReasonForbiddenTrailer, -1).quoting(name)
			}
		}
	}
	return nil
}

// markHops marks the headers that Connection names, and reports whether it
// names few enough.
func (h *Head) markHops() bool {
	named := 0
	for i := range h.Headers {
		if h.Headers[i].kind != connection {
			continue
		}
		for rest := h.Headers[i].Value; rest != nil; {
			var option []byte
			option, rest = element(rest)
			if len(option) == 0 {
				continue
			}
			if named++; named > maxConnectionOptions {
				return false
			}
			if endToEnd(option) {
				continue
			}
			for j := range h.Headers {
				f := &h.Headers[j]
				if f.kind == plain && len(f.Name) == len(option) && bytes.EqualFold(f.Name, option) {
					f.hop = true
				}
			}
		}
	}
	return true
}

func (h *Head) finishRequest() *Error {
	if e := h.finish(); e != nil {
		return e
	}
	switch {
	case h.flags&sawTransferEncoding != 0:
		h.Framing = Chunked
	case h.flags&sawContentLength != 0:
		h.Framing = Length
	default:
		h.Framing = None
	}
	h.Expect100 = h.Expect100 && h.Minor == 1
	if h.flags&sawHost != 0 {
		if len(h.Host) == 0 {
			return newError(ReasonMissingHost, -1)
		}
		if !ValidHost(h.Host) {
			return newError(ReasonHost, -1).quoting(h.Host)
		}
	} else if h.Minor == 1 {
		return newError(ReasonMissingHost, -1)
	}
	return h.checkTarget()
}

// checkTarget holds the target to the one form its method allows (RFC 9112
// section 3.2) and its authority, if it has one, to the Host header.
func (h *Head) checkTarget() *Error {
	if string(h.Method) == "CONNECT" {
		if h.Framing == Chunked || h.Length > 0 {
			return newError(ReasonForbiddenBody, -1)
		}
		if !ValidHost(h.Target) || !hasPort(h.Target) {
			return newError(ReasonTarget, -1).quoting(h.Target)
		}
		return h.checkAuthority(h.Target)
	}
	if h.Target[0] == '/' {
		return nil
	}
	if len(h.Target) == 1 && h.Target[0] == '*' && string(h.Method) == "OPTIONS" {
		return nil
	}
	authority, _, ok := splitAbsolute(h.Target)
	if !ok || !ValidHost(authority) {
		return newError(ReasonTarget, -1).quoting(h.Target)
	}
	return h.checkAuthority(authority)
}

func (h *Head) checkAuthority(authority []byte) *Error {
	if h.flags&sawHost == 0 {
		h.Host = authority
		return nil
	}
	if len(authority) != len(h.Host) || !bytes.EqualFold(authority, h.Host) {
		return newError(ReasonHostMismatch, -1).quoting(h.Host)
	}
	return nil
}

// splitAbsolute splits an http or https URI into its authority and what
// follows, which may be empty.
func splitAbsolute(target []byte) (authority, rest []byte, ok bool) {
	switch {
	case hasPrefixFold(target, "http://"):
		target = target[len("http://"):]
	case hasPrefixFold(target, "https://"):
		target = target[len("https://"):]
	default:
		return nil, nil, false
	}
	end := bytes.IndexAny(target, "/?")
	if end < 0 {
		end = len(target)
	}
	return target[:end], target[end:], true
}

// ValidHost reports whether b is a host with an optional port as the sidecar
// accepts it in Host, in a target's authority and in :authority: a name of
// letters, digits, '-', '.' and '_', or an IPv6 address in brackets; then
// nothing or ':' and a port up to 65535. User information, percent-encoding
// and zone identifiers are not accepted.
func ValidHost(b []byte) bool {
	i := 0
	if len(b) > 0 && b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 0 {
			return false
		}
		if a, err := netip.ParseAddr(string(b[1:end])); err != nil || !a.Is6() || a.Zone() != "" {
			return false
		}
		i = end + 1
	} else {
		for i < len(b) && class[b[i]]&isHost != 0 {
			i++
		}
		if i == 0 {
			return false
		}
	}
	if i == len(b) {
		return true
	}
	port := b[i+1:]
	if b[i] != ':' || len(port) == 0 || len(port) > 5 {
		return false
	}
	n := 0
	for _, c := range port {
		if !isDigit(c) {
			return false
		}
		n = n*10 + int(c-'0')
	}
	return n <= 65535
}

// hasPort reports whether a valid host has a port.
func hasPort(b []byte) bool {
	return bytes.LastIndexByte(b, ':') > bytes.LastIndexByte(b, ']')
}

func (h *Head) finishResponse(requestMethod []byte) *Error {
	if e := h.finish(); e != nil {
		return e
	}
	h.Host, h.Expect100 = nil, false
	announced := h.flags&sawTransferEncoding != 0 || h.Length > 0
	switch {
	case h.Status < 200 || h.Status == 204:
		// A sender that announces a body here may well send one, and its first
		// bytes would be read as the next response.
		if announced {
			return newError(ReasonForbiddenBody, -1)
		}
		h.Framing, h.Length = None, -1
		h.flags |= bodiless
	case string(requestMethod) == "CONNECT" && h.Status < 300:
		// Both are to be ignored here (RFC 9110 section 9.3.6), and go no further.
		h.Framing, h.Length = None, -1
		h.flags |= bodiless
	case string(requestMethod) == "HEAD" || h.Status == 304:
		h.Framing = None
		h.flags |= bodiless
	case h.flags&sawTransferEncoding != 0:
		h.Framing = Chunked
	case h.flags&sawContentLength != 0:
		h.Framing = Length
	default:
		h.Framing = UntilClose
		h.Close = true
	}
	return nil
}
