package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// relayBuffer is what one direction carries at once.
const relayBuffer = 32 << 10

// relay carries bytes both ways between each connection and one of its own to
// the upstream: through a buffer, which is cheapest for some KiB, or with
// splice(2), which is cheapest for more and takes a pipe for each direction.
func relay(ctx context.Context, o options) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("listen at %s: %w", o.listen, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := l.Accept()
		if err != nil {
			return errors.Join(ctx.Err(), err)
		}
		conns.Go(func() { carry(ctx, c, o) })
	}
}

func carry(ctx context.Context, down net.Conn, o options) {
	up, err := new(net.Dialer).DialContext(ctx, "tcp", o.to)
	if err != nil {
		_ = down.Close() // the caller sees it
		return
	}
	both := func() {
		_ = down.Close() // both directions end with the first
		_ = up.Close()
	}
	stop := context.AfterFunc(ctx, both)
	defer stop()
	pour := pour
	if o.splice {
		pour = func(dst, src net.Conn) { _, _ = io.Copy(dst, src) } // its end is the connection's
	}
	var back sync.WaitGroup
	back.Go(func() { pour(down, up); both() })
	pour(up, down)
	both()
	back.Wait()
}

func pour(dst, src net.Conn) {
	buf := make([]byte, relayBuffer)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}
