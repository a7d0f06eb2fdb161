package authority

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/identity/signing"
)

const (
	// proofTimeout bounds one call: a verifier may have to ask somebody.
	proofTimeout = 5 * time.Second
	// sayEvery is how often the log tells of refusals.
	sayEvery = 10 * time.Second

	byToken       = "token"
	byCertificate = "certificate"
)

// Register adds the service to a server whose credentials are Credentials.
func (a *Authority) Register(s grpc.ServiceRegistrar) {
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: signing.Service, HandlerType: (*handler)(nil), Metadata: "control-plane/identity/signing",
		Methods: []grpc.MethodDesc{{MethodName: "Sign", Handler: func(srv any, ctx context.Context, decode func(any) error, around grpc.UnaryServerInterceptor) (any, error) {
			in := new(structpb.Struct)
			if err := decode(in); err != nil {
				return nil, err
			}
			h, ok := srv.(handler)
			if !ok {
				return nil, status.Error(codes.Internal, "no authority")
			}
			if around == nil {
				return h.answer(ctx, in)
			}
			return around(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: signing.Method}, func(ctx context.Context, req any) (any, error) {
				in, ok := req.(*structpb.Struct)
				if !ok {
					return nil, status.Error(codes.Internal, "no request")
				}
				return h.answer(ctx, in)
			})
		}}},
	}, handler(a))
}

type handler interface {
	answer(ctx context.Context, in *structpb.Struct) (*structpb.Struct, error)
}

// answer is the call Sign.
func (a *Authority) answer(ctx context.Context, in *structpb.Struct) (*structpb.Struct, error) {
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	from := "unknown"
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		from = p.Addr.String()
		if host, _, err := net.SplitHostPort(from); err == nil {
			from = host
		}
	}
	id, proof, err := a.prove(ctx)
	if err != nil {
		return nil, a.refused(from, id, err)
	}
	if !a.limiter.allow(id.SPIFFE()+" "+from, a.now()) {
		return nil, a.refused(from, id, refuse(TooOften, "%s at %s asks too often: more than %d at once, or one a second for long", id, from, limitBurst))
	}
	r, err := signing.DecodeRequest(in)
	if err != nil {
		return nil, a.refused(from, id, &Refusal{BadRequest, err})
	}
	out, err := a.Sign(id, r.CSR)
	if err != nil {
		return nil, a.refused(from, id, err)
	}
	a.metrics.issued.WithLabelValues(proof).Inc()
	a.log.Info("certificate signed", "outrigger.identity", id.SPIFFE(), "source.address", from, "proof", proof,
		"tls.client.x509.serial_number", out.Chain[0].SerialNumber.Text(16), "tls.client.not_after", out.Chain[0].NotAfter)
	return out.Encode(), nil
}

// prove tells who calls: by the certificate of the connection where there is
// one, else by a token.
func (a *Authority) prove(ctx context.Context) (id identity.Identity, proof string, err error) {
	p, ok := peer.FromContext(ctx)
	info, tlsOK := credentials.TLSInfo{}, false
	if ok {
		info, tlsOK = p.AuthInfo.(credentials.TLSInfo)
	}
	if !tlsOK {
		return id, "", refuse(NoProof, "a certificate is asked for over TLS only")
	}
	if chain := info.State.PeerCertificates; len(chain) > 0 {
		// Again: the connection may be older than what has changed.
		id, err = a.verify(chain)
		return id, byCertificate, err
	}
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get(signing.Authorization)
	if len(values) != 1 {
		return id, "", refuse(NoProof, "the caller has proved nothing: give a token in the metadata %s, or a certificate that is valid", signing.Authorization)
	}
	token, ok := signing.Token(values[0])
	if !ok {
		return id, "", refuse(TokenMalformed, "the metadata %s is not Bearer and a token of at most %d bytes", signing.Authorization, signing.MaxToken)
	}
	id, err = a.verifier.Verify(ctx, token)
	return id, byToken, err
}

// refused counts a refusal and says it to the caller, and now and then to the
// log.
func (a *Authority) refused(from string, id identity.Identity, err error) error {
	reason, code := NotPossible, codes.Internal
	var r *Refusal
	if errors.As(err, &r) {
		reason = r.Reason
	}
	switch reason {
	case NoProof, TokenMalformed, TokenSignature, TokenExpired, TokenRejected, TokenUnbound, TrustDomain, Certificate:
		code = codes.Unauthenticated
	case Reserved, OtherIdentity:
		code = codes.PermissionDenied
	case BadRequest:
		code = codes.InvalidArgument
	case TooOften:
		code = codes.ResourceExhausted
	case NotPossible:
	}
	a.metrics.refused.WithLabelValues(string(reason)).Inc()
	if silent, ok := a.quiet.say(a.now()); ok {
		who := ""
		if id != (identity.Identity{}) {
			who = id.SPIFFE()
		}
		a.log.Warn("a certificate was refused", "source.address", from, "outrigger.identity", who, "reason", reason, "error.message", err.Error(), "untold", silent)
	}
	return status.Error(code, err.Error())
}

// quiet keeps strangers from filling the log.
type quiet struct {
	mu     sync.Mutex
	last   time.Time
	silent int
}

func (q *quiet) say(now time.Time) (silent int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.last.IsZero() && now.Sub(q.last) < sayEvery {
		q.silent++
		return 0, false
	}
	silent, q.silent, q.last = q.silent, 0, now
	return silent, true
}

// Credentials are those of the server that is reached over TLS: it proves that
// it is the control plane, and verifies a client's certificate where one is
// presented. Whether one is needed is for the services to say. Sessions are not
// resumed: connections are few and long.
func (a *Authority) Credentials() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13, Time: a.now, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return a.ownCertificate() },
		// Request, because VerifyConnection verifies, by the roots of the moment.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return nil
			}
			_, err := a.verify(cs.PeerCertificates)
			if err != nil {
				if silent, ok := a.quiet.say(a.now()); ok {
					a.log.Warn("a client was refused", "error.message", err.Error(), "untold", silent)
				}
			}
			return err
		},
	})
}

// MaxConnectionAge is for how long a connection to the control plane may stand:
// one that was made with a certificate of half its life ends before that does.
func (a *Authority) MaxConnectionAge() time.Duration { return a.o.TTL * 2 / 5 }

// ownCertificate is the control plane's own, renewed at half of its life and
// when the issuer has changed.
func (a *Authority) ownCertificate() (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	k, now := a.current.Load(), a.now()
	if a.own != nil && a.ownKeys == k && now.Before(a.ownRenew) {
		return a.own, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := k.sign(identity.ControlPlane(a.o.TrustDomain), key.Public(), a.o.Names, a.o.TTL, now)
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{PrivateKey: key, Leaf: leaf}
	for _, link := range append([]*x509.Certificate{leaf}, k.chain...) {
		c.Certificate = append(c.Certificate, link.Raw)
	}
	a.own, a.ownKeys, a.ownRenew = c, k, now.Add(leaf.NotAfter.Sub(now)/2)
	a.metrics.links.WithLabelValues("control plane").Set(float64(leaf.NotAfter.Unix()))
	return c, nil
}
