package apptest

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/tools/txtar"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/outrigger-mesh/outrigger/sidecar/bootstrap"
)

const (
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	routeType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	endpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// TestGeneratedConfigurationsAreValid: whatever objects the control plane takes
// without a problem, the Envoy of this version accepts what is made of them.
//
// For every folder in testdata it asks the control plane as an Envoy would that
// has a port for each Service, and as one that captures the traffic of a pod, puts the answers into a static bootstrap and has
// Envoy validate it: that checks each message by itself and, unlike a running
// Envoy's acknowledgement, that routes name clusters that exist. A dry run of
// the same folder must show the same resources.
func TestGeneratedConfigurationsAreValid(t *testing.T) {
	t.Parallel()
	envoy := envoyBinary(t)
	files, err := filepath.Glob(filepath.Join("testdata", "*.txtar"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no folders in testdata: %v", err)
	}
	folders := map[string]map[string]string{"demo": demoFolder(t)}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			t.Fatal(err)
		}
		folder := map[string]string{}
		for _, f := range a.Files {
			folder[f.Name] = string(f.Data)
		}
		folders[strings.TrimSuffix(filepath.Base(file), ".txtar")] = folder
	}
	for name, folder := range folders {
		t.Run(name, func(t *testing.T) { validates(t, envoy, folder) })
	}
}

// demoFolder is what ships with the demo.
func demoFolder(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, name := range []string{"services.yaml", "policies.yaml"} {
		b, err := os.ReadFile(filepath.Join("..", "demo", "mesh", name))
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(b)
	}
	return out
}

func validates(t *testing.T, envoy string, folder map[string]string) {
	c := startControlPlane(t, folder)
	if problems := c.problems(t); len(problems) > 0 {
		t.Fatalf("the control plane does not take the folder:\n%s", strings.Join(problems, "\n"))
	}
	dry := dryRun(t, c.mesh)
	upstreams := everyPort(t, dry)
	got := askAsEnvoy(t, c.xds, bootstrap.Config{
		Namespace: "shop", Workload: "validator", Instance: "validator-0", ServiceAccount: "default",
		Upstreams: upstreams, Inbounds: []bootstrap.Inbound{
			{Protocol: "http", Listen: listen(t, freeAddress(t)), Forward: listen(t, freeAddress(t))},
			{Protocol: "tcp", Listen: listen(t, freeAddress(t)), Forward: listen(t, freeAddress(t))},
			{Protocol: "tls", Listen: listen(t, freeAddress(t)), Forward: listen(t, freeAddress(t))},
			{Protocol: "auto", Listen: listen(t, freeAddress(t)), Forward: listen(t, freeAddress(t))},
		},
	})
	if n := len(got[listenerType]); n != len(upstreams)+4 {
		t.Errorf("%d listeners, want one for each of %d upstreams and four inbound ports", n, len(upstreams))
	}
	everythingOf(t, dry, got)
	validate(t, envoy, "with ambassador ports", got)

	got = askAsEnvoy(t, c.xds, bootstrap.Config{
		Namespace: "shop", Workload: "validator", Instance: "validator-0", ServiceAccount: "default", SDS: "unix:///nowhere",
		Capture: true, Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("fd00::1")},
	})
	for _, name := range []string{"outbound/0.0.0.0:15001", "outbound/[::]:15001"} {
		if got[listenerType][name] == nil {
			t.Errorf("an Envoy that captures has no listener %s", name)
		}
	}
	if len(got[clusterType]) < len(dry[clusterType]) {
		t.Errorf("an Envoy that captures is given %d of %d clusters", len(got[clusterType]), len(dry[clusterType]))
	}
	validate(t, envoy, "in a captured pod", got)
}

// everythingOf reports what a dry run shows and an Envoy that calls all is not
// given.
func everythingOf(t *testing.T, dry map[string][]string, got map[string]map[string]*anypb.Any) {
	t.Helper()
	for typeURL, names := range dry {
		if typeURL == listenerType {
			continue // an Envoy's listeners are its own
		}
		for _, name := range names {
			if got[typeURL][name] == nil {
				t.Errorf("the dry run shows %s %s, and an Envoy is not given it", typeURL, name)
			}
		}
	}
}

func validate(t *testing.T, envoy, what string, got map[string]map[string]*anypb.Any) {
	t.Helper()
	b, err := proto.Marshal(static(t, got))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "static.pb")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	p := launch(t, "envoy --mode validate", envoy, "--mode", "validate", "-c", file, "--disable-hot-restart", "--log-level", "warning")
	if code := p.exits(t); code != 0 {
		t.Errorf("an Envoy %s does not take what the control plane makes of the folder:\n%s%s", what, p.stderr.tail(10), p.stdout.tail(10))
	}
}

// dryRun returns the names of the resources that a dry run shows for Envoy.
func dryRun(t *testing.T, folder string) map[string][]string {
	t.Helper()
	p := launch(t, "dry-run", program("control-plane"), "--config", folder, "--dry-run")
	if code := p.exits(t); code != 0 {
		t.Fatalf("the dry run ended with %d:\n%s", code, p.stderr.String())
	}
	var out struct {
		XDS map[string]map[string][]struct{ Name string }
	}
	if err := json.Unmarshal([]byte(p.stdout.String()), &out); err != nil {
		t.Fatal(err)
	}
	names := map[string][]string{}
	for typeURL, rs := range out.XDS["envoy"] {
		for _, r := range rs {
			names[typeURL] = append(names[typeURL], r.Name)
		}
	}
	return names
}

// everyPort is an ambassador port for each port of each Service.
func everyPort(t *testing.T, dry map[string][]string) []bootstrap.Upstream {
	t.Helper()
	var out []bootstrap.Upstream
	for _, key := range dry[clusterType] {
		namespace, rest, _ := strings.Cut(key, "/")
		service, port, _ := strings.Cut(rest, ":")
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			t.Fatalf("cluster %q: %v", key, err)
		}
		out = append(out, bootstrap.Upstream{Service: service, Namespace: namespace, Port: uint16(n), Listen: listen(t, freeAddress(t))})
	}
	return out
}

// askAsEnvoy asks for everything that an Envoy with this bootstrap would ask
// for, state of the world: type URL -> name -> resource.
func askAsEnvoy(t *testing.T, address string, config bootstrap.Config) map[string]map[string]*anypb.Any {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).StreamAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	metadata, err := structpb.NewStruct(config.Metadata())
	if err != nil {
		t.Fatal(err)
	}
	node := &corev3.Node{Id: config.NodeID(), Metadata: metadata, UserAgentName: "envoy"}
	got := map[string]map[string]*anypb.Any{}
	ask := func(typeURL string, names []string) {
		t.Helper()
		if names != nil && len(names) == 0 {
			return
		}
		if err := stream.Send(&discoveryv3.DiscoveryRequest{Node: node, TypeUrl: typeURL, ResourceNames: names}); err != nil {
			t.Fatal(err)
		}
		resp, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: %v", typeURL, err)
		}
		if resp.GetTypeUrl() != typeURL {
			t.Fatalf("asked for %s and was given %s", typeURL, resp.GetTypeUrl())
		}
		got[typeURL] = map[string]*anypb.Any{}
		for _, r := range resp.GetResources() {
			m, err := r.UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			field := m.ProtoReflect().Descriptor().Fields().ByNumber(1) // the name, in all four types
			got[typeURL][m.ProtoReflect().Get(field).String()] = r
		}
	}
	ask(clusterType, nil)
	var eds []string
	for name, r := range got[clusterType] {
		if decode(t, r, &clusterv3.Cluster{}).GetType() == clusterv3.Cluster_EDS {
			eds = append(eds, name)
		}
	}
	slices.Sort(eds)
	ask(endpointType, eds)
	ask(listenerType, nil)
	var rds []string
	for _, r := range got[listenerType] {
		eachManager(t, decode(t, r, &listenerv3.Listener{}), func(m *hcmv3.HttpConnectionManager) {
			if name := m.GetRds().GetRouteConfigName(); name != "" {
				rds = append(rds, name)
			}
		})
	}
	if slices.Sort(rds); len(rds) > 0 { // none is no wildcard for routes
		ask(routeType, slices.Compact(rds))
	}
	return got
}

func decode[M proto.Message](t *testing.T, a *anypb.Any, into M) M {
	t.Helper()
	if err := a.UnmarshalTo(into); err != nil {
		t.Fatal(err)
	}
	return into
}

// eachManager shows every HTTP connection manager of a listener to f, which
// may change it.
func eachManager(t *testing.T, l *listenerv3.Listener, f func(*hcmv3.HttpConnectionManager)) {
	t.Helper()
	for _, c := range l.GetFilterChains() {
		for _, filter := range c.GetFilters() {
			var m hcmv3.HttpConnectionManager
			if !filter.GetTypedConfig().MessageIs(&m) {
				continue
			}
			f(decode(t, filter.GetTypedConfig(), &m))
			a, err := anypb.New(&m)
			if err != nil {
				t.Fatal(err)
			}
			filter.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: a}
		}
	}
}

// static puts what was answered into a bootstrap that needs nobody: endpoints
// into their clusters, routes into their listeners.
func static(t *testing.T, got map[string]map[string]*anypb.Any) *bootstrapv3.Bootstrap {
	t.Helper()
	out := &bootstrapv3.Bootstrap{StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{secrets(t)}}}
	for name, r := range got[clusterType] {
		c := decode(t, r, &clusterv3.Cluster{})
		if c.GetType() == clusterv3.Cluster_EDS {
			c.ClusterDiscoveryType, c.EdsClusterConfig = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}, nil
			endpoints := got[endpointType][name]
			if endpoints == nil {
				t.Fatalf("cluster %s has no endpoints resource", name)
			}
			c.LoadAssignment = decode(t, endpoints, &endpointv3.ClusterLoadAssignment{})
		}
		out.StaticResources.Clusters = append(out.StaticResources.Clusters, c)
	}
	for _, r := range got[listenerType] {
		l := decode(t, r, &listenerv3.Listener{})
		eachManager(t, l, func(m *hcmv3.HttpConnectionManager) {
			name := m.GetRds().GetRouteConfigName()
			if name == "" {
				return
			}
			m.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: decode(t, got[routeType][name], &routev3.RouteConfiguration{})}
		})
		out.StaticResources.Listeners = append(out.StaticResources.Listeners, l)
	}
	out.Node = &corev3.Node{Id: "validator-0.shop", Cluster: "validator"}
	host, port, _ := net.SplitHostPort(freeAddress(t))
	n, _ := strconv.ParseUint(port, 10, 16)
	out.Admin = &bootstrapv3.Admin{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(n)},
	}}}}
	return out
}

// secrets is the cluster that the bootstrap of an Envoy has for its certificate.
func secrets(t *testing.T) *clusterv3.Cluster {
	t.Helper()
	a, err := anypb.New(&httpv3.HttpProtocolOptions{UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
		ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return &clusterv3.Cluster{
		Name: bootstrap.ClusterSDS, LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: bootstrap.ClusterSDS},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": a},
	}
}
