package apptest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// frame of a client (RFC 6455, 5.2), masked with zeros, which change nothing.
func frame(first byte, payload []byte) []byte {
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

const (
	fin                               = 0x80
	opMore, opText, opBinary          = 0, 1, 2
	opClose, opPing, opPong, reserved = 8, 9, 10, 3
)

const socketHandshake = "GET / HTTP/1.1\r\nHost: peer\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

// TestWebSocketFrames: what no library sends, as frames, in the order of the
// Autobahn suite. The application judges them, and the sidecars carry its
// judgement back unchanged.
func TestWebSocketFrames(t *testing.T) {
	t.Parallel()
	address, ends := socketServer(t, libraries[0])
	p := newPair(t, "http", address, false)
	done := make(chan struct{})
	go func() { // nobody asks how these sockets ended
		defer close(done)
		for {
			select {
			case err := <-ends:
				t.Log("a socket has ended: ", err)
			case <-t.Context().Done():
				return
			}
		}
	}()
	t.Cleanup(func() { <-done })
	text := func(s string) []byte { return frame(fin|opText, []byte(s)) }
	for _, c := range []struct {
		name   string
		frames [][]byte
		want   []byte // from the server, frames as they are
		code   uint16 // of the server's goodbye; 0 is none
	}{
		{"1 echo of text", [][]byte{text("hello")}, []byte("\x81\x05hello"), 0},
		{"2 ping is answered with its payload", [][]byte{frame(fin|opPing, []byte("\x00\xff"))}, []byte("\x8a\x02\x00\xff"), 0},
		{"2 ping of 125 bytes", [][]byte{frame(fin|opPing, bytes.Repeat([]byte{0xfe}, 125))}, append([]byte("\x8a\x7d"), bytes.Repeat([]byte{0xfe}, 125)...), 0},
		{"2 ping of 126 bytes", [][]byte{frame(fin|opPing, make([]byte, 126))}, nil, 1002},
		{"2 pong unasked", [][]byte{frame(fin|opPong, []byte("well")), text("a")}, []byte("\x81\x01a"), 0},
		{"3 reserved bit", [][]byte{frame(fin|0x40|opText, []byte("a"))}, nil, 1002},
		{"4 reserved opcode", [][]byte{frame(fin|reserved, nil)}, nil, 1002},
		{"5 ping between fragments", [][]byte{frame(opText, []byte("ab")), frame(fin|opPing, []byte("x")), frame(fin|opMore, []byte("c"))}, []byte("\x8a\x01x\x81\x03abc"), 0},
		{"5 fragmented ping", [][]byte{frame(opPing, nil)}, nil, 1002},
		{"5 continuation of nothing", [][]byte{frame(fin|opMore, []byte("a"))}, nil, 1002},
		{"5 text inside a fragmented text", [][]byte{frame(opText, []byte("a")), text("b")}, nil, 1002},
		{"7 close is answered", [][]byte{frame(fin|opClose, []byte("\x03\xe8"))}, nil, 1000},
		{"7 close of one byte", [][]byte{frame(fin|opClose, []byte{3})}, []byte("\x88\x00"), 0}, // gorilla takes it for none
		{"7 close with a forbidden code", [][]byte{frame(fin|opClose, []byte("\x03\xed"))}, nil, 1002},
		{"7 nothing is read behind close", [][]byte{frame(fin|opClose, []byte("\x0f\xa0")), text("late")}, nil, 4000},
		{"9 frame of 1 MiB", [][]byte{frame(fin|opBinary, make([]byte, 1<<20))}, append([]byte("\x82\x7f\x00\x00\x00\x00\x00\x10\x00\x00"), make([]byte, 1<<20)...), 0},
		{"unmasked", [][]byte{[]byte("\x81\x01a")}, nil, 1002},
	} {
		for _, way := range []string{"behind the answer", "behind the handshake", "byte by byte"} {
			t.Run(c.name+" "+way, func(t *testing.T) {
				sent := bytes.Join(c.frames, nil)
				if way == "byte by byte" && len(sent) > 1000 {
					t.Skip("that takes long and shows nothing more")
				}
				conn := dialRaw(t, p.address)
				r := bufio.NewReader(conn)
				if way == "behind the handshake" { // in the same write: an application may not wait for its 101
					go func() { _, _ = conn.Write(append([]byte(socketHandshake), sent...)) }()
				} else if _, err := io.WriteString(conn, socketHandshake); err != nil {
					t.Fatal(err)
				}
				resp, err := http.ReadResponse(r, nil)
				if err != nil || resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-Websocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
					t.Fatalf("%v, %v", resp, err)
				}
				switch way {
				case "behind the answer":
					go func() { _, _ = conn.Write(sent) }()
				case "byte by byte":
					for i := range sent {
						if _, err := conn.Write(sent[i : i+1]); err != nil {
							break // judged before it was whole
						}
					}
				}
				got := make([]byte, len(c.want))
				if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, c.want) {
					t.Fatalf("%.40q, %v; want %.40q", got, err, c.want)
				}
				if c.code != 0 {
					bye := make([]byte, 4)
					if _, err := io.ReadFull(r, bye); err != nil || bye[0] != fin|opClose || binary.BigEndian.Uint16(bye[2:]) != c.code {
						t.Errorf("goodbye %q, %v; want %d", bye, err, c.code)
					}
				}
			})
		}
	}
}

// TestUpgradedHalves: each end of an upgraded connection may close its direction
// and still hear the other.
func TestUpgradedHalves(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = c.Close() }()
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			t.Error("not TCP")
			return
		}
		_, _ = rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: words\r\n\r\n")
		_ = rw.Flush()
		if r.URL.Path == "/server" { // it ends first, and hears the client all the same
			_, _ = io.WriteString(c, "first")
			_ = tcp.CloseWrite()
			b, err := io.ReadAll(rw)
			if string(b) != "last" || err != nil {
				t.Errorf("the server heard %q, %v", b, err)
			}
			return
		}
		b, err := io.ReadAll(rw) // to the client's end
		if err != nil {
			t.Error(err)
		}
		time.Sleep(50 * time.Millisecond)
		_, _ = io.WriteString(c, "heard "+string(b))
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { _ = s.Close(); <-done })
	p := newPair(t, "http", l.Addr().String(), false)

	begin := func(t *testing.T, path string) (*net.TCPConn, *bufio.Reader) {
		t.Helper()
		c := dialRaw(t, p.address)
		r := bufio.NewReader(c)
		_, _ = io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: peer\r\nConnection: Upgrade\r\nUpgrade: words\r\n\r\n")
		resp, err := http.ReadResponse(r, nil)
		if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%v, %v", resp, err)
		}
		return c, r
	}
	t.Run("the client ends first", func(t *testing.T) {
		c, r := begin(t, "/client")
		_, _ = io.WriteString(c, "all")
		_ = c.CloseWrite()
		if b, err := io.ReadAll(r); err != nil || string(b) != "heard all" {
			t.Errorf("%q, %v", b, err)
		}
	})
	t.Run("the server ends first", func(t *testing.T) {
		c, r := begin(t, "/server")
		if b, err := io.ReadAll(r); err != nil || string(b) != "first" {
			t.Errorf("%q, %v", b, err)
		}
		if _, err := io.WriteString(c, "last"); err != nil {
			t.Error(err)
		}
		_ = c.Close()
	})
}

// dialRaw connects with ten seconds for all that follows.
func dialRaw(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		t.Fatal("not TCP")
	}
	return tcp
}
