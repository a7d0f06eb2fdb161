package parse

import (
	"strings"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	// window is how far into a line of text a level or a trace id is looked for.
	window = 512
	// levelWithin is how far a level may stand behind a date.
	levelWithin = 96
)

// text takes what a line of text says in a way that cannot be mistaken: the
// level where the usual loggers write it, and level=warn, trace_id=... and
// traceparent=... of logfmt.
func text(r *record.Record) {
	head := r.Body[:min(len(r.Body), window)]
	r.Level = leading(head)
	for i := 0; ; i++ {
		n := strings.IndexByte(head[i:], '=')
		if n < 0 {
			return
		}
		i += n
		if i < len("lvl") {
			continue
		}
		// The last letters of the names that are looked for.
		switch head[i-1] {
		case 'l', 'y', 'd', 'D', 't':
			pair(r, head, i)
		}
	}
}

// pair reads the name and value around an equals sign.
func pair(r *record.Record, head string, equals int) {
	from := equals
	for from > 0 && equals-from <= len("traceparent") && head[from-1] > ' ' {
		from--
	}
	if from > 0 && head[from-1] > ' ' {
		return
	}
	i := knownIndex(head[from:equals])
	if i < 0 {
		return
	}
	value := head[equals+1:]
	for n := range len(value) {
		if value[n] <= ' ' {
			value = value[:n]
			break
		}
	}
	value = strings.Trim(value, `"`)
	switch {
	case logLevel <= i && i <= lvl:
		if level := levelOf(value); level != "" {
			r.Level = level
		}
	case traceID <= i && i <= traceID3:
		if hex(value, 32) {
			r.TraceID = strings.ToLower(value)
		}
	case spanID <= i && i <= spanID3:
		if hex(value, 16) {
			r.SpanID = strings.ToLower(value)
		}
	case i == traceparent && r.TraceID == "":
		r.TraceID = parentTrace(value)
	}
}

// leading reads the level where a line begins with one, or has one behind its
// date. A lower-case first word without brackets is prose.
func leading(head string) string {
	head = plainStart(head)
	if len(head) < 3 {
		return ""
	}
	switch c := head[0]; {
	case c == '[':
		word, rest, ok := strings.Cut(head[1:min(len(head), levelWithin)], "]")
		if !ok {
			return ""
		}
		if level := levelOf(strings.TrimSpace(word)); level != "" {
			return level
		}
		if len(word) >= len("12:00:00") && digit(word[0]) {
			if level := short(word); level != "" {
				return level
			}
			return behind(rest)
		}
		return ""
	case c == '<':
		return priority(head)
	case digit(c):
		if date(head) {
			return behind(head[min(len(head), len("12:00:00")):])
		}
		return ""
	case c < 'A' || c > 'Z':
		return console(head)
	}
	// klog and glog: I1125 12:00:00.
	if len(head) > 8 && digit(head[1]) && digit(head[2]) && digit(head[3]) && digit(head[4]) && head[5] == ' ' && digit(head[6]) && head[8] == ':' {
		return initial(head[0])
	}
	// Ruby's Logger: I, [2026-11-25T12:00:00.
	if head[1] == ',' && strings.HasPrefix(head[2:], " [") {
		return initial(head[0])
	}
	n := 1
	for n < len(head) && 'A' <= head[n] && head[n] <= 'Z' {
		n++
	}
	if n < len(head) && head[n] != ' ' && head[n] != ':' && head[n] != '[' && head[n] != '\t' && head[n] != '|' && head[n] != 0x1b {
		return ""
	}
	return levelOf(head[:n])
}

// plainStart skips what colours the start of a line.
func plainStart(head string) string {
	for len(head) > 2 && head[0] == 0x1b && head[1] == '[' {
		i := strings.IndexByte(head[:min(len(head), 12)], 'm')
		if i < 0 {
			return head
		}
		head = head[i+1:]
	}
	return head
}

// initial is the level that klog and Ruby shorten to one letter.
func initial(c byte) string {
	switch c {
	case 'D':
		return "debug"
	case 'I':
		return "info"
	case 'W':
		return "warn"
	case 'E':
		return "error"
	case 'F':
		return "fatal"
	}
	return ""
}

// short is the level of Serilog: [12:00:00 INF].
func short(stamp string) string {
	n := len(stamp)
	if n < 4 || stamp[n-4] != ' ' {
		return ""
	}
	switch stamp[n-3:] {
	case "VRB":
		return "trace"
	case "DBG":
		return "debug"
	case "INF":
		return "info"
	case "WRN":
		return "warn"
	case "ERR":
		return "error"
	case "FTL":
		return "fatal"
	}
	return ""
}

// console is the level of .NET's console logger: fail: Shop.Cart[0].
func console(head string) string {
	if len(head) < 6 || head[4] != ':' || head[5] != ' ' {
		return ""
	}
	switch head[:4] {
	case "trce":
		return "trace"
	case "dbug":
		return "debug"
	case "info":
		return "info"
	case "warn":
		return "warn"
	case "fail":
		return "error"
	case "crit":
		return "fatal"
	}
	return ""
}

// priority reads the severity of syslog's <PRI> (RFC 5424, section 6.2.1).
func priority(head string) string {
	n := 0
	for i := 1; i < min(len(head), 5); i++ {
		switch c := head[i]; {
		case digit(c):
			n = n*10 + int(c-'0')
		case c == '>' && i > 1 && n <= 191:
			return [8]string{"fatal", "fatal", "fatal", "error", "warn", "info", "info", "debug"}[n%8]
		default:
			return ""
		}
	}
	return ""
}

// date reports whether a line begins with a day or a time of day.
func date(head string) bool {
	if len(head) < len("12:00:00") {
		return false
	}
	return head[2] == ':' && head[5] == ':' || (head[4] == '-' || head[4] == '/') && head[7] == head[4] && digit(head[1]) && digit(head[5])
}

// behind finds the level behind a date: a word in capitals, or one in brackets
// or between tabs, before the message begins.
func behind(s string) string {
	s = s[:min(len(s), levelWithin)]
	for i := 0; i < len(s); {
		c := s[i]
		upper, lower := 'A' <= c && c <= 'Z', 'a' <= c && c <= 'z'
		if !upper && !lower {
			if c == '"' || c == '{' || c == ':' && i+1 < len(s) && s[i+1] == ' ' {
				return ""
			}
			i++
			if c == 0x1b { // a colour ends with an m
				for i < len(s) && s[i] != 'm' {
					i++
				}
				i++
			}
			continue
		}
		from := i
		same := true // all of it is in the case of the first
		for i < len(s) {
			c := s[i]
			if 'A' <= c && c <= 'Z' {
				same = same && upper
			} else if 'a' <= c && c <= 'z' {
				same = same && lower
			} else {
				break
			}
			i++
		}
		if !same || i-from < 3 || i-from > 9 {
			continue
		}
		word := s[from:i]
		if lower {
			around := from > 0 && i < len(s) && (s[from-1] == '[' && s[i] == ']' || s[from-1] == '\t' && s[i] == '\t')
			if !around {
				continue
			}
		}
		if level := levelOf(word); level != "" {
			return level
		}
		switch word {
		case "SEVERE":
			return "error"
		case "LOG", "HINT", "DETAIL", "STATEMENT": // PostgreSQL
			if i < len(s) && s[i] == ':' {
				return "info"
			}
		}
	}
	return ""
}

func digit(c byte) bool { return '0' <= c && c <= '9' }
