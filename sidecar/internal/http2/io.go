package http2

import (
	"errors"
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"time"
)

const (
	// maxQueued bounds what waits to be written: who has more to write waits.
	maxQueued = 64 << 10
	// maxPooled is the largest write buffer that goes back to the pool.
	maxPooled = maxQueued + 2*maxFrame
	// maxRounds bounds the writes that one stream does for others in a row.
	maxRounds = 4
	// maxIdleWorkers bounds the goroutines that wait for the next stream, and
	// maxFree the streams that wait for use.
	maxIdleWorkers = 128
	maxFree        = 128
	// linger is how long an ending connection waits for its peer to end it too:
	// closing with bytes unread would reset it and what was sent may be lost.
	linger      = 500 * time.Millisecond
	lingerBytes = 1 << 20
	// drainRoundTrip is what Drain allows for the round trip.
	drainRoundTrip = 5 * time.Second
)

// outBuffer is what waits to be written.
type outBuffer struct{ b []byte }

var outBuffers = sync.Pool{New: func() any { return &outBuffer{b: make([]byte, 0, 4<<10)} }}

func (c *conn) init(nc net.Conn, early []byte, cfg *Config, server bool) {
	c.cfg = cfg.resolved()
	c.server, c.nc = server, nc
	c.rd.init(nc, early)
	c.sec.init(c.cfg.MaxHeaderBytes)
	c.streams = make(map[uint32]*Stream)
	c.nextID = 1
	c.sendWin, c.recvWin = initialWindow, int64(c.cfg.ConnWindow)
	c.peerInitial, c.peerFrame = initialWindow, maxFrame
	c.peerStreams = assumedStreams
	c.enc = newEncoder()
	c.written.L = &c.mu
	c.tickEvery = min(c.cfg.HeadTimeout, c.cfg.WriteTimeout)
	if c.cfg.PingEvery > 0 {
		c.tickEvery = min(c.tickEvery, c.cfg.PingEvery)
	}
	c.tickEvery = min(max(c.tickEvery/4, 5*time.Millisecond), time.Second)
	c.put(c.greeting(c.buf()))
}

// assumedStreams is what a client takes for the server's limit until it says so.
const assumedStreams = 100

// greeting is what a connection begins with.
func (c *conn) greeting(b []byte) []byte {
	if !c.server {
		b = append(b, preface...)
	}
	at := len(b)
	b = appendFrame(b, 0, frameSettings, 0, 0)
	if c.server {
		b = appendSetting(b, settingMaxStreams, uint32(c.cfg.MaxStreams))
	} else {
		b = appendSetting(b, settingPush, 0)
	}
	b = appendSetting(b, settingInitialWindow, uint32(c.cfg.StreamWindow))
	b = appendSetting(b, settingMaxHeaderList, uint32(c.cfg.MaxHeaderBytes))
	putLength(b[at:], len(b)-at-headerSize)
	if n := c.cfg.ConnWindow - initialWindow; n > 0 {
		b = appendWindowUpdate(b, 0, uint32(n))
	}
	return b
}

// buf is the write buffer, to append to and put back. Called with mu held.
func (c *conn) buf() []byte {
	if c.out == nil {
		p, ok := outBuffers.Get().(*outBuffer)
		if !ok {
			panic("http2: the pool holds something else than buffers")
		}
		c.out = p
	}
	return c.out.b
}

func (c *conn) put(b []byte) { c.out.b = b }

// reply is put for a frame that the peer made us send.
func (c *conn) reply(b []byte) {
	c.put(b)
	if c.replies++; c.replies > maxReplies {
		c.stop(c.calm(ReasonQueue))
	}
}

func (c *conn) queued() int {
	if c.out == nil {
		return 0
	}
	return len(c.out.b)
}

// unlock releases mu and calls what was to be called without it.
func (c *conn) unlock() {
	if len(c.goneQ) == 0 && len(c.reasonQ) == 0 {
		c.mu.Unlock()
		return
	}
	gone, reasons := c.goneQ, c.reasonQ
	c.goneQ, c.reasonQ = nil, nil
	c.mu.Unlock()
	if c.cfg.OnProtocolError != nil {
		for _, r := range reasons {
			c.cfg.OnProtocolError(r)
		}
	}
	for _, f := range gone {
		f()
	}
}

// run reads until the connection ends, and ends it.
func (c *conn) run() error {
	start := time.Now()
	c.mu.Lock()
	c.now, c.headSince = start, start
	c.ticking = true
	c.tick = time.AfterFunc(c.tickEvery, c.onTick)
	c.mu.Unlock()
	err := c.frames(start)
	for err == nil {
		if err = c.rd.fill(); err == nil {
			err = c.frames(time.Now())
		}
	}
	return c.shutdown(err)
}

// frames takes all frames that have come whole.
func (c *conn) frames(now time.Time) (err error) {
	c.mu.Lock()
	c.now = now
	sent, ended := float64(c.dataSent), float64(c.ended)
	cancelled := float64(c.cancelled)
	c.dataSent, c.ended, c.cancelled = 0, 0, 0
	c.mu.Unlock()
	c.m.resets.earn(ended/2, &resetRation)
	c.m.useless.earn(8*cancelled, &uselessRation)
	c.m.resets.earn(8*cancelled, &resetRation)
	c.m.windows.earn(10*sent, &windowRation)
	c.m.pings.earn(sent, &pingRation)
	partial := false
	for err == nil {
		b := c.rd.unread()
		if c.server && !c.prefaced {
			n := min(len(b), len(preface))
			if string(b[:n]) != preface[:n] {
				err = c.fault(ProtocolError, ReasonPreface)
				break
			}
			if n < len(preface) {
				break
			}
			c.prefaced = true
			c.rd.r += n
			continue
		}
		if len(b) < headerSize {
			break
		}
		f := parseFrame(b)
		if f.length > maxFrame {
			err = c.fault(FrameSizeError, ReasonFrameSize)
			break
		}
		if len(b) < headerSize+f.length {
			partial = f.kind != frameData
			break
		}
		c.rd.r += headerSize + f.length
		err = c.onFrame(now, f, b[headerSize:headerSize+f.length])
	}
	return c.settle(now, partial || c.block.stream != 0, err)
}

// settle lets everyone know what the frames brought: streams find all of it at
// once, so that a message that came in one piece also leaves in one.
func (c *conn) settle(now time.Time, head bool, err error) error {
	c.sec.trim()
	c.mu.Lock()
	defer c.unlock()
	if c.greeted {
		switch {
		case !head:
			c.headSince = time.Time{}
		case c.headSince.IsZero():
			c.headSince = now
			c.busy()
		}
	}
	for i, s := range c.wakes {
		s.inWakes = false
		s.wakeReader()
		c.wakes[i] = nil
	}
	c.wakes = c.wakes[:0]
	for i, s := range c.fresh {
		c.dispatch(s)
		c.fresh[i] = nil
	}
	c.fresh = c.fresh[:0]
	if err == nil {
		c.trySend()
		err = c.stopErr
	}
	return err
}

// mayFlush reports whether there is something to send and nobody at it.
func (c *conn) mayFlush() bool { return !c.writing && c.queued() > 0 && c.werr == nil }

// flush sends what is queued, unless somebody else is at it. Called with mu
// held, which it gives up meanwhile.
func (c *conn) flush() {
	if !c.mayFlush() {
		return
	}
	c.writing = true
	c.writes++
	if c.active > 1 {
		// Others that can run now may have something to send as well.
		c.unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	c.send(nil, false)
}

// trySend is flush for the goroutine that reads, which may not wait.
func (c *conn) trySend() {
	for c.mayFlush() {
		c.writing = true
		var rest *outBuffer
		if c.rd.raw != nil {
			buf := c.take()
			c.writes++
			c.mu.Unlock()
			n, err := tryWrite(c.rd.raw, buf.b)
			c.mu.Lock()
			c.writes++
			if err == nil && n == len(buf.b) {
				recycleBuffer(buf)
				c.writing = false
				c.written.Broadcast()
				c.passRoom()
				continue
			}
			// A write error shows again when the rest is written.
			buf.b = buf.b[:copy(buf.b, buf.b[n:])]
			rest = buf
		}
		c.writes++ // not stuck until it has begun
		c.wg.Go(func() {
			c.mu.Lock()
			c.send(rest, true)
			c.unlock()
		})
	}
}

func tryWrite(raw syscall.RawConn, b []byte) (n int, err error) {
	werr := raw.Write(func(fd uintptr) bool {
		for {
			n, err = syscall.Write(int(fd), b)
			if !errors.Is(err, syscall.EINTR) {
				return true
			}
		}
	})
	if werr != nil {
		err = werr
	}
	if errors.Is(err, syscall.EAGAIN) {
		err = nil
	}
	return max(n, 0), err
}

// take is the write buffer, now the caller's.
func (c *conn) take() *outBuffer {
	buf := c.out
	c.out, c.replies = nil, 0
	return buf
}

func recycleBuffer(buf *outBuffer) {
	if cap(buf.b) <= maxPooled {
		buf.b = buf.b[:0]
		outBuffers.Put(buf)
	}
}

// send writes until nothing is queued: the rest of a buffer first. The caller
// holds mu and has set writing, which send ends. Unless it has a goroutine of
// its own, it hands over to one when others queue more and more.
func (c *conn) send(rest *outBuffer, own bool) {
	c.busy()
	for rounds := 0; c.werr == nil; rounds++ {
		buf := rest
		rest = nil
		if buf == nil {
			if c.queued() == 0 {
				break
			}
			buf = c.take()
		}
		if rounds >= maxRounds && !own {
			c.wg.Go(func() {
				c.mu.Lock()
				c.send(buf, true)
				c.unlock()
			})
			return
		}
		c.writes++
		c.unlock()
		_, err := c.nc.Write(buf.b)
		c.mu.Lock()
		c.writes++
		recycleBuffer(buf)
		if err != nil {
			c.werr = err
			c.stop(err)
		}
		c.passRoom()
	}
	c.writing = false
	c.written.Broadcast()
}

// stop makes reading end with err. Called with mu held.
func (c *conn) stop(err error) {
	if c.stopErr == nil && c.err == nil {
		c.stopErr = err
		_ = c.nc.SetReadDeadline(time.Unix(1, 0))
	}
}

// shutdown ends the connection: it says why, tells all streams, and waits for
// all goroutines.
func (c *conn) shutdown(err error) error {
	c.mu.Lock()
	if c.stopErr != nil {
		err = c.stopErr
	}
	says := false
	var ce *ConnError
	switch {
	case errors.As(err, &ce):
		c.reasonQ = append(c.reasonQ, ce.Reason)
		c.put(appendGoAway(c.buf(), c.lastStream(), ce.Code, ce.Reason))
		says = true
	case errors.Is(err, errIdle), errors.Is(err, errDrained):
		if c.goAway != goAwayFinal {
			c.put(appendGoAway(c.buf(), c.lastStream(), NoError, ""))
		}
		says = true
	case c.peerErr != nil:
		err = c.peerErr
	case errors.Is(err, io.EOF) && c.goAway != goAwayNone && len(c.streams) == 0:
		err = errDrained // the peer was faster
	}
	c.err = err
	for _, s := range c.streams {
		s.kill(err)
	}
	for _, s := range c.outQ {
		s.writable()
	}
	c.outQ, c.creditQ = nil, nil
	if c.tick != nil {
		c.tick.Stop()
	}
	if says {
		_ = c.nc.SetWriteDeadline(time.Now().Add(linger))
		for c.writing {
			c.written.Wait()
		}
		if c.mayFlush() {
			c.writing = true
			c.send(nil, true)
		}
	}
	if c.werr == nil {
		c.werr = ErrClosed
	}
	c.unlock()
	if says && c.server {
		if half, ok := c.nc.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
			_ = c.nc.SetReadDeadline(time.Now().Add(linger))
			c.rd.discard(lingerBytes)
		}
	}
	_ = c.nc.Close()
	c.rd.release()
	c.mu.Lock()
	for c.writing {
		c.written.Wait()
	}
	c.trim()
	c.unlock()
	c.wg.Wait()
	if errors.Is(err, errIdle) || errors.Is(err, errDrained) {
		return nil
	}
	return err
}

// trim gives up what an idle connection need not keep.
func (c *conn) trim() {
	for _, w := range c.workers {
		close(w.ch)
	}
	c.workers, c.fewest = nil, 0
	for _, s := range c.free {
		if s.timer != nil {
			s.timer.Stop()
		}
	}
	c.free = nil
}

// busy keeps the timer running that looks for what takes too long.
func (c *conn) busy() {
	if !c.ticking && c.tick != nil {
		c.ticking = true
		c.tick.Reset(c.tickEvery)
	}
}

func (c *conn) onTick() {
	now := time.Now()
	c.mu.Lock()
	defer c.unlock()
	if c.err != nil {
		return
	}
	if next := c.check(now); next > 0 {
		c.tick.Reset(next)
	}
}

// check looks for what takes too long, and returns when to look again; 0 is
// when something happens. Called with mu held.
func (c *conn) check(now time.Time) time.Duration {
	if !c.headSince.IsZero() && now.Sub(c.headSince) > c.cfg.HeadTimeout {
		c.stop(c.calm(ReasonHeadTimeout))
	}
	switch {
	case !c.writing || c.writes != c.lastWrite:
		c.lastWrite, c.stuck = c.writes, now
	case now.Sub(c.stuck) > c.cfg.WriteTimeout:
		c.reasonQ = append(c.reasonQ, ReasonWriteTimeout)
		c.stop(errWrite)
		_ = c.nc.SetWriteDeadline(time.Unix(1, 0))
	}
	if c.goAway == goAwaySoon && now.Sub(c.drainedAt) > drainRoundTrip {
		c.finalGoAway()
	}
	if c.active > 0 && c.cfg.PingEvery > 0 {
		switch quiet := now.Sub(c.now); {
		case c.pinged && c.now.Before(c.pingSent) && now.Sub(c.pingSent) > c.cfg.PingEvery:
			c.stop(errPing)
		case c.pinged && !c.now.Before(c.pingSent):
			c.pinged = false
		case !c.pinged && quiet > c.cfg.PingEvery:
			c.pinged, c.pingSent = true, now
			c.put(appendPing(c.buf(), false, []byte(alivePing)))
		}
	}
	if c.mayFlush() {
		// Nobody waits for this; whoever queued it has not flushed it yet.
		c.writing = true
		c.writes++
		c.wg.Go(func() {
			c.mu.Lock()
			c.send(nil, true)
			c.unlock()
		})
	}
	// Workers that nobody needed since the last time go, half of them at once.
	for range (c.fewest + 1) / 2 {
		close(c.workers[0].ch)
		c.workers = c.workers[1:]
	}
	c.fewest = len(c.workers)
	if c.active > 0 || c.writing || !c.headSince.IsZero() || c.goAway != goAwayNone {
		return c.tickEvery
	}
	c.trim()
	if c.idleSince.IsZero() {
		c.idleSince = now
	}
	c.ticking = false
	if c.cfg.IdleTimeout < 0 {
		return 0
	}
	left := c.cfg.IdleTimeout - now.Sub(c.idleSince)
	if left <= 0 {
		c.stop(errIdle)
	}
	return max(left, c.tickEvery)
}
