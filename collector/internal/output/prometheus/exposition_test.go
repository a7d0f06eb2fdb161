package prometheus

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	client "github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/outrigger-mesh/outrigger/collector/internal/scrape"
)

// source is a fake target's exposition, parsed by the library's parser.
func source(t *testing.T, exposition string) client.Gatherer {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(strings.NewReader(exposition))
	if err != nil {
		t.Fatal(err)
	}
	return client.GathererFunc(func() ([]*dto.MetricFamily, error) {
		var out []*dto.MetricFamily
		for _, f := range families {
			out = append(out, f)
		}
		return out, nil
	})
}

func exposition(t *testing.T, sources ...client.Gatherer) (*Exposition, *client.Registry) {
	t.Helper()
	reg := client.NewPedanticRegistry()
	e, err := New(Options{Logger: slog.New(slog.DiscardHandler), Registerer: reg, Sources: sources})
	if err != nil {
		t.Fatal(err)
	}
	return e, reg
}

// pull scrapes the handler over real HTTP and parses the answer as another
// program would.
func pull(t *testing.T, h http.Handler, accept string) (contentType, text string) {
	t.Helper()
	srv := httptest.NewServer(h)
	defer srv.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s: %s", resp.Status, body)
	}
	format := expfmt.ResponseFormat(resp.Header)
	dec := expfmt.NewDecoder(resp.Body, format)
	families := map[string]*dto.MetricFamily{}
	var names []string
	for {
		f := &dto.MetricFamily{}
		err := dec.Decode(f)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%s is not parsed: %v", format, err)
		}
		names = append(names, f.GetName())
		families[f.GetName()] = f
	}
	if len(names) != len(families) {
		t.Errorf("a family appears twice: %v", names)
	}
	reg := client.GathererFunc(func() ([]*dto.MetricFamily, error) {
		var out []*dto.MetricFamily
		for _, f := range families {
			out = append(out, f)
		}
		return out, nil
	})
	// The library's own merging refuses what is inconsistent.
	sorted, err := client.Gatherers{reg}.Gather()
	if err != nil {
		t.Errorf("inconsistent: %v", err)
	}
	var b strings.Builder
	for _, f := range sorted {
		f.Help = nil
		if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	return resp.Header.Get("Content-Type"), b.String()
}

func TestRealScrapeInEveryFormat(t *testing.T) {
	e, _ := exposition(t,
		source(t, "# TYPE orders_total counter\norders_total{job=\"a\"} 1 1234\n# TYPE lat histogram\nlat_bucket{le=\"1\"} 1\nlat_bucket{le=\"+Inf\"} 2\nlat_sum 3\nlat_count 2\n"),
		source(t, "# TYPE orders_total counter\norders_total{job=\"b\"} 2 5678\n"),
	)
	want := `# TYPE lat histogram
lat_bucket{le="1"} 1
lat_bucket{le="+Inf"} 2
lat_sum 3
lat_count 2
# TYPE orders_total counter
orders_total{job="a"} 1
orders_total{job="b"} 2
`
	f := func(accept, wantType string) {
		t.Helper()
		contentType, got := pull(t, e, accept)
		if !strings.HasPrefix(contentType, wantType) {
			t.Errorf("content type %q, want %q", contentType, wantType)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", contentType, diff)
		}
	}
	f("*/*", "text/plain; version=0.0.4")
	f("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0")
	f("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited", "application/vnd.google.protobuf")
}

func TestConflicts(t *testing.T) {
	f := func(name, want string, wantCounts map[string]float64, sources ...string) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			var gs []client.Gatherer
			for _, s := range sources {
				gs = append(gs, source(t, s))
			}
			e, reg := exposition(t, gs...)
			if _, got := pull(t, e, "text/plain"); got != want {
				t.Errorf("-want +got:\n%s", cmp.Diff(want, got))
			}
			counts := map[string]float64{}
			families, err := reg.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, fam := range families {
				for _, m := range fam.Metric {
					if fam.GetName() == "outrigger_exposition_conflicts_total" && m.Counter.GetValue() > 0 {
						counts[m.Label[0].GetValue()] = m.Counter.GetValue()
					}
				}
			}
			if diff := cmp.Diff(wantCounts, counts); diff != "" {
				t.Errorf("counted: -want +got:\n%s", diff)
			}
		})
	}
	f("numbers become untyped", "# TYPE x untyped\nx{j=\"a\"} 1\nx{j=\"b\"} 2\nx{j=\"c\"} 3\n",
		map[string]float64{"type_untyped": 2},
		"# TYPE x counter\nx{j=\"a\"} 1\n", "# TYPE x gauge\nx{j=\"b\"} 2\n", "x{j=\"c\"} 3\n")
	f("the type with more series stays", "# TYPE x gauge\nx{j=\"a\"} 1\nx{j=\"b\"} 2\n",
		map[string]float64{"type_dropped": 1},
		"# TYPE x summary\nx_sum{j=\"s\"} 1\nx_count{j=\"s\"} 1\n", "# TYPE x gauge\nx{j=\"a\"} 1\nx{j=\"b\"} 2\n")
	f("an untyped majority does not untype a summary", "# TYPE x untyped\nx{j=\"a\"} 1\nx{j=\"b\"} 2\n",
		map[string]float64{"type_dropped": 1},
		"# TYPE x summary\nx_sum{j=\"s\"} 1\nx_count{j=\"s\"} 1\n", "x{j=\"a\"} 1\nx{j=\"b\"} 2\n")
	f("of a series twice the first stays", "# TYPE x gauge\nx{a=\"1\",b=\"2\"} 1\n",
		map[string]float64{"duplicate": 1},
		"# TYPE x gauge\nx{a=\"1\",b=\"2\"} 1\n", "# TYPE x gauge\nx{b=\"2\",a=\"1\"} 9\n")
	f("no conflict", "# TYPE x gauge\nx{j=\"a\"} 1\n", map[string]float64{}, "# TYPE x gauge\nx{j=\"a\"} 1\n")
}

// Gathering must not change what a source owns, whatever conflicts there are.
func TestSourcesAreNotChanged(t *testing.T) {
	a := source(t, "# TYPE x counter\nx 1 1234\n")
	e, _ := exposition(t, a, source(t, "# TYPE x gauge\nx{j=\"b\"} 2\n"))
	before, _ := a.Gather()
	was := before[0].String()
	for range 2 {
		if _, err := e.Gather(); err != nil {
			t.Fatal(err)
		}
	}
	if now := before[0].String(); now != was {
		t.Errorf("was %s\nis %s", was, now)
	}
}

func TestASourceThatFailsIsCountedAndItsRestExposed(t *testing.T) {
	half := client.GathererFunc(func() ([]*dto.MetricFamily, error) {
		f, _ := source(t, "a 1\n").Gather()
		return f, errors.New("the other half")
	})
	e, reg := exposition(t, half)
	if _, got := pull(t, e, ""); got != "# TYPE a untyped\na 1\n" {
		t.Errorf("got %q", got)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "outrigger_exposition_source_errors_total" && f.Metric[0].Counter.GetValue() == 1 {
			return
		}
	}
	t.Errorf("not counted: %v", families)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A target that goes down: up is 0 at once, its series leave the exposition
// after two intervals.
func TestDownTargetsVanish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		tr := roundTrip(func(*http.Request) (*http.Response, error) {
			if down.Load() {
				return nil, errors.New("connection refused")
			}
			return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {"text/plain"}}, Body: io.NopCloser(strings.NewReader("a 1\n"))}, nil
		})
		s, err := scrape.New(scrape.Config{Targets: []scrape.Target{{Job: "j", Address: "h:1"}}}, scrape.Options{
			Logger: slog.New(slog.DiscardHandler), Registerer: client.NewRegistry(), Transport: tr,
			Jitter: func(time.Duration) time.Duration { return 0 },
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		e, _ := exposition(t, s)
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			rec := httptest.NewRecorder()
			e.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/metrics", nil))
			var got []string
			for line := range strings.Lines(rec.Body.String()) {
				if strings.HasPrefix(line, "a{") || strings.HasPrefix(line, "up{") {
					got = append(got, strings.TrimSpace(line))
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("after %s: -want +got:\n%s", time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)), diff)
			}
		}
		time.Sleep(time.Second)
		expect(`a{instance="h:1",job="j"} 1`, `up{instance="h:1",job="j"} 1`)
		down.Store(true)
		time.Sleep(scrape.DefaultInterval)
		expect(`a{instance="h:1",job="j"} 1`, `up{instance="h:1",job="j"} 0`)
		time.Sleep(scrape.DefaultInterval)
		expect(`up{instance="h:1",job="j"} 0`)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
