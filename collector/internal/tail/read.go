package tail

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strconv"
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
	notOpen              // the file cannot be opened now
)

// Read gives every log that is ready a turn of at most Quantum bytes, in the
// order in which they became ready, and calls emit with each record. emit
// returns whether there is credit for more; it always takes the record that it is
// given, and up to six more where a file ends. Read returns whether there is
// more to read now.
func (f *Follower) Read(emit func(Entry) bool) (more bool) {
	f.emit = emit
	for range len(f.ready) {
		l := f.ready[0]
		f.ready = f.ready[1:]
		l.queued = false
		switch f.turn(l) {
		case atEnd, notOpen:
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
// when the older is finished, because lines must stay in order and a record may
// go on in the next file.
func (f *Follower) turn(l *containerLog) stop {
	delete(f.waiting, l)
	if !f.prepare(l) {
		return atEnd
	}
	if l.budget <= 0 {
		l.budget = Quantum
	}
	for _, g := range slices.Clone(l.gens) {
		if !g.begun {
			g.begun = true
			if g.after == apart && !f.cutOff(l) {
				return noCredit
			}
		}
		why := f.read(l, g)
		if why == noBudget || why == noCredit {
			return why
		}
		last := l.gens[len(l.gens)-1] == g
		if last && !g.gone && !g.replaced && g.gz == nil {
			break
		}
		if g.finished && !g.gone && !g.replaced {
			if g.offset == g.size { // it had grown, and was read again
				f.shut(g)
			}
			continue
		}
		// Superseded or deleted: finished once it has been quiet for a while. One
		// that was superseded twice has been left by the runtime long ago, so what
		// the file system says of its last change will do.
		quiet := g.quietSince
		if twice := len(l.gens)-slices.Index(l.gens, g) > 2; twice && g.modified < quiet {
			quiet = g.modified
		}
		if !g.replaced && g.gz == nil && quiet.until(stampOf(f.cfg.Now())) < f.cfg.Grace {
			f.wait(l)
			break
		}
		if !last && !g.gone && g.missingSince != 0 && l.gens[slices.Index(l.gens, g)+1].after == apart {
			f.wait(l) // it may be about to be seen again under another name
			break
		}
		if why == notOpen && !g.gone {
			f.wait(l) // whether what was read is all is not known
			break
		}
		credit, ok := f.finish(l, g, last)
		if !ok {
			f.wait(l)
			break
		}
		if !credit {
			return noCredit
		}
		if g.replaced {
			f.enqueue(l) // what it was replaced by comes next, and may not have been there when we began
			return atEnd
		}
	}
	if len(l.gens) == 0 { // the last may have been given up
		if !f.cutOff(l) {
			return noCredit
		}
		return atEnd
	}
	if !f.letGo(l) {
		return noCredit
	}
	return atEnd
}

// finish takes the end of a generation that will not grow any more.
func (f *Follower) finish(l *containerLog, g *generation, last bool) (credit, ok bool) {
	credit = true
	if g.id == "" && !g.replaced && g.file != nil {
		if err := f.identify(l, g, true); err != nil {
			f.failed("read", g.path, err)
			return true, false
		}
		if g.id != "" { // one unfinished line is all that it had
			f.book.Written(g.id, g.size)
		}
	}
	if g.id != "" && !g.replaced && g.file != nil && l.policy.Off == "" {
		var line []byte
		start, cut := g.unread(), 0
		if g.long != nil {
			line, cut = g.long.text, g.long.cut
		} else {
			n := 0
			if g.gz == nil || g.offset < g.size {
				var err error
				if n, err = g.readAt(f.buf, g.offset); err != nil && !errors.Is(err, io.EOF) {
					f.failed("read", g.path, err)
					return true, false
				}
			}
			line = f.buf[:n]
			g.offset += int64(n)
		}
		if g.offset > start {
			credit = f.line(l, g, line, "", cut, start, g.offset)
		}
		g.long = nil
	}
	g.finished = true
	if g.gone && g.file == nil && g.unread() < g.size && g.gz == nil {
		f.giveUp(g, ledger.RotatedAway) // neither the open file nor a link is left
		credit = f.cutOff(l)
	}
	if g.gone && g.gzPath != "" && g.id != "" && !g.replaced {
		// What it was lives on as the compressed copy, which is not to be read again.
		// Should we end now, the next process finds the account by the copy.
		f.book.Open(g.id, g.gzPath, l.owner())
		f.shut(g)
		g.path, g.gzPath, g.gone, g.gz = g.gzPath, "", false, &inflater{}
		delete(f.gone, g)
		f.spend(l, g)
		return credit, true
	}
	if g.gone || g.replaced {
		if last || g.replaced { // what would have ended an open line will not come
			credit = f.end(l)
		}
		f.remove(l, g)
		return credit, true
	}
	f.shut(g)
	f.spend(l, g)
	return credit, true
}

// spend notes that the link of a finished generation may go once it is settled.
func (f *Follower) spend(l *containerLog, g *generation) {
	if g.link != "" {
		f.spent[g] = l
	}
}

// end lets go what is open: more of it will not come.
func (f *Follower) end(l *containerLog) (credit bool) {
	credit = true
	for _, s := range [...]cri.Stream{cri.Stdout, cri.Stderr} {
		if j, ok := l.joiner.Flush(s); ok {
			credit = f.group(l, j, "")
		}
	}
	for s, h := range l.held {
		if h.open() {
			h.grouper.Reset()
			credit = f.flush(l, cri.Stream(s))
		}
	}
	return credit
}

// open reports whether a record waits for more.
func (l *containerLog) open() bool {
	return l.joiner.Open() || slices.ContainsFunc(l.held[:], (*held).open)
}

// cutOff is end where more was written and is lost.
func (f *Follower) cutOff(l *containerLog) (credit bool) {
	if l.joiner.Open() {
		f.metrics.Malformed.WithLabelValues("no_end").Inc()
	}
	return f.end(l)
}

// idleAfter is how long nothing has to happen to a file until it is closed: an
// open file each for thousands of silent containers is more than a process may have.
const idleAfter = time.Minute

// read reads a generation until its end, or until budget or credit are used up.
func (f *Follower) read(l *containerLog, g *generation) stop {
	if g.replaced || g.finished && !g.again {
		return atEnd
	}
	g.again = false
	if err := f.open(l, g); err != nil {
		if !errors.Is(err, errOther) {
			f.failed("open", g.path, err)
		}
		return notOpen
	}
	if !f.verify(l, g) || g.id == "" {
		return atEnd
	}
	if l.policy.Off != "" {
		if g.size > g.unread() {
			f.book.GiveUp(g.id, g.unread(), ledger.ByRule)
			g.offset = g.size
			g.long = nil
			if !f.cutOff(l) { // what was open before does not go on behind the gap
				return noCredit
			}
		}
	}
	for g.offset < g.size {
		if l.budget <= 0 {
			return noBudget
		}
		n, err := g.readAt(f.buf, g.offset)
		if err != nil && !errors.Is(err, io.EOF) {
			f.failed("read", g.path, err)
			if g.gz != nil { // it will not get better
				return f.unreadable(l, g, err)
			}
			return atEnd
		}
		if n == 0 {
			if g.gz != nil {
				return f.unreadable(l, g, io.ErrUnexpectedEOF)
			}
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
	if g.quietSince == 0 {
		g.quietSince = stampOf(f.cfg.Now())
	}
	f.closeIdle(g)
	return atEnd
}

// shut closes the file of a generation, which may be opened again.
func (f *Follower) shut(g *generation) {
	if err := g.close(); err != nil {
		f.failed("close", g.path, err)
	}
}

// closeIdle closes a file that is read to its end and quiet. Its link keeps it meanwhile.
func (f *Follower) closeIdle(g *generation) {
	if g.file == nil || g.link == "" || g.long != nil || g.offset != g.size || g.quietSince == 0 || g.quietSince.until(stampOf(f.cfg.Now())) <= idleAfter {
		return
	}
	f.shut(g)
}

// unreadable gives up the rest of a damaged compressed file.
func (f *Follower) unreadable(l *containerLog, g *generation, err error) stop {
	n := f.book.GiveUp(g.id, g.unread(), ledger.Unreadable)
	g.offset = g.size
	g.long = nil
	f.log.Warn("the rest of a compressed log file is lost: it cannot be read", "log.file.path", g.path, "outrigger.lost_bytes", n,
		"outrigger.cause", ledger.Unreadable.String(), "error.message", err.Error())
	if !f.cutOff(l) {
		return noCredit
	}
	return atEnd
}

// chunk takes the lines in data, which was read at g.offset, and returns how
// many bytes it used. The bodies of all its records share one copy of it.
func (f *Follower) chunk(l *containerLog, g *generation, data []byte) (used int, credit bool) {
	whole := ""
	if end := bytes.LastIndexByte(data, '\n'); end >= 0 {
		whole = string(data[:end])
	}
	for {
		i := bytes.IndexByte(data[used:], '\n')
		if i < 0 {
			break
		}
		line, start, cut := data[used:used+i], g.offset, 0
		text := whole[used : used+i]
		end := start + int64(i) + 1
		if g.long != nil {
			g.long.add(line)
			line, text, start, cut = g.long.text, "", g.long.start, g.long.cut
		}
		used += i + 1
		g.offset = end
		credit = f.line(l, g, line, text, cut, start, end)
		g.long = nil
		if !credit {
			return used, false
		}
	}
	rest := data[used:]
	if g.long != nil || len(rest) == len(f.buf) {
		if g.long == nil {
			g.long = &long{start: g.offset}
		}
		g.long.add(rest)
		g.offset += int64(len(rest))
		used += len(rest)
	}
	return used, true
}

func (x *long) add(b []byte) {
	keep := min(len(b), MaxLine-len(x.text))
	x.text = append(x.text, b[:keep]...)
	x.cut += len(b) - keep
}

// verify notes the size and makes sure that the file is still the one that was
// being read. If it was overwritten in place, the old generation is given up
// from where nobody read it, and the new one takes its turn after it.
func (f *Follower) verify(l *containerLog, g *generation) bool {
	if g.gz != nil {
		return true // written once
	}
	info, err := g.file.Stat()
	if err != nil {
		f.failed("stat", g.path, err)
		return false
	}
	size := info.Size()
	touched := g.modified != stampOf(info.ModTime()) || size < g.size
	g.modified = stampOf(info.ModTime())
	if g.id == "" {
		g.note(size)
		if err := f.identify(l, g, false); err != nil {
			f.failed("read", g.path, err)
			return false
		}
		if g.id == "" {
			if g.quietSince == 0 {
				g.quietSince = stampOf(f.cfg.Now())
			}
			return true
		}
	}
	same := size >= g.offset
	if same && (size > g.offset || touched) {
		if same, err = f.same(g); err != nil {
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
		g.size, g.quietSince = size, 0
	}
}

func (f *Follower) replace(l *containerLog, g *generation) {
	f.log.Warn("log file was overwritten in place (copytruncate); reading it from its start", "log.file.path", g.path)
	f.giveUp(g, ledger.Truncated)
	g.long = nil
	g.replaced = true
	next := &generation{path: g.path, dev: g.dev, ino: g.ino, file: g.file, gone: g.gone, missingSince: g.missingSince, named: g.named, fresh: g.fresh, after: adjacent, before: g}
	g.file = nil
	f.unlink(f.linkPath(l, g.link)) // it is the new one's inode by now
	g.link = ""
	delete(f.gone, g)
	if next.gone {
		f.gone[next] = l
	}
	i := slices.Index(l.gens, g)
	l.gens = slices.Insert(l.gens, i+1, next)
	f.enqueue(l)
	f.verify(l, next) // so that it has its account and its link before its turn comes
}

// line takes one physical line. text is the same line as a string that may be
// kept; empty where there is none.
func (f *Follower) line(l *containerLog, g *generation, line []byte, text string, cut int, start, end int64) (credit bool) {
	if g.covered(start, end) {
		return true
	}
	if l.input != nil && l.input.Format == Envelope {
		return f.envelope(l, g, line, start, end)
	}
	parsed, problem, shares := l.parse(line)
	if problem != cri.OK {
		f.metrics.Malformed.WithLabelValues(problem.String()).Inc()
	}
	at := cri.Span{File: g.id, Start: start, End: end}
	if cut == 0 && l.joiner.Passes(parsed) {
		j := cri.Joined{Time: parsed.Time, Stream: parsed.Stream, Text: parsed.Text, Problem: problem, Lines: 1}
		j.Spans = f.slab.span(at)
		if shares && len(text) == len(line) { // the text is the end of the line
			return f.group(l, j, text[len(text)-len(parsed.Text):])
		}
		return f.group(l, j, "")
	}
	if l.joiner == nil {
		l.joiner = new(cri.Joiner)
	}
	j, ok := l.joiner.Add(parsed, problem, cut, at)
	if !ok {
		return true
	}
	j.Spans = slices.Clone(j.Spans)
	return f.group(l, j, "")
}

// parse reads a line in the log's format. shares says that the text is the end of the line itself.
func (l *containerLog) parse(line []byte) (parsed cri.Line, problem cri.Problem, shares bool) {
	format := CRI
	switch {
	case l.input != nil:
		format = l.input.Format
	case cri.IsDocker(line):
		format = Docker
	}
	switch format {
	case CRI:
		parsed, problem = cri.Parse(line)
		return parsed, problem, true
	case Docker:
		parsed, problem = cri.Docker(line)
		return parsed, problem, problem != cri.OK
	default:
		return cri.Line{Text: line}, cri.OK, true
	}
}

// origin is the name of a generation in the ids of its records.
func (l *containerLog) origin(id string) string {
	for _, g := range l.gens {
		if g.id == id {
			return g.origin
		}
	}
	return id // gone since a part of the record was read
}

// envelope takes a line that is a record written down.
func (f *Follower) envelope(l *containerLog, g *generation, line []byte, start, end int64) (credit bool) {
	r := f.slab.record()
	now := f.cfg.Now()
	*r = record.Record{Time: now, Resource: l.resource}
	if err := l.input.Decode(line, r); err != nil {
		f.metrics.Malformed.WithLabelValues("envelope").Inc()
		*r = record.Record{Time: now, Resource: l.resource, Body: string(line[:min(len(line), record.MaxBody)])}
	}
	r.Observed = now
	if r.Origin.File == "" { // it may have come from elsewhere
		r.Origin = record.Origin{File: g.origin, Path: l.path, Offset: start, End: end}
	}
	return f.emit(Entry{Record: r, Spans: f.slab.span(cri.Span{File: g.id, Start: start, End: end})})
}

// send hands a record on. Its spans are its own; text is its body.
func (f *Follower) send(l *containerLog, j cri.Joined, text string) (credit bool) {
	now := f.cfg.Now()
	at := j.Time
	if at.IsZero() {
		at = now
	}
	first, last := j.Spans[0], j.Spans[0]
	bytes := int64(0)
	for _, s := range j.Spans {
		if s.File == first.File {
			last = s
		}
		bytes += s.End - s.Start
	}
	file := l.origin(first.File)
	if j.Lines > 1 {
		// How many lines were joined may depend on when they were read. A backend that
		// knows records by their origin must not take a longer one for one that it has.
		file += "+" + strconv.FormatInt(bytes, 10)
	}
	r := f.slab.record()
	*r = record.Record{
		Time: at, Observed: now, Stream: j.Stream.String(), Body: text, TruncatedBytes: j.Cut,
		Resource: l.resource,
		Origin:   record.Origin{File: file, Path: l.path, Offset: first.Start, End: last.End},
	}
	return f.emit(Entry{Record: r, Spans: j.Spans})
}

// slab hands out records and spans of which many are made at a time.
type slab struct {
	records []record.Record
	spans   []cri.Span
}

const slabSize = 128

func (s *slab) record() *record.Record {
	if len(s.records) == 0 {
		s.records = make([]record.Record, slabSize)
	}
	r := &s.records[0]
	s.records = s.records[1:]
	return r
}

func (s *slab) span(at cri.Span) []cri.Span {
	if len(s.spans) == 0 {
		s.spans = make([]cri.Span, slabSize)
	}
	out := s.spans[:1:1]
	out[0] = at
	s.spans = s.spans[1:]
	return out
}
