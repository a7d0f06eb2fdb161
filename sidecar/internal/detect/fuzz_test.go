package detect_test

import (
	"crypto/tls"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/net/http2"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/detect"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
)

// FuzzDetect: an answer does not change whatever follows, MaxBytes give one, every
// request that http1 accepts is HTTP1 and nothing but the preface is HTTP2.
func FuzzDetect(f *testing.F) {
	for _, s := range []string{
		"GET /pay HTTP/1.1\r\nHost: shop\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: shop\r\n\r\n", "CONNECT shop:443 HTTP/1.1\r\nHost: shop:443\r\n\r\n",
		"M-SEARCH http://shop/ HTTP/1.0\r\n\r\n", "PRI /x HTTP/1.1\r\nHost: shop\r\n\r\n", http2.ClientPreface + "\x00\x00\x00\x04", "SET a b\r\n",
		"GET " + strings.Repeat("a", detect.MaxBytes),
	} {
		f.Add([]byte(s), uint16(3))
	}
	f.Add(hello(f, &tls.Config{ServerName: "shop.example", NextProtos: []string{"h2"}}), uint16(100))
	f.Add(split(hello(f, &tls.Config{ServerName: "shop.example"}), 7), uint16(11))
	f.Fuzz(func(t *testing.T, b []byte, step uint16) {
		r := detect.Detect(b)
		if r.Protocol == detect.More && len(b) >= detect.MaxBytes {
			t.Fatalf("%d bytes do not decide", len(b))
		}
		// Every beginning of a short input, some of a long one.
		stride := 1
		if len(b) > 512 {
			stride = int(step)%97 + len(b)/512
		}
		for n := 0; n < len(b); n += stride {
			part := detect.Detect(b[:n])
			if part.Protocol != detect.More && !reflect.DeepEqual(part, r) {
				t.Fatalf("%d bytes say %+v, %d say %+v", n, part, len(b), r)
			}
		}
		var h http1.Head
		if n, err := http1.ParseRequest(&h, b, nil); err == nil {
			if r.Protocol != detect.HTTP1 {
				t.Errorf("http1 accepts a request of %d bytes, Detect says %v", n, r.Protocol)
			}
		}
		if got, want := r.Protocol == detect.HTTP2, strings.HasPrefix(string(b), http2.ClientPreface); got != want {
			t.Errorf("HTTP2 is %t, the preface of x/net is there: %t", got, want)
		}
	})
}

// FuzzClientHello: what Detect and crypto/tls both take for a ClientHello says the
// same to both, and crypto/tls takes none that Detect does not see.
func FuzzClientHello(f *testing.F) {
	f.Add(hello(f, &tls.Config{ServerName: "Shop.example", NextProtos: []string{"h2", "http/1.1"}}))
	f.Add(hello(f, &tls.Config{ServerName: "shop.example", MaxVersion: tls.VersionTLS12}))
	f.Add(split(hello(f, &tls.Config{ServerName: "shop.example"}), 40))
	f.Add(built())
	f.Add(built(sni("shop"), "\x00\x10\x00\x03\x02h2", "\x0a\x0a"))
	f.Add(built(sni("shop", "bank")))
	f.Add(built("\x00\x00" + u16(11) + "\x01\x00\x01x" + "\x00\x00\x04shop"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > detect.MaxBytes {
			return
		}
		got, want := detect.Detect(b), crypto(b)
		if want == nil {
			return // crypto/tls looks into more extensions
		}
		if got.Protocol != detect.TLS {
			t.Fatalf("crypto/tls reads a ClientHello for %q, Detect says %v", want.ServerName, got.Protocol)
		}
		if got.ServerName != strings.ToLower(want.ServerName) && !(got.ServerName == "" && !isName(want.ServerName)) {
			t.Errorf("server name %q, crypto/tls reads %q", got.ServerName, want.ServerName)
		}
		if !slices.Equal(got.ALPN, want.SupportedProtos) {
			t.Errorf("ALPN %q, crypto/tls reads %q", got.ALPN, want.SupportedProtos)
		}
	})
}

// isName is a second opinion on what a DNS name is.
func isName(s string) bool {
	if _, err := netip.ParseAddr(s); err == nil || len(s) > 253 {
		return false
	}
	for _, l := range strings.Split(s, ".") {
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") != "" {
			return false
		}
	}
	return true
}
