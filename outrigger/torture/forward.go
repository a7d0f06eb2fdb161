package torture

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// forward is the kit's own server of the forward protocol v1: all four modes,
// acknowledgements, and the handshake if there is a shared key.
type forward struct {
	*gate
	judge *judge
	key   string // shared; empty is none
	turn  atomic.Int64
}

func newForward(j *judge, key string) (*forward, error) {
	f := &forward{judge: j, key: key}
	var err error
	f.gate, err = newGate(f.listen)
	return f, err
}

func (f *forward) settings() string {
	return fmt.Sprintf("fluentd: {address: %q, ackTimeout: 3s, connectTimeout: 1s, writeTimeout: 3s}", f.addr)
}
func (f *forward) address() string               { return f.addr }
func (f *forward) close()                        { f.down() }
func (f *forward) collect(context.Context) error { return nil }

func (f *forward) listen(l net.Listener) {
	var serving sync.WaitGroup
	defer serving.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		serving.Go(func() {
			defer func() { _ = c.Close() }() // it is over
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			_ = f.session(ctx, c) // the client hung up, or was told to
		})
	}
}

// session serves one connection until it ends.
func (f *forward) session(ctx context.Context, c net.Conn) error {
	d := msgpack.NewDecoder(bufio.NewReaderSize(c, 64<<10))
	if f.key != "" {
		if err := f.handshake(c, d); err != nil {
			return err
		}
	}
	for {
		records, options, err := message(d)
		if err != nil {
			return err
		}
		fault, _ := f.now()
		switch fault.mode {
		case stall: // a stalled server does not see that the client has hung up
			_, changed := f.now()
			<-f.either(ctx, c, changed)
			return errStalled
		case slow:
			select {
			case <-time.After(fault.delay):
			case <-ctx.Done():
				return ctx.Err()
			}
		case busy:
			return errors.New("busy")
		case busyItem:
			if f.turn.Add(1)%3 == 0 {
				return errors.New("busy")
			}
		default:
		}
		for _, text := range records {
			f.judge.arrive(text, time.Now())
		}
		if fault.mode == swallow {
			return errors.New("swallowed")
		}
		if options.Chunk != "" {
			b, err := msgpack.Marshal(map[string]string{"ack": options.Chunk})
			if err != nil {
				return err
			}
			if _, err := c.Write(b); err != nil {
				return err
			}
		}
	}
}

// either is closed when the fault changes or the client hangs up.
func (f *forward) either(ctx context.Context, c net.Conn, changed <-chan struct{}) <-chan struct{} {
	done := make(chan struct{})
	gone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, c) // until it is closed
		close(gone)
	}()
	go func() {
		defer close(done)
		select {
		case <-changed:
		case <-gone:
		case <-ctx.Done():
		}
	}()
	return done
}

type options struct {
	Chunk      string `msgpack:"chunk"`
	Compressed string `msgpack:"compressed"`
}

// maxEntries bounds what one message says it holds.
const maxEntries = 1 << 20

// message reads one message of any mode: the texts of its records, and its
// options.
func message(d *msgpack.Decoder) (texts [][]byte, o options, err error) {
	n, err := d.DecodeArrayLen()
	if err != nil {
		return nil, o, err
	}
	if n < 2 || n > 4 {
		return nil, o, fmt.Errorf("a message of %d elements", n)
	}
	if _, err := d.DecodeString(); err != nil { // the tag
		return nil, o, err
	}
	code, err := d.PeekCode()
	if err != nil {
		return nil, o, err
	}
	used := 2
	var packed []byte
	switch {
	case msgpcode.IsFixedArray(code) || code == msgpcode.Array16 || code == msgpcode.Array32:
		entries, err := d.DecodeArrayLen()
		if err != nil {
			return nil, o, err
		}
		if entries > maxEntries {
			return nil, o, fmt.Errorf("a message of %d entries", entries)
		}
		for range entries {
			text, err := entry(d)
			if err != nil {
				return nil, o, err
			}
			texts = append(texts, text)
		}
	case msgpcode.IsBin(code) || msgpcode.IsString(code):
		if packed, err = d.DecodeBytes(); err != nil {
			return nil, o, err
		}
	default:
		if err := d.Skip(); err != nil { // the time
			return nil, o, err
		}
		text, err := recordText(d)
		if err != nil {
			return nil, o, err
		}
		texts = [][]byte{text}
		used = 3
	}
	if n > used {
		if err := d.Decode(&o); err != nil {
			return nil, o, err
		}
	}
	if packed == nil {
		return texts, o, nil
	}
	in := io.Reader(bytes.NewReader(packed))
	switch o.Compressed {
	case "gzip":
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, o, err
		}
		in = io.LimitReader(z, 256<<20) // fluentd's own limit
	case "", "text":
	default:
		return nil, o, fmt.Errorf("compressed %q is not known here", o.Compressed)
	}
	for entries := msgpack.NewDecoder(bufio.NewReader(in)); ; {
		text, err := entry(entries)
		if errors.Is(err, io.EOF) {
			return texts, o, nil
		}
		if err != nil {
			return nil, o, err
		}
		texts = append(texts, text)
	}
}

// entry reads [time, record].
func entry(d *msgpack.Decoder) ([]byte, error) {
	n, err := d.DecodeArrayLen()
	if err != nil {
		return nil, err
	}
	if n != 2 {
		return nil, fmt.Errorf("an entry of %d elements", n)
	}
	if err := d.Skip(); err != nil {
		return nil, err
	}
	return recordText(d)
}

// recordText reads a record and returns its message, or log.
func recordText(d *msgpack.Decoder) (text []byte, err error) {
	n, err := d.DecodeMapLen()
	if err != nil {
		return nil, err
	}
	for range n {
		key, err := d.DecodeString()
		if err != nil {
			return nil, err
		}
		if key != "message" && key != "log" {
			if err := d.Skip(); err != nil {
				return nil, err
			}
			continue
		}
		if text, err = d.DecodeBytes(); err != nil {
			return nil, err
		}
	}
	return text, nil
}

// handshake is HELO, PING and PONG.
func (f *forward) handshake(c net.Conn, d *msgpack.Decoder) error {
	nonce := rand.Text()
	send := func(v any) error {
		b, err := msgpack.Marshal(v)
		if err != nil {
			return err
		}
		_, err = c.Write(b)
		return err
	}
	if err := send([]any{"HELO", map[string]any{"nonce": nonce, "auth": "", "keepalive": true}}); err != nil {
		return err
	}
	n, err := d.DecodeArrayLen()
	if err != nil || n != 6 {
		return fmt.Errorf("PING of %d elements: %w", n, err)
	}
	var ping [6]string
	for i := range ping {
		if ping[i], err = d.DecodeString(); err != nil {
			return err
		}
	}
	digest := func(host string) string {
		sum := sha512.Sum512([]byte(ping[2] + host + nonce + f.key))
		return hex.EncodeToString(sum[:])
	}
	if ping[0] != "PING" || !strings.EqualFold(ping[3], digest(ping[1])) {
		return errors.Join(errors.New("the shared key is another"), send([]any{"PONG", false, "shared key mismatch", "", ""}))
	}
	const host = "torture"
	return send([]any{"PONG", true, "", host, digest(host)})
}
