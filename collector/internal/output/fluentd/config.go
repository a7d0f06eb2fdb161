package fluentd

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// Config is the output's part of the collector's configuration. It holds no
// secrets: this mode has no shared key.
type Config struct {
	// Address of the server: host:port, or unix:///path of a socket.
	Address string `yaml:"address"`
	// TLS encrypts the connection. The server's certificate is checked against the
	// system's authorities (SSL_CERT_FILE names others), unless InsecureSkipVerify.
	TLS                bool `yaml:"tls"`
	InsecureSkipVerify bool `yaml:"insecureSkipVerify"`
	// Tag of the events: a template with {namespace}, {service}, {pod},
	// {container}, {stream} and {dataset}. Default kube.{namespace}.{service}.
	// Dots in values become underscores, so that they do not add parts; what a
	// record does not have is "unknown".
	Tag string `yaml:"tag"`
	// ConnectTimeout bounds a connect (default 3s), WriteTimeout sending one event
	// (default 10s), AckTimeout waiting for its acknowledgement (default 30s).
	ConnectTimeout time.Duration `yaml:"connectTimeout"`
	WriteTimeout   time.Duration `yaml:"writeTimeout"`
	AckTimeout     time.Duration `yaml:"ackTimeout"`
	// IdleTimeout is after how long without an event the connection is made anew
	// before the next one, because something between may have dropped it. Default
	// 30s.
	IdleTimeout time.Duration `yaml:"idleTimeout"`
}

func (c Config) withDefaults() Config {
	if c.Tag == "" {
		c.Tag = "kube.{namespace}.{service}"
	}
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

// Validate reports the first field that cannot be used, and what to write
// instead.
func (c Config) Validate() error {
	if c.Address == "" {
		return errors.New("fluentd: address is empty: write the server, such as fluentd.logging:24224")
	}
	network, _, _, err := c.endpoint()
	if err != nil {
		return err
	}
	if network == "unix" && c.TLS {
		return errors.New("fluentd: tls: a unix socket has none: leave it out")
	}
	if c.InsecureSkipVerify && !c.TLS {
		return errors.New("fluentd: insecureSkipVerify is set without tls: set tls or leave it out")
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"connectTimeout", c.ConnectTimeout}, {"writeTimeout", c.WriteTimeout}, {"ackTimeout", c.AckTimeout}, {"idleTimeout", c.IdleTimeout}} {
		if d.value < 0 {
			return fmt.Errorf("fluentd: %s: %s is negative: write a duration such as 30s", d.name, d.value)
		}
	}
	_, err = parseTag(c.withDefaults().Tag)
	return err
}

// endpoint returns the client library's network and what it needs of the address.
func (c Config) endpoint() (network, host string, port int, err error) {
	if path, ok := strings.CutPrefix(c.Address, "unix://"); ok {
		if !filepath.IsAbs(path) {
			return "", "", 0, fmt.Errorf("fluentd: address: %q is not the path of a socket: write unix:///run/fluentd.sock", c.Address)
		}
		return "unix", path, 0, nil
	}
	host, text, err := net.SplitHostPort(c.Address)
	if err == nil {
		port, err = strconv.Atoi(text)
	}
	if err != nil || host == "" || port < 1 || port > 65535 {
		return "", "", 0, fmt.Errorf("fluentd: address: %q is not host:port: write the server with its port, such as fluentd.logging:24224", c.Address)
	}
	if strings.Contains(host, ":") { // the library joins host and port by a colon
		host = "[" + host + "]"
	}
	network = "tcp"
	if c.TLS {
		network = "tls"
	}
	return network, host, port, nil
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

func (t tag) of(r *record.Record) string {
	var b strings.Builder
	b.WriteString(t.texts[0])
	for i, field := range t.fields {
		value := field(r)
		if value == "" {
			value = "unknown"
		}
		b.WriteString(strings.Map(func(r rune) rune {
			if r == '.' || r <= ' ' {
				return '_'
			}
			return r
		}, value))
		b.WriteString(t.texts[i+1])
	}
	return b.String()
}
