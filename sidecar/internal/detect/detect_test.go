package detect_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/http2"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
)

// decided returns how many bytes of b it takes to decide, and the decision.
func decided(b []byte) (int, detect.Result) {
	for n := range len(b) {
		if r := detect.Detect(b[:n]); r.Protocol != detect.More {
			return n, r
		}
	}
	return len(b), detect.Detect(b)
}

func TestPlain(t *testing.T) {
	for _, c := range []struct {
		name, in string
		want     detect.Protocol
		at       int // bytes that decide
	}{
		{"nothing", "", detect.More, 0},
		{"a usual method and a path", "GET /pay HTTP/1.1\r\n", detect.HTTP1, 5},
		{"an absolute target", "POST http://shop/ HTTP/1.1\r\n", detect.HTTP1, 12},
		{"an absolute target in capitals", "POST HTTPS://shop/ HTTP/1.1\r\n", detect.HTTP1, 13},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\n", detect.HTTP1, 17},
		{"CONNECT to an authority", "CONNECT shop:443 HTTP/1.1\r\n", detect.HTTP1, 24},
		{"CONNECT of NATS", "CONNECT {\"verbose\":false}\r\n", detect.Opaque, 26},
		{"an unusual method", "PROPFIND /x HTTP/1.1\r\n", detect.HTTP1, 19},
		{"an unusual version", "PROPFIND /x HTTP/3.0\r\n", detect.Opaque, 18},
		{"a short method that is more than one", "P", detect.More, 1},
		{"SIP", "INVITE sip:bob@shop SIP/2.0\r\n", detect.Opaque, 21},
		{"an inline command of Redis", "SET key value\r\n", detect.Opaque, 9},
		{"PING of Redis, inline", "PING\r\n", detect.Opaque, 5},
		{"PING of Redis", "*1\r\n$4\r\nPING\r\n", detect.Opaque, 1},
		{"EHLO of SMTP", "EHLO shop\r\n", detect.Opaque, 10},
		{"a method in small letters", "get / HTTP/1.1\r\n", detect.Opaque, 1},
		{"an empty line first", "\r\nGET / HTTP/1.1\r\n", detect.Opaque, 1},
		{"a target that begins with a space", "GET  / HTTP/1.1\r\n", detect.Opaque, 5},
		{"StartupMessage of PostgreSQL", "\x00\x00\x00\x08\x04\xd2\x16\x2f", detect.Opaque, 1},
		{"a method that is too long", strings.Repeat("M", 33), detect.Opaque, 33},
		{"the preface of HTTP/2", http2.ClientPreface, detect.HTTP2, 24},
		{"the preface with something else behind", strings.TrimSuffix(http2.ClientPreface, "SM\r\n\r\n") + "XX", detect.Opaque, 19},
		{"PRI as a method of HTTP/1", "PRI /x HTTP/1.1\r\n", detect.HTTP1, 14},
		{"the preface of another version", "PRI * HTTP/3.0\r\n", detect.Opaque, 12},
		{"a target without end", "CONNECT " + strings.Repeat("a", detect.MaxBytes), detect.Opaque, detect.MaxBytes},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, r := decided([]byte(c.in))
			if r.Protocol != c.want || at != c.at {
				t.Errorf("%v after %d bytes, want %v after %d", r.Protocol, at, c.want, c.at)
			}
		})
	}
}

// hello is the first flight of a TLS client.
func hello(tb testing.TB, config *tls.Config) []byte {
	tb.Helper()
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tls.Client(client, config).Handshake()
	}()
	header := make([]byte, 5)
	if _, err := io.ReadFull(server, header); err != nil {
		tb.Fatal(err)
	}
	body := make([]byte, binary.BigEndian.Uint16(header[3:]))
	if _, err := io.ReadFull(server, body); err != nil {
		tb.Fatal(err)
	}
	_, _ = server.Close(), client.Close()
	<-done
	return append(header, body...)
}

// split puts the one record of b into records of at most n bytes.
func split(b []byte, n int) []byte {
	var out []byte
	for body := b[5:]; len(body) > 0; {
		m := min(n, len(body))
		out = append(out, b[0], b[1], b[2], byte(m>>8), byte(m))
		out = append(out, body[:m]...)
		body = body[m:]
	}
	return out
}

func TestClientHello(t *testing.T) {
	for _, c := range []struct {
		name   string
		config *tls.Config
		want   detect.Result
	}{
		{"name and ALPN", &tls.Config{ServerName: "Pay.Example.COM", NextProtos: []string{"h2", "http/1.1"}}, detect.Result{Protocol: detect.TLS, ServerName: "pay.example.com", ALPN: []string{"h2", "http/1.1"}}},
		{"neither", &tls.Config{InsecureSkipVerify: true}, detect.Result{Protocol: detect.TLS}},
		{"TLS 1.2", &tls.Config{ServerName: "a.b", MaxVersion: tls.VersionTLS12}, detect.Result{Protocol: detect.TLS, ServerName: "a.b"}},
		{"not a DNS name", &tls.Config{ServerName: "a/b"}, detect.Result{Protocol: detect.TLS}},
		{"a letter that folds to ASCII", &tls.Config{ServerName: "\u212a.example"}, detect.Result{Protocol: detect.TLS}},
		{"an empty label", &tls.Config{ServerName: "a..b"}, detect.Result{Protocol: detect.TLS}},
		{"an ALPN of GREASE", &tls.Config{ServerName: "a", NextProtos: []string{"\x0a\x0a", "h2"}}, detect.Result{Protocol: detect.TLS, ServerName: "a", ALPN: []string{"\x0a\x0a", "h2"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := hello(t, c.config)
			for _, size := range []int{len(b), 100, 3, 1} {
				in := split(b, size)
				at, got := decided(in)
				if d := cmp.Diff(c.want, got); d != "" {
					t.Errorf("in records of %d (-want +got):\n%s", size, d)
				}
				if at != len(in) {
					t.Errorf("in records of %d: decided after %d bytes of %d", size, at, len(in))
				}
				if d := cmp.Diff(c.want, detect.Detect(append(in, "and more"...))); d != "" {
					t.Errorf("with more behind it (-want +got):\n%s", d)
				}
			}
		})
	}
}

// built is a ClientHello with the extensions given, as bytes of id and body.
func built(extensions ...string) []byte {
	body := "\x03\x03" + strings.Repeat("r", 32) + "\x00" + "\x00\x02\x13\x01" + "\x01\x00"
	if len(extensions) > 0 {
		all := ""
		for _, e := range extensions {
			all += e[:2] + u16(len(e)-2) + e[2:]
		}
		body += u16(len(all)) + all
	}
	message := "\x01\x00" + u16(len(body)) + body
	return []byte("\x16\x03\x01" + u16(len(message)) + message)
}

func u16(n int) string { return string([]byte{byte(n >> 8), byte(n)}) }

// sni is the extension with one entry for each name.
func sni(names ...string) string {
	list := ""
	for _, n := range names {
		list += "\x00" + u16(len(n)) + n
	}
	return "\x00\x00" + u16(len(list)) + list
}

func TestClientHelloByHand(t *testing.T) {
	opaque := detect.Result{Protocol: detect.Opaque}
	named := detect.Result{Protocol: detect.TLS, ServerName: "shop"}
	nameless := detect.Result{Protocol: detect.TLS}
	many := make([]string, 257)
	for i := range many {
		many[i] = u16(1000 + i)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want detect.Result
	}{
		{"no extensions", built(), nameless},
		{"a name", built(sni("Shop")), named},
		{"GREASE around it", built("\x0a\x0a", sni("shop"), "\xfa\xfa\x00"), named},
		{"a name of another type first", built("\x00\x00" + u16(11) + "\x01\x00\x01x" + "\x00\x00\x04shop"), named},
		{"an encrypted ClientHello: the outer name", built(sni("shop"), "\xfe\x0d\x00\x00\x01\x00\x01\x00\x00\x00\x00\x00"), named},
		{"an IPv4 address", built(sni("10.0.0.1")), nameless},
		{"the longest label", built(sni(strings.Repeat("a", 63))), detect.Result{Protocol: detect.TLS, ServerName: strings.Repeat("a", 63)}},
		{"a longer label", built(sni(strings.Repeat("a", 64))), nameless},
		{"a longer name", built(sni(strings.Repeat("a.", 127) + "a")), nameless},
		{"two names", built(sni("shop", "bank")), opaque},
		{"the extension twice", built(sni("shop"), sni("bank")), opaque},
		{"an empty name", built(sni("")), opaque},
		{"an empty list", built(sni()), opaque},
		{"a final dot", built(sni("shop.")), opaque},
		{"bytes behind the list", built(sni("shop") + "x"), opaque},
		{"an empty ALPN name", built("\x00\x10\x00\x01\x00"), opaque},
		{"too many extensions", built(many...), opaque},
		{"a server's hello", []byte("\x16\x03\x01\x00\x05\x02"), opaque},
		{"an empty record", []byte("\x16\x03\x01\x00\x00"), opaque},
		{"a record that is too long", []byte("\x16\x03\x01\x40\x01"), opaque},
		{"a message that is too long", []byte("\x16\x03\x01\x00\x10\x01\x00\x40\x00"), opaque},
		{"another version of records", []byte("\x16\x02"), opaque},
		{"an alert between fragments", []byte("\x16\x03\x01\x00\x04\x01\x00\x00\x30\x15"), opaque},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, got := decided(c.in)
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if at != len(c.in) {
				t.Errorf("decided after %d bytes of %d", at, len(c.in))
			}
		})
	}
}

func TestHTTPDoesNotAllocate(t *testing.T) {
	for _, in := range []string{"GET /pay HTTP/1.1\r\n", "PROPFIND /x HTTP/1.1", http2.ClientPreface, "\x00\x01"} {
		b := []byte(in)
		if n := testing.AllocsPerRun(100, func() { detect.Detect(b) }); n != 0 {
			t.Errorf("%q: %v allocations", in, n)
		}
	}
}

var errSeen = errors.New("seen")

// crypto returns what crypto/tls reads in b; nil where it reads no ClientHello.
func crypto(b []byte) *tls.ClientHelloInfo {
	client, server := net.Pipe()
	go func() {
		_ = client.SetDeadline(time.Now().Add(time.Minute))
		// Alerts are of no interest, but must find a reader.
		go func() { _, _ = io.Copy(io.Discard, client) }()
		_, _ = client.Write(b)
		_ = client.Close()
	}()
	var seen *tls.ClientHelloInfo
	_ = tls.Server(server, &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
		seen = i
		return nil, errSeen
	}}).HandshakeContext(context.Background())
	_ = server.Close()
	return seen
}
