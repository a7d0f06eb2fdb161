// Package frames is as much of HTTP/2 (RFC 9113) as a load generator and an
// upstream server for gRPC need: frames, both flow-control windows, and header
// blocks that are prepared once.
//
// It knows bytes, not sockets. It is no implementation for strangers: it trusts
// the other side to keep to the protocol where nothing could go unnoticed.
package frames

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/net/http2/hpack"
)

// Types of frames, RFC 9113 section 6.
const (
	Data         = 0x0
	Headers      = 0x1
	Reset        = 0x3
	settings     = 0x4
	pushPromise  = 0x5
	ping         = 0x6
	goAway       = 0x7
	windowUpdate = 0x8
	continuation = 0x9
)

// Flags of frames.
const (
	EndStream  = 0x1
	ack        = 0x1
	EndHeaders = 0x4
	padded     = 0x8
	priority   = 0x20
)

// Preface is what a client sends first, before its settings.
const Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

const (
	headerLen = 9
	maxFrame  = 16384 // neither side raises it
	// streamWindow is what both programs let a stream have in flight, and
	// connWindow a connection.
	streamWindow = 1 << 20
	connWindow   = 1 << 30
	// defaultWindow is what both have before they are told, section 6.9.2.
	defaultWindow = 65535
	tableSize     = 4096
)

// Append appends a frame.
func Append(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	b = append(b, byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload)), kind, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

// Message is a gRPC message of n bytes with its prefix.
func Message(n int) []byte {
	b := make([]byte, 5, 5+n)
	binary.BigEndian.PutUint32(b[1:], uint32(n))
	return append(b, bytes.Repeat([]byte{'m'}, n)...)
}

// Blocks are the header blocks of a list that is sent again and again: the first
// fills the table of the connection's decoder, all later ones refer to it. No
// other block of the connection may change the table. Plain uses no table.
type Blocks struct{ First, Later, Plain []byte }

// Prepare encodes a list as it is sent first and later.
func Prepare(list ...hpack.HeaderField) Blocks {
	var buf bytes.Buffer
	enc := hpack.NewEncoder(&buf)
	encode := func() []byte {
		buf.Reset()
		for _, f := range list {
			_ = enc.WriteField(f) // a buffer takes everything
		}
		return bytes.Clone(buf.Bytes())
	}
	b := Blocks{First: encode(), Later: encode()}
	enc = hpack.NewEncoder(&buf)
	for i := range list {
		list[i].Sensitive = true
	}
	b.Plain = encode()
	return b
}

// Literal encodes a field so that it does not change the table (RFC 7541 section
// 6.2.2); name and value are shorter than 127 bytes.
func Literal(name, value string) []byte {
	b := append([]byte{0, byte(len(name))}, name...)
	return append(append(b, byte(len(value))), value...)
}

// Conn is one side's view of a connection: what it may send and what it has
// received.
type Conn struct {
	// Window is how much data may be sent on the connection.
	Window int64
	// Initial is how much may be sent on a stream that begins now.
	Initial int64
	// NoTable says that the other side keeps less of a table for HPACK than
	// prepared blocks may fill.
	NoTable  bool
	consumed int64
}

// Frame is a frame for a stream; the payload is without padding and priority.
type Frame struct {
	Kind    byte
	End     bool // of the stream
	Stream  uint32
	Payload []byte
}

// Events are what a stream's owner is told.
type Events interface {
	// Frame is called for Data, Headers and Reset, whose payload is the code.
	Frame(f Frame) error
	// Grow says that a stream may send so much more; stream 0 that the
	// connection may (Conn.Window is that much larger already).
	Grow(stream uint32, by int64)
	// Shift says that every open stream may send so much more or, where it is
	// negative, less (RFC 9113 section 6.9.2).
	Shift(by int64)
}

// Open appends what either side says first: its settings and its window.
func (c *Conn) Open(b []byte) []byte {
	c.Window, c.Initial = defaultWindow, defaultWindow
	var p []byte
	set := func(id uint16, v uint32) {
		p = binary.BigEndian.AppendUint16(p, id)
		p = binary.BigEndian.AppendUint32(p, v)
	}
	set(0x2, 0) // ENABLE_PUSH
	set(0x4, streamWindow)
	b = Append(b, settings, 0, 0, p)
	return AppendGrow(b, 0, connWindow-defaultWindow)
}

// AppendGrow appends a WINDOW_UPDATE.
func AppendGrow(b []byte, stream, by uint32) []byte {
	return Append(b, windowUpdate, 0, stream, binary.BigEndian.AppendUint32(nil, by))
}

// Receive handles all whole frames of data and returns how much that is.
// Answers that the protocol asks for are appended to out.
func (c *Conn) Receive(data []byte, out *[]byte, to Events) (used int, err error) {
	for len(data)-used >= headerLen {
		h := data[used:]
		n := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		if bytes.HasPrefix(h, []byte("HTTP/1")) {
			return used, errors.New("the other side answers in HTTP/1")
		}
		if n > maxFrame {
			return used, fmt.Errorf("frame of %d bytes, more than %d", n, maxFrame)
		}
		if len(h) < headerLen+n {
			break
		}
		used += headerLen + n
		if err := c.frame(h[3], h[4], binary.BigEndian.Uint32(h[5:])&^(1<<31), h[headerLen:headerLen+n], out, to); err != nil {
			return used, err
		}
	}
	return used, nil
}

func (c *Conn) frame(kind, flags byte, stream uint32, p []byte, out *[]byte, to Events) error {
	switch kind {
	case Data, Headers:
		if kind == Headers && flags&EndHeaders == 0 {
			return errors.New("a header block in more than one frame")
		}
		if kind == Data {
			if c.consumed += int64(len(p)); c.consumed >= connWindow/2 {
				*out = AppendGrow(*out, 0, uint32(c.consumed))
				c.consumed = 0
			}
		}
		pad := 0
		if flags&padded != 0 && len(p) > 0 {
			pad, p = int(p[0]), p[1:]
		}
		if kind == Headers && flags&priority != 0 {
			p = p[min(5, len(p)):]
		}
		if pad > len(p) {
			return fmt.Errorf("padding of %d in %d bytes", pad, len(p))
		}
		return to.Frame(Frame{kind, flags&EndStream != 0, stream, p[:len(p)-pad]})
	case settings:
		if flags&ack != 0 {
			return nil
		}
		for ; len(p) >= 6; p = p[6:] {
			id, v := binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:])
			switch id {
			case 0x4:
				by := int64(v) - c.Initial
				c.Initial = int64(v)
				to.Shift(by)
			case 0x1:
				c.NoTable = v < tableSize
			default:
			}
		}
		*out = Append(*out, settings, ack, 0, nil)
	case ping:
		if flags&ack == 0 {
			*out = Append(*out, ping, ack, 0, p)
		}
	case windowUpdate:
		if len(p) != 4 {
			return fmt.Errorf("WINDOW_UPDATE of %d bytes", len(p))
		}
		by := int64(binary.BigEndian.Uint32(p) &^ (1 << 31))
		if stream == 0 {
			c.Window += by
		}
		to.Grow(stream, by)
	case Reset:
		if len(p) != 4 {
			return fmt.Errorf("RST_STREAM of %d bytes", len(p))
		}
		return to.Frame(Frame{kind, true, stream, p})
	case goAway:
		if len(p) >= 8 {
			return fmt.Errorf("GOAWAY with error %d: %q", binary.BigEndian.Uint32(p[4:]), p[8:])
		}
		return fmt.Errorf("GOAWAY of %d bytes", len(p))
	case continuation, pushPromise:
		return fmt.Errorf("frame of type %d is not expected", kind)
	default: // PRIORITY, and extensions: section 5.5 says to ignore them
	}
	return nil
}

// Inflow counts what a stream has received and says when to let more come.
type Inflow int64

// Took appends a WINDOW_UPDATE for the stream when half of its window is used.
func (i *Inflow) Took(n int, stream uint32, out []byte) []byte {
	if *i += Inflow(n); *i >= streamWindow/2 {
		out = AppendGrow(out, stream, uint32(*i))
		*i = 0
	}
	return out
}
