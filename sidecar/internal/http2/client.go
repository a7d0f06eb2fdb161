package http2

import "net"

// Client is the client's side of one connection.
type Client struct{ c conn }

// NewClient makes a client of a connection that was dialled. Streams can be
// opened at once; what they write is sent with the preface.
func NewClient(nc net.Conn, cfg *Config) *Client {
	c := &Client{}
	c.c.init(nc, nil, cfg, false)
	return c
}

// Run reads until the connection ends, and closes it: nil after Drain or for an
// idle connection, else what ended it (a *ConnError if the server broke a rule
// or said that we did, io.EOF if it left). The caller owns the goroutine it runs
// in; it must run for streams to get on.
func (c *Client) Run() error { return c.c.run() }

// Open takes the place of a stream, which Release gives back. It returns
// ErrBusy if the server allows no more now, or ErrGone if the connection takes
// no more at all. Before the server has told its limit, 100 are assumed.
func (c *Client) Open() (*Stream, error) {
	cc := &c.c
	cc.mu.Lock()
	defer cc.unlock()
	switch {
	case cc.err != nil || cc.stopErr != nil || cc.goAway >= goAwayFinal || cc.nextID > maxStreamID:
		return nil, ErrGone
	case cc.active >= cc.peerStreams:
		return nil, ErrBusy
	}
	cc.busy()
	return cc.newStream(0), nil
}

// Active is the number of streams that are open and not released.
func (c *Client) Active() int {
	c.c.mu.Lock()
	defer c.c.mu.Unlock()
	return c.c.active
}

// Usable reports whether Open may succeed, now or when streams have ended.
func (c *Client) Usable() bool {
	cc := &c.c
	cc.mu.Lock()
	defer cc.mu.Unlock()
	return cc.err == nil && cc.stopErr == nil && cc.goAway < goAwayFinal && cc.nextID <= maxStreamID
}

// Drain opens no more streams and ends the connection when those in flight have
// been released. It returns at once, may be called more than once, and from any
// goroutine.
func (c *Client) Drain() {
	cc := &c.c
	cc.mu.Lock()
	defer cc.unlock()
	if cc.goAway < goAwayFinal {
		cc.goAway = goAwayFinal
		cc.lastID = maxStreamID
		cc.put(appendGoAway(cc.buf(), 0, NoError, ""))
		cc.flush()
	}
	cc.endIfDrained()
}

// Close ends the connection and all its streams at once.
func (c *Client) Close() { c.c.close() }
