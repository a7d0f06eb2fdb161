package cri

import (
	"encoding/json"
	"time"
)

// Docker reads one line of Docker's json-file driver:
//
//	{"log":"the text\n","stream":"stdout","time":"2026-11-23T03:00:00.000000005Z"}
//
// A log without a newline at its end is a part, and the logical line goes on.
// It allocates; Parse is the fast one. What is not in the format comes back whole
// with the problem.
func Docker(line []byte) (Line, Problem) {
	raw := Line{Text: line}
	var d struct {
		Log    *string   `json:"log"`
		Stream string    `json:"stream"`
		Time   time.Time `json:"time"`
	}
	if err := json.Unmarshal(line, &d); err != nil || d.Log == nil || d.Time.IsZero() {
		return raw, BadTime
	}
	l := Line{Time: d.Time.UTC()}
	switch d.Stream {
	case "stdout":
		l.Stream = Stdout
	case "stderr":
		l.Stream = Stderr
	default:
		return raw, BadStream
	}
	l.Text = []byte(*d.Log)
	if n := len(l.Text); n > 0 && l.Text[n-1] == '\n' {
		l.Text = l.Text[:n-1]
	} else {
		l.Partial = true
	}
	return l, OK
}

// IsDocker reports whether a line looks like one of Docker's: a CRI line begins with a digit.
func IsDocker(line []byte) bool {
	const begin = `{"log":`
	return len(line) > len(begin) && string(line[:len(begin)]) == begin
}
