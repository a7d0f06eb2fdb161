package xdsclient

import (
	"fmt"
	"strings"
	"testing"

	rbachttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/authz"
)

// TestDecodeRBAC reads RBAC filters as Envoy's YAML: what they say to a few
// callers, or why they are refused. Nothing that is not understood may be left
// out.
func TestDecodeRBAC(t *testing.T) {
	golden.Pairs(t, "testdata/rbac/*.txtar", func(t *testing.T, _, text string) string {
		js, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var f rbachttpv3.RBAC
		if err := protojson.Unmarshal(js, &f); err != nil {
			t.Fatal(err)
		}
		a, err := anypb.New(&f)
		if err != nil {
			t.Fatal(err)
		}
		p, err := decodeRBAC([]*anypb.Any{a})
		if err != nil {
			return "rejected: " + strings.ReplaceAll(err.Error(), "\u00a0", " ") + "\n"
		}
		var out strings.Builder
		for _, who := range []string{"", "spiffe://cluster.local/ns/shop/sa/storefront", "spiffe://cluster.local/ns/other/sa/default"} {
			for _, what := range []string{"GET /api/x", "POST /admin", "bytes"} {
				r := authz.Request{Principal: who}
				if method, path, http := strings.Cut(what, " "); http {
					r.HTTP, r.Method, r.Path = true, []byte(method), []byte(path)
				}
				d := p.Decide(&r)
				said := "allowed"
				if d.Denied {
					said = d.Reason
				}
				if d.Observed != "" {
					said += ", observed: " + d.Observed
				}
				fmt.Fprintf(&out, "%q %s: %s\n", who, what, said)
			}
		}
		return out.String()
	})
}

func FuzzDecodeRBAC(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodeRBAC([]*anypb.Any{{TypeUrl: "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC", Value: b}})
		if err == nil {
			p.Decide(&authz.Request{Principal: "spiffe://a/ns/b/sa/c", HTTP: true, Method: []byte("GET"), Path: []byte("/")})
		}
	})
}
