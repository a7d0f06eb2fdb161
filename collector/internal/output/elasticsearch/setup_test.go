package elasticsearch

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// fakeTemplates keeps templates as Elasticsearch does, and answers about mappings
// as a test says. What a real server does is for TestRealSetup.
type fakeTemplates struct {
	mu      sync.Mutex
	kept    map[string]json.RawMessage
	puts    []string
	asked   []string
	refuse  int    // status of every answer; 0 answers
	mapping string // of GET .../_mapping/field; empty is 404
	would   string // of _simulate_index
}

func (f *fakeTemplates) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, r.Method+" "+r.URL.Path)
	list, object := "index_templates", "index_template"
	if strings.HasPrefix(r.URL.Path, "/_component_template/") {
		list, object = "component_templates", "component_template"
	}
	switch {
	case f.refuse > 0:
		w.WriteHeader(f.refuse)
		fmt.Fprint(w, `{"error":{"type":"security_exception","reason":"no"}}`)
	case strings.Contains(r.URL.Path, "/_mapping/"):
		if f.mapping == "" {
			w.WriteHeader(http.StatusNotFound)
		}
		fmt.Fprint(w, f.mapping)
	case strings.Contains(r.URL.Path, "/_simulate_index/"):
		fmt.Fprint(w, f.would)
	case r.Method == http.MethodPut:
		data, err := io.ReadAll(r.Body)
		if err != nil || !json.Valid(data) {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		if f.kept == nil {
			f.kept = map[string]json.RawMessage{}
		}
		f.kept[r.URL.Path] = data
		f.puts = append(f.puts, r.URL.Path)
		fmt.Fprint(w, `{"acknowledged":true}`)
	case f.kept[r.URL.Path] != nil:
		fmt.Fprintf(w, `{%q:[{"name":"x",%q:%s}]}`, list, object, f.kept[r.URL.Path])
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"error":{"type":"resource_not_found_exception","reason":"not found"}}`)
	}
}

func TestSetup(t *testing.T) {
	server := newFakeBulk(t, items(`"status":201`))
	templates := &fakeTemplates{would: `{"template":{"mappings":{"properties":{"kubernetes":{"properties":{"labels":{"type":"flattened"}}}}}}}`}
	server.other = templates.ServeHTTP
	records := batch(1)
	records[0].Resource = &record.Resource{Labels: map[string]string{"app.kubernetes.io/name": "x"}}
	var docs []bulkDoc
	server.answer = func(w http.ResponseWriter, d []bulkDoc) {
		docs = d
		items(`"status":201`)(w, d)
	}
	both := []string{"/_component_template/" + componentName, "/_index_template/" + templateName}
	if got := write(t, Config{Addresses: []string{server.URL}}, records); got.Err != nil || !cmp.Equal(templates.puts, both) {
		t.Fatalf("%+v, put %q", got, templates.puts)
	}
	if diff := cmp.Diff(map[string]any{"app.kubernetes.io/name": "x"}, docs[0].Fields["kubernetes.labels"]); diff != "" {
		t.Errorf("labels: %s", diff)
	}
	// Again, with a stream that exists and whose newest index has fields.
	templates.puts = nil
	templates.mapping = `{".ds-logs-outrigger-default-2026.11.25-000002":{"mappings":{}},".ds-logs-outrigger-default-2026.11.24-000001":{"mappings":{"kubernetes.labels":{"mapping":{"labels":{"type":"flattened"}}}}}}`
	if got := write(t, Config{Addresses: []string{server.URL}, Setup: "required"}, records); got.Err != nil || templates.puts != nil {
		t.Errorf("%+v, put %q; want nothing to do", got, templates.puts)
	}
	if got := docs[0].Fields["kubernetes.labels.app_kubernetes_io_name"]; got != "x" {
		t.Errorf("%v", docs[0].Fields)
	}
	// What the configuration says goes before.
	if got := write(t, Config{Addresses: []string{server.URL}, Labels: "flattened", Setup: "off"}, records); got.Err != nil || docs[0].Fields["kubernetes.labels"] == nil {
		t.Errorf("%+v, %v", got, docs)
	}
	asked := len(templates.asked)
	if got := write(t, Config{Addresses: []string{server.URL}, Setup: "off"}, records); got.Err != nil || len(templates.asked) != asked || docs[0].Fields["kubernetes.labels"] != nil {
		t.Errorf("setup off: %+v, asked %q", got, templates.asked[asked:])
	}
	no := false
	if got := write(t, Config{Addresses: []string{server.URL}, DataStream: &no}, records); got.Err != nil || len(templates.asked) != asked {
		t.Errorf("an index: %+v, asked %q", got, templates.asked[asked:])
	}
}

// A failure that passes is tried again, one that stays is told once; the logs go
// out in both cases, unless setup is required.
func TestSetupFails(t *testing.T) {
	f := func(status int, setup string, wantErr, permanent bool, wantAsked int) {
		t.Helper()
		server := newFakeBulk(t, items(`"status":201`))
		templates := &fakeTemplates{refuse: status}
		server.other = templates.ServeHTTP
		var log bytes.Buffer
		o, err := New(Config{Addresses: []string{server.URL}, Setup: setup}, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = o.Close() }() // closes idle connections
		for range 3 {
			got := o.Write(t.Context(), batch(1))
			if (got.Err != nil) != wantErr || got.Permanent != permanent {
				t.Errorf("%d, %s: %+v", status, setup, got)
			}
		}
		asked := 0
		for _, a := range templates.asked {
			if strings.Contains(a, "_template/") {
				asked++
			}
		}
		if asked != wantAsked {
			t.Errorf("%d, %s: asked %q; want %d times", status, setup, templates.asked, wantAsked)
		}
		if told := strings.Count(log.String(), "level=WARN"); !wantErr && told != min(1, 503-status) {
			t.Errorf("%d, %s: told %d times: %s", status, setup, told, log.String())
		}
	}
	f(403, "auto", false, false, 1)
	f(503, "auto", false, false, 1) // and after a minute again
	f(403, "required", true, true, 3)
	f(503, "required", true, false, 3)
}

func TestReplaces(t *testing.T) {
	want := componentTemplate()
	f := func(name string, change func(*template), yes bool, reason string) {
		t.Helper()
		have := componentTemplate()
		change(have)
		text, err := json.Marshal(have)
		if err != nil {
			t.Fatal(err)
		}
		if got, why := replaces(text, want); got != yes || why != reason {
			t.Errorf("%s: %t, %q; want %t, %q", name, got, why, yes, reason)
		}
	}
	f("the same", func(*template) {}, false, "")
	f("older", func(h *template) { h.Meta.Version = 0 }, true, "")
	f("newer", func(h *template) { h.Meta.Version++ }, false, "it is of a newer version")
	f("changed", func(h *template) { h.Template["settings"] = map[string]any{"a": "b"} }, false, "somebody changed it")
	f("older and changed", func(h *template) { h.Meta.Version, h.Priority = 0, 7 }, false, "somebody changed it")
	f("not ours", func(h *template) { h.Meta.ManagedBy = "terraform" }, false, "it is not ours")
	f("nobody's", func(h *template) { h.Meta = nil }, false, "it is not ours")
	if got, why := replaces(json.RawMessage(`7`), want); got || why != "it is not ours" {
		t.Errorf("not a template: %t, %q", got, why)
	}
}

// FuzzTemplates: whatever a server says of its templates and mappings, nothing
// panics, and only what is surely ours is replaced.
func FuzzTemplates(f *testing.F) {
	want := componentTemplate()
	text, err := json.Marshal(want)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"_meta":{"managed_by":"outrigger","version":-1,"checksum":""}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if yes, _ := replaces(text, want); yes && !bytes.Contains(text, []byte("outrigger")) {
			t.Fatalf("replaces %s", text)
		}
	})
}

func TestFailureStore(t *testing.T) {
	server := newFakeBulk(t, items(`"status":201,"failure_store":"used"`, `"status":201`, `"status":201,"failure_store":"used"`))
	var log bytes.Buffer
	o, err := New(Config{Addresses: []string{server.URL}, Setup: "off"}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }() // closes idle connections
	for range 2 {
		if got := o.Write(t.Context(), batch(3)); !cmp.Equal(got, output.Result{}) {
			t.Errorf("%+v; want all acknowledged", got)
		}
	}
	if o.FailureStored() != 4 || strings.Count(log.String(), "failure store") != 1 {
		t.Errorf("%d counted, log %s; want 4, told once", o.FailureStored(), log.String())
	}
}

// Several Writes at a time, among them of new resources and datasets, are as many
// requests with each record once.
func TestConcurrentWrites(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]int{}
	server := newFakeBulk(t, func(w http.ResponseWriter, docs []bulkDoc) {
		mu.Lock()
		for _, d := range docs {
			seen[d.Index+"/"+d.ID+"/"+fmt.Sprint(d.Fields["message"])]++
		}
		mu.Unlock()
		fmt.Fprintf(w, `{"errors":false,"items":[%s]}`, strings.TrimSuffix(strings.Repeat(`{"create":{"status":201}},`, len(docs)), ","))
	})
	o, err := New(Config{Addresses: []string{server.URL}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }() // closes idle connections
	if got := o.Traits(); got.Concurrency != 4 {
		t.Errorf("%+v", got)
	}
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			for range 5 {
				records := batch(50)
				for i, r := range records {
					r.Origin.File = fmt.Sprint(k)
					r.Attributes = map[string]any{"event.dataset": fmt.Sprint("d", i%7)}
				}
				if got := o.Write(t.Context(), records); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
					t.Errorf("%+v", got)
				}
			}
		})
	}
	wg.Wait()
	if len(seen) != 200 {
		t.Errorf("%d records; want 200", len(seen))
	}
	for k, n := range seen {
		if n != 5 {
			t.Errorf("%s: %d times; want 5", k, n)
		}
	}
}

// Datasets over the limit share the default stream and keep their name.
func TestTooManyStreams(t *testing.T) {
	o, err := New(Config{Addresses: []string{"http://127.0.0.1:1"}, Setup: "off"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	records := batch(maxStreams + 10)
	for i, r := range records {
		r.Attributes = map[string]any{"event.dataset": fmt.Sprintf("set%d", i)}
	}
	o.prepare(t.Context(), records, time.Unix(1, 0))
	if len(o.streams) != maxStreams || o.to(records[0]).name != "logs-set0-default" || o.to(records[len(records)-1]).name != "logs-outrigger-default" {
		t.Errorf("%d streams, %s, %s", len(o.streams), o.to(records[0]).name, o.to(records[len(records)-1]).name)
	}
}

// The transport may read a request's body after its answer: it gets an error, not
// the next request's bytes.
func TestBodyIsTakenBack(t *testing.T) {
	b := &body{data: []byte("abc")}
	r, err := b.reader()
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 2)
	if n, err := r.Read(p); n != 2 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	b.takeBack()
	if n, err := r.Read(p); n != 0 || err == nil {
		t.Errorf("%d, %v; want an error", n, err)
	}
}

// A server that answers before it has read the request and goes away is asked
// first the next time, so that its 413 is seen.
func TestEarlyRefusal(t *testing.T) {
	const limit = 2 << 20
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Elastic-Product", "Elasticsearch")
		if r.ContentLength <= limit {
			_, _ = io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, `{"errors":false,"items":[{"create":{"status":201}}]}`)
			return
		}
		if r.Header.Get("Expect") == "100-continue" {
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.Close() // with bytes unread: a reset
	}))
	defer server.Close()
	o, err := New(Config{Addresses: []string{server.URL}, Setup: "off", Compression: "none"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }() // closes idle connections
	small, large := batch(1), batch(1)
	large[0].Body = strings.Repeat("x", 16<<20)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var got output.Result
	for range 5 {
		if got = o.Write(ctx, large); got.Err == nil {
			t.Fatal("16 MiB were taken")
		}
		if got.TooLarge {
			break
		}
	}
	if !got.TooLarge {
		t.Errorf("%+v; want TooLarge", got)
	}
	if got := o.Write(ctx, small); got.Err != nil {
		t.Errorf("%+v", got)
	}
}
