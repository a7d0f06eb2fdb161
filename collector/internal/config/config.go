// Package config is the collector's configuration file: its shape, its defaults
// and what is refused.
//
//	admin: 127.0.0.1:15030            # /ready, /metrics, /api/v1/audit, /api/v1/logs; loopback only
//	dataDir: /var/lib/outrigger       # checkpoints, dead letters, reasons of drops, counts of quotas
//	cluster: eu-1                     # orchestrator.cluster.name; default none
//	node: worker-3                    # host.name; default $NODE_NAME, or the host's name
//	logs:
//	  folder: /var/log/pods           # default
//	  linkedFolders: [/var/lib/docker/containers] # into which symbolic links may lead; default none
//	  spool: /var/log/outrigger       # second names of files that are not settled; same file system as folder
//	  spoolBytes: 1073741824          # unread bytes of deleted files that are kept
//	  files:                          # single files beside the containers' logs
//	  - {name: nginx, paths: [/var/log/nginx/*.log], service: nginx, format: text}
//	  inputs:                         # what is pushed; each becomes a file below dataDir first
//	    otlp: {address: 127.0.0.1:4318}      # OTLP over HTTP and gRPC, on one port
//	    events: {}                           # Kubernetes Events, by one collector of the cluster
//	    journald: {units: [kubelet.service]} # of the node, by journalctl
//	  rules: [{name: no-health, match: {body: /healthz}, drop: true}]  # see docs/logs.md
//	  quotas: [{name: all, bytesPerSecond: 1048576, action: warn}]
//	  outputs: [local, es]            # names from outputs below; each gets every line
//	  batch: {maxRecords: 2000, maxBytes: 1048576, linger: 200ms}
//	  inFlight: 16384                 # records of one output read and not acknowledged
//	kubernetes:                       # what the API knows of the node's pods; default none
//	  watch: true                     # one watch of this node's pods, one of namespaces
//	  kubelet: https://10.0.0.5:10250 # asked for pods that the watch does not know yet; default none
//	  kubeletCAFile: /etc/kubelet-ca.crt
//	metrics:
//	  host: true                      # CPU, memory, disk, network of the node; default false
//	  hostRoot: /                     # where the node's file system is mounted
//	  scrape: [{job: sidecars, address: 127.0.0.1:15020, path: /metrics, interval: 15s}]
//	  expose: 0.0.0.0:15031           # all metrics for Prometheus to pull; default none
//	  outputs: [ix]
//	outputs:                          # name -> exactly one kind
//	  local: {store: {folder: /var/lib/outrigger/logs, retention: 168h}}
//	  es: {elasticsearch: {addresses: [https://es:9200], apiKeyFile: /etc/outrigger/es-key}}
//	  fl: {fluentd: {address: fluentd:24224}}
//	  ix: {influxdb: {url: http://influxdb:8086, org: o, bucket: b}}
//
// The file is one YAML document of at most 1 MiB. A key that does not exist is
// refused with its line, because a misspelt limit is a limit that is not there.
// What belongs to one output is defined and checked by that output's package.
// The package reads no other file and no environment; main does.
package config

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v2"

	"github.com/outrigger-mesh/outrigger/collector/internal/output/azuremonitor"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/discard"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/elasticsearch"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/fluentd"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/influxdb"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/logstash"
	"github.com/outrigger-mesh/outrigger/collector/internal/output/otlp"
	"github.com/outrigger-mesh/outrigger/collector/internal/rules"
	"github.com/outrigger-mesh/outrigger/collector/internal/scrape"
	"github.com/outrigger-mesh/outrigger/collector/internal/store"
)

// Defaults and limits.
const (
	MaxSize        = 1 << 20 // bytes of the file
	MaxOutputs     = 16
	DefaultAdmin   = "127.0.0.1:15030"
	DefaultDataDir = "/var/lib/outrigger"
	DefaultFolder  = "/var/log/pods"
	maxInFlight    = 1 << 20
	maxBatch       = 100_000
	maxBatchBytes  = 64 << 20
	maxLinger      = time.Minute
)

// Config is the whole file.
type Config struct {
	Admin   string   `yaml:"admin"`
	DataDir string   `yaml:"dataDir"`
	Cluster string   `yaml:"cluster"`
	Node    string   `yaml:"node"`
	Logs    *Logs    `yaml:"logs"`
	Metrics *Metrics `yaml:"metrics"`
	// Kubernetes is what is asked of the cluster; nil asks nothing.
	Kubernetes *Kubernetes       `yaml:"kubernetes"`
	Outputs    map[string]Output `yaml:"outputs"`
}

// Logs says which logs are read and where they go.
type Logs struct {
	Folder        string   `yaml:"folder"`
	LinkedFolders []string `yaml:"linkedFolders"`
	Spool         string   `yaml:"spool"`
	SpoolBytes    int64    `yaml:"spoolBytes"`
	Files         []Files  `yaml:"files"`
	Inputs        Inputs   `yaml:"inputs"`
	Outputs       []string `yaml:"outputs"`
	Batch         Batch    `yaml:"batch"`
	InFlight      int      `yaml:"inFlight"`
	// Rules and quotas, as package rules describes them.
	rules.Config `yaml:",inline"`
}

// Inputs are what is pushed to the collector. Nil ones are off.
type Inputs struct {
	OTLP *struct {
		// Address to listen on. Whoever reaches it can write logs: there is no TLS and no
		// authentication.
		Address string `yaml:"address"`
	} `yaml:"otlp"`
	Events *struct {
		// Namespace of the Lease that one collector of the cluster holds. Default $POD_NAMESPACE.
		Namespace string `yaml:"namespace"`
	} `yaml:"events"`
	Journald *struct {
		Binary    string        `yaml:"binary"`    // default journalctl
		Directory string        `yaml:"directory"` // of the journal's files; default the system's
		Namespace string        `yaml:"namespace"`
		Units     []string      `yaml:"units"` // default all
		Since     time.Duration `yaml:"since"` // how far back the first start goes; default 1h
	} `yaml:"journald"`
}

// Names of the inputs that are on.
func (i Inputs) Names() (names []string) {
	v := reflect.ValueOf(i)
	for f, value := range v.Fields() {
		if !value.IsNil() {
			names = append(names, f.Tag.Get("yaml"))
		}
	}
	return names
}

// Kubernetes says whom to ask what is known of pods.
type Kubernetes struct {
	// Watch the pods of this node and the namespaces at the API server. The address
	// and the token are those that Kubernetes gives every pod, unless Server says another.
	Watch     bool   `yaml:"watch"`
	Server    string `yaml:"server"`
	CAFile    string `yaml:"caFile"`
	TokenFile string `yaml:"tokenFile"`
	// Kubelet of this node, as https://10.0.0.5:10250. Needs the right to get
	// nodes/pods (before Kubernetes 1.33: nodes/proxy, which is much more).
	Kubelet         string `yaml:"kubelet"`
	KubeletCAFile   string `yaml:"kubeletCAFile"`
	KubeletInsecure bool   `yaml:"kubeletInsecure"` // its certificate is not checked
	// Wait is how long the lines of a new pod wait for what is known of it. Default 5s.
	Wait time.Duration `yaml:"wait"`
}

// Files are single files that are read.
type Files struct {
	Name    string   `yaml:"name"`
	Paths   []string `yaml:"paths"`
	Service string   `yaml:"service"` // service.name; default the name
	Format  string   `yaml:"format"`  // text (default), cri or docker
}

// Batch bounds what an output gets at once. Zero is the default.
type Batch struct {
	MaxRecords int           `yaml:"maxRecords"`
	MaxBytes   int           `yaml:"maxBytes"`
	Linger     time.Duration `yaml:"linger"`
}

// Metrics says which metrics are read and where they go.
type Metrics struct {
	Host     bool            `yaml:"host"`
	HostRoot string          `yaml:"hostRoot"`
	Scrape   []scrape.Target `yaml:"scrape"`
	Expose   string          `yaml:"expose"`
	Outputs  []string        `yaml:"outputs"`
}

// Output is one backend: exactly one field is set.
type Output struct {
	Store         *store.Config         `yaml:"store"`
	Elasticsearch *elasticsearch.Config `yaml:"elasticsearch"`
	Fluentd       *fluentd.Config       `yaml:"fluentd"`
	InfluxDB      *influxdb.Config      `yaml:"influxdb"`
	Logstash      *logstash.Config      `yaml:"logstash"`
	OTLP          *otlp.Config          `yaml:"otlp"`
	Discard       *discard.Config       `yaml:"discard"`
	AzureMonitor  *azuremonitor.Config  `yaml:"azuremonitor"`
}

// kinds are the names of the outputs' kinds.
func kinds() (names []string) {
	for f := range reflect.TypeFor[Output]().Fields() {
		names = append(names, f.Tag.Get("yaml"))
	}
	return names
}

// Parse reads and checks a configuration. getenv gives what Azure's workload
// identity puts into the environment of a pod (AZURE_TENANT_ID, AZURE_CLIENT_ID,
// AZURE_FEDERATED_TOKEN_FILE, AZURE_AUTHORITY_HOST), for outputs that do not say
// it themselves. The error has one line for each thing that is wrong, with its field,
// value and remedy.
func Parse(b []byte, getenv func(string) string) (*Config, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("the file has %d bytes; at most %d are read", len(b), MaxSize)
	}
	var c Config
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return nil, explain(err)
	}
	c.setDefaults()
	for _, o := range c.Outputs {
		if a := o.AzureMonitor; a != nil {
			*a = a.WithEnvironment(getenv)
		}
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	return &c, nil
}

func (c *Config) setDefaults() {
	def(&c.Admin, DefaultAdmin)
	def(&c.DataDir, DefaultDataDir)
	if c.Logs != nil {
		def(&c.Logs.Folder, DefaultFolder)
	}
	if c.Metrics != nil {
		def(&c.Metrics.HostRoot, "/")
	}
}

func def(field *string, value string) {
	if *field == "" {
		*field = value
	}
}

// The decoder's words that speak of Go.
var (
	unknown = regexp.MustCompile(`^(line \d+: )field (.+) not found in type (\S+)$`)
	twice   = regexp.MustCompile(`^(line \d+: )(?:field|key) (.+) already set in (?:type \S+|map)$`)
)

// explain turns the decoder's words for a Go type into the names of the file.
func explain(err error) error {
	var te *yaml.TypeError
	if !errors.As(err, &te) {
		return err
	}
	var errs []error
	for _, s := range te.Errors {
		if m := unknown.FindStringSubmatch(s); m != nil {
			s = fmt.Sprintf("%sunknown key %q; known here are %s", m[1], m[2], strings.Join(keys(reflect.TypeFor[Config](), m[3]), ", "))
		}
		if m := twice.FindStringSubmatch(s); m != nil {
			s = fmt.Sprintf("%skey %s is there twice; remove one", m[1], m[2])
		}
		errs = append(errs, errors.New(s))
	}
	return errors.Join(errs...)
}

// keys returns the YAML names of the struct type of the given name within t.
func keys(t reflect.Type, name string) []string {
	switch t.Kind() {
	case reflect.Pointer, reflect.Slice, reflect.Map:
		return keys(t.Elem(), name)
	case reflect.Struct:
	default:
		return nil
	}
	var own []string
	for f := range t.Fields() {
		tag, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if tag == "" {
			continue
		}
		if t.String() != name {
			if found := keys(f.Type, name); found != nil {
				return found
			}
		}
		own = append(own, tag)
	}
	if t.String() != name {
		return nil
	}
	return own
}

var outputName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (c *Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	address := func(field, value string) {
		if _, _, err := net.SplitHostPort(value); err != nil {
			bad("%s: %q is not host:port; write for example 127.0.0.1:15030", field, value)
		}
	}
	address("admin", c.Admin)
	if c.Logs == nil && c.Metrics == nil {
		bad("neither logs nor metrics is there: the collector would do nothing; write at least one")
	}
	if len(c.Outputs) > MaxOutputs {
		bad("outputs: there are %d; at most %d", len(c.Outputs), MaxOutputs)
	}
	stores := 0
	for _, name := range slices.Sorted(maps.Keys(c.Outputs)) {
		o := c.Outputs[name]
		if !outputName.MatchString(name) {
			bad("outputs: the name %q is used in file names; write lower-case letters, digits and '-'", name)
		}
		if o.Store != nil {
			stores++
		}
		if err := o.validate(); err != nil {
			bad("outputs.%s: %w", name, err)
		}
	}
	if stores > 1 {
		bad("outputs: %d of them are stores; there is one search, so leave one", stores)
	}
	use := func(field string, names []string, takes func(Output) bool, what string) {
		seen := map[string]bool{}
		for _, name := range names {
			o, ok := c.Outputs[name]
			switch {
			case !ok:
				bad("%s: there is no output %q; outputs has %s", field, name, list(slices.Sorted(maps.Keys(c.Outputs))))
			case !takes(o):
				bad("%s: output %q takes no %s", field, name, what)
			case seen[name]:
				bad("%s: output %q is there twice; remove one", field, name)
			}
			seen[name] = true
		}
	}
	if k := c.Kubernetes; k != nil {
		for field, value := range map[string]string{"kubernetes.server": k.Server, "kubernetes.kubelet": k.Kubelet} {
			if u, err := url.Parse(value); value != "" && (err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http") {
				bad("%s: %q is not an address; write https://host:port", field, value)
			}
		}
		if !k.Watch && k.Kubelet == "" {
			bad("kubernetes: neither watch nor kubelet is there, so nobody would be asked; write watch: true, or remove kubernetes")
		}
		if k.Wait < 0 || k.Wait > time.Minute {
			bad("kubernetes.wait: %s is not between 0s and 1m0s", k.Wait)
		}
	}
	if l := c.Logs; l != nil {
		if len(l.Outputs) == 0 {
			bad("logs.outputs is empty: name at least one of outputs, or remove logs")
		}
		use("logs.outputs", l.Outputs, func(o Output) bool { return o.InfluxDB == nil }, "logs")
		within := func(field string, v, limit int) {
			if v < 0 || v > limit {
				bad("%s: %d is not between 1 and %d; leave it out for the default", field, v, limit)
			}
		}
		within("logs.batch.maxRecords", l.Batch.MaxRecords, maxBatch)
		within("logs.batch.maxBytes", l.Batch.MaxBytes, maxBatchBytes)
		within("logs.inFlight", l.InFlight, maxInFlight)
		l.validate(bad)
		if _, err := rules.Compile(l.Config, "", l.Outputs); err != nil {
			bad("logs: %w", err)
		}
		if l.Batch.Linger < 0 || l.Batch.Linger > maxLinger {
			bad("logs.batch.linger: %s is not between 0s and %s", l.Batch.Linger, maxLinger)
		}
	}
	if m := c.Metrics; m != nil {
		use("metrics.outputs", m.Outputs, func(o Output) bool { return o.InfluxDB != nil }, "metrics")
		if m.Expose != "" {
			address("metrics.expose", m.Expose)
		}
		if m.Expose == "" && len(m.Outputs) == 0 {
			bad("metrics: neither expose nor outputs is there, so nobody would see the metrics; write expose: 127.0.0.1:15031, or remove metrics")
		}
		if err := (scrape.Config{Targets: m.Scrape}).Validate(); err != nil {
			bad("metrics: %w", err)
		}
	}
	return errors.Join(errs...)
}

func (l *Logs) validate(bad func(format string, args ...any)) {
	folder := func(field, value string) {
		if value != "" && !filepath.IsAbs(value) {
			bad("%s: %q is not an absolute path; write for example /var/log/outrigger", field, value)
		}
	}
	folder("logs.spool", l.Spool)
	if o := l.Inputs.OTLP; o != nil {
		if _, _, err := net.SplitHostPort(o.Address); err != nil {
			bad("logs.inputs.otlp.address: %q is not host:port; write for example 127.0.0.1:4318", o.Address)
		}
	}
	if j := l.Inputs.Journald; j != nil {
		folder("logs.inputs.journald.directory", j.Directory)
	}
	if rel, err := filepath.Rel(l.Folder, l.Spool); l.Spool != "" && err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		bad("logs.spool: %q lies in logs.folder, so that what is kept would be read as logs; write a folder beside it", l.Spool)
	}
	if l.SpoolBytes < 0 {
		bad("logs.spoolBytes: %d is negative; leave it out for 1 GiB", l.SpoolBytes)
	}
	for i, f := range l.LinkedFolders {
		folder(fmt.Sprintf("logs.linkedFolders[%d]", i), f)
	}
	seen := map[string]bool{}
	for i, f := range l.Files {
		field := fmt.Sprintf("logs.files[%d]", i)
		switch {
		case !outputName.MatchString(f.Name):
			bad("%s.name: %q; write lower-case letters, digits and '-'", field, f.Name)
		case seen[f.Name]:
			bad("%s.name: %q is there twice; write another", field, f.Name)
		}
		seen[f.Name] = true
		if len(f.Paths) == 0 {
			bad("%s.paths is empty; write at least one, for example /var/log/nginx/*.log", field)
		}
		for j, p := range f.Paths {
			folder(fmt.Sprintf("%s.paths[%d]", field, j), p)
			if _, err := filepath.Match(p, ""); err != nil {
				bad("%s.paths[%d]: %q is not a pattern: %w", field, j, p, err)
			}
		}
		if !slices.Contains([]string{"", "text", "cri", "docker"}, f.Format) {
			bad("%s.format: %q is not known; write text, cri or docker", field, f.Format)
		}
	}
}

func (o Output) validate() error {
	var has []string
	var errs []error
	add := func(kind string, set bool, validate func() error) {
		if set {
			has = append(has, kind)
			errs = append(errs, validate())
		}
	}
	add("store", o.Store != nil, func() error { return o.Store.Validate() })
	add("elasticsearch", o.Elasticsearch != nil, func() error { return o.Elasticsearch.Validate() })
	add("fluentd", o.Fluentd != nil, func() error { return o.Fluentd.Validate() })
	add("influxdb", o.InfluxDB != nil, func() error { return o.InfluxDB.Validate() })
	add("logstash", o.Logstash != nil, func() error { return o.Logstash.Validate() })
	add("otlp", o.OTLP != nil, func() error { return o.OTLP.Validate() })
	add("azuremonitor", o.AzureMonitor != nil, func() error { return o.AzureMonitor.Validate() })
	add("discard", o.Discard != nil, func() error { return nil })
	if len(has) != 1 {
		return fmt.Errorf("it has the kinds %s; write exactly one of %s", list(has), list(kinds()))
	}
	return errors.Join(errs...)
}

// Unused returns the outputs that neither logs nor metrics name.
func (c *Config) Unused() []string {
	used := map[string]bool{}
	if c.Logs != nil {
		for _, n := range c.Logs.Outputs {
			used[n] = true
		}
	}
	if c.Metrics != nil {
		for _, n := range c.Metrics.Outputs {
			used[n] = true
		}
	}
	return slices.DeleteFunc(slices.Sorted(maps.Keys(c.Outputs)), func(n string) bool { return used[n] })
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
