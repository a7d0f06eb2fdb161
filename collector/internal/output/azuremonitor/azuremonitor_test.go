package azuremonitor

import (
	"compress/gzip"
	"encoding/json"
	"encoding/pem"
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

const (
	testRule   = "dcr-0123456789abcdef0123456789abcdef"
	testStream = "Custom-Outrigger_CL"
)

// fakeAzure is a stand-in for Entra's token endpoint and for the Logs Ingestion
// API, strict about requests. There is no real service that a test could run; what
// it answers is what the documentation says.
type fakeAzure struct {
	*httptest.Server
	t *testing.T

	mu sync.Mutex
	// answer to the n-th call of its rows; nil or status 0 takes them.
	answer func(n int, rows []map[string]any) (status int, body string, header http.Header)
	token  func(n int, w http.ResponseWriter) bool // true: it has answered
	life   int                                     // seconds of a token
	asked  int                                     // tokens
	calls  int
	taken  []map[string]any
	secret string // instead of an assertion
}

func newFakeAzure(t *testing.T) (*fakeAzure, Config) {
	t.Helper()
	f := &fakeAzure{t: t, life: 3600}
	f.Server = httptest.NewTLSServer(f)
	f.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	t.Cleanup(f.Close)
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	return f, Config{
		DCREndpoint: f.URL, RuleID: testRule, Stream: testStream, TenantID: "tenant", ClientID: "client", AuthorityHost: f.URL + "/",
		TokenFile: write("token", "pod-token\n"), CAFile: write("ca.pem", string(ca)),
	}
}

func (f *fakeAzure) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r.Method != http.MethodPost {
		f.t.Errorf("%s %s", r.Method, r.URL)
	}
	switch r.URL.Path {
	case "/tenant/oauth2/v2.0/token":
		f.asked++
		if err := r.ParseForm(); err != nil {
			f.t.Error(err)
		}
		want := map[string][]string{"grant_type": {"client_credentials"}, "client_id": {"client"}, "scope": {"https://monitor.azure.com/.default"}}
		if f.secret != "" {
			want["client_secret"] = []string{f.secret}
		} else {
			want["client_assertion"], want["client_assertion_type"] = []string{"pod-token"}, []string{"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"}
		}
		if diff := cmp.Diff(want, map[string][]string(r.PostForm)); diff != "" {
			f.t.Errorf("token request: %s", diff)
		}
		if f.token != nil && f.token(f.asked, w) {
			return
		}
		fmt.Fprintf(w, `{"token_type":"Bearer","expires_in":%d,"ext_expires_in":%d,"access_token":"access-%d"}`, f.life, f.life, f.asked)
	case "/dataCollectionRules/" + testRule + "/streams/" + testStream:
		f.calls++
		if r.URL.RawQuery != "api-version=2023-01-01" || r.Header.Get("Content-Type") != "application/json" {
			f.t.Errorf("%s %v", r.URL, r.Header)
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
		data, err := io.ReadAll(body)
		if err != nil {
			f.t.Error(err)
		}
		if len(data) > 1_000_000 {
			f.t.Errorf("a call of %d bytes", len(data))
		}
		var rows []map[string]any
		if err := json.Unmarshal(data, &rows); err != nil || len(rows) == 0 {
			f.t.Errorf("%.200s: %v", data, err)
		}
		types := map[string]string{}
		for _, c := range Columns {
			types[c.Name] = c.Type
		}
		for _, row := range rows {
			for name, v := range row {
				ok := false
				switch v := v.(type) {
				case string:
					_, err := time.Parse(time.RFC3339Nano, v)
					ok = types[name] == "string" && len(v) <= 64<<10 || types[name] == "datetime" && err == nil
				case float64:
					ok = types[name] == "long" || types[name] == "int"
				case map[string]any:
					ok = types[name] == "dynamic"
				}
				if !ok {
					f.t.Errorf("column %s of type %q has %.80v", name, types[name], v)
				}
			}
		}
		if got := r.Header.Get("Authorization"); got != fmt.Sprint("Bearer access-", f.asked) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if f.answer != nil {
			if status, text, header := f.answer(f.calls, rows); status != 0 {
				for k := range header {
					w.Header().Set(k, header.Get(k))
				}
				w.WriteHeader(status)
				fmt.Fprint(w, text)
				return
			}
		}
		f.taken = append(f.taken, rows...)
		w.WriteHeader(http.StatusNoContent)
	default:
		f.t.Errorf("%s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusNotFound)
	}
}

func newOutput(t *testing.T, cfg Config) *Output {
	t.Helper()
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

func batch(n int, body string) []*record.Record {
	res := &record.Resource{Cluster: "c", Node: "n", Namespace: "shop", Pod: "payments-0", PodUID: "u", Container: "main", Service: "payments", Labels: map[string]string{"app.kubernetes.io/name": "payments"}}
	var out []*record.Record
	for i := range n {
		out = append(out, &record.Record{
			Time: time.Date(2026, 11, 23, 3, 0, 0, 5, time.UTC), Body: fmt.Sprint(body, i), Level: "info", Stream: "stdout", Resource: res,
			Origin: record.Origin{File: "1:2:3", Path: "/p", Offset: int64(i * 10), End: int64(i*10 + 10)},
		})
	}
	return out
}

func TestRows(t *testing.T) {
	for _, compression := range []string{"gzip", "none"} {
		f, cfg := newFakeAzure(t)
		cfg.Compression = compression
		o := newOutput(t, cfg)
		records := batch(2, "line \"quoted\" größe ")
		records[1].Attributes = map[string]any{"http.response.status_code": 503.0}
		records[1].Service, records[1].TruncatedBytes, records[1].TraceID, records[1].SpanID = "own", 7, "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
		for range 2 {
			if got := o.Write(t.Context(), records); !cmp.Equal(got, output.Result{}) {
				t.Fatalf("%+v", got)
			}
		}
		if f.asked != 1 || len(f.taken) != 4 {
			t.Errorf("%d tokens, %d rows; want 1 and 4", f.asked, len(f.taken))
		}
		id, _ := f.taken[0]["RecordId"].(string)
		if diff := cmp.Diff([]map[string]any{
			{
				"TimeGenerated": "2026-11-23T03:00:00.000000005Z", "Message": "line \"quoted\" größe 0", "Level": "info", "Stream": "stdout", "Cluster": "c", "Node": "n", "Namespace": "shop", "Pod": "payments-0",
				"PodUid": "u", "Container": "main", "Service": "payments", "Labels": map[string]any{"app.kubernetes.io/name": "payments"}, "FilePath": "/p", "FileOffset": 0.0, "RecordId": id,
			},
			{
				"TimeGenerated": "2026-11-23T03:00:00.000000005Z", "Message": "line \"quoted\" größe 1", "Level": "info", "Stream": "stdout", "Cluster": "c", "Node": "n", "Namespace": "shop", "Pod": "payments-0",
				"PodUid": "u", "Container": "main", "Service": "own", "Labels": map[string]any{"app.kubernetes.io/name": "payments"}, "FilePath": "/p", "FileOffset": 10.0, "RecordId": strings.TrimSuffix(id, "0") + "10",
				"TruncatedBytes": 7.0, "TraceId": "4bf92f3577b34da6a3ce929d0e0e4736", "SpanId": "00f067aa0ba902b7", "Attributes": map[string]any{"http.response.status_code": 503.0},
			},
		}, f.taken[:2]); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff(f.taken[:2], f.taken[2:]); diff != "" {
			t.Errorf("a resend differs: %s", diff)
		}
	}
}

// A batch over 1 MB is several calls; a long message is several rows; nothing is
// lost or cut.
func TestSizes(t *testing.T) {
	f, cfg := newFakeAzure(t)
	o := newOutput(t, cfg)
	records := batch(10, "")
	bodies := []string{strings.Repeat("x", 200_000), strings.Repeat("é", 90_000), strings.Repeat("\x01", record.MaxBody), "short", strings.Repeat("\xff", 100_000)}
	want := map[string]string{}
	for i, r := range records {
		r.Body = bodies[i%len(bodies)]
	}
	if got := o.Write(t.Context(), records); !cmp.Equal(got, output.Result{}) {
		t.Fatalf("%+v", got)
	}
	var ids []string
	for _, row := range f.taken {
		id, _ := row["RecordId"].(string)
		text, _ := row["Message"].(string)
		if _, seen := want[id]; !seen {
			ids = append(ids, id)
		}
		want[id] += text
	}
	if len(ids) != len(records) {
		t.Fatalf("%d records; want %d", len(ids), len(records))
	}
	for i, r := range records {
		if body := strings.ToValidUTF8(r.Body, ""); body != "" && want[ids[i]] != body {
			t.Errorf("record %d has %d bytes; want %d", i, len(want[ids[i]]), len(body))
		}
	}
	big := batch(2, "x")
	big[0].Attributes = map[string]any{"a": strings.Repeat("x", 70_000)}
	big[1].Attributes = map[string]any{"a": make(chan int)}
	got := o.Write(t.Context(), big)
	if got.Err != nil || len(got.Rejected) != 2 || !strings.Contains(got.Rejected[0].Reason, "64 KB") || !strings.Contains(got.Rejected[1].Reason, "JSON") {
		t.Errorf("%+v; want both rejected", got)
	}
}

func TestVerdicts(t *testing.T) {
	type answer = func(n int, rows []map[string]any) (int, string, http.Header)
	always := func(status int, body string, header ...string) answer {
		h := http.Header{}
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		return func(int, []map[string]any) (int, string, http.Header) { return status, body, h }
	}
	f := func(name string, a answer, permanent bool, after time.Duration, want string) {
		t.Helper()
		server, cfg := newFakeAzure(t)
		server.answer = a
		got := newOutput(t, cfg).Write(t.Context(), batch(2, "x"))
		if got.Err == nil || got.Permanent != permanent || got.RetryAfter != after || !strings.Contains(got.Err.Error(), want) || got.Retry != nil || got.Rejected != nil {
			t.Errorf("%s: %+v; want permanent %t, after %s, %q", name, got, permanent, after, want)
		}
	}
	f("busy", always(429, "", "Retry-After", "9"), false, 9*time.Second, "limit a minute")
	f("away", always(503, "no backend"), false, 0, "no backend")
	f("no role", always(403, `{"error":{"code":"OperationFailed","message":"The authentication token provided does not have access"}}`), true, 0, "Monitoring Metrics Publisher")
	f("no rule", always(404, `{"error":{"code":"NotFound","message":"Data collection rule not found"}}`), true, 0, "ruleId")
	f("bad before anything was taken", always(400, `{"error":{"code":"InvalidPayload","message":"x"}}`), true, 0, "InvalidPayload")
	f("moved", always(302, "", "Location", "https://new/"), true, 0, `"https://new/"`)

	// One record at fault is found, once the service has taken something.
	server, cfg := newFakeAzure(t)
	o := newOutput(t, cfg)
	if got := o.Write(t.Context(), batch(1, "x")); got.Err != nil {
		t.Fatalf("%+v", got)
	}
	poison := func(status int, body string) answer {
		return func(_ int, rows []map[string]any) (int, string, http.Header) {
			for _, row := range rows {
				if row["Message"] == "x5" {
					return status, body, nil
				}
			}
			return 0, "", nil
		}
	}
	for _, status := range []int{400, 413} {
		server.answer = poison(status, `{"error":{"code":"InvalidPayload","message":"row"}}`)
		server.taken = nil
		got := o.Write(t.Context(), batch(9, "x"))
		want := output.Result{Rejected: []output.Rejection{{Index: 5, Reason: fmt.Sprintf("status %d: InvalidPayload: row", status)}}}
		if diff := cmp.Diff(want, got); diff != "" || len(server.taken) != 8 {
			t.Errorf("%d: %d rows taken: %s", status, len(server.taken), diff)
		}
	}
	server.answer = poison(400, `{"error":{"code":"InvalidStream","message":"s"}}`)
	if got := o.Write(t.Context(), batch(9, "x")); got.Err == nil || !got.Permanent {
		t.Errorf("%+v; want a permanent error for a stream that is gone", got)
	}

	// What was taken before the service got busy is not sent again.
	server.answer = func(n int, _ []map[string]any) (int, string, http.Header) {
		if n == server.calls && len(server.taken) > 0 {
			return 429, "", http.Header{"Retry-After": {"3"}}
		}
		return 0, "", nil
	}
	server.taken = nil
	got := o.Write(t.Context(), batch(30, strings.Repeat("x", 50_000)))
	if got.Err != nil || got.RetryAfter != 3*time.Second || len(server.taken) == 0 || len(got.Retry) != 30-len(server.taken) || got.Retry[0] != len(server.taken) {
		t.Errorf("%d taken, %+v", len(server.taken), got)
	}
}

func TestTokens(t *testing.T) {
	// A token that is refused is renewed once; then it is permanent.
	server, cfg := newFakeAzure(t)
	o := newOutput(t, cfg)
	if got := o.Write(t.Context(), batch(1, "x")); got.Err != nil {
		t.Fatalf("%+v", got)
	}
	server.asked++ // so that the fake no longer takes the first
	if got := o.Write(t.Context(), batch(1, "x")); got.Err != nil || server.asked != 3 {
		t.Errorf("%d tokens, %+v; want a renewal", server.asked, got)
	}
	server.answer = func(int, []map[string]any) (int, string, http.Header) { return 401, "", nil }
	if got := o.Write(t.Context(), batch(1, "x")); got.Err == nil || !got.Permanent || server.asked != 4 {
		t.Errorf("%d tokens, %+v; want one renewal and a permanent error", server.asked, got)
	}

	// Renewed before its end; a failure to renew does no harm while it lives.
	server, cfg = newFakeAzure(t)
	o = newOutput(t, cfg)
	now := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	get := func(after time.Duration, want string) {
		t.Helper()
		got, err := o.tokens.get(t.Context(), now.Add(after), "")
		if got != want || (want == "") != (err != nil) {
			t.Errorf("after %s: %q, %v; want %q", after, got, err, want)
		}
	}
	get(0, "access-1")
	get(54*time.Minute, "access-1")
	get(56*time.Minute, "access-2")
	server.token = func(_ int, w http.ResponseWriter) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	get((56+56)*time.Minute, "access-2")
	asked := server.asked
	get((56+56)*time.Minute+time.Second, "access-2")
	if server.asked != asked {
		t.Error("asked again within a second of a failure")
	}
	get((56+60)*time.Minute, "")

	f := func(name string, token func(w http.ResponseWriter), permanent bool, want string) {
		t.Helper()
		server, cfg := newFakeAzure(t)
		server.token = func(_ int, w http.ResponseWriter) bool { token(w); return true }
		got := newOutput(t, cfg).Write(t.Context(), batch(1, "x"))
		if got.Err == nil || got.Permanent != permanent || !strings.Contains(got.Err.Error(), want) || server.calls > 0 || strings.Contains(got.Err.Error(), "pod-token") {
			t.Errorf("%s: %+v; want permanent %t, %q", name, got, permanent, want)
		}
	}
	f("unknown client", func(w http.ResponseWriter) {
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"error":"invalid_client","error_description":"AADSTS70021: No matching federated identity record found.\r\nTrace ID: 1"}`)
	}, true, "AADSTS70021: No matching federated identity record found.: check tenantId")
	f("away", func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) }, false, "status 502")
	f("no token", func(w http.ResponseWriter) { fmt.Fprint(w, `{"token_type":"Bearer","expires_in":1}`) }, false, "without a bearer token")
	f("no life", func(w http.ResponseWriter) { fmt.Fprint(w, `{"token_type":"Bearer","access_token":"x"}`) }, false, "without a bearer token")
	f("HTML", func(w http.ResponseWriter) { fmt.Fprint(w, `<html>`) }, false, "without a bearer token")

	// A client secret instead; a file that is gone is permanent.
	server, cfg = newFakeAzure(t)
	cfg.ClientSecretFile, cfg.TokenFile = cfg.TokenFile, ""
	server.secret = "pod-token"
	if got := newOutput(t, cfg).Write(t.Context(), batch(1, "x")); got.Err != nil {
		t.Errorf("%+v", got)
	}
	cfg.ClientSecretFile += "-gone"
	if got := newOutput(t, cfg).Write(t.Context(), batch(1, "x")); got.Err == nil || !got.Permanent || !strings.Contains(got.Err.Error(), "clientSecretFile") {
		t.Errorf("%+v", got)
	}
}

func TestConcurrentWrites(t *testing.T) {
	f, cfg := newFakeAzure(t)
	o := newOutput(t, cfg)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if got := o.Write(t.Context(), batch(50, "x")); got.Err != nil || len(got.Retry)+len(got.Rejected) > 0 {
				t.Errorf("%+v", got)
			}
		})
	}
	wg.Wait()
	if len(f.taken) != 400 || f.asked != 1 {
		t.Errorf("%d rows, %d tokens", len(f.taken), f.asked)
	}
}

func TestNobodyListens(t *testing.T) {
	f, cfg := newFakeAzure(t)
	f.Close()
	if got := newOutput(t, cfg).Write(t.Context(), batch(1, "x")); got.Err == nil || got.Permanent {
		t.Errorf("%+v; want an error that passes", got)
	}
}

func TestConfig(t *testing.T) {
	good := Config{DCREndpoint: "https://x.westeurope-1.ingest.monitor.azure.com", RuleID: testRule, Stream: testStream, TenantID: "t", ClientID: "c", TokenFile: "/f"}
	f := func(change func(*Config), want string) {
		t.Helper()
		c := good
		change(&c)
		err := c.Validate()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%v: error %v; want %q in it", c, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") || strings.Contains(fmt.Sprintf("%v %+v %#v", c, c, c), "hunter2") {
			t.Errorf("a secret is in the error %v or in %v", err, c)
		}
	}
	f(func(*Config) {}, "")
	f(func(c *Config) { c.WorkspaceID, c.SharedKey = "w", "hunter2" }, "switched off on 2026-09-14")
	f(func(c *Config) { c.SharedKeyFile = "/f" }, "dcrEndpoint, ruleId, stream")
	f(func(c *Config) { c.DCREndpoint = "" }, "dcrEndpoint is empty")
	f(func(c *Config) { c.DCREndpoint = "http://x" }, "not an https URL")
	f(func(c *Config) { c.DCREndpoint = "https://u:hunter2@x" }, "credentials")
	f(func(c *Config) { c.AuthorityHost = "login" }, "authorityHost")
	f(func(c *Config) { c.RuleID = "rule" }, "immutable id")
	f(func(c *Config) { c.Stream = "Outrigger_CL" }, "streamDeclarations")
	f(func(c *Config) { c.TenantID = "" }, "azure.workload.identity/use")
	f(func(c *Config) { c.ClientID = "a b" }, "azure.workload.identity/client-id")
	f(func(c *Config) { c.TokenFile = "" }, "clientSecretFile")
	f(func(c *Config) { c.ClientSecretFile = "/s" }, "leave one out")
	f(func(c *Config) { c.Compression = "zstd" }, "gzip or none")
	f(func(c *Config) { c.Concurrency = 33 }, "1 to 32")
	f(func(c *Config) { c.Timeout = 1 }, "timeout")
}

func TestWithEnvironment(t *testing.T) {
	env := func(name string) string { return "env " + name }
	got := Config{TenantID: "own"}.WithEnvironment(env)
	want := Config{TenantID: "own", ClientID: "env AZURE_CLIENT_ID", TokenFile: "env AZURE_FEDERATED_TOKEN_FILE", AuthorityHost: "env AZURE_AUTHORITY_HOST"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got := (Config{ClientSecretFile: "/s"}).WithEnvironment(env); got.TokenFile != "" {
		t.Errorf("%+v; want the secret that is configured", got)
	}
}

// A plain row costs no allocation once its container and file are known.
func TestRowsDoNotAllocate(t *testing.T) {
	w := newRows()
	records := batch(100, strings.Repeat("x", 200))
	keep := func(b []byte) []byte { return b }
	var b []byte
	encode := func() {
		b = b[:0]
		for _, r := range records {
			var err error
			if b, err = w.append(b, r, keep); err != nil {
				t.Fatal(err)
			}
		}
	}
	encode()
	if n := testing.AllocsPerRun(20, encode); n > 0 {
		t.Errorf("%v allocations for %d rows; want none", n, len(records))
	}
}

// FuzzAnswers: whatever Entra and the service answer, nothing panics, and an answer
// that is no success acknowledges nothing.
func FuzzAnswers(f *testing.F) {
	f.Add(400, `{"error":{"code":"InvalidStream","message":"x"}}`, `{"token_type":"Bearer","expires_in":60,"access_token":"x"}`)
	f.Add(204, ``, `{}`)
	f.Add(429, `{"error":7}`, `{"token_type":7}`)
	secretFile := filepath.Join(f.TempDir(), "s")
	if err := os.WriteFile(secretFile, []byte("s"), 0o600); err != nil {
		f.Fatal(err)
	}
	o, err := New(Config{DCREndpoint: "https://x", RuleID: testRule, Stream: testStream, TenantID: "t", ClientID: "c", ClientSecretFile: secretFile, Compression: "none"}, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	records := batch(3, "x")
	f.Fuzz(func(t *testing.T, status int, body, token string) {
		if status < 200 || status > 599 {
			return
		}
		asked := 0
		o.client.Transport = roundTripper(func(req *http.Request) (*http.Response, error) {
			if asked++; asked > 20 {
				t.Fatal("more than 20 requests for 3 records")
			}
			text, code := body, status
			if strings.HasSuffix(req.URL.Path, "/token") {
				text, code = token, http.StatusOK
			}
			return &http.Response{StatusCode: code, Header: http.Header{"Retry-After": {body}}, Body: io.NopCloser(strings.NewReader(text)), Request: req}, nil
		})
		o.tokens.value = ""
		o.taken.Store(len(body)%2 == 0)
		got := o.Write(t.Context(), records)
		stored := got.Err == nil && len(got.Retry)+len(got.Rejected) < 3
		if stored && status > 299 {
			t.Fatalf("status %d acknowledged: %+v", status, got)
		}
		if got.Err != nil && (len(got.Retry) > 0 || len(got.Rejected) > 0) {
			t.Fatalf("%+v", got)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
