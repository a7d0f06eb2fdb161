// Package xds turns the model, mesh.Mesh, into xDS v3 resources: listeners,
// routes, clusters and endpoints, once for each kind of data plane.
//
// It is pure: the same Mesh gives the same bytes, so a resource's version is a
// hash of its content and survives a restart. It knows protobufs and what each
// data plane honours (Parity); it knows neither streams nor nodes that are
// connected. Package discovery serves what it makes, and the dry run prints it.
//
// # Names
//
//	listener   outbound/<namespace>/<service>:<port>   Outrigger
//	           outbound/<virtual IP>:<port>            Outrigger, the same content
//	           outbound/<endpoint IP>:<endpoint port>  Outrigger, the same, of a Service without virtual IPs
//	           inbound/<namespace>/<pod>               Outrigger, for the proxy of that pod alone
//	           <service>.<namespace>:<port>            GRPC: xds:///payments.shop:80
//	           <service>.<namespace>.svc.cluster.local:<port>   GRPC, the same
//	           outbound/<namespace>/<service>:<port>|<address>  Envoy, by node
//	           inbound/<address>                       Envoy, by node
//	           outbound/0.0.0.0:15001, inbound/0.0.0.0:15006    Envoy that captures, and the same with [::]
//	route      <namespace>/<service>:<port>
//	cluster    <namespace>/<service>:<port>; inbound/<application address> by node
//	           inbound, passthrough, <namespace>/<service>:<port>|direct    Envoy that captures
//	endpoints  as the cluster
//
// A route may be there once more for the nodes of a namespace (Set.Overlays).
//
// # What a pod asks of those who call it
//
// The listener inbound/<namespace>/<pod> has no address. Its
// filter_metadata["outrigger.dev"].mtls is off, permissive or strict. Each port has
// a filter chain with its destination_port, or two where the protocol is unknown;
// what comes in at another port takes the chain without one or, where it is not
// HTTP, the default chain. Before the router, and before the tcp_proxy, stand an RBAC
// filter that denies and one that allows, where there is such a policy; rules are in
// force, shadow_rules are evaluated only. A policy in them is one rule, named
// <namespace>/<policy>[<rule>]. The cluster "inbound" stands for the address that
// the connection was made to.
//
// # Contract: what travels as typed metadata
//
// What Envoy's own fields have no word for is in typed_filter_metadata under
// the key "outrigger.dev": an xds.type.v3.TypedStruct whose value is described
// here. Durations are Go duration strings ("800ms"), ratios and counts are
// numbers, a condition that is not used is absent. A proxy that does not know
// the type ignores it. It is sent to Outrigger and Envoy, not to gRPC.
//
//	cluster.metadata   type.googleapis.com/outrigger.dev.v1alpha1.CircuitBreaker
//	  policy    string   <namespace>/<name> of the CircuitBreaker
//	  mode      string   Observe or Enforce
//	  trip      object   consecutiveFailures, failureRatio, slowCallThreshold, slowCallRatio,
//	                     minimumRequests, window, openFor, halfOpenRequests, failureOn [words]
//	  limits    object   only in Observe: connections, pendingRequests, requests, retries.
//	                     In Enforce they are the cluster's circuit_breakers
//	  ejection  object   consecutive5xx, consecutiveGatewayErrors, interval, baseEjectionTime,
//	                     maxEjectionPercent, failurePercentage {threshold, minimumHosts, requestVolume}
//	route.metadata     type.googleapis.com/outrigger.dev.v1alpha1.RetryPolicy
//	  policy        string   <namespace>/<name>, or "default"
//	  idempotentOn  [words]  retry_on words that apply to idempotent methods only
//
// An endpoint's filter_metadata["outrigger.dev"] holds the strings instance,
// workload and serviceAccount; those that are unknown are absent. One that takes
// mutual TLS says so in filter_metadata["envoy.transport_socket_match"] by
// {"outrigger.dev/mtls": "true"}; its cluster has transport_socket_matches then,
// whose TLS context names the identities of which the peer must prove one.
//
// In circuit_breakers, 4294967295 is "no limit": Envoy's own default for a
// threshold that is absent is 1024, which nobody asked for. A retry_policy
// whose retry_on is empty retries only what idempotentOn names; num_retries is
// the number after the first attempt. A route's cluster that does not exist
// means 500 for its share of the requests (cluster_not_found_response_code).
package xds

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// DataPlane is a kind of proxy. Each understands another part of xDS.
type DataPlane string

// The data planes: our sidecar, a real Envoy, a gRPC program without a proxy.
const (
	Outrigger DataPlane = "outrigger"
	Envoy     DataPlane = "envoy"
	GRPC      DataPlane = "grpc"
)

// DataPlanes lists them all.
func DataPlanes() []DataPlane { return []DataPlane{Outrigger, Envoy, GRPC} }

// DataPlaneOf tells the data plane from the user_agent_name of an xDS node:
// "envoy", "gRPC <language>", and anything else is treated as our sidecar.
func DataPlaneOf(userAgent string) DataPlane {
	switch {
	case userAgent == "envoy":
		return Envoy
	case strings.HasPrefix(userAgent, "gRPC"):
		return GRPC
	}
	return Outrigger
}

// The type URLs that are served.
const (
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
)

// TypeURLs lists the types in the order in which additions are to be pushed,
// so that whatever is referred to arrives first (make before break).
func TypeURLs() []string { return []string{ClusterType, EndpointType, ListenerType, RouteType} }

// Resource is one encoded resource. It is never changed and may be shared.
type Resource struct {
	Name string
	// Version is a hash of the content; of an Envoy's endpoints, also of their
	// cluster's.
	Version string
	Any     *anypb.Any
	// Reaches names, for a listener of an Envoy and for a route, the clusters that
	// requests may go to, sorted. Some may not exist.
	Reaches []string
	// ServiceAccount is, for a listener that is for one node alone, that of its pod.
	ServiceAccount string
}

// Resources of one type by name.
type Resources map[string]*Resource

// VersionOf is the version of a resource of these bytes: 64 bits of SHA-256 in
// hexadecimal.
func VersionOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:8])
}

// Set is all that one data plane may be told. Only an Update changes it.
type Set struct {
	DataPlane   DataPlane
	trustDomain string
	types       map[string]Resources
	overlays    map[string]Resources // routes, by the namespace that has them
	ports       map[string]*portSet
	instances   map[string]*instanceSet // by the name of the listener
	capture     *captureSet             // Envoy only
	// owners are the ports that have a listener by the address of an endpoint, by its
	// name, in order: the first has it.
	owners map[string][]owner
}

// owner is a port, and its listener of a name.
type owner struct {
	key      string
	listener *Resource
}

// Of returns the resources of a type that all nodes share; nil for a type that
// is not served. Of listeners, those that begin with InboundPrefix are for one
// node each. The map must not be changed.
func (s *Set) Of(typeURL string) Resources { return s.types[typeURL] }

// Overlays returns, by namespace, the routes that nodes of that namespace get
// instead of those of the same name that are shared. The maps must not be
// changed.
func (s *Set) Overlays() map[string]Resources { return s.overlays }

// Version is a hash over the names and versions of all resources.
func (s *Set) Version() string {
	h := sha256.New()
	put := func(of string, rs Resources) {
		for _, name := range slices.Sorted(maps.Keys(rs)) {
			// A hash never fails to write.
			_, _ = fmt.Fprintf(h, "%s\x00%s\x00%s\x00", of, name, rs[name].Version)
		}
	}
	for _, t := range TypeURLs() {
		put(t, s.types[t])
	}
	for _, namespace := range slices.Sorted(maps.Keys(s.overlays)) {
		put(RouteType+" "+namespace, s.overlays[namespace])
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// portSet is what was built for one port, and from what, so that a later Build
// takes over whatever did not change.
type portSet struct {
	namespace, service string
	vips               []netip.Addr
	port               mesh.Port

	*shape
	endpoints *Resource
	hosts     []*Resource // listeners by the addresses of the endpoints; only without virtual IPs
}

// shape is the part of a portSet that does not depend on the endpoints.
type shape struct {
	listeners []*Resource
	captured  []*Resource          // the listeners of an Envoy that captures; Envoy only
	direct    *Resource            // its cluster for single endpoints; nil where it needs none
	route     *Resource            // nil for ports that are not routed by request
	overlays  map[string]*Resource // by namespace, what is there instead of route
	cluster   *Resource
	clear     *Resource // the cluster for an Envoy that has no certificate; nil where it is no other
	reaches   []string  // clusters that calls to the port may go to, sorted
}

// reachesFrom are the clusters that calls from a namespace may go to.
func (s *shape) reachesFrom(namespace string) []string {
	if o := s.overlays[namespace]; o != nil {
		return o.Reaches
	}
	return s.reaches
}

// Build makes the resources of a data plane. What it made before (prev, which
// may be nil) is taken over for ports and pods that did not change: where only
// the endpoints of a port differ, only its ClusterLoadAssignment is encoded again.
//
// An error is a broken invariant: a message that cannot be encoded.
func Build(m *mesh.Mesh, dp DataPlane, prev *Set) (*Set, error) {
	s := &Set{
		DataPlane: dp, trustDomain: m.TrustDomain,
		types: map[string]Resources{}, overlays: map[string]Resources{}, ports: map[string]*portSet{}, instances: map[string]*instanceSet{},
		owners: map[string][]owner{},
	}
	for _, t := range TypeURLs() {
		s.types[t] = Resources{}
	}
	if prev == nil || prev.DataPlane != dp {
		prev = &Set{}
	}
	if s.capture = prev.capture; dp == Envoy && s.capture == nil {
		var err error
		if s.capture, err = buildCapture(); err != nil {
			return nil, err
		}
	}
	for i := range m.Services {
		svc := &m.Services[i]
		for j := range svc.Ports {
			key := mesh.Key(svc.Namespace, svc.Name, svc.Ports[j].Number)
			ps, err := buildPort(svc, svc.Ports[j], dp, prev.ports[key])
			if err != nil {
				return nil, fmt.Errorf("port %s for data plane %s: %w", key, dp, err)
			}
			s.add(key, ps)
		}
	}
	if dp != Envoy { // whose listeners are in its view
		s.addHosts()
	}
	if dp == GRPC {
		return s, s.addMissing()
	}
	for i := range m.Instances {
		in := &m.Instances[i]
		name := InboundListenerName(in.Namespace, in.Name)
		is, err := buildInstance(in, dp, prev.instances[name])
		if err != nil {
			return nil, fmt.Errorf("pod %s/%s for data plane %s: %w", in.Namespace, in.Name, dp, err)
		}
		s.instances[name] = is
		if is.listener != nil {
			s.types[ListenerType][name] = is.listener
		}
	}
	return s, nil
}

// addHosts adds the listeners by the addresses of endpoints. Of several ports
// that have an endpoint, the first by key has its listener: which one the
// application meant, the address does not say. A virtual IP goes before all.
func (s *Set) addHosts() {
	for _, key := range slices.Sorted(maps.Keys(s.ports)) {
		for _, l := range s.ports[key].hosts {
			s.owners[l.Name] = append(s.owners[l.Name], owner{key, l})
			if s.types[ListenerType][l.Name] == nil {
				s.types[ListenerType][l.Name] = l
			}
		}
	}
}

// addMissing gives each cluster that a route names and no Service has an entry
// without endpoints: gRPC would otherwise hold up the whole channel for the 15 s
// in which it hopes for the cluster, not just the share of that backend.
func (s *Set) addMissing() error {
	add := func(names []string) error {
		for _, name := range names {
			if s.types[ClusterType][name] != nil {
				continue
			}
			c, err := encode(ClusterType, name, cluster(name, mesh.Port{}, s.DataPlane))
			if err != nil {
				return err
			}
			e, err := encode(EndpointType, name, loadAssignment(name, nil, s.DataPlane))
			if err != nil {
				return err
			}
			s.types[ClusterType][name], s.types[EndpointType][name] = c, e
		}
		return nil
	}
	for _, ps := range s.ports {
		if err := add(ps.reaches); err != nil {
			return err
		}
		for _, o := range ps.overlays {
			if err := add(o.Reaches); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Set) add(key string, ps *portSet) {
	s.ports[key] = ps
	for _, l := range ps.listeners {
		s.types[ListenerType][l.Name] = l
	}
	if ps.route != nil {
		s.types[RouteType][key] = ps.route
	}
	for namespace, r := range ps.overlays {
		if s.overlays[namespace] == nil {
			s.overlays[namespace] = Resources{}
		}
		s.overlays[namespace][key] = r
	}
	s.types[ClusterType][key] = ps.cluster
	s.types[EndpointType][key] = ps.endpoints
}

func buildPort(svc *mesh.Service, p mesh.Port, dp DataPlane, old *portSet) (*portSet, error) {
	key := mesh.Key(svc.Namespace, svc.Name, p.Number)
	ps := &portSet{namespace: svc.Namespace, service: svc.Name, vips: svc.VIPs, port: p}
	var err error
	if old != nil && sameButEndpoints(old, ps) {
		ps.shape = old.shape
	} else if ps.shape, err = buildShape(key, svc, p, dp); err != nil {
		return nil, err
	}
	unchanged := old != nil && old.shape == ps.shape
	if unchanged && slices.Equal(old.port.Endpoints, p.Endpoints) {
		ps.endpoints, ps.hosts = old.endpoints, old.hosts
		return ps, nil
	}
	if len(svc.VIPs) == 0 {
		var had []*Resource
		if unchanged {
			had = old.hosts
		}
		switch dp {
		case Outrigger:
			ps.hosts, err = hosts(key, p, had)
		case Envoy:
			ps.hosts, err = capturedHosts(key, p, had)
		case GRPC:
		}
		if err != nil {
			return nil, err
		}
	}
	if old != nil && slices.Equal(old.port.Endpoints, p.Endpoints) && (dp != Envoy || old.cluster == ps.cluster) {
		ps.endpoints = old.endpoints
		return ps, nil
	}
	if ps.endpoints, err = encode(EndpointType, key, loadAssignment(key, p.Endpoints, dp)); err != nil {
		return nil, err
	}
	if dp == Envoy {
		// Envoy warms a cluster that changed until it is sent the endpoints
		// again, and acknowledges no further clusters meanwhile. So endpoints
		// count as new whenever their cluster is.
		ps.endpoints.Version += contentEnd + ps.cluster.Version
	}
	return ps, nil
}

// buildShape makes everything of a port but what its endpoints are.
func buildShape(key string, svc *mesh.Service, p mesh.Port, dp DataPlane) (*shape, error) {
	s := &shape{reaches: reaches(key, p, p.Routes, dp)}
	var err error
	if s.listeners, err = listeners(svc, p, dp); err != nil {
		return nil, err
	}
	c := cluster(key, p, dp)
	if dp == Envoy && len(p.Identities) > 0 {
		if s.clear, err = encode(ClusterType, key, c); err != nil {
			return nil, err
		}
	}
	if dp == Envoy {
		if s.captured, err = captured(key, svc, p); err != nil {
			return nil, err
		}
		if c := directCluster(key, svc, p); c != nil {
			if s.direct, err = encode(ClusterType, c.GetName(), c); err != nil {
				return nil, err
			}
		}
	}
	if dp != GRPC {
		c.TransportSocketMatches = transportSockets(svc, p)
	}
	if s.cluster, err = encode(ClusterType, key, c); err != nil {
		return nil, err
	}
	if !routed(p) {
		return s, nil
	}
	if s.route, err = encode(RouteType, key, routeConfiguration(key, p.Routes, dp)); err != nil {
		return nil, err
	}
	s.route.Reaches = s.reaches
	for _, consumer := range p.Consumers {
		r, err := encode(RouteType, key, routeConfiguration(key, consumer.Routes, dp))
		if err != nil {
			return nil, err
		}
		r.Reaches = reaches(key, p, consumer.Routes, dp)
		if s.overlays == nil {
			s.overlays = map[string]*Resource{}
		}
		s.overlays[consumer.Namespace] = r
	}
	return s, nil
}

// contentEnd ends the part of a version that is the hash of the content.
const contentEnd = "+"

// SameContent reports whether two versions are of resources with equal content.
func SameContent(a, b string) bool {
	a, _, _ = strings.Cut(a, contentEnd)
	b, _, _ = strings.Cut(b, contentEnd)
	return a == b
}

func sameButEndpoints(a, b *portSet) bool {
	if a.namespace != b.namespace || a.service != b.service || !slices.Equal(a.vips, b.vips) {
		return false
	}
	x, y := a.port, b.port
	x.Endpoints, y.Endpoints = nil, nil
	return reflect.DeepEqual(x, y)
}

// routed reports whether the port has a RouteConfiguration. A gRPC client that
// dials a port of unknown protocol has thereby said what it speaks.
func routed(p mesh.Port) bool { return p.Protocol.MayBeHTTP() }

// reaches lists the clusters that calls to a port with these routes may end in.
func reaches(key string, p mesh.Port, routes []mesh.Route, dp DataPlane) []string {
	var out []string
	if !p.Protocol.IsHTTP() && !p.OnlyServerNames {
		out = append(out, key)
	}
	add := func(backends []mesh.Backend) {
		for _, b := range backends {
			if b.Weight > 0 {
				out = append(out, mesh.Key(b.Namespace, b.Service, b.Port))
			}
		}
	}
	for _, r := range routes {
		if r.Filters == nil {
			add(r.Backends)
			continue
		}
		if r.Filters.Redirect == nil {
			add(r.Backends)
		}
		if dp != GRPC {
			for _, m := range mirrors(r.Filters.Mirrors) {
				out = append(out, m.GetCluster())
			}
		}
	}
	for _, n := range p.ServerNames {
		add(n.Backends)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// encode makes a Resource of a message whose encoding depends on its content
// only.
func encode(typeURL, name string, m proto.Message) (*Resource, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", name, err)
	}
	return &Resource{Name: name, Version: VersionOf(b), Any: &anypb.Any{TypeUrl: typeURL, Value: b}}, nil
}

// packed encodes a message that this package has just made. That it can be
// encoded is an invariant: every string in it is valid UTF-8 by Kubernetes'
// rules for names, or was checked by translate.
func packed(m proto.Message) *anypb.Any {
	a := new(anypb.Any)
	if err := anypb.MarshalFrom(a, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		panic("xds: cannot encode " + string(m.ProtoReflect().Descriptor().FullName()) + ": " + err.Error())
	}
	return a
}

func hostPort(host string, port uint16) string { return host + ":" + strconv.Itoa(int(port)) }

// sorted returns a sorted copy.
func sorted[T cmp.Ordered](in []T) []T { return slices.Sorted(slices.Values(in)) }
