package scrape

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"go.uber.org/goleak"
	"go.yaml.in/yaml/v2"

	"github.com/outrigger-mesh/outrigger/golden"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Each file holds a target, what it answers, and what comes out of it: an
// exposition with our labels, or the failure.
func TestGolden(t *testing.T) {
	at := time.UnixMilli(1_700_000_000_000)
	golden.Cases(t, "testdata/merge/*.txtar", func(t *testing.T, c *golden.Case) {
		var conf Target
		if err := yaml.UnmarshalStrict([]byte(c.Input("target")), &conf); err != nil {
			t.Fatal(err)
		}
		if err := conf.Validate(); err != nil {
			t.Fatal(err)
		}
		c.Want("want", merged(t, conf.withDefaults(), c.Input("answer"), strings.TrimSpace(c.Input("content-type")), at))
	})
}

func merged(t *testing.T, conf Target, answer, contentType string, at time.Time) string {
	t.Helper()
	families, err := decode([]byte(answer), contentType)
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	tg := newTarget(conf, nil, counters{}, discard())
	families, samples, dropped := finish(families, tg.labels, conf.HonorLabels, conf.SeriesLimit, at)
	return text(t, families) + fmt.Sprintf("samples %d, dropped %d\n", samples, dropped)
}

func text(t *testing.T, families []*dto.MetricFamily) string {
	t.Helper()
	var b strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return b.String()
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// start runs a Scraper on the targets and stops it, and waits, at the end of the test.
func start(t *testing.T, tr http.RoundTripper, targets ...Target) (*Scraper, *prometheus.Registry) {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	s, err := New(Config{Targets: targets}, Options{
		Logger: discard(), Registerer: reg, Transport: tr,
		Jitter: func(time.Duration) time.Duration { return 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s, reg
}

// settled waits until every target has been scraped once.
func settled(t *testing.T, s *Scraper) []Status {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		st := s.Status()
		n := 0
		for _, x := range st {
			if !x.LastScrape.IsZero() {
				n++
			}
		}
		if n == len(st) {
			return st
		}
	}
	t.Fatal("targets were not scraped within 10s")
	return nil
}

func value(families []*dto.MetricFamily, name string, labels ...string) (float64, bool) {
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
	metric:
		for _, m := range f.Metric {
			for i := 0; i < len(labels); i += 2 {
				found := false
				for _, l := range m.Label {
					found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
				}
				if !found {
					continue metric
				}
			}
			switch {
			case m.Gauge != nil:
				return m.Gauge.GetValue(), true
			case m.Counter != nil:
				return m.Counter.GetValue(), true
			case m.Untyped != nil:
				return m.Untyped.GetValue(), true
			}
		}
	}
	return 0, false
}

func TestScrapesARealClientLibraryInEveryFormat(t *testing.T) {
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "orders_total", Help: "Orders."})
	c.Add(7)
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "latency_seconds", Buckets: []float64{1}, NativeHistogramBucketFactor: 1.1})
	h.Observe(0.5)
	reg.MustRegister(c, h)
	serve := promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true})

	f := func(accept, wantType string) {
		t.Helper()
		var sent atomic.Value
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if accept != "" {
				r.Header.Set("Accept", accept)
			}
			serve.ServeHTTP(w, r)
			sent.Store(w.Header().Get("Content-Type"))
		}))
		defer srv.Close()
		s, _ := start(t, nil, Target{Job: "shop", Address: srv.Listener.Addr().String(), Labels: map[string]string{"node": "n1"}})
		if st := settled(t, s)[0]; !st.Up {
			t.Fatalf("%s: not up: %s", wantType, st.Error)
		}
		if got := sent.Load().(string); !strings.HasPrefix(got, wantType) {
			t.Errorf("content type %q, want %q", got, wantType)
		}
		fams, _ := s.Gather()
		if v, ok := value(fams, "orders_total", "job", "shop", "instance", srv.Listener.Addr().String(), "node", "n1"); !ok || v != 7 {
			t.Errorf("%s: orders_total = %v, %v; families: %v", wantType, v, ok, fams)
		}
		if v, _ := value(fams, "up", "job", "shop", "node", "n1"); v != 1 {
			t.Errorf("%s: up = %v", wantType, v)
		}
	}
	f("", "application/vnd.google.protobuf") // what we ask for
	f("text/plain", "text/plain; version=0.0.4")
	f("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0")
}

func TestFailuresSayTheReason(t *testing.T) {
	big := strings.Repeat("# a comment of forty bytes, again and on\n", MaxBody/40+1)
	f := func(name, want string, target Target, handler http.HandlerFunc) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			if handler != nil {
				srv := httptest.NewServer(handler)
				t.Cleanup(srv.Close)
				target.Address = srv.Listener.Addr().String()
			}
			target.Job = "j"
			s, reg := start(t, nil, target)
			st := settled(t, s)[0]
			if st.Up || st.Reason != want {
				t.Errorf("up %v, reason %q (%s), want %q", st.Up, st.Reason, st.Error, want)
			}
			fams, _ := s.Gather()
			if v, ok := value(fams, "up", "job", "j", "instance", target.Address); !ok || v != 0 {
				t.Errorf("up = %v, %v; want 0", v, ok)
			}
			got, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			if v, _ := value(got, "outrigger_scrape_failures_total", "job", "j", "reason", want); v != 1 {
				t.Errorf("failures counted: %v", got)
			}
		})
	}
	say := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			_, _ = io.WriteString(w, body)
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := ln.Addr().String()
	_ = ln.Close()
	f("nobody listens", "connect", Target{Address: gone}, nil)
	f("slow", "timeout", Target{Timeout: 50 * time.Millisecond}, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	f("not found", "status", Target{}, http.NotFound)
	f("html", "content_type", Target{}, say("text/html", "<html>"))
	f("no type", "content_type", Target{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, "a 1\n")
	})
	f("too large", "body_too_large", Target{}, say("text/plain", big))
	f("gzip bomb", "body_too_large", Target{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		_, _ = io.WriteString(z, big)
		_ = z.Close()
	})
	f("damaged", "parse", Target{}, say("text/plain", "a{ 1\n"))
	f("length that is not there", "parse", Target{}, say(
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited", "\xff\xff\xff\xff\xff\xff\x7f"))
	f("no token", "credentials", Target{Address: gone, TokenFile: "testdata/none"}, nil)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A target that stops answering is down at once, and its series vanish two
// intervals after its last good scrape; when it answers again they are back.
func TestSeriesOfASilentTargetGoStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var broken atomic.Bool
		n := 0
		tr := roundTrip(func(*http.Request) (*http.Response, error) {
			n++
			if broken.Load() {
				return nil, errors.New("no route to host")
			}
			return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"text/plain"}}, Body: io.NopCloser(strings.NewReader("a 1\n"))}, nil
		})
		s, reg := start(t, tr, Target{Job: "j", Address: "h:1", Interval: 10 * time.Second})
		expect := func(when string, up float64, series bool) {
			t.Helper()
			synctest.Wait()
			fams, _ := s.Gather()
			if v, ok := value(fams, "up"); !ok || v != up {
				t.Errorf("%s: up = %v, %v; want %v", when, v, ok, up)
			}
			if _, ok := value(fams, "a"); ok != series {
				t.Errorf("%s: series present %v, want %v", when, ok, series)
			}
		}
		time.Sleep(time.Second)
		expect("first scrape", 1, true)
		broken.Store(true)
		time.Sleep(10 * time.Second)
		expect("one failure", 0, true)
		time.Sleep(10 * time.Second)
		expect("over two intervals", 0, false)
		broken.Store(false)
		time.Sleep(10 * time.Second)
		expect("back", 1, true)
		if n != 4 {
			t.Errorf("%d scrapes, want 4", n)
		}
		if got := testutil.CollectAndCount(s.targets[0].counters.failures); got != 1 {
			t.Errorf("%d failure series in %v", got, reg)
		}
	})
}

func TestStoppingIsNotAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := roundTrip(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		s, err := New(Config{Targets: []Target{{Job: "j", Address: "h:1"}}}, Options{
			Logger: discard(), Registerer: prometheus.NewRegistry(), Transport: tr, Jitter: func(time.Duration) time.Duration { return 0 },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := s.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if fams, _ := s.Gather(); len(fams) != 0 {
			t.Errorf("published %v", fams)
		}
	})
}

// Two targets with the same family become one; a name with two types stays two
// families, for the output to decide. Snapshots are not changed by it.
func TestGatherMerges(t *testing.T) {
	answers := map[string]string{
		"a:1": "# TYPE x counter\nx 1\n# TYPE y gauge\ny 1\n",
		"b:1": "# TYPE x counter\nx 2\n# TYPE y counter\ny 2\n",
		"c:1": "# TYPE x counter\nx 3\n",
	}
	tr := roundTrip(func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"text/plain"}}, Body: io.NopCloser(strings.NewReader(answers[r.URL.Host]))}, nil
	})
	s, _ := start(t, tr, Target{Job: "j", Address: "a:1"}, Target{Job: "j", Address: "b:1"}, Target{Job: "j", Address: "c:1"})
	settled(t, s)
	for range 2 {
		fams, _ := s.Gather()
		var got []string
		for _, f := range fams {
			got = append(got, fmt.Sprintf("%s %s %d", f.GetName(), f.GetType(), len(f.Metric)))
		}
		want := []string{"scrape_duration_seconds GAUGE 3", "scrape_samples_scraped GAUGE 3", "up GAUGE 3", "x COUNTER 3", "y COUNTER 1", "y GAUGE 1"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
}

func TestConfig(t *testing.T) {
	ok := Target{Job: "j", Address: "127.0.0.1:1"}
	f := func(want string, change func(*Target)) {
		t.Helper()
		tg := ok
		change(&tg)
		err := Config{Targets: []Target{tg}}.Validate()
		if err == nil || !strings.HasPrefix(err.Error(), "scrape.targets[0]."+want) {
			t.Errorf("got %v, want an error of %s", err, want)
		}
	}
	f("job is empty", func(t *Target) { t.Job = "" })
	f(`address "localhost"`, func(t *Target) { t.Address = "localhost" })
	f(`scheme "ftp"`, func(t *Target) { t.Scheme = "ftp" })
	f(`path "metrics"`, func(t *Target) { t.Path = "metrics" })
	f("interval 1ms", func(t *Target) { t.Interval = time.Millisecond })
	f("timeout 20s", func(t *Target) { t.Timeout = 20 * time.Second })
	f("seriesLimit -1", func(t *Target) { t.SeriesLimit = -1 })
	f(`labels has the name "a-b"`, func(t *Target) { t.Labels = map[string]string{"a-b": ""} })
	f(`labels has the name "__x"`, func(t *Target) { t.Labels = map[string]string{"__x": ""} })
	f(`caFile "x"`, func(t *Target) { t.CAFile = "x" })
	if err := (Config{Targets: []Target{ok}}).Validate(); err != nil {
		t.Error(err)
	}
	if err := (Config{Targets: []Target{ok, ok}}).Validate(); err == nil || !strings.HasPrefix(err.Error(), "scrape.targets[1].address") {
		t.Errorf("twice: %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("# TYPE a counter\na{b=\"c\"} 1 2\n"), "text/plain; version=0.0.4")
	f.Add([]byte("\x05\n\x01a\x18\x03"), "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited")
	f.Add([]byte("# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n"), "text/plain")
	f.Add([]byte("a{job=\"x\",exported_job=\"y\"} 1\n"), "text/plain")
	ours := newTarget(Target{Job: "j", Address: "h:1"}, nil, counters{}, discard()).labels
	f.Fuzz(func(t *testing.T, body []byte, contentType string) {
		if strings.Contains(contentType, "openmetrics") || len(body) > 64<<10 {
			t.Skip() // that parser is fuzzed where it lives, and slow
		}
		families, err := decode(body, contentType)
		if err != nil {
			return
		}
		families, samples, dropped := finish(families, ours, false, 100, time.Unix(0, 0))
		if dropped > samples || samples-dropped > 100 {
			t.Fatalf("samples %d, dropped %d", samples, dropped)
		}
		for _, fam := range families {
			for _, m := range fam.Metric {
				for i, l := range m.Label {
					if i > 0 && l.GetName() <= m.Label[i-1].GetName() {
						t.Fatalf("labels of %s are not sorted and unique: %v", fam.GetName(), m.Label)
					}
				}
			}
			if _, err := expfmt.MetricFamilyToText(io.Discard, fam); err != nil {
				t.Fatal(err)
			}
		}
	})
}
