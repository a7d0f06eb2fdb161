package http1

import "bytes"

// NormalizePath is the one form of the path of a request target, in which it
// is matched, authorised and forwarded, so that no two of these can disagree.
// It takes a target in origin, absolute or asterisk form (RFC 9112 section
// 3.2); of an absolute one the scheme and the authority are dropped, which
// ParseRequest has compared with Host.
//
// In the path returned, %-escapes of unreserved characters are decoded and
// other escapes have upper-case digits; bytes that RFC 3986 has no place for
// are escaped; "." and ".." segments are resolved and empty segments inside
// are merged. Rejected are paths that programs are known to read differently:
// with %2F, %5C, %00, a backslash or a '#'; with a parameter on a dot segment;
// with ".." above the root or after an empty segment. Normalising the result
// again gives the same result.
//
// The query is returned as it came, without its '?': nil if there is no '?',
// empty but not nil if nothing follows it. Path aliases target if that was
// normal already, else it is the end of an extended dst.
func NormalizePath(dst, target []byte) (path, query []byte, err *Error) {
	if len(target) == 1 && target[0] == '*' {
		return target, nil, nil
	}
	if len(target) == 0 || target[0] != '/' {
		_, rest, ok := splitAbsolute(target)
		if !ok {
			return nil, nil, newError(ReasonTarget, -1).quoting(target)
		}
		target = rest
	}
	path = target
	if i := bytes.IndexByte(target, '?'); i >= 0 {
		path, query = target[:i:i], target[i+1:]
		for j, c := range query {
			if class[c]&isTarget == 0 {
				return nil, nil, newError(ReasonPathByte, i+1+j)
			}
		}
	}
	if len(path) == 0 {
		return append(dst, '/')[len(dst):], query, nil
	}
	if isNormal(path) {
		return path, query, nil
	}
	base := len(dst)
	dst, reason := appendNormal(dst, path)
	if reason != "" {
		return nil, nil, newError(reason, -1).quoting(path)
	}
	return dst[base:len(dst):len(dst)], query, nil
}

// AppendTarget appends the origin-form target of a path and a query as
// NormalizePath returns them, for Edit.Target.
func AppendTarget(dst, path, query []byte) []byte {
	dst = append(dst, path...)
	if query != nil {
		dst = append(dst, '?')
		dst = append(dst, query...)
	}
	return dst
}

// isNormal reports whether a path is certainly normal: no escapes, nothing to
// escape, and no segment that is empty inside or begins with a dot.
func isNormal(path []byte) bool {
	slash := false
	for _, c := range path {
		if class[c]&isPath == 0 || slash && (c == '/' || c == '.') {
			return false
		}
		slash = c == '/'
	}
	return true
}

// appendNormal appends the normal form of a path that begins with '/'.
func appendNormal(dst, path []byte) ([]byte, string) {
	base := len(dst)
	empty := false // an empty segment inside has been merged
	for i := 0; i < len(path); {
		start := len(dst)
		dst = append(dst, '/')
		i++
		for i < len(path) && path[i] != '/' {
			var reason string
			if dst, i, reason = appendByte(dst, path, i); reason != "" {
				return dst, reason
			}
		}
		last := i == len(path)
		segment := dst[start+1:]
		switch {
		case len(segment) == 0:
			if !last {
				empty = true
				dst = dst[:start]
			}
		case isDots(segment) && len(segment) == 1:
			dst = dst[:start]
			if last {
				dst = append(dst, '/')
			}
		case isDots(segment):
			if empty {
				return dst, ReasonAmbiguousDots
			}
			if start == base {
				return dst, ReasonPathAboveRoot
			}
			dst = dst[:base+bytes.LastIndexByte(dst[base:start], '/')]
			if last {
				dst = append(dst, '/')
			}
		case isDotsWithParameter(segment):
			return dst, ReasonDotParameter
		}
	}
	return dst, ""
}

// appendByte appends the normal form of the byte or escape at path[i] and
// returns the index behind it.
func appendByte(dst, path []byte, i int) ([]byte, int, string) {
	const digits = "0123456789ABCDEF"
	c := path[i]
	switch {
	case c == '%':
		if i+2 >= len(path) || class[path[i+1]]&isHex == 0 || class[path[i+2]]&isHex == 0 {
			return dst, i, ReasonPathEscape
		}
		c = unhex(path[i+1])<<4 | unhex(path[i+2])
		switch {
		case c == '/' || c == '\\' || c == 0:
			return dst, i, ReasonEncodedSeparator
		case class[c]&isUnreserved != 0:
			return append(dst, c), i + 3, ""
		}
		return append(dst, '%', digits[c>>4], digits[c&15]), i + 3, ""
	case class[c]&isPath != 0:
		return append(dst, c), i + 1, ""
	case class[c]&isTarget == 0 || c == '\\':
		return dst, i, ReasonPathByte
	default:
		return append(dst, '%', digits[c>>4], digits[c&15]), i + 1, ""
	}
}

func unhex(c byte) byte {
	if isDigit(c) {
		return c - '0'
	}
	return lower(c) - 'a' + 10
}

// isDots reports whether a segment is "." or "..".
func isDots(segment []byte) bool {
	return string(segment) == "." || string(segment) == ".."
}

// isDotsWithParameter reports whether a segment is "." or ".." followed by a
// parameter, which some servers strip before they resolve dots.
func isDotsWithParameter(segment []byte) bool {
	dots := 0
	for dots < len(segment) && segment[dots] == '.' {
		dots++
	}
	rest := segment[dots:]
	return (dots == 1 || dots == 2) && len(rest) > 0 && (rest[0] == ';' || len(rest) >= 3 && string(rest[:3]) == "%3B")
}
