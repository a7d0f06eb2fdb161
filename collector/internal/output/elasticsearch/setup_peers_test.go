//go:build peers

package elasticsearch

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

// peer is a real Elasticsearch that deploy/peers/elasticsearch.sh started.
type peer struct {
	t    *testing.T
	base string
	user string // who may do everything; empty without security
	run  string // in the names of what this run makes
	log  *bytes.Buffer
}

// newPeer returns nil if the server is for the other tests: those with security or
// those without.
func newPeer(t *testing.T, security bool) *peer {
	t.Helper()
	base := os.Getenv("OUTRIGGER_ES_URL")
	if base == "" {
		t.Skip("SKIPPED: no Elasticsearch. Run deploy/peers/elasticsearch.sh go test -tags peers ./collector/internal/output/elasticsearch/")
	}
	if secured := os.Getenv("OUTRIGGER_ES_SECURITY") == "true"; secured != security {
		t.Logf("nothing to do: the server's security is %t", secured)
		return nil
	}
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	user := ""
	if security {
		user = "admin"
	}
	return &peer{t: t, base: base, user: user, run: fmt.Sprintf("%x", time.Now().UnixNano()), log: &bytes.Buffer{}}
}

func (p *peer) call(method, path, body string) (int, map[string]any) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, p.base+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if p.user != "" {
		req.SetBasicAuth(p.user, "outrigger-peer")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(data, &out); err != nil {
		p.t.Fatalf("%s %s: %s", method, path, data)
	}
	return resp.StatusCode, out
}

func (p *peer) must(method, path, body string) map[string]any {
	p.t.Helper()
	status, out := p.call(method, path, body)
	if status != http.StatusOK {
		p.t.Fatalf("%s %s: %d %v", method, path, status, out)
	}
	return out
}

func (p *peer) output(cfg Config) *Output {
	p.t.Helper()
	cfg.Addresses = []string{p.base}
	if cfg.Namespace == "" {
		cfg.Namespace = p.run
	}
	o, err := New(cfg, slog.New(slog.NewTextHandler(p.log, nil)))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = o.Close() }) // closes idle connections
	return o
}

func (p *peer) store(o *Output, records []*record.Record) {
	p.t.Helper()
	if got := o.Write(p.t.Context(), records); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
		p.t.Fatalf("%+v", got)
	}
}

func (p *peer) count(index, query string) int {
	p.t.Helper()
	p.must(http.MethodPost, "/"+index+"/_refresh", "")
	n, _ := p.must(http.MethodPost, "/"+index+"/_count", `{"query":`+query+`}`)["count"].(float64)
	return int(n)
}

func (p *peer) records(n int) []*record.Record {
	b := batch(n)
	res := &record.Resource{
		Cluster: "c1", Node: "n1", Namespace: "shop", Pod: "payments-0", Container: "main", Service: "payments",
		Labels: map[string]string{"app": "x", "app.kubernetes.io/name": "payments", "app.kubernetes.io/part-of": "shop"},
	}
	for _, r := range b {
		r.Origin.File, r.Resource = p.run, res
	}
	return b
}

func TestRealSetup(t *testing.T) {
	p := newPeer(t, false)
	if p == nil {
		return
	}
	template := func() map[string]any {
		t.Helper()
		list, _ := p.must(http.MethodGet, "/_index_template/"+templateName, "")["index_templates"].([]any)
		m, _ := list[0].(map[string]any)["index_template"].(map[string]any)
		return m
	}

	// A stream from before the template keeps fields; they are sent so.
	before := p.output(Config{Setup: "off"})
	p.store(before, p.records(2))
	before.cfg.Setup = setupAuto
	if flattened, err := before.labelsFlattened(t.Context(), "logs-outrigger-"+p.run); flattened || err != nil {
		t.Errorf("labels of an old stream flattened: %t, %v", flattened, err)
	}

	o := p.output(Config{Setup: "required", Retention: "30d", Namespace: p.run + "b"})
	records := p.records(3)
	records[1].Attributes = map[string]any{"error": "boom", "host": "web", "a": 1.0, "a.b": 2.5, "event.dataset": "outrigger.access"}
	p.store(o, records)
	made := template()
	if life, _ := made["template"].(map[string]any)["lifecycle"].(map[string]any); life["data_retention"] != "30d" {
		t.Errorf("%v", made)
	}
	if did, err := o.install(t.Context()); did != "" || err != nil {
		t.Errorf("a second time: %q, %v; want nothing to do", did, err)
	}
	index := "logs-outrigger*-" + p.run + "b"
	for query, want := range map[string]int{
		`{"term":{"kubernetes.labels.app.kubernetes.io/name":"payments"}}`: 3,
		`{"term":{"kubernetes.labels.app":"x"}}`:                           3,
		`{"term":{"kubernetes.labels":"shop"}}`:                            3,
		`{"term":{"error.value":"boom"}}`:                                  1,
		`{"term":{"host.value":"web"}}`:                                    1,
		`{"range":{"a.b":{"gt":2.4,"lt":2.6}}}`:                            1,
		`{"match":{"message":"line"}}`:                                     3,
		`{"term":{"service.name":"payments"}}`:                             3,
	} {
		if got := p.count(index, query); got != want {
			t.Errorf("%s: %d; want %d", query, got, want)
		}
	}
	// An old stream stays as it is although the template is there now.
	p.store(p.output(Config{}), p.records(4)[2:])
	if got := p.count("logs-outrigger-"+p.run, `{"term":{"kubernetes.labels.app_kubernetes_io_name.keyword":"payments"}}`); got != 4 {
		t.Errorf("%d records in the old stream; want 4", got)
	}

	// A new retention is taken over.
	if did, err := p.output(Config{Retention: "7d"}).install(t.Context()); err != nil || !strings.Contains(did, "updated /_index_template/") || strings.Contains(did, "component") {
		t.Errorf("another retention: %q, %v", did, err)
	}
	// What somebody changed is left alone; so is what is not ours.
	changed := template()
	changed["priority"] = 151
	text, err := json.Marshal(changed)
	if err != nil {
		t.Fatal(err)
	}
	p.must(http.MethodPut, "/_index_template/"+templateName, string(text))
	p.log.Reset()
	if did, err := p.output(Config{Retention: "9d"}).install(t.Context()); did != "" || err != nil || !strings.Contains(p.log.String(), "somebody changed it") {
		t.Errorf("changed by somebody: %q, %v, log %s", did, err, p.log)
	}
	p.must(http.MethodPut, "/_index_template/"+templateName, `{"index_patterns":["logs-outrigger*-*"],"priority":152,"data_stream":{}}`)
	p.log.Reset()
	if did, err := o.install(t.Context()); did != "" || err != nil || !strings.Contains(p.log.String(), "not ours") {
		t.Errorf("not ours: %q, %v, log %s", did, err, p.log)
	}
	// An older version is replaced.
	older := componentTemplate()
	older.Meta.Version = 0
	if text, err = json.Marshal(older); err != nil {
		t.Fatal(err)
	}
	p.must(http.MethodPut, "/_component_template/"+componentName, string(text))
	if did, err := o.install(t.Context()); err != nil || !strings.Contains(did, "updated /_component_template/") {
		t.Errorf("an older one: %q, %v", did, err)
	}
}

// Lines of one millisecond come in their order, also where the cluster's own
// template has a date; a clock that is out by centuries costs nothing.
func TestRealOrder(t *testing.T) {
	p := newPeer(t, false)
	if p == nil {
		return
	}
	// Under names of its own, for a template cannot be taken away from a stream.
	if status, _ := p.call(http.MethodGet, "/_component_template/logs@mappings", ""); status == http.StatusNotFound {
		p.must(http.MethodPut, "/_component_template/logs@mappings", `{"template":{"mappings":{"properties":{"@timestamp":{"type":"date","ignore_malformed":false}}}}}`)
	}
	o := p.output(Config{Setup: "off", Dataset: "ordered"})
	ours := o.indexTemplate()
	ours.IndexPatterns, ours.Priority = []string{"logs-ordered-*"}, 400
	for _, put := range []struct {
		path string
		body *template
	}{{"/_component_template/" + componentName, componentTemplate()}, {"/_index_template/ordered", ours}} {
		text, err := json.Marshal(put.body)
		if err != nil {
			t.Fatal(err)
		}
		p.must(http.MethodPut, put.path, string(text))
	}
	records := p.records(200)
	for i, r := range records {
		r.Time = r.Time.Add(time.Duration(200 - i)) // the last is the first
	}
	records[0].Time, records[0].Observed = time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC), records[1].Time.Add(1)
	records[199].Time, records[199].Observed = time.Time{}, records[198].Time.Add(-1)
	p.store(o, records)
	index := "/logs-ordered-" + p.run
	p.must(http.MethodPost, index+"/_refresh", "")
	out := p.must(http.MethodPost, index+"/_search", `{"size":1000,"sort":["@timestamp"],"_source":["message"]}`)
	hits, _ := out["hits"].(map[string]any)["hits"].([]any)
	if len(hits) != len(records) {
		t.Fatalf("%d documents; want %d", len(hits), len(records))
	}
	for i, h := range hits {
		hit, _ := h.(map[string]any)
		source, _ := hit["_source"].(map[string]any)
		if want := records[199-i].Body; source["message"] != want {
			t.Fatalf("%d by time: %v; want %s", i, source["message"], want)
		}
	}
}

// A collector that may only ship does so, and says once what it could not do.
func TestRealSetupWithoutRights(t *testing.T) {
	p := newPeer(t, true)
	if p == nil {
		return
	}
	shipper := Config{Username: "shipper", Password: "outrigger-peer"}
	o := p.output(shipper)
	for range 2 {
		p.store(o, p.records(3))
	}
	if got := strings.Count(p.log.String(), "cannot make the index template"); got != 1 {
		t.Errorf("told %d times; want once: %s", got, p.log)
	}
	index := "logs-outrigger-" + p.run
	if got := p.count(index, `{"term":{"kubernetes.labels.app_kubernetes_io_name.keyword":"payments"}}`); got != 3 {
		t.Errorf("%d records; want 3, once each, with labels as fields", got)
	}
	shipper.Setup = "required"
	got := p.output(shipper).Write(t.Context(), p.records(1))
	if got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), "manage_index_templates") || !strings.Contains(got.Err.Error(), "unauthorized") {
		t.Errorf("%+v; want the privilege that is missing", got)
	}
	shipper.Setup, shipper.Password = "", "wrong"
	if got := p.output(shipper).Write(t.Context(), p.records(1)); got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), "passwordFile") {
		t.Errorf("wrong password: %+v", got)
	}
}

// No document is refused for its names.
func TestRealNames(t *testing.T) {
	p := newPeer(t, false)
	if p == nil {
		return
	}
	no := false
	for i, c := range awkward {
		r := p.records(1)
		r[0].Resource = &record.Resource{Node: "n1", Pod: "p", WorkloadKind: "CronJob", Workload: "w", Labels: map[string]string{"app": "x", "app.kubernetes.io/name": "y", "": "z"}}
		r[0].Attributes = c.attributes
		o := p.output(Config{DataStream: &no, Index: fmt.Sprintf("names-%s-%d", p.run, i)})
		if got := o.Write(t.Context(), r); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}

// Ten thousand records, several requests at a time, each as record.Fields says.
func TestRealEveryRecord(t *testing.T) {
	p := newPeer(t, false)
	if p == nil {
		return
	}
	o := p.output(Config{Setup: "off"})
	const n, size = 10_000, 1000
	records := p.records(n)
	for i, r := range records {
		r.Body = fmt.Sprint(i, " ", oddText[i%len(oddText)])[:min(2000, len(fmt.Sprint(i, " ", oddText[i%len(oddText)])))]
		r.TruncatedBytes = i % 3
		if i%2 == 0 {
			r.Attributes = map[string]any{"http.response.status_code": float64(200 + i%300), "took": float64(i) + 0.5, "user.name": fmt.Sprint("u", i), "ok": i%4 == 0, "none": nil, "tags": []any{"a", fmt.Sprint(i)}}
		}
	}
	done := make(chan struct{})
	for k := range 4 {
		go func() {
			defer func() { done <- struct{}{} }()
			for at := k * size; at < n; at += 4 * size {
				for range 2 { // and again, as after a lost answer
					if got := o.Write(t.Context(), records[at:at+size]); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
						t.Errorf("%+v", got)
					}
				}
			}
		}()
	}
	for range 4 {
		<-done
	}
	index := "/logs-outrigger-" + p.run
	// The server's answers are in the form that is read without decoding.
	resp, err := http.DefaultClient.Post(p.base+"/_bulk?filter_path="+filterPath, "application/x-ndjson", strings.NewReader(`{"create":{"_index":"plain-`+p.run+`"}}`+"\n{}\n"))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close() // read to its end
	if err != nil || !allStored(answer, 1) {
		t.Errorf("%s, %v; want the form that allStored knows", answer, err)
	}
	p.must(http.MethodPost, index+"/_refresh", "")
	after := ""
	seen := 0
	for {
		out := p.must(http.MethodPost, index+"/_search", `{"size":1000,"sort":[{"log.offset":"asc"}]`+after+`}`)
		hits, _ := out["hits"].(map[string]any)["hits"].([]any)
		if len(hits) == 0 {
			break
		}
		for _, h := range hits {
			hit, _ := h.(map[string]any)
			if seen >= n {
				t.Fatalf("more than %d documents", n)
			}
			if diff := cmp.Diff(reference(t, records[seen]), asNamespace(hit["_source"], "default")); diff != "" {
				t.Fatalf("record %d (-fields +stored):\n%s", seen, diff)
			}
			seen++
			after = fmt.Sprintf(`,"search_after":[%.0f]`, hit["sort"].([]any)[0])
		}
	}
	if seen != n {
		t.Errorf("%d documents; want %d, once each", seen, n)
	}
}

func asNamespace(source any, name string) map[string]any {
	m, _ := source.(map[string]any)
	m["data_stream.namespace"] = name
	return m
}
