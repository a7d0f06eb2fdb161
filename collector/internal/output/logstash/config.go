package logstash

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

// Limits of what can be configured.
const (
	maxHosts      = 64
	maxWindow     = 65536
	maxPipelining = 16
)

// Config is the output's part of the collector's configuration. It holds no
// secrets, only the names of their files, which are read again for every
// connection.
type Config struct {
	// Hosts of Logstash's beats input, host:port, at most 64. The first that is alive
	// is used, which keeps a stream's records in order; with LoadBalance each in its
	// turn for a batch, which does not.
	Hosts       []string `yaml:"hosts"`
	LoadBalance bool     `yaml:"loadBalance"`

	// TLS encrypts the connection, version 1.2 at least. The server's certificate is
	// checked against the system's authorities or those of CAFile, unless
	// InsecureSkipVerify; ServerName is the name in it where that is not the host.
	// CertFile and KeyFile are the client's own.
	TLS                bool   `yaml:"tls"`
	CAFile             string `yaml:"caFile"`
	CertFile           string `yaml:"certFile"`
	KeyFile            string `yaml:"keyFile"`
	ServerName         string `yaml:"serverName"`
	InsecureSkipVerify bool   `yaml:"insecureSkipVerify"`

	// CompressionLevel of zlib: 0 (none) to 9. Default 3, as Beats have it.
	CompressionLevel *int `yaml:"compressionLevel"`
	// Window is the events that Logstash acknowledges together: 1 to 65536, default
	// 2048. Pipelining is how many windows may be on their way: 1 to 16, default 2.
	Window     int `yaml:"window"`
	Pipelining int `yaml:"pipelining"`

	// Beat and Version are [@metadata][beat] and [@metadata][version], which pipelines
	// use to name indices. Default outrigger, and the version of this program.
	Beat    string `yaml:"beat"`
	Version string `yaml:"version"`

	// ConnectTimeout bounds a connect with its TLS handshake (default 10s),
	// WriteTimeout sending one window (default 30s), AckTimeout hearing nothing from a
	// server that has events (default 30s). A server that says it is still busy is
	// waited for, but no longer than BusyTimeout (default 5m) without one more event
	// acknowledged.
	ConnectTimeout time.Duration `yaml:"connectTimeout"`
	WriteTimeout   time.Duration `yaml:"writeTimeout"`
	AckTimeout     time.Duration `yaml:"ackTimeout"`
	BusyTimeout    time.Duration `yaml:"busyTimeout"`
}

func (c Config) withDefaults() Config {
	if c.CompressionLevel == nil {
		level := 3
		c.CompressionLevel = &level
	}
	if c.Window == 0 {
		c.Window = 2048
	}
	if c.Pipelining == 0 {
		c.Pipelining = 2
	}
	if c.Beat == "" {
		c.Beat = "outrigger"
	}
	if c.Version == "" {
		c.Version = programVersion()
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{{&c.ConnectTimeout, 10 * time.Second}, {&c.WriteTimeout, 30 * time.Second}, {&c.AckTimeout, 30 * time.Second}, {&c.BusyTimeout, 5 * time.Minute}} {
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
	c = c.withDefaults()
	switch {
	case len(c.Hosts) == 0:
		return errors.New("logstash: hosts is empty: write those of the beats input, such as [logstash.logging:5044]")
	case len(c.Hosts) > maxHosts:
		return fmt.Errorf("logstash: hosts: %d are more than %d: name a service that stands for them", len(c.Hosts), maxHosts)
	case *c.CompressionLevel < 0 || *c.CompressionLevel > 9:
		return fmt.Errorf("logstash: compressionLevel: %d is not from 0 to 9: write 3", *c.CompressionLevel)
	case c.Window < 1 || c.Window > maxWindow:
		return fmt.Errorf("logstash: window: %d is not from 1 to %d: write 2048", c.Window, maxWindow)
	case c.Pipelining < 1 || c.Pipelining > maxPipelining:
		return fmt.Errorf("logstash: pipelining: %d is not from 1 to %d: write 2", c.Pipelining, maxPipelining)
	}
	for _, address := range c.Hosts {
		host, text, err := net.SplitHostPort(address)
		port := 0
		if err == nil {
			port, err = strconv.Atoi(text)
		}
		if err != nil || host == "" || port < 1 || port > 65535 {
			return fmt.Errorf("logstash: hosts: %q is not host:port: write a host with its port, such as logstash.logging:5044", address)
		}
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"connectTimeout", c.ConnectTimeout}, {"writeTimeout", c.WriteTimeout}, {"ackTimeout", c.AckTimeout}, {"busyTimeout", c.BusyTimeout}} {
		if d.value < 0 {
			return fmt.Errorf("logstash: %s: %s is negative: write a duration such as 30s", d.name, d.value)
		}
	}
	return c.files().Validate("logstash", c.TLS)
}
