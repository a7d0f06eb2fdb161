// Package cri reads the log format of the Container Runtime Interface: one
// physical line, and the logical lines that runtimes cut into parts.
//
//	2026-11-23T03:00:00.000000005Z stdout F the text
//
// It knows bytes. It does not know files, generations or credit (package tail)
// nor what the text means (package parse). Nothing that it is given is an
// error: a line that is not in the format is handed back whole with a Problem,
// because a log line must never stop the reading of a log.
package cri

import (
	"bytes"
	"time"
)

// Problem says why a line is not in the format.
type Problem uint8

// The problems. OK is the zero value.
const (
	OK Problem = iota
	BadTime
	BadStream
	BadTag
)

// String is the value of the metric label.
func (p Problem) String() string {
	switch p {
	case OK:
		return "ok"
	case BadTime:
		return "bad_time"
	case BadStream:
		return "bad_stream"
	case BadTag:
		return "bad_tag"
	default:
		return "unknown"
	}
}

// Stream that a container wrote to. None is that of a malformed line.
type Stream uint8

// The streams.
const (
	None Stream = iota
	Stdout
	Stderr
)

// String is the stream's name in the format; empty for None.
func (s Stream) String() string {
	switch s {
	case Stdout:
		return "stdout"
	case Stderr:
		return "stderr"
	default:
		return ""
	}
}

// Line is one physical line. Text shares the memory that Parse was given.
type Line struct {
	Time    time.Time // UTC; zero for a malformed line
	Stream  Stream
	Partial bool // tag P: the logical line goes on
	Text    []byte
}

// Parse reads one physical line without its newline. It allocates nothing. Of
// several tags (separated by colons) the first counts. A line that is not in
// the format comes back whole as Text with the problem.
func Parse(line []byte) (Line, Problem) {
	raw := Line{Text: line}
	stamp, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok {
		return raw, BadTime
	}
	t, ok := parseTime(stamp)
	if !ok {
		return raw, BadTime
	}
	name, rest, _ := bytes.Cut(rest, []byte{' '})
	var stream Stream
	switch string(name) {
	case "stdout":
		stream = Stdout
	case "stderr":
		stream = Stderr
	default:
		return raw, BadStream
	}
	tags, text, _ := bytes.Cut(rest, []byte{' '})
	tag, _, _ := bytes.Cut(tags, []byte{':'})
	l := Line{Time: t, Stream: stream, Text: text}
	switch string(tag) {
	case "F":
	case "P":
		l.Partial = true
	default:
		return raw, BadTag
	}
	return l, OK
}

// parseTime reads RFC 3339 with up to nine digits of a fraction. time.Parse
// would cost a string, and takes commas and lower-case letters that no runtime
// writes.
func parseTime(b []byte) (time.Time, bool) {
	const date = len("2006-01-02T15:04:05")
	if len(b) < date+1 || b[4] != '-' || b[7] != '-' || b[10] != 'T' || b[13] != ':' || b[16] != ':' {
		return time.Time{}, false
	}
	year, ok1 := number(b[0:4])
	month, ok2 := number(b[5:7])
	day, ok3 := number(b[8:10])
	hour, ok4 := number(b[11:13])
	minute, ok5 := number(b[14:16])
	sec, ok6 := number(b[17:19])
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || !ok6 ||
		month < 1 || month > 12 || day < 1 || hour > 23 || minute > 59 || sec > 59 {
		return time.Time{}, false
	}
	nano := 0
	b = b[date:]
	if b[0] == '.' {
		n := 1
		for ; n < len(b) && n <= 9 && b[n] >= '0' && b[n] <= '9'; n++ {
			nano = nano*10 + int(b[n]-'0')
		}
		if n == 1 {
			return time.Time{}, false
		}
		for i := n; i <= 9; i++ {
			nano *= 10
		}
		b = b[n:]
	}
	t := time.Date(year, time.Month(month), day, hour, minute, sec, nano, time.UTC)
	if t.Day() != day { // 30 February
		return time.Time{}, false
	}
	if len(b) == 1 && b[0] == 'Z' {
		return t, true
	}
	if len(b) != len("+00:00") || b[3] != ':' || b[0] != '+' && b[0] != '-' {
		return time.Time{}, false
	}
	oh, ok1 := number(b[1:3])
	om, ok2 := number(b[4:6])
	if !ok1 || !ok2 || oh > 23 || om > 59 {
		return time.Time{}, false
	}
	offset := time.Duration(oh)*time.Hour + time.Duration(om)*time.Minute
	if b[0] == '+' {
		offset = -offset
	}
	return t.Add(offset), true
}

func number(b []byte) (n int, ok bool) {
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}
