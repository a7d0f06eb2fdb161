package output

import (
	"crypto/tls"
	"net"
	"net/http"
	"time"
)

// Transport returns the transport of an output over HTTP, which asks the proxy of
// the environment. It keeps at most so many idle connections to a host, for a
// minute; a connection may take 10 s, the handshake of TLS as long again, and the
// head of an answer timeout. The caller may change it before its first use, and
// closes its idle connections.
func Transport(config *tls.Config, connections int, timeout time.Duration) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       config,
		TLSHandshakeTimeout:   10 * time.Second,
		IdleConnTimeout:       60 * time.Second,
		MaxIdleConnsPerHost:   connections,
		ForceAttemptHTTP2:     true,
		ResponseHeaderTimeout: timeout,
	}
}
