package http2

import (
	"net"
	"time"
)

// Server is the server's side of one connection.
type Server struct{ c conn }

// NewServer makes a server of an accepted connection, of which the bytes early
// have been read already. They may begin with the client's preface and are not
// used after NewServer returns. On a *net.TCPConn the server waits without a
// read buffer.
func NewServer(nc net.Conn, early []byte, cfg *Config) *Server {
	s := &Server{}
	s.c.init(nc, early, cfg, true)
	return s
}

// Serve runs handle for each request, each in a goroutine, and closes the
// connection. It returns when the connection is over and all handlers have
// returned: nil after Drain or for an idle connection, else what ended it (a
// *ConnError if the client broke a rule, io.EOF if it left).
func (s *Server) Serve(handle func(*Stream)) error {
	s.c.handle = handle
	return s.c.run()
}

// Drain takes no new streams and ends the connection when those in flight have
// ended (RFC 9113 section 6.8). It returns at once. It may be called at any
// time, more than once, from any goroutine.
func (s *Server) Drain() {
	c := &s.c
	c.mu.Lock()
	defer c.unlock()
	if c.goAway != goAwayNone || c.err != nil {
		return
	}
	c.goAway, c.drainedAt = goAwaySoon, time.Now()
	c.put(appendPing(appendGoAway(c.buf(), maxStreamID, NoError, ""), false, []byte(drainPing)))
	c.busy()
	c.flush()
}

// Close ends the connection and all its streams at once.
func (s *Server) Close() { s.c.close() }

func (c *conn) close() {
	c.mu.Lock()
	c.stop(ErrClosed)
	c.unlock()
	_ = c.nc.Close()
}

// worker is a goroutine that waits for the next stream. It keeps its stack,
// which handlers have grown.
type worker struct{ ch chan *Stream }

// dispatch gives a new stream to a handler. Called with mu held.
func (c *conn) dispatch(s *Stream) {
	if n := len(c.workers); n > 0 {
		w := c.workers[n-1]
		c.workers = c.workers[:n-1]
		c.fewest = min(c.fewest, n-1)
		w.ch <- s
		return
	}
	c.wg.Go(func() { c.work(s) })
}

func (c *conn) work(s *Stream) {
	w := &worker{ch: make(chan *Stream, 1)}
	for ok := true; ok; s, ok = <-w.ch {
		c.mu.Lock()
		gen := s.gen
		c.unlock()
		c.handle(s)
		c.mu.Lock()
		if s.gen == gen {
			s.release()
		}
		if c.err != nil || len(c.workers) >= maxIdleWorkers {
			c.unlock()
			return
		}
		c.workers = append(c.workers, w)
		c.unlock()
	}
}
