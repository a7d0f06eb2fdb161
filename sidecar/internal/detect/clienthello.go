package detect

import (
	"net/netip"
	"strings"
)

const (
	recordHandshake   = 22
	handshakeHello    = 1
	recordHeader      = 5
	handshakeHeader   = 4
	maxRecord         = 1 << 14 // RFC 8446, 5.1
	extServerName     = 0
	extALPN           = 16
	nameTypeHost      = 0
	maxServerName     = 253 // RFC 1035, 2.3.4, without the final dot
	maxLabel          = 63
	helloFixed        = 2 + 32 // version and random
	maxExtensionsSeen = 256
)

// clientHello reads a ClientHello that may be spread over several records. What
// is broken is Opaque at once where a header shows it, else when the message is
// whole.
func clientHello(b []byte) Result {
	size, have, records := -1, 0, 0
	var header [handshakeHeader]byte
	for rest := b; ; records++ {
		switch {
		case len(rest) > 0 && rest[0] != recordHandshake, len(rest) > 1 && rest[1] != 3:
			return Result{Protocol: Opaque}
		case len(rest) < recordHeader:
			return Result{}
		}
		n := int(rest[3])<<8 | int(rest[4])
		if n == 0 || n > maxRecord {
			return Result{Protocol: Opaque}
		}
		fragment := rest[recordHeader:]
		whole := len(fragment) >= n
		fragment = fragment[:min(n, len(fragment))]
		if have < handshakeHeader {
			copy(header[have:], fragment)
		}
		have += len(fragment)
		if have > 0 && header[0] != handshakeHello {
			return Result{Protocol: Opaque}
		}
		if have >= handshakeHeader && size < 0 {
			size = handshakeHeader + (int(header[1])<<16 | int(header[2])<<8 | int(header[3]))
			if recordHeader+size > MaxBytes {
				return Result{Protocol: Opaque}
			}
		}
		switch {
		case size >= 0 && have >= size:
			message := b[recordHeader:]
			if records > 0 {
				message = join(b, size)
			}
			return parseHello(message[handshakeHeader:size])
		case !whole:
			return Result{}
		}
		rest = rest[recordHeader+n:]
	}
}

// join puts the fragments of a message of size bytes together. The records of b
// have been checked.
func join(b []byte, size int) []byte {
	out := make([]byte, 0, size)
	for len(out) < size {
		n := int(b[3])<<8 | int(b[4])
		fragment := b[recordHeader:]
		fragment = fragment[:min(n, len(fragment), size-len(out))]
		out = append(out, fragment...)
		b = b[min(recordHeader+n, len(b)):]
	}
	return out
}

// reader takes a message apart. Once something is missing it is bad and gives
// nothing more.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n int) []byte {
	if r.bad || n > len(r.b) {
		r.bad, r.b = true, nil
		return nil
	}
	out := r.b[:n:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) uint8() int {
	if b := r.take(1); b != nil {
		return int(b[0])
	}
	return 0
}

func (r *reader) uint16() int {
	if b := r.take(2); b != nil {
		return int(b[0])<<8 | int(b[1])
	}
	return 0
}

// parseHello reads the body of a ClientHello as crypto/tls does: a structure that
// is broken, an extension or a name that is there twice is no ClientHello, since
// the server could read it in another way. Extensions that are not known, GREASE
// (RFC 8701) among them, are skipped.
func parseHello(b []byte) Result {
	broken := Result{Protocol: Opaque}
	r := reader{b: b}
	r.take(helloFixed)
	r.take(r.uint8()) // session ID
	suites := r.take(r.uint16())
	r.take(r.uint8()) // compression methods
	if r.bad || len(suites)%2 != 0 {
		return broken
	}
	out := Result{Protocol: TLS}
	if len(r.b) == 0 {
		return out
	}
	extensions := reader{b: r.take(r.uint16())}
	if r.bad || len(r.b) > 0 {
		return broken
	}
	var seen [maxExtensionsSeen]uint16
	for count := 0; len(extensions.b) > 0; count++ {
		id := extensions.uint16()
		body := reader{b: extensions.take(extensions.uint16())}
		if extensions.bad || count == maxExtensionsSeen {
			return broken
		}
		for _, s := range seen[:count] {
			if int(s) == id {
				return broken
			}
		}
		seen[count] = uint16(id)
		switch id {
		case extServerName:
			name := serverName(&body)
			if body.bad {
				return broken
			}
			out.ServerName = hostName(name)
		case extALPN:
			out.ALPN = protocols(&body)
			if body.bad {
				return broken
			}
		}
	}
	return out
}

// serverName reads the list of RFC 6066, 3: at most one host name, without a
// final dot. Names of other types are skipped.
func serverName(r *reader) string {
	list := reader{b: r.take(r.uint16())}
	if r.bad || len(r.b) > 0 || len(list.b) == 0 {
		r.bad = true
		return ""
	}
	out := ""
	for len(list.b) > 0 {
		kind := list.uint8()
		name := list.take(list.uint16())
		if list.bad || len(name) == 0 {
			r.bad = true
			return ""
		}
		if kind != nameTypeHost {
			continue
		}
		if out != "" || name[len(name)-1] == '.' {
			r.bad = true
			return ""
		}
		out = string(name)
	}
	return out
}

// protocols reads the list of RFC 7301, 3.1.
func protocols(r *reader) []string {
	list := reader{b: r.take(r.uint16())}
	if r.bad || len(r.b) > 0 || len(list.b) == 0 {
		r.bad = true
		return nil
	}
	var out []string
	for len(list.b) > 0 {
		name := list.take(list.uint8())
		if list.bad || len(name) == 0 {
			r.bad = true
			return nil
		}
		out = append(out, string(name))
	}
	return out
}

// hostName is name in lower case, or nothing where it is no DNS name in ASCII. An
// underscore is let through: such names are in use. An address is no name
// (RFC 6066, 3).
func hostName(name string) string {
	if len(name) > maxServerName {
		return ""
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > maxLabel {
			return ""
		}
		for i := range len(label) {
			if c := label[i]; !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
				return ""
			}
		}
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	return strings.ToLower(name)
}
