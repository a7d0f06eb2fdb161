package loop

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// large answers each byte with n bytes, and leaves what it is told to unread.
type large struct {
	n     int
	seen  []int // what Receive was given
	ended error
}

func (h *large) Receive(c *Conn, data []byte) (int, error) {
	h.seen = append(h.seen, len(data))
	if len(data) < 2 {
		return 0, nil // a message is two bytes
	}
	c.Send(make([]byte, h.n))
	return 2, nil
}

func (h *large) Closed(_ *Conn, err error) { h.ended = err }

// TestSendsMoreThanTheSocketTakes: what does not fit waits until the reader
// reads, and half a message until the rest is there.
func TestSendsMoreThanTheSocketTakes(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	h := &large{n: 12 << 20}
	at, err := l.Listen(func() Handler { return h })
	if err != nil {
		t.Fatal(err)
	}
	client := make(chan error, 1)
	go func() {
		client <- func() error {
			c, err := net.Dial("tcp", at.String())
			if err != nil {
				return err
			}
			if _, err := c.Write([]byte{1}); err != nil {
				return err
			}
			time.Sleep(20 * time.Millisecond)
			if _, err := c.Write([]byte{2}); err != nil {
				return err
			}
			time.Sleep(20 * time.Millisecond) // the socket is full by now
			n, err := io.CopyN(io.Discard, c, int64(h.n))
			if err == nil && n != int64(h.n) {
				err = errors.New("too little came")
			}
			return errors.Join(err, c.Close())
		}()
	}()
	for h.ended == nil {
		if err := l.Wait(5 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-client; err != nil {
		t.Error(err)
	}
	if !errors.Is(h.ended, io.EOF) || len(h.seen) != 2 || h.seen[0] != 1 || h.seen[1] != 2 {
		t.Errorf("received %v, ended with %v", h.seen, h.ended)
	}
}

// TestAlarmIsFinerThanAMillisecond: an open loop needs it.
func TestAlarmIsFinerThanAMillisecond(t *testing.T) {
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}()
	best := time.Hour
	for range 50 { // another process may have the processor now and then
		begun := time.Now()
		if err := l.Alarm(200 * time.Microsecond); err != nil {
			t.Fatal(err)
		}
		if err := l.Wait(time.Second); err != nil {
			t.Fatal(err)
		}
		best = min(best, time.Since(begun))
	}
	if best < 200*time.Microsecond || best > 900*time.Microsecond {
		t.Errorf("an alarm of 200 us came after %s at best", best)
	}
}
