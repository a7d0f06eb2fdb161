package discovery

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/outrigger-mesh/outrigger/control-plane/identity"
	"github.com/outrigger-mesh/outrigger/control-plane/internal/xds"
)

// NodeStatus is what is known of one connected data plane.
type NodeStatus struct {
	ID        string        `json:"id"`
	DataPlane xds.DataPlane `json:"dataPlane"`
	// Protocol is delta or sotw.
	Protocol  string    `json:"protocol"`
	Connected time.Time `json:"connected"`
	// Applied: the node has acknowledged, of all that it subscribed to, what is
	// served now, and has refused nothing.
	Applied bool `json:"applied"`
	// Missing names the upstreams of an Envoy that no Service has.
	Missing []string     `json:"missing,omitempty"`
	Types   []TypeStatus `json:"types"`
}

// TypeStatus is the state of one resource type on a node.
type TypeStatus struct {
	Type string `json:"type"` // LDS, RDS, CDS or EDS
	// Version of the last response that was acknowledged.
	Version   string `json:"version,omitempty"`
	Resources int    `json:"resources"`
	// Pending responses have been sent and not been answered.
	Pending int   `json:"pending"`
	Nack    *Nack `json:"nack,omitempty"`
}

// Nack is a response that a data plane refused.
type Nack struct {
	Version string    `json:"version"`
	Reason  string    `json:"reason"`
	Time    time.Time `json:"time"`
	// Resources that were refused and have not been accepted since: name -> version.
	Resources map[string]string `json:"resources"`
}

// Applied counts the connected data planes of a kind that have applied all that
// is served to them.
type Applied struct {
	DataPlane xds.DataPlane `json:"dataPlane"`
	Applied   int           `json:"applied"`
	Total     int           `json:"total"`
	Rejected  int           `json:"rejected"`
}

// maxPending bounds the responses of a type of which a client owes an answer.
// More than a few cannot be owed: a watch opens with the answer to the last.
const maxPending = 16

// streamKey names a stream; SotW and delta count separately.
type streamKey struct {
	delta bool
	id    int64
}

// stream is what is known of one. Its fields are kept by its own lock: thousands of
// streams answer at the same time.
type stream struct {
	connected time.Time
	peer      *identity.Identity // what the client has proved; nil in clear

	mu   sync.Mutex
	node string
	seen *corev3.Node // the last that was looked at
	asker
	client *client // Envoy only; its view is held
	types  map[string]*typeState
}

type typeState struct {
	names   map[string]struct{} // subscribed by name
	version string              // last acknowledged
	acked   map[string]string   // name -> version
	pending map[string]*response
	nack    *Nack
}

type response struct {
	version   string
	resources map[string]string
	removed   []string
	full      bool
	// since is when the oldest update in it was published; zero where it only
	// answers a new subscription.
	since time.Time
}

// tracker follows what each stream has been sent and has answered. It
// implements go-control-plane's callbacks, which run on the streams' own
// goroutines.
type tracker struct {
	cache   *configCache
	log     *slog.Logger
	metrics *metrics
	now     func() time.Time
	limits  Limits

	mu      sync.Mutex
	streams map[streamKey]*stream

	propagation propagation
}

var _ serverv3.Callbacks = (*tracker)(nil)

var errUnknownStream = grpcstatus.Error(codes.Internal, "unknown stream")

func (t *tracker) open(ctx context.Context, k streamKey) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.streams) >= t.limits.Streams {
		t.metrics.refused.WithLabelValues("streams").Inc()
		return grpcstatus.Errorf(codes.ResourceExhausted, "%d data planes are connected, the most that one control plane takes; run more replicas", t.limits.Streams)
	}
	t.streams[k] = &stream{peer: peerOf(ctx), connected: t.now(), types: map[string]*typeState{}}
	return nil
}

func (t *tracker) closed(k streamKey) {
	t.mu.Lock()
	s := t.streams[k]
	delete(t.streams, k)
	t.mu.Unlock()
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ts := s.types[xds.EndpointType]; ts != nil {
		for name := range ts.names {
			t.propagation.leave(s, name)
		}
	}
	if s.client != nil {
		t.cache.disconnect(s.client)
		t.cache.release(s.view)
	}
	if s.node != "" {
		t.metrics.connected.WithLabelValues(string(s.dp)).Dec()
		t.log.Info("data plane disconnected", "xds.node", s.node, "xds.data_plane", s.dp)
	}
}

// introduce takes the node of a stream's first request.
func (t *tracker) introduce(s *stream, node *corev3.Node) error {
	if s.node != "" {
		if node == nil || node == s.seen {
			return nil
		}
		// What is answered is for the node of the request.
		if node.GetId() != s.node || whose(node) != s.asker {
			t.metrics.refused.WithLabelValues("node").Inc()
			return grpcstatus.Errorf(codes.InvalidArgument, "node %s says in a later request that it is %q, or of another kind, namespace or service account: a stream is of one data plane", s.node, node.GetId())
		}
		s.seen = node
		t.cache.knownBy(s.client, node)
		return nil
	}
	if node.GetId() == "" {
		t.metrics.refused.WithLabelValues("node").Inc()
		return grpcstatus.Error(codes.InvalidArgument, "the first request has no node.id: set it in the data plane's bootstrap, as <instance>.<namespace>")
	}
	if err := s.mayBe(node); err != nil {
		t.metrics.refused.WithLabelValues("identity").Inc()
		t.log.Warn("a data plane was refused", "xds.node", node.GetId(), "outrigger.identity", s.peer.SPIFFE(), "error.message", err.Error())
		return err
	}
	s.asker = whose(node)
	if s.dp == xds.Envoy {
		n, err := xds.ParseEnvoyNode(node.GetMetadata())
		if err != nil {
			t.metrics.refused.WithLabelValues("node").Inc()
			return grpcstatus.Errorf(codes.InvalidArgument, "node %s: %v", node.GetId(), err)
		}
		if n.Capture && xds.InboundListenerName(n.Namespace, n.Instance) != s.inbound {
			t.metrics.refused.WithLabelValues("node").Inc()
			return grpcstatus.Errorf(codes.InvalidArgument, "node %s says that it is the pod %s/%s: its id must be <instance>.<namespace>", node.GetId(), n.Namespace, n.Instance)
		}
		if err := t.cache.hold(n); err != nil {
			return grpcstatus.Errorf(codes.Internal, "node %s: %v", node.GetId(), err)
		}
		s.client = t.cache.connect()
		t.cache.knownBy(s.client, node)
	}
	s.node, s.seen = node.GetId(), node
	t.metrics.connected.WithLabelValues(string(s.dp)).Inc()
	t.log.Info("data plane connected", "xds.node", s.node, "xds.data_plane", s.dp, "xds.missing_upstreams", t.cache.missing(s.view))
	return nil
}

func (s *stream) of(typeURL string) *typeState {
	ts := s.types[typeURL]
	if ts == nil {
		ts = &typeState{names: map[string]struct{}{}, acked: map[string]string{}, pending: map[string]*response{}}
		s.types[typeURL] = ts
	}
	return ts
}

func (t *tracker) checkNames(s *stream, ts *typeState, typeURL string, names []string) error {
	if s.dp != xds.Envoy && slices.Contains(names, "*") {
		t.metrics.refused.WithLabelValues("wildcard").Inc()
		return grpcstatus.Errorf(codes.InvalidArgument, "node %s asks for every %s; only an Envoy may: subscribe by name", s.node, shortType(typeURL))
	}
	if len(ts.names) > t.limits.Names {
		t.metrics.refused.WithLabelValues("names").Inc()
		return grpcstatus.Errorf(codes.ResourceExhausted, "node %s subscribes to %d names of %s: at most %d; unsubscribe from destinations that are no longer called", s.node, len(ts.names), shortType(typeURL), t.limits.Names)
	}
	return nil
}

// countForeign counts what a node newly asks for and may not have.
func (t *tracker) countForeign(s *stream, ts *typeState, typeURL string, names []string) {
	for _, name := range names {
		if _, asked := ts.names[name]; !asked && t.cache.foreign(s.asker, typeURL, name) {
			t.metrics.foreign.Inc()
		}
	}
}

// answered records an ACK or NACK.
func (t *tracker) answered(s *stream, ts *typeState, typeURL, nonce string, detail *status.Status) {
	r := ts.pending[nonce]
	if nonce == "" || r == nil {
		return
	}
	delete(ts.pending, nonce)
	short := shortType(typeURL)
	if detail != nil {
		refused := maps.Clone(r.resources)
		if ts.nack != nil {
			maps.Copy(refused, ts.nack.Resources)
		}
		ts.nack = &Nack{Version: r.version, Reason: detail.GetMessage(), Time: t.now(), Resources: refused}
		t.metrics.nacks.WithLabelValues(short).Inc()
		if typeURL == xds.EndpointType {
			for name := range r.resources {
				t.propagation.refused(s, name)
			}
		}
		t.log.Warn("data plane rejected configuration", "xds.node", s.node, "xds.data_plane", s.dp, "xds.type", short,
			"xds.version", r.version, "xds.resources", slices.Sorted(maps.Keys(r.resources)), "error.message", detail.GetMessage())
		return
	}
	t.metrics.acks.WithLabelValues(short).Inc()
	ts.version = r.version
	if r.full {
		clear(ts.acked)
		ts.nack = nil
	}
	for name, version := range r.resources {
		if _, named := ts.names[name]; named || wildcards(typeURL) {
			ts.acked[name] = version // else it has unsubscribed meanwhile
		}
		if typeURL == xds.EndpointType {
			t.propagation.acknowledged(s, name, version, t.now())
		}
		ts.settle(name)
	}
	for _, name := range r.removed {
		delete(ts.acked, name)
		ts.settle(name)
	}
	if !r.since.IsZero() {
		t.metrics.push.Observe(t.now().Sub(r.since).Seconds())
	}
}

// settle forgets that a resource was refused. A Nack that has been shown is
// never changed.
func (ts *typeState) settle(name string) {
	if ts.nack == nil {
		return
	}
	if _, ok := ts.nack.Resources[name]; !ok {
		return
	}
	n := *ts.nack
	n.Resources = maps.Clone(n.Resources)
	delete(n.Resources, name)
	ts.nack = &n
	if len(n.Resources) == 0 {
		ts.nack = nil
	}
}

func (t *tracker) find(k streamKey) *stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.streams[k]
}

// all returns a copy.
func (t *tracker) all() map[streamKey]*stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.streams)
}

// id is that of the node; empty before it has said it.
func (s *stream) id() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node
}

func (t *tracker) sent(k streamKey, typeURL, nonce string, r *response) {
	s := t.find(k)
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ts := s.of(typeURL)
	var news []string
	for name, version := range r.resources {
		if old, had := ts.acked[name]; had && !xds.SameContent(old, version) {
			news = append(news, name)
		}
		if typeURL == xds.EndpointType {
			t.propagation.sent(s, name, version)
		}
	}
	r.since = t.cache.since(s.asker, typeURL, news)
	// What is being taken away does not count as there any more.
	if r.full {
		maps.DeleteFunc(ts.acked, func(name, _ string) bool { _, stays := r.resources[name]; return !stays })
	}
	for _, name := range r.removed {
		delete(ts.acked, name)
	}
	t.cache.acknowledged(s.client, typeURL, ts.acked)
	if len(ts.pending) >= maxPending {
		clear(ts.pending)
	}
	ts.pending[nonce] = r
}

// OnStreamOpen implements the library's callbacks.
func (t *tracker) OnStreamOpen(ctx context.Context, id int64, _ string) error {
	return t.open(ctx, streamKey{false, id})
}

// OnStreamClosed implements the library's callbacks.
func (t *tracker) OnStreamClosed(id int64, _ *corev3.Node) { t.closed(streamKey{false, id}) }

// OnDeltaStreamOpen implements the library's callbacks.
func (t *tracker) OnDeltaStreamOpen(ctx context.Context, id int64, _ string) error {
	return t.open(ctx, streamKey{true, id})
}

// OnDeltaStreamClosed implements the library's callbacks.
func (t *tracker) OnDeltaStreamClosed(id int64, _ *corev3.Node) { t.closed(streamKey{true, id}) }

// receive is what both protocols begin a request with: who asks, and whether for
// a type that is served. It is called with the stream's lock held.
func (t *tracker) receive(s *stream, node *corev3.Node, typeURL string) (*typeState, error) {
	if err := t.introduce(s, node); err != nil {
		return nil, err
	}
	if !slices.Contains(xds.TypeURLs(), typeURL) {
		return nil, errUnservedType(typeURL)
	}
	return s.of(typeURL), nil
}

// prepare makes what there is to be told to nodes of a kind. It may take long, for
// the first of them, and is called without the lock.
func (t *tracker) prepare(node *corev3.Node) error {
	if node.GetId() == "" {
		return nil // none, or it is refused
	}
	if err := t.cache.want(xds.DataPlaneOf(node.GetUserAgentName())); err != nil {
		return grpcstatus.Errorf(codes.Internal, "node %s: %v", node.GetId(), err)
	}
	return nil
}

// OnStreamRequest implements the library's callbacks.
func (t *tracker) OnStreamRequest(id int64, req *discoveryv3.DiscoveryRequest) error {
	if err := t.prepare(req.GetNode()); err != nil {
		return err
	}
	s := t.find(streamKey{false, id})
	if s == nil {
		return errUnknownStream
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ts, err := t.receive(s, req.GetNode(), req.GetTypeUrl())
	if err != nil {
		return err
	}
	t.answered(s, ts, req.GetTypeUrl(), req.GetResponseNonce(), req.GetErrorDetail())
	t.countForeign(s, ts, req.GetTypeUrl(), req.GetResourceNames())
	named := make(map[string]struct{}, len(req.GetResourceNames()))
	for _, name := range req.GetResourceNames() {
		named[name] = struct{}{}
		t.subscribe(s, ts, req.GetTypeUrl(), name)
	}
	for name := range ts.names {
		if _, ok := named[name]; !ok {
			t.unsubscribe(s, ts, req.GetTypeUrl(), name)
		}
	}
	for name := range ts.acked {
		if _, ok := ts.names[name]; !ok && len(ts.names) > 0 {
			delete(ts.acked, name)
		}
	}
	t.cache.acknowledged(s.client, req.GetTypeUrl(), ts.acked)
	return t.checkNames(s, ts, req.GetTypeUrl(), req.GetResourceNames())
}

// OnStreamDeltaRequest implements the library's callbacks.
func (t *tracker) OnStreamDeltaRequest(id int64, req *discoveryv3.DeltaDiscoveryRequest) error {
	if err := t.prepare(req.GetNode()); err != nil {
		return err
	}
	s := t.find(streamKey{true, id})
	if s == nil {
		return errUnknownStream
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ts, err := t.receive(s, req.GetNode(), req.GetTypeUrl())
	if err != nil {
		return err
	}
	// What it brings from an earlier stream, it has acknowledged there.
	if n := len(req.GetInitialResourceVersions()); n > t.limits.Names {
		t.metrics.refused.WithLabelValues("names").Inc()
		return grpcstatus.Errorf(codes.ResourceExhausted, "node %s brings %d initial versions of %s: at most %d", s.node, n, shortType(req.GetTypeUrl()), t.limits.Names)
	}
	maps.Copy(ts.acked, req.GetInitialResourceVersions())
	t.answered(s, ts, req.GetTypeUrl(), req.GetResponseNonce(), req.GetErrorDetail())
	t.countForeign(s, ts, req.GetTypeUrl(), req.GetResourceNamesSubscribe())
	for _, name := range req.GetResourceNamesSubscribe() {
		t.subscribe(s, ts, req.GetTypeUrl(), name)
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		t.unsubscribe(s, ts, req.GetTypeUrl(), name)
		delete(ts.acked, name)
		ts.settle(name)
	}
	t.cache.acknowledged(s.client, req.GetTypeUrl(), ts.acked)
	return t.checkNames(s, ts, req.GetTypeUrl(), req.GetResourceNamesSubscribe())
}

// OnStreamResponse implements the library's callbacks.
func (t *tracker) OnStreamResponse(_ context.Context, id int64, _ *discoveryv3.DiscoveryRequest, resp *discoveryv3.DiscoveryResponse) {
	r := &response{
		version: resp.GetVersionInfo(), resources: map[string]string{},
		full: wildcards(resp.GetTypeUrl()),
	}
	for _, a := range resp.GetResources() {
		r.resources[encodedName(a.GetValue())] = xds.VersionOf(a.GetValue())
	}
	t.sent(streamKey{false, id}, resp.GetTypeUrl(), resp.GetNonce(), r)
}

// OnStreamDeltaResponse implements the library's callbacks.
func (t *tracker) OnStreamDeltaResponse(id int64, _ *discoveryv3.DeltaDiscoveryRequest, resp *discoveryv3.DeltaDiscoveryResponse) {
	r := &response{version: resp.GetSystemVersionInfo(), resources: map[string]string{}, removed: resp.GetRemovedResources()}
	for _, res := range resp.GetResources() {
		r.resources[res.GetName()] = res.GetVersion()
	}
	t.sent(streamKey{true, id}, resp.GetTypeUrl(), resp.GetNonce(), r)
}

// OnFetchRequest implements the library's callbacks; REST is not served.
func (t *tracker) OnFetchRequest(context.Context, *discoveryv3.DiscoveryRequest) error {
	return grpcstatus.Error(codes.Unimplemented, "xDS over REST is not served: use ADS over gRPC")
}

// OnFetchResponse implements the library's callbacks; REST is not served.
func (t *tracker) OnFetchResponse(*discoveryv3.DiscoveryRequest, *discoveryv3.DiscoveryResponse) {}

// status is a snapshot, by data plane and node id.
func (t *tracker) status() []NodeStatus {
	streams := t.all()
	out := make([]NodeStatus, 0, len(streams))
	for k, s := range streams {
		if n, ok := t.statusOf(k, s); ok {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b NodeStatus) int {
		return cmp.Or(strings.Compare(string(a.DataPlane), string(b.DataPlane)), strings.Compare(a.ID, b.ID), a.Connected.Compare(b.Connected))
	})
	return out
}

// statusOf is that of one stream; none where it has not said yet which node it is.
func (t *tracker) statusOf(k streamKey, s *stream) (NodeStatus, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.node == "" {
		return NodeStatus{}, false
	}
	n := NodeStatus{
		ID: s.node, DataPlane: s.dp, Protocol: "sotw", Connected: s.connected, Missing: t.cache.missing(s.view), Applied: !t.cache.holding(s.client),
		Types: make([]TypeStatus, 0, len(s.types)),
	}
	if k.delta {
		n.Protocol = "delta"
	}
	for _, typeURL := range xds.TypeURLs() {
		ts := s.types[typeURL]
		if ts == nil {
			continue
		}
		n.Types = append(n.Types, TypeStatus{
			Type: shortType(typeURL), Version: ts.version, Resources: len(ts.acked), Pending: len(ts.pending), Nack: ts.nack,
		})
		if ts.nack != nil || len(ts.pending) > 0 {
			n.Applied = false
		}
		for name, version := range ts.acked {
			if cur, ok := t.cache.current(s.asker, typeURL, name); ok && !xds.SameContent(cur.Version, version) {
				n.Applied = false
			}
		}
	}
	return n, true
}

// wildcards reports whether a type may be asked for without names, and is sent
// in full in SotW.
func wildcards(typeURL string) bool { return typeURL == xds.ListenerType || typeURL == xds.ClusterType }

// shortType is the word that people use for a type.
func shortType(typeURL string) string {
	switch typeURL {
	case xds.ListenerType:
		return "LDS"
	case xds.RouteType:
		return "RDS"
	case xds.ClusterType:
		return "CDS"
	case xds.EndpointType:
		return "EDS"
	}
	return fmt.Sprintf("%.64q", typeURL)
}

// encodedName reads the name from an encoded resource: it is field 1 of all
// four types.
func encodedName(b []byte) string {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ""
		}
		b = b[n:]
		if num == 1 && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return ""
			}
			return string(v)
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return ""
		}
		b = b[n:]
	}
	return ""
}
