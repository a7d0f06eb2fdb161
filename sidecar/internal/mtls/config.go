package mtls

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strconv"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Protocol in a ClientHello's ALPN (RFC 7301) says that the client is the proxy
// of another workload, which encrypts what the application said, and not the
// application itself.
const Protocol = bootstrap.ProtocolMesh

// maxSessions is how many sessions are kept for resumption (RFC 8446, 2.2).
const maxSessions = 4096

// IsMesh reports whether a ClientHello that offers these protocols is that of
// another sidecar rather than of the application itself.
func IsMesh(alpn []string) bool { return slices.Contains(alpn, Protocol) }

// Client is the configuration of connections to peers of which each must prove
// one of the SPIFFE IDs in want; with none it accepts nobody. serverName is asked
// for (RFC 6066, 3), not verified. protocols is what will be spoken, "h2" or
// "http/1.1", and is offered besides Protocol: an Envoy believes what was agreed
// on; without any it looks at the bytes.
//
// Each configuration resumes its own sessions only, so make one for each
// endpoint and keep it. It follows renewals by itself.
func (i *Identity) Client(want []string, serverName string, protocols ...string) *tls.Config {
	accept := oneOf(sorted(want))
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: serverName, Time: i.now,
		NextProtos:           append(slices.Clone(protocols), Protocol),
		ClientSessionCache:   &sessions{i, strconv.FormatUint(i.scopes.Add(1), 10)},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return i.own() },
		InsecureSkipVerify:   true, //nolint:gosec // names are not what is verified: VerifyConnection does all of it, also for resumed sessions
		VerifyConnection: func(cs tls.ConnectionState) error {
			return i.check(&cs, x509.ExtKeyUsageServerAuth, accept)
		},
	}
}

// Server is the configuration of connections from other workloads: each must
// prove an identity of the trust domain, which PeerID tells. It is the same
// every time, so that sessions are resumed whichever connection they began on,
// follows renewals by itself, and must not be changed. Of the protocols that a
// client offers it takes h2, else http/1.1, else Protocol.
func (i *Identity) Server() *tls.Config { return i.server }

func (i *Identity) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Time: i.now,
		NextProtos:     []string{"h2", "http/1.1", Protocol},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return i.own() },
		// Any, because VerifyConnection verifies, also where a session is resumed.
		ClientAuth: tls.RequireAnyClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return i.check(&cs, x509.ExtKeyUsageClientAuth, anyone)
		},
	}
}

func (i *Identity) own() (*tls.Certificate, error) {
	if c := i.current.Load().certificate; c != nil {
		return c, nil
	}
	return nil, ErrNoCertificate
}

// sessions is the part of the shared cache that belongs to one configuration
// and to the certificate in use: a session proves what both sides had when it
// began.
type sessions struct {
	i     *Identity
	scope string
}

func (s *sessions) key(k string) string {
	return strconv.FormatUint(s.i.epoch.Load(), 10) + "|" + s.scope + "|" + k
}

func (s *sessions) Get(k string) (*tls.ClientSessionState, bool) { return s.i.session.Get(s.key(k)) }

func (s *sessions) Put(k string, cs *tls.ClientSessionState) { s.i.session.Put(s.key(k), cs) }
