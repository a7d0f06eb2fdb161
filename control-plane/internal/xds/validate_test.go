package xds_test

import (
	"context"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"golang.org/x/tools/txtar"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

// TestEnvoyTakesWhatItIsTold has a real Envoy validate, for each mesh of testdata,
// what it would be told as the node of node.json, as one that captures the traffic
// of each pod, and as what our sidecar is told of that pod.
func TestEnvoyTakesWhatItIsTold(t *testing.T) {
	envoy := envoyBinary(t)
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sections := map[string][]byte{}
			for _, f := range a.Files {
				sections[f.Name] = f.Data
			}
			var m mesh.Mesh
			strict(t, sections["mesh.json"], &m)
			ours, err := xds.Build(&m, xds.Outrigger, nil)
			if err != nil {
				t.Fatal(err)
			}
			set, err := xds.Build(&m, xds.Envoy, nil)
			if err != nil {
				t.Fatal(err)
			}
			nodes := map[string]*structpb.Struct{}
			if b, ok := sections["node.json"]; ok {
				nodes["node.json"] = new(structpb.Struct)
				if err := nodes["node.json"].UnmarshalJSON(b); err != nil {
					t.Fatal(err)
				}
			}
			for _, in := range append(slices.Clone(m.Instances), mesh.Instance{Namespace: "shop", Name: "none"}) {
				metadata, err := structpb.NewStruct(map[string]any{
					bootstrap.MetaNamespace: in.Namespace, bootstrap.MetaWorkload: "w%w", bootstrap.MetaInstance: in.Name, bootstrap.MetaServiceAccount: in.ServiceAccount,
					bootstrap.MetaSDS: "true", bootstrap.MetaCapture: "true", bootstrap.MetaAddresses: []any{"10.9.9.9", "fd00::9"},
				})
				if err != nil {
					t.Fatal(err)
				}
				nodes[in.Name] = metadata
			}
			for name, metadata := range nodes {
				n, err := xds.ParseEnvoyNode(metadata)
				if err != nil {
					t.Fatal(err)
				}
				v, err := set.EnvoyView(n, nil)
				if err != nil {
					t.Fatal(err)
				}
				out := static(t, set, v, n.Namespace)
				if l := ours.Of(xds.ListenerType)["inbound/"+n.Namespace+"/"+name]; l != nil {
					out.StaticResources.Listeners = append(out.StaticResources.Listeners, bound(t, l))
				}
				if why, ok := validated(t, envoy, out); !ok {
					t.Errorf("Envoy does not take what it is told as %s:\n%s", name, why)
				}
			}
		})
	}
}

func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("OUTRIGGER_ENVOY")
	if path == "" {
		var err error
		if path, err = filepath.Abs("../../../.cache/envoy/envoy"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if os.Getenv("OUTRIGGER_REQUIRE_ENVOY") == "1" {
		t.Fatalf("there is no real Envoy at %s and OUTRIGGER_REQUIRE_ENVOY is 1: run deploy/apptest/envoy.sh", path)
	}
	t.Skipf("SKIPPED: there is no real Envoy at %s: run deploy/apptest/envoy.sh, or name one in OUTRIGGER_ENVOY", path)
	return ""
}

func validated(t *testing.T, envoy string, config *bootstrapv3.Bootstrap) (string, bool) {
	t.Helper()
	b, err := proto.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "static.pb")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, envoy, "--mode", "validate", "-c", file, "--disable-hot-restart", "--log-level", "warning").CombinedOutput()
	return string(out), err == nil
}

// static is a bootstrap that needs nobody: endpoints in their clusters, routes in
// their listeners.
func static(t *testing.T, set *xds.Set, v *xds.EnvoyView, namespace string) *bootstrapv3.Bootstrap {
	t.Helper()
	clusters, routes := maps.Clone(set.Of(xds.ClusterType)), maps.Clone(set.Of(xds.RouteType))
	maps.Copy(clusters, v.Clusters)
	maps.Copy(routes, set.Overlays()[namespace])
	out := &bootstrapv3.Bootstrap{
		Node:            &corev3.Node{Id: "a.b", Cluster: "a"},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{secrets(t)}},
	}
	for name, r := range clusters {
		c := decoded(t, r, &clusterv3.Cluster{})
		if c.GetType() == clusterv3.Cluster_EDS {
			c.ClusterDiscoveryType, c.EdsClusterConfig = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, nil
			c.LoadAssignment = decoded(t, set.Of(xds.EndpointType)[name], &endpointv3.ClusterLoadAssignment{})
		}
		out.StaticResources.Clusters = append(out.StaticResources.Clusters, c)
	}
	for _, r := range v.Listeners {
		l := decoded(t, r, &listenerv3.Listener{})
		for _, c := range append(slices.Clone(l.GetFilterChains()), l.GetDefaultFilterChain()) {
			for _, f := range c.GetFilters() {
				var m hcmv3.HttpConnectionManager
				if !f.GetTypedConfig().MessageIs(&m) {
					continue
				}
				if err := f.GetTypedConfig().UnmarshalTo(&m); err != nil {
					t.Fatal(err)
				}
				if name := m.GetRds().GetRouteConfigName(); name != "" {
					if routes[name] == nil {
						t.Fatalf("listener %s names the route %s, which does not exist", r.Name, name)
					}
					config := decoded(t, routes[name], &routev3.RouteConfiguration{})
					config.ValidateClusters = wrapperspb.Bool(false) // a backend may be missing
					m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: config}
				}
				f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(t, &m)}
			}
		}
		out.StaticResources.Listeners = append(out.StaticResources.Listeners, l)
	}
	return out
}

// bound gives a listener of our sidecar an address, and its routes leave to lead
// to a cluster that is not there.
func bound(t *testing.T, r *xds.Resource) *listenerv3.Listener {
	t.Helper()
	l := decoded(t, r, &listenerv3.Listener{})
	l.Address = &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 9},
	}}}
	for _, c := range l.GetFilterChains() {
		for _, f := range c.GetFilters() {
			var m hcmv3.HttpConnectionManager
			if f.GetTypedConfig().MessageIs(&m) {
				if err := f.GetTypedConfig().UnmarshalTo(&m); err != nil {
					t.Fatal(err)
				}
				m.GetRouteConfig().ValidateClusters = wrapperspb.Bool(false)
				f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(t, &m)}
			}
		}
	}
	return l
}

// secrets is the static cluster that an Envoy's bootstrap has for its certificate.
func secrets(t *testing.T) *clusterv3.Cluster {
	t.Helper()
	return &clusterv3.Cluster{
		Name:           bootstrap.ClusterSDS,
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: bootstrap.ClusterSDS},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": pack(t, &httpv3.HttpProtocolOptions{
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
				ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
			}},
		})},
	}
}

func decoded[M proto.Message](t *testing.T, r *xds.Resource, into M) M {
	t.Helper()
	if err := r.Any.UnmarshalTo(into); err != nil {
		t.Fatal(err)
	}
	return into
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
