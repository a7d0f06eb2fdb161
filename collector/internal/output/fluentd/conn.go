package fluentd

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha512"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

// permanentError comes again until somebody changes the configuration.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// conn is an established connection. One goroutine of its own reads, so that a
// connection that the server has closed is known before it is used again.
type conn struct {
	raw       net.Conn // below TLS, closed to interrupt
	rw        net.Conn
	keepalive bool
	used      time.Time // of the last acknowledgement
	late      string    // chunk whose acknowledgement nobody waits for

	acks   chan string
	quit   chan struct{}
	dead   chan struct{} // closed when reading has ended
	err    error         // why; after dead
	finish sync.Once
}

// dial connects to one server, with TLS and the handshake where they are
// configured. Secrets and certificates are read here.
func dial(ctx context.Context, cfg Config, address string) (*conn, error) {
	network, target, err := endpoint(address)
	if err != nil {
		return nil, err
	}
	var tlsConfig *tls.Config
	if cfg.TLS {
		if tlsConfig, err = cfg.files().Config("fluentd"); err != nil {
			return nil, permanentError{err}
		}
		if tlsConfig.ServerName == "" {
			if tlsConfig.ServerName, _, err = net.SplitHostPort(target); err != nil {
				return nil, fmt.Errorf("fluentd %s: %w", address, err)
			}
		}
	}
	connectCtx, cancel := context.WithTimeout(ctx, cfg.ConnectTimeout)
	defer cancel()
	raw, err := (&net.Dialer{KeepAlive: 30 * time.Second}).DialContext(connectCtx, network, target)
	if err != nil {
		return nil, fmt.Errorf("fluentd %s: %w", address, err)
	}
	c := &conn{raw: raw, rw: raw, keepalive: *cfg.Keepalive, used: time.Now(), acks: make(chan string, cfg.Window+1), quit: make(chan struct{}), dead: make(chan struct{})}
	interrupt := context.AfterFunc(ctx, func() { _ = raw.Close() }) // the error is ctx's
	defer interrupt()
	reader, err := c.establish(ctx, connectCtx, cfg, tlsConfig)
	if err != nil {
		_ = raw.Close() // the first error counts
		return nil, explain(address, err)
	}
	go c.read(reader)
	return c, nil
}

func (c *conn) establish(ctx, connectCtx context.Context, cfg Config, tlsConfig *tls.Config) (*bufio.Reader, error) {
	if tlsConfig != nil {
		t := tls.Client(c.raw, tlsConfig)
		if err := t.HandshakeContext(connectCtx); err != nil {
			return nil, err
		}
		c.rw = t
	}
	reader := bufio.NewReaderSize(c.rw, 4<<10)
	if cfg.SharedKeyFile == "" {
		return reader, ctx.Err()
	}
	if err := c.rw.SetDeadline(time.Now().Add(cfg.WriteTimeout)); err != nil {
		return nil, err
	}
	if err := c.handshake(reader, cfg); err != nil {
		return nil, err
	}
	return reader, errors.Join(ctx.Err(), c.rw.SetDeadline(time.Time{}))
}

// handshake is the client's side of HELO, PING and PONG.
func (c *conn) handshake(reader *bufio.Reader, cfg Config) error {
	key, err := tlsfiles.Secret("fluentd", "sharedKeyFile", cfg.SharedKeyFile)
	if err != nil {
		return permanentError{err}
	}
	hostname := cfg.Hostname
	if hostname == "" {
		if hostname, err = os.Hostname(); err != nil {
			return fmt.Errorf("hostname: %w: write this node's name as hostname", err)
		}
	}
	first, err := readAnswer(reader)
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("no greeting within %s: the server has no shared key (leave sharedKeyFile out) or is overloaded: %w", cfg.WriteTimeout, err)
	case err != nil:
		return fmt.Errorf("while waiting for the server's greeting: %w", err)
	}
	hello, ok := first.(greeting)
	if !ok {
		return errors.New("the server begins with something else than a greeting")
	}
	c.keepalive = c.keepalive && hello.keepalive
	var secret [16]byte
	_, _ = rand.Read(secret[:]) // never fails
	salt := hex.EncodeToString(secret[:])
	username, password := "", ""
	if hello.auth != "" {
		if cfg.Username == "" {
			return permanentError{errors.New("the server asks for a user: set username and passwordFile")}
		}
		if password, err = tlsfiles.Secret("fluentd", "passwordFile", cfg.PasswordFile); err != nil {
			return permanentError{err}
		}
		username, password = cfg.Username, digest(hello.auth, cfg.Username, password)
	}
	ping := []byte{0x96}
	for _, s := range []string{"PING", hostname, salt, digest(salt, hostname, hello.nonce, key), username, password} {
		ping = appendString(ping, s)
	}
	if _, err := c.rw.Write(ping); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	second, err := readAnswer(reader)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the server closed the connection instead of admitting this client: check that sharedKeyFile, username and passwordFile hold what the server has: %w", err)
	}
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	pong, ok := second.(admission)
	switch {
	case !ok:
		return errors.New("handshake: the server answers a PING by something else than PONG")
	case !pong.ok:
		return permanentError{fmt.Errorf("the server does not admit this client: %q: check that sharedKeyFile, username and passwordFile hold what the server has", shorten(pong.reason))}
	case subtle.ConstantTimeCompare([]byte(pong.digest), []byte(digest(salt, pong.hostname, hello.nonce, key))) != 1:
		return permanentError{fmt.Errorf("the server (%q) does not know the shared key itself: check that the address is right and sharedKeyFile holds what the server has", shorten(pong.hostname))}
	}
	return nil
}

// digest is the protocol's: SHA-512 over the parts, in hex.
func digest(parts ...string) string {
	h := sha512.New()
	for _, p := range parts {
		_, _ = io.WriteString(h, p) // a hash never fails
	}
	return hex.EncodeToString(h.Sum(nil))
}

// explain adds the server and the remedy, and marks what is permanent.
func explain(address string, err error) error {
	remedy, permanent := tlsfiles.Explain(err)
	if remedy != "" {
		err = fmt.Errorf("%s: %w", remedy, err)
	}
	var already permanentError
	err, permanent = fmt.Errorf("fluentd %s: %w", address, err), permanent || errors.As(err, &already)
	if permanent {
		return permanentError{err}
	}
	return err
}

// read passes acknowledgements on until the connection ends. There is no deadline
// here: whoever waits for an acknowledgement has one, and closes the connection.
func (c *conn) read(r *bufio.Reader) {
	defer close(c.dead)
	for {
		answer, err := readAnswer(r)
		if err != nil {
			c.err = err
			return
		}
		switch a := answer.(type) {
		case acknowledgement:
			select {
			case c.acks <- a.chunk:
			case <-c.quit:
				c.err = net.ErrClosed
				return
			}
		case greeting:
			c.err = permanentError{errors.New("the server asks for a shared key: set sharedKeyFile")}
			return
		default:
			c.err = errors.New("the server answers a chunk by something else than an acknowledgement")
			return
		}
	}
}

// usable reports whether the connection can take a chunk.
func (c *conn) usable(idle time.Duration) bool {
	select {
	case <-c.dead:
		return false
	default:
		return time.Since(c.used) <= idle
	}
}

// close ends the connection and waits for its reader. What the server would still
// say is nobody's.
func (c *conn) close() {
	c.finish.Do(func() {
		close(c.quit)
		_ = c.raw.SetDeadline(time.Now().Add(time.Second)) // for the farewell of TLS
		_ = c.rw.Close()                                   // a connection that is given up may be broken
		<-c.dead
	})
}
