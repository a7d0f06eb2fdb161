package xdsclient

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"github.com/outrigger-mesh/outrigger/sidecar/internal/http1"
	"github.com/outrigger-mesh/outrigger/sidecar/internal/route"
)

// Limits of what a route changes.
const (
	maxChanges = 64 // of header fields
	maxMirrors = 4
)

// changesHeaders is a message with header changes: a route, or one of its
// weighted clusters.
type changesHeaders interface {
	GetRequestHeadersToAdd() []*corev3.HeaderValueOption
	GetRequestHeadersToRemove() []string
	GetResponseHeadersToAdd() []*corev3.HeaderValueOption
	GetResponseHeadersToRemove() []string
}

// headerChanges reads both directions.
func headerChanges(in changesHeaders) (request, response route.Change, err error) {
	if request, err = headerChange(in.GetRequestHeadersToAdd(), in.GetRequestHeadersToRemove()); err != nil {
		return request, response, fmt.Errorf("request_headers_to_%w", err)
	}
	if response, err = headerChange(in.GetResponseHeadersToAdd(), in.GetResponseHeadersToRemove()); err != nil {
		return request, response, fmt.Errorf("response_headers_to_%w", err)
	}
	return request, response, nil
}

func headerChange(add []*corev3.HeaderValueOption, remove []string) (route.Change, error) {
	var out route.Change
	if n := len(add) + len(remove); n > maxChanges {
		return out, fmt.Errorf("add: %d fields are changed; at most %d", n, maxChanges)
	}
	name := func(s string) (string, error) {
		s = strings.ToLower(s)
		switch {
		case s == "" || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("\"(),/:;<=>?@[\\]{}", r) }):
			return "", fmt.Errorf("%.100q is not a field name", s)
		case s == "host":
			return "", errors.New("host is changed by host_rewrite_literal")
		}
		return s, nil
	}
	for i, h := range add {
		n, err := name(h.GetHeader().GetKey())
		if err != nil {
			return out, fmt.Errorf("add[%d]: %w", i, err)
		}
		value := h.GetHeader().GetRawValue()
		if len(value) == 0 {
			value = []byte(h.GetHeader().GetValue())
		}
		if slices.ContainsFunc(value, func(c byte) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
			return out, fmt.Errorf("add[%d](%s): the value has a control character", i, n)
		}
		pair := http1.Pair{Name: n, Value: literal(value)}
		switch a := h.GetAppendAction(); a {
		case corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD:
			out.Set = append(out.Set, pair)
		case corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD:
			out.Add = append(out.Add, pair)
		default:
			return out, fmt.Errorf("add[%d](%s).append_action: %s is not supported", i, n, a)
		}
	}
	for i, r := range remove {
		n, err := name(r)
		if err != nil {
			return out, fmt.Errorf("remove[%d]: %w", i, err)
		}
		out.Remove = append(out.Remove, n)
	}
	return out, nil
}

// literal undoes Envoy's escape of '%', which begins a command there.
func literal(value []byte) []byte { return []byte(strings.ReplaceAll(string(value), "%%", "%")) }

// mergeChanges gives each cluster of the route what the route and the cluster say.
func mergeChanges(out *route.Route, in *routev3.Route) error {
	request, response, err := headerChanges(in)
	if err != nil {
		return err
	}
	weighted := in.GetRoute().GetWeightedClusters().GetClusters()
	for i := range out.Clusters {
		req, resp := request, response
		if i < len(weighted) {
			ofCluster, fromCluster, err := headerChanges(weighted[i])
			if err != nil {
				return fmt.Errorf("route.weighted_clusters.clusters[%d].%w", i, err)
			}
			req, resp = request.Then(ofCluster), response.Then(fromCluster)
		}
		if !req.Empty() {
			out.Clusters[i].Request = &req
		}
		if !resp.Empty() {
			out.Clusters[i].Response = &resp
		}
	}
	return nil
}

// rewrites reads what the cluster is asked for instead.
func rewrites(out *route.Route, in *routev3.RouteAction) error {
	switch h := in.GetHostRewriteSpecifier().(type) {
	case nil:
	case *routev3.RouteAction_HostRewriteLiteral:
		if !http1.ValidHost([]byte(h.HostRewriteLiteral)) || h.HostRewriteLiteral == "" {
			return fmt.Errorf("host_rewrite_literal: %.100q is not a host", h.HostRewriteLiteral)
		}
		out.Host = []byte(h.HostRewriteLiteral)
	default:
		return fmt.Errorf("host_rewrite_specifier: %T is not supported; host_rewrite_literal is", h)
	}
	if in.GetPathRewritePolicy() != nil || in.GetPathRewrite() != "" {
		return errors.New("path_rewrite_policy, path_rewrite: they are not supported; prefix_rewrite and regex_rewrite are")
	}
	var err error
	out.Path, err = pathRewrite(&out.Match, in.GetPrefixRewrite(), in.GetRegexRewrite())
	if err != nil {
		return err
	}
	if n := len(in.GetRequestMirrorPolicies()); n > maxMirrors {
		return fmt.Errorf("request_mirror_policies: %d; at most %d", n, maxMirrors)
	}
	for i, m := range in.GetRequestMirrorPolicies() {
		if m.GetCluster() == "" {
			return fmt.Errorf("request_mirror_policies[%d].cluster: it is empty", i)
		}
		mirror := route.Mirror{Cluster: m.GetCluster(), Numerator: 1, Denominator: 1}
		if f := m.GetRuntimeFraction().GetDefaultValue(); f != nil {
			mirror.Numerator = f.GetNumerator()
			switch f.GetDenominator() {
			case typev3.FractionalPercent_HUNDRED:
				mirror.Denominator = 100
			case typev3.FractionalPercent_TEN_THOUSAND:
				mirror.Denominator = 10_000
			case typev3.FractionalPercent_MILLION:
				mirror.Denominator = 1_000_000
			default:
				return fmt.Errorf("request_mirror_policies[%d].runtime_fraction.default_value.denominator: %s is not known", i, f.GetDenominator())
			}
		}
		out.Mirrors = append(out.Mirrors, mirror)
	}
	return nil
}

// pathRewrite is nil where the path stays.
func pathRewrite(m *route.Match, prefix string, regex *matcherv3.RegexMatchAndSubstitute) (*route.PathRewrite, error) {
	switch {
	case prefix != "" && regex != nil:
		return nil, errors.New("prefix_rewrite and regex_rewrite: one of them")
	case prefix != "":
		if strings.ContainsAny(prefix, "?#") || prefix[0] != '/' {
			return nil, fmt.Errorf("prefix_rewrite: %.100q is not a path", prefix)
		}
		switch {
		case m.Path != "": // the whole of it is the prefix
			return &route.PathRewrite{Full: prefix}, nil
		case m.Prefix != "":
			return &route.PathRewrite{From: strings.TrimRight(m.Prefix, "/"), Prefix: strings.TrimRight(prefix, "/")}, nil
		case m.PathRegex == nil: // every path begins with "/"
			return &route.PathRewrite{Prefix: strings.TrimRight(prefix, "/")}, nil
		}
		return nil, errors.New("prefix_rewrite: the match names no prefix")
	case regex != nil:
		expr := regex.GetPattern().GetRegex()
		if len(expr) > route.MaxRegex {
			return nil, fmt.Errorf("regex_rewrite.pattern: it has %d bytes; at most %d", len(expr), route.MaxRegex)
		}
		re, err := route.CompilePart(expr)
		if err != nil {
			return nil, fmt.Errorf("regex_rewrite.pattern: %w", err)
		}
		return &route.PathRewrite{Regex: re, Substitution: route.Substitution(regex.GetSubstitution())}, nil
	}
	return nil, nil //nolint:nilnil // no rewrite
}

func redirect(m *route.Match, in *routev3.RedirectAction) (*route.Redirect, error) {
	out := &route.Redirect{Host: in.GetHostRedirect()}
	if in.GetStripQuery() {
		return nil, errors.New("strip_query: it is not supported")
	}
	if out.Host != "" && !http1.ValidHost([]byte(out.Host)) {
		return nil, fmt.Errorf("host_redirect: %.100q is not a host", out.Host)
	}
	if p := in.GetPortRedirect(); p > 65535 {
		return nil, fmt.Errorf("port_redirect: %d is not a port", p)
	}
	out.Port = uint16(in.GetPortRedirect())
	switch s := in.GetSchemeRewriteSpecifier().(type) {
	case nil:
	case *routev3.RedirectAction_HttpsRedirect:
		if s.HttpsRedirect {
			out.Scheme = "https"
		}
	case *routev3.RedirectAction_SchemeRedirect:
		if out.Scheme = s.SchemeRedirect; out.Scheme != "http" && out.Scheme != "https" {
			return nil, fmt.Errorf("scheme_redirect: %.100q is neither http nor https", out.Scheme)
		}
	}
	var err error
	switch p := in.GetPathRewriteSpecifier().(type) {
	case nil:
	case *routev3.RedirectAction_PathRedirect:
		if p.PathRedirect == "" || p.PathRedirect[0] != '/' || strings.ContainsFunc(p.PathRedirect, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
			return nil, fmt.Errorf("path_redirect: %.100q is not a path", p.PathRedirect)
		}
		out.Path = &route.PathRewrite{Full: p.PathRedirect}
	case *routev3.RedirectAction_PrefixRewrite:
		out.Path, err = pathRewrite(m, p.PrefixRewrite, nil)
	case *routev3.RedirectAction_RegexRewrite:
		out.Path, err = pathRewrite(m, "", p.RegexRewrite)
	}
	if err != nil {
		return nil, err
	}
	switch in.GetResponseCode() {
	case routev3.RedirectAction_MOVED_PERMANENTLY:
		out.Status = 301
	case routev3.RedirectAction_FOUND:
		out.Status = 302
	case routev3.RedirectAction_SEE_OTHER:
		out.Status = 303
	case routev3.RedirectAction_TEMPORARY_REDIRECT:
		out.Status = 307
	case routev3.RedirectAction_PERMANENT_REDIRECT:
		out.Status = 308
	default:
		return nil, fmt.Errorf("response_code: %s is not known", in.GetResponseCode())
	}
	return out, nil
}
