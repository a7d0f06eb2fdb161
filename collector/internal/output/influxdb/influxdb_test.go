package influxdb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	protocol "github.com/influxdata/line-protocol"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func families(t testing.TB, exposition string) []*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := p.TextToMetricFamilies(strings.NewReader(exposition))
	if err != nil {
		t.Fatal(err)
	}
	var out []*dto.MetricFamily
	for _, f := range byName {
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

func fixed(f []*dto.MetricFamily) prometheus.Gatherer {
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return f, nil })
}

// numbered is n gauges m{i="..."} i with a timestamp.
func numbered(t testing.TB, n int) []*dto.MetricFamily {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "m{i=\"%04d\"} %d 1000\n", i, i)
	}
	return families(t, b.String())
}

type running struct {
	*Sink
	reg *prometheus.Registry
	log *bytes.Buffer // read it once stopped
	// stop ends Run and waits for it.
	stop func()
}

// run starts a sink that gathers at once and then hourly.
func run(t *testing.T, conf Config, source prometheus.Gatherer, tr http.RoundTripper) running {
	t.Helper()
	if conf.Org == "" {
		conf.Org, conf.Bucket = "acme", "metrics"
	}
	if conf.Interval == 0 {
		conf.Interval = time.Hour
	}
	if conf.Backoff.Initial == 0 {
		conf.Backoff = Backoff{Initial: time.Millisecond, Max: 10 * time.Millisecond}
	}
	log := &bytes.Buffer{}
	reg := prometheus.NewPedanticRegistry()
	s, err := New(conf, Options{
		Logger: slog.New(slog.NewTextHandler(log, nil)), Registerer: reg, Source: source, Transport: tr,
		Jitter: func(time.Duration) time.Duration { return 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return running{s, reg, log, stop}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10s: %s", what)
		}
	}
}

// counts returns the counters and gauges that are not 0, without the prefix.
func (r running) counts(t *testing.T, names ...string) map[string]float64 {
	t.Helper()
	fams, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range fams {
		short := strings.TrimPrefix(f.GetName(), "outrigger_influxdb_")
		if len(names) > 0 && !slices.Contains(names, short) {
			continue
		}
		for _, m := range f.Metric {
			if len(m.Label) > 0 {
				short = strings.TrimPrefix(f.GetName(), "outrigger_influxdb_") + " " + m.Label[0].GetValue()
			}
			if v := m.GetCounter().GetValue() + m.GetGauge().GetValue(); v != 0 {
				out[short] = v
			}
		}
	}
	return out
}

// The ledger closes: what was queued was written, dropped or waits.
func (r running) ledger(t *testing.T) {
	t.Helper()
	c := r.counts(t)
	sum := c["points_written_total"] + c["points_waiting"]
	for _, cause := range []string{causeQueueFull, causeRejected, causeTooLarge, causeShutdown} {
		sum += c["points_dropped_total "+cause]
	}
	if sum != c["points_total"] {
		t.Errorf("the ledger does not close: %v", c)
	}
}

func TestWrites(t *testing.T) {
	const exposition = `# TYPE c counter
c{a="x,y =z",b="back\\slash\\",time="1",e=""} 1.5 1000
# TYPE h histogram
h_bucket{j="k",le="0.5"} 1 1000
h_bucket{j="k",le="+Inf"} 2 1000
h_sum{j="k"} 3 1000
h_count{j="k"} 2 1000
# TYPE s summary
s{quantile="0.9"} 7 1000
s{quantile="0.99"} NaN 1000
s_sum 8 1000
s_count 9 1000
# TYPE g gauge
g +Inf 1000
# TYPE u untyped
u 1e300 1000
`
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := &fakeInflux{t: t, token: "s3cret"}
	r := run(t, Config{URL: f.start(), TokenFile: token, BatchSize: 3}, fixed(families(t, exposition)), nil)
	eventually(t, "all written", func() bool { return r.counts(t)["points_written_total"] == 9 })
	r.stop()
	want := []string{
		`c,a=x,y =z,b=back\slash/,exported_time=1 @1000000000 1.5`,
		"h_bucket,j=k,le=+Inf @1000000000 2",
		"h_bucket,j=k,le=0.5 @1000000000 1",
		"h_count,j=k @1000000000 2",
		"h_sum,j=k @1000000000 3",
		"s,quantile=0.9 @1000000000 7",
		"s_count @1000000000 9",
		"s_sum @1000000000 8",
		"u @1000000000 1e+300",
	}
	if diff := cmp.Diff(want, f.stored()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	wantCounts := map[string]float64{"points_total": 9, "points_written_total": 9, "points_dropped_total not_finite": 2, "points_waiting_max": DefaultQueuePoints, "requests_total 204": 3}
	if diff := cmp.Diff(wantCounts, r.counts(t)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if strings.Contains(r.log.String(), "s3cret") {
		t.Error("the log holds the token")
	}
}

func TestRetries(t *testing.T) {
	f := func(name string, wantRequests map[string]float64, atLeast time.Duration, script ...func(http.ResponseWriter, int) bool) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			fake := &fakeInflux{t: t, script: script}
			start := time.Now()
			r := run(t, Config{URL: fake.start()}, fixed(numbered(t, 10)), nil)
			eventually(t, "all written", func() bool { return r.counts(t)["points_written_total"] == 10 })
			if took := time.Since(start); took < atLeast {
				t.Errorf("took %s, want at least %s", took, atLeast)
			}
			if diff := cmp.Diff(wantRequests, r.counts(t, "requests_total")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if n := len(fake.stored()); n != 10 {
				t.Errorf("%d points stored", n)
			}
			r.stop()
			r.ledger(t)
		})
	}
	f("429 says when to return", map[string]float64{"requests_total 429": 1, "requests_total 204": 1}, time.Second,
		status(429, "", "Retry-After", "1"))
	f("503", map[string]float64{"requests_total 503": 2, "requests_total 204": 1}, 0,
		status(503, "down"), status(503, "down"))
	f("500 with a body that has no end", map[string]float64{"requests_total 500": 1, "requests_total 204": 1}, 0,
		status(500, strings.Repeat("x", 1<<20)))
	f("a broken connection", map[string]float64{"requests_total none": 1, "requests_total 204": 1}, 0,
		func(w http.ResponseWriter, _ int) bool {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_ = conn.Close()
			}
			return true
		})
}

func TestRejections(t *testing.T) {
	bad := "bad{i=\"1\"} 1 1000\nbad{i=\"2\"} 2 1000\n"
	f := func(name, style string, maxRequests int) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			fake := &fakeInflux{t: t, style: style, refuse: map[string]bool{"bad": true}}
			r := run(t, Config{URL: fake.start()}, fixed(append(numbered(t, 50), families(t, bad)...)), nil)
			eventually(t, "all judged", func() bool { c := r.counts(t); return c["points_total"] == 52 && c["points_waiting"] == 0 })
			r.stop()
			want := map[string]float64{"points_written_total": 50, "points_dropped_total rejected": 2}
			if diff := cmp.Diff(want, r.counts(t, "points_written_total", "points_dropped_total")); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if n := len(fake.stored()); n != 50 {
				t.Errorf("%d points stored", n)
			}
			if fake.requests > maxRequests {
				t.Errorf("%d requests, want at most %d", fake.requests, maxRequests)
			}
			r.ledger(t)
		})
	}
	f("InfluxDB 2 says how many", "2", 1)
	f("InfluxDB 3 lists them", "3", 1)
	f("a vague refusal is halved down to the points", "vague", 14)

	t.Run("nothing but bad points is given up in bounded time", func(t *testing.T) {
		fake := &fakeInflux{t: t, style: "vague", refuse: map[string]bool{"m": true}}
		r := run(t, Config{URL: fake.start()}, fixed(numbered(t, 1000)), nil)
		eventually(t, "all dropped", func() bool { return r.counts(t)["points_dropped_total rejected"] == 1000 })
		if fake.requests > 127 {
			t.Errorf("%d requests", fake.requests)
		}
	})
	t.Run("413 halves the batch until it fits", func(t *testing.T) {
		fake := &fakeInflux{t: t, maxLines: 10}
		r := run(t, Config{URL: fake.start()}, fixed(numbered(t, 80)), nil)
		eventually(t, "all written", func() bool { return r.counts(t)["points_written_total"] == 80 })
		if n := len(fake.stored()); n != 80 {
			t.Errorf("%d points stored", n)
		}
		r.stop()
		r.ledger(t)
	})
}

// What only a person can mend keeps the points, says the remedy, and a new
// token works without a restart.
func TestPermanent(t *testing.T) {
	f := func(name, want string, conf Config, script ...func(http.ResponseWriter, int) bool) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			fake := &fakeInflux{t: t, script: script}
			if len(script) == 0 {
				fake.token = "right"
			}
			conf.URL, conf.Org = fake.start(), "acme"
			if conf.Bucket == "" {
				conf.Bucket = "metrics"
			}
			r := run(t, conf, fixed(numbered(t, 10)), nil)
			eventually(t, "an error", func() bool { return r.Status().Permanent })
			st := r.Status()
			if !strings.Contains(st.Error, want) {
				t.Errorf("error %q, want %q", st.Error, want)
			}
			if st.Waiting != 10 || st.Breaker != "closed" {
				t.Errorf("status %+v", st)
			}
			r.stop()
			if got := r.counts(t)["points_dropped_total shutdown"]; got != 10 {
				t.Errorf("%v points dropped at shutdown, want 10", got)
			}
			if log := r.log.String(); strings.Count(log, "level=ERROR") != 1 || strings.Contains(log, "wrong-token") {
				t.Errorf("log: %s", log)
			}
			r.ledger(t)
		})
	}
	wrong := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(wrong, []byte("wrong-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	f("no token", "name it in influxdb.tokenFile", Config{})
	f("wrong token", "is wrong or revoked; replace the file's content", Config{TokenFile: wrong})
	f("no right", "give it the write permission", Config{}, status(403, `{"code":"forbidden","message":"insufficient permissions"}`, "Content-Type", "application/json"))
	f("no bucket", "create the bucket", Config{Bucket: "other"}, status(404, ""))
	f("a login page", "the write API answers 204", Config{}, status(200, "<html>log in</html>"))
	f("a redirect", "this is not an answer of the write API", Config{}, status(302, "", "Location", "/login"))
}

func TestANewTokenNeedsNoRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		token := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(token, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		r := run(t, Config{URL: "http://db", TokenFile: token}, fixed(numbered(t, 10)), roundTrip(func(req *http.Request) (*http.Response, error) {
			if req.Header.Get("Authorization") != "Token new" {
				return reply(req, 401), nil
			}
			return reply(req, 204), nil
		}))
		synctest.Wait()
		if !r.Status().Permanent {
			t.Fatalf("status %+v", r.Status())
		}
		if err := os.WriteFile(token, []byte("new"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(PermanentRetry)
		synctest.Wait()
		if st := r.Status(); st.Waiting != 0 || st.Error != "" {
			t.Errorf("status %+v", st)
		}
		r.stop()
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func reply(r *http.Request, code int) *http.Response {
	_, _ = io.Copy(io.Discard, r.Body)
	_ = r.Body.Close()
	return &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{}, Body: http.NoBody, Request: r}
}

// A database that is away: the breaker opens, few attempts are made, the queue
// holds its limit and drops the oldest, counted; when it is back the newest are
// written.
func TestLongOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var back atomic.Bool
		var attempts, written atomic.Int64
		round := 0
		source := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
			round++
			return families(t, fmt.Sprintf("m{round=\"%d\"} 1 1000\nn{round=\"%d\"} 1 1000\n", round, round)), nil
		})
		tr := roundTrip(func(r *http.Request) (*http.Response, error) {
			attempts.Add(1)
			if !back.Load() {
				_ = r.Body.Close()
				return nil, errors.New("connection refused")
			}
			written.Add(1)
			return reply(r, 204), nil
		})
		r := run(t, Config{
			URL: "http://db", Interval: 10 * time.Second, BatchSize: 2, QueuePoints: 20,
			Backoff: Backoff{Initial: time.Second, Max: time.Minute}, Breaker: Breaker{ConsecutiveFailures: 3, OpenFor: 30 * time.Second},
		}, source, tr)
		time.Sleep(time.Hour - time.Second)
		synctest.Wait()
		c := r.counts(t)
		if c["points_total"] != 720 || c["points_waiting"] != 20 || c["points_dropped_total queue_full"] != 700 {
			t.Errorf("after an hour: %v", c)
		}
		if n := attempts.Load(); n < 40 || n > 125 {
			t.Errorf("%d attempts in an hour", n)
		}
		if st := r.Status(); st.Breaker == "closed" || st.Error == "" || st.Permanent {
			t.Errorf("status %+v", st)
		}
		back.Store(true)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if c := r.counts(t); c["points_waiting"] != 0 || c["points_total"] != c["points_written_total"]+c["points_dropped_total queue_full"] {
			t.Errorf("after it is back: %v", c)
		}
		if written.Load() < 10 {
			t.Errorf("%d batches written", written.Load())
		}
		r.stop()
		r.ledger(t)
	})
}

// At the end the sink sends what waits, for Grace at most, and counts the rest.
func TestShutdown(t *testing.T) {
	f := func(name string, wantWritten, wantDropped float64, atMost time.Duration, tr roundTrip) {
		t.Helper()
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := run(t, Config{URL: "http://db", BatchSize: 10}, fixed(numbered(t, 30)), tr)
				time.Sleep(time.Second)
				start := time.Now()
				r.stop()
				if took := time.Since(start); took > atMost {
					t.Errorf("took %s, want at most %s", took, atMost)
				}
				c := r.counts(t)
				if c["points_written_total"] != wantWritten || c["points_dropped_total shutdown"] != wantDropped {
					t.Errorf("counts %v", c)
				}
				r.ledger(t)
			})
		})
	}
	f("a slow server gets what waits", 30, 0, 4*time.Second, func(r *http.Request) (*http.Response, error) {
		time.Sleep(1500 * time.Millisecond)
		return reply(r, 204), nil
	})
	f("a hanging one does not keep us", 0, 30, Grace, func(r *http.Request) (*http.Response, error) {
		<-r.Context().Done()
		_ = r.Body.Close()
		return nil, r.Context().Err()
	})
	f("an absent one is asked no more", 0, 30, 0, func(r *http.Request) (*http.Response, error) {
		_ = r.Body.Close()
		return nil, errors.New("connection refused")
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f := func(header string, want time.Duration) {
		t.Helper()
		if got := (answer{header: http.Header{"Retry-After": {header}}}).retryAfter(now); got != want {
			t.Errorf("Retry-After %q: %s, want %s", header, got, want)
		}
	}
	f("", 0)
	f("7", 7*time.Second)
	f("-7", 0)
	f("soon", 0)
	f("999999", MaxRetryAfter)
	f("Mon, 23 Nov 2026 12:00:30 GMT", 30*time.Second)
	f("Mon, 23 Nov 2026 11:00:00 GMT", 0)
	f("Tue, 24 Nov 2026 12:00:00 GMT", MaxRetryAfter)
}

func TestConfig(t *testing.T) {
	f := func(want string, change func(*Config)) {
		t.Helper()
		c := Config{URL: "https://db:8086", Bucket: "b"}
		change(&c)
		err := c.Validate()
		if want == "" {
			if err != nil {
				t.Error(err)
			}
			return
		}
		if err == nil || !strings.HasPrefix(err.Error(), "influxdb."+want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("got %v, want an error of %s", err, want)
		}
	}
	f("", func(*Config) {})
	f("url is empty", func(c *Config) { c.URL = "" })
	f(`url "db:8086"`, func(c *Config) { c.URL = "db:8086" })
	f(`url "https://u:xxxxx@db" holds a password`, func(c *Config) { c.URL = "https://u:secret@db" })
	f(`url "https://db?org=a" has a query`, func(c *Config) { c.URL = "https://db?org=a" })
	f("bucket is empty", func(c *Config) { c.Bucket = "" })
	f("interval 1ms", func(c *Config) { c.Interval = time.Millisecond })
	f("batchSize -1", func(c *Config) { c.BatchSize = -1 })
	f("queuePoints 10", func(c *Config) { c.QueuePoints = 10 })
	f("timeout -1s", func(c *Config) { c.Timeout = -time.Second })
	f("backoff initial 2s, max 1s", func(c *Config) { c.Backoff = Backoff{2 * time.Second, time.Second} })
	f("breaker.consecutiveFailures -1", func(c *Config) { c.Breaker.ConsecutiveFailures = -1 })
	f("breaker.openFor -1s", func(c *Config) { c.Breaker.OpenFor = -time.Second })
	f(`certFile "c"`, func(c *Config) { c.CertFile = "c" })
	f(`url "http://db"`, func(c *Config) { c.URL, c.CAFile = "http://db", "ca" })
}

// Every line that is written is one line to the project's own parser, with the
// same value and time, and no tag is lost or splits in two.
func FuzzLine(f *testing.F) {
	f.Add("m", "k", "v", 1.0, int64(1))
	f.Add("m,n o=p", "time", `a\`, math.MaxFloat64, int64(-1))
	f.Add("m\n", "k=\\", "\t\r\n,= ", 1e-300, int64(0))
	f.Fuzz(func(t *testing.T, name, key, value string, v float64, ts int64) {
		var dropped int
		var got []*batch
		e := encoder{now: time.Unix(0, ts), batchSize: 10, dropped: func(string, int) { dropped++ }, emit: func(b *batch) { got = append(got, b) }}
		e.point(name, []*dto.LabelPair{{Name: &key, Value: &value}}, "", "", v, ts)
		e.flush()
		if dropped+len(got) != 1 {
			t.Fatalf("dropped %d, batches %d", dropped, len(got))
		}
		if dropped == 1 {
			return
		}
		if strings.Count(got[0].text, "\n") != 1 {
			t.Fatalf("not one line: %q", got[0].text)
		}
		if !model.UTF8Validation.IsValidMetricName(name) || !model.UTF8Validation.IsValidLabelName(key) || strings.ContainsAny(name+key+value, "\x00\\\"") {
			return // names that no target can give us, and where parsers differ
		}
		ms, err := protocol.NewParser(protocol.NewMetricHandler()).Parse([]byte(got[0].text))
		if err != nil || len(ms) != 1 {
			t.Fatalf("%q: %v, %d metrics", got[0].text, err, len(ms))
		}
		tags := 0
		if key != "" && value != "" {
			tags = 1
		}
		if len(ms[0].TagList()) != tags || len(ms[0].FieldList()) != 1 || ms[0].FieldList()[0].Value != v || ms[0].Time().UnixNano() != ts {
			t.Fatalf("%q: %v", got[0].text, ms[0])
		}
	})
}

func BenchmarkEncode(b *testing.B) {
	f := numbered(b, 5000)
	e := encoder{now: time.Unix(1, 0), batchSize: DefaultBatchSize, dropped: func(string, int) {}, emit: func(x *batch) { b.SetBytes(int64(len(x.text))) }}
	b.ReportAllocs()
	for b.Loop() {
		e.family(f[0])
		e.flush()
	}
}
