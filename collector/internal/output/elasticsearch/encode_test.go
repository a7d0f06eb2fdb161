package elasticsearch

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func newTestEncoder(t testing.TB, compression string) (*encoder, func(*record.Record) *stream) {
	t.Helper()
	e, err := newEncoder(compression, 1, record.MaxAttributes)
	if err != nil {
		t.Fatal(err)
	}
	o := &Output{cfg: Config{}.withDefaults()}
	s := o.newStream("outrigger", false, time.Time{})
	return e, func(*record.Record) *stream { return s }
}

// document encodes one record and decodes its document again.
func document(t testing.TB, e *encoder, r *record.Record, s *stream) map[string]any {
	t.Helper()
	if rejected := e.encode([]*record.Record{r}, func(*record.Record) *stream { return s }); len(rejected) > 0 {
		t.Fatalf("%+v", rejected)
	}
	lines := bytes.Split(e.out.Bytes(), []byte("\n"))
	if len(lines) != 3 || len(lines[2]) > 0 {
		t.Fatalf("%d lines in %q", len(lines), e.out.Bytes())
	}
	var doc map[string]any
	if err := json.Unmarshal(lines[1], &doc); err != nil {
		t.Fatalf("%s: %v", lines[1], err)
	}
	return doc
}

// reference is what encoding/json makes of record.Fields.
func reference(t testing.TB, r *record.Record) map[string]any {
	t.Helper()
	fields := r.Fields()
	fields["data_stream.type"], fields["data_stream.dataset"], fields["data_stream.namespace"] = "logs", "outrigger", "default"
	text, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	return doc
}

var oddText = []string{
	"", "plain", "with \"quotes\" and \\ back\\slashes", "a\x00b\x01\x1f\x7f", "tab\tnew\nline\r\b\f", "größe 漢字 🚀", "\u2028\u2029", "<script>&amp;</script>",
	"\xff\xfe broken \xe6\x97", "\xed\xa0\x80 a surrogate", "12345678\"", "1234567\x80", "\ufffd", strings.Repeat("x", 5000), strings.Repeat("é\"", 500),
}

func randomRecord(rng *rand.Rand, resources []*record.Resource) *record.Record {
	text := func() string { return oddText[rng.IntN(len(oddText))] }
	maybe := func(s string) string {
		if rng.IntN(2) == 0 {
			return ""
		}
		return s
	}
	r := &record.Record{
		Time: time.Unix(rng.Int64N(4e9), rng.Int64N(1e9)).In(time.FixedZone("x", 3600)), Body: text(), Stream: maybe("stderr"), Level: maybe("warn"),
		TraceID: maybe("4bf92f3577b34da6a3ce929d0e0e4736"), SpanID: maybe("00f067aa0ba902b7"), Service: maybe(text()), TruncatedBytes: rng.IntN(2) * 77,
		Resource: resources[rng.IntN(len(resources))],
		Origin:   record.Origin{File: maybe("f"), Path: maybe("/var/log/pods/x" + text()), Offset: rng.Int64N(1 << 40)},
	}
	values := []any{text(), 1.0, -2.5, 1e300, 1e21, math.MaxFloat64, 5e-324, 123456789012345678.0, true, false, nil, []any{}, []any{"a", "b", nil}, map[string]any{}, []any{map[string]any{"b": 1.0, "a": "x"}}}
	names := []string{
		"http.response.status_code", "user.name", "log.level", "trace.id", "span.id", "service.name", "host.name", "stream", "message", "@timestamp", "kubernetes.pod.name",
		"log.file.path", "log.offset", "log.truncated_bytes", "x", "y.z", "ключ", "with space", "quo\"te", "data_stream.dataset", "event.dataset", "container.name", "kubernetes.labels.app", "nl\n", "a-b", "_own",
	}
	for range rng.IntN(8) {
		if r.Attributes == nil {
			r.Attributes = map[string]any{}
		}
		name := names[rng.IntN(len(names))]
		if _, plain := scalars[name]; plain {
			r.Attributes[name] = text()
		} else {
			r.Attributes[name] = values[rng.IntN(len(values))]
		}
	}
	return r
}

// Every record is written as record.Fields says: nothing more, nothing less.
func TestDocumentIsFields(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	resources := []*record.Resource{
		nil,
		{},
		{Cluster: "c1", Node: "n1", Namespace: "shop", Pod: "payments-0", PodUID: "u", Container: "main", Service: "payments", Labels: map[string]string{"app": "x", "app.kubernetes.io/name": "y"}},
		{
			Node: "n\"2", Namespace: "shop", Pod: "p", Service: "s", WorkloadKind: "Deployment", Workload: "cart", PodIP: "10.0.0.1", ContainerID: "abc", Image: "registry/cart:1",
			Annotations: map[string]string{"a": "b"}, NamespaceLabels: map[string]string{"n": "l"},
		},
		{Pod: "static", WorkloadKind: "Pod", Workload: "overrides the pod's name"},
	}
	e, to := newTestEncoder(t, "none")
	for i := range 2000 {
		r := randomRecord(rng, resources)
		got, want := document(t, e, r, to(r)), reference(t, r)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("record %d %+v (-fields +document):\n%s", i, r, diff)
		}
	}
}

func TestLabels(t *testing.T) {
	e, to := newTestEncoder(t, "none")
	labels := map[string]string{"app": "x", "app.kubernetes.io/name": "y", "app_kubernetes_io/name": "z", "nul\x00": "n", "": "e"}
	r := &record.Record{Resource: &record.Resource{Pod: "p", Labels: labels}}
	flat := *to(r)
	flat.flattened = true
	if diff := cmp.Diff(map[string]any{"app": "x", "app.kubernetes.io/name": "y", "app_kubernetes_io/name": "z", "nul_": "n", "": "e"}, document(t, e, r, &flat)["kubernetes.labels"]); diff != "" {
		t.Error(diff)
	}
	doc := document(t, e, r, to(r))
	for name, want := range map[string]any{"kubernetes.labels.app": "x", "kubernetes.labels.app_kubernetes_io_name": []any{"y", "z"}, "kubernetes.labels._": "e"} {
		if diff := cmp.Diff(want, doc[name]); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	if text := clashes(doc); text != "" {
		t.Error(text)
	}
}

var deepName = strings.Repeat("a.", 30) + "z"

type m = map[string]any

// awkward are attributes that Elasticsearch would refuse as they are, and what is
// sent.
var awkward = []struct {
	name       string
	attributes m
	want       m
}{
	{"a and a.b", m{"a": "x", "a.b": 1.0}, m{"a.value": "x", "a.b": 1.0}},
	{"a and a.b.c", m{"a": "x", "a-z": "y", "a.b.c": 1.0}, m{"a.value": "x", "a-z": "y", "a.b.c": 1.0}},
	{"a, a.b and a.b.c", m{"a": "x", "a.b": "y", "a.b.c": 1.0}, m{"a.value": "x", "a.b.value": "y", "a.b.c": 1.0}},
	{"a.value is there", m{"a": "x", "a.value": "y"}, m{"attributes.a": "x", "a.value": "y"}},
	{"a.value is an object", m{"a": "x", "a.value.z": "y"}, m{"attributes.a": "x", "a.value.z": "y"}},
	{"null and empty go with anything", m{"a": nil, "a.b": 1.0, "c": []any{}, "c.d": 1.0, "e": m{}, "e.f": 1.0}, m{"a": nil, "a.b": 1.0, "c": []any{}, "c.d": 1.0, "e": m{}, "e.f": 1.0}},
	{"beside ours", m{"host": "web", "kubernetes": "k", "kubernetes.cronjob": "j"}, m{"host.value": "web", "kubernetes.value": "k", "kubernetes.cronjob.value": "j"}},
	{"objects of ECS", m{"error": "boom", "service": "s", "user": 7.0, "http": true}, m{"error.value": "boom", "service.value": "s", "user.value": 7.0, "http.value": true}},
	{"an object stays", m{"error": m{}, "user": []any{m{"name": "x"}}}, m{"error": m{}, "user": []any{m{"name": "x"}}}},
	{"below plain fields", m{"message.text": "x", "kubernetes.pod.name.y": 1.0, "log.level.z": "w"}, m{"attributes.message_text": "x", "attributes.kubernetes_pod_name_y": 1.0, "attributes.log_level_z": "w"}},
	{"an object for a plain field", m{"stream": m{"a": 1.0}, "service.name": m{}}, m{"attributes.stream": m{"a": 1.0}, "attributes.service_name": m{}}},
	{"Elasticsearch's own", m{"_id": "x", "_source": 1.0, "_mine": 2.0}, m{"attributes._id": "x", "attributes._source": 1.0, "_mine": 2.0}},
	{"empty parts", m{"": 1.0, ".": 2.0, "a..b": 3.0, " ": 4.0, "\u2003.x": 5.0, "z.": 6.0}, m{"attributes._": 1.0, "attributes.__": 4.0, "attributes.___": 2.0, "attributes.a___b": 3.0, "attributes.__x": 5.0, "attributes.z__": 6.0}},
	{"one name for two", m{"message.a": 1.0, "attributes.message_a": 2.0}, m{"attributes.message_a_": 1.0, "attributes.message_a": 2.0}},
	{"too deep a name", m{deepName: 1.0}, m{"attributes." + strings.ReplaceAll(deepName, ".", "_"): 1.0}},
	{"mixed lists", m{"l": []any{1.0, m{"b": "x"}, nil}, "k": []any{"a", 2.5, true}, "n": []any{1.0, []any{"x"}}}, m{"l": []any{"1", `{"b":"x"}`, nil}, "k": []any{"a", "2.5", "true"}, "n": []any{"1", `["x"]`}}},
	{"within an object", m{"o": []any{m{"a": "x", "a.b": 1.0, "": 2.0}}}, m{"o": []any{m{"a": "x", "a_b": 1.0, "_": 2.0}}}},
	{"numbers that JSON lacks", m{"n": math.NaN(), "i": math.Inf(-1), "l": []any{"a", m{"x": math.NaN()}}}, m{"n": "NaN", "i": "-Inf", "l": []any{"a", `{"x":"NaN"}`}}},
}

// Names that clash are moved and no value is lost.
func TestNames(t *testing.T) {
	e, to := newTestEncoder(t, "none")
	for _, c := range awkward {
		r := &record.Record{Attributes: c.attributes, Resource: &record.Resource{Node: "n1", Pod: "p", WorkloadKind: "CronJob", Workload: "w"}}
		doc := document(t, e, r, to(r))
		if text := clashes(doc); text != "" {
			t.Errorf("%s: %s", c.name, text)
		}
		maps.DeleteFunc(doc, func(k string, _ any) bool {
			_, ours := e.lastFragment.names[k]
			return ours || k == record.Timestamp || k == record.Message || strings.HasPrefix(k, "data_stream.")
		})
		if diff := cmp.Diff(c.want, doc); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}

	// Objects deeper than Elasticsearch takes become text.
	var nested any = "end"
	for range 30 {
		nested = m{"o": nested}
	}
	r := &record.Record{Attributes: m{"d": nested}}
	doc := document(t, e, r, to(r))
	if text := clashes(doc); text != "" {
		t.Error(text)
	}
	if text, _ := json.Marshal(doc); !strings.Contains(string(text), "end") {
		t.Errorf("%s", text)
	}
}

func TestMaxFields(t *testing.T) {
	e, to := newTestEncoder(t, "none")
	e.maxFields = 2
	r := &record.Record{Attributes: map[string]any{"a": 1.0, "b": 2.0, "c": "x", "d": nil}}
	doc := document(t, e, r, to(r))
	if doc["a"] != 1.0 || doc["b"] != 2.0 || doc["c"] != nil || doc["outrigger.extra"] != `{"c":"x","d":null}` {
		t.Errorf("%v", doc)
	}
}

// clashes says what Elasticsearch would refuse in a document, as a real one was
// seen to do; empty if nothing.
func clashes(doc map[string]any) string {
	kinds := map[string]bool{} // true for objects
	var walk func(prefix string, v any, level int) string
	walk = func(prefix string, v any, level int) string {
		if level > 20 {
			return "too deep: " + prefix
		}
		switch v := v.(type) {
		case nil:
			return ""
		case []any:
			for _, x := range v {
				if bad := walk(prefix, x, level); bad != "" {
					return bad
				}
			}
			return ""
		case map[string]any:
			if prefix != "" {
				if object, seen := kinds[prefix]; seen && !object {
					return prefix + " is a value and an object"
				}
				kinds[prefix] = true
			}
			for k, x := range v {
				name := prefix
				for i, p := range strings.Split(k, ".") {
					if strings.TrimSpace(p) == "" {
						return fmt.Sprintf("an empty part in %q", k)
					}
					if i > 0 {
						if object, seen := kinds[name]; seen && !object {
							return name + " is a value and an object"
						}
						kinds[name] = true
					}
					name += "." + p
				}
				if bad := walk(name, x, level+1+strings.Count(k, ".")); bad != "" {
					return bad
				}
			}
			return ""
		}
		if object, seen := kinds[prefix]; seen && object {
			return prefix + " is an object and a value"
		}
		kinds[prefix] = false
		return ""
	}
	for k := range doc {
		if _, reserved := metadata[k]; reserved {
			return k + " is Elasticsearch's own"
		}
	}
	return walk("", doc, 0)
}

// FuzzAttributes: whatever a structured line says, the document is JSON without a
// name twice, holds nothing that Elasticsearch refuses for its names, and every
// value of the line.
func FuzzAttributes(f *testing.F) {
	f.Add(`{"a":"x","a.b":1,"host":"web","error":"boom","":2,"..":3,"_id":4,"message.x":5,"l":[1,{"b":2}]}`)
	f.Add(`{"attributes":1,"attributes.a":2,"a":3,"a.value":4,"a.value.x":5,"a.b.c":{"d.e":1,"d":2}}`)
	e, err := newEncoder("none", 1, record.MaxAttributes)
	if err != nil {
		f.Fatal(err)
	}
	_, to := newTestEncoder(f, "none")
	resource := &record.Resource{Node: "n", Pod: "p", Namespace: "ns", Service: "s", Labels: map[string]string{"a.b": "c"}}
	f.Fuzz(func(t *testing.T, text string) {
		var attributes map[string]any
		if json.Unmarshal([]byte(text), &attributes) != nil {
			return
		}
		for k := range attributes {
			if !utf8.ValidString(k) {
				return
			}
		}
		r := &record.Record{Body: "b", Resource: resource, Attributes: attributes}
		doc := document(t, e, r, to(r))
		line := bytes.Split(e.out.Bytes(), []byte("\n"))[1]
		if twice := repeated(line); twice != "" {
			t.Fatalf("%q is twice in %s", twice, line)
		}
		// Values may clash with each other within what they hold; only names of
		// attributes are ours to keep apart.
		shallow := map[string]any{}
		for k, v := range doc {
			if _, ok := v.(map[string]any); ok {
				v = map[string]any{}
			}
			if l, ok := v.([]any); ok {
				v = any(0.0)
				if holdsObjects(l) {
					v = map[string]any{}
				}
			}
			shallow[k] = v
		}
		if bad := clashes(shallow); bad != "" {
			t.Fatalf("%s in %s", bad, line)
		}
		over := 0
		for k := range attributes {
			if overridden(k, r, e.lastFragment, to(r)) {
				over++
			}
		}
		if want := len(reference(t, r)); len(attributes)-over <= e.maxFields && len(doc) != want {
			t.Fatalf("%d fields; want %d in %s", len(doc), want, line)
		}
	})
}

// repeated returns a name that is twice at the top of a JSON object.
func repeated(object []byte) string {
	dec := json.NewDecoder(bytes.NewReader(object))
	seen := map[string]bool{}
	if _, err := dec.Token(); err != nil {
		return err.Error()
	}
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return err.Error()
		}
		text, _ := name.(string)
		if seen[text] {
			return text
		}
		seen[text] = true
		var v json.RawMessage
		if err := dec.Decode(&v); err != nil {
			return err.Error()
		}
	}
	return ""
}

// Ids are unique, of one length and in the order of the offsets.
func TestIDs(t *testing.T) {
	offsets := []int64{0, 1, 62, 63, 64, 4095, 4096, 1 << 20, 1<<32 - 1, 1 << 32, 1<<48 - 1}
	var ids []string
	for _, o := range offsets {
		ids = append(ids, string(appendOffset(nil, o)))
	}
	if !slices.IsSorted(ids) || len(slices.Compact(slices.Clone(ids))) != len(ids) {
		t.Errorf("%q", ids)
	}
	for _, s := range ids {
		if len(s) != offsetDigits {
			t.Errorf("%q has %d digits", s, len(s))
		}
	}
	for _, o := range []int64{1 << 48, math.MaxInt64, -1} {
		if s := string(appendOffset(nil, o)); len(s) != 11 {
			t.Errorf("%d: %q", o, s)
		}
	}
	seen := map[string]bool{}
	for _, k := range []placeKey{{"f", "", "c", "n"}, {"f", "", "cn", ""}, {"f", "", "", "cn"}, {"cnf", "", "", ""}, {"f2", "", "c", "n"}} {
		if id := string(newPlace(k).id.text); seen[id] {
			t.Errorf("%+v has another's id", k)
		} else {
			seen[id] = true
		}
	}
	if a, b := newPlace(placeKey{"f", "/a", "c", "n"}), newPlace(placeKey{"f", "/b", "c", "n"}); !bytes.Equal(a.id.text, b.id.text) {
		t.Error("a file that was renamed has another id")
	}
}

// plainBatch is 1000 lines of 200 bytes of four containers.
func plainBatch() ([]*record.Record, int) {
	var batch []*record.Record
	line := strings.Repeat(`2026-11-23 03:00:00.123 INFO  [worker-12] payment accepted id=8f14e45f amount=12.50 `, 3)[:200]
	bodies := 0
	resources := make([]*record.Resource, 4)
	for i := range resources {
		resources[i] = &record.Resource{
			Cluster: "production", Node: "node-17", Namespace: "shop", Pod: fmt.Sprintf("payments-7d9c8b5f6d-x2vz%d", i), PodUID: "0b9c6a3e-98f0-4f3e-8b1d-0a7e3c1f2b4d", Container: "main", Service: "payments",
			WorkloadKind: "Deployment", Workload: "payments", PodIP: "10.1.2.3", ContainerID: strings.Repeat("ab", 32), Image: "registry.example/shop/payments:1.2.3",
			Labels: map[string]string{"app.kubernetes.io/name": "payments", "app.kubernetes.io/version": "1.2.3", "pod-template-hash": "7d9c8b5f6d", "team": "money"},
		}
	}
	for i := range 1000 {
		k := i / 250
		body := fmt.Sprint(i, " ", line)[:200]
		bodies += len(body)
		batch = append(batch, &record.Record{
			Time: time.Date(2026, 11, 23, 3, 0, i/100, i%100*10_000_019, time.UTC), Body: body, Stream: "stdout", Level: "info", Resource: resources[k],
			Origin: record.Origin{File: fmt.Sprint("2049:123456:89abcdef0123456", k), Path: "/var/log/pods/shop_" + resources[k].Pod + "_" + resources[k].PodUID + "/main/0.log", Offset: int64(i * 240), End: int64(i*240 + 240)},
		})
	}
	return batch, bodies
}

// A compressed body is the body: whatever the batch mixes, whatever is rejected in
// it, with either writer, and again after other bodies.
func TestCompressedIsTheSame(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	resources := []*record.Resource{nil, {}}
	for i := range 5 {
		resources = append(resources, &record.Resource{
			Cluster: "c", Node: "n", Namespace: "shop", Pod: fmt.Sprint("payments-", i), Container: "main", Service: []string{"", "payments"}[i%2], Labels: map[string]string{"app": "x", "team": fmt.Sprint(i % 3)},
		})
	}
	o := &Output{cfg: Config{}.withDefaults()}
	index := &Output{cfg: Config{Index: "logs", DataStream: new(bool)}.withDefaults()}
	streams := []*stream{o.newStream("outrigger", false, time.Time{}), o.newStream("outrigger", true, time.Time{}), o.newStream("access", false, time.Time{}), index.newStream("", false, time.Time{})}
	to := func(r *record.Record) *stream { return streams[int(r.Origin.Offset)%len(streams)] }
	plain, _ := newTestEncoder(t, "none")
	fast, _ := newTestEncoder(t, "gzip")
	small, err := newEncoder("gzip", 6, record.MaxAttributes)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 6 {
		var batch []*record.Record
		for n := range 300 {
			r := randomRecord(rng, resources)
			if n%10 != 0 { // mostly lines, with runs of one container
				r.Attributes = nil
			}
			if n%3 > 0 {
				r.Resource, r.Origin.Path = batch[n-1].Resource, batch[n-1].Origin.Path
			}
			if n%50 == 7 {
				r.Attributes = map[string]any{"no": "JSON", "what": func() {}}
			}
			if n == 100 && round%2 == 0 {
				r.Body = strings.Repeat("a long line ", record.MaxBody/12)
			}
			batch = append(batch, r)
		}
		rejected := plain.encode(batch, to)
		if len(rejected) == 0 || len(plain.sent) == 0 {
			t.Fatalf("%d rejected, %d sent", len(rejected), len(plain.sent))
		}
		for name, e := range map[string]*encoder{"1": fast, "6": small} {
			if diff := cmp.Diff(rejected, e.encode(batch, to)); diff != "" {
				t.Errorf("level %s: %s", name, diff)
			}
			if diff := cmp.Diff(plain.sent, e.sent); diff != "" {
				t.Errorf("level %s: %s", name, diff)
			}
			z, err := gzip.NewReader(&e.out)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(z)
			if err != nil || !bytes.Equal(text, plain.out.Bytes()) {
				t.Fatalf("round %d, level %s: %d bytes of %d: %v", round, name, len(text), plain.out.Len(), err)
			}
		}
	}
}

// A record costs no allocation once its container and file are known, unless its
// attributes hold objects or have to be renamed.
func TestEncodeDoesNotAllocate(t *testing.T) {
	batch, _ := plainBatch()
	for i, r := range batch {
		if i%2 == 0 {
			r.Attributes = map[string]any{"http.response.status_code": 503.0, "user.name": "u", "took": 1.5, "ok": true, "tags": []any{"a", "b"}, "event.dataset": "outrigger.access"}
		}
	}
	for _, compression := range []string{"none", "gzip"} {
		e, to := newTestEncoder(t, compression)
		e.encode(batch, to)
		if n := testing.AllocsPerRun(20, func() { e.encode(batch, to) }); n > 0 {
			t.Errorf("%s: %v allocations for %d records; want none", compression, n, len(batch))
		}
	}
}

// benchmarkEncode reports MB/s of the lines' own bytes.
func benchmarkEncode(b *testing.B, encode func([]*record.Record) int) {
	batch, bodies := plainBatch()
	b.SetBytes(int64(bodies))
	b.ReportAllocs()
	size := 0
	for b.Loop() {
		size = encode(batch)
	}
	b.ReportMetric(float64(size)/float64(bodies), "sent/body")
}

func BenchmarkEncode(b *testing.B) {
	for _, compression := range []string{"none", "gzip"} {
		b.Run(compression, func(b *testing.B) {
			e, to := newTestEncoder(b, compression)
			benchmarkEncode(b, func(batch []*record.Record) int {
				e.encode(batch, to)
				return e.out.Len()
			})
		})
	}
}

// BenchmarkFieldsAndJSON is what encode does, by record.Fields and encoding/json,
// with the compression of the standard library at its default: to compare with.
func BenchmarkFieldsAndJSON(b *testing.B) {
	for _, compression := range []string{"none", "gzip"} {
		b.Run(compression, func(b *testing.B) {
			zip := gzip.NewWriter(io.Discard)
			benchmarkEncode(b, func(batch []*record.Record) int {
				var body, out bytes.Buffer
				enc := json.NewEncoder(&body)
				enc.SetEscapeHTML(false)
				for _, r := range batch {
					id := newFileID("c", "n", r.Origin.File)
					fields := r.Fields()
					fields["data_stream.type"], fields["data_stream.dataset"], fields["data_stream.namespace"] = "logs", "outrigger", "default"
					if err := enc.Encode(map[string]any{"create": map[string]any{"_index": "logs-outrigger-default", "_id": string(id[:])}}); err != nil {
						b.Fatal(err)
					}
					if err := enc.Encode(fields); err != nil {
						b.Fatal(err)
					}
				}
				if compression == "none" {
					return body.Len()
				}
				zip.Reset(&out)
				_, _ = zip.Write(body.Bytes())
				_ = zip.Close()
				return out.Len()
			})
		})
	}
}

// An index takes times of 1970 to 2262; a record with another is not refused for it.
func TestTimesThatNoIndexTakes(t *testing.T) {
	read := time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC)
	for _, c := range []struct{ written, read, want time.Time }{
		{written: time.Unix(0, 0), read: read, want: time.Unix(0, 0)},
		{written: time.Unix(0, -1), read: read, want: read},
		{written: time.Time{}, read: read, want: read},
		{written: time.Unix(0, math.MaxInt64), read: read, want: time.Unix(0, math.MaxInt64)},
		{written: time.Unix(0, math.MaxInt64).Add(1), read: read, want: read},
		{written: time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), read: time.Time{}, want: time.Unix(0, 0)},
		{written: time.Time{}, read: time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC), want: time.Unix(0, math.MaxInt64)},
	} {
		if got := timestamp(&record.Record{Time: c.written, Observed: c.read}); !got.Equal(c.want) {
			t.Errorf("written %v, read %v: %v; want %v", c.written, c.read, got, c.want)
		}
	}
}
