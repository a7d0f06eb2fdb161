package tlsfiles_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

func TestValidate(t *testing.T) {
	f := func(files tlsfiles.Files, on bool, want string) {
		t.Helper()
		err := files.Validate("x", on)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v; want %q", files, err, want)
		}
	}
	f(tlsfiles.Files{}, false, "")
	f(tlsfiles.Files{}, true, "")
	f(tlsfiles.Files{CA: "a", Cert: "b", Key: "c", ServerName: "d"}, true, "")
	f(tlsfiles.Files{InsecureSkipVerify: true}, false, "without TLS")
	f(tlsfiles.Files{Cert: "b"}, true, "keyFile")
}

func TestSecret(t *testing.T) {
	dir := t.TempDir()
	f := func(content, want, wantErr string) {
		t.Helper()
		path := filepath.Join(dir, "secret")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := tlsfiles.Secret("x", "keyFile", path)
		if got != want || (wantErr == "") != (err == nil) || err != nil && (!strings.Contains(err.Error(), wantErr) || !strings.Contains(err.Error(), "keyFile")) {
			t.Errorf("%q, %v; want %q, %q", got, err, want, wantErr)
		}
	}
	f(" s3cret\n", "s3cret", "")
	f("\n", "", "is empty")
	f(strings.Repeat("x", 70000), "", "70000 bytes")
	if _, err := tlsfiles.Secret("x", "keyFile", dir+"/none"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ca")
	if err := os.WriteFile(path, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (tlsfiles.Files{CA: path}).Config("x"); err == nil || !strings.Contains(err.Error(), "holds no PEM certificate") {
		t.Errorf("%v", err)
	}
	c, err := tlsfiles.Files{ServerName: "n"}.Config("x")
	if err != nil || c.MinVersion != tls.VersionTLS12 || c.ServerName != "n" || c.InsecureSkipVerify {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestExplain(t *testing.T) {
	f := func(err error, want string, wantPermanent bool) {
		t.Helper()
		remedy, permanent := tlsfiles.Explain(fmt.Errorf("outer: %w", err))
		if !strings.Contains(remedy, want) || (remedy == "") != (want == "") || permanent != wantPermanent {
			t.Errorf("%v: %q, %t; want %q, %t", err, remedy, permanent, want, wantPermanent)
		}
	}
	f(&tls.CertificateVerificationError{Err: x509.HostnameError{Certificate: &x509.Certificate{}, Host: "h"}}, "serverName", true)
	f(x509.UnknownAuthorityError{}, "caFile", true)
	f(x509.CertificateInvalidError{Reason: x509.Expired}, "renew", true)
	f(tls.RecordHeaderError{Msg: "first record"}, "does not speak TLS", true)
	f(&net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}, "certFile", true)
	f(&net.OpError{Op: "remote error", Err: errors.New("tls: internal error")}, "", false)
	f(net.ErrClosed, "", false)
}
