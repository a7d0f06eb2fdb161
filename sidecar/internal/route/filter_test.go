package route_test

import (
	"regexp"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

func pair(name, value string) http1.Pair { return http1.Pair{Name: name, Value: []byte(value)} }

// The changes of a route and then those of its backend: the later word counts.
func TestThen(t *testing.T) {
	a := route.Change{Set: []http1.Pair{pair("x", "1"), pair("y", "1")}, Add: []http1.Pair{pair("z", "1")}, Remove: []string{"w"}}
	b := route.Change{Set: []http1.Pair{pair("x", "2")}, Add: []http1.Pair{pair("y", "2"), pair("z", "2")}, Remove: []string{"v"}}
	want := route.Change{
		Set: []http1.Pair{pair("y", "1"), pair("x", "2"), pair("y", "2")}, Add: []http1.Pair{pair("z", "1"), pair("z", "2")}, Remove: []string{"w", "v"},
	}
	if d := cmp.Diff(want, a.Then(b)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(route.Change{Remove: []string{"x"}, Set: []http1.Pair{}}, route.Change{Set: []http1.Pair{pair("x", "1")}}.Then(route.Change{Remove: []string{"x"}})); d != "" {
		t.Error(d)
	}
}

func TestPathRewrite(t *testing.T) {
	prefix := func(from, to string) *route.PathRewrite { return &route.PathRewrite{From: from, Prefix: to} }
	regex := func(expr, sub string) *route.PathRewrite {
		return &route.PathRewrite{Regex: regexp.MustCompile(expr), Substitution: route.Substitution(sub)}
	}
	for _, c := range []struct {
		r          *route.PathRewrite
		path, want string
	}{
		{&route.PathRewrite{Full: "/one"}, "/a/b", "/one"},
		{prefix("/api", "/v2"), "/api/x", "/v2/x"},
		{prefix("/api", "/v2"), "/api", "/v2"},
		{prefix("/api", ""), "/api", "/"},
		{prefix("/api", ""), "/api/x", "/x"},
		{prefix("", "/v2"), "/api/x", "/v2/api/x"},
		{prefix("/api", "/v2"), "/other", "/other"},
		{regex("^/api/*", "/"), "/api/x", "/x"},
		{regex("^/api/*", "/"), "/api", "/"},
		{regex("^/(a)/(b)", `/\2/\1$`), "/a/b/c", "/b/a$/c"},
		{regex("^/a", ""), "/a", "/"},
	} {
		if got := string(c.r.Append(nil, []byte(c.path))); got != c.want {
			t.Errorf("%+v of %s: %s, want %s", c.r, c.path, got, c.want)
		}
	}
}

func TestLocation(t *testing.T) {
	for _, c := range []struct {
		r          route.Redirect
		host, want string
	}{
		{route.Redirect{}, "echo", "http://echo/a?q"},
		{route.Redirect{}, "echo:8080", "http://echo:8080/a?q"},
		{route.Redirect{}, "echo:80", "http://echo/a?q"},
		{route.Redirect{Host: "example.org"}, "echo:8080", "http://example.org/a?q"},
		{route.Redirect{Scheme: "https"}, "echo:80", "https://echo/a?q"},
		{route.Redirect{Scheme: "https"}, "echo", "https://echo/a?q"},
		{route.Redirect{Scheme: "https"}, "echo:8443", "https://echo:8443/a?q"},
		{route.Redirect{Port: 8083}, "echo", "http://echo:8083/a?q"},
		{route.Redirect{Scheme: "https", Port: 443}, "echo", "https://echo/a?q"},
		{route.Redirect{Path: &route.PathRewrite{Full: "/new"}}, "[::1]:81", "http://[::1]:81/new?q"},
		{route.Redirect{}, "[::1]", "http://[::1]/a?q"},
	} {
		if got := string(c.r.AppendLocation(nil, "http", []byte(c.host), []byte("/a"), []byte("q"))); got != c.want {
			t.Errorf("%+v of %s: %s, want %s", c.r, c.host, got, c.want)
		}
	}
}
