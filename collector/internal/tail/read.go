package tail

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/cri"
	"github.com/outrigger-mesh/outrigger/collector/internal/ledger"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// stop says why a turn of reading ended.
type stop int

const (
	atEnd    stop = iota // nothing more to read now
	noBudget             // the quantum is used up
	noCredit             // emit said to stop
)

// Read gives every log that is ready a turn of at most Quantum bytes, in the
// order in which they became ready, and calls emit with each logical line. emit
// returns whether there is credit for more; it always takes the line that it is
// given, and up to three more where a file ends. Read returns whether there is
// more to read now.
func (f *Follower) Read(emit func(Entry) bool) (more bool) {
	f.emit = emit
	for range len(f.ready) {
		l := f.ready[0]
		f.ready = f.ready[1:]
		l.queued = false
		switch f.turn(l) {
		case atEnd:
			if len(l.gens) == 0 {
				f.forget(l)
			}
		case noBudget:
			f.enqueue(l)
		case noCredit:
			if l.budget <= 0 {
				f.enqueue(l)
				return true
			}
			// It keeps its place and what is left of its quantum.
			l.queued = true
			f.ready = slices.Insert(f.ready, 0, l)
			return true
		}
	}
	return len(f.ready) > 0
}

// turn reads the generations of a log in order. It goes on to a newer one only
// when the older is finished, because lines must stay in order and a logical
// line may go on in the next file.
func (f *Follower) turn(l *containerLog) stop {
	l.waiting = false
	if l.budget <= 0 {
		l.budget = Quantum
	}
	for _, g := range slices.Clone(l.gens) {
		switch why := f.read(l, g); why {
		case atEnd:
		case noBudget, noCredit:
			return why
		}
		last := l.gens[len(l.gens)-1] == g
		if last && !g.gone && !g.replaced {
			return atEnd
		}
		if g.file == nil && !g.gone && !g.replaced {
			continue // finished before
		}
		// Superseded or deleted: finished once it has been quiet for a while. One
		// that was superseded twice has been left by the runtime long ago, so what
		// the file system says of its last change will do.
		quiet := g.quietSince
		if twice := len(l.gens)-slices.Index(l.gens, g) > 2; twice && g.modified.Before(quiet) {
			quiet = g.modified
		}
		if !g.replaced && f.cfg.Now().Sub(quiet) < f.cfg.Grace {
			l.waiting = true
			return atEnd
		}
		credit, ok := f.finish(l, g, last)
		if !ok {
			l.waiting = true
			return atEnd
		}
		if !credit {
			return noCredit
		}
	}
	return atEnd
}

// finish takes the end of a generation that will not grow any more.
func (f *Follower) finish(l *containerLog, g *generation, last bool) (credit, ok bool) {
	credit = true
	if g.id == "" && !g.replaced {
		if err := f.identify(g, true); err != nil {
			f.failed("read", g.path, err)
			return true, false
		}
		if g.id != "" { // one unfinished line is all that it had
			f.book.Written(g.id, g.size)
		}
	}
	if g.id != "" && !g.replaced && g.file != nil {
		line, start, cut := g.long, g.longStart, g.longCut
		if !g.inLong {
			n, err := g.file.ReadAt(f.buf, g.offset)
			if err != nil && !errors.Is(err, io.EOF) {
				f.failed("read", g.path, err)
				return true, false
			}
			line, start, cut = f.buf[:n], g.offset, 0
			g.offset += int64(n)
		}
		if g.offset > start {
			credit = f.line(l, g, line, cut, start, g.offset)
		}
		g.endLong()
	}
	if g.gone || g.replaced {
		if last || g.replaced { // what would have ended an open line will not come
			for _, s := range [...]cri.Stream{cri.Stdout, cri.Stderr} {
				if j, ok := l.joiner.Flush(s); ok {
					credit = f.send(l, j)
				}
			}
		}
		f.remove(l, g)
		return credit, true
	}
	if err := g.close(); err != nil {
		f.failed("close", g.path, err)
	}
	return credit, true
}

func (g *generation) endLong() { g.long, g.longCut, g.inLong = nil, 0, false }

// read reads a generation until its end, or until budget or credit are used up.
func (f *Follower) read(l *containerLog, g *generation) stop {
	if g.replaced {
		return atEnd
	}
	if g.file == nil {
		if g.gone || !g.again {
			return atEnd
		}
		g.again = false
		if err := g.open(); err != nil {
			if !errors.Is(err, errOther) {
				f.failed("open", g.path, err)
			}
			return atEnd
		}
	}
	if !f.verify(l, g) || g.id == "" {
		return atEnd
	}
	for g.offset < g.size {
		if l.budget <= 0 {
			return noBudget
		}
		n, err := g.file.ReadAt(f.buf, g.offset)
		if err != nil && !errors.Is(err, io.EOF) {
			f.failed("read", g.path, err)
			return atEnd
		}
		if n == 0 {
			break
		}
		used, credit := f.chunk(l, g, f.buf[:n])
		l.budget -= used
		if !credit {
			return noCredit
		}
		if used == 0 { // the beginning of a line; its end is not written yet
			break
		}
	}
	if g.quietSince.IsZero() {
		g.quietSince = f.cfg.Now()
	}
	return atEnd
}

// chunk takes the lines in data, which was read at g.offset, and returns how
// many bytes it used.
func (f *Follower) chunk(l *containerLog, g *generation, data []byte) (used int, credit bool) {
	for {
		i := bytes.IndexByte(data[used:], '\n')
		if i < 0 {
			break
		}
		line, start, cut := data[used:used+i], g.offset, 0
		end := start + int64(i) + 1
		if g.inLong {
			g.lengthen(line)
			line, start, cut = g.long, g.longStart, g.longCut
		}
		used += i + 1
		g.offset = end
		credit = f.line(l, g, line, cut, start, end)
		g.endLong()
		if !credit {
			return used, false
		}
	}
	rest := data[used:]
	if g.inLong || len(rest) == len(f.buf) {
		if !g.inLong {
			g.inLong, g.longStart = true, g.offset
		}
		g.lengthen(rest)
		g.offset += int64(len(rest))
		used += len(rest)
	}
	return used, true
}

func (g *generation) lengthen(b []byte) {
	keep := min(len(b), MaxLine-len(g.long))
	g.long = append(g.long, b[:keep]...)
	g.longCut += len(b) - keep
}

// verify notes the size and makes sure that the file is still the one that was
// being read. If it was overwritten in place, the old generation is given up
// from where nobody read it, and the new one takes its turn after it.
func (f *Follower) verify(l *containerLog, g *generation) bool {
	info, err := g.file.Stat()
	if err != nil {
		f.failed("stat", g.path, err)
		return false
	}
	size := info.Size()
	g.modified = info.ModTime()
	if g.id == "" {
		g.note(size)
		if err := f.identify(g, false); err != nil {
			f.failed("read", g.path, err)
			return false
		}
		if g.id == "" {
			if g.quietSince.IsZero() {
				g.quietSince = f.cfg.Now()
			}
			return true
		}
	}
	same := size >= g.offset
	if same && size > g.offset {
		if same, err = g.same(); err != nil {
			f.failed("read", g.path, err)
			return false
		}
	}
	if !same {
		f.replace(l, g)
		return false
	}
	g.note(size)
	f.book.Written(g.id, size)
	return true
}

// note takes the size by stat; a change means that the file is not quiet.
func (g *generation) note(size int64) {
	if size != g.size {
		g.size, g.quietSince = size, time.Time{}
	}
}

func (f *Follower) replace(l *containerLog, g *generation) {
	f.log.Warn("log file was overwritten in place (copytruncate); reading it from its start", "log.file.path", g.path)
	f.giveUp(g, ledger.Truncated)
	g.endLong()
	g.replaced = true
	next := &generation{path: g.path, dev: g.dev, ino: g.ino, file: g.file, gone: g.gone, missingSince: g.missingSince, before: g}
	g.file = nil
	i := slices.Index(l.gens, g)
	l.gens = slices.Insert(l.gens, i+1, next)
	f.enqueue(l)
}

// line takes one physical line.
func (f *Follower) line(l *containerLog, g *generation, text []byte, cut int, start, end int64) (credit bool) {
	if g.covered(start, end) {
		return true
	}
	parsed, problem := cri.Parse(text)
	if problem != cri.OK {
		f.metrics.Malformed.WithLabelValues(problem.String()).Inc()
	}
	j, ok := l.joiner.Add(parsed, problem, cut, cri.Span{File: g.id, Start: start, End: end})
	if !ok {
		return true
	}
	return f.send(l, j)
}

func (f *Follower) send(l *containerLog, j cri.Joined) (credit bool) {
	now := f.cfg.Now()
	at := j.Time
	if at.IsZero() {
		at = now
	}
	first, last := j.Spans[0], j.Spans[0]
	for _, s := range j.Spans {
		if s.File == first.File {
			last = s
		}
	}
	return f.emit(Entry{
		Record: &record.Record{
			Time: at, Observed: now, Stream: j.Stream.String(), Body: string(j.Text), TruncatedBytes: j.Cut,
			Resource: l.resource,
			Origin:   record.Origin{File: first.File, Path: l.path, Offset: first.Start, End: last.End},
		},
		Spans: slices.Clone(j.Spans),
	})
}
