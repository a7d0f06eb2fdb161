package route_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

type headers map[string]string

func (h headers) Lookup(name string) ([]byte, bool) {
	v, ok := h[name]
	return []byte(v), ok
}

func request(method, target string, h headers) *route.Request {
	path, query, _ := strings.Cut(target, "?")
	return &route.Request{Method: []byte(method), Path: []byte(path), RawQuery: []byte(query), Headers: h}
}

func TestMatch(t *testing.T) {
	re := func(s string) route.Value {
		r, err := route.Compile(s)
		if err != nil {
			t.Fatal(err)
		}
		return route.Value{Regex: r}
	}
	f := func(m route.Match, method, target string, h headers, want bool) {
		t.Helper()
		c := &route.Config{Routes: []route.Route{{Name: "it", Match: m}}}
		if got := c.Match(request(method, target, h)) != nil; got != want {
			t.Errorf("%s %s %v against %+v: %v; want %v", method, target, h, m, got, want)
		}
	}
	all := route.Match{}
	f(all, "GET", "/", nil, true)
	f(all, "OPTIONS", "*", nil, true)

	exact := route.Match{Path: "/api"}
	f(exact, "GET", "/api", nil, true)
	f(exact, "GET", "/api?x=1", nil, true)
	f(exact, "GET", "/api/", nil, false)
	f(exact, "GET", "/API", nil, false)

	for _, p := range []string{"/api", "/api/"} {
		prefix := route.Match{Prefix: p}
		f(prefix, "GET", "/api", nil, true)
		f(prefix, "GET", "/api/", nil, true)
		f(prefix, "GET", "/api/x", nil, true)
		f(prefix, "GET", "/apix", nil, false)
		f(prefix, "GET", "/ap", nil, false)
	}
	f(route.Match{Prefix: "/"}, "GET", "/anything", nil, true)

	regex := route.Match{PathRegex: re("/v[0-9]|/w").Regex}
	f(regex, "GET", "/v1", nil, true)
	f(regex, "GET", "/w", nil, true)
	f(regex, "GET", "/v1/x", nil, false)
	f(regex, "GET", "/x/w", nil, false)

	f(route.Match{Method: "POST"}, "POST", "/", nil, true)
	f(route.Match{Method: "POST"}, "post", "/", nil, false)

	h := route.Match{Headers: []route.Value{{Name: "x-user", Exact: "ada"}, {Name: "x-env", Regex: re("canary|dev").Regex}}}
	f(h, "GET", "/", headers{"x-user": "ada", "x-env": "dev"}, true)
	f(h, "GET", "/", headers{"x-user": "ada", "x-env": "device"}, false)
	f(h, "GET", "/", headers{"x-user": "ada"}, false)
	f(route.Match{Headers: []route.Value{{Name: "x-empty"}}}, "GET", "/", headers{"x-empty": ""}, true)
	f(route.Match{Headers: []route.Value{{Name: "x-empty"}}}, "GET", "/", headers{}, false)

	q := route.Match{Query: []route.Value{{Name: "user name", Exact: "a&b=c"}}}
	f(q, "GET", "/?user+name=a%26b%3dc", nil, true)
	f(q, "GET", "/?x&user%20name=a%26b%3Dc", nil, true)
	f(q, "GET", "/?user+name=other&user+name=a%26b%3dc", nil, false) // the first value wins
	f(q, "GET", "/?user+name=a&b=c", nil, false)
	f(q, "GET", "/", nil, false)
	f(route.Match{Query: []route.Value{{Name: "debug"}}}, "GET", "/?&&debug", nil, true)
	f(route.Match{Query: []route.Value{{Name: "p", Exact: "100%"}}}, "GET", "/?p=100%", nil, true)
	f(route.Match{Query: []route.Value{{Name: "p", Exact: "%zz"}}}, "GET", "/?p=%zz", nil, true)
	f(route.Match{Query: []route.Value{{Name: "v", Regex: re("a b+").Regex}}}, "GET", "/?v=a%20bb", nil, true)
	f(route.Match{Query: []route.Value{{Name: "v", Regex: re("a b+").Regex}}}, "GET", "/?v=a%20bbc", nil, false)
}

func TestFirstMatchWins(t *testing.T) {
	c := &route.Config{Routes: []route.Route{
		{Name: "a", Match: route.Match{Prefix: "/a", Method: "GET"}}, {Name: "b", Match: route.Match{Prefix: "/a"}},
	}}
	f := func(method, path, want string) {
		t.Helper()
		got := ""
		if r := c.Match(request(method, path, nil)); r != nil {
			got = r.Name
		}
		if got != want {
			t.Errorf("%s %s takes %q; want %q", method, path, got, want)
		}
	}
	f("GET", "/a/b", "a")
	f("PUT", "/a/b", "b")
	f("GET", "/b", "")
}

func TestPickFollowsTheWeights(t *testing.T) {
	r := &route.Route{Clusters: []route.Weighted{{Cluster: "a", Weight: 1}, {Cluster: "zero", Weight: 0}, {Cluster: "b", Weight: 3}}}
	got := map[string]int{}
	for i := range uint64(400) {
		c, ok := r.Pick(i * (1<<64/400 + 1))
		if !ok {
			t.Fatal("no cluster")
		}
		got[c]++
	}
	if s := fmt.Sprint(got); s != "map[a:100 b:300]" {
		t.Errorf("400 even draws of 1:0:3 = %s", s)
	}
	for _, r := range []*route.Route{{}, {Clusters: []route.Weighted{{Cluster: "a", Weight: 0}}}} {
		if c, ok := r.Pick(1 << 63); ok {
			t.Errorf("Pick of weights adding up to 0 = %q", c)
		}
	}
}

func TestCompileRefusesWhatOnlyFitsWrapped(t *testing.T) {
	for _, bad := range []string{"a)|(?:b", "(", strings.Repeat("a", route.MaxRegex+1)} {
		if _, err := route.Compile(bad); err == nil {
			t.Errorf("Compile(%.20q) was accepted", bad)
		}
	}
}

type oneHeader struct{ value []byte }

func (h *oneHeader) Lookup(name string) ([]byte, bool) { return h.value, name == "x-user" }

func TestMatchAllocatesNothing(t *testing.T) {
	re, err := route.Compile("/v[0-9]+/x")
	if err != nil {
		t.Fatal(err)
	}
	c := &route.Config{Routes: []route.Route{
		{Match: route.Match{Path: "/health"}},
		{Match: route.Match{PathRegex: re}},
		{Match: route.Match{Prefix: "/api", Method: "DELETE"}},
		{Match: route.Match{Prefix: "/api", Query: []route.Value{{Name: "k", Exact: "v v"}}}},
		{Name: "last", Match: route.Match{Prefix: "/api", Method: "GET", Headers: []route.Value{{Name: "x-user", Exact: "ada"}}}, Clusters: []route.Weighted{{Cluster: "a", Weight: 1}}},
	}}
	r := &route.Request{Method: []byte("GET"), Path: []byte("/api/items"), RawQuery: []byte("a=b&k=v+w"), Headers: &oneHeader{[]byte("ada")}}
	if n := testing.AllocsPerRun(100, func() {
		got := c.Match(r)
		if got == nil || got.Name != "last" {
			t.Fatal("no match")
		}
		if _, ok := got.Pick(1 << 60); !ok {
			t.Fatal("no cluster")
		}
	}); n != 0 {
		t.Errorf("Match and Pick allocate %v times", n)
	}
}

func FuzzMatchQuery(f *testing.F) {
	f.Add([]byte("a=b&c=%41"), "c", "A")
	f.Fuzz(func(t *testing.T, query []byte, name, value string) {
		c := &route.Config{Routes: []route.Route{{Match: route.Match{Query: []route.Value{{Name: name, Exact: value}}}}}}
		c.Match(&route.Request{RawQuery: query})
	})
}
