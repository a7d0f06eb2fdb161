package elasticsearch

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/tlsfiles"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

const (
	setupAuto     = "auto"
	setupOff      = "off"
	setupRequired = "required"

	labelsAuto      = "auto"
	labelsFlattened = "flattened"
	labelsDedot     = "dedot"
)

var timeUnit = regexp.MustCompile(`^[1-9][0-9]{0,5}[dhms]$`)

// Config is the output's part of the collector's configuration.
type Config struct {
	// Addresses of the nodes, such as https://es-0.example:9200. Attempts take
	// turns. Either these or CloudID.
	Addresses []string `yaml:"addresses"`
	CloudID   string   `yaml:"cloudId"`

	// APIKey as Elasticsearch shows it, encoded or id:key; or Username and
	// Password. The files are read anew for every attempt, so a rotated secret
	// needs no reload.
	APIKey       string `yaml:"apiKey"`
	APIKeyFile   string `yaml:"apiKeyFile"`
	Username     string `yaml:"username"`
	Password     string `yaml:"password"`
	PasswordFile string `yaml:"passwordFile"`

	// CAFile holds the PEM certificates to trust instead of the system's. CertFile
	// and KeyFile are the client's own.
	CAFile   string `yaml:"caFile"`
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`

	// DataStream writes to the data streams logs-<dataset>-<namespace>; default
	// true. The dataset is the record's event.dataset, or Dataset where it has
	// none (default "outrigger"). The namespace is Namespace (default "default"): a
	// name of the installation, not Kubernetes'.
	DataStream *bool  `yaml:"dataStream"`
	Dataset    string `yaml:"dataset"`
	Namespace  string `yaml:"namespace"`
	// Index that is written to where DataStream is false. Default logs-outrigger.
	Index string `yaml:"index"`
	// Pipeline is the ingest pipeline, none by default.
	Pipeline string `yaml:"pipeline"`

	// Setup makes an index template for the data streams logs-outrigger*, with its
	// component template, or brings an older one up to date: auto (default) tries
	// and goes on without, required ships nothing until they are there, off does
	// not try. Nothing that others made is touched. It needs Elasticsearch 8.7 and
	// the privileges manage_index_templates and, to see how labels are mapped,
	// view_index_metadata.
	Setup string `yaml:"setup"`
	// Retention of these data streams in Elasticsearch's units, such as 30d. None by
	// default: then logs@lifecycle decides, where the cluster has it.
	Retention string `yaml:"retention"`
	// Labels of pods: flattened sends them as one object under their own keys,
	// dedot as fields with underscores for dots and slashes. auto (default) looks at
	// the mapping of each data stream.
	Labels string `yaml:"labels"`
	// MaxFields of a structured line; those after them in the order of their names
	// are one text, outrigger.extra. Default 256.
	MaxFields int `yaml:"maxFields"`

	// Concurrency is how many bulk requests are under way at a time at most, 1 to
	// 64. Default 4.
	Concurrency int `yaml:"concurrency"`
	// Compression of requests: gzip (default) or none. CompressionLevel is 1
	// (default) to 9. 1 knows what documents have in common: it is the fastest, and
	// makes requests about as small as 6 does. The others are for lines that have much
	// in common themselves.
	Compression      string `yaml:"compression"`
	CompressionLevel int    `yaml:"compressionLevel"`
	// Timeout of one attempt. Default 30s.
	Timeout time.Duration `yaml:"timeout"`
}

func (c Config) withDefaults() Config {
	if c.DataStream == nil {
		yes := true
		c.DataStream = &yes
	}
	def := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	def(&c.Dataset, ours)
	def(&c.Namespace, "default")
	def(&c.Index, "logs-outrigger")
	def(&c.Setup, setupAuto)
	def(&c.Labels, labelsAuto)
	def(&c.Compression, "gzip")
	for _, n := range []struct {
		field *int
		value int
	}{{&c.MaxFields, record.MaxAttributes}, {&c.Concurrency, 4}, {&c.CompressionLevel, 1}} {
		if *n.field == 0 {
			*n.field = n.value
		}
	}
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	return c
}

// Validate reports the first field that cannot be used, and what to write
// instead. It reads no files.
func (c Config) Validate() error {
	c = c.withDefaults()
	bad := func(field, value, problem, remedy string) error {
		return fmt.Errorf("elasticsearch: %s: %q %s: %s", field, value, problem, remedy)
	}
	switch {
	case len(c.Addresses) == 0 && c.CloudID == "":
		return errors.New("elasticsearch: addresses is empty: write the nodes, such as [https://localhost:9200], or a cloudId")
	case len(c.Addresses) > 0 && c.CloudID != "":
		return errors.New("elasticsearch: addresses and cloudId are both set: leave one out")
	}
	for _, a := range c.Addresses {
		u, err := url.Parse(a)
		switch {
		case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
			return bad("addresses", redactURL(a), "is not the URL of a node", "write one such as https://localhost:9200")
		case u.User != nil:
			return bad("addresses", redactURL(a), "holds credentials, which would be logged", "use username and passwordFile")
		}
	}
	for _, pair := range []struct{ a, b, inline, file string }{
		{"apiKey", "apiKeyFile", c.APIKey, c.APIKeyFile},
		{"password", "passwordFile", c.Password, c.PasswordFile},
	} {
		if pair.inline != "" && pair.file != "" {
			return fmt.Errorf("elasticsearch: %s and %s are both set: leave one out", pair.a, pair.b)
		}
	}
	hasKey, hasPassword := c.APIKey != "" || c.APIKeyFile != "", c.Password != "" || c.PasswordFile != ""
	switch {
	case hasKey && (hasPassword || c.Username != ""):
		return errors.New("elasticsearch: an API key and a username are both set: leave one out")
	case hasPassword != (c.Username != ""):
		return bad("username", c.Username, "and a password go together", "set username and passwordFile, or neither")
	case (c.CertFile == "") != (c.KeyFile == ""):
		return bad("certFile", c.CertFile, "and keyFile go together", "set both or neither")
	case c.Compression != "gzip" && c.Compression != "none":
		return bad("compression", c.Compression, "is not known", "write gzip or none")
	case c.CompressionLevel < 1 || c.CompressionLevel > 9:
		return bad("compressionLevel", strconv.Itoa(c.CompressionLevel), "is not a level of gzip", "write 1 (fast) to 9 (small)")
	case c.Concurrency < 1 || c.Concurrency > 64:
		return bad("concurrency", strconv.Itoa(c.Concurrency), "is out of range", "write 1 to 64")
	case c.MaxFields < 1 || c.MaxFields > 10_000:
		return bad("maxFields", strconv.Itoa(c.MaxFields), "is out of range", "write 1 to 10000")
	case c.Setup != setupAuto && c.Setup != setupOff && c.Setup != setupRequired:
		return bad("setup", c.Setup, "is not known", "write auto, required or off")
	case c.Setup == setupRequired && !*c.DataStream:
		return bad("setup", c.Setup, "is for data streams", "leave dataStream at true, or setup out")
	case c.Labels != labelsAuto && c.Labels != labelsFlattened && c.Labels != labelsDedot:
		return bad("labels", c.Labels, "is not known", "write auto, flattened or dedot")
	case c.Retention != "" && !timeUnit.MatchString(c.Retention):
		return bad("retention", c.Retention, "is not a time as Elasticsearch writes it", "write such as 30d or 12h")
	case c.Retention != "" && c.Setup == setupOff:
		return bad("retention", c.Retention, "has no effect with setup: off", "set the retention in the template that you manage")
	case c.Timeout < time.Second:
		return bad("timeout", c.Timeout.String(), "is shorter than a second", "write 30s")
	case part(c.Dataset) != c.Dataset:
		return bad("dataset", c.Dataset, "cannot be in the name of a data stream", "write "+part(c.Dataset))
	case part(c.Namespace) != c.Namespace:
		return bad("namespace", c.Namespace, "cannot be in the name of a data stream", "write "+part(c.Namespace))
	case c.Index != strings.ToLower(c.Index) || strings.ContainsAny(c.Index, `\/*?"<>| ,#:`) || strings.Trim(c.Index[:1], "-_+.") == "" || len(c.Index) > 255:
		return bad("index", c.Index, "cannot be the name of an index", "write a name in lower case such as logs-outrigger")
	}
	return nil
}

// part makes a text fit for one part of a data stream's name: lower case, none
// of the characters that are forbidden, and no hyphen, which separates the parts.
func part(s string) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r == 0x7f || strings.ContainsRune(`\/*?"<>|,#:-`, r) {
			return '_'
		}
		return r
	}, strings.ToLower(s))
	for len(s) > 100 {
		s = strings.ToValidUTF8(s[:100], "")
	}
	return s
}

func redactURL(a string) string {
	if i := strings.LastIndexByte(a, '@'); i >= 0 {
		return "[redacted]@" + a[i+1:]
	}
	return a
}

// String shows the configuration without its secrets.
func (c Config) String() string {
	type shown Config // without this method
	hide := func(s *string) {
		if *s != "" {
			*s = "[redacted]"
		}
	}
	hide(&c.APIKey)
	hide(&c.Password)
	addresses := make([]string, len(c.Addresses))
	for i, a := range c.Addresses {
		addresses[i] = redactURL(a)
	}
	c.Addresses = addresses
	return fmt.Sprintf("%+v", shown(c))
}

// GoString is String: %#v shows no secrets either.
func (c Config) GoString() string { return c.String() }

// LogValue is String for slog.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.String()) }

// authorization returns the value of the Authorization header; empty without
// credentials.
func (c Config) authorization() (string, error) {
	key, err := secret("apiKeyFile", c.APIKey, c.APIKeyFile)
	if err != nil {
		return "", err
	}
	if key != "" {
		if strings.Contains(key, ":") { // id:key, not encoded yet
			key = base64.StdEncoding.EncodeToString([]byte(key))
		}
		return "ApiKey " + key, nil
	}
	password, err := secret("passwordFile", c.Password, c.PasswordFile)
	if err != nil || c.Username == "" {
		return "", err
	}
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(c.Username+":"+password)), nil
}

func secret(field, inline, file string) (string, error) {
	if file == "" {
		return inline, nil
	}
	return tlsfiles.Secret("elasticsearch", field, file)
}

func (c Config) files() tlsfiles.Files {
	return tlsfiles.Files{CA: c.CAFile, Cert: c.CertFile, Key: c.KeyFile}
}
