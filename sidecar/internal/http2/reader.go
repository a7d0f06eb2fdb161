package http2

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

const (
	// bufferSize holds the largest frame and as much behind it.
	bufferSize = 32 << 10
	// smallBuffer is what a connection that cannot wait without a buffer waits
	// with.
	smallBuffer = 2 << 10
)

type buffer [bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// reader is the bytes of a connection that have been read and not yet used. On
// a TCP connection it holds a buffer only while there are some: it waits for
// the socket to be readable and takes one then.
type reader struct {
	nc     net.Conn
	raw    syscall.RawConn // nil if nc is not TCP
	ready  func(fd uintptr) bool
	pooled *buffer
	small  []byte
	buf    []byte
	r, w   int
	err    error // of the last try
	more   bool  // the last read filled the small buffer
}

func (b *reader) init(nc net.Conn, early []byte) {
	b.nc = nc
	if tcp, ok := nc.(*net.TCPConn); ok {
		if raw, err := tcp.SyscallConn(); err == nil {
			b.raw, b.ready = raw, b.try
		}
	}
	if len(early) > 0 {
		b.buf = make([]byte, max(bufferSize, len(early)))
		b.w = copy(b.buf, early)
	}
}

// unread is what has been read and not used, until the next fill.
func (b *reader) unread() []byte { return b.buf[b.r:b.w] }

// fill waits for more bytes. What is unread is less than a frame.
func (b *reader) fill() error {
	if b.raw != nil {
		b.err = nil
		if b.r == b.w {
			b.release()
		}
		if err := b.raw.Read(b.ready); err != nil {
			return err
		}
		return b.err
	}
	if b.r == b.w && !b.more {
		b.release()
		if b.small == nil {
			b.small = make([]byte, smallBuffer)
		}
		b.buf = b.small
	} else {
		b.room()
	}
	n, err := b.nc.Read(b.buf[b.w:])
	b.w += n
	b.more = b.w == len(b.buf)
	switch {
	case n > 0:
		return nil
	case err == nil:
		return io.ErrNoProgress
	default:
		return err
	}
}

// try reads what has come and reports whether that ended the wait.
func (b *reader) try(fd uintptr) bool {
	b.room()
	for {
		n, err := syscall.Read(int(fd), b.buf[b.w:])
		switch {
		case n > 0:
			b.w += n
			return true
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			if b.r == b.w {
				b.release()
			}
			return false
		case err != nil:
			b.err = os.NewSyscallError("read", err)
			return true
		default:
			b.err = io.EOF
			return true
		}
	}
}

// room makes room to read into.
func (b *reader) room() {
	switch {
	case b.buf == nil:
		b.take()
	case len(b.buf) < bufferSize: // the small one
		old := b.buf[b.r:b.w]
		b.take()
		b.w = copy(b.buf, old)
		b.r = 0
	case b.r == b.w:
		b.r, b.w = 0, 0
	case b.r > 0 && len(b.buf)-b.w < len(b.buf)/2:
		b.w = copy(b.buf, b.buf[b.r:b.w])
		b.r = 0
	}
}

func (b *reader) take() {
	p, ok := buffers.Get().(*buffer)
	if !ok {
		panic("http2: the pool holds something else than buffers")
	}
	b.pooled, b.buf = p, p[:]
}

// release gives the buffer back; nothing is unread.
func (b *reader) release() {
	if b.pooled != nil {
		buffers.Put(b.pooled)
		b.pooled = nil
	}
	b.buf, b.r, b.w = nil, 0, 0
}

// discard reads and forgets until the peer ends, the read deadline, or n bytes.
func (b *reader) discard(n int) {
	for n > 0 {
		b.r = b.w
		if b.fill() != nil {
			return
		}
		n -= b.w - b.r
	}
}
