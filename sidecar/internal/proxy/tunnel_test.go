package proxy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/accesslog"
)

// sockets are two ends of a TCP connection on loopback.
func sockets(tb testing.TB) (near, far *net.TCPConn) {
	tb.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	a, err := l.AcceptTCP()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _, _ = c.Close(), a.Close() })
	for _, c := range []net.Conn{a, c} {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return a, c.(*net.TCPConn)
}

// ends are a client and a server with a tunnel between them.
type ends struct {
	client, server net.Conn
	w              *tunnelling
	done           chan struct{}
}

// between begins a tunnel, which closes its connections as the proxy does.
func between(tb testing.TB, w *tunnelling) *ends {
	tb.Helper()
	down, client := sockets(tb)
	up, server := sockets(tb)
	_, _ = down.SetDeadline(time.Time{}), up.SetDeadline(time.Time{})
	return join(tb, w, &ends{client: client, server: server}, down, up)
}

func join(tb testing.TB, w *tunnelling, e *ends, down, up net.Conn) *ends {
	e.w, e.done = w, make(chan struct{})
	w.down, w.up = down, up
	if w.idle == 0 {
		w.idle = 10 * time.Second
	}
	go func() {
		defer close(e.done)
		w.run()
		_, _ = down.Close(), up.Close()
	}()
	tb.Cleanup(func() { _, _ = e.client.Close(), e.server.Close(); <-e.done })
	return e
}

// expect fails unless the tunnel has ended, or ends, in this way.
func (e *ends) expect(t *testing.T, flags accesslog.Flags, in, out int64) {
	t.Helper()
	select {
	case <-e.done:
	case <-time.After(10 * time.Second):
		t.Fatal("the tunnel does not end")
	}
	if e.w.flags != flags || e.w.in != in || e.w.out != out {
		t.Errorf("flags %v (%s), %d bytes in, %d out; want %v, %d, %d", e.w.flags, e.w.detail, e.w.in, e.w.out, flags, in, out)
	}
}

func say(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, c net.Conn, s string) {
	t.Helper()
	b := make([]byte, len(s))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != s {
		t.Fatalf("%q, %v; want %q", b, err, s)
	}
}

func ended(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Fatalf("%d bytes, %v; want the end", n, err)
	}
}

func isReset(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%d bytes, %v; want a reset", n, err)
	}
}

func TestEachSideMayEndFirst(t *testing.T) {
	for _, clientFirst := range []bool{true, false} {
		e := between(t, &tunnelling{early: []byte("hel")})
		first, second := e.client, e.server
		if !clientFirst {
			first, second = second, first
		}
		hear(t, e.server, "hel")
		say(t, first, "lo")
		hear(t, second, "lo")
		began := time.Now()
		_ = first.(*net.TCPConn).CloseWrite()
		ended(t, second)
		if d := time.Since(began); d > time.Second {
			t.Errorf("the half-close took %v", d)
		}
		say(t, second, "answer")
		hear(t, first, "answer")
		_ = second.(*net.TCPConn).CloseWrite()
		ended(t, first)
		if clientFirst {
			e.expect(t, 0, 5, 6)
		} else {
			e.expect(t, 0, 9, 2)
		}
	}
}

func TestEarlyBytesAreReleasedOnceSent(t *testing.T) {
	released := make(chan struct{})
	e := between(t, &tunnelling{early: []byte("hello"), release: sync.OnceFunc(func() { close(released) })})
	hear(t, e.server, "hello")
	<-released // while the connection lives
	_, _ = e.client.Close(), e.server.Close()
	e.expect(t, 0, 5, 0)
}

func TestAResetIsPassedOn(t *testing.T) {
	for _, c := range []struct {
		name  string
		which func(*ends) (dies, other net.Conn)
		want  accesslog.Flags
	}{
		{"of the client", func(e *ends) (net.Conn, net.Conn) { return e.client, e.server }, accesslog.DC},
		{"of the server", func(e *ends) (net.Conn, net.Conn) { return e.server, e.client }, accesslog.UC},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := between(t, &tunnelling{})
			dies, other := c.which(e)
			say(t, e.client, "ab")
			hear(t, e.server, "ab")
			say(t, e.server, "cde")
			hear(t, e.client, "cde")
			_ = dies.(*net.TCPConn).SetLinger(0)
			_ = dies.Close()
			isReset(t, other)
			e.expect(t, c.want, 2, 3)
		})
	}
}

// A peer that vanishes while it is written to is found by the write.
// The system tells of a reset once: to who looks whether there is anything to
// carry, while nothing is.
func TestAResetOfATunnelThatIdlesIsPassedOn(t *testing.T) {
	for _, fromServer := range []bool{true, false} {
		e := between(t, &tunnelling{})
		from, to, flags := e.client, e.server, accesslog.DC
		if fromServer {
			from, to, flags = e.server, e.client, accesslog.UC
		}
		abort(from)
		if n, err := to.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reset by the server: %t: the other side sees %d, %v; want a reset", fromServer, n, err)
		}
		e.expect(t, flags, 0, 0)
	}
}

func TestAPeerThatIsGoneEndsTheOtherSide(t *testing.T) {
	e := between(t, &tunnelling{})
	_ = e.client.Close() // an orderly end, behind which nobody reads
	ended(t, e.server)
	for {
		if _, err := e.server.Write(make([]byte, 64<<10)); err != nil {
			break
		}
	}
	<-e.done
	if e.w.flags != accesslog.DC || e.w.in != 0 {
		t.Errorf("flags %v (%s), %d bytes in", e.w.flags, e.w.detail, e.w.in)
	}
}

func TestClosingFromOutsideIsAReset(t *testing.T) {
	e := between(t, &tunnelling{})
	say(t, e.client, "a")
	hear(t, e.server, "a")
	_ = e.w.down.Close() // as a drain does that has waited long enough
	isReset(t, e.client)
	isReset(t, e.server)
	e.expect(t, accesslog.DC, 1, 0)
}

func TestSilenceEndsIt(t *testing.T) {
	const idle = 200 * time.Millisecond
	began := time.Now()
	e := between(t, &tunnelling{idle: idle})
	for range 6 { // one direction alone keeps it alive
		time.Sleep(idle / 2)
		say(t, e.server, "x")
		hear(t, e.client, "x")
	}
	isReset(t, e.client)
	isReset(t, e.server)
	e.expect(t, accesslog.SI, 0, 6)
	if d := time.Since(began); d < 4*idle {
		t.Errorf("it ended after %v", d)
	}
}

func TestAPeerThatTakesNothingEndsIt(t *testing.T) {
	for name, wrapped := range map[string]bool{"in the kernel": false, "in this process": true} {
		t.Run(name, func(t *testing.T) {
			down, client := sockets(t)
			up, server := sockets(t)
			var a net.Conn = down
			if wrapped {
				a = &plainConn{down}
			}
			e := join(t, &tunnelling{idle: 300 * time.Millisecond}, &ends{client: client, server: server}, a, up)
			for {
				if _, err := server.Write(make([]byte, 64<<10)); err != nil {
					break // a reset
				}
			}
			<-e.done
			if e.w.flags != accesslog.SI {
				t.Errorf("flags %v (%s)", e.w.flags, e.w.detail)
			}
		})
	}
}

// plainConn hides that it is a TCP connection.
type plainConn struct{ c *net.TCPConn }

func (p *plainConn) Read(b []byte) (int, error)         { return p.c.Read(b) }
func (p *plainConn) Write(b []byte) (int, error)        { return p.c.Write(b) }
func (p *plainConn) Close() error                       { return p.c.Close() }
func (p *plainConn) CloseWrite() error                  { return p.c.CloseWrite() }
func (p *plainConn) LocalAddr() net.Addr                { return p.c.LocalAddr() }
func (p *plainConn) RemoteAddr() net.Addr               { return p.c.RemoteAddr() }
func (p *plainConn) SetDeadline(t time.Time) error      { return p.c.SetDeadline(t) }
func (p *plainConn) SetReadDeadline(t time.Time) error  { return p.c.SetReadDeadline(t) }
func (p *plainConn) SetWriteDeadline(t time.Time) error { return p.c.SetWriteDeadline(t) }

func TestWhoSpokeFirst(t *testing.T) {
	for _, server := range []bool{true, false} {
		said := make(chan bool, 2)
		e := between(t, &tunnelling{first: func(server bool) { said <- server }})
		a, b := e.client, e.server
		if server {
			a, b = b, a
		}
		greeting := strings.Repeat("220 hello ", 100) // more than one look takes
		say(t, a, greeting)
		hear(t, b, greeting)
		say(t, b, "EHLO")
		hear(t, a, "EHLO")
		if got := <-said; got != server {
			t.Errorf("the server spoke first: %t, want %t", got, server)
		}
		_, _ = e.client.Close(), e.server.Close()
		<-e.done
		if len(said) != 0 {
			t.Error("it was told twice")
		}
	}
}

// secure is a tunnel whose client side is TLS that ends here.
func secure(t *testing.T) (e *ends, client *tls.Conn) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	down, raw := sockets(t)
	up, server := sockets(t)
	client = tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
	ours := tls.Server(down, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: k}}})
	shaken := make(chan error, 1)
	go func() { shaken <- ours.Handshake() }()
	if err := errors.Join(client.Handshake(), <-shaken); err != nil {
		t.Fatal(err)
	}
	return join(t, &tunnelling{}, &ends{client: client, server: server}, ours, up), client
}

func TestTLSThatEndsHere(t *testing.T) {
	t.Run("half-close both ways", func(t *testing.T) {
		e, client := secure(t)
		want := bytes.Repeat([]byte("0123456789"), 10_000)
		go func() { _, _ = client.Write(want); _ = client.CloseWrite() }()
		got, err := io.ReadAll(e.server)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		say(t, e.server, "answer")
		hear(t, client, "answer")
		_ = e.server.(*net.TCPConn).CloseWrite()
		ended(t, client)
		e.expect(t, 0, int64(len(want)), 6)
	})
	t.Run("a reset of the server is no close_notify", func(t *testing.T) {
		e, client := secure(t)
		say(t, e.server, "part of it")
		hear(t, client, "part of it")
		_ = e.server.(*net.TCPConn).SetLinger(0)
		_ = e.server.Close()
		isReset(t, client)
		e.expect(t, accesslog.UC, 0, 10)
	})
	t.Run("a reset of the client", func(t *testing.T) {
		e, client := secure(t)
		say(t, client, "part of it")
		hear(t, e.server, "part of it")
		raw := client.NetConn().(*net.TCPConn)
		_ = raw.SetLinger(0)
		_ = raw.Close()
		isReset(t, e.server)
		e.expect(t, accesslog.DC, 10, 0)
	})
}

// readBytes is what this process has read with read(2); splice(2) does not count.
func readBytes(t *testing.T) int64 {
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip("the system does not count: ", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "rchar: "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Skip("the system does not count")
	return 0
}

// The kernel carries the bytes, also when the rounds of the copy are short and
// when the first bytes were looked at.
func TestBytesAreNotCopied(t *testing.T) {
	const size = 32 << 20
	before := readBytes(t)
	e := between(t, &tunnelling{idle: time.Second, first: func(bool) {}})
	go func() {
		b := make([]byte, 64<<10)
		for range size / len(b) {
			if _, err := e.client.Write(b); err != nil {
				return
			}
		}
		_ = e.client.(*net.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, e.server); n != size || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	_ = e.server.Close()
	e.expect(t, 0, size, 0)
	// The server's end reads in this process too.
	if n := readBytes(t) - before; n > size+size/4 {
		t.Errorf("%d bytes were read for %d that were sent: the tunnel copies", n, size)
	}
}

// A tunnel that carries nothing holds its two connections and no more, also after
// it has carried something.
func TestIdleTunnelsHoldNoPipes(t *testing.T) {
	descriptors := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip("the system does not list descriptors: ", err)
		}
		return len(all)
	}
	const count = 30
	before := descriptors()
	for range count {
		e := between(t, &tunnelling{idle: time.Minute})
		say(t, e.client, "hello")
		hear(t, e.server, "hello")
		say(t, e.server, "hello")
		hear(t, e.client, "hello")
	}
	var held int
	for range 50 {
		time.Sleep(20 * time.Millisecond)
		runtime.GC() // with the second one, the pipes go that net keeps for later
		// Of each connection both ends are in this process.
		if held = descriptors() - before; held <= 4*count+10 {
			return
		}
	}
	t.Errorf("%d idle tunnels hold %d descriptors; want 4 each", count, held)
}
