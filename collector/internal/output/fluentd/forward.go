package fluentd

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/outrigger-mesh/outrigger/collector/internal/deflate"
	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// forward sends chunks. It is for one goroutine.
type forward struct {
	cfg     Config
	log     *slog.Logger
	tag     tag
	servers []*server
	limit   int // bytes of a chunk's entries; only ever smaller

	enc    *encoder
	gzip   *deflate.Writer
	zstd   *zstd.Encoder
	packed []byte
	spans  []span // of packed, one an entry
	small  bytes.Buffer
	head   []byte
	option []byte
	key    []byte

	// The batch under way.
	groups   []group // the first used ones
	used     int
	byTag    map[string]int
	verdicts []verdict
	reasons  map[int]string
	current  int // of groups
	at       int // in the current group
	ready    chunk
	more     bool // ready is to be sent
	dropped  bool // the server did not take a record that is now rejected
}

type group struct {
	tag     string
	indices []int
}

type verdict uint8

const (
	pending verdict = iota
	acknowledged
	rejected
)

// server is one of those to send to.
type server struct {
	address string
	weight  int
	credit  int // for turns by weight
	conn    *conn
	rest    output.Rest // it is left alone, unless there is no other
}

// chunk is one on its way.
type chunk struct {
	id       string
	tag      string
	number   int   // in its flight
	indices  []int // of its records in the batch; none in a probe
	size     int   // bytes of the entries
	deadline time.Time
}

func newForward(cfg Config, log *slog.Logger, t tag) *forward {
	f := &forward{cfg: cfg, log: log, tag: t, limit: cfg.MaxChunkBytes, enc: newEncoder(), byTag: map[string]int{}, reasons: map[int]string{}}
	for _, s := range cfg.Servers {
		f.servers = append(f.servers, &server{address: s.Address, weight: s.Weight})
	}
	return f
}

// Close closes the connections.
func (f *forward) Close() error {
	for _, s := range f.servers {
		s.drop()
	}
	if f.zstd != nil {
		return f.zstd.Close()
	}
	return nil
}

func (s *server) drop() {
	if s.conn != nil {
		s.conn.close()
		s.conn = nil
	}
}

func (s *server) failed() {
	s.drop()
	s.rest.Failed(time.Now())
}

// Write sends the batch as chunks, one tag a chunk, to one server.
func (f *forward) Write(ctx context.Context, batch []*record.Record) output.Result {
	f.begin(batch)
	err := f.ship(ctx, batch)
	var result output.Result
	settled := f.dropped // by the server
	for i, v := range f.verdicts {
		switch v {
		case pending:
			result.Retry = append(result.Retry, i)
		case acknowledged:
			settled = true
		case rejected:
			result.Rejected = append(result.Rejected, output.Rejection{Index: i, Reason: f.reasons[i]})
		}
	}
	if err == nil {
		return result
	}
	if !settled {
		var refused permanentError
		return output.Result{Err: err, Permanent: errors.As(err, &refused)}
	}
	f.log.Warn("some chunks were not acknowledged; their events are sent again", "event.remaining", len(result.Retry), "event.total", len(batch), "error.message", err.Error())
	return result
}

// begin sorts the batch by tag, each tag's records in their order.
func (f *forward) begin(batch []*record.Record) {
	f.verdicts = append(f.verdicts[:0], make([]verdict, len(batch))...)
	clear(f.reasons)
	clear(f.byTag)
	f.used, f.current, f.at, f.dropped = 0, 0, 0, false
	last := -1
	for i, r := range batch {
		f.key = f.tag.append(f.key[:0], r)
		if last < 0 || f.groups[last].tag != string(f.key) {
			n, ok := f.byTag[string(f.key)]
			if !ok {
				n = f.used
				f.used++
				if n == len(f.groups) {
					f.groups = append(f.groups, group{})
				}
				if f.groups[n].tag != string(f.key) {
					f.groups[n].tag = string(f.key)
				}
				f.groups[n].indices = f.groups[n].indices[:0]
				f.byTag[f.groups[n].tag] = n
			}
			last = n
		}
		f.groups[last].indices = append(f.groups[last].indices, i)
	}
}

// next packs the next chunk into f.packed, and says in f.more whether there is one.
// Records that cannot be sent are rejected here.
func (f *forward) next(batch []*record.Record) {
	f.more = false
	for ; f.current < f.used; f.current, f.at = f.current+1, 0 {
		g := &f.groups[f.current]
		f.ready = chunk{tag: g.tag, indices: make([]int, 0, len(g.indices)-f.at)}
		f.packed, f.spans = f.packed[:0], f.spans[:0]
		for ; f.at < len(g.indices); f.at++ {
			i := g.indices[f.at]
			before := len(f.packed)
			var err error
			f.packed, err = f.enc.entry(f.packed, batch[i])
			size := len(f.packed) - before
			switch {
			case err != nil:
				err = &encodingError{err}
			case size > f.cfg.MaxChunkBytes-overhead(g.tag):
				err = fmt.Errorf("is %d bytes as msgpack, and no chunk may be over maxChunkBytes (%d)", size, f.cfg.MaxChunkBytes)
			case len(f.packed) > f.limit-overhead(g.tag) && before > 0:
				f.packed = f.packed[:before]
				f.more = true
				return
			default:
				f.ready.indices = append(f.ready.indices, i)
				f.spans = append(f.spans, f.enc.last)
				continue
			}
			f.packed = f.packed[:before]
			f.reject(i, err.Error())
		}
		if len(f.ready.indices) > 0 {
			f.current, f.at = f.current+1, 0
			f.more = true
			return
		}
	}
}

func (f *forward) reject(i int, reason string) {
	f.verdicts[i] = rejected
	f.reasons[i] = reason
}

// ship sends the chunks and waits for their acknowledgements. It sets verdicts;
// after an error the rest is pending.
func (f *forward) ship(ctx context.Context, batch []*record.Record) error {
	f.next(batch)
	var s *server
	for f.more {
		var err error
		if s == nil {
			s, err = f.connect(ctx)
		} else if s.conn == nil { // a connection a chunk
			if s.conn, err = dial(ctx, f.cfg, s.address); err != nil {
				s.failed()
			}
		}
		if err != nil {
			return err
		}
		err = f.fly(ctx, s.conn, batch)
		switch {
		case err != nil && ctx.Err() != nil: // it broke because we broke it
			s.drop()
			return fmt.Errorf("fluentd %s: %w", s.address, context.Cause(ctx))
		case err != nil:
			s.failed()
			return explain(s.address, err)
		}
		s.rest.Worked()
		if !s.conn.keepalive {
			s.drop()
		}
	}
	return nil
}

// fly sends chunks over a connection, as many as it takes, and waits for their
// acknowledgements. When ctx ends it breaks the connection.
func (f *forward) fly(ctx context.Context, c *conn, batch []*record.Record) error {
	interrupt := context.AfterFunc(ctx, func() { _ = c.raw.Close() }) // the error is ctx's
	defer interrupt()
	w := flight{f: f, conn: c, newest: -1}
	for f.more {
		if err := w.send(f.ready); err != nil {
			return err
		}
		alone, size := len(f.ready.indices) == 1, len(f.packed)
		tag := f.ready.tag
		f.next(batch)
		if !f.more && alone && size > minChunkBytes && c.keepalive {
			f.packed, f.spans = f.packed[:0], f.spans[:0]
			if err := w.send(chunk{tag: tag}); err != nil {
				return err
			}
		}
		if !c.keepalive {
			break
		}
		for len(w.open) >= f.cfg.Window {
			if err := w.wait(); err != nil {
				return err
			}
		}
	}
	for w.waits() {
		if err := w.wait(); err != nil {
			return err
		}
	}
	if len(w.open) > 0 {
		c.late = w.open[0].id
	}
	return nil
}

// connect returns a server with a connection: the one whose turn it is, or
// another if that one cannot be reached.
func (f *forward) connect(ctx context.Context) (*server, error) {
	for _, s := range f.servers { // one that is not used any more keeps no connection
		if s.conn != nil && !s.conn.usable(f.cfg.IdleTimeout) {
			s.drop()
		}
	}
	var errs []error
	permanent := true
	for _, s := range f.order(time.Now()) {
		if s.conn != nil {
			return s, nil
		}
		c, err := dial(ctx, f.cfg, s.address)
		if err == nil {
			s.conn = c
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("fluentd %s: %w", s.address, context.Cause(ctx))
		}
		s.failed()
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

// order returns the servers in the order to try them: those that rest come last.
func (f *forward) order(now time.Time) []*server {
	var fit, rest []*server
	for _, s := range f.servers {
		if s.rest.Resting(now) {
			rest = append(rest, s)
		} else {
			fit = append(fit, s)
		}
	}
	if f.cfg.Balance == "weighted" && len(fit) > 1 {
		// The one with the most credit is next, and pays for its turn.
		best, total := 0, 0
		for i, s := range fit {
			s.credit += s.weight
			total += s.weight
			if s.credit > fit[best].credit {
				best = i
			}
		}
		fit[best].credit -= total
		fit[0], fit[best] = fit[best], fit[0]
	}
	return append(fit, rest...)
}

// flight is what is on its way over one connection.
type flight struct {
	f      *forward
	conn   *conn
	open   []chunk // oldest first
	sent   int
	newest int // of the chunks that were acknowledged; -1 for none
}

// send writes the chunk whose entries are in f.packed. One without events is a
// probe after a large one: its acknowledgement says that the server has passed over
// the large one.
func (w *flight) send(c chunk) error {
	f := w.f
	c.id, c.number, c.size = newID(), w.sent, len(f.packed)
	w.sent++
	body := f.packed
	var err error
	switch f.cfg.Compression {
	case "gzip":
		body = f.compressGzip()
	case "zstd":
		body, err = f.compressZstd()
	}
	if err != nil {
		return err
	}
	f.head = appendHead(f.head[:0], c.tag, len(body))
	f.option = appendOption(f.option[:0], c.id, len(c.indices), f.cfg.Compression)
	err = w.conn.rw.SetWriteDeadline(time.Now().Add(f.cfg.WriteTimeout))
	if err == nil {
		frame := net.Buffers{f.head, body, f.option}
		_, err = frame.WriteTo(w.conn.rw)
	}
	if err != nil {
		return w.unwritten(err)
	}
	c.deadline = time.Now().Add(f.cfg.AckTimeout)
	w.open = append(w.open, c)
	return nil
}

// unwritten returns why a chunk could not be written: what the server said before
// it hung up tells more than the broken pipe.
func (w *flight) unwritten(err error) error {
	timer := time.NewTimer(200 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-w.conn.dead:
		if !errors.Is(w.conn.err, io.EOF) {
			err = w.conn.err
		}
	case <-timer.C:
	}
	return fmt.Errorf("a chunk could not be sent (writeTimeout is %s): %w", w.f.cfg.WriteTimeout, err)
}

// waits reports whether a chunk with events is on its way.
func (w *flight) waits() bool {
	return slices.ContainsFunc(w.open, func(c chunk) bool { return len(c.indices) > 0 })
}

// wait waits for one acknowledgement, until the deadline of the oldest chunk.
func (w *flight) wait() error {
	timer := time.NewTimer(time.Until(w.open[0].deadline))
	defer timer.Stop()
	select {
	case id := <-w.conn.acks:
		return w.acknowledge(id)
	case <-w.conn.dead:
		select { // what was said before the end counts
		case id := <-w.conn.acks:
			return w.acknowledge(id)
		default:
		}
		if errors.Is(w.conn.err, io.EOF) {
			return fmt.Errorf("the server closed the connection before it acknowledged a chunk: if it has deny_keepalive, set keepalive: false: %w", w.conn.err)
		}
		return fmt.Errorf("the connection ended before a chunk was acknowledged: %w", w.conn.err)
	case <-timer.C:
		return w.late(w.open[0])
	}
}

func (w *flight) acknowledge(id string) error {
	w.conn.used = time.Now()
	i := slices.IndexFunc(w.open, func(c chunk) bool { return c.id == id })
	if i < 0 {
		if id == w.conn.late {
			w.conn.late = ""
			return nil
		}
		return fmt.Errorf("the server acknowledges a chunk that is not on its way: %q", shorten(id))
	}
	c := w.open[i]
	for _, j := range c.indices {
		w.f.verdicts[j] = acknowledged
	}
	w.newest = max(w.newest, c.number)
	w.open = slices.Delete(w.open, i, i+1)
	// The server comes to the chunks behind this one only now.
	for j := range w.open {
		if w.open[j].number > c.number {
			w.open[j].deadline = w.conn.used.Add(w.f.cfg.AckTimeout)
		}
	}
	return nil
}

// late decides on a chunk whose acknowledgement did not come in time.
func (w *flight) late(c chunk) error {
	f := w.f
	passed := w.newest > c.number
	err := fmt.Errorf("no acknowledgement of a chunk of %d events, %d bytes, within %s (ackTimeout): check that the server is not overloaded and that its chunk_size_limit is above maxChunkBytes", len(c.indices), c.size, f.cfg.AckTimeout)
	if c.size <= minChunkBytes {
		return err
	}
	if len(c.indices) == 1 && passed {
		f.dropped = true
		f.reject(c.indices[0], fmt.Sprintf("the server did not acknowledge this event of %d bytes within %s, but what was sent after it: its chunk_size_limit is smaller", c.size, f.cfg.AckTimeout))
		return err
	}
	if half := max(c.size/2, minChunkBytes); half < f.limit {
		f.limit = half
		f.log.Warn("chunks are made smaller, because one was not acknowledged; set maxChunkBytes below the server's chunk_size_limit", "outrigger.chunk_bytes", half, "error.message", err.Error())
	}
	return err
}

func newID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	return base64.StdEncoding.EncodeToString(id[:])
}

func (f *forward) compressGzip() []byte {
	if f.gzip == nil {
		f.gzip = deflate.NewWriter()
	}
	f.small.Reset()
	f.gzip.Reset(f.small.AvailableBuffer())
	at := 0
	for _, s := range f.spans {
		f.gzip.Write(f.packed[at:s.at])
		f.gzip.Repeat(&s.fragment.mark, s.fragment.data)
		at = s.at + len(s.fragment.data)
	}
	f.gzip.Write(f.packed[at:])
	f.small = *bytes.NewBuffer(f.gzip.Close())
	return f.small.Bytes()
}

func (f *forward) compressZstd() ([]byte, error) {
	if f.zstd == nil {
		w, err := zstd.NewWriter(io.Discard, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		f.zstd = w
	}
	f.small.Reset()
	compressed := f.zstd.EncodeAll(f.packed, f.small.AvailableBuffer())
	_, _ = f.small.Write(compressed) // keeps the memory
	return compressed, nil
}
