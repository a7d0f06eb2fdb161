package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// tally counts exchanges of one kind.
type tally struct {
	name string

	mu         sync.Mutex
	ok, failed int
	why        map[string]int // failures by what they said
}

// maxReasons that a tally tells apart.
const maxReasons = 12

func (t *tally) note(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		t.ok++
		return
	}
	t.failed++
	why := numbers.ReplaceAllString(err.Error(), "N")
	if len(t.why) >= maxReasons && t.why[why] == 0 {
		why = "something else"
	}
	t.why[why[:min(len(why), 160)]]++
}

// numbers are what makes equal failures look different.
var numbers = regexp.MustCompile(`[0-9]+`)

type tallies struct{ all []*tally }

func (t *tallies) String() string {
	var b strings.Builder
	for _, k := range t.all {
		fmt.Fprintf(&b, "%-10s %8d ok, %6d failed\n", k.name, k.ok, k.failed)
		for _, why := range slices.Sorted(maps.Keys(k.why)) {
			fmt.Fprintf(&b, "%30d  %s\n", k.why[why], strings.ReplaceAll(why, "\n", " "))
		}
	}
	return b.String()
}

// verdict: restarts of applications fail some exchanges, but not many.
func (t *tallies) verdict() error {
	var err error
	for _, k := range t.all {
		if k.ok == 0 || k.failed > (k.ok+k.failed)/10 {
			err = errors.Join(err, fmt.Errorf("%s: %d of %d exchanges failed; a tenth may, while applications restart", k.name, k.failed, k.ok+k.failed))
		}
	}
	return err
}

// workers of each kind.
const workers = 6

// begin starts the load, which lasts until ctx ends.
func (w *world) begin(ctx context.Context, wg *sync.WaitGroup, t *tallies, rate int) {
	loads := []struct {
		name string
		// make returns one worker's exchange, and what ends its connections.
		make func() (do func(context.Context, *rand.Rand) error, renew func())
	}{
		{"http/1.1", func() (func(context.Context, *rand.Rand) error, func()) { return w.http(1) }},
		{"http/2", func() (func(context.Context, *rand.Rand) error, func()) { return w.http(2) }},
		{"grpc", w.grpc},
		{"websocket", func() (func(context.Context, *rand.Rand) error, func()) { return w.socket, func() {} }},
		{"tcp", func() (func(context.Context, *rand.Rand) error, func()) { return w.raw, func() {} }},
	}
	pause := time.Second * time.Duration(len(loads)*workers) / time.Duration(rate)
	for _, l := range loads {
		k := &tally{name: l.name, why: map[string]int{}}
		t.all = append(t.all, k)
		for i := range workers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(i), 1))
				do, renew := l.make()
				defer func() { renew() }()
				for n := 1; ctx.Err() == nil; n++ {
					err := do(ctx, r)
					if until, _ := ctx.Deadline(); ctx.Err() != nil || time.Until(until) < time.Second {
						return // what fails now may fail because the load ends
					}
					k.note(err)
					if n%(20+10*i) == 0 { // some clients keep connections for longer than others
						renew()
						do, renew = l.make()
					}
					select {
					case <-ctx.Done():
					case <-time.After(time.Duration(float64(pause) * 2 * r.Float64())):
					}
				}
			})
		}
	}
}

// payload is bytes of a size that is mostly small.
func payload(r *rand.Rand) []byte {
	n := r.IntN(2 << 10)
	if r.IntN(50) == 0 {
		n = r.IntN(300 << 10)
	}
	return bytes.Repeat([]byte{byte('a' + r.IntN(26))}, n)
}

func (w *world) http(version int) (func(context.Context, *rand.Rand) error, func()) {
	p := &http.Protocols{}
	p.SetHTTP1(version == 1)
	p.SetUnencryptedHTTP2(version == 2)
	// A connection that was dialled for a request which then gave up becomes idle
	// after the client was thrown away: only a timeout ends it.
	tr := &http.Transport{Protocols: p, DisableCompression: true, IdleConnTimeout: 10 * time.Second}
	c := &http.Client{Transport: tr, Timeout: 10 * time.Second}
	names := []string{"web", "web2"} // each version of the caller to each version of the callee
	return func(ctx context.Context, r *rand.Rand) error {
		if r.IntN(30) == 0 { // one that gives up
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, time.Duration(r.IntN(3000))*time.Microsecond)
			defer cancel()
		}
		sent := payload(r)
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+w.calls[names[r.IntN(2)]]+"/echo", bytes.NewReader(sent))
		if err != nil {
			return err
		}
		resp, err := c.Do(req)
		if err != nil {
			return unlessAsked(ctx, err)
		}
		defer func() { _ = resp.Body.Close() }()
		got, err := io.ReadAll(resp.Body)
		switch {
		case err != nil:
			return unlessAsked(ctx, err)
		case resp.StatusCode != http.StatusOK:
			return fmt.Errorf("%s: %.100s", resp.Status, got)
		case !bytes.Equal(got, sent):
			return fmt.Errorf("%d bytes came back as %d", len(sent), len(got))
		}
		return nil
	}, tr.CloseIdleConnections
}

// unlessAsked is err, unless the client has given up as it meant to.
func unlessAsked(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

func (w *world) grpc() (func(context.Context, *rand.Rand) error, func()) {
	conn, err := grpc.NewClient("passthrough:///"+w.calls["rpc"], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return func(context.Context, *rand.Rand) error { return err }, func() {}
	}
	c := healthv1.NewHealthClient(conn)
	return func(ctx context.Context, r *rand.Rand) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if r.IntN(4) > 0 {
			_, err := c.Check(ctx, &healthv1.HealthCheckRequest{})
			return err
		}
		s, err := c.Watch(ctx, &healthv1.HealthCheckRequest{}) // a stream that its client cancels
		if err != nil {
			return err
		}
		_, err = s.Recv()
		return err
	}, func() { _ = conn.Close() }
}

func (w *world) socket(ctx context.Context, r *rand.Rand) error {
	c, resp, err := websocket.DefaultDialer.DialContext(ctx, "ws://"+w.calls["web"]+"/socket", nil)
	if resp != nil {
		_ = resp.Body.Close() // the library has read it
	}
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	for range 1 + r.IntN(8) {
		sent := payload(r)
		wrote := make(chan error, 1)
		go func() { wrote <- c.WriteMessage(websocket.BinaryMessage, sent) }()
		_, got, err := c.ReadMessage()
		if err != nil {
			_ = c.Close()
		}
		if err := errors.Join(<-wrote, err); err != nil {
			return err
		}
		if !bytes.Equal(got, sent) {
			return fmt.Errorf("%d bytes came back as %d", len(sent), len(got))
		}
	}
	if r.IntN(2) == 0 { // the other half vanishes
		_ = c.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(time.Second))
		_, _, _ = c.ReadMessage()
	}
	return nil
}

func (w *world) raw(ctx context.Context, r *rand.Rand) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", w.calls["raw"])
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if r.IntN(20) == 0 {
		return nil // comes and goes, as probes do
	}
	sent := append(payload(r), '.')
	go func() {
		_, _ = c.Write(sent) // what is missing is missed below
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.CloseWrite()
		}
	}()
	got, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(got, sent) {
		err = fmt.Errorf("%d bytes came back as %d", len(sent), len(got))
	}
	return err
}
