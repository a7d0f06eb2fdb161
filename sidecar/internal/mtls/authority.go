package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

// authority asks the one of the control plane, on a connection for the purpose:
// it is needed twice a day.
type authority struct{ *Identity }

func (a authority) Sign(ctx context.Context, r signing.Request) (out signing.Response, err error) {
	token, err := a.token()
	if err != nil {
		// Where there is still a certificate, it will do.
		if a.left(a.now()) <= 0 {
			return out, err
		}
		a.log.Debug("the token cannot be read; the certificate proves the workload", "error.message", err.Error())
	}
	conn, err := grpc.NewClient(a.o.Authority,
		grpc.WithTransportCredentials(credentials.NewTLS(a.controlPlane())),
		grpc.WithNoProxy(), // HTTPS_PROXY is the application's
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(2*signing.MaxResponse)),
	)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, signing.Authorization, signing.Bearer(token))
	}
	var answer structpb.Struct
	if err := conn.Invoke(ctx, signing.Method, r.Encode(), &answer); err != nil {
		return out, err
	}
	if out, err = signing.DecodeResponse(&answer); err != nil {
		return out, fmt.Errorf("the authority's answer: %w", err)
	}
	return out, nil
}

func (a authority) token() (string, error) {
	if a.o.TokenFile == "" {
		return "", nil
	}
	b, err := os.ReadFile(a.o.TokenFile)
	if err != nil {
		return "", fmt.Errorf("join token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" || len(token) > signing.MaxToken || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("join token file %s holds no token; write what control-plane --join-token %s/%s prints", a.o.TokenFile, a.self.Namespace, a.self.ServiceAccount)
	}
	return token, nil
}

// controlPlane is the configuration of connections to the control plane: it
// must prove its identity of our trust domain. The certificate of the workload
// is presented while it is valid. Sessions are not resumed: connections are few.
func (i *Identity) controlPlane() *tls.Config {
	want := identity.ControlPlane(i.self.TrustDomain)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Time: i.now, SessionTicketsDisabled: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if i.left(i.now()) <= 0 {
				return &tls.Certificate{}, nil // none
			}
			return i.own()
		},
		InsecureSkipVerify: true, //nolint:gosec // names are not what is verified: VerifyConnection does all of it
		VerifyConnection: func(cs tls.ConnectionState) error {
			m, err := i.anchors()
			if err != nil {
				return err
			}
			return i.checkWith(m, &cs, x509.ExtKeyUsageServerAuth, oneOf([]string{want.SPIFFE()}))
		},
	}
}

// anchors are the roots that the control plane's certificate may lead to: those
// of the file, and those that the authority has handed out.
func (i *Identity) anchors() (*material, error) {
	m := &material{roots: x509.NewCertPool()}
	for _, c := range i.current.Load().rootList {
		m.roots.AddCert(c)
	}
	if i.o.RootsFile == "" {
		return m, nil
	}
	b, err := os.ReadFile(i.o.RootsFile)
	if err != nil {
		return nil, fmt.Errorf("roots of the control plane: %w", err)
	}
	list, err := signing.DecodeCertificates(b)
	if err != nil {
		return nil, fmt.Errorf("roots of the control plane: %s: %w", i.o.RootsFile, err)
	}
	for _, c := range list {
		m.roots.AddCert(c)
	}
	return m, nil
}

// ControlPlane are the credentials of a gRPC connection to the control plane:
// both sides prove their identities. A handshake waits until there is a
// certificate to present.
func (i *Identity) ControlPlane() credentials.TransportCredentials {
	return waiting{credentials.NewTLS(i.controlPlane()), i.ready}
}

type waiting struct {
	credentials.TransportCredentials
	ready <-chan struct{}
}

func (w waiting) ClientHandshake(ctx context.Context, name string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	select {
	case <-w.ready:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("%w: %w", ErrNoCertificate, context.Cause(ctx))
	}
	return w.TransportCredentials.ClientHandshake(ctx, name, raw)
}

func (w waiting) Clone() credentials.TransportCredentials {
	return waiting{w.TransportCredentials.Clone(), w.ready}
}
