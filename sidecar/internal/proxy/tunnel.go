package proxy

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

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// tunnelling carries bytes both ways between two connections until both sides
// have ended, or one has failed.
//
//   - Between two TCP connections the kernel moves them (splice); they do not
//     pass through this process.
//   - The end of one side's bytes is passed on at once, and the other direction
//     goes on.
//   - A failure resets both connections, so that neither peer takes what it got
//     for all there was. That holds for the end of this process too: closing
//     means a reset until both sides have ended in order.
//   - Silence on both sides for the idle time is a failure, and so is a peer that
//     takes nothing for as long.
type tunnelling struct {
	down, up net.Conn
	early    []byte // of down, sent first
	release  func() // called once early has been sent; may be nil
	idle     time.Duration
	first    func(server bool) // told who spoke first; may be nil

	last  atomic.Int64 // when bytes were carried, in ns since began
	began time.Time
	spoke atomic.Bool
	once  sync.Once

	// What run leaves behind: the bytes that were handed to the other side, and how
	// the tunnel ended where not in order.
	in, out int64 // from down to up, and back
	flags   accesslog.Flags
	detail  string
}

// tunnel is a tunnelling with nothing to send first.
func tunnel(down, up net.Conn) (in, out int64) {
	w := tunnelling{down: down, up: up, idle: tcpIdleTimeout}
	w.run()
	return w.in, w.out
}

func (w *tunnelling) run() {
	w.began = time.Now()
	resetOnClose(w.down, true)
	resetOnClose(w.up, true)
	var wg sync.WaitGroup
	wg.Go(func() { w.in = w.direction(w.up, w.down) })
	w.out = w.direction(w.down, w.up)
	wg.Wait()
	if w.flags == 0 && w.detail == "" {
		resetOnClose(w.down, false)
		resetOnClose(w.up, false)
	}
}

// direction copies from src to dst until src ends and returns how many bytes dst
// took.
func (w *tunnelling) direction(dst, src net.Conn) (n int64) {
	if src == w.down && len(w.early) > 0 {
		_ = dst.SetWriteDeadline(time.Now().Add(w.idle))
		m, err := dst.Write(w.early)
		n += int64(m)
		w.touch(int64(m))
		if err != nil {
			w.fail(dst, stuckWrite(err))
			return n
		}
	}
	if src == w.down && w.release != nil {
		w.early = nil
		w.release()
	}
	copying, round := w.copy, min(tcpIdleCheck, w.idle/4)
	var waits *readiness
	if s, d, ok := bothTCP(src, dst); ok {
		copying = func(net.Conn, net.Conn) (int64, net.Conn, error) { return splice(d, s) }
		waits = newReadiness(s)
	}
	if w.first != nil {
		copying = w.watch(copying)
	}
	for {
		// Now and then the copy returns to say how far it has come. The write deadline
		// cannot pass before the read deadline does, unless a write has been stuck.
		now := time.Now()
		stuck := now.Add(w.idle)
		if err := errors.Join(src.SetReadDeadline(now.Add(round)), dst.SetWriteDeadline(stuck)); err != nil {
			w.fail(src, err)
			return n
		}
		var m int64
		var culprit net.Conn
		var err error
		if waits != nil && (w.first == nil || w.spoke.Load()) {
			// A round of splice holds a pipe, which is two descriptors, also while it
			// waits: so it begins when there is something to carry, and is short.
			if err = waits.wait(); err == nil {
				err = src.SetReadDeadline(time.Now().Add(min(spliceRound, round)))
			}
			culprit = src
		}
		if err == nil {
			m, culprit, err = copying(dst, src)
		}
		n += m
		w.touch(m)
		switch {
		case err == nil: // all that src had to say
			if err := closeWrite(dst); err != nil {
				w.fail(dst, err)
			}
			return n
		case !errors.Is(err, os.ErrDeadlineExceeded):
			w.fail(culprit, err)
			return n
		case w.silent() || !time.Now().Before(stuck):
			w.fail(nil, err)
			return n
		}
	}
}

func (w *tunnelling) touch(n int64) {
	if n > 0 {
		w.last.Store(int64(time.Since(w.began)))
	}
}

func (w *tunnelling) silent() bool { return time.Since(w.began)-time.Duration(w.last.Load()) >= w.idle }

// fail ends both directions because of err, which culprit met; nil is silence.
// Only the first failure counts: it causes another one.
func (w *tunnelling) fail(culprit net.Conn, err error) {
	w.once.Do(func() {
		switch {
		case culprit == nil, errors.Is(err, errStuck):
			w.flags, w.detail = accesslog.SI, "no bytes were carried for "+w.idle.String()
		case errors.Is(err, net.ErrClosed):
			w.flags, w.detail = accesslog.DC, "the proxy ended before the connection did"
		case culprit == w.down:
			w.flags, w.detail = accesslog.DC, "the client's connection failed: "+cause(err)
		default:
			w.flags, w.detail = accesslog.UC, "the connection to the endpoint failed: "+cause(err)
		}
		abort(w.down)
		abort(w.up)
	})
}

// chunks are for what the kernel cannot carry by itself: the content of a TLS
// record fits. Each silent direction holds one.
var chunks = sync.Pool{New: func() any { return new(chunk) }}

type chunk [16 << 10]byte

func newChunk() *chunk {
	b, ok := chunks.Get().(*chunk)
	if !ok {
		panic("proxy: the pool of chunks holds something else")
	}
	return b
}

// spliceRound is how long a round of splice may last: what pauses for longer gives
// its pipe back.
const spliceRound = 100 * time.Millisecond

// maxGreeting is how much of the first bytes is carried to see whose they are.
const maxGreeting = 512

// copy is one round of carrying through this process. It returns nil at the end
// of src, and else the connection that the error came from.
func (w *tunnelling) copy(dst, src net.Conn) (n int64, culprit net.Conn, err error) {
	b := newChunk()
	defer chunks.Put(b)
	for {
		m, rerr := src.Read(b[:])
		if m > 0 {
			written, werr := dst.Write(b[:m])
			n += int64(written)
			if werr != nil {
				return n, dst, stuckWrite(werr)
			}
			w.touch(n)
			// What was read counts for the peer that sent it, so the round may go on.
			if rerr == nil {
				continue
			}
		}
		if errors.Is(rerr, io.EOF) {
			return n, nil, nil
		}
		if rerr != nil {
			return n, src, rerr
		}
	}
}

// watch carries the first bytes through this process, to see which side speaks
// first, and what follows as before.
func (w *tunnelling) watch(then func(dst, src net.Conn) (int64, net.Conn, error)) func(dst, src net.Conn) (int64, net.Conn, error) {
	var seen bool
	return func(dst, src net.Conn) (int64, net.Conn, error) {
		if seen || w.spoke.Load() {
			return then(dst, src)
		}
		var b [maxGreeting]byte
		m, rerr := src.Read(b[:])
		if m > 0 {
			seen = true
			if w.spoke.CompareAndSwap(false, true) {
				w.first(src == w.up)
			}
		}
		written, werr := 0, error(nil)
		if m > 0 {
			written, werr = dst.Write(b[:m])
		}
		switch {
		case werr != nil:
			return int64(written), dst, stuckWrite(werr)
		case errors.Is(rerr, io.EOF):
			return int64(written), nil, nil
		case rerr != nil:
			return int64(written), src, rerr
		}
		n, culprit, err := then(dst, src)
		return int64(written) + n, culprit, err
	}
}

// errStuck is a write that has passed its deadline: what it did not write is
// lost, so that nothing can follow. It is no deadline to its reader.
var errStuck = errors.New("it takes no bytes")

func stuckWrite(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errStuck
	}
	return err
}

// readiness waits until a connection has something to read, or has ended.
type readiness struct {
	raw  syscall.RawConn
	peek func(fd uintptr) bool
	err  error // that peek met: the system tells of a reset once
}

// newReadiness is nil where c is closed already, which the copy will find.
func newReadiness(c *net.TCPConn) *readiness {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	r := &readiness{raw: raw}
	r.peek = func(fd uintptr) bool {
		var one [1]byte
		_, _, r.err = syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return !errors.Is(r.err, syscall.EAGAIN) && !errors.Is(r.err, syscall.EINTR)
	}
	return r
}

// wait until there is something, the connection has failed, or the read deadline
// has passed.
func (r *readiness) wait() error {
	r.err = nil
	if err := r.raw.Read(r.peek); err != nil {
		return err
	}
	if r.err != nil {
		return os.NewSyscallError("recvfrom", r.err)
	}
	return nil
}

// splice is one round of carrying in the kernel.
func splice(dst, src *net.TCPConn) (n int64, culprit net.Conn, err error) {
	if n, err = io.Copy(dst, src); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return n, nil, err
	}
	// The error does not say whose it is. Reading never gives EPIPE, and a
	// connection that was reset or timed out is gone.
	switch {
	case errors.Is(err, syscall.EPIPE):
		return n, dst, err
	case wire.Ended(src):
		return n, src, err
	case wire.Ended(dst):
		return n, dst, err
	}
	return n, src, err
}

func bothTCP(a, b net.Conn) (x, y *net.TCPConn, ok bool) {
	x, xok := a.(*net.TCPConn)
	y, yok := b.(*net.TCPConn)
	return x, y, xok && yok
}

// socket is the TCP connection beneath c; nil where there is none.
func socket(c net.Conn) *net.TCPConn {
	switch c := c.(type) {
	case *net.TCPConn:
		return c
	case *replayed:
		return c.TCPConn
	case *tls.Conn:
		return socket(c.NetConn())
	}
	return nil
}

// resetOnClose makes closing c a reset, also where the kernel does it because the
// process has died, or an orderly end again.
func resetOnClose(c net.Conn, reset bool) {
	if s := socket(c); s != nil {
		linger := -1
		if reset {
			linger = 0
		}
		// It fails on a connection that is gone, which needs none.
		_ = s.SetLinger(linger)
	}
}

// abort resets c. A tls.Conn is not closed itself: its last record would say that
// the end is in order.
func abort(c net.Conn) {
	resetOnClose(c, true)
	if s := socket(c); s != nil {
		_ = s.Close()
		return
	}
	_ = c.Close()
}

// closeWrite tells the peer of c that no more bytes come. A peer that has gone
// meanwhile is not told; whoever reads from it finds out.
func closeWrite(c net.Conn) error {
	if h, ok := c.(interface{ CloseWrite() error }); ok {
		if err := h.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) {
			return err
		}
		return nil
	}
	return errors.New("it cannot be closed in one direction")
}
