// Package loop is one thread that serves many sockets with epoll: the load
// generator and the upstream server run on it, because they share the machine
// with what they measure and should cost as little as possible.
//
// It knows sockets and bytes, not what they mean. A Loop belongs to the
// goroutine that calls Wait; nothing in it is safe for concurrent use. Linux
// only.
package loop

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// chunk is read from a socket at once; a handler sees at most this much more
// than it left.
const chunk = 256 << 10

// maxRest is how much a handler may leave unconsumed, and maxOut how much may
// wait to be sent: what is beyond is a peer that does not read.
const (
	maxRest = 1 << 20
	maxOut  = 16 << 20
)

// Loop is an epoll set.
type Loop struct {
	epoll  int
	timer  int // 0 until Alarm
	conns  map[int32]*Conn
	events [128]unix.EpollEvent
	buf    []byte
}

// Handler is what a connection's bytes are for. Receive gets all that has come
// and was not consumed, and returns how much it consumes; the slice is valid
// until it returns. An error closes the connection.
type Handler interface {
	Receive(c *Conn, data []byte) (consumed int, err error)
	// Closed is told why the connection ended; nil where this side closed it.
	Closed(c *Conn, err error)
}

// Conn is a connected socket.
type Conn struct {
	loop     *Loop
	fd       int
	handler  Handler
	accept   func() Handler // of a listener
	rest     []byte         // received, not consumed
	out      []byte         // to be sent
	sent     int            // of out
	blocked  bool           // waits to become writable
	handling bool           // Send need not flush
	gone     bool
}

// New makes an empty set. Close frees it.
func New() (*Loop, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	return &Loop{epoll: fd, conns: map[int32]*Conn{}, buf: make([]byte, chunk)}, nil
}

// Close closes every connection and the set.
func (l *Loop) Close() error {
	for _, c := range l.conns {
		c.Close()
	}
	if l.timer != 0 {
		_ = unix.Close(l.timer)
	}
	return unix.Close(l.epoll)
}

// Listen accepts at a free IPv4 loopback port, and gives each connection a
// handler of its own.
func (l *Loop) Listen(accept func() Handler) (netip.AddrPort, error) {
	fail := func(what string, err error) (netip.AddrPort, error) {
		return netip.AddrPort{}, fmt.Errorf("%s: %w", what, err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return fail("bind", errors.Join(err, unix.Close(fd)))
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return fail("listen", errors.Join(err, unix.Close(fd)))
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return fail("getsockname", errors.Join(err, unix.Close(fd)))
	}
	in, ok := name.(*unix.SockaddrInet4)
	if !ok {
		return fail("getsockname", fmt.Errorf("%T is not IPv4", name))
	}
	return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), uint16(in.Port)), l.add(&Conn{loop: l, fd: fd, accept: accept})
}

// Dial connects to an IPv4 address, and waits until it is.
func (l *Loop) Dial(to netip.AddrPort, h Handler) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	sa := &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	for err = unix.Connect(fd, sa); errors.Is(err, unix.EINTR); err = unix.Connect(fd, sa) {
	}
	if err != nil && !errors.Is(err, unix.EISCONN) {
		return nil, fmt.Errorf("connect to %s: %w", to, errors.Join(err, unix.Close(fd)))
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("set nonblocking: %w", errors.Join(err, unix.Close(fd)))
	}
	c := &Conn{loop: l, fd: fd, handler: h}
	return c, l.add(c)
}

func (l *Loop) add(c *Conn) error {
	if c.accept == nil {
		if err := unix.SetsockoptInt(c.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			return fmt.Errorf("TCP_NODELAY: %w", errors.Join(err, unix.Close(c.fd)))
		}
	}
	if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, c.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(c.fd)}); err != nil {
		return fmt.Errorf("epoll_ctl: %w", errors.Join(err, unix.Close(c.fd)))
	}
	l.conns[int32(c.fd)] = c
	return nil
}

// Alarm makes one Wait return after d at the latest, exact to some
// microseconds; epoll's own timeout counts milliseconds. A new alarm replaces
// the old one; zero or less means at once.
func (l *Loop) Alarm(d time.Duration) error {
	if l.timer == 0 {
		fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
		if err != nil {
			return fmt.Errorf("timerfd_create: %w", err)
		}
		if err := unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
			return fmt.Errorf("epoll_ctl: %w", errors.Join(err, unix.Close(fd)))
		}
		l.timer = fd
	}
	value := unix.NsecToTimespec(int64(max(d, 1)))
	if err := unix.TimerfdSettime(l.timer, 0, &unix.ItimerSpec{Value: value}, nil); err != nil {
		return fmt.Errorf("timerfd_settime: %w", err)
	}
	return nil
}

// Wait handles what has happened, once; where nothing has, it waits for the
// first event, the alarm, or at most the time given (whole milliseconds).
func (l *Loop) Wait(atMost time.Duration) error {
	n, err := unix.EpollWait(l.epoll, l.events[:], int(atMost.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("epoll_wait: %w", err)
	}
	for _, e := range l.events[:max(n, 0)] {
		if l.timer != 0 && e.Fd == int32(l.timer) {
			var expired [8]byte
			_, _ = unix.Read(l.timer, expired[:]) // only to make it unreadable
			continue
		}
		c := l.conns[e.Fd]
		switch {
		case c == nil:
		case c.accept != nil:
			if err := c.acceptAll(); err != nil {
				return err
			}
		default:
			c.ready(e.Events)
		}
	}
	return nil
}

func (c *Conn) acceptAll() error {
	for {
		fd, _, err := unix.Accept4(c.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		default:
		}
		if err := c.loop.add(&Conn{loop: c.loop, fd: fd, handler: c.accept()}); err != nil {
			return err
		}
	}
}

func (c *Conn) ready(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		c.flush()
	}
	if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) == 0 || c.gone {
		return
	}
	n, err := unix.Read(c.fd, c.loop.buf)
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		return
	case err != nil:
		c.end(err)
		return
	case n == 0:
		c.end(io.EOF)
		return
	default:
	}
	data := c.loop.buf[:n]
	if len(c.rest) > 0 {
		c.rest = append(c.rest, data...)
		data = c.rest
	}
	c.handling = true
	used, err := c.handler.Receive(c, data)
	c.handling = false
	left := data[used:]
	if err == nil && len(left) > maxRest {
		err = fmt.Errorf("%d bytes wait for the rest of a message", len(left))
	}
	if err != nil {
		c.end(err)
		return
	}
	c.rest = append(c.rest[:0], left...) // moves to the front where it aliases
	c.flush()
}

// Send queues bytes, which it copies. They leave when the handler returns, or
// at once outside of one.
func (c *Conn) Send(b []byte) {
	if c.gone {
		return
	}
	if c.sent == len(c.out) {
		c.out, c.sent = c.out[:0], 0
		if len(b) >= 16<<10 { // a copy would cost more than the call
			n, err := unix.Write(c.fd, b)
			if err == nil {
				b = b[n:]
			}
		}
	}
	c.out = append(c.out, b...)
	if !c.handling {
		c.flush()
	}
}

func (c *Conn) flush() {
	for c.sent < len(c.out) && !c.gone {
		n, err := unix.Write(c.fd, c.out[c.sent:])
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			if len(c.out)-c.sent > maxOut {
				c.end(fmt.Errorf("the other side does not read: %d bytes wait", len(c.out)-c.sent))
				return
			}
			c.watch(true)
			return
		case err != nil:
			c.end(err)
			return
		default:
			c.sent += n
		}
	}
	c.watch(false)
}

func (c *Conn) watch(writable bool) {
	if c.blocked == writable || c.gone {
		return
	}
	c.blocked = writable
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(c.fd)}
	if writable {
		e.Events |= unix.EPOLLOUT
	}
	if err := unix.EpollCtl(c.loop.epoll, unix.EPOLL_CTL_MOD, c.fd, &e); err != nil {
		c.end(fmt.Errorf("epoll_ctl: %w", err))
	}
}

// Close ends the connection; the handler is told with a nil error.
func (c *Conn) Close() { c.end(nil) }

func (c *Conn) end(err error) {
	if c.gone {
		return
	}
	c.gone = true
	delete(c.loop.conns, int32(c.fd))
	if cerr := unix.Close(c.fd); err == nil && cerr != nil {
		err = cerr
	}
	if c.handler != nil {
		c.handler.Closed(c, err)
	}
}
