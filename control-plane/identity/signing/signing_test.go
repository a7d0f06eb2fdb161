package signing_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

func certificate(tb testing.TB) *x509.Certificate {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{NotAfter: time.Unix(1<<32, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func TestMessagesRoundTrip(t *testing.T) {
	q, err := signing.DecodeRequest(signing.Request{CSR: []byte("anything")}.Encode())
	if err != nil || string(q.CSR) != "anything" {
		t.Errorf("request: %q, %v", q.CSR, err)
	}
	a, b := certificate(t), certificate(t)
	r, err := signing.DecodeResponse(signing.Response{Chain: []*x509.Certificate{a, b}, Roots: []*x509.Certificate{b}}.Encode())
	if err != nil || len(r.Chain) != 2 || !r.Chain[0].Equal(a) || len(r.Roots) != 1 || !r.Roots[0].Equal(b) {
		t.Errorf("response: %v, %v", r, err)
	}
}

// What is too large, of another kind or not there is refused by its field.
func TestDecodeRefuses(t *testing.T) {
	c := certificate(t)
	text := func(field, value string) *structpb.Struct {
		return &structpb.Struct{Fields: map[string]*structpb.Value{field: structpb.NewStringValue(value)}}
	}
	for want, in := range map[string]*structpb.Struct{
		"csr: it is not one PEM block": text("csr", "x"),
		"csr: 8193 bytes":              signing.Request{CSR: bytes.Repeat([]byte("x"), signing.MaxCSR+1)}.Encode(),
		"csr: 20000 bytes":             text("csr", strings.Repeat("x", 20000)),
	} {
		if _, err := signing.DecodeRequest(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
	many := make([]*x509.Certificate, signing.MaxCertificates+1)
	for i := range many {
		many[i] = c
	}
	for want, in := range map[string]*structpb.Struct{
		"certificate_chain: it holds no certificate":      {},
		"roots: it holds no certificate":                  signing.Response{Chain: many[:1]}.Encode(),
		"certificate_chain: it holds more than 32":        signing.Response{Chain: many, Roots: many[:1]}.Encode(),
		`it holds a PEM block "CERTIFICATE REQUEST"`:      text("certificate_chain", signing.Request{}.Encode().GetFields()["csr"].GetStringValue()),
		"certificate_chain: it is not PEM":                text("certificate_chain", "x"),
		"certificate_chain: 300000 bytes; at most 262144": text("certificate_chain", strings.Repeat("x", 300000)),
	} {
		if _, err := signing.DecodeResponse(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}

func TestToken(t *testing.T) {
	if got, ok := signing.Token(signing.Bearer("abc")); !ok || got != "abc" {
		t.Errorf("%q, %t", got, ok)
	}
	for _, v := range []string{"", "Bearer ", "bearer abc", "Basic abc", "Bearer " + strings.Repeat("x", signing.MaxToken+1)} {
		if got, ok := signing.Token(v); ok {
			t.Errorf("%.40q gave %.40q", v, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	c := certificate(f)
	f.Add(string(signing.EncodeCertificates([]*x509.Certificate{c})))
	f.Add(signing.Request{CSR: []byte("x")}.Encode().GetFields()["csr"].GetStringValue())
	f.Fuzz(func(t *testing.T, text string) {
		if certs, err := signing.DecodeCertificates([]byte(text)); err == nil {
			if again, err := signing.DecodeCertificates(signing.EncodeCertificates(certs)); err != nil || len(again) != len(certs) {
				t.Fatalf("what was read cannot be read again: %v", err)
			}
		}
		_, _ = signing.DecodeRequest(&structpb.Struct{Fields: map[string]*structpb.Value{"csr": structpb.NewStringValue(text)}})
	})
}
