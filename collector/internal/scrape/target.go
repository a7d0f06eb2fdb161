package scrape

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// accept prefers the formats that are cheap to read; OpenMetrics' parser is an
// order of magnitude slower.
const accept = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;escaping=allow-utf-8;q=0.7," +
	"text/plain;version=0.0.4;escaping=allow-utf-8;q=0.5," +
	"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.3"

// The reasons of outrigger_scrape_failures_total.
const (
	reasonConnect     = "connect"
	reasonTimeout     = "timeout"
	reasonStatus      = "status"
	reasonContentType = "content_type"
	reasonTooLarge    = "body_too_large"
	reasonParse       = "parse"
	reasonCredentials = "credentials"
)

type failure struct {
	reason string
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// snapshot is immutable once stored.
type snapshot struct {
	at       time.Time
	duration time.Duration
	samples  int
	dropped  int
	failure  *failure
	meta     []*dto.MetricFamily
	goodAt   time.Time           // of families
	families []*dto.MetricFamily // of the last good scrape
}

type target struct {
	conf     Target
	labels   []*dto.LabelPair // sorted; job and instance among them
	client   *http.Client
	counters counters
	log      *slog.Logger
	snap     atomic.Pointer[snapshot] // written by run only
}

func newTarget(conf Target, tr http.RoundTripper, c counters, log *slog.Logger) *target {
	all := map[string]string{"job": conf.Job, "instance": conf.Address}
	for k, v := range conf.Labels {
		all[k] = v
	}
	t := &target{
		conf:     conf,
		client:   &http.Client{Transport: tr},
		counters: c,
		log:      log.With("metricset.name", conf.Job, "url.full", conf.url()),
	}
	for k, v := range all {
		if v != "" {
			t.labels = append(t.labels, &dto.LabelPair{Name: proto.String(k), Value: proto.String(v)})
		}
	}
	slices.SortFunc(t.labels, compareLabels)
	return t
}

func (t *target) label(name string) string {
	for _, l := range t.labels {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}

func (t *target) run(ctx context.Context, wait time.Duration) {
	first := time.NewTimer(wait)
	defer first.Stop()
	select {
	case <-ctx.Done():
		return
	case <-first.C:
	}
	tick := time.NewTicker(t.conf.Interval)
	defer tick.Stop()
	for {
		t.scrape(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// scrape makes one attempt and publishes its outcome. An attempt cut short
// because we are stopping says nothing about the target and is not published.
func (t *target) scrape(ctx context.Context) {
	at := time.Now()
	families, samples, dropped, fail := t.fetch(ctx, at)
	if ctx.Err() != nil {
		return
	}
	next := &snapshot{at: at, duration: time.Since(at), samples: samples, dropped: dropped, failure: fail}
	prev := t.snap.Load()
	if fail == nil {
		next.goodAt, next.families = at, families
	} else {
		t.counters.failures.WithLabelValues(t.conf.Job, fail.reason).Inc()
		if prev != nil {
			next.goodAt, next.families = prev.goodAt, prev.families
		}
	}
	if dropped > 0 {
		t.counters.dropped.WithLabelValues(t.conf.Job).Add(float64(dropped))
	}
	next.meta = t.meta(next)
	t.snap.Store(next)

	// Changes are logged, not repetitions: the metric counts those.
	was := prev != nil && prev.failure != nil
	switch {
	case fail != nil && !was:
		t.log.Warn("scrape fails", "error.code", fail.reason, "error.message", fail.Error())
	case fail == nil && was:
		t.log.Info("scrape works again")
	}
	if dropped > 0 && (prev == nil || prev.dropped == 0) {
		t.log.Warn("scrape is over the series limit: the rest is dropped, families in alphabetical order; raise seriesLimit or reduce the target's labels",
			"seriesLimit", t.conf.SeriesLimit, "dropped", dropped)
	}
}

func (t *target) meta(s *snapshot) []*dto.MetricFamily {
	up := 1.0
	if s.failure != nil {
		up = 0
	}
	stamp := proto.Int64(s.at.UnixMilli())
	gauge := func(name, help string, v float64) *dto.MetricFamily {
		return &dto.MetricFamily{
			Name: proto.String(name), Help: proto.String(help), Type: dto.MetricType_GAUGE.Enum(),
			Metric: []*dto.Metric{{Label: t.labels, Gauge: &dto.Gauge{Value: &v}, TimestampMs: stamp}},
		}
	}
	return []*dto.MetricFamily{
		gauge("up", "1 if the last scrape of the target succeeded, 0 if not.", up),
		gauge("scrape_duration_seconds", "Duration of the last scrape.", s.duration.Seconds()),
		gauge("scrape_samples_scraped", "Samples the target exposed in the last scrape.", float64(s.samples)),
	}
}

func (t *target) fetch(ctx context.Context, at time.Time) (families []*dto.MetricFamily, samples, dropped int, fail *failure) {
	ctx, cancel := context.WithTimeout(ctx, t.conf.Timeout)
	defer cancel()
	body, contentType, fail := t.get(ctx)
	if fail != nil {
		return nil, 0, 0, fail
	}
	families, err := decode(body, contentType)
	if err != nil {
		reason := reasonParse
		if errors.Is(err, errContentType) {
			reason = reasonContentType
		}
		return nil, 0, 0, &failure{reason, err}
	}
	families, samples, dropped = finish(families, t.labels, t.conf.HonorLabels, t.conf.SeriesLimit, at)
	return families, samples, dropped, nil
}

func (t *target) get(ctx context.Context) (body []byte, contentType string, fail *failure) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.conf.url(), nil)
	if err != nil {
		return nil, "", &failure{reasonConnect, err}
	}
	req.Header.Set("Accept", accept)
	req.Header.Set("User-Agent", "outrigger-collector")
	req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", strconv.FormatFloat(t.conf.Timeout.Seconds(), 'f', -1, 64))
	if t.conf.TokenFile != "" {
		token, err := os.ReadFile(t.conf.TokenFile)
		if err != nil {
			return nil, "", &failure{reasonCredentials, fmt.Errorf("tokenFile: %w; mount the file or correct the path", err)}
		}
		req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	}
	resp, err := t.client.Do(req)
	if err != nil {
		return nil, "", t.ioFailure(err)
	}
	// The body has been read as far as it is wanted; a close error cannot lose data.
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return nil, "", &failure{reasonStatus, fmt.Errorf("%s answered %s instead of 200 OK", t.conf.url(), resp.Status)}
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, MaxBody+1))
	if err != nil {
		return nil, "", t.ioFailure(err)
	}
	if len(body) > MaxBody {
		return nil, "", &failure{reasonTooLarge, fmt.Errorf("%s answered more than %d bytes: reduce what the target exposes", t.conf.url(), MaxBody)}
	}
	return body, resp.Header.Get("Content-Type"), nil
}

func (t *target) ioFailure(err error) *failure {
	if errors.Is(err, context.DeadlineExceeded) {
		return &failure{reasonTimeout, fmt.Errorf("%s did not answer within %s: raise timeout (and interval), or make the target faster", t.conf.url(), t.conf.Timeout)}
	}
	return &failure{reasonConnect, err}
}
