package wire_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a connection on loopback: ours, and the peer's end.
func pair(t testing.TB) (*wire.Conn, *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	peer, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	c, err := wire.New(tcp, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = peer.Close() })
	return c, peer
}

func say(t testing.TB, peer net.Conn, s string) {
	t.Helper()
	if _, err := peer.Write([]byte(s)); err != nil {
		t.Fatal(err)
	}
}

// fill reads until n bytes are unread.
func fill(t testing.TB, c *wire.Conn, n int) string {
	t.Helper()
	for len(c.Unread()) < n {
		if err := c.Fill(); err != nil {
			t.Fatalf("Fill with %q unread: %v", c.Unread(), err)
		}
	}
	return string(c.Unread())
}

func TestEarlyBytesComeFirst(t *testing.T) {
	a, peer := pair(t)
	c, err := wire.New(a.TCP(), []byte("GET "))
	if err != nil {
		t.Fatal(err)
	}
	say(t, peer, "/pay")
	if got := fill(t, c, 8); got != "GET /pay" {
		t.Fatalf("read %q", got)
	}
}

func TestAPinnedHeadStaysWhereItIs(t *testing.T) {
	c, peer := pair(t)
	head := "HEAD" + strings.Repeat("h", 15<<10)
	say(t, peer, head)
	fill(t, c, len(head))
	pinned := c.Unread()
	c.Pin(len(head))
	body := strings.Repeat("b", 200<<10)
	go func() { _, _ = peer.Write([]byte(body)) }()
	for got := 0; got < len(body); {
		if c.Empty() {
			if err := c.Fill(); err != nil {
				t.Fatal(err)
			}
		}
		for _, b := range c.Unread() {
			if b != 'b' {
				t.Fatalf("byte %d of the body is %q", got, b)
			}
		}
		got += len(c.Unread())
		c.Use(len(c.Unread()))
	}
	if string(pinned) != head {
		t.Fatal("the body overwrote the pinned head")
	}
	c.Unpin()
}

func TestADeadlineThatMovesOnDoesNotEndARead(t *testing.T) {
	c, peer := pair(t)
	c.ReadBy(time.Now().Add(20 * time.Millisecond))
	c.ReadBy(time.Now().Add(time.Minute)) // the system still has the nearer one
	timer := time.AfterFunc(60*time.Millisecond, func() { _, _ = peer.Write([]byte("x")) })
	defer timer.Stop()
	if err := c.Fill(); err != nil {
		t.Fatalf("Fill: %v; want the byte that came in time", err)
	}
}

func TestAReadEndsAtItsDeadline(t *testing.T) {
	c, peer := pair(t)
	c.ReadBy(time.Now().Add(10 * time.Millisecond))
	if err := c.Fill(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Fill: %v; want a deadline error", err)
	}
	say(t, peer, "late")
	time.Sleep(20 * time.Millisecond)
	if err := c.Fill(); err != nil {
		t.Fatalf("Fill: %v; want what has come, though the deadline has passed", err)
	}
	c.Use(4)
	c.ReadBy(time.Now().Add(time.Minute))
	timer := time.AfterFunc(20*time.Millisecond, func() { _, _ = peer.Write([]byte("x")) })
	defer timer.Stop()
	if err := c.Fill(); err != nil {
		t.Fatalf("Fill after a new deadline: %v", err)
	}
}

func TestInterruptWakesAReaderUntilResume(t *testing.T) {
	c, peer := pair(t)
	c.ReadBy(time.Now().Add(time.Hour))
	for range 3 {
		var wg sync.WaitGroup
		wg.Go(func() { time.Sleep(5 * time.Millisecond); c.Interrupt() })
		if err := c.Fill(); !errors.Is(err, wire.ErrInterrupted) {
			t.Fatalf("Fill: %v; want ErrInterrupted", err)
		}
		wg.Wait()
		if err := c.Fill(); !errors.Is(err, wire.ErrInterrupted) {
			t.Fatalf("second Fill: %v; want ErrInterrupted until Resume", err)
		}
		c.Resume()
		say(t, peer, "x")
		if err := c.Fill(); err != nil {
			t.Fatalf("Fill after Resume: %v", err)
		}
		c.Use(1)
	}
	c.Interrupt()
	say(t, peer, "y")
	time.Sleep(20 * time.Millisecond)
	if err := c.Fill(); err != nil {
		t.Fatalf("Fill: %v; want the byte that came before", err)
	}
}

func TestAWriteGoesOnWhenItsDeadlineMovedOn(t *testing.T) {
	c, peer := pair(t)
	big := make([]byte, 16<<20)
	c.WriteBy(time.Now().Add(20 * time.Millisecond))
	c.WriteBy(time.Now().Add(time.Minute))
	var wg sync.WaitGroup
	wg.Go(func() {
		time.Sleep(60 * time.Millisecond)
		if n, err := io.Copy(io.Discard, io.LimitReader(peer, int64(len(big)))); err != nil || n != int64(len(big)) {
			t.Errorf("the peer read %d bytes, %v", n, err)
		}
	})
	if n, err := c.Write(big); err != nil || n != len(big) {
		t.Errorf("Write: %d, %v", n, err)
	}
	wg.Wait()
}

func TestAWriteToAPeerThatReadsNothingEnds(t *testing.T) {
	c, _ := pair(t)
	big := make([]byte, 64<<20)
	c.WriteBy(time.Now().Add(20 * time.Millisecond))
	if _, err := c.Write(big); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write: %v; want a deadline error", err)
	}
	c.WriteBy(time.Now().Add(time.Minute))
	var wg sync.WaitGroup
	wg.Go(func() { time.Sleep(20 * time.Millisecond); c.InterruptWrite() })
	if _, err := c.Write(big); !errors.Is(err, wire.ErrInterrupted) {
		t.Fatalf("Write: %v; want ErrInterrupted", err)
	}
	wg.Wait()
}

func TestGoneAndAlive(t *testing.T) {
	c, peer := pair(t)
	if c.Gone() != nil || !c.Alive() {
		t.Fatal("a quiet connection is gone or not alive")
	}
	say(t, peer, "x")
	time.Sleep(20 * time.Millisecond)
	if c.Gone() != nil || c.Alive() {
		t.Fatal("a connection with an unasked byte is gone, or fit for use")
	}
	fill(t, c, 1)
	c.Use(1)
	_ = peer.CloseWrite()
	time.Sleep(20 * time.Millisecond)
	if !errors.Is(c.Gone(), io.EOF) || c.Alive() {
		t.Fatalf("a half-closed connection: %v; want io.EOF, and not fit for use", c.Gone())
	}
	_ = peer.SetLinger(0)
	_ = peer.Close()
	time.Sleep(20 * time.Millisecond)
	if err := c.Gone(); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("a connection that was reset: %v", err)
	}
}

// A request costs no allocation here, and between two requests no buffer is
// held.
func TestAnIdleConnectionHoldsNothing(t *testing.T) {
	c, peer := pair(t)
	_ = peer.SetDeadline(time.Time{})
	in, ping, pong := make([]byte, 4), []byte("ping"), []byte("pong")
	n := testing.AllocsPerRun(200, func() {
		if _, err := peer.Write(ping); err != nil {
			t.Fatal(err)
		}
		c.ReadBy(time.Now().Add(time.Minute))
		for len(c.Unread()) < 4 {
			if err := c.Fill(); err != nil {
				t.Fatal(err)
			}
		}
		c.Pin(4)
		c.WriteBy(time.Now().Add(time.Minute))
		if _, err := c.Write(pong); err != nil {
			t.Fatal(err)
		}
		c.Unpin()
		if !c.Alive() || c.Unread() != nil {
			t.Fatal("something is held")
		}
		if _, err := io.ReadFull(peer, in); err != nil {
			t.Fatal(err)
		}
	})
	if n >= 1 && !raceEnabled {
		t.Errorf("%v allocations a request", n)
	}
}

// What was not interrupted has the deadline it had, or none.
func TestResumeKnowsWhatWasInterrupted(t *testing.T) {
	c, _ := pair(t)
	ends := func(what string, f func() error) {
		t.Helper()
		ended := make(chan error, 1)
		go func() { ended <- f() }()
		select {
		case err := <-ended:
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: %v; want the end of the deadline", what, err)
			}
		case <-time.After(2 * time.Second):
			t.Errorf("%s waits beyond its deadline", what)
			_ = c.Close()
			t.Log(<-ended) // either may have come first
		}
	}
	c.InterruptWrite()
	c.Resume()
	c.ReadBy(time.Now().Add(50 * time.Millisecond))
	ends("a read", c.Fill)

	c, _ = pair(t)
	c.Interrupt()
	c.Resume()
	c.WriteBy(time.Now().Add(50 * time.Millisecond))
	ends("a write", func() error { _, err := c.Write(make([]byte, 16<<20)); return err })
}

// A connection may be closed while it changes over to TLS.
func TestCloseDuringSecure(t *testing.T) {
	c, _ := pair(t)
	var wg sync.WaitGroup
	wg.Go(func() { _ = c.Close() })
	c.Secure(tls.Server(c.TCP(), &tls.Config{MinVersion: tls.VersionTLS13}))
	wg.Wait()
}
