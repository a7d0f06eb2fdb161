package xds_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/golden"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// Each file of testdata holds a mesh (mesh.json) and, in files that -update
// rewrites, what each data plane is told of it, what the Envoy of node.json is
// told beside it, and the parity of the policies.
func TestGolden(t *testing.T) {
	golden.Cases(t, "testdata/*.txtar", func(t *testing.T, c *golden.Case) {
		var m mesh.Mesh
		strict(t, []byte(c.Input("mesh.json")), &m)
		var sets []*xds.Set
		for _, dp := range xds.DataPlanes() {
			set, err := xds.Build(&m, dp, nil)
			if err != nil {
				t.Fatal(err)
			}
			sets = append(sets, set)
		}
		if node, ok := c.Lookup("node.json"); ok {
			var s structpb.Struct
			if err := s.UnmarshalJSON([]byte(node)); err != nil {
				t.Fatal(err)
			}
			n, err := xds.ParseEnvoyNode(&s)
			if err != nil {
				t.Fatal(err)
			}
			v, err := sets[1].EnvoyView(n, nil)
			if err != nil {
				t.Fatal(err)
			}
			listeners, err := xds.Dump(v.Listeners)
			if err != nil {
				t.Fatal(err)
			}
			clusters := slices.Sorted(maps.Keys(v.Clusters))
			own := xds.Resources{}
			for name, cluster := range v.Clusters {
				if sets[1].Of(xds.ClusterType)[name] == nil {
					own[name] = cluster
				}
			}
			dumped, err := xds.Dump(own)
			if err != nil {
				t.Fatal(err)
			}
			c.Want("envoy-node.json", indent(t, map[string]any{
				"listeners": listeners, "clusters": clusters, "own clusters": dumped, "missing": v.Missing,
			}))
		}
		for _, set := range sets {
			d, err := set.Dump()
			if err != nil {
				t.Fatal(err)
			}
			c.Want(string(set.DataPlane)+".json", indent(t, d))
		}
		var notes strings.Builder
		write := func(ns []xds.ParityNote) {
			for _, n := range ns {
				if n.DataPlane == xds.Outrigger && n.Support == xds.Honoured {
					continue
				}
				notes.WriteString(n.Field + " | " + string(n.DataPlane) + " | " + string(n.Support) + " | " + n.Detail + "\n")
			}
		}
		for _, s := range m.Services {
			for _, p := range s.Ports {
				ns := append(xds.BreakerParity(p.Breaker), xds.MTLSParity(p)...)
				for _, r := range p.Routes {
					ns = append(ns, xds.RetryParity(r.Retry)...)
					ns = append(ns, xds.FilterParity(r)...)
				}
				write(ns)
			}
		}
		for _, in := range m.Instances {
			for _, a := range in.Authorizations {
				write(xds.AuthorizationParity(a))
			}
		}
		if notes.Len() > 0 {
			c.Want("parity.txt", notes.String())
		}
	})
}

func strict(t *testing.T, data []byte, to any) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(to); err != nil {
		t.Fatal(err)
	}
}

func indent(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b) + "\n"
}

func shop(endpoints ...string) *mesh.Mesh {
	p := mesh.Port{
		Number: 80, Protocol: mesh.HTTP1,
		Routes: []mesh.Route{{Name: "default", Backends: []mesh.Backend{{Namespace: "shop", Service: "payments", Port: 80, Weight: 1}}}},
	}
	for _, e := range endpoints {
		p.Endpoints = append(p.Endpoints, mesh.Endpoint{Address: netip.MustParseAddrPort(e), Ready: true})
	}
	return &mesh.Mesh{Services: []mesh.Service{{Namespace: "shop", Name: "payments", Ports: []mesh.Port{p}}}}
}

// Building on what was built before gives what building from nothing gives, and
// shares all that did not change.
func TestBuildTakesOverWhatDidNotChange(t *testing.T) {
	for _, dp := range xds.DataPlanes() {
		before, err := xds.Build(shop("127.0.0.1:1"), dp, nil)
		if err != nil {
			t.Fatal(err)
		}
		after, err := xds.Build(shop("127.0.0.1:2"), dp, before)
		if err != nil {
			t.Fatal(err)
		}
		fresh, err := xds.Build(shop("127.0.0.1:2"), dp, nil)
		if err != nil {
			t.Fatal(err)
		}
		if after.Version() != fresh.Version() || after.Version() == before.Version() {
			t.Errorf("%s: versions %s, %s, %s", dp, before.Version(), after.Version(), fresh.Version())
		}
		for _, typeURL := range xds.TypeURLs() {
			for name, r := range after.Of(typeURL) {
				if name == "outbound/127.0.0.1:2" {
					continue // by the address of an endpoint that is new
				}
				if same := before.Of(typeURL)[name] == r; same == (typeURL == xds.EndpointType) {
					t.Errorf("%s: %s %s taken over: %v", dp, typeURL, name, same)
				}
			}
		}
	}
}

// An Envoy that has no certificate is not told of one that it would have to
// fetch: it would refuse the whole cluster. It speaks in clear, and a strict
// endpoint refuses it.
func TestEnvoyWithoutCertificate(t *testing.T) {
	m := shop("10.0.0.1:80")
	p := &m.Services[0].Ports[0]
	p.Endpoints[0].MTLS, p.Identities = true, []string{"spiffe://cluster.local/ns/shop/sa/pay"}
	set, err := xds.Build(m, xds.Envoy, nil)
	if err != nil {
		t.Fatal(err)
	}
	n := xds.EnvoyNode{Upstreams: []bootstrap.Upstream{{Service: "payments", Namespace: "shop", Port: 80, Listen: netip.MustParseAddrPort("127.0.0.1:4001")}}}
	const key = "shop/payments:80"
	without, err := set.EnvoyView(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	n.Certificates = true
	with, err := set.EnvoyView(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	tls := []byte("UpstreamTlsContext")
	if bytes.Contains(without.Clusters[key].Any.GetValue(), tls) || !bytes.Contains(with.Clusters[key].Any.GetValue(), tls) {
		t.Error("the cluster is not the one for the node")
	}
}

func TestDataPlaneOf(t *testing.T) {
	f := func(agent string, want xds.DataPlane) {
		t.Helper()
		if got := xds.DataPlaneOf(agent); got != want {
			t.Errorf("%q: %s, want %s", agent, got, want)
		}
	}
	f("envoy", xds.Envoy)
	f("gRPC Go", xds.GRPC)
	f("gRPC C-core", xds.GRPC)
	f(bootstrap.UserAgent, xds.Outrigger)
	f("", xds.Outrigger)
}

func TestEnvoyNodeErrorsNameTheEntry(t *testing.T) {
	f := func(metadata string, want string) {
		t.Helper()
		var s structpb.Struct
		if err := s.UnmarshalJSON([]byte(metadata)); err != nil {
			t.Fatal(err)
		}
		if _, err := xds.ParseEnvoyNode(&s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", metadata, err, want)
		}
	}
	f(`{"UPSTREAMS": ["payments=1"]}`, `"payments=1"`)
	f(`{"INBOUNDS": [4]}`, `inbound ""`)
	f(`{"UPSTREAMS": ["a.b:1=127.0.0.1:1"], "INBOUNDS": ["127.0.0.1:1=127.0.0.1:2"]}`, "two listeners on 127.0.0.1:1")
	f(`{"MTLS": "Strict", "SDS": "true"}`, `MTLS is "Strict": write off, permissive or strict`)
	f(`{"MTLS": "strict"}`, "an Envoy without a certificate can take no mutual TLS")
	const captures = `"CAPTURE": "true", "NAMESPACE": "shop", "INSTANCE": "web-0", `
	f(`{"CAPTURE": "true", "NAMESPACE": "shop", "SDS": "true", "ADDRESSES": ["10.0.0.1"]}`, "NAMESPACE or INSTANCE is empty")
	f(`{`+captures+`"ADDRESSES": ["10.0.0.1"]}`, "an Envoy without a certificate can take no mutual TLS")
	f(`{`+captures+`"SDS": "true"}`, "ADDRESSES holds 0 addresses")
	f(`{`+captures+`"SDS": "true", "ADDRESSES": ["10.0.0.1", "fe80::1%eth0"]}`, `ADDRESSES "fe80::1%eth0"`)
	f(`{`+captures+`"SDS": "true", "ADDRESSES": ["10.0.0.1"], "UPSTREAMS": ["a.b:1=127.0.0.1:15001"]}`, "a listener on 127.0.0.1:15001")
	f(`{"UPSTREAMS": [`+strings.TrimSuffix(strings.Repeat(`"",`, 257), ",")+`]}`, "at most 256")
}

// Node metadata comes from the network.
func FuzzParseEnvoyNode(f *testing.F) {
	f.Add("payments.shop:80=127.0.0.1:4001", "http:127.0.0.1:5001=127.0.0.1:8080", "", "")
	f.Add("a.b:1=[::1]:1", "tcp:[::1]:1=[::1]:2", "true", "::ffff:10.0.0.1")
	m := shop("127.0.0.1:1")
	m.Instances = []mesh.Instance{{Namespace: "shop", Name: "p", MTLS: mesh.Permissive}}
	set, err := xds.Build(m, xds.Envoy, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, up, in, capture, address string) {
		s, err := structpb.NewStruct(map[string]any{
			bootstrap.MetaUpstreams: []any{up}, bootstrap.MetaInbounds: []any{in}, bootstrap.MetaSDS: "true", bootstrap.MetaNamespace: "shop", bootstrap.MetaInstance: "p",
			bootstrap.MetaCapture: capture, bootstrap.MetaAddresses: []any{address},
		})
		if err != nil {
			return // not UTF-8
		}
		n, err := xds.ParseEnvoyNode(s)
		if err != nil {
			return
		}
		if _, err := set.EnvoyView(n, nil); err != nil {
			t.Fatalf("accepted, and then: %v", err)
		}
	})
}

// TestPathPrefixIsReplacedAsTheGatewayAPISays: the table of HTTPPathModifier, as
// Envoy evaluates what it is told.
func TestPathPrefixIsReplacedAsTheGatewayAPISays(t *testing.T) {
	f := func(path, prefix, by, want string) {
		t.Helper()
		m := shop()
		r := &m.Services[0].Ports[0].Routes[0]
		r.Match.Path = mesh.PathMatch{Kind: mesh.Prefix, Value: prefix}
		r.Filters = &mesh.Filters{Rewrite: &mesh.Rewrite{Path: &mesh.PathChange{ReplacePrefix: &by}}}
		set, err := xds.Build(m, xds.Envoy, nil)
		if err != nil {
			t.Fatal(err)
		}
		var config routev3.RouteConfiguration
		if err := set.Of(xds.RouteType)["shop/payments:80"].Any.UnmarshalTo(&config); err != nil {
			t.Fatal(err)
		}
		route := config.GetVirtualHosts()[0].GetRoutes()[0]
		matched := route.GetMatch().GetPrefix()
		if p := route.GetMatch().GetPathSeparatedPrefix(); p != "" {
			matched = p
		}
		if !strings.HasPrefix(path, matched) {
			t.Fatalf("%s is not matched by %q", path, matched)
		}
		got := path
		if p := route.GetRoute().GetPrefixRewrite(); p != "" {
			got = p + path[len(matched):]
		}
		if rx := route.GetRoute().GetRegexRewrite(); rx != nil {
			got = regexp.MustCompile(rx.GetPattern().GetRegex()).ReplaceAllLiteralString(got, rx.GetSubstitution())
		}
		if got != want {
			t.Errorf("%s with %q replaced by %q: %s, want %s", path, prefix, by, got, want)
		}
	}
	f("/foo/bar", "/foo", "/xyz", "/xyz/bar")
	f("/foo/bar", "/foo", "/xyz/", "/xyz/bar")
	f("/foo/bar", "/foo/", "/xyz", "/xyz/bar")
	f("/foo/bar", "/foo/", "/xyz/", "/xyz/bar")
	f("/foo", "/foo", "/xyz", "/xyz")
	f("/foo/", "/foo", "/xyz", "/xyz/")
	f("/foo/bar", "/foo", "", "/bar")
	f("/foo/", "/foo", "", "/")
	f("/foo", "/foo", "", "/")
	f("/foo/", "/foo", "/", "/")
	f("/foo", "/foo", "/", "/")
	f("/foo", "/", "/xyz", "/xyz/foo")
	f("/", "/", "/xyz/", "/xyz/")
	f("/foo", "/", "/", "/foo")
	f("/fo.o/x", "/fo.o", "/", "/x")
	f("/foo", "", "xyz", "/xyz/foo")
}

// A pod that did not change keeps its listener, and another does not disturb it.
func TestBuildTakesOverPods(t *testing.T) {
	pods := func(modes ...mesh.MTLS) *mesh.Mesh {
		m := &mesh.Mesh{}
		for i, mode := range modes {
			m.Instances = append(m.Instances, mesh.Instance{Namespace: "shop", Name: "p-" + string(rune('0'+i)), MTLS: mode})
		}
		return m
	}
	before, err := xds.Build(pods(mesh.Strict, mesh.Strict), xds.Outrigger, nil)
	if err != nil {
		t.Fatal(err)
	}
	after, err := xds.Build(pods(mesh.Strict, mesh.Off), xds.Outrigger, before)
	if err != nil {
		t.Fatal(err)
	}
	was, is := before.Of(xds.ListenerType), after.Of(xds.ListenerType)
	if was["inbound/shop/p-0"] != is["inbound/shop/p-0"] || is["inbound/shop/p-0"] == nil {
		t.Error("the listener of a pod that did not change was made again")
	}
	if was["inbound/shop/p-1"].Version == is["inbound/shop/p-1"].Version {
		t.Error("the mode of a pod changed, and its listener did not")
	}
}

// Two rules of one name must both stay: what is lost of a Deny would be allowed.
func TestRulesOfOneNameAllStay(t *testing.T) {
	m := &mesh.Mesh{Instances: []mesh.Instance{{Namespace: "shop", Name: "p", MTLS: mesh.Strict, Authorizations: []mesh.Authorization{{
		Policy: "shop/a", Action: mesh.Deny, Rules: []mesh.AuthorizationRule{
			{Name: "r", Principals: []string{"spiffe://a"}}, {Name: "r", Principals: []string{"spiffe://b"}}, {Name: "r", Principals: []string{"spiffe://a"}},
		},
	}}}}}
	set, err := xds.Build(m, xds.Outrigger, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := set.Of(xds.ListenerType)["inbound/shop/p"].Any.GetValue()
	for _, want := range []string{"spiffe://a", "spiffe://b", "shop/a[r]", "shop/a[r#2]"} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("%s is missing", want)
		}
	}
	if bytes.Contains(b, []byte("shop/a[r#3]")) {
		t.Error("a rule is there twice")
	}
}

// A node's view takes over what did not change, and what all nodes that capture
// share is one resource. A pod that is another's is not told of.
func TestEnvoyViewTakesOverWhatDidNotChange(t *testing.T) {
	of := func(version string) *mesh.Mesh {
		m := shop("127.0.0.1:1")
		second := shop("127.0.0.1:2").Services[0]
		second.Name, second.VIPs = "zip", []netip.Addr{netip.MustParseAddr("10.96.0.9")}
		second.Ports[0].Routes[0].Name = version
		second.Ports[0].Protocol = mesh.Protocol(version)
		m.Services[0].VIPs = []netip.Addr{netip.MustParseAddr("10.96.0.1")}
		m.Services = append(m.Services, second)
		m.Instances = []mesh.Instance{{Namespace: "shop", Name: "web-0", ServiceAccount: "web", MTLS: mesh.Strict}}
		return m
	}
	n := xds.EnvoyNode{
		Namespace: "shop", Workload: "web", Instance: "web-0", ServiceAccount: "web", Certificates: true, Capture: true, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1")},
		Upstreams: []bootstrap.Upstream{{Service: "payments", Namespace: "shop", Port: 80, Listen: netip.MustParseAddrPort("127.0.0.1:4001")}},
		Inbounds:  []bootstrap.Inbound{{Protocol: "http", Listen: netip.MustParseAddrPort("127.0.0.1:5001"), Forward: netip.MustParseAddrPort("127.0.0.1:5002")}},
	}
	one, err := xds.Build(of("http"), xds.Envoy, nil)
	if err != nil {
		t.Fatal(err)
	}
	before, err := one.EnvoyView(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	two, err := xds.Build(of("tcp"), xds.Envoy, one)
	if err != nil {
		t.Fatal(err)
	}
	after, err := two.EnvoyView(n, before)
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := two.EnvoyView(n, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !after.Equal(fresh) || after.Equal(before) {
		t.Error("the view is not what it would be if made anew")
	}
	const changed = "outbound/shop/zip:80|10.96.0.9:80"
	if len(after.Listeners) != 6 {
		t.Errorf("listeners: %v", slices.Sorted(maps.Keys(after.Listeners)))
	}
	for name, l := range after.Listeners {
		if same := before.Listeners[name] == l; same == (name == changed) {
			t.Errorf("%s taken over: %v", name, same)
		}
	}
	// Its namespace has routes of its own, so that the listener leads elsewhere.
	m := of("http")
	m.Services[1].Ports[0].Consumers = []mesh.Consumer{{Namespace: "shop", Routes: []mesh.Route{{Backends: []mesh.Backend{{Namespace: "shop", Service: "other", Port: 80, Weight: 1}}}}}}
	three, err := xds.Build(m, xds.Envoy, two)
	if err != nil {
		t.Fatal(err)
	}
	own, err := three.EnvoyView(n, after)
	if err != nil {
		t.Fatal(err)
	}
	if got := own.Listeners[changed].Reaches; !slices.Equal(got, []string{"shop/other:80"}) {
		t.Errorf("%s reaches %v", changed, got)
	}
	other := n
	other.ServiceAccount = "thief"
	v, err := two.EnvoyView(other, nil)
	if err != nil {
		t.Fatal(err)
	}
	if v.Listeners["inbound/0.0.0.0:15006"] != nil || after.Listeners["inbound/0.0.0.0:15006"] == nil {
		t.Error("the inbound listener of a pod is not for its service account alone")
	}
	for _, name := range []string{changed, "outbound/0.0.0.0:15001"} {
		if v.Listeners[name] != after.Listeners[name] || v.Listeners[name] == nil {
			t.Errorf("%s is made for each node", name)
		}
	}
}

// Whatever was built before, what is built is what would be built from nothing,
// and a node's view too.
func TestEveryHistoryGivesTheSame(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	some := func() bool { return random.IntN(2) == 0 }
	service := func(i int) *mesh.Service {
		s := shop().Services[0]
		s.Name = "s" + string(rune('0'+i))
		p := &s.Ports[0]
		if some() {
			s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, 0, byte(i)})}
		}
		for j := range random.IntN(3) {
			mtls := some()
			p.Endpoints = append(p.Endpoints, mesh.Endpoint{Address: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(i%2*4 + j)}), 80), Ready: some(), MTLS: mtls})
			if mtls {
				p.Identities = []string{"spiffe://cluster.local/ns/shop/sa/s"}
			}
		}
		if some() {
			p.Protocol = mesh.Unknown
		}
		if some() {
			p.Consumers = []mesh.Consumer{{Namespace: "front", Routes: []mesh.Route{{Name: "r", Backends: []mesh.Backend{{Namespace: "shop", Service: "s1", Port: 80, Weight: 1}}}}}}
		}
		return &s
	}
	instance := func(name string) *mesh.Instance {
		in := &mesh.Instance{Namespace: "front", Name: name, MTLS: mesh.Strict}
		if some() {
			in.Authorizations = []mesh.Authorization{{Policy: "front/p", Action: mesh.Allow, Ports: []uint16{uint16(random.IntN(2) + 1)}}}
		}
		return in
	}
	services, instances := make([]*mesh.Service, 4), make([]*mesh.Instance, 2)
	next := func() *mesh.Mesh { // in which one thing has changed, or gone
		if i := random.IntN(6); i < 4 {
			if services[i] = nil; random.IntN(4) > 0 {
				services[i] = service(i)
			}
		} else if instances[i-4] = nil; random.IntN(4) > 0 {
			instances[i-4] = instance(string(rune('a' + i - 4)))
		}
		m := &mesh.Mesh{TrustDomain: "cluster.local"}
		for _, s := range services {
			if s != nil {
				m.Services = append(m.Services, *s)
			}
		}
		for _, in := range instances {
			if in != nil {
				m.Instances = append(m.Instances, *in)
			}
		}
		return m
	}
	n := xds.EnvoyNode{
		Namespace: "front", Workload: "a", Instance: "a", Certificates: true, Capture: true, Addresses: []netip.Addr{netip.MustParseAddr("10.2.0.1")},
		Upstreams: []bootstrap.Upstream{{Service: "s0", Namespace: "shop", Port: 80, Listen: netip.MustParseAddrPort("127.0.0.1:4001")}},
	}
	prev := map[xds.DataPlane]*xds.Set{}
	var view *xds.EnvoyView
	for range 200 {
		m := next()
		for _, dp := range xds.DataPlanes() {
			fresh, err := xds.Build(m, dp, nil)
			if err != nil {
				t.Fatal(err)
			}
			set, err := xds.Build(m, dp, prev[dp])
			if err != nil {
				t.Fatal(err)
			}
			if set.Version() != fresh.Version() {
				t.Fatalf("%s: %+v", dp, m)
			}
			prev[dp] = set
			if dp != xds.Envoy {
				continue
			}
			freshView, err := fresh.EnvoyView(n, nil)
			if err != nil {
				t.Fatal(err)
			}
			if view, err = set.EnvoyView(n, view); err != nil {
				t.Fatal(err)
			}
			if !view.Equal(freshView) {
				t.Fatalf("view: %+v", m)
			}
			for name, l := range view.Listeners {
				if !slices.Equal(l.Reaches, freshView.Listeners[name].Reaches) {
					t.Fatalf("%s reaches %v, want %v", name, l.Reaches, freshView.Listeners[name].Reaches)
				}
			}
		}
	}
}

func BenchmarkBuild(b *testing.B) {
	m := &mesh.Mesh{TrustDomain: "cluster.local"}
	for i := range 1000 {
		s := shop("10.1.0.1:80", "10.1.0.2:80").Services[0]
		s.Name = fmt.Sprintf("s%04d", i)
		s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}
		m.Services = append(m.Services, s)
		m.Instances = append(m.Instances, mesh.Instance{Namespace: "shop", Name: s.Name, MTLS: mesh.Strict})
	}
	for _, dp := range xds.DataPlanes() {
		first, err := xds.Build(m, dp, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(string(dp)+"/fresh", func(b *testing.B) {
			for b.Loop() {
				if _, err := xds.Build(m, dp, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(string(dp)+"/unchanged", func(b *testing.B) {
			for b.Loop() {
				if _, err := xds.Build(m, dp, first); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
