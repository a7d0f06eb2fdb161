// Package wire is a connection as the proxy uses it: bytes that have been read
// and not yet used, deadlines, and a way to wake who waits.
//
// It knows TCP, and TLS above it; it does not know what is said. Three things
// set it apart from net.Conn. A connection that waits holds no buffer: the
// buffer is taken when bytes are there, by the same system call that reads them.
// Deadlines that only move on, as those of request after request do, cost no
// timer. And bytes that have come count, even where the deadline has passed.
//
// listener wraps what it accepts and upstream what it dials; proxy reads and
// writes. A Conn has one reader, one writer and one who asks Gone or Alive at a
// time; Interrupt, InterruptWrite and Close may be called by others meanwhile.
package wire

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// BufferSize of a pooled buffer, in bytes. What needs more makes it grow; grown
// buffers do not go back to the pool.
const BufferSize = 16 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, BufferSize); return &b }}

// Take borrows a buffer of BufferSize; Give ends that. The bytes are what the
// last user left.
func Take() *[]byte {
	p, ok := buffers.Get().(*[]byte)
	if !ok {
		panic("wire: the pool holds something else than buffers")
	}
	return p
}

// Give returns what Take lent.
func Give(p *[]byte) { buffers.Put(p) }

// ErrInterrupted is the error of a read or write that Interrupt or
// InterruptWrite ended.
var ErrInterrupted = errors.New("interrupted")

// instant is a time as nanoseconds after epoch, a third of the size of a
// time.Time; 0 is none.
type instant int64

var epoch = time.Now()

func at(t time.Time) instant {
	if t.IsZero() {
		return 0
	}
	return max(instant(t.Sub(epoch)), past)
}

func (i instant) time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return epoch.Add(time.Duration(i))
}

// passed reports whether it is a time that has come.
func (i instant) passed() bool { return i != 0 && time.Since(epoch) >= time.Duration(i) }

// past is a deadline that wakes whoever waits.
const past instant = 1

// Conn is a connection and what has been read of it. Make it with New.
//
//	buf: [ pinned | used | unread      | free ]
//	       0        base   r           w
type Conn struct {
	nc  net.Conn // tcp, or TLS above it
	tcp *net.TCPConn
	tls *tls.Conn // nil: in clear
	raw syscall.RawConn

	buf        []byte
	pooled     *[]byte
	base, r, w int

	// try, put and look are made once: a method value allocates.
	try     func(fd uintptr) bool
	put     func(fd uintptr) bool
	look    func(fd uintptr)
	got     int
	tryErr  error
	seen    bool
	seenErr error
	reset   error // seen by look
	rest    []byte
	putErr  error

	readBy, readSet   instant // wanted, and set in the system
	writeBy, writeSet instant
	secured           atomic.Pointer[tls.Conn] // is tls, for Close
	interrupted       atomic.Bool
	writeInterrupted  atomic.Bool
}

// New wraps tcp. What early holds has been read of it already and is kept. The
// error is that of a connection which is closed.
func New(tcp *net.TCPConn, early []byte) (*Conn, error) {
	c := &Conn{}
	return c, c.Init(tcp, early)
}

// Init makes c what New returns, where c is part of something larger.
func (c *Conn) Init(tcp *net.TCPConn, early []byte) (err error) {
	c.nc, c.tcp = tcp, tcp
	c.try, c.put, c.look = c.tryRead, c.tryWrite, c.lookAt
	if c.raw, err = tcp.SyscallConn(); err != nil {
		return err
	}
	c.preload(early)
	return nil
}

// Secure goes on over t, which must have been made above the Conn's TCP
// connection and have shaken hands. Nothing may be unread. Deadlines that were
// set meanwhile are taken back.
func (c *Conn) Secure(t *tls.Conn) {
	c.nc, c.tls = t, t
	c.secured.Store(t)
	c.readSet, c.writeSet = 0, 0
	_ = c.tcp.SetDeadline(time.Time{}) // a closed connection says so when it is used
}

// TCP is the connection below; TLS the one above it, nil in clear.
func (c *Conn) TCP() *net.TCPConn { return c.tcp }

// TLS is nil where the connection is in clear.
func (c *Conn) TLS() *tls.Conn { return c.tls }

// Transport is what bytes are read from and written to.
func (c *Conn) Transport() net.Conn { return c.nc }

// RemoteAddr is the peer's address.
func (c *Conn) RemoteAddr() net.Addr { return c.tcp.RemoteAddr() }

// LocalAddr is ours.
func (c *Conn) LocalAddr() net.Addr { return c.tcp.LocalAddr() }

// Close ends the connection, whoever uses it.
func (c *Conn) Close() error {
	if t := c.secured.Load(); t != nil {
		// The alert must not wait for a peer that reads nothing.
		_ = c.tcp.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		return t.Close()
	}
	return c.tcp.Close()
}

// Abort ends the connection so that the peer sees a broken one, not an end.
func (c *Conn) Abort() {
	_ = c.tcp.SetLinger(0)
	_ = c.tcp.Close()
}

// CloseWrite ends our direction.
func (c *Conn) CloseWrite() error {
	if c.tls != nil {
		return c.tls.CloseWrite()
	}
	return c.tcp.CloseWrite()
}

func (c *Conn) preload(early []byte) {
	if len(early) == 0 {
		return
	}
	c.hold()
	if len(early) > len(c.buf) {
		c.giveBack()
		c.buf = make([]byte, 2*len(early))
	}
	c.w = copy(c.buf, early)
}

// Unread is what has been read and not used; valid until the next Fill, Pin or
// Release.
func (c *Conn) Unread() []byte { return c.buf[c.r:c.w] }

// Use takes n bytes off Unread.
func (c *Conn) Use(n int) { c.r += n }

// Empty reports whether nothing is unread.
func (c *Conn) Empty() bool { return c.r == c.w }

// Fill reads more, waiting for it until the read deadline. A full buffer grows,
// so the caller bounds what it asks for. The error may be io.EOF,
// os.ErrDeadlineExceeded, ErrInterrupted, or the system's.
func (c *Conn) Fill() error {
	for {
		n, err := c.read()
		if n > 0 {
			c.w += n
			return nil
		}
		switch {
		case err == nil:
			return io.ErrNoProgress
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		}
		if err := c.expired(); err != nil {
			// What has come counts all the same.
			if c.tls == nil && c.raw.Control(func(fd uintptr) { c.try(fd) }) == nil && c.tryErr == nil && c.got > 0 {
				c.w += c.got
				return nil
			}
			return err
		}
	}
}

// expired says why a read whose deadline in the system has passed must end; nil
// where it may go on, with the deadline that is wanted.
func (c *Conn) expired() error {
	if c.interrupted.Load() {
		return ErrInterrupted
	}
	if c.readBy.passed() {
		c.readSet = past
		return os.ErrDeadlineExceeded
	}
	c.readSet = c.readBy
	if err := c.tcp.SetReadDeadline(c.readBy.time()); err != nil {
		return err
	}
	if c.interrupted.Load() { // whose deadline ours may have replaced
		return ErrInterrupted
	}
	return nil
}

func (c *Conn) read() (int, error) {
	if c.tls != nil {
		return c.readTLS()
	}
	c.tryErr = nil
	if err := c.raw.Read(c.try); err != nil {
		return 0, err
	}
	return c.got, c.tryErr
}

// tryRead reads what is there, taking a buffer only if something is. It returns
// false to be called again when the system says that something came.
func (c *Conn) tryRead(fd uintptr) bool {
	held := c.buf != nil
	c.room()
	var n int
	var err error
	for {
		n, err = readFD(int(fd), c.buf[c.w:])
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	c.got, c.tryErr = max(n, 0), nil
	if n > 0 {
		return true
	}
	if !held {
		c.Release()
	}
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return false
	case err != nil:
		c.tryErr = os.NewSyscallError("read", err)
	default:
		c.tryErr = io.EOF
	}
	return true
}

// readTLS waits with one byte where no buffer is held. What crypto/tls holds by
// itself is out of our hands.
func (c *Conn) readTLS() (int, error) {
	if c.buf != nil {
		c.room()
		return c.tls.Read(c.buf[c.w:])
	}
	var one [1]byte
	n, err := c.tls.Read(one[:])
	if n == 0 {
		return 0, err
	}
	c.room()
	c.buf[c.w] = one[0]
	return 1, nil
}

func (c *Conn) hold() {
	c.pooled = Take()
	c.buf = *c.pooled
}

// room makes place for what is to be read.
func (c *Conn) room() {
	if c.buf == nil {
		c.hold()
	}
	if c.r == c.w {
		c.r, c.w = c.base, c.base
	}
	if c.w < len(c.buf) {
		return
	}
	if c.r > c.base {
		c.w = c.base + copy(c.buf[c.base:], c.buf[c.r:c.w])
		c.r = c.base
		return
	}
	grown := make([]byte, 2*len(c.buf))
	copy(grown, c.buf[:c.w])
	if c.base > 0 {
		c.pooled = nil // what is pinned is still pointed into: the garbage collector takes it
	}
	c.giveBack()
	c.buf = grown
}

// Pin keeps the first n unread bytes where they are until Unpin, for a parsed
// head points into them. What follows stays unread.
func (c *Conn) Pin(n int) {
	c.Use(n)
	c.base = c.r
	if len(c.buf)-c.base >= BufferSize/4 {
		return
	}
	// Too little room behind the head to read a body into: leave the head where
	// it is, and go on in a buffer of its own.
	rest := c.buf[c.r:c.w]
	fresh := make([]byte, max(BufferSize, 2*len(rest)))
	c.w = copy(fresh, rest)
	c.pooled = nil
	c.buf, c.base, c.r = fresh, 0, 0
}

// Unpin ends Pin and gives the buffer back if nothing is unread.
func (c *Conn) Unpin() {
	c.base = 0
	if c.r == c.w {
		c.Release()
	}
}

// Release forgets what is unread and gives the buffer back.
func (c *Conn) Release() {
	c.giveBack()
	c.buf, c.base, c.r, c.w = nil, 0, 0, 0
}

func (c *Conn) giveBack() {
	if c.pooled != nil {
		Give(c.pooled)
		c.pooled = nil
	}
}

// ReadBy is until when reads may wait; zero is for ever.
func (c *Conn) ReadBy(t time.Time) {
	c.readBy = at(t)
	if c.readBy.nearer(c.readSet) {
		c.readSet = c.readBy
		_ = c.tcp.SetReadDeadline(t) // a closed connection says so when it is read
	}
}

// WriteBy is until when writes may wait; zero is for ever.
func (c *Conn) WriteBy(t time.Time) {
	c.writeBy = at(t)
	// A TLS connection on which a write timed out is lost, so that it cannot be
	// told later that there was time.
	if c.writeBy.nearer(c.writeSet) || c.tls != nil && c.writeBy != c.writeSet {
		c.writeSet = c.writeBy
		_ = c.tcp.SetWriteDeadline(t)
	}
}

// nearer reports whether a deadline is before the one that is set.
func (i instant) nearer(set instant) bool { return i != 0 && (set == 0 || i < set) }

// Write sends b, all of it unless there is an error. It implements io.Writer.
func (c *Conn) Write(b []byte) (n int, err error) {
	for {
		m, err := c.write(b[n:])
		n += m
		if err == nil {
			return n, nil
		}
		if again, err := c.mayWrite(err); !again {
			return n, err
		}
	}
}

// write sends as much of b as there is time for.
func (c *Conn) write(b []byte) (int, error) {
	if c.tls != nil || len(b) == 0 {
		return c.nc.Write(b)
	}
	c.rest, c.putErr = b, nil
	err := c.raw.Write(c.put)
	n := len(b) - len(c.rest)
	c.rest = nil
	if err == nil {
		err = c.putErr
	}
	return n, err
}

// tryWrite sends what the system takes of rest. It returns false to be called
// again when the system says that it takes more.
func (c *Conn) tryWrite(fd uintptr) bool {
	for len(c.rest) > 0 {
		n, err := writeFD(int(fd), c.rest)
		switch {
		case n > 0:
			c.rest = c.rest[n:]
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return false
		case err != nil:
			c.putErr = os.NewSyscallError("write", err)
			return true
		default:
			c.putErr = io.ErrUnexpectedEOF
			return true
		}
	}
	return true
}

// mayWrite reports whether a write that ended with err may go on, because the
// deadline has only seemed to pass.
func (c *Conn) mayWrite(err error) (bool, error) {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false, err
	}
	if c.writeInterrupted.Load() {
		return false, ErrInterrupted
	}
	if c.tls != nil || c.writeBy.passed() {
		c.writeSet = past
		return false, err
	}
	c.writeSet = c.writeBy
	if err := c.tcp.SetWriteDeadline(c.writeBy.time()); err != nil {
		return false, err
	}
	if c.writeInterrupted.Load() {
		return false, ErrInterrupted
	}
	return true, nil
}

// ErrStuck is the error of a Splice whose dst took nothing for too long. What was
// on its way is lost.
var ErrStuck = errors.New("the peer takes no bytes")

// Splice moves n bytes from src to dst within the kernel, where nothing is unread
// and neither is TLS. It waits for bytes until the read deadline of src, after
// which it can be called again, and for dst to take them until by. An end before
// n bytes is io.ErrUnexpectedEOF.
func Splice(dst, src *Conn, n int64, by time.Time) (moved int64, err error) {
	// Bytes may be in the pipe when a write ends: its deadline must be the true one.
	dst.writeBy = at(by)
	dst.writeSet = dst.writeBy
	if err := dst.tcp.SetWriteDeadline(by); err != nil {
		return 0, err
	}
	for {
		m, err := io.Copy(dst.tcp, &io.LimitedReader{R: src.tcp, N: n - moved})
		moved += m
		switch {
		case moved == n:
			return moved, nil
		case err == nil:
			return moved, io.ErrUnexpectedEOF
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return moved, err
		case dst.writeBy.passed() || dst.writeInterrupted.Load():
			return moved, ErrStuck
		}
		if err := src.expired(); err != nil {
			return moved, err
		}
	}
}

// Interrupt ends a read that waits, and every later one, with ErrInterrupted,
// until Resume. Bytes that have come are still read.
func (c *Conn) Interrupt() {
	c.interrupted.Store(true)
	_ = c.tcp.SetReadDeadline(past.time())
}

// InterruptWrite is Interrupt for writes.
func (c *Conn) InterruptWrite() {
	c.writeInterrupted.Store(true)
	_ = c.tcp.SetWriteDeadline(past.time())
}

// Resume ends Interrupt and InterruptWrite. Who interrupts must have returned.
func (c *Conn) Resume() {
	// Deadlines that are wanted are set anew by the read or write that meets them.
	// What was not interrupted has the deadline that was set, or none.
	if c.interrupted.Swap(false) {
		c.readSet = past
	}
	if c.writeInterrupted.Swap(false) {
		c.writeSet = past
	}
}

// Gone reports whether the connection has ended: io.EOF where the peer has closed
// its direction, which it may have done only to say that its request is whole;
// another error where nothing can be said to it any more. Bytes that it sent
// before hide that. It is nil while the connection stands.
func (c *Conn) Gone() error {
	_, err := c.peek()
	return err
}

// Alive reports whether an idle connection is still open and the peer has sent
// nothing, which nobody would have asked for.
func (c *Conn) Alive() bool {
	seen, _ := c.peek()
	return !seen
}

// peek looks without waiting, whatever the deadline, and reports whether there
// is anything to see.
func (c *Conn) peek() (seen bool, err error) {
	if err := c.raw.Control(c.look); err != nil {
		return true, err
	}
	return c.seen, c.seenErr
}

func (c *Conn) lookAt(fd uintptr) {
	var one [1]byte
	n, err := peekFD(int(fd), one[:])
	c.seen, c.seenErr = true, err
	switch {
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINTR):
		c.seen, c.seenErr = false, nil
	case err == nil && n == 0:
		// A reset that follows the end is told by the socket's error only, and once.
		if e, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR); c.reset == nil && err == nil && e != 0 {
			c.reset = syscall.Errno(e)
		}
		if c.seenErr = io.EOF; c.reset != nil {
			c.seenErr = c.reset
		}
	case err == nil && c.secured.Load() != nil && halfClosed(int(fd)):
		// What is to be read is the alert that says so.
		c.seenErr = io.EOF
	}
}
