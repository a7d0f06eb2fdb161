package fluentd

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Modes of the output.
const (
	modeForward = "forward"
	modeSimple  = "simple"
)

// Limits of what can be configured.
const (
	maxWindow     = 256
	minChunkBytes = 64 << 10
	maxChunkBytes = 256 << 20 // what fluentd takes of one chunk at most
	maxServers    = 64
)

// Config is the output's part of the collector's configuration. It holds no
// secrets, only the names of their files, which are read again for every
// connection.
type Config struct {
	// Mode is forward (default): many events a chunk, several chunks on their way,
	// with all of the options below; or simple: one event a message by
	// fluent-logger-golang, for servers that understand nothing else. The simple mode
	// takes address, tls, insecureSkipVerify, tag and the timeouts only.
	Mode string `yaml:"mode"`
	// Address of the server: host:port, or unix:///path of a socket. Either it or
	// Servers.
	Address string `yaml:"address"`
	// Servers, at most 64. Balance says how they are used: first (default), the
	// first in the list that is alive, which keeps a stream's records in order; or
	// weighted, each in its turn for a batch, which does not.
	Servers []Server `yaml:"servers"`
	Balance string   `yaml:"balance"`
	// TLS encrypts the connection, version 1.2 at least. The server's certificate is
	// checked against the system's authorities (SSL_CERT_FILE names others) or those
	// of CAFile, unless InsecureSkipVerify; ServerName is the name in it where that is
	// not the address. CertFile and KeyFile are the client's own.
	TLS                bool   `yaml:"tls"`
	CAFile             string `yaml:"caFile"`
	CertFile           string `yaml:"certFile"`
	KeyFile            string `yaml:"keyFile"`
	ServerName         string `yaml:"serverName"`
	InsecureSkipVerify bool   `yaml:"insecureSkipVerify"`
	// SharedKeyFile holds the key of the servers' <security>; Username and
	// PasswordFile are for servers that ask for a user too. Hostname is what this
	// node calls itself there; default the system's.
	SharedKeyFile string `yaml:"sharedKeyFile"`
	Username      string `yaml:"username"`
	PasswordFile  string `yaml:"passwordFile"`
	Hostname      string `yaml:"hostname"`
	// Tag of the events: a template with {namespace}, {service}, {pod},
	// {container}, {stream} and {dataset}. Default kube.{namespace}.{service}.
	// Dots in values become underscores, so that they do not add parts; what a
	// record does not have is "unknown".
	Tag string `yaml:"tag"`
	// Compression of chunks: none (default, which every server takes), gzip, or zstd
	// (fluentd 1.18 and newer).
	Compression string `yaml:"compression"`
	// Window is how many chunks may wait for their acknowledgement: 1 to 256,
	// default 8.
	Window int `yaml:"window"`
	// MaxChunkBytes bounds a chunk before compression: 64 KiB to 256 MiB, default
	// 8 MiB. It must be below the server's chunk_size_limit: a server drops what is
	// over that without a word.
	MaxChunkBytes int `yaml:"maxChunkBytes"`
	// Keepalive false makes a connection for every chunk, for servers with
	// deny_keepalive. A server that greets says so itself. Default true.
	Keepalive *bool `yaml:"keepalive"`
	// ConnectTimeout bounds a connect with its TLS handshake (default 3s),
	// WriteTimeout sending one chunk or event, and the forward protocol's own
	// handshake (default 10s), AckTimeout waiting for an acknowledgement (default
	// 30s).
	ConnectTimeout time.Duration `yaml:"connectTimeout"`
	WriteTimeout   time.Duration `yaml:"writeTimeout"`
	AckTimeout     time.Duration `yaml:"ackTimeout"`
	// IdleTimeout is after how long without an event the connection is made anew
	// before the next one, because something between may have dropped it. Default
	// 30s.
	IdleTimeout time.Duration `yaml:"idleTimeout"`
}

// Server is one of several.
type Server struct {
	Address string `yaml:"address"`
	// Weight is the server's share with balance: weighted, 1 to 1000. Default 1.
	Weight int `yaml:"weight"`
}

func (c Config) withDefaults() Config {
	def := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	def(&c.Mode, modeForward)
	def(&c.Balance, "first")
	def(&c.Tag, "kube.{namespace}.{service}")
	def(&c.Compression, "none")
	if c.Window == 0 {
		c.Window = 8
	}
	if c.MaxChunkBytes == 0 {
		c.MaxChunkBytes = 8 << 20
	}
	if c.Keepalive == nil {
		yes := true
		c.Keepalive = &yes
	}
	servers := slices.Clone(c.Servers)
	if c.Address != "" {
		servers = append(servers, Server{Address: c.Address})
	}
	for i := range servers {
		if servers[i].Weight == 0 {
			servers[i].Weight = 1
		}
	}
	c.Servers = servers
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&c.ConnectTimeout, 3 * time.Second}, {&c.WriteTimeout, 10 * time.Second}, {&c.AckTimeout, 30 * time.Second}, {&c.IdleTimeout, 30 * time.Second}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return c
}

func (c Config) files() tlsfiles.Files {
	return tlsfiles.Files{CA: c.CAFile, Cert: c.CertFile, Key: c.KeyFile, ServerName: c.ServerName, InsecureSkipVerify: c.InsecureSkipVerify}
}

// Validate reports the first field that cannot be used, and what to write
// instead. It reads no files.
func (c Config) Validate() error {
	if c.Address == "" && len(c.Servers) == 0 {
		return errors.New("fluentd: address is empty: write the server, such as fluentd.logging:24224, or several as servers")
	}
	if c.Address != "" && len(c.Servers) > 0 {
		return errors.New("fluentd: address and servers are both set: leave one out")
	}
	if len(c.Servers) > maxServers {
		return fmt.Errorf("fluentd: servers: %d are more than %d: name a service that stands for them", len(c.Servers), maxServers)
	}
	given, c := c, c.withDefaults()
	for _, s := range c.Servers {
		if network, _, err := endpoint(s.Address); err != nil {
			return err
		} else if network == "unix" && c.TLS {
			return errors.New("fluentd: tls: a unix socket has none: leave it out")
		}
		if s.Weight < 1 || s.Weight > 1000 {
			return fmt.Errorf("fluentd: servers: weight: %d of %s is not from 1 to 1000: write a share such as 1", s.Weight, s.Address)
		}
	}
	if err := c.files().Validate("fluentd", c.TLS); err != nil {
		return err
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"connectTimeout", c.ConnectTimeout}, {"writeTimeout", c.WriteTimeout}, {"ackTimeout", c.AckTimeout}, {"idleTimeout", c.IdleTimeout}} {
		if d.value < 0 {
			return fmt.Errorf("fluentd: %s: %s is negative: write a duration such as 30s", d.name, d.value)
		}
	}
	for _, e := range []struct {
		name, value string
		values      []string
	}{{"mode", c.Mode, []string{modeForward, modeSimple}}, {"balance", c.Balance, []string{"first", "weighted"}}, {"compression", c.Compression, []string{"none", "gzip", "zstd"}}} {
		if !slices.Contains(e.values, e.value) {
			return fmt.Errorf("fluentd: %s: %q is not known: write one of %s", e.name, e.value, strings.Join(e.values, ", "))
		}
	}
	switch {
	case c.Window < 1 || c.Window > maxWindow:
		return fmt.Errorf("fluentd: window: %d is not from 1 to %d: write 8", c.Window, maxWindow)
	case c.MaxChunkBytes < minChunkBytes || c.MaxChunkBytes > maxChunkBytes:
		return fmt.Errorf("fluentd: maxChunkBytes: %d is not from %d to %d: write 8388608", c.MaxChunkBytes, minChunkBytes, maxChunkBytes)
	case (c.Username == "") != (c.PasswordFile == ""):
		return fmt.Errorf("fluentd: username: %q and passwordFile: %q go together: set both or neither", c.Username, c.PasswordFile)
	case c.Username != "" && c.SharedKeyFile == "":
		return errors.New("fluentd: username is set without sharedKeyFile: the protocol has users only beside a shared key: set it")
	}
	if c.Mode == modeSimple {
		for _, f := range []struct {
			name string
			set  bool
		}{
			{"servers", len(given.Servers) > 0},
			{"balance", given.Balance != ""},
			{"caFile", c.CAFile != ""},
			{"certFile", c.CertFile != ""},
			{"serverName", c.ServerName != ""},
			{"sharedKeyFile", c.SharedKeyFile != ""},
			{"hostname", c.Hostname != ""},
			{"compression", given.Compression != ""},
			{"window", given.Window != 0},
			{"maxChunkBytes", given.MaxChunkBytes != 0},
			{"keepalive", given.Keepalive != nil},
		} {
			if f.set {
				return fmt.Errorf("fluentd: %s: the simple mode has none: write mode: forward or leave it out", f.name)
			}
		}
	}
	_, err := parseTag(c.Tag)
	return err
}

// endpoint returns the network and the address to dial.
func endpoint(address string) (network, target string, err error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", "", fmt.Errorf("fluentd: address: %q is not the path of a socket: write unix:///run/fluentd.sock", address)
		}
		return "unix", path, nil
	}
	host, text, err := net.SplitHostPort(address)
	port := 0
	if err == nil {
		port, err = strconv.Atoi(text)
	}
	if err != nil || host == "" || port < 1 || port > 65535 {
		return "", "", fmt.Errorf("fluentd: address: %q is not host:port: write the server with its port, such as fluentd.logging:24224", address)
	}
	return "tcp", address, nil
}

// tag is a parsed template: text and fields in turn, text first and last.
type tag struct {
	texts  []string
	fields []func(*record.Record) string
}

func parseTag(template string) (tag, error) {
	var t tag
	for rest := template; ; {
		text, after, found := strings.Cut(rest, "{")
		if strings.ContainsAny(text, "} \t\n") {
			return tag{}, fmt.Errorf("fluentd: tag: %q holds a space or a '}' that closes nothing: write a template such as kube.{namespace}.{service}", template)
		}
		t.texts = append(t.texts, text)
		if !found {
			return t, nil
		}
		name, after, found := strings.Cut(after, "}")
		field := fieldOf(name)
		if !found || field == nil {
			return tag{}, fmt.Errorf("fluentd: tag: {%s in %q is not a field: use {namespace}, {service}, {pod}, {container}, {stream} or {dataset}", name, template)
		}
		t.fields = append(t.fields, field)
		rest = after
	}
}

func fieldOf(name string) func(*record.Record) string {
	switch name {
	case "namespace":
		return func(r *record.Record) string { return r.Resource.Namespace }
	case "service":
		return func(r *record.Record) string { return r.Resource.Service }
	case "pod":
		return func(r *record.Record) string { return r.Resource.Pod }
	case "container":
		return func(r *record.Record) string { return r.Resource.Container }
	case "stream":
		return func(r *record.Record) string { return r.Stream }
	case "dataset":
		return func(r *record.Record) string {
			s, _ := r.Attributes[record.EventDataset].(string)
			return s
		}
	default:
		return nil
	}
}

// append appends the record's tag to b.
func (t tag) append(b []byte, r *record.Record) []byte {
	b = append(b, t.texts[0]...)
	for i, field := range t.fields {
		value := field(r)
		if value == "" {
			value = "unknown"
		}
		for j := range len(value) { // characters beyond ASCII stay what they are
			c := value[j]
			if c == '.' || c <= ' ' {
				c = '_'
			}
			b = append(b, c)
		}
		b = append(b, t.texts[i+1]...)
	}
	return b
}

func (t tag) of(r *record.Record) string { return string(t.append(nil, r)) }
