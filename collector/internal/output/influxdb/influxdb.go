// Package influxdb ships metrics to InfluxDB 2 and to what speaks its write API
// (InfluxDB 3, VictoriaMetrics).
//
// It is a metric sink: Run asks its source for all metrics every interval,
// writes them down as line protocol and sends them in batches. It knows the
// write API, its errors and which of them are worth another attempt. It does not
// know where the metrics come from: the source is a [prometheus.Gatherer]. The
// collector's main makes one Sink per configured database and runs it.
//
// A sample becomes one point: measurement = metric name, tags = labels, one
// field "value" that is always a float, so that no field ever changes its type.
// Histograms and summaries become the series of the text format (_bucket with
// le, _sum, _count; quantile). The timestamp is the metric's own, else the time
// of gathering, in nanoseconds; a point sent twice is therefore one point, and
// every resend is safe.
//
// The client library's blocking call makes single attempts; the queue, retries,
// backoff and the breaker are here, because the library's own queue drops
// without a word. Metrics may be dropped when the database is away for long, but
// never unseen: gathered = written + dropped by cause + waiting, and each has a
// metric.
package influxdb

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
	"net/netip"
	"net/url"
	"os"
	"sync"
	"time"

	influx "github.com/influxdata/influxdb-client-go/v2"
	"github.com/influxdata/influxdb-client-go/v2/api"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"
)

// Defaults and limits.
const (
	DefaultInterval    = 15 * time.Second
	DefaultBatchSize   = 5000    // points; what InfluxDB recommends
	DefaultQueuePoints = 100_000 // about 20 MB
	DefaultTimeout     = 30 * time.Second
	DefaultBackoff     = time.Second
	DefaultMaxBackoff  = time.Minute
	DefaultFailures    = 5
	DefaultOpenFor     = 15 * time.Second

	MaxBatchSize   = 50_000
	MaxQueuePoints = 10_000_000
	// MaxRetryAfter bounds what the server may ask for.
	MaxRetryAfter = 5 * time.Minute
	// PermanentRetry is the wait after an answer that only a person can change.
	PermanentRetry = time.Minute
	// Grace is how long Run goes on sending what waits once it is told to stop.
	Grace = 5 * time.Second
	// maxErrorBody is how much of an error answer is read.
	maxErrorBody = 64 << 10
	// maxLine is the size of one point; a longer one is dropped and counted.
	maxLine = 64 << 10
	// maxSplits is how often a batch with an unknown bad point is halved before
	// the rest is given up: at most 2^maxSplits pieces.
	maxSplits = 6
)

// Config is the section of one database in the collector's configuration.
type Config struct {
	// URL of the server, for example http://influxdb.monitoring:8086.
	URL string `yaml:"url"`
	Org string `yaml:"org"`
	// Bucket to write to.
	Bucket string `yaml:"bucket"`
	// TokenFile holds the API token; it is read at every attempt, so a new token
	// needs no restart. Without it no token is sent.
	TokenFile string `yaml:"tokenFile"`
	// Interval between gatherings; 15s by default.
	Interval time.Duration `yaml:"interval"`
	// BatchSize in points; 5000 by default.
	BatchSize int `yaml:"batchSize"`
	// QueuePoints that may wait for the server; 100,000 by default. Beyond it the
	// oldest are dropped and counted.
	QueuePoints int `yaml:"queuePoints"`
	// Timeout of one attempt; 30s by default.
	Timeout time.Duration `yaml:"timeout"`
	// CAFile verifies the server; the system's authorities by default.
	CAFile string `yaml:"caFile"`
	// CertFile and KeyFile are our certificate where the server asks for one.
	CertFile string  `yaml:"certFile"`
	KeyFile  string  `yaml:"keyFile"`
	Backoff  Backoff `yaml:"backoff"`
	Breaker  Breaker `yaml:"breaker"`
}

// Backoff between attempts: doubled from Initial to Max, half of it random.
type Backoff struct {
	Initial time.Duration `yaml:"initial"` // 1s by default
	Max     time.Duration `yaml:"max"`     // 1m by default
}

// Breaker stops attempts at a server that is down.
type Breaker struct {
	// ConsecutiveFailures that open it; 5 by default. Answers below 500 are none.
	ConsecutiveFailures int `yaml:"consecutiveFailures"`
	// OpenFor is how long it stays open before one attempt probes; 15s by default.
	OpenFor time.Duration `yaml:"openFor"`
}

func (c Config) withDefaults() Config {
	def(&c.Interval, DefaultInterval)
	def(&c.BatchSize, DefaultBatchSize)
	def(&c.QueuePoints, DefaultQueuePoints)
	def(&c.Timeout, DefaultTimeout)
	def(&c.Backoff.Initial, DefaultBackoff)
	def(&c.Backoff.Max, max(DefaultMaxBackoff, c.Backoff.Initial))
	def(&c.Breaker.ConsecutiveFailures, DefaultFailures)
	def(&c.Breaker.OpenFor, DefaultOpenFor)
	return c
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate names the first field that cannot be right, its value and the remedy.
func (c Config) Validate() error {
	c = c.withDefaults()
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		return errors.New("influxdb.url is empty: give the server, for example http://influxdb.monitoring:8086")
	case err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "":
		return fmt.Errorf("influxdb.url %q is not http://host:port or https://host:port", redact(c.URL))
	case u.User != nil:
		return fmt.Errorf("influxdb.url %q holds a password: put the token into a file and name it in tokenFile", u.Redacted())
	case u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("influxdb.url %q has a query: give org and bucket in their own fields", redact(c.URL))
	case c.Bucket == "":
		return errors.New("influxdb.bucket is empty: name the bucket to write to")
	case c.Interval < time.Second:
		return fmt.Errorf("influxdb.interval %s is too short: at least 1s", c.Interval)
	case c.BatchSize < 1 || c.BatchSize > MaxBatchSize:
		return fmt.Errorf("influxdb.batchSize %d is not between 1 and %d: leave it out for %d", c.BatchSize, MaxBatchSize, DefaultBatchSize)
	case c.QueuePoints < c.BatchSize || c.QueuePoints > MaxQueuePoints:
		return fmt.Errorf("influxdb.queuePoints %d is not between batchSize (%d) and %d: leave it out for %d", c.QueuePoints, c.BatchSize, MaxQueuePoints, DefaultQueuePoints)
	case c.Timeout <= 0:
		return fmt.Errorf("influxdb.timeout %s is not positive: leave it out for %s", c.Timeout, DefaultTimeout)
	case c.Backoff.Initial <= 0 || c.Backoff.Max < c.Backoff.Initial:
		return fmt.Errorf("influxdb.backoff initial %s, max %s: initial must be positive and max no smaller", c.Backoff.Initial, c.Backoff.Max)
	case c.Breaker.ConsecutiveFailures < 1:
		return fmt.Errorf("influxdb.breaker.consecutiveFailures %d is not positive: leave it out for %d", c.Breaker.ConsecutiveFailures, DefaultFailures)
	case c.Breaker.OpenFor <= 0:
		return fmt.Errorf("influxdb.breaker.openFor %s is not positive: leave it out for %s", c.Breaker.OpenFor, DefaultOpenFor)
	case (c.CertFile == "") != (c.KeyFile == ""):
		return fmt.Errorf("influxdb.certFile %q and keyFile %q: give both or neither", c.CertFile, c.KeyFile)
	case u.Scheme == "http" && (c.CAFile != "" || c.CertFile != ""):
		return fmt.Errorf("influxdb.url %q is http, where caFile and certFile are of no use: write https or remove them", c.URL)
	}
	return nil
}

// redact keeps a URL that was refused from showing a password.
func redact(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(not a URL)"
	}
	return u.Redacted()
}

// Options are what a Sink needs beside its configuration.
type Options struct {
	Logger     *slog.Logger          // required
	Registerer prometheus.Registerer // required
	// Source of the metrics. What it returns beside an error is sent.
	Source prometheus.Gatherer
	// Jitter returns the wait before the first gathering; random by default.
	Jitter func(interval time.Duration) time.Duration
	// Transport replaces the HTTP transport, in tests.
	Transport http.RoundTripper
}

// Sink ships the metrics of one source to one bucket.
type Sink struct {
	conf    Config
	source  prometheus.Gatherer
	log     *slog.Logger
	jitter  func(time.Duration) time.Duration
	metrics *metrics
	queue   *queue
	client  influx.Client
	api     api.WriteAPIBlocking
	tr      *transport
	breaker *gobreaker.TwoStepCircuitBreaker[struct{}]

	mu        sync.Mutex
	openUntil time.Time
	status    Status
}

// Status of a Sink, for people.
type Status struct {
	Waiting   int       // points in the queue
	LastWrite time.Time // when the server last took a batch; zero before
	Error     string    // of the last attempt; empty if it succeeded
	Permanent bool      // the error stays until a person acts
	Breaker   string    // closed, open, half-open
}

// New validates cfg, reads the certificates and registers the Sink's metrics.
func New(cfg Config, opts Options) (*Sink, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	s := &Sink{
		conf:   cfg,
		source: opts.Source,
		log:    opts.Logger.With("outrigger.output", "influxdb", "url.full", cfg.URL),
		jitter: opts.Jitter,
		queue:  newQueue(cfg.QueuePoints),
	}
	if s.jitter == nil {
		s.jitter = func(d time.Duration) time.Duration { return rand.N(d) }
	}
	base := opts.Transport
	if base == nil {
		conf, err := tlsConfig(cfg)
		if err != nil {
			return nil, err
		}
		base = &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			TLSClientConfig:       conf,
			TLSHandshakeTimeout:   10 * time.Second,
			ForceAttemptHTTP2:     true,
			MaxIdleConnsPerHost:   1,
			IdleConnTimeout:       90 * time.Second,
			ResponseHeaderTimeout: cfg.Timeout,
		}
	}
	if cfg.TokenFile != "" && insecure(cfg.URL) {
		s.log.Warn("the token travels in clear: use https in influxdb.url")
	}
	s.tr = &transport{base: base, tokenFile: cfg.TokenFile}
	s.client = influx.NewClientWithOptions(cfg.URL, "", influx.DefaultOptions().
		SetUseGZip(true).
		SetPrecision(time.Nanosecond).
		SetApplicationName("outrigger-collector").
		SetHTTPClient(&http.Client{
			Transport: s.tr,
			// A redirected POST becomes a GET, whose answer would say nothing of our points.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}))
	s.api = s.client.WriteAPIBlocking(cfg.Org, cfg.Bucket)
	s.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		Name:    "influxdb",
		Timeout: cfg.Breaker.OpenFor,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			return int(c.ConsecutiveFailures) >= cfg.Breaker.ConsecutiveFailures
		},
		OnStateChange: s.breakerChanged,
	})
	var err error
	if s.metrics, err = newMetrics(opts.Registerer, s); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Sink) breakerChanged(_ string, from, to gobreaker.State) {
	if to == gobreaker.StateOpen {
		s.mu.Lock()
		s.openUntil = time.Now().Add(s.conf.Breaker.OpenFor)
		s.mu.Unlock()
	}
	s.log.Info("breaker of the output", "outrigger.breaker.from", from.String(), "outrigger.breaker.to", to.String())
}

// Status is safe to call from any goroutine.
func (s *Sink) Status() Status {
	s.mu.Lock()
	st := s.status
	s.mu.Unlock()
	st.Waiting = s.queue.size()
	st.Breaker = s.breaker.State().String()
	return st
}

func tlsConfig(cfg Config) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("influxdb.caFile: %w; mount the file or correct the path", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("influxdb.caFile %q holds no PEM certificate", cfg.CAFile)
		}
	}
	if cfg.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("influxdb.certFile %q and keyFile %q: %w", cfg.CertFile, cfg.KeyFile, err)
		}
		conf.Certificates = []tls.Certificate{cert}
	}
	return conf, nil
}

func insecure(raw string) bool {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" || u.Hostname() == "localhost" {
		return false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return err != nil || !addr.IsLoopback()
}

// Run gathers and sends until ctx ends; then it sends what waits for at most
// Grace, counts the rest as dropped and returns nil. It may be called once.
func (s *Sink) Run(ctx context.Context) error {
	sending, abort := context.WithCancel(context.WithoutCancel(ctx))
	defer abort()
	var wg sync.WaitGroup
	wg.Go(func() { s.send(ctx, sending) })
	s.gather(ctx)
	s.queue.close()
	late := time.AfterFunc(Grace, abort)
	wg.Wait()
	late.Stop()
	s.metrics.dropped(causeShutdown, s.queue.drain())
	s.client.Close()
	s.tr.CloseIdleConnections()
	return nil
}

func (s *Sink) gather(ctx context.Context) {
	if !sleep(ctx, min(s.jitter(s.conf.Interval), s.conf.Interval)) {
		return
	}
	tick := time.NewTicker(s.conf.Interval)
	defer tick.Stop()
	for {
		s.gatherOnce(time.Now())
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Sink) gatherOnce(now time.Time) {
	families, err := s.source.Gather()
	if err != nil {
		s.metrics.sourceErrors.Inc()
		s.log.Warn("the source of metrics returned an error; what it returned beside it is sent", "error.message", err.Error())
	}
	e := encoder{now: now, batchSize: s.conf.BatchSize, dropped: s.metrics.dropped, emit: func(b *batch) {
		s.metrics.gathered.Add(float64(b.points))
		if lost := s.queue.push(b); lost > 0 {
			s.metrics.dropped(causeQueueFull, lost)
		}
	}}
	for _, f := range families {
		e.family(f)
	}
	e.flush()
}

// sleep reports whether d passed before ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
