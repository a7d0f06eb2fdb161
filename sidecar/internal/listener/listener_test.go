package listener_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/listener"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a group until the test ends.
func serve(t *testing.T, g *listener.Group, handle func(*listener.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := g.Serve(ctx, l.(*net.TCPListener), handle); !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return l.Addr().String()
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	return c
}

func TestDrainWakesTheIdleWaitsForTheBusyAndCutsTheRest(t *testing.T) {
	g := &listener.Group{}
	idling, release := make(chan bool, 1), make(chan struct{})
	addr := serve(t, g, func(c *listener.Conn) {
		if c.Fill() != nil {
			return
		}
		said := c.Unread()[0]
		c.Use(1)
		switch said {
		case 'i':
			idling <- true
			_ = c.FillIdle(time.Now().Add(time.Hour)) // until Drain interrupts
		case 'b':
			<-release
			_, _ = c.Write([]byte("done"))
		case 'c':
			_ = c.Fill() // busy, and nothing comes: until it is cut
		}
	})
	idle, busy, stuck := dial(t, addr), dial(t, addr), dial(t, addr)
	for c, what := range map[net.Conn]string{idle: "i", busy: "b", stuck: "c"} {
		_, _ = io.WriteString(c, what)
	}
	<-idling
	for begun := time.Now(); g.Active() != 3; time.Sleep(time.Millisecond) {
		if time.Since(begun) > 5*time.Second {
			t.Fatalf("%d connections; want 3", g.Active())
		}
	}
	ctx, stop := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer stop()
	forced := make(chan int)
	go func() { forced <- g.Drain(ctx) }()
	if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the idle connection saw %v; want its end", err)
	}
	close(release)
	if b, err := io.ReadAll(busy); string(b) != "done" {
		t.Errorf("the busy connection got %q, %v", b, err)
	}
	if n := <-forced; n != 1 {
		t.Errorf("%d connections cut; want 1", n)
	}
	if !g.Draining() || g.Active() != 0 {
		t.Errorf("draining %v, %d left", g.Draining(), g.Active())
	}
	if _, err := dial(t, addr).Read(make([]byte, 1)); err == nil {
		t.Error("a connection was served after Drain")
	}
	if g.Refused() != 1 {
		t.Errorf("%d refused; want 1", g.Refused())
	}
}

func TestALameGroupStillAcceptsAndAConnectionCanEndAlone(t *testing.T) {
	g := &listener.Group{}
	idling := make(chan bool, 1)
	addr := serve(t, g, func(c *listener.Conn) {
		for range 2 {
			if c.Empty() {
				idling <- true
				if c.FillIdle(time.Now().Add(time.Hour)) != nil {
					return
				}
			}
			_, _ = c.Write(c.Unread())
			c.Use(len(c.Unread()))
			if c.Ending() {
				return
			}
		}
	})
	echo := func(c net.Conn) (string, error) {
		if _, err := c.Write([]byte("x")); err != nil {
			return "", err
		}
		var b [1]byte
		n, err := io.ReadFull(c, b[:])
		return string(b[:n]), err
	}
	first := dial(t, addr)
	<-idling
	if got, err := echo(first); got != "x" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	<-idling // it waits for its next request
	g.Lame()
	if n, err := first.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("an idle connection of a lame group: %d, %v; want its end", n, err)
	}
	second := dial(t, addr)
	<-idling
	if got, err := echo(second); got != "x" || err != nil {
		t.Fatalf("a connection to a lame group: %q, %v; want one request", got, err)
	}
	if n, err := second.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("its second request: %d, %v; want its end", n, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if forced := g.Drain(ctx); forced != 0 {
		t.Errorf("%d connections were cut", forced)
	}
	if third := dial(t, addr); third != nil {
		if n, err := third.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("a connection after Drain: %d, %v; want it closed", n, err)
		}
	}
}

func TestEndEndsOneConnection(t *testing.T) {
	g := &listener.Group{}
	conns := make(chan *listener.Conn, 2)
	addr := serve(t, g, func(c *listener.Conn) {
		conns <- c
		_ = c.FillIdle(time.Now().Add(time.Hour))
	})
	a := dial(t, addr)
	(<-conns).End()
	b := dial(t, addr)
	other := <-conns
	if n, err := a.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%d, %v; want the end", n, err)
	}
	if other.Ending() {
		t.Error("the other one ends too")
	}
	_ = b.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	var timeout net.Error
	if _, err := b.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("the other one: %v; want it open", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	g.Drain(ctx)
}
