package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// pair is a reader and the connection that feeds it.
func pair(t *testing.T) (*reader, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	peer, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), peer.Close() })
	r := &reader{nc: c.(*net.TCPConn)}
	if err := r.watch(); err != nil {
		t.Fatal(err)
	}
	return r, peer.(*net.TCPConn)
}

// A drain wakes a connection by its deadline. A request that has come by then
// is still served.
func TestWaitSeesBytesThatCameBeforeTheDeadline(t *testing.T) {
	r, peer := pair(t)
	if r.arrived() || r.gone() {
		t.Error("a silent peer has neither sent nor gone")
	}
	_ = r.nc.SetReadDeadline(time.Unix(1, 0))
	if err := r.wait(); err == nil {
		t.Fatal("waited past the deadline for nothing")
	}
	_, _ = peer.Write([]byte("G"))
	for end := time.Now().Add(time.Second); !r.arrived(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the byte does not arrive")
		}
	}
	if err := r.wait(); err != nil {
		t.Errorf("%v; want the byte", err)
	}
}

func TestGoneSeesBothEnds(t *testing.T) {
	r, peer := pair(t)
	_ = peer.CloseWrite()
	for end := time.Now().Add(time.Second); !r.gone(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the peer's end goes unnoticed")
		}
	}
	r, _ = pair(t)
	_ = r.nc.Close()
	if !r.gone() {
		t.Error("our own end goes unnoticed")
	}
}

// A head that has been parsed stays as it is, whatever is read behind it.
func TestPinnedHeadSurvivesTheBody(t *testing.T) {
	for _, n := range []int{100, bufferSize - bufferSize/4 + 1, bufferSize, 3 * bufferSize} {
		r, peer := pair(t)
		head := bytes.Repeat([]byte("h"), n)
		body := bytes.Repeat([]byte("b"), 4*bufferSize)
		go func() { _, _ = peer.Write(append(head[:n:n], body...)); _ = peer.CloseWrite() }()
		for len(r.unread()) < n {
			if err := r.fill(); err != nil {
				t.Fatal(err)
			}
		}
		pinned := r.unread()[:n]
		r.pin(n)
		got := 0
		for {
			for _, c := range r.unread() {
				if c != 'b' {
					t.Fatalf("head of %d: %q in the body", n, c)
				}
			}
			got += len(r.unread())
			r.use(len(r.unread()))
			if err := r.fill(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			// Whoever takes a buffer from the pool meanwhile may write to it.
			if p, ok := buffers.Get().(*[]byte); ok {
				clear(*p)
				buffers.Put(p)
			}
		}
		if got != len(body) || !bytes.Equal(pinned, head) {
			t.Errorf("head of %d: %d bytes of body, head intact: %v", n, got, bytes.Equal(pinned, head))
		}
		r.unpin()
		if r.buf != nil || r.pooled != nil {
			t.Errorf("head of %d: an idle reader holds a buffer", n)
		}
	}
}
