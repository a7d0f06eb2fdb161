package main

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Columns of a record: they grow with what they hold up to a limit, so that one
// long name does not push all messages off the screen.
const (
	minService = 12
	maxService = 32
	levelWidth = 5
	stampWidth = len("2026-11-23T03:00:00.000")
)

// columns are the widths that records are written with. The zero value is ready.
type columns struct{ service int }

// fit makes room for a record.
func (c *columns) fit(f map[string]any) {
	c.service = max(c.service, minService, min(utf8.RuneCountInString(clean(text(f, "service.name"))), maxService))
}

// render is one record as a line: time, service, level, message, and what joins
// it to others. Further lines of the message stand under its first.
func (c *columns) render(f map[string]any) string {
	c.fit(f)
	var b strings.Builder
	stamp := clean(text(f, "@timestamp"))
	if len(stamp) > stampWidth {
		stamp = stamp[:stampWidth]
	}
	fmt.Fprintf(&b, "%-*s %-*s %-*s ", stampWidth, stamp, c.service, clean(text(f, "service.name")), levelWidth, clean(text(f, "log.level")))
	message := strings.Split(strings.TrimRight(text(f, "message"), "\r\n"), "\n")
	for i, line := range message {
		line = clean(strings.TrimSuffix(line, "\r"))
		if i > 0 {
			b.WriteByte('\n')
			if line != "" {
				line = strings.Repeat(" ", stampWidth+c.service+levelWidth+3) + line
			}
		}
		b.WriteString(line)
	}
	if d := text(f, "outrigger.direction"); d != "" {
		fmt.Fprintf(&b, " [%s %s]", clean(d), clean(text(f, "outrigger.destination")))
	}
	if id := text(f, "trace.id"); id != "" {
		fmt.Fprintf(&b, " trace.id=%s", clean(id))
	}
	return b.String()
}

// clean makes a text that somebody else wrote fit for a terminal: without the
// colours and other escape sequences of ECMA-48 (section 5.4), tabs as spaces,
// and other control characters as they are written in Go.
func clean(s string) string {
	if !strings.ContainsFunc(s, unicode.IsControl) {
		return s
	}
	var b strings.Builder
	for s != "" {
		if n := escape(s); n > 0 {
			s = s[n:]
			continue
		}
		r, n := utf8.DecodeRuneInString(s)
		switch {
		case r == '\t':
			b.WriteString("    ")
		case unicode.IsControl(r):
			quoted := strconv.QuoteRune(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		default:
			b.WriteString(s[:n])
		}
		s = s[n:]
	}
	return b.String()
}

// escape returns the length of the control sequence that s begins with, or 0:
// ESC [, parameters from 0x20 to 0x3f, and a final byte from 0x40 to 0x7e. What
// is not whole is no sequence.
func escape(s string) int {
	rest, ok := strings.CutPrefix(s, "\x1b[")
	if !ok {
		return 0
	}
	i := strings.IndexFunc(rest, func(r rune) bool { return r < 0x20 || r > 0x3f })
	if i < 0 || rest[i] < 0x40 || rest[i] > 0x7e {
		return 0
	}
	return len(s) - len(rest) + i + 1
}

func text(f map[string]any, name string) string {
	switch v := f[name].(type) {
	case nil:
		return ""
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}
