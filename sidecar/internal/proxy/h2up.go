package proxy

import (
	"context"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http2"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/upstream"
)

// h2Up is the called side of an attempt over HTTP/2: a stream of a connection
// that others use too.
type h2Up struct {
	s     upstream.Stream
	by    time.Time
	wrote bool
}

// open borrows a stream for the attempt.
func (u *h2Up) open(e *upstream.Endpoint, by time.Time) (err error) {
	u.s, err = e.Open(context.Background(), by)
	u.wrote = false
	return err
}

func (u *h2Up) writeHead(h *http1.Head, e *http1.Edit, end bool) error {
	err := u.s.WriteHead(h, e, end)
	u.wrote = err == nil // a head is queued whole or not at all
	return err
}

func (u *h2Up) writeBody(b []byte, end bool) error {
	if len(b) == 0 && !end {
		return nil
	}
	return u.s.WriteData(b, end, u.by)
}

func (u *h2Up) writeTrailers(t []http1.Header) error { return u.s.WriteTrailers(t) }

func (u *h2Up) flush() error { return u.s.Flush() }

func (u *h2Up) sent() bool { return u.wrote }

func (u *h2Up) writeBy(t time.Time) { u.by = t }

// interruptWrite gives the stream up: what waits for its window fails.
func (u *h2Up) interruptWrite() { u.s.Reset(http2.Cancel) }

func (u *h2Up) readHead(h *http1.Head, by time.Time) error { return u.s.ReadHead(h, by) }

func (u *h2Up) readBody(wait bool, by time.Time) ([]byte, bool, error) {
	return u.s.ReadBody(wait, by)
}

func (u *h2Up) bodyTrailers() []http1.Header { return u.s.Trailers() }

func (u *h2Up) wake() { u.s.Interrupt() }

func (u *h2Up) unprocessed() bool { return u.s.Unprocessed() }

func (u *h2Up) release(bool) {
	u.s.Close(time.Now())
	u.s = upstream.Stream{}
}
