// Package multiline finds out which lines of a log are one record: the stack
// traces and crash reports of the usual languages, or what a pattern says.
//
// It looks at one line at a time and at what it remembers of the one before it
// (a few bytes for each stream). It knows text. It does not keep lines, know
// files or time: package tail holds a record that is open, and lets it go after
// the next line or a time limit. A line that is neither part of a trace nor may
// begin one is never held.
package multiline

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Limits. The bytes of a record are bounded by whoever joins the lines.
const (
	MaxLines   = 1000 // of one record; the line after these begins another
	MaxPattern = 4096 // bytes of a regular expression
	// MaxMatched bytes of a line are compared with one: the first of a longer line,
	// or the last where the end of the line is what tells (unfinished, end).
	MaxMatched = 16 << 10
)

type languages uint16

const (
	java languages = 1 << iota
	golang
	python
	dotnet
	ruby
	node
	php
	rust

	all = java | golang | python | dotnet | ruby | node | php | rust
)

var names = map[string]languages{
	"java": java, "go": golang, "python": python, "dotnet": dotnet, "ruby": ruby, "node": node, "php": php, "rust": rust,
	"auto": all, "none": 0,
}

type mode uint8

const (
	traces     mode = iota
	start           // a match begins a record
	follow          // a match belongs to the record before it
	unfinished      // what comes after a match belongs to it
	end             // a match ends a record
)

var modes = map[string]mode{"start": start, "continue": follow, "unfinished": unfinished, "end": end}

// Language is what one container's records look like. It is not changed and is
// safe for concurrent use.
type Language struct {
	spec    string
	langs   languages
	mode    mode
	pattern *regexp.Regexp
}

// Compile reads a specification:
//
//	auto                  the traces of all languages below
//	none                  every line is a record
//	java,go,python,...    also dotnet, ruby, node, php, rust
//	start:<regexp>        a line that matches begins a record
//	continue:<regexp>     a line that matches belongs to the record before it
//	unfinished:<regexp>   the line after one that matches belongs to it
//	end:<regexp>          a line that matches is the last of its record
//
// The regular expression is RE2's, of at most MaxPattern bytes. With one, every
// line that may be followed is held until the next.
func Compile(spec string) (*Language, error) {
	if word, pattern, ok := strings.Cut(spec, ":"); ok {
		m, ok := modes[word]
		if !ok {
			return nil, fmt.Errorf("multiline %q: %q is not a kind of pattern; write start:, continue:, unfinished: or end: before it", spec, word)
		}
		if pattern == "" || len(pattern) > MaxPattern {
			return nil, fmt.Errorf("multiline %.80q: the regular expression has %d bytes; give it 1 to %d", spec, len(pattern), MaxPattern)
		}
		re, err := regexp.Compile(pattern)
		if err != nil {
			return nil, fmt.Errorf("multiline %q: %w; write it as RE2 reads it (no look-around, no back references)", spec, err)
		}
		return &Language{spec: spec, mode: m, pattern: re}, nil
	}
	l := &Language{spec: spec}
	for name := range strings.SplitSeq(spec, ",") {
		bits, ok := names[strings.TrimSpace(name)]
		if !ok {
			return nil, fmt.Errorf("multiline %q: no language is called %q; write auto, none, or some of %s", spec, strings.TrimSpace(name), known())
		}
		l.langs |= bits
	}
	return l, nil
}

func known() string {
	var out []string
	for name, bits := range names {
		if bits != 0 && bits != all {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// String is the specification.
func (l *Language) String() string { return l.spec }

// Grouper returns one for a stream's first line.
func (l *Language) Grouper() Grouper { return Grouper{lang: l} }

// Grouper follows one stream of one file. The zero value joins nothing. It is
// for one goroutine.
type Grouper struct {
	lang  *Language
	state state
	lines int // of the record, this one included
}

// Reset says that the record before was let go: the next line begins another.
func (g *Grouper) Reset() { g.state, g.lines = none, 0 }

// Line judges the next line of the stream, without its newline. The line joins
// the record before it, or begins one. open says that more lines may follow, so
// that the record is to be held until the next line or a time limit. It keeps
// nothing of text, and allocates nothing.
func (g *Grouper) Line(text []byte) (joins, open bool) {
	if g.lang == nil {
		return false, false
	}
	if g.lang.mode != traces {
		return g.matched(text)
	}
	if g.state == none {
		g.state = g.lang.head(text)
		if g.state == none {
			return false, false
		}
		g.lines = 1
		return false, true
	}
	next := g.lang.step(g.state, chomp(text))
	if next == none {
		g.state, g.lines = g.lang.head(text), 1
		return false, g.state != none
	}
	if next == last {
		g.Reset()
		return true, false
	}
	return g.joined(next)
}

// joined counts a line that belongs to the record before it, or begins another
// of the same kind where that one is full.
func (g *Grouper) joined(next state) (joins, open bool) {
	g.state = next
	if g.lines >= MaxLines {
		g.lines = 1
		return false, true
	}
	g.lines++
	return true, true
}

// matched is Line for a pattern. Its state is begun while a record may go on.
func (g *Grouper) matched(text []byte) (joins, open bool) {
	if len(text) > MaxMatched {
		if g.lang.mode == unfinished || g.lang.mode == end {
			text = text[len(text)-MaxMatched:]
		} else {
			text = text[:MaxMatched]
		}
	}
	match := g.lang.pattern.Match(text)
	before := g.state == begun
	switch g.lang.mode {
	case start:
		joins, open = before && !match, true
	case follow:
		joins, open = before && match, true
	case unfinished:
		joins, open = before, match
	case end, traces: // traces do not come here
		joins, open = before, !match
	}
	if joins && g.lines >= MaxLines {
		joins = false
	}
	if !joins {
		g.lines = 0
	}
	g.lines++
	g.state = none
	if open {
		g.state = begun
	}
	return joins, open
}
