// Package sds hands the workload's certificate, its key and the roots of the
// mesh to an Envoy beside the sidecar: the xDS Secret Discovery Service, state
// of the world and delta, and what is newer as soon as there is.
//
// It knows the form of secrets and who may reach the socket; it knows neither
// how the certificate is got nor what it is used for. main serves what package
// mtls has.
package sds

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/mtls"
)

const (
	unixPrefix = "unix://"
	// maxStreamsPerConnection: an Envoy opens one for each place in which a secret
	// is named.
	maxStreamsPerConnection = 4096
	maxMessage              = 64 << 10
	stopTimeout             = time.Second
)

// Source has the secrets; *mtls.Identity is one.
type Source interface {
	Secrets() (*mtls.Secrets, <-chan struct{}, error)
}

// Listen binds unix:///<path>, which only the own user may open, or an address
// on loopback, which every user of the machine may: whoever reaches it gets the
// workload's key. A socket that nobody listens on any more is replaced.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	path, ok := strings.CutPrefix(address, unixPrefix)
	if !ok {
		a, err := netip.ParseAddrPort(address)
		if err != nil || !a.Addr().IsLoopback() {
			return nil, fmt.Errorf("%s is neither %s<path> nor an address on loopback: the workload's key would leave the machine", address, unixPrefix)
		}
		var lc net.ListenConfig
		return lc.Listen(ctx, "tcp", address)
	}
	if !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("%s: the path is not absolute: write %s/<folder>/<name>", address, unixPrefix)
	}
	if err := clear(ctx, path); err != nil {
		return nil, err
	}
	// Nobody may connect between bind and chmod.
	old := syscall.Umask(0o177)
	defer syscall.Umask(old)
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return l, nil
}

// clear removes a socket of a program that has ended.
func clear(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket: name another path", path)
	}
	var d net.Dialer
	if c, err := d.DialContext(ctx, "unix", path); err == nil {
		return errors.Join(fmt.Errorf("%s is in use by another program: stop that one, or name another path", path), c.Close())
	}
	return os.Remove(path)
}

// Serve answers on l, which it closes, until ctx ends, and returns nil once all
// streams have ended.
func Serve(ctx context.Context, l net.Listener, source Source, log *slog.Logger) error {
	streams, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	s := &server{now: newWord(), end: streams.Done()}
	g := grpc.NewServer(grpc.MaxConcurrentStreams(maxStreamsPerConnection), grpc.MaxRecvMsgSize(maxMessage))
	secretv3.RegisterSecretDiscoveryServiceServer(g, s)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.follow(streams, source, log) })
	stopped := make(chan struct{})
	defer close(stopped)
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-stopped:
		}
		end()
		cut := time.AfterFunc(stopTimeout, g.Stop)
		g.GracefulStop()
		cut.Stop()
	})
	err := g.Serve(l)
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve SDS on %s: %w", l.Addr(), err)
}

// follow puts into force what the source has.
func (s *server) follow(ctx context.Context, source Source, log *slog.Logger) {
	for {
		secrets, replaced, err := source.Secrets()
		switch {
		case err != nil:
			log.Error("the certificate cannot be served by SDS", "error.message", err.Error())
		case secrets != nil:
			s.publish(secrets)
		}
		select {
		case <-ctx.Done():
			return
		case <-replaced:
		}
	}
}

// secret is a resource and the hash of its content.
type secret struct {
	version string
	message *tlsv3.Secret
}

// word is what is served at one moment.
type word struct {
	secrets  map[string]secret // empty before there is a certificate
	replaced chan struct{}
}

func newWord() *word { return &word{secrets: map[string]secret{}, replaced: make(chan struct{})} }

func (s *server) publish(in *mtls.Secrets) {
	next := newWord()
	put := func(content []byte, m *tlsv3.Secret) {
		sum := sha256.Sum256(content)
		next.secrets[m.GetName()] = secret{hex.EncodeToString(sum[:8]), m}
	}
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	// Of the key nothing is said in a version: the certificate names it.
	put(in.Chain, &tlsv3.Secret{Name: bootstrap.SecretCertificate, Type: &tlsv3.Secret_TlsCertificate{
		TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(in.Chain), PrivateKey: inline(in.Key)},
	}})
	put(in.Roots, &tlsv3.Secret{Name: bootstrap.SecretRoots, Type: &tlsv3.Secret_ValidationContext{
		ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(in.Roots)},
	}})
	s.mu.Lock()
	old := s.now
	s.now = next
	s.mu.Unlock()
	close(old.replaced)
}
