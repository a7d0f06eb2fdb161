// Package scrape reads metrics from the node's targets and keeps the newest
// answer of each.
//
// It knows the exposition formats of Prometheus (protobuf, text 0.0.4,
// OpenMetrics 1.0), what a failed scrape must look like, and Prometheus' rules
// for the labels job and instance. It does not know where the metrics go, nor
// how targets are discovered: its configuration is a fixed list, and whoever
// wants another list makes another Scraper.
//
// The sample model is Prometheus' own: a [dto.MetricFamily] per name. What is
// once published is never changed again, so any number of readers may hold it
// without a lock; they must not change it either. Every metric carries a
// timestamp in milliseconds: the target's own where it gave one, else the time
// of the scrape. A reader that may not pass timestamps on strips them.
//
// The collector's main runs one Scraper and hands its Gather to the metric
// outputs.
package scrape

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// Defaults and limits.
const (
	DefaultInterval    = 15 * time.Second
	DefaultTimeout     = 10 * time.Second
	DefaultPath        = "/metrics"
	DefaultSeriesLimit = 20_000

	MinInterval = time.Second
	MaxTargets  = 2_000
	// MaxBody is how many bytes of one answer, after decompression, are read.
	MaxBody = 16 << 20
	// StaleAfter is how many intervals the series of a silent target are kept.
	StaleAfter = 2
)

// Config is the scrape section of the collector's configuration.
type Config struct {
	Targets []Target `yaml:"targets"`
}

// Target is one endpoint that answers GET with an exposition.
type Target struct {
	// Job is the value of the label job.
	Job string `yaml:"job"`
	// Address is host:port; it is also the value of the label instance.
	Address string `yaml:"address"`
	// Scheme is http (the default) or https.
	Scheme string `yaml:"scheme"`
	// Path and query; /metrics by default.
	Path string `yaml:"path"`
	// Interval between scrapes; 15s by default, at least 1s.
	Interval time.Duration `yaml:"interval"`
	// Timeout of one scrape; 10s by default or nine tenths of a shorter interval.
	Timeout time.Duration `yaml:"timeout"`
	// HonorLabels keeps a label of the target that collides with one of ours;
	// by default the target's is renamed to exported_<name>.
	HonorLabels bool `yaml:"honorLabels"`
	// Labels are added to every series, job and instance among them if given.
	Labels map[string]string `yaml:"labels"`
	// SeriesLimit of one scrape; 20,000 by default. What is over it is dropped
	// and counted.
	SeriesLimit int `yaml:"seriesLimit"`
	// CAFile verifies an https target; the system's authorities by default.
	CAFile string `yaml:"caFile"`
	// TokenFile holds a bearer token; it is read again at every scrape.
	TokenFile string `yaml:"tokenFile"`
}

func (t Target) withDefaults() Target {
	if t.Scheme == "" {
		t.Scheme = "http"
	}
	if t.Path == "" {
		t.Path = DefaultPath
	}
	if t.Interval == 0 {
		t.Interval = DefaultInterval
	}
	if t.Timeout == 0 {
		t.Timeout = min(DefaultTimeout, t.Interval*9/10)
	}
	if t.SeriesLimit == 0 {
		t.SeriesLimit = DefaultSeriesLimit
	}
	return t
}

func (t Target) url() string { return t.Scheme + "://" + t.Address + t.Path }

// Validate names the first field that cannot be right, its value and the remedy.
func (c Config) Validate() error {
	if len(c.Targets) > MaxTargets {
		return fmt.Errorf("scrape.targets has %d entries: at most %d on one node; a target list this long belongs to Prometheus itself", len(c.Targets), MaxTargets)
	}
	seen := map[string]int{}
	for i, t := range c.Targets {
		if err := t.Validate(); err != nil {
			return fmt.Errorf("scrape.targets[%d].%w", i, err)
		}
		key := t.Job + "\x00" + t.withDefaults().url()
		if j, dup := seen[key]; dup {
			return fmt.Errorf("scrape.targets[%d].address %q: job %q scrapes it already in targets[%d]; remove one", i, t.Address, t.Job, j)
		}
		seen[key] = i
	}
	return nil
}

// Validate names the first field of the target that cannot be right.
func (t Target) Validate() error {
	t = t.withDefaults()
	if t.Job == "" {
		return errors.New("job is empty: give the group of targets a name, for example sidecars")
	}
	if host, port, err := net.SplitHostPort(t.Address); err != nil || host == "" || port == "" {
		return fmt.Errorf("address %q is not host:port; write for example 127.0.0.1:15020", t.Address)
	}
	if t.Scheme != "http" && t.Scheme != "https" {
		return fmt.Errorf("scheme %q is neither http nor https", t.Scheme)
	}
	if u, err := url.Parse(t.url()); err != nil || !strings.HasPrefix(t.Path, "/") || u.Host != t.Address {
		return fmt.Errorf("path %q is not a path: start it with '/', for example /metrics", t.Path)
	}
	if t.Interval < MinInterval {
		return fmt.Errorf("interval %s is too short: at least %s", t.Interval, MinInterval)
	}
	if t.Timeout <= 0 || t.Timeout >= t.Interval {
		return fmt.Errorf("timeout %s is not between 0 and the interval %s: shorten it, or lengthen the interval", t.Timeout, t.Interval)
	}
	if t.SeriesLimit < 0 {
		return fmt.Errorf("seriesLimit %d is negative: leave it out for %d", t.SeriesLimit, DefaultSeriesLimit)
	}
	if t.CAFile != "" && t.Scheme != "https" {
		return fmt.Errorf("caFile %q is of no use with scheme http: set scheme to https or remove it", t.CAFile)
	}
	for name := range t.Labels {
		if !model.LegacyValidation.IsValidLabelName(name) || strings.HasPrefix(name, model.ReservedLabelPrefix) {
			return fmt.Errorf("labels has the name %q: letters, digits and '_' only, not starting with a digit or \"__\"", name)
		}
	}
	return nil
}

// Options are what a Scraper needs beside its configuration.
type Options struct {
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // required
	// Jitter returns how long a target waits before its first scrape, so that
	// targets spread over the interval. Random by default.
	Jitter func(interval time.Duration) time.Duration
	// Transport replaces the HTTP transport of every target, in tests.
	Transport http.RoundTripper
}

// Scraper scrapes a fixed list of targets. Gather and Status may be called from
// any goroutine, before, during and after Run.
type Scraper struct {
	targets []*target
	log     *slog.Logger
	jitter  func(time.Duration) time.Duration
}

type counters struct {
	failures *prometheus.CounterVec // job, reason
	dropped  *prometheus.CounterVec // job
}

// New validates cfg, reads the CA files and registers the Scraper's own metrics.
func New(cfg Config, opts Options) (*Scraper, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	c := counters{
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_scrape_failures_total",
			Help: "Scrapes that gave no metrics, by the reason: connect, timeout, status, content_type, body_too_large, parse, credentials.",
		}, []string{"job", "reason"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "outrigger_scrape_series_dropped_total",
			Help: "Series of a scrape over the series limit of their target.",
		}, []string{"job"}),
	}
	for _, col := range []prometheus.Collector{c.failures, c.dropped} {
		if err := opts.Registerer.Register(col); err != nil {
			return nil, fmt.Errorf("scrape: registering metrics: %w", err)
		}
	}
	s := &Scraper{log: opts.Logger, jitter: opts.Jitter}
	if s.jitter == nil {
		s.jitter = func(d time.Duration) time.Duration { return rand.N(d) }
	}
	plain := opts.Transport
	if plain == nil {
		plain = newTransport(nil)
	}
	for i, tc := range cfg.Targets {
		tc = tc.withDefaults()
		tr := plain
		if tc.CAFile != "" && opts.Transport == nil {
			pem, err := os.ReadFile(tc.CAFile)
			if err != nil {
				return nil, fmt.Errorf("scrape.targets[%d].caFile: %w; mount the file or correct the path", i, err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("scrape.targets[%d].caFile %q holds no PEM certificate", i, tc.CAFile)
			}
			tr = newTransport(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12})
		}
		s.targets = append(s.targets, newTarget(tc, tr, c, opts.Logger))
	}
	return s, nil
}

// newTransport keeps one connection a target and asks no proxy: targets are on
// this node.
func newTransport(conf *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:            (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSClientConfig:        conf,
		TLSHandshakeTimeout:    5 * time.Second,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        5 * time.Minute,
		MaxResponseHeaderBytes: 64 << 10,
	}
}

// Run scrapes until ctx ends and returns nil once every target's goroutine has
// ended. It may be called once.
func (s *Scraper) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, t := range s.targets {
		wait := min(s.jitter(t.conf.Interval), t.conf.Interval)
		wg.Go(func() { t.run(ctx, wait) })
	}
	wg.Wait()
	<-ctx.Done()
	for _, t := range s.targets {
		t.client.CloseIdleConnections()
	}
	return nil
}

// Gather merges the newest snapshots of all targets; it never fails. Families
// are sorted by name. A name appears once for each type that targets gave it:
// they may disagree, and what to do about it depends on the output. A target
// whose last good scrape is older than two intervals has only its meta series
// (up, scrape_duration_seconds, scrape_samples_scraped).
func (s *Scraper) Gather() ([]*dto.MetricFamily, error) {
	now := time.Now()
	type key struct {
		name string
		kind dto.MetricType
	}
	merged := map[key]*dto.MetricFamily{}
	owned := map[key]bool{} // families made here, which may be appended to
	for _, t := range s.targets {
		snap := t.snap.Load()
		if snap == nil {
			continue
		}
		lists := [][]*dto.MetricFamily{snap.meta}
		if now.Sub(snap.goodAt) <= StaleAfter*t.conf.Interval {
			lists = append(lists, snap.families)
		}
		for _, list := range lists {
			for _, f := range list {
				k := key{f.GetName(), f.GetType()}
				have, ok := merged[k]
				switch {
				case !ok:
					merged[k] = f
				case !owned[k]:
					merged[k] = &dto.MetricFamily{
						Name: have.Name, Help: have.Help, Type: have.Type, Unit: have.Unit,
						Metric: slices.Concat(have.Metric, f.Metric),
					}
					owned[k] = true
				default:
					have.Metric = append(have.Metric, f.Metric...)
				}
			}
		}
	}
	out := make([]*dto.MetricFamily, 0, len(merged))
	for _, f := range merged {
		out = append(out, f)
	}
	slices.SortFunc(out, compareFamilies)
	return out, nil
}

func compareFamilies(a, b *dto.MetricFamily) int {
	if c := strings.Compare(a.GetName(), b.GetName()); c != 0 {
		return c
	}
	return int(a.GetType()) - int(b.GetType())
}

// Status is what is known of one target, for people.
type Status struct {
	Job, Instance, URL string
	Up                 bool
	LastScrape         time.Time     // start of the last scrape; zero before the first
	LastGood           time.Time     // start of the last scrape that succeeded
	Duration           time.Duration // of the last scrape
	Samples            int           // of the last scrape, before the limit
	Dropped            int           // of the last scrape, over the limit
	Reason             string        // why the last scrape failed, as in the metric
	Error              string        // why the last scrape failed, in words
}

// Status lists the targets in the order of the configuration.
func (s *Scraper) Status() []Status {
	out := make([]Status, 0, len(s.targets))
	for _, t := range s.targets {
		st := Status{Job: t.label("job"), Instance: t.label("instance"), URL: t.conf.url()}
		if snap := t.snap.Load(); snap != nil {
			st.Up, st.LastScrape, st.LastGood = snap.failure == nil, snap.at, snap.goodAt
			st.Duration, st.Samples, st.Dropped = snap.duration, snap.samples, snap.dropped
			if snap.failure != nil {
				st.Reason, st.Error = snap.failure.reason, snap.failure.Error()
			}
		}
		out = append(out, st)
	}
	return out
}
