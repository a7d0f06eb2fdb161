package accesslog

import (
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// line is the room in which a line is built, and the second for which the last
// one in it was: the date is written once a second, not once a line.
type line struct {
	b      []byte
	second int64
	date   []byte // 2006-01-02T15:04:05.
}

// request builds the line of a request. Each name stands with the quotes around
// it, so that a field is one copy and its value.
func (l *line) request(e *Entry, same []byte) {
	b := append(l.b[:0], `{"`+record.Timestamp+`":"`...)
	b = l.appendTime(b, e.Start)
	if e.failed() {
		b = append(b, `","`+record.LogLevel+`":"warn","`+record.Message+`":"`...)
	} else {
		b = append(b, `","`+record.LogLevel+`":"info","`+record.Message+`":"`...)
	}
	b = appendMessage(b, e)
	b = append(b, same...)
	b = append(append(append(b, `,"outrigger.direction":"`...), e.Direction...), '"')
	b = append(append(append(b, `,"network.protocol":"`...), e.Protocol...), '"')
	if len(e.Method) > 0 {
		b = appendText(b, `,"http.request.method":"`, cut(e.Method, maxText))
		b = appendText(b, `,"url.path":"`, cut(e.Path, maxLong))
		b = appendText(b, `,"url.domain":"`, cut(e.Host, maxText))
	}
	b = appendNonEmpty(b, `,"user_agent.original":"`, cut(e.UserAgent, maxText))
	b = appendNonEmpty(b, `,"http.request.id":"`, cut(e.RequestID, maxText))
	if e.Protocol != "tcp" {
		b = appendInt(b, `,"http.response.status_code":`, int64(e.Status))
	}
	if e.Protocol == "grpc" && e.GRPCStatus >= 0 {
		b = appendInt(b, `,"rpc.grpc.status_code":`, int64(e.GRPCStatus))
	}
	b = append(e.Flags.appendTo(append(b, `,"outrigger.response_flags":"`...)), '"')
	b = appendInt(b, `,"event.duration":`, int64(e.Duration))
	b = appendInt(b, `,"http.request.body.bytes":`, e.BytesIn)
	b = appendInt(b, `,"http.response.body.bytes":`, e.BytesOut)
	b = appendText(b, `,"outrigger.destination":"`, e.Destination)
	b = appendNonEmpty(b, `,"outrigger.route":"`, e.Route)
	b = appendNonEmpty(b, `,"destination.address":"`, e.Upstream)
	b = appendNonEmpty(b, `,"source.address":"`, e.Source)
	b = appendNonEmpty(b, `,"outrigger.security":"`, e.Security)
	b = appendNonEmpty(b, `,"outrigger.peer.identity":"`, cut(e.PeerIdentity, maxLong))
	b = appendNonEmpty(b, `,"tls.client.server_name":"`, cut(e.TLSServerName, maxText))
	b = appendInt(b, `,"outrigger.attempts":`, int64(e.Attempts))
	if len(e.TraceID) > 0 {
		b = appendText(b, `,"`+record.TraceID+`":"`, e.TraceID)
		b = appendText(b, `,"`+record.SpanID+`":"`, e.SpanID)
	}
	b = appendNonEmpty(b, `,"parent.id":"`, cut(e.ParentID, maxText))
	b = appendNonEmpty(b, `,"outrigger.breaker.policy":"`, e.Breaker)
	b = appendNonEmpty(b, `,"outrigger.authorization.policy":"`, e.Denied)
	b = appendNonEmpty(b, `,"outrigger.authorization.observed":"`, cut(e.Observed, maxLong))
	b = appendNonEmpty(b, `,"error.message":"`, cut(e.Detail, maxLong))
	b = appendNonEmpty(b, `,"outrigger.config_version":"`, e.Config)
	l.b = append(b, "}\n"...)
}

// failed reports whether whoever reads warnings should see the line: what the
// destination or the mesh got wrong, not what the caller did. The codes of gRPC
// are those that OpenTelemetry takes for errors of a server: UNKNOWN,
// DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
func (e *Entry) failed() bool {
	if e.Protocol == "grpc" {
		switch e.GRPCStatus {
		case 2, 4, 12, 13, 14, 15:
			return true
		}
	}
	return e.Status >= 500 || e.Flags != 0
}

// appendMessage writes what a person reads first: GET /pay -> 503 UO 1.2ms, or
// for gRPC, whose code follows the status, POST /pay.Pay/Do -> 200/14 1.2ms.
func appendMessage(b []byte, e *Entry) []byte {
	if len(e.Method) > 0 {
		b = append(appendEscaped(b, cut(e.Method, maxText)), ' ')
		b = appendEscaped(b, cut(e.Path, maxMessage))
	} else {
		b = append(b, e.Protocol...)
	}
	b = append(b, " ->"...)
	if e.Protocol != "tcp" {
		b = strconv.AppendInt(append(b, ' '), int64(e.Status), 10)
	}
	if e.Protocol == "grpc" && e.GRPCStatus >= 0 {
		b = strconv.AppendInt(append(b, '/'), int64(e.GRPCStatus), 10)
	}
	if e.Flags != 0 {
		b = e.Flags.appendTo(append(b, ' '))
	}
	tenths := (max(e.Duration, 0) + 50*time.Microsecond) / (100 * time.Microsecond)
	b = strconv.AppendInt(append(b, ' '), int64(tenths/10), 10)
	return append(b, '.', byte('0'+tenths%10), 'm', 's')
}

// appendTime writes RFC 3339 in UTC with microseconds.
func (l *line) appendTime(b []byte, t time.Time) []byte {
	if second := t.Unix(); second != l.second || len(l.date) == 0 {
		l.second, l.date = second, t.UTC().AppendFormat(l.date[:0], "2006-01-02T15:04:05.")
	}
	b = append(b, l.date...)
	micros := t.Nanosecond() / 1000
	for unit := 100_000; unit > 0; unit /= 10 {
		b = append(b, byte('0'+micros/unit%10))
	}
	return append(b, 'Z')
}

// text is what a field may hold.
type text interface{ ~string | ~[]byte }

// cut keeps the first n bytes.
func cut[T text](v T, n int) T { return v[:min(len(v), n)] }

// appendText writes a field; name is `,"name":"`.
func appendText[T text](b []byte, name string, value T) []byte {
	return append(appendEscaped(append(b, name...), value), '"')
}

func appendNonEmpty[T text](b []byte, name string, value T) []byte {
	if len(value) == 0 {
		return b
	}
	return appendText(b, name, value)
}

func appendInt(b []byte, name string, v int64) []byte {
	return strconv.AppendInt(append(b, name...), v, 10)
}

// appendEscaped writes v as the inside of a JSON string (RFC 8259, 7). What is
// not UTF-8 becomes U+FFFD.
func appendEscaped[T text](b []byte, v T) []byte {
	if isPlain(v) { // nearly always
		return append(b, v...)
	}
	from := 0 // what is before it has been written
	for i := 0; i < len(v); {
		c := v[i]
		if plain[c] {
			i++
			continue
		}
		b = append(b, v[from:i]...)
		if c < utf8.RuneSelf {
			b = appendEscape(b, c)
			i++
		} else {
			r, n := utf8.DecodeRuneInString(string(v[i:min(i+utf8.UTFMax, len(v))]))
			b = utf8.AppendRune(b, r)
			i += n
		}
		from = i
	}
	return append(b, v[from:]...)
}

func appendEscape(b []byte, c byte) []byte {
	const hex = "0123456789abcdef"
	if c == '"' || c == '\\' {
		return append(b, '\\', c)
	}
	return append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
}

// plain are the bytes that stand for themselves.
var plain = func() (t [256]bool) {
	for c := 0x20; c < 0x7f; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

// isPlain reports whether all bytes are plain.
func isPlain[T text](v T) bool {
	n := len(v)
	if n < 8 {
		for i := range n {
			if !plain[v[i]] {
				return false
			}
		}
		return true
	}
	for i := 0; i+8 < n; i += 8 {
		if special(word(v[i : i+8])) {
			return false
		}
	}
	return !special(word(v[n-8:])) // some of them for the second time
}

// word is eight bytes as the compiler loads them at once.
func word[T text](v T) uint64 {
	_ = v[7]
	return uint64(v[0]) | uint64(v[1])<<8 | uint64(v[2])<<16 | uint64(v[3])<<24 | uint64(v[4])<<32 | uint64(v[5])<<40 | uint64(v[6])<<48 | uint64(v[7])<<56
}

// special reports whether any byte of a word is not plain. It looks at all eight
// at once: subtracting 1 from each byte borrows from the eighth bit of one that
// was 0, and exclusive or makes 0 what is looked for.
func special(w uint64) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	quote, backslash, del := w^'"'*ones, w^'\\'*ones, w^0x7f*ones
	return (w|(w-0x20*ones)|(quote-ones)|(backslash-ones)|(del-ones))&high != 0
}
