package xds

import (
	"regexp"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/control-plane/internal/mesh"
)

// hostSelectionAttempts is how often a proxy looks for an endpoint that has not
// yet failed this request before it takes any. Of two endpoints a draw misses
// one time in two: with Envoy's example of 5, one retry in 32 would meet the
// endpoint that has just failed; so it is one in 65536.
const hostSelectionAttempts = 16

// routeConfiguration is one virtual host for every authority: which port is
// meant was decided by the listener.
func routeConfiguration(key string, routes []mesh.Route, dp DataPlane) *routev3.RouteConfiguration {
	vh := &routev3.VirtualHost{Name: key, Domains: []string{"*"}}
	for _, r := range routes {
		if out := oneRoute(r, dp); out != nil {
			vh.Routes = append(vh.Routes, out)
		}
	}
	return &routev3.RouteConfiguration{Name: key, VirtualHosts: []*routev3.VirtualHost{vh}}
}

// oneRoute returns nil for a route that no request of this data plane can match.
func oneRoute(r mesh.Route, dp DataPlane) *routev3.Route {
	match := routeMatch(r.Match, dp)
	if match == nil {
		return nil
	}
	out := &routev3.Route{Name: r.Name, Match: match}
	// Header changes stand at one place, so that their order is ours.
	ofBackends := dp != GRPC && changesBackends(r.Backends)
	if dp != GRPC && !ofBackends {
		changeRoute(out, r.Filters)
	}
	if r.Filters != nil && r.Filters.Redirect != nil {
		out.Action = &routev3.Route_Redirect{Redirect: redirect(*r.Filters.Redirect, r.Match.Path)}
		return out
	}
	action := &routev3.RouteAction{}
	var weighted []*routev3.WeightedCluster_ClusterWeight
	for _, b := range r.Backends {
		if b.Weight > 0 {
			w := &routev3.WeightedCluster_ClusterWeight{
				Name: mesh.Key(b.Namespace, b.Service, b.Port), Weight: wrapperspb.UInt32(b.Weight),
			}
			if ofBackends {
				changeBackend(w, r.Filters, b.Filters)
			}
			weighted = append(weighted, w)
		}
	}
	switch {
	case len(weighted) == 0:
		out.Action = &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
			Status: 500,
			Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{
				InlineString: "outrigger: route " + r.Name + " has no usable backend\n",
			}},
		}}
		return out
	case len(weighted) == 1 && !ofBackends:
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: weighted[0].GetName()}
	default:
		action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: &routev3.WeightedCluster{Clusters: weighted}}
	}
	if dp == GRPC {
		if r.Timeout > 0 {
			action.MaxStreamDuration = &routev3.RouteAction_MaxStreamDuration{MaxStreamDuration: durationpb.New(r.Timeout)}
		}
	} else {
		// Absent is 15 s in Envoy; zero is none.
		action.Timeout = durationpb.New(r.Timeout)
		// A backend that names no Service keeps its share (Gateway API).
		action.ClusterNotFoundResponseCode = routev3.RouteAction_INTERNAL_SERVER_ERROR
		out.Metadata = retryMetadata(r.Retry)
		if r.Filters != nil {
			action.RequestMirrorPolicies = mirrors(r.Filters.Mirrors)
			if r.Filters.Rewrite != nil {
				rewrite(action, *r.Filters.Rewrite, r.Match.Path)
			}
		}
	}
	action.RetryPolicy = retryPolicy(r.Retry, dp)
	out.Action = &routev3.Route_Route{Route: action}
	return out
}

// routeMatch returns nil where no request of the data plane can match: gRPC
// calls have no query and are always POST.
func routeMatch(m mesh.Match, dp DataPlane) *routev3.RouteMatch {
	out := &routev3.RouteMatch{}
	switch m.Path.Kind {
	case mesh.Exact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Path.Value}
	case mesh.Regex:
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: m.Path.Value}}
	case mesh.Prefix:
		prefix := strings.TrimRight(m.Path.Value, "/")
		switch {
		case prefix == "":
			out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
		case dp == GRPC: // refuses path_separated_prefix
			out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: regexp.QuoteMeta(prefix) + "(/.*)?"}}
		default:
			out.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: prefix}
		}
	case mesh.Any:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
	}
	switch {
	case m.Method == "":
	case dp != GRPC:
		out.Headers = append(out.Headers, headerMatcher(":method", mesh.Exact, m.Method))
	case m.Method != "POST":
		return nil
	}
	for _, h := range m.Headers {
		out.Headers = append(out.Headers, headerMatcher(h.Name, h.Kind, h.Value))
	}
	if dp == GRPC && len(m.Query) > 0 {
		return nil
	}
	for _, q := range m.Query {
		qm := &routev3.QueryParameterMatcher{Name: q.Name}
		if q.Kind == mesh.Any {
			qm.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: true}
		} else {
			qm.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: stringMatcher(q.Kind, q.Value)}
		}
		out.QueryParameters = append(out.QueryParameters, qm)
	}
	return out
}

func headerMatcher(name string, kind mesh.MatchKind, value string) *routev3.HeaderMatcher {
	if kind == mesh.Any {
		return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	}
	return &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: stringMatcher(kind, value)}}
}

func stringMatcher(kind mesh.MatchKind, value string) *matcherv3.StringMatcher {
	if kind == mesh.Regex {
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: value}}}
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: value}}
}

// grpcRetryWords are the conditions that a gRPC client retries on (gRFC A44).
func grpcRetryWords() []string {
	return []string{"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable"}
}

// grpcMaxRetries: gRPC makes five attempts at most (gRFC A44).
const grpcMaxRetries = 4

// retryPolicy returns nil where nothing is to be retried.
func retryPolicy(r mesh.Retry, dp DataPlane) *routev3.RetryPolicy {
	if r.Attempts == 0 {
		return nil
	}
	on := sorted(r.On)
	if dp == GRPC {
		on = slices.DeleteFunc(on, func(w string) bool { return !slices.Contains(grpcRetryWords(), w) })
	} else if len(r.Status) > 0 {
		on = append(on, "retriable-status-codes")
	}
	if len(on) == 0 && (dp != Outrigger || len(r.IdempotentOn) == 0) {
		return nil
	}
	out := &routev3.RetryPolicy{
		RetryOn: strings.Join(on, ","), NumRetries: wrapperspb.UInt32(r.Attempts), PerTryTimeout: duration(r.PerTryTimeout),
	}
	if r.BackoffBase > 0 {
		out.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{
			BaseInterval: durationpb.New(r.BackoffBase), MaxInterval: duration(max(r.BackoffMax, r.BackoffBase)),
		}
	}
	if dp == GRPC {
		out.NumRetries = wrapperspb.UInt32(min(r.Attempts, grpcMaxRetries))
		out.PerTryTimeout = nil // not implemented there
		return out
	}
	out.RetriableStatusCodes = sorted(r.Status)
	out.HostSelectionRetryMaxAttempts = hostSelectionAttempts
	out.RetryHostPredicate = []*routev3.RetryPolicy_RetryHostPredicate{{
		Name: "envoy.retry_host_predicates.previous_hosts",
		ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{
			TypedConfig: packed(&previoushostsv3.PreviousHostsPredicate{}),
		},
	}}
	return out
}
