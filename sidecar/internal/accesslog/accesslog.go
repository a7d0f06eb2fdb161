// Package accesslog writes one JSON line a request, with Elastic Common Schema
// names, in the form that the collector recognises.
//
// It knows the form of the line and what waits for the writer. Package proxy
// calls it at the end of every request, which never waits for its log line: where
// too much is pending the line is dropped and counted. Lines are gathered and
// written together, so that a line costs neither a system call nor a wake-up.
package accesslog

import (
	"bytes"
	"context"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// MaxPending is how many bytes of lines may wait for the writer, beside those
// that it writes: some 1500 lines. What does not fit is dropped and counted.
const MaxPending = 1 << 20

// A line is written when it has waited for FlushInterval, or when a chunk of
// lines is full. Lines gather in chunks so that a burst neither moves what waits
// nor leaves a large buffer behind.
const (
	FlushInterval = 20 * time.Millisecond
	chunkSize     = 32 << 10
)

// How much of what a stranger wrote is logged: a head may hold 64 KiB, and one
// line must not take the room of hundreds.
const (
	maxLong    = 1024 // of the path, an identity and a reason
	maxMessage = 128  // of the path, in the message
	maxText    = 256  // of every other field
)

// Entry is what is known of a request when it has ended. Byte slices may alias
// a connection's buffer: Write copies.
type Entry struct {
	Start         time.Time
	Duration      time.Duration
	Direction     string // outbound or inbound
	Protocol      string // http, http2, grpc or tcp
	Method        []byte
	Path          []byte // without the query: it may hold secrets
	Host          []byte
	UserAgent     []byte
	RequestID     []byte
	Status        int
	GRPCStatus    int8 // status code in the trailers, -1 where none came; of Protocol grpc only
	Flags         Flags
	Destination   string // <namespace>/<service>:<port>
	Route         string
	Upstream      string // address of the endpoint
	Source        string // address of the caller
	Security      string // mutual_tls or tls, on the side of the mesh; empty: in clear
	PeerIdentity  string // SPIFFE ID of the caller (inbound) or of the endpoint (outbound)
	TLSServerName string // that the caller asked for
	Attempts      int
	BytesIn       int64 // of the request's body
	BytesOut      int64 // of the response's body
	TraceID       []byte
	SpanID        []byte
	ParentID      []byte
	Breaker       string // policy that rejected, or would have
	Denied        string // authorization policy that denied
	Observed      string // what a policy in Observe mode would have denied it for
	Detail        string // why, for local replies
	Config        string // version of the configuration
}

// Log is what waits for one writer. It is safe for concurrent use.
type Log struct {
	same    []byte // the fields that are the same on every line of a request
	end     []byte // those of every other line, and its end
	lines   sync.Pool
	dropped atomic.Uint64
	failed  atomic.Uint64

	mu      sync.Mutex // held for a copy, never while something is written
	waiting int        // bytes in chunks and current
	chunks  [][]byte   // full ones, oldest first
	current []byte
	free    [][]byte // empty ones

	first chan struct{} // a line waits where none did
	full  chan struct{} // a chunk is full
}

// New makes a Log whose lines say that they come from the workload given.
func New(namespace, workload, instance string) *Log {
	l := &Log{first: make(chan struct{}, 1), full: make(chan struct{}, 1)}
	l.lines.New = func() any { return &line{b: make([]byte, 0, 1024)} }
	node := appendText(nil, `,"`+record.ServiceName+`":"`, workload)
	node = appendText(node, `,"service.namespace":"`, namespace)
	node = appendText(node, `,"service.node.name":"`, instance)
	l.same = append([]byte(`","`+record.EventDataset+`":"`+record.DatasetAccess+`"`), node...)
	l.end = append(node, "}\n"...)
	return l
}

// Dropped is how many lines were dropped because MaxPending was reached.
func (l *Log) Dropped() uint64 { return l.dropped.Load() }

// Failed is how many lines the writer refused.
func (l *Log) Failed() uint64 { return l.failed.Load() }

// Run writes the lines to w until ctx ends, then what is still pending. It is the
// only writer. Nothing runs while there is nothing to write.
func (l *Log) Run(ctx context.Context, w io.Writer) error {
	out := writer{log: l, to: w}
	timer := time.NewTimer(FlushInterval)
	defer timer.Stop()
	for more := false; ; {
		if !more {
			timer.Stop()
			select {
			case <-l.first:
			case <-ctx.Done():
			}
		}
		timer.Reset(FlushInterval)
		select {
		case <-timer.C:
			more = out.flush(true)
		case <-l.full:
			more = out.flush(false) // the current chunk may fill as well
		case <-ctx.Done():
			out.flush(true)
			return ctx.Err()
		}
	}
}

// take moves what waits into batch: full chunks, and the current one if all is
// wanted.
func (l *Log) take(batch [][]byte, all bool) [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	batch = append(batch, l.chunks...)
	clear(l.chunks)
	l.chunks = l.chunks[:0]
	if all && len(l.current) > 0 {
		batch = append(batch, l.current)
		l.current = nil
	}
	l.waiting = len(l.current)
	select { // what it said is done
	case <-l.full:
	default:
	}
	return batch
}

// giveBack takes chunks that were written, as many as may be needed soon: what a
// burst took is let go. It reports whether lines wait.
func (l *Log) giveBack(batch [][]byte) (more bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range batch {
		if cap(c) == chunkSize {
			l.free = append(l.free, c[:0])
		}
	}
	if keep := 1 + l.waiting/chunkSize; len(l.free) > keep {
		clear(l.free[keep:])
		l.free = l.free[:keep]
	}
	return l.waiting > 0
}

// writer passes lines on. A writer that took only part of a line leaves a torn
// one; the next begins on a line of its own.
type writer struct {
	log   *Log
	to    io.Writer
	batch [][]byte
	torn  bool
}

// flush writes what waits, and reports whether more does by now.
func (w *writer) flush(all bool) (more bool) {
	w.batch = w.log.take(w.batch[:0], all)
	for _, c := range w.batch {
		w.write(c)
	}
	more = w.log.giveBack(w.batch)
	clear(w.batch)
	return more
}

func (w *writer) write(b []byte) {
	if w.torn {
		if _, err := w.to.Write([]byte{'\n'}); err == nil {
			w.torn = false
		}
	}
	if n, err := w.to.Write(b); err != nil {
		n = min(max(n, 0), len(b))
		w.log.failed.Add(uint64(bytes.Count(b[n:], []byte{'\n'})))
		w.torn = w.torn || n > 0 && b[n-1] != '\n'
	}
}

// add puts a line, which may be in two parts, to what waits.
func (l *Log) add(a, b []byte) {
	n := len(a) + len(b)
	l.mu.Lock()
	if l.waiting+n > MaxPending {
		l.mu.Unlock()
		l.dropped.Add(1)
		return
	}
	first, full := l.waiting == 0, false
	if len(l.current)+n > cap(l.current) {
		if len(l.current) > 0 {
			full = len(l.chunks) == 0
			l.chunks = append(l.chunks, l.current)
		}
		if last := len(l.free) - 1; last >= 0 && n <= chunkSize {
			l.current, l.free[last] = l.free[last], nil
			l.free = l.free[:last]
		} else {
			l.current = make([]byte, 0, max(n, chunkSize))
		}
	}
	l.current = append(append(l.current, a...), b...)
	l.waiting += n
	l.mu.Unlock()
	if first {
		signal(l.first)
	}
	if full {
		signal(l.full)
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is known already
	}
}

// Write logs a request.
func (l *Log) Write(e *Entry) {
	v, ok := l.lines.Get().(*line)
	if !ok {
		panic("accesslog: the pool holds something else")
	}
	v.request(e, l.same)
	l.add(v.b, nil)
	l.lines.Put(v)
}

// WriteRaw logs a line that is JSON already; object must begin with '{' and end
// with '}'. What names the node is added.
func (l *Log) WriteRaw(object []byte) {
	if len(object) < 2 {
		return
	}
	l.add(object[:len(object)-1], l.end)
}
