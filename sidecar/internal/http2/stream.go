package http2

import (
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// Stream is one request and its response. One goroutine reads and one writes;
// they may be the same. Interrupt, Reset and Gone may be called from any, until
// Release; after Release a Stream must not be used, for it is used again.
type Stream struct {
	c          *conn
	rsig, wsig chan struct{}

	// The rest is guarded by c.mu, save what ReadBody and ReadHead have handed
	// out. What outlives a use:

	gen      uint32 // counts the uses
	head     http1.Head
	more     []http1.Head
	trailers []http1.Header
	arena    []byte // what heads and trailers point into
	in, span []byte // received; handed out
	timer    *time.Timer
	timerAt  time.Time // zero: not running
	inWakes  bool

	use
}

// use is what a stream forgets.
type use struct {
	id uint32 // 0: a client's that has sent nothing yet

	recvEnd, sendEnd bool
	gotFinal         bool // a head that is not interim has come
	sentFinal        bool
	isHead           bool // the request is HEAD
	unprocessed      bool
	gone             bool
	err              error // ends reading and writing

	sendWin, recvWin int64
	unacked          int64
	length, got      int64 // of the body; -1: not known
	heads            int   // that have come and were not read: head, then more

	rwait, wwait         bool
	rlate, wlate         bool // the deadline ended the wait
	rdeadline, wdeadline time.Time
	interrupted          bool
	inCreditQ, inOutQ    bool
	onGone               func()
}

const (
	// What a stream keeps for its next use.
	keptArena = 8 << 10
	keptBody  = 16 << 10
)

// newStream is a stream that counts as active. Called with mu held.
func (c *conn) newStream(id uint32) *Stream {
	var s *Stream
	if n := len(c.free); n > 0 {
		s = c.free[n-1]
		c.free[n-1] = nil
		c.free = c.free[:n-1]
	} else {
		s = &Stream{c: c, rsig: make(chan struct{}, 1), wsig: make(chan struct{}, 1)}
	}
	s.id = id
	s.length = -1
	s.sendWin, s.recvWin = c.peerInitial, initialWindow
	if c.acked {
		s.recvWin = int64(c.cfg.StreamWindow)
	}
	c.active++
	c.idleSince = time.Time{}
	return s
}

// recycle takes a stream that nobody uses any more.
func (c *conn) recycle(s *Stream) {
	s.gen++
	s.use = use{}
	s.head.Reset()
	s.more, s.trailers = s.more[:0], s.trailers[:0]
	s.arena = kept(s.arena, keptArena)
	s.in, s.span = kept(s.in, keptBody), kept(s.span, keptBody)
	if len(c.free) < maxFree && c.err == nil {
		c.free = append(c.free, s)
	} else if s.timer != nil {
		s.timer.Stop()
	}
}

// kept is b for the next use, unless it has grown large.
func kept(b []byte, most int) []byte {
	if cap(b) > most {
		return nil
	}
	return b[:0]
}

// ReadHead is the head of the request, on a server, where it is there already;
// on a client, the head of the next response: interim ones (1xx) first, each of
// which is read by a call of its own. The slices of h are valid until Release;
// the storage of h.Headers becomes the stream's.
//
// It returns os.ErrDeadlineExceeded, ErrInterrupted, a *StreamError, or what
// ended the connection. A zero deadline is none.
func (s *Stream) ReadHead(h *http1.Head, deadline time.Time) error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	for {
		if s.heads > 0 {
			s.heads--
			storage := h.Headers[:0]
			*h = s.head
			s.head = http1.Head{Headers: storage}
			if len(s.more) > 0 {
				s.head, s.more[0] = s.more[0], http1.Head{}
				s.more = s.more[:copy(s.more, s.more[1:])]
			}
			return nil
		}
		switch {
		case s.err != nil:
			return s.err
		case s.gotFinal:
			return errOrder
		}
		if err := s.waitRead(deadline); err != nil {
			return err
		}
	}
}

// ReadBody is the next part of the body, which is valid until the next call of
// ReadBody or Release; the next call also tells the peer that it may send more.
// With done, there is nothing behind it and Trailers are there; then data may
// be empty. Without wait it returns what has come, which may be nothing.
//
// Errors are those of ReadHead. After a *StreamError nothing more is returned,
// even if it had come before.
func (s *Stream) ReadBody(wait bool, deadline time.Time) (data []byte, done bool, err error) {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	if n := int64(len(s.span)); n > 0 {
		s.span = s.span[:0]
		if queued := c.giveBack(n); s.giveBack(n) || queued {
			c.flush()
		}
	}
	for {
		switch {
		case s.err != nil:
			return nil, false, s.err
		case len(s.in) > 0:
			s.span, s.in = s.in, s.span
			return s.span, s.recvEnd, nil
		case s.recvEnd:
			return nil, true, nil
		case !wait:
			return nil, false, nil
		}
		if err := s.waitRead(deadline); err != nil {
			return nil, false, err
		}
	}
}

// Trailers of the message read, once ReadBody has said done; valid until
// Release. Names are in lower case. Fields that say nothing in a trailer
// section (Host, Content-Length, TE) are not among them.
func (s *Stream) Trailers() []http1.Header {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.trailers
}

// giveBack tells the peer that n bytes of the stream's window were read, in
// large portions, and reports whether it did now. Called with mu held.
func (s *Stream) giveBack(n int64) (queued bool) {
	if s.recvEnd || s.err != nil {
		return false
	}
	s.unacked += n
	if s.unacked >= max(int64(s.c.cfg.StreamWindow)/2, 1) {
		s.c.put(appendWindowUpdate(s.c.buf(), s.id, uint32(s.unacked)))
		s.recvWin += s.unacked
		s.unacked = 0
		return true
	}
	return false
}

// waitRead waits for the goroutine that reads the connection. Called with mu
// held, which it gives up meanwhile.
func (s *Stream) waitRead(deadline time.Time) error {
	if s.interrupted {
		s.interrupted = false
		return ErrInterrupted
	}
	c := s.c
	if c.mayFlush() {
		// It may be what the peer waits for.
		c.flush()
		return nil // look again
	}
	s.rwait, s.rdeadline = true, deadline
	s.arm(deadline)
	c.unlock()
	<-s.rsig
	c.mu.Lock()
	if s.rlate {
		s.rlate = false
		return os.ErrDeadlineExceeded
	}
	return nil
}

// waitWrite is waitRead for the other goroutine.
func (s *Stream) waitWrite(deadline time.Time) error {
	c := s.c
	s.wwait, s.wdeadline = true, deadline
	s.arm(deadline)
	c.unlock()
	<-s.wsig
	c.mu.Lock()
	if s.wlate {
		s.wlate = false
		return os.ErrDeadlineExceeded
	}
	return nil
}

// arm makes the timer run no later than the deadline. It is left running when a
// wait ends, since the next one most often has a later deadline: then it costs
// nothing.
func (s *Stream) arm(deadline time.Time) {
	if deadline.IsZero() || !s.timerAt.IsZero() && !deadline.Before(s.timerAt) {
		return
	}
	d := max(time.Until(deadline), 0)
	s.timerAt = deadline
	if s.timer == nil {
		s.timer = time.AfterFunc(d, s.onTimer)
	} else {
		s.timer.Reset(d)
	}
}

func (s *Stream) onTimer() {
	now := time.Now()
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	s.timerAt = time.Time{}
	if s.rwait && !s.rdeadline.IsZero() {
		if now.Before(s.rdeadline) {
			s.arm(s.rdeadline)
		} else {
			s.rlate = true
			s.wakeReader()
		}
	}
	if s.wwait && !s.wdeadline.IsZero() {
		if now.Before(s.wdeadline) {
			s.arm(s.wdeadline)
		} else {
			s.wlate = true
			s.writable()
		}
	}
}

// readable has a waiting reader woken when all frames that came are taken.
func (s *Stream) readable() {
	if s.rwait && !s.inWakes {
		s.inWakes = true
		s.c.wakes = append(s.c.wakes, s)
	}
}

func (s *Stream) wakeReader() {
	if s.rwait {
		s.rwait = false
		s.rsig <- struct{}{}
	}
}

// writable wakes a waiting writer and reports whether there was one.
func (s *Stream) writable() bool {
	if !s.wwait {
		return false
	}
	s.wwait = false
	s.wsig <- struct{}{}
	return true
}

// endRecv is the peer's END_STREAM.
func (s *Stream) endRecv() {
	s.recvEnd = true
	if s.sendEnd {
		s.over()
	}
}

func (s *Stream) endSend() {
	s.sendEnd = true
	if s.recvEnd {
		s.over()
	}
}

// over is the end of the stream as the protocol sees it.
func (s *Stream) over() {
	delete(s.c.streams, s.id)
	s.c.closed.add(s.id)
	s.c.ended++
}

// kill ends the stream before its time. A client that has the whole response
// keeps it; only writing ends.
func (s *Stream) kill(err error) {
	c := s.c
	delete(c.streams, s.id)
	if se, ok := err.(*StreamError); ok && !se.Remote { //nolint:errorlint // made here
		c.killed.add(s.id)
	} else {
		c.closed.add(s.id)
	}
	if !c.server && s.recvEnd {
		s.sendEnd = true
		s.writable()
		return
	}
	s.err = err
	s.gone = true
	if f := s.onGone; f != nil {
		s.onGone = nil
		c.goneQ = append(c.goneQ, f)
	}
	s.wakeReader()
	s.writable()
}

// writeErr is why nothing more can be written.
func (s *Stream) writeErr() error {
	switch {
	case s.err != nil:
		return s.err
	case s.sendEnd:
		return errDone
	case s.c.err != nil:
		return s.c.err
	case s.c.werr != nil:
		return s.c.werr
	default:
		return nil
	}
}

// room waits until there is room in the write buffer.
func (s *Stream) room(deadline time.Time) error {
	c := s.c
	for {
		if err := s.writeErr(); err != nil {
			return err
		}
		if c.queued() < maxQueued {
			return nil
		}
		if !c.writing {
			c.flush()
			continue
		}
		if !s.inOutQ {
			s.inOutQ = true
			c.outQ = append(c.outQ, s)
		}
		if err := s.waitWrite(deadline); err != nil {
			return err
		}
	}
}

// WriteHead queues a head: of the request on a client; on a server of the
// response, final or interim (1xx). With end the message has no body. Names
// become lower case; fields that belong to one HTTP/1.1 connection are left out.
// It waits only for room in the write buffer.
//
// On a client it returns ErrGone if the connection takes no new streams; then
// Unprocessed.
func (s *Stream) WriteHead(h *http1.Head, e *http1.Edit, end bool) error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	defer c.passOn()
	if err := s.room(time.Time{}); err != nil {
		s.unprocessed = s.unprocessed || !c.server && s.id == 0
		return err
	}
	if s.sentFinal {
		return errOrder
	}
	if !c.server {
		if c.goAway >= goAwayFinal || c.nextID > maxStreamID {
			s.unprocessed = true
			return ErrGone
		}
		s.id = c.nextID
		c.nextID += 2
		c.streams[s.id] = s
		s.sendWin, s.recvWin = c.peerInitial, initialWindow
		if c.acked {
			s.recvWin = int64(c.cfg.StreamWindow)
		}
		s.isHead = string(h.Method) == "HEAD"
	}
	interim := c.server && h.Status < 200
	end = end && !interim
	s.sentFinal = !interim
	b := c.buf()
	at := len(b)
	b = appendFrame(b, 0, frameHeaders, 0, s.id)
	if c.server {
		b = c.enc.appendResponse(b, h, e, &c.scratch)
	} else {
		b = c.enc.appendRequest(b, h, e, c.cfg.Scheme, &c.scratch)
	}
	c.put(c.finishBlock(b, at, end))
	if end {
		s.endSend()
	}
	return nil
}

// finishBlock completes the frame header of a field section that begins at at,
// and cuts it into frames that the peer takes.
func (c *conn) finishBlock(b []byte, at int, end bool) []byte {
	n := len(b) - at - headerSize
	var flags byte
	if end {
		flags = flagEndStream
	}
	if n <= c.peerFrame {
		putLength(b[at:], n)
		b[at+4] = flags | flagEndHeaders
		return b
	}
	id := parseFrame(b[at:]).stream
	rest := append([]byte(nil), b[at+headerSize+c.peerFrame:]...)
	b = b[:at+headerSize+c.peerFrame]
	putLength(b[at:], c.peerFrame)
	b[at+4] = flags
	for len(rest) > 0 {
		n := min(len(rest), c.peerFrame)
		flags = 0
		if n == len(rest) {
			flags = flagEndHeaders
		}
		b = appendFrame(b, n, frameContinuation, flags, id)
		b = append(b, rest[:n]...)
		rest = rest[n:]
	}
	return b
}

// WriteData queues a part of the body; it does not keep b. It waits until
// deadline for the peer to open its windows and to read; a zero deadline is
// none, but a peer that reads nothing for Config.WriteTimeout ends the
// connection. Errors are those of ReadHead.
func (s *Stream) WriteData(b []byte, end bool, deadline time.Time) error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	defer c.passOn()
	if !s.sentFinal {
		return errOrder
	}
	for {
		if err := s.room(deadline); err != nil {
			return err
		}
		n := min(int64(len(b)), s.sendWin, c.sendWin, int64(c.peerFrame), maxFrame)
		if len(b) > 0 && n <= 0 {
			if c.mayFlush() {
				c.flush()
				continue
			}
			c.passOn() // what this stream was woken for and cannot use
			if s.sendWin > 0 && !s.inCreditQ {
				s.inCreditQ = true
				c.creditQ = append(c.creditQ, s)
			}
			if err := s.waitWrite(deadline); err != nil {
				return err
			}
			continue
		}
		last := int(n) == len(b)
		var flags byte
		if last && end {
			flags = flagEndStream
		}
		if n > 0 || flags != 0 {
			out := appendFrame(c.buf(), int(n), frameData, flags, s.id)
			c.put(append(out, b[:n]...))
			c.dataSent++
		}
		s.sendWin -= n
		c.sendWin -= n
		b = b[n:]
		if last {
			if end {
				s.endSend()
			}
			return nil
		}
	}
}

// WriteTrailers queues the trailers and the end of the message. Fields that may
// not stand there are left out.
func (s *Stream) WriteTrailers(t []http1.Header) error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	defer c.passOn()
	if !s.sentFinal {
		return errOrder
	}
	if err := s.room(time.Time{}); err != nil {
		return err
	}
	b := c.buf()
	at := len(b)
	b = appendFrame(b, 0, frameHeaders, 0, s.id)
	b = c.enc.appendTrailers(b, t, &c.scratch)
	if len(b) == at+headerSize {
		// A section without fields is an odd thing; the end needs none.
		b = appendFrame(b[:at], 0, frameData, flagEndStream, s.id)
	} else {
		b = c.finishBlock(b, at, true)
	}
	c.put(b)
	s.endSend()
	return nil
}

// Flush sends what all streams of the connection have queued, unless somebody
// is at it, who then sends this too. It waits while the write buffer is full.
func (s *Stream) Flush() error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	defer c.passOn()
	c.flush()
	for c.queued() >= maxQueued && s.err == nil && c.err == nil && c.werr == nil {
		if !c.writing {
			c.flush()
			continue
		}
		if !s.inOutQ {
			s.inOutQ = true
			c.outQ = append(c.outQ, s)
		}
		if err := s.waitWrite(time.Time{}); err != nil {
			return err
		}
	}
	return s.err
}

// Reset sends RST_STREAM, unless the stream is over or has not begun.
func (s *Stream) Reset(code ErrCode) {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	s.reset(code)
	c.flush()
}

func (s *Stream) reset(code ErrCode) {
	c := s.c
	if s.id == 0 || s.err != nil || s.recvEnd && s.sendEnd || c.err != nil {
		return
	}
	if !c.server {
		c.cancelled++
	}
	s.onGone = nil // it is not the peer who ends it
	recvEnd := s.recvEnd
	s.recvEnd = false
	s.kill(&StreamError{Code: code})
	s.recvEnd = recvEnd
	s.gone = false
	c.put(appendRST(c.buf(), s.id, code))
}

// Interrupt makes the ReadHead or ReadBody that waits, or else the next that
// would, return ErrInterrupted, once.
func (s *Stream) Interrupt() {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	s.interrupted = true
	s.wakeReader()
}

// Resume takes an Interrupt back that nothing has met.
func (s *Stream) Resume() {
	s.c.mu.Lock()
	s.interrupted = false
	s.c.mu.Unlock()
}

// OnGone has f called once, when the peer resets the stream or the connection
// dies before the stream's end; at once if that has happened. f is called
// without locks held, maybe by the goroutine that reads the connection: it must
// not block. Nil removes it.
func (s *Stream) OnGone(f func()) {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	if f != nil && s.gone {
		c.goneQ = append(c.goneQ, f)
		return
	}
	s.onGone = f
}

// Gone reports whether the peer has reset the stream, or the connection died,
// before the stream's end.
func (s *Stream) Gone() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.gone
}

// Unprocessed reports whether the server has certainly not acted on the request
// (RFC 9113 section 8.7): it may be sent again on another connection.
func (s *Stream) Unprocessed() bool {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.unprocessed
}

// ID is the stream's identifier, 0 on a client before WriteHead.
func (s *Stream) ID() uint32 {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.id
}

// Release ends the use of the stream. If it is not over it is reset: with
// NO_ERROR on a server that has written a whole response, else with CANCEL. A
// server's stream is released when its handler returns, if not before. Nobody
// may wait on it.
func (s *Stream) Release() {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	s.release()
}

func (s *Stream) release() {
	c := s.c
	code := Cancel
	if c.server && s.sendEnd {
		code = NoError
	}
	s.reset(code)
	if n := int64(len(s.in) + len(s.span)); n > 0 {
		c.giveBack(n)
	}
	if s.inCreditQ {
		c.creditQ = without(c.creditQ, s)
	}
	if s.inOutQ {
		c.outQ = without(c.outQ, s)
	}
	c.recycle(s)
	c.active--
	c.passOn()
	c.flush()
	c.endIfDrained()
}

func without(q []*Stream, s *Stream) []*Stream {
	for i := range q {
		if q[i] == s {
			return append(q[:i], q[i+1:]...)
		}
	}
	return q
}
