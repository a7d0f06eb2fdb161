package identity_test

import (
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
)

func TestSPIFFERoundTrip(t *testing.T) {
	want := identity.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "payments"}
	if got := want.SPIFFE(); got != "spiffe://cluster.local/ns/shop/sa/payments" {
		t.Fatalf("SPIFFE() = %q", got)
	}
	got, err := identity.Parse(want.SPIFFE())
	if err != nil || got != want {
		t.Fatalf("Parse = %+v, %v", got, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{
		"", "https://cluster.local/ns/shop/sa/x", "spiffe://cluster.local", "spiffe:///ns/shop/sa/x",
		"spiffe://cluster.local/ns/shop/sa/", "spiffe://cluster.local/ns/shop/sa/x/y", "spiffe://cluster.local/ns/../sa/x",
		"spiffe://cluster.local/ns/sh%6fp/sa/x", "spiffe://cluster.local/ns/shop/sa/x?y", "spiffe://Cluster.local/ns/shop/sa/x",
	} {
		if id, err := identity.Parse(s); !errors.Is(err, identity.ErrNotWorkload) {
			t.Errorf("Parse(%q) = %+v, %v; want ErrNotWorkload", s, id, err)
		}
	}
}

func TestOfCertificate(t *testing.T) {
	u := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	pay, other := u("spiffe://cluster.local/ns/shop/sa/payments"), u("spiffe://cluster.local/ns/shop/sa/cart")
	got, err := identity.OfCertificate(&x509.Certificate{URIs: []*url.URL{pay}, DNSNames: []string{"payments.shop"}})
	if err != nil || got.SPIFFE() != pay.String() {
		t.Errorf("%v, %v", got, err)
	}
	for want, c := range map[string]*x509.Certificate{
		"no URI":       {DNSNames: []string{"payments.shop"}},
		"2 URIs":       {URIs: []*url.URL{pay, other}},
		"an authority": {URIs: []*url.URL{pay}, IsCA: true},
		"begin with":   {URIs: []*url.URL{u("https://cluster.local/ns/shop/sa/payments")}},
		"a part that":  {URIs: []*url.URL{u("spiffe://me@cluster.local/ns/shop/sa/payments")}},
	} {
		if id, err := identity.OfCertificate(c); !errors.Is(err, identity.ErrNotWorkload) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", want, id, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("spiffe://cluster.local/ns/shop/sa/payments")
	f.Add("spiffe://x/ns//sa/")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := identity.Parse(s)
		if err == nil && id.SPIFFE() != s {
			t.Fatalf("Parse(%q) accepted what it writes as %q", s, id.SPIFFE())
		}
	})
}
