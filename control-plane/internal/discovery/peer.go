package discovery

import (
	"context"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// guard refuses streams of clients that have not proved who they are. That a
// certificate that was presented is good, the handshake has verified.
func (s *Server) guard(trustDomain string) grpc.StreamServerInterceptor {
	return func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		refuse := func(code codes.Code, format string, args ...any) error {
			s.metrics.refused.WithLabelValues("identity").Inc()
			return grpcstatus.Errorf(code, format, args...)
		}
		p, ok := peer.FromContext(stream.Context())
		if !ok {
			return refuse(codes.Unauthenticated, "the client is unknown")
		}
		info, ok := p.AuthInfo.(credentials.TLSInfo)
		if !ok || len(info.State.PeerCertificates) == 0 {
			return refuse(codes.Unauthenticated, "configuration is given to those who present a client certificate of trust domain %s: get one from the authority (Sign) first", trustDomain)
		}
		id, err := identity.OfCertificate(info.State.PeerCertificates[0])
		if err != nil {
			return refuse(codes.Unauthenticated, "client certificate: %v", err)
		}
		if id.TrustDomain != trustDomain {
			return refuse(codes.PermissionDenied, "client certificate: %s is of trust domain %s; this control plane is of %s", id, id.TrustDomain, trustDomain)
		}
		return next(srv, provenStream{stream, context.WithValue(stream.Context(), provenKey{}, &id)})
	}
}

type provenKey struct{}

// provenStream is a stream whose context knows the client.
type provenStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a stream is what its context belongs to
}

// Context implements grpc.ServerStream.
func (s provenStream) Context() context.Context { return s.ctx }

// peerOf is what guard has found; nil where the client came in clear.
func peerOf(ctx context.Context) *identity.Identity {
	id, _ := ctx.Value(provenKey{}).(*identity.Identity)
	return id
}

// mayBe refuses a node that says that it is of another workload than its client
// has proved: it would be told what is for others, and be shown as them.
func (s *stream) mayBe(node *corev3.Node) error {
	if s.peer == nil {
		return nil
	}
	said := func(key string) string { return node.GetMetadata().GetFields()[key].GetStringValue() }
	ns, account := said(bootstrap.MetaNamespace), said(bootstrap.MetaServiceAccount)
	if ns != s.peer.Namespace || account != s.peer.ServiceAccount {
		return grpcstatus.Errorf(codes.PermissionDenied, "node %q says that it is of namespace %q and service account %q (node metadata %s, %s), and its client has proved that it is %s",
			node.GetId(), ns, account, bootstrap.MetaNamespace, bootstrap.MetaServiceAccount, s.peer)
	}
	if !strings.HasSuffix(node.GetId(), "."+s.peer.Namespace) {
		return grpcstatus.Errorf(codes.PermissionDenied, "node %q is not <instance>.%s, and its client has proved that it is %s", node.GetId(), s.peer.Namespace, s.peer)
	}
	return nil
}
