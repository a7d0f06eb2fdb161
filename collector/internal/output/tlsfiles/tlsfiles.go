// Package tlsfiles is the client's side of TLS for the outputs that open their own
// connections: certificates and secrets from files, and what a failed handshake
// means in words that name the field to change.
//
// It knows the names of the fields, which are the same in every output, and no
// protocol. The outputs call it.
package tlsfiles

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
)

// maxSecret bounds what is read of a secret's file.
const maxSecret = 64 << 10

// Files names what a client needs for TLS.
type Files struct {
	CA         string // caFile: PEM certificates to trust instead of the system's
	Cert       string // certFile: the client's own, PEM
	Key        string // keyFile: its key, PEM
	ServerName string // serverName: in the server's certificate, where it is not the address
	// InsecureSkipVerify takes any certificate.
	InsecureSkipVerify bool
}

// Validate reports a combination of fields that cannot be used. on says whether
// TLS is switched on. It reads no files.
func (f Files) Validate(kind string, on bool) error {
	if !on && f != (Files{}) {
		return fmt.Errorf("%s: caFile, certFile, keyFile, serverName or insecureSkipVerify is set without TLS: switch it on or leave them out", kind)
	}
	if (f.Cert == "") != (f.Key == "") {
		return fmt.Errorf("%s: certFile: %q and keyFile: %q go together: set both or neither", kind, f.Cert, f.Key)
	}
	return nil
}

// Config reads the files. The client's certificate is read again in every
// handshake. The caller may change what it gets.
func (f Files) Config(kind string) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: f.ServerName, InsecureSkipVerify: f.InsecureSkipVerify} //nolint:gosec // G402: the user asks for it by name
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, fmt.Errorf("%s: caFile: %w: mount the certificate there or correct the path", kind, err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: caFile: %s holds no PEM certificate: write -----BEGIN CERTIFICATE----- blocks into it", kind, f.CA)
		}
	}
	if f.Cert != "" {
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
			if err != nil {
				return nil, pairError{fmt.Errorf("%s: certFile %s, keyFile %s: %w: write a PEM certificate and its key into them", kind, f.Cert, f.Key, err)}
			}
			return &cert, nil
		}
	}
	return t, nil
}

// pairError: the client's certificate cannot be used. It says what to do itself.
type pairError struct{ error }

func (e pairError) Unwrap() error { return e.error }

// Explain returns what to do about an error of a TLS connection, empty where the
// error says it itself or is none of TLS, and whether it will come again until
// somebody does it.
func Explain(err error) (remedy string, permanent bool) {
	var (
		host     x509.HostnameError
		unknown  x509.UnknownAuthorityError
		invalid  x509.CertificateInvalidError
		verify   *tls.CertificateVerificationError
		header   tls.RecordHeaderError
		op       *net.OpError
		pair     pairError
		isRemote = errors.As(err, &op) && op.Op == "remote error"
	)
	switch {
	case errors.As(err, &pair):
		return "", true
	case errors.As(err, &host):
		return "the server's certificate is for another host: correct the address, or set serverName to a name that the certificate holds", true
	case errors.As(err, &unknown):
		return "the server's certificate comes from an authority that is not trusted: set caFile to the authority's certificate", true
	case errors.As(err, &invalid), errors.As(err, &verify):
		return "the server's certificate is not valid: renew it, or set caFile to its authority's certificate", true
	case errors.As(err, &header):
		return "the server does not speak TLS: switch TLS off here, or on there", true
	case isRemote && strings.Contains(op.Error(), "certificate"), isRemote && strings.Contains(op.Error(), "unknown"):
		return "the server refuses this client's certificate: set certFile and keyFile to one that it trusts", true
	}
	return "", false
}

// Secret reads a secret's file, without the white space around it.
func Secret(kind, field, file string) (string, error) {
	info, err := os.Stat(file)
	if err == nil && info.Size() > maxSecret {
		return "", fmt.Errorf("%s: %s: %s holds %d bytes and no secret has more than %d: correct the path", kind, field, file, info.Size(), maxSecret)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("%s: %s: %w: mount the secret there or correct the path", kind, field, err)
	}
	s := strings.TrimSpace(string(data))
	if s == "" {
		return "", fmt.Errorf("%s: %s: %s is empty: write the secret into it", kind, field, file)
	}
	return s, nil
}
