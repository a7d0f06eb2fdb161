package rules_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestRedact(t *testing.T) {
	s := compile(t, `rules: [{name: r, redact: {kinds: [token, email, iban, card, ip], patterns: ['pin=\d{4}'], with: "#"}}]`)
	p := s.For(&record.Resource{})
	f := func(in, want string) {
		t.Helper()
		r := record.Record{Body: in}
		v := p.Apply(&r)
		if r.Body != want || v.Redacted != strings.Count(want, "#") {
			t.Errorf("Apply(%q): %q, %d redacted; want %q", in, r.Body, v.Redacted, want)
		}
	}
	same := func(in string) { t.Helper(); f(in, in) }
	f("card 4111111111111111.", "card #.")
	f("card 4111 1111 1111 1111 5", "card # 5")
	f("200 5500-0000-0000-0004", "200 #")
	f("amex 378282246310005 and 3782 822463 10005", "amex # and #")
	same("card 4111111111111112")
	same("order 1763931600123 at 20261125120000")
	same("x4111111111111111 4111111111111111x 0.4111111111111111")
	same("4111 1111 1111 111")
	f("mail joe.doe+x@mail.example.com, now", "mail #, now")
	f("<a@b.io> a@c.de", "<#> #")
	same("user@localhost @home a@b.c git@1.2")
	f("Authorization: Bearer abcdef123456", "Authorization: Bearer #")
	same("bearer of news")
	f("t eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9 x", "t # x")
	same("eyJhbGci is short")
	f("key AKIAIOSFODNN7EXAMPLE", "key #")
	f("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "#")
	f("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "#\nrest")
	f("x -----BEGIN PRIVATE KEY-----\nMIIE", "x #")
	same("-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----")
	f("iban DE89370400440532013000 and GB82 WEST 1234 5698 7654 32", "iban # and #")
	same("iban DE88370400440532013000")
	f("from 10.0.0.1:8080 to [2001:db8::1]:443", "from #:8080 to [#]:443")
	same("version 1.2.3 at 12:00:00, 256.1.1.1, std::vector")
	f("pin=1234 pin=12", "# pin=12")
}

func TestRedactValues(t *testing.T) {
	p := compile(t, `rules: [{name: r, redact: {kinds: [card, email]}}]`).For(&record.Resource{})
	r := record.Record{Body: `{"msg":"m a@example.com","card":4111111111111111,"n":17,"to":["b@example.com",{"deep":"c@example.com"}]}`}
	v := p.Apply(&r)
	want := map[string]any{"card": "[redacted]", "n": 17.0, "to": []any{"[redacted]", map[string]any{"deep": "[redacted]"}}}
	if d := cmp.Diff(want, r.Attributes); d != "" || r.Body != "m [redacted]" || v.Redacted != 4 {
		t.Errorf("body %q, %d redacted; attributes (-want +got):\n%s", r.Body, v.Redacted, d)
	}
}

// A record that a rule drops is redacted by the rules after it: it may be shown.
func TestDroppedRecordsAreRedacted(t *testing.T) {
	p := compile(t, `rules: [{name: d, drop: true}, {name: r, redact: {kinds: [email]}}]`).For(&record.Resource{})
	r := record.Record{Body: "a@example.com"}
	if v := p.Apply(&r); v.Rule != "d" || r.Body != "[redacted]" {
		t.Errorf("rule %q, body %q", v.Rule, r.Body)
	}
}

// Whatever the text: no panic, it stays text, and it is changed where something
// was found and nowhere else.
func FuzzRedact(f *testing.F) {
	f.Add("4111 1111 1111 1111 a@b.io 10.0.0.1 2001:db8:: DE89370400440532013000 Bearer abcdefgh")
	f.Add("-----BEGIN PRIVATE KEY-----")
	f.Add("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.x")
	p := compile(f, `rules: [{name: r, redact: {kinds: [token, email, iban, card, ip]}}]`).For(&record.Resource{})
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8("x "+s, "?")
		r := record.Record{Body: s}
		v := p.Apply(&r)
		if !utf8.ValidString(r.Body) || strings.Count(r.Body, "[redacted]") != strings.Count(s, "[redacted]")+v.Redacted || (v.Redacted == 0) != (r.Body == s) {
			t.Fatalf("%q became %q with %d redacted", s, r.Body, v.Redacted)
		}
	})
}
