package proxy

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

// minSplice is from how many bytes on the kernel carries the rest of a body: two
// system calls more than a small one needs.
const minSplice = 32 << 10

// maxSplice is how many bytes a client has writeTimeout for.
const maxSplice = 256 << 10

// unread is how many bytes of the response's body are still on the upstream's
// connection where the kernel can carry them to the client's: both sides speak
// HTTP/1.1 in clear, and the body is framed by its length on both. Else it is 0.
func (f *forwarding) unread() int64 {
	if f.up != callee(&f.h1) {
		return 0
	}
	d, ok := f.down.(*h1Down)
	if !ok || d.framing != http1.Length || !f.h1.c.Empty() || d.conn.TLS() != nil || f.h1.c.TLS() != nil {
		return 0
	}
	return f.h1.body.Left()
}

// splice carries n bytes of the body to the client, whose response has been
// flushed.
func (f *forwarding) splice(n int64) error {
	d, ok := f.down.(*h1Down)
	if !ok {
		panic("proxy: bytes to splice to a client that is not HTTP/1.1")
	}
	for n > 0 {
		f.h1.c.ReadBy(f.nextLook())
		moved, err := wire.Splice(&d.conn.Conn, &f.h1.c.Conn, min(n, maxSplice), sooner(f.until, time.Now().Add(writeTimeout)))
		n -= moved
		f.bytesOut += moved
		f.h1.body.Passed(moved)
		switch {
		case errors.Is(err, wire.ErrStuck) && !f.until.IsZero() && !time.Now().Before(f.until):
			return os.ErrDeadlineExceeded
		case errors.Is(err, wire.ErrStuck):
			return errClientStuck
		}
		if err = f.patient(err); err != nil {
			// The error of the kernel does not say whose it is.
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.ErrUnexpectedEOF) && d.conn.Gone() != nil {
				return errClientGone
			}
			return err
		}
	}
	return nil
}
