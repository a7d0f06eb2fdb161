package xdsclient

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

func message(k kind) proto.Message {
	return map[kind]proto.Message{
		listeners: &listenerv3.Listener{}, routes: &routev3.RouteConfiguration{},
		clusters: &clusterv3.Cluster{}, endpoints: &endpointv3.ClusterLoadAssignment{},
	}[k]
}

// TestDecode reads the golden files: resources as Envoy's YAML in files named
// after their kind, each followed by what the table says of it, or by the reason
// that goes back to the control plane.
func TestDecode(t *testing.T) {
	golden.Pairs(t, "testdata/decode/*.txtar", func(t *testing.T, name, resource string) string {
		var k kind
		for k = range kinds {
			if strings.HasPrefix(name, k.String()) {
				break
			}
		}
		return decodeYAML(t, k, []byte(resource))
	})
}

func decodeYAML(t *testing.T, k kind, text []byte) string {
	t.Helper()
	js, err := yaml.YAMLToJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	m := message(k)
	if err := protojson.Unmarshal(js, m); err != nil {
		t.Fatalf("%s: %v", k, err)
	}
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var r resource
	var name string
	if l, ok := m.(*listenerv3.Listener); ok {
		name = l.GetName()
	}
	if err := r.decode(k, name, b); err != nil {
		// protobuf-go varies the space after its own prefix on purpose.
		return "rejected: " + strings.ReplaceAll(err.Error(), "\u00a0", " ") + "\n"
	}
	var s strings.Builder
	switch k {
	case listeners:
		if in := r.inbound; in != nil {
			fmt.Fprintf(&s, "mtls=%s\n", in.MTLS)
			for _, n := range slices.Sorted(maps.Keys(in.Ports)) {
				fmt.Fprintf(&s, "  %d %s\n", n, in.Ports[n].Protocol)
			}
			fmt.Fprintf(&s, "  others %s\n", in.Default.Protocol)
			break
		}
		if r.listener.service != "" {
			fmt.Fprintf(&s, "of %s ", r.listener.service)
		}
		fmt.Fprintf(&s, "%s routes=%q cluster=%q", r.listener.protocol, r.listener.routeName, r.listener.cluster)
		if c := r.listener.inline; c != nil {
			fmt.Fprintf(&s, " inline routes=%d", len(c.Routes))
		}
		for _, n := range r.listener.serverNames {
			fmt.Fprintf(&s, "\n  %s to %s", n.Name, weighted(n.Clusters))
		}
		s.WriteByte('\n')
	case routes:
		for _, x := range r.routes.Routes {
			fmt.Fprintf(&s, "%s\n  match %+v\n  to %s timeout %v\n  retry %+v\n%s", x.Name, x.Match, weighted(x.Clusters), x.Timeout, x.Retry, filters(&x))
		}
	case clusters:
		c := r.cluster
		fmt.Fprintf(&s, "%s endpoints of %s\n  limits %+v observe=%t\n  budget %+v\n  policy %q\n", c.Name, c.eds, c.Limits, c.LimitsObserve, c.Budget, c.Policy)
		if c.HTTP2 {
			s.WriteString("  http2\n")
		}
		if c.TLS != nil {
			fmt.Fprintf(&s, "  tls %q of %q\n", c.TLS.ServerName, c.TLS.Identities)
		}
		if c.Breaker != nil {
			fmt.Fprintf(&s, "  breaker %+v\n", *c.Breaker)
		}
		if c.Outlier != nil {
			fmt.Fprintf(&s, "  outlier %+v\n", *c.Outlier)
		}
	case endpoints:
		for _, e := range r.endpoints {
			fmt.Fprintf(&s, "%+v\n", e)
		}
	case kinds:
	}
	return s.String()
}

// FuzzDecode: whatever a control plane sends, the decoders return.
func FuzzDecode(f *testing.F) {
	files, err := filepath.Glob("testdata/decode/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			for k := range kinds {
				if !strings.HasPrefix(file.Name, k.String()) {
					continue
				}
				js, err := yaml.YAMLToJSON(file.Data)
				if err != nil {
					f.Fatal(err)
				}
				m := message(k)
				if err := protojson.Unmarshal(js, m); err != nil {
					f.Fatal(err)
				}
				b, err := proto.Marshal(m)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(uint8(k), b)
			}
		}
	}
	f.Fuzz(func(t *testing.T, k uint8, b []byte) {
		var in resource
		if in.decode(listeners, inboundPrefix, b) == nil && in.inbound.Default.Protocol == "" {
			t.Error("ports that are not named have no protocol")
		}
		var r resource
		if err := r.decode(kind(k)%kinds, "", b); err != nil {
			return
		}
		if kind(k)%kinds == routes {
			refs(r.routes)
		}
	})
}

func FuzzLastGood(f *testing.F) {
	b, err := encodeLastGood([]saved{{kind: clusters, name: "a", version: "1", raw: []byte("x")}, {kind: listeners, name: "b", missing: true}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := decodeLastGood(b)
		if err != nil {
			return
		}
		if _, err := encodeLastGood(list); err != nil {
			t.Errorf("what was read cannot be written: %v", err)
		}
	})
}

func weighted(in []route.Weighted) string {
	var out []string
	for _, w := range in {
		s := fmt.Sprintf("{Cluster:%s Weight:%d", w.Cluster, w.Weight)
		if w.Request != nil {
			s += " request " + change(w.Request)
		}
		if w.Response != nil {
			s += " response " + change(w.Response)
		}
		out = append(out, s+"}")
	}
	return "[" + strings.Join(out, " ") + "]"
}

func change(c *route.Change) string {
	var out []string
	for _, p := range c.Set {
		out = append(out, fmt.Sprintf("set %s=%s", p.Name, p.Value))
	}
	for _, p := range c.Add {
		out = append(out, fmt.Sprintf("add %s=%s", p.Name, p.Value))
	}
	for _, name := range c.Remove {
		out = append(out, "remove "+name)
	}
	return "(" + strings.Join(out, ", ") + ")"
}

// filters are the lines of what a route changes.
func filters(r *route.Route) string {
	var s strings.Builder
	path := func(p *route.PathRewrite) string {
		switch {
		case p == nil:
			return "as it is"
		case p.Full != "":
			return p.Full
		case p.Regex != nil:
			return fmt.Sprintf("%s replaced by %s", p.Regex, p.Substitution)
		}
		return fmt.Sprintf("%q in the place of %q", p.Prefix, p.From)
	}
	if d := r.Redirect; d != nil {
		fmt.Fprintf(&s, "  redirect %d %s://%s:%d, path %s, %s\n", d.Status, d.Scheme, d.Host, d.Port, path(d.Path), change(&d.Response))
	}
	if r.Path != nil || r.Host != nil {
		fmt.Fprintf(&s, "  rewrite host %q, path %s\n", r.Host, path(r.Path))
	}
	for _, m := range r.Mirrors {
		fmt.Fprintf(&s, "  mirror %d/%d to %s\n", m.Numerator, m.Denominator, m.Cluster)
	}
	return s.String()
}
