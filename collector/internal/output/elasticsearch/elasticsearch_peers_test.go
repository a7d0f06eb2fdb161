//go:build peers

package elasticsearch

import (
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/internal/output"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

// TestRealElasticsearch talks to a real server at OUTRIGGER_ES_URL, which
// deploy/peers/elasticsearch.sh starts.
func TestRealElasticsearch(t *testing.T) {
	p := newPeer(t, false)
	if p == nil {
		return
	}
	base, es := p.base, p.call
	run := p.run
	// search returns how many documents match and their sources.
	search := func(index, query string) []map[string]any {
		t.Helper()
		if status, out := es(http.MethodPost, "/"+index+"/_refresh", ""); status != 200 {
			t.Fatalf("refresh: %v", out)
		}
		status, out := es(http.MethodPost, "/"+index+"/_search", `{"size":100,"sort":[{"log.offset":"asc"}],"query":`+query+`}`)
		if status != 200 {
			t.Fatalf("search %s: %v", query, out)
		}
		var found []map[string]any
		for _, hit := range out["hits"].(map[string]any)["hits"].([]any) {
			found = append(found, hit.(map[string]any)["_source"].(map[string]any))
		}
		return found
	}
	newOutput := func(cfg Config) *Output {
		t.Helper()
		cfg.Addresses = []string{base}
		cfg.Dataset, cfg.Setup = "generic", "off" // setup has a test of its own
		o, err := New(cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := o.Close(); err != nil {
				t.Error(err)
			}
		})
		return o
	}
	// The built-in template logs@template is absent from the test distribution, and
	// so is constant_keyword; this is its part that makes data streams.
	status, out := es(http.MethodPut, "/_index_template/outrigger-test", `{"index_patterns":["logs-generic-*","logs-blocked-*"],"priority":500,"data_stream":{},"template":{"mappings":{"properties":{
		"data_stream":{"properties":{"type":{"type":"keyword"},"dataset":{"type":"keyword"},"namespace":{"type":"keyword"}}},
		"http.response.status_code":{"type":"long"},"service.name":{"type":"keyword"},"trace.id":{"type":"keyword"}}}}}`)
	dataStreams := status == 200
	if !dataStreams {
		t.Logf("SKIPPED the data stream part: this server has none: %v", out)
	}

	records := func() []*record.Record {
		b := batch(5)
		for _, r := range b {
			r.Origin.File = run
			r.TraceID = "4bf92f3577b34da6a3ce929d0e0e4736"
		}
		b[1].Attributes = map[string]any{"http.response.status_code": float64(503), "tags": []any{"a", "b"}, "nested": map[string]any{"x": true}}
		b[2].Attributes = map[string]any{"http.response.status_code": "not a number"}
		b[3].Body = "card declined, <größe> \u2028 \"quoted\"\n\tat main"
		return b
	}

	t.Run("data stream", func(t *testing.T) {
		if !dataStreams {
			t.Skip("SKIPPED: this server has no data streams")
		}
		o := newOutput(Config{Namespace: run})
		index := "logs-generic-" + run
		for attempt := range 2 { // the second is a resend: 409 for every item
			got := o.Write(t.Context(), records())
			if got.Err != nil || len(got.Retry) > 0 || len(got.Rejected) != 1 || got.Rejected[0].Index != 2 {
				t.Fatalf("attempt %d: %+v; want record 2 rejected by the mapping, the others stored", attempt, got)
			}
			if reason := got.Rejected[0].Reason; !strings.Contains(reason, "document_parsing_exception") || !strings.Contains(reason, "not a number") {
				t.Errorf("reason %q; want the server's own words", reason)
			}
		}
		all := search(index, `{"match_all":{}}`)
		if len(all) != 4 {
			t.Fatalf("%d documents; want 4, once each", len(all))
		}
		if diff := cmp.Diff("card declined, <größe> \u2028 \"quoted\"\n\tat main", all[2]["message"]); diff != "" {
			t.Error(diff)
		}
		if all[0]["@timestamp"] != "2026-11-23T03:00:00.000000005Z" {
			t.Errorf("@timestamp %v", all[0]["@timestamp"])
		}
		// As Kibana would ask.
		for query, want := range map[string]int{
			`{"term":{"trace.id":"4bf92f3577b34da6a3ce929d0e0e4736"}}`:                      4,
			`{"term":{"service.name":"payments"}}`:                                          4,
			`{"match_phrase":{"message":"card declined"}}`:                                  1,
			`{"range":{"http.response.status_code":{"gte":500}}}`:                           1,
			`{"term":{"data_stream.dataset":"generic"}}`:                                    4,
			`{"range":{"@timestamp":{"gte":"2026-11-23","lt":"2026-11-23T03:00:01Z"}}}`:     4,
			`{"bool":{"must_not":{"exists":{"field":"http.response.status_code"}}}}`:        3,
			`{"query_string":{"query":"kubernetes.namespace:shop AND log.level:\"info\""}}`: 4,
		} {
			if got := len(search(index, query)); got != want {
				t.Errorf("%s: %d; want %d", query, got, want)
			}
		}
		status, out := es(http.MethodGet, "/.ds-"+index+"-*/_settings?filter_path=*.settings.index.provided_name&expand_wildcards=all", "")
		if status != 200 || len(out) != 1 {
			t.Errorf("backing indices %v; want one", out)
		}
	})

	t.Run("plain index", func(t *testing.T) {
		no := false
		o := newOutput(Config{DataStream: &no, Index: "plain-" + run})
		for range 2 {
			good := append(records()[:2], records()[3:]...)
			if got := o.Write(t.Context(), good); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
				t.Fatalf("%+v", got)
			}
		}
		if got := len(search("plain-"+run, `{"match_all":{}}`)); got != 4 {
			t.Errorf("%d documents; want 4, once each", got)
		}
	})

	t.Run("no right to make the index", func(t *testing.T) {
		if status, out := es(http.MethodPut, "/_cluster/settings", `{"persistent":{"action.auto_create_index":"false"}}`); status != 200 {
			t.Fatalf("%v", out)
		}
		defer es(http.MethodPut, "/_cluster/settings", `{"persistent":{"action.auto_create_index":null}}`)
		no := false
		got := newOutput(Config{DataStream: &no, Index: "absent-" + run}).Write(t.Context(), records())
		if got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), "index_not_found_exception") {
			t.Errorf("%+v; want a permanent error in the server's words", got)
		}
	})

	t.Run("missing pipeline", func(t *testing.T) {
		no := false
		got := newOutput(Config{DataStream: &no, Index: "plain-" + run, Pipeline: "no-such-pipeline"}).Write(t.Context(), records()[:1])
		if got.Err == nil && len(got.Rejected) == 0 || !strings.Contains(fmt.Sprint(got.Err, got.Rejected), "no-such-pipeline") {
			t.Errorf("%+v; want the server's word on the pipeline", got)
		}
	})

	t.Run("too large", func(t *testing.T) {
		big := records()[:1]
		big[0].Body = strings.Repeat("x", record.MaxBody)
		var large []*record.Record
		for i := range 20 { // http.max_content_length is 16 MiB here
			r := *big[0]
			r.Origin.Offset = int64(i)
			large = append(large, &r)
		}
		no := false
		o := newOutput(Config{DataStream: &no, Index: "plain-" + run, Compression: "none"})
		var got output.Result
		for range 2 { // the first may break before its answer can be read; the second asks first
			if got = o.Write(t.Context(), large); got.Err == nil {
				t.Fatalf("%d MiB were taken", len(large))
			}
			if got.TooLarge {
				break
			}
			t.Logf("not seen as 413: %v", got.Err)
		}
		if !got.TooLarge {
			t.Errorf("%+v; want TooLarge", got)
		}
		if got := o.Write(t.Context(), large[:10]); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
			t.Errorf("half of it: %+v", got)
		}
	})

	// An index behind the flood-stage watermark answers 429, one that is closed for
	// writing 403, each by item; the records of the other stream are stored.
	t.Run("busy and blocked", func(t *testing.T) {
		if !dataStreams {
			t.Skip("SKIPPED: this server has no data streams")
		}
		o := newOutput(Config{Namespace: run})
		mixed := records()[:2]
		mixed[0].Origin.File, mixed[1].Origin.File = run+"-mixed", run+"-mixed"
		mixed[1].Attributes["event.dataset"] = "blocked"
		if got := o.Write(t.Context(), mixed); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
			t.Fatalf("%+v", got)
		}
		block := func(name string, on bool) {
			t.Helper()
			if status, out := es(http.MethodPut, "/logs-blocked-"+run+"/_settings?expand_wildcards=all", fmt.Sprintf(`{"index.blocks.%s":%t}`, name, on)); status != 200 {
				t.Fatalf("%v", out)
			}
		}
		offset := int64(1000)
		for _, name := range []string{"read_only_allow_delete", "write"} {
			block(name, true)
			for _, r := range mixed {
				offset++
				r.Origin.Offset = offset
			}
			got := o.Write(t.Context(), mixed)
			if got.Err != nil || len(got.Rejected) > 0 || !cmp.Equal(got.Retry, []int{1}) {
				t.Errorf("%s: %+v; want record 1 alone to be sent again", name, got)
			}
			alone := o.Write(t.Context(), mixed[1:])
			if name == "write" && (alone.Err == nil || !alone.Permanent || !strings.Contains(alone.Err.Error(), "cluster_block_exception")) {
				t.Errorf("%s, alone: %+v; want a permanent error in the server's words", name, alone)
			}
			block(name, false)
			if got := o.Write(t.Context(), mixed[1:]); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
				t.Errorf("%s, after the block: %+v", name, got)
			}
		}
		if got := len(search("logs-blocked-"+run, `{"match_all":{}}`)); got != 3 {
			t.Errorf("%d documents behind the blocks; want 3", got)
		}
	})
}
