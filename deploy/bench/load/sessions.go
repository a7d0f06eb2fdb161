package load

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/net/http2/hpack"

	"github.com/outrigger-mesh/outrigger/deploy/bench/frames"
	"github.com/outrigger-mesh/outrigger/deploy/bench/loop"
)

// Host is the authority that every HTTP request names.
const Host = "items.bench"

// Paths of the requests, for those who route.
const (
	HTTP1Path = "/v1/items"
	GRPCPath  = "/bench.Items/"
)

// Echo is the message that goes there and back.
var Echo = bytes.Repeat([]byte{'e'}, Small)

// http1 asks for a body of a known length.
type http1 struct {
	client *Client
	want   int
	slot   *slot
	left   int // of the body; 0: the head is not here yet
}

var http1Request = []byte("GET " + HTTP1Path + "?id=42 HTTP/1.1\r\nHost: " + Host + "\r\nUser-Agent: outrigger-bench/1\r\nAccept: */*\r\n\r\n")

func (h *http1) begin(*loop.Conn)       {}
func (h *http1) finish(*loop.Conn) bool { return true }

func (h *http1) ask(s *slot) {
	h.slot = s
	s.conn.Send(http1Request)
}

// Receive implements loop.Handler.
func (h *http1) Receive(_ *loop.Conn, data []byte) (used int, err error) {
	if h.slot == nil {
		return 0, fmt.Errorf("an answer to no request: %.60q", data)
	}
	if h.left == 0 {
		end := bytes.Index(data, []byte("\r\n\r\n"))
		if end < 0 {
			return 0, nil
		}
		n, err := length(data[:end+2])
		if err != nil {
			return 0, err
		}
		if n != h.want {
			return 0, fmt.Errorf("a body of %d bytes, want %d", n, h.want)
		}
		used, h.left = end+4, n
	}
	body := data[used:min(used+h.left, len(data))]
	used += len(body)
	if h.left -= len(body); h.left > 0 {
		return used, nil
	}
	if used < len(data) {
		return used, fmt.Errorf("%d bytes after the body", len(data)-used)
	}
	if body[len(body)-1] != 'b' {
		return used, fmt.Errorf("the body ends with %q", body[len(body)-1])
	}
	s := h.slot
	h.slot = nil
	h.client.answer(s)
	return used, nil
}

// length reads the status, which must be 200, and Content-Length, which must be
// there.
func length(head []byte) (int, error) {
	if !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) {
		return 0, fmt.Errorf("not a 200: %.60q", head)
	}
	for rest := head; len(rest) > 0; {
		var line []byte
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		const name = "content-length:"
		if len(line) > len(name) && (line[0] == 'c' || line[0] == 'C') && bytes.EqualFold(line[:len(name)], []byte(name)) {
			n, err := strconv.Atoi(string(bytes.TrimSpace(line[len(name):])))
			if err != nil {
				return 0, fmt.Errorf("content-length: %w", err)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("no content-length in %.200q", head)
}

// Closed implements loop.Handler.
func (h *http1) Closed(_ *loop.Conn, err error) { h.client.closed(err) }

// echo sends a message and awaits it back.
type echo struct {
	client *Client
	slot   *slot
	have   int
}

func (e *echo) begin(*loop.Conn)       {}
func (e *echo) finish(*loop.Conn) bool { return true }

func (e *echo) ask(s *slot) {
	e.slot, e.have = s, 0
	s.conn.Send(Echo)
}

// Receive implements loop.Handler.
func (e *echo) Receive(_ *loop.Conn, data []byte) (int, error) {
	e.have += len(data)
	switch {
	case e.slot == nil || e.have > len(Echo):
		return 0, errors.New("more comes back than was sent")
	case data[0] != 'e' || data[len(data)-1] != 'e':
		return 0, fmt.Errorf("what comes back is not what was sent: %.20q", data)
	case e.have == len(Echo):
		s := e.slot
		e.slot = nil
		e.client.answer(s)
	default:
	}
	return len(data), nil
}

// Closed implements loop.Handler.
func (e *echo) Closed(_ *loop.Conn, err error) { e.client.closed(err) }

// calls makes calls on one connection, several at once: unary ones, or streams
// that stay open and carry a message there and back a request.
type calls struct {
	client   *Client
	conn     frames.Conn
	stream   bool
	headers  frames.Blocks
	spoken   bool
	next     uint32
	streams  map[uint32]*slot
	blocked  []*slot
	decoder  *hpack.Decoder
	status   string // of the block that is decoded: :status
	outcome  string // and grpc-status
	out      []byte
	deferred bool // Receive sends out
}

// stream is what a slot's stream has seen.
type stream struct {
	id       uint32
	window   int64
	have     int
	inflow   frames.Inflow
	accepted bool // headers with status 200 have come
	asked    bool // a message must still be sent
	ending   bool // this side has ended it
}

var (
	question    = frames.Message(Question)
	answerBytes = Small + 5
)

func newGRPC(c *Client, streams bool) *calls {
	method := "Get"
	if streams {
		method = "Watch"
	}
	g := &calls{client: c, stream: streams, next: 1, streams: map[uint32]*slot{}, headers: frames.Prepare(
		hpack.HeaderField{Name: ":method", Value: "POST"}, hpack.HeaderField{Name: ":scheme", Value: "http"},
		hpack.HeaderField{Name: ":path", Value: GRPCPath + method}, hpack.HeaderField{Name: ":authority", Value: Host},
		hpack.HeaderField{Name: "content-type", Value: "application/grpc"}, hpack.HeaderField{Name: "user-agent", Value: "outrigger-bench/1"},
		hpack.HeaderField{Name: "te", Value: "trailers"},
	)}
	g.decoder = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		switch f.Name {
		case ":status":
			g.status = f.Value
		case "grpc-status":
			g.outcome = f.Value
		default:
		}
	})
	return g
}

func (g *calls) begin(c *loop.Conn) { c.Send(g.conn.Open([]byte(frames.Preface))) }

func (g *calls) ask(s *slot) {
	if s.stream.id == 0 {
		s.stream = stream{id: g.next, window: g.conn.Initial}
		g.next += 2
		g.streams[s.stream.id] = s
		block := g.headers.First
		if g.spoken {
			block = g.headers.Later
		}
		g.spoken = true
		g.out = frames.Append(g.out, frames.Headers, frames.EndHeaders, s.stream.id, block)
	}
	s.stream.asked = true
	g.pump(s)
	g.flush(s.conn)
}

// pump sends the message that a slot owes when both windows let it.
func (g *calls) pump(s *slot) {
	n := int64(len(question))
	if min(s.stream.window, g.conn.Window) < n {
		g.blocked = append(g.blocked, s)
		return
	}
	s.stream.window -= n
	g.conn.Window -= n
	s.stream.asked = false
	var flags byte
	if !g.stream {
		flags, s.stream.ending = frames.EndStream, true
	}
	g.out = frames.Append(g.out, frames.Data, flags, s.stream.id, question)
}

func (g *calls) flush(c *loop.Conn) {
	if !g.deferred && len(g.out) > 0 {
		c.Send(g.out)
		g.out = g.out[:0]
	}
}

// finish ends the streams that are open; it may be called again.
func (g *calls) finish(c *loop.Conn) bool {
	for _, s := range g.streams {
		if !s.stream.ending {
			s.stream.ending = true
			g.out = frames.Append(g.out, frames.Data, frames.EndStream, s.stream.id, nil)
		}
	}
	g.flush(c)
	return len(g.streams) == 0
}

// Receive implements loop.Handler.
func (g *calls) Receive(c *loop.Conn, data []byte) (int, error) {
	g.deferred = true
	used, err := g.conn.Receive(data, &g.out, g)
	g.deferred = false
	g.flush(c)
	return used, err
}

// Closed implements loop.Handler.
func (g *calls) Closed(_ *loop.Conn, err error) { g.client.closed(err) }

// Grow implements frames.Events.
func (g *calls) Grow(id uint32, by int64) {
	if s := g.streams[id]; s != nil {
		s.stream.window += by
	}
	g.resume()
}

// Shift implements frames.Events.
func (g *calls) Shift(by int64) {
	for _, s := range g.streams {
		s.stream.window += by
	}
	g.resume()
}

func (g *calls) resume() {
	again := g.blocked
	g.blocked = nil
	for _, s := range again {
		if s.stream.asked {
			g.pump(s)
		}
	}
}

// Frame implements frames.Events.
func (g *calls) Frame(f frames.Frame) error {
	if g.conn.NoTable {
		return errors.New("the other side takes no table for header compression, which these requests are prepared for")
	}
	g.status, g.outcome = "", ""
	if f.Kind == frames.Headers {
		if _, err := g.decoder.Write(f.Payload); err != nil {
			return fmt.Errorf("header block: %w", err)
		}
		if err := g.decoder.Close(); err != nil {
			return fmt.Errorf("header block: %w", err)
		}
	}
	s := g.streams[f.Stream]
	if s == nil {
		return fmt.Errorf("a frame for stream %d, which is not open", f.Stream)
	}
	if f.Kind == frames.Reset {
		return fmt.Errorf("stream %d was reset with code %x", f.Stream, f.Payload)
	}
	k := &s.stream
	if f.Kind == frames.Data {
		if !k.accepted {
			return fmt.Errorf("data before headers on stream %d", f.Stream)
		}
		if k.have += len(f.Payload); k.have > answerBytes {
			return fmt.Errorf("more than a message of %d bytes on stream %d", answerBytes, f.Stream)
		}
		if g.stream {
			g.out = k.inflow.Took(len(f.Payload), f.Stream, g.out)
			if k.have == answerBytes {
				k.have = 0
				g.client.answer(s)
			}
		}
		if f.End {
			return fmt.Errorf("stream %d ended without a status", f.Stream)
		}
		return nil
	}
	if !k.accepted {
		if g.status != "200" {
			return fmt.Errorf("status %q", g.status)
		}
		k.accepted = true
	}
	if !f.End {
		return nil
	}
	switch {
	case g.outcome != "0":
		return fmt.Errorf("grpc-status %q", g.outcome)
	case !k.ending:
		return fmt.Errorf("stream %d was ended by the other side", f.Stream)
	case !g.stream && k.have != answerBytes:
		return fmt.Errorf("a message of %d bytes, want %d", k.have, answerBytes)
	default:
	}
	delete(g.streams, f.Stream)
	s.stream = stream{}
	if !g.stream {
		g.client.answer(s)
	}
	return nil
}
