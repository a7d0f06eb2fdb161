package certificate

import (
	"crypto/x509"
	"maps"
	"strings"
	"testing"
	"time"
)

var plan = Plan{Names: []string{"outrigger-injector.outrigger-system.svc", "127.0.0.1"}, Life: 30 * 24 * time.Hour}

var begin = time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)

func TestFounding(t *testing.T) {
	s, why, err := Next(nil, plan, false, begin)
	if err != nil || why != "an authority was founded" {
		t.Fatal(why, err)
	}
	if next, why, err := Next(s, plan, false, begin.Add(time.Hour)); next != s || why != "" || err != nil {
		t.Errorf("an hour later: %q, %v", why, err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.Bundle())
	for _, name := range plan.Names {
		if _, err := s.leaf.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: name, CurrentTime: begin}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := plan
	other.Names = []string{"new.example"}
	if next, why, err := Next(s, other, false, begin.Add(time.Hour)); err != nil || why != "the certificate has other names" || next.leaf.Leaf.VerifyHostname("new.example") != nil {
		t.Errorf("other names: %q, %v", why, err)
	}
	data, err := s.Data()
	if err != nil {
		t.Fatal(err)
	}
	if back, err := Parse(data); err != nil || !back.leaf.Leaf.Equal(s.leaf.Leaf) || string(back.Bundle()) != string(s.Bundle()) {
		t.Errorf("read back: %v", err)
	}
	f := func(want string, change func(map[string][]byte)) {
		t.Helper()
		d := maps.Clone(data)
		change(d)
		if _, err := Parse(d); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	strange, _, err := Next(nil, plan, false, begin)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := strange.Data()
	if err != nil {
		t.Fatal(err)
	}
	f("ca.crt holds 0 certificates", func(d map[string][]byte) { delete(d, keyRoots) })
	f("ca.key holds no key", func(d map[string][]byte) { d[keyRootKey] = []byte("x") })
	f("is not the key of the first certificate", func(d map[string][]byte) { d[keyRootKey] = foreign[keyRootKey] })
	f("tls.crt and tls.key", func(d map[string][]byte) { d[keyCertKey] = foreign[keyCertKey] })
	f("issued by none of", func(d map[string][]byte) { d[keyCert], d[keyCertKey] = foreign[keyCert], foreign[keyCertKey] })
}

// A year, looked at four times a day, by a caller that learns of a new root only when
// it is published: whenever it calls, it trusts what is served.
func TestYear(t *testing.T) {
	const look = 6 * time.Hour
	var s *State
	trusted := []byte(nil) // what the API server has
	roots, leaves := map[string]bool{}, map[string]bool{}
	most := 0
	for now := begin; now.Before(begin.Add(365 * 24 * time.Hour)); now = now.Add(look) {
		// Publishing lags: what was decided at the last look arrives now.
		if s != nil {
			trusted = s.Bundle()
		}
		published := s != nil && strings.Contains(string(trusted), string(s.Newest()))
		next, _, err := Next(s, plan, published, now)
		if err != nil {
			t.Fatal(err)
		}
		if s == nil {
			trusted = next.Bundle()
		}
		s = next
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(trusted)
		if _, err := s.leaf.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: plan.Names[0], CurrentTime: now.Add(look)}); err != nil {
			t.Fatalf("%s: %v", now, err)
		}
		roots[string(s.Newest())] = true
		leaves[string(s.leaf.Leaf.Raw)] = true
		most = max(most, len(s.roots))
	}
	if len(roots) != 7 || len(leaves) < 20 || most > 3 {
		t.Errorf("%d authorities, %d certificates, at most %d roots at once", len(roots), len(leaves), most)
	}
}

// While nobody can publish the new root, the certificate stays with the old
// authority for as long as it lives.
func TestUnpublished(t *testing.T) {
	s, _, err := Next(nil, plan, true, begin)
	if err != nil {
		t.Fatal(err)
	}
	look := func(now time.Time, published bool, want string) {
		t.Helper()
		next, why, err := Next(s, plan, published, now)
		if err != nil || why != want {
			t.Errorf("%s: %q, %v, want %q", now, why, err, want)
		}
		s = next
	}
	day := 24 * time.Hour
	look(begin.Add(16*day), true, "the certificate is at half of its life")
	look(begin.Add(32*day), true, "the certificate is at half of its life")
	look(begin.Add(48*day), true, "the certificate is at half of its life")
	look(begin.Add(60*day), true, "an authority was founded to follow another")
	look(begin.Add(60*day+30*time.Second), true, "") // not settled
	look(begin.Add(64*day), false, "")
	look(begin.Add(76*day), false, "the certificate is about to expire")

	// Both gone, after a long sleep.
	look(begin.Add(500*day), true, "an authority was founded")
}

func TestPlan(t *testing.T) {
	if err := plan.Validate(); err != nil {
		t.Error(err)
	}
	if err := (Plan{Names: []string{"a"}, Life: time.Second}).Validate(); err == nil || !strings.Contains(err.Error(), "--certificate-lifetime 1s is too short") {
		t.Error(err)
	}
	if err := (Plan{Life: time.Hour}).Validate(); err == nil {
		t.Error("no name, no error")
	}
}
