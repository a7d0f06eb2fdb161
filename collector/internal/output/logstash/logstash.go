// Package logstash is the output to Logstash's beats input, and whatever else takes
// lumberjack version 2.
//
// It knows windows, partial and keep-alive acknowledgements, and how Beats lay out
// a document; the pipeline, which calls it, owns retries and the circuit breaker.
// The wire is its own and not go-lumber's client: that waits for a busy server
// without end, cannot be interrupted, and takes no documents that are encoded
// already.
//
// An acknowledgement means that Logstash's queue has the event, which is memory
// unless queue.type is persisted. Logstash repeats an acknowledgement, or sends 0,
// to say that it is busy. Events are sent again when their acknowledgement was lost,
// so Logstash can see them twice.
package logstash

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/klauspost/compress/zlib"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	maxWindowBytes = 8 << 20  // of a window's frames before compression
	maxDocument    = 16 << 20 // bytes; a larger one is rejected
	maxReason      = 512      // bytes of another's words that are passed on
)

// Output sends records to Logstash. It takes one Write at a time, which keeps the
// records of a stream in order.
type Output struct {
	cfg   Config
	log   *slog.Logger
	hosts []*host
	turn  int

	enc    *encoder
	zlib   *zlib.Writer
	frames []byte // of the next window
	packed bytes.Buffer

	// The batch under way.
	verdicts []verdict
	reasons  map[int]string
	at       int
}

type verdict uint8

const (
	pending verdict = iota
	acknowledged
	rejected
)

type host struct {
	address string
	conn    *conn
	rest    output.Rest // it is left alone, unless there is no other
}

// conn is a connection whose windows are all acknowledged between Writes.
type conn struct {
	raw net.Conn // below TLS, closed to interrupt
	rw  net.Conn
}

// window is one on its way.
type window struct {
	indices []int // of its records in the batch
	acked   int
}

// permanentError comes again until somebody changes the configuration.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// New makes the output. It does not connect and reads no files; a server that is
// away is the first Write's matter.
func New(cfg Config, log *slog.Logger) (*Output, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	o := &Output{cfg: cfg, log: log, enc: newEncoder(cfg.Beat, cfg.Version), reasons: map[int]string{}}
	for _, address := range cfg.Hosts {
		o.hosts = append(o.hosts, &host{address: address})
	}
	return o, nil
}

// Kind returns "logstash".
func (*Output) Kind() string { return "logstash" }

// Traits are one Write at a time; windows on their way give the throughput.
func (*Output) Traits() output.Traits { return output.Traits{Concurrency: 1} }

// Close closes the connections.
func (o *Output) Close() error {
	for _, h := range o.hosts {
		h.drop()
	}
	return nil
}

func (h *host) drop() {
	if h.conn != nil {
		h.conn.close()
		h.conn = nil
	}
}

func (h *host) failed() {
	h.drop()
	h.rest.Failed(time.Now())
}

// Write sends the batch as windows to one host. Events that were acknowledged are,
// even if the connection broke after that.
func (o *Output) Write(ctx context.Context, batch []*record.Record) output.Result {
	o.verdicts = append(o.verdicts[:0], make([]verdict, len(batch))...)
	clear(o.reasons)
	o.at = 0
	err := o.ship(ctx, batch)
	var result output.Result
	settled := false
	for i, v := range o.verdicts {
		switch v {
		case pending:
			result.Retry = append(result.Retry, i)
		case acknowledged:
			settled = true
		case rejected:
			result.Rejected = append(result.Rejected, output.Rejection{Index: i, Reason: o.reasons[i]})
		}
	}
	if err == nil {
		return result
	}
	if !settled {
		var refused permanentError
		return output.Result{Err: err, Permanent: errors.As(err, &refused)}
	}
	o.log.Warn("some events were not acknowledged; they are sent again", "event.remaining", len(result.Retry), "event.total", len(batch), "error.message", err.Error())
	return result
}

func (o *Output) ship(ctx context.Context, batch []*record.Record) error {
	next := o.next(batch)
	if len(next.indices) == 0 {
		return nil
	}
	h, err := o.connect(ctx)
	if err != nil {
		return err
	}
	interrupt := context.AfterFunc(ctx, func() { _ = h.conn.raw.Close() }) // the error is ctx's
	defer interrupt()
	err = o.exchange(h.conn, next, batch)
	switch {
	case err == nil:
		h.rest.Worked()
		return nil
	case ctx.Err() != nil: // it broke because we broke it
		h.drop()
		return fmt.Errorf("logstash %s: %w", h.address, context.Cause(ctx))
	default:
		h.failed()
		return explain(h.address, err)
	}
}

// exchange sends windows and reads acknowledgements by turns. The server's answers
// are so small that they fit into the buffers of the connection meanwhile.
func (o *Output) exchange(c *conn, next window, batch []*record.Record) error {
	var open []window
	progress := time.Now()
	for len(next.indices) > 0 || len(open) > 0 {
		if len(next.indices) > 0 && len(open) < o.cfg.Pipelining {
			if err := o.send(c, len(next.indices)); err != nil {
				return err
			}
			if len(open) == 0 {
				progress = time.Now()
			}
			open = append(open, next)
			next = o.next(batch)
			continue
		}
		limit := progress.Add(o.cfg.BusyTimeout)
		if deadline := time.Now().Add(o.cfg.AckTimeout); deadline.Before(limit) {
			limit = deadline
		}
		if err := c.rw.SetReadDeadline(limit); err != nil {
			return err
		}
		seq, err := readAck(c.rw)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("no acknowledgement within %s (ackTimeout), or no event more within %s (busyTimeout): check that Logstash is not overloaded or blocked by its own outputs: %w", o.cfg.AckTimeout, o.cfg.BusyTimeout, err)
		}
		if err != nil {
			return err
		}
		w := &open[0]
		switch n := int64(seq); {
		case n > int64(len(w.indices)):
			return fmt.Errorf("the server acknowledges event %d of a window of %d", n, len(w.indices))
		case n <= int64(w.acked): // it is busy
			if !time.Now().Before(progress.Add(o.cfg.BusyTimeout)) {
				return fmt.Errorf("the server has been busy for %s (busyTimeout) without taking one event more", o.cfg.BusyTimeout)
			}
			continue
		}
		for _, i := range w.indices[w.acked:seq] {
			o.verdicts[i] = acknowledged
		}
		w.acked = int(seq)
		progress = time.Now()
		if w.acked == len(w.indices) {
			open = open[1:]
		}
	}
	return nil
}

// next encodes the next window into o.frames; without indices there is none.
// Records that cannot be sent are rejected here.
func (o *Output) next(batch []*record.Record) window {
	var w window
	o.frames = o.frames[:0]
	for ; o.at < len(batch) && len(w.indices) < o.cfg.Window; o.at++ {
		before := len(o.frames)
		o.frames = beginDocument(o.frames, len(w.indices)+1)
		var err error
		o.frames, err = o.enc.document(o.frames, batch[o.at])
		size := len(o.frames) - before - documentLen
		if err == nil && size > maxDocument {
			err = fmt.Errorf("it is %d bytes, more than %d", size, maxDocument)
		}
		if err != nil {
			o.frames = o.frames[:before]
			o.verdicts[o.at] = rejected
			o.reasons[o.at] = "cannot be sent as JSON: " + shorten(err.Error())
			continue
		}
		if len(o.frames) > maxWindowBytes && before > 0 {
			o.frames = o.frames[:before]
			return w
		}
		endDocument(o.frames, before)
		if w.indices == nil {
			w.indices = make([]int, 0, min(o.cfg.Window, len(batch)-o.at))
		}
		w.indices = append(w.indices, o.at)
	}
	return w
}

// send writes the window in o.frames.
func (o *Output) send(c *conn, count int) error {
	o.packed.Reset()
	_, _ = o.packed.Write(appendWindow(o.packed.AvailableBuffer(), count)) // a buffer never fails
	body := o.frames
	if level := *o.cfg.CompressionLevel; level > 0 {
		_, _ = o.packed.Write([]byte{'2', 'C', 0, 0, 0, 0})
		before := o.packed.Len()
		if o.zlib == nil {
			w, err := zlib.NewWriterLevel(&o.packed, level)
			if err != nil {
				return fmt.Errorf("zlib: %w", err)
			}
			o.zlib = w
		} else {
			o.zlib.Reset(&o.packed)
		}
		if _, err := o.zlib.Write(o.frames); err != nil {
			return fmt.Errorf("zlib: %w", err)
		}
		if err := o.zlib.Close(); err != nil {
			return fmt.Errorf("zlib: %w", err)
		}
		all := o.packed.Bytes()
		binary.BigEndian.PutUint32(all[before-4:], uint32(len(all)-before))
		body = nil
	}
	if err := c.rw.SetWriteDeadline(time.Now().Add(o.cfg.WriteTimeout)); err != nil {
		return err
	}
	frames := net.Buffers{o.packed.Bytes()}
	if len(body) > 0 {
		frames = append(frames, body)
	}
	if _, err := frames.WriteTo(c.rw); err != nil {
		return c.unwritten(err)
	}
	return nil
}

// unwritten returns why a window could not be written: what the server said before
// it hung up (that it does not trust our certificate) tells more than the broken
// pipe.
func (c *conn) unwritten(err error) error {
	if c.rw.SetReadDeadline(time.Now().Add(200*time.Millisecond)) == nil {
		if _, said := c.rw.Read(make([]byte, 1)); said != nil {
			if remedy, _ := tlsfiles.Explain(said); remedy != "" {
				err = said
			}
		}
	}
	return fmt.Errorf("a window could not be sent: %w", err)
}

// connect returns a host with a connection: the one whose turn it is, or another if
// that one cannot be reached.
func (o *Output) connect(ctx context.Context) (*host, error) {
	now := time.Now()
	var fit, rest []*host
	for i := range o.hosts {
		h := o.hosts[(o.turn+i)%len(o.hosts)]
		if h.rest.Resting(now) {
			rest = append(rest, h)
		} else {
			fit = append(fit, h)
		}
	}
	if o.cfg.LoadBalance {
		o.turn = (o.turn + 1) % len(o.hosts)
	}
	var errs []error
	permanent := true
	for _, h := range append(fit, rest...) {
		if h.conn != nil && h.conn.alive() {
			return h, nil
		}
		h.drop()
		c, err := o.dial(ctx, h.address)
		if err == nil {
			h.conn = c
			return h, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("logstash %s: %w", h.address, context.Cause(ctx))
		}
		h.failed()
		err = explain(h.address, err)
		var p permanentError
		permanent = permanent && errors.As(err, &p)
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if permanent {
		return nil, permanentError{err}
	}
	return nil, err
}

// dial connects. Certificates are read here.
func (o *Output) dial(ctx context.Context, address string) (*conn, error) {
	var config *tls.Config
	if o.cfg.TLS {
		var err error
		if config, err = o.cfg.files().Config("logstash"); err != nil {
			return nil, permanentError{err}
		}
		if config.ServerName == "" {
			if config.ServerName, _, err = net.SplitHostPort(address); err != nil {
				return nil, err
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, o.cfg.ConnectTimeout)
	defer cancel()
	raw, err := (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &conn{raw: raw, rw: raw}
	if config != nil {
		t := tls.Client(raw, config)
		if err := t.HandshakeContext(ctx); err != nil {
			_ = raw.Close() // the first error counts
			return nil, err
		}
		c.rw = t
	}
	return c, nil
}

// alive reports whether the server has neither closed an idle connection nor said
// something that belongs to no window.
func (c *conn) alive() bool {
	if err := c.rw.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		return false
	}
	_, err := c.rw.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

func (c *conn) close() {
	_ = c.raw.SetDeadline(time.Now().Add(time.Second)) // for the farewell of TLS
	_ = c.rw.Close()                                   // a connection that is given up may be broken
}

// explain adds the host and the remedy, and marks what is permanent.
func explain(address string, err error) error {
	remedy, permanent := tlsfiles.Explain(err)
	if remedy != "" {
		err = fmt.Errorf("%s: %w", remedy, err)
	}
	var already permanentError
	err, permanent = fmt.Errorf("logstash %s: %w", address, err), permanent || errors.As(err, &already)
	if permanent {
		return permanentError{err}
	}
	return err
}

func shorten(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason] + "…"
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

var _ output.Output = (*Output)(nil)
