package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// reverseProxy is httputil.ReverseProxy as one would use it without a mesh: no
// routes, no breaker, no metrics and no access log.
func reverseProxy(ctx context.Context, o options) error {
	transport := &http.Transport{MaxIdleConns: 0, MaxIdleConnsPerHost: 1024, IdleConnTimeout: time.Hour, DisableCompression: true}
	server := &http.Server{ReadHeaderTimeout: time.Minute, IdleTimeout: time.Hour, ErrorLog: log.New(os.Stderr, "reverseproxy: ", 0)}
	to := &url.URL{Scheme: "http", Host: o.to}
	if o.http2 {
		var p http.Protocols
		p.SetUnencryptedHTTP2(true)
		transport.Protocols, server.Protocols = &p, &p
	}
	if o.tls != "" {
		config, err := mutual(o)
		if err != nil {
			return err
		}
		if o.tls == "client" {
			to.Scheme, transport.TLSClientConfig = "https", config
		} else {
			server.TLSConfig = config
		}
	}
	proxy := &httputil.ReverseProxy{
		Transport: transport, FlushInterval: flushInterval(o), ErrorLog: server.ErrorLog,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to)
			r.Out.Host = r.In.Host
			r.SetXForwarded()
		},
	}
	server.Handler = proxy
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("listen at %s: %w", o.listen, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if o.tls == "server" {
		l = tls.NewListener(l, server.TLSConfig)
	}
	if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return ctx.Err()
}

// flushInterval sends messages of streams as they come.
func flushInterval(o options) time.Duration {
	if o.http2 {
		return -1
	}
	return 0
}

// mutual is TLS 1.3 in which both sides show a certificate of the same root.
func mutual(o options) (*tls.Config, error) {
	root, err := os.ReadFile(filepath.Join(o.certs, "ca.pem"))
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(root) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(o.certs, "ca.pem"))
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(o.certs, o.tls+".pem"), filepath.Join(o.certs, o.tls+".key"))
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert},
		RootCAs: pool, ServerName: "server.bench", ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
	}, nil
}
