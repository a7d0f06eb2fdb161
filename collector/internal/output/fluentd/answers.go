package fluentd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Limits of what a server may say. The longest answer is a greeting or its
// counterpart: five short texts.
const (
	maxAnswer      = 16 << 10 // bytes
	maxAnswerDepth = 4
	maxAnswerItems = 64 // of one array or map
)

// Answers of a server.
type (
	acknowledgement struct{ chunk string }
	greeting        struct { // HELO
		nonce, auth string // raw bytes
		keepalive   bool
	}
	admission struct { // PONG
		ok                       bool
		reason, hostname, digest string
	}
)

// readAnswer reads one answer: acknowledgement, greeting or admission.
func readAnswer(r *bufio.Reader) (any, error) {
	if first, err := r.Peek(2); err == nil && first[0] == 0x15 && first[1] == 3 { // an alert
		return nil, permanentError{errors.New("the server speaks TLS: set tls")}
	}
	d := decoder{r: r, left: maxAnswer}
	v, err := d.value(0)
	if err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case map[string]any:
		if chunk, ok := v["ack"].(string); ok && chunk != "" {
			return acknowledgement{chunk}, nil
		}
	case []any:
		kind, _ := at(v, 0).(string)
		switch {
		case kind == "HELO" && len(v) == 2:
			options, ok := v[1].(map[string]any)
			if !ok && v[1] != nil {
				return nil, errors.New("the server's HELO has no options")
			}
			g := greeting{keepalive: true}
			g.nonce, _ = options["nonce"].(string)
			g.auth, _ = options["auth"].(string)
			if keep, ok := options["keepalive"].(bool); ok {
				g.keepalive = keep
			}
			return g, nil
		case kind == "PONG" && len(v) == 5:
			ok, isBool := v[1].(bool)
			if !isBool {
				return nil, errors.New("the server's PONG does not say whether this client is admitted")
			}
			a := admission{ok: ok}
			a.reason, _ = v[2].(string)
			a.hostname, _ = v[3].(string)
			a.digest, _ = v[4].(string)
			return a, nil
		}
	}
	return nil, fmt.Errorf("the server's answer is neither an acknowledgement nor a handshake: %s", shorten(fmt.Sprintf("%q", fmt.Sprint(v))))
}

func at(list []any, i int) any {
	if i < len(list) {
		return list[i]
	}
	return nil
}

// decoder reads the part of msgpack that answers are made of. Texts and binaries
// become string; numbers are read over and become nil.
type decoder struct {
	r    *bufio.Reader
	left int
}

var errLongAnswer = fmt.Errorf("the server's answer is longer than %d bytes", maxAnswer)

func (d *decoder) value(depth int) (any, error) {
	if depth > maxAnswerDepth {
		return nil, fmt.Errorf("the server's answer is nested more than %d deep", maxAnswerDepth)
	}
	if d.left < 1 {
		return nil, errLongAnswer
	}
	d.left--
	c, err := d.r.ReadByte()
	if err != nil {
		if depth > 0 && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	switch {
	case c < 0x80 || c >= 0xe0: // small integers
		return nil, nil
	case c < 0x90:
		return d.pairs(int(c&0x0f), depth)
	case c < 0xa0:
		return d.list(int(c&0x0f), depth)
	case c < 0xc0:
		return d.text(int(c & 0x1f))
	}
	length := func(size int) (int, error) {
		raw, err := d.bytes(size)
		if err != nil {
			return 0, err
		}
		var full [8]byte
		copy(full[8-size:], raw)
		n := binary.BigEndian.Uint64(full[:])
		if n > maxAnswer {
			return 0, errLongAnswer
		}
		return int(n), nil
	}
	var n int
	switch c {
	case 0xc0:
		return nil, nil
	case 0xc2, 0xc3:
		return c == 0xc3, nil
	case 0xc4, 0xd9:
		n, err = length(1)
	case 0xc5, 0xda, 0xdc, 0xde:
		n, err = length(2)
	case 0xc6, 0xdb, 0xdd, 0xdf:
		n, err = length(4)
	case 0xcc, 0xd0:
		_, err = d.bytes(1)
	case 0xcd, 0xd1:
		_, err = d.bytes(2)
	case 0xca, 0xce, 0xd2:
		_, err = d.bytes(4)
	case 0xcb, 0xcf, 0xd3:
		_, err = d.bytes(8)
	default:
		return nil, fmt.Errorf("the server's answer holds the byte %#02x, which no answer of the forward protocol has: is this a forward server?", c)
	}
	if err != nil {
		return nil, err
	}
	switch c {
	case 0xc4, 0xc5, 0xc6, 0xd9, 0xda, 0xdb:
		return d.text(n)
	case 0xdc, 0xdd:
		return d.list(n, depth)
	case 0xde, 0xdf:
		return d.pairs(n, depth)
	}
	return nil, nil
}

func (d *decoder) bytes(n int) ([]byte, error) {
	if n > d.left {
		return nil, errLongAnswer
	}
	d.left -= n
	b := make([]byte, n)
	if _, err := io.ReadFull(d.r, b); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return b, nil
}

func (d *decoder) text(n int) (any, error) {
	b, err := d.bytes(n)
	return string(b), err
}

func (d *decoder) list(n, depth int) (any, error) {
	if n > maxAnswerItems {
		return nil, fmt.Errorf("the server's answer is an array of %d: more than %d", n, maxAnswerItems)
	}
	list := make([]any, n)
	for i := range list {
		var err error
		if list[i], err = d.value(depth + 1); err != nil {
			return nil, err
		}
	}
	return list, nil
}

func (d *decoder) pairs(n, depth int) (any, error) {
	if n > maxAnswerItems {
		return nil, fmt.Errorf("the server's answer is a map of %d: more than %d", n, maxAnswerItems)
	}
	pairs := make(map[string]any, n)
	for range n {
		key, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		value, err := d.value(depth + 1)
		if err != nil {
			return nil, err
		}
		if name, ok := key.(string); ok {
			pairs[name] = value
		}
	}
	return pairs, nil
}
