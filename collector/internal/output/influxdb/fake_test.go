package influxdb

import (
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	protocol "github.com/influxdata/line-protocol"
)

// fakeInflux is a strict fake of InfluxDB's write endpoint: it refuses what the
// server refuses, reads line protocol with the project's own parser, and keeps
// one value per measurement, tags and timestamp. It is not InfluxDB; the peer
// test runs against a real server.
type fakeInflux struct {
	t     *testing.T
	token string
	// script answers the first requests; false lets one through. Guarded by mu.
	script []func(w http.ResponseWriter, lines int) bool
	// refuse names measurements that the server takes no points of; said in the
	// style of InfluxDB 2 (with a count), 3 (with a list) or vaguely.
	refuse map[string]bool
	style  string
	// maxLines over which the answer is 413.
	maxLines int

	mu       sync.Mutex
	points   map[string]float64
	requests int
}

func (f *fakeInflux) start() string {
	f.points = map[string]float64{}
	srv := httptest.NewServer(f)
	f.t.Cleanup(srv.Close)
	return srv.URL
}

func (f *fakeInflux) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests++
	fail := func(code int, kind, format string, args ...any) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.WriteHeader(code)
		_, _ = fmt.Fprintf(w, `{"code":%q,"message":%q}`, kind, fmt.Sprintf(format, args...))
	}
	if r.Method != http.MethodPost || r.URL.Path != "/api/v2/write" {
		f.t.Errorf("%s %s is not the write API", r.Method, r.URL)
		fail(404, "not found", "path not found")
		return
	}
	q := r.URL.Query()
	if q.Get("org") != "acme" || q.Get("precision") != "ns" {
		f.t.Errorf("query %v", q)
	}
	if f.token != "" && r.Header.Get("Authorization") != "Token "+f.token {
		fail(401, "unauthorized", "unauthorized access")
		return
	}
	if q.Get("bucket") != "metrics" {
		fail(404, "not found", "bucket %q not found", q.Get("bucket"))
		return
	}
	if r.Header.Get("Content-Encoding") != "gzip" {
		f.t.Error("the body is not gzip")
		return
	}
	z, err := gzip.NewReader(r.Body)
	if err != nil {
		f.t.Error(err)
		return
	}
	body, err := io.ReadAll(z)
	if err != nil {
		f.t.Error(err)
		return
	}
	handler := protocol.NewMetricHandler()
	metrics, err := protocol.NewParser(handler).Parse(body)
	if err != nil {
		f.t.Errorf("not line protocol: %v\n%s", err, body)
		fail(400, "invalid", "unable to parse: %v", err)
		return
	}
	if len(f.script) > 0 {
		next := f.script[0]
		f.script = f.script[1:]
		if next(w, len(metrics)) {
			return
		}
	}
	if f.maxLines > 0 && len(metrics) > f.maxLines {
		fail(413, "request too large", "unable to read data: points batch is too large")
		return
	}
	refused := 0
	for _, m := range metrics {
		if f.refuse[m.Name()] {
			refused++
		}
	}
	if refused > 0 && f.style == "vague" { // nothing is stored
		fail(400, "invalid", "unable to parse points")
		return
	}
	for _, m := range metrics {
		if f.refuse[m.Name()] {
			continue
		}
		fields := m.FieldList()
		v, isFloat := fields[0].Value.(float64)
		if len(fields) != 1 || fields[0].Key != "value" || !isFloat {
			f.t.Errorf("fields of %s: %v", m.Name(), fields)
		}
		f.points[fmt.Sprintf("%s @%d", series(m), m.Time().UnixNano())] = v
	}
	switch {
	case refused == 0:
		w.WriteHeader(http.StatusNoContent)
	case f.style == "3":
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(400)
		_, _ = fmt.Fprintf(w, `{"error":"partial write of line protocol occurred","data":[%s]}`,
			strings.TrimSuffix(strings.Repeat(`{"original_line":"x","line_number":1,"error_message":"invalid column type"},`, refused), ","))
	default:
		fail(422, "unprocessable entity", "failure writing points to database: partial write: field type conflict: input field \"value\" on measurement \"m\" is type float, already exists as type integer dropped=%d", refused)
	}
}

func series(m protocol.Metric) string {
	var b strings.Builder
	b.WriteString(m.Name())
	for _, tag := range m.TagList() {
		fmt.Fprintf(&b, ",%s=%s", tag.Key, tag.Value)
	}
	return b.String()
}

func (f *fakeInflux) stored() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, k := range slices.Sorted(maps.Keys(f.points)) {
		out = append(out, fmt.Sprintf("%s %v", k, f.points[k]))
	}
	return out
}

// status answers one request with a code, some headers and a body.
func status(code int, body string, headers ...string) func(http.ResponseWriter, int) bool {
	return func(w http.ResponseWriter, _ int) bool {
		for i := 0; i < len(headers); i += 2 {
			w.Header().Set(headers[i], headers[i+1])
		}
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
		return true
	}
}
