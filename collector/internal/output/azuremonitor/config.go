package azuremonitor

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// Config is the output's part of the collector's configuration. It holds no
// secrets but in SharedKey, which is refused.
type Config struct {
	// DCREndpoint is the logs ingestion URI of the data collection rule, or of the
	// data collection endpoint where a private link is used.
	DCREndpoint string `yaml:"dcrEndpoint"`
	// RuleID is the immutable id of the data collection rule: dcr-<32 hex digits>.
	RuleID string `yaml:"ruleId"`
	// Stream of the rule, such as Custom-Outrigger_CL, with the columns of Columns.
	Stream string `yaml:"stream"`

	// TenantID and ClientID of the Entra application or managed identity. With
	// workload identity they, TokenFile and AuthorityHost are in the environment of
	// the pod, whence main fills in what is empty here.
	TenantID string `yaml:"tenantId"`
	ClientID string `yaml:"clientId"`
	// TokenFile holds the pod's service account token (workload identity).
	// ClientSecretFile holds a secret of the application instead. Either is read
	// anew for every token.
	TokenFile        string `yaml:"tokenFile"`
	ClientSecretFile string `yaml:"clientSecretFile"`
	// AuthorityHost gives the tokens. Default https://login.microsoftonline.com/.
	AuthorityHost string `yaml:"authorityHost"`
	// Audience of the tokens. Default https://monitor.azure.com; other clouds have
	// another, such as https://monitor.azure.us.
	Audience string `yaml:"audience"`

	// CAFile holds the PEM certificates to trust instead of the system's.
	CAFile string `yaml:"caFile"`
	// Compression of requests: gzip (default) or none.
	Compression string `yaml:"compression"`
	// Concurrency is how many calls are under way at a time at most, 1 to 32.
	// Default 4.
	Concurrency int `yaml:"concurrency"`
	// Timeout of one call. Default 30s.
	Timeout time.Duration `yaml:"timeout"`

	// Of the HTTP Data Collector API, which Azure switched off on 2026-09-14. They
	// are here to be refused with an explanation.
	WorkspaceID   string `yaml:"workspaceId"`
	SharedKey     string `yaml:"sharedKey"`
	SharedKeyFile string `yaml:"sharedKeyFile"`
}

// WithEnvironment fills what is empty from what Azure's workload identity webhook
// puts into a pod's environment, which only main reads: call it before Validate.
func (c Config) WithEnvironment(getenv func(string) string) Config {
	fill := func(field *string, name string) {
		if *field == "" {
			*field = getenv(name)
		}
	}
	fill(&c.TenantID, "AZURE_TENANT_ID")
	fill(&c.ClientID, "AZURE_CLIENT_ID")
	fill(&c.AuthorityHost, "AZURE_AUTHORITY_HOST")
	if c.ClientSecretFile == "" {
		fill(&c.TokenFile, "AZURE_FEDERATED_TOKEN_FILE")
	}
	return c
}

func (c Config) withDefaults() Config {
	def := func(field *string, value string) {
		if *field == "" {
			*field = value
		}
	}
	def(&c.AuthorityHost, "https://login.microsoftonline.com/")
	def(&c.Audience, "https://monitor.azure.com")
	def(&c.Compression, "gzip")
	if c.Concurrency == 0 {
		c.Concurrency = 4
	}
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	return c
}

var (
	ruleID = regexp.MustCompile(`^dcr-[0-9a-f]{32}$`)
	stream = regexp.MustCompile(`^(Custom|Microsoft)-[A-Za-z0-9_]{1,100}$`)
	guid   = regexp.MustCompile(`^[0-9A-Za-z.-]{1,100}$`) // or a domain, for tenants
)

// Validate reports the first field that cannot be used, and what to write
// instead. It reads no files.
func (c Config) Validate() error {
	if c.WorkspaceID != "" || c.SharedKey != "" || c.SharedKeyFile != "" {
		return errors.New("azuremonitor: workspaceId and sharedKey belong to the HTTP Data Collector API, which Azure switched off on 2026-09-14: " +
			"make a data collection rule of kind Direct with a custom stream for the table, give an identity the role Monitoring Metrics Publisher on it, " +
			"and write dcrEndpoint, ruleId, stream, tenantId, clientId and tokenFile (or clientSecretFile) instead")
	}
	c = c.withDefaults()
	bad := func(field, value, problem, remedy string) error {
		return fmt.Errorf("azuremonitor: %s: %q %s: %s", field, value, problem, remedy)
	}
	for _, u := range []struct{ field, value, like string }{
		{"dcrEndpoint", c.DCREndpoint, "https://my-rule-ab12.westeurope-1.ingest.monitor.azure.com"},
		{"authorityHost", c.AuthorityHost, "https://login.microsoftonline.com/"},
		{"audience", c.Audience, "https://monitor.azure.com"},
	} {
		parsed, err := url.Parse(u.value)
		switch {
		case u.value == "":
			return fmt.Errorf("azuremonitor: %s is empty: write one such as %s", u.field, u.like)
		case err != nil || parsed.Scheme != "https" || parsed.Host == "" || parsed.RawQuery != "" || parsed.Fragment != "":
			return bad(u.field, u.value, "is not an https URL", "write one such as "+u.like)
		case parsed.User != nil:
			return fmt.Errorf("azuremonitor: %s holds credentials, which would be logged: leave them out", u.field)
		}
	}
	switch {
	case !ruleID.MatchString(c.RuleID):
		return bad("ruleId", c.RuleID, "is not the immutable id of a data collection rule", "write immutableId of the rule's JSON view: dcr- and 32 hex digits")
	case !stream.MatchString(c.Stream):
		return bad("stream", c.Stream, "is not the name of a stream", "write that of the rule's streamDeclarations, such as Custom-Outrigger_CL")
	case !guid.MatchString(c.TenantID):
		return bad("tenantId", c.TenantID, "is not the id of a tenant", "write the directory (tenant) id, or label the pod azure.workload.identity/use: \"true\"")
	case !guid.MatchString(c.ClientID):
		return bad("clientId", c.ClientID, "is not the id of an application", "write the application (client) id, or annotate the service account with azure.workload.identity/client-id")
	case c.TokenFile == "" && c.ClientSecretFile == "":
		return errors.New("azuremonitor: tokenFile and clientSecretFile are both empty: write one, or label the pod azure.workload.identity/use: \"true\"")
	case c.TokenFile != "" && c.ClientSecretFile != "":
		return errors.New("azuremonitor: tokenFile and clientSecretFile are both set: leave one out")
	case c.Compression != "gzip" && c.Compression != "none":
		return bad("compression", c.Compression, "is not known", "write gzip or none")
	case c.Concurrency < 1 || c.Concurrency > 32:
		return bad("concurrency", fmt.Sprint(c.Concurrency), "is out of range", "write 1 to 32")
	case c.Timeout < time.Second:
		return bad("timeout", c.Timeout.String(), "is shorter than a second", "write 30s")
	}
	return nil
}

// String shows the configuration without its secrets.
func (c Config) String() string {
	type shown Config // without this method
	if c.SharedKey != "" {
		c.SharedKey = "[redacted]"
	}
	for _, u := range []*string{&c.DCREndpoint, &c.AuthorityHost, &c.Audience} {
		if i := strings.LastIndexByte(*u, '@'); i >= 0 {
			*u = "[redacted]@" + (*u)[i+1:]
		}
	}
	return fmt.Sprintf("%+v", shown(c))
}

// GoString is String: %#v shows no secrets either.
func (c Config) GoString() string { return c.String() }

// LogValue is String for slog.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.String()) }
