package proxy

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// bufferSize of a pooled read buffer. A head that needs more makes it grow, up
// to what http1.Limits allows; grown buffers do not go back to the pool.
const bufferSize = 16 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// reader is the bytes of a connection that have been read and not yet used. It
// holds a buffer only while there are some, so an idle connection holds none.
//
//	buf: [ pinned head | used | unread      | free ]
//	       0        base      r           w
type reader struct {
	nc      *net.TCPConn
	buf     []byte
	pooled  *[]byte
	base    int
	r, w    int
	raw     syscall.RawConn
	ready   func(fd uintptr) bool
	waitErr error
}

// watch makes wait, arrived and gone possible.
func (b *reader) watch() (err error) {
	b.raw, err = b.nc.SyscallConn()
	b.ready = b.peek
	return err
}

// wait returns when there is a byte to read, an error, or the read deadline,
// without holding a buffer meanwhile. A byte that has come counts even if the
// deadline has passed.
func (b *reader) wait() error {
	if b.r < b.w {
		return nil
	}
	b.waitErr = nil
	if err := b.raw.Read(b.ready); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) && b.arrived() {
			return nil
		}
		return err
	}
	return b.waitErr
}

// arrived reports whether there is a byte to read.
func (b *reader) arrived() bool { return b.look() && b.waitErr == nil }

// gone reports whether the peer has ended the connection, or we have. Bytes that
// it sent before hide that.
func (b *reader) gone() bool { return b.look() && b.waitErr != nil }

// look peeks without waiting and reports whether there was anything to see.
func (b *reader) look() (seen bool) {
	b.waitErr = nil
	if err := b.raw.Control(func(fd uintptr) { seen = b.peek(fd) }); err != nil {
		b.waitErr = err
		return true
	}
	return seen
}

func (b *reader) peek(fd uintptr) bool {
	var one [1]byte
	n, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	switch {
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINTR):
		return false
	case err != nil:
		b.waitErr = err
	case n == 0:
		b.waitErr = io.EOF
	}
	return true
}

// unread bytes; valid until the next call of fill, pin or release.
func (b *reader) unread() []byte { return b.buf[b.r:b.w] }

func (b *reader) use(n int) { b.r += n }

// fill reads more. It grows a full buffer, so the caller bounds what it asks
// for.
func (b *reader) fill() error {
	if b.buf == nil {
		p, ok := buffers.Get().(*[]byte)
		if !ok {
			panic("proxy: the pool holds something else than buffers")
		}
		b.pooled, b.buf = p, *p
	}
	if b.r == b.w {
		b.r, b.w = b.base, b.base
	}
	if b.w == len(b.buf) {
		if b.r > b.base {
			b.w = b.base + copy(b.buf[b.base:], b.buf[b.r:b.w])
			b.r = b.base
		} else {
			grown := make([]byte, 2*len(b.buf))
			copy(grown, b.buf[:b.w])
			if b.base > 0 {
				b.giveBackLater()
			}
			b.giveBack()
			b.buf = grown
		}
	}
	n, err := b.nc.Read(b.buf[b.w:])
	b.w += n
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// pin keeps the first n unread bytes where they are until unpin: a parsed head
// points into them. What follows stays unread.
func (b *reader) pin(n int) {
	b.use(n)
	b.base = b.r
	if len(b.buf)-b.base >= bufferSize/4 {
		return
	}
	// Too little room behind the head to read a body into: leave the head where
	// it is, and go on in a buffer of its own.
	rest := b.buf[b.r:b.w]
	fresh := make([]byte, max(bufferSize, 2*len(rest)))
	b.w = copy(fresh, rest)
	b.giveBackLater()
	b.buf, b.base, b.r = fresh, 0, 0
}

// unpin ends pin and gives the buffer back if nothing is unread.
func (b *reader) unpin() {
	b.base = 0
	if b.r == b.w {
		b.release()
	}
}

func (b *reader) release() {
	b.giveBack()
	b.buf, b.base, b.r, b.w = nil, 0, 0, 0
}

func (b *reader) giveBack() {
	if b.pooled != nil {
		buffers.Put(b.pooled)
		b.pooled = nil
	}
}

// giveBackLater forgets a pooled buffer that a head still points into; the
// garbage collector takes it.
func (b *reader) giveBackLater() { b.pooled = nil }
