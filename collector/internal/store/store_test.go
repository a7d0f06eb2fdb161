package store

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/outrigger-mesh/outrigger/collector/internal/query"
	"github.com/outrigger-mesh/outrigger/collector/record"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.Folder == "" {
		cfg.Folder = t.TempDir()
	}
	s, err := Open(cfg, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// line makes a record of file f; its offset is its place in the file.
func line(at time.Time, file string, offset int, service, body string, attributes map[string]any) *record.Record {
	return &record.Record{
		Time: at, Observed: at, Body: body, Level: "info",
		Resource:   &record.Resource{Namespace: "shop", Pod: service + "-0", Service: service},
		Attributes: attributes,
		Origin:     record.Origin{File: file, Path: "/var/log/pods/" + file, Offset: int64(offset), End: int64(offset) + 1},
	}
}

func search(t testing.TB, s *Store, text string, q Query) []string {
	t.Helper()
	e, err := query.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	q.Expr = e
	out := []string{}
	for l, err := range s.Search(t.Context(), q) {
		if err != nil {
			t.Fatalf("search %s: %v", text, err)
		}
		var f map[string]any
		if err := json.Unmarshal(l.JSON, &f); err != nil {
			t.Fatal(err)
		}
		out = append(out, f["message"].(string))
	}
	return out
}

// A record is found by text, field, trace and time as soon as Append returns,
// newest first over the days; appending it again changes nothing.
func TestSearch(t *testing.T) {
	s := open(t, Config{})
	today := time.Now().UTC().Truncate(24 * time.Hour)
	yesterday := today.Add(-24 * time.Hour)
	batch := []*record.Record{
		line(yesterday.Add(23*time.Hour), "a", 0, "payments", "first: card declined", map[string]any{"http.response.status_code": 402.0}),
		line(today.Add(time.Second), "a", 100, "payments", "third: declined card", nil),
		line(today, "b", 0, "cart", "second: card_added", map[string]any{"event.dataset": "outrigger.access"}),
		line(today.Add(time.Second), "a", 200, "payments", "fourth, at the same time", nil),
	}
	batch[1].TraceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	for range 2 { // the second time is a resend
		if err := s.Append(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	f := func(text string, q Query, want ...string) {
		t.Helper()
		if diff := cmp.Diff(append([]string{}, want...), search(t, s, text, q)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", text, diff)
		}
	}
	const first, second, third, fourth = "first: card declined", "second: card_added", "third: declined card", "fourth, at the same time"
	f("", Query{}, fourth, third, second, first)
	f("", Query{Limit: 2}, fourth, third)
	f("card", Query{}, third, second, first)
	f(`"card declined"`, Query{}, first)
	f("service.name:payments declined", Query{}, third, first)
	f("service.name:PAY*", Query{}, fourth, third, first)
	f("4bf92f3577b34da6a3ce929d0e0e4736", Query{}, third)
	f("trace.id:4bf92f3577b34da6a3ce929d0e0e4736", Query{}, third)
	f("http.response.status_code>400", Query{}, first)
	f("NOT card", Query{}, fourth)
	f("event.dataset:outrigger.access OR http.response.status_code:402", Query{}, second, first)
	f("", Query{From: today}, fourth, third, second)
	f("", Query{To: today}, first)
	f("", Query{From: today, To: today.Add(time.Second)}, second)
	f(`@timestamp>="`+today.Add(time.Second).Format(time.RFC3339)+`"`, Query{}, fourth, third)
	if st := s.Stats(); st.Stored != 4 || st.Duplicates != 4 || st.Days != 2 || st.Bytes == 0 {
		t.Errorf("stats %+v", st)
	}
}

// What was acknowledged is there after a restart, and resends are still
// recognised.
func TestReopen(t *testing.T) {
	folder := t.TempDir()
	now := time.Now()
	batch := []*record.Record{line(now, "a", 0, "x", "one", nil), line(now, "a", 10, "x", "two", nil)}
	s, err := Open(Config{Folder: folder}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Append(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Folder: folder})
	if err := s.Append(t.Context(), append(batch, line(now, "a", 20, "x", "three", nil))); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"one", "three", "two"}, slices.Sorted(slices.Values(search(t, s, "", Query{})))); diff != "" {
		t.Error(diff)
	}
	if st := s.Stats(); st.Duplicates != 2 {
		t.Errorf("stats %+v; want 2 duplicates", st)
	}
}

// A clock that says whole seconds puts very many records into one microsecond;
// when the order of arrival comes round, the ids are taken.
func TestManyRecordsOfOneMicrosecond(t *testing.T) {
	s := open(t, Config{})
	now := time.Now().UTC().Truncate(time.Second)
	const rounds, each = 4, 300
	for round := range rounds {
		var batch []*record.Record
		for i := range each {
			batch = append(batch, line(now, "a", round*each+i, "x", "b", nil))
		}
		s.seq = 0 // as after 65,536 records
		if err := s.Append(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Stats().Stored; got != rounds*each {
		t.Fatalf("%d stored; want %d", got, rounds*each)
	}
	if got := len(search(t, s, "", Query{From: now, To: now.Add(1), Limit: MaxResults})); got != rounds*each {
		t.Errorf("%d found; want %d", got, rounds*each)
	}
}

// The index proposes and the compiled query decides: a search gives what reading
// every record would give.
func TestSearchIsExact(t *testing.T) {
	s := open(t, Config{})
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	base := time.Now().Add(-time.Hour)
	var batch []*record.Record
	for i := range 500 {
		r := line(base.Add(time.Duration(i)*time.Millisecond), "f", i, pick("payments", "Cart", "größe"),
			fmt.Sprintf("%d %s-%s %s", i, pick("card", "Karte", "CARD_x"), pick("declined", "ok"), pick("日本 go", "a.b/c", "42")), map[string]any{"http.response.status_code": float64(200 + 100*random.IntN(4))})
		if random.IntN(2) == 0 {
			r.Attributes["error.message"] = pick("declined twice", "timeout")
		}
		batch = append(batch, r)
	}
	if err := s.Append(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"card", "card*", `"card declined"`, "日本", "service.name:cart", "service.name:GRÖSSE", "service.name:größe", "NOT declined", "http.response.status_code:200",
		"http.response.status_code:(200 OR 500) card NOT error.message:timeout", "a.b", "*eclined", "error.message:*", "(ok OR timeout) service.name:payments", "42 OR 43", "kubernetes.pod.name:payments-0",
	} {
		match := query.Compile(must(query.Parse(text)))
		var want []string
		for _, r := range slices.Backward(batch) {
			if match(r.Fields()) {
				want = append(want, r.Body)
			}
		}
		if diff := cmp.Diff(want, search(t, s, text, Query{}), cmp.Comparer(func(a, b []string) bool { return slices.Equal(a, b) })); diff != "" {
			t.Errorf("%s: %s", text, diff)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Old days are deleted as files; what is too old or from the future is refused by
// name and the rest of the batch is stored.
func TestRetention(t *testing.T) {
	folder := t.TempDir()
	now := time.Now().UTC()
	s, err := Open(Config{Folder: folder, Retention: 240 * time.Hour}, quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Append(t.Context(), []*record.Record{line(now.Add(-100*time.Hour), "a", 0, "x", "old", nil), line(now, "a", 1, "x", "new", nil)}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Folder: folder, Retention: 24 * time.Hour})
	if diff := cmp.Diff([]string{"new"}, search(t, s, "", Query{})); diff != "" {
		t.Error(diff)
	}
	files, _ := filepath.Glob(filepath.Join(folder, "logs-*.db"))
	if len(files) != 1 {
		t.Errorf("files %v; want today's alone", files)
	}
	err = s.Append(t.Context(), []*record.Record{
		line(now.Add(-100*time.Hour), "a", 2, "x", "too old", nil), line(now, "a", 3, "x", "good", nil), line(now.Add(72*time.Hour), "a", 4, "x", "future", nil),
	})
	var refused *RefusedError
	if !errors.As(err, &refused) || len(refused.Records) != 2 || refused.Records[0].Index != 0 || refused.Records[1].Index != 2 {
		t.Fatalf("error %v; want records 0 and 2 refused", err)
	}
	if diff := cmp.Diff([]string{"good", "new"}, slices.Sorted(slices.Values(search(t, s, "", Query{})))); diff != "" {
		t.Error(diff)
	}
}

// maxBytes: the oldest day makes room for the newest; a day older than all that
// is kept is refused; the newest day alone at the limit is an error.
func TestMaxBytes(t *testing.T) {
	s := open(t, Config{})
	s.cfg.MaxBytes = 4 << 20 // smaller than Validate allows, for speed
	now := time.Now().UTC()
	random := rand.New(rand.NewPCG(1, 2))
	n := 0
	fill := func(at time.Time) error {
		var batch []*record.Record
		for range 200 {
			body := make([]byte, 1024)
			for i := range body {
				body[i] = 'a' + byte(random.IntN(26))
			}
			n++
			batch = append(batch, line(at, "a", n, "x", string(body), nil))
		}
		return s.Append(t.Context(), batch)
	}
	for range 4 {
		if err := fill(now.Add(-48 * time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	for range 30 {
		if err = fill(now); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), s.cfg.Folder) || !strings.Contains(err.Error(), "raise maxBytes") {
		t.Errorf("error %v; want ErrFull with the folder and the remedy", err)
	}
	if st := s.Stats(); st.Days != 1 {
		t.Errorf("%d days; want the newest alone", st.Days)
	}
	var refused *RefusedError
	if err := fill(now.Add(-48 * time.Hour)); !errors.As(err, &refused) || len(refused.Records) != 200 {
		t.Errorf("a day older than what is kept: %v; want it refused", err)
	}
}

// A full disk is an error that says what to do; when there is space again the
// same batch goes in, once.
func TestDiskFull(t *testing.T) {
	s := open(t, Config{})
	now := time.Now().UTC()
	if err := s.Append(t.Context(), []*record.Record{line(now, "a", 0, "x", "before", nil)}); err != nil {
		t.Fatal(err)
	}
	d := s.days[now.Format(time.DateOnly)]
	pages := func(n int) {
		if _, err := d.write.Exec(fmt.Sprintf("PRAGMA max_page_count = %d", n)); err != nil {
			t.Fatal(err)
		}
	}
	pages(1) // SQLite takes the pages that it has
	var batch []*record.Record
	for i := range 100 {
		batch = append(batch, line(now, "b", i, "x", strings.Repeat("full ", 300), nil))
	}
	for range 2 {
		err := s.Append(t.Context(), batch)
		if !errors.Is(err, ErrFull) || !strings.Contains(err.Error(), s.cfg.Folder) || !strings.Contains(err.Error(), "free space") {
			t.Fatalf("error %v; want ErrFull with the folder and the remedy", err)
		}
	}
	if diff := cmp.Diff([]string{"before"}, search(t, s, "", Query{})); diff != "" {
		t.Errorf("a failed batch left something: %s", diff)
	}
	pages(1 << 20)
	if err := s.Append(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	if got := len(search(t, s, "full", Query{})); got != 100 {
		t.Errorf("%d records after the disk has space again; want 100", got)
	}
}

// Damage that shows only when a page is read must not stop today's logs either.
func TestDayDamagedWithin(t *testing.T) {
	folder := t.TempDir()
	now := time.Now().UTC()
	s := open(t, Config{Folder: folder})
	batch := func(file string) (out []*record.Record) {
		for i := range 200 {
			out = append(out, line(now, file, i, "x", strings.Repeat("words ", 100), nil))
		}
		return out
	}
	if err := errors.Join(s.Append(t.Context(), batch("a")), s.Close()); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(folder, "logs-"+now.Format(time.DateOnly)+".db")
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := len(b) / 2; i < len(b); i++ { // opening it reads the beginning only
		b[i] = 0xa5
	}
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, Config{Folder: folder})
	if err := s.Append(t.Context(), batch("b")); err != nil {
		t.Fatal(err)
	}
	if got := len(search(t, s, "words", Query{})); got != 200 {
		t.Errorf("%d records after the damage; want 200", got)
	}
	if aside, err := filepath.Glob(name + ".damaged-*"); err != nil || len(aside) == 0 {
		t.Errorf("nothing is set aside: %v", err)
	}
}

// What a user can mend is said with its place and the remedy.
func TestRemedies(t *testing.T) {
	s := open(t, Config{})
	f := func(code int, words ...string) {
		t.Helper()
		got := remedy(code)
		for _, w := range words {
			if !strings.Contains(got, w) {
				t.Errorf("code %d: %q does not mention %q", code, got, w)
			}
		}
	}
	f(sqlite3.SQLITE_IOERR, "free space", "quota", "goes on by itself")
	f(sqlite3.SQLITE_CANTOPEN, "this user may write to")
	f(sqlite3.SQLITE_READONLY, "this user may write to")

	if err := os.RemoveAll(s.cfg.Folder); err != nil {
		t.Fatal(err)
	}
	if err := s.Append(t.Context(), []*record.Record{line(time.Now(), "a", 0, "x", "y", nil)}); err == nil || !strings.Contains(err.Error(), "this user may write to") {
		t.Errorf("with the folder gone: %v", err)
	}
}

// A database that is damaged is set aside under another name.
func TestDamagedDay(t *testing.T) {
	folder := t.TempDir()
	now := time.Now().UTC()
	name := filepath.Join(folder, "logs-"+now.Format(time.DateOnly)+".db")
	if err := os.WriteFile(name, []byte(strings.Repeat("this is no database", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, Config{Folder: folder})
	if err := s.Append(t.Context(), []*record.Record{line(now, "a", 0, "x", "after", nil)}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"after"}, search(t, s, "", Query{})); diff != "" {
		t.Error(diff)
	}
	if aside, _ := filepath.Glob(name + ".damaged-*"); len(aside) != 1 {
		t.Errorf("set aside: %v; want one file", aside)
	}
}

// More days than may be open at once are all searched.
func TestManyDays(t *testing.T) {
	s := open(t, Config{Retention: 1000 * time.Hour})
	now := time.Now().UTC()
	for i := range 3 * maxOpenDays {
		if err := s.Append(t.Context(), []*record.Record{line(now.Add(-time.Duration(i)*24*time.Hour), "a", i, "x", fmt.Sprint(i), nil)}); err != nil {
			t.Fatal(err)
		}
	}
	got := search(t, s, "", Query{})
	if len(got) != 3*maxOpenDays || got[0] != "0" || got[23] != "23" {
		t.Errorf("found %v", got)
	}
	open := 0
	for _, d := range s.days {
		if d.isOpen() {
			open++
		}
	}
	if open > maxOpenDays {
		t.Errorf("%d databases open; want at most %d", open, maxOpenDays)
	}
}

func TestSearchDeadline(t *testing.T) {
	s := open(t, Config{})
	if err := s.Append(t.Context(), []*record.Record{line(time.Now(), "a", 0, "x", "y", nil)}); err != nil {
		t.Fatal(err)
	}
	s.cfg.SearchTimeout = time.Nanosecond
	for _, err := range s.Search(t.Context(), Query{}) {
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "shorten the time range") {
			t.Errorf("error %v; want the deadline and a remedy", err)
		}
		return
	}
	t.Error("no error")
}

// A live tail gets the matching records that are appended after it began, a
// resend not again; one that is too slow is told how much it missed.
func TestFollow(t *testing.T) {
	s := open(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	now := time.Now()
	if err := s.Append(t.Context(), []*record.Record{line(now, "a", 0, "x", "before", nil)}); err != nil {
		t.Fatal(err)
	}
	tail := s.Follow(ctx, query.Match{Field: "service.name", Value: query.Pattern{"x"}})
	if err := s.Append(t.Context(), []*record.Record{line(now, "a", 0, "x", "before", nil), line(now, "a", 1, "y", "other", nil), line(now, "a", 2, "x", "after", nil)}); err != nil {
		t.Fatal(err)
	}
	var batch []*record.Record
	for i := range followerQueue + 9 {
		batch = append(batch, line(now, "b", i, "x", "more", nil))
	}
	if err := s.Append(t.Context(), batch); err != nil {
		t.Fatal(err)
	}
	var got []string
	for l, err := range tail {
		var lagged *LaggedError
		if errors.As(err, &lagged) {
			got = append(got, fmt.Sprintf("skipped %d", lagged.Skipped))
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(l.JSON), `"after"`) {
			got = append(got, "after")
			cancel()
		}
	}
	if diff := cmp.Diff([]string{"skipped 10", "after"}, got); diff != "" {
		t.Error(diff)
	}
	if st := s.Stats(); st.Followers != 0 || st.Skipped != 10 {
		t.Errorf("stats %+v", st)
	}
}

func TestFollowEndsWithTheStore(t *testing.T) {
	s := open(t, Config{})
	tail := s.Follow(t.Context(), query.All{})
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, err := range tail {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("error %v; want ErrClosed", err)
		}
	}
}

func get(t *testing.T, base, path string) (int, string, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+path, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("Content-Type"), string(body)
}

func TestHandler(t *testing.T) {
	s := open(t, Config{})
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	defer http.DefaultClient.CloseIdleConnections()
	now := time.Date(2026, 1, 1, 0, 0, 0, 5, time.UTC)
	s.cfg.Retention = time.Since(now) + 48*time.Hour
	breaker := line(now.Add(time.Second), "a", 2, "cart", "circuit breaker of payments opened", map[string]any{"event.dataset": record.DatasetBreaker, "outrigger.evidence.id": "payments-17"})
	if err := s.Append(t.Context(), []*record.Record{line(now, "a", 1, "payments", "card <declined>", map[string]any{"b": true, "a": 1.5}), breaker}); err != nil {
		t.Fatal(err)
	}
	f := func(path string, wantStatus int, wantType, wantBody string) {
		t.Helper()
		status, kind, body := get(t, server.URL, path)
		if status != wantStatus || kind != wantType || !strings.Contains(body, wantBody) {
			t.Errorf("GET %s: %d %s\n%s\nwant %d %s\n%s", path, status, kind, body, wantStatus, wantType, wantBody)
		}
	}
	const ndjson, object = "application/x-ndjson", "application/json"
	f("/api/v1/logs?query=card", 200, ndjson,
		`{"@timestamp":"2026-01-01T00:00:00.000000005Z","a":1.5,"b":true,"kubernetes.namespace":"shop","kubernetes.pod.name":"payments-0","log.file.path":"/var/log/pods/a","log.level":"info","log.offset":1,"message":"card <declined>","orchestrator.namespace":"shop","service.name":"payments"}`+"\n")
	f("/api/v1/logs?query=nothing", 200, ndjson, "")
	f("/api/v1/logs?query="+url.QueryEscape("a ("), 400, object, `{"error":"query, column 4: the query ends where`)
	f("/api/v1/logs?since=now", 400, object, "since: \\\"now\\\" is not a duration")
	f("/api/v1/logs?limit=100000", 400, object, "limit")
	f("/api/v1/logs?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z", 400, object, "exchange")
	f("/api/v1/logs?form=1", 400, object, "form: there is no such parameter")
	f("/api/v1/evidence/payments-17", 200, object, `"message":"circuit breaker of payments opened"`)
	f("/api/v1/evidence/payments-18", 404, object, "older than retention")
	f("/api/v1/facets?field=service.name", 200, object, `{"field":"service.name","records":2,"without":0,"partial":false,"values":[{"value":"cart","count":1},{"value":"payments","count":1}]}`)
	f("/api/v1/facets", 400, object, "field")
	s.cfg.SearchTimeout = time.Nanosecond
	f("/api/v1/logs?query=card", 200, ndjson, `{"error":"search: stopped in 2026-01-01 after 0 records`)
}

// follow=true sends the last records in the order of time and then the new ones,
// every record once.
func TestHandlerFollow(t *testing.T) {
	s := open(t, Config{})
	server := httptest.NewServer(s.Handler())
	defer server.Close()
	defer http.DefaultClient.CloseIdleConnections()
	now := time.Now()
	send := func(i int) {
		if err := s.Append(t.Context(), []*record.Record{line(now.Add(time.Duration(i)*time.Millisecond), "a", i, "x", fmt.Sprint("n", i), nil)}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		send(i)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/api/v1/logs?follow=true&limit=2&query=service.name:x", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	next := func() string {
		if !lines.Scan() {
			t.Fatalf("the stream ended: %v", lines.Err())
		}
		var f map[string]any
		if err := json.Unmarshal(lines.Bytes(), &f); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(f["message"])
	}
	got := []string{next(), next()}
	send(5)
	got = append(got, next())
	send(6)
	got = append(got, next())
	if diff := cmp.Diff([]string{"n3", "n4", "n5", "n6"}, got); diff != "" {
		t.Error(diff)
	}
	cancel()
	deadline := time.Now().Add(5 * time.Second)
	for s.Stats().Followers != 0 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	if n := s.Stats().Followers; n != 0 {
		t.Errorf("%d live tails after the client has gone", n)
	}
}

func TestConfig(t *testing.T) {
	f := func(c Config, want string) {
		t.Helper()
		err := c.Validate()
		if want == "" {
			if err != nil {
				t.Errorf("%+v: %v", c, err)
			}
			return
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v; want %q in it", c, err, want)
		}
	}
	f(Config{Folder: "x"}, "")
	f(Config{}, "folder")
	f(Config{Folder: "x", Retention: time.Hour}, "retention: 1h0m0s")
	f(Config{Folder: "x", MaxBytes: 5}, "maxBytes: 5")
	f(Config{Folder: "x", SearchTimeout: -1}, "searchTimeout")
}

func traceOf(k int) string { return fmt.Sprintf("%032x", uint64(k)*0x9e3779b97f4a7c15) }

// benchRecords are access-log-like records with eight words and a trace id.
func benchRecords(n, from int, base time.Time) []*record.Record {
	batch := make([]*record.Record, n)
	for i := range batch {
		k := from + i
		r := line(base.Add(time.Duration(k)*100*time.Microsecond), fmt.Sprint("f", k%20), k, fmt.Sprint("service-", k%20), fmt.Sprintf("order %d of customer %d: card declined by issuer after %d ms", k, k%977, k%313), map[string]any{
			"http.request.method": "GET", "http.response.status_code": float64(200 + 100*(k%4)), "url.path": fmt.Sprintf("/v1/orders/%d", k%1000), "event.duration": float64(k * 1000),
		})
		r.TraceID = traceOf(k)
		batch[i] = r
	}
	return batch
}

// BenchmarkAppend reports rows a second, durable, in batches of 1,000.
func BenchmarkAppend(b *testing.B) {
	s := open(b, Config{})
	base := time.Now().UTC().Truncate(24 * time.Hour).Add(-24 * time.Hour)
	n := 0
	for b.Loop() {
		b.StopTimer()
		batch := benchRecords(1000, n, base)
		n += len(batch)
		b.StartTimer()
		if err := s.Append(b.Context(), batch); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "rows/s")
	b.ReportMetric(float64(s.Stats().Bytes)/float64(n), "bytes/row")
}

// BenchmarkSearch looks for the newest 100 lines in 200,000.
func BenchmarkSearch(b *testing.B) {
	s := open(b, Config{})
	base := time.Now().UTC().Truncate(24 * time.Hour).Add(-24 * time.Hour)
	const rows = 200_000
	for n := 0; n < rows; n += 5000 {
		if err := s.Append(b.Context(), benchRecords(5000, n, base)); err != nil {
			b.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"newest": "", "word": "declined", "phrase-and-service": `service.name:service-7 "card declined"`, "rare-word": "123456",
		"trace": traceOf(777), "absent": "nosuchword", "unindexed-common": "http.response.status_code>=500", "unindexed-absent": "url.path:/none",
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				search(b, s, text, Query{Limit: 100})
			}
		})
	}
}
