package http2

import (
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// conn is what a Server and a Client have in common: the state of a connection
// and of its streams. Methods with a now argument are the state machine; the
// rest is in io.go.
type conn struct {
	cfg    Config
	server bool
	nc     net.Conn

	// The goroutine that reads owns these.
	rd       reader
	sec      section
	block    block
	wakes    []*Stream // that wait for what has come
	fresh    []*Stream // of a server, not yet given to a handler
	m        meters
	prefaced bool // the client's preface came
	greeted  bool // the peer's first SETTINGS came; written with mu held

	mu sync.Mutex
	// Everything below is guarded by mu.

	streams map[uint32]*Stream // open or half closed
	free    []*Stream
	active  int // not yet released
	// peerLast is the highest stream that a client has opened; nextID is the
	// next that we open.
	peerLast, nextID uint32
	closed           recent // streams that ended
	killed           recent // streams that we reset

	sendWin, recvWin int64
	unacked          int64 // read and not yet given back to the peer
	acked            bool  // the peer knows our settings
	peerInitial      int64
	peerFrame        int
	peerStreams      int

	enc     encoder
	scratch scratch
	out     *outBuffer
	replies int // control frames in out
	writing bool
	written sync.Cond // writing has ended
	writes  uint64    // changes when a write begins and when it ends
	werr    error
	outQ    []*Stream // wait for room in out
	creditQ []*Stream // wait for the connection's window

	err       error // the connection is over
	stopErr   error // why reading is to end
	peerErr   error // what a GOAWAY said
	goneQ     []func()
	reasonQ   []string
	goAway    goAwayState
	lastID    uint32 // of the GOAWAY sent or received
	pinged    bool
	now       time.Time // of the last frames
	headSince time.Time
	idleSince time.Time
	pingSent  time.Time
	drainedAt time.Time
	// dataSent counts frames of data since the reader last looked, which earn the
	// peer WINDOW_UPDATEs and PINGs; ended counts streams that ended well.
	dataSent, ended int
	// cancelled counts a client's own resets in the same way: what the server had
	// sent before it knew is not its fault.
	cancelled int

	tick      *time.Timer
	tickEvery time.Duration
	ticking   bool
	lastWrite uint64
	stuck     time.Time

	workers []*worker // that wait; the last to come is the first to go
	fewest  int       // of them since the last tick
	handle  func(*Stream)
	wg      sync.WaitGroup
}

type goAwayState uint8

const (
	goAwayNone  goAwayState = iota
	goAwaySoon              // server: the first GOAWAY of Drain is out
	goAwayFinal             // no more streams
	goAwayPeer              // client: the server said so
)

// block is a field section that is coming in.
type block struct {
	stream uint32
	frames int
	bytes  int
	end    bool // END_STREAM
	selfie bool // depends on itself
}

// recent remembers stream identifiers for a while.
type recent struct {
	ids []uint32
	at  int
}

const recentStreams = 128

func (r *recent) add(id uint32) {
	if len(r.ids) < recentStreams {
		r.ids = append(r.ids, id)
		return
	}
	r.ids[r.at] = id
	r.at = (r.at + 1) % recentStreams
}

func (r *recent) has(id uint32) bool {
	for _, v := range r.ids {
		if v == id {
			return true
		}
	}
	return false
}

// maxFramesPerBlock bounds the frames of a field section, however small.
const maxFramesPerBlock = 32

// maxReplies bounds the control frames that wait for a peer that does not read.
const maxReplies = 1000

// maxSettings bounds the parameters of one SETTINGS frame; six are known.
const maxSettings = 64

// maxInterim bounds the bytes of field sections that a stream keeps.
func (c *conn) maxKept() int { return 4 * c.cfg.MaxHeaderBytes }

func (c *conn) fault(code ErrCode, reason string) error {
	return &ConnError{Code: code, Reason: reason}
}

// calm is a peer that asks for more work than it may.
func (c *conn) calm(reason string) error { return c.fault(EnhanceYourCalm, reason) }

// onFrame takes a whole frame. An error ends the connection.
func (c *conn) onFrame(now time.Time, f frame, p []byte) error {
	if !c.greeted && (f.kind != frameSettings || f.has(flagAck)) {
		return c.fault(ProtocolError, ReasonPreface)
	}
	if c.block.stream != 0 && (f.kind != frameContinuation || f.stream != c.block.stream) {
		return c.fault(ProtocolError, ReasonFrame)
	}
	switch f.kind {
	case frameData:
		return c.onData(now, f, p)
	case frameHeaders:
		return c.onHeaders(now, f, p)
	case frameContinuation:
		if c.block.stream == 0 {
			return c.fault(ProtocolError, ReasonFrame)
		}
		return c.onFragment(now, f, p)
	case frameRSTStream:
		return c.onReset(now, f, p)
	case frameSettings:
		return c.onSettings(now, f, p)
	case framePing:
		return c.onPing(now, f, p)
	case frameWindowUpdate:
		return c.onWindowUpdate(now, f, p)
	case frameGoAway:
		return c.onGoAway(f, p)
	case framePriority:
		return c.onPriority(now, f, p)
	case framePushPromise:
		return c.fault(ProtocolError, ReasonPush)
	default:
		if !c.m.useless.take(now, &uselessRation) {
			return c.calm(ReasonUselessFrames)
		}
		return nil
	}
}

// idle reports whether a stream has not been opened yet; a server opens none.
func (c *conn) idle(id uint32) bool {
	if c.server {
		return id > c.peerLast || id&1 == 0
	}
	return id >= c.nextID || id&1 == 0
}

// streamError resets a stream, open or not, for a rule that the peer broke.
// Called with mu held.
func (c *conn) streamError(now time.Time, id uint32, code ErrCode, reason string) error {
	c.reasonQ = append(c.reasonQ, reason)
	if s := c.streams[id]; s != nil {
		s.kill(&StreamError{Code: code, Reason: reason})
	} else {
		c.killed.add(id)
	}
	c.reply(appendRST(c.buf(), id, code))
	if !c.m.resets.take(now, &resetRation) {
		return c.calm(ReasonRapidReset)
	}
	return nil
}

func (c *conn) onData(now time.Time, f frame, p []byte) error {
	if f.stream == 0 {
		return c.fault(ProtocolError, ReasonFrame)
	}
	data, ok := unpad(f, p)
	if !ok {
		return c.fault(ProtocolError, ReasonFrame)
	}
	n := int64(len(p))
	end := f.has(flagEndStream)
	if len(data) == 0 && !end {
		if !c.m.empty.take(now, &emptyRation) {
			return c.calm(ReasonEmptyData)
		}
	} else {
		c.m.empty.earn(0.1, &emptyRation)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > c.recvWin {
		return c.fault(FlowControlError, ReasonFlowControl)
	}
	c.recvWin -= n
	s := c.streams[f.stream]
	if s == nil {
		if c.idle(f.stream) {
			return c.fault(ProtocolError, ReasonStreamID)
		}
		c.giveBack(n)
		return c.onLate(now, f.stream)
	}
	// Padding is read as soon as it comes.
	c.giveBack(n - int64(len(data)))
	var code ErrCode
	var reason string
	switch {
	case s.recvEnd:
		code, reason = StreamClosed, ReasonStreamClosed
	case !c.server && !s.gotFinal:
		code, reason = ProtocolError, ReasonResponse
	case n > s.recvWin:
		code, reason = FlowControlError, ReasonFlowControl
	case s.length >= 0 && (s.got+int64(len(data)) > s.length || end && s.got+int64(len(data)) < s.length):
		code, reason = ProtocolError, ReasonLength
	}
	if reason != "" {
		c.giveBack(int64(len(data)))
		return c.streamError(now, f.stream, code, reason)
	}
	s.recvWin -= n
	s.got += int64(len(data))
	if pad := n - int64(len(data)); pad > 0 && !end {
		s.giveBack(pad)
	}
	s.in = append(s.in, data...)
	if end {
		s.endRecv()
	}
	s.readable()
	return nil
}

// onLate takes a frame for a stream that is over: if we reset it, the peer may
// not know yet. Called with mu held.
func (c *conn) onLate(now time.Time, id uint32) error {
	if c.killed.has(id) || c.goAway >= goAwayFinal && c.server && id > c.lastID {
		if !c.m.useless.take(now, &uselessRation) {
			return c.calm(ReasonUselessFrames)
		}
		return nil
	}
	return c.streamError(now, id, StreamClosed, ReasonStreamClosed)
}

func (c *conn) onHeaders(now time.Time, f frame, p []byte) error {
	if f.stream == 0 || c.server && f.stream&1 == 0 {
		return c.fault(ProtocolError, ReasonStreamID)
	}
	p, ok := unpad(f, p)
	if !ok {
		return c.fault(ProtocolError, ReasonFrame)
	}
	c.block = block{stream: f.stream, end: f.has(flagEndStream)}
	if f.has(flagPriority) {
		if len(p) < 5 {
			return c.fault(FrameSizeError, ReasonFrameSize)
		}
		c.block.selfie = binary.BigEndian.Uint32(p)&maxStreamID == f.stream
		p = p[5:]
	}
	c.sec.begin(c.cfg.MaxHeaderBytes, c.cfg.MaxHeaders)
	return c.onFragment(now, f, p)
}

// onFragment takes a part of a field section and, at its end, the section.
func (c *conn) onFragment(now time.Time, f frame, p []byte) error {
	b := &c.block
	b.frames++
	b.bytes += len(p)
	// What is compressed is not longer than what it says, save for the largest
	// fields, of which each was longer than allowed.
	if b.frames > maxFramesPerBlock || b.bytes > c.cfg.MaxHeaderBytes+maxFrame {
		return c.calm(ReasonContinuation)
	}
	if _, err := c.sec.dec.Write(p); err != nil {
		return c.fault(CompressionError, ReasonCompression)
	}
	if !f.has(flagEndHeaders) {
		return nil
	}
	if err := c.sec.dec.Close(); err != nil {
		return c.fault(CompressionError, ReasonCompression)
	}
	done := *b
	c.block = block{}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.headSince = time.Time{}
	if c.server {
		return c.onRequest(now, done)
	}
	return c.onResponse(now, done)
}

// onRequest takes a field section of a client. Called with mu held.
func (c *conn) onRequest(now time.Time, b block) error {
	if s := c.streams[b.stream]; s != nil {
		return c.onTrailers(now, s, b)
	}
	if b.stream <= c.peerLast {
		switch {
		case c.killed.has(b.stream):
			return c.onLate(now, b.stream)
		case c.closed.has(b.stream):
			return c.fault(StreamClosed, ReasonStreamClosed)
		default:
			return c.fault(ProtocolError, ReasonStreamID)
		}
	}
	c.peerLast = b.stream
	if c.goAway >= goAwayFinal {
		// Sent before the client knew; it takes another connection (RFC 9113
		// section 6.8).
		if !c.m.useless.take(now, &uselessRation) {
			return c.calm(ReasonUselessFrames)
		}
		return nil
	}
	switch {
	case b.selfie:
		return c.streamError(now, b.stream, ProtocolError, ReasonFrame)
	case c.active >= c.cfg.MaxStreams:
		return c.streamError(now, b.stream, RefusedStream, ReasonTooManyStreams)
	case c.sec.tooMuch:
		return c.tooLarge(now, b)
	}
	s := c.newStream(b.stream)
	var reason string
	s.arena, reason = c.sec.request(&s.head, s.arena, b.end)
	if reason != "" {
		c.active--
		c.recycle(s)
		return c.streamError(now, b.stream, ProtocolError, reason)
	}
	c.streams[b.stream] = s
	s.heads, s.gotFinal = 1, true
	s.length = -1
	if s.head.Framing == http1.Length {
		s.length = s.head.Length
	}
	if b.end {
		s.endRecv()
	}
	c.fresh = append(c.fresh, s)
	c.busy()
	return nil
}

// tooLarge answers 431 to a section that is larger than allowed.
func (c *conn) tooLarge(now time.Time, b block) error {
	dst := c.buf()
	at := len(dst)
	dst = appendFrame(dst, 0, frameHeaders, flagEndHeaders|flagEndStream, b.stream)
	dst = c.enc.begin(dst)
	dst = c.enc.field(dst, fieldStatus, status431)
	putLength(dst[at:], len(dst)-at-headerSize)
	c.reply(dst)
	return c.streamError(now, b.stream, NoError, ReasonHeaderList)
}

var status431 = []byte("431")

func putLength(b []byte, n int) { b[0], b[1], b[2] = byte(n>>16), byte(n>>8), byte(n) }

// onTrailers takes the second section of a message. Called with mu held.
func (c *conn) onTrailers(now time.Time, s *Stream, b block) error {
	reason := ""
	switch {
	case s.recvEnd:
		return c.streamError(now, s.id, StreamClosed, ReasonStreamClosed)
	case b.selfie:
		reason = ReasonFrame
	case !b.end:
		reason = ReasonTrailers
	case c.sec.tooMuch:
		return c.streamError(now, s.id, EnhanceYourCalm, ReasonHeaderList)
	case s.length >= 0 && s.got < s.length:
		reason = ReasonLength
	}
	if reason == "" {
		s.trailers, s.arena, reason = c.sec.trailers(s.trailers[:0], s.arena)
	}
	if reason != "" {
		return c.streamError(now, s.id, ProtocolError, reason)
	}
	s.endRecv()
	s.readable()
	return nil
}

// onResponse takes a field section of a server. Called with mu held.
func (c *conn) onResponse(now time.Time, b block) error {
	s := c.streams[b.stream]
	switch {
	case s == nil && c.idle(b.stream):
		return c.fault(ProtocolError, ReasonStreamID)
	case s == nil:
		return c.onLate(now, b.stream)
	case s.gotFinal:
		return c.onTrailers(now, s, b)
	case b.selfie:
		return c.streamError(now, s.id, ProtocolError, ReasonFrame)
	case c.sec.tooMuch:
		return c.streamError(now, s.id, EnhanceYourCalm, ReasonHeaderList)
	case len(s.arena) > c.maxKept():
		return c.streamError(now, s.id, EnhanceYourCalm, ReasonInterimFlood)
	}
	h := &s.head
	if s.heads > 0 {
		if len(s.more) >= maxInterim {
			return c.streamError(now, s.id, EnhanceYourCalm, ReasonInterimFlood)
		}
		s.more = append(s.more, http1.Head{})
		h = &s.more[len(s.more)-1]
	}
	var reason string
	s.arena, reason = c.sec.response(h, s.arena, b.end, s.isHead)
	if reason != "" {
		return c.streamError(now, s.id, ProtocolError, reason)
	}
	s.heads++
	if h.Status >= 200 {
		s.gotFinal = true
		switch h.Framing {
		case http1.Length:
			s.length = h.Length
		case http1.None:
			s.length = 0
		default:
			s.length = -1
		}
	}
	if b.end {
		s.endRecv()
	}
	s.readable()
	return nil
}

// maxInterim bounds the interim responses that nobody has read.
const maxInterim = 16

func (c *conn) onReset(now time.Time, f frame, p []byte) error {
	if f.stream == 0 {
		return c.fault(ProtocolError, ReasonStreamID)
	}
	if len(p) != 4 {
		return c.fault(FrameSizeError, ReasonFrameSize)
	}
	code := ErrCode(binary.BigEndian.Uint32(p))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle(f.stream) {
		return c.fault(ProtocolError, ReasonStreamID)
	}
	s := c.streams[f.stream]
	if s == nil {
		if !c.m.useless.take(now, &uselessRation) {
			return c.calm(ReasonUselessFrames)
		}
		return nil
	}
	if code == RefusedStream && !s.gotFinal && s.heads == 0 {
		s.unprocessed = true
	}
	s.kill(&StreamError{Code: code, Remote: true})
	if c.server && !c.m.resets.take(now, &resetRation) {
		return c.calm(ReasonRapidReset)
	}
	return nil
}

func (c *conn) onSettings(now time.Time, f frame, p []byte) error {
	switch {
	case f.stream != 0:
		return c.fault(ProtocolError, ReasonStreamID)
	case len(p)%6 != 0 || f.has(flagAck) && len(p) != 0:
		return c.fault(FrameSizeError, ReasonFrameSize)
	case !c.m.settings.take(now, &settingsRation), len(p) > 6*maxSettings:
		return c.calm(ReasonSettingsFlood)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.has(flagAck) {
		if !c.acked {
			c.acked = true
			// From here on the peer counts with our window.
			for _, s := range c.streams {
				s.recvWin += int64(c.cfg.StreamWindow) - initialWindow
			}
		}
		return nil
	}
	first := !c.greeted
	if first {
		c.greeted = true
		c.peerStreams = maxStreamID
	}
	window := int64(-1)
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch binary.BigEndian.Uint16(p) {
		case settingTableSize:
			c.enc.setMax(v)
		case settingPush:
			if v > 1 || v == 1 && !c.server {
				return c.fault(ProtocolError, ReasonSetting)
			}
		case settingMaxStreams:
			c.peerStreams = int(min(v, maxStreamID))
		case settingInitialWindow:
			if v > maxWindow {
				return c.fault(FlowControlError, ReasonSetting)
			}
			window = int64(v)
		case settingMaxFrame:
			if v < maxFrame || v > maxPeerFrame {
				return c.fault(ProtocolError, ReasonSetting)
			}
			c.peerFrame = int(v)
		}
	}
	// Once a frame, however often it says so: it touches every stream.
	if window >= 0 && window != c.peerInitial {
		delta := window - c.peerInitial
		c.peerInitial = window
		for _, s := range c.streams {
			if s.sendWin += delta; s.sendWin > maxWindow {
				return c.fault(FlowControlError, ReasonFlowControl)
			}
			if delta > 0 {
				s.writable()
			}
		}
	}
	c.reply(appendFrame(c.buf(), 0, frameSettings, flagAck, 0))
	return nil
}

func (c *conn) onPing(now time.Time, f frame, p []byte) error {
	switch {
	case f.stream != 0:
		return c.fault(ProtocolError, ReasonStreamID)
	case len(p) != 8:
		return c.fault(FrameSizeError, ReasonFrameSize)
	case !c.m.pings.take(now, &pingRation):
		return c.calm(ReasonPingFlood)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !f.has(flagAck) {
		c.reply(appendPing(c.buf(), true, p))
		return nil
	}
	switch string(p) {
	case drainPing:
		c.finalGoAway()
	case alivePing:
		c.pinged = false
	}
	return nil
}

// Payloads of our PINGs.
const (
	drainPing = "or-drain"
	alivePing = "or-alive"
)

func (c *conn) onWindowUpdate(now time.Time, f frame, p []byte) error {
	if len(p) != 4 {
		return c.fault(FrameSizeError, ReasonFrameSize)
	}
	if !c.m.windows.take(now, &windowRation) {
		return c.calm(ReasonWindowUpdateFlood)
	}
	n := int64(binary.BigEndian.Uint32(p) & maxWindow)
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.stream == 0 {
		if n == 0 {
			return c.fault(ProtocolError, ReasonFlowControl)
		}
		if c.sendWin += n; c.sendWin > maxWindow {
			return c.fault(FlowControlError, ReasonFlowControl)
		}
		c.passCredit()
		return nil
	}
	if c.idle(f.stream) {
		return c.fault(ProtocolError, ReasonStreamID)
	}
	s := c.streams[f.stream]
	switch {
	case s == nil:
		return nil
	case n == 0:
		return c.streamError(now, s.id, ProtocolError, ReasonFlowControl)
	}
	if s.sendWin += n; s.sendWin > maxWindow {
		return c.streamError(now, s.id, FlowControlError, ReasonFlowControl)
	}
	s.writable()
	return nil
}

func (c *conn) onGoAway(f frame, p []byte) error {
	switch {
	case f.stream != 0:
		return c.fault(ProtocolError, ReasonStreamID)
	case len(p) < 8:
		return c.fault(FrameSizeError, ReasonFrameSize)
	case c.server:
		return nil // the client ends the connection when it wants
	}
	last, code := binary.BigEndian.Uint32(p)&maxStreamID, ErrCode(binary.BigEndian.Uint32(p[4:]))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goAway < goAwayPeer {
		c.goAway, c.lastID = goAwayPeer, last
	}
	c.lastID = min(c.lastID, last)
	for id, s := range c.streams {
		if id > c.lastID {
			s.unprocessed = true
			s.kill(&StreamError{Code: RefusedStream, Remote: true})
		}
	}
	if code != NoError && c.peerErr == nil {
		c.peerErr = &ConnError{Code: code, Remote: true}
	}
	c.endIfDrained()
	return nil
}

func (c *conn) onPriority(now time.Time, f frame, p []byte) error {
	if f.stream == 0 {
		return c.fault(ProtocolError, ReasonStreamID)
	}
	if !c.m.useless.take(now, &uselessRation) {
		return c.calm(ReasonUselessFrames)
	}
	switch {
	case len(p) != 5:
		return c.inStream(now, f.stream, FrameSizeError, ReasonFrameSize)
	case binary.BigEndian.Uint32(p)&maxStreamID == f.stream:
		return c.inStream(now, f.stream, ProtocolError, ReasonFrame)
	}
	return nil
}

// inStream is a stream error where the stream may not have been opened: then it
// is the connection's, since an idle stream cannot be reset.
func (c *conn) inStream(now time.Time, id uint32, code ErrCode, reason string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.streams[id] != nil:
		return c.streamError(now, id, code, reason)
	case c.idle(id):
		return c.fault(code, reason)
	default:
		return nil
	}
}

// finalGoAway ends what Drain began: clients have had the time of a round trip
// to learn of it. Called with mu held.
func (c *conn) finalGoAway() {
	if c.goAway != goAwaySoon {
		return
	}
	c.goAway, c.lastID = goAwayFinal, c.peerLast
	c.reply(appendGoAway(c.buf(), c.lastID, NoError, ""))
	c.endIfDrained()
}

// lastStream is what a GOAWAY says: the last stream that was looked at.
func (c *conn) lastStream() uint32 {
	if c.server && c.goAway == goAwayFinal {
		return c.lastID
	}
	return c.peerLast
}

// endIfDrained ends the connection if it takes no more streams and has none.
func (c *conn) endIfDrained() {
	if c.goAway >= goAwayFinal && c.active == 0 {
		c.stop(errDrained)
	}
}

// giveBack tells the peer that n bytes of the connection's window were read, in
// large portions, and reports whether it did now.
func (c *conn) giveBack(n int64) (queued bool) {
	c.unacked += n
	if c.unacked >= int64(c.cfg.ConnWindow)/2 && c.err == nil {
		c.put(appendWindowUpdate(c.buf(), 0, uint32(c.unacked)))
		c.recvWin += c.unacked
		c.unacked = 0
		return true
	}
	return false
}

// passCredit wakes the stream that has waited longest for the connection's
// window; it wakes the next when it has taken what it needs.
func (c *conn) passCredit() {
	for c.sendWin > 0 && len(c.creditQ) > 0 {
		s := c.creditQ[0]
		c.creditQ = c.creditQ[1:]
		s.inCreditQ = false
		if s.writable() {
			return
		}
	}
}

// passRoom is passCredit for room in the write buffer.
func (c *conn) passRoom() {
	for c.queued() < maxQueued && len(c.outQ) > 0 {
		s := c.outQ[0]
		c.outQ = c.outQ[1:]
		s.inOutQ = false
		if s.writable() {
			return
		}
	}
}

// passOn wakes who can use what this stream leaves of room and of credit.
func (c *conn) passOn() {
	c.passRoom()
	c.passCredit()
}
