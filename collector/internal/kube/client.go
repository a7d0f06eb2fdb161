// Package kube asks the API server and the kubelet: get, list, watch, create and
// update in JSON, over net/http.
//
// It is the collector's one door to the cluster, in place of client-go: a
// per-node agent reads a handful of fields of a few objects, and is to stay
// small. Callers give the type that an object is decoded into; a type with the
// few fields that are wanted is all that is ever kept of an object, and lists are
// decoded object by object, so that no list is in memory whole.
//
// It does not know what the objects mean (packages metadata and input/events).
package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// Limits of an answer.
const (
	// MaxObject bytes of one object are read; etcd takes 1.5 MiB by default.
	MaxObject = 16 << 20
	// MaxList bytes of one list are read.
	MaxList = 1 << 30
	// maxStatus bytes are read of an answer that says why it is none.
	maxStatus = 64 << 10
	// Timeout of a request that is no watch.
	Timeout = 30 * time.Second
)

// Config of a Client. Files are read again for each connection (certificates) or
// request (token), because all of them are rotated under a running program.
type Config struct {
	// Server is the address: https://10.96.0.1:443.
	Server string
	// CAFile verifies the server; the system's authorities by default.
	CAFile string
	// TokenFile holds a bearer token, for example that of the service account.
	TokenFile string
	// CertFile and KeyFile are a client certificate.
	CertFile, KeyFile string
	// Insecure does not verify the server. For a kubelet whose certificate nobody
	// signed: the token is then shown to whoever answers at the address, so that has to
	// be the node's own.
	Insecure bool
	// UserAgent tells the API server's audit log who asks.
	UserAgent string
	// Wrap, where it is given, stands around the transport.
	Wrap func(http.RoundTripper) http.RoundTripper
}

// Folder of a pod's service account.
const accountFolder = "/var/run/secrets/kubernetes.io/serviceaccount"

// InCluster returns the configuration that Kubernetes gives every pod: the
// address in the environment, which getenv reads, and the service account's files.
// It reports false outside of a pod.
func InCluster(getenv func(string) string) (Config, bool) {
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return Config{}, false
	}
	return Config{Server: "https://" + net.JoinHostPort(host, port), CAFile: accountFolder + "/ca.crt", TokenFile: accountFolder + "/token"}, true
}

// Expand puts the environment, which getenv reads, into the address of a server:
// https://$(NODE_IP):10250, as Kubernetes writes it. So one configuration serves
// all nodes. A variable that is not set is an error, and so is a $( that is not closed.
func Expand(server string, getenv func(string) string) (string, error) {
	before, rest, found := strings.Cut(server, "$(")
	if !found {
		return server, nil
	}
	name, after, closed := strings.Cut(rest, ")")
	if !closed {
		return "", fmt.Errorf("kube: server %q: the $( is not closed: write it as https://$(NODE_IP):10250", server)
	}
	value := getenv(name)
	if value == "" {
		return "", fmt.Errorf("kube: server %q: the environment has no %s: set it, or write the address", server, name)
	}
	if strings.Contains(value, ":") { // IPv6
		value = "[" + value + "]"
	}
	return before + value + after, nil
}

// Client is safe for concurrent use.
type Client struct {
	cfg    Config
	base   *url.URL
	client *http.Client
	close  func()
}

// New returns a Client that has not connected yet.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.Server)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" {
		return nil, fmt.Errorf("kube: server %q is not an address: write it as https://10.96.0.1:443", cfg.Server)
	}
	if base.Scheme == "http" && (cfg.TokenFile != "" || cfg.CertFile != "") {
		return nil, fmt.Errorf("kube: server %q has no TLS, and credentials would be sent in clear: write https", cfg.Server)
	}
	if (cfg.CertFile == "") != (cfg.KeyFile == "") {
		return nil, errors.New("kube: a client certificate needs both its file and that of its key")
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "outrigger-collector"
	}
	c := &Client{cfg: cfg, base: base}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 15 * time.Second, Count: 4}}
	transport := &http.Transport{
		DialContext:           dialer.DialContext,
		Proxy:                 nil, // the API server and the kubelet are in the cluster
		MaxIdleConnsPerHost:   2,
		IdleConnTimeout:       time.Minute,
		ResponseHeaderTimeout: Timeout,
	}
	transport.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conf, err := c.tls()
		if err != nil {
			return nil, err
		}
		return (&tls.Dialer{NetDialer: dialer, Config: conf}).DialContext(ctx, network, addr)
	}
	var rt http.RoundTripper = transport
	if cfg.Wrap != nil {
		rt = cfg.Wrap(rt)
	}
	// A redirect would carry the token elsewhere.
	c.client = &http.Client{Transport: rt, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	c.close = transport.CloseIdleConnections
	return c, nil
}

// Close closes the connections that nothing uses.
func (c *Client) Close() { c.close() }

func (c *Client) tls() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: c.cfg.Insecure} //nolint:gosec // what Config.Insecure says
	if c.cfg.CAFile != "" {
		pem, err := os.ReadFile(c.cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("caFile: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("caFile: %s holds no certificate in PEM", c.cfg.CAFile)
		}
	}
	if c.cfg.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(c.cfg.CertFile, c.cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("certFile %s, keyFile %s: %w", c.cfg.CertFile, c.cfg.KeyFile, err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}

// StatusError is an answer other than 2xx.
type StatusError struct {
	Code       int
	Reason     string // of the Kubernetes Status, where there is one
	Message    string
	RetryAfter time.Duration // that the server asked for
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%d %s: %s", e.Code, e.Reason, e.Message)
}

// Code returns the HTTP status of an error that a Client returned, 0 where there
// was no answer.
func Code(err error) int {
	var s *StatusError
	if errors.As(err, &s) {
		return s.Code
	}
	return 0
}

// Request is what is asked for.
type Request struct {
	Method string // GET by default
	Path   string // /api/v1/pods
	Query  url.Values
	// Metadata asks for the objects' metadata only.
	Metadata bool
	Body     any // as JSON
}

const (
	acceptJSON     = "application/json"
	acceptList     = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
	acceptMetadata = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
)

// do sends the request and returns an answer of 2xx; its body is the caller's.
func (c *Client) do(ctx context.Context, r Request, accept string) (*http.Response, error) {
	var body io.Reader
	if r.Body != nil {
		b, err := json.Marshal(r.Body)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", r.Path, err)
		}
		body = bytes.NewReader(b)
	}
	u := *c.base
	u.Path = strings.TrimSuffix(u.Path, "/") + r.Path
	u.RawQuery = r.Query.Encode()
	if r.Method == "" {
		r.Method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, u.String(), body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.Path, err)
	}
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", c.cfg.UserAgent)
	if body != nil {
		req.Header.Set("Content-Type", acceptJSON)
	}
	if c.cfg.TokenFile != "" {
		token, err := os.ReadFile(c.cfg.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("tokenFile: %w", err)
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err // names method and address
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxStatus)) // the status is the error
	return nil, refusal(resp, text, r)
}

func refusal(resp *http.Response, text []byte, r Request) error {
	e := &StatusError{Code: resp.StatusCode}
	var s status
	if json.Unmarshal(text, &s) == nil {
		e.Reason, e.Message = s.Reason, s.Message
		e.RetryAfter = time.Duration(s.Details.RetryAfterSeconds) * time.Second
	}
	if e.Message == "" {
		e.Message = fmt.Sprintf("%.200s", strings.TrimSpace(string(text)))
	}
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n >= 0 {
		e.RetryAfter = time.Duration(n) * time.Second
	}
	e.RetryAfter = min(max(0, e.RetryAfter), maxRetryAfter)
	return fmt.Errorf("%s %s: %w", r.Method, r.Path, e)
}

// status is the Kubernetes Status as far as it is used.
type status struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
	Details struct {
		RetryAfterSeconds int `json:"retryAfterSeconds"`
	} `json:"details"`
}

// Do sends a request about one object and decodes the answer into out, unless
// that is nil.
func (c *Client) Do(ctx context.Context, r Request, out any) error {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	accept := acceptJSON
	if r.Metadata {
		accept = acceptMetadata
	}
	resp, err := c.do(ctx, r, accept)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, MaxObject)).Decode(out); err != nil {
		return fmt.Errorf("%s: the answer is not what was asked for: %w", r.Path, err)
	}
	return nil
}

// List calls each with every object of a list, decoded into a new T, and returns
// the list's resourceVersion. Objects may have been handed over when it fails.
func List[T any](ctx context.Context, c *Client, r Request, each func(*T)) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*Timeout)
	defer cancel()
	accept := acceptJSON
	if r.Metadata {
		accept = acceptList
	}
	resp, err := c.do(ctx, r, accept)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	version, err = decodeList(io.LimitReader(resp.Body, MaxList), each)
	if err != nil {
		return "", fmt.Errorf("%s: the answer is not a list: %w", r.Path, err)
	}
	return version, nil
}

func decodeList[T any](r io.Reader, each func(*T)) (version string, err error) {
	dec := json.NewDecoder(r)
	if err := delim(dec, '{'); err != nil {
		return "", err
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return "", err
		}
		switch key {
		case "metadata":
			var m struct {
				ResourceVersion string `json:"resourceVersion"`
			}
			if err := dec.Decode(&m); err != nil {
				return "", err
			}
			version = m.ResourceVersion
		case "items":
			if err := items(dec, each); err != nil {
				return "", err
			}
		default:
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return "", err
			}
		}
	}
	return version, delim(dec, '}')
}

func items[T any](dec *json.Decoder, each func(*T)) error {
	open, err := dec.Token()
	if err != nil {
		return err
	}
	if open == nil { // an empty list may be null
		return nil
	}
	if open != json.Delim('[') {
		return fmt.Errorf("items is %v", open)
	}
	for dec.More() {
		object := new(T)
		if err := dec.Decode(object); err != nil {
			return err
		}
		each(object)
	}
	return delim(dec, ']')
}

func delim(dec *json.Decoder, want json.Delim) error {
	got, err := dec.Token()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	if got != want {
		return fmt.Errorf("%v where %v should be", got, want)
	}
	return nil
}
