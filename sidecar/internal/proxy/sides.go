package proxy

import (
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// downstream is the side of an exchange that called: what is left of its
// request, and the way its response goes. An HTTP/1.1 connection is one, request
// after request, and so is each stream of an HTTP/2 connection.
//
// Its body is read by one goroutine at a time, the exchange's or its pump's;
// everything else is the exchange's own, except interruptBody.
type downstream interface {
	// readBody takes the next span of the request's body, which is valid until the
	// next call. Without wait it returns at once, with nothing where nothing has
	// come. done says that the body is over.
	readBody(wait bool) (data []byte, done bool, err error)
	// bodyTrailers of a body that is done.
	bodyTrailers() []http1.Header
	// interruptBody wakes a readBody that waits; it may fail from then on.
	interruptBody()
	// resumeBody ends that: another attempt reads on.
	resumeBody()
	// gone reports whether the client no longer waits for an answer.
	gone() bool

	// interim sends a response of 1xx, which another one follows.
	interim(h *http1.Head) error
	// writeHead begins the response; end says that nothing follows it. The edit
	// is the exchange's, and may be changed.
	writeHead(h *http1.Head, e *http1.Edit, end bool) error
	// writeBody sends a span of the body; end says that it is the last and that no
	// trailers follow it. An empty last span is fine.
	writeBody(b []byte, end bool) error
	// writeTrailers ends the body.
	writeTrailers(t []http1.Header) error
	// flush sends what is buffered. Every write before it may have waited for it.
	flush() error
	// cut ends a response that is not whole so that the client can tell.
	cut()
}

// callee is the side of an attempt that is called: a connection or a stream that
// upstream has lent. One goroutine writes and one reads, which may be the same.
type callee interface {
	// writeHead begins the request; end says that nothing follows it.
	writeHead(h *http1.Head, e *http1.Edit, end bool) error
	writeBody(b []byte, end bool) error
	writeTrailers(t []http1.Header) error
	flush() error
	// sent reports whether any byte of the request may have left.
	sent() bool
	// writeBy is until when writes may wait; zero is for ever.
	writeBy(t time.Time)
	// interruptWrite wakes a write that waits.
	interruptWrite()

	// readHead waits for the next head of the response until by, which may be
	// before the exchange gives up: after os.ErrDeadlineExceeded it can be called
	// again.
	readHead(h *http1.Head, by time.Time) error
	// readBody is that of downstream, waiting until by.
	readBody(wait bool, by time.Time) (data []byte, done bool, err error)
	bodyTrailers() []http1.Header
	// wake ends a read that waits, for good; for other goroutines.
	wake()
	// unprocessed reports, after an error, that the callee said it has not looked
	// at the request (RFC 9113, 8.7).
	unprocessed() bool

	// release ends the attempt. keep says that the exchange came to its end on this
	// side, so that the connection is fit for another.
	release(keep bool)
}
