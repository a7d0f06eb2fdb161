package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type thing struct {
	Metadata struct {
		Name            string `json:"name"`
		ResourceVersion string `json:"resourceVersion"`
	} `json:"metadata"`
}

func TestDecodeList(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		names   []string
		version string
		fails   bool
	}{
		"whole":              {text: `{"kind":"PodList","metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"}}]}`, names: []string{"a", "b"}, version: "7"},
		"items first":        {text: `{"items":[{"metadata":{"name":"a"}}],"metadata":{"resourceVersion":"7"}}`, names: []string{"a"}, version: "7"},
		"null items":         {text: `{"metadata":{"resourceVersion":"7"},"items":null}`, version: "7"},
		"cut short":          {text: `{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"}},`, names: []string{"a"}, fails: true},
		"no list":            {text: `["a"]`, fails: true},
		"items is an object": {text: `{"items":{}}`, fails: true},
		"empty":              {text: ``, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			var names []string
			version, err := decodeList(strings.NewReader(c.text), func(o *thing) { names = append(names, o.Metadata.Name) })
			if (err != nil) != c.fails {
				t.Errorf("error %v", err)
			}
			if d := cmp.Diff(c.names, names); d != "" {
				t.Error(d)
			}
			if err == nil && version != c.version {
				t.Errorf("version %q, want %q", version, c.version)
			}
		})
	}
}

func FuzzDecodeList(f *testing.F) {
	f.Add(`{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"a"}}],"x":[{}]}`)
	f.Add(`{"items":null}`)
	f.Fuzz(func(t *testing.T, text string) {
		n := 0
		_, err := decodeList(strings.NewReader(text), func(o *thing) {
			if o == nil {
				t.Fatal("no object")
			}
			n++
		})
		var whole json.RawMessage
		if err == nil && json.NewDecoder(strings.NewReader(text)).Decode(&whole) != nil {
			t.Errorf("%q was taken with %d objects", text, n)
		}
	})
}

// script is a named fake of an API server: it answers each request in turn.
type script struct {
	t     *testing.T
	mu    sync.Mutex
	steps []func(http.ResponseWriter, *http.Request)
	seen  []string
}

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	q := r.URL.Query()
	s.seen = append(s.seen, fmt.Sprintf("watch=%s version=%s", q.Get("watch"), q.Get("resourceVersion")))
	step := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	if len(s.steps) > 0 {
		step, s.steps = s.steps[0], s.steps[1:]
	}
	s.mu.Unlock()
	step(w, r)
}

func (s *script) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.seen...)
}

func text(code int, body string) func(http.ResponseWriter, *http.Request) {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		_, _ = w.Write([]byte(body))
	}
}

// A watch that ends goes on where it was; one whose version is gone lists again;
// a change that was not taken comes again; an overloaded server is left alone.
func TestWatchGoesOn(t *testing.T) {
	event := func(kind, name, version string) string {
		return fmt.Sprintf(`{"type":%q,"object":{"metadata":{"name":%q,"resourceVersion":%q}}}`+"\n", kind, name, version)
	}
	fake := &script{t: t, steps: []func(http.ResponseWriter, *http.Request){
		text(200, `{"metadata":{"resourceVersion":"10"},"items":[{"metadata":{"name":"a","resourceVersion":"3"}}]}`),
		text(200, event("ADDED", "b", "11")+event("BOOKMARK", "", "20")+event("NEW", "", "21")),
		text(200, event("ADDED", "refuse", "22")),
		text(200, event("ADDED", "refuse", "22")+`{"type":"ERROR","object":{"code":410,"reason":"Expired"}}`),
		text(200, `{"metadata":{"resourceVersion":"30"},"items":[]}`),
		text(200, event("DELETED", "b", "31")+`{"type":`),
		text(429, `{"kind":"Status","reason":"TooManyRequests","message":"no","details":{"retryAfterSeconds":1}}`),
	}}
	server := httptest.NewServer(fake)
	defer server.Close()
	c, err := New(Config{Server: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var told []string
	var failures int
	refused := false
	w := &Watch[thing]{
		Client: c, Path: "/api/v1/things", Version: func(o *thing) string { return o.Metadata.ResourceVersion }, Log: slog.New(slog.DiscardHandler),
		Begin: func() { told = append(told, "begin") }, End: func() { told = append(told, "end") },
		Listed: func(o *thing) { told = append(told, "listed "+o.Metadata.Name) },
		Changed: func(k Type, o *thing) error {
			if o.Metadata.Name == "refuse" && !refused {
				refused = true
				return errors.New("not now")
			}
			told = append(told, string(k)+" "+o.Metadata.Name)
			return nil
		},
		Reached: func(v string) { told = append(told, "reached "+v) },
		Failed:  func(error) { failures++ },
	}
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	for end := time.Now().Add(time.Minute); len(fake.requests()) < 8 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{
		"watch= version=0", "watch=1 version=10", "watch=1 version=20", "watch=1 version=20", "watch= version=0", "watch=1 version=30", "watch=1 version=31", "watch=1 version=31",
	}, fake.requests()); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{
		"begin", "listed a", "end", "reached 10", "ADDED b", "reached 11", "reached 20", "ADDED refuse", "reached 22", "begin", "end", "reached 30", "DELETED b", "reached 31",
	}, told); d != "" {
		t.Error(d)
	}
	if failures != 3 { // refused change, cut stream, 429
		t.Errorf("%d failures, want 3", failures)
	}
}

// The token is read for each request; a redirect is not followed with it; an
// answer that is no Status is quoted.
func TestRequests(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	var got []string
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Header.Get("Authorization"))
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusFound)
		case "/odd":
			http.Error(w, "a proxy says no", http.StatusBadGateway)
		default:
			_, _ = w.Write([]byte(`{"metadata":{"name":"x"}}`))
		}
	}))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	defer server.Close()
	c, err := New(Config{Server: server.URL, TokenFile: token, Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Do(t.Context(), Request{Path: "/"}, nil); err == nil || !strings.Contains(err.Error(), "tokenFile") {
		t.Errorf("no token file: %v", err)
	}
	for _, text := range []string{"one\n", "two"} {
		if err := os.WriteFile(token, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var o thing
		if err := c.Do(t.Context(), Request{Path: "/"}, &o); err != nil || o.Metadata.Name != "x" {
			t.Errorf("%v %v", o, err)
		}
	}
	if err := c.Do(t.Context(), Request{Path: "/away"}, nil); Code(err) != 302 {
		t.Errorf("redirect: %v", err)
	}
	if err := c.Do(t.Context(), Request{Path: "/odd"}, nil); Code(err) != 502 || !strings.Contains(err.Error(), "a proxy says no") {
		t.Errorf("odd answer: %v", err)
	}
	if d := cmp.Diff([]string{"Bearer one", "Bearer two", "Bearer two", "Bearer two"}, got); d != "" {
		t.Error(d)
	}
	// Whoever is not signed by the named authority gets no token.
	ca := filepath.Join(t.TempDir(), "ca")
	if err := os.WriteFile(ca, []byte("nothing"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{ca, ca + "-not-there"} {
		strict, err := New(Config{Server: server.URL, TokenFile: token, CAFile: file})
		if err != nil {
			t.Fatal(err)
		}
		if err := strict.Do(t.Context(), Request{Path: "/"}, nil); err == nil || !strings.Contains(err.Error(), "caFile") {
			t.Errorf("%s: %v", file, err)
		}
	}
	strict, err := New(Config{Server: server.URL, TokenFile: token})
	if err != nil {
		t.Fatal(err)
	}
	if err := strict.Do(t.Context(), Request{Path: "/"}, nil); err == nil || len(got) != 4 {
		t.Errorf("an unknown server was trusted: %v", err)
	}
}

func TestConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"is not an address": {Server: "10.0.0.1"},
		"in clear":          {Server: "http://10.0.0.1", TokenFile: "x"},
		"that of its key":   {Server: "https://10.0.0.1", CertFile: "x"},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	env := map[string]string{"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
	if c, ok := InCluster(func(k string) string { return env[k] }); !ok || c.Server != "https://[fd00::1]:443" {
		t.Errorf("%v %v", c, ok)
	}
	if _, ok := InCluster(func(string) string { return "" }); ok {
		t.Error("in a cluster without its environment")
	}
}

func TestExpand(t *testing.T) {
	env := map[string]string{"NODE_IP": "10.0.0.5", "V6": "fd00::5"}
	for in, want := range map[string]string{
		"https://10.0.0.9:10250":   "https://10.0.0.9:10250",
		"https://$(NODE_IP):10250": "https://10.0.0.5:10250",
		"https://$(V6):10250":      "https://[fd00::5]:10250",
		"https://$(ABSENT):10250":  "has no ABSENT",
		"https://$(NODE_IP:10250":  "is not closed",
	} {
		got, err := Expand(in, func(k string) string { return env[k] })
		if err == nil && got != want || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %q %v, want %q", in, got, err, want)
		}
	}
}
