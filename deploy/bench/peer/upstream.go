package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/outrigger-mesh/outrigger/deploy/bench/frames"
	"github.com/outrigger-mesh/outrigger/deploy/bench/load"
	"github.com/outrigger-mesh/outrigger/deploy/bench/loop"
)

// upstream serves every scenario, each at a port of its own, from one thread.
// It prints the ports as one line of JSON, by the names that it knows them by.
func upstream(ctx context.Context, stdout io.Writer) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	l, err := loop.New()
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // the program ends
	small, large := http1Reply(load.Small), http1Reply(load.Large)
	headers := frames.Prepare(hpack.HeaderField{Name: ":status", Value: "200"}, hpack.HeaderField{Name: "content-type", Value: "application/grpc"})
	ports := map[string]netip.AddrPort{}
	for name, accept := range map[string]func() loop.Handler{
		load.HTTP1Small: func() loop.Handler { return small },
		load.HTTP1Large: func() loop.Handler { return large },
		load.TCPEcho:    func() loop.Handler { return new(echo) },
		load.GRPCUnary:  func() loop.Handler { return newGRPC(headers, false) },
		load.GRPCStream: func() loop.Handler { return newGRPC(headers, true) },
	} {
		if ports[name], err = l.Listen(accept); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(stdout).Encode(ports); err != nil {
		return fmt.Errorf("print the ports: %w", err)
	}
	for ctx.Err() == nil {
		if err := l.Wait(100 * time.Millisecond); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// http1 answers every request with the same bytes. It reads no more of a request
// than where it ends: none has a body.
type http1 []byte

func http1Reply(n int) http1 {
	return append([]byte("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: "+strconv.Itoa(n)+"\r\n\r\n"),
		bytes.Repeat([]byte{'b'}, n)...)
}

// Receive implements loop.Handler.
func (h http1) Receive(c *loop.Conn, data []byte) (used int, err error) {
	for {
		i := bytes.Index(data[used:], []byte("\r\n\r\n"))
		if i < 0 {
			return used, nil
		}
		used += i + 4
		c.Send(h)
	}
}

// Closed implements loop.Handler.
func (http1) Closed(*loop.Conn, error) {}

// echo sends a message back for every one that has come.
type echo struct{ have int }

// Receive implements loop.Handler.
func (e *echo) Receive(c *loop.Conn, data []byte) (int, error) {
	for e.have += len(data); e.have >= load.Small; e.have -= load.Small {
		c.Send(load.Echo)
	}
	return len(data), nil
}

// Closed implements loop.Handler.
func (*echo) Closed(*loop.Conn, error) {}

// calls answers calls of either kind: one message for each that has come.
type calls struct {
	conn    frames.Conn
	open    bool // the preface has come
	stream  bool // calls are streams
	headers frames.Blocks
	spoken  bool // the first of them have been sent
	calls   map[uint32]*call
	blocked []uint32 // streams that wait for a window
	out     []byte
}

type call struct {
	window  int64
	have    int // bytes of the message that comes
	owed    int // messages to be sent
	inflow  frames.Inflow
	headers bool // sent
	ended   bool // by the caller
	waiting bool // is in blocked
}

var (
	reply    = frames.Message(load.Small)
	trailers = frames.Literal("grpc-status", "0")
)

// question is how long a caller's message is with its prefix.
const question = load.Question + 5

func newGRPC(headers frames.Blocks, stream bool) *calls {
	return &calls{headers: headers, stream: stream, calls: map[uint32]*call{}}
}

// Receive implements loop.Handler.
func (g *calls) Receive(c *loop.Conn, data []byte) (used int, err error) {
	g.out = g.out[:0]
	if !g.open {
		if len(data) < len(frames.Preface) {
			return 0, nil
		}
		if string(data[:len(frames.Preface)]) != frames.Preface {
			return 0, fmt.Errorf("not HTTP/2: %.20q", data)
		}
		g.open, used = true, len(frames.Preface)
		g.out = g.conn.Open(g.out)
	}
	n, err := g.conn.Receive(data[used:], &g.out, g)
	c.Send(g.out)
	return used + n, err
}

// Closed implements loop.Handler. What a proxy says wrong is worth reading.
func (*calls) Closed(_ *loop.Conn, err error) {
	if err != nil && !errors.Is(err, io.EOF) {
		fmt.Fprintln(os.Stderr, "peer: gRPC:", err)
	}
}

// Frame implements frames.Events.
func (g *calls) Frame(f frames.Frame) error {
	k := g.calls[f.Stream]
	if f.Kind == frames.Headers && k == nil {
		k = &call{window: g.conn.Initial}
		g.calls[f.Stream] = k
	}
	if f.Kind == frames.Reset {
		delete(g.calls, f.Stream) // the caller no longer wants it
		return nil
	}
	if k == nil {
		return fmt.Errorf("data for stream %d, which is not open", f.Stream)
	}
	if f.Kind == frames.Data {
		if !f.End {
			g.out = k.inflow.Took(len(f.Payload), f.Stream, g.out)
		}
		for k.have += len(f.Payload); k.have >= question; k.have -= question {
			k.owed++
		}
	}
	k.ended = k.ended || f.End
	g.serve(f.Stream, k)
	return nil
}

// Grow implements frames.Events.
func (g *calls) Grow(stream uint32, by int64) {
	if k := g.calls[stream]; k != nil {
		k.window += by
	}
	g.resume()
}

// Shift implements frames.Events.
func (g *calls) Shift(by int64) {
	for _, k := range g.calls {
		k.window += by
	}
	g.resume()
}

func (g *calls) resume() {
	again := g.blocked
	g.blocked = nil
	for _, id := range again {
		if k := g.calls[id]; k != nil {
			k.waiting = false
			g.serve(id, k)
		}
	}
}

func (g *calls) serve(id uint32, k *call) {
	if !g.stream && !k.ended {
		return
	}
	if !k.headers {
		block := g.headers.First
		switch {
		case g.conn.NoTable:
			block = g.headers.Plain
		case g.spoken:
			block = g.headers.Later
		default:
		}
		g.out = frames.Append(g.out, frames.Headers, frames.EndHeaders, id, block)
		k.headers, g.spoken = true, true
	}
	for ; k.owed > 0; k.owed-- {
		if n := int64(len(reply)); min(k.window, g.conn.Window) < n {
			if !k.waiting {
				k.waiting = true
				g.blocked = append(g.blocked, id)
			}
			return
		}
		k.window -= int64(len(reply))
		g.conn.Window -= int64(len(reply))
		g.out = frames.Append(g.out, frames.Data, 0, id, reply)
	}
	if k.ended {
		g.out = frames.Append(g.out, frames.Headers, frames.EndHeaders|frames.EndStream, id, trailers)
		delete(g.calls, id)
	}
}
