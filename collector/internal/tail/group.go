package tail

import (
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/cri"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// held is the record of one stream that may go on with the next line, as a
// stack trace does. It lives with the log, so it goes on over a rotation; after
// a restart its lines, which are not settled, are read again.
type held struct {
	grouper Grouper
	joined  cri.Joined // without its text
	text    []byte
	since   time.Time // of its last line
}

func (h *held) open() bool { return h != nil && len(h.joined.Spans) > 0 }

// group takes one logical line. text is its text as a string that may be kept,
// empty where there is none.
func (f *Follower) group(l *containerLog, j cri.Joined, text string) (credit bool) {
	if l.policy.Grouper == nil {
		return f.send(l, j, own(j.Text, text))
	}
	h := l.held[j.Stream]
	if h == nil {
		h = &held{grouper: l.policy.Grouper()}
		l.held[j.Stream] = h
	}
	joins, open := h.grouper.Line(j.Text)
	credit = true
	if joins && h.open() {
		h.add(j, f.cfg.Now())
		if !open {
			return f.flush(l, j.Stream)
		}
		f.wait(l)
		return true
	}
	if h.open() {
		credit = f.flush(l, j.Stream)
	}
	if !open {
		return f.send(l, j, own(j.Text, text))
	}
	h.joined, h.since = j, f.cfg.Now()
	h.text = append(h.text[:0], j.Text...)
	h.joined.Text = nil
	f.wait(l)
	return credit
}

func own(b []byte, text string) string {
	if text != "" {
		return text
	}
	return string(b)
}

func (h *held) add(j cri.Joined, now time.Time) {
	room := max(0, record.MaxBody-len(h.text)-1)
	if room > 0 {
		h.text = append(h.text, '\n')
	}
	keep := min(room, len(j.Text))
	h.text = append(h.text, j.Text[:keep]...)
	h.joined.Lines += j.Lines
	h.joined.Cut += j.Cut + len(j.Text) - keep
	h.since = now
	for _, s := range j.Spans {
		if last := &h.joined.Spans[len(h.joined.Spans)-1]; last.File == s.File && last.End == s.Start {
			last.End = s.End
		} else {
			h.joined.Spans = append(h.joined.Spans, s)
		}
	}
}

// flush lets the record of a stream go that waits for more.
func (f *Follower) flush(l *containerLog, s cri.Stream) (credit bool) {
	h := l.held[s]
	j, text := h.joined, string(h.text)
	*h = held{grouper: h.grouper}
	return f.send(l, j, text)
}

// letGo flushes the records that have waited long enough for their next line. Of a stream without
// one nothing is kept: thousands of containers would each keep what none of them needs.
func (f *Follower) letGo(l *containerLog) (credit bool) {
	credit = true
	for s := range l.held {
		h := l.held[s]
		if h.open() && f.cfg.Now().Sub(h.since) < f.cfg.Hold {
			f.wait(l)
			continue
		}
		if h.open() {
			credit = f.flush(l, cri.Stream(s))
		}
		l.held[s] = nil
	}
	if !l.joiner.Open() {
		l.joiner = nil
	}
	return credit
}
