package xdsclient

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/balance"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/outlier"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/retry"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/table"
)

// The decoders below are pure. What the table cannot say, and what would change
// which requests go where if it were left out, is an error that names the
// field; what only tunes is left out.

// cluster is a Cluster resource; its endpoints arrive under the name eds.
type cluster struct {
	table.Cluster
	eds string
}

func decodeRoutes(b []byte) (*route.Config, error) {
	var c routev3.RouteConfiguration
	if err := proto.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	return routeConfig(&c)
}

func routeConfig(in *routev3.RouteConfiguration) (*route.Config, error) {
	hosts := in.GetVirtualHosts()
	at := slices.IndexFunc(hosts, func(vh *routev3.VirtualHost) bool { return slices.Contains(vh.GetDomains(), "*") })
	switch {
	case len(hosts) == 1:
		at = 0
	case at < 0:
		return nil, fmt.Errorf("virtual_hosts: of %d none has the domain \"*\"; the authority was decided by the listener", len(hosts))
	}
	vh := hosts[at]
	out := &route.Config{Name: in.GetName(), Routes: make([]route.Route, 0, len(vh.GetRoutes()))}
	for i, r := range vh.GetRoutes() {
		decoded, err := oneRoute(r, vh.GetRetryPolicy())
		if err != nil {
			return nil, fmt.Errorf("virtual_hosts[%d].routes[%d](%s).%w", at, i, r.GetName(), err)
		}
		out.Routes = append(out.Routes, decoded)
	}
	return out, nil
}

func oneRoute(in *routev3.Route, inherited *routev3.RetryPolicy) (route.Route, error) {
	out := route.Route{Name: in.GetName()}
	var err error
	if out.Match, err = routeMatch(in.GetMatch()); err != nil {
		return out, fmt.Errorf("match.%w", err)
	}
	switch a := in.GetAction().(type) {
	case *routev3.Route_DirectResponse:
		if s := a.DirectResponse.GetStatus(); s != 500 {
			return out, fmt.Errorf("direct_response.status: %d is not supported; 500 is", s)
		}
		return out, nil
	case *routev3.Route_Route:
		if err := routeAction(&out, a.Route); err != nil {
			return out, fmt.Errorf("route.%w", err)
		}
		policy := a.Route.GetRetryPolicy()
		if policy == nil {
			policy = inherited
		}
		if out.Retry, err = retryPolicy(policy, in.GetMetadata()); err != nil {
			return out, err
		}
		return out, mergeChanges(&out, in)
	case *routev3.Route_Redirect:
		if out.Redirect, err = redirect(&out.Match, a.Redirect); err != nil {
			return out, fmt.Errorf("redirect.%w", err)
		}
		_, out.Redirect.Response, err = headerChanges(in)
		return out, err
	}
	return out, fmt.Errorf("action: %T is not supported; route, redirect and direct_response are", in.GetAction())
}

func routeAction(out *route.Route, in *routev3.RouteAction) error {
	switch s := in.GetClusterSpecifier().(type) {
	case *routev3.RouteAction_Cluster:
		if s.Cluster == "" {
			return errors.New("cluster: it is empty")
		}
		out.Clusters = []route.Weighted{{Cluster: s.Cluster, Weight: 1}}
	case *routev3.RouteAction_WeightedClusters:
		for i, w := range s.WeightedClusters.GetClusters() {
			if w.GetName() == "" {
				return fmt.Errorf("weighted_clusters.clusters[%d].name: it is empty", i)
			}
			out.Clusters = append(out.Clusters, route.Weighted{Cluster: w.GetName(), Weight: w.GetWeight().GetValue()})
		}
	default:
		return fmt.Errorf("cluster_specifier: %T is not supported; cluster and weighted_clusters are", s)
	}
	err := rewrites(out, in)
	if err != nil {
		return err
	}
	out.Timeout, err = duration("timeout", in.GetTimeout(), 0)
	return err
}

func routeMatch(in *routev3.RouteMatch) (route.Match, error) {
	var out route.Match
	var err error
	switch p := in.GetPathSpecifier().(type) {
	case *routev3.RouteMatch_Path:
		if out.Path = p.Path; p.Path == "" {
			return out, errors.New("path: it is empty")
		}
	case *routev3.RouteMatch_PathSeparatedPrefix:
		if out.Prefix = p.PathSeparatedPrefix; out.Prefix == "" {
			return out, errors.New("path_separated_prefix: it is empty")
		}
	case *routev3.RouteMatch_Prefix:
		// Unlike path_separated_prefix it may end within a path element.
		if p.Prefix != "" && p.Prefix != "/" {
			out.PathRegex, err = compile("prefix", regexp.QuoteMeta(p.Prefix)+`(?s:.*)`)
		}
	case *routev3.RouteMatch_SafeRegex:
		out.PathRegex, err = compile("safe_regex", p.SafeRegex.GetRegex())
	default:
		err = fmt.Errorf("path_specifier: %T is not supported", p)
	}
	switch {
	case err != nil:
		return out, err
	case in.GetCaseSensitive() != nil && !in.GetCaseSensitive().GetValue():
		return out, errors.New("case_sensitive: false is not supported")
	case in.GetRuntimeFraction() != nil:
		return out, errors.New("runtime_fraction: it is not supported; use weighted_clusters")
	case in.GetGrpc() != nil, in.GetTlsContext() != nil, len(in.GetCookies()) > 0, len(in.GetDynamicMetadata()) > 0, len(in.GetFilterState()) > 0:
		return out, errors.New("grpc, tls_context, cookies, dynamic_metadata, filter_state: they are not supported")
	}
	for i, h := range in.GetHeaders() {
		v, err := headerMatch(h)
		if err != nil {
			return out, fmt.Errorf("headers[%d](%s).%w", i, h.GetName(), err)
		}
		if v.Name == ":method" {
			if v.Regex != nil || out.Method != "" {
				return out, fmt.Errorf("headers[%d](:method): one exact match is supported", i)
			}
			out.Method = v.Exact
			continue
		}
		if v.Name == "" || v.Name[0] == ':' {
			return out, fmt.Errorf("headers[%d](%s): of the pseudo-headers only :method is supported", i, v.Name)
		}
		out.Headers = append(out.Headers, v)
	}
	for i, q := range in.GetQueryParameters() {
		v := route.Value{Name: q.GetName()}
		switch m := q.GetQueryParameterMatchSpecifier().(type) {
		case *routev3.QueryParameterMatcher_StringMatch:
			v, err = stringMatch(v, m.StringMatch)
		case *routev3.QueryParameterMatcher_PresentMatch:
			v, err = present(v, m.PresentMatch)
		default:
			v, err = present(v, true)
		}
		if err != nil {
			return out, fmt.Errorf("query_parameters[%d](%s).%w", i, q.GetName(), err)
		}
		out.Query = append(out.Query, v)
	}
	return out, nil
}

func headerMatch(in *routev3.HeaderMatcher) (route.Value, error) {
	v := route.Value{Name: strings.ToLower(in.GetName())}
	if in.GetInvertMatch() {
		return v, errors.New("invert_match: it is not supported")
	}
	if in.GetTreatMissingHeaderAsEmpty() {
		return v, errors.New("treat_missing_header_as_empty: it is not supported")
	}
	switch m := in.GetHeaderMatchSpecifier().(type) {
	case *routev3.HeaderMatcher_StringMatch:
		return stringMatch(v, m.StringMatch)
	case *routev3.HeaderMatcher_PresentMatch:
		return present(v, m.PresentMatch)
	case nil:
		return present(v, true)
	default:
		return v, fmt.Errorf("header_match_specifier: %T is not supported; string_match and present_match are", m)
	}
}

func present(v route.Value, want bool) (route.Value, error) {
	if !want {
		return v, errors.New("present_match: false is not supported")
	}
	var err error
	v.Regex, err = compile("present_match", `(?s:.*)`)
	return v, err
}

func stringMatch(v route.Value, m *matcherv3.StringMatcher) (route.Value, error) {
	const anything = `(?s:.*)`
	var expr string
	switch p := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		if !m.GetIgnoreCase() {
			v.Exact = p.Exact
			return v, nil
		}
		expr = regexp.QuoteMeta(p.Exact)
	case *matcherv3.StringMatcher_Prefix:
		expr = regexp.QuoteMeta(p.Prefix) + anything
	case *matcherv3.StringMatcher_Suffix:
		expr = anything + regexp.QuoteMeta(p.Suffix)
	case *matcherv3.StringMatcher_Contains:
		expr = anything + regexp.QuoteMeta(p.Contains) + anything
	case *matcherv3.StringMatcher_SafeRegex:
		var err error
		v.Regex, err = compile("string_match.safe_regex", p.SafeRegex.GetRegex())
		return v, err
	default:
		return v, fmt.Errorf("string_match: %T is not supported", p)
	}
	if m.GetIgnoreCase() {
		expr = `(?i:` + expr + `)`
	}
	var err error
	v.Regex, err = compile("string_match", expr)
	return v, err
}

func compile(field, expr string) (*regexp.Regexp, error) {
	re, err := route.Compile(expr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return re, nil
}

// retryPolicy joins Envoy's policy and our metadata. Without a policy nothing is
// retried, whatever the metadata says.
func retryPolicy(in *routev3.RetryPolicy, meta *corev3.Metadata) (retry.Policy, error) {
	out := retry.Policy{}
	if err := retryMetadata(meta, &out); err != nil {
		return out, err
	}
	if in == nil {
		return out, nil
	}
	fail := func(err error) (retry.Policy, error) { return out, fmt.Errorf("route.retry_policy.%w", err) }
	var words []string
	status := false
	for w := range strings.SplitSeq(in.GetRetryOn(), ",") {
		switch w = strings.TrimSpace(w); w {
		case "":
		case "retriable-status-codes":
			status = true
		default:
			words = append(words, w)
		}
	}
	var err error
	if out.On, err = retry.ParseConditions(words); err != nil {
		return fail(fmt.Errorf("retry_on: %w", err))
	}
	if status {
		for _, s := range in.GetRetriableStatusCodes() {
			if s < 100 || s > 599 {
				return fail(fmt.Errorf("retriable_status_codes: %d is not a status", s))
			}
			out.Status = append(out.Status, int(s))
		}
		slices.Sort(out.Status)
	}
	out.Attempts = 1 // Envoy's default
	if n := in.GetNumRetries(); n != nil {
		out.Attempts = int(min(n.GetValue(), maxAttempts))
	}
	if out.PerTryTimeout, err = duration("per_try_timeout", in.GetPerTryTimeout(), 0); err != nil {
		return fail(err)
	}
	if b := in.GetRetryBackOff(); b != nil {
		if out.BackoffBase, err = duration("retry_back_off.base_interval", b.GetBaseInterval(), 0); err != nil {
			return fail(err)
		}
		if out.BackoffMax, err = duration("retry_back_off.max_interval", b.GetMaxInterval(), 0); err != nil {
			return fail(err)
		}
	}
	return out, nil
}

// maxAttempts bounds num_retries, as the RetryPolicy object does.
const maxAttempts = 10

func decodeCluster(b []byte) (cluster, error) {
	var c clusterv3.Cluster
	var out cluster
	if err := proto.Unmarshal(b, &c); err != nil {
		return out, err
	}
	if c.GetType() != clusterv3.Cluster_EDS || c.GetClusterType() != nil {
		return out, fmt.Errorf("type: %s is not supported; EDS is", c.GetType())
	}
	out.Name = c.GetName()
	if out.eds = c.GetEdsClusterConfig().GetServiceName(); out.eds == "" {
		out.eds = c.GetName()
	}
	if out.eds == "" {
		return out, errors.New("name: it is empty")
	}
	var err error
	if out.HTTP2, err = speaksHTTP2(c.GetTypedExtensionProtocolOptions()); err != nil {
		return out, err
	}
	if err := thresholds(c.GetCircuitBreakers(), &out.Cluster); err != nil {
		return out, fmt.Errorf("circuit_breakers.%w", err)
	}
	if out.Outlier, err = outlierDetection(c.GetOutlierDetection()); err != nil {
		return out, fmt.Errorf("outlier_detection.%w", err)
	}
	if err := transportSockets(&c, &out.Cluster); err != nil {
		return out, err
	}
	if err := protocolOptions(&c, &out.Cluster); err != nil {
		return out, err
	}
	return out, breakerMetadata(c.GetMetadata(), &out.Cluster)
}

// speaksHTTP2 reads which version of HTTP the endpoints are spoken to in.
func speaksHTTP2(options map[string]*anypb.Any) (bool, error) {
	const key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	a := options[key]
	if a == nil {
		return false, nil
	}
	var o httpv3.HttpProtocolOptions
	if err := a.UnmarshalTo(&o); err != nil {
		return false, fmt.Errorf("typed_extension_protocol_options[%s]: %w", key, err)
	}
	switch c := o.GetExplicitHttpConfig().GetProtocolConfig().(type) {
	case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions:
		return true, nil
	case *httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions, nil:
		return false, nil
	default:
		return false, fmt.Errorf("typed_extension_protocol_options[%s].explicit_http_config: %T is not supported; http_protocol_options and http2_protocol_options are", key, c)
	}
}

// Envoy's retry budget where the control plane says none.
const (
	defaultBudgetPercent     = 20
	defaultBudgetConcurrency = 3
)

func thresholds(in *clusterv3.CircuitBreakers, out *table.Cluster) error {
	out.Budget = retry.Budget{Percent: defaultBudgetPercent, MinConcurrency: defaultBudgetConcurrency}
	for i, t := range in.GetThresholds() {
		if t.GetPriority() != corev3.RoutingPriority_DEFAULT {
			continue // nothing of ours has a priority
		}
		for _, l := range []struct {
			field string
			in    *wrapperspb.UInt32Value
			out   *uint32
		}{
			{"max_connections", t.GetMaxConnections(), &out.Limits.Connections},
			{"max_pending_requests", t.GetMaxPendingRequests(), &out.Limits.PendingRequests},
			{"max_requests", t.GetMaxRequests(), &out.Limits.Requests},
			{"max_retries", t.GetMaxRetries(), &out.Limits.Retries},
		} {
			if l.in != nil && l.in.GetValue() == 0 {
				return fmt.Errorf("thresholds[%d].%s: 0 would reject everything; leave it out, or give at least 1", i, l.field)
			}
			if v := l.in.GetValue(); v != math.MaxUint32 {
				*l.out = v
			}
		}
		b := t.GetRetryBudget()
		if b == nil {
			continue
		}
		if p := b.GetBudgetPercent(); p != nil {
			if !(p.GetValue() >= 0 && p.GetValue() <= 100) {
				return fmt.Errorf("thresholds[%d].retry_budget.budget_percent: %v is not 0 to 100", i, p.GetValue())
			}
			out.Budget.Percent = uint32(math.Round(p.GetValue()))
		}
		if m := b.GetMinRetryConcurrency(); m != nil {
			out.Budget.MinConcurrency = m.GetValue()
		}
	}
	return nil
}

// outlierDetection reads Envoy's message with Envoy's defaults. A rule that is
// not enforced is not used; where none is left there is no detection. Enforcing
// a rule by chance (1 to 99 percent) is taken for always.
func outlierDetection(in *clusterv3.OutlierDetection) (*outlier.Policy, error) {
	if in == nil {
		return nil, nil // not a failure: the cluster has no detection
	}
	or := func(v *wrapperspb.UInt32Value, def uint32) uint32 {
		if v == nil {
			return def
		}
		return v.GetValue()
	}
	var out outlier.Policy
	var err error
	if out.Interval, err = duration("interval", in.GetInterval(), 10*time.Second); err != nil {
		return nil, err
	}
	if out.BaseEjectionTime, err = duration("base_ejection_time", in.GetBaseEjectionTime(), 30*time.Second); err != nil {
		return nil, err
	}
	out.MaxEjectionPercent = min(or(in.GetMaxEjectionPercent(), 10), 100)
	if or(in.GetEnforcingConsecutive_5Xx(), 100) > 0 {
		out.Consecutive5xx = or(in.GetConsecutive_5Xx(), 5)
	}
	if or(in.GetEnforcingConsecutiveGatewayFailure(), 0) > 0 {
		out.ConsecutiveGatewayErrors = or(in.GetConsecutiveGatewayFailure(), 5)
	}
	if or(in.GetEnforcingFailurePercentage(), 0) > 0 {
		out.FailurePercentage = outlier.FailurePercentage{
			Threshold:     or(in.GetFailurePercentageThreshold(), 85),
			MinimumHosts:  or(in.GetFailurePercentageMinimumHosts(), 5),
			RequestVolume: or(in.GetFailurePercentageRequestVolume(), 50),
		}
	}
	if out.Consecutive5xx == 0 && out.ConsecutiveGatewayErrors == 0 && out.FailurePercentage.Threshold == 0 {
		return nil, nil // nothing is enforced
	}
	return &out, nil
}

func decodeEndpoints(b []byte) ([]balance.Endpoint, error) {
	var cla endpointv3.ClusterLoadAssignment
	if err := proto.Unmarshal(b, &cla); err != nil {
		return nil, err
	}
	var out []balance.Endpoint
	seen := map[netip.AddrPort]bool{}
	for i, l := range cla.GetEndpoints() {
		if l.GetPriority() != 0 {
			return nil, fmt.Errorf("endpoints[%d].priority: %d is not supported; 0 is", i, l.GetPriority())
		}
		for j, e := range l.GetLbEndpoints() {
			ep, err := endpoint(e)
			if err != nil {
				return nil, fmt.Errorf("endpoints[%d].lb_endpoints[%d].%w", i, j, err)
			}
			if seen[ep.Address] {
				continue
			}
			seen[ep.Address] = true
			ep.Zone = l.GetLocality().GetZone()
			out = append(out, ep)
		}
	}
	return out, nil
}

func endpoint(in *endpointv3.LbEndpoint) (balance.Endpoint, error) {
	sa := in.GetEndpoint().GetAddress().GetSocketAddress()
	if sa == nil {
		return balance.Endpoint{}, errors.New("endpoint.address.socket_address: it is missing")
	}
	ip, err := netip.ParseAddr(sa.GetAddress())
	if err != nil {
		return balance.Endpoint{}, fmt.Errorf("endpoint.address.socket_address.address: %q is not an IP address", sa.GetAddress())
	}
	port := sa.GetPortValue()
	if port == 0 || port > math.MaxUint16 {
		return balance.Endpoint{}, fmt.Errorf("endpoint.address.socket_address.port_value: %d is not 1 to 65535", port)
	}
	out := balance.Endpoint{Address: netip.AddrPortFrom(ip.Unmap(), uint16(port)), Weight: 1}
	switch in.GetHealthStatus() {
	case corev3.HealthStatus_UNKNOWN, corev3.HealthStatus_HEALTHY, corev3.HealthStatus_DEGRADED:
		out.Healthy = true
	default:
	}
	if w := in.GetLoadBalancingWeight(); w != nil {
		out.Weight = max(w.GetValue(), 1)
	}
	if err := endpointTLS(in.GetMetadata(), &out); err != nil {
		return out, err
	}
	return out, endpointMetadata(in.GetMetadata(), &out)
}

// duration reads a duration that must not be negative; def where it is absent.
func duration(field string, in *durationpb.Duration, def time.Duration) (time.Duration, error) {
	if in == nil {
		return def, nil
	}
	if err := in.CheckValid(); err != nil {
		return 0, fmt.Errorf("%s: %w", field, err)
	}
	d := in.AsDuration()
	if d < 0 {
		return 0, fmt.Errorf("%s: %v is negative", field, d)
	}
	return d, nil
}
