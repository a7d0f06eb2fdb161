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
