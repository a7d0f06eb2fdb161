//go:build peers

package influxdb

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// A real VictoriaMetrics takes our points and gives every one of them back,
// with its name, labels, value and time. It is started by
// deploy/peers/victoriametrics.sh.
func TestRealVictoriaMetrics(t *testing.T) {
	base := os.Getenv("OUTRIGGER_VM_URL")
	if base == "" {
		t.Skip("OUTRIGGER_VM_URL is not set: run deploy/peers/victoriametrics.sh go test -tags peers ./collector/internal/output/influxdb/")
	}
	const n = 12_000
	stamp := time.Now().Add(-time.Minute).Truncate(time.Millisecond)
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "peer_gauge{i=\"%d\"} %d.5 %d\n", i, i, stamp.UnixMilli())
	}
	fmt.Fprintf(&b, "# TYPE peer_latency histogram\npeer_latency_bucket{path=\"/a b,c=d\",le=\"0.5\"} 1 %[1]d\npeer_latency_bucket{path=\"/a b,c=d\",le=\"+Inf\"} 2 %[1]d\npeer_latency_sum{path=\"/a b,c=d\"} 0.75 %[1]d\npeer_latency_count{path=\"/a b,c=d\"} 2 %[1]d\n", stamp.UnixMilli())
	fmt.Fprintf(&b, "# TYPE peer_summary summary\npeer_summary{quantile=\"0.9\"} NaN %[1]d\npeer_summary_sum 1e+300 %[1]d\npeer_summary_count 3 %[1]d\n", stamp.UnixMilli())

	r := run(t, Config{URL: base, BatchSize: 5000}, fixed(families(t, b.String())), nil)
	const want = n + 4 + 2
	eventually(t, "all written", func() bool { return r.counts(t)["points_written_total"] == want })
	r.stop()
	if c := r.counts(t, "requests_total", "points_dropped_total"); !cmp.Equal(c, map[string]float64{"requests_total 204": 3, "points_dropped_total not_finite": 1}) {
		t.Errorf("counts %v", c)
	}

	get(t, base+"/internal/force_flush")
	type row struct {
		Metric     map[string]string `json:"metric"`
		Values     []float64         `json:"values"`
		Timestamps []int64           `json:"timestamps"`
	}
	got := map[string]row{}
	lines := bufio.NewScanner(strings.NewReader(get(t, base+"/api/v1/export?match[]="+url.QueryEscape(`{__name__=~"peer_.*"}`))))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var x row
		if err := json.Unmarshal(lines.Bytes(), &x); err != nil {
			t.Fatal(err)
		}
		delete(x.Metric, "db") // the bucket, which the server adds
		key, err := json.Marshal(x.Metric)
		if err != nil {
			t.Fatal(err)
		}
		got[string(key)] = x
	}
	if len(got) != want {
		t.Errorf("%d series came back, want %d", len(got), want)
	}
	f := func(labels string, value float64) {
		t.Helper()
		x, ok := got[labels]
		if !ok || len(x.Values) != 1 || x.Values[0] != value || x.Timestamps[0] != stamp.UnixMilli() {
			t.Errorf("%s: %v, want %v at %d", labels, x, value, stamp.UnixMilli())
		}
	}
	for i := range n {
		f(fmt.Sprintf(`{"__name__":"peer_gauge","i":"%d"}`, i), float64(i)+0.5)
	}
	f(`{"__name__":"peer_latency_bucket","le":"0.5","path":"/a b,c=d"}`, 1)
	f(`{"__name__":"peer_latency_bucket","le":"+Inf","path":"/a b,c=d"}`, 2)
	f(`{"__name__":"peer_latency_sum","path":"/a b,c=d"}`, 0.75)
	f(`{"__name__":"peer_latency_count","path":"/a b,c=d"}`, 2)
	f(`{"__name__":"peer_summary_sum"}`, 1e300)
	f(`{"__name__":"peer_summary_count"}`, 3)

	// PromQL works on what has been written.
	if q := get(t, base+"/api/v1/query?query="+url.QueryEscape("count(peer_gauge)")+"&time="+fmt.Sprint(stamp.Unix()+1)); !strings.Contains(q, fmt.Sprintf("%q", fmt.Sprint(n))) {
		t.Errorf("count(peer_gauge): %s", q)
	}
}

// The same points sent twice are the same points: a resend after a lost answer
// adds nothing.
func TestRealVictoriaMetricsResend(t *testing.T) {
	base := os.Getenv("OUTRIGGER_VM_URL")
	if base == "" {
		t.Skip("OUTRIGGER_VM_URL is not set: run deploy/peers/victoriametrics.sh go test -tags peers ./collector/internal/output/influxdb/")
	}
	stamp := time.Now().Add(-time.Minute).UnixMilli()
	f := families(t, fmt.Sprintf("peer_resend 7 %d\n", stamp))
	var source prometheus.Gatherer = prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return f, nil })
	s, err := New(Config{URL: base, Bucket: "metrics"}, Options{Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), Source: source})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		s.gatherOnce(time.Now())
		b := s.queue.take(t.Context())
		if v := s.attempt(t.Context(), b); v.kind != kindWritten {
			t.Fatal(v.err)
		}
		s.queue.giveBack()
	}
	s.tr.CloseIdleConnections()
	get(t, base+"/internal/force_flush")
	q := get(t, base+"/api/v1/query?query="+url.QueryEscape("peer_resend")+fmt.Sprintf("&time=%d", stamp/1000+1))
	if !strings.Contains(q, `"7"`) || strings.Count(q, "peer_resend") != 1 {
		t.Errorf("query: %s", q)
	}
}

func get(t *testing.T, u string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, u, nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	if err := resp.Body.Close(); err != nil {
		t.Fatal(err)
	}
	if err != nil || resp.StatusCode/100 != 2 {
		t.Fatalf("%s: %s %v\n%s", u, resp.Status, err, body)
	}
	return string(body)
}
