package torture

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// mode is how a backend behaves.
type mode int

const (
	healthy  mode = iota
	busy          // refuses everything for now: 429 and 503 in turn; forward closes the connection
	busyItem      // refuses every third record for now
	tooLarge      // refuses requests of more than limit bytes: 413
	reject        // refuses every tenth record for good: 400
	slow          // answers after delay
	stall         // accepts and never answers
	swallow       // stores, and closes the connection instead of answering
)

// fault is a mode with its measure.
type fault struct {
	mode  mode
	delay time.Duration
	limit int
}

// gate is what all backends of the kit have: a port that stays the same, a
// listener that can be gone, and a fault.
type gate struct {
	mu       sync.Mutex
	addr     string
	listener net.Listener
	conns    map[net.Conn]struct{}
	fault    fault
	changed  chan struct{} // closed when the fault changes
	serve    func(net.Listener)
	serving  sync.WaitGroup
}

func newGate(serve func(net.Listener)) (*gate, error) {
	g := &gate{addr: "127.0.0.1:0", conns: map[net.Conn]struct{}{}, changed: make(chan struct{}), serve: serve}
	return g, g.up()
}

// up listens, on the same port as before. It is harmless when it does already.
func (g *gate) up() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.listener != nil {
		return nil
	}
	var err error
	var l net.Listener
	for range 100 { // a connection of another program may have the port for a moment
		if l, err = net.Listen("tcp", g.addr); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	g.addr, g.listener = l.Addr().String(), l
	tracked := &tracking{l, g}
	g.serving.Go(func() { g.serve(tracked) })
	return nil
}

// down refuses connections and breaks those that there are.
func (g *gate) down() {
	g.mu.Lock()
	if g.listener != nil {
		_ = g.listener.Close() // nobody needs it any more
		g.listener = nil
	}
	for c := range g.conns {
		_ = c.Close() // that is the purpose
	}
	clear(g.conns)
	g.mu.Unlock()
	g.serving.Wait()
}

func (g *gate) set(f fault) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fault = f
	close(g.changed)
	g.changed = make(chan struct{})
}

// now returns the fault, and what is closed when there is another.
func (g *gate) now() (fault, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fault, g.changed
}

var errStalled = errors.New("stalled")

// wait delays an answer as the fault says. It fails if there is to be none.
func (g *gate) wait(ctx context.Context) (fault, error) {
	f, changed := g.now()
	switch f.mode {
	case slow:
		select {
		case <-time.After(f.delay):
		case <-ctx.Done():
			return f, ctx.Err()
		}
	case stall:
		select {
		case <-changed:
		case <-ctx.Done():
		}
		return f, errStalled
	default:
	}
	return f, nil
}

// tracking is a listener that knows its connections.
type tracking struct {
	net.Listener
	gate *gate
}

func (t *tracking) Accept() (net.Conn, error) {
	c, err := t.Listener.Accept()
	if err != nil {
		return nil, err
	}
	t.gate.mu.Lock()
	defer t.gate.mu.Unlock()
	if t.gate.listener != t.Listener { // it went down in between
		_ = c.Close() // that is the purpose
		return nil, net.ErrClosed
	}
	t.gate.conns[c] = struct{}{}
	return &trackedConn{c, t.gate}, nil
}

type trackedConn struct {
	net.Conn
	gate *gate
}

func (c *trackedConn) Close() error {
	c.gate.mu.Lock()
	delete(c.gate.conns, c.Conn)
	c.gate.mu.Unlock()
	return c.Conn.Close()
}
