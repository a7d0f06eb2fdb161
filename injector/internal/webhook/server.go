package webhook

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Timeouts of a connection. The API server waits at most 30 s for a webhook.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeader         = 64 << 10
)

// CheckEvery is how often at most a new connection looks whether the
// certificate's files have changed.
const CheckEvery = 5 * time.Second

// Server returns an HTTPS server for the handler, not yet listening: give its
// ServeTLS empty file names. get is the certificate of this instant. With
// callers, only who has a certificate of these authorities is answered, as an API
// server has that was given one for webhooks; nil asks for none.
func Server(h http.Handler, get func(*tls.ClientHelloInfo) (*tls.Certificate, error), callers *x509.CertPool, log *slog.Logger) *http.Server {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: get}
	if callers != nil {
		conf.ClientAuth, conf.ClientCAs = tls.RequireAndVerifyClientCert, callers
	}
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // handshakes that strangers break off
		TLSConfig:         conf,
	}
}

// Callers reads the authorities of those who may call, in PEM.
func Callers(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--client-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("--client-ca %s holds no certificate in PEM", file)
	}
	return pool, nil
}

func newExpiry() prometheus.Gauge {
	return prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "outrigger_certificate_expiry_timestamp_seconds",
		Help: "When the serving certificate of the webhook expires.",
	})
}

// Certificate is a certificate and key in two files that may be replaced at any
// time (a mounted Secret, cert-manager). It is read again when a file changes;
// while the new pair cannot be used, the old one serves and the failure is
// counted and logged. Safe for concurrent use; it needs no goroutine.
type Certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	now               func() time.Time
	failures          prometheus.Counter
	expiry            prometheus.Gauge

	mu      sync.Mutex
	pair    *tls.Certificate
	stamp   [2]stamp
	checked time.Time
}

type stamp struct {
	changed time.Time
	size    int64
}

// NewCertificate reads the files for the first time and registers the metrics.
// now is the clock.
func NewCertificate(certFile, keyFile string, log *slog.Logger, reg prometheus.Registerer, now func() time.Time) (*Certificate, error) {
	c := &Certificate{
		certFile: certFile, keyFile: keyFile, log: log, now: now,
		failures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "outrigger_webhook_certificate_reload_failures_total",
			Help: "Times a changed serving certificate could not be used; the old one served on.",
		}),
		expiry: newExpiry(),
	}
	for _, m := range []prometheus.Collector{c.failures, c.expiry} {
		if err := reg.Register(m); err != nil {
			return nil, fmt.Errorf("webhook: registering metrics: %w", err)
		}
	}
	stamp, err := c.stamps()
	if err != nil {
		return nil, err
	}
	return c, c.load(stamp)
}

func (c *Certificate) stamps() (s [2]stamp, err error) {
	for i, file := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(file)
		if err != nil {
			return s, fmt.Errorf("serving certificate: %w; mount the Secret or correct the path", err)
		}
		s[i] = stamp{info.ModTime(), info.Size()}
	}
	return s, nil
}

func (c *Certificate) load(s [2]stamp) error {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("serving certificate %s with key %s: %w", c.certFile, c.keyFile, err)
	}
	c.pair, c.stamp, c.checked = &pair, s, c.now()
	c.expiry.Set(float64(pair.Leaf.NotAfter.Unix()))
	return nil
}

// Get is a [tls.Config]'s GetCertificate.
func (c *Certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); now.Sub(c.checked) >= CheckEvery {
		c.checked = now
		s, err := c.stamps()
		if err == nil && s == c.stamp {
			return c.pair, nil
		}
		if err == nil {
			err = c.load(s)
		}
		if err != nil {
			// Files are replaced one after the other; the next look finds both.
			c.failures.Inc()
			c.log.Warn("the new serving certificate cannot be used; the old one serves on", "error.message", err.Error())
		} else {
			c.log.Info("serving certificate replaced", "tls.server.not_after", c.pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return c.pair, nil
}
