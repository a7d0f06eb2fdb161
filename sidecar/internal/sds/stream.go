package sds

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// SecretType is the type_url of what is served.
const SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// server implements the service. There are two secrets, so the state of a stream
// is which of them it has: no library's cache is needed.
type server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer

	end <-chan struct{}

	mu  sync.Mutex
	now *word
}

func (s *server) word() *word {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// check refuses what is not served, by name: an Envoy would wait for it for
// ever.
func check(typeURL string, names []string) error {
	if typeURL != "" && typeURL != SecretType {
		return status.Errorf(codes.InvalidArgument, "type %.100q is not served here; %s is", typeURL, SecretType)
	}
	for _, n := range names {
		if n != bootstrap.SecretCertificate && n != bootstrap.SecretRoots {
			return status.Errorf(codes.NotFound, "there is no secret %.100q; there are %s and %s", n, bootstrap.SecretCertificate, bootstrap.SecretRoots)
		}
	}
	return nil
}

// stream is what one client has asked for and been sent.
type stream struct {
	wanted map[string]bool
	sent   map[string]string // version by name
	nonce  int
}

// news are the wanted secrets that the client does not have, by name.
func (st *stream) news(w *word) []string {
	var out []string
	for name := range st.wanted {
		if sec, ok := w.secrets[name]; ok && st.sent[name] != sec.version {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// receive reads requests into a channel until the stream ends.
func receive[T any](ctx context.Context, recv func() (T, error)) <-chan T {
	out := make(chan T)
	go func() {
		defer close(out)
		for {
			r, err := recv()
			if err != nil {
				return // the stream's context says why
			}
			select {
			case out <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// StreamSecrets implements the state-of-the-world protocol.
func (s *server) StreamSecrets(str secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	st := stream{wanted: map[string]bool{}, sent: map[string]string{}}
	requests := receive(str.Context(), str.Recv)
	for {
		w := s.word()
		// A response lists all that is wanted, when any of it is new.
		if len(st.news(w)) > 0 {
			st.nonce++
			resp, err := response(w, slices.Sorted(maps.Keys(st.wanted)))
			if err != nil {
				return err
			}
			resp.Nonce = strconv.Itoa(st.nonce)
			for name := range st.wanted {
				st.sent[name] = w.secrets[name].version
			}
			if err := str.Send(resp); err != nil {
				return err
			}
		}
		select {
		case <-s.end:
			return status.Error(codes.Unavailable, "the sidecar ends")
		case <-w.replaced:
		case req, ok := <-requests:
			if !ok {
				return nil
			}
			if err := check(req.GetTypeUrl(), req.GetResourceNames()); err != nil {
				return err
			}
			// A refusal is not answered by sending the same again: what is in force with
			// the client stays until there is something newer.
			wanted := map[string]bool{}
			for _, n := range req.GetResourceNames() {
				wanted[n] = true
			}
			maps.DeleteFunc(st.sent, func(name, _ string) bool { return !wanted[name] })
			st.wanted = wanted
		}
	}
}

// DeltaSecrets implements the delta protocol.
func (s *server) DeltaSecrets(str secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	st := stream{wanted: map[string]bool{}, sent: map[string]string{}}
	requests := receive(str.Context(), str.Recv)
	for {
		w := s.word()
		if names := st.news(w); len(names) > 0 {
			st.nonce++
			resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: SecretType, Nonce: strconv.Itoa(st.nonce)}
			for _, name := range names {
				sec := w.secrets[name]
				body, err := anypb.New(sec.message)
				if err != nil {
					return status.Errorf(codes.Internal, "encode %s: %v", name, err)
				}
				resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: name, Version: sec.version, Resource: body})
				st.sent[name] = sec.version
			}
			if err := str.Send(resp); err != nil {
				return err
			}
		}
		select {
		case <-s.end:
			return status.Error(codes.Unavailable, "the sidecar ends")
		case <-w.replaced:
		case req, ok := <-requests:
			if !ok {
				return nil
			}
			if err := check(req.GetTypeUrl(), req.GetResourceNamesSubscribe()); err != nil {
				return err
			}
			for _, n := range req.GetResourceNamesSubscribe() {
				st.wanted[n] = true
				// Who subscribes again, wants to be sent again, unless it says what it has.
				st.sent[n] = req.GetInitialResourceVersions()[n]
			}
			for _, n := range req.GetResourceNamesUnsubscribe() {
				delete(st.wanted, n)
				delete(st.sent, n)
			}
		}
	}
}

// FetchSecrets answers once.
func (s *server) FetchSecrets(_ context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	if err := check(req.GetTypeUrl(), req.GetResourceNames()); err != nil {
		return nil, err
	}
	w := s.word()
	if len(w.secrets) == 0 {
		return nil, status.Error(codes.Unavailable, "the workload has no certificate yet")
	}
	return response(w, req.GetResourceNames())
}

func response(w *word, names []string) (*discoveryv3.DiscoveryResponse, error) {
	out := &discoveryv3.DiscoveryResponse{TypeUrl: SecretType}
	var versions []string
	for _, name := range names {
		sec, ok := w.secrets[name]
		if !ok {
			continue
		}
		body, err := anypb.New(sec.message)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "encode %s: %v", name, err)
		}
		out.Resources = append(out.Resources, body)
		versions = append(versions, sec.version)
	}
	out.VersionInfo = strings.Join(versions, "+")
	return out, nil
}
