package proxy_test

import (
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

func pair(name, value string) http1.Pair { return http1.Pair{Name: name, Value: []byte(value)} }

// tells answers with what arrived: path, host and the fields that begin with x-.
func tells(t *testing.T) string {
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Server", "here")
		w.Header().Set("X-Secret", "hidden")
		fmt.Fprintf(w, "%s %s host=%s set=%q add=%q gone=%q body=%d", r.Method, r.URL.RequestURI(), r.Host, r.Header.Values("X-Set"), r.Header.Values("X-Add"), r.Header.Values("X-Gone"), len(body))
	})
}

// The filters of a route, seen from both sides, over each version of HTTP.
func TestFilters(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Match.Prefix = "/api"
		r.Path, r.Host = &route.PathRewrite{From: "/api", Prefix: "/v2"}, []byte("other.example")
		r.Clusters[0].Request = &route.Change{Set: []http1.Pair{pair("x-set", "ours")}, Add: []http1.Pair{pair("x-add", "two")}, Remove: []string{"x-gone"}}
		r.Clusters[0].Response = &route.Change{Set: []http1.Pair{pair("x-server", "there")}, Add: []http1.Pair{pair("x-more", "yes")}, Remove: []string{"x-secret"}}
	}, tells(t))
	for range 3 { // on one connection: nothing of a request stays for the next
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+m.addr+"/api/cart?q=1", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"X-Set": {"theirs"}, "X-Add": {"one"}, "X-Gone": {"away"}}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if want := `POST /v2/cart?q=1 host=other.example set=["ours"] add=["one" "two"] gone=[] body=5`; string(body) != want {
			t.Errorf("the application saw %s\nwant %s", body, want)
		}
		if h := resp.Header; h.Get("X-Server") != "there" || h.Get("X-More") != "yes" || h.Values("X-Secret") != nil {
			t.Errorf("the client saw %v", h)
		}
		if line := m.logged(); line["url.path"] != "/api/cart" {
			t.Errorf("logged %v: not what the client asked for", line["url.path"])
		}
	}
}

// A path that a route makes is no less strict than one that a client sends.
func TestARewriteMayNotEscape(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Path = &route.PathRewrite{Regex: regexp.MustCompile("^/up/"), Substitution: []byte("/x/../../")}
	}, tells(t))
	resp, err := http.Get("http://" + m.addr + "/up/secret")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if strings.Contains(string(body), "..") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}

func TestRedirect(t *testing.T) {
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Redirect = &route.Redirect{Status: 302, Scheme: "https", Host: "example.org", Port: 8443, Path: &route.PathRewrite{Full: "/login"}, Response: route.Change{Set: []http1.Pair{pair("x-why", "moved")}}}
	}, tells(t))
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get("http://" + m.addr + "/cart?q=1")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if got := resp.Header.Get("Location"); resp.StatusCode != 302 || got != "https://example.org:8443/login?q=1" || resp.Header.Get("X-Why") != "moved" {
		t.Errorf("%d to %s, %v", resp.StatusCode, got, resp.Header)
	}
	if line := m.logged(); line["http.response.status_code"] != 302.0 {
		t.Errorf("logged %v", line)
	}
}

// A mirror gets the request with its body and its changes; the client gets the
// answer of the backend alone, and does not wait for the mirror.
func TestMirror(t *testing.T) {
	got := make(chan string, 10)
	release := make(chan struct{})
	mirror := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- fmt.Sprintf("%s %s %s %s", r.Method, r.URL.RequestURI(), r.Header.Get("X-Set"), body)
		<-release
		http.Error(w, "of the mirror", http.StatusTeapot)
	})
	m := start(t, func(_ *table.Cluster, r *route.Route) {
		r.Mirrors = []route.Mirror{{Cluster: "shop/mirror:80", Numerator: 1, Denominator: 1}}
		r.Clusters[0].Request = &route.Change{Set: []http1.Pair{pair("x-set", "ours")}}
	}, tells(t))
	before := m.table.Load()
	m.table.Store(&table.Table{Version: "v2", Destinations: before.Destinations, Clusters: map[string]*table.Cluster{
		key: before.Clusters[key], "shop/mirror:80": {Name: "shop/mirror:80", Endpoints: endpoints(mirror)},
	}})
	for i := range 3 {
		resp, err := http.Post("http://"+m.addr+"/pay?n=1", "text/plain", strings.NewReader(fmt.Sprint("order ", i)))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != 200 || !strings.HasPrefix(string(body), "POST /pay?n=1") {
			t.Errorf("the client got %d %s", resp.StatusCode, body)
		}
	}
	seen := map[string]bool{}
	for range 3 {
		select {
		case s := <-got:
			seen[s] = true
		case <-time.After(20 * time.Second):
			t.Fatalf("the mirror got %v", seen)
		}
	}
	close(release)
	for i := range 3 {
		if s := fmt.Sprintf("POST /pay?n=1 ours order %d", i); !seen[s] {
			t.Errorf("the mirror did not get %q but %v", s, seen)
		}
	}
	// Where the body is too large to keep, it is told rather than half sent.
	resp, err := http.Post("http://"+m.addr+"/pay", "text/plain", strings.NewReader(strings.Repeat("x", 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	eventually(t, func() bool {
		return counted(t, m.registry, "outrigger_breaker_rejected_total", "mirror", "mirror.shop.svc") == 1
	}, "what was not mirrored is not counted")
}
