package elasticsearch

import (
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeBulk is a stand-in for the bulk endpoint, strict about requests, that
// answers as a test says. What a real server does is for TestRealElasticsearch.
type fakeBulk struct {
	*httptest.Server
	t        *testing.T
	answer   func(w http.ResponseWriter, docs []bulkDoc)
	other    http.HandlerFunc // for what is not a bulk request; nil has no right to it
	mu       sync.Mutex
	requests []*http.Request // bulk requests
}

type bulkDoc struct {
	Index, ID string
	Fields    map[string]any
}

func newFakeBulk(t *testing.T, answer func(w http.ResponseWriter, docs []bulkDoc)) *fakeBulk {
	f := &fakeBulk{t: t, answer: answer}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fakeBulk) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Elastic-Product", "Elasticsearch")
	if r.URL.Path != "/_bulk" {
		if f.other != nil {
			f.other(w, r)
			return
		}
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, `{"error":{"type":"security_exception","reason":"action is unauthorized"},"status":403}`)
		return
	}
	f.mu.Lock()
	f.requests = append(f.requests, r)
	f.mu.Unlock()
	if r.Method != http.MethodPost || r.URL.Path != "/_bulk" || r.Header.Get("Content-Type") != "application/x-ndjson" {
		f.t.Errorf("%s %s %s", r.Method, r.URL, r.Header.Get("Content-Type"))
	}
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			f.t.Error(err)
			return
		}
		body = z
	}
	var docs []bulkDoc
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var a struct {
			Create *struct {
				Index string `json:"_index"`
				ID    string `json:"_id"`
			} `json:"create"`
		}
		dec := json.NewDecoder(strings.NewReader(lines.Text()))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&a); err != nil || a.Create == nil {
			f.t.Errorf("action %s: %v", lines.Text(), err)
		}
		d := bulkDoc{Index: a.Create.Index, ID: a.Create.ID}
		if !lines.Scan() {
			f.t.Error("an action without a document")
		}
		if err := json.Unmarshal(lines.Bytes(), &d.Fields); err != nil {
			f.t.Errorf("document %s: %v", lines.Text(), err)
		}
		docs = append(docs, d)
	}
	f.answer(w, docs)
}

// items answers as Elasticsearch does, with a status for every document.
func items(statuses ...string) func(http.ResponseWriter, []bulkDoc) {
	return func(w http.ResponseWriter, _ []bulkDoc) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"errors":true,"items":[{"create":{%s}}]}`, strings.Join(statuses, `}},{"create":{`))
	}
}

func batch(n int) []*record.Record {
	var out []*record.Record
	for i := range n {
		out = append(out, &record.Record{
			Time: time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC), Body: fmt.Sprint("line ", i), Level: "info",
			Resource: &record.Resource{Namespace: "shop", Pod: "payments-0", Service: "payments"},
			Origin:   record.Origin{File: "1:2:3", Path: "/p", Offset: int64(i * 10), End: int64(i*10 + 10)},
		})
	}
	return out
}

func write(t *testing.T, cfg Config, records []*record.Record) output.Result {
	t.Helper()
	o, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	}()
	return o.Write(t.Context(), records)
}

func TestItemVerdicts(t *testing.T) {
	f := func(name string, statuses []string, want output.Result) {
		t.Helper()
		server := newFakeBulk(t, items(statuses...))
		got := write(t, Config{Addresses: []string{server.URL}}, batch(len(statuses)))
		if got.Err != nil {
			t.Errorf("%s: %v", name, got.Err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	const ok, conflict = `"status":201`, `"status":409,"error":{"type":"version_conflict_engine_exception","reason":"document already exists"}`
	const busy = `"status":429,"error":{"type":"es_rejected_execution_exception","reason":"queue is full"}`
	const mapping = `"status":400,"error":{"type":"document_parsing_exception","reason":"failed to parse field [n]","caused_by":{"reason":"For input string: \"x\""}}`
	const forbidden = `"status":403,"error":{"type":"security_exception","reason":"action is unauthorized"}`
	f("all stored", []string{ok, ok}, output.Result{})
	f("an earlier attempt stored it", []string{ok, conflict}, output.Result{})
	f("busy items alone are sent again", []string{ok, busy, ok, `"status":503`}, output.Result{Retry: []int{1, 3}})
	f("a record that no mapping takes", []string{mapping, ok}, output.Result{Rejected: []output.Rejection{{Index: 0, Reason: `status 400: document_parsing_exception: failed to parse field [n]: For input string: "x"`}}})
	f("the failure store has it", []string{`"status":201,"failure_store":"used"`, ok}, output.Result{})
	f("no right for some: kept", []string{ok, forbidden}, output.Result{Retry: []int{1}})

	server := newFakeBulk(t, items(forbidden, forbidden))
	if got := write(t, Config{Addresses: []string{server.URL}}, batch(2)); got.Err == nil || !got.Permanent || got.Retry != nil || !strings.Contains(got.Err.Error(), "create_doc") {
		t.Errorf("no right for all: %+v; want a permanent error with the privilege that is missing", got)
	}
}

func TestRequestVerdicts(t *testing.T) {
	f := func(name string, answer func(http.ResponseWriter, []bulkDoc), permanent, tooLarge bool, after time.Duration, want string) {
		t.Helper()
		server := newFakeBulk(t, answer)
		got := write(t, Config{Addresses: []string{server.URL}}, batch(2))
		if got.Err == nil || got.Permanent != permanent || got.TooLarge != tooLarge || got.RetryAfter != after || !strings.Contains(got.Err.Error(), want) || got.Retry != nil || got.Rejected != nil {
			t.Errorf("%s: %+v; want permanent %t, too large %t, after %s, %q", name, got, permanent, tooLarge, after, want)
		}
		if len(server.requests) != 1 {
			t.Errorf("%s: %d requests; one Write is one attempt", name, len(server.requests))
		}
	}
	status := func(code int, body string, header ...string) func(http.ResponseWriter, []bulkDoc) {
		return func(w http.ResponseWriter, _ []bulkDoc) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
			fmt.Fprint(w, body)
		}
	}
	f("busy", status(429, `{"error":{"type":"circuit_breaking_exception","reason":"[parent] Data too large"},"status":429}`, "Retry-After", "7"), false, false, 7*time.Second, "Data too large")
	f("away", status(503, "<html>no  backend</html>"), false, false, 0, "<html>no backend</html>")
	f("gateway", status(502, ""), false, false, 0, "no reason given")
	f("too large", status(413, ""), false, true, 0, "http.max_content_length")
	f("who", status(401, `{"error":{"type":"security_exception","reason":"missing authentication credentials"}}`), true, false, 0, "apiKeyFile")
	f("may not", status(403, ""), true, false, 0, "create_doc")
	f("where", status(404, ""), true, false, 0, "addresses")
	f("moved", status(302, "", "Location", "https://new/"), true, false, 0, `"https://new/"`)
	f("bad pipeline", status(400, `{"error":{"type":"illegal_argument_exception","reason":"pipeline with id [x] does not exist"}}`), true, false, 0, "pipeline with id [x]")
	f("not JSON", status(200, "OK"), false, false, 0, "cannot be read")
	f("fewer items than sent", items(`"status":201`), false, false, 0, "bulk request of 2 items has 1")
	f("other operation", status(200, `{"items":[{"index":{"status":201}},{"index":{"status":201}}]}`), false, false, 0, `no "create"`)
	f("no status", status(200, `{"items":[{"create":{}},{"create":{"status":201}}]}`), false, false, 0, "status 0")
	f("more items than sent", items(`"status":201`, `"status":201`, `"status":201`), false, false, 0, "bulk request of 2 items has 3")
	f("two operations", status(200, `{"items":[{"create":{"status":201},"index":{"status":201}},{"create":{"status":201}}]}`), false, false, 0, "more than that")
	f("no errors, but no items", status(200, `{"errors":false}`), false, false, 0, "bulk request of 2 items has 0")
	f("cut off", status(200, `{"items":[{"create":{"status":201}},`), false, false, 0, "cannot be read")
}

func TestUnknownProductIsPermanent(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") }))
	defer server.Close()
	got := write(t, Config{Addresses: []string{server.URL}}, batch(1))
	if got.Err == nil || !got.Permanent {
		t.Errorf("%+v; want a permanent error", got)
	}
}

func TestNobodyListens(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close()
	got := write(t, Config{Addresses: []string{server.URL}}, batch(1))
	if got.Err == nil || got.Permanent {
		t.Errorf("%+v; want an error that passes", got)
	}
}

func TestTimeout(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	server := newFakeBulk(t, func(http.ResponseWriter, []bulkDoc) { <-ctx.Done() })
	defer cancel()
	o, err := New(Config{Addresses: []string{server.URL}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	o.cfg.Timeout = 20 * time.Millisecond
	if got := o.Write(t.Context(), batch(1)); !errors.Is(got.Err, context.DeadlineExceeded) {
		t.Errorf("%+v; want the deadline", got)
	}
}

// What is sent: data streams by dataset, ids that a resend repeats, gzip,
// credentials.
func TestRequest(t *testing.T) {
	var docs [][]bulkDoc
	server := newFakeBulk(t, func(w http.ResponseWriter, d []bulkDoc) {
		docs = append(docs, d)
		items(`"status":201`, `"status":201`, `"status":201`)(w, d)
	})
	keyFile := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(keyFile, []byte("id:secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	records := batch(4)
	records[1].Attributes = map[string]any{"event.dataset": "Outrigger.Access-Log"}
	records[2].Origin = record.Origin{}
	records[3].Attributes = map[string]any{"n": make(chan int)}
	cfg := Config{Addresses: []string{server.URL}, APIKeyFile: keyFile, Pipeline: "p", Namespace: "staging"}
	for range 2 {
		got := write(t, cfg, records)
		if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 1 || got.Rejected[0].Index != 3 {
			t.Fatalf("%+v; want record 3 rejected, which JSON cannot hold", got)
		}
	}
	first, r := docs[0], server.requests[0]
	if diff := cmp.Diff(first, docs[1]); diff != "" {
		t.Errorf("a resend differs: %s", diff)
	}
	if first[0].ID == first[1].ID || first[0].ID >= first[1].ID || first[0].ID[:16] != first[1].ID[:16] || len(first[0].ID) != 24 || first[2].ID != "" {
		t.Errorf("ids %q %q %q", first[0].ID, first[1].ID, first[2].ID)
	}
	if first[0].Index != "logs-outrigger-staging" || first[1].Index != "logs-outrigger.access_log-staging" {
		t.Errorf("indices %q %q", first[0].Index, first[1].Index)
	}
	if diff := cmp.Diff(map[string]any{
		"@timestamp": "2026-11-23T03:00:00.000000005Z", "message": "line 0", "log.level": "info", "service.name": "payments", "kubernetes.namespace": "shop", "kubernetes.pod.name": "payments-0",
		"orchestrator.namespace": "shop", "log.file.path": "/p", "log.offset": 0.0, "data_stream.type": "logs", "data_stream.dataset": "outrigger", "data_stream.namespace": "staging",
	}, first[0].Fields); diff != "" {
		t.Error(diff)
	}
	if r.Header.Get("Authorization") != "ApiKey aWQ6c2VjcmV0" || r.Header.Get("Content-Encoding") != "gzip" || r.URL.Query().Get("pipeline") != "p" {
		t.Errorf("header %v, query %v", r.Header, r.URL.Query())
	}
	no := false
	server.answer = func(w http.ResponseWriter, d []bulkDoc) {
		docs = append(docs, d)
		items(`"status":201`)(w, d)
	}
	write(t, Config{Addresses: []string{server.URL}, Username: "u", Password: "p", DataStream: &no, Compression: "none"}, batch(1))
	last, r := docs[len(docs)-1], server.requests[len(server.requests)-1]
	if last[0].Index != "logs-outrigger" || last[0].Fields["data_stream.type"] != nil || r.Header.Get("Content-Encoding") != "" {
		t.Errorf("plain index: %+v, header %v", last, r.Header)
	}
	if user, password, _ := r.BasicAuth(); user != "u" || password != "p" {
		t.Errorf("header %v", r.Header)
	}
	if err := os.Remove(keyFile); err != nil {
		t.Fatal(err)
	}
	if got := write(t, cfg, batch(1)); got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), "apiKeyFile") {
		t.Errorf("a secret that is gone: %+v", got)
	}
}

func TestTLS(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Elastic-Product", "Elasticsearch")
		fmt.Fprint(w, `{"items":[{"create":{"status":201}}]}`)
	}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer server.Close()
	if got := write(t, Config{Addresses: []string{server.URL}}, batch(1)); got.Err == nil || !strings.Contains(got.Err.Error(), "certificate") {
		t.Errorf("an unknown authority: %+v; want an error", got)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := write(t, Config{Addresses: []string{server.URL}, CAFile: ca}, batch(1)); got.Err != nil {
		t.Errorf("with caFile: %v", got.Err)
	}
}

func TestConfig(t *testing.T) {
	f := func(c Config, want string) {
		t.Helper()
		err := c.Validate()
		if want == "" {
			if err != nil {
				t.Errorf("%v: %v", c, err)
			}
			return
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v; want %q in it", c, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("a secret is in the error %v", err)
		}
	}
	at := []string{"https://es:9200"}
	f(Config{Addresses: at}, "")
	f(Config{CloudID: "x:eA=="}, "")
	f(Config{}, "addresses is empty")
	f(Config{Addresses: at, CloudID: "x"}, "cloudId")
	f(Config{Addresses: []string{"es:9200"}}, "not the URL of a node")
	f(Config{Addresses: []string{"https://u:hunter2@es:9200"}}, "credentials")
	f(Config{Addresses: at, APIKey: "hunter2", APIKeyFile: "f"}, "apiKeyFile")
	f(Config{Addresses: at, APIKey: "hunter2", Username: "u", Password: "hunter2"}, "API key and a username")
	f(Config{Addresses: at, Password: "hunter2"}, "username")
	f(Config{Addresses: at, CertFile: "c"}, "keyFile")
	f(Config{Addresses: at, Compression: "zip"}, "compression")
	f(Config{Addresses: at, Timeout: 5}, "timeout")
	f(Config{Addresses: at, Dataset: "a-b"}, "write a_b")
	f(Config{Addresses: at, Namespace: "A"}, "write a")
	f(Config{Addresses: at, Index: "Logs"}, "index")
	f(Config{Addresses: at, CompressionLevel: 10}, "compressionLevel")
	f(Config{Addresses: at, Concurrency: 65}, "concurrency")
	f(Config{Addresses: at, MaxFields: -1}, "maxFields")
	f(Config{Addresses: at, Setup: "yes"}, "auto, required or off")
	f(Config{Addresses: at, Setup: "required", DataStream: new(bool)}, "data streams")
	f(Config{Addresses: at, Labels: "raw"}, "labels")
	f(Config{Addresses: at, Retention: "1 month"}, "30d")
	f(Config{Addresses: at, Retention: "30d", Setup: "off"}, "no effect")
	f(Config{Addresses: at, Retention: "30d", Setup: "required", Labels: "dedot", Concurrency: 8}, "")

	c := Config{Addresses: []string{"https://u:hunter2@es"}, APIKey: "hunter2", Password: "hunter2", APIKeyFile: "/run/key"}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "config", c)
	for _, shown := range []string{fmt.Sprint(c), fmt.Sprintf("%+v", c), fmt.Sprintf("%#v", c), log.String()} {
		if strings.Contains(shown, "hunter2") || !strings.Contains(shown, "/run/key") {
			t.Errorf("shown as %s", shown)
		}
	}
}

// FuzzVerdicts: whatever a server answers, every record gets one verdict and an
// answer that is not understood acknowledges nothing.
func FuzzVerdicts(f *testing.F) {
	f.Add(`{"errors":true,"items":[{"create":{"status":201}},{"create":{"status":429,"error":{"type":"a","reason":"b"}}}]}`)
	f.Add(`{"items":[{"create":{"status":400}},{"create":{"status":403}}]}`)
	f.Add(`{"errors":false,"items":[{"create":{"status":201}},{"create":{"status":200}}]}` + "\n")
	f.Fuzz(func(t *testing.T, body string) {
		r, err := read([]byte(body), []int{4, 7})
		if allStored([]byte(body), 2) {
			// What the quick look takes for success, encoding/json must too.
			var a answer
			if err := json.Unmarshal([]byte(body), &a); err != nil || len(a.Items) != 2 || a.Items[0]["create"].Status/2 != 100 || a.Items[1]["create"].Status/2 != 100 {
				t.Fatalf("%q taken for success: %+v, %v", body, a, err)
			}
		}
		if (err != nil || r.Err != nil) && (len(r.Retry) > 0 || len(r.Rejected) > 0) {
			t.Fatalf("%+v, %v", r, err)
		}
		seen := map[int]bool{}
		for _, i := range r.Retry {
			seen[i] = true
		}
		for _, x := range r.Rejected {
			if seen[x.Index] {
				t.Fatalf("two verdicts: %+v", r)
			}
			seen[x.Index] = true
		}
		delete(seen, 4)
		delete(seen, 7)
		if len(seen) > 0 {
			t.Fatalf("verdicts on records that were not sent: %+v", r)
		}
	})
}
