package apptest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
)

// peerSocket is a WebSocket of one of two libraries that know nothing of each
// other.
type peerSocket interface {
	// write sends a message, whole or in fragments of so many bytes.
	write(text bool, b []byte, fragment int) error
	read() (text bool, b []byte, err error)
	// ping waits for its pong, which takes a reader at work.
	ping() error
	close(code int, reason string) error
	// cut ends the connection without a word.
	cut()
	// protocol that was agreed on.
	protocol() string
}

// closed is how the other side said goodbye.
type closed struct {
	code   int
	reason string
}

func (c closed) Error() string { return fmt.Sprintf("closed with %d %q", c.code, c.reason) }

// library is one implementation, as client and as server.
type library struct {
	name   string
	dial   func(url string, compress bool) (peerSocket, *http.Response, error)
	accept func(w http.ResponseWriter, r *http.Request, compress bool) (peerSocket, error)
}

var subprotocols = []string{"ledger.v2", "ledger.v1"}

// messageMax is what both libraries take.
const messageMax = 32 << 20

type gorillaSocket struct {
	*gorilla.Conn
	pong chan struct{}
}

func newGorilla(c *gorilla.Conn) *gorillaSocket {
	s := &gorillaSocket{c, make(chan struct{}, 16)}
	c.SetReadLimit(messageMax)
	c.SetPongHandler(func(string) error { s.pong <- struct{}{}; return nil })
	return s
}

func (s *gorillaSocket) write(text bool, b []byte, fragment int) error {
	kind := gorilla.BinaryMessage
	if text {
		kind = gorilla.TextMessage
	}
	if fragment == 0 {
		return s.WriteMessage(kind, b)
	}
	// A fragment goes out whenever the write buffer, which the test makes small, is
	// full.
	w, err := s.NextWriter(kind)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(fragment, len(b))
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return w.Close()
}

func (s *gorillaSocket) read() (bool, []byte, error) {
	kind, b, err := s.ReadMessage()
	var c *gorilla.CloseError
	if errors.As(err, &c) {
		err = closed{c.Code, c.Text}
	}
	return kind == gorilla.TextMessage, b, err
}

func (s *gorillaSocket) ping() error {
	if err := s.WriteControl(gorilla.PingMessage, []byte("are you there"), time.Now().Add(5*time.Second)); err != nil {
		return err
	}
	select {
	case <-s.pong:
		return nil
	case <-time.After(5 * time.Second):
		return errors.New("no pong within 5s")
	}
}

func (s *gorillaSocket) close(code int, reason string) error {
	return s.WriteControl(gorilla.CloseMessage, gorilla.FormatCloseMessage(code, reason), time.Now().Add(5*time.Second))
}

func (s *gorillaSocket) cut()             { _ = s.NetConn().Close() }
func (s *gorillaSocket) protocol() string { return s.Subprotocol() }

type coderSocket struct{ *coder.Conn }

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

func (s coderSocket) write(text bool, b []byte, fragment int) error {
	ctx, cancel := within(20 * time.Second)
	defer cancel()
	kind := coder.MessageBinary
	if text {
		kind = coder.MessageText
	}
	if fragment == 0 {
		return s.Write(ctx, kind, b)
	}
	w, err := s.Writer(ctx, kind) // each write is a fragment
	if err != nil {
		return err
	}
	for len(b) > 0 {
		n := min(fragment, len(b))
		if _, err := w.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return w.Close()
}

func (s coderSocket) read() (bool, []byte, error) {
	ctx, cancel := within(30 * time.Second)
	defer cancel()
	kind, b, err := s.Read(ctx)
	var c coder.CloseError
	if errors.As(err, &c) {
		err = closed{int(c.Code), c.Reason}
	}
	return kind == coder.MessageText, b, err
}

func (s coderSocket) ping() error {
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	return s.Ping(ctx)
}

func (s coderSocket) close(code int, reason string) error {
	return s.Close(coder.StatusCode(code), reason)
}
func (s coderSocket) cut()             { _ = s.CloseNow() }
func (s coderSocket) protocol() string { return s.Subprotocol() }

var libraries = []library{
	{
		name: "gorilla",
		dial: func(url string, compress bool) (peerSocket, *http.Response, error) {
			d := gorilla.Dialer{HandshakeTimeout: 10 * time.Second, Subprotocols: subprotocols, EnableCompression: compress, WriteBufferSize: 1 << 10}
			c, resp, err := d.Dial(url, nil)
			if err != nil {
				return nil, resp, err
			}
			return newGorilla(c), resp, nil
		},
		accept: func(w http.ResponseWriter, r *http.Request, compress bool) (peerSocket, error) {
			u := gorilla.Upgrader{Subprotocols: subprotocols[1:], EnableCompression: compress, WriteBufferSize: 1 << 10}
			c, err := u.Upgrade(w, r, nil)
			if err != nil {
				return nil, err
			}
			return newGorilla(c), nil
		},
	},
	{
		name: "coder",
		dial: func(url string, compress bool) (peerSocket, *http.Response, error) {
			ctx, cancel := within(10 * time.Second)
			defer cancel()
			c, resp, err := coder.Dial(ctx, url, &coder.DialOptions{Subprotocols: subprotocols, CompressionMode: coderCompression(compress)})
			if err != nil {
				return nil, resp, err
			}
			c.SetReadLimit(messageMax)
			return coderSocket{c}, resp, nil
		},
		accept: func(w http.ResponseWriter, r *http.Request, compress bool) (peerSocket, error) {
			c, err := coder.Accept(w, r, &coder.AcceptOptions{Subprotocols: subprotocols[1:], CompressionMode: coderCompression(compress)})
			if err != nil {
				return nil, err
			}
			c.SetReadLimit(messageMax)
			return coderSocket{c}, nil
		},
	},
}

func coderCompression(on bool) coder.CompressionMode {
	if on {
		return coder.CompressionNoContextTakeover // both libraries know this one
	}
	return coder.CompressionDisabled
}

// socketServer serves each path with what the path says, and hands out how its
// sockets ended.
func socketServer(t *testing.T, l library) (address string, ends chan error) {
	t.Helper()
	ends = make(chan error, 256)
	listener, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			http.Error(w, "no sockets here", http.StatusForbidden)
			return
		}
		c, err := l.accept(w, r, r.URL.Query().Has("compress"))
		if err != nil {
			ends <- err
			return
		}
		defer c.cut()
		switch r.URL.Path {
		case "/goodbye":
			if err := c.close(4001, "till tomorrow"); err != nil {
				ends <- err
				return
			}
		case "/vanish":
			return
		}
		for {
			text, b, err := c.read()
			if err == nil {
				err = c.write(text, b, len(r.URL.Query().Get("fragment")))
			}
			if err != nil {
				ends <- err
				return
			}
		}
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return listener.Addr().String(), ends
}

// TestWebSocket: two libraries that know nothing of each other talk through two
// sidecars, each as client and as server.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	for _, server := range libraries {
		for _, strict := range []bool{false, true} {
			address, ends := socketServer(t, server)
			p := newPair(t, "http", address, strict)
			for _, client := range libraries {
				t.Run(client.name+" to "+server.name+map[bool]string{true: ", mtls"}[strict], func(t *testing.T) { p.sockets(t, client, ends) })
			}
		}
	}
}

func (p *pair) sockets(t *testing.T, client library, ends chan error) {
	dial := func(t *testing.T, path string) peerSocket {
		t.Helper()
		c, _, err := client.dial("ws://"+p.address+path, strings.Contains(path, "compress"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.cut)
		return c
	}
	ended := func(t *testing.T) error {
		t.Helper()
		select {
		case err := <-ends:
			return err
		case <-time.After(10 * time.Second):
			t.Fatal("the server's socket goes on")
			return nil
		}
	}
	finish := func(t *testing.T, c peerSocket) {
		t.Helper()
		_ = c.close(1000, "")
		_ = ended(t)
	}
	echoes := func(t *testing.T, c peerSocket, text bool, b []byte, fragment int) {
		t.Helper()
		sent := make(chan error, 1)
		go func() { sent <- c.write(text, b, fragment) }() // a large echo begins before all has been sent
		gotText, got, err := c.read()
		if e := <-sent; e != nil || err != nil || gotText != text || !bytes.Equal(got, b) {
			t.Fatalf("sent %d bytes (%v), read %d (%v), text %v; want text %v", len(b), e, len(got), err, gotText, text)
		}
	}

	t.Run("text", func(t *testing.T) {
		c := dial(t, "/")
		echoes(t, c, true, []byte("caf\u00e9 \u2615"), 0)
		echoes(t, c, true, nil, 0)
		finish(t, c)
	})
	t.Run("binary of each length encoding", func(t *testing.T) { // RFC 6455, 5.2: 7, 16 and 64 bits
		c := dial(t, "/")
		for _, n := range []int{0, 1, 125, 126, 127, 128, 65535, 65536, 65537, 300 << 10} {
			echoes(t, c, false, bytes.Repeat([]byte{0xfe}, n), 0)
		}
		finish(t, c)
	})
	t.Run("fragmented", func(t *testing.T) {
		c := dial(t, "/?fragment=xxxxxxx")
		echoes(t, c, true, bytes.Repeat([]byte("fragment "), 500), 7)
		finish(t, c)
	})
	t.Run("16 MiB", func(t *testing.T) {
		c := dial(t, "/")
		echoes(t, c, false, bytes.Repeat([]byte("0123456789abcdef"), 1<<20), 0)
		finish(t, c)
	})
	t.Run("ping and pong", func(t *testing.T) {
		c := dial(t, "/")
		done := make(chan struct{})
		go func() { defer close(done); _, _, _ = c.read() }() // somebody must read for the pong
		for range 3 {
			if err := c.ping(); err != nil {
				t.Fatal(err)
			}
		}
		c.cut()
		<-done
		_ = ended(t)
	})
	t.Run("client says goodbye", func(t *testing.T) {
		c := dial(t, "/")
		if err := c.close(4002, "had enough"); err != nil {
			t.Fatal(err)
		}
		if err := ended(t); !errors.Is(err, closed{4002, "had enough"}) {
			t.Errorf("the server was told: %v", err)
		}
	})
	t.Run("server says goodbye", func(t *testing.T) {
		c := dial(t, "/goodbye")
		if _, _, err := c.read(); !errors.Is(err, closed{4001, "till tomorrow"}) {
			t.Errorf("the client was told: %v", err)
		}
		c.cut()
		select { // a library that waits for the client's goodbye has nothing more to say
		case err := <-ends:
			t.Log("the socket has ended: ", err)
		case <-time.After(6 * time.Second):
		}
	})
	t.Run("subprotocol", func(t *testing.T) {
		c := dial(t, "/")
		if got := c.protocol(); got != "ledger.v1" {
			t.Errorf("agreed on %q; want the one that both know", got)
		}
		finish(t, c)
	})
	t.Run("compression is agreed on by the ends", func(t *testing.T) {
		c, resp, err := client.dial("ws://"+p.address+"/?compress", true)
		if err != nil {
			t.Fatal(err)
		}
		defer c.cut()
		if got := resp.Header.Get("Sec-WebSocket-Extensions"); !strings.HasPrefix(got, "permessage-deflate") {
			t.Errorf("extensions %q", got)
		}
		echoes(t, c, true, bytes.Repeat([]byte("compress me "), 4000), 0)
		finish(t, c)
	})
	t.Run("refused handshake", func(t *testing.T) {
		_, resp, err := client.dial("ws://"+p.address+"/refuse", false)
		if err == nil || resp == nil || resp.StatusCode != http.StatusForbidden {
			t.Errorf("%v, %v", resp, err)
		}
	})
	t.Run("client vanishes", func(t *testing.T) {
		c := dial(t, "/")
		echoes(t, c, true, []byte("hello"), 0)
		c.cut()
		var polite closed
		if err := ended(t); errors.As(err, &polite) && polite.code != 1006 {
			t.Errorf("the server was told %v of a client that said nothing", err)
		}
	})
	t.Run("server vanishes", func(t *testing.T) {
		c := dial(t, "/vanish")
		var polite closed
		if _, _, err := c.read(); err == nil || errors.As(err, &polite) && polite.code != 1006 {
			t.Errorf("the client was told %v of a server that said nothing", err)
		}
	})
	t.Run("200 at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				c, _, err := client.dial("ws://"+p.address+"/", false)
				if err != nil {
					t.Errorf("%d: %v", i, err)
					return
				}
				defer c.cut()
				for n := range 5 {
					want := fmt.Sprintf("%d of %d", n, i)
					if err := c.write(true, []byte(want), 0); err != nil {
						t.Errorf("%d: %v", i, err)
						return
					}
					if _, b, err := c.read(); err != nil || string(b) != want {
						t.Errorf("%d: %q, %v; want %q", i, b, err, want)
						return
					}
				}
			})
		}
		wg.Wait()
		for range 200 {
			_ = ended(t)
		}
	})
}
