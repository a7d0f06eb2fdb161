package proxy

import (
	"errors"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
)

// upgrade passes a 101 on (RFC 9110, 7.8). The request must have ended: what
// follows it belongs to the new protocol. Both sides speak HTTP/1.1, for nobody
// else was asked to switch.
func (f *forwarding) upgrade() result {
	x := f.exchange
	d, ok := x.down.(*h1Down)
	if !ok || !x.req.Upgrade || !f.resp.Upgrade || f.up != callee(&f.h1) {
		return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.endpoint.Name + " switched protocols unasked"}
	}
	for f.pump != nil && !f.pumpEnded() {
		select {
		case <-f.pump:
		case <-time.After(lastLook):
			if d.gone() {
				return f.lost(errClientGone)
			}
		}
	}
	if !x.bodyDone || f.broken || f.pump != nil && !f.pumpDone {
		return result{failure: retry.Reset, status: 502, flags: accesslog.UPE, why: f.endpoint.Name + " switched protocols before the request was complete"}
	}
	f.heard = time.Now()
	x.status, x.answered, x.mustClose = 101, true, true
	d.take()
	d.out = http1.AppendResponseHead(d.out, &f.resp, &http1.Edit{KeepUpgrade: true})
	early := f.h1.c.Unread()
	d.out = append(d.out, early...)
	x.bytesOut = int64(len(early))
	f.h1.c.Use(len(early))
	if err := d.flush(); err != nil {
		return left(err, 0)
	}
	return result{status: 101, tunnel: true}
}

// converse carries bytes both ways after a 101 until both sides have ended. The
// attempt is over by then: a tunnel may last for days.
func (f *forwarding) converse() {
	x, c := f.exchange, f.h1.c
	defer func() {
		f.called(nil)
		f.h1.release(false)
	}()
	d, ok := x.down.(*h1Down)
	if !ok {
		panic("proxy: a tunnel for a client that cannot have asked for it")
	}
	if x.capture != nil && x.identity == "" {
		x.capture.lasts(d.conn)
	}
	early := d.conn.Unread()
	d.conn.Use(len(early))
	x.pumped += int64(len(early))
	err := errors.Join(d.conn.TCP().SetDeadline(time.Time{}), c.TCP().SetDeadline(time.Time{}))
	if err == nil && len(early) > 0 {
		_, err = c.Transport().Write(early)
	}
	if err != nil {
		r := f.lost(err)
		x.flags |= r.flags
		x.detail = r.why
		return
	}
	in, out := tunnel(d.conn.Transport(), c.Transport())
	x.pumped += in
	x.bytesOut += out
}
