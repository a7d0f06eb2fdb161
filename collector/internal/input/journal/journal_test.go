package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T, cfg Config) *Writer {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	if cfg.Pending == nil {
		cfg.Pending = func() int64 { return 0 }
	}
	w, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func one(body string) []*record.Record {
	return []*record.Record{{Body: body, Resource: &record.Resource{}}}
}

// read returns the bodies of a folder in the order of the tail: old files by
// name, then the live one.
func read(t *testing.T, folder string) (bodies []string, malformed int) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "0.log.*"))
	if err != nil {
		t.Fatal(err)
	}
	var d Decoder
	for _, f := range append(files, filepath.Join(folder, live)) {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for text := range bytes.Lines(b) {
			var r record.Record
			if err := d.Decode(text, &r); err != nil {
				malformed++
				continue
			}
			bodies = append(bodies, r.Body)
		}
	}
	return bodies, malformed
}

func TestRoundTrip(t *testing.T) {
	res := &record.Resource{
		Cluster: "c", Node: "n", Namespace: "ns", Pod: "p", PodUID: "u", Container: "k", Restart: 3, Service: "s", Labels: map[string]string{"a.b/c": "d\n"},
		WorkloadKind: "Deployment", Workload: "w", PodIP: "::1", ContainerID: "id", Image: "i", Annotations: map[string]string{"x": "y"}, NamespaceLabels: map[string]string{"t": "u"},
	}
	in := []*record.Record{
		{
			Time: time.Date(2026, 11, 23, 19, 53, 0, 123456789, time.UTC), Observed: time.Date(2026, 11, 23, 19, 53, 1, 1, time.UTC), Stream: "stdout", Body: "a \"b\" \\ \n\r\t\x00\x1f é 😀 \u2028", Level: "warn",
			TraceID: "0af7651916cd43dd8448eb211c80319c", SpanID: "b7ad6b7169203331", Service: "own", TruncatedBytes: 7, Resource: res,
			Attributes: map[string]any{"n": 1.5, "i": 9007199254740991.0, "big": 1e300, "s": "x", "t": true, "z": nil, "l": []any{"a", 1.0, nil}, "m": map[string]any{"k": map[string]any{}}, "é\"": "q"},
		},
		{Body: "", Resource: res},
		{Body: "x", Resource: &record.Resource{}},
	}
	var e encoder
	var d Decoder
	var got []*record.Record
	for _, r := range in {
		text := e.append(nil, r)
		if bytes.IndexByte(text, '\n') != len(text)-1 {
			t.Errorf("%q is not one line", text)
		}
		out := new(record.Record)
		if err := d.Decode(text, out); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		got = append(got, out)
	}
	if diff := cmp.Diff(in, got); diff != "" {
		t.Error(diff)
	}
	if got[0].Resource != got[1].Resource {
		t.Error("equal resources are two")
	}
}

// What is over a limit is cut and counted, and the rest of the record stays.
func TestLimits(t *testing.T) {
	var e encoder
	var d Decoder
	many := map[string]any{}
	for i := range 2 * record.MaxAttributes {
		many[fmt.Sprint("a", i)] = "v"
	}
	deep := any("x")
	for range 100 {
		deep = []any{deep}
	}
	labels := map[string]string{}
	for i := range 5000 {
		labels[fmt.Sprint("label", i)] = "some value"
	}
	for name, r := range map[string]*record.Record{
		"body":       {Body: strings.Repeat("x", 3<<20)},
		"escapes":    {Body: strings.Repeat("\x01", 1<<20)},
		"runes":      {Body: strings.Repeat("😀", 1<<19)},
		"attributes": {Attributes: many},
		"name":       {Attributes: map[string]any{strings.Repeat("n", 1<<20): 1.0}},
		"value":      {Attributes: map[string]any{"k": strings.Repeat("v", 1<<20)}},
		"values":     {Attributes: map[string]any{"a": strings.Repeat("v", 200<<10), "b": strings.Repeat("v", 200<<10)}},
		"depth":      {Attributes: map[string]any{"k": deep}},
		"kind":       {Attributes: map[string]any{"k": make(chan int)}},
		"level":      {Level: strings.Repeat("l", 1<<20)},
		"resource":   {Resource: &record.Resource{Labels: labels, Namespace: "kept"}},
	} {
		t.Run(name, func(t *testing.T) {
			text := e.append(nil, r)
			if len(text) > MaxLine+1 {
				t.Errorf("%d bytes", len(text))
			}
			var out record.Record
			if err := d.Decode(text, &out); err != nil {
				t.Fatal(err)
			}
			if out.TruncatedBytes == 0 {
				t.Error("not counted")
			}
			if !utf8.ValidString(out.Body) || len(out.Attributes) > record.MaxAttributes {
				t.Errorf("%d attributes", len(out.Attributes))
			}
			if name == "resource" && out.Resource.Namespace != "kept" {
				t.Errorf("%+v", out.Resource)
			}
		})
	}
	var out record.Record
	if err := d.Decode(e.append(nil, &record.Record{Attributes: map[string]any{"a": math.NaN(), "b": math.Inf(-1)}, Time: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)}), &out); err != nil || out.Attributes["a"] != "NaN" || out.Attributes["b"] != "-Inf" || !out.Time.IsZero() {
		t.Errorf("%v %+v", err, out)
	}
}

func FuzzRoundTrip(f *testing.F) {
	f.Add("body", "stdout", "info", "key", "value", 1.5, int64(5), "ns")
	f.Add("\xff\"\n\x00", "", "", "", "\\", math.Inf(1), int64(-1), "é")
	f.Fuzz(func(t *testing.T, body, stream, level, key, val string, number float64, at int64, namespace string) {
		in := record.Record{
			Body: body, Stream: stream, Level: level, Time: time.Unix(0, at).UTC(), Resource: &record.Resource{Namespace: namespace},
			Attributes: map[string]any{key: val, key + "n": number, key + "l": []any{val, number}},
		}
		var e encoder
		text := e.append(nil, &in)
		if bytes.IndexByte(text, '\n') != len(text)-1 || len(text) > MaxLine+1 {
			t.Fatalf("not one line: %q", text)
		}
		var d Decoder
		var out record.Record
		if err := d.Decode(text, &out); err != nil {
			t.Fatalf("%v: %q", err, text)
		}
		if len(body) < 1000 && utf8.ValidString(body) && out.Body != body {
			t.Errorf("body %q, was %q", out.Body, body)
		}
		if out.Resource.Namespace != strings.ToValidUTF8(namespace, "\uFFFD") && utf8.ValidString(namespace) {
			t.Errorf("namespace %q, was %q", out.Resource.Namespace, namespace)
		}
		if !out.Time.Equal(in.Time) {
			t.Errorf("time %s, was %s", out.Time, in.Time)
		}
		if len(key) < 100 && len(val) < 1000 && utf8.ValidString(key) && utf8.ValidString(val) {
			if out.Attributes[key] != val {
				t.Errorf("attribute %v, was %q", out.Attributes[key], val)
			}
			if got, ok := out.Attributes[key+"n"].(float64); ok && got != number {
				t.Errorf("number %v, was %v", got, number)
			}
		}
		again := e.append(nil, &out) // what was written can be written again, to the same
		if utf8.ValidString(body+stream+level+key+val+namespace) && len(text) < 4096 && string(again) != string(text) {
			t.Errorf("%q\n%q", text, again)
		}
	})
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"t":"2026-11-23T19:53:00Z","body":"x","attrs":{"a":[1,{"b":null}]},"res":{"namespace":"n"}}`))
	f.Add([]byte(`{"body":"x","res":7}`))
	f.Add([]byte(`{"bo`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var d Decoder
		r := record.Record{Body: "before"}
		if err := d.Decode(text, &r); err != nil {
			if !errors.Is(err, ErrMalformed) || r.Body != "before" || r.Resource != nil {
				t.Errorf("%v, and the record is %+v", err, r)
			}
			return
		}
		if r.Resource == nil {
			t.Error("no resource")
		}
		var e encoder
		var out record.Record
		if err := d.Decode(e.append(nil, &r), &out); err != nil {
			t.Errorf("%q cannot be written again: %v", text, err)
		}
	})
}

// Files are renamed as kubelet does, with names that grow though the clock stands
// still, and the oldest goes when it is acknowledged and not before.
func TestRotation(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "new", "journal")
	var pending atomic.Int64
	now := time.Date(2026, 11, 23, 19, 53, 0, 0, time.UTC)
	cfg := Config{Folder: folder, MaxFile: 1000, MaxBytes: 5000, MaxPending: 3000, Pending: pending.Load, Now: func() time.Time { return now }}
	w := open(t, cfg)
	body := strings.Repeat("x", 480)
	put := func(i int) error { return w.Append(t.Context(), one(fmt.Sprint(i, " ", body))) }
	for i := range 7 {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	// A file that somebody else made under the next name stays as it is.
	taken := filepath.Join(folder, "0.log.20261123-195303")
	if err := os.WriteFile(taken, []byte("{\"body\":\"mine\"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := put(99); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	w = open(t, cfg) // and it goes on
	for i := 7; i < 9; i++ {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	bodies, malformed := read(t, folder)
	if len(bodies) != 10 || malformed != 0 {
		t.Errorf("%d bodies, %d malformed", len(bodies), malformed)
	}
	n := 0
	for _, b := range bodies {
		if b == "mine" {
			continue
		}
		if !strings.HasPrefix(b, fmt.Sprint(n, " ")) {
			t.Errorf("at %d: %.10s", n, b)
		}
		n++
	}
	// All of it is pending: nothing is deleted, and soon all is refused.
	pending.Store(3000)
	i := 9
	var full *FullError
	for ; i < 100; i++ {
		if err := put(i); errors.As(err, &full) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pending.Add(500)
	}
	if full == nil || full.RetryAfter <= 0 {
		t.Fatalf("never full after %d records", i)
	}
	refused := i
	pending.Store(600) // two records
	for ; i < 40; i++ {
		if err := put(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	bodies, _ = read(t, folder)
	if total := size(t, folder); total > 5000 || len(bodies) < 2 || !strings.HasPrefix(bodies[len(bodies)-1], "39 ") {
		t.Errorf("%d bytes, %d bodies", total, len(bodies))
	}
	if v := testutil.ToFloat64(w.metrics.refused.WithLabelValues("full")); v != 1 || refused < 9 {
		t.Errorf("%v refused, at %d", v, refused)
	}
}

func size(t *testing.T, folder string) (total int64) {
	t.Helper()
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		total += info.Size()
	}
	return total
}

// Where Pending is wrong in the small, what is not acknowledged is still never
// deleted; when the outputs have caught up, the room is found again.
func TestNothingPendingIsDeleted(t *testing.T) {
	var pending atomic.Int64
	folder := t.TempDir()
	w := open(t, Config{Folder: folder, MaxFile: 1000, MaxBytes: 5000, MaxPending: 3000, Pending: func() int64 { return pending.Load() }})
	body := strings.Repeat("x", 480)
	n := 0
	var full *FullError
	for ; n < 100; n++ {
		pending.Store(0) // Append believes that there is room,
		q := &request{text: (&encoder{}).append(nil, one(fmt.Sprint(n, " ", body))[0]), taken: make(chan error, 1)}
		pending.Store(1 << 40) // and the deletion that nothing is through
		if err := w.enqueue(q); errors.As(err, &full) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if err := <-q.taken; err != nil {
			t.Fatal(err)
		}
	}
	if full == nil {
		t.Fatal("never full")
	}
	if bodies, _ := read(t, folder); len(bodies) != n {
		t.Errorf("%d of %d are there", len(bodies), n)
	}
	pending.Store(0)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if err := w.Append(t.Context(), one("after")); err == nil {
			break
		} else if !errors.As(err, &full) || time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// The torn end of a request that was never taken does not spoil the next record.
func TestTorn(t *testing.T) {
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, live), []byte("{\"body\":\"whole\"}\n{\"body\":\"to"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := open(t, Config{Folder: folder})
	if err := w.Append(t.Context(), one("next")); err != nil {
		t.Fatal(err)
	}
	bodies, malformed := read(t, folder)
	if diff := cmp.Diff([]string{"whole", "next"}, bodies); diff != "" || malformed != 1 {
		t.Errorf("%s%d malformed", diff, malformed)
	}
	// A disk that fails: the sender is told, every time, and it works again later.
	good := w.file
	broken, err := os.Open(filepath.Join(folder, live)) // cannot be written to
	if err != nil {
		t.Fatal(err)
	}
	w.file = broken // the goroutine that commits waits
	for range 2 {
		if err := w.Append(t.Context(), one("lost?")); err == nil {
			t.Error("taken by a broken disk")
		}
	}
	w.file = good
	if err := errors.Join(broken.Close(), w.Append(t.Context(), one("again"))); err != nil {
		t.Fatal(err)
	}
	if bodies, _ := read(t, folder); bodies[len(bodies)-1] != "again" {
		t.Errorf("%q", bodies)
	}
}

// Many senders share a write to the disk, and each record is there when its
// sender is told so.
func TestGroupCommit(t *testing.T) {
	folder := t.TempDir()
	w := open(t, Config{Folder: folder})
	const senders, each = 32, 20
	var group sync.WaitGroup
	for s := range senders {
		group.Go(func() {
			for i := range each {
				if err := w.Append(context.Background(), one(fmt.Sprint(s, "/", i))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	group.Wait()
	bodies, malformed := read(t, folder)
	if len(bodies) != senders*each || malformed != 0 {
		t.Errorf("%d bodies, %d malformed", len(bodies), malformed)
	}
	next := map[string]int{}
	for _, b := range bodies {
		s, i, _ := strings.Cut(b, "/")
		if fmt.Sprint(next[s]) != i {
			t.Errorf("sender %s: %s where %d should be", s, i, next[s])
		}
		next[s]++
	}
	if n := testutil.ToFloat64(w.metrics.commits); n >= senders*each/2 {
		t.Errorf("%v commits for %d requests", n, senders*each)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Append(ctx, one("x")); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"how far behind": {Folder: t.TempDir()},
		"less two files": {Folder: t.TempDir(), Pending: func() int64 { return 0 }, MaxBytes: 100, MaxFile: 50},
		"name a folder":  {Folder: "/proc/none", Pending: func() int64 { return 0 }},
	} {
		if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// Once buffers have grown, writing a record down allocates nothing.
func TestAllocations(t *testing.T) {
	r := &record.Record{Time: time.Unix(1, 2), Body: "a line of text", Level: "info", Resource: &record.Resource{Namespace: "n"}, Attributes: map[string]any{"http.response.status_code": 200.0, "url.path": "/x"}}
	var e encoder
	dst := e.append(make([]byte, 0, 4096), r)
	if n := testing.AllocsPerRun(100, func() { dst = e.append(dst[:0], r) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkEncode(b *testing.B) {
	r := &record.Record{Time: time.Unix(1, 2), Body: strings.Repeat("a line of text ", 10), Level: "info", Resource: &record.Resource{Namespace: "n"}, Attributes: map[string]any{"http.response.status_code": 200.0, "url.path": "/x"}}
	var e encoder
	dst := e.append(nil, r)
	b.SetBytes(int64(len(dst)))
	b.ReportAllocs()
	for b.Loop() {
		dst = e.append(dst[:0], r)
	}
}

func BenchmarkDecode(b *testing.B) {
	r := &record.Record{Time: time.Unix(1, 2), Body: strings.Repeat("a line of text ", 10), Level: "info", Resource: &record.Resource{Namespace: "n"}, Attributes: map[string]any{"http.response.status_code": 200.0, "url.path": "/x"}}
	var e encoder
	text := e.append(nil, r)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	var d Decoder
	for b.Loop() {
		if err := d.Decode(text, r); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	w, err := Open(Config{Folder: b.TempDir(), Pending: func() int64 { return 0 }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	var batch []*record.Record
	for range 512 {
		batch = append(batch, one(strings.Repeat("a line of text ", 10))...)
	}
	b.SetBytes(512 * 150)
	b.RunParallel(func(p *testing.PB) {
		for p.Next() {
			if err := w.Append(context.Background(), batch); err != nil {
				b.Error(err)
			}
		}
	})
}
