package cri

import (
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Span is the place of physical lines: half-open byte range [Start, End) of one
// file generation.
type Span struct {
	File       string
	Start, End int64
}

// Joined is a logical line. Text and Spans are valid until the next call of the
// Joiner that returned it.
type Joined struct {
	Time    time.Time // of its first part
	Stream  Stream
	Text    []byte
	Cut     int // bytes of text over record.MaxBody, cut off
	Spans   []Span
	Problem Problem
	Lines   int // physical ones
}

// Joiner joins the parts of logical lines. It belongs to one container's log
// (through all of its generations, because a rotation may fall between two
// parts) and keeps the streams apart: a runtime interleaves them freely. It
// holds at most record.MaxBody bytes a stream. Not safe for concurrent use; the
// zero value is ready, and of a nil one, which no line has been added to, nothing is open.
type Joiner struct {
	open [Stderr + 1]part
	one  [1]Span
}

type part struct {
	time  time.Time
	text  []byte
	cut   int
	lines int
	spans []Span
}

// Add takes one physical line, of which cut bytes were already left off by the
// reader, and returns the logical line that it ends, if it ends one. A
// malformed line stands for itself and disturbs no open one.
func (j *Joiner) Add(l Line, p Problem, cut int, at Span) (Joined, bool) {
	o := &j.open[l.Stream]
	if len(o.spans) == 0 && !l.Partial {
		j.one[0] = at
		text, over := limit(l.Text, record.MaxBody)
		return Joined{Time: l.Time, Stream: l.Stream, Text: text, Cut: cut + over, Spans: j.one[:], Problem: p, Lines: 1}, true
	}
	if len(o.spans) == 0 {
		o.time = l.Time
	}
	text, over := limit(l.Text, record.MaxBody-len(o.text))
	o.text = append(o.text, text...)
	o.cut += cut + over
	o.lines++
	if n := len(o.spans); n > 0 && o.spans[n-1].File == at.File && o.spans[n-1].End == at.Start {
		o.spans[n-1].End = at.End
	} else {
		o.spans = append(o.spans, at)
	}
	if l.Partial {
		return Joined{}, false
	}
	return j.Flush(l.Stream)
}

// Flush returns what there is of the stream's open line: its end will not come.
func (j *Joiner) Flush(s Stream) (Joined, bool) {
	if j == nil || len(j.open[s].spans) == 0 {
		return Joined{}, false
	}
	o := &j.open[s]
	out := Joined{Time: o.time, Stream: s, Text: o.text, Cut: o.cut, Spans: o.spans, Lines: o.lines}
	// The memory of a joined line goes with it: thousands of containers would
	// otherwise each keep the longest line that they ever wrote.
	*o = part{}
	return out, true
}

// Passes reports whether l would come back from Add at once and unchanged, so
// that the caller need not ask.
func (j *Joiner) Passes(l Line) bool {
	return !l.Partial && (j == nil || len(j.open[l.Stream].spans) == 0) && len(l.Text) <= record.MaxBody
}

// Open reports whether a line is waiting for its end.
func (j *Joiner) Open() bool {
	return j != nil && len(j.open[Stdout].spans)+len(j.open[Stderr].spans) > 0
}

func limit(b []byte, n int) (kept []byte, over int) {
	if len(b) <= n {
		return b, 0
	}
	return b[:n], len(b) - n
}
