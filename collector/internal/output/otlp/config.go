package otlp

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
)

const maxHeaders = 32

// Config is the output's part of the collector's configuration.
type Config struct {
	// Endpoint is the URL of the receiver, for both protocols: http://otel:4318,
	// https://otel:4317. Over HTTP /v1/logs is added, unless it is there.
	Endpoint string `yaml:"endpoint"`
	// Protocol is http (protobuf over HTTP, default) or grpc.
	Protocol string `yaml:"protocol"`

	// Headers of every request, at most 32 with those of HeaderFiles, which holds for a
	// header the file with its value. Secrets belong there: the files are read again
	// for every request.
	Headers     map[string]string `yaml:"headers"`
	HeaderFiles map[string]string `yaml:"headerFiles"`

	// For https. The server's certificate is checked against the system's authorities
	// or those of CAFile, unless InsecureSkipVerify; ServerName is the name in it where
	// that is not the host. CertFile and KeyFile are the client's own.
	CAFile             string `yaml:"caFile"`
	CertFile           string `yaml:"certFile"`
	KeyFile            string `yaml:"keyFile"`
	ServerName         string `yaml:"serverName"`
	InsecureSkipVerify bool   `yaml:"insecureSkipVerify"`

	// Compression of requests: gzip (default) or none.
	Compression string `yaml:"compression"`
	// Timeout of one attempt. Default 30s.
	Timeout time.Duration `yaml:"timeout"`
}

func (c Config) withDefaults() Config {
	def := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	def(&c.Protocol, "http")
	def(&c.Compression, "gzip")
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
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
	if c.Endpoint == "" {
		return errors.New("otlp: endpoint is empty: write the receiver's URL, such as http://otel-collector.logging:4318")
	}
	u, err := url.Parse(c.Endpoint)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return fmt.Errorf("otlp: endpoint: %q is not a URL of http or https: write one such as http://otel-collector.logging:4318", hideUser(c.Endpoint))
	case u.User != nil:
		return fmt.Errorf("otlp: endpoint: %q holds credentials, which would be logged: use headerFiles", hideUser(c.Endpoint))
	case u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("otlp: endpoint: %q holds more than a path: write the URL up to there", c.Endpoint)
	case c.Protocol != "http" && c.Protocol != "grpc":
		return fmt.Errorf("otlp: protocol: %q is not known: write http or grpc", c.Protocol)
	case c.Protocol == "grpc" && strings.Trim(u.Path, "/") != "":
		return fmt.Errorf("otlp: endpoint: %q has a path, and gRPC has none: leave it out", c.Endpoint)
	case c.Protocol == "grpc" && u.Port() == "":
		return fmt.Errorf("otlp: endpoint: %q has no port: write that of gRPC, mostly 4317", c.Endpoint)
	case c.Compression != "gzip" && c.Compression != "none":
		return fmt.Errorf("otlp: compression: %q is not known: write gzip or none", c.Compression)
	case c.Timeout < time.Second:
		return fmt.Errorf("otlp: timeout: %s is shorter than a second: write 30s", c.Timeout)
	case len(c.Headers)+len(c.HeaderFiles) > maxHeaders:
		return fmt.Errorf("otlp: headers, headerFiles: %d are more than %d", len(c.Headers)+len(c.HeaderFiles), maxHeaders)
	}
	seen := map[string]bool{}
	for _, name := range slices.Concat(slices.Sorted(maps.Keys(c.Headers)), slices.Sorted(maps.Keys(c.HeaderFiles))) {
		key := http.CanonicalHeaderKey(name)
		switch {
		case !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(c.Headers[name]):
			return fmt.Errorf("otlp: headers: %q cannot be the name of a header, or its value holds a control character: correct it", name)
		case seen[key]:
			return fmt.Errorf("otlp: headers: %q is there twice: leave one out", name)
		case slices.Contains([]string{"Content-Type", "Content-Encoding", "Content-Length", "Host", "Te"}, key) || strings.HasPrefix(key, "Grpc-"):
			return fmt.Errorf("otlp: headers: %q is set by the protocol: leave it out", name)
		}
		seen[key] = true
	}
	return c.files().Validate("otlp", u.Scheme == "https")
}

func hideUser(a string) string {
	if i := strings.LastIndexByte(a, '@'); i >= 0 {
		return "[redacted]@" + a[i+1:]
	}
	return a
}

// String shows the configuration without the values of its headers.
func (c Config) String() string {
	type shown Config // without this method
	hidden := make(map[string]string, len(c.Headers))
	for name := range c.Headers {
		hidden[name] = "[redacted]"
	}
	c.Headers, c.Endpoint = hidden, hideUser(c.Endpoint)
	return fmt.Sprintf("%+v", shown(c))
}

// GoString is String: %#v shows no secrets either.
func (c Config) GoString() string { return c.String() }

// header returns the headers, with the contents of the files.
func (c Config) header() (map[string]string, error) {
	h := make(map[string]string, len(c.Headers)+len(c.HeaderFiles))
	maps.Copy(h, c.Headers)
	for name, file := range c.HeaderFiles {
		value, err := tlsfiles.Secret("otlp", "headerFiles: "+name, file)
		if err != nil {
			return nil, err
		}
		if !httpguts.ValidHeaderFieldValue(value) {
			return nil, fmt.Errorf("otlp: headerFiles: %s: %s holds a control character, which no header may have: write the value on one line", name, file)
		}
		h[name] = value
	}
	return h, nil
}
